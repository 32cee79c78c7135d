"""The steps of a study, one function each: what the numbered notebooks call.

Each step opens its run, skips itself when its evidence is there, does its work, lets the tripwires
judge the evidence, and writes it last. Leaves to others: all computing (the rooms it calls),
tables and figures (`report`).
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib import checks, coresets, files, params, probe, runs
from kdlib.augment import Pixels
from kdlib.building import build_images
from kdlib.cache import Cache, CacheError, pixel_statistics
from kdlib.cartography import datamap, read_datamap, write_datamap
from kdlib.data import open_source
from kdlib.dynamics import DynamicsLog
from kdlib.evaluation import evaluate
from kdlib.gradients import gradient_norms
from kdlib.loading import Loader, View
from kdlib.models import Network, Resized, build_network
from kdlib.objectives import build_distiller, needs_teacher, student_outputs, teacher_columns
from kdlib.params import EXHIBITS, PICKED, SHARD_POLICIES, Cell, Objective, Study, parse_part
from kdlib.pretrained import load_pretrained
from kdlib.ranks import Ranks, launch, wait
from kdlib.sampling import CUT, Plan, fixed_shards, shards_in_fraction, split_ids
from kdlib.seeds import PURPOSES, derive
from kdlib.selection import Subset, budget, select
from kdlib.states import saved_step
from kdlib.teacher import Replay, open_outputs, store_outputs, stored_accuracy, verify_outputs
from kdlib.tracking import open_tracker
from kdlib.trainer import ALONE, Task, Trained, checkpoint_steps, train
from kdlib.weights import load_weights, weights_fingerprint

CROSS_ENTROPY = Objective(kind="cross_entropy")
REPLAYED = "replayed"  # teacher outputs of the views that the students will see


@dataclass(frozen=True)
class Images:
    """A study's cached images and their split.

    Attributes:
        train: Cache of the training split, validation images included.
        test: Cache of the test split.
        train_ids: (N,) int64, sorted: what teachers and students may learn from.
        validation_ids: int64, sorted: what curves and best epochs are read from.
        pixels: Normalisation measured on `train_ids`.
    """

    train: Cache
    test: Cache
    train_ids: np.ndarray
    validation_ids: np.ndarray
    pixels: Pixels

    @property
    def fingerprints(self) -> dict[str, str]:
        split = files.sha256_array(self.train_ids, self.validation_ids)
        return {"train": self.train.fingerprint, "test": self.test.fingerprint, "split": split}

    @property
    def n_classes(self) -> int:
        """Classes of the labels.

        Raises: ValueError for images without labels.
        """
        names = self.train.header["class_names"]
        if not names:
            raise ValueError(
                f"the images of {self.train.folder} have no labels (study: data.labelled), and "
                "every objective, datamap and probe of this study needs them"
            )
        return len(names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the cached images."""
        return self.train.layout("images")[1]

    def network(self, model: params.Model, seed: int, device: str, n_more: int = 0) -> Network:
        """A network for these images, and `n_more` classes, with weights drawn from `seed`."""
        n_classes = self.n_classes + n_more
        built = build_network(model, n_classes=n_classes, image_shape=self.image_shape, seed=seed)
        return built.to(device, memory_format=self.pixels.memory_format)

    def validation(self, device: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(images (N, C, H, W) uint8, labels (N,) int64) of the held-out training images."""
        images = torch.from_numpy(self.train.read("images", self.validation_ids))
        labels = torch.from_numpy(self.train.read("labels", self.validation_ids))
        return images.to(device), labels.to(device)


def use(compute: params.Compute, ranks: Ranks = ALONE) -> str:
    """Set the number of threads, and return the device the study asks for, or this process's own
    one of several.

    Raises: RuntimeError when that device is not there; another one is never taken silently.
    """
    torch.set_num_threads(compute.threads)
    if compute.device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            f"the study asks for {compute.device}, but torch sees no GPU here; set compute.device: "
            "cpu in the study, or run it where a GPU is"
        )
    return compute.device if ranks.alone else ranks.device


def cache_images(study: Study) -> Images:
    """Step 01: cache both splits, split off validation images, measure the pixels."""
    study, caches = study.upstream, {}
    for split in ("train", "test"):
        source, part = open_source(study.data, split), _part(study, split)
        caches[split] = build_images(source, study.cache / split, study.data.shard_size, part)
        caches[split].verify()
    train_ids, _ = split_ids(
        caches["train"].example_ids, study.data.n_validation, study.data.split_seed
    )
    settings = {
        "own": study.step_settings("cache"),
        "inputs": {split: cache.fingerprint for split, cache in caches.items()},
    }
    with runs.open_run(study, study.runs / "cache", settings) as run:
        if not run.finished:
            mean, std = pixel_statistics(caches["train"], train_ids)
            run.finish({"step": "cache", "study": study.name, "mean": mean, "std": std})
    return open_images(study)


def _part(study: Study, split: str) -> tuple[int, int]:
    return parse_part(study.data.part) if split == "train" else (1, 1)


def open_images(study: Study) -> Images:
    """What step 01 made.

    Raises: FileNotFoundError or CacheError that name notebook 01 when it has not run.
    """
    study = study.upstream
    evidence = runs.read_evidence(study.runs / "cache", study.step_settings("cache"))
    train, test = (
        Cache(study.cache / split, part=_part(study, split)) for split in ("train", "test")
    )
    train_ids, validation_ids = split_ids(
        train.example_ids, study.data.n_validation, study.data.split_seed
    )
    pixels = Pixels(evidence["mean"], evidence["std"], study.compute.channels_last)
    return Images(train, test, train_ids, validation_ids, pixels)


def make_teacher(study: Study, images: Images, ranks: Ranks = ALONE) -> dict[str, Any] | None:
    """Step 02: train or load the teacher, record training dynamics, store its outputs; then the
    study's further teachers, but for those that learn from a subset alone.

    Returns: The study's teacher's evidence; None on all but the first of several processes.
    Raises: TripwireError when one does not reach the accuracy on its card, among others.
    """
    evidence = make_one_teacher(study.upstream, images, None, ranks)
    for name in further_teachers(study):
        make_one_teacher(study, images, name, ranks)
    return evidence


def further_teachers(study: Study) -> list[str]:
    """Names of the further teachers that step 02 makes."""
    return [name for name, teacher in study.teachers.items() if teacher.learns_from == "train"]


def _teacher(study: Study, name: str | None) -> params.Teacher:
    if name is None:
        return study.teacher
    if name not in study.teachers:
        known = files.nearest(name, study.teachers) if study.teachers else "it has none"
        raise params.StudyError(f"no teacher {name!r} in this study's `teachers`; {known}")
    return study.teachers[name]


def teacher_folder(study: Study, name: str | None = None) -> Path:
    """The run of the study's teacher, or of a further one."""
    return study.upstream.runs / "teacher" if name is None else study.runs / "teachers" / name


def make_one_teacher(
    study: Study, images: Images, name: str | None, ranks: Ranks = ALONE
) -> dict[str, Any] | None:
    """The teacher of the study (`name` None), or one of its further ones; as `make_teacher`."""
    device, teacher = use(study.compute, ranks), _teacher(study, name)
    folder = teacher_folder(study, name)
    settings = {"own": study.step_settings("teacher", teacher=name), "inputs": images.fingerprints}
    if teacher.weights is not None:
        settings["inputs"]["weights_file"] = files.sha256_file(_weights_file(teacher.weights))
    point = {} if name is None else {"teacher": name}
    if _launch(study, ranks, folder, settings, "teacher", **point):
        return runs.read_evidence(folder)
    if name is None and study.dynamics.model is not None:
        _record_dynamics(study, images, device, ranks)
    with open_shared_run(study, folder, settings, ranks) as run:
        if run.finished:
            evidence = runs.read_evidence(run.folder)
            if ranks.first:
                _restore_outputs(study, images, name, run.folder, evidence, device)
            return evidence
        network = teacher_network(study, images, device, name)
        evidence = {"step": "teacher", "study": study.name, "data": images.fingerprints}
        tripwires = checks.TEACHER
        if teacher.training is not None:
            recorded = name is None and study.dynamics.model is None
            trained = _supervise(
                run, study, images, network, teacher.training, teacher.seed, recorded, "teacher",
                ranks,
            )  # fmt: skip
            if trained is None:
                return None
            evidence |= trained
            tripwires = (*checks.RUN, *checks.TEACHER)
            load_weights(network, run.folder / trained["checkpoints"]["last"]["file"])
        elif not ranks.first:
            return None
        evidence["teacher"] = _store_all(study, images, network, name, run.folder, device)
        evidence["checks"] = checks.demand(tripwires, evidence)
        return run.finish(evidence, device)


def _store_all(
    study: Study, images: Images, network: Network, name: str | None, folder: Path, device: str
) -> dict[str, Any]:
    """Store a teacher's outputs below its run, and measure it by them: its card."""
    teacher, pixels = _teacher(study, name), teacher_pixels(study, images, name)
    stored = {
        split: _store(study, network, pixels, cache, folder / f"outputs-{split}", device, name=name)
        for split, cache in (("train", images.train), ("test", images.test))
    }
    outputs = {split: cache.fingerprint for split, cache in stored.items()}
    if replay(study) is not None:
        place = folder / f"outputs-{REPLAYED}"
        replayed = _store(study, network, pixels, images.train, place, device, name=name)
        outputs[REPLAYED] = replayed.fingerprint
    return _measured(study, images, network.n_classes, stored) | {
        "name": name or "teacher",
        "claimed": teacher.expected_accuracy,
        "tolerance": teacher.tolerance,
        "split": "test",
        "weights_sha256": weights_fingerprint(network),
        "n_stages": network.n_stages,
        "outputs": outputs,
        "trained_here": teacher.training is not None,
        "trained_on": teacher.trained_on
        or ("kept" if teacher.learns_from == "train" else "subset"),
    }


def _subset_teacher(study: Study, images: Images, name: str, subset: Subset, seed: int) -> None:
    """Train a teacher that learns from one subset alone, with draws of its own for each seed of the
    students, and store its outputs, unless it is there already."""
    device, teacher = use(study.compute), study.teachers[name]
    own = study.step_settings("teacher", teacher=name) | {"seed": seed}
    settings = {"own": own, "inputs": images.fingerprints | {"subset": subset.sha256}}
    requested = derive(seed, "teacher")  # its student draws from `seed` itself
    folder = _subset_teacher_folder(study, name, subset, seed)
    with runs.open_run(study, folder, settings) as run:
        if run.finished:
            evidence = runs.read_evidence(folder)
            _restore_outputs(study, images, name, folder, evidence, device)
            return
        network = teacher_network(study, images, device, name, requested)
        plan = plan_run(images, teacher.training, subset.example_ids, requested)
        describe = f"teacher {name} of {subset.strategy} {subset.fraction:g}, seed {seed}"
        trained = train_run(
            run, study, images, network, teacher.training, plan, CROSS_ENTROPY, requested,
            describe, ALONE,
        )  # fmt: skip
        evidence = {"step": "teacher", "study": study.name, "data": images.fingerprints} | trained
        evidence["subset"] |= {"sha256": subset.sha256, "strategy": subset.strategy}
        load_weights(network, run.folder / trained["checkpoints"]["last"]["file"])
        evidence["teacher"] = _store_all(study, images, network, name, run.folder, device)
        evidence["checks"] = checks.demand((*checks.RUN, *checks.TEACHER), evidence)
        run.finish(evidence, device)


def _subset_teacher_folder(study: Study, name: str, subset: Subset, seed: int) -> Path:
    return teacher_folder(study, name) / f"subset={subset.sha256[:16]}" / f"seed={seed}"


def teacher_network(
    study: Study, images: Images, device: str, name: str | None = None, seed: int | None = None
) -> Network:
    """The teacher, or a further one, with its published or loaded weights, or with those its
    training begins from, drawn from its own seed or from another one.

    It sees images of `teacher.image_size` where that is set, whatever their size in the cache.
    """
    teacher = _teacher(study, name)
    shape, size = images.image_shape, teacher.image_size
    seen = shape if size is None else (shape[0], size, size)
    if teacher.pretrained:
        network = load_pretrained(
            teacher.model,
            n_classes=images.n_classes,
            image_shape=seen,
            trust_code=teacher.trust_code,
        )
    else:
        network = build_network(
            teacher.model,
            n_classes=images.n_classes,
            image_shape=seen,
            seed=derive(teacher.seed if seed is None else seed, "init"),
        )
        if teacher.weights is not None:
            load_weights(network, _weights_file(teacher.weights))
    network = network if size is None else Resized(network, size)
    return network.to(device, memory_format=images.pixels.memory_format)


def made_teacher(
    study: Study,
    images: Images,
    device: str,
    folder: Path,
    evidence: dict[str, Any],
    name: str | None = None,
) -> Network:
    """A finished teacher, with the weights its card names.

    Args:
        folder, evidence: Of its run.

    Raises: ValueError for other weights.
    """
    network = teacher_network(study, images, device, name)
    if _teacher(study, name).training is not None:
        load_weights(network, folder / evidence["checkpoints"]["last"]["file"])
    if weights_fingerprint(network) != evidence["teacher"]["weights_sha256"]:
        raise ValueError(
            f"the teacher's weights are not those of {folder}; delete it and run the notebook that "
            "makes it again"
        )
    return network


def _measured(
    study: Study, images: Images, n_classes: int, stored: dict[str, Cache]
) -> dict[str, Any]:
    """A teacher's accuracy as read back from its stored outputs: of its logits, or of the nearest
    neighbours of its features among the study's training images where it has no classifier."""
    if n_classes:
        return {
            "measured": stored_accuracy(stored["test"], images.test),
            "measured_train": stored_accuracy(stored["train"], images.train),
            "measured_by": "logits",
        }
    pair = []
    for split, (cache, ids) in zip(("train", "test"), probe_examples(images), strict=True):
        values = stored[split].read("features", ids)[:, 0].astype(np.float32)
        pair.append(labelled_features(cache, ids, values, stored[split].header["teacher"]))
    found = probe.knn_probe(*pair, study.probe.k)
    return {"measured": found.accuracy, "measured_train": None, "measured_by": "knn"}


@contextlib.contextmanager
def open_shared_run(
    study: Study, folder: Path, settings: dict[str, Any], ranks: Ranks
) -> Iterator[runs.Run]:
    """The run, opened and locked by the first of the processes that share it."""
    if ranks.first:
        with runs.open_run(study, folder, settings) as run:
            wait(ranks)
            yield run
    else:
        wait(ranks)
        yield runs.Run(folder, settings)


def _launch(
    study: Study, ranks: Ranks, folder: Path, settings: dict[str, Any], step: str, **point: Any
) -> bool:
    """Make a run by several processes under torchrun, when the study asks for them and this is not
    one of them; whether that happened.

    Raises: RuntimeError when one of them fails; its own error stands above.
    """
    if study.compute.processes == 1 or not ranks.alone or runs.Run(folder, settings).finished:
        return False
    path = written(study)
    arguments = [str(x) for pair in point.items() for x in (f"--{pair[0]}", pair[1])]
    launch(["kdlib", "step", step, str(path), *arguments], study.compute.processes)
    return True


def written(study: Study) -> Path:
    """A file of the study as it is in memory, for processes of its own."""
    path = study.runs / "launched" / f"{study.name}.yaml"  # JSON, which is YAML
    content = study.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    return files.write_json(path, content)


def store_part(study: Study, images: Images, part: tuple[int, int]) -> list[Cache]:
    """Store part i of k of a loaded teacher's outputs for the training images, and for the replayed
    views where the study asks for them: for several processes at once, before step 02.

    Returns: What is stored now, restricted to the part.
    Raises: ValueError for a teacher that this study trains: step 02 stores its outputs.
    """
    study = study.upstream
    if study.teacher.training is not None:
        raise ValueError(
            "the teacher of this study is trained by notebooks/02_teacher.ipynb, which then stores "
            "its outputs; parts are for a loaded one (study: teacher.weights or teacher.pretrained)"
        )
    device = use(study.compute)
    network = teacher_network(study, images, device)
    pixels = teacher_pixels(study, images)
    kinds = ("train",) if replay(study) is None else ("train", REPLAYED)
    folders = [outputs_folder(study, kind) for kind in kinds]
    return [_store(study, network, pixels, images.train, f, device, part) for f in folders]


def _store(
    study: Study,
    network: Network,
    pixels: Pixels,
    images: Cache,
    folder: Path,
    device: str,
    part: tuple[int, int] | None = None,
    name: str | None = None,
) -> Cache:
    """Store and spot-check a teacher's outputs of one split, or of the replayed views."""
    replayed = folder.name == f"outputs-{REPLAYED}"
    views = replay(study) if replayed else None
    wanted = ["logits"] if network.n_classes else []
    if not replayed:  # for the probes
        wanted.append("features")
    if replayed or (images.header["split"] == "train" and replay(study) is None):
        for objective in study.objectives.values():
            if objective.teacher == name:
                wanted += teacher_columns(objective, network.n_stages)
    stored = store_outputs(
        network,
        pixels,
        images,
        folder,
        device,
        replay=views,
        top_k=study.teacher.outputs.top_k,
        wanted=tuple(dict.fromkeys(wanted)),
        part=part or _part(study, images.header["split"]),
    )
    verify_outputs(network, pixels, images, stored, views)
    return stored


def _restore_outputs(
    study: Study,
    images: Images,
    name: str | None,
    folder: Path,
    evidence: dict[str, Any],
    device: str,
) -> None:
    """Store again what of a finished teacher's outputs was taken away as damaged."""
    gone = []
    for which in evidence["teacher"]["outputs"]:
        try:
            part = _part(study, "test" if which == "test" else "train")
            Cache(folder / f"outputs-{which}", part=part)
        except CacheError:
            gone.append(which)
    if not gone:
        return
    network = made_teacher(study, images, device, folder, evidence, name)
    pixels = teacher_pixels(study, images, name)
    for which in gone:
        of = images.test if which == "test" else images.train
        _store(study, network, pixels, of, folder / f"outputs-{which}", device, name=name)


def replay(study: Study) -> Replay | None:
    """The views that the study's teacher and students share; None when each pass has a new one."""
    outputs = study.teacher.outputs
    if outputs.views is None:
        return None
    return Replay(outputs.views, study.training.augment, derive(outputs.seed, "augment"))


def open_teacher(study: Study, name: str | None = None) -> dict[str, Any]:
    """The card of the teacher, or of a further one, as step 02 measured it.

    Raises: FileNotFoundError when there is no teacher; ValueError when the study has been changed
        since it was made.
    """
    study = study.upstream if name is None else study
    own = study.step_settings("teacher", teacher=name)
    return runs.read_evidence(teacher_folder(study, name), own)["teacher"]


def _weights_file(weights: str) -> Path:
    path = params.data_path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"teacher weights {path} are not there; put the file into the data folder "
            f"({files.data_root()}), set KDLIB_DATA, or write an absolute path (teacher.weights)"
        )
    return path


