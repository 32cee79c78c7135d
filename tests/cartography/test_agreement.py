"""Rank correlations, runs needed, and how averages of runs agree."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.cartography.agreement import (
    _disjoint,
    between_runs,
    rank_correlations,
    runs_needed,
    spearman,
    stability,
)

RNG = np.random.default_rng(0)
TRUTH = RNG.normal(size=400)


def noisy(n_runs, noise=1.0):
    return TRUTH + noise * RNG.normal(size=(n_runs, len(TRUTH)))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
def test_spearman_is_that_of_scipy_ties_included(pairs):
    first, second = np.array(pairs).T
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        assert math.isnan(spearman(first, second))
    else:
        np.testing.assert_allclose(
            spearman(first, second), stats.spearmanr(first, second).statistic, atol=1e-9
        )


def test_any_rising_function_of_a_score_ranks_alike():
    assert spearman(TRUTH, np.exp(TRUTH)) == 1
    assert spearman(TRUTH, -TRUTH) == -1


def test_the_correlations_of_a_table_are_square_and_nan_for_a_constant_column():
    table = pd.DataFrame({"x": [1, 2, 3], "y": [3, 2, 1], "z": [7, 7, 7]})
    matrix = rank_correlations(table)
    assert list(matrix.index) == list(matrix.columns) == ["x", "y", "z"]
    assert matrix.loc["x", "y"] == pytest.approx(-1)
    assert matrix.loc["x", "x"] == pytest.approx(1)
    assert matrix["z"].isna().all()


@pytest.mark.parametrize("digits", [1, 12])  # with ties, and without
def test_correlations_are_the_cosines_of_centred_ranks(digits):
    scores = np.random.default_rng(1).normal(size=(5, 300)).round(digits)
    ranks = stats.rankdata(scores, axis=1)
    ranks -= ranks.mean(axis=1, keepdims=True)
    ranks /= np.linalg.norm(ranks, axis=1, keepdims=True)
    matrix = rank_correlations(pd.DataFrame(scores.T))
    np.testing.assert_allclose(matrix, ranks @ ranks.T, atol=1e-13)


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        spearman(np.array([1.0, np.nan]), np.array([1.0, 2.0]))


def test_between_runs_is_the_mean_over_pairs():
    runs = np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1]])  # pairs: 1, -1, -1
    assert between_runs(runs) == pytest.approx({"correlation": -1 / 3, "low": -1, "high": 1})


def test_averages_of_more_runs_agree_better_as_the_prophecy_formula_predicts():
    runs = noisy(12)
    table = stability(runs)
    assert table["n_runs"].tolist() == [1, 2, 3, 4, 5, 6]
    assert (np.diff(table["correlation"]) > 0).all()
    assert (table["low"] <= table["correlation"]).all()
    assert (table["correlation"] <= table["high"]).all()
    single = between_runs(runs)["correlation"]
    target = table["correlation"].iloc[-1]
    # noise is normal here, where rank correlations follow the formula closely
    assert abs(runs_needed(single, target) - 6) <= 1


def test_groups_share_no_run_and_each_pair_of_groups_stands_once():
    pairs = list(_disjoint(5, 2))
    assert all(not set(x) & set(y) for x, y in pairs)
    assert len({frozenset([x, y]) for x, y in pairs}) == len(pairs) == 5 * 3  # C(5,2) C(3,2) / 2


def test_the_same_seed_draws_the_same_groups():
    runs = noisy(12)
    pd.testing.assert_frame_equal(stability(runs), stability(runs))


def test_runs_needed_solves_the_prophecy_formula():
    for r, target in [(0.3, 0.9), (0.7, 0.95), (0.94, 0.95)]:
        n = runs_needed(r, target)
        assert n * r / (1 + (n - 1) * r) >= target - 1e-9
        assert n == 1 or (n - 1) * r / (1 + (n - 2) * r) < target
    assert runs_needed(-0.2) == math.inf
    assert math.isnan(runs_needed(math.nan))
