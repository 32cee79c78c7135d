"""What does a cached teacher cost, and what does it teach? Distillation from stored outputs, timed.

    KDLIB_DATA=... python benchmarks/teacher_cache.py [--n 10000] [--views 2] [--top-k 3]
        [--steps 600] [--rounds 8]

A ResNet-56 teaches a ResNet-8 on the first `n` training images of CIFAR-10 (the data folder needs
the data set and weights/resnet56-cifar10.safetensors). Step times: blocks of 8 steps of every form
take turns, their medians are compared with plain supervised training. Then a student of each form
is trained from one seed for `steps` steps of 128 images and tested on the 10,000 test images.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kdlib.cache.build import build_images
from kdlib.cache.shards import Cache
from kdlib.cache.study_source import open_source
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.evaluation import evaluate
from kdlib.models.live import LiveOutputs
from kdlib.models.networks import build_network
from kdlib.models.outputs import Replay, store_outputs, stored_accuracy
from kdlib.models.weights import load_weights
from kdlib.study import objectives
from kdlib.study.data import Data, data_path
from kdlib.study.models import Model
from kdlib.study.objectives import CrossEntropy
from kdlib.study.training import Augment, Training
from kdlib.trainer.objectives import build_distiller
from kdlib.trainer.step import Step, Task

BATCH, BLOCK = 128, 8
PIXELS = Pixels([0.485, 0.456, 0.406], [0.229, 0.224, 0.225], channels_last=True)
VIEW = Augment(crop_padding=4, flip=True)
KD = objectives.KD(alpha=0.7, temperature=4.0)


def network(name: str, seed: int = 0) -> torch.nn.Module:
    """A CIFAR-10 network with drawn weights, in the memory format that suits a CPU."""
    built = build_network(Model(name=name), n_classes=10, image_shape=(3, 32, 32), seed=seed)
    return built.to(memory_format=torch.channels_last)


class Form:
    """One way to train: a student with its optimiser and its loader, which reads or asks the
    teacher."""

    def __init__(
        self, images: Cache, n_steps: int, stored: Cache | None = None,
        replay: Replay | None = None, live: LiveOutputs | None = None,
    ) -> None:  # fmt: skip
        training = Training(steps=n_steps, batch_size=BATCH, lr_peak=0.1, warmup_steps=50)
        ids = images.example_ids
        view = View(VIEW, 0, PIXELS, None if replay is None else replay.n)
        loader = Loader(
            Plan(ids, BATCH, n_steps, 0), images, view=view, teacher=stored, live=live, reuse=True
        )
        taught = stored is not None or live is not None
        objective = KD if taught else CrossEntropy()
        outputs = {"logits": (10,)}
        self.step = 0
        self.task = Task(
            network=network("cifar_resnet8"),
            distiller=build_distiller(
                objective, outputs, outputs if taught else {}, seed=0, n_examples=len(ids)
            ),
            pixels=PIXELS,
            loader=loader,
            objective=objective,
            training=training,
            validation=(torch.empty(0), torch.empty(0)),
            full_size=len(ids),
            n_examples=images.n_examples,
            seed=0,
        )
        self.train_one = Step(self.task)

    def advance(self) -> None:
        """One step, batch and teacher included."""
        self.train_one(self.task.loader.batch(self.step), self.step)
        self.step += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=8)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    teacher = network("cifar_resnet56")
    load_weights(teacher, data_path("weights/resnet56-cifar10.safetensors"))
    teacher.eval()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = Data(source="cifar10", n_train=chosen.n, n_validation=1)
        images = build_images(open_source(data, "train"), folder / "train", 2048)
        test = build_images(open_source(data, "test"), folder / "test", 2048)
        replay = Replay(chosen.views, VIEW, 0)
        kinds: dict[str, dict] = {
            "all logits, clean view": {},
            f"top {chosen.top_k}, clean view": {"top_k": chosen.top_k},
            f"all logits, {chosen.views} replayed views": {"replay": replay},
            f"top {chosen.top_k}, {chosen.views} replayed views": {
                "replay": replay, "top_k": chosen.top_k,
            },
        }  # fmt: skip
        start = time.perf_counter()
        stored = {
            kind: store_outputs(
                teacher,
                PIXELS,
                images,
                folder / kind.replace(" ", "_"),
                wanted=("logits",),
                **options,
            )
            for kind, options in kinds.items()
        }
        n_outputs = chosen.n * (2 + 2 * chosen.views)
        rate = n_outputs / (time.perf_counter() - start)

        def forms(n_steps: int) -> dict[str, Form]:
            made = {"supervised, no teacher": Form(images, n_steps)}
            made |= {
                kind: Form(images, n_steps, cache, kinds[kind].get("replay"))
                for kind, cache in stored.items()
            }
            return made | {
                "teacher live": Form(images, n_steps, live=LiveOutputs(teacher, PIXELS, ["logits"]))
            }

        timed = forms(chosen.rounds * BLOCK + BLOCK)
        blocks: dict[str, list[float]] = {kind: [] for kind in timed}
        for number in range(chosen.rounds + 1):
            for kind, form in timed.items():
                begin = time.perf_counter()
                for _ in range(BLOCK):
                    form.advance()
                if number:  # the first block warms up
                    blocks[kind].append((time.perf_counter() - begin) / BLOCK)
        trained = forms(chosen.steps)
        accuracy = {}
        pixels, labels = test.resident("images"), test.resident("labels")
        for kind, form in trained.items():
            for _ in range(chosen.steps):
                form.advance()
            accuracy[kind] = evaluate(form.task.network, PIXELS, pixels, labels)[1]
        print(
            f"\nCIFAR-10, first {chosen.n:,} training images, ResNet-56 -> ResNet-8, batch {BATCH},"
            f" 1 thread, torch {torch.__version__}; medians of {chosen.rounds} blocks of {BLOCK} "
            f"steps; students of one seed after {chosen.steps} steps; the teacher makes "
            f"{rate:,.0f} outputs/s\n"
        )
        print(
            "| form | ms/step | ratio to supervised | bytes/image | teacher read back | student |"
        )
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        plain = blocks["supervised, no teacher"]
        for kind, times in blocks.items():
            ratio = statistics.median(t / p for t, p in zip(times, plain, strict=True))
            size = read = "-"
            if kind in stored:
                size = str(sum(stored[kind].row_bytes().values()))
                read = f"{stored_accuracy(stored[kind], images):.2%}"
            print(
                f"| {kind} | {1000 * statistics.median(times):.0f} | {ratio:.3f} | {size} | {read} "
                f"| {accuracy[kind]:.2%} |"
            )


if __name__ == "__main__":
    main()
