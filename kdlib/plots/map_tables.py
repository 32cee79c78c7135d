"""What figures of datamaps are drawn from: small tables, to be committed beside the figures.

Up to `DENSE` examples every one is a row; of more, every bin of a square grid is one, with the
number of its examples.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from kdlib.plots import theme
from kdlib.plots.theme import CORRECTNESS, REGIONS

DENSE = 20_000  # examples; above, points cover each other and bins are drawn
BINS = 100  # along each side
HIGHEST = {"confidence": 1.0, "variability": 0.5, "correctness": 1.0}  # all start at 0


def map_points(table: pd.DataFrame, what: str = "datamap") -> pd.DataFrame:
    """The points of a map, or its bins where there are more than `DENSE` examples.

    Args:
        table: A row per example: `variability`, `confidence`, `correctness`.
        what: What it is called in a message.

    Returns: `variability`, `confidence`, `correctness` (float64) and `n`, the examples of the row;
        of bins the middle of the bin, a row for each tenth of correctness in it, the mean of that
        tenth. The points of a map that is one already stay as they are.
    Raises: ValueError for missing columns, an empty table, or a score that is out of its range.
    """
    x, y, correctness = map_scores(table, tuple(HIGHEST), what)
    if "n" in table:
        n = table["n"].to_numpy(np.int64)
    elif len(table) <= DENSE:
        n = np.ones(len(table), np.int64)
    else:
        columns, rows = bin_of(x, HIGHEST["variability"]), bin_of(y, HIGHEST["confidence"])
        places = (columns * BINS + rows) * CORRECTNESS.N + tenths(correctness)
        kept, first, n = np.unique(places, return_inverse=True, return_counts=True)
        correctness = np.bincount(first, correctness) / n
        columns, rows = np.divmod(kept // CORRECTNESS.N, BINS)
        x, y = (columns + 0.5) * HIGHEST["variability"] / BINS, (rows + 0.5) / BINS
    return pd.DataFrame({"variability": x, "confidence": y, "correctness": correctness, "n": n})


def region_table(table: pd.DataFrame, regions: str) -> pd.DataFrame:
    """Each region that has examples: `region`, `n`, and the medians `variability`, `confidence`.

    Raises: ValueError for missing columns or an unknown region.
    """
    theme.demand(table, ("variability", "confidence", regions), "datamap")
    codes = region_codes(table[regions])
    rows = []
    for code, region in enumerate(REGIONS):
        inside = table[codes == code]
        if len(inside):
            middle = (float(inside[score].median()) for score in ("variability", "confidence"))
            rows.append((region, len(inside), *middle))
    return pd.DataFrame(rows, columns=["region", "n", "variability", "confidence"])


def class_table(table: pd.DataFrame, regions: str, class_names: Sequence[str]) -> pd.DataFrame:
    """Examples of each class in each region: `class_name`, `region`, `n`, class by class.

    Raises: ValueError for a label without a name.
    """
    labels, n = table["label"], len(class_names)
    if not labels.between(0, n - 1).all():
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()} but there are {n} class names; "
            f"expected labels in [0, {n - 1}]"
        )
    places = len(REGIONS) * labels.to_numpy(np.int64) + region_codes(table[regions])
    counts = np.bincount(places, minlength=len(REGIONS) * n)
    names = [(str(name), region) for name in class_names for region in REGIONS]
    return pd.DataFrame(names, columns=["class_name", "region"]).assign(n=counts)


def pair_table(first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """Two maps of the same examples, as `plots.datamaps.draw_pair` draws them.

    Args:
        first: `confidence`, `variability`, `region_variability`; index the example ids.
        second: The same columns of the same examples, in any order.
        names: What the two maps are of, for messages.

    Returns: `panel` (`confidence`, `variability`, `regions`), `x` of the second map, `y` of the
        first one (of regions their place in `REGIONS`), `n`, and `rho`, Spearman's correlation of
        the panel, NaN where one side is constant.
    Raises: ValueError for missing columns, ids that are not the same, scores out of their range,
        or an unknown region.
    """
    n_different = len(first.index.symmetric_difference(second.index))
    if n_different:
        raise ValueError(
            f"{n_different} example ids differ ({len(first)} in {names[0]!r}, {len(second)} in "
            f"{names[1]!r}); expected two maps of the same examples"
        )
    second = second.reindex(first.index)
    for name, table in zip(names, (first, second), strict=True):
        map_scores(table, ("confidence", "variability"), name, ("region_variability",))
    parts = []
    for score in ("confidence", "variability"):
        top = HIGHEST[score]
        y, x = (np.clip(table[score].to_numpy(float), 0, top) for table in (first, second))
        constant = min(np.ptp(x), np.ptp(y)) == 0
        rho = np.nan if constant else pd.Series(x).rank().corr(pd.Series(y).rank())
        n = np.ones(len(x), np.int64)
        if len(x) > DENSE:
            kept, n = np.unique(bin_of(x, top) * BINS + bin_of(y, top), return_counts=True)
            x, y = ((side + 0.5) * top / BINS for side in np.divmod(kept, BINS))
        parts.append(pd.DataFrame({"panel": score, "x": x, "y": y, "n": n, "rho": rho}))
    codes = [region_codes(table["region_variability"]) for table in (second, first)]
    kept, n = np.unique(codes[0] * len(REGIONS) + codes[1], return_counts=True)
    x, y = (side.astype(float) for side in np.divmod(kept, len(REGIONS)))
    parts.append(pd.DataFrame({"panel": "regions", "x": x, "y": y, "n": n, "rho": np.nan}))
    return pd.concat(parts, ignore_index=True)


def binned(
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
    weights: np.ndarray,
    tops: tuple[float, float],
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and mean values in the square grid of bins.

    Args:
        x: Shape (N,), in [0, tops[0]]; the end belongs to the last bin.
        y: Shape (N,), in [0, tops[1]].
        values: Shape (N,), what is averaged.
        weights: Shape (N,), the examples of each.
        tops: Where the last bins end.

    Returns: Counts (BINS, BINS) int64, a row for each bin of y, and means of the same shape, 0
        where a bin is empty.
    """
    places = BINS * bin_of(y, tops[1]) + bin_of(x, tops[0])
    counts = np.bincount(places, weights, BINS**2).astype(np.int64)
    means = np.bincount(places, weights * values, BINS**2) / np.maximum(counts, 1)
    return counts.reshape(BINS, BINS), means.reshape(BINS, BINS)


