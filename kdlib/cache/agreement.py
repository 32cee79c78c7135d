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
    """The sources of `train` and, where there are labels, `test`, compared before anything is built
    from them.

    Raises: As `open_source`; CheckError with a sentence for each reason why they do not belong
        together.
    """
    both = {split: open_source(data, split) for split in data.splits}
    if found := splits.faults(declared(data, both)):
        raise CheckError(
            "the training and the test split do not belong together.\n  " + "\n  ".join(found)
        )
    return both


def declared(data: Data, both: Splits) -> splits.Facts:
    """The facts that are known before pixels and labels are read."""
    facts = {key: {} for key in ("class_names", "shape", "n_images", "identity")}
    for split in both:
        for key, fact in zip(facts, _described(both[split]), strict=True):
            facts[key][split] = fact
    return facts | {"same_source": _same_source(data, facts.pop("identity"))}


def agreement(
    data: Data, both: dict[str, Cache], train_ids: np.ndarray, validation_ids: np.ndarray
) -> splits.Facts:
    """All facts, once the caches are there.

    Args:
        both: As of `open_sources`.
        train_ids, validation_ids: (N,) int64 of the training split.
    """
    facts = declared(data, both)
    n_classes = len(facts["class_names"]["train"])
    if n_classes:
        train, test = both["train"], both["test"]
        parts = {
            "train": (train, train_ids),
            "validation": (train, validation_ids),
            "test": (test, test.example_ids),
        }
        facts["per_class"] = {
            split: np.bincount(cache.read("labels", ids), minlength=n_classes).tolist()
            for split, (cache, ids) in parts.items()
        }
        facts["fewer"] = _why_fewer(data)
    return facts


def _described(opened: Source | Cache) -> tuple[list[str], list[int], int, dict[str, Any]]:
    """Class names, shape of an image, number of images, identity."""
    if isinstance(opened, Cache):
        header, shape = opened.header, opened.layout("images")[1]
        return header["class_names"], list(shape), len(opened.example_ids), header["identity"]
    names, shape = list(opened.class_names), list(opened.image_shape)
    return names, shape, opened.n_examples, opened.identity


def _same_source(data: Data, identities: dict[str, dict[str, Any]]) -> str | None:
    """Words for a source that both splits are read from."""
    if not data.labelled:
        return None
    if data.source == "folder":
        root = files.data_root() / data.folder
        train, test = (os.path.realpath(root / name) for name in ("train", data.test_folder))
        if train == test:
            return f"both splits are read from the folder {train} (study: data.test_folder)"
        return None
    if data.source == "huggingface":
        hub = data.huggingface
        if hub.train_split == hub.test_split:
            return (
                f"both splits are the split {hub.train_split!r} of {hub.dataset} (study: "
                "data.huggingface.train_split, test_split)"
            )
        return None
    train, test = (identities[split]["sha256"] for split in splits.SPLITS)
    return f"both splits have the same bytes (sha256 {train})" if train == test else None


def _why_fewer(data: Data) -> str | None:
    """Why images of a class of the source can be absent among those learnt from."""
    part = f"part {data.part} of the shards holds none (study: data.part, data.shard_size)"
    why = {
        f"the first {data.n_train} images hold none (study: data.n_train)": data.n_train,
        part: data.part != "1/1",
        "the new labels may name none (study: data.relabel)": data.relabel,
    }
    return "; ".join(reason for reason, given in why.items() if given) or None
