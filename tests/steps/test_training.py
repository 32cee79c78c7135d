"""Trainings of a study: what cannot finish, what every run says, and what changes no byte."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY, first_run, forge, tiny_study

from kdlib.dataset.loader import Loader
from kdlib.dataset.plan import Plan
from kdlib.models.networks import network_for
from kdlib.models.weights import weights_fingerprint
from kdlib.repro import checks
from kdlib.repro.run import read_evidence, read_metrics
from kdlib.repro.seeds import derive
from kdlib.steps import training as training_module
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.checkpoints import keep_epoch
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.folders import student_folder
from kdlib.steps.processes import write_study
from kdlib.steps.results import results
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml
from kdlib.trainer.loop import checkpoint_steps

STUDIES = sorted(TINY.parent.glob("*.yaml"))


def test_the_same_study_gives_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    study = tiny_study(tmp_path)
    images = cache_images(study)
    make_teacher(study, images)
    make_datamap(study, images)
    train_student(study, images, study.cells()[0], 1)
    names = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.suffix in (
        ".npy", ".parquet", ".safetensors")]  # fmt: skip
    assert len(names) > 20
    for name in names:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_study_written_for_processes_of_its_own_is_read_back_as_it_is(home, path):
    (home / "params").symlink_to(path.parent)  # for what it shares, and for code of its own
    study = load_study(path)
    launched = write_study(study)
    assert launched.is_relative_to(home)
    again = load_study(launched)
    assert again == study
    assert again.upstream == study.upstream


def test_a_study_that_shares_with_one_beside_it_is_read_back_wherever_both_lie(home):
    outside = home / "not in params"
    outside.mkdir()
    shutil.copy(TINY, outside / "tiny.yaml")
    (outside / "more.yaml").write_text("{base: tiny.yaml, shares: tiny.yaml, recordings: null}")
    study = load_study(outside / "more.yaml")
    again = load_study(write_study(study))
    assert again == study
    assert again.upstream == study.upstream
    assert again.upstream.name == "tiny"


def test_a_study_is_written_with_every_number_and_letter(home):
    options = {"a": "1e-3", "b": "010", "c": "no", "d": "~", "e": "😀 é", "f": 1e-7}
    content = parse_yaml(TINY.read_text()) | {"compute": {"processes": 2}}
    content["training"]["lr_peak"] = 1e-7
    content["probe"]["c_grid"] = [1e-300, 1e-6, 0.5, 1, 1e16]
    content["students"]["tiny"]["model"]["options"] = options
    study = Study.model_validate({"name": "tiny", **content})
    again = load_study(write_study(study))
    assert again == study
    assert again.students["tiny"].model.options == options


def test_the_terms_of_a_loss_stand_apart_and_make_up_the_whole(lab):
    study = tiny_study(lab)
    kd, plain = (
        read_metrics(student_folder(study, study.cell(objective=objective), 0))
        for objective in ("kd", "plain")
    )
    assert len(kd) > 1
    whole = 0.5 * kd["train_loss_cross_entropy"] + 0.5 * 2.0**2 * kd["train_loss_kd"]
    np.testing.assert_allclose(kd["train_loss"], whole, rtol=1e-6)
    assert (kd["train_loss_kd"] != kd["train_loss_cross_entropy"]).all()
    assert not [name for name in plain if name.startswith("train_loss_")]


def test_every_run_says_where_its_weights_began(lab):
    study = tiny_study(lab)
    images = open_images(study)
    for cell in study.cells():
        for seed in study.seeds:
            found = read_evidence(student_folder(study, cell, seed))["initialisation"]
            network = network_for(images, study.students["tiny"].model, derive(seed, "init"), "cpu")
            assert found == {"origin": "random", "weights_sha256": weights_fingerprint(network)}


def test_a_loader_that_ignores_its_subset_cannot_finish_a_run(lab, monkeypatch):
    study = tiny_study(lab, seeds=[7, 8])
    images = open_images(study)

    class Ignoring(Loader):
        def __init__(self, plan, images, **options):
            whole = Plan(images.example_ids, plan.batch_size, plan.n_steps, 7)
            super().__init__(whole, images, **options)

    monkeypatch.setattr(training_module, "Loader", Ignoring)
    with pytest.raises(checks.CheckError, match="declared -> recorded: unique_examples: 363"):
        train_student(study, images, study.cell(strategy="easy"), 7)
    folder = student_folder(study, study.cell(strategy="easy"), 7)
    assert not (folder / "evidence.json").exists()


def test_teacher_rows_read_out_of_step_cannot_finish_a_run(lab, monkeypatch):
    study = tiny_study(lab, seeds=[7, 8], training__steps=200, objectives__kd__alpha=0.1)
    images = open_images(study)
    rng = np.random.default_rng(0)

    class Shuffled(Loader):
        def teacher_rows(self, positions, views):
            order = rng.permutation(len(self.plan.example_ids))
            return super().teacher_rows(order[positions], views)

    monkeypatch.setattr(training_module, "Loader", Shuffled)
    for seed in study.seeds:
        with pytest.raises(checks.CheckError, match="pairing: teacher term"):
            train_student(study, images, study.cell(objective="kd"), seed)


def test_two_seeds_that_are_one_are_refused(lab):
    study = tiny_study(lab)
    cell = study.cells()[0]
    twin = read_evidence(student_folder(study, cell, 1))
    forge(first_run(study), lambda e: e.update(order_sha256=twin["order_sha256"]))
    table = results(study)
    assert table["refused"].tolist() == [True, True] + [False] * 10
    assert "shares initial weights or order with seed [1]" in table["reason"].iloc[0]


@pytest.mark.parametrize("epoch", range(1, 8))
def test_the_kept_epoch_is_the_step_its_readers_ask_for(lab, epoch):
    study = tiny_study(lab)
    training = study.training.model_copy(update={"batch_size": 32, "checkpoint_fractions": (0, 1)})
    n = 50_000
    plan = Plan(np.arange(n), 32, round(7 * n / 32), 0)
    kept = checkpoint_steps(keep_epoch(training, plan, epoch), plan.n_steps)
    assert round(epoch * (n / 32)) in kept


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(lab, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study = tiny_study(lab, compute={"device": "cuda"})
    with pytest.raises(RuntimeError, match="torch sees no GPU here"):
        make_teacher(study, open_images(study))


def test_a_loader_that_draws_other_shards_than_planned_cannot_finish_a_run(lab, monkeypatch):
    study = tiny_study(lab, axes__strategy=["random", "easy", "random_shards"])
    images = open_images(study)

    class Sorted(Loader):
        def __init__(self, plan, images, **options):
            super().__init__(plan, images, **options)
            plan.members = lambda number: np.arange(plan.shards_per_pass)
            self.batch(0)
            del plan.members

    monkeypatch.setattr(training_module, "Loader", Sorted)
    with pytest.raises(checks.CheckError, match="not as often as planned"):
        train_student(study, images, study.cell(strategy="random_shards"), 0)


def test_where_pixels_are_kept_changes_no_weight_and_no_setting(lab):
    plain = tiny_study(lab)
    cell = plain.cell(strategy="easy", objective="kd")
    before = read_evidence(student_folder(plain, cell, 0))
    mapped = tiny_study(lab, compute={"images": "mapped"})
    images = open_images(mapped)
    assert train_student(mapped, images, cell, 0) == before  # not trained again
    shutil.rmtree(student_folder(plain, cell, 0))
    again = train_student(mapped, images, cell, 0)
    assert again["checkpoints"]["last"] == before["checkpoints"]["last"]


def test_two_processes_make_the_study_one_makes(lab):
    alone = tiny_study(lab)
    cell = alone.cell(strategy="full", objective="kd")
    images = open_images(alone)
    before = make_datamap(alone, images)
    ones = [alone.runs / "teacher", student_folder(alone, cell, 0)]
    ones = [shutil.copytree(one, lab / f"one{i}") for i, one in enumerate(ones)]
    study = tiny_study(lab, compute={"processes": 2})
    twos = [study.runs / "teacher", student_folder(study, cell, 0)]
    evidences = [make_teacher(study, images), train_student(study, images, cell, 0)]
    for one, two, evidence in zip(ones, twos, evidences, strict=True):
        wanted = read_evidence(one)
        assert all(check["passed"] for check in evidence["checks"])
        for key in ("budget", "coverage", "initialisation", "order_sha256", "seeds"):
            assert evidence[key] == wanted[key]
        weights = [
            load_file(folder / found["checkpoints"]["last"]["file"])
            for folder, found in ((one, wanted), (two, evidence))
        ]
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor.float(), weights[1][name].float(), atol=0.03), name
    after = make_datamap(study, images)  # complete, and of the same examples
    assert after.index.equals(before.index)
    assert np.allclose(after["confidence"], before["confidence"], atol=0.02)
