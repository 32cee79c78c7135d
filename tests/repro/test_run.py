"""Run folders: finished by evidence alone, never reused for other settings, never overwritten."""

import json
import subprocess

import pandas as pd
import pytest

from kdlib.repro import files, run
from kdlib.repro.run import circumstances, open_run, read_evidence, read_metrics
from kdlib.study.load import load_study


@pytest.fixture
def study(monkeypatch, tmp_path):
    source = files.workspace() / "params" / "tiny.yaml"
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return load_study(source)


def _finish(study, settings, content="first"):
    with open_run(study.runs, study.runs / "teacher", settings) as run:
        files.write_json(run.folder / "result.json", content)
        return run.finish({"step": "teacher"})


def test_a_run_is_finished_when_its_evidence_is_there_and_not_before(study):
    with open_run(study.runs, study.runs / "teacher", {"lr": 1}) as run:
        assert not run.finished
        run.finish({"step": "teacher"})
        assert run.finished
    assert read_evidence(study.runs / "teacher")["step"] == "teacher"


def test_a_finished_run_keeps_no_state(study):
    with open_run(study.runs, study.runs / "teacher", {"lr": 1}) as run:
        run.state.mkdir()
        (run.state / "state.safetensors").write_bytes(b"optimizer state")
        files.write_json(run.folder / "result.json", {"kept": True})
        run.finish({"step": "teacher"})
    assert not run.state.exists()
    assert files.read_json(run.folder / "result.json") == {"kept": True}


def test_evidence_names_its_circumstances(study):
    made = _finish(study, {"lr": 1})["made"]
    assert made["versions"]["torch"]
    assert made["wall_s"] >= 0
    assert len(made["code_sha256"]) == 64
    assert made["threads"] >= 1


def test_other_settings_move_the_old_run_aside_and_print_the_difference(study, capsys):
    _finish(study, {"training": {"lr": 1}})
    with open_run(study.runs, study.runs / "teacher", {"training": {"lr": 2}}) as run:
        assert not run.finished
        assert not (run.folder / "result.json").exists()
    assert "training.lr: 1 -> 2" in capsys.readouterr().out
    (kept,) = (study.runs / "archive").glob("*/teacher/result.json")
    assert json.loads(kept.read_text()) == "first"


def test_nothing_in_the_archive_is_overwritten_when_settings_go_back_and_forth(study):
    for round_, lr in enumerate((1, 2, 1, 2, 1)):
        _finish(study, {"lr": lr}, content=round_)
    kept = sorted((study.runs / "archive").glob("*/teacher*/result.json"))
    assert sorted(json.loads(path.read_text()) for path in kept) == [0, 1, 2, 3]


def test_evidence_of_other_settings_does_not_finish_a_run(study):
    _finish(study, {"lr": 1})
    evidence = (study.runs / "teacher" / "evidence.json").read_bytes()
    with open_run(study.runs, study.runs / "teacher", {"lr": 2}) as run:
        # a pipeline engine that restores the outputs of a failed job puts the old file back
        (run.folder / "evidence.json").write_bytes(evidence)
        assert not run.finished
    with pytest.raises(ValueError, match="belongs to other settings"):
        read_evidence(study.runs / "teacher")


def test_a_missing_foreign_or_cut_evidence_says_so(study):
    with pytest.raises(
        FileNotFoundError, match="no finished run; run `python -m kdlib step teacher"
    ):
        read_evidence(study.runs / "teacher")
    _finish(study, {"lr": 1})
    path = study.runs / "teacher" / "evidence.json"
    whole = path.read_text()
    path.write_text(json.dumps(json.loads(whole) | {"format": 9}))
    with pytest.raises(ValueError, match=r"has format 9; expected 4: delete .*teacher, then run `"):
        read_evidence(study.runs / "teacher")
    path.write_text(whole[:40])
    with pytest.raises(ValueError, match="not valid JSON"):
        read_evidence(study.runs / "teacher")


def test_evidence_that_was_changed_is_refused_by_reader_and_step(study):
    _finish(study, {"lr": 1})
    folder = study.runs / "teacher"
    path = folder / "evidence.json"
    whole = json.loads(path.read_text())
    for change in ({"measured": 0.9}, {"seal": "0" * 64}, {"settings_sha256": "0" * 64}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(
            ValueError, match=r"evidence\.json was changed .*delete .*teacher, then run `"
        ):
            read_evidence(folder)
        with (
            open_run(study.runs, folder, {"lr": 1}) as run,
            pytest.raises(ValueError, match="was changed after it was written"),
        ):
            assert run.finished
    path.write_text(json.dumps(whole))
    assert read_evidence(folder) == whole


def test_metrics_that_were_changed_are_refused(study):
    folder = study.runs / "teacher"
    path = folder / "metrics.parquet"
    table = pd.DataFrame({"step": [1, 2], "train_loss": [0.5, 0.25]})
    settings = {"step": {"lr": 1}}
    with open_run(study.runs, folder, settings) as run:
        table.to_parquet(path)
        run.finish({"step": "teacher", "metrics_sha256": files.sha256_file(path)})
    pd.testing.assert_frame_equal(read_metrics(folder), table)
    table.assign(train_loss=0.1).to_parquet(path)
    with pytest.raises(ValueError, match=r"metrics\.parquet is missing or was changed"):
        read_metrics(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"metrics\.parquet is missing or was changed"):
        read_metrics(folder)


def test_code_is_clean_beside_figures_that_a_study_has_drawn(tmp_path, monkeypatch):
    package = tmp_path / "kdlib" / "repro"
    package.mkdir(parents=True)
    (package / "run.py").touch()
    figure = tmp_path / "figures" / "accuracy.md"
    figure.parent.mkdir()
    figure.touch()

    def git(*command):
        user = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", "-C", tmp_path, *user, *command], check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "Begin")
    monkeypatch.setattr(run, "__file__", str(package / "run.py"))
    figure.write_text("redrawn")
    assert circumstances("cpu")["git_clean"]
    (package / "new.py").touch()
    assert not circumstances("cpu")["git_clean"]
