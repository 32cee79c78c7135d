"""Every defect of the two earlier studies is caught, every honest number passes, and every
invariant has its test."""

import ast
import os
import pkgutil
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from planning import planned
from tiny import ROOT

from audit import report
from audit.invariants import INVARIANTS
from audit.small_study import SmallStudy, judged, refused
from audit.study_a import keyed_by_position, overlapping_union, unsaved_subset
from audit.study_b import identical_views, keyed_by_pixels, seed_plus_epoch, truncated_patches
from kdlib.compare.committed import write_committed
from kdlib.repro import checks, files
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.done import unfinished
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml

QUICK = (
    unsaved_subset,
    overlapping_union,
    keyed_by_position,
    truncated_patches,
    identical_views,
    keyed_by_pixels,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A workspace in which notebook 09 has run on the tiny study, by papermill."""
    home = tmp_path_factory.mktemp("audit")
    (home / "params").mkdir()
    shutil.copy(ROOT / "params" / "tiny.yaml", home / "params")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(home))
        cache_images(load_study("params/tiny.yaml"))
    command = [sys.executable, "-m", "kdlib.papermill_engine", "--no-progress-bar"]
    done = subprocess.run(
        [*command, str(ROOT / "notebooks" / "09_audit.ipynb"), "out.ipynb",
         "-p", "study", "params/tiny.yaml"],
        cwd=home, env=os.environ | {"KDLIB_HOME": str(home)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def study(made, tmp_path, monkeypatch):
    """A copy of it, to break."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return load_study("params/tiny.yaml")


@pytest.fixture(scope="module")
def images(made):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KDLIB_HOME", str(made))
        return open_images(load_study("params/tiny.yaml"))


def test_every_defect_is_caught_and_every_honest_number_passes(study):
    table = report.open_exhibits(study)
    assert len(table) == len(report.DEFECTS) == table["name"].nunique()
    assert set(table["study"]) == {"A", "B"}
    assert table["caught"].all(), table.loc[~table["caught"], "name"].tolist()
    assert table["quiet"].all(), table.loc[~table["quiet"], "name"].tolist()
    assert (table["sentence"].str.len() > 15).all()
    numbers = table[["defect", "honest"]]
    assert ((numbers >= 0) & (numbers <= 1)).all(axis=None)
    assert (table["defect"] != table["honest"]).all()


# What each defect must do to its number, from what it is.
@pytest.mark.parametrize(
    ("name", "defect", "honest"),
    [
        ("three seeds that were one", 0.0, None),
        ("a slice of -0 that took everything", 1.0, 0.0),
        ("a union of regions that overlap", None, 363 / 1100),
        ("subsets drawn before the seed was set", None, 1.0),
        ("dynamics keyed by position", None, 1.0),
        ("early stopping left on", None, 1.0),
        ("seed + epoch", 0.99, 0.0),
        ("two views that were one", 1.0, None),
        ("an alarm that always rang", 1.0, 0.0),
        ("a teacher cache keyed by pixels", 0.0, 1.0),
        ("a resume that went elsewhere", None, 1.0),
        ("patches truncated, not resized", None, 1.0),
    ],
)
def test_numbers_that_follow_from_the_defect_are_these(study, name, defect, honest):
    row = report.open_exhibits(study).set_index("name").loc[name]
    for found, expected in ((row["defect"], defect), (row["honest"], honest)):
        assert expected is None or found == pytest.approx(expected, abs=1e-6)


def test_the_artefact_of_study_b_lies_below_the_untrained_student(study):
    row = (
        report.open_exhibits(study).set_index("name").loc["test features of the untrained student"]
    )
    untrained = float(re.search(r"untrained: ([\d.]+) %", row["measure"])[1]) / 100
    assert row["defect"] < untrained - 0.2
    assert row["honest"] > untrained


def test_a_finished_audit_is_read_and_not_made_again(study, images, monkeypatch):
    monkeypatch.setattr(report, "exhibits", None)
    assert len(report.make(study, images)) == len(report.DEFECTS)


def test_a_changed_table_is_refused(study):
    path = study.runs / "audit" / "exhibits.parquet"
    report.open_exhibits(study).assign(caught=True, defect=0.5).to_parquet(path)
    with pytest.raises(ValueError, match="kdlib metadata"):
        report.open_exhibits(study)


def test_exhibits_made_again_elsewhere_have_the_numbers_of_the_notebook(study, images, monkeypatch):
    first = report.open_exhibits(study).set_index("name")
    monkeypatch.setattr(report, "DEFECTS", {defect: report.DEFECTS[defect] for defect in QUICK})
    again = report.exhibits(images).set_index("name")
    assert len(again) == len(QUICK)
    for table in (first, again):  # folders are numbered as they are needed
        table["sentence"] = table["sentence"].str.replace(r"\.\.\./\d+/", ".../", regex=True)
    pd.testing.assert_frame_equal(first.loc[again.index, again.columns], again, check_exact=True)


def test_exhibits_leave_the_global_generator_and_the_study_alone(made, images, tmp_path):
    before = np.random.get_state()[1].copy()
    files_before = sorted(made.rglob("*"))
    small = SmallStudy(images, tmp_path)
    for defect in (seed_plus_epoch, identical_views):
        defect(small)
    assert np.array_equal(np.random.get_state()[1], before)
    assert sorted(made.rglob("*")) == files_before


def test_a_check_that_sleeps_or_always_speaks_is_seen():
    honest = {"gradient": {"norm": 1.0, "tensors": 2, "tensors_without": 0}}
    wrong = {"gradient": {"norm": 0.0, "tensors": 2, "tensors_without": 2}}
    told = judged((checks.gradient,), wrong, honest)
    assert (told["caught"], told["quiet"]) == (True, True)
    assert told["check"] == "kdlib.repro.checks.gradient"
    assert "2 of 2 parameter tensors got none" in told["sentence"]
    assert not judged((checks.gradient,), honest, honest)["caught"]
    assert not judged((checks.gradient,), wrong, wrong)["quiet"]
    # one of two checks that speaks is not both
    both = (checks.gradient, checks.same_weights)
    same = {"probes": [{"train_weights": "a", "test_weights": "a"}]}
    assert not judged(both, wrong | same, honest | same)["caught"]


def test_what_is_not_refused_has_no_sentence():
    def explode():
        raise ValueError("no such thing")

    assert refused(explode) == "no such thing"
    assert refused(lambda: None) == ""


def test_an_uncaught_defect_stands_out_in_table_and_figure(study):
    table = report.open_exhibits(study).assign(caught=False)
    assert report.describe_exhibits(table).count("**no**") == len(table)
    text = report.describe_exhibits(report.open_exhibits(study))
    assert "**no**" not in text
    assert not re.search(r"[0-9a-f]{64}", text)  # hashes by their beginning
    assert "/tmp" not in text


def test_each_defect_is_explained_in_two_sentences_with_both_numbers(study):
    table = report.open_exhibits(study)
    explained = [report.describe_defects(table, of).splitlines() for of in "AB"]
    assert [len(of_study) for of_study in explained] == table["study"].value_counts()[
        ["A", "B"]
    ].tolist()
    lines = [line for of_study in explained for line in of_study]
    for line, row in zip(lines, table.itertuples(), strict=True):
        assert line.lower().startswith(f"- **{row.name}**".lower())
        assert 2 <= len(re.findall(r"[a-z0-9)%]\.(?= |$)", row.happened)) <= 3, row.name
        assert f"{100 * row.defect:.1f} % with the defect" in line
    whole = (study.figures / "audit.md").read_text()
    assert all(line in whole for line in lines)


def test_figure_and_text_are_redrawn_from_the_table_to_the_same_bytes(study):
    names = ("audit.png", "audit.pdf", "audit.md")
    before = {name: files.sha256_file(study.figures / name) for name in names}
    shutil.rmtree(study.figures)
    table = report.open_exhibits(study)
    report.write(study, table)
    assert set(report.draw(study, table)) == {"audit"}
    assert {name: files.sha256_file(study.figures / name) for name in names} == before


# --- names ---------------------------------------------------------------------------------------

A_NAME = re.compile(r"\b[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+")
NO_NAME = re.compile(r"\.(?:md|yaml|csv|parquet|ipynb)$|^s\.d$")


def test_every_name_that_the_audit_prints_can_be_imported(study):
    table = report.open_exhibits(study)
    names = set(re.findall(r"\bkdlib(?:\.\w+)+", report.describe_exhibits(table)))
    assert names >= {"kdlib.repro.checks.budget", "kdlib.cartography.subset.Subset.save"}
    for name in names:
        assert callable(pkgutil.resolve_name(name)), name
    for check in {name for cell in table["check"] for name in cell.split(", ")}:
        assert check in names or "." not in check


def test_the_audit_s_texts_write_no_dotted_name_by_hand():
    """Names come from the functions themselves (`named`), so that a function that moves is named by
    its new place."""
    for path in sorted((ROOT / "audit").glob("*.py")):
        texts = [n.value for n in ast.walk(ast.parse(path.read_text()))
                 if isinstance(n, ast.Constant) and isinstance(n.value, str)]  # fmt: skip
        for name in {name for text in texts for name in A_NAME.findall(text)}:
            assert NO_NAME.search(name) or pkgutil.resolve_name(name), f"{path.name}: {name}"


# --- what they printed ---------------------------------------------------------------------------


def test_the_row_published_as_random_is_the_full_set_s():
    table = report.published().set_index(["strategy", "fraction"])
    full, random = table.loc[("full", 1.0)], table.loc[("random", 0.33)]
    as_published = table.loc[("random_as_published", 0.33)]
    assert ((as_published - full).abs() < 1).all()
    assert (as_published - random > 3).all()
    assert len(table) == 19  # full, random twice, 11 strategies, 5 more fractions
    assert set(report.STUDENTS) == set(table.columns)


def _rows(**columns):
    """Result rows that differ in the given columns."""
    base = {
        "student": "tiny", "strategy": "easy", "fraction": 0.33, "objective": "kd", "seed": 0,
        "test_accuracy": 0.5, "steps": 400.0, "refused": False,
    }  # fmt: skip
    return pd.DataFrame(base | columns)


def test_ours_are_means_of_accepted_runs_by_objective():
    table = _rows(
        objective=["kd", "kd", "kd", "plain", "plain"],
        seed=[0, 1, 2, 0, 1],
        test_accuracy=[0.50, 0.52, 0.99, 0.40, 0.42],
        refused=[False, False, True, False, False],
    )
    assert report.ours(table, "easy", 0.33) == "kd 51.0 ± 1.4, plain 41.0 ± 1.4"
    assert report.ours(table, "hard", 0.33) == report.ours(table, "easy", 0.1) == "-"


def test_our_tables_stand_beside_theirs_where_they_are(home):
    text = report.describe_published()
    assert "No run table here that belongs to `subsets` and `fractions`" in text
    assert "ours:" not in text.split("\n\n")[1]
    (home / "params").mkdir(exist_ok=True)
    for name in ("cifar10", "subsets"):
        shutil.copy(ROOT / "params" / f"{name}.yaml", home / "params")
    study = load_study(home / "params" / "subsets.yaml")
    curves = _rows(seed=[0, 1], step=[1, 1], validation_accuracy=[0.5, 0.5])
    tables = {"results": _rows(seed=[0, 1], test_accuracy=[0.5, 0.52]), "curves": curves}
    write_committed(study, tables | {"probes": curves})
    text = report.describe_published()
    assert "ours: subsets, tiny" in text
    assert "| easy, 33 % | 71.9 | 61.9 | 49.0 | kd 51.0 ± 1.4 |" in text
    assert "400 steps, 2 seeds" in text
    assert "No run table here that belongs to `fractions`" in text
    path = home / "params" / "subsets.yaml"
    path.write_text(path.read_text().replace("steps: 400", "steps: 401"))
    assert "ours:" not in report.describe_published().split("\n\n")[1]


# --- invariants ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("invariant", "tests"), [row[1:] for row in INVARIANTS])
def test_the_tests_that_hold_an_invariant_are_there(invariant, tests):
    for name in tests:
        path, _, function = name.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert function in functions, f"{name} is missing, which proves: {invariant}"


# --- the pipeline --------------------------------------------------------------------------------


@pytest.mark.parametrize(("asked", "target", "made_by"), [
    (True, "all", {"cache", "audit"}), (False, "audit", {"cache", "audit"}),
    (False, "all", {"cache"}),
])  # fmt: skip
def test_a_study_that_asks_for_it_or_a_call_by_name_makes_the_audit(home, asked, target, made_by):
    content = parse_yaml((ROOT / "params" / "tiny.yaml").read_text()) | {"audit": asked}
    (home / "tiny.yaml").write_text(yaml.safe_dump(content))
    environment = os.environ | {"KDLIB_HOME": str(home)}
    rules = planned(home / "tiny.yaml", home, home / "log", target, environment=environment).keys()
    rules -= {"all"}
    assert rules - {"audit"} == made_by - {"audit"} if target == "audit" else made_by <= rules
    assert ("audit" in rules) == ("audit" in made_by)


def test_a_check_that_sees_no_defect_leaves_no_evidence_and_fails_again(study, images, monkeypatch):
    shutil.rmtree(study.runs / "audit")
    rows = [
        {"name": "a leak", "caught": False, "quiet": True},
        {"name": "another", "caught": True, "quiet": False},
    ]
    monkeypatch.setattr(report, "exhibits", lambda images: pd.DataFrame(rows))
    said = "no check sees the defect of a leak; a check objects to the honest run of another"
    for _ in range(2):
        with pytest.raises(checks.CheckError, match=said):
            report.make(study, images)
        assert not (study.runs / "audit" / "evidence.json").exists()


def test_an_audit_of_other_images_is_made_again_also_where_the_study_does_not_ask_for_it(study):
    assert unfinished(study, "audit") == {}
    (study.figures / "audit.md").unlink()
    folder = study.runs / "audit"
    assert unfinished(study, "audit") == {folder: f"{study.figures}/audit.md is not there"}
    (folder / "exhibits.parquet").unlink()
    assert unfinished(study, "audit") == {folder: "exhibits.parquet is gone"}
    assert folder not in unfinished(study)
