"""Probes of a study: rows, checks, what is done once, and weights from outside."""

import shutil

import numpy as np
import pandas as pd
import pytest
from tiny import TINY, flip, tiny_study

from kdlib.compare.comparisons import with_untrained
from kdlib.probes.classifiers import Features, linear_probe
from kdlib.steps import probe, probe_network
from kdlib.steps.cache import open_images
from kdlib.steps.compare import compile_tables, probes
from kdlib.steps.distill import open_student
from kdlib.steps.figures import draw_comparison
from kdlib.steps.folders import student_folder
from kdlib.steps.teacher_outputs import open_teacher
from kdlib.study.yaml_text import parse_yaml


def test_kept_weights_that_were_changed_are_not_probed(lab):
    study = tiny_study(lab)
    cell = study.probed_cells()[0]
    shutil.rmtree(study.runs / "probe")
    flip(student_folder(study, cell, 0) / "weights-00000030.safetensors")
    with pytest.raises(ValueError, match=r"weights-00000030\.safetensors was changed .*delete"):
        probe.probe_cell(study, open_images(study), cell)


def test_test_features_of_an_untrained_network_are_refused(lab):
    rng = np.random.default_rng(0)
    ids = np.arange(40)

    def features(split, weights):
        values = rng.normal(size=(40, 4)).astype(np.float32)
        return Features(values, ids % 2, ids, split, weights)

    with pytest.raises(ValueError, match="weights"):
        linear_probe(features("train", "trained"), features("test", "untrained"), [1.0], 0)


def test_probes_stand_beside_an_untrained_student_and_the_teacher(lab):
    table = probes(tiny_study(lab))
    untrained = table[table["strategy"] == "untrained"]
    assert (untrained["step"] == 0).all()
    assert untrained.groupby("probe").size().to_dict() == {"knn": 2, "linear": 2}  # seeds
    assert table[table["strategy"] == "teacher"].groupby("probe").size().to_dict() == {
        "knn": 1, "linear": 1,
    }  # fmt: skip


PLACES = {
    "few_shot": [1, 3],
    "few_shot_draws": 2,
    "layers": ["features", "stage1"],
    # the same digits at twice the size: what is learnt of 8 pixels is not lost on the way back
    "others": {"large": {"source": "digits", "n_validation": 797, "image_size": 16}},
}


@pytest.fixture(scope="module")
def probed_once(made, tmp_path_factory):
    """The tiny study, its first cell probed in every way."""
    lab = tmp_path_factory.mktemp("probed")
    shutil.copytree(made, lab, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(lab))
        _probed(lab)
    return lab


