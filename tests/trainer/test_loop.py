"""The one loop: resuming, recording, budgets, failures."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from kdlib.cache.build import build_shards
from kdlib.cartography.log import DynamicsLog
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.models.networks import build_network
from kdlib.repro.run import Run
from kdlib.repro.seeds import derive
from kdlib.study import objectives
from kdlib.study.models import Model
from kdlib.study.objectives import CrossEntropy
from kdlib.study.training import Compute, Training
from kdlib.trainer import loop
from kdlib.trainer.loop import train
from kdlib.trainer.objectives import build_distiller, student_outputs
from kdlib.trainer.pairing import pairing
from kdlib.trainer.state import BEFORE, NAME, StateError
from kdlib.trainer.step import Learner, Step, Task, TrainingError

N, CLASSES = 90, 3
PIXELS = Pixels([0.5], [0.25])
TRAINING = Training(epochs=4, batch_size=16, lr_peak=0.1, warmup_steps=3, evaluate_every_steps=5)


class _Stopped(BaseException):
    """Stands for a kill: no handler of ours catches it."""


class _DropoutNet(Network):
    def __init__(self):
        super().__init__()
        self.n_features, self.n_classes, self.n_stages = 16, CLASSES, 0
        self.linear, self.drop, self.out = (
            nn.Linear(16, 16),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        )

    def features(self, x):
        return self.drop(torch.relu(self.linear(x.flatten(1))))

    def head(self, features):
        return self.out(features)


class _DropRateNet(_DropoutNet):
    """As timm's networks drop: by a number, without a module for it."""

    def __init__(self):
        super().__init__()
        self.drop, self.drop_rate = nn.Identity(), 0.5

    def features(self, x):
        return F.dropout(super().features(x), self.drop_rate, self.training)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(3)
    labels = np.arange(N, dtype=np.int64) % CLASSES
    pixels = (
        rng.integers(0, 120, (N, 1, 4, 4), dtype=np.uint8)
        + (labels * 60).astype(np.uint8)[:, None, None, None]
    )
    return build_shards(
        tmp_path / "images",
        {"kind": "images"},
        {"images": ("|u1", (1, 4, 4)), "labels": ("<i8", ())},
        lambda span: {"images": pixels[slice(*span)], "labels": labels[slice(*span)]},
        n_examples=N,
        shard_size=40,
    )


KD = objectives.KD(alpha=0.5, temperature=2.0)


def _task(
    images, *, seed=0, training=TRAINING, network=None, log=None, observed="train", n=60,
    objective=KD, **more,
):  # fmt: skip
    ids = np.arange(n)
    plan = Plan(ids, training.batch_size, training.n_steps(n), seed)
    one_hot = torch.nn.functional.one_hot(images.resident("labels"), CLASSES).half() * 4
    teacher = build_shards(
        images.folder.parent / "outputs",
        {"view": "clean", "top_k": None, "n_classes": CLASSES},
        {"logits": ("<f2", (1, CLASSES))},
        lambda span: {"logits": one_hot[slice(*span), None].numpy()},
        n_examples=N,
        shard_size=40,
    )
    held_out = images.resident("images")[n:], images.resident("labels")[n:]
    if network is None:
        model = Model(name="tiny_cnn", options={"width": 4})
        network = build_network(model, n_classes=CLASSES, image_shape=(1, 4, 4), seed=seed)
    shapes = network.output_shapes((1, 4, 4), student_outputs(objective, network.n_stages))
    distiller = build_distiller(objective, shapes, {"logits": (CLASSES,)}, seed=seed, n_examples=n)
    return Task(
        network=network,
        distiller=distiller,
        pixels=PIXELS,
        loader=Loader(
            plan,
            images,
            view=View(training.augment, derive(seed, "augment"), PIXELS),
            teacher=teacher,
            reuse=True,
        ),
        n_examples=N,
        objective=objective,
        training=training,
        validation=held_out,
        full_size=n,
        seed=seed,
        log=log,
        observed=observed,
        **more,
    )


