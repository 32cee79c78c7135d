"""One optimiser step: forward, loss and backward of one batch."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdlib.dataset.batch import Batch
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network, in_precision
from kdlib.models.evaluation import Evaluation, evaluate
from kdlib.repro.seeds import torch_seeded
from kdlib.study.objectives import Objective
from kdlib.study.training import Compute, Training
from kdlib.trainer.distiller import Distiller
from kdlib.trainer.distributed import World, distributed, gathered, synchronised
from kdlib.trainer.held_out import HeldOut
from kdlib.trainer.objectives import student_outputs
from kdlib.trainer.optimiser import learning_rate, make_optimiser


class Recorder(Protocol):
    """Records training dynamics, as `kdlib.cartography.DynamicsLog` does."""

    def record(self, epochs: Tensor, positions: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Record the logits (B, C) of some examples at their positions among the run's ids."""

    def flush(self) -> None:
        """Write what was recorded to the disk."""


class TrainingError(RuntimeError):
    """A training that cannot continue. The run is not finished; its last saved state is whole."""


@dataclass(frozen=True)
class Task:
    """A network, its loss, its batches, and how it is trained.

    Attributes:
        distiller: The objective's loss, with the projectors it trains beside the network.
        validation: (images (N, C, H, W) uint8, labels (N,) int64) for the curves and the best
            epoch; of images without labels with their teacher outputs.
        full_size: Number of training images before any selection: one `epoch` of the curves.
        n_examples: Examples of the whole split; every example id is below it.
        seed: The run's seed, from which every random stream is derived.
        log: Where training dynamics are recorded, or None.
        observed: `train` records each batch as it is trained on, `eval` a clean pass after each
            pass.
        compute: Precision, compilation.
        world: The processes that share each batch, as the loader knows them.
    """

    network: Network
    distiller: Distiller
    pixels: Pixels
    loader: Loader
    objective: Objective
    training: Training
    validation: tuple[Tensor, Tensor] | HeldOut
    full_size: int
    n_examples: int
    seed: int
    log: Recorder | None = None
    observed: str = "train"
    compute: Compute = field(default_factory=Compute)
    world: World = field(default_factory=World)


class Learner(nn.Module):
    """A network and its objective's projectors as one module, from images to the inputs of the
    loss: one call to compile and to distribute."""

    def __init__(self, network: Network, distiller: Distiller, objective: Objective) -> None:
        super().__init__()
        self.network, self.distiller = network, distiller
        wanted = student_outputs(objective, network.n_stages, distiller.labelled)
        # gradients of the label loss stop at the features: labels train the last layer only
        self.apart = distiller.labels_train_head_only and distiller.labelled
        self.wanted = tuple(name for name in wanted if not (self.apart and name == "logits"))

    def _outputs(self, images: Tensor) -> dict[str, Tensor]:
        if self.wanted == ("logits",):
            return {"logits": self.network(images)}
        outputs = self.network.outputs(images, self.wanted)
        if self.apart:
            outputs["logits"] = self.network.head(outputs["features"].detach())
        return outputs

    def forward(self, images: Tensor, second: Tensor | None = None) -> dict[str, Tensor]:
        """Projected outputs by name, (B, ...), with those of a second view of the same examples."""
        outputs = self._outputs(images)
        others = None if second is None else self._outputs(second)
        return self.distiller.project(outputs, others)


def evaluated(task: Task, network: Network) -> Evaluation | None:
    """A network on the held-out images, without labels by the objective's loss; None where nothing
    is held out."""
    held_out = task.validation
    if isinstance(held_out, HeldOut):
        learner = Learner(network, task.distiller, task.objective)
        return held_out.evaluate(learner, task.distiller)
    return evaluate(network, task.pixels, *held_out) if len(held_out[1]) else None


