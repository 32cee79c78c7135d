"""Step 02: a study's teachers, loaded or trained, their training dynamics, and their stored
outputs."""

from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.cache.outputs import open_outputs
from kdlib.cartography.subset import Subset
from kdlib.dataset.images import Images
from kdlib.models.base import Network, Origin
from kdlib.models.networks import network_for
from kdlib.models.size import network_size
from kdlib.repro import checks
from kdlib.repro.run import read_evidence
from kdlib.repro.seeds import derive
from kdlib.steps.checkpoints import load_last
from kdlib.steps.folders import dynamics_settings, teacher_folder
from kdlib.steps.output_costs import demand_room
from kdlib.steps.precision import decided
from kdlib.steps.processes import launch_run, open_shared_run, prepare_device
from kdlib.steps.teacher_network import (
    begun_network,
    load_teacher,
    of_file,
    recorded_network,
    teacher_network,
    teacher_pixels,
    teacher_settings,
)
from kdlib.steps.teacher_outputs import (
    REPLAYED,
    demand_grids,
    open_teacher,
    restore_outputs,
    store_all_outputs,
)
from kdlib.steps.training import LiveTeacher, StoredTeacher, finish_run, replay, train_run
from kdlib.study.models import TrainedTeacher
from kdlib.study.objectives import Objective
from kdlib.study.study import Study
from kdlib.trainer.distributed import World, this_process, wait


def make_teacher(study: Study, images: Images) -> dict[str, Any] | None:
    """Step 02: train or load the teacher, record training dynamics, store its outputs; then the
    same for the study's further teachers, except those that are trained on a student's subset.

    Returns: The evidence of the study's teacher; None on all but the first of several processes.
    Raises: CheckError when a check fails: a teacher misses its expected accuracy, for example;
        what `kdlib.models.origins.begin` raises for weights from which a student cannot begin.
    """
    for name in study.axes.student:  # what cannot begin is refused before hours of training
        settings = study.students[name]
        if settings.is_given:
            begun_network(network_for(images, settings.model, 0, "cpu"), settings, images)
    evidence = make_one_teacher(study.upstream, images, None)
    for name in study.shared_teachers[1:]:
        make_one_teacher(study, images, name)
    return evidence


