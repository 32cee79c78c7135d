"""What a finished study says about single images."""

import numpy as np
import pytest

from kdlib.probes.diagnostics import unit_rows
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_datamap
from kdlib.steps.example import Examples
from kdlib.steps.recordings import record
from kdlib.study.load import load_study


@pytest.fixture
def examples(made, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(made))
    study = load_study("params/tiny.yaml")
    return Examples(study, open_images(study))


def test_courses_are_those_behind_the_datamap(examples):
    table = open_datamap(examples.study, examples.images)
    ids = table.index[[3, 500, 7]]
    course = examples.courses(ids)
    assert np.allclose(course.label_prob.mean(axis=0), table.loc[ids, "confidence"], atol=1e-6)
    assert np.allclose(course.correct.mean(axis=0), table.loc[ids, "correctness"])
    right = course.predicted == table.loc[ids, "label"].to_numpy()
    assert np.array_equal(right, course.correct)


def test_teachers_probabilities_are_those_of_its_stored_logits(examples):
    ids = examples.images.train_ids[[0, 9]]
    probs = examples.teacher_probs(ids)
    assert probs.shape == (2, 10)
    assert np.allclose(probs.sum(axis=1), 1)
    logits = examples._stored.read("logits", ids)[:, 0].astype(np.float64)
    assert np.allclose(np.log(probs[0] / probs[0, 0]), logits[0] - logits[0, 0], atol=1e-4)


def test_neighbours_are_the_images_of_the_highest_cosine(examples):
    ids = examples.images.train_ids
    table = examples.neighbours(int(ids[40]), 5)
    unit = unit_rows(examples.features(ids))
    cosine = unit @ unit[40]
    cosine[40] = -2
    assert table["example_id"].tolist() == ids[np.argsort(-cosine, kind="stable")[:5]].tolist()
    assert np.allclose(table["similarity"], np.sort(cosine)[::-1][:5], atol=1e-6)


def test_representatives_are_some_of_the_selection_and_the_same_again(examples):
    ids = examples.images.train_ids[100:400]
    table, n_read = examples.representatives(ids)
    assert n_read == table["size"].sum() == 300
    assert len(table) == 12
    assert np.isin(table["example_id"], ids).all()
    again, _ = Examples(examples.study, examples.images).representatives(ids)
    assert again.equals(table)


@pytest.mark.usefixtures("lab")
def test_each_finished_recording_has_its_regions():
    study = load_study("params/tiny.yaml")
    images = open_images(study)
    none = Examples(study, images).regions_by_recording
    assert none.shape == (len(images.train_ids), 0)
    record(study, images, "wide", "seed=1")
    table = Examples(study, images).regions_by_recording
    assert table.columns.tolist() == ["wide seed=1"]
    assert table.index.tolist() == images.train_ids.tolist()
    assert table["wide seed=1"].isin(["easy", "ambiguous", "hard"]).all()
