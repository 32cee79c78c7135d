"""How many examples of each class a subset has, by the tables of its runs.

A subset chosen by a score may lack classes; a student of it cannot name them, whatever else the
subset is good for. `results` holds the numbers of each run since 2026-11; for tables from before,
every function here has nothing to say.
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from kdlib.compare.text import Table, numbers_of
from kdlib.study.cells import share_in_words

FEW = 5  # examples of a class, below which a sentence says so
COLUMNS = ("class_counts", "class_names")  # of the results table
SUBSET = ["strategy", "fraction"]
MOST_NAMES = 8  # classes that a sentence lists
MOST_COLUMNS = 20  # classes that a table lists


def counts_in_words(labels: np.ndarray, n_classes: int) -> str:
    """The number of examples of each class, as the results table holds it.

    >>> counts_in_words(np.array([0, 2, 2]), 4)
    '1 0 2 0'
    """
    return " ".join(map(str, np.bincount(labels, minlength=n_classes)))


def class_counts(results: pd.DataFrame) -> pd.DataFrame:
    """The fewest examples of each class that a subset has in any seed.

    Args:
        results: One row per run, of any students and objectives: these share a seed's subset.

    Returns: One row per strategy and fraction, a column of int64 for each class, in the order of
        the study; empty where the numbers were not recorded.
    """
    if COLUMNS[0] not in results or not (known := results.dropna(subset=COLUMNS[0])).size:
        return pd.DataFrame(index=pd.MultiIndex.from_arrays([[], []], names=SUBSET))
    numbers = np.array([text.split(" ") for text in known[COLUMNS[0]]]).astype(np.int64)
    names = json.loads(known[COLUMNS[1]].iloc[0])
    table = pd.DataFrame(numbers, columns=pd.Index(names, dtype=object))
    return table.groupby([known[axis].to_numpy() for axis in SUBSET], sort=False).min()


def fewest(results: pd.DataFrame) -> pd.Series:
    """Of each strategy and fraction, in words: the examples of its rarest class, and how many
    classes it lacks; empty where the numbers were not recorded."""
    found = {}
    for subset, numbers in class_counts(results).iterrows():
        lacking = int((numbers == 0).sum())
        lacks = f" (lacks {lacking} of {len(numbers)} classes)" if lacking else ""
        found[subset] = f"{numbers.min()}{lacks}"
    return pd.Series(found, dtype=object)


def class_sentences(results: pd.DataFrame) -> list[str]:
    """A sentence for each subset that lacks classes, or has fewer than `FEW` examples of one, the
    most lacking first."""
    table = class_counts(results)
    scarce = table[(table < FEW).any(axis=1)]
    order = sorted(scarce.index, key=lambda subset: -int((scarce.loc[subset] < 1).sum()))
    return [_sentence(*subset, scarce.loc[subset]) for subset in order]


def _sentence(strategy: str, fraction: float, numbers: pd.Series) -> str:
    lacking, rare = numbers.index[numbers == 0], numbers[(numbers > 0) & (numbers < FEW)]
    parts = []
    if len(lacking):
        parts.append(f"lacks {len(lacking)} of {len(numbers)} classes ({_listed(lacking)})")
    if len(rare):
        named = _listed([f"{name}: {n}" for name, n in rare.items()])
        parts.append(f"has fewer than {FEW} examples of {len(rare)} ({named})")
    learns = ": a student of it never sees what it lacks" if len(lacking) else ""
    return f"At {share_in_words(fraction)}, {strategy} {' and '.join(parts)}{learns}."


def class_table(results: pd.DataFrame) -> Table | None:
    """The numbers of each subset as a table, of many classes their range; nothing where they were
    not recorded."""
    if (counts := class_counts(results)).empty:
        return None
    rows, names = [], list(map(str, counts.columns))
    first = results.drop_duplicates(SUBSET).set_index(SUBSET)
    of = [(*first.loc[key, ["student"]], *key, first.loc[key, "objective"]) for key in counts.index]
    for (strategy, fraction), numbers in counts.iterrows():
        cells = [strategy, share_in_words(fraction), str(int((numbers > 0).sum()))]
        if len(names) > MOST_COLUMNS:
            numbers = (numbers.min(), f"{numbers.median():g}", numbers.max())
        rows.append([*cells, *map(str, numbers)])
    if len(names) > MOST_COLUMNS:
        names = ["fewest of a class", "median", "most"]
    head = ["strategy", "fraction", "classes", *names]
    return Table(head, rows, "llr" + "r" * len(names), numbers_of(of, range(2, len(head))))


def _listed(names: Iterable[str]) -> str:
    names: Sequence[str] = [str(name) for name in names]
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
