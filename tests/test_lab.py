"""The lab of a finished study: what each method gives, and the page that shows them."""

import base64
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import ROOT, tiny_study

from kdlib import open_study
from kdlib.lab import Lab
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import open_images
from kdlib.steps.display import meanings
from kdlib.steps.distill import make_subset
from kdlib.study.base import StudyError

# page -> its program: the block of code that opens the default study
PROGRAMS = {
    path.name: block
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)
    if "open_study(" in block and "digits" in block
}
# what holds after it
RESULTS = {
    "python.md": "assert accuracy == runs.query('seed == 0')['test_accuracy'].item()\n"
    "assert logits.shape == (len(subset), 10)\n"
    "assert lab.evaluate(mine)[1] > 0.2\n"
}


@pytest.fixture
def tiny_lab(lab: Path) -> Lab:
    return Lab(tiny_study(lab))


@pytest.mark.parametrize("page", PROGRAMS)
def test_the_program_of_a_page_runs(lab, page, monkeypatch, capsys):
    """All of it, with the names of the tiny study."""
    tiny_study(lab)
    code = PROGRAMS[page].replace("digits", "tiny").replace('"ambiguous"', '"easy"')
    assert len(code.splitlines()) <= 35
    code += RESULTS.get(page, "")
    monkeypatch.chdir(lab)
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(code, {})
    assert f"study tiny: {lab / 'params' / 'tiny.yaml'}" in capsys.readouterr().out


def test_a_study_is_looked_for_here_and_then_in_the_workspace(lab, tmp_path_factory, monkeypatch):
    tiny_study(lab)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    assert open_study("params/tiny.yaml").study.compare.margin == 0.02
    (elsewhere / "params").mkdir()
    text = (lab / "params" / "tiny.yaml").read_text()
    (elsewhere / "params" / "tiny.yaml").write_text(text.replace("margin: 0.02", "margin: 0.03"))
    assert open_study("params/tiny.yaml").study.compare.margin == 0.03
    with pytest.raises(FileNotFoundError, match=r"no study file 'none.yaml'; params/ has tiny"):
        open_study("none.yaml")


def test_an_axis_left_open_has_the_first_value_of_the_study(lab):
    tiny_study(lab)
    usual = open_study("params/tiny.yaml", strategy=None, fraction=None, objective=None)
    assert usual.cell() == usual.study.cell()
    chosen = open_study("params/tiny.yaml", strategy="easy", objective="plain")
    assert chosen.cell() == chosen.study.cell(strategy="easy", objective="plain")
    assert chosen.cell(strategy="random") == chosen.study.cell(strategy="random", objective="plain")
    with pytest.raises(StudyError, match="unknown strategy 'eazy'; did you mean 'easy'"):
        open_study("params/tiny.yaml", strategy="eazy")
    for axis, values in (("strategy", ("", 0, False)), ("fraction", ("", 0, 0.0, False, True))):
        for value in values:
            with pytest.raises(StudyError, match=f"{axis}.* '?{value}'?; (known|expected)"):
                open_study("params/tiny.yaml", **{axis: value})


def test_every_column_of_the_tables_shown_has_a_meaning(tiny_lab):
    tiny_lab.cache()
    runs = tiny_lab.distill()
    for table in (tiny_lab.datamap(), runs):
        assert list(meanings(table)) == list(table.columns)
    hashes = {f"{split}_{of}" for split in ("train", "test") for of in ("examples", "weights")}
    assert set(tiny_lab.probe("easy").columns) - hashes == set(meanings(tiny_lab.probe("easy")))
    assert "Mean over epochs of the probability of the gold label" in tiny_lab.columns(
        tiny_lab.datamap()
    )


def test_runs_are_those_of_all_seeds_and_of_all_objectives_or_one(tiny_lab):
    runs = tiny_lab.distill("easy", fraction=0.33)
    assert runs[["objective", "seed"]].values.tolist() == [
        ["kd", 0], ["kd", 1], ["plain", 0], ["plain", 1],
    ]  # fmt: skip
    one = tiny_lab.distill("easy", fraction=0.33, objective="plain", seeds=[1])
    assert one["folder"].tolist() == runs["folder"].tolist()[3:]
    checks = tiny_lab.checks(one)
    assert checks["passed"].sum() == one["checks"].item() == len(checks)
    curves = tiny_lab.curves(runs)
    last = curves.groupby(["objective", "seed"])["step"].max()
    assert last.tolist() == runs["steps"].tolist()
    evidence = read_evidence(Path(runs["folder"][0]))
    assert runs["weights_sha256"][0] == evidence["checkpoints"]["last"]["weights_sha256"]


@pytest.mark.parametrize("seeds", [0, [], (), [True], [0.0], ["0"], "01", [-1], [None], 1.5])
def test_seeds_that_are_no_list_of_seeds_are_refused(tiny_lab, seeds):
    with pytest.raises(StudyError, match=r"seeds are .*; expected a list of integers >= 0"):
        tiny_lab.distill("easy", seeds=seeds)


@pytest.mark.parametrize("seed", [True, -1, "0", None, 0.5])
def test_a_seed_that_is_none_is_refused(tiny_lab, seed):
    for call in (tiny_lab.select, tiny_lab.student, tiny_lab.untrained):
        with pytest.raises(StudyError, match=r"seeds are \[.*\]; expected"):
            call(seed=seed)


@pytest.mark.parametrize("axis", ["strategy", "fraction", "objective", "student"])
@pytest.mark.parametrize("value", ["", 0, False])
def test_a_value_that_is_empty_is_no_default(tiny_lab, axis, value):
    for call in (tiny_lab.distill, tiny_lab.probe, tiny_lab.student):
        with pytest.raises(StudyError, match=f"{axis}.*; (known|expected)"):
            call(**{axis: value})


