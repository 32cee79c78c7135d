"""`kdlib.steps.step_command`: steps without notebooks make what the notebooks make."""

import io
import json

import pytest

from kdlib.cache.shards import CacheError
from kdlib.repro.run import read_evidence
from kdlib.steps import cache, step_command
from kdlib.steps.distill import open_student
from kdlib.steps.folders import student_folder
from kdlib.study.base import StudyError
from kdlib.study.load import load_study


def test_points_name_cells_and_seeds_and_leave_axes_out(lab):
    study = load_study("params/tiny.yaml")
    lines = ['{"strategy": "easy", "objective": "plain", "seed": 1}\n', "\n", '{"seed": 0}\n']
    (easy, one), (first, zero) = step_command.read_points(lines, study)
    assert (easy.strategy, easy.objective, easy.fraction, one) == ("easy", "plain", 0.33, 1)
    assert (first, zero) == (study.cell(), 0)
    for seed in ("true", "-1", "0.5", '"0"', "null"):
        with pytest.raises(StudyError, match=r"seeds are \[.*\]; expected a list of integers >= 0"):
            list(step_command.read_points([f'{{"seed": {seed}}}'], study))
    with pytest.raises(ValueError, match="'easy, 0' is no point; expected"):
        list(step_command.read_points(["easy, 0"], study))
    with pytest.raises(ValueError, match=r"is no point; expected \{\"seed\": 0"):
        list(step_command.read_points(['{"strategy": "easy"}'], study))
    with pytest.raises(StudyError, match="unknown strategy 'eazy'"):
        list(step_command.read_points(['{"strategy": "eazy", "seed": 0}'], study))


def test_points_are_read_one_by_one_as_they_come(lab):
    study = load_study("params/tiny.yaml")
    lines = iter(['{"seed": 0}', '{"seed": 1}'])
    points = step_command.read_points(lines, study)
    assert next(points)[1] == 0
    assert next(lines) == '{"seed": 1}'  # nothing was read ahead


def test_a_student_that_fails_is_reported_and_the_next_one_is_trained(lab):
    study = load_study("params/tiny.yaml")
    cell = study.cell(strategy="easy", objective="kd")
    folder = student_folder(study, cell, 0)
    (folder / "evidence.json").unlink()
    (folder / "subset.parquet").write_bytes(b"damaged")
    bad, good = step_command.distill(study, [(cell, 0), (cell, 1)])
    assert (bad["seed"], good["seed"]) == (0, 1)
    assert "subset.parquet" in bad["error"]
    assert "test_accuracy" not in bad
    assert (
        good["test_accuracy"]
        == (open_student(study, cell, 1)["checkpoints"]["last"]["test_accuracy"])
    )
    assert good["step"] == "distill"
    assert good["strategy"] == "easy"
    assert good["seconds"] >= 0


def test_a_built_cache_needs_no_data_set(lab, monkeypatch):
    def absent(*_):
        raise AssertionError("the data set was opened")

    monkeypatch.setattr(cache, "open_sources", absent)
    study = load_study("params/tiny.yaml")
    (study.runs / "cache" / "evidence.json").rename(lab / "before.json")
    [row] = step_command.run_steps(study, ["cache"], [], built=True)
    assert (row["step"], row["n_train"], row["n_test"]) == ("cache", 1100, 500)
    made, before = read_evidence(study.runs / "cache"), json.loads(
        (lab / "before.json").read_text()
    )  # fmt: skip
    same = ("mean", "std", "settings_sha256")
    assert [made[key] for key in same] == [before[key] for key in same]
    (study.cache / "train" / "index.json").unlink()
    with pytest.raises(CacheError, match="no cache"):
        list(step_command.run_steps(study, ["cache"], [], built=True))


def test_steps_by_the_command_line_print_a_row_each(lab, monkeypatch, capsys):
    from kdlib.__main__ import main

    def called(*arguments):
        monkeypatch.setattr("sys.argv", ["kdlib", "step", *arguments])
        code = main()
        return code, [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    code, rows = called("cache,teacher,datamap,probe,compare", "params/tiny.yaml")
    assert code == 0
    assert [row["step"] for row in rows] == ["cache", "teacher", "datamap", "probe", "compare"]
    assert rows[-1]["n_accepted"] == rows[-1]["n_runs"] == 12
    assert read_evidence(lab / "runs" / "tiny" / "compare")["n_runs"] == 12
    code, rows = called(
        "distill", "params/tiny.yaml", "--strategy", "easy", "--seed", "0", "--seed", "1"
    )
    assert (code, [row["seed"] for row in rows]) == (0, [0, 1])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"seed": 1}\n{"strategy": "easy", "seed": 0}\n'))
    code, rows = called("distill", "params/tiny.yaml", "--points", "-")
    assert (code, [(r["strategy"], r["seed"]) for r in rows]) == (
        0, [("random", 1), ("easy", 0)],
    )  # fmt: skip
    (lab / "points").write_text('{"objective": "plain", "seed": 1}\n')
    code, rows = called("distill", "params/tiny.yaml", "--points", str(lab / "points"))
    assert (code, rows[0]["objective"]) == (0, "plain")
    with pytest.raises(SystemExit):
        called("teecher", "params/tiny.yaml")
    assert "no step 'teecher'; did you mean 'teacher'?" in capsys.readouterr().err
