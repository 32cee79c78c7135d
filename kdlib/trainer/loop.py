"""The one training step and the one loop, for teachers and students alike, resumable to the bit.

What differs between runs is the objective and the settings, never the code path. No generator has
a state here: order, augmentation and dropout are functions of (seed, step), so that a run killed at
any moment and started again ends with the same bytes. Several processes share each batch and train
what one would. Leaves to others: what is trained on what (`experiment`), how weights move
(`optimising`), and whether the numbers may be believed (`checks`).
"""

import contextlib
import copy
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

from kdlib.models.evaluation import accuracy, all_outputs, evaluate
from kdlib.models.weights import save_weights, weights_fingerprint
from kdlib.repro import files
from kdlib.repro.run import Run
from kdlib.study.objectives import needs_teacher
from kdlib.study.training import Training
from kdlib.trainer.distributed import gathered
from kdlib.trainer.optimiser import Ema, Patience, learning_rate
from kdlib.trainer.state import read_state, write_state
from kdlib.trainer.step import Learner, Step, Task, TrainingError
from kdlib.trainer.tracking import Tracker

STATE_EVERY_S = 20.0  # at most this much work is lost by a kill


CHUNK = 5000  # images of a clean pass that are in memory at once; a multiple of its batch


@dataclass(frozen=True)
class Trained:
    """What a finished loop leaves.

    Attributes:
        metrics: One row per evaluation.
        checkpoints: Step -> (file name, weights fingerprint); the last step is always there.
        best_step: Step of the highest validation accuracy, the first one when several tie.
        last_step: Steps taken: those of the plan, or fewer with early stopping.
        visits: (n_examples of the split,) int64, how often each example id was trained on.
        evidence: Facts for the tripwires: initialisation, order, gradient, pairing.
    """

    metrics: pd.DataFrame
    checkpoints: dict[int, tuple[str, str]]
    best_step: int
    last_step: int
    visits: np.ndarray
    evidence: dict[str, Any]


def checkpoint_steps(training: Training, n_steps: int) -> set[int]:
    """Steps whose weights are kept for probing: the chosen fractions of the budget and its end."""
    return {round(f * n_steps) for f in training.checkpoint_fractions} | {n_steps}


def _order_sha256(order: np.ndarray) -> str | None:
    """Of the first pass; None where nothing is drawn, so that all seeds have the same."""
    drawn = not np.array_equal(order, np.sort(order))
    return files.sha256_array(order) if drawn else None


def train(
    run: Run,
    task: Task,
    describe: str | None = "training",
    tracker: Tracker | None = None,
    state_every_s: float | None = None,
) -> Trained:
    """Train to the end of the budget, from the beginning or from where a killed run stopped.

    Weights at the checkpoint steps, at the best and at the last step are written into the run's
    folder; the caller finishes the run. Of several processes the first one writes.

    Args:
        describe: Beside the progress bar; None shows none.
        state_every_s: Seconds between resumable states; None: `STATE_EVERY_S`.

    Raises: TrainingError for a loss that is not finite, memory that runs out, or a network that
        cannot be compiled here; StateError for a state of other settings.
    """
    with _explaining():
        try:
            return _train(run, task, describe, tracker, state_every_s)
        finally:
            task.loader.close()


def _train(
    run: Run,
    task: Task,
    describe: str | None,
    tracker: Tracker | None,
    state_every_s: float | None,
) -> Trained:
    plan, training = task.loader.plan, task.training
    every = training.evaluate_every_steps or max(1, round(task.full_size / training.batch_size))
    kept = checkpoint_steps(training, plan.n_steps)
    loop = _Loop(run, task)
    quiet = {} if task.ranks.first and describe is not None else {"disable": True}
    interval = STATE_EVERY_S if state_every_s is None else state_every_s
    progress = tqdm(
        total=plan.n_steps, initial=loop.step, desc=describe, unit="step", leave=False, **quiet
    )
    task.network.train()
    saved = time.monotonic()
    with progress:
        while True:
            if loop.step in kept or loop.stopped:
                loop.keep(loop.kept_weights(), loop.step)
            if loop.step == plan.n_steps or loop.stopped:
                break
            loop.advance()
            if loop.step % every == 0 or loop.step == plan.n_steps:
                row = loop.measure()
                if tracker is not None:
                    tracker.log({k: v for k, v in row.items() if k != "step"}, loop.step)
                progress.set_postfix_str(
                    f"loss {row['train_loss']:.3f}, validation {row['validation_accuracy']:.1%}"
                )
            progress.update(1)
            if time.monotonic() - saved >= interval:
                loop.save()
                saved = time.monotonic()
    return loop.close()


