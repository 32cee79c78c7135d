"""A step is finished when its evidence is of the settings and inputs of now, its checks passed and
its files are there; nobody's memory decides it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from tiny import files_below, first_run, forge, tiny_study

from kdlib.repro import checks, files
from kdlib.repro.run import read_evidence
from kdlib.steps import distill
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.compare import compile_tables, costs, finish_tables, open_tables
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.done import SHOWN, unfinished
from kdlib.steps.figures import redraw
from kdlib.steps.folders import student_folder
from kdlib.study.study import Study


def whole(home: Path) -> Study:
    """The tiny study without recordings, which is finished in each `lab` of these tests."""
    return tiny_study(home, recordings=None)


@pytest.fixture(scope="module")
def made(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of that name with its comparison, and with what its notebooks show."""
    home = shutil.copytree(made, tmp_path_factory.mktemp("compared") / "home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        study = whole(home)
        compare(study)
        show(study, "datamap")
    return home


def compare(study: Study) -> None:
    """What notebook 06 does."""
    finish_tables(study, "compare", compile_tables(study))
    show(study, "compare")


def show(study: Study, *steps: str) -> None:
    """Files in place of what the notebooks of some steps draw and write."""
    for name in (name for step in steps for name in SHOWN[step]):
        path = study.figures / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def open_of(study: Study) -> dict[str, str]:
    """Which runs of a study are not finished, by their folder below its own."""
    return {str(f.relative_to(study.runs)): why for f, why in unfinished(study).items()}


def steps_of(study: Study) -> set[str]:
    """The steps of the runs that are not finished."""
    return {name.split("/")[0] for name in open_of(study)}


def test_a_whole_study_has_no_unfinished_run_wherever_one_stands(lab, tmp_path, monkeypatch):
    study = whole(lab)
    assert open_of(study) == {}
    monkeypatch.chdir("/")
    assert open_of(study) == {}
    assert unfinished(study, "scores") == {}


def test_an_empty_workspace_has_every_run_to_make(home):
    study = tiny_study(home)
    found = open_of(study)
    n_runs = len(study.cells()) * len(study.seeds) + len(study.probed_cells())
    n_runs += len(study.recordings.runs())
    assert len(found) == n_runs + 5  # cache, teacher, datamap, compare, scores
    assert set(found.values()) == {"is not made yet"}


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"compare__margin": 0.05}, {"compare"}),
        ({"probe__k": 7}, {"probe", "compare"}),
        ({"training__lr_peak": 0.01}, {"distill", "probe", "compare"}),
        ({"dynamics__window": 4}, {"datamap", "distill", "probe", "compare"}),
        ({"teacher__seed": 5}, {"teacher", "datamap", "distill", "probe", "compare"}),
        ({"seeds": [0, 1, 2]}, {"distill", "probe", "compare"}),
        ({"data__split_seed": 1}, {"cache", "teacher", "datamap", "distill", "probe", "compare"}),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, dict) else "",
)
def test_an_edited_study_names_what_its_settings_reach_and_the_edit_taken_back_nothing(
    lab, changes, steps
):
    whole(lab)
    assert steps_of(tiny_study(lab, recordings=None, **changes)) == steps
    assert steps_of(tiny_study(lab, recordings=None)) == set()


def test_the_first_run_that_an_edit_reaches_says_which_setting_and_the_others_what_they_read(lab):
    whole(lab)
    found = open_of(tiny_study(lab, recordings=None, dynamics__window=4))
    assert "dynamics.window: 3 -> 4" in found["datamap"]
    assert found["compare"] == "reads tiny/datamap, which is not finished"
    strategies = {name.split("strategy=")[1].split("/")[0] for name in found if "distill" in name}
    assert strategies == {"easy"}  # the others choose without a datamap


@pytest.mark.parametrize("name", ["summary.md", "ledger.md", "datamap.png", "regions.png"])
def test_a_figure_or_text_that_is_gone_is_made_by_its_own_step_alone(lab, name):
    study = whole(lab)
    (study.figures / name).unlink()
    (step,) = [step for step, names in SHOWN.items() if name in names]
    assert open_of(study) == {step: f"{study.figures / name} is not there"}


def test_tables_made_anew_leave_the_texts_of_before_unfinished(lab):
    study = whole(lab)
    finish_tables(study, "compare", compile_tables(study))  # as `python -m kdlib step compare`
    assert open_of(study)["compare"].endswith(".md is older than the run that it shows")


def test_a_run_whose_file_is_gone_is_made_again_to_the_byte(lab):
    study = whole(lab)
    folder, cell = first_run(study), study.cells()[0]
    weights = folder / read_evidence(folder)["checkpoints"]["last"]["file"]
    before = weights.read_bytes()
    weights.unlink()
    assert f"{weights.name} is gone" in open_of(study)[str(folder.relative_to(study.runs))]
    train_student(study, open_images(study), cell, study.seeds[0])
    assert weights.read_bytes() == before
    assert set(steps_of(study)) == {"compare"}  # its evidence is another
    compare(study)
    assert open_of(study) == {}


def test_evidence_with_a_failed_check_finishes_nothing(lab):
    study = whole(lab)

    def fail(evidence):
        evidence["checks"][0]["passed"] = False

    forge(first_run(study), fail)
    name = str(first_run(study).relative_to(study.runs))
    assert open_of(study)[name].startswith("the check ")
    assert " failed: " in open_of(study)[name]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda path: path.unlink(), "is not made yet"),
        (lambda path: path.write_text('{"format"'), "is not valid JSON"),
        (lambda path: path.write_text(path.read_text().replace(": 1", ": 2", 1)), "was changed"),
    ],
    ids=["gone", "cut", "edited"],
)
def test_evidence_that_is_gone_cut_or_edited_finishes_nothing(lab, damage, says):
    study = whole(lab)
    damage(study.runs / "teacher" / "evidence.json")
    found = open_of(study)
    assert says in found["teacher"]
    assert {"datamap", "compare"} < set(found)


