"""`compute.precision`: measured once for a study, the same in all its runs."""

import pytest
from tiny import student, tiny_study

from kdlib.repro import checks, files
from kdlib.repro.run import read_evidence
from kdlib.steps import precision
from kdlib.steps.cache import cache_images
from kdlib.steps.done import unfinished
from kdlib.steps.folders import precision_file, student_folder
from kdlib.steps.recount import Recount
from kdlib.steps.results import FACTORS
from kdlib.study.base import StudyError

PLAIN = {"strategy": "random", "objective": "plain"}


def timed(monkeypatch, **seconds):
    """Steps of these precisions take so many seconds, and no others are measured."""
    monkeypatch.setattr(precision, "_seconds", lambda network, pixels, name, _: seconds[name])


def test_auto_takes_the_faster_and_keeps_to_it(home, monkeypatch):
    study = tiny_study(home, compute={"precision": "auto"}, training__steps=2)
    images = cache_images(study)
    timed(monkeypatch, float32=1.0, bf16=0.25)
    cell, evidence = student(study, images, **PLAIN)
    assert evidence["executed"]["precision"] == "bfloat16"
    kept = evidence["precision"]
    assert (kept["taken"], kept["ratio"], kept["student"]) == ("bf16", 4.0, "tiny")
    timed(monkeypatch, float32=1.0, bf16=2.0)  # would now be the slower
    assert precision.decided(study, images) == {"precision": "bf16"}
    folder = student_folder(study, cell, 0)
    assert Recount(study).reasons(cell, 0, folder, evidence, lambda *_: None) == []

    first = files.read_json(folder / "settings.json")
    precision_file(study).unlink()  # as on another machine, or where steps were measured again
    assert precision.decided(study, images) == {"precision": "float32"}
    assert "precision: bf16 -> float32" in unfinished(study)[folder]
    student(study, images, **PLAIN)
    second = read_evidence(folder)
    assert second["executed"]["precision"] == "float32"
    (line,) = checks.differing(files.read_json(folder / "settings.json"), first, FACTORS)
    assert line == "inputs.precision: bf16 -> float32"  # a table refuses the two side by side


def test_a_slower_precision_is_named_once_and_taken_all_the_same(home, monkeypatch, capsys):
    study = tiny_study(home, compute={"precision": "bf16"}, training__steps=2)
    images = cache_images(study)
    timed(monkeypatch, float32=1.0, bf16=9.6)
    _, evidence = student(study, images, **PLAIN)
    printed = capsys.readouterr().out
    assert "asks for bf16, and on cpu (" in printed
    assert "takes 9.6 times as long as one in float32: set compute.precision" in printed
    assert evidence["executed"]["precision"] == "bfloat16"
    assert precision.decided(study, images) == {}
    assert capsys.readouterr().out == ""


def test_a_precision_that_is_measured_has_its_seconds(home):
    study = tiny_study(home, compute={"precision": "auto"})
    assert precision.decided(study, cache_images(study))["precision"] in ("float32", "bf16")
    kept = files.read_json(precision_file(study))
    assert kept["ratio"] == kept["seconds"]["float32"] / kept["seconds"]["bf16"] > 0
    assert (kept["taken"] == "bf16") == (kept["ratio"] > 1)
    assert kept["images"] == 64


def test_auto_is_not_portable(home):
    with pytest.raises(StudyError, match="portable: true and precision: auto exclude each other"):
        tiny_study(home, compute={"portable": True, "precision": "auto"})
