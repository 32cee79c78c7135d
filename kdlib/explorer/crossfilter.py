"""Filters by classes and by ranges of scores, and the histograms that show what each lets pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

LIMITS = {"variability": (0.0, 0.5), "confidence": (0.0, 1.0), "correctness": (0.0, 1.0)}
N_BINS = 40
DISTINCT = 48  # a score of at most so many values, at equal distances, has a bin for each


def range_of(table: pd.DataFrame, score: str) -> tuple[float, float]:
    """Ends of a score: the possible ones where they are known, else those of the table."""
    values = table[score][np.isfinite(table[score])]
    return LIMITS.get(score, (float(values.min()), float(values.max())))


class Filters:
    """Which of N examples pass each of several filters.

    Attributes:
        classes: Labels that pass; empty: all.
        ranges: Score -> (low, high), both ends included.
        visible: (N,) bool: which examples pass all of them.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        classes: Iterable[int] = (),
        ranges: Mapping[str, tuple[float, float]] | None = None,
        former: "Filters | None" = None,
    ) -> None:
        """Args: former, filters of the same table, whose equal parts are not computed again."""
        self.classes = sorted(set(classes))
        self.ranges = {score: (low, high) for score, (low, high) in (ranges or {}).items()}
        known = {} if former is None else former._passing
        self._passing = {}  # what filters -> (N,) bool
        if self.classes:
            key = ("class", *self.classes)
            self._passing[key] = known.get(key)
            if self._passing[key] is None:
                self._passing[key] = table["label"].isin(self.classes).to_numpy()
        for score, (low, high) in self.ranges.items():
            key = (score, low, high)
            self._passing[key] = known.get(key)
            if self._passing[key] is None:
                values = table[score].to_numpy()
                self._passing[key] = (values >= low) & (values <= high)
        self._n_failed = np.zeros(len(table), np.uint8)
        for passing in self._passing.values():
            self._n_failed += ~passing
        self.visible = self._n_failed == 0

    def visible_without(self, name: str) -> np.ndarray:
        """(N,) bool: which examples pass all filters but the one of a score or of `class`."""
        for key, passing in self._passing.items():
            if key[0] == name:
                return self._n_failed == ~passing
        return self.visible


@dataclass(frozen=True)
class Bins:
    """The bins of one score.

    Attributes:
        edges: (B + 1,) ascending; a bin holds [left, right), the last one its right edge too.
        places: (N,) uint8, the bin of each example; B for what lies in none, such as NaN.
        whole: (B,) how many examples each bin holds.
        centres: (B,) the one value of each bin; None where a bin holds a range.
    """

    edges: np.ndarray
    places: np.ndarray
    whole: np.ndarray
    centres: np.ndarray | None

    def counts(self, chosen: np.ndarray) -> np.ndarray:
        """(B,) how many of the chosen examples each bin holds.

        Args: chosen, (N,) bool, or positions.
        """
        n = len(self.whole)
        return np.bincount(self.places[chosen], minlength=n + 1)[:n]

    def ends(self, first: int, last: int) -> tuple[float, float]:
        """Low and high, both included, of the values in bins [first, last)."""
        high = float(self.edges[last])
        if last < len(self.whole):  # the right edge belongs to the next bin
            high = float(np.nextafter(high, -np.inf))
        return float(self.edges[first]), high


def make_bins(table: pd.DataFrame, score: str) -> Bins:
    """Bins of equal width over a score; one for each value where there are few."""
    values = table[score].to_numpy(dtype=np.float64, na_value=np.nan)
    low, high = range_of(table, score)
    centres = _places(np.unique(values[np.isfinite(values)].round(9)), low, high)
    if centres is None:
        edges = np.linspace(low, high if high > low else low + 1, N_BINS + 1)
    else:
        step = centres[1] - centres[0]
        edges = np.append(centres, high + step) - step / 2
    n = len(edges) - 1
    places = np.searchsorted(edges, values, "right") - 1
    places[values == edges[-1]] = n - 1
    places[(places < 0) | ~np.isfinite(values)] = n
    places = places.astype(np.uint8)
    return Bins(edges, places, np.bincount(places, minlength=n + 1)[:n], centres)


def _places(distinct: np.ndarray, low: float, high: float) -> np.ndarray | None:
    """All places from low to high at the distance of the distinct values; None where these are
    many, or not at equal distances."""
    if not 1 < len(distinct) <= DISTINCT:
        return None
    step = np.diff(distinct).min()
    n = round((high - low) / step) + 1
    steps = (distinct - low) / step
    if n > DISTINCT or np.abs(steps - steps.round()).max() > 0.01:
        return None
    return np.linspace(low, high, n)
