"""The one training step and the one loop, for teachers and students alike, resumable to the bit.

What differs between runs is the objective and the settings, never the code path. No generator has
a state here: order, augmentation and dropout are functions of (seed, step), so that a run killed at
any moment and started again ends with the same bytes. Leaves to others: what is trained on what
(`steps`), and whether the numbers may be believed (`checks`).
"""

import contextlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm.auto import tqdm

from kdlib import files
from kdlib.augment import Pixels
from kdlib.dynamics import DynamicsLog
from kdlib.evaluation import accuracy, all_outputs, evaluate
from kdlib.loading import Batch, Loader
from kdlib.losses import objective_loss, soft_loss
from kdlib.models import Network
from kdlib.params import Objective, Training
from kdlib.runs import Run
from kdlib.seeds import torch_seeded
from kdlib.weights import save_weights, weights_fingerprint

STATE_EVERY_S = 20.0  # at most this much work is lost by a kill
CHUNK = 5000  # images of a clean pass that are in memory at once; a multiple of its batch


class TrainingError(RuntimeError):
    """Training that cannot go on; the last saved state is whole and the run is not finished."""


@dataclass(frozen=True)
class Task:
    """What one run trains on what.

    Attributes:
        validation: (images (N, C, H, W) uint8, labels (N,) int64) for the curves and the best
            epoch.
        full_size: Images that may be trained on in all: one `epoch` of the curves.
        n_examples: Examples of the whole split; ids are below it.
        seed: The run's requested seed, from which every stream is derived.
        log: Where training dynamics are recorded, or None.
        observed: `train` records each batch as it is trained on, `eval` a clean pass after each
            pass.
    """

    network: Network
    pixels: Pixels
    loader: Loader
    objective: Objective
    training: Training
    validation: tuple[torch.Tensor, torch.Tensor]
    full_size: int
    n_examples: int
    seed: int
    log: DynamicsLog | None = None
    observed: str = "train"


@dataclass(frozen=True)
class Trained:
    """What a finished loop leaves.

    Attributes:
        metrics: One row per evaluation.
        checkpoints: Step -> (file name, weights fingerprint); the last step is always there.
        best_step: Step of the highest validation accuracy, the first one when several tie.
        visits: (n_examples of the split,) int64, how often each example id was trained on.
        evidence: Facts for the tripwires: initialisation, order, gradient, pairing.
    """

    metrics: pd.DataFrame
    checkpoints: dict[int, tuple[str, str]]
    best_step: int
    visits: np.ndarray
    evidence: dict[str, Any]


def learning_rate(training: Training, step: int, n_steps: int) -> float:
    """Learning rate of step `step` in [0, n_steps): linear warm-up, then constant or cosine."""
    if step < training.warmup_steps:
        return training.lr_peak * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.lr_peak
    done = (step - training.warmup_steps) / max(1, n_steps - training.warmup_steps)
    return training.lr_peak * 0.5 * (1 + math.cos(math.pi * done))


def checkpoint_steps(training: Training, n_steps: int) -> set[int]:
    """Steps whose weights are kept for probing: the chosen fractions of the budget and its end."""
    return {round(f * n_steps) for f in training.checkpoint_fractions} | {n_steps}


def make_optimiser(network: Network, training: Training) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW; biases and normalisation weights are not decayed."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if training.optimiser == "adamw":
        return torch.optim.AdamW(groups, lr=training.lr_peak, foreach=True)
    momentum = training.momentum
    return torch.optim.SGD(
        groups, lr=training.lr_peak, momentum=momentum, nesterov=momentum > 0, foreach=True
    )


def training_step(
    task: Task, optimiser: torch.optim.Optimizer, batch: Batch, step: int
) -> tuple[float, torch.Tensor]:
    """One optimiser step on one batch.

    Returns: (loss in nats, detached logits (B, C) from before the step).
    Raises: TrainingError when the loss is not finite; the weights are then still those before it.
    """
    with _dropout_seed(task, step):
        logits = task.network(batch.images)
    loss = objective_loss(task.objective, logits, batch.labels, batch.teacher_logits)
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss is {value} at step {step}; lower training.lr_peak, or look at the batch of "
            f"example ids {batch.example_ids[:4].tolist()}, ..."
        )
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimiser.param_groups:
        group["lr"] = learning_rate(task.training, step, task.loader.plan.n_steps)
    optimiser.step()
    return value, logits.detach()


def _dropout_seed(task: Task, step: int) -> contextlib.AbstractContextManager:
    """The global generator under this step's own seed, when some layer draws from it."""
    drops = any("Drop" in type(m).__name__ for m in task.network.modules())
    return torch_seeded(task.seed, "dropout", step) if drops else contextlib.nullcontext()