def _log(folder, images, n_epochs=4, observed="train"):
    ids = np.arange(60)
    return DynamicsLog.create(
        folder, ids, images.read("labels", ids), n_epochs=n_epochs, n_classes=CLASSES,
        observed=observed, logits=True, provenance={"images": images.fingerprint},
    )  # fmt: skip


def _run(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, {"some": "settings"})


def _bytes(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.lstrip(".").startswith("state.")
    }


def _stop_after(monkeypatch, n):
    """Let `n` more training steps happen, then stop as abruptly as an exception can."""
    real, left = Step.__call__, [n]

    def step(*arguments):
        if left[0] == 0:
            raise _Stopped
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(Step, "__call__", step)


@pytest.mark.parametrize("observed", ["train", "eval"])
@pytest.mark.parametrize("network", [None, _DropoutNet, _DropRateNet])
@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_stopped_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one(
    tmp_path, images, monkeypatch, observed, network, optimiser
):
    training = TRAINING.model_copy(
        update={"optimiser": optimiser, "lr_peak": 0.01, "checkpoint_fractions": (0, 0.5)}
    )

    def one(folder):
        torch.manual_seed(5)  # of this test alone: the initial weights of _DropoutNet
        net = network() if network else None
        log = _log(folder / "dynamics", images, observed=observed)
        task = _task(images, training=training, network=net, log=log, observed=observed)
        trained = train(_run(folder), task)
        log.finish()
        return trained

    whole = one(tmp_path / "whole")
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    for n_steps in (1, 4, 7):  # three stops; the fourth start ends the run
        with monkeypatch.context() as patch:
            _stop_after(patch, n_steps)
            with pytest.raises(_Stopped):
                one(tmp_path / "stopped")
    resumed = one(tmp_path / "stopped")

    assert _bytes(tmp_path / "stopped") == _bytes(tmp_path / "whole")
    assert resumed.checkpoints == whole.checkpoints
    assert resumed.best_step == whole.best_step
    assert np.array_equal(resumed.visits, whole.visits)
    assert resumed.evidence == whole.evidence


@pytest.mark.parametrize("observed", ["train", "eval"])
def test_recording_dynamics_leaves_the_weights_as_they_are(tmp_path, images, observed):
    log = _log(tmp_path / "dynamics", images, observed=observed)
    recorded = train(_run(tmp_path / "a"), _task(images, log=log, observed=observed))
    plain = train(_run(tmp_path / "b"), _task(images))
    assert recorded.checkpoints == plain.checkpoints


def test_the_dynamics_of_a_clean_pass_are_those_of_the_weights_after_it(tmp_path, images):
    training = TRAINING.model_copy(update={"epochs": 1.0, "batch_size": 60, "warmup_steps": 0})
    log = _log(tmp_path / "dynamics", images, n_epochs=1, observed="eval")
    task = _task(images, training=training, log=log, observed="eval")
    train(_run(tmp_path / "run"), task)
    task.network.eval()
    with torch.no_grad():
        logits = task.network(task.pixels.prepare(task.loader.raw(np.arange(60))))
    expected = logits.softmax(1)[torch.arange(60), task.loader.labels[:60]].numpy()
    assert np.allclose(log.finish()["gold_prob"][0], expected, atol=1e-3)


def test_two_seeds_share_neither_initial_weights_nor_order(tmp_path, images):
    a = train(_run(tmp_path / "a"), _task(images, seed=0)).evidence
    b = train(_run(tmp_path / "b"), _task(images, seed=1)).evidence
    assert a["initial_weights_sha256"] != b["initial_weights_sha256"]
    assert a["order_sha256"] != b["order_sha256"]


