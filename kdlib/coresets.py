"""Coresets: exactly n of N examples, chosen from scores, features or both.

Pure functions on arrays. Everywhere `n` is the budget, in [0, N], and `ties`, (N,) uint64, gives
every example its own pseudo-random number: it decides every tie and all that is random, smaller
first, so that a choice is deterministic and permuting the examples permutes nothing but positions
(to that end the greedy methods work in the order of `ties`). Functions that choose return (n,)
int64 positions, sorted and distinct. All raise ValueError for shapes and values out of range.
Leaves to others: ids, budgets and names of strategies (selection), scores of the training dynamics
(cartography), the making of features (teacher).

[Xia2023] Xia et al., Moderate Coreset: A Universal Method of Data Selection for Real-world
    Data-efficient Deep Learning, ICLR 2023
[Zheng2023] Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, 2023,
    arXiv 2210.15809
[Maharana2023] Maharana et al., D2 Pruning: Message Passing for Balancing Diversity and Difficulty
    in Data Pruning, 2023, arXiv 2310.07931
[Sener2018] Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set
    Approach, 2018, arXiv 1708.00489
[Welling2009] Welling, Herding Dynamical Weights to Learn, ICML 2009
[Cho2025] Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty and
    Prediction Uncertainty, 2025, arXiv 2502.06905
[Efraimidis2006] Efraimidis and Spirakis, Weighted Random Sampling with a Reservoir, 2006
[Sorscher2022] Sorscher et al., Beyond Neural Scaling Laws: Beating Power Law Scaling via Data
    Pruning, 2022, arXiv 2206.14486
"""

import heapq
import math
import operator
from collections.abc import Callable, Mapping
from fractions import Fraction

import numpy as np
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

DECIMALS = 12  # to which squared distances of centred, scaled features are compared
# Distances of a greedy loop (n * N) from which it shows its progress: 20 s at D = 64, where 2.5e8
# took 5 s (one run, one thread of a Xeon, NumPy 2.4, 2026-11).
LONG = 10**9
BLOCK_ROWS = 1024  # rows whose neighbours are compared at a time
SPARE = 8  # candidates beyond the k nearest: room for ties, and for the rounding of fast distances
KMEANS_STARTS = 10  # of which k-means keeps the one with the smallest inertia


def lowest(cost: np.ndarray, n: int, ties: np.ndarray) -> np.ndarray:
    """The n examples of lowest cost.

    Args:
        cost: (N,) finite.

    >>> lowest(np.array([2.0, 1.0, 1.0]), 1, ties=np.array([5, 9, 4], np.uint64)).tolist()
    [2]
    """
    n, ties = _budget(n, ties)
    return np.sort(np.lexsort((ties, _row("cost", cost, ties)))[:n])  # last key sorts first


def central(score: np.ndarray, n: int, ties: np.ndarray) -> np.ndarray:
    """The n examples in the middle of the order by (score, ties).

    Of two that lie equally far from the middle, below and above, `ties` decides.

    Args:
        score: (N,) finite; the paper's is `class_distance`.

    Source: [Xia2023]; its code cuts at rounded quantiles.

    >>> central(np.array([0.0, 9.0, 2.0, 1.0, 7.0]), 3, ties=np.arange(5, dtype=np.uint64)).tolist()
    [2, 3, 4]
    """
    n, ties = _budget(n, ties)
    rank = np.empty(len(ties), dtype=np.int64)
    rank[np.lexsort((ties, _row("score", score, ties)))] = np.arange(len(ties))
    return lowest(np.abs(2 * rank - (len(ties) - 1)), n, ties)


