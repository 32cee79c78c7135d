"""A study of images without labels, from the cache to the comparison."""

import copy
import json
import math
import os
import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from planning import planned
from safetensors.torch import load_file, save_file
from tiny import ROOT, forge
from unlabelled import TOKENS, UNLABELLED, write_images

from kdlib.lab import open_study
from kdlib.repro import checks
from kdlib.repro.run import read_evidence, read_metrics
from kdlib.steps.cache import cache_images, cache_sentences, open_images
from kdlib.steps.compare import compile_tables, finish_tables
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import run_table, train_student
from kdlib.steps.done import unfinished
from kdlib.steps.folders import student_folder
from kdlib.steps.probe import open_probes, probe_cell
from kdlib.steps.recount import Recount
from kdlib.steps.remeasure import Remeasure
from kdlib.steps.results import results
from kdlib.steps.teacher import make_teacher, teacher_table
from kdlib.steps.training import OBJECTIVE
from kdlib.study.base import StudyError
from kdlib.study.load import load_study
from kdlib.study.study import Study


def study_of(home: Path, **changes) -> Study:
    content = copy.deepcopy(UNLABELLED)
    for dotted, value in changes.items():
        *path, key = dotted.split("__")
        place = content
        for part in path:
            place = place[part]
        place[key] = value
    path = home / "params" / "wild.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A workspace in which steps 01 to 06 have run."""
    home = tmp_path_factory.mktemp("unlabelled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        patch.delenv("KDLIB_DATA", raising=False)
        write_images(home)
        study = study_of(home)
        images = cache_images(study)
        make_teacher(study, images)
        for cell in study.cells():
            for seed in study.seeds:
                train_student(study, images, cell, seed)
        for cell in study.probed_cells():
            probe_cell(study, images, cell)
        finish_tables(study, "compare", compile_tables(study))
    return home


@pytest.fixture
def wild(whole: Path, home: Path) -> Study:
    """A copy of it, to look at or to break."""
    shutil.copytree(whole, home, dirs_exist_ok=True)
    return load_study(home / "params" / "wild.yaml")


def test_a_study_without_labels_runs_whole(wild):
    images = open_images(wild)
    assert images.test is None
    assert set(images.train.read("labels", images.train_ids)) == {-1}
    assert not (wild.cache / "test").exists()  # the images are there once
    assert not (wild.runs / "datamap").exists()
    table = results(wild)
    assert not table["refused"].any(), table["reason"].tolist()
    assert table["linear_accuracy_on_digits"].between(0.2, 1).all()
    assert table[["test_accuracy", "linear_accuracy"]].isna().all(axis=None)
    assert (table["validation_loss_best"] <= table["validation_loss"]).all()
    left = {path.name for path in unfinished(wild)}
    assert left == {"compare"}  # whose figures are drawn in notebook 06
    assert "48 training images without labels; there is no test split" in cache_sentences(wild)[0]


def test_the_pipeline_has_no_step_03(home):
    study_of(home)
    jobs = planned(home / "params" / "wild.yaml", home, home / "plan.log", environment=os.environ)
    assert jobs == {"all": 1, "cache": 1, "teacher": 1, "distill": 3, "probe": 3, "compare": 1}


def test_what_needs_labels_is_absent_and_not_zero(wild):
    cell = wild.cells()[0]
    evidence = read_evidence(student_folder(wild, cell, 0))
    names = [check["name"] for check in evidence["checks"]]
    assert names == ["budget", "coverage", "gradient", "untouched_test", "pairing"]
    assert "test_accuracy" not in run_table(wild, {(cell, 0): evidence})
    metrics = read_metrics(student_folder(wild, cell, 0))
    terms = ["train_loss_cls", "train_loss_patch"]
    facts = ["step", "epoch", "learning_rate", "train_loss", "validation_loss"]
    assert list(metrics) == facts + terms
    best = metrics.loc[metrics["validation_loss"].idxmin()]
    kept = evidence["checkpoints"]["best"]
    assert (kept["step"], kept["validation_loss"]) == (best["step"], best["validation_loss"])
    teacher = read_evidence(wild.runs / "teacher")
    assert teacher["checks"] == []
    assert teacher["teacher"]["measured"] is None
    assert teacher_table(wild)["accuracy"].isna().all()
    probes = open_probes(wild, cell)
    assert set(probes["on"]) == {"digits"}
    assert "teacher" in set(probes["strategy"])  # whose quality these probes are


@pytest.mark.parametrize("name", ["01_cache", "02_teacher", "04_distill", "05_probe", "06_compare"])
def test_the_cells_of_a_notebook_run_without_labels(wild, name, monkeypatch):
    notebook = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    file = wild.runs.parents[1] / "params" / "wild.yaml"
    known = {"__name__": "notebook"}
    for i, cell in enumerate(cells):
        exec(compile(cell, f"{name}, cell {i}", "exec"), known)
        known["study"] = str(file)
    plt.close("all")
    if name == "06_compare":
        assert not unfinished(wild)
        shown = (wild.figures / "objectives.md").read_text()
        assert "| cls_weight (1 - cos CLS) + patch_weight (1 - cos patches) + barlow" in shown
        assert "labels train" not in shown


def test_the_student_has_no_last_layer(wild):
    (weights,) = student_folder(wild, wild.cells()[0], 0).glob("weights-00000012*")
    assert not [name for name in load_file(weights) if name.startswith("linear")]


def test_a_loss_that_the_weights_do_not_have_refuses_the_row(wild):
    first, second = (student_folder(wild, wild.cells()[0], seed) for seed in wild.seeds)
    forge(first, lambda e: e["checkpoints"]["last"].update(validation_loss=0.01))
    changed = load_file(second / OBJECTIVE)
    save_file({k: v + 1 for k, v in changed.items()}, second / OBJECTIVE)
    (wild.runs / "measured.json").unlink()
    reasons = results(wild)["reason"]
    assert "`last` measured again: validation loss 0." in reasons[0]
    assert "objective.safetensors is not as the training left it" in reasons[1]
    assert (reasons[2:] == "").all()


VIEWS = {"teacher__outputs": {"views": 2}, "training__augment": {"flip": True, "crop_padding": 1}}


@pytest.mark.parametrize(
    ("objective", "changes"),
    [
        (TOKENS | {"barlow_weight": 0.1}, VIEWS),  # a second view, and replayed ones
        (TOKENS, {"teacher__outputs": "live", "training__augment": {"flip": True}}),
        ({"kind": "rkd", "distance_weight": 1.0, "angle_weight": 2.0}, {}),
        ({"kind": "hint", "weight": 2.0, "stage": "last"}, {}),
        ({"kind": "attention", "weight": 100.0}, {}),
        ({"kind": "similarity", "weight": 5.0}, {}),
    ],
)
def test_each_objective_trains_and_its_loss_is_measured_again(wild, objective, changes):
    study = study_of(wild.runs.parents[1], objectives__tokens=objective, **changes)
    images, cell = open_images(study), study.cell(strategy="random")
    make_teacher(study, images)
    evidence = train_student(study, images, cell, 0)
    assert all(check["passed"] for check in evidence["checks"])
    _, reasons = Remeasure(study, Recount(study)).student(cell, 0, evidence)
    assert reasons == []


OWN = """
def loss(student, teacher, labels):
    assert labels is None and set(student) == {"features"}
    return (student["features"].mean(1) - teacher["features"].mean(1)).square().mean()
"""


def test_an_own_objective_gets_no_labels(wild):
    home = wild.runs.parents[1]
    (home / "params" / "own.py").write_text(OWN)
    own = {"kind": "own", "code": "params/own.py", "trust_code": True, "reads": ["features"]}
    study = study_of(home, objectives__tokens=own)
    make_teacher(study, open_images(study))
    evidence = train_student(study, open_images(study), study.cells()[0], 0)
    assert math.isfinite(evidence["checkpoints"]["last"]["validation_loss"])


def test_validation_images_that_are_trained_on_too_stop_step_01(home):
    write_images(home)
    folder = home / "data" / "wild" / "train"
    for i in range(16):
        shutil.copy(folder / f"{i:03d}.png", folder / f"copy{i:03d}.png")
    with pytest.raises(checks.CheckError, match=r"of the validation images are among those traine"):
        cache_images(study_of(home))
    cache_images(study_of(home, data__duplicates=1.0))


def test_a_study_without_recorded_training_says_why_it_has_no_datamap(wild, capsys):
    with pytest.raises(StudyError, match="wild has images without labels: it has no training dyn"):
        make_datamap(wild, open_images(wild))
    lab = open_study(wild.runs.parents[1] / "params" / "wild.yaml")
    with pytest.raises(StudyError, match="it has no training dynamics and no datamap"):
        lab.dynamics()
    with pytest.raises(StudyError, match="it has no training dynamics and no datamap"):
        lab.select("easy")


def test_images_in_files_of_tensors_are_learnt_from_and_rounding_is_in_the_evidence(home):
    """As the shards of study B, but for one image whose values are no 256 levels."""
    write_images(home)
    files = cache_images(study_of(home))
    pixels = files.train.resident("images").float() / 255
    pixels[3] = pixels[3] * 0.999
    (home / "data" / "shards").mkdir()
    for i in range(2):
        torch.save({"images": pixels[24 * i : 24 * i + 24]}, home / f"data/shards/images_{i}.pt")
    study = study_of(home, data__source="tensors", data__folder="shards")
    tensors = cache_images(study)
    assert torch.equal(tensors.train.resident("images"), files.train.resident("images"))
    reader = read_evidence(study.runs / "cache")["reader"]["train"]
    assert reader["counts"] == {"rounded": 1}
    assert any("1 of values that were rounded" in text for text in cache_sentences(study))
