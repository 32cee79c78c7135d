"""The steps of a study in one process: what is reused, what is refused, what a lie runs into."""

import json
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from test_pretrained import HUBCONF

from kdlib import (
    __main__,
    building,
    cache,
    checks,
    coresets,
    files,
    loading,
    probing,
    report,
    runs,
    sampling,
    steps,
)
from kdlib.cache import CacheError
from kdlib.models import build_network
from kdlib.params import Model, load_study
from kdlib.probe import Features, linear_probe
from kdlib.seeds import derive
from kdlib.selection import Subset
from kdlib.trainer import checkpoint_steps
from kdlib.weights import load_weights, save_weights, weights_fingerprint

TINY = files.workspace() / "params" / "tiny.yaml"


def _study(home, **changes):
    """The tiny study, some of its values changed, as a file of its own in `home`."""
    content = yaml.safe_load(TINY.read_text())
    for dotted, value in changes.items():
        *path, key = dotted.split("__")
        place = content
        for part in path:
            place = place[part]
        place[key] = value
    path = home / "params" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workspace in which the whole tiny study has run, without notebooks."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = _study(home)
        images = steps.cache_images(study)
        steps.make_teacher(study, images)
        steps.make_datamap(study, images)
        for cell in study.cells():
            for seed in study.seeds:
                steps.train_student(study, images, cell, seed)
        for cell in study.probed_cells():
            probing.probe_cell(study, images, cell)
    return home


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    """A copy of it, to break."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


def _first_run(study):
    return steps.student_folder(study, study.cells()[0], study.seeds[0])


def _forge(folder, change):
    """Change evidence by hand, and seal it again."""
    path = folder / "evidence.json"
    evidence = json.loads(path.read_text())
    change(evidence)
    path.write_text(json.dumps(files.sealed(evidence)))


def test_every_row_of_an_honest_study_is_accepted(home):
    table = report.results(_study(home))
    assert len(table) == 12  # (full, random 33 %, easy 33 %) x (kd, plain) x 2 seeds
    assert not table["refused"].any()
    assert (table["steps"] == 60).all()
    assert (table["samples"] == 60 * 64).all()
    assert set(table["unique_examples"]) == {363, 1100}


def test_finished_runs_are_read_and_not_made_again(home, monkeypatch):
    study = _study(home)
    monkeypatch.setattr(steps, "train", None)
    monkeypatch.setattr(steps, "datamap", None)
    monkeypatch.setattr(steps, "store_outputs", None)
    images = steps.cache_images(study)
    steps.make_teacher(study, images)
    steps.make_datamap(study, images)
    for cell in study.cells():
        steps.train_student(study, images, cell, 0)
    assert len(probing.probe_cell(study, images, study.probed_cells()[0])) > 0


def test_the_same_study_gives_the_same_bytes(made, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    study = _study(tmp_path)
    images = steps.cache_images(study)
    steps.make_teacher(study, images)
    steps.make_datamap(study, images)
    steps.train_student(study, images, study.cells()[0], 1)
    names = [p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.suffix in (
        ".npy", ".parquet", ".safetensors")]  # fmt: skip
    assert len(names) > 20
    for name in names:
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name


def test_a_changed_training_makes_new_students_and_keeps_teacher_and_old_runs(home, monkeypatch):
    study = _study(home, training__lr_peak=0.05)
    monkeypatch.setattr(steps, "store_outputs", None)  # a new teacher would need it
    images = steps.open_images(study)
    steps.make_teacher(study, images)
    steps.train_student(study, images, study.cells()[0], 0)
    evidence = runs.read_evidence(_first_run(study))
    assert len(list((study.runs / "archive").glob("*/distill/**/evidence.json"))) == 1
    assert evidence["settings_sha256"] != json.loads(
        next((study.runs / "archive").glob("*/distill/**/evidence.json")).read_text()
    )["settings_sha256"]  # fmt: skip


def test_paired_seeds_share_initial_weights_across_cells_and_subsets_across_objectives(home):
    study = _study(home)
    by_cell = {
        (c.strategy, c.objective): [runs.read_evidence(steps.student_folder(study, c, s)) for s in
        (0, 1)] for c in study.cells()
    }  # fmt: skip
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


def test_a_saved_subset_is_what_the_student_was_trained_on(home):
    study = _study(home)
    folder = steps.student_folder(study, study.cell(strategy="easy"), 0)
    subset = Subset.load(folder / "subset.parquet")
    evidence = runs.read_evidence(folder)
    assert subset.sha256 == evidence["subset"]["sha256"]
    assert len(subset.example_ids) == evidence["budget"]["recorded"]["unique_examples"] == 363
    images = steps.open_images(study)
    assert not set(subset.example_ids) & set(images.validation_ids)


def test_every_run_says_where_its_weights_began(home):
    study = _study(home)
    images = steps.open_images(study)
    for cell in study.cells():
        for seed in study.seeds:
            found = runs.read_evidence(steps.student_folder(study, cell, seed))["initialisation"]
            network = images.network(study.students["tiny"].model, derive(seed, "init"), "cpu")
            assert found == {"source": "random", "weights_sha256": weights_fingerprint(network)}


# --- lies ----------------------------------------------------------------------------------------


def test_a_loader_that_ignores_its_subset_cannot_finish_a_run(home, monkeypatch):
    study = _study(home, seeds=[7, 8])
    images = steps.open_images(study)

    class Ignoring(loading.Loader):
        def __init__(self, plan, images, **options):
            whole = sampling.Plan(images.example_ids, plan.batch_size, plan.n_steps, 7)
            super().__init__(whole, images, **options)

    monkeypatch.setattr(steps, "Loader", Ignoring)
    with pytest.raises(checks.TripwireError, match="declared -> recorded: unique_examples: 363"):
        steps.train_student(study, images, study.cell(strategy="easy"), 7)
    folder = steps.student_folder(study, study.cell(strategy="easy"), 7)
    assert not (folder / "evidence.json").exists()


def test_a_selection_of_another_size_than_its_fraction_is_refused(home, monkeypatch):
    study = _study(home)
    images = steps.open_images(study)
    monkeypatch.setattr(steps, "select", lambda table, *_: table.index.to_numpy())
    with pytest.raises(ValueError, match=r"easy chose 1100 of 1100.*; a fraction of 0.33 is 363"):
        steps.make_subset(study, images, study.cell(strategy="easy"), 0)


def test_teacher_rows_read_out_of_step_cannot_finish_a_run(home, monkeypatch):
    study = _study(home, seeds=[7, 8], training__steps=200, objectives__kd__alpha=0.1)
    images = steps.open_images(study)
    rng = np.random.default_rng(0)

    class Shuffled(loading.Loader):
        def teacher_rows(self, ranks, views):
            order = rng.permutation(len(self.plan.example_ids))
            return super().teacher_rows(order[ranks], views)

    monkeypatch.setattr(steps, "Loader", Shuffled)
    for seed in study.seeds:
        with pytest.raises(checks.TripwireError, match="pairing: teacher term"):
            steps.train_student(study, images, study.cell(objective="kd"), seed)


def test_a_teacher_below_its_card_stops_the_study(home):
    study = _study(home, teacher__expected_accuracy=0.999)
    with pytest.raises(checks.TripwireError, match=r"teacher_card: .* claimed 99\.90%"):
        steps.make_teacher(study, steps.open_images(study))
    assert not (study.runs / "teacher" / "evidence.json").exists()


def test_a_row_with_another_budget_is_refused_and_shown(home):
    study = _study(home)
    _forge(_first_run(study), lambda e: e["budget"]["recorded"].update(steps=156))
    tables = report.compile_tables(study)
    refused = tables["results"][tables["results"]["refused"]]
    assert refused["run"].tolist() == [str(_first_run(study).relative_to(study.runs))]
    assert "steps: 60 -> 156" in refused["reason"].iloc[0]
    full = tables["strategies"].query("strategy == 'full' and objective == 'kd'").iloc[0]
    assert (full["n_seeds"], full["n_refused"]) == (1, 1)
    told = (
        f"{refused['run'].item()} ({100 * refused['test_accuracy'].item():.1f} %, which enters no"
    )
    assert f"- refused: {told} mean): budget: " in report.summary(study, tables)


def test_a_number_without_its_checkpoint_is_refused(home):
    study = _study(home)
    evidence = runs.read_evidence(_first_run(study))
    path = _first_run(study) / evidence["checkpoints"]["last"]["file"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    table = report.results(study)
    assert table["refused"].sum() == 1
    assert "checkpoints missing or changed: last" in table["reason"].iloc[0]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "files_of",
    ["cache/*/train/images-00001.npy", "cache/*/train/labels-00000.npy",
     "cache/*/test/images-00000.npy", "runs/tiny/teacher/outputs-train/logits-00002.npy"],
)  # fmt: skip
def test_a_flipped_bit_in_a_shard_stops_the_next_training(home, files_of):
    study = _study(home)
    shutil.rmtree(study.runs / "distill")
    (path,) = home.glob(files_of)
    _flip(path)
    with pytest.raises(CacheError, match=rf"{path.name} differ from their checksums; run"):
        steps.train_student(study, steps.open_images(study), study.cell(objective="kd"), 0)
    assert not list(study.runs.glob("distill/**/evidence.json"))


def test_outputs_taken_away_as_damaged_are_stored_again_by_the_teacher_s_weights(
    home, made, monkeypatch
):
    study = _study(home)
    images, folder = steps.open_images(study), study.runs / "teacher" / "outputs-train"
    evidence = (study.runs / "teacher" / "evidence.json").read_bytes()
    _flip(folder / "features-00001.npy")
    building.repair(folder)
    shutil.rmtree(study.runs / "teacher" / "outputs-test")
    monkeypatch.setattr(steps, "train", None)
    steps.make_teacher(study, images)
    for path in (made / "runs/tiny/teacher").rglob("outputs-*/*.npy"):
        assert (home / path.relative_to(made)).read_bytes() == path.read_bytes(), path
    assert (study.runs / "teacher" / "evidence.json").read_bytes() == evidence


def test_kept_weights_that_were_changed_are_not_probed(home):
    study = _study(home)
    cell = study.probed_cells()[0]
    shutil.rmtree(study.runs / "probe")
    _flip(steps.student_folder(study, cell, 0) / "weights-00000030.safetensors")
    with pytest.raises(ValueError, match=r"weights-00000030\.safetensors was changed .*delete"):
        probing.probe_cell(study, steps.open_images(study), cell)


def test_metrics_that_were_changed_are_not_drawn(home):
    study = _study(home)
    path = _first_run(study) / "metrics.parquet"
    table = pd.read_parquet(path, partitioning=None)
    table.assign(validation_accuracy=1.0).to_parquet(path)
    with pytest.raises(ValueError, match=r"metrics\.parquet is missing or was changed"):
        report.curves(study, report.results(study))


def test_two_seeds_that_are_one_are_refused(home):
    study = _study(home)
    cell = study.cells()[0]
    twin = runs.read_evidence(steps.student_folder(study, cell, 1))
    _forge(_first_run(study), lambda e: e.update(order_sha256=twin["order_sha256"]))
    table = report.results(study)
    assert table["refused"].tolist() == [True, True] + [False] * 10
    assert "shares initial weights or order with seed [1]" in table["reason"].iloc[0]


def test_a_run_that_differs_in_more_than_the_factor_is_refused(home):
    study = _study(home)
    folder = steps.student_folder(study, study.cell(strategy="easy"), 0)
    settings = json.loads((folder / "settings.json").read_text())
    settings["inputs"]["split"] = "of another seed"
    files.write_json(folder / "settings.json", settings)
    _forge(folder, lambda e: e.update(settings_sha256=files.fingerprint(settings)))
    table = report.results(study)
    assert table["refused"].sum() == 1
    reason = table[table["refused"]]["reason"].iloc[0]
    assert "differs from the other runs in inputs.split" in reason
    assert reason.endswith("-> of another seed")


def test_a_changed_study_does_not_silently_use_what_was_made_before(home):
    images = steps.open_images(_study(home))
    with pytest.raises(ValueError, match="split_seed: 0 -> 3; run the notebook"):
        steps.open_images(_study(home, data__split_seed=3))
    study = _study(home, dynamics__window=4)
    with pytest.raises(ValueError, match=r"before the study was changed .* scoring.window: 3 -> 4"):
        steps.train_student(study, images, study.cell(strategy="easy"), 5)
    study = _study(home, teacher__seed=9)
    for needing in (steps.make_datamap, lambda s, i: steps.train_student(s, i, s.cells()[0], 5)):
        with pytest.raises(ValueError, match=r"teacher\.seed: 0 -> 9"):
            needing(study, images)
    study = _study(home, probe__k=9)
    with pytest.raises(ValueError, match="k: 5 -> 9"):
        report.probes(study)


def test_rows_made_before_the_study_was_changed_are_refused(home):
    table = report.results(_study(home, objectives__kd__alpha=0.9))
    assert table.groupby("objective")["refused"].mean().to_dict() == {"kd": 1.0, "plain": 0.0}
    assert "objective.alpha: 0.5 -> 0.9" in table[table["refused"]]["reason"].iloc[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data__split_seed": 3}, "split_seed: 0 -> 3"),
        ({"teacher__seed": 7}, "teacher.seed: 0 -> 7"),
    ],
)
def test_a_table_is_of_the_images_and_the_teacher_the_study_has_now(home, changes, told):
    with pytest.raises(ValueError, match=told):
        report.results(_study(home, **changes))


@pytest.mark.parametrize(
    ("forge", "told"),
    [
        (lambda e: e["data"].update(split="of another seed"), "images"),
        (lambda e: e["teacher"].update(weights_sha256="0" * 64), "teacher outputs"),
        (lambda e: e["subset"].update(parent_datamap="0" * 64), "datamap"),
    ],
)
def test_rows_of_another_study_s_making_are_refused(home, forge, told):
    study = _study(home)
    folder = steps.student_folder(study, study.cell(strategy="easy", objective="kd"), 0)
    _forge(folder, forge)
    table = report.results(study)
    reason = table[table["refused"]]["reason"].item()
    assert f"made of another study's {told}: run notebook 04 again" in reason


def test_a_datamap_of_another_recording_chooses_nothing(home):
    study = _study(home)
    images = steps.open_images(study)
    folder = study.recorded_run
    settings = json.loads((folder / "settings.json").read_text())
    settings["inputs"]["more"] = 1
    files.write_json(folder / "settings.json", settings)
    _forge(folder, lambda e: e.update(settings_sha256=files.fingerprint(settings)))
    with pytest.raises(ValueError, match=r"recorded: .* -> "):
        steps.open_datamap(study, images)


@pytest.mark.parametrize("epoch", range(1, 8))
def test_the_kept_epoch_is_the_step_its_readers_ask_for(home, epoch):
    study = _study(home)
    training = study.training.model_copy(update={"batch_size": 32, "checkpoint_fractions": (0, 1)})
    n = 50_000
    plan = sampling.Plan(np.arange(n), 32, round(7 * n / 32), 0)
    kept = checkpoint_steps(steps.keep_epoch(training, plan, epoch), plan.n_steps)
    assert round(epoch * (n / 32)) in kept


def test_a_missing_run_is_refused_and_named(home):
    study = _study(home)
    shutil.rmtree(_first_run(study))
    assert "holds no finished run" in report.results(study)["reason"].iloc[0]


def test_no_row_left_is_no_comparison(home):
    study = _study(home)
    shutil.rmtree(study.runs / "distill")
    with pytest.raises(checks.TripwireError, match="every row is refused"):
        report.compile_tables(study)


def test_changed_datamap_and_changed_probe_tables_are_refused(home):
    study = _study(home)
    images = steps.open_images(study)
    path = study.runs / "datamap" / "datamap.parquet"
    other = study.runs / "probe" / study.probed_cells()[0].path / "probes.parquet"
    shutil.copy(other, path)
    with pytest.raises(ValueError, match="datamap"):
        steps.open_datamap(study, images)
    table = probing.open_probes(study, study.probed_cells()[0])
    table.assign(accuracy=1.0).to_parquet(other)
    with pytest.raises(ValueError, match="kdlib metadata"):
        probing.open_probes(study, study.probed_cells()[0])


def test_test_features_of_an_untrained_network_are_refused(home):
    rng = np.random.default_rng(0)
    ids = np.arange(40)

    def features(split, weights):
        values = rng.normal(size=(40, 4)).astype(np.float32)
        return Features(values, ids % 2, ids, split, weights)

    with pytest.raises(ValueError, match="weights"):
        linear_probe(features("train", "trained"), features("test", "untrained"), [1.0], 0)


def test_probes_stand_beside_an_untrained_student_and_the_teacher(home):
    table = report.probes(_study(home))
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
    home = tmp_path_factory.mktemp("probed")
    shutil.copytree(made, home, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        _probed(home)
    return home


@pytest.fixture
def probed(probed_once, tmp_path, monkeypatch):
    """A copy of it, to break."""
    shutil.copytree(probed_once, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


def _probed(home):
    study = _study(home, probe=yaml.safe_load(TINY.read_text())["probe"] | PLACES)
    images = steps.open_images(study)
    cell = study.probed_cells()[0]
    return study, images, cell, probing.probe_cell(study, images, cell)


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
    evidence = steps.open_student(study, last, 0)["checkpoints"]["last"]
    rows = students[(students["seed"] == 0) & (students["step"] == 60)]
    assert set(rows["weights_sha256"]) == {evidence["weights_sha256"]}


def test_the_tripwires_judge_the_study_s_own_data_and_the_last_layer(probed):
    _, images, _, table = _probed(probed)
    before = probing._probe_evidence(table, images)
    elsewhere = (table["on"] != "own") | (table["layer"] != "features")
    table.loc[elsewhere, ["accuracy", "rank_ratio"]] = 0.0
    assert probing._probe_evidence(table, images) == before
    table.loc[~elsewhere, "accuracy"] = 0.0
    assert probing._probe_evidence(table, images) != before


def test_teacher_and_untrained_networks_are_probed_once_whatever_the_cells(probed, monkeypatch):
    study, images, _, table = _probed(probed)
    seen, probe_network = [], probing._probe_network
    monkeypatch.setattr(probing, "made_teacher", None)  # its rows are there
    monkeypatch.setattr(
        probing, "_probe_network", lambda *given: seen.append(given[3]) or probe_network(*given)
    )
    other = study.probed_cells()[1]
    again = probing.probe_cell(study, images, other)
    assert len(seen) == 2 * 2 * 2  # seeds, steps after 0, data
    at_start = [t[t["step"] == 0]["weights_sha256"].unique().tolist() for t in (table, again)]
    assert at_start[0] == at_start[1]
    assert not set(at_start[0]) & set(seen)
    columns = ["on", "probe", "accuracy", "effective_rank"]
    rows = [t[t["strategy"] == "teacher"][columns].reset_index(drop=True) for t in (table, again)]
    pd.testing.assert_frame_equal(*rows)
    whole = report.with_untrained(pd.concat([table, again], ignore_index=True))
    assert (whole["strategy"] == "teacher").sum() == 8
    assert (whole["strategy"] == "untrained").sum() == 2 * 2 * 2 * 4  # seeds, data, layers, probes
    assert "places" in report.draw_comparison(study, report.compile_tables(study))


def test_seeds_that_stop_early_are_each_judged_at_their_last_step(probed):
    _, images, _, table = _probed(probed)
    first = (table["seed"] == 0) & (table["step"] == 60)
    table.loc[first, "step"] = 50  # it stopped there, and collapsed
    table.loc[first, ["accuracy", "rank_ratio"]] = 0.01
    evidence = probing._probe_evidence(table, images)
    assert evidence["collapse"]["ratio"] == 0.01
    assert evidence["floor"]["trained"] < 0.6


def test_the_teacher_is_probed_again_when_its_outputs_are_others(probed, monkeypatch):
    study, images, cell, _ = _probed(probed)
    pair = probing._teacher_pair(study, images, steps.open_teacher(study))
    monkeypatch.setattr(probing, "_probe_pair", lambda *_: iter([{"accuracy": 0.5}]))
    rows = list(probing._probe_teacher(study, images, cell, pair, {"train": "new"}, {}, "cpu"))
    assert rows[0]["accuracy"] == 0.5


def test_features_of_the_same_weights_give_the_same_bytes_again(probed):
    study, images, cell, _ = _probed(probed)
    folder = probing.probe_folder(study, cell)
    before = (folder / "probes.parquet").read_bytes()
    (folder / "evidence.json").unlink()
    probing.probe_cell(study, images, cell)
    assert (folder / "probes.parquet").read_bytes() == before


def test_a_weight_file_from_outside_is_probed_as_a_checkpoint_of_the_study_is(probed):
    study, images, cell, table = _probed(probed)
    evidence = steps.open_student(study, cell, 0)
    path = steps.student_folder(study, cell, 0) / evidence["checkpoints"]["last"]["file"]
    found = probing.probe_weights(study, images, study.students["tiny"].model, path)
    kept = table[(table["seed"] == 0) & (table["step"] == 60)].reset_index(drop=True)
    same = [c for c in found.columns if c != "cka_teacher"]
    pd.testing.assert_frame_equal(found[same], kept[same])
    told = probing.told(found)
    assert f"{100 * found['accuracy'].iloc[0]:.2f}" in told
    assert "| large | stage1 | 8 |" in told


def test_a_gpu_that_is_not_there_is_not_replaced_by_the_cpu(home, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    study = _study(home, compute={"device": "cuda"})
    with pytest.raises(RuntimeError, match="torch sees no GPU here"):
        steps.make_teacher(study, steps.open_images(study))


def test_a_missing_weight_file_and_a_missing_step_say_what_to_do(home, tmp_path):
    study = _study(
        home, teacher={"model": {"name": "cifar_resnet8"}, "weights": "absent.safetensors",
                       "trained_on": "elsewhere",
                       "expected_accuracy": 0.9},
        dynamics={"model": {"name": "tiny_cnn"}, "window": 3, "el2n_epoch": 2,
                  "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}},
    )  # fmt: skip
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors are not there"):
        steps.make_teacher(study, steps.open_images(study))
    shutil.rmtree(study.runs)
    with pytest.raises(FileNotFoundError, match="run the notebook"):
        steps.open_images(study)


def test_a_teacher_read_from_a_file_leaves_the_datamap_to_a_recorded_network(home):
    before = _study(home)
    evidence = runs.read_evidence(before.runs / "teacher")
    weights = before.runs / "teacher" / evidence["checkpoints"]["last"]["file"]
    kept = home / "data" / "teacher.safetensors"
    kept.parent.mkdir()
    shutil.copy(weights, kept)
    study = _study(
        home, teacher={"model": {"name": "tiny_cnn", "options": {"width": 8}},
                       "weights": "teacher.safetensors", "trained_on": "kept",
                       "expected_accuracy": 0.5},
        dynamics={"model": {"name": "tiny_cnn"}, "window": 3, "el2n_epoch": 2, "observed": "eval",
                  "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}},
    )  # fmt: skip
    images = steps.open_images(study)
    loaded = steps.make_teacher(study, images)["teacher"]
    assert loaded["weights_sha256"] == evidence["teacher"]["weights_sha256"]
    assert loaded["measured"] == evidence["teacher"]["measured"]
    assert len(steps.make_datamap(study, images)) == 1100
    assert (study.runs / "dynamics" / "evidence.json").exists()


def test_a_loaded_teacher_s_outputs_can_be_stored_in_parts_from_the_command_line(home, capsys):
    before = _study(home)
    evidence = runs.read_evidence(before.runs / "teacher")
    weights = home / "data" / "teacher.safetensors"
    weights.parent.mkdir()
    shutil.copy(before.runs / "teacher" / evidence["checkpoints"]["last"]["file"], weights)
    whole = home / "whole"
    shutil.move(before.runs / "teacher", whole)
    with pytest.raises(ValueError, match="trained by notebooks/02_teacher"):
        steps.store_part(before, steps.open_images(before), (1, 2))
    teacher = {"model": {"name": "tiny_cnn", "options": {"width": 8}},
               "weights": "teacher.safetensors", "trained_on": "kept",
                       "expected_accuracy": 0.5}  # fmt: skip
    recorded = {"model": {"name": "tiny_cnn"}, "window": 3, "el2n_epoch": 2,
                "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1}}  # fmt: skip
    study = _study(home, teacher=teacher, dynamics=recorded)
    folder = steps.outputs_folder(study, "train")
    for part in ("2/2", "1/2"):
        with pytest.MonkeyPatch.context() as patch:
            file = str(home / "params" / "tiny.yaml")
            patch.setattr("sys.argv", ["kdlib", "cache", "outputs", file, "--part", part])
            assert __main__.main() == 0
    assert "3 of 5 shards, 697 of 1,297 examples; missing: " in capsys.readouterr().out
    loaded = steps.make_teacher(study, steps.open_images(study))["teacher"]
    assert loaded["outputs"]["train"] == evidence["teacher"]["outputs"]["train"]
    for path in (whole / "outputs-train").glob("*.npy"):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def _files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_figures_are_drawn_from_the_records_and_are_the_same_bytes_twice(home):
    study = _study(home)
    drawn = report.draw_datamap(study) | report.redraw(study)[0]
    names = {f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")}
    names |= {"summary.md", "objectives.md", "ledger.md", "comparison.md", "comparison.tex"}
    first = _files(study.figures)
    tables = {f"tables/{name}.parquet" for name in ("results", "curves", "probes", "costs")}
    assert set(first) == names | tables
    assert sum(len(first[name]) for name in tables) < 300_000
    report.draw_datamap(study)
    report.redraw(study)
    assert _files(study.figures) == first


def test_a_clone_without_runs_redraws_the_same_bytes_from_the_committed_tables(
    home, monkeypatch, capsys
):
    study = _study(home)
    report.draw_datamap(study)
    report.finish(study, report.compile_tables(study))
    monkeypatch.setattr("sys.argv", ["kdlib", "figures", str(home / "params" / "tiny.yaml")])
    assert __main__.main() == 0
    assert "the comparison is drawn from its runs" in capsys.readouterr().out
    first = _files(study.figures)
    shutil.rmtree(study.runs)
    shutil.rmtree(study.cache)
    for path in study.figures.glob("*.*"):
        if path.stem not in ("datamap", "forming", "regions"):
            path.unlink()
    monkeypatch.setattr("sys.argv", ["kdlib", "figures"])  # all studies that have tables
    assert __main__.main() == 0
    told = capsys.readouterr().out
    assert "tiny: the comparison is drawn from its committed tables" in told
    assert "not drawn, since their records are not in" in told
    assert "datamap, forming, regions" in told
    assert _files(study.figures) == first


def test_changed_or_foreign_tables_draw_nothing_and_stop_no_other_study(home, monkeypatch, capsys):
    study = _study(home)
    report.compile_tables(study)
    shutil.copytree(study.figures, home / "figures" / "twin")
    shutil.copy(home / "params" / "tiny.yaml", home / "params" / "twin.yaml")
    shutil.rmtree(study.runs)
    monkeypatch.setattr("sys.argv", ["kdlib", "figures"])
    assert __main__.main() == 1
    told = capsys.readouterr()
    assert "tiny: the comparison is drawn from its committed tables" in told.out
    assert "twin.yaml: ValueError" in told.err
    assert "study: tiny -> twin" in told.err
    path = study.figures / "tables" / "results.parquet"
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tiney"[:4], 1)[:-1])
    before = (study.figures / "summary.md").read_bytes()
    monkeypatch.setattr("sys.argv", ["kdlib", "figures", "params/tiny.yaml"])
    assert __main__.main() == 1
    assert "cut or damaged" in capsys.readouterr().err
    assert (study.figures / "summary.md").read_bytes() == before
    shutil.rmtree(study.figures / "tables")
    assert __main__.main() == 1
    assert "has neither runs" in capsys.readouterr().err


def test_every_row_says_the_command_that_makes_its_cell_again(home):
    study = _study(home)
    tables = report.compile_tables(study)
    summary = report.summary(study, tables)
    for name in ("results", "strategies", "objectives"):
        for row in tables[name].to_dict("records"):
            program, notebook, _, *options = shlex.split(row["command"])
            assert (program, notebook) == ("papermill", "notebooks/04_distill.ipynb")
            assert options[::3] == ["-p"] * 5
            given = dict(zip(options[1::3], options[2::3], strict=True))
            assert load_study(given.pop("study")) == study
            cell = study.cell(**given)
            assert dict(cell.items()) == {axis: row[axis] for axis in dict(cell.items())}
            assert f"`{row['command']}`" in summary


def test_run_tables_say_what_each_number_was_made_from(home):
    study = _study(home)
    table = report.compile_tables(study)["results"]
    for row in table.to_dict("records"):
        evidence = runs.read_evidence(study.runs / row["run"])
        assert row["checkpoint_sha256"] == evidence["checkpoints"]["last"]["file_sha256"]
        assert row["subset_sha256"] == evidence["subset"]["sha256"]
        teacher = evidence["teacher"]
        assert row["teacher_sha256"] == (teacher["weights_sha256"] if teacher else "")
        assert (row["data_train"], row["data_split"]) == (
            evidence["data"]["train"], evidence["data"]["split"],
        )  # fmt: skip
        assert row["declared_steps"] == row["steps"] == 60
        assert row["settings_sha256"] == evidence["settings_sha256"]
        assert f"torch {evidence['made']['versions']['torch']}" in row["versions"]
    assert not table.isna().drop(columns=["linear_accuracy", "knn_accuracy"]).any(axis=None)
    assert str(home) not in table.to_csv()
    shutil.rmtree(_first_run(study))
    refused = report.compile_tables(study)["results"].iloc[0]
    assert refused["refused"]
    assert refused["reason"].startswith("runs/tiny/distill/student=tiny")
    assert str(home) not in report.summary(study, report.compile_tables(study))


def test_a_study_of_features_compares_the_probe_of_the_last_step(home):
    study = _study(
        home, compare={"baseline": "random", "margin": 0.02, "measure": "linear"},
        probe={"strategy": ["full", "random", "easy"], "fraction": 0.33, "k": 5,
               "objective": ["kd", "plain"], "c_grid": [0.1, 10.0]},
    )  # fmt: skip
    table = report.results(study)
    lacking = ~(table["strategy"].isin(["full", "easy"]) & (table["objective"] == "kd"))
    assert table["refused"].tolist() == lacking.tolist()
    assert "holds no finished run" in table[lacking]["reason"].iloc[0]
    images = steps.open_images(study)
    for cell in study.cells():
        probing.probe_cell(study, images, cell)
    tables = report.compile_tables(study)
    assert not tables["results"]["refused"].any()
    by_hand = probing.open_probes(study, study.cell(strategy="easy"))
    last = by_hand.query("step == 60 and probe == 'linear' and seed == 1")["accuracy"].item()
    row = tables["results"].query("strategy == 'easy' and objective == 'kd' and seed == 1")
    assert row["linear_accuracy"].item() == last
    assert row["test_accuracy"].item() != last
    [compared] = tables["strategies"].query("strategy == 'easy' and objective == 'kd'").index
    pair = tables["results"].query("objective == 'kd'").groupby("strategy")["linear_accuracy"]
    wanted = pair.mean()["easy"] - pair.mean()["random"]
    assert tables["strategies"].loc[compared, "difference"] == pytest.approx(wanted)
    assert "linear probe of the last step's features" in report.summary(study, tables)
    assert set(report.redraw(study)[0]) >= {"accuracy", "differences"}
    path = probing.probe_folder(study, study.cell(strategy="easy"))
    _forge(path, lambda e: e["floor"].update(untrained=0.999))
    found = report.results(study)
    assert found[found["refused"]]["reason"].str.contains("probe_floor").tolist() == [True] * 2


def test_probes_of_refused_runs_are_left_out_or_called_so(home):
    study = _study(home)
    cell = study.cell(strategy="easy")
    _forge(steps.student_folder(study, cell, 0), lambda e: e["budget"]["recorded"].update(steps=9))
    tables = report.compile_tables(study)
    shown = report._judged(tables["probes"], tables["results"]).query("strategy == 'easy'")
    assert set(shown["seed"]) == {1}
    _forge(steps.student_folder(study, cell, 1), lambda e: e["budget"]["recorded"].update(steps=9))
    tables = report.compile_tables(study)
    shown = report._judged(tables["probes"], tables["results"])
    assert set(shown["strategy"]) == {"full", "easy_(refused)", "untrained", "teacher"}
    assert len(shown) == len(tables["probes"])
    assert "probes" in report.draw_comparison(study, tables)


def test_a_probe_of_other_weights_is_no_measure(home):
    study = _study(
        home, compare={"baseline": "random", "margin": 0.02, "measure": "knn"},
        probe={"strategy": ["full", "random", "easy"], "fraction": 0.33, "k": 5,
               "objective": ["kd", "plain"], "c_grid": [0.1, 10.0]},
    )  # fmt: skip
    folder = steps.student_folder(study, study.cell(strategy="easy"), 0)
    _forge(folder, lambda e: e["checkpoints"]["last"].update(weights_sha256="0" * 64))
    row = report.results(study).query("strategy == 'easy' and objective == 'kd' and seed == 0")
    assert "its knn probe is of other weights" in row["reason"].item()


def test_the_ledger_charges_what_the_study_recorded(home):
    study = _study(home)
    tables = report.compile_tables(study)
    spent = tables["costs"].set_index("what")["wall_s"]
    evidence = runs.read_evidence(study.runs / "teacher")
    assert spent["teacher"] == evidence["made"]["wall_s"]
    table = tables["ledger"].set_index(["strategy", "objective"])["selection_s"]
    assert table["random"].tolist() == [0, 0]
    assert table["easy", "kd"] == pytest.approx(spent["datamap"])
    # without a teacher its training was for the map alone
    assert table["easy", "plain"] == pytest.approx(spent["datamap"] + spent["teacher"])
    text = report.ledger_text(study, tables)
    assert f"| teacher | {spent['teacher']:.3g} | 86 |" in text


# --- shards, views, parts --------------------------------------------------------------------


def test_shard_policies_are_strategies_with_budgets_of_their_own(home):
    study = _study(home, axes__strategy=["random", "easy", "fixed_shards", "random_shards"])
    images = steps.open_images(study)
    size = images.train.shard_size
    evidence = {
        s: steps.train_student(study, images, study.cell(strategy=s), 0)
        for s in ("fixed_shards", "random_shards")
    }
    assert all(check["passed"] for e in evidence.values() for check in e["checks"])
    fixed, drawn = evidence["fixed_shards"], evidence["random_shards"]
    # five shards of 300, the last one shorter: a third of them is two
    ids = steps.make_subset(study, images, study.cell(strategy="fixed_shards"), 0).example_ids
    assert len(np.unique(ids // size)) == 2
    assert fixed["budget"]["declared"]["unique_examples"] == len(ids)
    assert fixed["coverage"]["most"] - fixed["coverage"]["fewest"] <= 1
    assert drawn["coverage"]["shards_per_pass"] == 2
    assert drawn["coverage"]["most"] - drawn["coverage"]["fewest"] > 1
    assert drawn["subset"]["n_examples"] == len(images.train_ids)


def _picked(study, images, ids, name="mine"):
    """Save a selection as the explorer does."""
    data = files.fingerprint(images.fingerprints)
    parent = runs.read_evidence(study.runs / "datamap")["datamap_sha256"]
    fraction = len(ids) / len(images.train_ids)
    subset = Subset(np.sort(ids), f"picked_{name}", fraction, 0, parent, data)
    subset.save(study.runs / "selections" / f"{name}.parquet")
    return subset


def _student(study, images, **axes):
    cell = study.cell(**axes)
    return cell, steps.train_student(study, images, cell, 0)


@pytest.mark.parametrize("policy", ["fixed_shards", "random_shards"])
def test_the_biased_scheme_is_trained_refused_and_shown_with_its_number(home, policy):
    study = _study(home, axes__strategy=["random", "easy", policy, f"{policy}_cut"])
    images = steps.open_images(study)
    for cell in study.cells():
        for seed in study.seeds:
            steps.train_student(study, images, cell, seed)
    table = report.results(study)
    exhibits = table["strategy"] == f"{policy}_cut"
    assert exhibits.sum() == 4
    assert table[exhibits]["refused"].all()
    assert table[exhibits]["reason"].str.contains("coverage: ").all()
    assert table[exhibits]["test_accuracy"].between(0, 1).all()
    honest = table[table["strategy"] == policy]
    assert not honest["refused"].any()
    if policy == "fixed_shards":  # of the same shards the last ones are not reached
        fewer = table[exhibits]["unique_examples"].to_numpy()
        assert (fewer < honest["unique_examples"].to_numpy()).all()


def test_an_exhibit_that_no_tripwire_catches_is_not_kept(home, monkeypatch):
    strategies = ["random", "easy", "fixed_shards_cut"]
    study = _study(home, axes__strategy=strategies, training__order="sequential")
    monkeypatch.setattr(steps, "CUT", 1.0)
    with pytest.raises(checks.TripwireError, match="passes every tripwire; expected one to fail"):
        _student(study, steps.open_images(study), strategy="fixed_shards_cut")


OWN = {
    "model": {"name": "tiny_cnn", "options": {"width": 8}},
    "training": {"steps": 60, "batch_size": 64, "lr_peak": 0.1},
    "expected_accuracy": 0.3,
}


def _taught_study(home, **own):
    objectives = {
        "kd": {"kind": "kd", "alpha": 0.5, "temperature": 2.0},
        "plain": {"kind": "cross_entropy"},
        "other": {"kind": "kd", "alpha": 0.5, "temperature": 2.0, "teacher": "other"},
    }
    _study(home)
    path = home / "params" / "tiny.yaml"
    content = yaml.safe_load(path.read_text())
    content |= {"objectives": objectives, "teachers": {"other": OWN | own}}
    content["axes"]["objective"] = ["kd", "plain", "other"]
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def test_students_of_a_further_teacher_hear_that_one(home, monkeypatch, capsys):
    study = _taught_study(home)
    images = steps.open_images(study)
    with pytest.raises(FileNotFoundError, match=r"teachers/other holds no finished run"):
        _student(study, images, objective="other")
    # the study's own teacher and its students stand as they were
    before = runs.read_evidence(steps.teacher_folder(study))
    command = ["kdlib", "step", "teacher", str(home / "params" / "tiny.yaml"), "--teacher"]
    monkeypatch.setattr("sys.argv", [*command, "othr"])
    assert __main__.main() == 1
    assert "no teacher 'othr' in this study's `teachers`; did you mean" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", [*command, "other"])
    assert __main__.main() == 0
    steps.make_teacher(study, images)
    assert runs.read_evidence(steps.teacher_folder(study)) == before
    _, heard = _student(study, images, objective="other")
    _, usual = _student(study, images, objective="kd")
    card = steps.open_teacher(study, "other")
    assert heard["teacher"] == card
    assert usual["teacher"] == steps.open_teacher(study)
    assert card["weights_sha256"] != usual["teacher"]["weights_sha256"]
    assert heard["initialisation"] == usual["initialisation"]
    assert heard["checkpoints"]["last"] != usual["checkpoints"]["last"]


def test_a_teacher_of_the_subset_alone_has_seen_nothing_else(home):
    study = _taught_study(home, learns_from="subset")
    images = steps.open_images(study)
    steps.make_teacher(study, images)
    assert not (study.runs / "teachers").exists()  # there is one for each subset
    cell, evidence = _student(study, images, strategy="easy", objective="other")
    (folder,) = (study.runs / "teachers" / "other").glob("subset=*/seed=0")
    teacher = runs.read_evidence(folder)
    subset = steps.make_subset(study, images, cell, 0)
    assert teacher["subset"]["sha256"] == subset.sha256
    assert teacher["coverage"]["unique"] == len(subset) < len(images.train_ids)
    assert teacher["coverage"]["outside_subset"] == 0
    assert evidence["teacher"] == teacher["teacher"]
    assert evidence["teacher"]["trained_on"] == "subset"
    # student and teacher are one architecture and yet draw apart
    assert teacher["initialisation"] != evidence["initialisation"]
    assert teacher["order_sha256"] != evidence["order_sha256"]
    before = (folder / "evidence.json").read_bytes()
    _student(study, images, strategy="easy", objective="other")
    assert (folder / "evidence.json").read_bytes() == before
    steps.train_student(study, images, cell, 1)
    assert len(list((study.runs / "teachers" / "other").glob("subset=*/seed=*"))) == 2
    table = report.results(study)
    mine = (table["strategy"] == "easy") & (table["objective"] == "other")
    assert not table[mine | (table["objective"] != "other")]["refused"].any()


def test_a_study_that_shares_a_teacher_makes_students_alone(home, monkeypatch):
    other = {"base": "tiny.yaml", "shares": "tiny.yaml", "training": {"steps": 30}}
    path = home / "params" / "less.yaml"
    path.write_text(yaml.safe_dump(other))
    study = load_study(path)
    monkeypatch.setattr(steps, "store_outputs", None)
    images = steps.cache_images(study)
    steps.make_teacher(study, images)
    steps.make_datamap(study, images)
    _, evidence = _student(study, images, strategy="easy", objective="kd")
    assert sorted(path.name for path in study.runs.iterdir()) == ["distill"]
    assert evidence["teacher"] == steps.open_teacher(load_study(home / "params" / "tiny.yaml"))
    assert evidence["subset"]["parent_datamap"] == runs.read_evidence(
        study.upstream.runs / "datamap"
    )["datamap_sha256"]  # fmt: skip


def test_a_selection_made_by_hand_is_trained_on_and_compared_with_a_random_one_of_its_size(home):
    study = _study(home)
    images = steps.open_images(study)
    subset = _picked(study, images, images.train_ids[5:102:2])
    study = _study(home, axes__strategy=["random", "easy", "picked_mine"])
    cells = [c for c in study.cells() if c.fraction == subset.fraction]
    assert {c.strategy for c in cells} == {"random", "picked_mine"}
    for cell in cells:
        for seed in study.seeds:
            evidence = steps.train_student(study, images, cell, seed)
            assert evidence["subset"]["n_examples"] == 49
    picked = steps.open_student(study, study.cell(strategy="picked_mine"), 0)
    assert picked["subset"]["sha256"] == subset.sha256
    assert picked["subset"]["parent_datamap"] == subset.parent
    compared = report.compile_tables(study)["strategies"]
    [row] = compared.query("strategy == 'picked_mine' and objective == 'kd'").to_dict("records")
    assert (row["against_strategy"], row["n_seeds"]) == ("random", 2)


def test_a_selection_of_other_images_or_with_held_out_ones_is_refused(home):
    study = _study(home)
    images = steps.open_images(study)
    _picked(study, images, np.append(images.train_ids[:9], images.validation_ids[:1]))
    with pytest.raises(ValueError, match="10 examples, 1 of them no training images"):
        steps.make_subset(study, images, study.cell(strategy="picked_mine"), 0)
    other = Subset(images.train_ids[:9], "picked_other", 9 / 1100, 0, None, "other images")
    other.save(study.runs / "selections" / "other.parquet")
    with pytest.raises(ValueError, match="made from something else"):
        steps.make_subset(study, images, study.cell(strategy="picked_other"), 0)


@pytest.mark.parametrize("strategy", ["herding", "ccs", "random_balanced", "mixed"])
def test_rules_of_their_own_train_on_exactly_their_budget(home, strategy):
    study = _study(home, selections={"mixed": {"kind": "mixture", "shares": {"easy": 1.0}}})
    images = steps.open_images(study)
    subset = steps.make_subset(study, images, study.cell(strategy=strategy), 0)
    assert len(subset) == 363
    assert (subset.strategy, subset.parent is None) == (strategy, False)
    if strategy == "mixed":  # of one region: that region
        easy = steps.make_subset(study, images, study.cell(strategy="easy"), 0)
        assert subset.sha256 == easy.sha256


def test_the_datamap_holds_gradients_and_distances_of_the_recorded_network_and_the_teacher(home):
    study = _study(home)
    images = steps.open_images(study)
    table = steps.open_datamap(study, images)
    recorded = runs.read_evidence(study.recorded_run)
    network = images.network(study.teacher.model, 0, "cpu")
    epoch = round(2 * recorded["epochs_in_steps"])  # dynamics.gradient_epoch: 2
    load_weights(network, study.recorded_run / recorded["series"][str(epoch)])
    grand, grand_last = steps.gradients(images, network, table.index.to_numpy()[:9], "cpu")
    np.testing.assert_allclose(table["grand"][:9], grand, rtol=1e-5)
    np.testing.assert_allclose(table["grand_last"][:9], grand_last, rtol=1e-5)
    features = steps.teacher_features(study, images.train, table.index.to_numpy())
    distance = coresets.class_distance(features, table["label"].to_numpy())
    np.testing.assert_allclose(table["class_distance"], distance)


def test_a_gradient_epoch_beyond_the_training_is_refused(home):
    study = _study(home, dynamics__gradient_epoch=9)
    with pytest.raises(ValueError, match="gradient_epoch is 9; the recorded training ends after"):
        steps.make_teacher(study, steps.open_images(study))


def test_a_loader_that_draws_other_shards_than_planned_cannot_finish_a_run(home, monkeypatch):
    study = _study(home, axes__strategy=["random", "easy", "random_shards"])
    images = steps.open_images(study)

    class Sorted(loading.Loader):
        def __init__(self, plan, images, **options):
            super().__init__(plan, images, **options)
            plan.members = lambda number: np.arange(plan.shards_per_pass)
            self.batch(0)
            del plan.members

    monkeypatch.setattr(steps, "Loader", Sorted)
    with pytest.raises(checks.TripwireError, match="not as often as planned"):
        steps.train_student(study, images, study.cell(strategy="random_shards"), 0)


def test_students_of_replayed_views_see_what_the_teacher_saw(home):
    study = _study(
        home,
        teacher__outputs={"views": 3, "top_k": 4},
        training__augment={"crop_padding": 1},
    )
    images = steps.open_images(study)
    card = steps.make_teacher(study, images)["teacher"]
    assert set(card["outputs"]) == {"train", "test", "replayed"}
    for objective in ("kd", "plain"):
        evidence = steps.train_student(study, images, study.cell(objective=objective), 0)
        assert all(check["passed"] for check in evidence["checks"])
    # stored outputs know their views: a student that would see others is refused
    stored = steps.open_outputs(
        steps.outputs_folder(study, "replayed"), images.train, card["weights_sha256"]
    )
    plan = sampling.Plan(images.train_ids, 64, 3, 0)
    view = loading.View(study.training.augment, 1, images.pixels, 3)
    with pytest.raises(CacheError, match="outputs of other views"):
        loading.Loader(plan, images.train, view=view, teacher=stored)


def test_a_study_on_part_of_the_shards_learns_from_those_alone(home):
    study = _study(home, data__part="1/2", data__n_validation=100, teacher__expected_accuracy=0.3)
    images = steps.cache_images(study)
    assert images.train.example_ids.tolist() == list(range(600))
    assert max(images.train_ids.max(), images.validation_ids.max()) == 599
    steps.make_teacher(study, images)
    steps.make_datamap(study, images)
    evidence = steps.train_student(study, images, study.cell(strategy="easy"), 0)
    assert all(check["passed"] for check in evidence["checks"])
    assert evidence["subset"]["n_examples"] == 165  # 33 % of 500
    assert steps.open_images(study).fingerprints == images.fingerprints


def test_where_pixels_are_kept_changes_no_weight_and_no_setting(home):
    plain = _study(home)
    cell = plain.cell(strategy="easy", objective="kd")
    before = runs.read_evidence(steps.student_folder(plain, cell, 0))
    mapped = _study(home, compute={"images": "mapped"})
    images = steps.open_images(mapped)
    assert steps.train_student(mapped, images, cell, 0) == before  # not trained again
    shutil.rmtree(steps.student_folder(plain, cell, 0))
    again = steps.train_student(mapped, images, cell, 0)
    assert again["checkpoints"]["last"] == before["checkpoints"]["last"]


def test_images_without_labels_are_cached_and_then_refused_by_name(home):
    rng = np.random.default_rng(0)
    for i in range(12):
        path = home / "data" / "wild" / ("train" if i < 9 else "test") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(path)
    data = {"source": "folder", "folder": "wild", "labelled": False, "n_validation": 2}
    study = _study(home, data=data)
    images = steps.cache_images(study)
    assert images.train.read("labels", images.train_ids).tolist() == [-1] * 7
    with pytest.raises(ValueError, match=r"no labels \(study: data\.labelled\)"):
        steps.make_teacher(study, images)


# --- every objective, end to end -----------------------------------------------------------------

TAUGHT = {
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
def taught(made, tmp_path_factory):
    """A workspace whose teacher has stored all that any objective reads, in two replayed views."""
    home = tmp_path_factory.mktemp("taught")
    shutil.copytree(made / "cache", home / "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = _taught(home)
        steps.make_teacher(study, steps.cache_images(study))
    return home


def _taught(home, **changes):
    names = ["plain", *TAUGHT]
    return _study(
        home, objectives={"plain": {"kind": "cross_entropy"}} | TAUGHT, axes__objective=names,
        probe__objective=["plain"], teacher__outputs={"views": 2},
        training={"steps": 40, "batch_size": 64, "lr_peak": 0.05, "augment": {"crop_padding": 1}},
        **changes,
    )  # fmt: skip


@pytest.mark.parametrize("objective", TAUGHT)
def test_every_objective_trains_a_student_that_passes_every_tripwire(
    taught, monkeypatch, objective
):
    monkeypatch.setenv("KDLIB_HOME", str(taught))
    study = _taught(taught)
    cell = study.cell(strategy="full", objective=objective)
    evidence = steps.train_student(study, steps.open_images(study), cell, 0)
    assert all(check["passed"] for check in evidence["checks"])
    assert evidence["pairing"]["permuted"] > evidence["pairing"]["paired"]
    assert (evidence["pairing"]["teacher_accuracy"] is None) == (
        objective not in ("mse", "dkd", "dist", "standard")
    )
    # chance is 0.1 with a standard deviation of 0.013; some objectives have barely begun
    assert evidence["checkpoints"]["last"]["test_accuracy"] > 0.125


def test_an_objective_the_teacher_was_not_asked_for_says_which_notebook_to_run(home):
    more = {"kd": {"kind": "kd", "alpha": 0.5, "temperature": 2.0},
            "plain": {"kind": "cross_entropy"},
        "hint": {"kind": "hint", "weight": 1.0}}  # fmt: skip
    study = _study(home, objectives=more)
    with pytest.raises(ValueError, match=r"made before the study was changed.*features_for"):
        steps.train_student(study, steps.open_images(study), study.cell(objective="hint"), 0)


def test_a_run_that_stops_early_says_so_and_is_compared_with_its_like(home):
    training = {"steps": 60, "batch_size": 64, "lr_peak": 2.0, "evaluate_every_steps": 2,
                "early_stopping": 1, "checkpoint_fractions": [0, 0.5, 1]}  # fmt: skip
    study = _study(home, training=training)
    images = steps.open_images(study)
    for cell in study.cells():
        for seed in study.seeds:
            evidence = steps.train_student(study, images, cell, seed)
    assert evidence["budget"]["comparison"] == "early_stopping"
    table = report.results(study)
    assert not table["refused"].any()
    assert (table["steps"] < 60).any()
    tables = report.compile_tables(study)
    assert set(tables["strategies"]["budget"]) == {"early_stopping"}
    assert "early stopping" in report.summary(study, tables)
    assert "curves" in report.draw_comparison(study, tables)
    assert report.objective_table(study, tables).count("\n| ") == 3  # kd and plain below the line


def test_a_best_epoch_chosen_on_images_the_teacher_has_learnt_from_is_not_reported(home):
    study = _study(home)
    for cell in study.cells():
        for seed in study.seeds:
            folder = steps.student_folder(study, cell, seed)
            if cell.objective == "kd":
                _forge(folder, lambda e: e["selection"].update(teacher_overlap=197))
    table = report.results(study)
    assert not table["refused"].any()
    assert table.groupby("objective")["test_accuracy_best"].count().to_dict() == {
        "kd": 0, "plain": 6,
    }  # fmt: skip


def test_two_processes_make_the_study_one_makes(home):
    alone = _study(home)
    cell = alone.cell(strategy="full", objective="kd")
    images = steps.open_images(alone)
    before = steps.make_datamap(alone, images)
    ones = [alone.runs / "teacher", steps.student_folder(alone, cell, 0)]
    ones = [shutil.copytree(one, home / f"one{i}") for i, one in enumerate(ones)]
    study = _study(home, compute={"processes": 2})
    twos = [study.runs / "teacher", steps.student_folder(study, cell, 0)]
    told = [steps.make_teacher(study, images), steps.train_student(study, images, cell, 0)]
    for one, two, evidence in zip(ones, twos, told, strict=True):
        wanted = runs.read_evidence(one)
        assert all(check["passed"] for check in evidence["checks"])
        for key in ("budget", "coverage", "initialisation", "order_sha256", "seeds"):
            assert evidence[key] == wanted[key]
        weights = [
            load_file(folder / found["checkpoints"]["last"]["file"])
            for folder, found in ((one, wanted), (two, evidence))
        ]
        for name, tensor in weights[0].items():
            assert torch.allclose(tensor.float(), weights[1][name].float(), atol=0.03), name
    after = steps.make_datamap(study, images)  # complete, and of the same examples
    assert after.index.equals(before.index)
    assert np.allclose(after["confidence"], before["confidence"], atol=0.02)


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
    study = _study(
        tmp_path,
        data=PHOTOGRAPHS | {"folder": str(tmp_path / "photographs"), "image_size": 96},
        teacher=origin | {"trained_on": "elsewhere", "image_size": 224, "expected_accuracy": 0.0,
                          "outputs": {"views": 2}},
        dynamics={"model": {"name": "tiny_cnn"}, "el2n_epoch": 1, "window": 2,
                  "training": {"epochs": 2, "batch_size": 10, "lr_peak": 0.01}},
        students={"vit": {"model": VIT}}, axes__student=["vit"],
        objectives={"tokens": TAUGHT["barlow"], "plain": {"kind": "cross_entropy"}},
        axes__objective=["tokens", "plain"], probe__objective=["tokens"],
        training={"steps": 4, "batch_size": 10, "lr_peak": 1e-3, "optimiser": "adamw",
                  "warmup_steps": 2, "augment": {"flip": True}},
    )  # fmt: skip
    images = steps.cache_images(study)
    card = steps.make_teacher(study, images)["teacher"]
    assert card["measured_by"] == ("logits" if teacher == "weights" else "knn")
    stored = cache.Cache(steps.outputs_folder(study, "replayed"))
    shapes = [shape for _, shape in stored.header["columns"].values()]
    assert [2, 24, 16, 16] in shapes or [2, 6, 16, 16] in shapes  # 224 / 14 patches a side
    evidence = steps.train_student(study, images, study.cell(objective="tokens"), 0)
    assert all(check["passed"] for check in evidence["checks"])
