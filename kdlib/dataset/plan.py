"""The examples of each step of a run, in order: a pure function of its seed.

Batches are cut from one endless stream of passes over the training set; a pass holds each of its
examples once. Every batch has exactly `batch_size` examples, so that a budget of K steps is
K * batch_size samples for a subset of any size. A batch may hold the end of one pass and the start
of the next; of a subset smaller than a batch it may hold the same example twice.
"""

import threading
from bisect import bisect_right
from decimal import ROUND_HALF_UP, Decimal

import numpy as np

from kdlib.repro.seeds import generator

ORDERS = ("shuffled", "windowed", "sequential")


def split_ids(example_ids: np.ndarray, n_validation: int, seed: int) -> tuple[np.ndarray, ...]:
    """Hold out validation examples from a training split.

    Args:
        example_ids: (N,) int64, sorted: all examples of the training split that are at hand.
        n_validation: How many to hold out, in [0, N).
        seed: The study's split seed.

    Returns: (training ids, validation ids), both sorted int64, disjoint, together all ids.
    Raises: ValueError when nothing would be left on one side.
    """
    ids = np.asarray(example_ids, np.int64)
    if not 0 <= n_validation < len(ids):
        raise ValueError(
            f"n_validation is {n_validation} of {len(ids)} training images; "
            "expected at least one to learn from (study: data.n_validation)"
        )
    order = generator(seed, "split").permutation(len(ids))
    return np.sort(ids[order[n_validation:]]), np.sort(ids[order[:n_validation]])


