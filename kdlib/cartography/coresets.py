"""Coresets from scores: exactly n of N examples.

Pure functions on arrays, called by `selection.select`, which checks their arguments. Everywhere `n`
is the budget, in [0, N], and `ties`, (N,) distinct uint64, gives every example a pseudo-random
number: it decides every tie and all that is random, smaller first, so that a choice is
deterministic and does not depend on the order of the examples. Functions that choose return (n,)
int64 positions, sorted and distinct.

[Xia2023] Xia et al., Moderate Coreset: A Universal Method of Data Selection for Real-world
    Data-efficient Deep Learning, ICLR 2023
[Zheng2023] Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, 2023,
    arXiv 2210.15809
[Cho2025] Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty and
    Prediction Uncertainty, 2025, arXiv 2502.06905
[Efraimidis2006] Efraimidis and Spirakis, Weighted Random Sampling with a Reservoir, 2006
"""

import math
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np


def lowest(cost: np.ndarray, n: int, ties: np.ndarray) -> np.ndarray:
    """The n examples of lowest cost.

    Args:
        cost: (N,) finite.

    >>> lowest(np.array([2.0, 1.0, 1.0]), 1, ties=np.array([5, 9, 4], np.uint64)).tolist()
    [2]
    """
    return np.sort(np.lexsort((ties, cost))[:n])  # the last key sorts first


def moderate(score: np.ndarray, n: int, ties: np.ndarray) -> np.ndarray:
    """The n examples in the middle of the order by (score, ties).

    Of two that lie equally far from the middle, below and above, `ties` decides.

    Args:
        score: (N,) finite; the paper's is `class_distance`.

    Source: [Xia2023]; its code cuts at rounded quantiles.

    >>> score, ties = np.array([0.0, 9.0, 2.0, 1.0, 7.0]), np.arange(5, dtype=np.uint64)
    >>> moderate(score, 3, ties).tolist()
    [2, 3, 4]
    """
    place = np.empty(len(ties), dtype=np.int64)
    place[np.lexsort((ties, score))] = np.arange(len(ties))
    return lowest(np.abs(2 * place - (len(ties) - 1)), n, ties)


def mixture(
    costs: Mapping[str, np.ndarray], shares: Mapping[str, float], n: int, ties: np.ndarray
) -> np.ndarray:
    """The n examples several orders choose by turns.

    The budget is allotted by largest remainder (equal remainders: in the order of `shares`). The
    parts then take turns, in that order; each takes its cheapest example that none has taken, until
    its allotment is met. So overlapping parts still give n examples.

    Args:
        costs: Part to (N,) finite costs.
        shares: The same parts to shares in [0, 1] that sum to 1.

    >>> costs = {"easy": np.array([0, 1, 2, 3]), "hard": np.array([3, 2, 1, 0])}
    >>> ties = np.arange(4, dtype=np.uint64)
    >>> mixture(costs, {"easy": 0.75, "hard": 0.25}, 4, ties).tolist()
    [0, 1, 2, 3]
    >>> mixture(costs, {"easy": 0.5, "hard": 0.5}, 3, ties).tolist()
    [0, 1, 3]
    """
    # As the decimals they are written as: 0.29 of 100 is 29, with no remainder to compete for.
    exact = {part: Fraction(str(float(share))) for part, share in shares.items()}
    quotas = {part: n * share / sum(exact.values()) for part, share in exact.items()}
    left = {part: math.floor(quota) for part, quota in quotas.items()}
    remainders = sorted(quotas, key=lambda part: left[part] - quotas[part])  # a stable sort
    for part in remainders[: n - sum(left.values())]:
        left[part] += 1
    orders = {part: iter(np.lexsort((ties, costs[part])).tolist()) for part in shares}
    taken = np.zeros(len(ties), dtype=bool)
    while any(left.values()):
        for part, order in orders.items():
            if left[part]:
                taken[next(i for i in order if not taken[i])] = True
                left[part] -= 1
    return np.flatnonzero(taken)


def ccs(
    difficulty: np.ndarray, n: int, ties: np.ndarray, *, cutoff: float, n_strata: int
) -> np.ndarray:
    """Coverage-centric selection: without the hardest, equally many from every level of difficulty.

    Drops the floor(cutoff * N) hardest; cuts what is left into strata of equal width in difficulty;
    every non-empty stratum gives the same number, a small one all it has, and what it lacks is
    shared by the larger ones; single examples left over come from the largest. Within a stratum the
    choice is random, by `ties`.

    Args:
        difficulty: (N,) finite; high = hard.
        n: In [0, N - floor(cutoff * N)].
        cutoff: In [0, 1), taken as the decimal number it is written as; the paper's beta.
        n_strata: >= 1; the authors' code takes 50.

    Raises: ValueError for a cutoff that leaves fewer than n.
    Source: [Zheng2023], algorithm 1. Its code closes the last stratum by multiplying the largest
        score by 1.0001, which loses the largest where all scores are negative; here it always
        belongs to the last. Its code leaves out the hardest by accumulated margin whichever score
        makes the strata, here by that score.

    >>> difficulty = np.array([0.0, 0.1, 0.1, 0.2, 1.0, 9.0])
    >>> ties = np.arange(6, dtype=np.uint64)
    >>> ccs(difficulty, 3, ties, cutoff=0.2, n_strata=2).tolist()
    [0, 1, 4]
    """
    n_kept = len(ties) - math.floor(Fraction(str(float(cutoff))) * len(ties))
    if n_kept < n:
        raise ValueError(
            f"cutoff {cutoff} keeps {n_kept} of {len(ties)}; expected >= n, which is {n}"
        )
    if n == 0:
        return np.empty(0, dtype=np.int64)
    kept = lowest(difficulty, n_kept, ties)
    height = difficulty[kept] - difficulty[kept].min()
    width = height.max() or 1.0
    strata = np.minimum((height / width * n_strata).astype(np.int64), n_strata - 1)
    _, strata, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    order = np.lexsort((ties[kept], strata))
    starts = np.cumsum(sizes) - sizes
    budgets = _even_budgets(sizes, n, np.lexsort((ties[kept][order][starts], -sizes)))
    within = np.arange(len(order)) - np.repeat(starts, sizes)  # place of each in its stratum
    return np.sort(kept[order[within < np.repeat(budgets, sizes)]])


