"""A study in which each seed has a recording of its own, by whose scores its subsets are chosen."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from a_study import STUDY, changed, validated
from tiny import tiny_study

from kdlib.compare.comparisons import selection_s
from kdlib.compare.report import summary
from kdlib.lab import Lab
from kdlib.repro.run import read_evidence
from kdlib.steps import datamap, distill
from kdlib.steps.cache import open_images
from kdlib.steps.compare import compile_tables
from kdlib.steps.datamap import make_datamap, open_datamap
from kdlib.steps.distill import make_subset, train_student
from kdlib.steps.done import unfinished
from kdlib.steps.folders import datamap_folder, recording_folder, student_folder
from kdlib.steps.probe import probe_cell
from kdlib.steps.results import results
from kdlib.study.base import StudyError
from kdlib.study.study import Study

Patch = pytest.MonkeyPatch
CHANGES = {
    "dynamics__per_seed": True,
    "recordings": {
        "models": {"tiny": {"name": "tiny_cnn", "options": {"width": 8}}},
        "training": {"epochs": 3, "batch_size": 64, "lr_peak": 0.1},
        "seeds": [0, 1],
    },
    "training__steps": 20,
    "axes__objective": ["plain"],
    "probe__objective": ["plain"],
}


@pytest.fixture(scope="module")
def whole(prepare_datamap: Callable[[Path], Study], tmp_path_factory: pytest.TempPathFactory):
    """A workspace with such a study: recordings, datamaps, students, probes."""
    home = tmp_path_factory.mktemp("home")
    prepare_datamap(home)
    with Patch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = tiny_study(home, **CHANGES)
        images = open_images(study)
        make_datamap(study, images)
        _train(study)
        for cell in study.probed_cells():
            probe_cell(study, images, cell)
    return home


@pytest.fixture
def study(whole: Path, tmp_path: Path, monkeypatch: Patch) -> Study:
    """A copy of it, to break."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tiny_study(tmp_path, **CHANGES)


def _train(study: Study) -> None:
    for cell in study.cells():
        for seed in study.seeds:
            train_student(study, open_images(study), cell, seed)


def test_each_seed_s_subset_is_that_of_its_own_recording(study: Study):
    images, cell, chosen = open_images(study), study.cell(strategy="easy"), {}
    for seed in study.seeds:
        subset = make_subset(study, images, cell, seed)
        log = recording_folder(study, "tiny", f"seed={seed}") / "dynamics"
        gold_prob = np.load(log / "gold_prob.npy").astype(np.float64)  # (3, 1600)
        # easy: the nearest to variability 0, confidence 1
        far = gold_prob.std(0) ** 2 + (1 - gold_prob.mean(0)) ** 2
        is_in = np.isin(np.load(log / "example_ids.npy"), subset.example_ids)
        assert far[is_in].max() <= far[~is_in].min()
        evidence = read_evidence(student_folder(study, cell, seed))
        made = read_evidence(study.runs / "datamaps" / f"seed={seed}")["datamap_sha256"]
        assert evidence["subset"]["parent_datamap"] == subset.parent == made
        chosen[seed] = set(subset.example_ids)
    assert chosen[0] != chosen[1]


def test_a_seed_s_map_has_its_recording_s_gradients_and_the_teacher_s_scores(study: Study):
    lab = Lab(study)
    of_study, of_seed = lab.datamap(), lab.datamap(seed=1)
    assert set(of_seed) == set(of_study)
    for name in ("prototypicality", "class_distance"):
        np.testing.assert_array_equal(of_seed[name], of_study[name])
    assert not np.allclose(of_seed["grand"], of_study["grand"])
    assert not of_seed.isna().any().any()
    with pytest.raises(StudyError, match=r"seed 7 has no recording .* has the seeds 0, 1"):
        lab.select("easy", seed=7)
    assert lab.select("random", seed=7).parent is None  # which reads no score


def test_its_rows_are_accepted_and_its_summary_says_that_seeds_are_recordings(study: Study):
    tables = compile_tables(study)
    assert not tables["results"]["refused"].any()
    assert "Every seed had a recording of its own" in summary(study, tables)
    seconds = tables["costs"].set_index("what")["wall_s"]
    of_one = (seconds["recordings"] + seconds["datamaps"]) / 2
    assert selection_s(study, tables["costs"], "easy", "plain") == pytest.approx(of_one)
    assert selection_s(study, tables["costs"], "random", "plain") == 0


