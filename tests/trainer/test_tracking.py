"""`kdlib.trainer.tracking`: switches that write offline, and change nothing else."""

import json
import random
import subprocess
import sys
import time
import warnings
from itertools import starmap
from unittest.mock import MagicMock

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import ROOT, tiny_study

from kdlib.__main__ import main
from kdlib.compare import sql
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps import summaries
from kdlib.steps.folders import student_folder
from kdlib.study.training import Tracking
from kdlib.study.yaml_text import parse_yaml
from kdlib.trainer.tracking import open_tracker, summarise

ROW = {"train_loss": 0.5, "validation_accuracy": 0.25}
third_party = pytest.mark.filterwarnings("ignore")  # what the packages themselves warn of


def log(tracking, folder, rows, resumed=0):
    with open_tracker(tracking, folder, "random 0.33 kd, seed 0", {"own": 1}, resumed) as tracker:
        for step in rows:
            tracker.log(ROW | {"train_loss": float(step)}, step)


def scalars(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


@third_party
def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path):
    log(Tracking(tensorboard=True), tmp_path, [10, 20, 30])
    log(Tracking(tensorboard=True), tmp_path, [30, 40], resumed=20)  # the state was of step 20
    assert scalars(tmp_path, "train_loss") == [(10, 10), (20, 20), (30, 30), (40, 40)]
    assert [value for _, value in scalars(tmp_path, "validation_accuracy")] == [0.25] * 4