def bin_of(side: np.ndarray, top: float) -> np.ndarray:
    """The bin of each number in [0, top].

    >>> bin_of(np.array([0, 0.004, 0.5]), 0.5).tolist()
    [0, 0, 99]
    """
    return np.minimum((BINS / top * side).astype(np.int64), BINS - 1)


def tenths(correctness: np.ndarray) -> np.ndarray:
    """The step of the colour map; 7 of 10 may be stored as 0.69999999."""
    n_steps = CORRECTNESS.N
    return np.clip(np.floor(correctness * n_steps + 1e-6), 0, n_steps - 1).astype(np.int64)


def map_scores(
    table: pd.DataFrame, scores: Sequence[str], what: str, more: Sequence[str] = ()
) -> list[np.ndarray]:
    """Variability, confidence and what comes after these as float64, checked, rounding cut off."""
    theme.demand(table, (*scores, *more), what)
    for score in scores:
        column, top = table[score], HIGHEST[score]
        if not column.between(-1e-6, top + 1e-6).all():  # rounded to float32
            raise ValueError(
                f"{score} runs from {column.min():g} to {column.max():g}, "
                f"{column.isna().sum()} are NaN; expected numbers in [0, {top:g}], "
                "which `python -m kdlib step datamap STUDY` makes"
            )
    ordered = ("variability", "confidence", *scores[2:])
    return [np.clip(table[score].to_numpy(float), 0, HIGHEST[score]) for score in ordered]


def region_codes(column: pd.Series) -> np.ndarray:
    """Regions as their place in `REGIONS`, (N,) int64."""
    named = column.astype("category").cat.set_categories(list(REGIONS))
    codes = named.cat.codes.to_numpy(np.int64)  # -1: another name or NaN
    if (codes < 0).any():
        raise ValueError(
            f"unknown region {column.iloc[int(np.argmin(codes))]!r} in {column.name!r}; expected "
            f"one of {', '.join(REGIONS)}"
        )
    return codes
