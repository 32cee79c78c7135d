"""Trainings that are stopped or killed and resumed; damaged states."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from trainer.small_task import (
    TRAINING,
    DropoutNet,
    DropRateNet,
    Stopped,
    kept_bytes,
    new_log,
    run_in,
    small_images,
    small_task,
    stop_after,
)

from kdlib.repro.run import Run
from kdlib.study.training import Compute, Training
from kdlib.trainer import loop
from kdlib.trainer.loop import train
from kdlib.trainer.state import NAME, StateError


@pytest.fixture
def images(tmp_path):
    return small_images(tmp_path)


@pytest.mark.parametrize("observed", ["train", "eval"])
@pytest.mark.parametrize("network", [None, DropoutNet, DropRateNet])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_stopped_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(
    tmp_path, images, monkeypatch, observed, network, optimiser
):
    training = TRAINING.model_copy(
        update={"optimiser": optimiser, "lr_peak": 0.01, "checkpoint_fractions": (0, 0.5)}
    )

    def one(folder):
        torch.manual_seed(5)  # of this test alone: the initial weights of DropoutNet
        net = network() if network else None
        log = new_log(folder / "dynamics", images, observed=observed)
        task = small_task(images, training=training, network=net, log=log, observed=observed)
        trained = train(run_in(folder), task)
        log.finish()
        return trained

    whole = one(tmp_path / "whole")
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    for n_steps in (1, 4, 7):  # three stops; the fourth start ends the run
        with monkeypatch.context() as patch:
            stop_after(patch, n_steps)
            with pytest.raises(Stopped):
                one(tmp_path / "stopped")
    resumed = one(tmp_path / "stopped")

    assert kept_bytes(tmp_path / "stopped") == kept_bytes(tmp_path / "whole")
    assert resumed.checkpoints == whole.checkpoints
    assert resumed.best_step == whole.best_step
    assert np.array_equal(resumed.visits, whole.visits)
    assert resumed.evidence == whole.evidence


VARIANTS = {
    "ema": {"ema": 0.9},
    "clip": {"clip_norm": 0.05},
    "accumulate": {"accumulate": 4},
    "step": {"schedule": "step", "milestones": (0.3, 0.6)},
    "plateau": {"schedule": "plateau", "patience": 1, "decay": 0.5, "evaluate_every_steps": 2},
    "one_cycle": {"schedule": "one_cycle"},
    "adam": {"optimiser": "adam", "lr_peak": 0.01},
    "float16": {},
    "record_steps": {"record_steps": True, "schedule": "one_cycle"},
    "early_stopping": {"early_stopping": 1, "evaluate_every_steps": 1, "lr_peak": 1.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_train_resumes_to_the_bit(tmp_path, images, monkeypatch, name):
    training = Training(**TRAINING.model_dump() | VARIANTS[name])

    compute = Compute(precision="fp16" if name == "float16" else "float32")

    def one(folder):
        return train(run_in(folder), small_task(images, training=training, compute=compute))

    whole = one(tmp_path / "whole")
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    for n_steps in (1, 2):
        with monkeypatch.context() as patch:
            stop_after(patch, n_steps)
            with pytest.raises(Stopped):
                one(tmp_path / "stopped")
    resumed = one(tmp_path / "stopped")
    assert kept_bytes(tmp_path / "stopped") == kept_bytes(tmp_path / "whole")
    assert (resumed.last_step, resumed.evidence) == (whole.last_step, whole.evidence)
    assert whole.evidence["stopped_early"] == (name == "early_stopping")


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_network_with_its_channels_last_resumes_to_the_bit(
    tmp_path, images, monkeypatch, optimiser
):
    training = TRAINING.model_copy(update={"optimiser": optimiser, "lr_peak": 0.01})

    def one(folder):
        task = small_task(images, training=training)
        task.network.to(memory_format=torch.channels_last)  # as a study's are
        return train(run_in(folder), task, state_every_s=0.0)

    whole = one(tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises(Stopped):
            one(tmp_path / "stopped")
    assert one(tmp_path / "stopped").checkpoints == whole.checkpoints


def test_a_state_of_other_settings_is_refused(tmp_path, images, monkeypatch):
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    stop_after(monkeypatch, 2)
    run = run_in(tmp_path / "run")
    with pytest.raises(Stopped):
        train(run, small_task(images))
    with pytest.raises(StateError, match=r"of other settings.*some: settings -> other"):
        train(Run(run.folder, {"some": "other"}), small_task(images))


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    """kill -9, really: a process that trains is killed at three moments."""
    script = tmp_path / "train.py"
    script.write_text(KILLED)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script)]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, env=environment)
    for _ in range(3):
        process = subprocess.Popen([*command, str(tmp_path / "killed"), "slow"], env=environment)
        state = tmp_path / "killed" / "state" / NAME
        before = _changed(state)
        while process.poll() is None:  # until it has saved something new
            if _changed(state) != before:
                time.sleep(0.05)
                process.kill()
                break
            time.sleep(0.01)
        assert process.wait() == -signal.SIGKILL
    subprocess.run([*command, str(tmp_path / "killed")], check=True, env=environment)
    assert kept_bytes(tmp_path / "killed") == kept_bytes(tmp_path / "whole")


def _changed(path) -> int | None:
    """When a file was written; None where there is none, as between two renames."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


KILLED = """
import sys, time
from pathlib import Path
import numpy as np, torch
from kdlib.trainer import loop
from kdlib.dataset.pixels import Pixels
from kdlib.cache.build import build_shards
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.models.networks import build_network
from kdlib.trainer.objectives import build_distiller
from kdlib.study.models import Model
from kdlib.study.objectives import CrossEntropy
from kdlib.study.training import Augment, Training
from kdlib.repro.run import Run
from kdlib.dataset.plan import Plan
from kdlib.trainer.loop import train
from kdlib.trainer.step import Task

folder = Path(sys.argv[1])
folder.mkdir(exist_ok=True)
torch.set_num_threads(1)
loop.STATE_EVERY_S = 0.0 if len(sys.argv) > 2 else 20.0
if len(sys.argv) > 2:
    real = loop.Step.__call__
    loop.Step.__call__ = lambda *a: (time.sleep(0.02), real(*a))[1]
rng = np.random.default_rng(0)
pixels, labels = rng.integers(0, 256, (400, 1, 8, 8), np.uint8), rng.integers(0, 10, 400)
images = build_shards(
    folder.parent / "images", {"kind": "images"},
    {"images": ("|u1", (1, 8, 8)), "labels": ("<i8", ())},
    lambda span: {"images": pixels[slice(*span)], "labels": labels[slice(*span)]},
    n_examples=400, shard_size=100,
)
training = Training(
    steps=60, batch_size=32, lr_peak=0.1, ema=0.9, optimiser="adamw",
    augment=Augment(crop_padding=1), checkpoint_fractions=(0, 0.5), evaluate_every_steps=7,
)
objective = CrossEntropy()
normal = Pixels([0.3], [0.4])
network = build_network(Model(name="tiny_cnn"), n_classes=10, image_shape=(1, 8, 8), seed=0)
train(Run(folder, {"some": "settings"}), Task(
    network=network, pixels=normal,
    distiller=build_distiller(objective, {"logits": (10,)}, {}, seed=0, n_examples=300),
    loader=Loader(Plan(np.arange(300), 32, 60, 0), images, view=View(training.augment, 1, normal)),
    objective=objective, training=training, full_size=300, n_examples=400, seed=0,
    validation=(images.resident("images")[300:], images.resident("labels")[300:]),
))
"""