def dual_beta(
    score: np.ndarray,
    confidence: np.ndarray,
    n: int,
    ties: np.ndarray,
    *,
    exponent: float,
    concentration: float = 15.0,
    n_anchors: int = 10,
) -> np.ndarray:
    """A random sample in which easier examples are the more probable the fewer are kept.

    Weights are score * BetaPDF(confidence; alpha, beta) with r = 1 - n / N the pruning ratio, mu
    the mean confidence of the `n_anchors` highest scores (of all, where there are fewer), and
    beta = concentration * (1 - mu) * (1 - r**exponent), alpha = concentration + 1 - beta.
    Drawn without replacement: the n smallest of E / weight, E exponential, made from `ties`.
    A score of 0 has weight 0 whatever the density; weights of 0 come last, by `ties`.

    Args:
        score: (N,) finite, >= 0; the paper's is `scores.dual`.
        confidence: (N,) in [0, 1].
        exponent: > 0; small = easier examples are preferred from lower pruning ratios on. The
            paper's c_D.
        concentration: > 0, large = narrower density; the paper's C.
        n_anchors: >= 1.

    Source: [Cho2025] and its code, which takes alpha + beta = 16 and 10 anchors; the drawing is
        that of [Efraimidis2006].

    >>> score, confidence = np.array([1.0, 1.0, 0.0]), np.array([0.9, 0.0, 0.5])
    >>> ties = np.array([7, 2, 1], np.uint64)
    >>> dual_beta(score, confidence, 1, ties, exponent=4).tolist()
    [0]
    """
    from scipy.special import xlog1py, xlogy

    if n == 0:
        return np.empty(0, dtype=np.int64)
    # By `ties`, so that the mean is summed in one order whatever the order of the examples.
    anchors = np.lexsort((ties, -score))[:n_anchors]
    beta = concentration * (1 - confidence[anchors].mean()) * (1 - (1 - n / len(ties)) ** exponent)
    # In logarithms, without the normalisation, which orders nothing: a density that is infinite
    # (beta < 1 at confidence 1) needs no case of its own. concentration - beta is alpha - 1.
    log_density = xlogy(concentration - beta, confidence) + xlog1py(beta - 1, -confidence)
    uniform = np.minimum((ties + 0.5) / 2.0**64, np.nextafter(1.0, 0.0))
    drawn = score > 0
    key = np.full(len(ties), np.inf)
    key[drawn] = np.log(-np.log1p(-uniform[drawn])) - np.log(score[drawn]) - log_density[drawn]
    return lowest(key, n, ties)


def per_class(
    labels: np.ndarray,
    n: int,
    ties: np.ndarray,
    choose: Callable[[np.ndarray, int], np.ndarray],
) -> np.ndarray:
    """The n examples a method chooses class by class, the classes as equal as their sizes allow.

    A class that is too small gives all it has; the others share the rest equally. Single examples
    left over come from classes in the order of the smallest of their `ties`.

    Args:
        labels: (N,) integers.
        choose: Given the sorted positions of a class and a number m > 0, m of those positions.

    >>> labels, ties = np.array([0, 0, 0, 1]), np.arange(4, dtype=np.uint64)
    >>> per_class(labels, 3, ties, lambda positions, m: positions[:m]).tolist()
    [0, 1, 3]
    """
    _, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((ties, inverse))
    starts = np.cumsum(sizes) - sizes
    budgets = _even_budgets(sizes, n, np.argsort(ties[order[starts]]))
    chosen = [np.empty(0, dtype=np.int64)]
    for start, size, m in zip(starts, sizes, budgets, strict=True):
        if m:
            chosen.append(choose(np.sort(order[start : start + size]), int(m)))
    return np.sort(np.concatenate(chosen))


def _even_budgets(sizes: np.ndarray, n: int, order: np.ndarray) -> np.ndarray:
    """Numbers that sum to n, at most `sizes`, as equal as possible; the odd ones go by `order`."""
    level, left = 0, n
    for n_groups, size in zip(range(len(sizes), 0, -1), np.sort(sizes).tolist(), strict=True):
        if (size - level) * n_groups > left:  # the groups from this one on share what is left
            level += left // n_groups
            break
        left -= (size - level) * n_groups
        level = size
    budgets = np.minimum(sizes, level)
    budgets[order[sizes[order] > level][: n - budgets.sum()]] += 1
    return budgets
