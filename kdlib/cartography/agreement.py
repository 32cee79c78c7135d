"""Agreement of scores, runs and architectures on the order of examples.

Pure functions on tables and arrays of scores.

[Spearman1904] Spearman, The Proof and Measurement of Association between Two Things, 1904
[Brown1910] Brown, Some Experimental Results in the Correlation of Mental Abilities, 1910
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pandas as pd

from kdlib.repro.seeds import generator

MOST_DRAWS = 30  # pairs of groups of runs that are compared, at most


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation, ties averaged; NaN where one side is constant.

    Args:
        first, second: (N,) finite numbers.

    Returns: In [-1, 1], rounded to 12 decimals.
    Raises: ValueError for values that are not finite.
    Source: [Spearman1904].

    >>> round(spearman(np.array([1, 2, 3]), np.array([10, 30, 20])), 9)
    0.5
    """
    pair = pd.DataFrame({"first": first, "second": second})
    return float(rank_correlations(pair).loc["first", "second"].round(12))


def rank_correlations(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of each pair of columns.

    Args:
        table: Scores, one row per example.

    Returns: A square table, 1 on the diagonal, NaN for columns that are constant.
    Raises: ValueError for scores that are not finite, which pandas would leave out.
    """
    if not np.isfinite(table.to_numpy(np.float64)).all():
        raise ValueError("scores hold NaN or infinity; a ranking needs finite numbers")
    return table.corr("spearman")


def between_runs(runs: np.ndarray) -> dict[str, float]:
    """Rank correlations of one score between single runs.

    Args:
        runs: (R, N) the score in each of R >= 2 runs.

    Returns: `correlation`, the mean over pairs of runs; `low`, `high`, the extremes of the pairs;
        all NaN where the score is constant in a run.
    Raises: ValueError for scores that are not finite.
    """
    correlations = rank_correlations(pd.DataFrame(np.transpose(runs)))
    pairs = correlations.to_numpy()[np.triu_indices(len(runs), 1)]
    return _summary(pairs)


def stability(runs: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of the mean over n runs with the mean over n other runs, for each n.

    Args:
        runs: (R, N) the score in each of R >= 2 runs.
        seed: Draws the pairs of groups where there are more than `MOST_DRAWS`.

    Returns: One row per n in [1, R // 2]: `n_runs`, `correlation` (mean), `low` and `high`
        (extremes over the pairs of disjoint groups).
    """
    runs = np.asarray(runs, np.float64)
    rows = []
    for n in range(1, len(runs) // 2 + 1):
        groups = list(_disjoint(len(runs), n))
        if len(groups) > MOST_DRAWS:
            chosen = generator(seed, "bootstrap", n).choice(len(groups), MOST_DRAWS, replace=False)
            groups = [groups[i] for i in sorted(chosen)]
        means = [[runs[list(group)].mean(axis=0) for group in pair] for pair in groups]
        rows.append({"n_runs": n} | _summary(np.array([spearman(*pair) for pair in means])))
    return pd.DataFrame(rows)


def _summary(correlations: np.ndarray) -> dict[str, float]:
    extremes = {"low": float(correlations.min()), "high": float(correlations.max())}
    return {"correlation": float(correlations.mean())} | extremes


def _disjoint(n_runs: int, size: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each unordered pair of disjoint groups of runs, once."""
    for first in itertools.combinations(range(n_runs), size):
        rest = [i for i in range(n_runs) if i not in first and i > first[0]]
        for second in itertools.combinations(rest, size):
            yield first, second


def runs_needed(correlation: float, target: float = 0.95) -> float:
    """Number of runs whose averages would correlate to `target`, predicted from single runs.

    Args:
        correlation: Between two single runs.
        target: In (0, 1).

    Returns: A whole number >= 1, infinity where single runs do not agree at all, NaN for NaN.
    Source: the prophecy formula of [Brown1910] and Spearman, r(n) = n r / (1 + (n - 1) r), solved
        for n; it holds for averages of like runs and is a prediction, not a measurement.

    >>> runs_needed(0.5, target=0.9), runs_needed(0.97), runs_needed(0.0)
    (9.0, 1.0, inf)
    """
    if math.isnan(correlation):
        return math.nan
    if correlation <= 0:
        return math.inf
    if correlation >= target:
        return 1.0
    return float(math.ceil(target * (1 - correlation) / (correlation * (1 - target)) - 1e-9))