def mixture(
    costs: Mapping[str, np.ndarray], shares: Mapping[str, float], n: int, ties: np.ndarray
) -> np.ndarray:
    """The n examples several orders choose by turns.

    The budget is allotted by largest remainder (equal remainders: in the order of `shares`). The
    parts then take turns, in that order; each takes its cheapest example that none has taken, until
    its allotment is met. So overlapping parts still give n examples.

    Args:
        costs: Part to (N,) finite costs.
        shares: The same parts to shares in [0, 1] that sum to 1 (within 1e-9).

    >>> costs = {"easy": np.array([0, 1, 2, 3]), "hard": np.array([3, 2, 1, 0])}
    >>> ties = np.arange(4, dtype=np.uint64)
    >>> mixture(costs, {"easy": 0.75, "hard": 0.25}, 4, ties).tolist()
    [0, 1, 2, 3]
    >>> mixture(costs, {"easy": 0.5, "hard": 0.5}, 3, ties).tolist()
    [0, 1, 3]
    """
    n, ties = _budget(n, ties)
    if set(costs) != set(shares):
        raise ValueError(
            f"costs are of {list(costs)}, shares of {list(shares)}; expected equal parts"
        )
    for part, share in shares.items():
        _number(f"shares[{part!r}]", share, "[0, 1]", 0 <= share <= 1)
    # As the decimals they are written as: 0.29 of 100 is 29, with no remainder to compete for.
    exact = {part: Fraction(str(float(share))) for part, share in shares.items()}
    total = sum(exact.values())
    if abs(total - 1) > 1e-9:
        raise ValueError(f"shares {dict(shares)} sum to {float(total)}; expected 1")
    quotas = {part: n * share / total for part, share in exact.items()}
    left = {part: math.floor(quota) for part, quota in quotas.items()}
    remainders = sorted(quotas, key=lambda part: left[part] - quotas[part])  # a stable sort
    for part in remainders[: n - sum(left.values())]:
        left[part] += 1
    orders = {
        part: iter(np.lexsort((ties, _row(f"costs[{part!r}]", costs[part], ties))).tolist())
        for part in shares
    }
    taken = np.zeros(len(ties), dtype=bool)
    while any(left.values()):
        for part, order in orders.items():
            if left[part]:
                taken[next(i for i in order if not taken[i])] = True
                left[part] -= 1
    return np.flatnonzero(taken)