class Step:
    """Takes optimiser steps, in the precision and on the processes of a task.

    Attributes:
        learner: The module whose parameters are trained, neither compiled nor distributed.
        optimiser: Over all its trained parameters.
        executed: Of the last step: `batch_size` over all processes, `accumulate`, `clip_norm`, and
            `precision`, the type in which its passes were computed.
        scaler: Of the loss, in float16. A step whose scaled gradient overflows changes no weight.
        overflowed: Whether the last one did.
        parts: Sums of `Distiller.parts` over the last `summed` steps: float64 scalars on the
            device, so that no step waits for them.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.executed: dict[str, Any] = {}
        self.parts: dict[str, Tensor | float] = {}
        self.summed = 0
        learner = synchronised(Learner(task.network, task.distiller, task.objective), task.world)
        _demand_statistics(learner, task.training)
        self.learner, self.optimiser = learner, make_optimiser(learner.parameters(), task.training)
        kind = next(task.network.parameters()).device.type
        self.scaler = torch.amp.GradScaler(kind, enabled=task.compute.precision == "fp16")
        self._call = distributed(learner, task.world)
        if task.compute.compile:
            self._call = torch.compile(self._call)
        self._drops = any(
            "Drop" in type(m).__name__ or getattr(m, "drop_rate", 0) for m in learner.modules()
        )

    def __call__(self, batch: Batch, step: int, factor: float = 1.0) -> tuple[float, Tensor]:
        """Take step `step` on one batch.

        Args:
            factor: Multiplies the schedule's learning rate.

        Returns: (loss in nats, detached logits (B, C) float32 from before the step), of the batch
            of all processes; C is 0 without labels.
        Raises: TrainingError when the loss is not finite; the weights are then unchanged.
        """
        task, training = self.task, self.task.training
        self.optimiser.zero_grad(set_to_none=True)
        n_pieces = training.accumulate
        total, parts = 0.0, []
        for number, piece in enumerate(_pieces(batch, n_pieces)):
            last = number == n_pieces - 1
            quiet = contextlib.nullcontext() if last or task.world.alone else self._call.no_sync()
            with quiet:
                loss, logits = self._loss(piece, step, number)
                value = loss.item() / n_pieces
                if not math.isfinite(value):
                    raise TrainingError(
                        f"the loss is {value} at step {step}; lower training.lr_peak, or look at "
                        f"the batch of example ids {piece.example_ids[:4].tolist()}, ..."
                    )
                # times the number of processes, by which DistributedDataParallel divides
                self.scaler.scale(loss * task.world.size / n_pieces).backward()
            total += value
            for name, part in task.distiller.parts.items():
                self.parts[name] = self.parts.get(name, 0.0) + part.double() / n_pieces
            parts.append(logits)
        self.scaler.unscale_(self.optimiser)
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.learner.parameters(), training.clip_norm)
        rate = learning_rate(training, step, task.loader.plan.n_steps) * factor
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.overflowed = self.scaler.get_scale() < scale
        self.executed = {
            "batch_size": sum(map(len, parts)),
            "accumulate": len(parts),
            "clip_norm": training.clip_norm,
            "precision": self._precision,
        }
        self.summed += 1
        # rows of pieces, each gathered over the processes, in the order of the gathered batch
        of_rank = zip(*(part.chunk(task.world.size) for part in parts), strict=True)
        return total, torch.cat([rows for ranks in of_rank for rows in ranks])

    def gradient(self, before: dict[str, float] | None) -> dict[str, float]:
        """Norm of the first step's gradient, number of trained tensors, and of those it missed.
        Where it missed some, those that the second step's misses count (`steps` is then 2): weights
        drawn as zeros, as in timm's ResNets, hold the first one back.

        Args:
            before: What this returned after the step before, to which the last one adds; None after
                the first step.
        """
        if before is not None and (not before["tensors_without"] or "steps" in before):
            return before
        trained = [p for p in self.learner.parameters() if p.requires_grad]
        norms = [float(p.grad.norm()) if p.grad is not None else 0.0 for p in trained]
        missed = sum(n == 0.0 for n in norms)
        if before is not None:
            return before | {"tensors_without": missed, "steps": 2}
        return {"norm": math.hypot(*norms), "tensors": len(norms), "tensors_without": missed}

    def take_means(self) -> dict[str, float]:
        """`train_loss_<name>` of each part of the loss, a mean over the steps since the last
        call."""
        means = {f"train_loss_{k}": float(v) / self.summed for k, v in self.parts.items()}
        self.parts, self.summed = {}, 0
        return means

    def _loss(self, batch: Batch, step: int, piece: int) -> tuple[Tensor, Tensor]:
        """(the loss of the whole batch, its detached logits)."""
        task, seeded = self.task, contextlib.nullcontext()
        if self._drops:
            seeded = torch_seeded(task.seed, "dropout", step, piece, task.world.rank)
        with seeded, in_precision(batch.images.device.type, task.compute.precision):
            self._precision = _precision(batch.images)
            seen = (batch.images,) if batch.second is None else (batch.images, batch.second)
            projected = self._call(*seen)
        projected, teacher = (
            {k: gathered(v, task.world) for k, v in outputs.items()}
            for outputs in (projected, batch.teacher or {})
        )
        labels = gathered(batch.labels, task.world)
        loss = task.distiller.loss(projected, labels, teacher)
        logits = projected.get("logits", labels.new_empty(len(labels), 0))
        return loss, logits.detach().float()


def _demand_statistics(learner: nn.Module, training: Training) -> None:
    """Refuse pieces of one image where BatchNorm normalises each piece by its own statistics.

    Raises: ValueError.
    """
    one = training.batch_size == training.accumulate
    if one and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in learner.modules()):
        raise ValueError(
            f"batch_size {training.batch_size} in {training.accumulate} pieces (accumulate) are "
            "pieces of one image, and this network's BatchNorm would learn nothing of the spread "
            "between images; expected pieces of two images or more: lower training.accumulate, "
            "raise training.batch_size, or take a network without BatchNorm"
        )


def _precision(images: Tensor) -> str:
    """The type in which a network computes on these images now."""
    kind = images.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else images.dtype
    return str(dtype).removeprefix("torch.")


def _pieces(batch: Batch, n: int) -> Iterator[Batch]:
    """Equal pieces of a batch, in order."""
    size = len(batch.labels) // n
    for start in range(0, size * n, size):
        rows = slice(start, start + size)
        cut = {k: v[rows] for k, v in batch._asdict().items() if isinstance(v, Tensor)}
        if batch.teacher is not None:
            cut["teacher"] = {k: v[rows] for k, v in batch.teacher.items()}
        yield batch._replace(**cut)
