"""Plausible mistakes, planted in the code that trains: a tripwire stops each at run time, when the
student is trained or when the table is compiled.

Mistakes that only tests can stop are those in code that training and the second derivation share,
or that is its own definition: the formula of a loss or a score, the architecture of a network, the
random numbers of a view of an image, the statistics of a comparison. There is nothing to compare
them with at run time but the same function.
"""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tiny import tiny_study

from kdlib.dataset import plan as plans
from kdlib.dataset.plan import Plan
from kdlib.models import evaluation
from kdlib.models.evaluation import evaluate
from kdlib.repro.checks import CheckError
from kdlib.repro.seeds import generator
from kdlib.steps import cache as steps_cache
from kdlib.steps import checkpoints, distill, training
from kdlib.steps.cache import open_images
from kdlib.steps.distill import train_student
from kdlib.steps.folders import student_folder
from kdlib.steps.results import results
from kdlib.trainer import step

Patch = pytest.MonkeyPatch


def subset_ignored(patch: Patch) -> None:
    """The plan trains on all images, and says so of itself."""
    real = Plan.__init__

    def plan(self, example_ids, *args, **options):
        real(self, np.arange(example_ids[-1] + 1), *args, **options)

    patch.setattr(Plan, "__init__", plan)


def pass_added_to_seed(patch: Patch) -> None:
    """The order of a pass is drawn with seed + pass."""
    patch.setattr(
        plans, "generator", lambda seed, purpose, *parts: generator(seed + sum(parts), purpose)
    )


def another_split(patch: Patch) -> None:
    """The test accuracy is measured on validation images."""

    def measure(network, pixels, images, labels, **options):
        return evaluate(network, pixels, images[:197], labels[:197], **options)

    patch.setattr(checkpoints, "evaluate", measure)


def rate_of_taught(patch: Patch) -> None:
    """Students with a teacher get another learning rate."""
    real = step.learning_rate
    patch.setattr(step, "learning_rate", lambda *args: 1.5 * real(*args))


def labels_rolled(patch: Patch) -> None:
    """Each image gets its neighbour's label."""
    real = training.Loader

    def loader(plan, images, **options):
        return real(plan, images, **options | {"labels": np.roll(
            images.read("labels", plan.example_ids), 1
        )})  # fmt: skip

    patch.setattr(training, "Loader", loader)


def one_initialisation(patch: Patch) -> None:
    """Every seed begins with the same weights."""
    real = distill.network_for
    patch.setattr(distill, "network_for", lambda images, model, seed, *args: real(
        images, model, 5, *args
    ))  # fmt: skip


def no_decay(patch: Patch) -> None:
    """Weight decay is lost on the way to the optimiser."""
    real = step.make_optimiser

    def make(parameters, settings):
        return real(parameters, settings.model_copy(update={"weight_decay": 0.0}))

    patch.setattr(step, "make_optimiser", make)


def subset_of_another_seed(patch: Patch) -> None:
    """The subset is drawn with the first seed, whatever the seed."""
    real = distill.select
    patch.setattr(
        distill, "select", lambda table, n, rule, seed, features: real(table, n, rule, 7, features)
    )


def measured_in_training_mode(patch: Patch) -> None:
    """BatchNorm takes its statistics from the test batch."""
    patch.setattr(evaluation, "eval_mode", contextlib.nullcontext)


# name of the mistake -> what the tripwire says
MISTAKES: dict[Callable[[Patch], None], str] = {
    subset_ignored: "unique_examples: 1297 on record, 363 by the files|were trained on",
    pass_added_to_seed: "batches: ",
    another_split: "test images of `last`: n 197",
    rate_of_taught: "learning rate of step",
    labels_rolled: "batches: |teacher rows",
    one_initialisation: "its initial weights are not those that its seed draws",
    no_decay: "weight_decay as executed: 0.0, asked for 0.0005",
    subset_of_another_seed: "subset drawn again",
    measured_in_training_mode: "`last` measured again: ",
}


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_tripwire_stops_a_planted_mistake(
    lab: Path, monkeypatch: Patch, mistake: Callable[[Patch], None]
):
    study = tiny_study(lab)
    cell, seed = study.cell(strategy="random", objective="kd"), 1
    folder = student_folder(study, cell, seed)
    shutil.rmtree(folder)
    images = open_images(study)
    with monkeypatch.context() as patch:
        mistake(patch)
        try:
            train_student(study, images, cell, seed)
        except CheckError as error:
            said = str(error)
        else:
            patch.undo()
            table = results(study).set_index("run")
            said = table.loc[str(folder.relative_to(study.runs)), "reason"]
    assert any(sentence in said for sentence in MISTAKES[mistake].split("|")), said


def test_pixel_statistics_of_other_images_are_refused(lab: Path, monkeypatch: Patch):
    study = tiny_study(lab)
    shutil.rmtree(study.runs / "cache")
    real = steps_cache.pixel_statistics
    with monkeypatch.context() as patch:
        patch.setattr(steps_cache, "pixel_statistics", lambda cache, ids: real(cache, ids[:9]))
        steps_cache.cache_images(study)
    table = results(study)
    assert table["reason"].str.contains("step 01 recorded mean as").all()
