"""Coresets from features against slow loops from their papers, and scores from features."""

import math

import numpy as np
import pytest
from cartography.test_coresets import SELECTORS, budgets_of, data_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cartography import feature_coresets
from kdlib.cartography.feature_scores import class_distance, finite_features, prototypicality


def d2_loop(score, features, n, ties, k, gamma_forward, gamma_reverse):
    """D2 pruning as its paper states it, over all pairs."""
    n_examples = len(ties)
    square = [[float(((a - b) ** 2).sum()) for b in features] for a in features]
    linked = np.zeros((n_examples, n_examples), dtype=bool)
    for i in range(n_examples):
        others = sorted(set(range(n_examples)) - {i}, key=lambda j: (square[i][j], ties[j]))
        linked[i, others[:k]] = linked[others[:k], i] = True
    s = [
        score[i]
        + sum(math.exp(-gamma_forward * square[i][j]) * score[j] for j in np.flatnonzero(linked[i]))
        for i in range(n_examples)
    ]
    left = set(range(n_examples))
    while len(left) > n_examples - n:
        best = min(left, key=lambda i: (-s[i], ties[i]))
        left.remove(best)
        for j in left & set(np.flatnonzero(linked[best]).tolist()):
            s[j] -= math.exp(-gamma_reverse * square[best][j]) * s[best]
    return sorted(set(range(n_examples)) - left)


@settings(max_examples=40, deadline=None)
@given(
    n_examples=st.integers(1, 40),
    k=st.integers(1, 5),
    gammas=st.sampled_from([(0.1, 1.0), (1.0, 0.1), (5.0, 0.0)]),
    seed=st.integers(0, 1000),
)
def test_d2_follows_the_loop_of_its_paper(n_examples, k, gammas, seed):
    data = data_of(n_examples, seed, "smooth")
    score, features, ties = data["score"], data["features"], data["ties"]
    options = {"neighbours": k, "gamma_forward": gammas[0], "gamma_reverse": gammas[1]}
    for n in budgets_of(n_examples):
        expected = d2_loop(score, features, n, ties, k, *gammas)
        assert feature_coresets.d2(score, features, n, ties, **options).tolist() == expected


@settings(max_examples=40, deadline=None)
@given(n_examples=st.integers(1, 60), k=st.integers(1, 5), seed=st.integers(0, 1000))
def test_d2_decides_equal_distances_and_equal_scores_by_ties(n_examples, k, seed):
    # a grid and whole scores, every weight 1: arithmetic is exact, so ties are ties
    data = data_of(n_examples, seed, "levels")
    score, features, ties = data["score"] * 4, data["features"], data["ties"]
    options = {"neighbours": k, "gamma_forward": 0, "gamma_reverse": 0}
    for n in budgets_of(n_examples):
        expected = d2_loop(score, features, n, ties, k, 0, 0)
        assert feature_coresets.d2(score, features, n, ties, **options).tolist() == expected


def test_d2_lowers_the_neighbours_of_what_it_takes():
    # two pairs at distance 0 and 1 from each other, the pairs far apart: (0, 1), (2, 3)
    features = np.array([[0.0], [0.0], [50.0], [51.0]])
    score, ties = np.array([5.0, 4.0, 3.0, 2.0]), np.arange(4, dtype=np.uint64)
    options = {"neighbours": 1, "gamma_forward": 1.0, "gamma_reverse": 1.0}
    # forward: 5 + 4, 4 + 5, 3 + 2/e = 3.74, 2 + 3/e = 3.10. 0 is taken and 1 sinks to 0;
    # 2 is taken and 3 sinks to 3.10 - 3.74/e = 1.73, which is above 0
    for n, order in enumerate([[], [0], [0, 2], [0, 2, 3], [0, 1, 2, 3]]):
        assert feature_coresets.d2(score, features, n, ties, **options).tolist() == order


def test_d2_over_several_blocks_equals_one_block(monkeypatch):
    data = data_of(200, 5, "levels")
    one = SELECTORS["d2"](data, 60)
    monkeypatch.setattr(feature_coresets, "BLOCK_ROWS", 7)
    assert SELECTORS["d2"](data, 60).tolist() == one.tolist()


def whole(features):
    """Features on a grid as exact integers, and N times each less the sum of all."""
    rows = [[int(v) for v in row] for row in features]
    total = [sum(column) for column in zip(*rows, strict=True)]
    return rows, [[len(rows) * v - t for v, t in zip(row, total, strict=True)] for row in rows]