def train(run: Run, task: Task, describe: str = "training") -> Trained:
    """Train to the end of the budget, from the beginning or from where a killed run stopped.

    Weights at the checkpoint steps, at the best and at the last step are written into the run's
    folder; the caller finishes the run.

    Raises: TrainingError for a loss that is not finite or memory that runs out.
    """
    plan, network, training = task.loader.plan, task.network, task.training
    every = training.evaluate_every_steps or max(1, round(task.full_size / training.batch_size))
    kept = checkpoint_steps(training, plan.n_steps)
    optimiser = make_optimiser(network, training)
    loop = _Loop.start(run, task, optimiser)
    progress = tqdm(total=plan.n_steps, initial=loop.step, desc=describe, unit="step", leave=False)
    network.train()
    saved = time.monotonic()
    try:
        while True:
            if loop.step in kept:
                loop.keep(run, network, loop.step)
            if loop.step == plan.n_steps:
                break
            loop.advance(task, optimiser)
            if loop.step % every == 0 or loop.step == plan.n_steps:
                row = loop.measure(task)
                progress.set_postfix_str(
                    f"loss {row['train_loss']:.3f}, validation {row['validation_accuracy']:.1%}"
                )
            progress.update(1)
            if time.monotonic() - saved >= STATE_EVERY_S:
                loop.save(run, task, optimiser)
                saved = time.monotonic()
    except torch.OutOfMemoryError as error:
        raise TrainingError(f"out of memory: lower training.batch_size ({error})") from None
    finally:
        progress.close()
        task.loader.close()
    return loop.close(run, task)


