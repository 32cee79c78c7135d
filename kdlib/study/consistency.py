"""Whether the sections of a study fit each other."""

import itertools
import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kdlib.study.base import NAME, known
from kdlib.study.evaluation import OWN
from kdlib.study.models import StoredOutputs
from kdlib.study.objectives import RKD, Objective, Similarity, needs_teacher, why_labels
from kdlib.study.selections import PICKED, SHARD_POLICIES, STRATEGIES, Dynamics
from kdlib.study.training import Augment

if TYPE_CHECKING:
    from kdlib.study.study import Study


def check(study: "Study") -> None:
    """Compare every section with those it names.

    Raises: ValueError with the first thing that does not fit.
    """
    _check_names(study)
    if study.data.labelled:
        _check_teachers_accuracy(study)
    else:
        _check_unlabelled(study)
    if study.recorded_training is None:
        _check_unmapped(study)
    _check_shards(study)
    _check_probes(study)
    _check_teachers(study)
    _check_trainings(study)
    _check_recordings(study)
    _check_objectives(study)
    if study.compute.portable:
        _check_portable(study)


def check_strategy(name: str, selections: Iterable[str]) -> None:
    """Refuse a strategy that is neither built in, nor named by the study, nor picked by hand."""
    if not (name.startswith(PICKED) and re.fullmatch(NAME, name, re.ASCII)):
        known(name, (*STRATEGIES, *selections, f"{PICKED}<name>"), "strategy")


def _check_names(study: "Study") -> None:
    axes, probe, compare = study.axes, study.probe, study.compare
    compared = axes.objective[:1] if compare.objective is None else (compare.objective,)
    for name in study.selections:
        if name in STRATEGIES or name.startswith(PICKED):
            raise ValueError(f"selection {name!r} has the name of a built-in strategy")
    for name in axes.strategy:
        check_strategy(name, study.selections)
    for names, among, what in (
        (axes.student, study.students, "student on the axis"),
        (axes.objective, study.objectives, "objective"),
        ((compare.baseline,), axes.strategy, "baseline strategy"),
        (compared, axes.objective, "objective to compare with"),
        (probe.objective, axes.objective, "objective to probe"),
        (probe.strategy, ("full", *axes.strategy), "strategy to probe"),
    ):
        for name in names:
            known(name, among, what)


def _check_shards(study: "Study") -> None:
    """Numbers of shards that there are, where their number is known before the cache is built, and
    a baseline for cells of so many shards."""
    axes, data, compare = study.axes, study.data, study.compare
    if data.n_train is not None:
        (i, k), n = data.part_of("train"), math.ceil(data.n_train / data.shard_size)
        n = n * i // k - n * (i - 1) // k
        for asked in axes.shards or ():
            if asked > n:
                raise ValueError(
                    f"axes.shards asks for {asked} of {n} shards ({data.n_train:,} images, "
                    f"{data.shard_size:,} to a shard): expected at most {n}"
                )
    of_shards = set(itertools.product(axes.strategy, axes.shards or ()))
    for pair in compare.pairs or ():
        for cell in pair.cells:
            if cell not in of_shards:
                raise ValueError(
                    f"compare.pairs names {cell[0]} of {cell[1]} shards; expected a strategy of "
                    "axes.strategy and a number of axes.shards"
                )
    if axes.shards and not compare.pairs and compare.baseline not in ("full", *SHARD_POLICIES):
        raise ValueError(
            f"cells of so many shards are not compared with {compare.baseline}: give "
            f"compare.baseline: full, {' or '.join(SHARD_POLICIES)}, or compare.pairs"
        )