@third_party
def test_weights_and_biases_writes_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    log(Tracking(wandb=True), tmp_path, [10, 20])
    (made,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert made.stat().st_size > 0


@third_party
def test_trackers_leave_the_global_generators_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def states():
        return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()

    before = states()
    log(Tracking(tensorboard=True, wandb=True), tmp_path, [1])
    assert states() == before


def test_switched_off_nothing_is_imported_or_written(tmp_path):
    code = (
        "import sys; from pathlib import Path; from kdlib.trainer.tracking import open_tracker; "
        "from kdlib.study.training import Tracking; "
        f"t = open_tracker(Tracking(), Path({str(tmp_path)!r}), 'a', {{}}, 0); "
        "tracker = t.__enter__(); tracker.log({'loss': 1.0}, 1); t.__exit__(None, None, None); "
        "print([m for m in ('wandb', 'tensorboard', 'torch') if m in sys.modules])"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert finished.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    absent = "torch.utils.tensorboard" if name == "tensorboard" else "wandb"
    monkeypatch.setitem(sys.modules, absent, None)
    with pytest.raises(
        ModuleNotFoundError, match=rf"tracking\.{name} needs .*pip install 'kdlib\["
    ):
        log(Tracking(**{name: True}), tmp_path, [1])


@third_party
def test_a_tracker_that_fails_says_so_once_and_stops_nothing(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    with open_tracker(Tracking(tensorboard=True), tmp_path, "a", {}, 0) as tracker:
        with pytest.warns(UserWarning, match=r"TensorBoard failed and is off .*No space left"):
            tracker.log(ROW, 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.log(ROW, 2)


@third_party
def test_a_tracker_that_cannot_be_opened_or_closed_stops_nothing(tmp_path, monkeypatch):
    import wandb

    def refuse(*_, **__):
        raise RuntimeError("no API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.warns(UserWarning, match="Weights & Biases failed and is off .*no API key"):
        log(Tracking(wandb=True), tmp_path, [1])
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, "close", refuse)
    with pytest.warns(UserWarning, match="TensorBoard failed"):
        log(Tracking(tensorboard=True), tmp_path, [1])


def records(path):
    """The records of an offline run's file; its process may still write when the run has ended.

    The file holds them in blocks of 32 kB: checksum, length and kind (whole, first, middle, last)
    before each piece, and 7 bytes before all.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    found, until = [], time.monotonic() + 60
    while not found or not found[-1].HasField("exit"):
        assert time.monotonic() < until, f"{path} has no end"
        data, at, whole, found = path.read_bytes(), 7, b"", []
        while at + 7 <= len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            n, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole, at = whole + data[at + 7 : at + 7 + n], at + 7 + n
            if kind in (1, 4) and at <= len(data):
                found.append(Record.FromString(whole))
                whole = b""
    return found


def sent(folder):
    """What offline runs have for the server: (their run records, the summary that results)."""
    runs, summary = [], {}
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for record in records(path):
            runs += [record.run] if record.HasField("run") else []
            for item in record.summary.update:
                summary[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return runs, summary


@third_party
def test_a_run_has_group_tags_and_notes_and_its_results_come_to_its_summary(home, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = home / "runs" / "mine" / "distill" / "student=tiny" / "strategy=easy" / "seed=1"
    settings = {"step": {"lr": 0.1}}
    files.write_json(folder / "settings.json", settings)
    tracking = Tracking(wandb=True, notes="why")
    with open_tracker(tracking, folder, "easy, seed 1", settings, 0) as tracker:
        tracker.log(ROW, 10)
        tracker.summarise({"test_accuracy": 0.875})
    summarise(tracking, folder, {"strategies/verdict": "better", "linear_accuracy": 0.5})
    runs, summary = sent(folder)
    assert (runs[0].run_group, runs[0].job_type, runs[0].notes) == ("mine", "distill", "why")
    assert sorted(runs[0].tags) == ["seed=1", "strategy=easy", "student=tiny"]
    assert runs[0].display_name == "easy, seed 1"
    assert len({run.run_id for run in runs}) == 1  # the later results belong to the same run
    expected = {"test_accuracy": 0.875, "strategies/verdict": "better", "linear_accuracy": 0.5}
    assert summary.items() >= expected.items()
    summarise(Tracking(), folder, {"linear_accuracy": 0.75})  # switched off
    assert sent(folder)[1]["linear_accuracy"] == 0.5


@third_party
def test_group_and_tags_are_those_of_the_study_and_the_id_that_of_a_sweep(home, monkeypatch):
    import wandb

    made, runs = [], home / "runs" / "mine"
    monkeypatch.setattr(wandb, "init", lambda **given: made.append(given) or MagicMock())
    tracking = Tracking(wandb=True, group="spring", tags=("a", "b" * 70))
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "of-agent")
    for place in ("distill/seed=0", "teacher"):
        log(tracking, runs / place, [1])
    monkeypatch.delenv("WANDB_SWEEP_ID")
    log(tracking, runs / "distill/seed=0", [2])
    assert made[0]["group"] == "spring"
    assert made[0]["tags"] == ["a", "b" * 64]
    # a sweep's student has the id that the agent gave, and keeps it after the sweep
    assert made[0]["id"] == made[2]["id"] == "of-agent" != made[1]["id"]


def test_probes_and_verdicts_come_to_the_runs_of_their_cell(lab, monkeypatch):
    study = tiny_study(lab, tracking={"wandb": True})
    shown = {}
    monkeypatch.setattr(
        summaries, "summarise", lambda _, folder, found: shown.update({folder: found})
    )
    cell = study.cell(strategy="easy", objective="kd")
    rows = [
        (0, 30, "linear", "own", 0.1),
        (0, 60, "linear", "own", 0.2),
        (0, 60, "knn", "mnist", 0.3),
    ]
    table = pd.DataFrame(rows, columns=["seed", "step", "probe", "on", "accuracy"])
    summaries.show_probes(study, cell, table.assign(layer="features"))
    folder = student_folder(study, cell, 0)
    assert shown[folder] == {"linear_accuracy": 0.2, "knn_accuracy/mnist": 0.3}
    axes = dict(cell.items())
    run = str(folder.relative_to(study.runs))
    results = pd.DataFrame([axes | {"run": run, "refused": False, "reason": ""}])
    verdict = {"verdict": "worse", "difference": -0.1, "low": -0.2, "high": -0.05}
    verdicts = [axes | verdict | {"against_fraction": f} for f in (0.33, 0.1)]
    other = [axes | verdict | {"against_fraction": 0.33, "objective": "plain", "verdict": "better"}]
    summaries.show_verdicts(
        study, {"results": results, "strategies": pd.DataFrame(verdicts + other)}
    )
    expected = {f"strategies/{name}": value for name, value in verdict.items()}
    expected |= {f"strategies 0.1/{name}": value for name, value in verdict.items()}
    assert shown[folder] == expected | {"refused": False, "reason": ""}


def test_the_sweep_s_command_drives_a_cell_which_sql_finds(lab, monkeypatch, capsys):
    sweep = parse_yaml((ROOT / "profiles" / "wandb-sweep.yaml").read_text())
    study = tiny_study(lab)
    assert set(sweep["parameters"]) == {"student", "strategy", "fraction", "objective", "seed"}
    point = {name: of["values"][0] for name, of in sweep["parameters"].items()}
    words = {"${env}": [], "python": [], "params/digits.yaml": [str(lab / "params" / "tiny.yaml")]}
    words["${args}"] = list(starmap("--{}={}".format, point.items()))  # as the agent writes them
    command = [part for word in sweep["command"] for part in words.get(word, [word])]
    assert command[:2] == ["-m", "kdlib"]
    monkeypatch.setattr("sys.argv", command[1:])
    assert main() == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (
        row["test_accuracy"]
        == read_evidence(student_folder(study, study.cell(strategy="random", objective="kd"), 0))[
            "checkpoints"
        ]["last"]["test_accuracy"]
    )
    axes = " AND ".join(f"{name} = ?" for name in point)
    found = sql.query(f"SELECT max(step) AS last FROM metrics WHERE {axes}", list(point.values()))
    assert found["last"][0] == 60
