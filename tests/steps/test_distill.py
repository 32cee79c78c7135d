"""Subsets and students: what they learn from, every objective, and saved selections."""

import json
import shutil

import numpy as np
import pytest
from tiny import first_run, tiny_study

from kdlib.cartography.subset import Subset
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps import datamap, distill, teacher, teacher_outputs, training
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.compare import compile_tables
from kdlib.steps.probe import probe_cell


def test_finished_runs_are_read_and_not_made_again(lab, monkeypatch):
    study = tiny_study(lab)
    monkeypatch.setattr(training, "train", None)
    monkeypatch.setattr(datamap, "compute_datamap", None)
    monkeypatch.setattr(teacher_outputs, "store_outputs", None)
    images = cache_images(study)
    teacher.make_teacher(study, images)
    datamap.make_datamap(study, images)
    for cell in study.cells():
        distill.train_student(study, images, cell, 0)
    assert len(probe_cell(study, images, study.probed_cells()[0])) > 0


def test_a_changed_training_makes_new_students_and_keeps_teacher_and_old_runs(lab, monkeypatch):
    study = tiny_study(lab, training__lr_peak=0.05)
    monkeypatch.setattr(teacher_outputs, "store_outputs", None)  # a new teacher would need it
    images = open_images(study)
    teacher.make_teacher(study, images)
    distill.train_student(study, images, study.cells()[0], 0)
    evidence = read_evidence(first_run(study))
    assert len(list((study.runs / "archive").glob("*/distill/**/evidence.json"))) == 1
    assert evidence["settings_sha256"] != json.loads(
        next((study.runs / "archive").glob("*/distill/**/evidence.json")).read_text()
    )["settings_sha256"]  # fmt: skip


def test_paired_seeds_share_initial_weights_across_cells_and_subsets_across_objectives(lab):
    study = tiny_study(lab)
    by_cell = {
        (c.strategy, c.objective): [distill.open_student(study, c, seed) for seed in (0, 1)]
        for c in study.cells()
    }
    initial = {
        tuple(run["initialisation"]["weights_sha256"] for run in found)
        for found in by_cell.values()
    }
    assert len(initial) == 1
    assert len(set(initial.pop())) == 2
    subsets = {key: [run["subset"]["sha256"] for run in found] for key, found in by_cell.items()}
    assert subsets["random", "kd"] == subsets["random", "plain"]
    assert len(set(subsets["random", "kd"])) == 2
    assert len(set(subsets["easy", "kd"])) == 1


def test_a_saved_subset_is_what_the_student_was_trained_on(lab):
    study = tiny_study(lab)
    folder = distill.student_folder(study, study.cell(strategy="easy"), 0)
    subset = Subset.load(folder / "subset.parquet")
    evidence = read_evidence(folder)
    assert subset.sha256 == evidence["subset"]["sha256"]
    assert len(subset.example_ids) == evidence["budget"]["recorded"]["unique_examples"] == 363
    images = open_images(study)
    assert not set(subset.example_ids) & set(images.validation_ids)


def test_a_selection_of_another_size_than_its_fraction_is_refused(lab, monkeypatch):
    study = tiny_study(lab)
    images = open_images(study)
    monkeypatch.setattr(distill, "select", lambda table, *_: table.index.to_numpy())
    with pytest.raises(ValueError, match=r"easy chose 1100 of 1100.*; a fraction of 0.33 is 363"):
        distill.make_subset(study, images, study.cell(strategy="easy"), 0)


def _picked(study, images, ids, name="mine"):
    """Save a selection as the explorer does."""
    data = files.fingerprint(images.fingerprints)
    parent = read_evidence(study.runs / "datamap")["datamap_sha256"]
    fraction = len(ids) / len(images.train_ids)
    subset = Subset(np.sort(ids), f"picked_{name}", fraction, 0, parent, data)
    subset.save(study.runs / "selections" / f"{name}.parquet")
    return subset


def test_a_selection_made_by_hand_is_trained_on_and_compared_with_a_random_one_of_its_size(lab):
    study = tiny_study(lab)
    images = open_images(study)
    subset = _picked(study, images, images.train_ids[5:102:2])
    study = tiny_study(lab, axes__strategy=["random", "easy", "picked_mine"])
    cells = [c for c in study.cells() if c.fraction == subset.fraction]
    assert {c.strategy for c in cells} == {"random", "picked_mine"}
    for cell in cells:
        for seed in study.seeds:
            evidence = distill.train_student(study, images, cell, seed)
            assert evidence["subset"]["n_examples"] == 49
    picked = distill.open_student(study, study.cell(strategy="picked_mine"), 0)
    assert picked["subset"]["sha256"] == subset.sha256
    assert picked["subset"]["parent_datamap"] == subset.parent
    compared = compile_tables(study)["strategies"]
    [row] = compared.query("strategy == 'picked_mine' and objective == 'kd'").to_dict("records")
    assert (row["against_strategy"], row["n_seeds"]) == ("random", 2)


