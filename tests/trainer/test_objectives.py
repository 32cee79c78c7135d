"""`kdlib.trainer.objectives`: objectives from a user's file; all others are in
`test_logit_losses` and `test_feature_losses`."""

import hashlib
import shutil

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml
from tiny import ROOT
from torch import nn

from kdlib.compare.report import objective_table
from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import open_student, train_student
from kdlib.steps.teacher import make_teacher
from kdlib.study.base import StudyError
from kdlib.study.load import load_study
from kdlib.study.objectives import UserObjective, needs_teacher
from kdlib.study.user_code import pin
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns

CODE = """
import torch.nn.functional as F
from torch import nn

def projectors(student, teacher, **options):
    return {"features": nn.Linear(student["features"][0], teacher["features"][0])}

def loss(student, teacher, labels, weight):
    near = F.mse_loss(student["features"], teacher["features"])
    return F.cross_entropy(student["logits"], labels) + weight * near
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def sha256_of_code(home):
    return hashlib.sha256((home / "mine.py").read_bytes()).hexdigest()


def own(**more):
    given = {"code": "mine.py", "trust_code": True, "reads": ["features"]}
    given |= {"options": {"weight": 2.0}}
    return pin(UserObjective(**given | more), "objectives.mine")


def distiller(objective, seed=0):
    shapes = {"features": (3,)}
    student = {"logits": (2,), "features": (5,)}
    return build_distiller(objective, student, shapes, seed=seed, n_examples=9)


def test_an_own_objective_is_what_its_file_says(home):
    objective = own()
    assert teacher_columns(objective, 2) == ("features",)
    assert student_outputs(objective, 2) == ("logits", "features")
    assert needs_teacher(objective)
    made, again, other = distiller(objective), distiller(objective), distiller(objective, seed=1)
    assert made.projectors["features"].weight.equal(again.projectors["features"].weight)
    assert not made.projectors["features"].weight.equal(other.projectors["features"].weight)
    nn.init.zeros_(made.projectors["features"].weight)
    nn.init.constant_(made.projectors["features"].bias, 1.0)
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    labels, teacher = torch.tensor([1, 1]), {"features": torch.full((2, 3), 4.0)}
    projected = made.project({"logits": logits, "features": torch.ones(2, 5)})
    # cross-entropy, and twice (1 - 4)²
    expected = F.cross_entropy(logits, labels) + 18
    assert made.loss(projected, labels, teacher).item() == pytest.approx(expected.item())


def test_what_must_rise_with_foreign_rows_may_be_said_apart_from_the_loss(home):
    code = "def loss(student, teacher, labels): return student['logits'].sum()"
    (home / "mine.py").write_text(f"{code}\ndef term(*all): return all[1]['features'].sum()")
    made = distiller(own(options=None))
    given = {"logits": torch.ones(2, 2), "features": torch.ones(2, 5)}
    teacher, labels = {"features": torch.ones(2, 3)}, torch.zeros(2, dtype=torch.int64)
    assert made.loss(given, labels, teacher).item() == 4
    assert made.soft_term(given, teacher, labels).item() == 6


def test_projectors_stand_behind_outputs_that_are_there(home):
    (home / "mine.py").write_text(CODE.replace('{"features": nn', '{"feature": nn'))
    with pytest.raises(ValueError, match=r"behind \['feature'\]; expected some of \['features'"):
        distiller(own())


def test_no_code_runs_before_it_is_trusted_and_none_when_a_study_is_read(home):
    (home / "mine.py").write_text("raise SystemExit('ran')")
    assert own().code_sha256  # read, not run
    with pytest.raises(ValueError, match="trust_code"):
        own(trust_code=None)
    with pytest.raises(ValueError, match="Input should be True"):
        own(trust_code=False)


def test_changed_missing_and_wrong_code_is_refused_with_what_to_do(home):
    pinned = own().code_sha256
    objective = own(code_sha256=pinned)
    (home / "mine.py").write_text(CODE + "\n# changed")
    with pytest.raises(ValueError, match=r"has sha256 .*; expected .*: read what it does now"):
        own(code_sha256=pinned)
    with pytest.raises(ValueError, match="was changed while the study runs"):
        distiller(objective)
    (home / "long.py").write_bytes(b"#" * 2**19)
    for name in ("gone.py", "/dev/zero", "long.py", "x" * 400, "."):
        with pytest.raises(ValueError, match=r"no file .* that can be read; expected a Python"):
            own(code=name)
    with pytest.raises(ValueError, match="expected logits, features, stage1"):
        own(reads=["logit"])
    for code, message in (
        ("1 / 0", r"mine\.py cannot be run: ZeroDivisionError"),
        ("def los(): pass", "has no function `loss`"),
    ):
        (home / "mine.py").write_text(code)
        with pytest.raises(ValueError, match=message):
            distiller(own())
    (home / "mine.py").write_text("def loss(student, teacher, labels): return student['logits']")
    made = distiller(own(options=None))
    projected = {"logits": torch.zeros(2, 2), "features": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=r"loss gave \(2, 2\); expected a tensor of no axis"):
        made.loss(projected, torch.zeros(2, dtype=torch.int64), {"features": torch.zeros(2, 3)})


def test_a_study_trains_on_its_own_objective_and_anew_when_the_code_changes(home):
    (home / "params").mkdir()
    shutil.copy(ROOT / "params" / "tiny.yaml", home / "params")
    content = {
        "base": "tiny.yaml", "recordings": None, "seeds": [0, 1],
        "objectives": {"mine": {"kind": "own", "code": "mine.py", "trust_code": True,
                                "reads": ["features"], "options": {"weight": 0.1}}},
        "axes": {"objective": ["mine", "plain"], "strategy": ["random"]},
        "probe": {"strategy": ["full"], "objective": ["mine"]},
    }  # fmt: skip
    (home / "params" / "mine.yaml").write_text(yaml.safe_dump(content))
    study = load_study("params/mine.yaml")
    images = cache_images(study)
    make_teacher(study, images)
    make_datamap(study, images)
    cell = study.cell(strategy="random", objective="mine")
    for seed in study.seeds:
        evidence = train_student(study, images, cell, seed)
    assert evidence["pairing"]["paired"] < evidence["pairing"]["permuted"]
    (home / "mine.py").write_text(CODE.replace("+ weight *", "+ 2 * weight *"))
    changed = load_study("params/mine.yaml")
    with pytest.raises(ValueError, match="code_sha256"):
        open_student(changed, cell, 0)
    again = train_student(changed, images, cell, 0)
    last = [e["checkpoints"]["last"]["weights_sha256"] for e in (evidence, again)]
    assert last[0] != last[1]
    assert list((home / "runs/mine/archive").glob("*/distill"))
    columns = ["refused", "student", "strategy", "fraction", "objective", "test_accuracy"]
    table = objective_table(changed, {"results": pd.DataFrame(columns=columns)})
    said = f"a function in a file of the user (code mine.py, code_sha256 {sha256_of_code(home)}"
    assert f"| mine | {said}" in table
    assert "weight 0.1)" in table
    (home / "mine.py").unlink()
    with pytest.raises(StudyError, match=r"no file .*mine\.py"):
        load_study("params/mine.yaml")
