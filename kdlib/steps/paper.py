"""The figures and tables of several studies as the LaTeX of a paper, and its PDF where LaTeX is."""

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from kdlib.compare.answer import answers, covered, question
from kdlib.compare.classes import class_sentences
from kdlib.compare.comparisons import Tables
from kdlib.compare.report import titled
from kdlib.compare.text import comparison_latex, escaped, measured_on
from kdlib.repro import files
from kdlib.steps.captions import caption
from kdlib.steps.compare import open_tables
from kdlib.steps.report import pictures
from kdlib.study.cells import shards_counted
from kdlib.study.study import Study

PAPER = "paper"
COMPILERS = {  # command -> its options; twice, for references
    "pdflatex": ("-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape"),
    "tectonic": (),
}
COMPILING_S = 300  # seconds after which a compiler that does not end is stopped
PREAMBLE = r"""\documentclass[10pt]{article}
\usepackage[a4paper, margin=2cm]{geometry}
\usepackage[T1]{fontenc}
\IfFileExists{lmodern.sty}{\usepackage{lmodern}}{}
\usepackage{booktabs, longtable, graphicx, pdflscape}
\usepackage[hidelinks]{hyperref}
\begin{document}
\title{Figures and tables}
\date{}
\author{}
\maketitle
"""


def write_paper(studies: Sequence[tuple[Study, Path]]) -> tuple[Path, list[str]]:
    """Write `runs/paper/`: `paper.tex`, of each study `<study>.tex` with its question, answer,
    figures and tables, and the figures as PDF. The folder is made anew.

    Args:
        studies: Each with its file.

    Returns: Path of `paper.tex`, and what each study was taken from, in words.
    Raises: As `open_tables`; ValueError for a study that is named twice.
    """
    from kdlib.steps.figures import draw_comparison  # matplotlib, where something is drawn

    names = [study.name for study, _ in studies]
    if len(set(names)) != len(names):
        raise ValueError(f"studies are {names}; expected each once")
    folder, origins = files.workspace() / "runs" / PAPER, []
    shutil.rmtree(folder, ignore_errors=True)
    for study, file in studies:
        tables, origin = open_tables(study)
        figures = pictures(study, draw_comparison(study, tables))
        with shards_counted(tables["results"]):
            lines = _section(study, file, tables, figures)
        for name, path in figures.items():
            target = folder / f"{study.name}-{name}.pdf"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path.with_suffix(".pdf"), target)
        _write(folder / f"{study.name}.tex", lines)
        origins.append(f"{study.name}: {origin}")
    inputs = [rf"\input{{{name}.tex}}" for name in names]
    return _write(folder / "paper.tex", [PREAMBLE, *inputs, r"\end{document}"]), origins


def _write(path: Path, lines: Iterable[str]) -> Path:
    text = "\n".join(lines) + "\n"
    return files.write_atomic(path, lambda out: out.write(text.encode()))


def _section(study: Study, file: Path, tables: Tables, figures: dict[str, Path]) -> list[str]:
    """One study: question, answer and what it covers, figures, tables."""
    lines = [
        rf"\section{{{escaped(study.name)}}}",
        rf"\emph{{{escaped(question(file))}}}", "",
        escaped(answers(study, tables)[0].sentence), "",
        escaped(covered(study, tables)), "",
    ]  # fmt: skip
    for sentence in class_sentences(tables["results"]):
        lines += [escaped(sentence), ""]
    for name in figures:
        lines += [
            r"\begin{figure}[htbp]", r"\centering",
            rf"\includegraphics[width=\linewidth, height=0.8\textheight, keepaspectratio]"
            rf"{{{study.name}-{name}.pdf}}",
            rf"\caption{{{escaped(study.name)}: {escaped(caption(name))}}}"
            rf"\label{{fig:{study.name}-{name}}}",
            r"\end{figure}", "",
        ]  # fmt: skip
    lines += [r"\begin{landscape}", r"\fontsize{6}{7.5}\selectfont\setlength{\tabcolsep}{2.5pt}"]
    for name, title, rows in titled(study, tables):
        measured = measured_on(rows["measure"].unique() if len(rows) else ())
        text = f"{study.name}: {title[0].lower()}{title[1:]}; {measured}, in %."
        lines += [comparison_latex(rows, text, f"{study.name}-{name}")]
    return [*lines, r"\end{landscape}", r"\clearpage"]


def compile_paper(path: Path) -> Path:
    """Compile `paper.tex` to a PDF beside it.

    Raises: RuntimeError in a sentence where there is no LaTeX, or where it fails.
    """
    found = [name for name in COMPILERS if shutil.which(name)]
    if not found:
        raise RuntimeError(
            f"no PDF was made: neither {' nor '.join(COMPILERS)} is on the PATH; install a LaTeX, "
            f"or compile {path} elsewhere"
        )
    command = [found[0], *COMPILERS[found[0]], path.name]
    for _ in range(2):
        try:
            done = subprocess.run(
                command, cwd=path.parent, capture_output=True, text=True, errors="replace",
                timeout=COMPILING_S, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(
                f"no PDF was made: {found[0]} did not end within {COMPILING_S} s"
            ) from None
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if line.startswith("!")]
            fault = (said or done.stderr.splitlines() or ["no reason given"])[0]
            raise RuntimeError(f"no PDF was made: {found[0]} stopped at {path}: {fault[:300]}")
    return path.with_suffix(".pdf")
