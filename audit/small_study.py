"""What the defects are made again with: small trainings on a study's images, and the record of one
defect."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib.cache.shards import Cache
from kdlib.cartography.datamap import compute_datamap
from kdlib.cartography.log import DynamicsLog, begin_log
from kdlib.cartography.selection import select
from kdlib.dataset.batch import View
from kdlib.dataset.images import Images
from kdlib.dataset.loader import Loader
from kdlib.dataset.plan import Plan, budget
from kdlib.models.base import Network
from kdlib.models.evaluation import all_outputs, evaluate
from kdlib.models.networks import network_for
from kdlib.models.outputs import store_outputs
from kdlib.models.weights import weights_fingerprint
from kdlib.probes.classifiers import Features, linear_probe
from kdlib.repro import checks
from kdlib.repro.run import Run
from kdlib.repro.seeds import derive, generator
from kdlib.steps.training import (
    CROSS_ENTROPY,
    StoredTeacher,
    TrainingInputs,
    build_task,
    training_evidence,
)
from kdlib.study.models import Model
from kdlib.study.objectives import Objective, needs_teacher
from kdlib.study.training import Augment, Training
from kdlib.trainer.distiller import Distiller
from kdlib.trainer.loop import Trained, train
from kdlib.trainer.step import Task

N_EXAMPLES, N_TEST = 1100, 500  # of larger data, so many: a seeded draw
SEEDS = (0, 1, 2)
THIRD = 0.33  # the fraction of the first earlier study
STUDENT = Model(name="tiny_cnn", options={"width": 16})
TEACHER = Model(name="tiny_cnn", options={"width": 24})
BRIEF = Training(epochs=10, batch_size=64, lr_peak=0.4, warmup_steps=10)
RECORDED = BRIEF.model_copy(update={"augment": Augment(crop_padding=1)})  # the teacher's
C_GRID = (0.1, 1.0, 10.0)


@dataclass(frozen=True)
class Exhibit:
    """One defect of an earlier study, reproduced in miniature.

    Attributes:
        name: In a few words.
        measure: What both numbers are, shares in [0, 1] or their differences.
        defect: The number that the defect gives.
        honest: The number without it.
        check: What catches it: functions of kdlib as `named` gives them, or a procedure in words.
        sentence: The message of that check.
        caught: Whether the check fails on the defect.
        quiet: Whether the check passes on the honest number.
    """

    name: str
    measure: str
    defect: float
    honest: float
    check: str
    sentence: str
    caught: bool
    quiet: bool


def named(*functions: Callable) -> str:
    """The names under which functions are imported."""
    return ", ".join(f"{f.__module__}.{f.__qualname__}" for f in functions)


def judged(
    wanted: Sequence[Callable[[checks.Evidence], checks.Outcome]],
    defect: checks.Evidence,
    honest: checks.Evidence,
) -> dict[str, Any]:
    """The outcome of checks on the evidence with the defect and without it: the last fields of an
    exhibit. The defect is caught when all checks fail on it."""
    failed = [check for check in checks.run_all(wanted, defect) if not check.passed]
    return {
        "check": named(*wanted),
        "sentence": "; ".join(check.sentence for check in failed),
        "caught": len(failed) == len(wanted),
        "quiet": all(check.passed for check in checks.run_all(wanted, honest)),
    }


def refused(call: Callable[[], Any]) -> str:
    """The message of the error that a call raises; empty when it raises none."""
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return ""


@dataclass(frozen=True)
class Fit:
    """One finished training.

    Attributes:
        plan: The declared plan, which a defect may not follow.
        images: Of the study; its best epoch is chosen on the validation images.
        accuracy: On the test images, of the last step.
    """

    task: Task
    plan: Plan
    trained: Trained
    accuracy: float
    folder: Path
    images: Images

    @property
    def evidence(self) -> checks.Evidence:
        """The evidence of a training, as its checks read it, declared without early stopping."""
        task = self.task
        declared = task.training.model_copy(update={"early_stopping": None})
        inputs = TrainingInputs(
            self.images, task.network, declared, self.plan, task.seed, task.objective
        )
        return training_evidence(inputs, self.trained)


class SmallStudy:
    """Some of a study's images, a recorded teacher, and students, each trained in a second or two.

    Attributes:
        ids: (N,) int64, sorted: the training examples.
        test_ids: int64, sorted.
    """

    def __init__(self, images: Images, folder: Path) -> None:
        """Trains on demand; files go below `folder`."""
        self.images, self.folder, self._n = images, folder, 0
        self._known: dict[tuple, Fit] = {}
        self.ids = _at_most(images.train_ids, N_EXAMPLES)
        self.test_ids = _at_most(np.arange(images.test.n_examples), N_TEST)

    def labels(self, ids: np.ndarray) -> np.ndarray:
        """Labels of training examples, (n,) int64."""
        return self.images.train.read("labels", ids)

    @cached_property
    def test(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(images (n, C, H, W) uint8, labels (n,) int64) of the test split."""
        return self._read(self.images.test, self.test_ids)

    @staticmethod
    def _read(cache: Cache, ids: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        return tuple(torch.from_numpy(cache.read(c, ids)) for c in ("images", "labels"))

    def place(self) -> Path:
        """A new folder."""
        self._n += 1
        folder = self.folder / f"{self._n:03d}"
        folder.mkdir(parents=True)
        return folder

    def network(self, seed: int, model: Model = STUDENT) -> Network:
        """A network with the initial weights of a seed."""
        return network_for(self.images, model, derive(seed, "init"), "cpu")

    def third(self, strategy: str, seed: int) -> np.ndarray:
        """A third of the examples, by the study's selection."""
        return select(self.table, budget(len(self.ids), THIRD), strategy, seed)

    def plan(self, ids: np.ndarray, seed: int, training: Training = BRIEF) -> Plan:
        """The plan of a training on some examples."""
        return Plan(ids, training.batch_size, training.n_steps(len(ids)), seed)

    def loader(self, plan: Plan, seed: int, training: Training = BRIEF, **more: Any) -> Loader:
        """Batches of a plan."""
        view = View(training.augment, derive(seed, "augment"), self.images.pixels)
        return Loader(plan, self.images.train, view=view, reuse=True, **more)

    def task(
        self,
        plan: Plan,
        seed: int,
        *,
        training: Training = BRIEF,
        objective: Objective = CROSS_ENTROPY,
        model: Model = STUDENT,
        network: Network | None = None,
        distiller: type[Distiller] | None = None,
        log: DynamicsLog | None = None,
        observed: str = "train",
    ) -> Task:
        """A network, its loss and its batches; `distiller` replaces the objective's class."""
        network, teacher = network or self.network(seed, model), None
        if needs_teacher(objective):
            teacher = StoredTeacher(self.outputs, {"n_stages": network.n_stages})
        inputs = TrainingInputs(
            self.images, network, training, plan, seed, objective, teacher, log=log,
            observed=observed,
        )  # fmt: skip
        return replace(
            build_task(inputs, distiller),
            validation=self._read(self.images.train, self.images.validation_ids[:N_TEST]),
            full_size=len(self.ids),
        )

    def fit(self, task: Task, plan: Plan | None = None, folder: Path | None = None) -> Fit:
        """Train to the end; `plan` is what it is declared to see, where that is not what it does
        see."""
        folder = folder or self.place()
        trained = train(Run(folder, {}), task, describe=None)
        plan, accuracy = plan or task.loader.plan, self.accuracy(task.network)
        return Fit(task, plan, trained, accuracy, folder, self.images)

    def student(self, ids: np.ndarray, seed: int, **options: Any) -> Fit:
        """A student of some examples."""
        plan = self.plan(ids, seed, options.get("training", BRIEF))
        return self.fit(self.task(plan, seed, **options))

    def known(self, strategy: str, seed: int, objective: Objective = CROSS_ENTROPY) -> Fit:
        """The student of the full set or of a third, trained once for all exhibits; its network
        must stay as it is."""
        key = (strategy, seed, objective.kind)
        if key not in self._known:
            ids = self.ids if strategy == "full" else self.third(strategy, seed)
            self._known[key] = self.student(ids, seed, objective=objective)
        return self._known[key]

    def accuracy(self, network: Network) -> float:
        """On the test images, in [0, 1]."""
        return evaluate(network, self.images.pixels, *self.test).accuracy

    @cached_property
    def teacher(self) -> tuple[Network, DynamicsLog]:
        """A teacher of all examples, and the log of its training."""
        plan = self.plan(self.ids, 0, RECORDED)
        log = self.log(plan)
        fit = self.fit(self.task(plan, 0, training=RECORDED, model=TEACHER, log=log))
        return fit.task.network, log.finish()

    def log(self, plan: Plan, observed: str = "train") -> DynamicsLog:
        """An empty log of a training's dynamics."""
        return begin_log(self.place() / "dynamics", self.images, plan, observed=observed)

    @cached_property
    def table(self) -> pd.DataFrame:
        """The datamap of the teacher's training."""
        log = self.teacher[1]
        return compute_datamap(log, el2n_epoch=log.n_epochs // 2, window=3)

    @cached_property
    def outputs(self) -> Cache:
        """The teacher's logits, features and grids of the training images."""
        wanted = ("logits", "features", "stage1", "stage2")
        folder, images = self.place() / "outputs", self.images
        return store_outputs(self.teacher[0], images.pixels, images.train, folder, wanted=wanted)

    def features(self, network: Network, split: str) -> Features:
        """A network's features of one split."""
        cache, ids = (
            (self.images.train, self.ids) if split == "train" else (self.images.test, self.test_ids)
        )
        pixels, labels = self._read(cache, ids)
        (values,) = all_outputs(network, self.images.pixels, pixels, ("features",))
        sha256 = weights_fingerprint(network)
        return Features(values.numpy(), labels.numpy(), ids, split, sha256)

    def probed(self, network: Network) -> float:
        """Test accuracy of a linear probe of a network's features."""
        pair = (self.features(network, split) for split in ("train", "test"))
        return linear_probe(*pair, C_GRID, 0).accuracy


def _at_most(ids: np.ndarray, n: int) -> np.ndarray:
    if len(ids) <= n:
        return ids
    return np.sort(generator(0, "subset").choice(ids, n, replace=False))


def mean(values: Sequence[float]) -> float:
    """Over seeds."""
    return float(np.mean(values))
