"""Students and teachers that begin from given weights: in the evidence, in the tables, and held to
what the study asks for."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from models.test_origins import PUBLISHED, stand_in
from tiny import forge, tiny_study

from kdlib.dataset.images import Images
from kdlib.models import origins
from kdlib.models.base import Network
from kdlib.models.networks import network_for
from kdlib.models.weights import save_weights
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps import teacher as teacher_module
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import student_network, train_student
from kdlib.steps.done import unfinished
from kdlib.steps.folders import student_folder
from kdlib.steps.probe import probe_cell
from kdlib.steps.results import results
from kdlib.study.models import Model
from kdlib.study.study import Study
from kdlib.trainer import loop

TINY = {"name": "tiny_cnn", "options": {"width": 8}}


@pytest.fixture
def given(lab: Path) -> tuple[Study, Images]:
    """A study whose students begin from a file, all layers of `tuned` are trained, and the last of
    `frozen`."""
    (lab / "data").mkdir()
    images = open_images(tiny_study(lab))
    body = network_for(images, Model.model_validate(TINY), 7, "cpu", 3)  # of three more classes
    save_weights(body, lab / "data" / "body.safetensors", {})
    tuned = {"model": TINY, "weights": "body.safetensors"}
    students = {"tuned": tuned, "frozen": tuned | {"freeze": "backbone"}}
    axes = {"student": [*students], "strategy": ["random"], "fraction": [0.33],
            "objective": ["plain"]}  # fmt: skip
    study = tiny_study(
        lab, students=students, axes=axes, probe__strategy=["random"], probe__objective=["plain"],
    )  # fmt: skip
    return study, images


def made(study: Study, images: Images) -> dict[tuple[str, int], dict]:
    """The evidence of every student, by name and seed."""
    return {
        (cell.student, seed): train_student(study, images, cell, seed)
        for cell in study.cells() if cell.strategy == "random"
        for seed in study.seeds
    }  # fmt: skip


def reasons(study: Study) -> dict[tuple[str, int], str]:
    table = results(study)
    rows = table[table["strategy"] == "random"]
    return {(r.student, r.seed): r.reason for r in rows.itertuples()}


def test_a_file_s_weights_are_on_record_in_the_table_and_derived_again(given):
    study, images = given
    evidences = made(study, images)
    begun = {run: evidence["initialisation"] for run, evidence in evidences.items()}
    sha256 = files.sha256_file(study.runs.parents[1] / "data" / "body.safetensors")
    assert {b["origin"] for b in begun.values()} == {f"file: {sha256}"}
    assert len({b["body_sha256"] for b in begun.values()}) == 1
    assert len({b["weights_sha256"] for b in begun.values()}) == 2  # a last layer for each seed
    assert [begun[name, 0].get("frozen") for name in ("tuned", "frozen")] == [None, 6]
    assert evidences["frozen", 0]["gradient"]["tensors"] == 2
    assert set(reasons(study).values()) == {""}
    table = results(study).dropna(subset="origin").drop_duplicates("student")
    found = dict(zip(table["student"], table["origin"], strict=True))
    assert found == {"tuned": f"file: {sha256}", "frozen": f"file: {sha256}, its backbone frozen"}
    cell = study.cell(student="frozen", strategy="random", objective="plain")
    network = student_network(study, images, cell, 0).state_dict()
    initial = origins.parts(network_for(images, Model.model_validate(TINY), 7, "cpu", 3))[0]
    assert all(network[name].equal(tensor) for name, tensor in initial.items())
    probes = probe_cell(study, images, cell)
    assert probes.query("probe == 'linear' and strategy == 'random'")["accuracy"].nunique() == 1


def test_random_weights_make_no_column(lab):
    assert "origin" not in results(tiny_study(lab))


def ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(teacher_module, "begun_network", lambda network, *_: network)
    patch.setattr("kdlib.steps.distill.begun_network", lambda network, *_: network)


def thawed(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Network, "freeze_backbone", lambda self: None)


def last_layer_alone(patch: pytest.MonkeyPatch) -> None:
    real = origins.begin

    def begin(network, *args):
        real(network, *args)
        network.freeze_backbone()

    patch.setattr("kdlib.steps.teacher_network.begin", begin)


def half_a_body(patch: pytest.MonkeyPatch) -> None:
    real = origins.read_weights

    def read(network, *args):
        before = network.conv2.weight.detach().clone()
        found = real(network, *args)
        network.conv2.weight.data.copy_(before)
        return found

    patch.setattr(origins, "read_weights", read)


@pytest.mark.parametrize(
    ("mistake", "sentence"),
    [
        (ignored, "its initial weights have origin random on record, file: "),
        (
            thawed,
            "its backbone changed in training, 0 tensors were frozen, and its settings freeze",
        ),
        (last_layer_alone, "its backbone did not change in training, 6 tensors were frozen, and"),
        (half_a_body, "its initial weights have body_sha256 "),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_about_the_beginning_refuses_the_row(given, monkeypatch, mistake, sentence):
    study, images = given
    with monkeypatch.context() as patch:
        mistake(patch)
        made(study, images)
    assert any(sentence in reason for reason in reasons(study).values())


def test_a_body_that_two_readers_read_alike_and_wrongly_is_not_in_the_file(given, monkeypatch):
    study, images = given
    half_a_body(monkeypatch)  # of the derivation, too
    made(study, images)
    assert all("1 of its initial tensors do not stand" in r for r in reasons(study).values())


def test_an_origin_that_was_edited_and_another_file_are_refused(given):
    study, images = given
    made(study, images)
    cell = study.cell(student="tuned", strategy="random", objective="plain")
    folder = student_folder(study, cell, 0)
    assert folder not in unfinished(study)
    forge(folder, lambda e: e["initialisation"].update(origin="pretrained: resnet18.a1_in1k"))
    assert "have origin pretrained: resnet18.a1_in1k on record" in reasons(study)["tuned", 0]
    body = network_for(images, Model.model_validate(TINY), 8, "cpu")
    save_weights(body, study.runs.parents[1] / "data" / "body.safetensors", {})
    assert "weights_file" in unfinished(study)[folder]


def test_what_cannot_begin_is_refused_before_the_teacher_is_trained(given):
    study, images = given
    (study.runs.parents[1] / "data" / "body.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"body\.safetensors are not there; put the file"):
        teacher_module.make_teacher(study, images)


def test_a_teacher_is_tuned_from_a_file_and_its_dynamics_recorded(given):
    study, images = given
    teacher = {"model": TINY, "weights": "body.safetensors", "expected_accuracy": 0.5,
               "training": {"epochs": 5, "batch_size": 64, "lr_peak": 0.1}}  # fmt: skip
    study = tiny_study(
        files.workspace(), teacher=teacher, axes__objective=["kd"],
        axes__strategy=["random"], probe__strategy=["random"],
    )  # fmt: skip
    evidence = teacher_module.make_teacher(study, images)
    assert evidence["initialisation"]["origin"].startswith("file: ")
    assert evidence["initialisation"]["last"] == "drawn"
    assert len(make_datamap(study, images)) == len(images.train_ids)
    made(study, images)
    assert set(reasons(study).values()) == {""}
    forge(study.runs / "teacher", lambda e: e["initialisation"].update(origin="random"))
    assert all("teacher: its initial weights" in reason for reason in reasons(study).values())


def test_a_file_without_its_last_layer_is_a_teacher_of_features(given, capsys):
    study, images = given
    body, _ = origins.parts(network_for(images, Model.model_validate(TINY), 7, "cpu"))
    save_weights(body, files.workspace() / "data" / "features.safetensors", {})
    teacher = {"model": TINY, "weights": "features.safetensors", "trained_on": "elsewhere",
               "expected_accuracy": 0.2}  # fmt: skip
    recorded = {"model": TINY, "window": 3, "el2n_epoch": 2,
                "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}}  # fmt: skip
    study = tiny_study(
        files.workspace(), teacher=teacher, dynamics=recorded,
        objectives={"plain": {"kind": "cross_entropy"}}, axes__objective=["plain"],
        probe__objective=["plain"],
    )  # fmt: skip
    card = teacher_module.make_teacher(study, images)["teacher"]
    assert card["measured_by"] == "knn"
    assert read_evidence(study.runs / "teacher")["teacher"] == card
    assert "no last layer" in capsys.readouterr().out


def test_students_of_published_weights_are_derived_again_without_a_network(lab, monkeypatch):
    """Once, where the weights are; what they are is then kept."""
    stand_in(monkeypatch, "resnet10t", in_chans=1)
    axes = {"student": ["small"], "strategy": ["random"], "fraction": [0.33],
            "objective": ["plain"]}  # fmt: skip
    study = tiny_study(
        lab, students={"small": PUBLISHED}, axes=axes, probe__strategy=["random"],
        probe__objective=["plain"], training__steps=4, training__checkpoint_fractions=[1],
    )  # fmt: skip
    made(study, images := open_images(study))
    assert set(reasons(study).values()) == {""}
    assert set(results(study)["origin"].dropna()) == {"pretrained: resnet10t.c3_in1k"}
    monkeypatch.setattr(timm, "create_model", unreachable(timm.create_model))
    assert set(reasons(study).values()) == {""}
    (study.runs / "measured.json").unlink()
    assert all("timm/resnet10t are not on this machine" in r for r in reasons(study).values())
    with pytest.raises(RuntimeError, match="are not on this machine"):
        teacher_module.make_teacher(study, images)


def unreachable(real: Callable) -> Callable:
    def create(name, pretrained=False, **options):
        if pretrained:
            raise OSError("name resolution failed")
        return real(name, **options)

    return create


def test_a_killed_training_of_a_last_layer_goes_on_to_the_same_bytes(given, monkeypatch):
    study, images = given
    cell = study.cell(student="frozen", strategy="random", objective="plain")
    whole = train_student(study, images, cell, 0)
    shutil.rmtree(student_folder(study, cell, 0))
    real = loop._Loop.advance

    def advance(self):
        if self.step == 40:
            self.save()
            raise KeyboardInterrupt
        real(self)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Loop, "advance", advance)
        with pytest.raises(KeyboardInterrupt):
            train_student(study, images, cell, 0)
    again = train_student(study, images, cell, 0)
    for key in ("checkpoints", "initialisation", "series_sha256"):
        assert again[key] == whole[key]
