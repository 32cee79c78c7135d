"""What a study found, in words: commands, the ledger, the best epoch."""

import shlex
import shutil

import pytest
from tiny import forge, tiny_study

from kdlib.compare.report import ledger_text, summary
from kdlib.repro import checks
from kdlib.repro.run import read_evidence
from kdlib.steps.compare import compile_tables, results
from kdlib.steps.distill import student_folder
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
    assert "These runs were made on cpu (" in text
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
    text = ledger_text(study, tables)
    assert f"| teacher | {spent['teacher']:.3g} | 86 |" in text


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
