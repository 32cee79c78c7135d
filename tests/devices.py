"""What tests that run on every device share: where they run, a few images, a teacher, a training.

Run as a module by torchrun, it is one process of a training (`python -m devices FOLDER DEVICE`).
"""

import copy
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kdlib.cache.build import build_images
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.models.networks import build_network
from kdlib.models.outputs import store_outputs
from kdlib.repro.run import Run
from kdlib.repro.seeds import derive
from kdlib.steps.processes import prepare_device
from kdlib.study import objectives
from kdlib.study.models import Model
from kdlib.study.objectives import Objective
from kdlib.study.training import Augment, ColourJitter, Compute, Training
from kdlib.trainer.distributed import World, joined, wait
from kdlib.trainer.loop import Trained, train
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns
from kdlib.trainer.step import Step, Task

GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here"),
]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]

N, CLASSES, SHAPE, SHARD = 120, 4, (3, 8, 8), 32
PIXELS = Pixels([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
KEPT = ("logits", "features", "stage1", "stage2", "attention1", "attention2")  # of the teacher
AUGMENT = Augment(flip=True, crop_padding=1, colour_jitter=ColourJitter(brightness=0.2, hue=0.1))
TRAINING = Training(
    steps=20, batch_size=16, lr_peak=0.05, warmup_steps=3, augment=AUGMENT, evaluate_every_steps=5
)
PLAIN = objectives.CrossEntropy()
KD = objectives.KD(alpha=0.5, temperature=2.0)


class Killed(BaseException):
    """Stands for a kill: kdlib handles no such exception."""


def make_images(folder: Path) -> Cache:
    """120 images in 4 shards; the classes differ in brightness."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, N)
    pixels = rng.integers(0, 100, (N, *SHAPE)) + 50 * labels[:, None, None, None]
    source = array_source("noise", "train", pixels.astype(np.uint8), labels, "abcd")
    return build_images(source, folder, SHARD)


def network(width: int = 4, seed: int = 0, pixels: Pixels = PIXELS) -> Network:
    """A small network with two stages and BatchNorm, on the CPU."""
    model = Model(name="tiny_cnn", options={"width": width})
    made = build_network(model, n_classes=CLASSES, image_shape=SHAPE, seed=seed)
    return made.to(memory_format=pixels.memory_format)


def make_teacher(images: Cache, folder: Path, **how: Any) -> Cache:
    """Outputs of a wider network, stored from the CPU."""
    return store_outputs(network(width=6, seed=9), PIXELS, images, folder, wanted=KEPT, **how)


def task(
    images: Cache,
    teacher: Cache | None = None,
    *,
    device: str = "cpu",
    objective: Objective = PLAIN,
    training: Training = TRAINING,
    student: Network | None = None,
    pixels: Pixels = PIXELS,
    together: World | None = None,
    n: int = 80,
    **more: Any,
) -> Task:
    """Train a student on the first `n` images, the others being held out.

    Args:
        together: Of the processes that share each batch; None: this one alone.
        more: Fields of `Task`.
    """
    together = together or World(device=device)
    student = student or network(pixels=pixels)
    reads = teacher_columns(objective, 2)
    second = None
    if objective.compares_views:
        second = View(training.augment, derive(0, "second_view"), pixels)
    shapes = {k: tuple(teacher.layout(k)[1][1:]) for k in reads} if reads else {}
    wanted = student_outputs(objective, student.n_stages)
    distiller = build_distiller(
        objective, student.output_shapes(SHAPE, wanted), shapes, seed=0, n_examples=n
    )
    held_out = np.arange(n, N)
    validation = (
        torch.from_numpy(images.read(c, held_out)).to(device) for c in ("images", "labels")
    )
    return Task(
        network=student.to(device),
        distiller=distiller.to(device),
        pixels=pixels,
        loader=Loader(
            Plan(np.arange(n), training.batch_size, training.n_steps(n), 0),
            images,
            view=View(training.augment, derive(0, "augment"), pixels),
            teacher=teacher if reads else None,
            reads=reads,
            second=second,
            device=device,
            reuse=together.alone,
            rank=together.rank,
            world_size=together.size,
        ),
        objective=objective,
        training=training,
        validation=tuple(validation),
        full_size=n,
        n_examples=N,
        seed=0,
        world=together,
        **more,
    )


def run_in(folder: Path) -> Run:
    """A run without a study."""
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, {"some": "settings"})


def last_weights(folder: Path, trained: Trained) -> dict[str, Tensor]:
    """The weights that a training ended with."""
    return load_file(folder / trained.checkpoints[trained.last_step][0])


def kept_bytes(folder: Path) -> dict[str, bytes]:
    """What a run has written, but for its resumable states."""
    files = [p for p in folder.rglob("*") if p.is_file() and "state." not in p.name]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def killed_after(patch: pytest.MonkeyPatch, n: int) -> None:
    """Let `n` more training steps happen; the next one is a kill."""
    real, left = Step.__call__, [n]

    def step(*arguments):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return real(*arguments)

    patch.setattr(Step, "__call__", step)


def exact(model: Network, images: Tensor, wanted: Sequence[str]) -> dict[str, np.ndarray]:
    """Outputs of uint8 images in float64 on the CPU, the true values up to 1e-15."""
    with torch.no_grad():
        plain = copy.deepcopy(model).cpu().double().eval()
        found = plain.outputs(PIXELS.prepare(images.cpu()).double(), wanted)
    return {name: value.numpy() for name, value in found.items()}


class Together(World):
    """Processes that talk to each other even where there is one of them."""

    alone = False


def share(folder: Path, device: str) -> None:
    """Be one of the processes of a training in `folder`, where images and outputs are."""
    with joined(device, single=True) as world:
        together = Together(world.rank, world.size, world.device)
        prepare_device(Compute(device=device))
        images = Cache(folder / "images")
        teacher = Cache(folder / "teacher")
        made = task(images, teacher, device=world.device, objective=KD, together=together)
        trained = train(run_in(folder / "together"), made)
        wait(together)
        if world.first:
            (folder / "last").write_text(trained.checkpoints[trained.last_step][0])
            backend = torch.distributed.get_backend()
            (folder / "backend").write_text(f"{backend} {world.size}")


if __name__ == "__main__":
    os.environ.setdefault("TQDM_DISABLE", "1")
    share(Path(sys.argv[1]), sys.argv[2])
