"""What the training and the test split of a study must have in common, as rules on plain facts.

The facts are a dictionary of JSON values. They are judged before a cache is built (from what the
sources declare), before the evidence of step 01 is written (from the caches), and again when a
table is compiled (from the evidence).
"""

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

Facts = dict[str, Any]
SPLITS = ("train", "test")
MOST_NAMES = 8  # classes that a sentence lists


def faults(facts: Facts) -> list[str]:
    """Why these splits cannot be used together, a sentence each; none when they can.

    Args:
        facts: `class_names`, `shape` and `n_images`, each by split (`train` with the validation
            images, and `test` where there are labels); `same_source`, words for one source of
            both, or None. Once the caches are there also `per_class`, the numbers of images of each
            class in `train`, `validation` and `test`, and `fewer`, words for why a class of the
            source can be absent in train.
    """
    names = facts["class_names"]
    found = [f"{facts['same_source']}; the test images must be others"] * bool(facts["same_source"])
    found += [
        f"the {split} split has no images (study: data)"
        for split in names
        if facts["n_images"][split] < 1
    ]
    if "test" not in names:
        return found
    found += _shapes(facts["shape"])
    found += _names(names["train"], names["test"])
    if names["train"] and len(names["train"]) < 2:
        found.append(
            f"there is one class only, {names['train'][0]!r}; a classifier needs two (for images "
            "without labels: `labelled: false`, study: data.labelled)"
        )
    if "per_class" in facts:
        found += _unlearnt(facts)
    return found


def _shapes(shape: dict[str, Sequence[int]]) -> list[str]:
    train, test = ("x".join(map(str, shape[split])) for split in SPLITS)
    if train == test:
        return []
    remedy = "save both with the same channels"
    if shape["train"][0] == shape["test"][0]:
        remedy = "give one size for all (study: data.image_size)"
    return [f"train images are {train} (channels, height, width) and test images {test}; {remedy}"]


def _names(train: list[str], test: list[str]) -> list[str]:
    """Faults of two lists of class names, whose positions are the labels."""
    remedy = "write both splits with the same class names in the same order"
    found = _alike(sorted({*train, *test}))
    if train == test or found:
        return found
    if sorted(train) != sorted(test):
        only = [_listed(sorted(set(a) - set(b))) for a, b in ((train, test), (test, train))]
        return [f"classes differ: only in train {only[0]}, only in test {only[1]}; {remedy}"]
    label = next(i for i, pair in enumerate(zip(train, test, strict=True)) if len(set(pair)) > 1)
    return [
        f"train numbers its classes {_listed(train)} and test {_listed(test)}, so that label "
        f"{label} is {train[label]!r} in train and {test[label]!r} in test; {remedy}"
    ]


