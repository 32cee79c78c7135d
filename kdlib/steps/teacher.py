"""Step 02: a study's teachers, loaded or trained, their dynamics, and their stored outputs.

Leaves to others: the training itself (experiment), the format of outputs (teacher).
"""

from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.cache.outputs import open_outputs
from kdlib.cache.shards import Cache
from kdlib.cartography.log import begin_log
from kdlib.cartography.subset import Subset
from kdlib.dataset.images import Images
from kdlib.models.base import Network
from kdlib.models.weights import load_weights
from kdlib.repro import checks, files
from kdlib.repro.run import Run, open_run, read_evidence
from kdlib.repro.seeds import derive
from kdlib.steps.teacher_network import (
    _teacher,
    _weights_file,
    keep_epoch,
    recorded_network,
    teacher_folder,
    teacher_network,
)
from kdlib.steps.teacher_outputs import REPLAYED, _restore_outputs, _store_all, open_teacher
from kdlib.steps.training import (
    CROSS_ENTROPY,
    launch_run,
    open_shared_run,
    plan_run,
    replay,
    train_run,
    use,
)
from kdlib.study.models import LoadedTeacher, TrainedTeacher
from kdlib.study.objectives import Objective
from kdlib.study.study import Study
from kdlib.study.training import Training
from kdlib.trainer.distributed import World, this_process, wait


def make_teacher(study: Study, images: Images) -> dict[str, Any] | None:
    """Step 02: train or load the teacher, record training dynamics, store its outputs; then the
    study's further teachers, but for those that learn from a subset alone.

    Returns: The study's teacher's evidence; None on all but the first of several processes.
    Raises: TripwireError when one does not reach the accuracy on its card, among others.
    """
    evidence = make_one_teacher(study.upstream, images, None)
    for name in further_teachers(study):
        make_one_teacher(study, images, name)
    return evidence


def further_teachers(study: Study) -> list[str]:
    """Names of the further teachers that step 02 makes."""
    return [name for name, teacher in study.teachers.items() if not teacher.of_subset]


