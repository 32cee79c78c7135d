"""The training loop of teachers and students, which resumes to the bit.

Order, augmentation and dropout are functions of (seed, step) without a generator's state, so that
a run that is killed at any moment and started again ends with the same bytes.
"""

import contextlib
import copy
import hashlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kdlib.models.evaluation import all_outputs
from kdlib.models.origins import begun
from kdlib.models.weights import save_weights, weights_fingerprint
from kdlib.repro import files
from kdlib.repro.run import Run
from kdlib.study.training import Training
from kdlib.trainer.distributed import gathered
from kdlib.trainer.optimiser import Ema, Patience, lowered
from kdlib.trainer.pairing import pairing
from kdlib.trainer.state import read_state, write_state
from kdlib.trainer.step import Step, Task, TrainingError, evaluated
from kdlib.trainer.tracking import Tracker

STATE_EVERY_S = 20.0  # a killed run loses at most this much work
FEWEST_ORDERED = 13  # examples of which two seeds hardly draw the same order (13! = 6e9)
CHUNK = 5000  # images without augmentation in memory at once; a multiple of their batch size


@dataclass(frozen=True)
class Trained:
    """The results of a finished loop.

    Attributes:
        metrics: One row per evaluation.
        checkpoints: Step -> (file name, weights fingerprint), the last step included.
        best_step: Step of the highest validation accuracy, without labels of the lowest validation
            loss; the first one when several tie.
        last_step: Steps taken: those of the plan, or fewer with early stopping.
        visits: (n_examples of the split,) int64, how often each example id was trained on.
        evidence: Facts for the checks: initialisation, order, batches, gradient, pairing, what
            evaluations read, settings as they were executed.
    """

    metrics: pd.DataFrame
    checkpoints: dict[int, tuple[str, str]]
    best_step: int
    last_step: int
    visits: np.ndarray
    evidence: dict[str, Any]


def checkpoint_steps(training: Training, n_steps: int) -> set[int]:
    """Steps of the checkpoints to probe: the study's fractions of the budget, and its end."""
    return {round(f * n_steps) for f in training.checkpoint_fractions} | {n_steps}