def teacher_table(study: Study) -> pd.DataFrame:
    """One row per teacher that step 02 made: its accuracy on the test images beside the expected
    one, what it was trained on, its size and cost, how many checks passed, and its folder."""
    rows = []
    for name in study.shared_teachers:
        folder = teacher_folder(study, name)
        evidence = read_evidence(folder)
        card, checked = evidence["teacher"], evidence["checks"]
        origin = evidence.get("initialisation", {}).get("origin", Origin().name)
        begun = {} if origin == Origin().name else {"begun_from": origin}
        rows.append(
            {"teacher": card["name"], "accuracy": card["measured"], "expected": card["claimed"],
             "tolerance": card["tolerance"], "measured_by": card["measured_by"],
             "trained_on": card["trained_on"], **begun, **evidence.get("network", {}),
             "checks": sum(c["passed"] for c in checked), "folder": str(folder)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def make_one_teacher(study: Study, images: Images, name: str | None) -> dict[str, Any] | None:
    """The teacher of the study (`name` None), or one of its further ones; as `make_teacher`."""
    prepare_device(study.compute)
    demand_grids(study, images, name)
    teacher, folder = teacher_settings(study, name), teacher_folder(study, name)
    settings = {"step": study.step_settings("teacher", teacher=name)}
    settings["inputs"] = images.fingerprints | of_file(teacher)
    if isinstance(teacher, TrainedTeacher):
        settings["inputs"] |= decided(study, images)
    point = {} if name is None else {"teacher": name}
    launch_run(study, folder, settings, "teacher", **point)
    if name is None and study.dynamics.model is not None:
        _record_dynamics(study, images)
    return _make(study, images, name, folder, settings)


def _make(
    study: Study,
    images: Images,
    name: str | None,
    folder: Path,
    settings: dict[str, Any],
    subset: Subset | None = None,
    seed: int = 0,
) -> dict[str, Any] | None:
    """A teacher whose training, if it has one, and outputs are a run with these settings.

    Args:
        subset: Of a student with this seed, to train the teacher on, with random streams of that
            seed, by this process alone.
    """
    teacher, world = teacher_settings(study, name), this_process(study.compute.device)
    device, own_seed, describe = world.device, None, "teacher"
    rules = checks.TEACHER if study.data.labelled else ()  # its outputs are verified as stored
    if subset is not None:
        own_seed, world = derive(seed, "teacher"), World(device=device)  # the others wait
        describe = f"teacher {name} of {subset.strategy} {subset.fraction:g}, seed {seed}"
    with open_shared_run(study, folder, settings, world) as run:
        if run.finished:
            evidence = read_evidence(folder)
            if world.first:
                restore_outputs(study, images, name, folder, evidence, device)
            return evidence
        network, evidence = teacher_network(study, images, device, name, own_seed), {}
        if world.first:
            demand_room(study, images, network, name, folder)
        if isinstance(teacher, TrainedTeacher):
            begun_network(network, teacher, images)
            recorded = name is None and study.dynamics.model is None
            evidence = train_run(
                run,
                study,
                images,
                network,
                teacher.training,
                images.train_ids if subset is None else subset.example_ids,
                teacher.seed if own_seed is None else own_seed,
                describe,
                dynamics=study.dynamics if recorded else None,
                world=world,
            )
            rules = (*checks.RUN, *rules)
        if not world.first:
            return None
        if evidence:
            load_last(network, folder, evidence)
        if subset is not None:
            evidence["subset"] |= {"sha256": subset.sha256, "strategy": subset.strategy}
        if "network" not in evidence:  # of one that was not trained here
            evidence["network"] = network_size(network, images.image_shape)
        evidence["teacher"] = store_all_outputs(study, images, network, name, folder, device)
        return finish_run(run, study, images, "teacher", evidence, rules)


def _record_dynamics(study: Study, images: Images) -> None:
    """Train the network whose dynamics make the datamap, when it is not the teacher."""
    dynamics, world = study.dynamics, this_process(study.compute.device)
    inputs = images.fingerprints | decided(study, images)
    settings = {"step": dynamics_settings(study), "inputs": inputs}
    with open_shared_run(study, study.recorded_run, settings, world) as run:
        if run.finished:
            return
        network = recorded_network(study, images, world.device)
        evidence = train_run(
            run, study, images, network, dynamics.training, images.train_ids, dynamics.seed,
            "dynamics", dynamics=dynamics,
        )  # fmt: skip
        if evidence is not None:
            finish_run(run, study, images, "dynamics", evidence, checks.RUN)


def open_stored_teacher(
    study: Study, images: Images, objective: Objective, subset: Subset, seed: int
) -> StoredTeacher:
    """The teacher of a student with this objective, subset and seed; one that is trained on the
    subset is made here."""
    name = objective.teacher
    demand_grids(study, images, name)  # a study that shares its teacher has students of its own
    folder = teacher_folder(study, name)
    if name not in study.shared_teachers:
        folder = folder / f"subset={subset.sha256[:16]}" / f"seed={seed}"
        asked = study.step_settings("teacher", teacher=name) | {"seed": seed}
        inputs = images.fingerprints | {"subset": subset.sha256} | decided(study, images)
        settings = {"step": asked, "inputs": inputs | of_file(teacher_settings(study, name))}
        world = this_process(study.compute.device)
        if world.first:
            _make(study, images, name, folder, settings, subset, seed)
        wait(world)
        card = read_evidence(folder)["teacher"]
    else:
        card = open_teacher(study, name)
    views, part = replay(study), study.data.part_of("train")
    place = folder / f"outputs-{'train' if views is None else REPLAYED}"
    outputs = open_outputs(place, images.train, card["weights_sha256"], part)
    if not study.teacher.live:
        return StoredTeacher(outputs, card, views)
    owner = study.upstream if name is None else study
    device = this_process(study.compute.device).device

    def load() -> Network:
        return load_teacher(owner, images, device, folder, read_evidence(folder), name)

    return LiveTeacher(outputs, card, load=load, pixels=teacher_pixels(owner, images, name))
