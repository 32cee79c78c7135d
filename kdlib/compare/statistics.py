"""Statistics of paired differences: interval, verdict, correction for many tests, number of seeds.

Sources:
    [Student1908] Student. The Probable Error of a Mean. Biometrika 6, 1908.
        DOI 10.1093/biomet/6.1.1.
    [Schuirmann1987] Schuirmann. A comparison of the Two One-Sided Tests Procedure and the Power
        Approach for assessing the equivalence of average bioavailability. J. Pharmacokinet.
        Biopharm. 15, 1987. DOI 10.1007/BF01068419.
    [Holm1979] Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scand. J. Stat. 6,
        1979. https://www.jstor.org/stable/4615733.
"""

from bisect import bisect_left

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

VERDICTS = ("better", "worse", "equivalent", "inconclusive")
EQUIVALENCE_LEVEL = 0.90  # two one-sided tests at 5 % each


def paired_interval(differences: np.ndarray, level: float) -> tuple[float, float, float, float]:
    """Mean of paired differences, its confidence interval and two-sided p value.

    Args:
        differences: shape (S,), float64, finite, one per seed.
        level: Confidence level, in (0, 1).

    Returns: (mean, low, high, p_value). Without pairs all are NaN; of one pair, and of differences
        that are all equal, all but the mean: equal differences say that the measure is too coarse
        or that one run was compared many times, and not how far another seed would lie.
    Source: [Student1908], with S - 1 degrees of freedom; assumes roughly normal differences.

    >>> mean, low, high, p = paired_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    >>> mean, round(low, 3), round(high, 3), round(p, 3)  # t = 4.303, standard error 1 / sqrt(3)
    (2.0, -0.484, 4.484, 0.074)
    """
    n = len(differences)
    mean = float(differences.mean()) if n else np.nan
    if n < 2:
        return mean, np.nan, np.nan, np.nan
    if np.ptp(differences) < np.finfo(np.float32).tiny:  # squares of smaller spreads underflow
        return float(differences[0]), np.nan, np.nan, np.nan
    error = differences.std(ddof=1) / np.sqrt(n)
    half = stdtrit(n - 1, (1 + level) / 2) * error
    p_value = 2 * stdtr(n - 1, -abs(mean) / error)
    return mean, float(mean - half), float(mean + half), float(p_value)


def verdict(low: float, high: float, low90: float, high90: float, margin: float) -> str:
    """The verdict on a difference, from two of its confidence intervals.

    Equivalence is tested first: a difference that is significant and certainly smaller than the
    margin counts as equivalent. As seeds are added, every difference inside the margin becomes
    equivalent and every difference outside it better or worse.

    Args:
        low, high: Interval at the study's level, NaN without one.
        low90, high90: Interval at 90 %, NaN without one.
        margin: Smallest difference that matters, > 0.

    Returns: "equivalent" when the 90 % interval lies strictly inside +-margin (two one-sided tests
        at 5 %); else "better" when low > 0, "worse" when high < 0; else "inconclusive".
    Source: [Schuirmann1987]; the precedence is ours.

    >>> verdict(0.001, 0.005, 0.002, 0.004, margin=0.01), verdict(0.001, 0.05, 0.01, 0.04, 0.01)
    ('equivalent', 'better')
    """
    if -margin < low90 and high90 < margin:
        return "equivalent"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "inconclusive"


def seeds_needed(sd: float, margin: float, level: float = 0.95, power: float = 0.8) -> int:
    """How many paired seeds would settle a comparison.

    The smallest S that does both, for normal differences of standard deviation `sd`: finds a true
    difference as large as the margin significant at `level` with probability `power`, and finds a
    true difference of 0 equivalent with probability `power`. A true difference between 0 and the
    margin may need more. `sd` is itself an estimate: from few seeds, S is an order of magnitude.

    Args:
        sd: Standard deviation (ddof=1) of the paired differences, >= 0.
        margin: Smallest difference that matters, > 0, in the unit of `sd`.
        level: Confidence level of better and worse, in (0, 1).
        power: Probability wanted, in (0, 1).

    Returns: S >= 2.
    Raises: ValueError for a number out of range.
    Source: noncentral t; for equivalence the Bonferroni lower bound of the power, so that S is not
        too small.

    >>> seeds_needed(sd=0.01, margin=0.01), seeds_needed(sd=0.001, margin=0.01)
    (11, 3)
    """
    if not (0 <= sd < np.inf and 0 < margin < np.inf):
        raise ValueError(
            f"sd is {sd} and margin {margin}; expected finite sd >= 0 and margin > 0 (sd needs at "
            "least 2 pairs)"
        )
    check_fraction("level", level, "params: compare.confidence_level")
    check_fraction("power", power, "0.8 is usual")
    if sd == 0:
        return 2

    def settles(n: int) -> bool:
        shift = margin / sd * np.sqrt(n)
        fails_difference = nctdtr(n - 1, shift, stdtrit(n - 1, (1 + level) / 2))
        fails_one_side = nctdtr(n - 1, shift, stdtrit(n - 1, (1 + EQUIVALENCE_LEVEL) / 2))
        return max(fails_difference, 2 * fails_one_side) <= 1 - power

    enough = 2
    while not settles(enough):
        enough *= 2
    between = range(enough // 2 + 1, enough)  # half of `enough` does not settle, or is 1
    return between.start + bisect_left(between, True, key=settles)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values (N,) -> (N,), high = not significant; NaN stays and does not count
    [Holm1979]."""
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values, kind="stable")[: np.isfinite(p_values).sum()]  # NaN sorts last
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def check_fraction(name: str, value: float, hint: str) -> None:
    """Refuse a number that is not in (0, 1)."""
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; expected a number in (0, 1) ({hint})")