def map_of_another_seed(patch: Patch) -> None:
    """Every seed's subset is chosen by the map of seed 0."""
    patch.setattr(distill, "open_datamap", lambda study, images, _: open_datamap(study, images, 0))


def recording_of_another_seed(patch: Patch) -> None:
    """Every seed's map is made of the recording of seed 0."""
    real = datamap._open_log
    patch.setattr(datamap, "_open_log", lambda s, i, seed: real(s, i, None if seed is None else 0))


@pytest.mark.parametrize(
    ("mistake", "said"),
    [
        (map_of_another_seed, "subset drawn again"),
        (recording_of_another_seed, r"datamap: confidence of \d+ examples is not that of its reco"),
    ],
)
def test_a_map_of_another_seed_is_refused(
    study: Study, monkeypatch: Patch, mistake: Callable[[Patch], None], said: str
):
    for folder in (datamap_folder(study, 1), study.runs / "distill"):
        shutil.rmtree(folder)
    with monkeypatch.context() as patch:
        mistake(patch)
        make_datamap(study, open_images(study))
        _train(study)
    table = results(study)
    wrong = (table["strategy"] == "easy") & (table["seed"] == 1)
    assert table[wrong]["reason"].str.contains(said).all()
    assert not table[~wrong]["reason"].str.contains(said).any()


def test_a_recording_that_is_gone_leaves_what_its_seed_read_unfinished(study: Study):
    def found() -> set[str]:
        runs = (str(folder.relative_to(study.runs)) for folder in unfinished(study))
        return {name for name in runs if not name.startswith(("probe", "compare", "scores"))}

    show = ("datamap", "forming", "regions")
    study.figures.mkdir(parents=True, exist_ok=True)
    for name in show:
        (study.figures / f"{name}.png").touch()
    assert found() == set()
    (recording_folder(study, "tiny", "seed=1") / "evidence.json").unlink()
    easy = student_folder(study, study.cell(strategy="easy"), 1).relative_to(study.runs)
    assert found() == {"recorded/model=tiny/seed=1", "datamaps/seed=1", "datamap", str(easy)}
    make_datamap(study, open_images(study))  # records it again, to the byte
    assert found() == set()


def test_a_seed_without_a_recording_is_refused_when_the_study_is_read():
    content = changed("dynamics.per_seed", True)
    assert validated(content).dynamics.per_seed
    says = r"needs a recording of each seed.* none of \[2\]: give `recordings` a model and `seeds:"
    with pytest.raises(StudyError, match=says):
        validated(changed("seeds", [0, 1, 2], content))
    with pytest.raises(
        StudyError, match=r"reads 4 epochs .*, and recordings.training has 3: lower"
    ):
        validated(changed("dynamics.window", 4, content))
    with pytest.raises(StudyError, match=r"none of \[0, 1\]"):
        validated({k: v for k, v in content.items() if k != "recordings"})


def test_a_study_that_shares_reads_the_recordings_of_the_other_one():
    per_seed = changed("dynamics.per_seed", True)
    other, alone = validated(per_seed), validated(STUDY)
    mine = validated(changed("shares", "case.yaml", per_seed) | {"recordings": None})
    shared = mine.sharing(other)
    assert datamap_folder(shared, 1) == other.runs / "datamaps" / "seed=1"
    with pytest.raises(StudyError, match=r"dynamics\.per_seed: None -> True"):
        mine.sharing(alone)
    more = validated(changed("seeds", [0, 4], changed("shares", "case.yaml", per_seed)))
    with pytest.raises(StudyError, match=r"seeds: no recordings of \[4\]"):
        more.sharing(other)


def test_what_is_recorded_and_taught_has_the_settings_of_before():
    alone, per_seed = validated(STUDY), validated(changed("dynamics.per_seed", True))
    for step in ("teacher", "datamap", "record", "scores"):
        assert per_seed.step_settings(step) == alone.step_settings(step)
    assert "recordings" in per_seed.step_settings("compare")
    assert "recordings" not in alone.step_settings("compare")
