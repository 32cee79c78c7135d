"""Every committed figure is one that a study's committed tables draw, and no other."""

import pytest

from audit import report
from kdlib.compare.committed import (
    NAMES,
    STEPS,
    is_committed,
    is_committed_step,
    read_committed,
    read_step,
)
from kdlib.compare.comparisons import comparisons
from kdlib.plots import theme
from kdlib.repro.files import workspace
from kdlib.steps import figures
from kdlib.study.load import load_study

FOLDER = workspace() / "figures"
SCREENSHOTS = "explorer"  # tests/screenshots.py takes them
STUDIES = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def drawn_files(name):
    return {path.name for path in (FOLDER / name).glob("*.p[dn][fg]")}


@pytest.mark.parametrize("name", [name for name in STUDIES if name != SCREENSHOTS])
def test_the_figures_of_a_study_are_those_that_its_committed_tables_draw(name, monkeypatch):
    study, drawn = load_study(f"params/{name}.yaml"), set()
    monkeypatch.setattr(theme, "save_figure", lambda fig, folder, figure: (drawn.add(figure), "")
                        and (folder / figure, folder / figure))  # fmt: skip
    monkeypatch.setattr("pathlib.Path.unlink", lambda path: pytest.fail(f"{path} is drawn no more"))
    if is_committed(study):
        figures.draw_comparison(study, comparisons(study, read_committed(study)))
    draw = {"datamap": figures.draw_datamap, "scores": figures.draw_scores,
            "noise": figures.draw_noise}  # fmt: skip
    for step in draw:
        if is_committed_step(study, step):
            draw[step](study, tables=read_step(study, step))
    if is_committed_step(study, "audit"):
        report.draw_committed(study, read_step(study, "audit")["exhibits"])
    assert drawn_files(name) == {f"{figure}.{kind}" for figure in drawn for kind in ("png", "pdf")}


def test_no_file_lies_beside_the_tables_that_nothing_reads():
    known = {f"{step}/{table}.parquet" for step, tables in STEPS.items() for table in tables}
    known |= {f"{table}.parquet" for table in (*NAMES, "datamap")}
    for name in STUDIES:
        tables = FOLDER / name / "tables"
        found = {str(path.relative_to(tables)) for path in tables.rglob("*") if path.is_file()}
        assert found <= known
