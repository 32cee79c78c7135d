"""A final run: nothing is held out (`data.n_validation: 0`), and each step is on record."""

import hashlib

import pandas as pd
import pytest
from matplotlib.figure import Figure
from tiny import first_run, make_study, tiny_study

from kdlib.compare.report import summary
from kdlib.plots.curves import learning_curves
from kdlib.repro.run import read_evidence, read_metrics
from kdlib.steps.checkpoints import shown_results
from kdlib.steps.compare import compile_tables
from kdlib.steps.recount import Recount, unlike_recorded_steps

TRAINING = {"steps": 8, "batch_size": 64, "lr_peak": 0.1, "evaluate_every_steps": 3,
            "record_steps": True, "checkpoint_fractions": [0, 1]}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = tiny_study(
            home, data__n_validation=0, training=TRAINING, recordings=None,
            teacher__training__record_steps=True, seeds=[0, 1],
            axes__strategy=["random"], axes__objective=["kd"], compare={"baseline": "random"},
            probe__strategy=["full"],
        )  # fmt: skip
        make_study(study)
        yield study


def test_without_validation_images_the_last_epoch_counts_and_the_study_is_whole(study):
    tables = compile_tables(study)
    results = tables["results"]
    assert results["reason"].tolist() == [""] * 4
    assert results["test_accuracy"].notna().all()
    assert results["test_accuracy_best"].isna().all()
    assert results["best_step"].tolist() == [8] * 4
    metrics = read_metrics(first_run(study))
    assert metrics[["validation_loss", "validation_accuracy"]].isna().all(axis=None)
    assert metrics["step"].tolist() == [3, 6, 8]
    evidence = read_evidence(first_run(study))
    assert evidence["read"]["validation"] == []
    shown = shown_results(evidence, evidence["checkpoints"])
    measured = {f"test_{name}" for name in ("accuracy", "loss", "precision", "recall", "f1")}
    assert set(shown) == measured | {"steps", "samples", "unique_examples"}
    sentences = {check["name"]: check["sentence"] for check in evidence["checks"]}
    assert sentences["untouched_test"].startswith("no image was held out")
    assert "No image was held out, so that there is no best epoch" in summary(study, tables)
    assert "## Averages over classes" in summary(study, tables)
    # 8 * 9 * 64 + 16 * 8 * 9 * 16 + 16 * 10 products
    size = "| tiny | 1,442 | 0.00598 | 0.0232 |"
    assert size in summary(study, tables)
    assert tables["ledger"].empty
    ax = learning_curves(Figure().subplots(), tables["curves"])
    assert ax.get_ylabel() == "training accuracy (%)"


def test_each_step_is_on_record_and_belongs_to_the_metrics(study, tmp_path):
    folder = first_run(study)
    steps, metrics = read_metrics(folder, "steps"), read_metrics(folder)
    assert steps["step"].tolist() == list(range(1, 9))
    assert steps["loss"][3:6].mean() == pytest.approx(metrics["train_loss"][1])
    assert steps["learning_rate"][7] == metrics["learning_rate"][2]
    sha256 = read_evidence(folder)["steps_sha256"]
    assert unlike_recorded_steps(folder, sha256) == []
    assert unlike_recorded_steps(folder, "other") == ["steps.parquet was changed"]


def test_the_teacher_s_steps_are_on_record_too(study):
    folder = study.runs / "teacher"
    evidence = read_evidence(folder)
    assert len(read_metrics(folder, "steps")) == evidence["budget"]["recorded"]["steps"]
    counted = Recount(study)
    assert counted.teacher_reasons(folder, evidence) == []
    forged = evidence | {"steps_sha256": "other"}
    assert counted.teacher_reasons(folder, forged) == ["steps.parquet was changed"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda steps: steps[:-1], "steps.parquet has 7 steps of 8"),
        (lambda steps: steps * [1, 1.01, 1], "train_loss by the recorded steps is not that of"),
        (lambda steps: steps * [1, 1, 1.01], "learning_rate by the recorded steps is not that of"),
    ],
)
def test_steps_that_are_not_those_of_the_metrics_are_found(study, tmp_path, change, sentence):
    metrics = pd.read_parquet(first_run(study) / "metrics.parquet")
    metrics.to_parquet(tmp_path / "metrics.parquet")
    steps = pd.read_parquet(first_run(study) / "steps.parquet")
    change(steps).to_parquet(tmp_path / "steps.parquet")
    sha256 = hashlib.sha256((tmp_path / "steps.parquet").read_bytes()).hexdigest()
    (found,) = unlike_recorded_steps(tmp_path, sha256)
    assert found.startswith(sentence)
