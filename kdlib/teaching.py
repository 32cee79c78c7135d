"""Step 02: a study's teachers, loaded or trained, their dynamics, and their stored outputs.

Leaves to others: the training itself (experiment), the format of outputs (teacher).
"""

from pathlib import Path
from typing import Any

import numpy as np

from kdlib import checks, files, params, probe, runs
from kdlib.augment import Pixels
from kdlib.cache import Cache, CacheError
from kdlib.dataset import Images, probe_examples
from kdlib.dynamics import DynamicsLog
from kdlib.experiment import (
    CROSS_ENTROPY,
    launch_run,
    open_shared_run,
    plan_run,
    replay,
    train_run,
    use,
)
from kdlib.models import Network, Resized, build_network
from kdlib.objectives import teacher_columns
from kdlib.params import Objective, Study
from kdlib.pretrained import load_pretrained
from kdlib.ranks import Ranks, wait
from kdlib.sampling import Plan
from kdlib.seeds import derive
from kdlib.selection import Subset
from kdlib.teacher import open_outputs, store_outputs, stored_accuracy, verify_outputs
from kdlib.trainer import ALONE
from kdlib.weights import load_weights, weights_fingerprint

REPLAYED = "replayed"  # teacher outputs of the views that the students will see


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
    if launch_run(study, ranks, folder, settings, "teacher", **point):
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
        part=part or study.data.part_of(images.header["split"]),
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
            part = study.data.part_of("test" if which == "test" else "train")
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


def recorded_network(study: Study, images: Images, device: str) -> Network:
    """The network whose dynamics make the datamap, for its weights to be loaded into."""
    if study.dynamics.model is None:
        return teacher_network(study, images, device)
    return images.network(study.dynamics.model, derive(study.dynamics.seed, "init"), device)


def teacher_features(study: Study, cache: Cache, ids: np.ndarray) -> np.ndarray:
    """The teacher's stored features of some examples of one split, (n, D) float32."""
    teacher, split = open_teacher(study), cache.header["split"]
    folder = outputs_folder(study, split)
    stored = open_outputs(folder, cache, teacher["weights_sha256"], study.data.part_of(split))
    stored.verify()
    return stored.read("features", ids)[:, 0].astype(np.float32)


def open_heard(
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
    part = study.data.part_of("train")
    place = folder / f"outputs-{which}"
    return card, open_outputs(place, images.train, card["weights_sha256"], part)


def labelled_features(
    cache: Cache, ids: np.ndarray, values: np.ndarray, weights: str
) -> probe.Features:
    """Features with the labels, ids, split and weights they belong to."""
    return probe.Features(values, cache.read("labels", ids), ids, cache.header["split"], weights)
