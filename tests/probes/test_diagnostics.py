"""The shape of features is judged against what theory allows, and each number against a slow count
over all pairs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.probes.diagnostics import (
    alignment,
    collapse,
    effective_rank,
    even_uniformity,
    isotropic_rank,
    linear_cka,
    mean_cosine,
    shared,
    uniformity,
    unit_variance,
)


def test_effective_rank_of_known_spectra():
    rng = np.random.default_rng(0)
    left = np.linalg.qr(rng.normal(size=(30, 3)))[0]
    right = np.linalg.qr(rng.normal(size=(6, 3)))[0]

    def with_spectrum(*singular):
        return left @ np.diag(singular) @ right.T

    assert effective_rank(with_spectrum(5, 5, 5)) == pytest.approx(3)
    assert effective_rank(with_spectrum(7, 0, 0)) == pytest.approx(1)
    # p = 1/2, 1/4, 1/4: entropy 1.5 ln 2.
    assert effective_rank(with_spectrum(2, 1, 1)) == pytest.approx(2**1.5)
    assert effective_rank(np.full((20, 5), 0.1, np.float32)) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.zeros((4, 3))) == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(2, 12), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_effective_rank_is_bounded_and_ignores_scale_and_rotation(n, d, scale, seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, d))
    rank = effective_rank(values)
    assert 1 <= rank <= min(n, d) + 1e-9
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    assert effective_rank(scale * values @ rotation) == pytest.approx(rank)


@pytest.mark.parametrize("shape", [(16, 16), (1100, 32), (40, 200), (300, 64)])
def test_isotropic_rank_is_what_random_features_reach(shape):
    rng = np.random.default_rng(0)
    ranks = [effective_rank(rng.normal(size=shape)) for _ in range(10)]
    assert np.mean(ranks) == pytest.approx(isotropic_rank(*shape), rel=0.02)


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 60), st.integers(4, 60), st.floats(1e-3, 1e3), st.integers(0, 99))
def test_isotropic_random_features_pass_and_constant_ones_fail(n, d, scale, seed):
    rng = np.random.default_rng(seed)
    passed = collapse((scale * rng.normal(size=(n, d))).astype(np.float32))
    assert not passed.collapsed
    assert 0.8 < passed.ratio < 1.2
    row = (scale * rng.normal(size=(1, d))).astype(np.float32)
    failed = collapse(np.repeat(row, n, axis=0))
    assert failed.collapsed
    assert failed.ratio == pytest.approx(1 / failed.isotropic_rank, rel=1e-4)
    assert collapse(np.zeros((n, d))).collapsed


def test_collapse_needs_two_examples_two_features_and_finite_values():
    for shape in ((1, 8), (8, 1)):
        with pytest.raises(ValueError, match="at least 2 examples and 2 features"):
            collapse(np.ones(shape))
    with pytest.raises(ValueError, match="NaN or infinite"):
        effective_rank(np.array([[1.0, np.nan]]))


def rotation(d, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def unit(values):
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms == 0, 1, norms)


def pairs(n):
    return [(i, j) for i in range(n) for j in range(n) if i != j]


def test_diagnostics_of_three_points_worked_by_hand():
    # directions: right, up, right; centred on their mean (1, 1): (0, -1), (-1, 1), (1, 0)
    values, labels = np.array([[1.0, 0.0], [0.0, 2.0], [2.0, 1.0]]), np.array([0, 0, 1])
    # cosines: -1/sqrt 2 (first and second), 0, -1/sqrt 2
    assert mean_cosine(values) == pytest.approx(-2 / np.sqrt(2) / 3)
    square = np.array([[1.0, 0.0], [0.0, 3.0], [1.0, 0.0], [0.0, 5.0]])
    # on the circle: x is 1, 0, 1, 0 and y 0, 1, 0, 1: each has variance 1/4
    assert unit_variance(square) == pytest.approx(1 / 4)
    # the only pair of a class is right and up: squared distance 2
    assert alignment(values, labels) == pytest.approx(2)
    # of six pairs among four points two coincide, four are at squared distance 2
    assert uniformity(square) == pytest.approx(np.log((2 + 4 * np.exp(-4)) / 6))
    # x and x + y: covariance 1 of variances 1 and 2 in one dimension each, squared over product
    x, y = np.array([[1.0], [-1.0], [1.0], [-1.0]]), np.array([[1.0], [1.0], [-1.0], [-1.0]])
    assert linear_cka(x, x + y) == pytest.approx(1 / 2)
    assert linear_cka(x, np.hstack([x, y])) == pytest.approx(1 / np.sqrt(2))


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 24), st.integers(1, 6), st.integers(0, 999))
def test_sums_over_pairs_are_those_of_a_slow_count(n, d, seed):
    rng = np.random.default_rng(seed)
    values, labels = rng.normal(size=(n, d)) + 0.3, rng.integers(0, 2, n)
    values[0] = 0
    u, centred = unit(values), unit(values - values.mean(axis=0))
    assert mean_cosine(values) == pytest.approx(
        np.mean([centred[i] @ centred[j] for i, j in pairs(n)]), abs=1e-12
    )
    distances = {(i, j): ((u[i] - u[j]) ** 2).sum() for i, j in pairs(n)}
    of_class = [v for (i, j), v in distances.items() if labels[i] == labels[j]]
    assert alignment(values, labels) == pytest.approx(np.mean(of_class), abs=1e-12)
    far = np.exp(-2 * np.array(list(distances.values())))
    assert uniformity(values) == pytest.approx(np.log(far.mean()), abs=1e-9)
    other = rng.normal(size=(n, 3))
    gram, other_gram = (c @ c.T for c in (values - values.mean(0), other - other.mean(0)))
    hsic = [(a * b).sum() for a, b in ((gram, other_gram), (gram, gram), (other_gram, other_gram))]
    expected = hsic[0] / np.sqrt(hsic[1] * hsic[2])
    assert linear_cka(values, other) == pytest.approx(expected, abs=1e-9)
    assert linear_cka(values, other, norm=shared(other, other)) == linear_cka(values, other)


@settings(max_examples=30, deadline=None)
@given(st.integers(4, 30), st.integers(2, 8), st.floats(1e-3, 1e3), st.integers(0, 999))
def test_scale_rotation_and_order_change_no_diagnostic_and_all_stay_in_range(n, d, scale, seed):
    rng = np.random.default_rng(seed)
    values, other = rng.normal(size=(n, d)), rng.normal(size=(n, 3))
    labels, order = np.arange(n) % 2, rng.permutation(n)

    def all_of(values, labels, other):
        return [
            mean_cosine(values), unit_variance(values), alignment(values, labels),
            uniformity(values), linear_cka(values, other),
        ]  # fmt: skip

    found = all_of(values, labels, other)
    changed = scale * values @ rotation(d, seed)
    assert all_of(changed[order], labels[order], other[order]) == pytest.approx(found)
    cosine, variance, aligned, even, cka = found
    assert -1 / (n - 1) - 1e-12 <= cosine <= 1
    assert 0 <= variance <= 1 / d + 1e-12
    assert 0 <= aligned <= 4
    assert -8 <= even <= 1e-12
    assert 0 <= cka <= 1
    assert linear_cka(values, scale * values @ rotation(d) + 5) == pytest.approx(1)
    assert linear_cka(other, values) == pytest.approx(cka)


def test_isotropic_features_reach_what_theory_says():
    values = np.random.default_rng(0).normal(size=(3000, 16))
    labels = np.arange(3000) % 10
    assert mean_cosine(values) == pytest.approx(0, abs=1e-3)
    assert unit_variance(values) == pytest.approx(1 / 16, rel=2e-3)
    assert alignment(values, labels) == pytest.approx(2, abs=0.01)
    assert uniformity(values) == pytest.approx(even_uniformity(16), abs=0.01)
    # two networks that have nothing in common: about D / sqrt(N D) of chance
    assert linear_cka(values, np.random.default_rng(1).normal(size=(3000, 16))) < 0.02


@pytest.mark.parametrize("d", [2, 3, 64])
def test_even_uniformity_is_the_mean_over_the_sphere(d):
    first, second = (unit(np.random.default_rng(s).normal(size=(200_000, d))) for s in (0, 1))
    drawn = np.log(np.exp(-2 * ((first - second) ** 2).sum(axis=1)).mean())
    assert even_uniformity(d) == pytest.approx(drawn, abs=0.02)


def test_collapsed_features_are_at_the_bad_end_of_every_diagnostic():
    row = np.random.default_rng(0).normal(size=(1, 8)).astype(np.float32)
    same = np.repeat(row, 40, axis=0)
    labels = np.arange(40) % 4
    assert mean_cosine(same) == 0  # nothing is left of them without their mean
    assert unit_variance(same) == pytest.approx(0, abs=1e-12)
    assert alignment(same, labels) == pytest.approx(0, abs=1e-12)
    assert uniformity(same) == pytest.approx(0, abs=1e-6)
    assert linear_cka(same.astype(float) * 0, np.eye(40)) == 0
    line = np.outer(np.arange(40.0), row)
    assert mean_cosine(line) == pytest.approx(-1 / 39)  # two directions, opposite
    assert mean_cosine(np.vstack([line[1:], 1e6 * row])) > 0.8


def test_uniformity_of_some_rows_is_that_of_these_examples():
    values = np.random.default_rng(0).normal(size=(1200, 5))
    rows = np.random.default_rng(1).permutation(1200)[:600]
    assert uniformity(values, rows) == pytest.approx(uniformity(values[rows]))
    assert uniformity(values, rows) != uniformity(values)


def test_diagnostics_without_a_pair_are_refused():
    one = np.ones((1, 3))
    for diagnostic in (mean_cosine, uniformity):
        with pytest.raises(ValueError, match="expected at least 2 to make a pair"):
            diagnostic(one)
    with pytest.raises(ValueError, match="two examples of some class"):
        alignment(np.eye(3), np.arange(3))
    with pytest.raises(ValueError, match="expected one label each"):
        alignment(np.eye(3), np.zeros(2, int))
    with pytest.raises(ValueError, match=r"3 and of 2 examples; expected those of the same"):
        linear_cka(np.eye(3), np.eye(2))
    for diagnostic in (mean_cosine, uniformity, unit_variance):
        with pytest.raises(ValueError, match="NaN or infinite"):
            diagnostic(np.array([[1.0, np.nan], [0.0, 1.0]]))