def outputs_folder(study: Study, which: str) -> Path:
    """Where a study's stored teacher outputs of one split, or of the replayed views, are."""
    return teacher_folder(study) / f"outputs-{which}"


def teacher_pixels(study: Study, images: Images, name: str | None = None) -> Pixels:
    """The normalisation the teacher, or a further one, was trained with."""
    teacher = _teacher(study, name)
    if teacher.mean is None:
        return images.pixels
    if len(teacher.mean) != images.image_shape[0]:
        raise params.StudyError(
            f"teacher.mean and std have {len(teacher.mean)} numbers; expected one for each of "
            f"{images.image_shape[0]} channels"
        )
    return Pixels(list(teacher.mean), list(teacher.std), study.compute.channels_last)


def _record_dynamics(study: Study, images: Images, device: str, ranks: Ranks) -> None:
    """Train the network whose dynamics make the datamap, when it is not the teacher."""
    dynamics = study.dynamics
    own = {k: study.step_settings("teacher")[k] for k in ("dynamics", "compute")}
    settings = {"own": own, "inputs": images.fingerprints}
    with open_shared_run(study, study.recorded_run, settings, ranks) as run:
        if run.finished:
            return
        network = recorded_network(study, images, device)
        evidence = {"step": "dynamics", "study": study.name, "data": images.fingerprints}
        trained = _supervise(
            run, study, images, network, dynamics.training, dynamics.seed, True, "dynamics", ranks
        )
        if trained is None:
            return
        evidence |= trained
        evidence["checks"] = checks.demand(checks.RUN, evidence)
        run.finish(evidence, device)