def train(
    run: Run,
    task: Task,
    describe: str | None = "training",
    tracker: Tracker | None = None,
    state_every_s: float | None = None,
) -> Trained:
    """Train to the end of the budget, from the beginning or from the saved state of a killed run.

    Weights at the checkpoint steps, at the best and at the last step are written into the run's
    folder; the caller finishes the run. Of several processes the first one writes.

    Args:
        describe: Text beside the progress bar; None shows no bar.
        state_every_s: Seconds between resumable states; None: `STATE_EVERY_S`.

    Raises: TrainingError for a loss that is not finite, memory that runs out, or a network that
        cannot be compiled here; StateError for a state of other settings.
    """
    n_steps, training = task.loader.plan.n_steps, task.training
    every = training.evaluate_every_steps or max(1, round(task.full_size / training.batch_size))
    kept = checkpoint_steps(training, n_steps)
    interval = STATE_EVERY_S if state_every_s is None else state_every_s
    bar = {"total": n_steps, "desc": describe, "unit": "step", "leave": False}
    if not task.world.first or describe is None:
        bar["disable"] = True
    with contextlib.ExitStack() as stack:
        stack.enter_context(_explaining())
        stack.callback(task.loader.close)
        loop = _Loop(run, task)
        progress = stack.enter_context(tqdm(initial=loop.step, **bar))
        task.network.train()
        saved = time.monotonic()
        while True:
            if loop.step in kept or loop.stopped:
                loop.keep(loop.kept_weights(), loop.step)
            if loop.step == n_steps or loop.stopped:
                break
            loop.advance()
            if loop.step % every == 0 or loop.step == n_steps:
                row = loop.measure()
                if tracker is not None:
                    known = {k: v for k, v in row.items() if k != "step" and not math.isnan(v)}
                    tracker.log(known, loop.step)
                which = "train" if math.isnan(row["validation_loss"]) else "validation"
                accuracy = row.get(f"{which}_accuracy")
                held_out = (
                    f"{row['validation_loss']:.3f}" if accuracy is None else f"{accuracy:.1%}"
                )
                progress.set_postfix_str(f"loss {row['train_loss']:.3f}, {which} {held_out}")
            progress.update(1)
            if time.monotonic() - saved >= interval:
                loop.save()
                saved = time.monotonic()
        return loop.close()


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """Raise a TrainingError that says what to do in the place of an error of the machine."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        # of the CPU's allocator; of the CUDA runtime, as for pinned memory; of cuBLAS and cuDNN
        signs = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
        if memory or any(sign in first for sign in signs):
            sentence = "out of memory: lower training.batch_size, or raise training.accumulate"
        elif type(error).__name__ in ("BackendCompilerFailed", "InductorError"):
            sentence = (
                "torch.compile failed; on a CPU it needs a C++ compiler (g++), on a GPU a C "
                "compiler and Python's headers: install them, or set compute.compile: false"
            )
        else:
            raise
        raise TrainingError(f"{sentence} ({first})") from None


class _Loop:
    """Everything of a run that changes from step to step; saved and restored."""

    def __init__(self, run: Run, task: Task) -> None:
        """At step 0, or at the step of the saved state."""
        self.run, self.task = run, task
        self.advance_one = Step(task)
        self.step, self.stopped, self.n_overflows = 0, False, 0
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last row
        self.recorded: list[list[float]] = []  # loss and learning rate of each step
        self.hits, self.best_step, self.best_accuracy = 0, -1, -1.0
        self.best_loss = math.inf  # decides without labels
        self.best_weights: dict[str, Tensor] = {}
        self.checkpoints: dict[int, tuple[str, str]] = {}
        self.visits = torch.zeros(task.n_examples, dtype=torch.int64)
        self.batches_sha256 = ""  # of the ids and labels of all batches so far
        self.factor = 1.0  # multiplies the learning rate; `plateau` lowers it
        self.plateau = Patience(task.training.patience)
        self.patience = Patience(task.training.early_stopping or 0)
        self.ema = Ema(task.network, task.training.ema) if task.training.ema else None
        # a second network, which holds the mean of weights while it is evaluated
        self._measured = copy.deepcopy(task.network) if self.ema else task.network
        order = task.loader.plan.order(0)
        # all seeds share the sorted order, and some share one of the few orders of few examples
        drawn = len(order) >= FEWEST_ORDERED and not np.array_equal(order, np.sort(order))
        self.evidence = {
            "initial_weights_sha256": weights_fingerprint(task.network),
            "begun": begun(task.network),
            "order_sha256": files.sha256_array(order) if drawn else None,
            "validation": [],  # what evaluations read: one entry, unless they read different images
        }
        self._restore()

    def advance(self) -> None:
        """Take one step; record its dynamics, hits and visits."""
        task = self.task
        batch = task.loader.batch(self.step)
        loss, logits = self.advance_one(batch, self.step, self.factor)
        self.n_overflows += self.advance_one.overflowed
        if not self.advance_one.overflowed:
            before = self.evidence.get("gradient")
            self.evidence["gradient"] = self.advance_one.gradient(before)
        if self.ema is not None:
            self.ema.update(task.network)
        columns = (batch.example_ids, batch.labels, batch.passes, batch.positions)
        ids, labels, passes, positions = (gathered(column, task.world) for column in columns)
        self.losses.append(loss)
        if task.training.record_steps:
            self.recorded.append([loss, self._rate])
        if logits.shape[1]:
            self.hits += int((logits.argmax(1) == labels).sum())
        self._count(ids, labels)
        if task.log is not None:
            self._record(passes, positions, logits, labels)
        self.step += 1

    @property
    def _rate(self) -> float:
        return self.advance_one.optimiser.param_groups[0]["lr"]

    def _count(self, ids: Tensor, labels: Tensor) -> None:
        """Count a batch among the visits, and chain its examples and labels, in the order of ids,
        to those of the batches before."""
        ids, labels = torch.stack((ids, labels)).cpu()
        self.visits.index_add_(0, ids, torch.ones_like(ids))
        order = ids.argsort(stable=True)
        rows = b"".join(column[order].numpy().tobytes() for column in (ids, labels))
        chained = hashlib.sha256(bytes.fromhex(self.batches_sha256) + rows)
        self.batches_sha256 = chained.hexdigest()

    def _executed(self) -> dict[str, Any]:
        """Settings of the training as its objects have them, beside those it was asked for."""
        step, view = self.advance_one, self.task.loader.view
        groups = step.optimiser.param_groups
        further: dict[str, Any] = {}
        if step.scaler.is_enabled():
            further["overflows"] = self.n_overflows
        if self.task.training.betas is not None:
            further["betas"] = list(groups[0]["betas"])
        further |= step.executed
        return further | {
            "optimiser": type(step.optimiser).__name__.lower(),
            "weight_decay": max(group["weight_decay"] for group in groups),
            "momentum": max(group.get("momentum", 0.0) for group in groups),
            "learning_rates": {str(row["step"]): row["learning_rate"] for row in self.rows},
            "augment": None
            if view is None
            else view.settings.model_dump(mode="json", exclude_none=True),
            "objective": step.learner.distiller.objective.model_dump(
                mode="json", exclude_none=True
            ),
            "ema": None if self.ema is None else self.ema.decay,
        }

    def _record(self, passes: Tensor, positions: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Record the dynamics of complete passes; a partial last pass is left out."""
        task, batch_size = self.task, self.task.training.batch_size
        if not task.world.first:
            return
        if task.observed == "train":
            whole = passes < task.loader.plan.n_passes
            task.log.record(passes[whole], positions[whole], logits[whole], labels[whole])
            return
        n = len(task.loader.plan.example_ids)
        for number in range(self.step * batch_size // n, (self.step + 1) * batch_size // n):
            for start in range(0, n, CHUNK):
                some = torch.arange(start, min(start + CHUNK, n))
                images = task.loader.raw(some.numpy())
                (clean,) = all_outputs(task.network, task.pixels, images, ("logits",))
                epochs = torch.full((len(some),), number)
                task.log.record(epochs, some, clean, task.loader.labels[some])

    def kept_weights(self) -> dict[str, Tensor]:
        """The weights to evaluate and to save: the network's, or their running mean."""
        return self.task.network.state_dict() if self.ema is None else self.ema.weights

    def measure(self) -> dict[str, float]:
        """Evaluate: add one row of metrics, copy the weights when they are the best so far, lower
        the learning rate on a plateau, and stop early where the study says so. Where no image is
        held out, validation columns are NaN, and the last weights are the best."""
        task, training = self.task, self.task.training
        if self.ema is not None:
            self._measured.load_state_dict(self.ema.weights)
        loss = accuracy = math.nan
        if (measured := evaluated(task, self._measured)) is not None:
            loss, accuracy = measured.loss, measured.accuracy
            if measured.read not in self.evidence["validation"]:
                self.evidence["validation"].append(measured.read)
        row = {
            "step": self.step,
            "epoch": self.step * training.batch_size / task.full_size,
            "learning_rate": self._rate,
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "train_accuracy": self.hits / (len(self.losses) * training.batch_size),
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            **self.advance_one.take_means(),
        }
        if accuracy is None:  # there are no labels
            del row["train_accuracy"], row["validation_accuracy"]
            better = loss < self.best_loss
        else:  # with nothing held out the last is the best
            better = accuracy > self.best_accuracy or math.isnan(accuracy)
        self.rows.append(row)
        self.evidence["executed"] = self._executed()
        self.losses, self.hits = [], 0
        if better:
            self.best_accuracy, self.best_loss, self.best_step = accuracy, loss, self.step
            kept = self.kept_weights()
            self.best_weights = {k: v.detach().cpu().clone() for k, v in kept.items()}
        if training.schedule == "plateau" and self.plateau.spent(loss):
            self.factor = lowered(training, self.factor)
        if training.early_stopping is not None and self.patience.spent(loss):
            self.stopped = True
        return row

    def keep(self, weights: dict[str, Tensor], step: int) -> None:
        """Write a checkpoint's weights."""
        name = f"weights-{step:08d}.safetensors"
        sha256 = weights_fingerprint(weights)
        if self.task.world.first:
            save_weights(weights, self.run.folder / name, {"step": str(step)})
        self.checkpoints[step] = (name, sha256)

    _NUMBERS = (
        "step", "stopped", "rows", "losses", "hits", "best_step", "best_accuracy", "best_loss",
        "evidence", "factor", "batches_sha256", "n_overflows",
    )  # fmt: skip

    def save(self) -> None:
        """Write the resumable state."""
        if not self.task.world.first:
            return
        step = self.advance_one
        tensors = {f"learner.{k}": v for k, v in step.learner.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()} | {"visits": self.visits}
        tensors["recorded"] = torch.tensor(self.recorded, dtype=torch.float64)
        for number, slots in step.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": v for k, v in slots.items() if v is not None}
        numbers = {key: getattr(self, key) for key in self._NUMBERS} | {
            "checkpoints": list(self.checkpoints.items()),
            "plateau": [self.plateau.best, self.plateau.waited],
            "patience": [self.patience.best, self.patience.waited],
            "scaler": step.scaler.state_dict(),
            "parts": [step.summed, {name: float(part) for name, part in step.parts.items()}],
        }
        if self.ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self.ema.weights.items()}
            numbers["ema_updates"] = self.ema.n_updates
        if self.task.log is not None:
            self.task.log.flush()
        write_state(self.run.state, self.run.settings, tensors, numbers)

    def _restore(self) -> None:
        state = read_state(self.run.state, self.run.settings)
        if state is None:
            return
        tensors, numbers = state
        for key in self._NUMBERS:
            setattr(self, key, numbers.get(key, getattr(self, key)))  # of an older state: as new
        self.checkpoints = {step: tuple(kept) for step, kept in numbers["checkpoints"]}
        self.plateau.best, self.plateau.waited = numbers["plateau"]
        self.patience.best, self.patience.waited = numbers["patience"]
        self.visits = tensors.pop("visits")
        self.recorded = tensors.pop("recorded", torch.empty(0)).tolist()
        parts: dict[str, dict] = {"learner": {}, "best": {}, "optimiser": {}, "ema": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.best_weights = parts["best"]
        step = self.advance_one
        step.learner.load_state_dict(parts["learner"])
        step.scaler.load_state_dict(numbers.get("scaler", {}))
        step.summed, step.parts = numbers.get("parts", (0, {}))  # of an older state: none
        if self.ema is not None:
            self.ema.load(parts["ema"], numbers["ema_updates"])
        groups = step.optimiser.state_dict()["param_groups"]
        trained = [p for group in step.optimiser.param_groups for p in group["params"]]
        slots: dict[int, dict] = {}
        for name, tensor in parts["optimiser"].items():
            number, _, key = name.partition(".")
            parameter = trained[int(number)]
            if tensor.shape == parameter.shape:
                # fused optimisers pair the elements of a weight and its momentum by their order in
                # memory: the saved tensor is contiguous, the weight may have its channels last
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            slots.setdefault(int(number), {})[key] = tensor
        step.optimiser.load_state_dict({"state": slots, "param_groups": groups})

    def close(self) -> Trained:
        """Write metrics and the best weights; collect the evidence for the checks."""
        if self.best_step not in self.checkpoints:
            self.keep(self.best_weights, self.best_step)
        metrics = pd.DataFrame(self.rows)
        if self.task.world.first:
            files.write_atomic(self.run.folder / "metrics.parquet", metrics.to_parquet)
            if self.recorded:
                table = pd.DataFrame(self.recorded, columns=["loss", "learning_rate"])
                table.insert(0, "step", np.arange(1, len(table) + 1))
                files.write_atomic(self.run.folder / "steps.parquet", table.to_parquet)
        self.evidence["pairing"] = pairing(self.task, self.advance_one.learner)
        self.evidence["stopped_early"] = self.stopped
        self.evidence["batches_sha256"] = self.batches_sha256
        facts = self.best_step, self.step, self.visits.numpy(), self.evidence
        return Trained(metrics, self.checkpoints, *facts)
