"""`kdlib.sampling`: what is planned is what is seen, whatever the order of asking."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.sampling import Loader, Plan, split_ids

SIZES = {"n": st.integers(1, 40), "batch_size": st.integers(1, 50), "seed": st.integers(0, 99)}


def plan_of(n: int, batch_size: int, n_steps: int = 10, seed: int = 0) -> Plan:
    """A plan whose ids are 3, 8, 13, ...: not their ranks."""
    return Plan(5 * np.arange(n) + 3, batch_size, n_steps, seed)


@settings(max_examples=80, deadline=None)
@given(**SIZES)
def test_every_pass_sees_every_example_once_for_any_batch_size(n, batch_size, seed):
    plan = plan_of(n, batch_size, seed=seed)
    n_steps = -(-3 * n // batch_size)  # at least three passes
    seen = [plan.at(step) for step in range(n_steps)]
    assert all(part.shape == (batch_size,) for pair in seen for part in pair)
    passes, ranks = (np.concatenate(parts) for parts in zip(*seen, strict=True))
    assert np.all(np.diff(passes) >= 0)
    for number in range(3):
        assert sorted(ranks[passes == number]) == list(range(n))


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
    n_validation = data.draw(st.integers(1, n - 1))
    training, validation = split_ids(n, n_validation, seed)
    assert len(validation) == n_validation
    assert training.dtype == validation.dtype == np.int64
    assert all(np.all(np.diff(ids) > 0) for ids in (training, validation))
    assert sorted([*training, *validation]) == list(range(n))
    for ours, again in zip((training, validation), split_ids(n, n_validation, seed), strict=True):
        np.testing.assert_array_equal(ours, again)


def test_seeds_hold_out_unrelated_examples_and_all_of_them_equally_often():
    held = np.stack([np.isin(np.arange(40), split_ids(40, 10, seed)[1]) for seed in range(400)])
    assert len({row.tobytes() for row in held}) == 400
    # each is held out 100 times of 400, give or take 5 standard deviations of 8.7
    assert np.all(np.abs(held.sum(axis=0) - 100) < 44)


@pytest.mark.parametrize("n_validation", [0, 10, 11, -1])
def test_a_split_leaves_something_on_each_side(n_validation):
    with pytest.raises(ValueError, match=rf"n_validation is {n_validation} of 10.*data\.n_vali"):
        split_ids(10, n_validation, 0)


@pytest.mark.parametrize("n_ids", [30, 5], ids=["subset", "smaller than a batch"])
def test_a_batch_carries_the_right_rows_of_every_column(make_images, n_ids):
    images = make_images(50)
    ids = np.sort(np.random.default_rng(0).permutation(50)[:n_ids])
    teacher = torch.arange(50.0)[:, None] * 10 + torch.arange(4)  # row i says that it is row i
    plan = Plan(ids, 8, 12, seed=0)
    loader = Loader(plan, images, teacher, "cpu")
    visits = dict.fromkeys(ids.tolist(), 0)
    for step in range(12):
        batch, (passes, ranks) = loader.batch(step), plan.at(step)
        assert batch.passes.tolist() == passes.tolist()
        assert batch.ranks.tolist() == ranks.tolist()
        assert batch.images.dtype == torch.uint8
        for i in range(8):
            example = int(batch.example_ids[i])
            visits[example] += 1
            assert ids[batch.ranks[i]] == example
            row = np.array([example])
            np.testing.assert_array_equal(batch.images[i].numpy(), images.read("images", row)[0])
            assert batch.labels[i] == images.read("labels", row)[0]
            assert batch.teacher_logits[i].tolist() == [10 * example + c for c in range(4)]
    assert max(visits.values()) - min(visits.values()) <= 1
    assert sum(visits.values()) == 96


def test_without_a_teacher_a_batch_has_no_teacher_rows(make_images):
    images = make_images(10)
    assert Loader(Plan(np.arange(10), 4, 3, 0), images, None, "cpu").batch(0).teacher_logits is None


def test_a_plan_of_ids_the_cache_does_not_have_is_refused(make_images):
    loader = Loader(Plan(np.arange(12), 12, 1, 0), make_images(10), None, "cpu")
    with pytest.raises(IndexError, match="out of range"):
        loader.batch(0)


def test_sampling_leaves_the_global_generators_alone(make_images):
    images = make_images(10)
    before, torch_before = np.random.get_state()[1].copy(), torch.get_rng_state()
    training, _ = split_ids(10, 3, 0)
    Loader(Plan(training, 4, 3, 0), images, None, "cpu").batch(2)
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert torch.equal(torch.get_rng_state(), torch_before)
