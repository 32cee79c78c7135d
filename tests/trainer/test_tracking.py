"""`kdlib.trainer.tracking`: switches that write offline, and change nothing else."""

import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch

from kdlib.study.training import Tracking
from kdlib.trainer.tracking import open_tracker

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
