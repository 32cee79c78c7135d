"""`kdlib.dataset.plan`: what is planned is what is seen, whatever the order of asking."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from kdlib.dataset.plan import ORDERS, Plan, budget, fixed_shards, shards_in_fraction, split_ids

SIZES = {"n": st.integers(1, 40), "batch_size": st.integers(1, 50), "seed": st.integers(0, 99)}


def plan_of(n: int, batch_size: int, n_steps: int = 10, seed: int = 0) -> Plan:
    """A plan whose ids are 3, 8, 13, ...: not their positions."""
    return Plan(5 * np.arange(n) + 3, batch_size, n_steps, seed)


@settings(max_examples=80, deadline=None)
@given(**SIZES)
def test_every_pass_sees_every_example_once_for_any_batch_size(n, batch_size, seed):
    plan = plan_of(n, batch_size, seed=seed)
    n_steps = -(-3 * n // batch_size)  # at least three passes
    seen = [plan.at(step) for step in range(n_steps)]
    assert all(part.shape == (batch_size,) for pair in seen for part in pair)
    passes, positions = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    assert np.all(np.diff(passes) >= 0)
    for number in range(3):
        assert sorted(positions[passes == number]) == list(range(n))


@settings(max_examples=60, deadline=None)
@given(**SIZES, n_steps=st.integers(1, 30))
def test_visits_never_differ_by_more_than_one(n, batch_size, seed, n_steps):
    plan = plan_of(n, batch_size, n_steps, seed)
    visits = np.zeros(n, int)
    for step in range(n_steps):
        np.add.at(visits, plan.at(step)[1], 1)
        assert visits.max() - visits.min() <= 1
    assert visits.sum() == n_steps * batch_size
    assert visits.min() == plan.n_passes


@settings(max_examples=40, deadline=None)
@given(**SIZES, data=st.data())
def test_a_step_is_the_same_in_whatever_order_steps_are_asked_for(n, batch_size, seed, data):
    fresh = plan_of(n, batch_size, seed=seed)
    forward = [fresh.at(step) for step in range(12)]
    other = plan_of(n, batch_size, seed=seed)
    for step in data.draw(st.lists(st.integers(0, 11), min_size=1, max_size=15)):
        for ours, theirs in zip(other.at(step), forward[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_orders_differ_between_seeds_and_passes_and_match_for_equal_seeds():
    orders = {
        (seed, number): tuple(plan_of(50, 7, seed=seed).order(number))
        for seed in range(4)
        for number in range(4)
    }
    assert len(set(orders.values())) == 16
    assert tuple(plan_of(50, 20, seed=2).order(3)) == orders[2, 3]  # whatever the batch size
    # as many places agree by chance as in unrelated permutations: Poisson with mean 1
    keys = list(orders)
    agreeing = [
        np.sum(np.array(orders[a]) == orders[b]) for i, a in enumerate(keys) for b in keys[:i]
    ]
    assert abs(np.mean(agreeing) - 1) < 5 / np.sqrt(len(agreeing))


def test_every_rank_comes_at_every_place_equally_often():
    places = np.zeros((6, 6))
    for seed in range(600):
        places[np.arange(6), plan_of(6, 1, seed=seed).order(0)] += 1
    # 25 degrees of freedom: 52.6 is exceeded once in 1,000 sets of seeds
    assert np.sum((places - 100) ** 2 / 100) < 52.6


@pytest.mark.parametrize("ids", [[], [1, 1], [2, 1], [0, 3, 2]])
def test_a_plan_needs_distinct_sorted_ids(ids):
    with pytest.raises(ValueError, match=rf"distinct, sorted example ids; got {len(ids)} ids"):
        Plan(np.array(ids), 4, 10, 0)


def test_complete_passes_are_counted_without_the_last_partial_one():
    # 10 steps of 7 are 70 examples: 3 passes over 20 and half of a fourth
    assert plan_of(20, 7, 10).n_passes == 3
    assert plan_of(20, 2, 10).n_passes == 1
    assert plan_of(21, 2, 10).n_passes == 0


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 60), seed=st.integers(0, 99), data=st.data())
def test_a_split_is_disjoint_sorted_and_complete(n, seed, data):
    n_validation = data.draw(st.integers(0, n - 1))
    training, validation = split_ids(np.arange(n), n_validation, seed)
    assert len(validation) == n_validation
    assert training.dtype == validation.dtype == np.int64
    assert all(np.all(np.diff(ids) > 0) for ids in (training, validation))
    assert sorted([*training, *validation]) == list(range(n))
    for ours, again in zip(
        (training, validation), split_ids(np.arange(n), n_validation, seed), strict=True
    ):
        np.testing.assert_array_equal(ours, again)


def test_seeds_hold_out_unrelated_examples_and_all_of_them_equally_often():
    held = np.stack(
        [np.isin(np.arange(40), split_ids(np.arange(40), 10, seed)[1]) for seed in range(400)]
    )
    assert len({row.tobytes() for row in held}) == 400
    # each is held out 100 times of 400, give or take 5 standard deviations of 8.7
    assert np.all(np.abs(held.sum(axis=0) - 100) < 44)


@pytest.mark.parametrize("n_validation", [10, 11, -1])
def test_a_split_leaves_something_to_learn_from(n_validation):
    with pytest.raises(ValueError, match=rf"n_validation is {n_validation} of 10.*data\.n_vali"):
        split_ids(np.arange(10), n_validation, 0)


def test_a_split_of_part_of_the_examples_holds_out_some_of_them():
    known = np.arange(20, 50)
    training, validation = split_ids(known, 10, 1)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, validation])), known)


# --- orders and shards -----------------------------------------------------------------------

SHARD = 8


def sharded(n: int, order: str = "shuffled", per_pass: int | None = None, **changes) -> Plan:
    """A plan over ids that leave gaps in each shard of 8, as held-out examples do."""
    ids = np.flatnonzero(np.arange(2 * n) % 3 != 1)[:n]
    settings = {"batch_size": 7, "n_steps": 10, "seed": 0, "window_shards": 2} | changes
    return Plan(ids, order=order, shard_size=SHARD, shards_per_pass=per_pass, **settings)


def seen_by(plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """(passes, positions) of the whole budget."""
    parts = zip(*(plan.at(step) for step in range(plan.n_steps)), strict=True)
    return tuple(np.concatenate(part) for part in parts)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 70),
    order=st.sampled_from(ORDERS),
    batch_size=st.integers(1, 40),
    seed=st.integers(0, 9),
    window=st.integers(1, 5),
    data=st.data(),
)
def test_every_planned_example_is_seen_exactly_once_per_pass(
    n, order, batch_size, seed, window, data
):
    n_shards = sharded(n).n_shards
    per_pass = data.draw(st.none() | st.integers(1, n_shards))
    plan = sharded(
        n, order, per_pass, batch_size=batch_size, n_steps=30, seed=seed, window_shards=window
    )
    passes, positions = seen_by(plan)
    shards = plan.example_ids // SHARD
    for number in range(plan.n_passes):
        mine = np.sort(positions[passes == number])
        expected = np.flatnonzero(np.isin(shards, np.unique(shards)[plan.members(number)]))
        np.testing.assert_array_equal(mine, expected)
    assert passes.max() <= plan.n_passes
    np.testing.assert_array_equal(np.bincount(positions, minlength=n), plan.visits())


@settings(max_examples=40, deadline=None)
@given(order=st.sampled_from(ORDERS), per_pass=st.none() | st.integers(1, 6), data=st.data())
def test_sharded_steps_are_the_same_in_whatever_order_they_are_asked_for(order, per_pass, data):
    forward = [sharded(40, order, per_pass).at(step) for step in range(10)]
    other = sharded(40, order, per_pass)
    for step in data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=12)):
        for ours, theirs in zip(other.at(step), forward[step], strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("per_pass", [None, 3])
def test_processes_together_see_what_one_process_sees(order, per_pass):
    plan = sharded(50, order, per_pass, batch_size=12)
    for step in range(10):
        whole = plan.at(step)
        for world_size in (2, 3, 4):
            shares = [plan.at(step, rank, world_size) for rank in range(world_size)]
            assert {len(share[0]) for share in shares} == {12 // world_size}
            for together, alone in zip(zip(*shares, strict=True), whole, strict=True):
                np.testing.assert_array_equal(np.concatenate(together), alone)
    with pytest.raises(ValueError, match="rank 0 of 5 of a batch of 12"):
        plan.at(0, 0, 5)


def test_a_sequential_pass_goes_by_example_id():
    np.testing.assert_array_equal(sharded(20, "sequential").order(3), np.arange(20))
    assert np.all(np.diff(sharded(40, "sequential", 3).order(3)) > 0)


def test_a_windowed_pass_reads_few_shards_at_a_time():
    plan = Plan(np.arange(1000), 50, 20, 0, order="windowed", shard_size=100, window_shards=3)
    order = plan.order(0)  # of ten shards
    for start in range(0, 900, 300):
        window = order[start : start + 300]
        assert len(set(window // 100)) == 3
        # they are mixed: neighbours come from one shard as often as by chance, 99 times in 299
        assert abs(np.sum(np.diff(window // 100) == 0) - 99) < 40
    assert len(set(order[900:] // 100)) == 1
    assert tuple(order) != tuple(plan.order(1))


def test_a_windowed_order_meets_every_example_at_every_place_equally_often():
    places = np.zeros((12, 12))
    for seed in range(1200):
        plan = Plan(np.arange(12), 4, 3, seed, order="windowed", shard_size=3, window_shards=2)
        places[np.arange(12), plan.order(0)] += 1
    # shards move together, so that cells are not independent: each within 5 deviations of 9.6
    assert np.all(np.abs(places - 100) < 48)


@pytest.mark.parametrize("order", ORDERS)
def test_random_shards_come_equally_often_over_200_passes(order):
    n_shards, per_pass, size = 122, 15, 4
    plan = Plan(
        np.arange(n_shards * size), 20, 200 * per_pass * size // 20, 0,
        order=order, shard_size=size, shards_per_pass=per_pass,
    )  # fmt: skip
    assert plan.n_passes == 200
    visits = plan.shard_visits()
    expected = 200 * per_pass / n_shards
    # draws without replacement vary less than independent ones, by (1 - 15/122)
    statistic = np.sum((visits - expected) ** 2 / expected) / (1 - per_pass / n_shards)
    assert 0.0005 < stats.chi2.sf(statistic, n_shards - 1) < 0.9995
    drawn = np.stack([plan.members(number) for number in range(200)])
    assert len({tuple(row) for row in drawn}) == 200


@pytest.mark.parametrize("order", ["shuffled", "windowed"])
def test_a_budget_that_ends_inside_a_pass_prefers_no_shard(order):
    # 25 shards, a budget of 5/8 of one pass: what starved the last third of them in sorted order
    totals = np.zeros(25)
    for seed in range(200):
        plan = Plan(np.arange(25 * 16), 10, 25, seed, order=order, shard_size=16, window_shards=4)
        totals += 16 * plan.shard_visits()
    expected = 200 * 250 / 25
    # examples of one shard come together, so that counts vary by up to 16 at a time
    assert np.all(np.abs(totals - expected) < 5 * np.sqrt(16 * expected))
    assert abs(totals[17:].sum() / totals.sum() - 8 / 25) < 0.03


def test_fixed_shards_are_whole_and_the_same_for_a_seed():
    ids = sharded(60).example_ids
    chosen = fixed_shards(ids, SHARD, 3, seed=5)
    np.testing.assert_array_equal(chosen, fixed_shards(ids, SHARD, 3, seed=5))
    shards = np.unique(chosen // SHARD)
    assert len(shards) == 3
    np.testing.assert_array_equal(chosen, ids[np.isin(ids // SHARD, shards)])
    drawn = [np.unique(fixed_shards(ids, SHARD, 3, s) // SHARD) for s in range(600)]
    counts = np.bincount(np.concatenate(drawn), minlength=sharded(60).n_shards)
    assert np.all(np.abs(counts - 600 * 3 / len(counts)) < 60)
    with pytest.raises(ValueError, match="99 fixed shards of"):
        fixed_shards(ids, SHARD, 99, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"order": "sorted"}, "order is 'sorted'; expected one of shuffled"),
        ({"order": "windowed", "shard_size": None}, "needs the cache's shard_size"),
        ({"shards_per_pass": 3, "shard_size": None}, "needs the cache's shard_size"),
        ({"shards_per_pass": 4}, "4 shards per pass of 3; expected 1 to 3"),
        ({"shards_per_pass": 0}, "0 shards per pass of 3"),
    ],
)
def test_an_impossible_plan_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(np.arange(30), 4, 10, 0, **{"shard_size": 10} | changes)


def test_sampling_leaves_the_global_generators_alone():
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    training, _ = split_ids(np.arange(10), 3, 0)
    Plan(training, 4, 3, 0).at(2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize(
    ("n_shards", "fraction", "n"), [(5, 0.5, 3), (10, 1.0, 10), (122, 0.2, 24), (3, 0.01, 1)]
)
def test_a_fraction_of_shards_is_rounded_half_up_and_at_least_one(n_shards, fraction, n):
    assert shards_in_fraction(np.arange(n_shards * 4), 4, fraction) == n


@settings(max_examples=100, deadline=None)
@given(n_examples=st.integers(1, 10**6), hundredths=st.integers(0, 100))
def test_budget_rounds_half_up_in_decimals(n_examples, hundredths):
    exact = Fraction(hundredths, 100) * n_examples
    assert budget(n_examples, hundredths / 100) == math.floor(exact + Fraction(1, 2))
    assert budget(n_examples, 1 / n_examples) == 1
    assert budget(n_examples, 1.0) == n_examples


def test_budget_takes_the_fraction_as_it_is_written():
    # As binary floats 0.145 and 0.285 lie below what is written; half an example decides.
    assert budget(100, 0.145) == 15
    assert budget(1000, 0.2855) == 286
    assert budget(200, 0.0025) == 1


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_budget_of_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match=r"expected a number in \[0, 1\]"):
        budget(10, fraction)
