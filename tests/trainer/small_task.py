"""A training of seconds: 90 images of 4 x 4 pixels, small networks, teacher logits from labels."""

import numpy as np
import torch
import torch.nn.functional as F
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
from kdlib.study.training import Training
from kdlib.trainer.objectives import build_distiller, student_outputs
from kdlib.trainer.step import Step, Task

N, CLASSES = 90, 3
PIXELS = Pixels([0.5], [0.25])
TRAINING = Training(epochs=4, batch_size=16, lr_peak=0.1, warmup_steps=3, evaluate_every_steps=5)


class Stopped(BaseException):
    """Raised in the place of a kill; kdlib catches no BaseException."""


class DropoutNet(Network):
    """Two linear layers with dropout between them."""

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


class DropRateNet(DropoutNet):
    """Dropout as in networks of timm: a number instead of a module."""

    def __init__(self):
        super().__init__()
        self.drop, self.drop_rate = nn.Identity(), 0.5

    def features(self, x):
        return F.dropout(super().features(x), self.drop_rate, self.training)


def small_images(folder):
    """90 images of 3 classes, which differ in brightness."""
    rng = np.random.default_rng(3)
    labels = np.arange(N, dtype=np.int64) % CLASSES
    pixels = (
        rng.integers(0, 120, (N, 1, 4, 4), dtype=np.uint8)
        + (labels * 60).astype(np.uint8)[:, None, None, None]
    )
    return build_shards(
        folder / "images",
        {"kind": "images"},
        {"images": ("|u1", (1, 4, 4)), "labels": ("<i8", ())},
        lambda span: {"images": pixels[slice(*span)], "labels": labels[slice(*span)]},
        n_examples=N,
        shard_size=40,
    )


KD = objectives.KD(alpha=0.5, temperature=2.0)


def small_task(
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


def new_log(folder, images, n_epochs=4, observed="train"):
    ids = np.arange(60)
    return DynamicsLog.create(
        folder, ids, images.read("labels", ids), n_epochs=n_epochs, n_classes=CLASSES,
        observed=observed, logits=True, provenance={"images": images.fingerprint},
    )  # fmt: skip


def run_in(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return Run(folder, {"some": "settings"})


def kept_bytes(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.lstrip(".").startswith("state.")
    }


def stop_after(monkeypatch, n):
    """Let `n` more training steps happen, then stop as abruptly as an exception can."""
    real, left = Step.__call__, [n]

    def step(*arguments):
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        return real(*arguments)

    monkeypatch.setattr(Step, "__call__", step)
