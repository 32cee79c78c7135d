"""Facts of a run derived again by other code: equal to those of an honest run, unlike those of a
run that saw something else."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import first_run, forge, tiny_study

from kdlib.dataset.plan import ORDERS, Plan, budget
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.repro.seeds import derive, hashed
from kdlib.steps import derived
from kdlib.steps.cache import open_images
from kdlib.steps.derived import Expected
from kdlib.steps.distill import make_subset
from kdlib.steps.folders import student_folder
from kdlib.steps.recount import Recount
from kdlib.steps.remeasure import Remeasure
from kdlib.steps.results import results
from kdlib.study.training import Training
from kdlib.trainer.optimiser import learning_rate


def test_numbers_are_drawn_as_the_library_draws_them():
    for seed, purpose, parts in ((0, "order", (3,)), (7, "shards", ()), (2**40, "split", (1, 2))):
        assert derived.stream_seed(seed, purpose, *parts) == derive(seed, purpose, *parts)
    ids = np.array([0, 5, 2**40])
    np.testing.assert_array_equal(derived.tie_numbers(ids, 3), hashed(ids, 3, "subset"))
    arrays = np.arange(6).reshape(2, 3), np.array([0.5], np.float32)
    assert derived.array_sha256(*arrays) == files.sha256_array(*arrays)
    for n, fraction in ((100, 0.145), (3, 0.5), (7, 0.0), (363, 1.0)):
        assert derived.rounded(n, fraction) == budget(n, fraction)


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
        {"schedule": "one_cycle", "warmup_steps": 2, "lr_floor": 0.02},
        {"schedule": "cosine", "lr_floor": 0.02},
        {"schedule": "constant"},
    ],
)
def test_every_learning_rate_is_that_of_the_schedule(settings: dict):
    training = Training(steps=8, batch_size=2, lr_peak=0.3, **settings)
    dumped = training.model_dump(mode="json")
    for step in range(8):
        ours = derived.learning_rate(dumped, step + 1, 8)
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


def raise_accuracies(evidence: dict) -> None:
    for entry in evidence["checkpoints"].values():
        entry["test_accuracy"] += 0.004  # two images of 500


def raise_f1(evidence: dict) -> None:
    evidence["checkpoints"]["last"]["test_f1"] += 0.01


def raise_rate(evidence: dict) -> None:
    evidence["executed"]["learning_rates"]["60"] *= 1.001


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (raise_accuracies, "`last` measured again: "),
        (lambda e: e["subset"].update(sha256="0" * 64), "subset: 000000000000 on record"),
        (raise_rate, "learning rate of step 60"),
        (raise_f1, "`last`: test_precision test_recall test_f1 are "),
        (
            lambda e: e["initialisation"].update(weights_sha256="0" * 64),
            "its initial weights are not those that its seed draws",
        ),
    ],
)
def test_evidence_that_was_edited_and_sealed_again_is_refused(lab: Path, change, sentence: str):
    study = tiny_study(lab)
    forge(first_run(study), change)
    table = results(study)
    assert table["refused"].sum() == 1
    assert sentence in table["reason"].iloc[0]


def test_a_teacher_s_card_that_was_edited_refuses_the_students_it_taught(lab: Path):
    def raise_card(evidence: dict) -> None:
        evidence["teacher"]["measured"] += 0.004

    study = tiny_study(lab)
    forge(study.runs / "teacher", raise_card)
    for cell, seed in itertools.product(study.cells(), study.seeds):
        if cell.objective == "kd":
            forge(student_folder(study, cell, seed), raise_card)
    refused = results(study).query("refused")
    assert set(refused["objective"]) == {"kd"}
    assert refused["reason"].str.contains("teacher: its stored logits measured again").all()


def test_a_datamap_of_a_training_that_was_another_refuses_the_rows_that_read_it(lab: Path):
    study = tiny_study(lab)
    forge(study.runs / "teacher", lambda e: e["executed"].update(weight_decay=0.0))
    refused = results(study).query("refused")
    assert set(refused["strategy"]) == {"full", "random", "easy"}  # with kd, all; and easy without
    assert set(refused[refused["objective"] == "plain"]["strategy"]) == {"easy"}
    assert refused["reason"].str.contains("weight_decay as executed: 0.0, asked for 0.0005").all()


def test_rows_of_two_settings_with_the_same_weights_are_refused(lab: Path):
    study = tiny_study(lab)
    one, two = (student_folder(study, study.cell(strategy=s), 0) for s in ("random", "easy"))
    last = read_evidence(one)["checkpoints"]
    for name in {entry["file"] for entry in last.values()}:
        shutil.copy(one / name, two / name)
    forge(two, lambda evidence: evidence.update(checkpoints=last))
    table = results(study).set_index("run")
    for folder, other in ((one, two), (two, one)):
        reason = table.loc[str(folder.relative_to(study.runs)), "reason"]
        assert f"twins: its weights are those of {other.relative_to(study.runs)}" in reason


def test_a_probe_of_other_examples_is_left_out(lab: Path, monkeypatch: pytest.MonkeyPatch):
    study = tiny_study(lab)
    assert results(study)["linear_accuracy"].notna().sum() == 4  # full and easy with kd, two seeds
    real = Recount.probed
    monkeypatch.setattr(
        Recount, "probed", lambda self, on: real(self, on) | {"test_examples": "train 9"}
    )
    assert results(study)["linear_accuracy"].isna().all()


def test_what_was_measured_again_is_kept(lab: Path, monkeypatch: pytest.MonkeyPatch):
    study = tiny_study(lab)
    first = results(study)
    monkeypatch.setattr(Remeasure, "_answers", None)  # is called for a new checkpoint alone
    pd.testing.assert_frame_equal(results(study), first)
