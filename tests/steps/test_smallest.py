"""Every check on the smallest study there can be: one student on one image, two classes, two test
images. It passes or fails there as it does elsewhere, or says that it cannot judge."""

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import flip, make_study, tiny_study

from kdlib.dataset.images import Images
from kdlib.dataset.loader import Loader
from kdlib.dataset.plan import Plan
from kdlib.models.networks import TinyCNN
from kdlib.probes import classifiers
from kdlib.repro import checks
from kdlib.repro.run import read_evidence
from kdlib.steps import distill, probe, probe_network, training
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.distill import train_student
from kdlib.steps.folders import student_folder
from kdlib.steps.results import results
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study
from kdlib.study.study import Study

BRIGHT = {"a": 40, "b": 200}  # the classes differ in brightness


def _draw(home: Path, n_train: int, n_test: int, permuted: bool = False) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", n_train), ("test", n_test)):
        for label, level in BRIGHT.items():
            folder = home / "data" / "photographs" / split / label
            folder.mkdir(parents=True)
            for i in range(n // 2):
                level = BRIGHT["ab"[i % 2]] if permuted else level
                pixels = rng.integers(level - 30, level + 30, (8, 8, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


LEARNING = {"steps": 20, "batch_size": 2, "lr_peak": 0.05}


def _study(home: Path, **changes) -> Study:
    return tiny_study(
        home,
        **{
            "data": {"source": "folder", "folder": "photographs", "n_validation": 2},
            "teacher__training": LEARNING, "dynamics": {"el2n_epoch": 1, "window": 2},
            "training": LEARNING | {"checkpoint_fractions": [0, 1]}, "recordings": None,
            "axes__strategy": ["random"], "axes__fraction": [0.25],
            "probe__strategy": ["full"], "probe__fraction": 0.25, "probe__k": 1,
            "probe__c_grid": [1.0],  # so few cannot choose one
        } | changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def smallest(tmp_path_factory) -> Path:
    """A workspace with six training images, of which two are held out, and two test images; its
    students and probes are made."""
    home = tmp_path_factory.mktemp("smallest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        _draw(home, 6, 2)
        study = _study(home)
        make_study(study)
    return home


@pytest.fixture
def small(smallest: Path, home: Path) -> Study:
    """A copy of it, to break."""
    shutil.copytree(smallest, home, dirs_exist_ok=True)
    return load_study(home / "params" / "tiny.yaml")


def test_every_check_passes_on_the_smallest_study_or_says_that_it_cannot_judge(small):
    table = results(small)
    assert not table["refused"].any(), table["reason"].tolist()
    one = read_evidence(student_folder(small, small.cell(strategy="random", objective="kd"), 0))
    probed = read_evidence(small.runs / "probe" / small.probed_cells()[0].path)
    said = {c["name"]: c["sentence"] for c in one["checks"] + probed["checks"]}
    assert set(said) == {check.__name__ for check in (*checks.STUDENT, *checks.PROBE)}
    assert said["coverage"].startswith("1 of 1 examples visited 40 to 40 times")
    assert said["pairing"].startswith("one example has no other's rows: permuting shows nothing")
    assert said["teacher_card"].endswith("the test images are too few to tell it from chance")


def other_images(patch: pytest.MonkeyPatch) -> None:
    class Other(Loader):
        def __init__(self, plan, images, **options):
            ids = np.setdiff1d(images.example_ids, plan.example_ids)[: len(plan.example_ids)]
            plan = Plan(ids, plan.batch_size, plan.n_steps, 0)
            super().__init__(plan, images, **options)

    patch.setattr(training, "Loader", Other)


def one_image_too_many(patch: pytest.MonkeyPatch) -> None:
    class Whole(Loader):
        def __init__(self, plan, images, **options):
            plan = Plan(images.example_ids[:2], plan.batch_size, plan.n_steps, 0)
            super().__init__(plan, images, **options)

    patch.setattr(training, "Loader", Whole)


def no_gradient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(TinyCNN, "head", lambda self, features: self.linear(features.detach()))


def chosen_on_test(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Images, "validation", lambda self, device: tuple(
        self.test.resident(column).to(device) for column in ("images", "labels")
    ))  # fmt: skip


def rows_of_another(patch: pytest.MonkeyPatch) -> None:
    def rows(self, positions, views):
        return {name: values.flip(-1) for name, values in real(self, positions, views).items()}

    real = Loader.teacher_rows
    patch.setattr(Loader, "teacher_rows", rows)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        (other_images, r"coverage: .* visits outside the subset"),
        (one_image_too_many, r"budget: declared -> recorded: unique_examples: 1 -> 2"),
        (no_gradient, r"gradient: gradient norm .*; 6 of 8 parameter tensors got none"),
        (chosen_on_test, r"untouched_test: best epoch chosen on 2 images that are not the 2 held"),
        (rows_of_another, r"pairing: .*teacher rows 0\.00% right where the teacher is 100\.00%"),
    ],
)
def test_a_student_on_one_image_is_checked_as_any_other(small, monkeypatch, defect, sentence):
    cell = small.cell(strategy="random", objective="kd")
    shutil.rmtree(student_folder(small, cell, 0))
    images = open_images(small)
    defect(monkeypatch)
    for _ in range(2):  # the second call finds nothing to go on with
        with pytest.raises(checks.CheckError, match=sentence):
            train_student(small, images, cell, 0)


def no_features(patch: pytest.MonkeyPatch) -> None:
    real = TinyCNN.staged
    patch.setattr(TinyCNN, "staged", lambda self, x: (torch.ones(len(x), 16), real(self, x)[1]))


def weights_of_two_steps(patch: pytest.MonkeyPatch) -> None:
    real = probe_network.labelled_features

    def features(cache, ids, values, weights):
        return real(cache, ids, values, weights + cache.header["split"])

    patch.setattr(probe_network, "labelled_features", features)
    patch.setattr(classifiers, "_check_pair", lambda train, test: None)


@pytest.mark.parametrize(
    ("defect", "sentence"),
    [
        (no_features, "not_collapsed: effective rank is"),
        (weights_of_two_steps, "same_weights: .* probes mix features of two weights"),
    ],
)
def test_features_of_few_images_are_checked_as_any_other(small, monkeypatch, defect, sentence):
    shutil.rmtree(small.runs / "probe")
    images = open_images(small)
    defect(monkeypatch)
    for _ in range(2):
        with pytest.raises(checks.CheckError, match=sentence):
            probe.probe_cell(small, images, small.probed_cells()[0])


@pytest.mark.parametrize("n_test", [2, 16])
def test_a_teacher_of_permuted_labels_is_noticed_where_the_test_images_are_enough(home, n_test):
    """With `expected_accuracy: 0`, which every accuracy reaches."""
    _draw(home, 16, n_test, permuted=True)
    study = _study(home, teacher__expected_accuracy=0.0)
    images = cache_images(study)
    if n_test == 2:
        card = make_teacher(study, images)["checks"][-1]
        assert card["sentence"].endswith("too few to tell it from chance")
        return
    with pytest.raises(checks.CheckError, match=r"teacher_card: .* by chance.*`uninformed: true`"):
        make_teacher(study, images)
    study = _study(home, teacher__expected_accuracy=0.0, teacher__uninformed=True)
    assert make_teacher(study, images)["teacher"]["uninformed"]


def test_without_the_untrained_network_the_floor_says_that_it_compared_nothing(small):
    table = pd.read_parquet(small.runs / "probe" / small.probed_cells()[0].path / "probes.parquet")
    kept = probe._probe_evidence(table, "own")
    later = probe._probe_evidence(table[table["step"] != 0], "own")
    assert kept["floor"]["untrained"] is not None
    assert later["floor"]["untrained"] is None
    passed, sentence = checks.probe_floor(later)
    assert passed
    assert "the untrained network was not kept, and nothing was compared" in sentence


def test_the_few_orders_of_few_images_are_no_sign_of_one_seed(small):
    """Of two images every other seed draws the same order."""
    cell = small.cell(strategy="full", objective="plain")
    for seed in small.seeds:
        assert read_evidence(student_folder(small, cell, seed))["order_sha256"] is None


def test_pieces_of_one_image_are_refused_where_a_network_normalises_by_them(small):
    asked = {"steps": 4, "batch_size": 2, "accumulate": 2, "lr_peak": 0.05}
    study = _study(small.runs.parents[1], training=asked)
    cell, images = study.cell(objective="plain"), open_images(study)
    with pytest.raises(ValueError, match=r"are pieces of one image, .* expected pieces of two"):
        train_student(study, images, cell, 0)
    for more in ({"batch_size": 4}, {"accumulate": 1}):  # as the message says
        study = _study(small.runs.parents[1], training=asked | more)
        assert train_student(study, images, cell, 0)["budget"]["recorded"]["steps"] == 4


def test_probes_of_fewer_than_the_untrained_network_knows_are_refused(small, monkeypatch):
    """The test features of the last step are in another order than their labels."""
    steps, load, label = [], probe.load_step, probe_network.labelled_features

    def load_step(network, folder, evidence, step):
        steps.append(step)
        return load(network, folder, evidence, step)

    def features(cache, ids, values, weights):
        late = cache.header["split"] == "test" and steps[-1] != "0"
        return label(cache, ids, values[::-1] if late else values, weights)

    monkeypatch.setattr(probe, "load_step", load_step)
    monkeypatch.setattr(probe_network, "labelled_features", features)
    shutil.rmtree(small.runs / "probe")
    with pytest.raises(
        checks.CheckError, match=r"probe_floor: .*0\.00% trained, 100\.00% untrained"
    ):
        probe.probe_cell(small, open_images(small), small.probed_cells()[0])


def test_weights_that_were_changed_refuse_their_row(small):
    folder = student_folder(small, small.cells()[0], 0)
    flip(folder / read_evidence(folder)["checkpoints"]["last"]["file"])
    table = results(small)
    assert table["refused"].sum() == 1
    assert "checkpoints missing or changed: last" in table.query("refused")["reason"].item()


def test_seeds_that_share_their_first_weights_refuse_their_rows(small, monkeypatch):
    cell, images, real = small.cells()[0], open_images(small), distill.network_for
    for seed in small.seeds:
        shutil.rmtree(student_folder(small, cell, seed))
    with monkeypatch.context() as patch:
        patch.setattr(distill, "network_for", lambda images, model, _, *more: real(
            images, model, 5, *more
        ))  # fmt: skip
        for seed in small.seeds:
            train_student(small, images, cell, seed)
    reasons = results(small).query("refused")["reason"]
    assert len(reasons) == len(small.seeds)
    assert all("shares initial weights or order with seed" in reason for reason in reasons)
