"""What the one loop costs: against a bare loop, with dynamics, with a teacher, and on this machine.

    python benchmarks/training.py --model cifar_resnet8 --threads 1
    python benchmarks/training.py --seeds        # paired seeds one after another, or as one

Random images of CIFAR-10's shape, batch 128. The rows take turns, in blocks of a few steps, so that
what else runs on the machine slows all of them; printed are medians over the rounds, and the median
of the ratio to the bare loop within each round.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from kdlib.cache.build import build_shards
from kdlib.cache.shards import Cache
from kdlib.cartography.log import DynamicsLog
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.models.networks import build_network
from kdlib.repro.run import Run
from kdlib.study import objectives
from kdlib.study.models import Model
from kdlib.study.objectives import CrossEntropy
from kdlib.study.training import Augment, Compute, Training
from kdlib.trainer.loop import _Loop
from kdlib.trainer.objectives import build_distiller
from kdlib.trainer.step import Task

N, SHAPE, CLASSES, BATCH = 10_240, (3, 32, 32), 10, 128
STEPS = 1_000_000  # of the plan: more than are ever taken
PLAIN, KD = CrossEntropy(), objectives.KD(alpha=0.7, temperature=4.0)


def caches(folder: Path, shape: tuple[int, int, int] = SHAPE, n: int = N) -> tuple[Cache, Cache]:
    """`n` random images of a (C, H, W) shape, and random outputs of a teacher of theirs."""
    rng = np.random.default_rng(0)
    images = build_shards(
        folder / "images",
        {"kind": "images", "split": "train"},
        {"images": ("|u1", shape), "labels": ("<i8", ())},
        lambda span: {
            "images": rng.integers(0, 256, (span[1] - span[0], *shape), np.uint8),
            "labels": rng.integers(0, CLASSES, span[1] - span[0]),
        },
        n_examples=n,
        shard_size=2048,
    )
    outputs = build_shards(
        folder / "outputs",
        {"view": "clean", "top_k": None, "n_classes": CLASSES},
        {"logits": ("<f2", (1, CLASSES))},
        lambda span: {"logits": rng.normal(size=(span[1] - span[0], 1, CLASSES)).astype("<f2")},
        n_examples=n,
        shard_size=2048,
    )
    return images, outputs


def network_of(
    name: str,
    channels_last: bool,
    shape: tuple[int, int, int] = SHAPE,
    device: str = "cpu",
) -> Network:
    """A network with random weights for images of a (C, H, W) shape, on the device."""
    network = build_network(Model(name=name), n_classes=CLASSES, image_shape=shape, seed=0)
    return network.to(
        device, memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def bare(images: Cache, name: str, channels_last: bool = True) -> Callable[[], None]:
    """The barest loop: float images prepared in advance, one gather, one step."""
    network = network_of(name, channels_last)
    pixels = Pixels([0.5] * 3, [0.25] * 3, channels_last).prepare(images.resident("images"))
    labels = images.resident("labels")
    optimiser = torch.optim.SGD(
        network.parameters(), lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
    )
    order = torch.from_numpy(np.random.default_rng(1).permutation(N)).split(BATCH)
    number = 0

    def step() -> None:
        nonlocal number
        chosen = order[number % len(order)]
        number += 1
        x = pixels[chosen]
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        loss = F.cross_entropy(network(x), labels[chosen])
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()

    return step


def ours(
    images: Cache,
    name: str,
    folder: Path,
    *,
    teacher: Cache | None = None,
    recorded: bool = False,
    channels_last: bool = True,
    augment: Augment | None = None,
    batch: int = BATCH,
    device: str = "cpu",
    **compute: str | bool,
) -> Callable[[], None]:
    """One step of the lab's loop, with its bookkeeping."""
    folder.mkdir(parents=True)
    n, (_, shape) = images.n_examples, images.layout("images")
    training = Training(
        steps=STEPS, batch_size=batch, lr_peak=1e-3, schedule="constant",
        augment=augment or Augment(),
    )  # fmt: skip
    pixels = Pixels([0.5] * 3, [0.25] * 3, channels_last)
    plan = Plan(np.arange(n), batch, STEPS, 0)
    log = None
    if recorded:
        log = DynamicsLog.create(
            folder / "dynamics", plan.example_ids, images.read("labels", plan.example_ids),
            n_epochs=40, n_classes=CLASSES, observed="train", logits=False, provenance={},
        )  # fmt: skip
    objective = PLAIN if teacher is None else KD
    heard = {} if teacher is None else {"logits": (CLASSES,)}
    loader = Loader(
        plan, images, view=View(training.augment, 0, pixels), teacher=teacher,
        device=device, residence="resident", reuse=True,
    )  # fmt: skip
    task = Task(
        network=network_of(name, channels_last, shape, device),
        distiller=build_distiller(
            objective, {"logits": (CLASSES,)}, heard, seed=0, n_examples=n
        ).to(device),
        pixels=pixels,
        loader=loader,
        objective=objective,
        training=training,
        validation=tuple(images.resident(c)[:10].to(device) for c in ("images", "labels")),
        full_size=n,
        n_examples=n,
        seed=0,
        log=log,
        compute=Compute(device=device, channels_last=channels_last, **compute),
    )
    return _Loop(Run(folder, {}), task).advance