class _Loop:
    """Everything of a run that changes from step to step besides network, optimiser and log."""

    def __init__(self, run: Run, task: Task) -> None:
        self.step = 0
        self.rows: list[dict[str, float]] = []
        self.losses: list[float] = []  # since the last row
        self.hits, self.best_step, self.best_accuracy = 0, -1, -1.0
        self.best_weights: dict[str, torch.Tensor] = {}
        self.checkpoints: dict[int, tuple[str, str]] = {}
        self.visits = torch.zeros(task.n_examples, dtype=torch.int64)
        self.evidence = {
            "initial_weights_sha256": weights_fingerprint(task.network),
            "order_sha256": files.sha256_array(task.loader.plan.order(0)),
            "settings_sha256": run.settings_sha256,
        }

    @classmethod
    def start(cls, run: Run, task: Task, optimiser: torch.optim.Optimizer) -> "_Loop":
        """A fresh loop, or the one a killed run saved, with weights and optimiser put back."""
        loop, path = cls(run, task), run.folder / "state.safetensors"
        if path.exists():
            loop._restore(path, task, optimiser)
        return loop

    def advance(self, task: Task, optimiser: torch.optim.Optimizer) -> None:
        """One step, its dynamics, its bookkeeping."""
        batch = task.loader.batch(self.step)
        loss, logits = training_step(task, optimiser, batch, self.step)
        if self.step == 0:
            norms = [float(p.grad.norm()) if p.grad is not None else 0.0 for p in _trained(task)]
            self.evidence["gradient"] = {
                "norm": math.hypot(*norms),
                "tensors": len(norms),
                "tensors_without": sum(n == 0.0 for n in norms),
            }
        self.losses.append(loss)
        self.hits += int((logits.argmax(1) == batch.labels).sum())
        ids = batch.example_ids.cpu()
        self.visits.index_add_(0, ids, torch.ones_like(ids))
        self._record(task, batch, logits)
        self.step += 1

    def _record(self, task: Task, batch: Batch, logits: torch.Tensor) -> None:
        """Write the dynamics of complete passes; the last, partial pass is no recorded epoch."""
        if task.log is None:
            return
        n_passes = task.loader.plan.n_passes
        if task.observed == "train":
            whole = batch.passes < n_passes
            task.log.record(
                batch.passes[whole], batch.ranks[whole], logits[whole], batch.labels[whole]
            )
            return
        n = len(task.loader.plan.example_ids)
        before = self.step * task.training.batch_size // n
        for number in range(before, (self.step + 1) * task.training.batch_size // n):
            for start in range(0, n, CHUNK):
                ranks = torch.arange(start, min(start + CHUNK, n))
                images = task.loader.raw(ranks.numpy())
                _, clean = all_outputs(task.network, task.pixels, images)
                passes = torch.full((len(ranks),), number)
                task.log.record(passes, ranks, clean, task.loader.labels[ranks])

    def measure(self, task: Task) -> dict[str, float]:
        """Add one row of metrics, and remember the weights when they are the best so far."""
        loss, hits = evaluate(task.network, task.pixels, *task.validation)
        n_samples = len(self.losses) * task.training.batch_size
        row = {
            "step": self.step,
            "epoch": self.step * task.training.batch_size / task.full_size,
            "learning_rate": learning_rate(task.training, self.step - 1, task.loader.plan.n_steps),
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "train_accuracy": self.hits / n_samples,
            "validation_loss": loss,
            "validation_accuracy": hits,
        }
        self.rows.append(row)
        self.losses, self.hits = [], 0
        if hits > self.best_accuracy:
            self.best_accuracy, self.best_step = hits, self.step
            state = task.network.state_dict()
            self.best_weights = {k: v.detach().cpu().clone() for k, v in state.items()}
        return row

    def keep(self, run: Run, weights: Network | dict[str, torch.Tensor], step: int) -> None:
        """Write a checkpoint's weights."""
        name = f"weights-{step:08d}.safetensors"
        sha256 = save_weights(weights, run.folder / name, {"step": str(step)})
        self.checkpoints[step] = (name, sha256)

    def save(self, run: Run, task: Task, optimiser: torch.optim.Optimizer) -> None:
        """Write the resumable state: one file of plain tensors, its numbers as JSON."""
        tensors = {f"network.{k}": v for k, v in task.network.state_dict().items()}
        tensors |= {f"best.{k}": v for k, v in self.best_weights.items()} | {"visits": self.visits}
        for number, slots in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{k}": v for k, v in slots.items() if v is not None}
        numbers = {
            key: getattr(self, key)
            for key in ("step", "rows", "losses", "hits", "best_step", "best_accuracy", "evidence")
        } | {"checkpoints": list(self.checkpoints.items())}
        if task.log is not None:
            task.log.flush()
        plain = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
        data = save(plain, {"state": json.dumps(numbers)})
        files.write_atomic(run.folder / "state.safetensors", lambda file: file.write(data))

    def _restore(self, path: Path, task: Task, optimiser: torch.optim.Optimizer) -> None:
        try:
            with safe_open(path, "pt") as file:
                numbers = json.loads(file.metadata()["state"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise TrainingError(
                f"{path} is not a training state of ours ({error}); delete it to train from step 0"
            ) from error
        if numbers["evidence"]["settings_sha256"] != self.evidence["settings_sha256"]:
            raise TrainingError(f"{path} belongs to other settings; delete it to train from step 0")
        for key, value in numbers.items():
            setattr(self, key, value)
        self.checkpoints = {step: tuple(kept) for step, kept in numbers["checkpoints"]}
        self.visits = tensors.pop("visits")
        parts: dict[str, dict] = {"network": {}, "best": {}, "optimiser": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.best_weights = parts["best"]
        task.network.load_state_dict(parts["network"])
        slots: dict[int, dict] = {}
        for name, tensor in parts["optimiser"].items():
            number, _, key = name.partition(".")
            slots.setdefault(int(number), {})[key] = tensor
        groups = optimiser.state_dict()["param_groups"]
        optimiser.load_state_dict({"state": slots, "param_groups": groups})

    def close(self, run: Run, task: Task) -> Trained:
        """Write metrics and the best weights; gather what the tripwires need."""
        if self.best_step not in self.checkpoints:
            self.keep(run, self.best_weights, self.best_step)
        metrics = pd.DataFrame(self.rows)
        files.write_atomic(run.folder / "metrics.parquet", lambda f: metrics.to_parquet(f))
        self.evidence["pairing"] = pairing(task)
        return Trained(
            metrics, self.checkpoints, self.best_step, self.visits.numpy(), self.evidence
        )


def _trained(task: Task) -> list[torch.nn.Parameter]:
    return [p for p in task.network.parameters() if p.requires_grad]


def pairing(task: Task, n: int = 512) -> dict[str, float] | None:
    """Soft loss of `n` evenly spaced training examples, teacher rows in place and swapped.

    Swapped means that each example gets the row of an example of another class.

    Returns: {"paired", "permuted"}: mean soft losses in nats; "teacher_accuracy": of the rows of
        all training examples as this loader hands them out, against its labels. None without a
        teacher.
    """
    loader = task.loader
    if not loader.has_teacher:
        return None
    ranks = np.arange(len(loader.plan.example_ids))
    chosen = ranks[np.linspace(0, len(ranks) - 1, min(n, len(ranks))).astype(np.int64)]
    _, logits = all_outputs(task.network, task.pixels, loader.raw(chosen))
    teacher = loader.teacher_logits(chosen, np.zeros_like(chosen)).double()
    by_class = loader.labels[chosen].argsort(stable=True)
    swapped = teacher.clone()
    swapped[by_class] = teacher[by_class.roll(int(loader.labels[chosen].bincount().max()))]
    temperature = task.objective.temperature or 1.0
    rows = [
        loader.teacher_logits(r, np.zeros_like(r)) for r in np.split(ranks, ranks[CHUNK::CHUNK])
    ]
    return {
        "paired": float(soft_loss(logits.double(), teacher, temperature)),
        "permuted": float(soft_loss(logits.double(), swapped, temperature)),
        "teacher_accuracy": accuracy(torch.cat(rows), loader.labels),
    }
