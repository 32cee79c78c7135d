"""Several studies become the LaTeX of a paper, which compiles where a LaTeX is."""

import re
import shutil
import sys

import pytest
from tiny import tiny_study

from kdlib.__main__ import main
from kdlib.steps import paper
from kdlib.steps.compare import compile_tables
from kdlib.study.load import load_study


@pytest.fixture
def two(lab):
    """Two studies with committed tables, of which one has a hostile question."""
    study = tiny_study(lab)
    compile_tables(study)
    text = (lab / "params" / "tiny.yaml").read_text()
    (lab / "params" / "twin.yaml").write_text(f"# 50 % of $x_1^2 & \\end{{document}} → 猫?\n{text}")
    twin = load_study("params/twin.yaml")
    shutil.copytree(study.runs, twin.runs)
    compile_tables(twin)
    return [(s, lab / "params" / f"{s.name}.yaml") for s in (study, twin)]


def test_a_paper_has_each_study_with_its_figures_and_tables_and_compiles(two):
    path, origins = paper.write_paper(two)
    assert origins == ["tiny: its committed tables", "twin: its committed tables"]
    whole = path.read_text()
    assert re.findall(r"\\input\{(.*?)\}", whole) == ["tiny.tex", "twin.tex"]
    for study, _ in two:
        text = (path.parent / f"{study.name}.tex").read_text()
        shown = re.findall(r"\\includegraphics\[.*?\]\s*\{(.*?)\}", text)
        assert f"{study.name}-accuracy.pdf" in shown
        assert all((path.parent / name).read_bytes().startswith(b"%PDF") for name in shown)
        labels = re.findall(r"\\label\{(.*?)\}", text)
        assert len(labels) == len(set(labels))
        assert {f"tab:{study.name}-strategies", f"tab:{study.name}-objectives"} <= set(labels)
        begun, ended = (re.findall(rf"\\{what}\{{(\w+)\}}", text) for what in ("begin", "end"))
        assert sorted(begun) == sorted(ended)
        for bare in re.findall(r"(?<!\\)[_%#]", re.sub(r"\{[\w.:-]+\}", "", text)):
            pytest.fail(f"{bare} is not escaped")
    twin = (path.parent / "twin.tex").read_text()
    assert r"50 \% of \$x\_1\textasciicircum{}2 \& \textbackslash{}end\{document\} [U+2192]" in twin
    try:
        assert paper.compile_paper(path).read_bytes().startswith(b"%PDF-")
    except RuntimeError as error:
        if "on the PATH" not in str(error):
            raise
        pytest.skip(str(error))


def test_without_latex_there_is_a_folder_and_a_sentence(two, monkeypatch, capsys):
    monkeypatch.setattr("kdlib.steps.figures.draw_comparison", lambda study, tables: {})
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["kdlib", "paper"])  # all that are committed
    assert main() == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[:2] == [
        "tiny: its committed tables",
        "twin: its committed tables",
    ]
    assert "no PDF was made: neither pdflatex nor tectonic is on the PATH" in printed.err


def test_a_latex_that_fails_is_said_with_its_fault(tmp_path, monkeypatch):
    compiler = tmp_path / "pdflatex"
    compiler.write_text("#!/bin/sh\necho '! Undefined control sequence.'\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "paper.tex").write_text("")
    with pytest.raises(RuntimeError, match=r"paper.tex: ! Undefined control sequence\."):
        paper.compile_paper(tmp_path / "paper.tex")


def test_a_study_that_is_named_twice_is_refused(two):
    with pytest.raises(ValueError, match="expected each once"):
        paper.write_paper([two[0], two[0]])
