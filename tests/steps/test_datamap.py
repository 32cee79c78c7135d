"""The datamap of a study: what it is made from, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from tiny import forge, tiny_study

from kdlib.cartography.feature_scores import class_distance
from kdlib.models.networks import network_for
from kdlib.models.weights import load_weights
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import open_images
from kdlib.steps.compare import probes
from kdlib.steps.datamap import gradients, make_datamap, open_datamap, open_map
from kdlib.steps.distill import train_student
from kdlib.steps.probe import open_probes
from kdlib.steps.teacher_outputs import teacher_features


def test_the_map_of_small_data_can_be_committed_and_is_opened_where_no_step_has_run(lab):
    study = tiny_study(lab)
    images = open_images(study)
    made = make_datamap(study, images)
    assert open_map(study, images)[1] == study.runs / "datamap" / "datamap.parquet"
    shutil.rmtree(study.runs / "datamap")
    table, path = open_map(study, images)
    assert path == study.figures / "tables" / "datamap.parquet"
    assert table.equals(made.drop(columns=["grand", "grand_last"]))
    with pytest.raises(ValueError, match=r"of other settings .*teacher.seed: 0 -> 9; run `python"):
        open_map(tiny_study(lab, teacher__seed=9), images)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="or notebooks/03_datamap"):
        open_map(study, images)


def test_a_changed_study_does_not_silently_use_what_was_made_before(lab):
    images = open_images(tiny_study(lab))
    with pytest.raises(ValueError, match="split_seed: 0 -> 3; run `python -m kdlib step"):
        open_images(tiny_study(lab, data__split_seed=3))
    study = tiny_study(lab, dynamics__window=4)
    with pytest.raises(ValueError, match=r"study was changed .* dynamics.window: 3 -> 4"):
        train_student(study, images, study.cell(strategy="easy"), 5)
    study = tiny_study(lab, teacher__seed=9)
    for needing in (
        make_datamap,
        lambda s, i: train_student(s, i, s.cells()[0], 5),
    ):
        with pytest.raises(ValueError, match=r"teacher\.seed: 0 -> 9"):
            needing(study, images)
    study = tiny_study(lab, probe__k=9)
    with pytest.raises(ValueError, match="k: 5 -> 9"):
        probes(study)


def test_a_datamap_of_another_recording_chooses_nothing(lab):
    study = tiny_study(lab)
    images = open_images(study)
    folder = study.recorded_run
    settings = json.loads((folder / "settings.json").read_text())
    settings["inputs"]["more"] = 1
    files.write_json(folder / "settings.json", settings)
    forge(folder, lambda e: e.update(settings_sha256=files.fingerprint(settings)))
    with pytest.raises(ValueError, match=r"recorded: .* -> "):
        open_datamap(study, images)


def test_changed_datamap_and_changed_probe_tables_are_refused(lab):
    study = tiny_study(lab)
    images = open_images(study)
    path = study.runs / "datamap" / "datamap.parquet"
    other = study.runs / "probe" / study.probed_cells()[0].path / "probes.parquet"
    shutil.copy(other, path)
    with pytest.raises(ValueError, match="datamap"):
        open_datamap(study, images)
    table = open_probes(study, study.probed_cells()[0])
    table.assign(accuracy=1.0).to_parquet(other)
    with pytest.raises(ValueError, match="kdlib metadata"):
        open_probes(study, study.probed_cells()[0])


def test_the_datamap_holds_gradients_and_distances_of_the_recorded_network_and_the_teacher(lab):
    study = tiny_study(lab)
    images = open_images(study)
    table = open_datamap(study, images)
    recorded = read_evidence(study.recorded_run)
    network = network_for(images, study.teacher.model, 0, "cpu")
    epoch = round(2 * recorded["epochs_in_steps"])  # dynamics.gradient_epoch: 2
    load_weights(network, study.recorded_run / recorded["series"][str(epoch)])
    grand, grand_last = gradients(images, network, table.index.to_numpy()[:9], "cpu")
    np.testing.assert_allclose(table["grand"][:9], grand, rtol=1e-5)
    np.testing.assert_allclose(table["grand_last"][:9], grand_last, rtol=1e-5)
    features = teacher_features(study, images.train, table.index.to_numpy())
    distance = class_distance(features, table["label"].to_numpy())
    np.testing.assert_allclose(table["class_distance"], distance)
