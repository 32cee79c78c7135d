"""Step 04: the subset that a student is trained on, and its training."""

from typing import Any

import numpy as np
import pandas as pd

from kdlib.cartography.selection import select
from kdlib.cartography.subset import Subset
from kdlib.dataset.images import Images
from kdlib.dataset.plan import budget, fixed_shards, shards_in_fraction
from kdlib.models.base import Network
from kdlib.models.networks import network_for
from kdlib.repro import checks, files
from kdlib.repro.run import Run, read_evidence
from kdlib.repro.seeds import derive
from kdlib.steps.checkpoints import load_last
from kdlib.steps.datamap import open_datamap
from kdlib.steps.folders import axes_of, datamap_folder, student_folder, student_settings
from kdlib.steps.precision import decided
from kdlib.steps.processes import launch_run, open_shared_run, prepare_device
from kdlib.steps.teacher import open_stored_teacher
from kdlib.steps.teacher_network import begun_network, of_file
from kdlib.steps.teacher_outputs import teacher_features
from kdlib.steps.training import finish_run, train_run
from kdlib.study.cells import Cell
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import PICKED, SHARD_POLICIES
from kdlib.study.study import Study
from kdlib.trainer.distributed import this_process

MACRO = ("test_precision", "test_recall", "test_f1")  # averages over classes


def make_subset(study: Study, images: Images, cell: Cell, seed: int) -> Subset:
    """The training examples of one cell and seed; their number is the fraction of all.

    `fixed_shards` takes the fraction of the shards, whole, or the cell's number of them.
    `random_shards` takes all examples; each pass draws its shards.

    Raises: ValueError for more shards than there are.
    """
    ids, data, parent = images.train_ids, files.fingerprint(images.fingerprints), None
    if cell.strategy in SHARD_POLICIES:
        n = _n_shards(images, cell)
        if cell.strategy == "fixed_shards":
            ids = fixed_shards(ids, images.train.shard_size, n, seed)
        return Subset(ids, cell.strategy, axes_of(study, cell)["fraction"], seed, parent, data)
    if cell.strategy.startswith(PICKED):
        return _picked(study, cell, seed, ids, data)
    rule = cell.strategy if cell.strategy == "full" else study.selection(cell.strategy)
    features = None
    if not study.reads_datamap(cell.strategy):  # these look at ids alone
        table = pd.DataFrame(index=pd.Index(ids, name="example_id"))
    else:
        table = open_datamap(study, images, seed)
        parent = read_evidence(datamap_folder(study, seed))["datamap_sha256"]
        if rule.reads_features:
            features = teacher_features(study, images.train, table.index.to_numpy())
    asked = budget(len(ids), cell.fraction)
    ids = select(table, asked, rule, seed, features)
    if len(ids) != asked:  # a plan takes any number of ids: here they are held to the fraction
        raise ValueError(
            f"{cell.strategy} chose {len(ids)} of {len(images.train_ids)} training images; a "
            f"fraction of {cell.fraction:g} is {asked}"
        )
    return Subset(ids, cell.strategy, cell.fraction, seed, parent, data)


