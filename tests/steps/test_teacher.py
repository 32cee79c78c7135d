"""Teachers: loaded, trained, below their card, further ones, and what they store."""

import shutil

import numpy as np
import pytest
import torch
import yaml
from models.test_published import HUBCONF
from PIL import Image
from tiny import flip, student, tiny_study

from kdlib.__main__ import main
from kdlib.cache.build import repair
from kdlib.cache.shards import Cache, CacheError
from kdlib.dataset.batch import View
from kdlib.dataset.loader import Loader
from kdlib.dataset.plan import Plan
from kdlib.models.networks import build_network
from kdlib.models.weights import save_weights
from kdlib.repro import checks
from kdlib.repro.run import read_evidence
from kdlib.steps import teacher as teacher_module
from kdlib.steps import teacher_outputs, training
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import make_subset, train_student
from kdlib.steps.folders import teacher_folder
from kdlib.steps.results import results
from kdlib.steps.teacher_outputs import open_teacher, outputs_folder, store_part
from kdlib.study.load import load_study
from kdlib.study.models import Model
from kdlib.study.yaml_text import parse_yaml


def test_a_teacher_below_its_card_stops_the_study(lab):
    study = tiny_study(lab, teacher__expected_accuracy=0.999)
    with pytest.raises(checks.CheckError, match=r"teacher_card: .* claimed 99\.90%"):
        teacher_module.make_teacher(study, open_images(study))
    assert not (study.runs / "teacher" / "evidence.json").exists()


