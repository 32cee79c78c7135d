"""Pairs of examples whose features point the same way."""

import numpy as np
import pandas as pd

from kdlib.probes.diagnostics import unit_rows

BLOCK = 2048  # rows and columns of the products that are in memory at a time: 16 MB
_ERROR = 1e-5  # of a float32 product of unit vectors, and more


def similar_pairs(values: np.ndarray, least: float, most: int) -> tuple[pd.DataFrame, int]:
    """The pairs of rows with the highest cosine similarity.

    Every pair is looked at once; beside the features no more than a few blocks and `most` pairs are
    in memory. An all-zero row is similar to none.

    Args:
        values: (N, D) features.
        least: Smallest cosine similarity, in (-1, 1].
        most: Pairs that are returned, at most.

    Returns: Columns `first` < `second` (positions) and `similarity`, rounded to six decimals; the
        most similar first, ties by position. And how many pairs reach `least` (a block's rounding
        may count one at the very edge).
    Raises: ValueError for features that are not a finite matrix, or limits out of range.
    """
    if not -1 < least <= 1 or most < 1:
        raise ValueError(
            f"similarity is {least} and most is {most}; expected a cosine in (-1, 1] and at least "
            "one pair"
        )
    values = np.asarray(values)
    unit = _unit(values)
    floor, n_found = least - _ERROR, 0
    kept, similarity = np.empty((0, 2), np.int64), np.empty(0)
    for top in range(0, len(unit), BLOCK):
        for left in range(top, len(unit), BLOCK):
            products = unit[top : top + BLOCK] @ unit[left : left + BLOCK].T
            if left == top:
                products[np.tril_indices(len(products))] = -2  # each pair once, none with itself
            n_found += int((products >= least - _ERROR).sum())
            places = np.argwhere(products >= floor) + np.array([top, left])
            if not len(places):
                continue
            kept = np.concatenate([kept, places])
            similarity = np.append(similarity, _cosines(values, places))
            if len(kept) > most:
                order = np.lexsort((kept[:, 1], kept[:, 0], -similarity))[:most]
                kept, similarity = kept[order], similarity[order]
                floor = max(floor, similarity[-1] - _ERROR)
    order = np.lexsort((kept[:, 1], kept[:, 0], -similarity))
    reached = order[similarity[order] >= least]
    table = pd.DataFrame(kept[reached], columns=["first", "second"])
    table["similarity"] = similarity[reached]
    return table, n_found - len(order) + len(reached)


def nearest(values: np.ndarray, position: int, n: int) -> pd.DataFrame:
    """The rows with the highest cosine similarity to one of them.

    Args:
        values: (N, D) features.
        position: The row that is compared with all others.
        n: Rows that are returned, at most.

    Returns: Columns `position` and `similarity`, rounded to six decimals; the most similar first,
        ties by position. An all-zero row has similarity 0 with every other.

    >>> nearest(np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0]]), 0, 2)["position"].tolist()
    [2, 1]
    """
    own = unit_rows(values[position : position + 1])[0]
    starts = range(0, len(values), BLOCK)
    parts = [unit_rows(values[start : start + BLOCK]) @ own for start in starts]
    similarity = np.concatenate(parts).astype(np.float64).round(6)
    order = np.lexsort((np.arange(len(values)), -similarity))
    order = order[order != position][:n]
    return pd.DataFrame({"position": order, "similarity": similarity[order]})


def _unit(values: np.ndarray) -> np.ndarray:
    """Rows of norm 1, (N, D) float32; a row of zeros stays one."""
    unit = np.empty(values.shape, np.float32)
    for start in range(0, len(values), BLOCK):
        unit[start : start + BLOCK] = unit_rows(values[start : start + BLOCK])
    return unit


def _cosines(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosines of some pairs of rows, in float64, a block of pairs at a time."""
    parts = []
    for part in np.array_split(pairs, len(pairs) // BLOCK + 1):
        first, second = (unit_rows(values[part[:, side]]) for side in (0, 1))
        parts.append(np.einsum("nd,nd->n", first, second))
    return np.concatenate(parts).round(6)