@pytest.fixture
def probed(probed_once, tmp_path, monkeypatch):
    """A copy of it, to break."""
    shutil.copytree(probed_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


def _probed(lab):
    study = tiny_study(lab, probe=parse_yaml(TINY.read_text())["probe"] | PLACES)
    images = open_images(study)
    cell = study.probed_cells()[0]
    return study, images, cell, probe.probe_cell(study, images, cell)


def test_probes_of_layers_and_of_other_data_stand_in_rows_of_their_own(probed):
    study, _, _, table = _probed(probed)
    students = table[table["strategy"] != "teacher"]
    per_place = students.groupby(["on", "layer"]).size()
    # 2 seeds, 3 checkpoints, 2 probes and 2 numbers of shots
    assert per_place.to_dict() == {
        (on, layer): 24 for on in ("own", "large") for layer in ("features", "stage1")
    }
    assert set(students["probe"]) == {"linear", "knn", "few_shot_1", "few_shot_3"}
    teacher = table[table["strategy"] == "teacher"]
    assert teacher.groupby(["on", "layer"]).size().to_dict() == {
        ("own", "features"): 4, ("large", "features"): 4,
    }  # fmt: skip
    assert set(students["n_features"][students["layer"] == "stage1"]) == {8}
    linear = table[(table["probe"] == "linear") & (table["layer"] == "features")]
    mean = linear.groupby(["strategy", "on"])["accuracy"].mean()
    assert (mean > 0.5).all()
    for strategy in ("full", "teacher"):  # the same images but for their size
        assert abs(mean[strategy, "own"] - mean[strategy, "large"]) < 0.15
    assert set(students.loc[students["on"] == "large", "n_train"][students["probe"] == "knn"]) == {
        500
    }
    assert students.loc[students["on"] == "own", "cka_teacher"].between(0, 1).all()
    assert students.loc[students["on"] == "large", "cka_teacher"].isna().all()
    shape = ["effective_rank", "alignment", "uniformity", "weights_sha256"]
    assert (table.groupby(["seed", "step", "on", "layer"])[shape].nunique() == 1).all(axis=None)
    last = study.cells()[0]
    evidence = open_student(study, last, 0)["checkpoints"]["last"]
    rows = students[(students["seed"] == 0) & (students["step"] == 60)]
    assert set(rows["weights_sha256"]) == {evidence["weights_sha256"]}


def test_the_checks_judge_the_study_s_own_data_and_the_last_layer(probed):
    *_, table = _probed(probed)
    before = probe._probe_evidence(table, "own")
    elsewhere = (table["on"] != "own") | (table["layer"] != "features")
    table.loc[elsewhere, ["accuracy", "rank_ratio"]] = 0.0
    assert probe._probe_evidence(table, "own") == before
    table.loc[~elsewhere, "accuracy"] = 0.0
    assert probe._probe_evidence(table, "own") != before


def test_teacher_and_untrained_networks_are_probed_once_whatever_the_cells(
    probed, unwritten, monkeypatch
):
    study, images, _, table = _probed(probed)
    seen, real = [], probe.probe_network
    monkeypatch.setattr(probe, "load_teacher", None)  # its rows are there
    monkeypatch.setattr(
        probe, "probe_network", lambda *given: seen.append(given[2]) or real(*given)
    )
    other = study.probed_cells()[1]
    again = probe.probe_cell(study, images, other)
    assert len(seen) == 2 * 2  # seeds, steps after 0
    at_start = [t[t["step"] == 0]["weights_sha256"].unique().tolist() for t in (table, again)]
    assert at_start[0] == at_start[1]
    assert not set(at_start[0]) & set(seen)
    columns = ["on", "probe", "accuracy", "effective_rank"]
    rows = [t[t["strategy"] == "teacher"][columns].reset_index(drop=True) for t in (table, again)]
    pd.testing.assert_frame_equal(*rows)
    whole = with_untrained(pd.concat([table, again], ignore_index=True))
    assert (whole["strategy"] == "teacher").sum() == 8
    assert (whole["strategy"] == "untrained").sum() == 2 * 2 * 2 * 4  # seeds, data, layers, probes
    assert "places" in draw_comparison(study, compile_tables(study))


def test_seeds_that_stop_early_are_each_judged_at_their_last_step(probed):
    *_, table = _probed(probed)
    first = (table["seed"] == 0) & (table["step"] == 60)
    table.loc[first, "step"] = 50  # it stopped there, and collapsed
    table.loc[first, ["accuracy", "rank_ratio"]] = 0.01
    evidence = probe._probe_evidence(table, "own")
    assert evidence["collapse"]["ratio"] == 0.01
    assert evidence["floor"]["trained"] < 0.6


def test_the_teacher_is_probed_again_when_its_outputs_are_others(probed, monkeypatch):
    study, images, cell, _ = _probed(probed)
    card = open_teacher(study) | {"outputs": {"train": "new"}}
    monkeypatch.setattr(probe, "probe_pair", lambda *_: iter([{"accuracy": 0.5}]))
    [row] = probe._Probing(study, images, cell, card, {}, "cpu").teacher()
    assert row["accuracy"] == 0.5


def test_features_of_the_same_weights_give_the_same_bytes_again(probed):
    study, images, cell, _ = _probed(probed)
    folder = probe.probe_folder(study, cell)
    before = (folder / "probes.parquet").read_bytes()
    (folder / "evidence.json").unlink()
    probe.probe_cell(study, images, cell)
    assert (folder / "probes.parquet").read_bytes() == before


def test_a_weight_file_from_outside_is_probed_as_a_checkpoint_of_the_study_is(probed):
    study, images, cell, table = _probed(probed)
    evidence = open_student(study, cell, 0)
    path = student_folder(study, cell, 0) / evidence["checkpoints"]["last"]["file"]
    found = probe_network.probe_weights(study, images, study.students["tiny"].model, path)
    kept = table[(table["seed"] == 0) & (table["step"] == 60)].reset_index(drop=True)
    same = [c for c in found.columns if c != "cka_teacher"]
    pd.testing.assert_frame_equal(found[same], kept[same])
    text = probe_network.probe_text(found)
    assert f"{100 * found['accuracy'].iloc[0]:.2f}" in text
    assert "| large | stage1 | 8 |" in text