def _check_probes(study: "Study") -> None:
    probe, axes, measure = study.probe, study.axes, study.compare.measure
    for name in probe.strategy:
        if name.startswith(PICKED):
            raise ValueError(f"{name} has the fraction it was saved with and cannot be probed")
    if probe.fraction is None and axes.fraction is not None:
        raise ValueError("probe.fraction is missing; expected one of axes.fraction")
    for fraction in probe.fractions:
        if fraction not in (axes.fraction or ()):
            raise ValueError(f"probe.fraction is {fraction}; expected one of axes.fraction")
    if measure == "accuracy":
        if study.compare.on is not None:
            raise ValueError(
                "compare.on names data sets on which probes are compared: give measure: linear or "
                "knn, or leave it out"
            )
        return
    for name in study.compare.places:
        known(name, (OWN, *probe.others), "data set to compare on")
    lacking = {
        "strategy": {"full", *axes.strategy} - set(probe.strategy),
        "objective": set(axes.objective) - set(probe.objective),
        "fraction": set(axes.fraction or ()) - set(probe.fractions),
    }
    if lacking := {axis: sorted(values) for axis, values in lacking.items() if values}:
        raise ValueError(
            f"compare.measure is {measure}, but not every cell is probed: probe lacks {lacking}; "
            "add them, or compare accuracy"
        )


def _check_teachers(study: "Study") -> None:
    if study.teacher.of_subset:
        raise ValueError(
            "the study's teacher learns from all training images; one that learns from the "
            "subset stands under `teachers`"
        )
    for name, teacher in study.teachers.items():
        if teacher.outputs != StoredOutputs():
            raise ValueError(
                f"teacher {name} has `outputs`; those of `teacher` hold for all: students of "
                "one study see the same views"
            )
    everyone = (study.teacher, *study.teachers.values())
    learnt = any(teacher.trained_on == "train" for teacher in everyone)
    if learnt and (how := study.training.selects):
        raise ValueError(
            f"`{how}` reads the validation images, which the teacher has learnt from "
            "(trained_on: train): take another teacher, or a budget that does not read them"
        )


def _check_unmapped(study: "Study") -> None:
    """Without a recorded training there is no datamap; `full`, random subsets and shards need
    none."""
    why = "a loaded teacher has no recorded training: give `dynamics` a model and a training"
    if not study.data.labelled:
        why = "images without labels have none"
    for name in study.axes.strategy:
        if study.reads_datamap(name):
            raise ValueError(
                f"strategy {name} reads the datamap, and {why}; or take full, random, fixed_shards "
                "or random_shards"
            )
    if study.dynamics != Dynamics():
        raise ValueError(f"{why}; or leave `dynamics` out, as no strategy here reads the datamap")
    if study.recordings is not None and study.recordings.training is None:
        raise ValueError(f"`recordings` without a training repeat the recorded one, and {why}")


def _check_teachers_accuracy(study: "Study") -> None:
    for name, teacher in {"teacher": study.teacher, **study.teachers}.items():
        if teacher.expected_accuracy is None:
            raise ValueError(f"{name} has no `expected_accuracy`, which its outputs are held to")


def _check_unlabelled(study: "Study") -> None:
    """What needs labels, in a study whose images have none."""
    if study.data.n_validation == 0:
        raise ValueError(
            "a training without labels is followed by its loss on held-out images, and "
            "data.n_validation is 0: hold some out"
        )
    for settings, key in ((study.data, "test_folder"), (study.data.huggingface, "test_split")):
        if settings and getattr(settings, key) != type(settings).model_fields[key].default:
            raise ValueError(
                "images without labels have no test split; validation images are held out of the "
                f"training split: leave `{key}` out"
            )
    for name, objective in study.objectives.items():
        if why := why_labels(objective):
            raise ValueError(f"objective {name} needs labels, and the images have none: {why}")
    for name, student in study.students.items():
        if student.freeze is not None:
            raise ValueError(
                f"student {name} has `freeze: {student.freeze}`, and without labels there is no "
                "last layer to train: leave it out"
            )
    for name, teacher in {"teacher": study.teacher, **study.teachers}.items():
        for key, asked in (
            ("training", getattr(teacher, "training", None)),
            ("expected_accuracy", teacher.expected_accuracy),
            ("outputs.top_k", teacher.stored.top_k),
        ):
            if asked is not None:
                raise ValueError(
                    f"{name} has `{key}`, which is of labels, and the images have none: give a "
                    "teacher by `weights` or `pretrained`, and leave the key out"
                )
    sections = {"recordings": study.recordings, "audit": study.audit or None}
    sections["dynamics"] = None if study.dynamics == Dynamics() else study.dynamics
    for key, asked in sections.items():
        if asked is not None:
            raise ValueError(f"`{key}` trains with labels, and the images have none: leave it out")
    if study.compare.measure == "accuracy" or OWN in study.compare.places:
        raise ValueError(
            "the images have no labels, by which students could be compared: name labelled data "
            "sets under probe.others, and write compare: {measure: linear, on: [...]}"
        )


