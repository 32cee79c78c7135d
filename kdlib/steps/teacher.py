"""Step 02: a study's teachers, loaded or trained, their training dynamics, and their stored
outputs."""

from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.cache.outputs import open_outputs
from kdlib.cartography.log import begin_log
from kdlib.cartography.subset import Subset
from kdlib.dataset.images import Images
from kdlib.models.base import Network
from kdlib.models.weights import load_weights
from kdlib.repro import checks, files
from kdlib.repro.run import Run, open_run, read_evidence
from kdlib.repro.seeds import derive
from kdlib.steps.checkpoints import keep_epoch
from kdlib.steps.processes import launch_run, open_shared_run, prepare_device
from kdlib.steps.teacher_network import (
    recorded_network,
    teacher_folder,
    teacher_network,
    teacher_settings,
    weights_file,
)
from kdlib.steps.teacher_outputs import (
    REPLAYED,
    open_teacher,
    restore_outputs,
    store_all_outputs,
)
from kdlib.steps.training import (
    StoredTeacher,
    TrainingInputs,
    finish_run,
    plan_run,
    replay,
    train_run,
)
from kdlib.study.models import LoadedTeacher, TrainedTeacher
from kdlib.study.objectives import Objective
from kdlib.study.study import Study
from kdlib.study.training import Training
from kdlib.trainer.distributed import World, this_process, wait


def make_teacher(study: Study, images: Images) -> dict[str, Any] | None:
    """Step 02: train or load the teacher, record training dynamics, store its outputs; then the
    same for the study's further teachers, except those that are trained on a student's subset.

    Returns: The evidence of the study's teacher; None on all but the first of several processes.
    Raises: CheckError when a check fails: a teacher misses its expected accuracy, for example.
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
    one, what it was trained on, how many checks passed, and its folder."""
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
    device, teacher = prepare_device(study.compute), teacher_settings(study, name)
    folder = teacher_folder(study, name)
    settings = {"step": study.step_settings("teacher", teacher=name), "inputs": images.fingerprints}
    if isinstance(teacher, LoadedTeacher):
        settings["inputs"]["weights_file"] = files.sha256_file(weights_file(teacher.weights))
    point = {} if name is None else {"teacher": name}
    if launch_run(study, folder, settings, "teacher", **point):
        return read_evidence(folder)
    if name is None and study.dynamics.model is not None:
        _record_dynamics(study, images, device)
    first = this_process(study.compute.device).first
    with open_shared_run(study, folder, settings) as run:
        if run.finished:
            evidence = read_evidence(run.folder)
            if first:
                restore_outputs(study, images, name, run.folder, evidence, device)
            return evidence
        network, evidence = teacher_network(study, images, device, name), {}
        if isinstance(teacher, TrainedTeacher):
            recorded = name is None and study.dynamics.model is None
            evidence = _supervise(
                run, study, images, network, teacher.training, teacher.seed, recorded, "teacher"
            )
        return _finish_teacher(run, study, images, network, name, evidence) if first else None


def _finish_teacher(
    run: Run,
    study: Study,
    images: Images,
    network: Network,
    name: str | None,
    evidence: dict[str, Any],
) -> dict[str, Any]:
    """Store the outputs of a teacher and finish its run; `evidence` is empty for one that was not
    trained here."""
    rules, device = checks.TEACHER, this_process(study.compute.device).device
    if evidence:
        load_weights(network, run.folder / evidence["checkpoints"]["last"]["file"])
        rules = (*checks.RUN, *rules)
    evidence["teacher"] = store_all_outputs(study, images, network, name, run.folder, device)
    return finish_run(run, study, images, "teacher", evidence, rules)


def _make_subset_teacher(
    study: Study, images: Images, name: str, subset: Subset, seed: int
) -> None:
    """Train a teacher on the subset of a student, with random streams of its seed, and store its
    outputs, unless its run is finished."""
    device, training = prepare_device(study.compute), study.teachers[name].training
    asked = study.step_settings("teacher", teacher=name) | {"seed": seed}
    settings = {"step": asked, "inputs": images.fingerprints | {"subset": subset.sha256}}
    folder, teacher_seed = _subset_folder(study, name, subset, seed), derive(seed, "teacher")
    with open_run(study.runs, folder, settings) as run:
        if run.finished:
            restore_outputs(study, images, name, folder, read_evidence(folder), device)
            return
        inputs = TrainingInputs(
            images=images,
            network=teacher_network(study, images, device, name, teacher_seed),
            training=training,
            plan=plan_run(images, training, subset.example_ids, teacher_seed),
            seed=teacher_seed,
            observed=study.dynamics.observed,
            compute=study.compute,
            world=World(device=device),  # the other processes wait
        )
        describe = f"teacher {name} of {subset.strategy} {subset.fraction:g}, seed {seed}"
        evidence = train_run(run, inputs, describe, study.tracking)
        evidence["subset"] |= {"sha256": subset.sha256, "strategy": subset.strategy}
        _finish_teacher(run, study, images, inputs.network, name, evidence)


def _subset_folder(study: Study, name: str, subset: Subset, seed: int) -> Path:
    return teacher_folder(study, name) / f"subset={subset.sha256[:16]}" / f"seed={seed}"


def _record_dynamics(study: Study, images: Images, device: str) -> None:
    """Train the network whose dynamics make the datamap, when it is not the teacher."""
    dynamics = study.dynamics
    asked = {key: study.step_settings("teacher")[key] for key in ("dynamics", "compute")}
    settings = {"step": asked, "inputs": images.fingerprints}
    with open_shared_run(study, study.recorded_run, settings) as run:
        if run.finished:
            return
        network = recorded_network(study, images, device)
        evidence = _supervise(
            run, study, images, network, dynamics.training, dynamics.seed, True, "dynamics"
        )
        if evidence is not None:
            finish_run(run, study, images, "dynamics", evidence, checks.RUN)


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
    """Train on all training images with labels only; record the dynamics where `recorded`."""
    plan = plan_run(images, training, images.train_ids, seed)
    world, log = this_process(study.compute.device), None
    if recorded:
        training = keep_epoch(training, plan, study.dynamics.gradient_epoch)
    if recorded and world.first:
        log = begin_log(
            run.folder / "dynamics",
            images,
            plan,
            observed=study.dynamics.observed,
            logits=study.dynamics.logits,
            settings=run.settings_sha256,
        )
    inputs = TrainingInputs(
        images, network, training, plan, seed, log=log,
        observed=study.dynamics.observed, compute=study.compute, world=world,
    )  # fmt: skip
    evidence = train_run(run, inputs, describe, study.tracking)
    if log is not None:
        log.finish()
    return evidence


def open_stored_teacher(
    study: Study, images: Images, objective: Objective, subset: Subset, seed: int
) -> StoredTeacher:
    """The teacher of a student with this objective, subset and seed; one that is trained on the
    subset is made here."""
    name = objective.teacher
    if name is not None and study.teachers[name].of_subset:
        world = this_process(study.compute.device)
        if world.first:
            _make_subset_teacher(study, images, name, subset, seed)
        wait(world)
        folder = _subset_folder(study, name, subset, seed)
        card = read_evidence(folder)["teacher"]
    else:
        folder, card = teacher_folder(study, name), open_teacher(study, name)
    views, part = replay(study), study.data.part_of("train")
    place = folder / f"outputs-{'train' if views is None else REPLAYED}"
    outputs = open_outputs(place, images.train, card["weights_sha256"], part)
    return StoredTeacher(outputs, card, views)