def _alike(names: Iterable[str]) -> list[str]:
    """Faults of names that look like one another."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [
        f"classes {_listed(group)} differ only in case, white space, zeros in front or the form of "
        "their letters; give them one name, or names that differ"
        for group in groups.values()
        if len(group) > 1
    ]


def _folded(name: str) -> str:
    """A class name without case, white space and the form of its letters. Single letters keep their
    case: sets of handwriting have `a` and `A`.

    >>> _folded(" Golf  ball"), _folded("01"), _folded("A")
    ('golf ball', '1', 'A')
    """
    plain = " ".join(unicodedata.normalize("NFKC", name).split())
    if plain.isascii() and plain.isdigit():
        return plain.lstrip("0") or "0"
    return plain if len(plain) == 1 else plain.casefold()


def _unlearnt(facts: Facts) -> list[str]:
    """Faults of classes without an image to learn from."""
    counts, names = facts["per_class"], facts["class_names"]["train"]
    absent = [label for label, n in enumerate(counts["train"]) if n == 0]
    if not absent:
        return []
    what, its = ("class", "its") if len(absent) == 1 else ("classes", "their")
    held_out, tested = (sum(counts[s][i] for i in absent) for s in ("validation", "test"))
    if held_out:
        why = f", while {held_out} of {its} images are held out; give another `split_seed` or a "
        why += "smaller `n_validation` (study: data)"
    elif facts["fewer"]:
        why = f"; {facts['fewer']}"
    elif tested:
        why = f", while {tested} of {its} images are in test; add some to train, or leave the "
        why += "class out of both splits"
    else:
        why = f", though the data set names {len(names)} classes; leave names without images out, "
        why += f"and number the labels 0 to {len(names) - len(absent) - 1} without a gap"
    return [f"{what} {_listed([names[label] for label in absent])}: no image to learn from{why}"]


def remarks(facts: Facts) -> list[str]:
    """What is unusual about splits that can be used together, in words."""
    names, found = facts["class_names"]["train"], []
    for split in ("validation", "test") if "per_class" in facts else ():
        absent = [names[label] for label, n in enumerate(facts["per_class"][split]) if n == 0]
        if absent and any(facts["per_class"][split]):
            of = f"{len(absent)} of {len(names)} classes"
            found.append(f"no {split} images of {of}: {_listed(absent)}")
    return found


def agree(evidence: Facts) -> tuple[bool, str]:
    """Training and test images have the same classes in the same order and the same shape, come
    from two sources, and every class has an image to learn from."""
    facts = evidence["agree"]
    if found := faults(facts):
        return False, "; ".join(found)
    classes, n_train = facts["class_names"]["train"], facts["n_images"]["train"]
    if "test" not in facts["n_images"]:
        return True, f"{n_train:,} training images without labels; there is no test split"
    n_test = facts["n_images"]["test"]
    sentence = f"{n_train:,} training and {n_test:,} test images of the same {len(classes)} classes"
    return True, "; ".join([sentence, *remarks(facts)])


def duplicates(evidence: Facts) -> tuple[bool, str]:
    """Of images with the same pixels, few are in train and test, and few have two labels; without
    labels few validation images are among those trained on."""
    facts = evidence["duplicates"]
    if "n_validation" in facts:
        return _held_out(facts)
    n_images, n_test = sum(facts["n_images"].values()), facts["n_images"]["test"]
    pairs, other = facts["pairs"], facts["contradicting"]
    if not sum(pairs.values()):
        return True, f"no two of {n_images:,} images have the same pixels"
    parts = [
        f"{pairs[where]:,} {words} ({other[where]:,} with two labels)"
        for where, words in (("train", "in train"), ("test", "in test"), ("across", "across"))
    ]
    crossing, torn = facts["crossing"] / n_test, facts["two_labels"] / n_images
    shares = f"{crossing:.2%} of the test images are in train too, {torn:.2%} of all images have "
    shares += "another label elsewhere"
    if facts["held_out"]:
        shares += f", {facts['held_out']:,} validation images are among those trained on"
    sentence = f"pairs of images with the same pixels: {', '.join(parts)}; {shares}"
    return _within(max(crossing, torn), facts["limit"], sentence)


def _held_out(facts: Facts) -> tuple[bool, str]:
    n_train, share = facts["n_images"]["train"], facts["held_out"] / facts["n_validation"]
    if not facts["pairs"]["train"]:
        return True, f"no two of {n_train:,} images have the same pixels"
    sentence = (
        f"{facts['pairs']['train']:,} pairs of images with the same pixels; {share:.2%} of the "
        "validation images are among those trained on"
    )
    return _within(share, facts["limit"], sentence)


def _within(share: float, limit: float, sentence: str) -> tuple[bool, str]:
    if share <= limit:
        return True, sentence
    return False, (
        f"{sentence}: more than {limit:.2%}. duplicates.parquet in the folder of step 01 "
        "(runs/<study>/cache) lists them: remove them from the data set, or allow a larger share "
        "(study: data.duplicates)"
    )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:MOST_NAMES]))
    more = len(names) - MOST_NAMES
    return f"[{shown} and {more} more]" if more > 0 else f"[{shown}]"