@pytest.mark.parametrize("network", [None, _DropoutNet, _DropRateNet])
def test_training_leaves_the_global_generators_as_they_were(tmp_path, images, network):
    task = _task(images, network=network() if network else None)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(_run(tmp_path / "run"), task)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_every_budgeted_sample_is_seen_and_none_beside(tmp_path, images):
    trained = train(_run(tmp_path / "run"), _task(images))
    assert trained.visits.sum() == 15 * 16  # ceil(4 epochs * 60 / 16) steps of 16
    assert trained.visits[60:].sum() == 0
    assert trained.visits[:60].min() == 4


def test_the_last_step_is_measured_even_off_the_evaluation_grid(tmp_path, images):
    training = TRAINING.model_copy(update={"evaluate_every_steps": 4})
    metrics = train(_run(tmp_path / "run"), _task(images, training=training)).metrics
    assert metrics["step"].tolist() == [4, 8, 12, 15]


def test_the_best_step_is_the_first_of_those_that_tie(tmp_path, images, monkeypatch):
    told = iter([0.5, 0.9, 0.9])
    monkeypatch.setattr(loop, "evaluate", lambda *_: (1.0, next(told)))
    assert train(_run(tmp_path / "run"), _task(images)).best_step == 10


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    tmp_path, images, monkeypatch
):
    task = _task(images)
    monkeypatch.setattr(
        type(task.distiller), "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    before = {k: v.clone() for k, v in task.network.named_parameters()}
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; lower training\.lr_peak"):
        train(_run(tmp_path / "run"), task)
    assert all(torch.equal(v, before[k]) for k, v in task.network.named_parameters())
    assert not (tmp_path / "run" / "evidence.json").exists()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] can't allocate memory: you tried"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_running_out_of_memory_says_what_to_lower(tmp_path, images, monkeypatch, error):
    def explode(*_):
        raise error

    task = _task(images)
    monkeypatch.setattr(type(task.distiller), "loss", explode)
    with pytest.raises(TrainingError, match=r"lower training\.batch_size"):
        train(_run(tmp_path / "run"), task)


def test_an_error_of_another_kind_keeps_its_own_words(tmp_path, images, monkeypatch):
    def explode(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    task = _task(images)
    monkeypatch.setattr(type(task.distiller), "loss", explode)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(_run(tmp_path / "run"), task)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_network_trains_like_the_plain_one(tmp_path, images):
    training = TRAINING.model_copy(update={"epochs": 1.0, "lr_peak": 0.01})
    weights = []
    for compiled in (False, True):
        run = _run(tmp_path / str(compiled))
        task = _task(images, training=training, compute=Compute(compile=compiled))
        trained = train(run, task)
        weights.append(load_file(run.folder / trained.checkpoints[trained.last_step][0]))
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor.float(), weights[1][name].float(), atol=1e-3), name


@pytest.mark.filterwarnings("ignore")
def test_a_missing_compiler_is_named(tmp_path, images, monkeypatch):
    class InductorError(RuntimeError):
        pass

    def explode(*_):
        raise InductorError("no working C++ compiler")

    task = _task(images, compute=Compute(compile=True))
    monkeypatch.setattr(Step, "__call__", explode)
    with pytest.raises(TrainingError, match=r"needs a C\+\+ compiler .*compute\.compile: false"):
        train(_run(tmp_path / "run"), task)