def _n_shards(images: Images, cell: Cell) -> int:
    """The shards of a cell: its number, or those in its fraction."""
    ids, size = images.train_ids, images.train.shard_size
    if cell.shards is None:
        return shards_in_fraction(ids, size, cell.fraction)
    if cell.shards > (n := len(np.unique(ids // size))):
        raise ValueError(
            f"{cell.strategy} asks for {cell.shards} of {n} shards with training images; expected "
            f"at most {n} (study: axes.shards)"
        )
    return cell.shards


def _picked(study: Study, cell: Cell, seed: int, ids: np.ndarray, data: str) -> Subset:
    """A selection saved in the explorer: the same examples for every seed."""
    saved = Subset.load(study.picked(cell.strategy), data)
    strange = np.setdiff1d(saved.example_ids, ids)
    if len(strange) or budget(len(ids), cell.fraction) != len(saved):
        raise ValueError(
            f"{study.picked(cell.strategy)} has {len(saved)} examples, {len(strange)} of them no "
            f"training images of this study; expected {budget(len(ids), cell.fraction)} of "
            f"{len(ids)} (fraction {cell.fraction:g}): leave the fraction out, or pick again"
        )
    return Subset(saved.example_ids, cell.strategy, cell.fraction, seed, saved.parent, data)


def train_student(study: Study, images: Images, cell: Cell, seed: int) -> dict[str, Any] | None:
    """Step 04: one student of one cell and seed.

    Returns: Its evidence, also of a run that is finished already; None on all but the first of
        several processes.
    Raises: CheckError when a check fails; the run is then not finished.
    """
    prepare_device(study.compute)
    subset = make_subset(study, images, cell, seed)
    objective, teacher = study.objectives[cell.objective], None
    fingerprints = images.fingerprints | {"subset": subset.sha256} | decided(study, images)
    fingerprints |= of_file(study.students[cell.student])
    if needs_teacher(objective):
        teacher = open_stored_teacher(study, images, objective, subset, seed)
        fingerprints["teacher_outputs"] = teacher.fingerprint
    settings = {"step": student_settings(study, cell, seed), "inputs": fingerprints}
    folder = student_folder(study, cell, seed)
    launch_run(study, folder, settings, "distill", **dict(cell.items()), seed=seed)
    world, n_shards = this_process(study.compute.device), None
    if cell.strategy == "random_shards":
        n_shards = _n_shards(images, cell)
    with open_shared_run(study, folder, settings, world) as run:
        if run.finished:
            if world.first:
                _renew(run, subset, teacher and teacher.card)
            return read_evidence(folder)
        if world.first:
            subset.save(folder / "subset.parquet")
        evidence = train_run(
            run,
            study,
            images,
            new_student(study, images, cell, seed),
            study.training,
            subset.example_ids,
            seed,
            f"{cell.strategy} {subset.fraction:g} {cell.objective}, seed {seed}",
            objective=objective,
            teacher=teacher,
            shards_per_pass=n_shards,
        )
        if evidence is None:
            return None
        evidence |= {"cell": dict(cell.items()), "teacher": teacher and teacher.card}
        evidence["subset"] |= {
            "sha256": subset.sha256,
            "strategy": cell.strategy,
            "seed": seed,
            "parent_datamap": subset.parent,
        }
        rules = checks.student_rules(study.data.labelled)
        return finish_run(run, study, images, "distill", evidence, rules)


def _renew(run: Run, subset: Subset, card: dict[str, Any] | None) -> None:
    """Name in a finished run's evidence the datamap and the teacher of now, where a datamap made
    anew chose the same examples, or a teacher made anew has the same outputs."""
    evidence = read_evidence(run.folder)
    named = evidence["subset"] | {"parent_datamap": subset.parent}
    if named == evidence["subset"] and card == evidence["teacher"]:
        return
    if named != evidence["subset"]:
        (run.folder / "subset.parquet").unlink()
        subset.save(run.folder / "subset.parquet")
    renewed = files.sealed(evidence | {"subset": named, "teacher": card})
    files.write_json(run.folder / "evidence.json", renewed)


def open_student(study: Study, cell: Cell, seed: int) -> dict[str, Any]:
    """The evidence of one student run.

    Raises: FileNotFoundError when it is not finished; ValueError when the study has changed since.
    """
    return read_evidence(student_folder(study, cell, seed), student_settings(study, cell, seed))


def outcome(evidence: dict[str, Any]) -> dict[str, Any]:
    """Accuracies, without labels validation losses, and budget of a finished student; the columns
    of every table of runs."""
    last, best = evidence["checkpoints"]["last"], evidence["checkpoints"]["best"]
    selection = evidence["selection"]  # no best epoch where the teacher learnt from these images
    chosen = selection["held_out"]["n"] > 0 and selection["teacher_overlap"] == 0
    if "validation_loss" in last:
        measured = {"validation_loss": last["validation_loss"]}
        measured |= {"validation_loss_best": best["validation_loss"]}
    else:
        measured = {"test_accuracy": last["test_accuracy"]}
        measured |= {"test_accuracy_best": best["test_accuracy"] if chosen else float("nan")}
    return measured | {
        "best_step": best["step"],
        **{key: last[key] for key in MACRO if key in last},  # since 2026-11, likewise the next
        **evidence.get("network", {}),
        **evidence["budget"]["recorded"],
    }


def run_table(study: Study, evidences: dict[tuple[Cell, int], dict[str, Any]]) -> pd.DataFrame:
    """One row per student, by cell and seed: axes, accuracies, budget, checks, folder."""
    rows = [
        axes_of(study, cell)
        | {"seed": seed}
        | outcome(evidence)
        | {"checks": sum(check["passed"] for check in evidence["checks"])}
        | {"weights_sha256": evidence["checkpoints"]["last"]["weights_sha256"]}
        | {"folder": str(student_folder(study, cell, seed))}
        for (cell, seed), evidence in evidences.items()
    ]
    return pd.DataFrame(rows)


def new_student(study: Study, images: Images, cell: Cell, seed: int) -> Network:
    """The network of a student with the weights from which its runs of a seed begin."""
    settings, device = study.students[cell.student], prepare_device(study.compute)
    network = network_for(images, settings.model, derive(seed, "init"), device)
    return begun_network(network, settings, images)


def student_network(study: Study, images: Images, cell: Cell, seed: int) -> Network:
    """The network of a finished student, with the weights of its last step, in evaluation mode.

    Raises: As `open_student`; ValueError for weights that were changed.
    """
    evidence, model = open_student(study, cell, seed), study.students[cell.student].model
    network = network_for(images, model, derive(seed, "init"), prepare_device(study.compute))
    load_last(network, student_folder(study, cell, seed), evidence)
    return network.eval()
