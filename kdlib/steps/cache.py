"""Step 01: a study's cached images, their split, and the pixel statistics."""

import pandas as pd

from kdlib.cache.build import build_images
from kdlib.cache.shards import Cache
from kdlib.cache.study_source import open_source
from kdlib.dataset.images import Images
from kdlib.dataset.pixels import Pixels, pixel_statistics
from kdlib.dataset.plan import split_ids
from kdlib.repro import processor
from kdlib.repro.run import open_run, read_evidence
from kdlib.study.study import Study


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
        "step": study.step_settings("cache"),
        "inputs": {split: cache.fingerprint for split, cache in caches.items()},
    }
    with open_run(study.runs, study.runs / "cache", settings) as run:
        if not run.finished:
            mean, std = pixel_statistics(caches["train"], train_ids)
            run.finish({"step": "cache", "study": study.name, "mean": mean, "std": std})
    return open_images(study)


def _ask_for_portable(study: Study) -> None:
    if study.compute.portable:  # pixels are the first that torch computes; `use` sees that it held
        processor.ask()


def open_images(study: Study) -> Images:
    """The images of step 01.

    Raises: FileNotFoundError or CacheError that name notebook 01 when it has not run.
    """
    _ask_for_portable(study)
    study = study.upstream
    evidence = read_evidence(study.runs / "cache", study.step_settings("cache"))
    train, test = (
        Cache(study.cache / split, part=study.data.part_of(split)) for split in ("train", "test")
    )
    train_ids, validation_ids = split_ids(
        train.example_ids, study.data.n_validation, study.data.split_seed
    )
    pixels = Pixels(evidence["mean"], evidence["std"], study.compute.channels_last)
    return Images(train, test, train_ids, validation_ids, pixels)


def split_table(images: Images) -> pd.DataFrame:
    """One row per split: number of images, their shape (C, H, W), and the folder of their cache."""
    splits = (
        ("train", images.train_ids, images.train),
        ("validation", images.validation_ids, images.train),
        ("test", images.test.example_ids, images.test),
    )
    rows = {
        split: {"images": len(ids), "shape": images.image_shape, "folder": str(cache.folder)}
        for split, ids, cache in splits
    }
    return pd.DataFrame.from_dict(rows, orient="index")
