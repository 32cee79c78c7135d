"""Facts of a run derived again by other code: equal to those of an honest run, unlike those of a
run that saw something else."""

from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_study

from kdlib.dataset.plan import ORDERS, Plan, budget
from kdlib.repro import files
from kdlib.repro.seeds import derive, hashed
from kdlib.steps import recount
from kdlib.steps.cache import open_images
from kdlib.steps.distill import make_subset
from kdlib.steps.recount import Expected, Recount
from kdlib.study.training import Training
from kdlib.trainer.optimiser import learning_rate


def test_numbers_are_drawn_as_the_library_draws_them():
    for seed, purpose, parts in ((0, "order", (3,)), (7, "shards", ()), (2**40, "split", (1, 2))):
        assert recount.stream_seed(seed, purpose, *parts) == derive(seed, purpose, *parts)
    ids = np.array([0, 5, 2**40])
    np.testing.assert_array_equal(recount.tie_numbers(ids, 3), hashed(ids, 3, "subset"))
    arrays = np.arange(6).reshape(2, 3), np.array([0.5], np.float32)
    assert recount.array_sha256(*arrays) == files.sha256_array(*arrays)
    for n, fraction in ((100, 0.145), (3, 0.5), (7, 0.0), (363, 1.0)):
        assert recount.rounded(n, fraction) == budget(n, fraction)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("drawn", [None, 2])
def test_every_batch_is_that_of_the_plan(order: str, drawn: int | None):
    ids = np.array([0, 1, 4, 7, 8, 9, 12, 15, 16, 17, 18])  # of shards of 5 examples
    plan = Plan(ids, 4, 9, 3, order=order, shard_size=5, window_shards=2, shards_per_pass=drawn)
    training = {"batch_size": 4, "order": order, "window_shards": 2}
    batches = list(Expected(ids, 9, drawn).batches(training, 3, 5))
    assert len(batches) == 9
    for step, batch in enumerate(batches):
        np.testing.assert_array_equal(batch, ids[plan.at(step)[1]])


@pytest.mark.parametrize(
    "settings",
    [
        {"schedule": "cosine", "warmup_steps": 3},
        {"schedule": "step", "milestones": (0.5, 0.75)},
        {"schedule": "one_cycle", "warmup_steps": 2},
        {"schedule": "constant"},
    ],
)
def test_every_learning_rate_is_that_of_the_schedule(settings: dict):
    training = Training(steps=8, batch_size=2, lr_peak=0.3, **settings)
    dumped = training.model_dump(mode="json")
    for step in range(8):
        ours = recount.learning_rate(dumped, step + 1, 8)
        assert ours == pytest.approx(learning_rate(training, step, 8), rel=1e-12)


@pytest.fixture
def counted(lab: Path) -> Recount:
    return Recount(tiny_study(lab))


def test_the_split_is_that_of_step_01(counted: Recount):
    images = open_images(counted.study)
    np.testing.assert_array_equal(counted.train_ids, images.train_ids)
    np.testing.assert_array_equal(counted.validation_ids, images.validation_ids)


@pytest.mark.parametrize(
    "strategy",
    ["full", "random", "easy", "hard", "ambiguous", "ambiguous_corner", "aum_top", "el2n_bottom",
     "forgetting_events_top", "forgetting_events_bottom", "fixed_shards", "random_shards"],
)  # fmt: skip
def test_a_subset_is_that_of_the_strategy(counted: Recount, strategy: str):
    study = counted.study
    cell = study.cell(strategy=strategy)
    subset = make_subset(study, open_images(study), cell, 1)
    np.testing.assert_array_equal(counted.subset(cell, 1), subset.example_ids)


def test_a_coreset_is_not_derived_here(counted: Recount):
    assert counted.subset(counted.study.cell(strategy="moderate"), 0) is None