@contextlib.contextmanager
def _explaining() -> Iterator[None]:
    """What is to be done about an error of the machine, in its place."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if (sentence := _explained(error)) is None:
            raise
        raise TrainingError(sentence) from None


def _explained(error: Exception) -> str | None:
    """What to do about an error of the machine; None for any other."""
    first = str(error).splitlines()[0] if str(error) else type(error).__name__
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
    # of the CPU's allocator; of the CUDA runtime, as for pinned memory; of cuBLAS and cuDNN
    signs = ("can't allocate memory", "CUDA error: out of memory", "_STATUS_ALLOC_FAILED")
    if memory or any(sign in first for sign in signs):
        return f"out of memory: lower training.batch_size, or raise training.accumulate ({first})"
    if type(error).__name__ in ("BackendCompilerFailed", "InductorError"):
        return (
            "torch.compile failed; on a CPU it needs a C++ compiler (g++), on a GPU a C compiler "
            f"and Python's headers: install them, or set compute.compile: false ({first})"
        )
    return None


class _Loop:
    """Everything of a run that changes from step to step, and how it is kept."""

    def __init__(self, run: Run, task: Task) -> None:
        """A fresh loop, or the one a killed run saved."""
        self.run, self.task = run, task
        self.advance_one = Step(task)
        self.step, self.stopped = 0, False
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last row
        self.hits, self.best_step, self.best_accuracy = 0, -1, -1.0
        self.best_weights: dict[str, Tensor] = {}
        self.checkpoints: dict[int, tuple[str, str]] = {}
        self.visits = torch.zeros(task.n_examples, dtype=torch.int64)
        self.factor = 1.0  # on the learning rate: what `plateau` has left of it
        self.plateau = Patience(task.training.patience)
        self.patience = Patience(task.training.early_stopping or 0)
        self.ema = Ema(task.network, task.training.ema) if task.training.ema else None
        # a second network to measure the mean of weights with
        self._measured = copy.deepcopy(task.network) if self.ema else task.network
        self.evidence = {
            "initial_weights_sha256": weights_fingerprint(task.network),
            "order_sha256": _order_sha256(task.loader.plan.order(0)),
        }
        self._restore()

    def advance(self) -> None:
        """One step, its dynamics, its bookkeeping."""
        task = self.task
        batch = task.loader.batch(self.step)
        loss, logits, _ = self.advance_one(batch, self.step, self.factor)
        if self.step == 0:
            self.evidence["gradient"] = self._gradient()
        if self.ema is not None:
            self.ema.update(task.network)
        ids, labels, passes, positions = (
            batch.example_ids, batch.labels, batch.passes, batch.positions,
        )  # fmt: skip
        if not task.ranks.alone:
            ids, labels, passes, positions = (
                gathered(v, task.ranks) for v in (ids, labels, passes, positions)
            )
        self.losses.append(loss)
        self.hits += int((logits.argmax(1) == labels).sum())
        ids = ids.cpu()
        self.visits.index_add_(0, ids, torch.ones_like(ids))
        if task.log is not None:
            self._record(passes, positions, logits, labels)
        self.step += 1

    def _gradient(self) -> dict[str, float]:
        trained = [p for p in self.advance_one.learner.parameters() if p.requires_grad]
        norms = [float(p.grad.norm()) if p.grad is not None else 0.0 for p in trained]
        return {
            "norm": math.hypot(*norms),
            "tensors": len(norms),
            "tensors_without": sum(n == 0.0 for n in norms),
        }

    def _record(self, passes: Tensor, positions: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Write the dynamics of complete passes; the last, partial pass is no recorded epoch."""
        task, batch_size = self.task, self.task.training.batch_size
        if not task.ranks.first:
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
        """The weights that are measured and kept: the network's, or their running mean."""
        return self.task.network.state_dict() if self.ema is None else self.ema.weights

    def measure(self) -> dict[str, float]:
        """Add one row of metrics, remember the weights when they are the best so far, and look
        whether the learning rate falls or the training ends."""
        task, training = self.task, self.task.training
        if self.ema is not None:
            self._measured.load_state_dict(self.ema.weights)
        loss, hits = evaluate(self._measured, task.pixels, *task.validation)
        rate = learning_rate(training, self.step - 1, task.loader.plan.n_steps)
        row = {
            "step": self.step,
            "epoch": self.step * training.batch_size / task.full_size,
            "learning_rate": rate * self.factor,
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "train_accuracy": self.hits / (len(self.losses) * training.batch_size),
            "validation_loss": loss,
            "validation_accuracy": hits,
        }
        self.rows.append(row)
        self.losses, self.hits = [], 0
        if hits > self.best_accuracy:
            self.best_accuracy, self.best_step = hits, self.step
            kept = self.kept_weights()
            self.best_weights = {k: v.detach().cpu().clone() for k, v in kept.items()}
        if training.schedule == "plateau" and self.plateau.spent(loss):
            self.factor *= training.decay
        if training.early_stopping is not None and self.patience.spent(loss):
            self.stopped = True
        return row

    def keep(self, weights: dict[str, Tensor], step: int) -> None:
        """Write a checkpoint's weights."""
        name = f"weights-{step:08d}.safetensors"
        sha256 = weights_fingerprint(weights)
        if self.task.ranks.first:
            save_weights(weights, self.run.folder / name, {"step": str(step)})
        self.checkpoints[step] = (name, sha256)

    _NUMBERS = (
        "step", "stopped", "rows", "losses", "hits", "best_step", "best_accuracy", "evidence",
        "factor",
    )  # fmt: skip

    def save(self) -> None:
        """Write the resumable state."""
        if not self.task.ranks.first:
            return
        step = self.advance_one
        tensors = {f"learner.{k}": v for k, v in step.learner.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()} | {"visits": self.visits}
        for number, slots in step.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": v for k, v in slots.items() if v is not None}
        numbers = {key: getattr(self, key) for key in self._NUMBERS} | {
            "checkpoints": list(self.checkpoints.items()),
            "plateau": self.plateau.numbers(),
            "patience": self.patience.numbers(),
        }
        if self.ema is not None:
            tensors |= {f"ema.{k}": v for k, v in self.ema.weights.items()}
            numbers["ema_updates"] = self.ema.n_updates
        if self.task.log is not None:
            self.task.log.flush()
        write_state(self.run.state, self.run.settings, tensors, numbers)

    def _restore(self) -> None:
        found = read_state(self.run.state, self.run.settings)
        if found is None:
            return
        tensors, numbers = found
        for key in self._NUMBERS:
            setattr(self, key, numbers[key])
        self.checkpoints = {step: tuple(kept) for step, kept in numbers["checkpoints"]}
        self.plateau.load(numbers["plateau"])
        self.patience.load(numbers["patience"])
        self.visits = tensors.pop("visits")
        parts: dict[str, dict] = {"learner": {}, "best": {}, "optimiser": {}, "ema": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.best_weights = parts["best"]
        step = self.advance_one
        step.learner.load_state_dict(parts["learner"])
        if self.ema is not None:
            self.ema.load(parts["ema"], numbers["ema_updates"])
        groups = step.optimiser.state_dict()["param_groups"]
        trained = [p for group in step.optimiser.param_groups for p in group["params"]]
        slots: dict[int, dict] = {}
        for name, tensor in parts["optimiser"].items():
            number, _, key = name.partition(".")
            parameter = trained[int(number)]
            if tensor.shape == parameter.shape:
                # fused optimisers pair a weight and its momentum by their place in memory: the
                # saved one is contiguous, the weight may have its channels last
                tensor = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
            slots.setdefault(int(number), {})[key] = tensor
        step.optimiser.load_state_dict({"state": slots, "param_groups": groups})

    def close(self) -> Trained:
        """Write metrics and the best weights; gather what the tripwires need."""
        if self.best_step not in self.checkpoints:
            self.keep(self.best_weights, self.best_step)
        metrics = pd.DataFrame(self.rows)
        if self.task.ranks.first:
            path = self.run.folder / "metrics.parquet"
            files.write_atomic(path, lambda f: metrics.to_parquet(f))
        self.evidence["pairing"] = pairing(self.task, self.advance_one.learner)
        self.evidence["stopped_early"] = self.stopped
        return Trained(
            metrics,
            self.checkpoints,
            self.best_step,
            self.step,
            self.visits.numpy(),
            self.evidence,
        )


@torch.no_grad()
def pairing(task: Task, learner: Learner, n: int = 512) -> dict[str, float] | None:
    """The objective's teacher term on `n` evenly spaced training examples, teacher rows in place
    and swapped.

    Swapped means that each example gets the row of an example of another class, as far as no class
    has more than half of them.

    Returns: {"paired", "permuted"}: the terms; "teacher_accuracy": of the logits of all training
        examples as this loader hands them out, against its labels, None when it reads no logits.
        None without a teacher.
    """
    loader = task.loader
    if not needs_teacher(task.objective):
        return None
    every = np.arange(len(loader.plan.example_ids))
    chosen = every[np.linspace(0, len(every) - 1, min(n, len(every))).astype(np.int64)]
    teacher = loader.teacher_rows(chosen, np.zeros_like(chosen))
    by_class = loader.labels[chosen].argsort(stable=True)
    shift = int(loader.labels[chosen].bincount().max())
    swapped = {k: v.clone() for k, v in teacher.items()}
    for key, rows in teacher.items():
        swapped[key][by_class] = rows[by_class.roll(shift)]
    modes = [(module, module.training) for module in learner.modules()]
    learner.eval()
    images = task.pixels.prepare(loader.raw(chosen))
    parts = [learner(some) for some in images.split(128)]
    # exact sums tell a loss that hears nothing; code of others may be written for float32 alone
    exact = torch.float32 if task.objective.kind == "own" else torch.float64
    projected = {k: torch.cat([p[k] for p in parts]).to(exact) for k in parts[0]}
    for module, training in modes:
        module.training = training
    labels = loader.labels[chosen]
    terms = [
        float(
            task.distiller.soft_term(projected, {k: v.to(exact) for k, v in rows.items()}, labels)
        )
        for rows in (teacher, swapped)
    ]
    found = {"paired": terms[0], "permuted": terms[1], "teacher_accuracy": None}
    if "logits" in teacher:
        chunks = np.split(every, every[CHUNK::CHUNK])
        read = [loader.teacher_rows(r, np.zeros_like(r))["logits"] for r in chunks]
        found["teacher_accuracy"] = accuracy(torch.cat(read), loader.labels)
    return found
