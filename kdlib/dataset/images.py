"""A study's cached images, their split into training and validation, and their normalisation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdlib.cache.shards import Cache
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.torch_adapters import ImageDataset
from kdlib.repro import files


@dataclass(frozen=True)
class Images:
    """A study's cached images and their split.

    Attributes:
        train: Cache of the training split, validation images included.
        test: Cache of the test split; None for images without labels.
        train_ids: (N,) int64, sorted: what teachers and students may learn from.
        validation_ids: int64, sorted: what curves and best epochs are read from.
        pixels: Normalisation measured on `train_ids`.
    """

    train: Cache
    test: Cache | None
    train_ids: np.ndarray
    validation_ids: np.ndarray
    pixels: Pixels

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprints of the caches and of the split, by which a run names its images."""
        split = files.sha256_array(self.train_ids, self.validation_ids)
        return {name: cache.fingerprint for name, cache in self.caches.items()} | {"split": split}

    @property
    def caches(self) -> dict[str, Cache]:
        """The cache of each split that there is: `train`, and `test` where there are labels."""
        both = {"train": self.train, "test": self.test}
        return {split: cache for split, cache in both.items() if cache is not None}

    @property
    def n_classes(self) -> int:
        """Classes of the labels; 0 of images without labels."""
        return len(self.train.header["class_names"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the cached images."""
        return self.train.layout("images")[1]

    def dataset(
        self, split: str, subset: Any = None, *, normalised: bool = True, **options: Any
    ) -> ImageDataset:
        """The images of a split as a torch `Dataset`.

        Args:
            split: `train`, `validation` (held out from the training split) or, where there are
                labels, `test`.
            subset: A `Subset` or example ids; None: all of the split.
            normalised: float32 images, normalised as the study's networks see them; else uint8.
            options: `transform` and `teacher` of `ImageDataset`.

        Raises: ValueError for another split, or examples that are not of it.
        """
        splits = {"train": self.train_ids, "validation": self.validation_ids}
        if self.test is not None:
            splits["test"] = self.test.example_ids
        if split not in splits:
            raise ValueError(f"no split {split!r}; {files.nearest(split, splits)}")
        ids = splits[split] if subset is None else getattr(subset, "example_ids", subset)
        if len(strange := np.setdiff1d(ids, splits[split])):
            raise ValueError(
                f"{len(strange)} of {len(ids)} examples, {strange[0]} first, are not of the split "
                f"{split}, which has {len(splits[split])}"
            )
        cache, pixels = self.test if split == "test" else self.train, self.pixels
        return ImageDataset(cache, ids, pixels=pixels if normalised else None, **options)

    def validation(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(images (N, C, H, W) uint8, labels (N,) int64) of the held-out training images."""
        columns = (self.train.read(column, self.validation_ids) for column in ("images", "labels"))
        return tuple(torch.from_numpy(column).to(device) for column in columns)


def probe_examples(images: Images) -> list[tuple[Cache, np.ndarray]]:
    """(cache, ids) of what a probe learns from, and of what it is tested on; neither for images
    without labels."""
    if images.test is None:
        return []
    return [(images.train, images.train_ids), (images.test, np.arange(images.test.n_examples))]
