"""Facts about the two splits of a study, from their sources or caches, for the rules of
`kdlib.repro.splits`."""

import os
from typing import Any

import numpy as np

from kdlib.cache.shards import Cache
from kdlib.cache.sources import Source
from kdlib.cache.study_source import open_source
from kdlib.repro import files, splits
from kdlib.repro.checks import CheckError
from kdlib.study.data import Data

Splits = dict[str, Source] | dict[str, Cache]


def open_sources(data: Data) -> dict[str, Source]:
    """The sources of `train` and `test`, compared before anything is built from them.

    Raises: As `open_source`; CheckError with a sentence for each reason why they do not belong
        together.
    """
    both = {split: open_source(data, split) for split in splits.SPLITS}
    if found := splits.faults(declared(data, both)):
        raise CheckError(
            "the training and the test split do not belong together.\n  " + "\n  ".join(found)
        )
    return both


def declared(data: Data, both: Splits) -> splits.Facts:
    """The facts that are known before pixels and labels are read."""
    described = {split: _described(opened) for split, opened in both.items()}
    facts = {
        key: {split: described[split][key] for split in splits.SPLITS}
        for key in ("class_names", "shape", "n_images")
    }
    return facts | {"same_source": _same_source(data, described)}


def agreement(
    data: Data, both: dict[str, Cache], train_ids: np.ndarray, validation_ids: np.ndarray
) -> splits.Facts:
    """All facts, once the caches are there.

    Args:
        both: `train` and `test`.
        train_ids, validation_ids: (N,) int64 of the training split.
    """
    facts = declared(data, both)
    n_classes, train, test = len(facts["class_names"]["train"]), both["train"], both["test"]
    parts = {
        "train": (train, train_ids),
        "validation": (train, validation_ids),
        "test": (test, test.example_ids),
    }
    if n_classes:
        facts["per_class"] = {
            split: np.bincount(cache.read("labels", ids), minlength=n_classes).tolist()
            for split, (cache, ids) in parts.items()
        }
        facts["fewer"] = _why_fewer(data)
    return facts


def _described(opened: Source | Cache) -> dict[str, Any]:
    if isinstance(opened, Cache):
        names, shape = opened.header["class_names"], opened.layout("images")[1]
        identity, n_images = opened.header["identity"], len(opened.example_ids)
    else:
        names, shape = opened.class_names, opened.image_shape
        identity, n_images = opened.identity, opened.n_examples
    return {
        "class_names": list(names), "shape": list(shape), "identity": identity,
        "n_images": n_images,
    }  # fmt: skip


def _same_source(data: Data, described: dict[str, dict[str, Any]]) -> str | None:
    """Words for a source that both splits are read from."""
    if data.source == "folder":
        root = files.data_root() / data.folder
        train, test = (os.path.realpath(root / name) for name in ("train", data.test_folder))
        if train == test:
            return f"both splits are read from the folder {train} (study: data.test_folder)"
        if os.path.commonpath([train, test]) in (train, test):
            return (
                f"of the folders {train} and {test} one lies in the other (study: data.test_folder)"
            )
        return None
    if data.source == "huggingface":
        hub = data.huggingface
        if hub.train_split == hub.test_split:
            return (
                f"both splits are the split {hub.train_split!r} of {hub.dataset} (study: "
                "data.huggingface.train_split, test_split)"
            )
        return None
    train, test = (described[split]["identity"]["sha256"] for split in splits.SPLITS)
    return f"both splits have the same bytes (sha256 {train})" if train == test else None


def _why_fewer(data: Data) -> str | None:
    """Why images of a class of the source can be absent among those learnt from."""
    why = []
    if data.n_train is not None:
        why.append(f"the first {data.n_train} images hold none (study: data.n_train)")
    if data.part != "1/1":
        why.append(f"part {data.part} of the shards holds none (study: data.part, data.shard_size)")
    if data.relabel is not None:
        why.append("the new labels may name none (study: data.relabel)")
    return "; ".join(why) or None