def test_a_selection_of_other_images_or_with_held_out_ones_is_refused(lab):
    study = tiny_study(lab)
    images = open_images(study)
    _picked(study, images, np.append(images.train_ids[:9], images.validation_ids[:1]))
    with pytest.raises(ValueError, match="10 examples, 1 of them no training images"):
        distill.make_subset(study, images, study.cell(strategy="picked_mine"), 0)
    other = Subset(images.train_ids[:9], "picked_other", 9 / 1100, 0, None, "other images")
    other.save(study.runs / "selections" / "other.parquet")
    with pytest.raises(ValueError, match="made from something else"):
        distill.make_subset(study, images, study.cell(strategy="picked_other"), 0)


@pytest.mark.parametrize("strategy", ["herding", "ccs", "random_balanced", "mixed"])
def test_rules_of_their_own_train_on_exactly_their_budget(lab, strategy):
    study = tiny_study(lab, selections={"mixed": {"kind": "mixture", "shares": {"easy": 1.0}}})
    images = open_images(study)
    subset = distill.make_subset(study, images, study.cell(strategy=strategy), 0)
    assert len(subset) == 363
    assert (subset.strategy, subset.parent is None) == (strategy, False)
    if strategy == "mixed":  # of one region: that region
        easy = distill.make_subset(study, images, study.cell(strategy="easy"), 0)
        assert subset.sha256 == easy.sha256


OBJECTIVES = {
    "mse": {"kind": "mse", "alpha": 0.1},
    "dkd": {"kind": "dkd", "target_weight": 1.0, "rest_weight": 2.0, "temperature": 2.0},
    "dist": {"kind": "dist", "inter_weight": 1.0, "intra_weight": 1.0, "temperature": 1.0},
    "standard": {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "standardise": True},
    "hint": {"kind": "hint", "weight": 1.0},
    "attention": {"kind": "attention", "weight": 1.0},
    "rkd": {"kind": "rkd", "distance_weight": 5.0, "angle_weight": 10.0},
    "similarity": {"kind": "similarity", "weight": 100.0},
    "crd": {"kind": "crd", "weight": 0.5, "temperature": 0.1, "width": 16},
    "tokens": {"kind": "tokens", "cls_weight": 1.0, "patch_weight": 0.5},
    "barlow": {"kind": "tokens", "cls_weight": 1.0, "patch_weight": 0.5, "barlow_weight": 0.1},
}


@pytest.fixture(scope="module")
def objectives_lab(made, tmp_path_factory):
    """A workspace whose teacher has stored all that any objective reads, in two replayed views."""
    lab = tmp_path_factory.mktemp("objectives_lab")
    shutil.copytree(made / "cache", lab / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(lab))
        study = _study(lab)
        teacher.make_teacher(study, cache_images(study))
    return lab


def _study(lab, **changes):
    names = ["plain", *OBJECTIVES]
    return tiny_study(
        lab, objectives={"plain": {"kind": "cross_entropy"}} | OBJECTIVES, axes__objective=names,
        probe__objective=["plain"], teacher__outputs={"views": 2},
        training={"steps": 40, "batch_size": 64, "lr_peak": 0.05, "augment": {"crop_padding": 1}},
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_trains_a_student_that_passes_every_check(
    objectives_lab, monkeypatch, objective
):
    monkeypatch.setenv("KDLIB_HOME", str(objectives_lab))
    study = _study(objectives_lab)
    cell = study.cell(strategy="full", objective=objective)
    evidence = distill.train_student(study, open_images(study), cell, 0)
    assert all(check["passed"] for check in evidence["checks"])
    assert evidence["pairing"]["permuted"] > evidence["pairing"]["paired"]
    assert (evidence["pairing"]["teacher_accuracy"] is None) == (
        objective not in ("mse", "dkd", "dist", "standard")
    )
    # chance is 0.1 with a standard deviation of 0.013; some objectives have barely begun
    assert evidence["checkpoints"]["last"]["test_accuracy"] > 0.125


def test_an_objective_the_teacher_was_not_asked_for_says_which_notebook_to_run(lab):
    more = {"kd": {"kind": "kd", "alpha": 0.5, "temperature": 2.0},
            "plain": {"kind": "cross_entropy"},
        "hint": {"kind": "hint", "weight": 1.0}}  # fmt: skip
    study = tiny_study(lab, objectives=more)
    with pytest.raises(ValueError, match=r"made before the study was changed.*features_for"):
        distill.train_student(study, open_images(study), study.cell(objective="hint"), 0)
