"""Cached images as a torch `Dataset`, and the order of a plan as a torch `Sampler`, for a training
loop that is not kdlib's.

    train = lab.images.dataset("train", subset)
    sampler = PlanSampler(train.example_ids, seed=0)
    batches = DataLoader(train, batch_size=64, sampler=sampler, num_workers=2)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from kdlib.cache.outputs import stored_logits
from kdlib.cache.shards import Cache
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan

Item = tuple[Tensor, ...]


class ImageDataset(Dataset):
    """Some examples of an image cache; item i is the one with `example_ids[i]`.

    An item is `(image, label, example_id)`: the image (C, H, W), label and id int64 scalars. With
    stored teacher outputs its logits (K,) float32 follow. A `DataLoader` reads a whole batch at
    once; its worker processes map the shards themselves.

    Attributes:
        example_ids: (N,) int64, in the order of the items.
    """

    def __init__(
        self,
        images: Cache,
        example_ids: np.ndarray,
        *,
        pixels: Pixels | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
        teacher: Cache | None = None,
    ) -> None:
        """Choose examples of a cache.

        Args:
            images: The cache.
            example_ids: (N,) int64, of examples that are in it.
            pixels: Normalises images to float32; None gives them as they are stored, uint8.
            transform: Called with each image (C, H, W) uint8, before it is normalised.
            teacher: Stored outputs of the same images (`lab.teacher_outputs`).

        Raises: IndexError for ids that are not in the cache; ValueError for outputs of other
            images.
        """
        images.positions(example_ids)
        if teacher is not None and teacher.header["images"] != images.fingerprint:
            raise ValueError(
                f"the teacher outputs in {teacher.folder} are of other images than {images.folder}"
            )
        self.images, self.example_ids = images, np.asarray(example_ids, np.int64)
        self.pixels, self.transform, self.teacher = pixels, transform, teacher

    def __len__(self) -> int:
        return len(self.example_ids)

    def __getitem__(self, position: int) -> Item:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: Sequence[int]) -> list[Item]:
        """The items of a batch; each shard is read once."""
        ids = self.example_ids[list(positions)]
        images = torch.from_numpy(self.images.read("images", ids))  # (B, C, H, W) uint8
        if self.transform is not None:
            images = torch.stack([self.transform(image) for image in images])
        if self.pixels is not None:
            images = self.pixels.prepare(images)
        columns = [images, torch.from_numpy(self.images.read("labels", ids)), torch.from_numpy(ids)]
        if self.teacher is not None:
            columns.append(stored_logits(self.teacher, ids))
        return list(zip(*columns, strict=True))


class PlanSampler(Sampler[int]):
    """Positions in the order of one pass of a `Plan`: pass n is that of a kdlib run with this seed.

    Give it the `example_ids` of the data set it orders. Call `set_epoch(n)` before each pass; until
    then it is pass 0. A kdlib run cuts its batches from the endless stream of passes, a
    `DataLoader` cuts each pass by itself, so that the last batch of a pass is shorter here.
    """

    def __init__(self, example_ids: np.ndarray, seed: int, **order: Any) -> None:
        """Plan passes over some examples.

        Args:
            example_ids: (N,) int64, sorted, distinct.
            seed: The run's seed.
            order: `order`, `shard_size`, `window_shards` and `shards_per_pass` of `Plan`.
        """
        self._plan = Plan(example_ids, len(example_ids), 1, seed, **order)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the pass that the next iteration gives, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(self._plan.order(self._epoch).tolist())

    def __len__(self) -> int:
        return len(self._plan.order(self._epoch))
