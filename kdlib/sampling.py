"""Which examples, in which order, at which step: a plan that is a pure function of its seed.

Batches are cut from one endless stream of passes, each pass a fresh permutation of the training
set. Every batch has exactly `batch_size` examples, so that a budget of K steps is K * batch_size
samples whatever the size of the subset, every example is seen once per pass, and visit counts never
differ by more than one. A batch may hold the end of one pass and the start of the next, and of a
subset smaller than a batch the same example twice.
"""

from dataclasses import dataclass

import numpy as np
import torch

from kdlib.cache import Cache
from kdlib.seeds import generator


def split_ids(n_examples: int, n_validation: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Hold out validation examples from a training split.

    Args:
        n_examples: Size of the training split; ids are [0, n_examples).
        n_validation: How many to hold out, in (0, n_examples).
        seed: The study's split seed.

    Returns: (training ids, validation ids), both sorted int64, disjoint, together all ids.
    Raises: ValueError when nothing would be left on one side.
    """
    if not 0 < n_validation < n_examples:
        raise ValueError(
            f"n_validation is {n_validation} of {n_examples} training images; "
            "expected at least one on each side (study: data.n_validation)"
        )
    order = generator(seed, "split").permutation(n_examples)
    return np.sort(order[n_validation:]), np.sort(order[:n_validation])


@dataclass(frozen=True)
class Batch:
    """One step's examples.

    Attributes:
        example_ids: (B,) int64.
        ranks: (B,) int64, place of each id among the plan's sorted ids.
        passes: (B,) int64, which pass over the training set each example belongs to.
        images: (B, C, H, W) uint8.
        labels: (B,) int64.
        teacher_logits: (B, C) float32, or None.
    """

    example_ids: torch.Tensor
    ranks: torch.Tensor
    passes: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    teacher_logits: torch.Tensor | None


class Plan:
    """The order in which a run sees its examples.

    Attributes:
        example_ids: (N,) int64, sorted: the training set.
        batch_size: Examples per step.
        n_steps: Optimiser steps in all.
    """

    def __init__(self, example_ids: np.ndarray, batch_size: int, n_steps: int, seed: int) -> None:
        """Raises: ValueError when there is nothing to draw from, or an id stands twice."""
        ids = np.asarray(example_ids, dtype=np.int64)
        if len(ids) == 0 or np.any(np.diff(ids) <= 0):
            raise ValueError(f"a plan needs distinct, sorted example ids; got {len(ids)} ids")
        self.example_ids, self.batch_size, self.n_steps = ids, batch_size, n_steps
        self._seed = seed
        self._orders: dict[int, np.ndarray] = {}

    @property
    def n_passes(self) -> int:
        """Complete passes within the budget; a last, partial one is not counted."""
        return self.n_steps * self.batch_size // len(self.example_ids)

    def order(self, number: int) -> np.ndarray:
        """Ranks in the order of pass `number`: (N,) int64, a permutation."""
        if number not in self._orders:
            self._orders = {k: v for k, v in self._orders.items() if k >= number - 1}
            rng = generator(self._seed, "order", number)
            self._orders[number] = rng.permutation(len(self.example_ids))
        return self._orders[number]

    def at(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """What step `step` sees: (passes, ranks), both (batch_size,) int64."""
        n = len(self.example_ids)
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        passes, places = np.divmod(positions, n)
        ranks = np.empty_like(places)
        for number in range(passes[0], passes[-1] + 1):
            mine = passes == number
            ranks[mine] = self.order(number)[places[mine]]
        return passes, ranks


class Loader:
    """Batches of a plan out of a cache that fits in memory, with cached teacher logits when given.

    The pixels stay uint8 and stay where they are; a batch is one gather per column.
    """

    def __init__(
        self, plan: Plan, images: Cache, teacher_logits: torch.Tensor | None, device: str
    ) -> None:
        """Open the columns the plan needs.

        Args:
            images: The training split's image cache.
            teacher_logits: (n_examples, C) float, row i = example id i; None without a teacher.
            device: Where the columns live and batches are made.
        """
        self.plan, self.device = plan, device
        self.images = images.resident("images").to(device)
        self.labels = images.resident("labels").to(device)
        self.teacher_logits = None if teacher_logits is None else teacher_logits.to(device)
        self._ids = torch.tensor(plan.example_ids)

    def batch(self, step: int) -> Batch:
        """The batch of one step, on the device."""
        passes, ranks = (torch.from_numpy(part) for part in self.plan.at(step))
        example_ids = self._ids[ranks].to(self.device)
        teacher = self.teacher_logits
        return Batch(
            example_ids=example_ids,
            ranks=ranks.to(self.device),
            passes=passes.to(self.device),
            # index_select gathers uint8 rows much faster than images[ids] does
            images=torch.index_select(self.images, 0, example_ids),
            labels=torch.index_select(self.labels, 0, example_ids),
            teacher_logits=None if teacher is None else teacher.index_select(0, example_ids),
        )