def k_center_loop(features, n, ties):
    rows, centred = whole(features)
    chosen = []
    while len(chosen) < n:
        left = [i for i in range(len(rows)) if i not in chosen]
        if chosen:
            far = {i: min(math.dist(rows[i], rows[j]) ** 2 for j in chosen) for i in left}
            chosen.append(min(left, key=lambda i: (-round(far[i]), ties[i])))
        else:
            chosen.append(min(left, key=lambda i: (sum(v * v for v in centred[i]), ties[i])))
    return sorted(chosen)


def herding_loop(features, n, ties):
    _, centred = whole(features)
    total, chosen = [0] * features.shape[1], []
    while len(chosen) < n:
        left = [i for i in range(len(centred)) if i not in chosen]
        error = {i: sum((t + v) ** 2 for t, v in zip(total, centred[i], strict=True)) for i in left}
        chosen.append(min(left, key=lambda i: (error[i], ties[i])))
        total = [t + v for t, v in zip(total, centred[chosen[-1]], strict=True)]
    return sorted(chosen)


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(["k_center", "herding"]),
    n_examples=st.integers(1, 40),
    seed=st.integers(0, 1000),
)
def test_greedy_methods_follow_exact_loops_on_a_grid_full_of_ties(method, n_examples, seed):
    data = data_of(n_examples, seed, "levels")
    loop = {"k_center": k_center_loop, "herding": herding_loop}[method]
    for n in budgets_of(n_examples):
        expected = loop(data["features"], n, data["ties"])
        assert SELECTORS[method](data, n).tolist() == expected


def test_k_center_starts_in_the_middle_and_goes_to_the_far_ends():
    # mean 4: first 3; then 10 (distance 7), then 0 and 2 are 3 and 1 from 3: 0
    features, ties = np.array([[0.0], [2.0], [3.0], [10.0], [5.0]]), np.arange(5, dtype=np.uint64)
    for n, order in enumerate([[], [2], [2, 3], [0, 2, 3], [0, 2, 3, 4]]):
        assert feature_coresets.k_center(features, n, ties).tolist() == order


def test_herding_keeps_the_mean_of_all():
    # mean 4: first 5 (3 is as near, its tie larger), then 3 makes the mean of two 4; 0 and 8 would
    # then move it equally far, and 0 has the smaller tie
    features, ties = np.array([[0.0], [3.0], [5.0], [8.0]]), np.array([0, 3, 2, 1], np.uint64)
    for n, order in enumerate([[], [2], [1, 2], [0, 1, 2], [0, 1, 2, 3]]):
        assert feature_coresets.herding(features, n, ties).tolist() == order


@pytest.mark.parametrize("method", ["k_center", "herding"])
def test_greedy_methods_ignore_shift_scale_and_the_progress_bar(method, monkeypatch):
    data = data_of(80, 2, "smooth")
    chosen = SELECTORS[method](data, 30).tolist()
    monkeypatch.setattr(feature_coresets, "LONG", 0)
    moved = {**data, "features": (data["features"] * 1024 + 77).astype(np.float64)}
    assert SELECTORS[method](moved, 30).tolist() == chosen


def test_class_distance_is_measured_from_the_coordinatewise_median():
    features = np.array([[0, 0], [1, 9], [5, 1], [7, 7], [4, 4]], dtype=np.float32)
    labels = np.array([3, 3, 3, 1, 1])
    # medians (1, 1) and (5.5, 5.5)
    expected = [2**0.5, 8.0, 4.0, 4.5**0.5, 4.5**0.5]
    np.testing.assert_allclose(class_distance(features, labels), expected)
    assert class_distance(np.empty((0, 2)), np.empty(0, np.int64)).tolist() == []


def test_prototypicality_is_the_distance_to_the_centre_of_the_nearest_cluster():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(0, 1, (30, 3)), rng.normal(50, 1, (20, 3))])
    blobs = np.split(features, [30])
    expected = np.concatenate([np.linalg.norm(b - b.mean(axis=0), axis=1) for b in blobs])
    scores = prototypicality(features, n_clusters=2, seed=4)
    np.testing.assert_allclose(scores, expected)
    assert (prototypicality(features, n_clusters=2, seed=4) == scores).all()


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.ones(3), r"features have shape \(3,\); expected \(3, D\)"),
        (np.ones((2, 4)), r"features have shape \(2, 4\); expected \(3, D\)"),
        (np.ones((3, 0)), r"features have shape \(3, 0\); expected \(3, D\)"),
        (np.full((3, 1), np.inf), "NaN or infinity"),
    ],
)
def test_features_that_are_no_matrix_of_finite_numbers_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        finite_features(features, 3)


def test_more_clusters_than_distinct_features_are_refused():
    with pytest.raises(ValueError, match=r"n_clusters is 3; expected \[1, 2\]"):
        prototypicality(np.array([[0.0], [0.0], [1.0]]), 3, 0)
