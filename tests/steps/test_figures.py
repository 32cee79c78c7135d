"""Figures of a study: from its records, from committed tables, and from neither."""

import shutil

from tiny import files_below, tiny_study

from kdlib.__main__ import main
from kdlib.compare.committed import NAMES, STEPS
from kdlib.steps.compare import compile_tables, finish_tables


def test_figures_are_drawn_from_the_records_and_again_from_the_committed_tables_alone(
    lab, monkeypatch, capsys
):
    """The same bytes both times."""
    study = tiny_study(lab)
    finish_tables(study, "compare", compile_tables(study))
    monkeypatch.setattr("sys.argv", ["kdlib", "figures", str(lab / "params" / "tiny.yaml")])
    assert main() == 0
    said, drawn, *_ = capsys.readouterr().out.splitlines()
    assert said == "tiny: the comparison is drawn from its runs"
    drawn = drawn.removesuffix(f" drawn in {study.figures}").split(", ")
    assert {"accuracy", "differences", "datamap", "forming", "regions"} <= set(drawn)
    names = {f"{name}.{kind}" for name in drawn for kind in ("pdf", "png")}
    names |= {"summary.md", "objectives.md", "ledger.md", "comparison.md", "comparison.tex"}
    first = files_below(study.figures)
    tables = {f"tables/{name}.parquet" for name in NAMES}
    tables |= {f"tables/datamap/{name}.parquet" for name in STEPS["datamap"]}
    tables |= {"tables/datamap.parquet"}  # the whole one, for the demo
    assert set(first) == names | tables | {"datamap.html"}
    del first["datamap.html"]  # it shows images, which are gone next
    assert sum(len(first[name]) for name in tables) < 300_000
    assert (study.runs / "compare" / "costs.md").is_file()
    shutil.rmtree(study.runs)
    shutil.rmtree(study.cache)
    for path in study.figures.glob("*.*"):
        path.unlink()
    for stale in ("diagnostics.png", "probes_on_mnist.pdf"):  # drawn before, and no more
        (study.figures / stale).write_bytes(b"of before")
    monkeypatch.setattr("sys.argv", ["kdlib", "figures"])  # all studies that have tables
    assert main() == 0
    printed = capsys.readouterr().out
    assert "tiny: the comparison is drawn from its committed tables" in printed
    assert "not drawn, since neither records nor tables are there: those of step scores" in printed
    assert "datamap, forming, regions" in printed
    assert files_below(study.figures) == first


def test_changed_or_foreign_tables_draw_nothing_and_stop_no_other_study(lab, monkeypatch, capsys):
    study = tiny_study(lab)
    compile_tables(study)
    shutil.copytree(study.figures, lab / "figures" / "twin")
    shutil.copy(lab / "params" / "tiny.yaml", lab / "params" / "twin.yaml")
    shutil.rmtree(study.runs)
    monkeypatch.setattr("sys.argv", ["kdlib", "figures"])
    assert main() == 1
    printed = capsys.readouterr()
    assert "tiny: the comparison is drawn from its committed tables" in printed.out
    assert "twin.yaml: ValueError" in printed.err
    assert "study: tiny -> twin" in printed.err
    path = study.figures / "tables" / "results.parquet"
    path.write_bytes(path.read_bytes().replace(b"tiny", b"tiney"[:4], 1)[:-1])
    before = (study.figures / "summary.md").read_bytes()
    monkeypatch.setattr("sys.argv", ["kdlib", "figures", "params/tiny.yaml"])
    assert main() == 1
    assert "cut or damaged" in capsys.readouterr().err
    assert (study.figures / "summary.md").read_bytes() == before
    shutil.rmtree(study.figures / "tables")
    assert main() == 1
    assert "has neither runs" in capsys.readouterr().err