def test_outputs_taken_away_as_damaged_are_stored_again_by_the_teacher_s_weights(
    lab, made, monkeypatch
):
    study = tiny_study(lab)
    images, folder = open_images(study), study.runs / "teacher" / "outputs-train"
    evidence = (study.runs / "teacher" / "evidence.json").read_bytes()
    flip(folder / "features-00001.npy")
    repair(folder)
    shutil.rmtree(study.runs / "teacher" / "outputs-test")
    monkeypatch.setattr(training, "train", None)
    teacher_module.make_teacher(study, images)
    for path in (made / "runs/tiny/teacher").rglob("outputs-*/*.npy"):
        assert (lab / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    assert (study.runs / "teacher" / "evidence.json").read_bytes() == evidence


def test_a_missing_weight_file_and_a_missing_step_say_what_to_do(lab, tmp_path):
    study = tiny_study(
        lab, teacher={"model": {"name": "cifar_resnet8"}, "weights": "absent.safetensors",
                       "trained_on": "elsewhere",
                       "expected_accuracy": 0.9},
        dynamics={"model": {"name": "tiny_cnn"}, "window": 3, "el2n_epoch": 2,
                  "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}},
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors are not there"):
        teacher_module.make_teacher(study, open_images(study))
    shutil.rmtree(study.runs)
    with pytest.raises(FileNotFoundError, match="run `python -m kdlib step"):
        open_images(study)


def test_a_teacher_read_from_a_file_leaves_the_datamap_to_a_recorded_network(lab):
    before = tiny_study(lab)
    evidence = read_evidence(before.runs / "teacher")
    weights = before.runs / "teacher" / evidence["checkpoints"]["last"]["file"]
    kept = lab / "data" / "teacher.safetensors"
    kept.parent.mkdir()
    shutil.copy(weights, kept)
    study = tiny_study(
        lab, teacher={"model": {"name": "tiny_cnn", "options": {"width": 8}},
                       "weights": "teacher.safetensors", "trained_on": "kept",
                       "expected_accuracy": 0.5},
        dynamics={"model": {"name": "tiny_cnn"}, "window": 3, "el2n_epoch": 2, "observed": "eval",
                  "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}},
    )  # fmt: skip
    images = open_images(study)
    loaded = teacher_module.make_teacher(study, images)["teacher"]
    assert loaded["weights_sha256"] == evidence["teacher"]["weights_sha256"]
    assert loaded["measured"] == evidence["teacher"]["measured"]
    assert len(make_datamap(study, images)) == 1100
    assert (study.runs / "dynamics" / "evidence.json").exists()


def test_a_loaded_teacher_s_outputs_can_be_stored_in_parts_from_the_command_line(lab, capsys):
    before = tiny_study(lab)
    evidence = read_evidence(before.runs / "teacher")
    weights = lab / "data" / "teacher.safetensors"
    weights.parent.mkdir()
    shutil.copy(before.runs / "teacher" / evidence["checkpoints"]["last"]["file"], weights)
    whole = lab / "whole"
    shutil.move(before.runs / "teacher", whole)
    with pytest.raises(ValueError, match=r"run `python -m kdlib step teacher params/tiny\.yaml`"):
        store_part(before, open_images(before), (1, 2))
    teacher = {"model": {"name": "tiny_cnn", "options": {"width": 8}},
               "weights": "teacher.safetensors", "trained_on": "kept",
                       "expected_accuracy": 0.5}  # fmt: skip
    recorded = {"model": {"name": "tiny_cnn"}, "window": 3, "el2n_epoch": 2,
                "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}}  # fmt: skip
    study = tiny_study(lab, teacher=teacher, dynamics=recorded)
    folder = outputs_folder(study, "train")
    for part in ("2/2", "1/2"):
        with pytest.MonkeyPatch.context() as patch:
            file = str(lab / "params" / "tiny.yaml")
            patch.setattr("sys.argv", ["kdlib", "cache", "outputs", file, "--part", part])
            assert main() == 0
    assert "3 of 5 shards, 697 of 1,297 examples; missing: " in capsys.readouterr().out
    loaded = teacher_module.make_teacher(study, open_images(study))["teacher"]
    assert loaded["outputs"]["train"] == evidence["teacher"]["outputs"]["train"]
    for path in (whole / "outputs-train").glob("*.npy"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


OWN = {
    "model": {"name": "tiny_cnn", "options": {"width": 8}},
    "training": {"steps": 60, "batch_size": 64, "lr_peak": 0.1},
    "expected_accuracy": 0.3,
}


def _study_of_two_teachers(lab, **own):
    objectives = {
        "kd": {"kind": "kd", "alpha": 0.5, "temperature": 2.0},
        "plain": {"kind": "cross_entropy"},
        "other": {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "teacher": "other"},
    }
    tiny_study(lab)
    path = lab / "params" / "tiny.yaml"
    content = parse_yaml(path.read_text())
    content |= {"objectives": objectives, "teachers": {"other": OWN | own}}
    content["axes"]["objective"] = ["kd", "plain", "other"]
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def test_students_of_a_further_teacher_learn_from_that_one(lab, monkeypatch, capsys):
    study = _study_of_two_teachers(lab)
    images = open_images(study)
    with pytest.raises(FileNotFoundError, match=r"teachers/other holds no finished run"):
        student(study, images, objective="other")
    # the study's own teacher and its students stand as they were
    before = read_evidence(teacher_folder(study))
    command = ["kdlib", "step", "teacher", str(lab / "params" / "tiny.yaml"), "--teacher"]
    monkeypatch.setattr("sys.argv", [*command, "othr"])
    assert main() == 1
    assert "no teacher 'othr' in this study's `teachers`; did you mean" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "other"])
    assert main() == 0
    teacher_module.make_teacher(study, images)
    assert read_evidence(teacher_folder(study)) == before
    _, further = student(study, images, objective="other")
    _, usual = student(study, images, objective="kd")
    card = open_teacher(study, "other")
    assert further["teacher"] == card
    assert usual["teacher"] == open_teacher(study)
    assert card["weights_sha256"] != usual["teacher"]["weights_sha256"]
    assert further["initialisation"] == usual["initialisation"]
    assert further["checkpoints"]["last"] != usual["checkpoints"]["last"]


def test_a_teacher_of_the_subset_alone_has_seen_nothing_else(lab):
    study = _study_of_two_teachers(lab, learns_from="subset")
    images = open_images(study)
    teacher_module.make_teacher(study, images)
    assert not (study.runs / "teachers").exists()  # there is one for each subset
    cell, evidence = student(study, images, strategy="easy", objective="other")
    (folder,) = (study.runs / "teachers" / "other").glob("subset=*/seed=0")
    teacher = read_evidence(folder)
    subset = make_subset(study, images, cell, 0)
    assert teacher["subset"]["sha256"] == subset.sha256
    assert teacher["coverage"]["unique"] == len(subset) < len(images.train_ids)
    assert teacher["coverage"]["outside_subset"] == 0
    assert evidence["teacher"] == teacher["teacher"]
    assert evidence["teacher"]["trained_on"] == "subset"
    # student and teacher are one architecture and yet draw apart
    assert teacher["initialisation"] != evidence["initialisation"]
    assert teacher["order_sha256"] != evidence["order_sha256"]
    before = (folder / "evidence.json").read_bytes()
    student(study, images, strategy="easy", objective="other")
    assert (folder / "evidence.json").read_bytes() == before
    train_student(study, images, cell, 1)
    assert len(list((study.runs / "teachers" / "other").glob("subset=*/seed=*"))) == 2
    table = results(study)
    mine = (table["strategy"] == "easy") & (table["objective"] == "other")
    assert not table[mine | (table["objective"] != "other")]["refused"].any()


def test_a_study_that_shares_a_teacher_makes_students_alone(lab, monkeypatch):
    other = {"base": "tiny.yaml", "shares": "tiny.yaml", "training": {"steps": 30}}
    path = lab / "params" / "less.yaml"
    path.write_text(yaml.safe_dump(other))
    study = load_study(path)
    monkeypatch.setattr(teacher_outputs, "store_outputs", None)
    images = cache_images(study)
    teacher_module.make_teacher(study, images)
    make_datamap(study, images)
    _, evidence = student(study, images, strategy="easy", objective="kd")
    assert sorted(path.name for path in study.runs.iterdir()) == ["distill"]
    assert evidence["teacher"] == open_teacher(load_study(lab / "params" / "tiny.yaml"))
    assert evidence["subset"]["parent_datamap"] == read_evidence(
        study.upstream.runs / "datamap"
    )["datamap_sha256"]  # fmt: skip


def test_a_gradient_epoch_beyond_the_training_is_refused(lab):
    study = tiny_study(lab, dynamics__gradient_epoch=9)
    with pytest.raises(ValueError, match="gradient_epoch is 9; the recorded training ends after"):
        teacher_module.make_teacher(study, open_images(study))


def test_students_of_replayed_views_see_what_the_teacher_saw(lab):
    study = tiny_study(
        lab,
        teacher__outputs={"views": 3, "top_k": 4},
        training__augment={"crop_padding": 1},
    )
    images = open_images(study)
    card = teacher_module.make_teacher(study, images)["teacher"]
    assert set(card["outputs"]) == {"train", "test", "replayed"}
    for objective in ("kd", "plain"):
        evidence = train_student(study, images, study.cell(objective=objective), 0)
        assert all(check["passed"] for check in evidence["checks"])
    # stored outputs know their views: a student that would see others is refused
    stored = teacher_module.open_outputs(
        outputs_folder(study, "replayed"), images.train, card["weights_sha256"]
    )
    plan = Plan(images.train_ids, 64, 3, 0)
    view = View(study.training.augment, 1, images.pixels, 3)
    with pytest.raises(CacheError, match="outputs of other views"):
        Loader(plan, images.train, view=view, teacher=stored)


PHOTOGRAPHS = {
    "source": "folder", "folder": "photographs", "n_validation": 6, "shard_size": 16,
}  # fmt: skip


VIT = {
    "name": "timm/vit_tiny_patch16_224",
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}


@pytest.mark.parametrize("teacher", ["weights", "hub"])
def test_a_vit_student_at_96_pixels_learns_from_a_vit_14_teacher_at_224(
    tmp_path, monkeypatch, teacher
):
    """Tiny random transformers: the path, not what is learnt."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    rng = np.random.default_rng(0)
    for split, n in (("train", 18), ("test", 6)):
        for label in "ab":
            folder = tmp_path / "photographs" / split / label
            folder.mkdir(parents=True)
            for number in range(n):
                pixels = rng.integers(0, 100, (96, 96, 3), np.uint8) + 100 * (label == "b")
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    large = {"name": VIT["name"], "options": VIT["options"] | {"patch_size": 14, "embed_dim": 24}}
    origin = {"model": large, "weights": str(tmp_path / "vit.safetensors")}
    if teacher == "weights":
        drawn = build_network(Model(**large), n_classes=2, image_shape=(3, 224, 224), seed=0)
        save_weights(drawn, tmp_path / "vit.safetensors", {})
    else:
        folder = tmp_path / "hub" / "owner_networks_v1"
        folder.mkdir(parents=True)
        (folder / "hubconf.py").write_text(HUBCONF)
        monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
        origin = {"model": {"name": "hub/owner/networks:v1/dinov2_vits14"}, "pretrained": True,
                  "trust_code": True}  # fmt: skip
    study = tiny_study(
        tmp_path,
        data=PHOTOGRAPHS | {"folder": str(tmp_path / "photographs"), "image_size": 96},
        teacher=origin | {"trained_on": "elsewhere", "image_size": 224, "expected_accuracy": 0.0,
                          "uninformed": True, "outputs": {"views": 2}},
        dynamics={"model": {"name": "tiny_cnn"}, "el2n_epoch": 1, "window": 2,
                  "training": {"epochs": 2, "batch_size": 10, "lr_peak": 0.01}},
        students={"vit": {"model": VIT}}, axes__student=["vit"],
        objectives={"tokens": {"kind": "tokens", "cls_weight": 1.0, "patch_weight": 0.5,
                               "barlow_weight": 0.1},
                    "plain": {"kind": "cross_entropy"}},
        axes__objective=["tokens", "plain"], probe__objective=["tokens"],
        training={"steps": 4, "batch_size": 10, "lr_peak": 1e-3, "optimiser": "adamw",
                  "warmup_steps": 2, "augment": {"flip": True}},
    )  # fmt: skip
    images = cache_images(study)
    card = teacher_module.make_teacher(study, images)["teacher"]
    assert card["measured_by"] == ("logits" if teacher == "weights" else "knn")
    stored = Cache(outputs_folder(study, "replayed"))
    shapes = [shape for _, shape in stored.header["columns"].values()]
    assert [2, 24, 16, 16] in shapes or [2, 6, 16, 16] in shapes  # 224 / 14 patches a side
    evidence = train_student(study, images, study.cell(objective="tokens"), 0)
    assert all(check["passed"] for check in evidence["checks"])
