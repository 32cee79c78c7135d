"""Step 01: a study's cached images, their split, and the pixels measured on it.

Leaves to others: files of images (building, cache), who learns from them (experiment).
"""

from dataclasses import dataclass

import numpy as np
import torch

from kdlib import files, params, processor, runs
from kdlib.augment import Pixels
from kdlib.building import build_images
from kdlib.cache import Cache, pixel_statistics
from kdlib.data import open_source
from kdlib.models import Network, build_network
from kdlib.params import Study
from kdlib.sampling import split_ids


@dataclass(frozen=True)
class Images:
    """A study's cached images and their split.

    Attributes:
        train: Cache of the training split, validation images included.
        test: Cache of the test split.
        train_ids: (N,) int64, sorted: what teachers and students may learn from.
        validation_ids: int64, sorted: what curves and best epochs are read from.
        pixels: Normalisation measured on `train_ids`.
    """

    train: Cache
    test: Cache
    train_ids: np.ndarray
    validation_ids: np.ndarray
    pixels: Pixels

    @property
    def fingerprints(self) -> dict[str, str]:
        split = files.sha256_array(self.train_ids, self.validation_ids)
        return {"train": self.train.fingerprint, "test": self.test.fingerprint, "split": split}

    @property
    def n_classes(self) -> int:
        """Classes of the labels.

        Raises: ValueError for images without labels.
        """
        names = self.train.header["class_names"]
        if not names:
            raise ValueError(
                f"the images of {self.train.folder} have no labels (study: data.labelled), and "
                "every objective, datamap and probe of this study needs them"
            )
        return len(names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the cached images."""
        return self.train.layout("images")[1]

    def network(self, model: params.Model, seed: int, device: str, n_more: int = 0) -> Network:
        """A network for these images, and `n_more` classes, with weights drawn from `seed`."""
        n_classes = self.n_classes + n_more
        built = build_network(model, n_classes=n_classes, image_shape=self.image_shape, seed=seed)
        return built.to(device, memory_format=self.pixels.memory_format)

    def validation(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(images (N, C, H, W) uint8, labels (N,) int64) of the held-out training images."""
        images = torch.from_numpy(self.train.read("images", self.validation_ids))
        labels = torch.from_numpy(self.train.read("labels", self.validation_ids))
        return images.to(device), labels.to(device)


def cache_images(study: Study, built: bool = False) -> Images:
    """Step 01: cache both splits, split off validation images, measure the pixels.

    Args:
        built: The caches are whole already (unpacked, say), and their source is not opened.
    """
    _ask_for_portable(study)
    study, caches = study.upstream, {}
    for split in ("train", "test"):
        folder, part = study.cache / split, study.data.part_of(split)
        if built:
            caches[split] = Cache(folder, part=part)
        else:
            source = open_source(study.data, split)
            caches[split] = build_images(source, folder, study.data.shard_size, part)
        caches[split].verify()
    train_ids, _ = split_ids(
        caches["train"].example_ids, study.data.n_validation, study.data.split_seed
    )
    settings = {
        "own": study.step_settings("cache"),
        "inputs": {split: cache.fingerprint for split, cache in caches.items()},
    }
    with runs.open_run(study, study.runs / "cache", settings) as run:
        if not run.finished:
            mean, std = pixel_statistics(caches["train"], train_ids)
            run.finish({"step": "cache", "study": study.name, "mean": mean, "std": std})
    return open_images(study)


def _ask_for_portable(study: Study) -> None:
    if study.compute.portable:  # pixels are the first that torch computes; `use` sees that it held
        processor.ask()


def open_images(study: Study) -> Images:
    """What step 01 made.

    Raises: FileNotFoundError or CacheError that name notebook 01 when it has not run.
    """
    _ask_for_portable(study)
    study = study.upstream
    evidence = runs.read_evidence(study.runs / "cache", study.step_settings("cache"))
    train, test = (
        Cache(study.cache / split, part=study.data.part_of(split)) for split in ("train", "test")
    )
    train_ids, validation_ids = split_ids(
        train.example_ids, study.data.n_validation, study.data.split_seed
    )
    pixels = Pixels(evidence["mean"], evidence["std"], study.compute.channels_last)
    return Images(train, test, train_ids, validation_ids, pixels)


def probe_examples(images: Images) -> list[tuple[Cache, np.ndarray]]:
    """(cache, ids) of what a probe learns from, and of what it is tested on."""
    return [(images.train, images.train_ids), (images.test, np.arange(images.test.n_examples))]