def test_what_is_no_table_of_runs_is_refused_with_its_columns(tiny_lab):
    runs = tiny_lab.distill(seeds=[0])
    for table in (runs[runs["seed"] > 5], runs.drop(columns="folder")):
        with pytest.raises(ValueError, match=r"expected a row for each run with its `folder`"):
            tiny_lab.curves(table)


def test_the_tables_of_the_teacher_and_of_the_images(tiny_lab):
    [card] = tiny_lab.teacher().to_dict("records")
    assert card["accuracy"] >= card["expected"] == 0.5
    table = tiny_lab.cache()
    assert table["images"].to_dict() == {"train": 1100, "validation": 197, "test": 500}
    assert tiny_lab.dynamics().n_examples == 1100


def test_a_subset_is_that_of_the_step_and_its_images_carry_the_teacher_s_logits(tiny_lab):
    subset = tiny_lab.select("easy", fraction=0.33, seed=1)
    cell = tiny_lab.study.cell(strategy="easy", fraction=0.33)
    assert subset.sha256 == make_subset(tiny_lab.study, open_images(tiny_lab.study), cell, 1).sha256
    data = tiny_lab.images.dataset("train", subset, teacher=tiny_lab.teacher_outputs())
    image, _, example_id, logits = data[3]
    assert int(example_id) == subset.example_ids[3]
    assert np.array_equal(logits, tiny_lab.teacher_logits(subset)[3])
    accuracy = float((tiny_lab.teacher_logits(np.arange(500), "test").argmax(1)
                      == tiny_lab.images.test.read("labels", np.arange(500))).mean())  # fmt: skip
    assert accuracy == tiny_lab.teacher()["accuracy"].item()
    raw = tiny_lab.images.dataset("train", subset, normalised=False)[3][0]
    assert torch.equal(tiny_lab.images.pixels.prepare(raw[None])[0], image)


def test_examples_of_another_split_are_refused(tiny_lab):
    ids = tiny_lab.images.validation_ids
    assert len(tiny_lab.images.dataset("validation")) == len(ids)
    with pytest.raises(ValueError, match=r"197 of 197 examples, .* are not of the split train"):
        tiny_lab.images.dataset("train", ids)
    with pytest.raises(ValueError, match="no split 'tets'; did you mean 'test'"):
        tiny_lab.images.dataset("tets")


def test_an_untrained_student_has_the_weights_its_run_began_with(tiny_lab):
    from kdlib.models.weights import weights_fingerprint

    evidence = read_evidence(Path(tiny_lab.distill(seeds=[1])["folder"][0]))
    found = weights_fingerprint(tiny_lab.untrained(seed=1))
    assert found == evidence["initialisation"]["weights_sha256"]


def test_figures_and_texts_are_those_of_the_steps(tiny_lab):
    tables = tiny_lab.compare()
    assert set(meanings(tables["results"])) > {"test_accuracy", "refused", "reason"}
    picture = tiny_lab.figure("datamap")
    assert picture.path == tiny_lab.study.figures / "datamap.png"
    assert picture._repr_png_()[0] == picture.path.read_bytes()
    text = tiny_lab.text("summary")
    assert text == text._repr_markdown_() == (tiny_lab.study.figures / "summary.md").read_text()
    with pytest.raises(KeyError, match="did you mean 'regions'"):
        tiny_lab.figure("region")


def test_what_is_long_stands_under_a_title_that_a_click_opens(tiny_lab):
    tiny_lab.compare()
    shown = tiny_lab.fold("More & more", "summary", "curves", "fractions")._repr_markdown_()
    assert shown.startswith("<details><summary>More &amp; more</summary>\n\n# tiny: results\n")
    assert shown.endswith("\n\n</details>")
    encoded = base64.b64encode((tiny_lab.study.figures / "curves.png").read_bytes()).decode()
    assert re.findall('<img alt="(.*?)" .*?base64,(.*?)">', shown) == [("curves", encoded)]
    lacking = tiny_lab.fold("More data", "fractions")._repr_markdown_()
    assert "*tiny has no figure `fractions`: a strategy at three fractions" in lacking
    with pytest.raises(KeyError, match="did you mean 'curves'"):
        tiny_lab.fold("More", "curve")


def test_a_study_without_wrong_labels_gets_one_sentence_before_any_training(lab):
    slow = {"models": {"slow": {"name": "tiny_cnn"}}, "seeds": [0, 1]}
    tiny = Lab(tiny_study(lab, recordings=slow))
    with pytest.raises(StudyError, match="no label of tiny is known to be wrong") as caught:
        tiny.noise()
    [shown] = caught.value._render_traceback_()  # what IPython shows of it
    assert shown == f"StudyError: {caught.value}"
    assert "\n" not in shown
    assert not (tiny.study.runs / "recorded" / "model=slow").exists()


def test_settings_are_shown_as_what_differs_from_the_defaults(tiny_lab):
    text = tiny_lab.settings("compare", "data")
    assert "| compare.margin | 0.02 | 0.01 |" in text
    assert "| data.shard_size | 300 | 2048 |" in text
    assert "teacher" not in text
    assert "baseline" not in text
    assert "<summary>Settings of tiny that differ" in text._repr_markdown_()


def test_a_notebook_s_unknown_parameter_is_refused_though_no_history_is_passed(lab, monkeypatch):
    tiny_study(lab)
    history = ["", 'study = "params/tiny.yaml"', "# Parameters\nstuddy = 'params/tiny.yaml'"]
    shell = SimpleNamespace(user_ns={"In": history})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    with pytest.raises(ValueError, match="no parameter 'studdy'; did you mean 'study'"):
        open_study("params/tiny.yaml")