def test_stored_outputs_that_are_gone_leave_the_teacher_unfinished(lab):
    study = whole(lab)
    shutil.rmtree(study.runs / "teacher" / "outputs-test")
    assert "outputs-test" in open_of(study)["teacher"]


def test_committed_tables_of_another_time_leave_the_comparison_unfinished(lab):
    study = whole(lab)
    table = study.figures / "tables" / "results.parquet"
    table.write_bytes(table.read_bytes() + b"0")
    assert open_of(study) == {"compare": f"{table} is gone or is not as it was written"}


def test_a_notebook_that_failed_after_its_evidence_is_executed_again(lab):
    study = whole(lab)
    notebook = study.runs / "cache" / "01_cache.ipynb"
    error = {"output_type": "error", "ename": "ValueError", "evalue": "no", "traceback": []}
    code = {"cell_type": "code", "source": [], "outputs": [error]}
    files.write_json(notebook, {"cells": [code]})
    assert open_of(study) == {"cache": f"{notebook} stopped at an error"}
    code = {"cell_type": "code", "metadata": {"papermill": {"status": "pending"}}, "source": []}
    files.write_json(notebook, {"cells": [code]})
    assert open_of(study) == {"cache": f"{notebook} did not come to its last cell"}
    evidence = notebook.with_name("evidence.json")
    os.utime(evidence, (notebook.stat().st_mtime + 9,) * 2)  # made by hand since
    assert open_of(study) == {}


def test_a_notebook_of_the_comparison_with_other_code_is_executed_again(lab):
    study = whole(lab)
    source = Path(__file__).parents[2] / "notebooks" / "06_compare.ipynb"
    executed = study.runs / "compare" / "06_compare.ipynb"
    shutil.copy(source, executed)
    assert open_of(study) == {}
    executed.write_text(executed.read_text().replace("lab.compare()", "lab.compare() "))
    said = "notebooks/06_compare.ipynb was changed since it was executed"
    assert open_of(study) == {"compare": said}


def test_a_datamap_made_anew_that_chooses_the_same_examples_trains_nothing_again(lab, monkeypatch):
    whole(lab)
    study = tiny_study(lab, recordings=None, dynamics__clusters=3)
    images = open_images(study)
    make_datamap(study, images)
    show(study, "datamap")
    monkeypatch.setattr(distill, "train_run", lambda *_, **__: pytest.fail("it trains again"))
    for cell in study.cells():
        for seed in study.seeds:
            train_student(study, images, cell, seed)
    assert steps_of(study) == {"compare"}
    cell = study.cell(strategy="easy")
    evidence = read_evidence(student_folder(study, cell, 0))
    now = read_evidence(study.runs / "datamap")["datamap_sha256"]
    assert evidence["subset"]["parent_datamap"] == now
    assert not compile_tables(study)["results"]["refused"].any()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training__lr_peak": 0.01}, r"every row is refused; .*training\.lr_peak: \S+ -> 0\.01"),
        ({"teacher__seed": 5}, r"made before the study was changed .*teacher\.seed: 0 -> 5"),
        ({"data__split_seed": 1}, r"made before the study was changed .*split_seed: 0 -> 1"),
    ],
    ids=["students", "teacher", "images"],
)
def test_no_figure_and_no_text_shows_numbers_of_other_settings(lab, changes, says):
    study = whole(lab)
    texts = files_below(study.figures)
    edited = tiny_study(lab, recordings=None, **changes)
    for show_again in (redraw, open_tables, compile_tables):
        with pytest.raises((ValueError, checks.CheckError), match=says):
            show_again(edited)
    after = files_below(study.figures)
    assert {name: after[name] for name in texts if texts[name]} == {
        name: content for name, content in texts.items() if content
    }
    assert not any(name.startswith(("accuracy", "differences", "curves")) for name in after)


def test_costs_of_other_settings_are_in_no_ledger(lab):
    whole(lab)
    study = tiny_study(lab, recordings=None, training__lr_peak=0.01)
    assert set(costs(study)["what"]) == {"cache", "teacher", "datamap"}


def test_a_failing_check_leaves_no_evidence_and_the_second_call_fails_equally(lab, monkeypatch):
    study = whole(lab)
    folder, cell = first_run(study), study.cells()[0]
    shutil.rmtree(folder)
    rule = lambda evidence: (False, "it is never right")  # noqa: E731
    rule.__name__ = "never"
    monkeypatch.setattr(checks, "STUDENT", (*checks.STUDENT, rule))
    for _ in range(2):
        with pytest.raises(checks.CheckError, match="it is never right"):
            train_student(study, open_images(study), cell, study.seeds[0])
        assert not (folder / "evidence.json").exists()


def test_what_is_read_of_a_cache_made_anew_is_compared_with_the_images(lab):
    whole(lab)
    study = tiny_study(lab, recordings=None, data__split_seed=1)
    cache_images(study)
    show(study)
    found = open_of(study)
    assert "was made of other inputs (split: " in found["teacher"]
    assert "cache" not in found
    assert json.loads((study.runs / "cache" / "evidence.json").read_text())["step"] == "cache"
