"""Intervals are those of Student, verdicts ask for equivalence first, and the number of seeds that
is needed has the stated power."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.compare.statistics import paired_interval, seeds_needed, verdict

MARGIN, LEVEL = 0.01, 0.95


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_interval_and_p_value_are_those_of_scipy(seed, n, level):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n), rng.random(n)
    expected = stats.ttest_rel(a, b)
    ends = expected.confidence_interval(level)
    assert paired_interval(a - b, level) == pytest.approx(
        ((a - b).mean(), ends.low, ends.high, expected.pvalue)
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=8), st.randoms(use_true_random=False))
def test_interval_follows_a_swap_and_ignores_the_order_of_seeds(counts, random):
    differences = [count / 360 for count in counts]
    mean, low, high, p = paired_interval(np.array(differences), LEVEL)
    assume(len(set(counts)) > 1)  # equal differences have no interval
    assert paired_interval(-np.array(differences), LEVEL) == pytest.approx((-mean, -high, -low, p))
    random.shuffle(differences)
    assert paired_interval(np.array(differences), LEVEL) == pytest.approx((mean, low, high, p))
    assert low <= mean <= high


def test_equal_differences_and_too_few_pairs_have_an_answer():
    for equal in (np.full(3, 0.1), np.array([0, 1e-296]), np.zeros(2)):  # no interval of width 0
        np.testing.assert_equal(paired_interval(equal, LEVEL), (equal[0], *[np.nan] * 3))
    np.testing.assert_equal(paired_interval(np.array([0.1]), LEVEL), (0.1, *[np.nan] * 3))
    np.testing.assert_equal(paired_interval(np.array([]), LEVEL), [np.nan] * 4)


def test_verdicts():
    nan = float("nan")
    assert verdict(-0.02, 0.02, -0.015, 0.015, 0.01) == "inconclusive"
    assert verdict(-0.012, 0.008, -0.009, 0.005, 0.01) == "equivalent"  # 95 % may leave the margin
    assert verdict(0.001, 0.009, 0.002, 0.008, 0.01) == "equivalent"  # unlike 0, yet too small
    assert verdict(0.001, 0.011, 0.002, 0.010, 0.01) == "better"  # on the margin is not inside
    assert verdict(-0.03, -0.001, -0.02, -0.002, 0.01) == "worse"
    assert verdict(-0.011, -0.001, -0.01, -0.002, 0.01) == "worse"
    assert verdict(0.0, 0.03, 0.001, 0.02, 0.01) == "inconclusive"
    assert verdict(nan, nan, nan, nan, 0.01) == "inconclusive"


@pytest.mark.parametrize("sd", [0.005, 0.01, 0.03])
def test_seeds_needed_is_the_smallest_number_with_the_stated_power(sd):
    n = seeds_needed(sd, MARGIN)

    def powers(n):
        t95, t90 = stats.t.ppf([0.975, 0.95], n - 1)
        shift = MARGIN / sd * np.sqrt(n)
        two_sided = 2 * stats.nct.sf(t90, n - 1, shift) - 1
        return min(stats.nct.sf(t95, n - 1, shift), two_sided)

    assert powers(n) >= 0.8 > powers(n - 1)


def test_seeds_needed_settles_four_of_five_simulated_studies():
    rng, sd = np.random.default_rng(0), 0.01
    n, settled = seeds_needed(sd, MARGIN), {0.0: 0, MARGIN: 0}
    for truth in settled:
        for differences in truth + sd * rng.normal(size=(400, n)):
            _, low, high, _ = paired_interval(differences, 0.95)
            _, low90, high90, _ = paired_interval(differences, 0.90)
            wanted = "better" if truth else "equivalent"
            settled[truth] += verdict(low, high, low90, high90, MARGIN) == wanted
    assert min(settled.values()) / 400 > 0.75


def test_seeds_needed_grows_with_noise_and_has_limits():
    needed = [seeds_needed(sd, MARGIN) for sd in (0, 0.001, 0.01, 0.1, 1, 100)]
    assert needed == sorted(needed)
    assert needed[0] == 2
    # Large S: (1.645 + 1.282)^2 (sd / margin)^2, the normal approximation for equivalence.
    assert needed[-1] == pytest.approx(8.564 * 1e8, rel=0.001)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        seeds_needed(float("nan"), MARGIN)
    with pytest.raises(ValueError, match="power is 80"):
        seeds_needed(0.01, MARGIN, power=80)
