"""Step 01: a study's cached images, their split, and the pixel statistics."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.cache.agreement import agreement, open_sources
from kdlib.cache.build import build_splits
from kdlib.cache.duplicates import count_duplicates, find_duplicates
from kdlib.cache.readings import counted, sentence
from kdlib.cache.shards import Cache
from kdlib.cache.sources import SPLITS
from kdlib.dataset.images import Images
from kdlib.dataset.pixels import Pixels, pixel_statistics
from kdlib.dataset.plan import split_ids
from kdlib.dataset.views import check_shape
from kdlib.repro import checks, files, processor
from kdlib.repro.commands import run_to_make
from kdlib.repro.run import open_run, read_evidence, read_table
from kdlib.repro.tables import write_parquet
from kdlib.study.study import Study

DUPLICATES = "duplicates.parquet"  # in the folder of step 01's run


def cache_images(study: Study, built: bool = False) -> Images:
    """Step 01: cache the splits, split off validation images, measure the pixels.

    Args:
        built: The caches are whole already (unpacked, say), and their source is not opened.
    """
    _ask_for_portable(study)
    trainings, study, data = study.trainings, study.upstream, study.data
    parts = {split: data.part_of(split) for split in data.splits}
    if built:
        caches = {split: Cache(study.cache / split, part=part) for split, part in parts.items()}
    else:
        caches = build_splits(open_sources(data), study.cache, data.shard_size, parts)
    for cache in caches.values():
        cache.verify()
    for training in trainings:
        check_shape(training.augment, caches["train"].layout("images")[1])
    ids = split_ids(caches["train"].example_ids, data.n_validation, data.split_seed)
    settings = {
        "step": study.step_settings("cache"),
        "inputs": {split: cache.fingerprint for split, cache in caches.items()},
    }
    with open_run(study.runs, study.runs / "cache", settings) as run:
        if not run.finished:
            evidence = {"step": "cache", "study": study.name}
            reader = {split: counted(cache) for split, cache in caches.items()}
            if any(reader.values()):  # of images that were files
                evidence["reader"] = reader
            evidence |= _checked(study, caches, *ids, run.folder / DUPLICATES)
            mean, std = pixel_statistics(caches["train"], ids[0])
            run.finish(evidence | {"mean": mean, "std": std})
    return open_images(study)


def reader_sentence(evidence: dict[str, Any]) -> str:
    """What the reader of image files did, from the evidence of step 01; empty when nothing."""
    done = {split: sentence(evidence.get("reader", {}).get(split)) for split in SPLITS}
    return "; ".join(f"{split}, {text}" for split, text in done.items() if text)


def _checked(
    study: Study,
    caches: dict[str, Cache],
    train_ids: np.ndarray,
    validation_ids: np.ndarray,
    path: Path,
) -> dict[str, Any]:
    """Compare the splits, and write the table of duplicates, which is there for the reader also
    when a check fails.

    Returns: Evidence: `agree`, `duplicates`, `duplicates_sha256` and `checks`.
    Raises: checks.CheckError with a sentence for each fault.
    """
    evidence = {"agree": agreement(study.data, caches, train_ids, validation_ids)}
    table = find_duplicates(caches["train"], caches.get("test"), validation_ids)
    write_parquet(path, table, {"inputs": {s: c.fingerprint for s, c in caches.items()}})
    n_images, limit = evidence["agree"]["n_images"], study.data.duplicates
    evidence["duplicates"] = count_duplicates(
        table, n_images["train"], n_images.get("test"), limit, len(validation_ids)
    )
    evidence["duplicates_sha256"] = files.sha256_file(path)
    try:
        return evidence | {"checks": checks.demand(checks.CACHE, evidence)}
    except checks.CheckError as error:
        raise checks.CheckError(
            f"{error}\n  Once the images are changed, delete {study.cache}, which holds them as "
            f"they were, then {run_to_make(study.runs / 'cache')}"
        ) from None


def open_duplicates(study: Study) -> pd.DataFrame:
    """The images of step 01 whose pixels occur more than once, as of `find_duplicates`.

    Raises: FileNotFoundError or ValueError that names the command when step 01 has not run or the
        table was changed.
    """
    study = study.upstream
    return read_table(
        study.runs / "cache" / DUPLICATES,
        study.step_settings("cache"),
        "duplicates_sha256",
    )


def cache_sentences(study: Study) -> list[str]:
    """What step 01 checked, and what it converted, cut or passed over, a sentence each."""
    study = study.upstream
    evidence = read_evidence(study.runs / "cache", study.step_settings("cache"))
    reader = reader_sentence(evidence)
    checked = [f"{check['name']}: {check['sentence']}" for check in evidence["checks"]]
    return checked + ([f"reader: {reader}"] if reader else [])


def _ask_for_portable(study: Study) -> None:
    if study.compute.portable:  # pixels are the first that torch computes; `use` sees that it held
        processor.ask()


def open_images(study: Study) -> Images:
    """The images of step 01.

    Raises: FileNotFoundError or CacheError that name the command when it has not run.
    """
    _ask_for_portable(study)
    study = study.upstream
    evidence = read_evidence(study.runs / "cache", study.step_settings("cache"))
    train, *test = (
        Cache(study.cache / split, part=study.data.part_of(split)) for split in study.data.splits
    )
    train_ids, validation_ids = split_ids(
        train.example_ids, study.data.n_validation, study.data.split_seed
    )
    pixels = Pixels(evidence["mean"], evidence["std"], study.compute.channels_last)
    return Images(train, test[0] if test else None, train_ids, validation_ids, pixels)


def split_table(images: Images) -> pd.DataFrame:
    """One row per split: number of images, their shape (C, H, W), and the folder of their cache."""
    splits = [
        ("train", images.train_ids, images.train),
        ("validation", images.validation_ids, images.train),
    ]
    if images.test is not None:
        splits.append(("test", images.test.example_ids, images.test))
    rows = {
        split: {"images": len(ids), "shape": images.image_shape, "folder": str(cache.folder)}
        for split, ids, cache in splits
    }
    return pd.DataFrame.from_dict(rows, orient="index")
