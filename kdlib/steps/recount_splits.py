"""What step 01 says of the two splits, derived again from the shards by code of its own."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np

from kdlib.steps.recount import Recount


def split_disagreements(recount: Recount, evidence: dict[str, Any]) -> list[str]:
    """Where the evidence of step 01 says other things than the shards, a sentence each."""
    wrong = []
    limit = recount.study.upstream.data.duplicates
    derived = {"agree": _agreement(recount), "duplicates": _duplicates(recount)}
    derived["duplicates"]["limit"] = 0.01 if limit is None else limit
    for part, facts in derived.items():
        recorded = evidence.get(part, {})
        wrong += [
            f"step 01 recorded {part}.{name} as {recorded.get(name)}, and the shards give {value}"
            for name, value in facts.items()
            if recorded.get(name) != value
        ]
    return wrong


def pixel_disagreements(evidence: dict[str, Any], mean: np.ndarray, std: np.ndarray) -> list[str]:
    """Where the pixel statistics of step 01 are not those of the images learnt from.

    Args:
        mean, std: (C,) measured again, pixels in [0, 1].
    """
    return [
        f"step 01 recorded {name} as {evidence.get(name)}, and the training images give "
        f"{measured.tolist()}"
        for name, measured in (("mean", mean), ("std", std))
        if np.shape(evidence.get(name)) != measured.shape
        or not np.allclose(evidence[name], measured, rtol=0, atol=1e-9)
    ]


def _agreement(recount: Recount) -> dict[str, Any]:
    both = recount.splits
    first = {split: min(shards.folder.glob("index*.json")) for split, shards in both.items()}
    headers = {split: json.loads(path.read_text())["header"] for split, path in first.items()}
    names = {split: header["class_names"] for split, header in headers.items()}
    facts = {
        "class_names": names,
        "shape": {split: header["columns"]["images"][1] for split, header in headers.items()},
        "n_images": {split: len(shards.ids) for split, shards in both.items()},
    }
    if names["train"]:
        places = {
            "train": (recount.train, recount.train_ids),
            "validation": (recount.train, recount.validation_ids),
            "test": (recount.test, recount.test.ids),
        }
        counts = {s: Counter(x.rows("labels", ids).tolist()) for s, (x, ids) in places.items()}
        facts["per_class"] = {
            split: [count[label] for label in range(len(names["train"]))]
            for split, count in counts.items()
        }
    return facts


def _duplicates(recount: Recount) -> dict[str, Any]:
    """Counts of images with the same pixels, from one dictionary of all images."""
    held_out = set(recount.validation_ids.tolist())
    groups: dict[bytes, Counter[tuple[str, int]]] = defaultdict(Counter)  # -> (place, label)
    for pixels, example_id, label in _rows(recount, "train"):
        groups[pixels]["validation" if example_id in held_out else "kept", label] += 1
    for pixels, _, label in _rows(recount, "test") if "test" in recount.splits else ():
        groups[pixels]["test", label] += 1
    pairs, other = Counter(train=0, test=0, across=0), Counter(train=0, test=0, across=0)
    crossing = among_kept = two_labels = 0
    for group in groups.values():
        if group.total() == 1:
            continue
        places, labels = Counter(), {label for _, label in group}
        for (place, _), n in group.items():
            places[place] += n
        whole = _pairs(places)
        pairs.update(whole)
        other.update(whole)
        for label in labels:
            other.subtract(_pairs(Counter({p: group[p, label] for p in places})))
        crossing += places["test"] if places["kept"] + places["validation"] else 0
        among_kept += places["validation"] if places["kept"] else 0
        two_labels += group.total() if len(labels) > 1 else 0
    if "test" not in recount.splits:
        facts = {"n_images": {"train": len(recount.train.ids)}, "pairs": {"train": pairs["train"]}}
        return facts | {"held_out": among_kept, "n_validation": len(held_out)}
    return {
        "n_images": {"train": len(recount.train.ids), "test": len(recount.test.ids)},
        "pairs": dict(pairs), "contradicting": dict(other), "crossing": crossing,
        "held_out": among_kept, "two_labels": two_labels,
    }  # fmt: skip


def _pairs(places: Counter[str]) -> dict[str, int]:
    train, test = places["kept"] + places["validation"], places["test"]
    return {"train": train * (train - 1) // 2, "test": test * (test - 1) // 2,
            "across": train * test}  # fmt: skip


def _rows(recount: Recount, split: str) -> Iterator[tuple[bytes, int, int]]:
    """A hash of its pixels, id and label (the source's) of each image."""
    shards = recount.splits[split]
    replaced = any(shards.folder.glob("original_labels-*.npy"))
    labels = shards.rows("original_labels" if replaced else "labels", shards.ids)
    return zip(recount.pixels[split], shards.ids.tolist(), labels.tolist(), strict=True)