def test_a_full_disk_keeps_the_last_state_whole(tmp_path, images, monkeypatch):
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        _stop_after(patch, 3)
        with pytest.raises(_Stopped):
            train(_run(tmp_path / "run"), _task(images))
    state = (tmp_path / "run" / "state" / "state.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(_run(tmp_path / "run"), _task(images))
    assert (tmp_path / "run" / "state" / "state.safetensors").read_bytes() == state


def test_a_state_of_other_settings_or_of_another_kind_is_refused(tmp_path, images, monkeypatch):
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    _stop_after(monkeypatch, 2)
    run = _run(tmp_path / "run")
    with pytest.raises(_Stopped):
        train(run, _task(images))
    with pytest.raises(StateError, match=r"of other settings.*some: settings -> other"):
        train(Run(run.folder, {"some": "other"}), _task(images))
    for name in (NAME, BEFORE):
        (run.state / name).write_bytes(b"\x80\x04not tensors")
    with pytest.raises(StateError, match="not a whole training state"):
        train(run, _task(images))


def test_permuted_teacher_rows_show_in_the_pairing(tmp_path, images):
    task = _task(images)
    train(_run(tmp_path / "run"), task)
    learner = Learner(task.network, task.distiller, task.objective)
    honest = pairing(task, learner)
    shuffled, rows = np.random.default_rng(0).permutation(60), task.loader.teacher_rows
    task.loader.teacher_rows = lambda positions, views: rows(shuffled[positions], views)
    broken = pairing(task, learner)
    assert honest["paired"] < 0.5 * honest["permuted"]
    assert honest["teacher_accuracy"] == 1.0
    assert broken["teacher_accuracy"] < 0.6


def test_without_teacher_there_is_no_pairing(tmp_path, images):
    task = _task(images, objective=CrossEntropy())
    loader = Loader(task.loader.plan, images, view=View(TRAINING.augment, 0, PIXELS))
    plain = dataclasses.replace(task, loader=loader)
    assert train(_run(tmp_path / "run"), plain).evidence["pairing"] is None


VARIANTS = {
    "ema": {"ema": 0.9},
    "clip": {"clip_norm": 0.05},
    "accumulate": {"accumulate": 4},
    "step": {"schedule": "step", "milestones": (0.3, 0.6)},
    "plateau": {"schedule": "plateau", "patience": 1, "decay": 0.5, "evaluate_every_steps": 2},
    "one_cycle": {"schedule": "one_cycle"},
    "early_stopping": {"early_stopping": 1, "evaluate_every_steps": 1, "lr_peak": 1.0},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_way_to_train_resumes_to_the_bit(tmp_path, images, monkeypatch, name):
    training = Training(**TRAINING.model_dump() | VARIANTS[name])

    def one(folder):
        return train(_run(folder), _task(images, training=training))

    whole = one(tmp_path / "whole")
    monkeypatch.setattr(loop, "STATE_EVERY_S", 0.0)
    for n_steps in (1, 2):
        with monkeypatch.context() as patch:
            _stop_after(patch, n_steps)
            with pytest.raises(_Stopped):
                one(tmp_path / "stopped")
    resumed = one(tmp_path / "stopped")
    assert _bytes(tmp_path / "stopped") == _bytes(tmp_path / "whole")
    assert (resumed.last_step, resumed.evidence) == (whole.last_step, whole.evidence)
    assert whole.evidence["stopped_early"] == (name == "early_stopping")


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_a_network_with_its_channels_last_resumes_to_the_bit(
    tmp_path, images, monkeypatch, optimiser
):
    training = TRAINING.model_copy(update={"optimiser": optimiser, "lr_peak": 0.01})

    def one(folder):
        task = _task(images, training=training)
        task.network.to(memory_format=torch.channels_last)  # as a study's are
        return train(_run(folder), task, state_every_s=0.0)

    whole = one(tmp_path / "whole")
    with monkeypatch.context() as patch:
        _stop_after(patch, 4)
        with pytest.raises(_Stopped):
            one(tmp_path / "stopped")
    assert one(tmp_path / "stopped").checkpoints == whole.checkpoints


def test_kept_weights_are_the_running_mean_of_those_of_every_step(tmp_path, images, monkeypatch):
    training = TRAINING.model_copy(update={"ema": 0.5})
    seen, real = [], Step.__call__

    def step(self, *arguments):
        told = real(self, *arguments)
        seen.append(self.task.network.conv1.weight.detach().clone())
        return told

    task = _task(images, training=training)
    mean = task.network.conv1.weight.detach().clone()
    monkeypatch.setattr(Step, "__call__", step)
    trained = train(_run(tmp_path / "run"), task)
    for number, weight in enumerate(seen):
        keep = min(0.5, (1 + number) / (10 + number))
        mean = keep * mean + (1 - keep) * weight
    kept = load_file(tmp_path / "run" / trained.checkpoints[15][0])["conv1.weight"]
    assert torch.allclose(kept, mean, atol=1e-6)
    assert not torch.allclose(kept, seen[-1], atol=1e-4)


def test_a_batch_in_pieces_gives_the_gradient_of_the_whole(images):
    """Without BatchNorm, which sees a piece at a time, and with a loss that is a mean."""
    gradients = []
    for accumulate in (1, 4):
        torch.manual_seed(5)  # of this test alone
        network = _DropoutNet()
        network.drop = nn.Identity()
        training = TRAINING.model_copy(update={"accumulate": accumulate})
        task = _task(images, network=network, training=training)
        step = Step(task)
        loss, logits = step(task.loader.batch(0), 0)
        gradients.append([loss, logits, *(p.grad for p in network.parameters())])
    for whole, pieces in zip(*gradients, strict=True):
        assert np.allclose(np.asarray(whole), np.asarray(pieces), atol=1e-6)


def test_a_clipped_gradient_has_at_most_the_norm_asked_for(images):
    training = TRAINING.model_copy(update={"clip_norm": 0.01})
    task = _task(images, training=training)
    step = Step(task)
    step(task.loader.batch(0), 0)
    norm = torch.cat([p.grad.flatten() for p in task.network.parameters()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_early_stopping_ends_the_run_and_keeps_its_last_weights(tmp_path, images, monkeypatch):
    training = TRAINING.model_copy(update={"early_stopping": 1, "evaluate_every_steps": 2})
    told = iter([0.5, 0.6, 0.7])
    monkeypatch.setattr(loop, "evaluate", lambda *_: (next(told), 0.5))
    trained = train(_run(tmp_path / "run"), _task(images, training=training))
    assert (trained.last_step, trained.evidence["stopped_early"]) == (6, True)
    assert (tmp_path / "run" / trained.checkpoints[6][0]).exists()
    assert trained.visits.sum() == 6 * 16


def test_a_plateau_lowers_the_learning_rate(tmp_path, images, monkeypatch):
    training = TRAINING.model_copy(
        update={"schedule": "plateau", "patience": 1, "decay": 0.5, "evaluate_every_steps": 3}
    )
    told = iter([0.5, 0.6, 0.7, 0.8, 0.9])
    monkeypatch.setattr(loop, "evaluate", lambda *_: (next(told), 0.5))
    metrics = train(_run(tmp_path / "run"), _task(images, training=training)).metrics
    # the third evaluation is one too many, and the fifth again
    assert metrics["learning_rate"].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


def test_bfloat16_trains_in_it_and_keeps_float32_weights(tmp_path, images):
    cast = train(_run(tmp_path / "a"), _task(images, compute=Compute(precision="bf16")))
    plain = train(_run(tmp_path / "b"), _task(images))
    weights = [load_file(tmp_path / r / "weights-00000015.safetensors") for r in "ab"]
    assert cast.checkpoints[15][1] != plain.checkpoints[15][1]
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype
        assert torch.allclose(tensor.float(), weights[1][name].float(), atol=0.1)


def test_a_killed_process_goes_on_to_the_same_bytes(tmp_path):
    """kill -9, really: a process that trains digits is killed at three moments."""
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
    assert _bytes(tmp_path / "killed") == _bytes(tmp_path / "whole")


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
from sklearn.datasets import load_digits
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
digits = load_digits()
pixels = (digits.images * 15).astype(np.uint8)[:, None]
labels = digits.target.astype(np.int64)
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
