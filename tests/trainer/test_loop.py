"""The training loop: recording, budgets, failures, ways to train."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from trainer.small_task import (
    KD,
    PIXELS,
    TRAINING,
    DropoutNet,
    DropRateNet,
    new_log,
    run_in,
    small_images,
    small_task,
)

from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.models.evaluation import Evaluation
from kdlib.steps.recount import unlike_executed
from kdlib.study.objectives import CrossEntropy
from kdlib.study.training import Compute
from kdlib.trainer import loop
from kdlib.trainer.loop import train
from kdlib.trainer.pairing import pairing
from kdlib.trainer.step import Learner, Step, TrainingError


@pytest.fixture
def images(tmp_path):
    return small_images(tmp_path)


@pytest.mark.parametrize("observed", ["train", "eval"])
def test_recording_dynamics_leaves_the_weights_as_they_are(tmp_path, images, observed):
    log = new_log(tmp_path / "dynamics", images, observed=observed)
    recorded = train(run_in(tmp_path / "a"), small_task(images, log=log, observed=observed))
    plain = train(run_in(tmp_path / "b"), small_task(images))
    assert recorded.checkpoints == plain.checkpoints


def test_the_dynamics_of_a_clean_pass_are_those_of_the_weights_after_it(tmp_path, images):
    training = TRAINING.model_copy(update={"epochs": 1.0, "batch_size": 60, "warmup_steps": 0})
    log = new_log(tmp_path / "dynamics", images, n_epochs=1, observed="eval")
    task = small_task(images, training=training, log=log, observed="eval")
    train(run_in(tmp_path / "run"), task)
    task.network.eval()
    with torch.no_grad():
        logits = task.network(task.pixels.prepare(task.loader.raw(np.arange(60))))
    expected = logits.softmax(1)[torch.arange(60), task.loader.labels[:60]].numpy()
    assert np.allclose(log.finish()["gold_prob"][0], expected, atol=1e-3)


def test_two_seeds_share_neither_initial_weights_nor_order(tmp_path, images):
    a = train(run_in(tmp_path / "a"), small_task(images, seed=0)).evidence
    b = train(run_in(tmp_path / "b"), small_task(images, seed=1)).evidence
    assert a["initial_weights_sha256"] != b["initial_weights_sha256"]
    assert a["order_sha256"] != b["order_sha256"]


@pytest.mark.parametrize("network", [None, DropoutNet, DropRateNet])
def test_training_leaves_the_global_generators_as_they_were(tmp_path, images, network):
    task = small_task(images, network=network() if network else None)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    train(run_in(tmp_path / "run"), task)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_every_budgeted_sample_is_seen_and_none_beside(tmp_path, images):
    trained = train(run_in(tmp_path / "run"), small_task(images))
    assert trained.visits.sum() == 15 * 16  # ceil(4 epochs * 60 / 16) steps of 16
    assert trained.visits[60:].sum() == 0
    assert trained.visits[:60].min() == 4


def test_the_last_step_is_measured_even_off_the_evaluation_grid(tmp_path, images):
    training = TRAINING.model_copy(update={"evaluate_every_steps": 4})
    metrics = train(run_in(tmp_path / "run"), small_task(images, training=training)).metrics
    assert metrics["step"].tolist() == [4, 8, 12, 15]


def test_the_best_step_is_the_first_of_those_that_tie(tmp_path, images, monkeypatch):
    evaluations = iter([0.5, 0.9, 0.9])
    monkeypatch.setattr(loop, "evaluated", lambda *_: Evaluation(1.0, next(evaluations), 1, ""))
    assert train(run_in(tmp_path / "run"), small_task(images)).best_step == 10


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(
    tmp_path, images, monkeypatch
):
    task = small_task(images)
    monkeypatch.setattr(
        type(task.distiller), "loss", lambda *_: torch.tensor(float("nan"), requires_grad=True)
    )
    before = {k: v.clone() for k, v in task.network.named_parameters()}
    with pytest.raises(TrainingError, match=r"the loss is nan at step 0; lower training\.lr_peak"):
        train(run_in(tmp_path / "run"), task)
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

    task = small_task(images)
    monkeypatch.setattr(type(task.distiller), "loss", explode)
    with pytest.raises(TrainingError, match=r"lower training\.batch_size"):
        train(run_in(tmp_path / "run"), task)


def test_an_error_of_another_kind_keeps_its_own_words(tmp_path, images, monkeypatch):
    def explode(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    task = small_task(images)
    monkeypatch.setattr(type(task.distiller), "loss", explode)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        train(run_in(tmp_path / "run"), task)


@pytest.mark.long
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++ on a CPU")
@pytest.mark.filterwarnings("ignore")  # of the compiler
def test_a_compiled_network_trains_like_the_plain_one(tmp_path, images):
    training = TRAINING.model_copy(update={"epochs": 1.0, "lr_peak": 0.01})
    weights = []
    for compiled in (False, True):
        run = run_in(tmp_path / str(compiled))
        task = small_task(images, training=training, compute=Compute(compile=compiled))
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

    task = small_task(images, compute=Compute(compile=True))
    monkeypatch.setattr(Step, "__call__", explode)
    with pytest.raises(TrainingError, match=r"needs a C\+\+ compiler .*compute\.compile: false"):
        train(run_in(tmp_path / "run"), task)


def test_permuted_teacher_rows_show_in_the_pairing(tmp_path, images):
    task = small_task(images)
    train(run_in(tmp_path / "run"), task)
    learner = Learner(task.network, task.distiller, task.objective)
    honest = pairing(task, learner)
    shuffled, rows = np.random.default_rng(0).permutation(60), task.loader.teacher_rows
    task.loader.teacher_rows = lambda positions, views: rows(shuffled[positions], views)
    broken = pairing(task, learner)
    assert honest["paired"] < 0.5 * honest["permuted"]
    assert honest["teacher_accuracy"] == 1.0
    assert broken["teacher_accuracy"] < 0.6


def test_without_labels_rows_are_shifted_by_one_in_the_pairing(tmp_path, images, monkeypatch):
    task, seen = small_task(images), []
    task.loader._labels[:] = -1

    def term(projected, teacher, labels):
        seen.append(teacher["logits"])
        return teacher["logits"].sum()

    monkeypatch.setattr(task.distiller, "soft_term", term)
    pairing(task, Step(task).learner)
    assert torch.equal(seen[1], seen[0].roll(1, 0))


def test_without_teacher_there_is_no_pairing(tmp_path, images):
    task = small_task(images, objective=CrossEntropy())
    loader = Loader(task.loader.plan, images, view=View(TRAINING.augment, 0, PIXELS))
    plain = dataclasses.replace(task, loader=loader)
    assert train(run_in(tmp_path / "run"), plain).evidence["pairing"] is None


def test_kept_weights_are_the_running_mean_of_those_of_every_step(tmp_path, images, monkeypatch):
    training = TRAINING.model_copy(update={"ema": 0.5})
    seen, real = [], Step.__call__

    def step(self, *arguments):
        taken = real(self, *arguments)
        seen.append(self.task.network.conv1.weight.detach().clone())
        return taken

    task = small_task(images, training=training)
    mean = task.network.conv1.weight.detach().clone()
    monkeypatch.setattr(Step, "__call__", step)
    trained = train(run_in(tmp_path / "run"), task)
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
        network = DropoutNet()
        network.drop = nn.Identity()
        training = TRAINING.model_copy(update={"accumulate": accumulate})
        task = small_task(images, network=network, training=training)
        step = Step(task)
        loss, logits = step(task.loader.batch(0), 0)
        gradients.append([loss, logits, *(p.grad for p in network.parameters())])
    for whole, pieces in zip(*gradients, strict=True):
        assert np.allclose(np.asarray(whole), np.asarray(pieces), atol=1e-6)


def test_a_clipped_gradient_has_at_most_the_norm_asked_for(images):
    training = TRAINING.model_copy(update={"clip_norm": 0.01})
    task = small_task(images, training=training)
    step = Step(task)
    step(task.loader.batch(0), 0)
    norm = torch.cat([p.grad.flatten() for p in task.network.parameters()]).norm()
    assert norm == pytest.approx(0.01, rel=1e-3)


def test_early_stopping_ends_the_run_and_keeps_its_last_weights(tmp_path, images, monkeypatch):
    training = TRAINING.model_copy(update={"early_stopping": 1, "evaluate_every_steps": 2})
    evaluations = iter([0.5, 0.6, 0.7])
    monkeypatch.setattr(loop, "evaluated", lambda *_: Evaluation(next(evaluations), 0.5, 1, ""))
    trained = train(run_in(tmp_path / "run"), small_task(images, training=training))
    assert (trained.last_step, trained.evidence["stopped_early"]) == (6, True)
    assert (tmp_path / "run" / trained.checkpoints[6][0]).exists()
    assert trained.visits.sum() == 6 * 16


def test_a_plateau_lowers_the_learning_rate(tmp_path, images, monkeypatch):
    training = TRAINING.model_copy(
        update={"schedule": "plateau", "patience": 1, "decay": 0.5, "evaluate_every_steps": 3}
    )
    evaluations = iter([0.5, 0.6, 0.7, 0.8, 0.9])
    monkeypatch.setattr(loop, "evaluated", lambda *_: Evaluation(next(evaluations), 0.5, 1, ""))
    metrics = train(run_in(tmp_path / "run"), small_task(images, training=training)).metrics
    # the third evaluation is one too many, and the fifth again
    assert metrics["learning_rate"].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.05, 0.05])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_in_it_and_keeps_float32_weights(tmp_path, images, precision):
    cast = train(run_in(tmp_path / "a"), small_task(images, compute=Compute(precision=precision)))
    plain = train(run_in(tmp_path / "b"), small_task(images))
    weights = [load_file(tmp_path / r / "weights-00000015.safetensors") for r in "ab"]
    assert cast.checkpoints[15][1] != plain.checkpoints[15][1]
    for name, tensor in weights[0].items():
        assert tensor.dtype == weights[1][name].dtype
        assert torch.allclose(tensor.float(), weights[1][name].float(), atol=0.1)


@pytest.mark.parametrize(
    ("compute", "precision"),
    [
        (Compute(), "float32"),
        (Compute(precision="bf16"), "bfloat16"),
        (Compute(precision="fp16"), "float16"),
    ],
)
def test_settings_are_on_record_as_they_were_executed(tmp_path, images, compute, precision):
    training = TRAINING.model_copy(update={"accumulate": 2, "clip_norm": 0.5, "ema": 0.9})
    task = small_task(images, training=training, compute=compute)
    executed = train(run_in(tmp_path / "run"), task).evidence["executed"]
    rates = executed.pop("learning_rates")
    assert executed.pop("overflows", None) == (0 if precision == "float16" else None)
    assert list(rates) == ["5", "10", "15"]
    assert rates["15"] < rates["5"] < training.lr_peak
    assert executed == {
        "batch_size": 16,
        "accumulate": 2,
        "clip_norm": 0.5,
        "precision": precision,
        "optimiser": "sgd",
        "weight_decay": training.weight_decay,
        "momentum": training.momentum,
        "augment": {"crop_padding": 0, "flip": False},
        "objective": {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "standardise": False},
        "ema": 0.9,
    }


def test_a_step_that_overflows_in_float16_changes_no_weight_and_is_counted(tmp_path, images):
    task = small_task(images, compute=Compute(precision="fp16"))
    step = Step(task)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.clone() for p in step.learner.parameters()]
    step(task.loader.batch(0), 0)
    assert step.overflowed
    assert all(map(torch.equal, step.learner.parameters(), before))
    step.scaler = torch.amp.GradScaler("cpu")
    step(task.loader.batch(1), 1)
    assert not step.overflowed
    assert not all(map(torch.equal, step.learner.parameters(), before))


def test_a_plateau_stops_at_its_floor(tmp_path, images, monkeypatch):
    schedule = {"schedule": "plateau", "patience": 1, "decay": 0.25, "lr_floor": 0.01}
    training = TRAINING.model_copy(update=schedule | {"evaluate_every_steps": 2, "warmup_steps": 0})
    worse = iter(range(10))
    monkeypatch.setattr(loop, "evaluated", lambda *_: Evaluation(next(worse), 0.5, 1, ""))
    trained = train(run_in(tmp_path / "run"), small_task(images, training=training))
    # lowered after the evaluations of steps 6, 10 and 14: 0.1, 0.025, 0.01 instead of 0.00625
    rates = [0.1, 0.1, 0.1, 0.025, 0.025, 0.01, 0.01, 0.01]
    assert trained.metrics["learning_rate"].tolist() == pytest.approx(rates)
    assert unlike_executed(asked_for(training), trained.evidence["executed"], 15) == []
    higher = asked_for(training.model_copy(update={"lr_floor": 0.02}))
    (wrong,) = unlike_executed(higher, trained.evidence["executed"], 15)
    assert wrong == "learning rate of step 12: 0.01, asked for 0.02"


def test_betas_are_on_record_and_held_to_the_settings(tmp_path, images):
    training = TRAINING.model_copy(update={"optimiser": "adam", "betas": (0.5, 0.9)})
    executed = train(run_in(tmp_path / "run"), small_task(images, training=training)).evidence[
        "executed"
    ]
    assert (executed["optimiser"], executed["betas"]) == ("adam", [0.5, 0.9])
    assert unlike_executed(asked_for(training), executed, 15) == []
    other = asked_for(training.model_copy(update={"betas": (0.9, 0.9)}))
    (wrong,) = unlike_executed(other, executed, 15)
    assert wrong == "betas as executed: 0.5 and 0.9, asked for 0.9 and 0.9"


def asked_for(training):
    """The settings of a step with this training and the small task's objective."""
    dumped = {"training": training, "objective": KD, "compute": Compute()}
    return {k: v.model_dump(mode="json", exclude_none=True) for k, v in dumped.items()}