def shards_in_fraction(example_ids: np.ndarray, shard_size: int, fraction: float) -> int:
    """How many of the shards that hold these examples a fraction of them is, rounded half up: at
    least one."""
    return max(1, budget(len(np.unique(np.asarray(example_ids) // shard_size)), fraction))


def fixed_shards(example_ids: np.ndarray, shard_size: int, n: int, seed: int) -> np.ndarray:
    """The examples of n shards, drawn once: the same in every pass.

    Args:
        example_ids: (N,) int64, sorted.
        n: Shards, of those that hold any of these examples.

    Returns: Sorted int64 example ids.
    Raises: ValueError when there are fewer shards.
    """
    shards = np.asarray(example_ids) // shard_size
    known = np.unique(shards)
    if not 1 <= n <= len(known):
        raise ValueError(f"{n} fixed shards of {len(known)}; expected 1 to {len(known)}")
    chosen = generator(seed, "subset").choice(known, n, replace=False)
    return np.asarray(example_ids)[np.isin(shards, chosen)]


class Plan:
    """The order in which a run sees its examples.

    Attributes:
        example_ids: (N,) int64, sorted: the training set.
        batch_size: Examples per step, over all processes.
        n_steps: Optimiser steps in all.
    """

    def __init__(
        self,
        example_ids: np.ndarray,
        batch_size: int,
        n_steps: int,
        seed: int,
        *,
        order: str = "shuffled",
        shard_size: int | None = None,
        window_shards: int = 8,
        shards_per_pass: int | None = None,
    ) -> None:
        """Plan a run.

        Args:
            order: Within a pass: `shuffled` permutes all its examples; `windowed` permutes its
                shards, takes `window_shards` of them at a time and permutes their examples
                together, so that few shards are read at once; `sequential` goes by example id.
            shard_size: Examples per shard of the cache; needed for `windowed` and
                `shards_per_pass`.
            shards_per_pass: Each pass has only so many shards, drawn anew for each; None: all.

        Raises: ValueError when there is nothing to draw from, an id stands twice, or the shards are
            too few.
        """
        ids = np.asarray(example_ids, dtype=np.int64)
        if len(ids) == 0 or np.any(np.diff(ids) <= 0):
            raise ValueError(f"a plan needs distinct, sorted example ids; got {len(ids)} ids")
        if order not in ORDERS:
            raise ValueError(f"order is {order!r}; expected one of {', '.join(ORDERS)}")
        if shard_size is None and (order == "windowed" or shards_per_pass is not None):
            raise ValueError("an order by shards needs the cache's shard_size")
        self.example_ids, self.batch_size, self.n_steps = ids, batch_size, n_steps
        self._seed, self._order, self._window = seed, order, window_shards
        shards = ids // shard_size if shard_size else np.zeros_like(ids)
        cuts = np.flatnonzero(np.diff(shards)) + 1
        self._bounds = np.concatenate([[0], cuts, [len(ids)]])  # positions at which a shard begins
        self.n_shards = len(self._bounds) - 1
        if shards_per_pass is not None and not 1 <= shards_per_pass <= self.n_shards:
            raise ValueError(
                f"{shards_per_pass} shards per pass of {self.n_shards}; expected 1 to "
                f"{self.n_shards}"
            )
        self.shards_per_pass = shards_per_pass
        self._starts = [0]  # of each pass, in samples; grows as it is asked for
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()  # a loader's thread looks ahead in the same plan

    @property
    def n_passes(self) -> int:
        """Complete passes within the budget; a last, partial one is not counted."""
        return self._pass_at(self.n_steps * self.batch_size)

    def _pass_at(self, sample: int) -> int:
        """Number of the pass that the sample at this place of the stream belongs to."""
        if self.shards_per_pass is None:
            return sample // len(self.example_ids)
        with self._lock:
            while self._starts[-1] <= sample:
                members = self.members(len(self._starts) - 1)
                sizes = self._bounds[members + 1] - self._bounds[members]
                self._starts.append(self._starts[-1] + int(sizes.sum()))
        return bisect_right(self._starts, sample) - 1

    def _start(self, number: int) -> int:
        """Place in the stream at which a pass begins."""
        if self.shards_per_pass is None:
            return number * len(self.example_ids)
        while len(self._starts) <= number:
            self._pass_at(self._starts[-1])
        return self._starts[number]

    def members(self, number: int) -> np.ndarray:
        """Shards of pass `number`, sorted int64, counted among those of the training set."""
        if self.shards_per_pass is None:
            return np.arange(self.n_shards)
        rng = generator(self._seed, "shards", number)
        return np.sort(rng.choice(self.n_shards, self.shards_per_pass, replace=False))

    def order(self, number: int) -> np.ndarray:
        """Positions in the order of pass `number`, int64; of all shards a permutation of
        (0..N-1)."""
        with self._lock:
            if number not in self._orders:
                kept = {k: v for k, v in self._orders.items() if k >= number - 1}
                self._orders = kept | {number: self._draw(number)}
            return self._orders[number]

    def _draw(self, number: int) -> np.ndarray:
        rng, shards = generator(self._seed, "order", number), self.members(number)
        if self._order == "windowed":
            shards = rng.permutation(shards)
            windows = np.split(shards, range(self._window, len(shards), self._window))
            return np.concatenate([rng.permutation(self._positions(window)) for window in windows])
        positions = self._positions(shards)
        return positions if self._order == "sequential" else rng.permutation(positions)

    def _positions(self, shards: np.ndarray) -> np.ndarray:
        return np.concatenate([np.arange(self._bounds[s], self._bounds[s + 1]) for s in shards])

    def pieces(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int, int]]:
        """What step `step` sees, as (pass, start, stop): places [start, stop) of that pass's order.

        Args:
            rank: Which of `world_size` processes asks; together they see what one would.

        Raises: ValueError when the batch cannot be split evenly.
        """
        if self.batch_size % world_size or not 0 <= rank < world_size:
            raise ValueError(
                f"rank {rank} of {world_size} of a batch of {self.batch_size}; expected a batch "
                "size that is a multiple of the number of processes"
            )
        share = self.batch_size // world_size
        sample = step * self.batch_size + rank * share
        stop, number, pieces = sample + share, self._pass_at(sample), []
        while sample < stop:
            begin, end = self._start(number), self._start(number + 1)
            pieces.append((number, sample - begin, min(stop, end) - begin))
            sample, number = end, number + 1
        return pieces

    def at(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """What step `step` sees: (passes, positions), both (batch_size / world_size,) int64;
        arguments as in `pieces`."""
        pieces = self.pieces(step, rank, world_size)
        passes = [np.full(stop - start, number) for number, start, stop in pieces]
        positions = [self.order(number)[start:stop] for number, start, stop in pieces]
        return np.concatenate(passes), np.concatenate(positions)

    def shard_visits(self) -> np.ndarray:
        """Mean visits of the examples of each shard: (n_shards,) float64."""
        return np.add.reduceat(self.visits(), self._bounds[:-1]) / np.diff(self._bounds)

    def visits(self, n_steps: int | None = None) -> np.ndarray:
        """How often the whole budget, or its first `n_steps` steps, visits each example: (N,)
        int64."""
        n_samples = (self.n_steps if n_steps is None else n_steps) * self.batch_size
        counts, number = np.zeros(len(self.example_ids), np.int64), self._pass_at(n_samples)
        if self.shards_per_pass is None:
            counts += number
        else:
            drawn = np.zeros(self.n_shards, np.int64)
            for earlier in range(number):
                drawn[self.members(earlier)] += 1
            counts += np.repeat(drawn, np.diff(self._bounds))
        left = n_samples - self._start(number)
        counts[self.order(number)[:left]] += 1
        return counts


def budget(n_examples: int, fraction: float) -> int:
    """Number of examples in a fraction of a data set, rounded half up.

    Args:
        n_examples: N >= 0.
        fraction: In [0, 1], taken as the decimal number it is written as.

    Raises: ValueError for a fraction out of range.

    >>> budget(100, 0.145), budget(3, 0.5), budget(3, 1 / 3), budget(7, 0.0)
    (15, 2, 1, 0)
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected a number in [0, 1]")
    exact = Decimal(repr(float(fraction))) * n_examples  # 0.145 * 100 is 14.499... as a float
    return int(exact.to_integral_value(ROUND_HALF_UP))