def clean_pass(images: Cache, name: str) -> Callable[[], None]:
    """A bare step, and its share of a clean pass over the training set after each epoch: how
    dynamics are usually recorded."""
    step, network = bare(images, name), network_of(name, True)
    pixels = Pixels([0.5] * 3, [0.25] * 3, True).prepare(images.resident("images"))
    labels, number = images.resident("labels"), 0

    def both() -> None:
        nonlocal number
        step()
        chosen = slice(number * BATCH % N, number * BATCH % N + BATCH)
        number += 1
        network.eval()
        with torch.no_grad():
            probs = network(pixels[chosen]).softmax(1)
            probs.gather(1, labels[chosen, None]).numpy()
        network.train()

    return both


def compared(
    rows: dict[str, Callable[[], None]], n_rounds: int, n_steps: int
) -> dict[str, tuple[float, float]]:
    """Per row: (median ms a step, median over the rounds of its ratio to the first row)."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for step in rows.values():
        step()
    for _ in range(n_rounds):
        for name, step in rows.items():
            step()  # its memory is warm
            begin = time.perf_counter()
            for _ in range(n_steps):
                step()
            times[name].append((time.perf_counter() - begin) / n_steps * 1e3)
    first = times[next(iter(rows))]
    return {
        name: (
            statistics.median(found),
            statistics.median(t / f for t, f in zip(found, first, strict=True)),
        )
        for name, found in times.items()
    }


def print_table(found: dict[str, tuple[float, float]], head: str) -> None:
    print(f"\n| {head} | ms/step | ratio |\n| --- | ---: | ---: |")
    for name, (ms, ratio) in found.items():
        print(f"| {name} | {ms:.2f} | {ratio:.3f} |")


def steps_of(arguments: argparse.Namespace, folder: Path) -> None:
    """The loop against a bare one, and what the switches of a study change."""
    images, teacher = caches(folder)
    name = arguments.model
    rows = {
        "bare loop": bare(images, name),
        "kdlib, labels": ours(images, name, folder / "a"),
        "kdlib, labels, dynamics recorded": ours(images, name, folder / "b", recorded=True),
        "kdlib, distilled from stored logits": ours(images, name, folder / "c", teacher=teacher),
        "kdlib, labels, flip and crop": ours(
            images, name, folder / "d", augment=Augment(flip=True, crop_padding=4)
        ),
        "bare loop, clean pass after each epoch": clean_pass(images, name),
    }
    head = f"{name}, batch {BATCH}, {arguments.threads} thread(s)"
    print_table(compared(rows, arguments.rounds, arguments.steps), head)
    rows = {
        "float32, channels last": ours(images, name, folder / "e"),
        "float32, contiguous": ours(images, name, folder / "f", channels_last=False),
        "bf16, channels last": ours(images, name, folder / "g", precision="bf16"),
        "bf16, contiguous": ours(images, name, folder / "h", precision="bf16", channels_last=False),
    }
    if arguments.compile:
        rows["float32, compiled"] = ours(images, name, folder / "i", compile=True)
    print_table(compared(rows, arguments.rounds, arguments.steps), f"switches, {head}")


def paired_seeds(arguments: argparse.Namespace) -> None:
    """S seeds one after another, and as one model over stacked parameters."""
    from torch.func import functional_call, grad_and_value, stack_module_state, vmap

    n_seeds = 5
    for name, shape, batch in (("tiny_cnn", (1, 8, 8), 64), (arguments.model, SHAPE, BATCH)):

        def fresh(seed: int, name: str = name, shape: tuple = shape) -> Network:
            return build_network(Model(name=name), n_classes=CLASSES, image_shape=shape, seed=seed)

        x = torch.randn(n_seeds, batch, *shape, generator=torch.Generator().manual_seed(0))
        y = torch.arange(n_seeds * batch).reshape(n_seeds, batch) % CLASSES
        separate = [fresh(s) for s in range(n_seeds)]
        stacked = [fresh(s) for s in range(n_seeds)]
        parameters, buffers = stack_module_state(stacked)
        skeleton = fresh(0)

        def loss_of(p, b, images, labels, skeleton=skeleton):
            return F.cross_entropy(functional_call(skeleton, (p, b), (images,)), labels)

        batched = vmap(grad_and_value(loss_of))

        def one_by_one(separate=separate, x=x, y=y) -> None:
            for number, network in enumerate(separate):
                network.zero_grad(set_to_none=True)
                F.cross_entropy(network(x[number]), y[number]).backward()
                with torch.no_grad():
                    for p in network.parameters():
                        p -= 0.01 * p.grad

        def as_one(batched=batched, parameters=parameters, buffers=buffers, x=x, y=y) -> None:
            gradients, _ = batched(parameters, buffers, x, y)
            with torch.no_grad():
                for key, gradient in gradients.items():
                    parameters[key] -= 0.01 * gradient

        rows = {f"{n_seeds} seeds one after another": one_by_one, "as one stacked model": as_one}
        found = compared(rows, arguments.rounds, arguments.steps)
        print_table(found, f"{name}, batch {batch}, {arguments.threads} thread(s)")
        own = torch.stack([dict(n.named_parameters())["conv1.weight"] for n in separate])
        apart = float((own - parameters["conv1.weight"]).detach().abs().max())
        print(f"\nlargest difference of a weight of the first layer: {apart:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="cifar_resnet8")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=10, help="in a block")
    parser.add_argument("--seeds", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.seeds:
        paired_seeds(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        steps_of(arguments, Path(folder))


if __name__ == "__main__":
    main()
