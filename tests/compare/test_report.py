"""What a study found, in words: commands, the ledger, the best epoch."""

import shlex
import shutil

import pytest
from tiny import forge, tiny_study

from kdlib.compare.comparisons import comparisons
from kdlib.compare.report import costs_text, ledger_text, summary
from kdlib.repro import checks
from kdlib.repro.run import read_evidence
from kdlib.steps.compare import compile_tables
from kdlib.steps.folders import student_folder
from kdlib.steps.results import results
from kdlib.study.load import load_study


def test_no_row_left_is_no_comparison(lab):
    study = tiny_study(lab)
    shutil.rmtree(study.runs / "distill")
    with pytest.raises(checks.CheckError, match="every row is refused"):
        compile_tables(study)


def test_every_row_says_the_command_that_makes_its_cell_again(lab):
    study = tiny_study(lab)
    tables = compile_tables(study)
    text = summary(study, tables)
    best, last = (tables["results"][f"test_accuracy{epoch}"] for epoch in ("_best", ""))
    gains = 100 * (best - last).dropna()
    line = f"{gains.mean():+.2f} points on average and {gains.max():+.2f} at most ({len(gains)} "
    assert line in text
    assert "The same kind of processor gives the same bytes" in text
    for other, sentence in (
        ({"portable": True}, "Held to AVX2"),
        ({"device": "cuda"}, "A GPU may sum"),
    ):
        compute = study.compute.model_copy(update=other)
        asked = study.model_copy(update={"compute": compute})
        assert sentence in summary(asked, tables)
    for name in ("results", "strategies", "objectives"):
        for row in tables[name].to_dict("records"):
            program, notebook, _, *options = shlex.split(row["command"])
            assert (program, notebook) == ("papermill", "notebooks/04_distill.ipynb")
            assert options[::3] == ["-p"] * 5
            given = dict(zip(options[1::3], options[2::3], strict=True))
            assert load_study(given.pop("study")) == study
            cell = study.cell(**given)
            assert dict(cell.items()) == {axis: row[axis] for axis in dict(cell.items())}
            assert f"`{row['command']}`" in text


def test_the_summary_says_what_is_known_of_duplicates(lab):
    study = tiny_study(lab)
    tables = compile_tables(study)
    assert "Duplicates: no two of 1,797 images have the same pixels." in summary(study, tables)
    assert "occur once" not in summary(study, tables)
    for distinct, shown in ((0.0, False), (0.125, True)):
        measured = tables["results"].assign(
            test_accuracy_distinct=tables["results"]["test_accuracy"] - distinct
        )
        text = summary(study, tables | {"results": measured})
        assert ("## On test images that occur once" in text) is shown
        mean = (
            100 * measured.query("strategy == 'easy' & objective == 'kd'")["test_accuracy"].mean()
        )
        row = f"| tiny | kd | 33 % | easy | {mean:.2f} | {mean - 12.5:.2f} | -12.50 |"
        assert (row in text) is shown
    older = tables["results"].drop(columns="duplicates")  # as committed before it was known
    assert "Duplicates" not in summary(study, tables | {"results": older})


def test_the_summary_says_what_was_converted_and_nothing_where_nothing_was(lab):
    study = tiny_study(lab)
    tables = compile_tables(study)
    assert "reader" not in tables["results"]
    assert "as they were read" not in summary(study, tables)
    done = {"images": 7, "counts": {"greyscale": 2}, "passed_over": {".txt": 3}, "unknown": 0}
    forge(study.runs / "cache", lambda evidence: evidence.update(reader={"train": done}))
    assert (
        "Images as they were read: train, of 7 images: 2 made RGB from greyscale; 3 files passed "
        "over (.txt 3)."
    ) in summary(study, compile_tables(study))


def laid_over(below, above):
    return {k: below[k] | v if isinstance(v, dict) else v for k, v in above.items()}


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (
            {"duplicates": {"crossing": 9, "pairs": {"train": 0, "test": 0, "across": 9}}},
            "duplicates: pairs of",
        ),
        ({"mean": [0.25]}, r"recorded mean as \[0.25\], and the training images give \["),
        (
            {"duplicates": {"held_out": 1}},
            "recorded duplicates.held_out as 1, and the shards give 0",
        ),
    ],
)
def test_runs_on_images_that_fail_a_check_or_of_edited_evidence_are_refused(lab, facts, said):
    study = tiny_study(lab)
    forge(study.runs / "cache", lambda e: e.update(laid_over(e, facts)))
    table = results(study)
    assert table["refused"].all()
    assert table["reason"].str.contains(said).all()


def test_the_ledger_charges_what_the_study_recorded(lab):
    study = tiny_study(lab)
    tables = compile_tables(study)
    spent = tables["costs"].set_index("what")["wall_s"]
    evidence = read_evidence(study.runs / "teacher")
    assert spent["teacher"] == evidence["made"]["wall_s"]
    table = tables["ledger"].set_index(["strategy", "objective"])["selection_s"]
    assert table["random"].tolist() == [0, 0]
    assert table["easy", "kd"] == pytest.approx(spent["datamap"])
    # without a teacher its training was for the map alone
    assert table["easy", "plain"] == pytest.approx(spent["datamap"] + spent["teacher"])
    text = costs_text(study, tables)
    assert f"| teacher | {spent['teacher']:.3g} | 86 |" in text
    assert (study.runs / "compare" / "costs.md").read_text() == text
    # The committed text has steps alone, and says the same without the runs.
    steps = ledger_text(study, tables)
    alone = comparisons(study, {name: tables[name] for name in ("results", "curves", "probes")})
    assert ledger_text(study, alone) == steps
    assert "(s)" not in steps
    assert "`runs/tiny/compare/costs.md`" in costs_text(study, alone)


def test_a_best_epoch_chosen_on_images_the_teacher_has_learnt_from_is_not_reported(lab):
    study = tiny_study(lab)
    for cell in study.cells():
        for seed in study.seeds:
            folder = student_folder(study, cell, seed)
            if cell.objective == "kd":
                forge(folder, lambda e: e["selection"].update(teacher_overlap=197))
    table = results(study)
    assert not table["refused"].any()
    assert table.groupby("objective")["test_accuracy_best"].count().to_dict() == {
        "kd": 0, "plain": 6,
    }  # fmt: skip
