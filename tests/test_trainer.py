"""The one loop: resuming, recording, budgets, failures."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import trainer
from kdlib.augment import Pixels
from kdlib.building import build
from kdlib.dynamics import DynamicsLog
from kdlib.loading import Loader, View
from kdlib.models import Network, build_network
from kdlib.params import Model, Objective, Training
from kdlib.runs import Run
from kdlib.sampling import Plan
from kdlib.seeds import derive
from kdlib.trainer import Task, TrainingError, learning_rate, make_optimiser, train

N, CLASSES = 90, 3
PIXELS = Pixels([0.5], [0.25])
TRAINING = Training(epochs=4, batch_size=16, lr_peak=0.1, warmup_steps=3, evaluate_every_steps=5)


class _Stopped(BaseException):
    """Stands for a kill: no handler of ours catches it."""


class _DropoutNet(Network):
    def __init__(self):
        super().__init__()
        self.n_features = 16
        self.linear, self.drop, self.out = (
            nn.Linear(16, 16),
            nn.Dropout(0.5),
            nn.Linear(16, CLASSES),
        )

    def features(self, x):
        return self.drop(torch.relu(self.linear(x.flatten(1))))

    def head(self, features):
        return self.out(features)


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(3)
    labels = np.arange(N, dtype=np.int64) % CLASSES
    pixels = (
        rng.integers(0, 120, (N, 1, 4, 4), dtype=np.uint8)
        + (labels * 60).astype(np.uint8)[:, None, None, None]
    )
    return build(
        tmp_path / "images",
        {"kind": "images"},
        {"images": ("|u1", (1, 4, 4)), "labels": ("<i8", ())},
        lambda span: {"images": pixels[slice(*span)], "labels": labels[slice(*span)]},
        n_examples=N,
        shard_size=40,
    )


def _task(images, *, seed=0, training=TRAINING, network=None, log=None, observed="train", n=60):
    ids = np.arange(n)
    plan = Plan(ids, training.batch_size, training.n_steps(n), seed)
    one_hot = torch.nn.functional.one_hot(images.resident("labels"), CLASSES).half() * 4
    teacher = build(
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
    return Task(
        network=network,
        pixels=PIXELS,
        loader=Loader(
            plan,
            images,
            view=View(training.augment, derive(seed, "augment"), PIXELS),
            teacher=teacher,
            reuse=True,
        ),
        n_examples=N,
        objective=Objective(kind="kd", alpha=0.5, temperature=2.0),
        training=training,
        validation=held_out,
        full_size=n,
        seed=seed,
        log=log,
        observed=observed,
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
        if path.is_file() and path.name != "state.safetensors"
    }


def _stop_after(monkeypatch, n):
    """Let `n` more training steps happen, then stop as abruptly as an exception can."""
    real, left = trainer.training_step, [n]

    def step(*arguments):
        if left[0] == 0:
            raise _Stopped
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(trainer, "training_step", step)


@pytest.mark.parametrize("observed", ["train", "eval"])
@pytest.mark.parametrize("network", [None, _DropoutNet])
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
    monkeypatch.setattr(trainer, "STATE_EVERY_S", 0.0)
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


@pytest.mark.parametrize("network", [None, _DropoutNet])
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
    monkeypatch.setattr(trainer, "evaluate", lambda *_: (1.0, next(told)))
    assert train(_run(tmp_path / "run"), _task(images)).best_step == 10


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    tmp_path, images, monkeypatch
):
    monkeypatch.setattr(trainer, "objective_loss", lambda *_: torch.tensor(float("nan")))
    task = _task(images)
    before = {k: v.clone() for k, v in task.network.named_parameters()}
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; lower training\.lr_peak"):
        train(_run(tmp_path / "run"), task)
    assert all(torch.equal(v, before[k]) for k, v in task.network.named_parameters())
    assert not (tmp_path / "run" / "evidence.json").exists()


def test_running_out_of_memory_says_what_to_lower(tmp_path, images, monkeypatch):
    def explode(*_):
        raise torch.OutOfMemoryError("asked for too much")

    monkeypatch.setattr(trainer, "objective_loss", explode)
    with pytest.raises(TrainingError, match=r"lower training\.batch_size"):
        train(_run(tmp_path / "run"), _task(images))


def test_a_full_disk_keeps_the_last_state_whole(tmp_path, images, monkeypatch):
    monkeypatch.setattr(trainer, "STATE_EVERY_S", 0.0)
    with monkeypatch.context() as patch:
        _stop_after(patch, 3)
        with pytest.raises(_Stopped):
            train(_run(tmp_path / "run"), _task(images))
    state = (tmp_path / "run" / "state.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(_run(tmp_path / "run"), _task(images))
    assert (tmp_path / "run" / "state.safetensors").read_bytes() == state


def test_a_state_of_other_settings_or_of_another_kind_is_refused(tmp_path, images, monkeypatch):
    monkeypatch.setattr(trainer, "STATE_EVERY_S", 0.0)
    _stop_after(monkeypatch, 2)
    run = _run(tmp_path / "run")
    with pytest.raises(_Stopped):
        train(run, _task(images))
    with pytest.raises(TrainingError, match="belongs to other settings"):
        train(Run(run.folder, {"other": "settings"}), _task(images))
    (run.folder / "state.safetensors").write_bytes(b"\x80\x04not tensors")
    with pytest.raises(TrainingError, match="not a training state of ours"):
        train(run, _task(images))


def test_permuted_teacher_rows_show_in_the_pairing(tmp_path, images):
    task = _task(images)
    train(_run(tmp_path / "run"), task)
    honest = trainer.pairing(task)
    shuffled, rows = np.random.default_rng(0).permutation(60), task.loader.teacher_logits
    task.loader.teacher_logits = lambda ranks, views: rows(shuffled[ranks], views)
    broken = trainer.pairing(task)
    assert honest["paired"] < 0.5 * honest["permuted"]
    assert honest["teacher_accuracy"] == 1.0
    assert broken["teacher_accuracy"] < 0.6


def test_learning_rate_warms_up_and_then_falls_along_a_cosine():
    cosine = Training(steps=14, batch_size=1, lr_peak=0.8, warmup_steps=4)
    # steps 0..3 climb by quarters; step 4 starts the cosine at its peak, step 9 is half-way
    rates = [learning_rate(cosine, step, 14) for step in (0, 1, 3, 4, 9)]
    assert rates == pytest.approx([0.2, 0.4, 0.8, 0.8, 0.4])
    constant = cosine.model_copy(update={"schedule": "constant"})
    assert learning_rate(constant, 13, 14) == 0.8


def test_biases_and_normalisation_weights_are_not_decayed(images):
    optimiser = make_optimiser(_task(images).network, TRAINING)
    decayed, free = optimiser.param_groups
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim == 1 for p in free["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (TRAINING.weight_decay, 0.0)


def test_without_teacher_there_is_no_pairing(tmp_path, images):
    task = _task(images)
    loader = Loader(task.loader.plan, images, view=View(TRAINING.augment, 0, PIXELS))
    plain = dataclasses.replace(task, loader=loader, objective=Objective(kind="cross_entropy"))
    assert train(_run(tmp_path / "run"), plain).evidence["pairing"] is None
