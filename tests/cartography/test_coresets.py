"""Coresets from scores against slow loops from their papers; budgets and ties of every coreset."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.cartography import coresets, feature_coresets


def ties_of(n, rng):
    """Distinct uint64 over the whole range, in no order."""
    return rng.permutation(np.unique(rng.integers(0, 2**64, 2 * n, dtype=np.uint64)))[:n]


def data_of(n, seed, kind="levels"):
    """What every selector below needs; `levels` takes few values, so that cuts go through ties."""
    rng = np.random.default_rng(seed)
    score, features = rng.random(n), rng.standard_normal((n, 2))
    if kind == "levels":
        score, features = np.round(score * 4) / 4, np.round(features)
    if kind == "constant":
        score, features = np.full(n, 0.5), np.full((n, 2), 1 / 3)
    labels = rng.integers(0, 3, n)
    return {"score": score, "features": features, "labels": labels, "ties": ties_of(n, rng)}


def permuted(data, order):
    return {name: values[order] for name, values in data.items()}


def lowest_of_each(data):
    return lambda positions, m: positions[
        coresets.lowest(data["score"][positions], m, data["ties"][positions])
    ]


MIX = {"easy": 0.5, "hard": 0.3, "random": 0.2}
SELECTORS = {
    "lowest": lambda d, n: coresets.lowest(d["score"], n, d["ties"]),
    "moderate": lambda d, n: coresets.moderate(d["score"], n, d["ties"]),
    "mixture": lambda d, n: coresets.mixture(
        {"easy": d["score"], "hard": -d["score"], "random": 0 * d["score"]}, MIX, n, d["ties"]
    ),
    "ccs": lambda d, n: coresets.ccs(d["score"], n, d["ties"], cutoff=0, n_strata=4),
    "d2": lambda d, n: feature_coresets.d2(
        d["score"], d["features"], n, d["ties"], neighbours=3, gamma_forward=0.5, gamma_reverse=0.2
    ),
    "k_center": lambda d, n: feature_coresets.k_center(d["features"], n, d["ties"]),
    "herding": lambda d, n: feature_coresets.herding(d["features"], n, d["ties"]),
    "dual_beta": lambda d, n: coresets.dual_beta(d["score"], d["score"], n, d["ties"], exponent=4),
    "per_class": lambda d, n: coresets.per_class(d["labels"], n, d["ties"], lowest_of_each(d)),
}
CASES = {
    "name": st.sampled_from(sorted(SELECTORS)),
    "n_examples": st.integers(1, 40),
    "kind": st.sampled_from(["smooth", "levels", "constant"]),
    "seed": st.integers(0, 1000),
}


def budgets_of(n_examples):
    return sorted({0, 1, n_examples // 3, n_examples})


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_every_selector_returns_exactly_its_budget_of_sorted_distinct_positions(
    name, n_examples, kind, seed
):
    data = data_of(n_examples, seed, kind)
    for n in budgets_of(n_examples):
        chosen = SELECTORS[name](data, n)
        assert chosen.dtype == np.int64
        assert chosen.shape == (n,)
        assert (np.diff(chosen) > 0).all()
        assert not n or (chosen[0] >= 0 and chosen[-1] < n_examples)


@settings(max_examples=150, deadline=None)
@given(**CASES)
def test_permuting_the_examples_permutes_the_choice_alike(name, n_examples, kind, seed):
    data = data_of(n_examples, seed, kind)
    order = np.random.default_rng(seed + 1).permutation(n_examples)
    for n in budgets_of(n_examples):
        chosen = SELECTORS[name](permuted(data, order), n)
        assert sorted(order[chosen].tolist()) == SELECTORS[name](data, n).tolist()


@pytest.mark.parametrize("name", sorted(set(SELECTORS) - {"moderate"}))
def test_where_all_is_equal_the_smallest_ties_are_chosen(name):
    data = data_of(30, 0, "constant")
    data["labels"][:] = 0
    if name == "d2":  # its graph is one of hubs where all distances are 0; here they are far apart
        data["features"] = 1000.0 * np.arange(60).reshape(30, 2)
    for n in (1, 10, 29):
        assert SELECTORS[name](data, n).tolist() == sorted(np.argsort(data["ties"])[:n])


def test_where_all_is_equal_central_takes_the_middle_of_the_ties():
    data = data_of(31, 0, "constant")
    assert SELECTORS["moderate"](data, 11).tolist() == sorted(np.argsort(data["ties"])[10:21])


@pytest.mark.parametrize("name", sorted(SELECTORS))
def test_no_examples_give_an_empty_choice(name):
    data = data_of(0, 0)
    data["features"] = np.empty((0, 2))
    assert SELECTORS[name](data, 0).tolist() == []


# --- scores alone ---------------------------------------------------------------------------------


def test_the_lowest_are_taken_and_equal_ones_by_ties():
    cost, ties = np.array([3.0, 1.0, 1.0, 0.0, 1.0]), np.array([0, 9, 2, 4, 5], np.uint64)
    # in order: 3 (cost 0), then of cost 1: position 2 (tie 2), 4 (tie 5), 1 (tie 9), then 0
    for n, order in enumerate([[], [3], [2, 3], [2, 3, 4], [1, 2, 3, 4], [0, 1, 2, 3, 4]]):
        assert coresets.lowest(cost, n, ties).tolist() == order


@pytest.mark.parametrize(("ties", "extra"), [([3, 0, 2, 1], 0), ([0, 3, 2, 1], 3)])
def test_central_takes_the_middle_and_of_two_equally_far_the_smaller_tie(ties, extra):
    # scores 0 .. 3 at positions 1, 2, 3, 0: the middle two are 2 and 3; the outer two 1 and 0
    score = np.array([3.0, 0.0, 1.0, 2.0])
    ties = np.array(ties, np.uint64)
    assert coresets.moderate(score, 2, ties).tolist() == [2, 3]
    outer = {0: 1, 3: 0}[extra]
    assert coresets.moderate(score, 3, ties).tolist() == sorted([2, 3, outer])
    # one of the middle two: position 2 has tie 2, position 3 has tie 1
    assert coresets.moderate(score, 1, ties).tolist() == [3]


def test_a_mixture_takes_turns_and_passes_over_what_is_taken():
    ties = np.arange(6, dtype=np.uint64)
    costs = {"a": np.array([0, 1, 2, 3, 4, 5]), "b": np.array([0, 1, 5, 5, 2, 3])}
    # a takes 0; b, whose best is 0, takes 1; a takes 2; b takes 4
    assert coresets.mixture(costs, {"a": 0.5, "b": 0.5}, 4, ties).tolist() == [0, 1, 2, 4]
    # b first: b 0, a 1, b 4, a 2: the same set; of three, b has the odd one: b 0, a 1, b 4
    assert coresets.mixture(costs, {"b": 0.5, "a": 0.5}, 3, ties).tolist() == [0, 1, 4]
    # a has 3 of 4 (turns a 0, b 1, a 2, a 3)
    assert coresets.mixture(costs, {"a": 0.75, "b": 0.25}, 4, ties).tolist() == [0, 1, 2, 3]


def test_a_mixture_allots_by_largest_remainder():
    ties = np.arange(200, dtype=np.uint64)
    cost = np.arange(200.0)
    apart = {"a": cost, "b": np.abs(cost - 100)}
    for share, n, n_a in [(0.29, 100, 29), (1 / 3, 10, 3), (0.7, 5, 4), (0.25, 10, 3), (0.0, 7, 0)]:
        # 0.7 of 5 is 3.5, 0.25 of 10 is 2.5: equal remainders, of which a is named first
        chosen = coresets.mixture(apart, {"a": share, "b": round(1 - share, 15)}, n, ties)
        assert (chosen < 50).sum() == n_a


def coverage_loop(difficulty, n, ties, cutoff, n_strata):
    """Algorithm 1 of Zheng et al., with its budgets from the smallest stratum on."""
    order = sorted(range(len(ties)), key=lambda i: (difficulty[i], ties[i]))
    kept = order[: len(order) - math.floor(Fraction(str(cutoff)) * len(order))]
    low, high = min(difficulty[kept]), max(difficulty[kept])
    strata = {}
    for i in kept:
        k = 0 if high == low else int((difficulty[i] - low) / (high - low) * n_strata)
        strata.setdefault(min(k, n_strata - 1), []).append(i)
    groups = [sorted(group, key=lambda i: ties[i]) for group in strata.values()]
    chosen = []
    # of equal sizes the one with the smallest tie comes last: it is served as the larger
    groups.sort(key=lambda group: (len(group), -int(ties[group[0]])))
    for done, group in enumerate(groups):
        chosen += group[: (n - len(chosen)) // (len(groups) - done)]
    return sorted(chosen)


@settings(max_examples=100, deadline=None)
@given(
    n_examples=st.integers(1, 60),
    kind=st.sampled_from(["smooth", "levels", "constant"]),
    cutoff=st.sampled_from([0.0, 0.1, 0.29, 0.5]),
    n_strata=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_coverage_follows_the_loop_of_its_paper(n_examples, kind, cutoff, n_strata, seed):
    data = data_of(n_examples, seed, kind)
    difficulty, ties = data["score"] ** 3, data["ties"]
    for n in range(n_examples - math.floor(Fraction(str(cutoff)) * n_examples) + 1):
        chosen = coresets.ccs(difficulty, n, ties, cutoff=cutoff, n_strata=n_strata)
        assert chosen.tolist() == coverage_loop(difficulty, n, ties, cutoff, n_strata)


def test_coverage_drops_the_hardest_and_shares_what_small_strata_lack():
    # the hardest tenth is position 9; width 8 / 2: strata {0 .. 6} (below 4) and {7, 8}
    difficulty = np.array([0, 0, 1, 1, 2, 2, 3, 8, 8, 99.0])
    ties = np.arange(10, dtype=np.uint64)[::-1].copy()
    options = {"cutoff": 0.1, "n_strata": 2}
    assert coresets.ccs(difficulty, 2, ties, **options).tolist() == [6, 8]
    assert coresets.ccs(difficulty, 3, ties, **options).tolist() == [
        5,
        6,
        8,
    ]  # odd one: the larger
    assert coresets.ccs(difficulty, 6, ties, **options).tolist() == [3, 4, 5, 6, 7, 8]
    assert coresets.ccs(difficulty, 9, ties, **options).tolist() == list(range(9))


def test_a_cutoff_is_the_decimal_number_it_is_written_as():
    data = data_of(100, 0)  # 0.29 * 100 is 28.999... as a float; 29 are dropped
    with pytest.raises(ValueError, match=r"cutoff 0\.29 keeps 71 of 100; expected >= n"):
        coresets.ccs(data["score"], 72, data["ties"], cutoff=0.29, n_strata=5)


def test_of_equally_hard_examples_coverage_drops_the_largest_ties():
    ties = np.array([3, 1, 2, 0], np.uint64)
    assert coresets.ccs(np.ones(4), 2, ties, cutoff=0.5, n_strata=3).tolist() == [1, 3]


# --- Beta sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 20, 100, 199])
def test_beta_sampling_is_a_race_of_exponentials_with_the_weights_of_the_paper(n):
    rng = np.random.default_rng(3)
    score, confidence, ties = rng.random(200), rng.random(200), ties_of(200, rng)
    mu = confidence[np.argsort(score)[-10:]].mean()
    b = 15 * (1 - mu) * (1 - (1 - n / 200) ** 5.5)
    weights = score * stats.beta.pdf(confidence, 16 - b, b)
    uniform = (ties.astype(np.float64) + 0.5) / 2**64
    arrivals = stats.expon.ppf(uniform) / weights
    expected = np.sort(np.argsort(arrivals)[:n])
    assert (
        coresets.dual_beta(score, confidence, n, ties, exponent=5.5).tolist() == expected.tolist()
    )


def test_beta_sampling_draws_in_proportion_to_the_score_where_confidence_is_equal():
    rng = np.random.default_rng(0)
    score, n_draws = np.array([1.0, 2.0, 5.0]), 2000
    first = [
        coresets.dual_beta(score, np.full(3, 0.5), 1, ties_of(3, rng), exponent=4)[0]
        for _ in range(n_draws)
    ]
    share = np.bincount(first, minlength=3) / n_draws
    spread = np.sqrt(0.25 / n_draws)  # at most, for each share
    np.testing.assert_allclose(share, score / 8, atol=4 * spread)


def test_beta_sampling_leans_to_easier_examples_the_fewer_it_keeps():
    rng = np.random.default_rng(1)
    confidence, ties = rng.random(2000), ties_of(2000, rng)
    score = 1 - confidence  # the hardest have the highest score: mu is near 0
    means = [
        confidence[coresets.dual_beta(score, confidence, n, ties, exponent=4)].mean()
        for n in (20, 200, 600)
    ]
    assert means[0] > means[1] > means[2]
    assert means[0] > 0.8


def test_weights_of_zero_come_last_and_infinite_ones_first():
    ties = np.array([1, 0, 5, 4, 3, 2], np.uint64)
    score = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    confidence = np.array([0.5, 1.0, 0.0, 1.0, 0.5, 0.99])
    # mu is that of all, 0.665; n = 1: beta = 15 * 0.335 * (1 - (5/6)**0.01) = 0.009 < 1, so the
    # density is infinite at confidence 1 and 0 at confidence 0; a score of 0 stays a weight of 0
    chosen = [
        set(coresets.dual_beta(score, confidence, n, ties, exponent=0.01).tolist())
        for n in range(7)
    ]
    assert chosen[1] == {3}
    assert chosen[2] == {3, 5}
    assert chosen[3] == {3, 4, 5}
    assert chosen[4] == {1, 3, 4, 5}  # then the weights of 0, by ties: 1, 0, 2
    assert chosen[5] == {0, 1, 3, 4, 5}


def test_the_smallest_and_largest_ties_make_finite_random_numbers():
    ties = np.array([0, 2**64 - 1, 2**63], np.uint64)
    for n in range(4):
        assert len(coresets.dual_beta(np.ones(3), np.full(3, 0.5), n, ties, exponent=4)) == n


# --- classes --------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_classes_are_as_equal_as_their_sizes_allow(sizes, share, seed):
    labels, rng = np.repeat(np.arange(len(sizes)), sizes), np.random.default_rng(seed)
    n, ties = int(share * len(labels)), ties_of(len(labels), rng)
    chosen = coresets.per_class(labels, n, ties, lambda positions, m: positions[:m])
    counts = np.bincount(labels[chosen], minlength=len(sizes))
    assert counts.sum() == n
    level = counts.max()
    # whoever has less than the fullest by more than one has given all it has
    assert all(
        count == size for count, size in zip(counts, sizes, strict=True) if count < level - 1
    )
    odd = [k for k in range(len(sizes)) if counts[k] == level - 1 and counts[k] < sizes[k]]
    smallest = [ties[labels == k].min() for k in range(len(sizes))]
    if odd:  # a class passed over has no smaller tie than one that got an example more
        served = [k for k in range(len(sizes)) if counts[k] == level]
        assert max(smallest[k] for k in served) < min(smallest[k] for k in odd)


def test_a_small_class_gives_all_and_the_odd_one_goes_to_the_smallest_tie():
    labels = np.array([7, 7, 7, 7, 2, 5, 5, 5])
    ties = np.array([4, 5, 6, 7, 0, 3, 2, 1], np.uint64)
    asked = {}

    def choose(positions, m):
        asked[int(labels[positions[0]])] = (positions.tolist(), m)
        return positions[-m:]

    # 6 of 8: class 2 gives its one, 5 are left for two: 3 for class 5, whose smallest tie is 1 < 4
    assert coresets.per_class(labels, 6, ties, choose).tolist() == [2, 3, 4, 5, 6, 7]
    assert asked == {2: ([4], 1), 5: ([5, 6, 7], 3), 7: ([0, 1, 2, 3], 2)}