def teacher_table(study: Study) -> pd.DataFrame:
    """One row per teacher that step 02 made: its accuracy on the test images beside the expected
    one, what it has learnt from, how many checks passed, and its folder."""
    rows = []
    for name in (None, *further_teachers(study)):
        folder = teacher_folder(study, name)
        evidence = read_evidence(folder)
        card, checked = evidence["teacher"], evidence["checks"]
        rows.append(
            {"teacher": card["name"], "accuracy": card["measured"], "expected": card["claimed"],
             "tolerance": card["tolerance"], "measured_by": card["measured_by"],
             "trained_on": card["trained_on"], "checks": sum(c["passed"] for c in checked),
             "folder": str(folder)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def make_one_teacher(study: Study, images: Images, name: str | None) -> dict[str, Any] | None:
    """The teacher of the study (`name` None), or one of its further ones; as `make_teacher`."""
    device, teacher = use(study.compute), _teacher(study, name)
    folder = teacher_folder(study, name)
    settings = {"step": study.step_settings("teacher", teacher=name), "inputs": images.fingerprints}
    if isinstance(teacher, LoadedTeacher):
        settings["inputs"]["weights_file"] = files.sha256_file(_weights_file(teacher.weights))
    point = {} if name is None else {"teacher": name}
    if launch_run(study, folder, settings, "teacher", **point):
        return read_evidence(folder)
    if name is None and study.dynamics.model is not None:
        _record_dynamics(study, images, device)
    with open_shared_run(study, folder, settings) as run:
        if run.finished:
            evidence = read_evidence(run.folder)
            if this_process(study.compute.device).first:
                _restore_outputs(study, images, name, run.folder, evidence, device)
            return evidence
        network = teacher_network(study, images, device, name)
        evidence = {"step": "teacher", "study": study.name, "data": images.fingerprints}
        tripwires = checks.TEACHER
        if isinstance(teacher, TrainedTeacher):
            recorded = name is None and study.dynamics.model is None
            trained = _supervise(
                run, study, images, network, teacher.training, teacher.seed, recorded, "teacher"
            )  # fmt: skip
            if trained is None:
                return None
            evidence |= trained
            tripwires = (*checks.RUN, *checks.TEACHER)
            load_weights(network, run.folder / trained["checkpoints"]["last"]["file"])
        elif not this_process(study.compute.device).first:
            return None
        evidence["teacher"] = _store_all(study, images, network, name, run.folder, device)
        evidence["checks"] = checks.demand(tripwires, evidence)
        return run.finish(evidence, device)


def _subset_teacher(study: Study, images: Images, name: str, subset: Subset, seed: int) -> None:
    """Train a teacher that learns from one subset alone, with draws of its own for each seed of the
    students, and store its outputs, unless it is there already."""
    device, teacher = use(study.compute), study.teachers[name]
    own = study.step_settings("teacher", teacher=name) | {"seed": seed}
    settings = {"step": own, "inputs": images.fingerprints | {"subset": subset.sha256}}
    requested = derive(seed, "teacher")  # its student draws from `seed` itself
    folder = _subset_teacher_folder(study, name, subset, seed)
    with open_run(study.runs, folder, settings) as run:
        if run.finished:
            evidence = read_evidence(folder)
            _restore_outputs(study, images, name, folder, evidence, device)
            return
        network = teacher_network(study, images, device, name, requested)
        plan = plan_run(images, teacher.training, subset.example_ids, requested)
        describe = f"teacher {name} of {subset.strategy} {subset.fraction:g}, seed {seed}"
        trained = train_run(
            run, study, images, network, teacher.training, plan, CROSS_ENTROPY, requested,
            describe, World(device=device),
        )  # fmt: skip
        evidence = {"step": "teacher", "study": study.name, "data": images.fingerprints} | trained
        evidence["subset"] |= {"sha256": subset.sha256, "strategy": subset.strategy}
        load_weights(network, run.folder / trained["checkpoints"]["last"]["file"])
        evidence["teacher"] = _store_all(study, images, network, name, run.folder, device)
        evidence["checks"] = checks.demand((*checks.RUN, *checks.TEACHER), evidence)
        run.finish(evidence, device)


def _subset_teacher_folder(study: Study, name: str, subset: Subset, seed: int) -> Path:
    return teacher_folder(study, name) / f"subset={subset.sha256[:16]}" / f"seed={seed}"


def _record_dynamics(study: Study, images: Images, device: str) -> None:
    """Train the network whose dynamics make the datamap, when it is not the teacher."""
    dynamics = study.dynamics
    own = {k: study.step_settings("teacher")[k] for k in ("dynamics", "compute")}
    settings = {"step": own, "inputs": images.fingerprints}
    with open_shared_run(study, study.recorded_run, settings) as run:
        if run.finished:
            return
        network = recorded_network(study, images, device)
        evidence = {"step": "dynamics", "study": study.name, "data": images.fingerprints}
        trained = _supervise(
            run, study, images, network, dynamics.training, dynamics.seed, True, "dynamics"
        )
        if trained is None:
            return
        evidence |= trained
        evidence["checks"] = checks.demand(checks.RUN, evidence)
        run.finish(evidence, device)


def _supervise(
    run: Run,
    study: Study,
    images: Images,
    network: Network,
    training: Training,
    seed: int,
    recorded: bool,
    describe: str,
) -> dict[str, Any] | None:
    """Train on all training images with labels alone, recording dynamics when asked to."""
    plan = plan_run(images, training, images.train_ids, seed)
    world = this_process(study.compute.device)
    if recorded:
        training = keep_epoch(training, plan, study.dynamics.gradient_epoch)
    log = None
    if recorded and world.first:
        log = begin_log(
            run.folder / "dynamics",
            images,
            plan,
            observed=study.dynamics.observed,
            logits=study.dynamics.logits,
            settings=run.settings_sha256,
        )
    evidence = train_run(
        run, study, images, network, training, plan, CROSS_ENTROPY, seed, describe, world, log=log
    )
    if log is not None:
        log.finish()
    return evidence


def open_heard(
    study: Study, images: Images, objective: Objective, subset: Subset, seed: int
) -> tuple[dict[str, Any], Cache]:
    """The teacher that a student of this subset and seed hears: its card and stored outputs."""
    name = objective.teacher
    if name is not None and study.teachers[name].of_subset:
        world = this_process(study.compute.device)
        if world.first:
            _subset_teacher(study, images, name, subset, seed)
        wait(world)
        folder = _subset_teacher_folder(study, name, subset, seed)
        card = read_evidence(folder)["teacher"]
    else:
        folder, card = teacher_folder(study, name), open_teacher(study, name)
    which = "train" if replay(study) is None else REPLAYED
    part = study.data.part_of("train")
    place = folder / f"outputs-{which}"
    return card, open_outputs(place, images.train, card["weights_sha256"], part)
