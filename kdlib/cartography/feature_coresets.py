"""Coresets from features: exactly n of N examples, spread out or representative.

Pure functions on arrays, as in `coresets`: the greedy methods work in the order of `ties`, so that
the choice does not depend on the order of the examples. Features are (N, D) finite float64.

[Maharana2023] Maharana et al., D2 Pruning: Message Passing for Balancing Diversity and Difficulty
    in Data Pruning, 2023, arXiv 2310.07931
[Zheng2023] Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, 2023,
    arXiv 2210.15809
[Sener2018] Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set
    Approach, 2018, arXiv 1708.00489
[Welling2009] Welling, Herding Dynamical Weights to Learn, ICML 2009
"""

import heapq

import numpy as np
from tqdm.auto import tqdm

DECIMALS = 12  # to which squared distances of centred, scaled features are compared
# Distances of a greedy loop (n * N) from which it shows its progress: 20 s at D = 64, where 2.5e8
# took 5 s (one run, one thread of a Xeon, NumPy 2.4, 2026-11).
LONG = 10**9
BLOCK_ROWS = 1024  # rows whose neighbours are compared at a time
SPARE = 8  # candidates beyond the k nearest: room for ties, and for the rounding of fast distances


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
    order = np.argsort(ties)
    values, squares = _centred(features[order])
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
    order = np.argsort(ties)
    values, squares = _centred(features[order])
    total, taken, chosen = np.zeros(values.shape[1]), np.zeros(len(ties)), []
    for _ in _progress("herding", n, len(ties)):
        # |total + x|^2 without |total|^2, which is the same for all
        pick = np.argmin(np.round(squares + 2 * (values @ total), DECIMALS) + taken)
        chosen.append(pick)
        taken[pick] = np.inf
        total += values[pick]
    return np.sort(order[chosen])


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
