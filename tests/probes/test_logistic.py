"""Logistic regression reaches scikit-learn's minimum, for every C of the grid, whatever the
features and classes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.probes.logistic import TOLERANCE, fit_path

GRID = 10.0 ** np.arange(-4, 5)


def clouds(seed=0, n=400, d=6, k=3, spread=1.5):
    """Gaussian classes, standardised features of very different directions of variance."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % k
    values = rng.normal(size=(k, d))[labels] + spread * rng.normal(size=(n, d))
    values = values @ np.diag(2.0 ** -np.arange(d)) @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (values - values.mean(axis=0)) / values.std(axis=0), labels


def objective(values, labels, coefficients, intercepts, c):
    """scikit-learn's, divided by C * N: one row of coefficients is that of two classes."""
    scores = values @ coefficients.T + intercepts
    if scores.shape[1] == 1:
        scores = np.hstack([np.zeros_like(scores), scores])
    gold = scores[np.arange(len(labels)), labels]
    losses = np.logaddexp.reduce(scores, axis=1) - gold
    return losses.mean() + (coefficients**2).sum() / (2 * c * len(labels))


def reference(values, labels, c):
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=c, tol=1e-10, max_iter=20_000).fit(values, labels)


@pytest.mark.parametrize("k", [2, 3, 7])
def test_every_fit_reaches_the_minimum_of_scikit_learn(k):
    values, labels = clouds(k=k)
    fits = list(fit_path(values, labels, GRID))
    assert [fit.c for fit in fits] == list(GRID)
    for fit in fits:
        theirs = reference(values, labels, fit.c)
        least = objective(values, labels, theirs.coef_, theirs.intercept_, fit.c)
        coefficients = fit.coefficients[1:] - fit.coefficients[:1] if k == 2 else fit.coefficients
        intercepts = fit.intercepts[1:] - fit.intercepts[:1] if k == 2 else fit.intercepts
        ours = objective(values, labels, coefficients, intercepts, fit.c)
        assert ours == pytest.approx(fit.objective, rel=1e-5)
        assert least * (1 - 1e-6) <= ours <= least * (1 + 1e-4) + 1e-9
        assert fit.converged
        agree = (fit.predict(values) == theirs.predict(values)).mean()
        assert agree > 0.99


def test_the_gradient_at_a_fit_is_as_small_as_promised():
    values, labels = clouds()
    for fit in fit_path(values, labels, GRID):
        scores = values @ fit.coefficients.T + fit.intercepts
        probs = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        error = (probs - np.eye(3)[labels]) / len(labels)
        of_weights = error.T @ values + fit.coefficients / (fit.c * len(labels))
        assert np.abs(of_weights).max() <= 1.01 * TOLERANCE + 1e-7
        assert np.abs(error.sum(axis=0)).max() <= 1.01 * TOLERANCE + 1e-7


def test_a_path_ends_where_a_cold_start_ends():
    values, labels = clouds()
    *_, warm = fit_path(values, labels, GRID)
    (cold,) = fit_path(values, labels, [GRID[-1]])
    assert cold.objective == pytest.approx(warm.objective, rel=2e-4)
    assert (cold.predict(values) == warm.predict(values)).mean() > 0.99


def test_the_same_input_gives_the_same_bytes_and_the_order_of_the_grid_nothing():
    values, labels = clouds()
    runs = [list(fit_path(values, labels, grid)) for grid in (GRID, GRID, [*GRID[::-1], GRID[3]])]
    for fits in runs[1:]:
        for one, other in zip(runs[0], fits, strict=True):
            assert one.coefficients.tobytes() == other.coefficients.tobytes()
            assert one.intercepts.tobytes() == other.intercepts.tobytes()


def test_classes_that_a_plane_separates_converge_at_a_huge_c():
    values, labels = clouds(spread=0.02)
    *_, fit = fit_path(values, labels, [1e-6, 1.0, 1e5, 1e8])
    assert fit.converged
    assert (fit.predict(values) == labels).all()
    theirs = reference(values, labels, 1e8)
    least = objective(values, labels, theirs.coef_, theirs.intercept_, 1e8)
    # losses of 1e-9 nats: the smallest of what float32 could tell from 1 is 6e-8
    assert fit.objective < 1e-6
    assert fit.objective <= least * (1 + 1e-3)


def test_constant_and_repeated_features_and_missing_classes_reach_the_minimum():
    values, labels = clouds()
    whole = np.hstack([values, np.full((400, 2), 3.0), values[:, :2]])
    for fit in fit_path(whole, 10 * labels + 5, [0.01, 1.0, 100.0]):
        theirs = reference(whole, labels, fit.c)
        least = objective(whole, labels, theirs.coef_, theirs.intercept_, fit.c)
        assert fit.converged
        assert fit.objective == pytest.approx(least, rel=1e-4)
        assert set(fit.predict(whole)) <= {5, 15, 25}
        np.testing.assert_allclose(fit.coefficients[:, 6:8], 0, atol=1e-9)


def test_features_without_any_variance_leave_the_frequencies_of_the_classes():
    labels = np.array([0, 0, 0, 1])
    (fit,) = fit_path(np.ones((4, 3)), labels, [1.0])
    assert fit.converged
    # p = 3/4, 1/4: the entropy of the labels
    assert fit.objective == pytest.approx(-0.75 * np.log(0.75) - 0.25 * np.log(0.25), rel=1e-4)
    assert (fit.predict(np.ones((2, 3))) == 0).all()


def test_more_features_than_examples_reach_the_minimum_too():
    rng = np.random.default_rng(0)
    values, labels = rng.normal(size=(30, 80)), np.arange(30) % 3
    for fit in fit_path(values, labels, [0.001, 0.1, 10.0]):
        theirs = reference(values, labels, fit.c)
        least = objective(values, labels, theirs.coef_, theirs.intercept_, fit.c)
        assert fit.objective == pytest.approx(least, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.integers(2, 5), st.floats(-50, 50), st.floats(0.3, 2))
def test_an_offset_changes_nothing_and_a_rotation_only_the_coordinates(seed, k, offset, spread):
    values, labels = clouds(seed, n=60, d=4, k=k, spread=spread)
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(4, 4)))[0]
    (plain,) = fit_path(values, labels, [1.0])
    (moved,) = fit_path(values @ rotation + offset, labels, [1.0])
    assert moved.objective == pytest.approx(plain.objective, rel=2e-4)
    np.testing.assert_allclose(moved.coefficients @ rotation.T, plain.coefficients, atol=0.05)
    np.testing.assert_allclose(plain.coefficients.sum(axis=0), 0, atol=1e-9)