def _check_trainings(study: "Study") -> None:
    for training in study.trainings:
        pieces = training.accumulate * study.compute.processes
        if training.batch_size % pieces:
            raise ValueError(
                f"batch_size {training.batch_size} cannot be split among "
                f"{study.compute.processes} processes, each in {training.accumulate} pieces; "
                f"expected a multiple of {pieces}"
            )
    further = [study.recordings.training] if study.recordings else []
    for training in filter(None, (*study.trainings, *further)):
        if study.data.n_validation == 0 and (how := training.selects):
            raise ValueError(
                f"`{how}` reads validation images, and data.n_validation is 0: hold some out, or "
                "take a budget and a schedule that do not read them"
            )
    recorded = study.recorded_training
    if recorded is not None and recorded.early_stopping is not None:
        raise ValueError(
            "`early_stopping` is for students: every epoch of the recorded training is planned"
        )


def _check_recordings(study: "Study") -> None:
    if not study.dynamics.per_seed or study.shares is not None:  # else they are the other study's
        return
    recorded = study.recordings.seeds if study.recordings else ()
    if lacking := sorted(set(study.seeds) - set(recorded)):
        raise ValueError(
            f"dynamics.per_seed needs a recording of each seed, and there is none of {lacking}: "
            f"give `recordings` a model and `seeds: {list(study.seeds)}`"
        )
    epochs = (study.recordings.training or study.recorded_training).epochs  # None: of steps
    read = max(study.dynamics.el2n_epoch, study.dynamics.window)
    if epochs is not None and epochs < read:
        raise ValueError(
            f"dynamics.per_seed reads {read} epochs of each recording (el2n_epoch, window), and "
            f"recordings.training has {epochs:g}: lower the first two, or raise the last"
        )


def _check_objectives(study: "Study") -> None:
    augmented = study.training.augment != Augment()
    frozen = [name for name in study.axes.student if study.students[name].freeze]
    for name, objective in study.objectives.items():
        if objective.teacher is not None:
            if not needs_teacher(objective):
                raise ValueError(
                    f"objective {name} uses no teacher: remove `teacher: {objective.teacher}`"
                )
            known(objective.teacher, study.teachers, f"teacher of objective {name}")
        if frozen and name in study.axes.objective and objective.teacher_features is not None:
            raise ValueError(
                f"objective {name} compares features, and those of student {frozen[0]} do not "
                "change (freeze: backbone): leave one of the two out"
            )
        stored = study.teacher.stored
        # grids cannot be augmented afterwards
        clean = stored.views is None and not study.teacher.live
        if objective.compares_grids and augmented and clean:
            raise ValueError(
                f"objective {name} compares grids of features, and the flipped grid is not that of "
                "the flipped image: give teacher.outputs.views, which the students then see, or "
                "teacher.outputs: live, or no training.augment"
            )
        if isinstance(objective, Similarity) and stored.grid is not None:
            raise ValueError(
                f"objective {name} compares whole grids, and resized ones have other similarities: "
                "leave teacher.outputs.grid out"
            )
        if objective.compares_views and not augmented:
            raise ValueError(
                f"objective {name} compares two views of each image: give training.augment"
            )


def _check_portable(study: "Study") -> None:
    """torch leaves square roots and logarithms of whole tensors to a library of a maker of
    processors, whose last bits differ on another one."""
    asked = {
        "optimiser: adam or adamw": any(t.optimiser != "sgd" for t in study.trainings),
        "outputs: top_k": study.teacher.stored.top_k is not None,
        **{f"objective {name}": _takes_roots(o) for name, o in study.objectives.items()},
    }
    for what, is_asked in asked.items():
        if is_asked:
            raise ValueError(
                f"compute.portable: true cannot be kept with {what}: it takes square roots or "
                "logarithms that differ between processors; leave one of them out"
            )


def _takes_roots(objective: Objective) -> bool:
    """Of distances, of variances of logits, or of those of Barlow's embeddings."""
    standardised = getattr(objective, "standardise", False) or objective.compares_views
    return standardised or isinstance(objective, RKD)