def _supervise(
    run: runs.Run,
    study: Study,
    images: Images,
    network: Network,
    training: params.Training,
    seed: int,
    recorded: bool,
    describe: str,
    ranks: Ranks,
) -> dict[str, Any] | None:
    """Train on all training images with labels alone, recording dynamics when asked to."""
    plan = plan_run(images, training, images.train_ids, seed)
    if recorded:
        training = keep_epoch(training, plan, study.dynamics.gradient_epoch)
    log = None
    if recorded and ranks.first:
        log = DynamicsLog.create(
            run.folder / "dynamics",
            plan.example_ids,
            images.train.read("labels", plan.example_ids),
            n_epochs=plan.n_passes,
            n_classes=images.n_classes,
            observed=study.dynamics.observed,
            logits=study.dynamics.logits,
            provenance=images.fingerprints | {"settings": run.settings_sha256},
        )
    evidence = train_run(
        run, study, images, network, training, plan, CROSS_ENTROPY, seed, describe, ranks, log=log
    )
    if log is not None:
        log.finish()
    return evidence


def keep_epoch(training: params.Training, plan: Plan, epoch: int | None) -> params.Training:
    """A training that also keeps its weights at the end of one epoch, counted from 1.

    Raises: ValueError for an epoch beyond its end.
    """
    if epoch is None:
        return training
    steps_of_epoch = len(plan.example_ids) / plan.batch_size
    step = round(epoch * steps_of_epoch)  # as those who read it say
    if step > plan.n_steps:
        raise ValueError(
            f"dynamics.gradient_epoch is {epoch}; the recorded training ends after "
            f"{plan.n_steps / steps_of_epoch:g} epochs"
        )
    kept = (*training.checkpoint_fractions, step / plan.n_steps)
    return training.model_copy(update={"checkpoint_fractions": kept})


