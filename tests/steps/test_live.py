"""Studies whose teacher computes its outputs live; stored grids of the students' side."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_study

from kdlib.cache.shards import Cache
from kdlib.models.live import LiveOutputs
from kdlib.repro import checks
from kdlib.steps import teacher as teacher_module
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.done import unfinished
from kdlib.steps.folders import student_folder
from kdlib.steps.recount import Recount
from kdlib.steps.remeasure import Remeasure
from kdlib.steps.teacher import make_teacher
from kdlib.steps.teacher_outputs import outputs_folder
from kdlib.study.base import StudyError
from kdlib.study.study import Study

TOKENS = {"kind": "tokens", "cls_weight": 1.0, "patch_weight": 0.5, "barlow_weight": 0.1}
OBJECTIVES = {
    "kd": {"kind": "kd", "alpha": 0.5, "temperature": 2.0},
    "attention": {"kind": "attention", "weight": 1.0},
    "tokens": TOKENS,
    "small": {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "teacher": "small"},
    "own": {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "teacher": "own"},
    "plain": {"kind": "cross_entropy"},
}
FURTHER = {"model": {"name": "tiny_cnn", "options": {"width": 4}}, "expected_accuracy": 0.1,
           "training": {"steps": 20, "batch_size": 64, "lr_peak": 0.1}}  # fmt: skip


def study_of(home: Path, outputs="live", **changes) -> Study:
    """The tiny study with augmented students of a few steps."""
    changes = {
        "objectives": OBJECTIVES, "axes__objective": list(OBJECTIVES), "recordings": None,
        "teachers": {"small": FURTHER, "own": FURTHER | {"learns_from": "subset"}},
        "training": {"steps": 30, "batch_size": 64, "lr_peak": 0.05,
                     "augment": {"crop_padding": 1}},
    } | changes  # fmt: skip
    return tiny_study(home, teacher__outputs=outputs, **changes)


@pytest.fixture(scope="module")
def live(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose live teachers are made."""
    home = tmp_path_factory.mktemp("live")
    shutil.copytree(made / "cache", home / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = study_of(home)
        make_teacher(study, cache_images(study))
    return home


@pytest.fixture
def study(live: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    shutil.copytree(live, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return study_of(tmp_path)


@pytest.mark.parametrize("objective", ["kd", "attention", "tokens", "small", "own"])
def test_students_of_a_live_teacher_pass_every_check_and_are_recounted(study, objective):
    images, cell = open_images(study), study.cell(strategy="full", objective=objective)
    evidence = train_student(study, images, cell, 0)
    assert all(check["passed"] for check in evidence["checks"])
    assert evidence["teacher"]["live"] is True
    found = evidence["pairing"]["live"]
    assert found["weights_sha256"] == evidence["teacher"]["weights_sha256"]
    assert found["n"] == 256
    assert (found["accuracy"] is None) == (objective in ("attention", "tokens"))
    folder, recount = student_folder(study, cell, 0), Recount(study)

    def reasons(**changes):
        forged = evidence | {"pairing": evidence["pairing"] | {"live": found | changes}}
        return recount.reasons(cell, 0, folder, forged, lambda *_: None)

    assert reasons() == []
    assert reasons(view={"augment": {}, "seed": 1})[0].startswith("its views")
    assert "the seed of its views: 1 on record" in reasons(view=found["view"] | {"seed": 1})[0]
    assert "the examples it was asked for" in reasons(examples_sha256="0" * 64)[0]
    if found["accuracy"] is not None and objective != "own":  # whose teacher is of one student
        remeasure = Remeasure(study, recount)
        assert remeasure.student(cell, 0, evidence)[1] == []
        forged = found | {"accuracy": found["accuracy"] + 0.1}
        lied = evidence | {"pairing": evidence["pairing"] | {"live": forged}}
        (reason,) = remeasure.student(cell, 0, lied)[1]
        assert reason.startswith("its live teacher measured again: ")
    bare = evidence | {"pairing": evidence["pairing"] | {"live": None}}
    assert "a live teacher: False on record, True by the files" in recount.reasons(
        cell, 0, folder, bare, lambda *_: None
    )


def test_step_02_of_a_live_teacher_stores_what_datamap_and_probes_read_alone(study):
    for which in ("train", "test"):
        stored = Cache(outputs_folder(study, which))
        assert set(stored.header["columns"]) == {"logits", "features"}
    assert not outputs_folder(study, "replayed").exists()
    assert len(make_datamap(study, open_images(study))) == 1100


def test_a_student_of_stored_outputs_is_not_finished_once_the_teacher_is_live(lab, monkeypatch):
    changed = tiny_study(lab, teacher__outputs="live", recordings=None)
    why = {f.relative_to(changed.runs).parts[0]: s for f, s in unfinished(changed).items()}
    assert "teacher.outputs" in why["teacher"]
    images = open_images(changed)
    make_teacher(changed, images)
    make_datamap(changed, images)
    kd = student_folder(changed, changed.cell(strategy="full", objective="kd"), 0)
    plain = student_folder(changed, changed.cell(strategy="full", objective="plain"), 0)
    why = unfinished(changed)
    assert "teacher_outputs" in why[kd]
    assert plain not in why


def test_a_live_teacher_of_other_weights_fails_the_check_of_its_students(study, monkeypatch):
    class Other(LiveOutputs):
        def __init__(self, network, *more):
            for parameter in network.parameters():
                parameter.data.mul_(1.1)
            super().__init__(network, *more)

    monkeypatch.setattr("kdlib.steps.training.LiveOutputs", Other)
    with pytest.raises(checks.CheckError, match="by OTHER weights of the teacher's card"):
        train_student(study, open_images(study), study.cell(strategy="full", objective="kd"), 0)


def test_grids_are_stored_at_the_students_side(made, tmp_path, monkeypatch):
    """Stored, a whole grid and one of the students' side give the same loss."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    shutil.copytree(made / "cache", tmp_path / "cache")
    large = FURTHER | {"image_size": 16, "training": FURTHER["training"] | {"steps": 40}}
    kept = {}
    for grid in (None, 4):
        outputs = {} if grid is None else {"grid": grid}
        study = tiny_study(
            tmp_path, teacher=large | {"outputs": outputs}, recordings=None,
            objectives={"tokens": TOKENS | {"barlow_weight": None}},
            axes__objective=["tokens"], probe__objective=["tokens"],
            training={"steps": 20, "batch_size": 64, "lr_peak": 0.05},
            dynamics={"el2n_epoch": 1, "window": 2},
        )  # fmt: skip
        images = cache_images(study)
        make_teacher(study, images)
        side = Cache(outputs_folder(study, "train")).header["columns"]["stage2"][1][-1]
        assert side == (grid or 8)
        kept[grid] = train_student(study, images, study.cell(strategy="full"), 0)
    whole, small = (np.array([kept[grid]["pairing"][k] for k in ("paired", "permuted")])
                    for grid in (None, 4))  # fmt: skip
    np.testing.assert_allclose(small, whole, rtol=1e-3)  # float16, twice


def test_grids_of_another_side_than_the_students_are_refused_before_the_teacher_is_trained(
    live, monkeypatch
):
    monkeypatch.setenv("KDLIB_HOME", str(live))
    study = study_of(live, outputs={"views": 2, "grid": 3})
    monkeypatch.setattr(teacher_module, "train_run", None)
    with pytest.raises(
        StudyError, match=r"grid is 3, and student tiny has a grid of 4 x 4 in objective tokens"
    ):
        make_teacher(study, open_images(study))


@pytest.mark.parametrize(
    ("outputs", "changes", "message"),
    [
        ("lively", {}, r"teacher\.outputs: unknown value 'lively'; did you mean 'live'"),
        ({"views": 2, "grid": 4}, {"objectives__kd": {"kind": "similarity", "weight": 1.0}},
         "objective kd compares whole grids"),
        ({}, {"objectives__kd": TOKENS},
         r"give teacher\.outputs\.views.*or teacher\.outputs: live"),
        ("live", {"teachers": {"small": FURTHER | {"outputs": "live"}}},
         "teacher small has `outputs`; those of `teacher` hold for all"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_from_a_teacher_is_refused(home, outputs, changes, message):
    with pytest.raises(StudyError, match=message):
        study_of(home, outputs, **({"objectives": {**OBJECTIVES}, "teachers": {"small": FURTHER,
                 "own": FURTHER}} | changes))  # fmt: skip