def coverage(
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

    Raises: ValueError, beside the usual, for a cutoff that leaves fewer than n.
    Source: [Zheng2023], algorithm 1; its code has strata of 1.0001 times the width, so that the
        last is closed, here the highest score belongs to the last.

    >>> difficulty = np.array([0.0, 0.1, 0.1, 0.2, 1.0, 9.0])
    >>> ties = np.arange(6, dtype=np.uint64)
    >>> coverage(difficulty, 3, ties, cutoff=0.2, n_strata=2).tolist()
    [0, 1, 4]
    """
    n, ties = _budget(n, ties)
    difficulty = _row("difficulty", difficulty, ties)
    _number("cutoff", cutoff, "[0, 1)", 0 <= cutoff < 1)
    _number("n_strata", n_strata, ">= 1", operator.index(n_strata) >= 1)
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
    budgets = _shares(sizes, n, np.lexsort((ties[kept][order][starts], -sizes)))
    within = np.arange(len(order)) - np.repeat(starts, sizes)  # rank of each in its stratum
    return np.sort(kept[order[within < np.repeat(budgets, sizes)]])


def d2(
    score: np.ndarray,
    features: np.ndarray,
    n: int,
    ties: np.ndarray,
    *,
    neighbours: int,
    gamma_forward: float,
    gamma_reverse: float,
) -> np.ndarray:
    """D2 pruning: the highest scores of a graph on which every choice lowers its neighbours.

    Two examples are neighbours when either is among the k nearest of the other, at distance d.
    Forward: s_i = score_i + sum over neighbours j of exp(-gamma_forward * d_ij**2) * score_j. Then
    n times: take the i of highest s_i, and for each neighbour j not yet taken (reverse)
    s_j -= exp(-gamma_reverse * d_ij**2) * s_i. A score that has sunk below 0 raises its neighbours.

    Args:
        score: (N,) finite, >= 0; high = wanted (difficult).
        features: (N, D) finite; the weights depend on their scale.
        neighbours: k >= 1; where fewer others exist, all of them.
        gamma_forward: >= 0; large = the scores stay as they are.
        gamma_reverse: >= 0; large = choices do not repel each other.

    Source: [Maharana2023]; its code weighs by exp(-gamma * d) with a forward gamma of 1, and
        chooses within strata of the score as [Zheng2023] does; here the choice is from the whole.

    >>> score, features = np.array([3.0, 2.0, 1.0]), np.array([[0.0], [0.0], [9.0]])
    >>> ties = np.arange(3, dtype=np.uint64)
    >>> d2(score, features, 2, ties, neighbours=1, gamma_forward=1, gamma_reverse=1).tolist()
    [0, 2]
    """
    n, ties = _budget(n, ties)
    score, features = _row("score", score, ties, least=0), _matrix(features, len(ties))
    _number("neighbours", neighbours, ">= 1", operator.index(neighbours) >= 1)
    _number("gamma_forward", gamma_forward, ">= 0, finite", 0 <= gamma_forward < math.inf)
    _number("gamma_reverse", gamma_reverse, ">= 0, finite", 0 <= gamma_reverse < math.inf)
    order = np.argsort(ties)
    rows, columns, squares = _graph(features[order], min(neighbours, len(ties) - 1))
    messages = np.exp(-gamma_forward * squares) * score[order][columns]
    s = (score[order] + np.bincount(rows, messages, minlength=len(ties))).tolist()
    first = np.searchsorted(rows, np.arange(len(ties) + 1)).tolist()
    columns, weights = columns.tolist(), np.exp(-gamma_reverse * squares).tolist()
    # Every change of a score adds an entry to the heap; an entry that differs from s is outdated.
    heap, chosen, taken = [(-value, i) for i, value in enumerate(s)], [], [False] * len(ties)
    heapq.heapify(heap)
    while len(chosen) < n:
        value, i = heapq.heappop(heap)
        if taken[i] or -value != s[i]:
            continue
        taken[i] = True
        chosen.append(i)
        for edge in range(first[i], first[i + 1]):
            j = columns[edge]
            if not taken[j]:
                s[j] -= weights[edge] * s[i]
                heapq.heappush(heap, (-s[j], j))
    return np.sort(order[chosen])


def k_center(features: np.ndarray, n: int, ties: np.ndarray) -> np.ndarray:
    """Greedy k-center: each next example is the one farthest from all chosen.

    The first is the nearest to the mean. Squared distances that agree to `DECIMALS` decimals, in
    units of the largest deviation of a feature from its mean, count as equal.

    Args:
        features: (N, D) finite.

    Source: [Sener2018], algorithm 1; there the first ones are given, the labelled pool.

    >>> features = np.array([[0.0], [1.0], [2.0], [9.0]])
    >>> k_center(features, 3, ties=np.arange(4, dtype=np.uint64)).tolist()
    [0, 2, 3]
    """
    n, ties = _budget(n, ties)
    order = np.argsort(ties)
    values, squares = _centred(_matrix(features, len(ties))[order])
    farness, pick, chosen = np.full(len(ties), np.inf), None, []
    for _ in _progress("k-center", n, len(ties)):
        pick = np.argmin(np.round(squares, DECIMALS)) if pick is None else np.argmax(farness)
        chosen.append(pick)
        to_pick = squares + squares[pick] - 2 * (values @ values[pick])
        np.minimum(farness, np.round(to_pick, DECIMALS), out=farness)
        farness[pick] = -np.inf
    return np.sort(order[chosen])


def herding(features: np.ndarray, n: int, ties: np.ndarray) -> np.ndarray:
    """Herding: each next example brings the mean of the chosen nearest to the mean of all.

    Squared distances count as equal as in `k_center`.

    Args:
        features: (N, D) finite.

    Source: [Welling2009]; there examples may repeat and the inner product with the error so far is
        maximised, which is the same for features of equal norm.

    >>> herding(np.array([[0.0], [4.0], [5.0]]), 2, ties=np.arange(3, dtype=np.uint64)).tolist()
    [0, 1]
    """
    n, ties = _budget(n, ties)
    order = np.argsort(ties)
    values, squares = _centred(_matrix(features, len(ties))[order])
    total, taken, chosen = np.zeros(values.shape[1]), np.zeros(len(ties)), []
    for _ in _progress("herding", n, len(ties)):
        # |total + x|^2 without |total|^2, which is the same for all
        pick = np.argmin(np.round(squares + 2 * (values @ total), DECIMALS) + taken)
        chosen.append(pick)
        taken[pick] = np.inf
        total += values[pick]
    return np.sort(order[chosen])


def beta_sampling(
    score: np.ndarray,
    confidence: np.ndarray,
    n: int,
    ties: np.ndarray,
    *,
    exponent: float,
    concentration: float = 15.0,
    n_anchors: int = 10,
) -> np.ndarray:
    """A random sample that leans to easier examples the fewer are kept.

    Weights are score * BetaPDF(confidence; alpha, beta) with r = 1 - n / N the pruning ratio, mu
    the mean confidence of the `n_anchors` highest scores (of all, where there are fewer), and
    beta = concentration * (1 - mu) * (1 - r**exponent), alpha = concentration + 1 - beta.
    Drawn without replacement: the n smallest of E / weight, E exponential, made from `ties`.
    A score of 0 has weight 0 whatever the density; weights of 0 come last, by `ties`.

    Args:
        score: (N,) finite, >= 0; the paper's is `cartography.dual`.
        confidence: (N,) in [0, 1].
        exponent: > 0; small = the lean begins at lower pruning ratios. The paper's c_D.
        concentration: > 0, large = narrower density; the paper's C.
        n_anchors: >= 1.

    Source: [Cho2025] and its code, which takes alpha + beta = 16 and 10 anchors; the drawing is
        that of [Efraimidis2006].

    >>> score, confidence = np.array([1.0, 1.0, 0.0]), np.array([0.9, 0.0, 0.5])
    >>> ties = np.array([7, 2, 1], np.uint64)
    >>> beta_sampling(score, confidence, 1, ties, exponent=4).tolist()
    [0]
    """
    from scipy.special import xlog1py, xlogy

    n, ties = _budget(n, ties)
    score = _row("score", score, ties, least=0)
    confidence = _row("confidence", confidence, ties, least=0, most=1)
    _number("exponent", exponent, "> 0, finite", 0 < exponent < math.inf)
    _number("concentration", concentration, "> 0, finite", 0 < concentration < math.inf)
    _number("n_anchors", n_anchors, ">= 1", operator.index(n_anchors) >= 1)
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
    return np.sort(np.lexsort((ties, key))[:n])


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

    Raises: ValueError, beside the usual, when `choose` returns anything but m of the positions.

    >>> labels, ties = np.array([0, 0, 0, 1]), np.arange(4, dtype=np.uint64)
    >>> per_class(labels, 3, ties, lambda positions, m: positions[:m]).tolist()
    [0, 1, 3]
    """
    n, ties = _budget(n, ties)
    labels = _labels(labels, len(ties))
    classes, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    order = np.lexsort((ties, inverse))
    starts = np.cumsum(sizes) - sizes
    budgets = _shares(sizes, n, np.argsort(ties[order[starts]]))
    chosen = [np.empty(0, dtype=np.int64)]
    for label, start, size, m in zip(classes, starts, sizes, budgets, strict=True):
        if m:
            positions = np.sort(order[start : start + size])
            part = np.asarray(choose(positions, int(m)))
            if len(np.unique(part)) != m or len(part) != m or not np.isin(part, positions).all():
                raise ValueError(
                    f"choose returned {len(part)} positions for class {label}; expected {m} "
                    "distinct ones of those it was given"
                )
            chosen.append(part)
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def class_distance(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Euclidean distance of each example to the centre of its class.

    Args:
        features: (N, D) finite.
        labels: (N,) integers.

    Returns: (N,) float64 >= 0; high = atypical. The centre is the coordinate-wise median.
    Source: [Xia2023], as in its code.

    >>> class_distance(np.array([[0.0], [1.0], [5.0], [7.0]]), np.array([0, 0, 0, 1])).tolist()
    [1.0, 0.0, 4.0, 0.0]
    """
    features = _matrix(features)
    labels = _labels(labels, len(features))
    distance = np.empty(len(labels))
    order = np.argsort(labels, kind="stable")
    for members in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        if len(members):
            inside = features[members]
            distance[members] = np.linalg.norm(inside - np.median(inside, axis=0), axis=1)
    return distance


def prototypicality(features: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Euclidean distance of each example to the nearest centroid of k-means.

    Args:
        features: (N, D) finite.
        n_clusters: In [1, number of distinct features].
        seed: In [0, 2**32); of the `KMEANS_STARTS` starts.

    Returns: (N,) float64 >= 0; high = atypical. One thread: equal on CPU for equal input, while
        another order of the examples may lead to other clusters.
    Source: [Sorscher2022], there over self-supervised features; here Euclidean, on those given.

    >>> prototypicality(np.array([[0.0], [2.0], [9.0]]), n_clusters=2, seed=0).round(9).tolist()
    [1.0, 1.0, 0.0]
    """
    from sklearn.cluster import KMeans

    features = _matrix(features)
    n_distinct = len(np.unique(features, axis=0))
    is_possible = 1 <= operator.index(n_clusters) <= n_distinct
    _number("n_clusters", n_clusters, f"[1, {n_distinct}], the distinct features", is_possible)
    _number("seed", seed, "[0, 2**32)", 0 <= operator.index(seed) < 2**32)
    with threadpool_limits(1):
        model = KMeans(n_clusters, n_init=KMEANS_STARTS, random_state=int(seed)).fit(features)
    return np.linalg.norm(features - model.cluster_centers_[model.labels_], axis=1)


def _budget(n: int, ties: np.ndarray) -> tuple[int, np.ndarray]:
    ties = np.asarray(ties)
    if ties.ndim != 1 or ties.dtype != np.uint64 or len(np.unique(ties)) != len(ties):
        raise ValueError(f"ties are {ties.dtype}, {ties.shape}; expected a row of distinct uint64")
    _number("the budget n", n, f"[0, {len(ties)}]", 0 <= operator.index(n) <= len(ties))
    return operator.index(n), ties


def _number(name: str, value: float, expected: str, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"{name} is {value}; expected {expected}")


def _row(
    name: str, values: np.ndarray, ties: np.ndarray, least: float = -np.inf, most: float = np.inf
) -> np.ndarray:
    """One finite float64 in [least, most] per example."""
    values = np.asarray(values, dtype=np.float64)
    if values.shape != ties.shape:
        raise ValueError(f"{name} has shape {values.shape}; expected {ties.shape}, one per example")
    bad = ~(np.isfinite(values) & (values >= least) & (values <= most))
    if bad.any():
        raise ValueError(
            f"{name} holds {values[bad][0]}, and {bad.sum()} bad values of {len(values)} in all; "
            f"expected finite values in [{least}, {most}]"
        )
    return values


def _matrix(features: np.ndarray, n_examples: int | None = None) -> np.ndarray:
    """Finite float64 features, (N, D) with D > 0."""
    features = np.asarray(features, dtype=np.float64)
    if features.ndim != 2 or not features.shape[1] or n_examples not in (None, len(features)):
        raise ValueError(
            f"features have shape {features.shape}; expected ({n_examples or 'N'}, D), D > 0"
        )
    if not np.isfinite(features).all():
        raise ValueError("features hold NaN or infinity; expected finite values")
    return features


def _labels(labels: np.ndarray, n_examples: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (n_examples,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels are {labels.dtype}, {labels.shape}; expected {n_examples} integers"
        )
    return labels


def _shares(sizes: np.ndarray, n: int, order: np.ndarray) -> np.ndarray:
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


def _centred(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features less their mean, in units of the largest deviation, and their squared norms."""
    values = features - features.mean(axis=0) if len(features) else features
    values = values / (np.abs(values).max(initial=0.0) or 1.0)
    return values, (values * values).sum(axis=1)


def _progress(describe: str, n: int, n_examples: int):
    return tqdm(range(n), desc=describe, unit="ex", leave=False, disable=n * n_examples < LONG)


def _graph(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Edges of the k-nearest-neighbour graph in both directions, sorted: from, to, distance**2.

    Equally near neighbours are taken by position. scikit-learn's fast distances only propose
    candidates: the k are chosen by exact ones, among all examples where a tie may reach further.
    """
    from sklearn.neighbors import NearestNeighbors

    n_examples = len(features)
    if k < 1:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    centred = features - features.mean(axis=0)
    n_candidates = min(k + 1 + SPARE, n_examples)
    search = NearestNeighbors(n_neighbors=n_candidates, algorithm="brute").fit(centred)
    rounding = 1e-12 * (centred * centred).sum(axis=1).max()
    nearest, squares = np.empty((n_examples, k), np.int64), np.empty((n_examples, k))
    for start in range(0, n_examples, BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, n_examples))
        reach, candidates = search.kneighbors(centred[rows])  # (B, k + 1 + SPARE)
        nearest[rows], squares[rows] = _k_nearest(features, rows, candidates, k)
        if n_candidates < n_examples:
            for row in rows[squares[rows, -1] + rounding >= reach[:, -1] ** 2]:
                everyone = np.arange(n_examples)[None]
                nearest[row], squares[row] = _k_nearest(features, np.array([row]), everyone, k)
    rows = np.repeat(np.arange(n_examples), k)
    keys = np.concatenate(
        [rows * n_examples + nearest.ravel(), nearest.ravel() * n_examples + rows]
    )
    keys, at = np.unique(keys, return_index=True)
    return keys // n_examples, keys % n_examples, np.tile(squares.ravel(), 2)[at]


def _k_nearest(
    features: np.ndarray, rows: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each row's candidates but itself, by exact distance, then position."""
    candidates = np.sort(candidates, axis=1)
    squares = ((features[rows][:, None] - features[candidates]) ** 2).sum(axis=2)  # (B, c, D)
    masked = np.where(candidates == rows[:, None], np.inf, squares)
    columns = np.argsort(masked, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(candidates, columns, 1), np.take_along_axis(masked, columns, 1)