def plan_run(
    images: Images,
    training: params.Training,
    example_ids: np.ndarray,
    seed: int,
    shards_per_pass: int | None = None,
    biased: bool = False,
) -> Plan:
    """The order of a run's examples; an epoch of drawn shards is as long as these are on
    average.

    Args:
        biased: Read the shards of each pass in sorted order and cut it short, as an exhibit.
    """
    n, size = len(example_ids), images.train.shard_size
    if shards_per_pass is not None:
        n = round(n * shards_per_pass / len(np.unique(example_ids // size)))
    return Plan(
        example_ids,
        training.batch_size,
        training.n_steps(n),
        seed,
        order="sequential" if biased else training.order,
        shard_size=size,
        window_shards=training.window_shards,
        shards_per_pass=shards_per_pass,
        cut=CUT if biased else 1.0,
    )


def train_run(
    run: runs.Run,
    study: Study,
    images: Images,
    network: Network,
    training: params.Training,
    plan: Plan,
    objective: Objective,
    seed: int,
    describe: str,
    ranks: Ranks,
    *,
    log: DynamicsLog | None = None,
    teacher: Cache | None = None,
    card: dict[str, Any] | None = None,
    labels: np.ndarray | None = None,
    declared: Plan | None = None,
) -> dict[str, Any] | None:
    """Train, measure the last and the best checkpoint on the test split, collect the evidence.

    Args:
        teacher, card: The teacher's stored outputs and what step 02 measured of it.
        labels: Instead of the stored ones, one for each example of the plan.
        declared: The plan that the run is said to follow, where that is another one (an exhibit).

    Returns: The evidence; None on all but the first of several processes.
    Raises: CacheError when a shard of images, labels or teacher outputs is not as it was written.
    """
    device = use(study.compute, ranks)
    if ranks.first:  # once a run: 0.3 s a GB on two cores, and what is learnt is what was stored
        for cache in (images.train, images.test, *([] if teacher is None else [teacher])):
            cache.verify()
    views = replay(study) if teacher is not None else None
    view = View(training.augment, derive(seed, "augment"), images.pixels)
    if views is not None:
        view = View(views.augment, views.seed, images.pixels, views.n)
    second = None
    if objective.barlow_weight is not None:
        second = View(training.augment, derive(seed, "second_view"), images.pixels)
    reads = teacher_columns(objective, card["n_stages"] if card else 0)
    loader = Loader(
        plan,
        images.train,
        view=view,
        teacher=teacher,
        reads=reads,
        second=second,
        labels=labels,
        device=device,
        residence=study.compute.images,
        reuse=ranks.alone,
        rank=ranks.rank,
        n_ranks=ranks.n,
    )
    heard = {} if teacher is None else teacher.header["columns"]
    shapes = {  # without the axis of views; logits may be stored as the largest alone
        name: (images.n_classes,) if name == "logits" else tuple(heard[name][1][1:])
        for name in reads
    }
    distiller = build_distiller(
        objective,
        network.output_shapes(images.image_shape, student_outputs(objective, network.n_stages)),
        shapes,
        seed=seed,
        n_examples=len(plan.example_ids),
    ).to(device)
    task = Task(
        network=network,
        distiller=distiller,
        pixels=images.pixels,
        loader=loader,
        objective=objective,
        training=training,
        validation=images.validation(device),
        full_size=len(images.train_ids),
        n_examples=images.train.n_examples,
        seed=seed,
        log=log,
        observed=study.dynamics.observed,
        compute=study.compute,
        ranks=ranks,
    )
    tracking = study.tracking if ranks.first else params.Tracking()
    with open_tracker(
        tracking, run.folder, describe, run.settings, saved_step(run.folder)
    ) as tracker:
        trained = train(run, task, describe, tracker)
    if not ranks.first:
        return None
    test = images.test.resident("images").to(device), images.test.resident("labels").to(device)
    measured = {}
    for which, step in (("last", trained.last_step), ("best", trained.best_step)):
        if which == "best" and step == trained.last_step:
            measured["best"] = measured["last"]
            continue
        file, weights_sha256 = trained.checkpoints[step]
        load_checked(network, run.folder, file, weights_sha256)
        loss, accuracy = evaluate(network, images.pixels, *test)
        measured[which] = {
            "step": step,
            "file": file,
            "file_sha256": files.sha256_file(run.folder / file),
            "weights_sha256": weights_sha256,
            "test_accuracy": accuracy,
            "test_loss": loss,
        }
    held_out = images.validation_ids
    evidence = training_evidence(held_out, training, declared or plan, trained, seed, card)
    evidence["metrics_sha256"] = files.sha256_file(run.folder / "metrics.parquet")
    if "logits" in reads:  # read past the loader, for the tripwire to compare
        read = stored_accuracy(teacher, images.train, plan.example_ids)
        evidence["pairing"] |= {"stored_accuracy": read}
    return evidence | {"checkpoints": measured}


def training_evidence(
    validation_ids: np.ndarray,
    training: params.Training,
    plan: Plan,
    trained: Trained,
    seed: int,
    card: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the tripwires read of a finished training.

    Args:
        validation_ids: From which its best epoch was chosen.
        training, plan: As they were declared; where they say so, a run may stop early.
        card: Of the teacher it heard.
    """
    n_steps, kept = plan.n_steps, checkpoint_steps(training, plan.n_steps)
    series = [s for s in sorted(trained.checkpoints) if s in kept or s == trained.last_step]
    if training.early_stopping is not None and trained.evidence["stopped_early"]:
        n_steps = trained.last_step
    planned = plan.visits(n_steps)
    coverage = checks.coverage_evidence(
        trained.visits, plan.example_ids, planned, plan.shards_per_pass
    )
    return {
        "seeds": {"requested": seed, "resolved": {p: derive(seed, p) for p in PURPOSES}},
        "budget": {
            "comparison": training.comparison,
            "declared": {
                "unique_examples": int((planned > 0).sum()),
                "samples": n_steps * plan.batch_size,
                "steps": n_steps,
            },
            "bound": plan.n_steps,
            "recorded": {
                "unique_examples": coverage["unique"],
                "samples": int(trained.visits.sum()),
                "steps": int(trained.metrics["step"].iloc[-1]),
            },
        },
        "coverage": coverage,
        "subset": {"n_examples": len(plan.example_ids)},
        "epochs_in_steps": len(plan.example_ids) / plan.batch_size,
        "initialisation": {
            "source": "random",
            "weights_sha256": trained.evidence["initial_weights_sha256"],
        },
        "order_sha256": trained.evidence["order_sha256"],
        "gradient": trained.evidence["gradient"],
        "pairing": trained.evidence["pairing"],
        "selection": {
            "best_epoch_by": "validation",
            "overlap": int((trained.visits[validation_ids] > 0).sum()),
            "steers": training.selects,
            # validation images of which the student has heard through its teacher
            "teacher_overlap": len(validation_ids)
            if card is not None and card["trained_on"] == "train"
            else 0,
        },
        "series": {str(step): trained.checkpoints[step][0] for step in series},
        "series_sha256": {str(step): trained.checkpoints[step][1] for step in series},
    }


def load_checked(network: Network, folder: Path, file: str, weights_sha256: str | None) -> str:
    """Load the weights of a run into a network.

    Args:
        weights_sha256: Their fingerprint when they were written; None where that is not known.

    Returns: Their fingerprint.
    Raises: ValueError for weights that were changed.
    """
    found = load_weights(network, folder / file)
    if weights_sha256 not in (None, found):
        raise ValueError(
            f"{folder / file} was changed after it was written; delete {folder} and run the "
            "notebook that makes it again"
        )
    return found


def load_step(network: Network, folder: Path, evidence: dict[str, Any], step: int | str) -> str:
    """Load the weights of one kept step of a finished run; as `load_checked`."""
    known = evidence.get("series_sha256", {})  # runs of format 1 have none
    return load_checked(network, folder, evidence["series"][str(step)], known.get(str(step)))


def make_datamap(study: Study, images: Images) -> pd.DataFrame:
    """Step 03: every score of every training example, from the recorded dynamics, the recorded
    network's gradients where the study asks for them, and the teacher's features."""
    study = study.upstream
    recorded = runs.read_evidence(study.recorded_run)
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)
    settings = {
        "own": study.step_settings("datamap"),
        "inputs": images.fingerprints | _made_from(study),
    }
    path = study.runs / "datamap" / "datamap.parquet"
    with runs.open_run(study, path.parent, settings) as run:
        if not run.finished:
            images.train.verify()
            scoring = study.dynamics
            table = datamap(log, el2n_epoch=scoring.el2n_epoch, window=scoring.window)
            table = table.assign(**_further_scores(study, images, table, recorded))
            provenance = settings["inputs"] | {"settings": run.settings_sha256}
            write_datamap(table, path, provenance)
            run.finish(
                {
                    "step": "datamap",
                    "study": study.name,
                    "datamap_sha256": files.sha256_file(path),
                    "n_examples": len(table),
                    "n_epochs": log.n_epochs,
                    "observed": log.observed,
                }
            )
        return open_datamap(study, images)


def _made_from(study: Study) -> dict[str, str]:
    """What a datamap is made from beside images: the recorded training, the teacher's outputs."""
    return {
        "recorded": runs.read_evidence(study.recorded_run)["settings_sha256"],
        "teacher_outputs": open_teacher(study)["outputs"]["train"],
    }


def _further_scores(
    study: Study, images: Images, table: pd.DataFrame, recorded: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Scores that a log of outputs does not hold; the teacher's features are in memory meanwhile,
    4 bytes a number."""
    device, ids = use(study.compute), table.index.to_numpy()
    scores = {}
    epoch = study.dynamics.gradient_epoch
    if epoch is not None:
        network = recorded_network(study, images, device)
        step = round(epoch * recorded["epochs_in_steps"])
        load_step(network, study.recorded_run, recorded, step)
        scores["grand"], scores["grand_last"] = gradients(images, network, ids, device)
    features = teacher_features(study, images.train, ids)
    n_clusters = study.dynamics.clusters or images.n_classes
    seed = derive(study.dynamics.seed, "clusters") % 2**32  # scikit-learn takes 32 bits
    scores["prototypicality"] = coresets.prototypicality(features, n_clusters, seed)
    return scores | {"class_distance": coresets.class_distance(features, table["label"].to_numpy())}


def recorded_network(study: Study, images: Images, device: str) -> Network:
    """The network whose dynamics make the datamap, for its weights to be loaded into."""
    if study.dynamics.model is None:
        return teacher_network(study, images, device)
    return images.network(study.dynamics.model, derive(study.dynamics.seed, "init"), device)


def gradients(
    images: Images, network: Network, ids: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """`grand` and `grand_last` of some training examples under a network's weights."""
    pixels = torch.from_numpy(images.train.read("images", ids)).to(device)
    labels = torch.from_numpy(images.train.read("labels", ids)).to(device)
    return gradient_norms(network, images.pixels, pixels, labels, describe="gradients")


def teacher_features(study: Study, cache: Cache, ids: np.ndarray) -> np.ndarray:
    """The teacher's stored features of some examples of one split, (n, D) float32."""
    teacher, split = open_teacher(study), cache.header["split"]
    folder = outputs_folder(study, split)
    stored = open_outputs(folder, cache, teacher["weights_sha256"], _part(study, split))
    stored.verify()
    return stored.read("features", ids)[:, 0].astype(np.float32)


def open_datamap(study: Study, images: Images) -> pd.DataFrame:
    """What step 03 made, checked against the images and the evidence.

    Raises: FileNotFoundError that names notebook 03; ValueError for a datamap of other images,
        another recording or another teacher.
    """
    study = study.upstream
    evidence = runs.read_evidence(study.runs / "datamap", study.step_settings("datamap"))
    path = study.runs / "datamap" / "datamap.parquet"
    table = read_datamap(path, images.fingerprints | _made_from(study))
    if files.sha256_file(path) != evidence["datamap_sha256"]:
        raise ValueError(f"{path} differs from its evidence; run notebooks/03_datamap.ipynb again")
    return table


def make_subset(study: Study, images: Images, cell: Cell, seed: int) -> Subset:
    """The training examples of one cell and seed, exactly as many as the fraction says.

    Of `fixed_shards` whole shards, as many as the fraction says of them; of `random_shards` all,
    since each pass draws its own. The exhibits take the shards of the policy they are named after.
    """
    ids, data, parent = images.train_ids, files.fingerprint(images.fingerprints), None
    if cell.strategy in (*SHARD_POLICIES, *EXHIBITS):
        if cell.strategy.startswith("fixed_shards"):
            size = images.train.shard_size
            ids = fixed_shards(ids, size, shards_in_fraction(ids, size, cell.fraction), seed)
        return Subset(ids, cell.strategy, cell.fraction, seed, parent, data)
    if cell.strategy.startswith(PICKED):
        return _picked(study, cell, seed, ids, data)
    rule = cell.strategy if cell.strategy == "full" else study.selection(cell.strategy)
    features = None
    if rule == "full" or (rule.kind == "random" and not rule.balanced):  # these look at ids alone
        table = pd.DataFrame(index=pd.Index(ids, name="example_id"))
    else:
        table = open_datamap(study, images)
        parent = runs.read_evidence(study.upstream.runs / "datamap")["datamap_sha256"]
        if rule.kind in ("k_center", "herding", "d2"):
            features = teacher_features(study, images.train, table.index.to_numpy())
    asked = budget(len(ids), cell.fraction)
    ids = select(table, asked, rule, seed, features)
    if len(ids) != asked:  # a plan declares what it is given: this is where the fraction is held
        raise ValueError(
            f"{cell.strategy} chose {len(ids)} of {len(images.train_ids)} training images; a "
            f"fraction of {cell.fraction:g} is {asked}"
        )
    return Subset(ids, cell.strategy, cell.fraction, seed, parent, data)


def _picked(study: Study, cell: Cell, seed: int, ids: np.ndarray, data: str) -> Subset:
    """A selection made by hand: the same examples for every seed."""
    saved = Subset.load(study.picked(cell.strategy), data)
    strange = np.setdiff1d(saved.example_ids, ids)
    if len(strange) or budget(len(ids), cell.fraction) != len(saved):
        raise ValueError(
            f"{study.picked(cell.strategy)} has {len(saved)} examples, {len(strange)} of them no "
            f"training images of this study; expected {budget(len(ids), cell.fraction)} of "
            f"{len(ids)} (fraction {cell.fraction:g}): leave the fraction out, or pick again"
        )
    return Subset(saved.example_ids, cell.strategy, cell.fraction, seed, saved.parent, data)


def train_student(
    study: Study, images: Images, cell: Cell, seed: int, ranks: Ranks = ALONE
) -> dict[str, Any] | None:
    """Step 04: one student of one cell and seed.

    Returns: Its evidence, of this training or, when the run is finished, of the earlier one; None
        on all but the first of several processes.
    Raises: TripwireError when a tripwire fails; the run is then not finished.
    """
    device = use(study.compute, ranks)
    subset = make_subset(study, images, cell, seed)
    objective = study.objectives[cell.objective]
    card = stored = None
    inputs = images.fingerprints | {"subset": subset.sha256}
    if needs_teacher(objective):
        card, stored = _heard(study, images, objective, subset, seed, ranks)
        inputs["teacher_outputs"] = stored.fingerprint
    settings = {"own": student_settings(study, cell, seed), "inputs": inputs}
    folder = student_folder(study, cell, seed)
    if _launch(study, ranks, folder, settings, "distill", **dict(cell.items()), seed=seed):
        return runs.read_evidence(folder)
    with open_shared_run(study, folder, settings, ranks) as run:
        if run.finished:
            return runs.read_evidence(run.folder)
        if ranks.first:
            subset.save(run.folder / "subset.parquet")
        network = images.network(study.students[cell.student].model, derive(seed, "init"), device)
        n_shards = None
        if cell.strategy in ("random_shards", "random_shards_cut"):
            n_shards = shards_in_fraction(
                subset.example_ids, images.train.shard_size, cell.fraction
            )
        plan = plan_run(images, study.training, subset.example_ids, seed, n_shards)
        declared, exhibit = plan, cell.strategy in EXHIBITS
        if exhibit:
            plan = plan_run(images, study.training, subset.example_ids, seed, n_shards, biased=True)
        describe = f"{cell.strategy} {cell.fraction:g} {cell.objective}, seed {seed}"
        evidence = train_run(
            run, study, images, network, study.training, plan, objective, seed, describe, ranks,
            teacher=stored, card=card, declared=declared,
        )  # fmt: skip
        if evidence is None:
            return None
        evidence |= {
            "step": "distill",
            "study": study.name,
            "cell": dict(cell.items()),
            "data": images.fingerprints,
            "teacher": card,
            "exhibit": exhibit,
        }
        evidence["subset"] |= {
            "sha256": subset.sha256,
            "strategy": cell.strategy,
            "seed": seed,
            "parent_datamap": subset.parent,
        }
        judged = checks.as_exhibit if exhibit else checks.demand
        evidence["checks"] = judged(checks.STUDENT, evidence)
        return run.finish(evidence, device)


def _heard(
    study: Study, images: Images, objective: Objective, subset: Subset, seed: int, ranks: Ranks
) -> tuple[dict[str, Any], Cache]:
    """The teacher that a student of this subset and seed hears: its card and stored outputs."""
    name = objective.teacher
    if name is not None and study.teachers[name].learns_from == "subset":
        if ranks.first:
            _subset_teacher(study, images, name, subset, seed)
        wait(ranks)
        folder = _subset_teacher_folder(study, name, subset, seed)
        card = runs.read_evidence(folder)["teacher"]
    else:
        folder, card = teacher_folder(study, name), open_teacher(study, name)
    which = "train" if replay(study) is None else REPLAYED
    part = _part(study, "train")
    place = folder / f"outputs-{which}"
    return card, open_outputs(place, images.train, card["weights_sha256"], part)


def student_settings(study: Study, cell: Cell, seed: int) -> dict[str, Any]:
    """What the study asks of one student run."""
    return study.step_settings("distill", cell) | {"seed": seed}


def open_student(study: Study, cell: Cell, seed: int) -> dict[str, Any]:
    """The evidence of one student run.

    Raises: FileNotFoundError when it is not finished; ValueError when the study has been changed
        since it was made.
    """
    own = student_settings(study, cell, seed)
    return runs.read_evidence(student_folder(study, cell, seed), own)


def student_folder(study: Study, cell: Cell, seed: int) -> Path:
    """Where the run of one cell and seed is."""
    return study.runs / "distill" / cell.path / f"seed={seed}"


def probe_examples(images: Images) -> list[tuple[Cache, np.ndarray]]:
    """(cache, ids) of what a probe learns from, and of what it is tested on."""
    return [(images.train, images.train_ids), (images.test, np.arange(images.test.n_examples))]


def labelled_features(
    cache: Cache, ids: np.ndarray, values: np.ndarray, weights: str
) -> probe.Features:
    """Features with the labels, ids, split and weights they belong to."""
    return probe.Features(values, cache.read("labels", ids), ids, cache.header["split"], weights)
