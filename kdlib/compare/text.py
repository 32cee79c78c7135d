"""Comparisons as sentences, Markdown and LaTeX, from the same rows."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.compare.differences import AGAINST
from kdlib.compare.statistics import EQUIVALENCE_LEVEL, VERDICTS
from kdlib.repro.files import write_atomic
from kdlib.study.cells import share_in_words
from kdlib.study.evaluation import AXES, OWN, named_place
from kdlib.study.study import Study

MEASURED = {  # column of the results table -> what the compared accuracy is measured on
    "test_accuracy": "last step on the test split",
    "linear_accuracy": "linear probe of the last step's features, on the test split",
    "knn_accuracy": "k-NN probe of the last step's features, on the test split",
}


LONG = 40  # rows that fit on a page of LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"}, "±": r"$\pm$",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A table before it is written as Markdown, HTML or LaTeX.

    Attributes:
        head: Names of the columns.
        rows: Cells of each row.
        align: `l` or `r` for each column; columns without a letter are aligned left.
        cells: For each row, column -> the cell of the study (values of `AXES`) that its number is
            of; of a row without an entry none is known.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    align: str = ""
    cells: Sequence[Mapping[int, tuple]] = ()

    def markdown(self) -> str:
        """Lines joined by newlines, without one at the end."""
        return table(self.head, self.rows, self.align)


def numbers_of(cells: Iterable[tuple], columns: Iterable[int]) -> list[dict[int, tuple]]:
    """The `cells` of a table each of whose rows has numbers of one cell in the same columns."""
    columns = list(columns)
    return [dict.fromkeys(columns, tuple(cell)) for cell in cells]


@dataclass(frozen=True)
class Section:
    """A part of a text: a title, a paragraph, a table."""

    title: str
    text: str
    table: Table

    def markdown(self) -> list[str]:
        """Blocks of Markdown, below a heading of the second level."""
        text = [self.text, ""] if self.text else []
        return [f"## {self.title}", "", *text, self.table.markdown(), ""]


_LAST_LATIN = 0x17F  # of the letters that LaTeX's standard fonts have


def measured_on(columns: Iterable[str]) -> str:
    """What the accuracies in columns of the results table, of one measure, are measured on.

    >>> measured_on(["knn_accuracy_on_mnist"])
    "k-NN probe of the last step's features, on the test split of mnist"
    """
    bases, places = zip(*map(named_place, columns), strict=True)
    names = " and of ".join(place_in_words(place) for place in places)
    return MEASURED[bases[0]] + (f" of {names}" if any(places) else "")


def place_in_words(on: str) -> str:
    """A data set's name in a sentence."""
    return "the study's data" if on in ("", OWN) else on


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], align: str = "") -> str:
    """A Markdown table; lines joined by newlines, without one at the end.

    Args:
        head: Names of the columns.
        rows: Cells of each row, written as `str` writes them; a bar and a tag are escaped.
        align: `l` or `r` for each column; columns without a letter are aligned left.

    >>> print(table(["score", "runs"], [["aum", 3]], "lr"))
    | score | runs |
    | --- | ---: |
    | aum | 3 |
    """
    lines = [[_cell(cell) for cell in line] for line in (head, *rows)]
    rules = ["---:" if letter == "r" else "---" for letter in align.ljust(len(head), "l")]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in [lines[0], rules, *lines[1:]])


def _cell(content: Any) -> str:
    """A cell that ends where it should: a bar, a line break or a tag would end or change a row."""
    text = " ".join(str(content).split("\n"))
    return re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"(?<!\\)\|", r"\|", text))


def write_text(study: Study, name: str, parts: Iterable[str], folder: Path | None = None) -> str:
    """Write lines or blocks of text to a file of the study's figures folder, or of another one;
    returns the text."""
    text = "\n".join(parts).rstrip() + "\n"
    path = (study.figures if folder is None else folder) / name
    write_atomic(path, lambda file: file.write(text.encode()))
    return text


def summary_lines(comparison: pd.DataFrame) -> list[str]:
    """The results in plain sentences: the counts first, then better, worse, equivalent and
    inconclusive, the largest differences first.

    Args:
        comparison: From `paired_differences` or `objective_differences`.

    Returns: One sentence per element; accuracies and differences in percentage points.
    """
    if comparison.empty:
        return ["There is nothing to compare: no cell but those to compare with."]
    first, n = comparison.iloc[0], len(comparison)
    counts = comparison["verdict"].value_counts()
    verdicts = ", ".join(f"{counts.get(name, 0)} {name}" for name in VERDICTS)
    lines = [
        f"{count(n, 'comparison')} at {first.budget.replace('_', ' ')} with a "
        f"margin of {count(100 * first.margin, 'point')}: {verdicts}."
    ]
    settled = comparison[comparison["verdict"].isin(["better", "worse"])]
    if len(settled):
        kept = int((settled["p_holm"] < 1 - settled["level"]).sum())
        lines.append(
            f"Of the {len(settled)} better or worse, {kept} stay significant after Holm's "
            f"correction for {count(int(comparison['p_value'].notna().sum()), 'test')}."
        )
    ordered = comparison.assign(
        order=comparison["verdict"].map(VERDICTS.index), size=-comparison["difference"].abs()
    ).sort_values(["order", "size", *AXES, *AGAINST], kind="stable")
    several = comparison["student"].nunique() > 1
    return lines + [_sentence(row, several) for row in ordered.itertuples()]


def comparison_markdown(comparison: pd.DataFrame) -> str:
    """The comparison as a Markdown table: accuracies in %, mean ± sd (ddof=1) over paired seeds.

    Args:
        comparison: From `paired_differences` or `objective_differences`.

    Returns: The table; a number that is not there is "-", and best epochs have a column where one
        is reported.
    """
    return comparison_table(comparison).markdown()


def comparison_latex(comparison: pd.DataFrame, caption: str, label: str) -> str:
    """The same table for LaTeX, in the rules of booktabs; a long one may break over pages.

    Args:
        comparison: From `paired_differences` or `objective_differences`.
        caption, label: Plain text, escaped here; the label loses what LaTeX does not allow in one.

    Returns: A `table`, or a `longtable` of more than 40 rows, ending with a newline.
    """
    written = comparison_table(comparison)
    head, rows = written.head, written.rows
    numbers = {"fraction", "seeds", "p (Holm)"}
    columns = "".join("r" if name in numbers else "l" for name in head)
    title = rf"\caption{{{escaped(caption)}}}\label{{tab:{_label(label)}}}"
    header = rf"{' & '.join(map(escaped, head))} \\"
    body = [rf"{' & '.join(map(_typeset, row))} \\" for row in rows]
    if len(rows) > LONG:
        lines = [
            rf"\begin{{longtable}}{{{columns}}}", rf"{title} \\", r"\toprule", header,
            r"\midrule", r"\endfirsthead", r"\toprule", header, r"\midrule", r"\endhead",
            r"\bottomrule", r"\endfoot", *body, r"\end{longtable}",
        ]  # fmt: skip
    else:
        lines = [
            r"\begin{table}", r"\centering", title, rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule", header, r"\midrule", *body, r"\bottomrule", r"\end{tabular}",
            r"\end{table}",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text that LaTeX prints as it stands; a sign that its fonts lack by its number, and a line
    break as a space.

    >>> escaped("aum_top, 33 %"), escaped("é → 猫")
    ('aum\\\\_top, 33 \\\\%', 'é [U+2192] [U+732B]')
    """
    signs = (sign if sign.isprintable() else " " for sign in text)
    return "".join(
        _LATEX.get(sign) or (sign if ord(sign) <= _LAST_LATIN else f"[U+{ord(sign):04X}]")
        for sign in signs
    )


def count(n: float, thing: str) -> str:
    """A number of things.

    >>> count(1, "point"), count(2.5, "point")
    ('1 point', '2.5 points')
    """
    return f"{n:g} {thing}" if n == 1 else f"{n:g} {thing}s"


def points(accuracy: float, sign: str = "") -> str:
    """An accuracy or a difference in percent, "-" for NaN."""
    rounded = round(100 * accuracy, 1)
    if rounded == 0:
        return "0.0"  # neither +0.0 nor -0.0
    return "-" if np.isnan(rounded) else f"{rounded:{sign}.1f}"


def comparison_table(comparison: pd.DataFrame) -> Table:
    """A comparison as text: a row for each of its rows, in the same order.

    Args:
        comparison: From `paired_differences` or `objective_differences`; of `comparisons` it also
            has the examples of the rarest class (`fewest`).
    """
    head = [
        "student", "objective", "fraction", "strategy", "accuracy (%)", "against",
        "its accuracy (%)", "difference (points)", "p (Holm)", "seeds", "verdict",
    ]  # fmt: skip
    has_best, has_classes = comparison["best_mean"].notna().any(), "fewest" in comparison
    rows, cells = [], []
    for row in comparison.itertuples():
        interval = f"({100 * row.level:g} %: {points(row.low, '+')} to {points(row.high, '+')})"
        best = f"{points(row.best_mean)} ({points(row.best_difference, '+')})"
        rows.append(
            [
                row.student, row.objective, share_in_words(row.fraction), row.strategy,
                f"{points(row.mean)} ± {points(row.sd)}", _against(row),
                f"{points(row.against_mean)} ± {points(row.against_sd)}",
                f"{points(row.difference, '+')} {interval}", _probability(row.p_holm),
                str(row.n_seeds), row.verdict, *([best] if has_best else []),
                *([row.fewest] if has_classes else []),
            ]
        )  # fmt: skip
        cell = tuple(getattr(row, axis) for axis in AXES)
        against = row.student, row.against_strategy, row.against_fraction, row.against_objective
        cells.append(dict.fromkeys((4, 7, 8, 9, *range(11, len(rows[-1]))), cell) | {6: against})
    head += ["best epoch (%)"] * int(has_best) + ["fewest of a class"] * has_classes
    return Table(head, rows, cells=cells)


def _probability(p: float) -> str:
    if np.isnan(p):
        return "-"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _typeset(text: str) -> str:
    """A cell of a table: names escaped, signs of numbers in mathematics."""
    words = []
    for word in text.split(" "):
        bare = word.strip("()")
        if bare[:1] in ("+", "-") and bare[1:2].isdigit():
            word = word.replace(bare, f"${bare}$")
        else:
            word = escaped(word) if word not in ("<", "-") else {"<": "$<$", "-": "--"}[word]
        words.append(word)
    return " ".join(words)


def _label(text: str) -> str:
    return "".join(sign if sign.isalnum() or sign in "-.:" else "-" for sign in text)


def _against(row: Any) -> str:
    """What a row is compared with: only what differs from its cell."""
    parts = [row.against_strategy] if row.against_strategy != row.strategy else []
    if row.against_objective != row.objective:
        parts.append(f"with {row.against_objective}")
    if row.against_fraction != row.fraction:
        parts.append(f"at {share_in_words(row.against_fraction)}")
    return " ".join(parts)


def _sentence(row: Any, name_student: bool) -> str:
    """One row of a comparison in words; the student is named where there are several."""
    is_full = row.strategy == "full"
    subject = (
        f"With {row.objective}, the full set"
        if is_full
        else f"At {share_in_words(row.fraction)} with {row.objective}, {row.strategy}"
    )
    level, ends = row.level, (row.low, row.high)
    if row.verdict == "equivalent":
        level, ends = EQUIVALENCE_LEVEL, (row.low90, row.high90)
    facts = [f"{100 * level:g} % interval {points(ends[0])} to {points(ends[1])}"]
    facts = [] if np.isnan(row.low) else facts
    facts.append(count(row.n_seeds, "paired seed"))
    if row.n_refused:
        facts.append(f"{count(row.n_refused, 'refused run')} left out")
    if name_student:
        facts.append(f"student {row.student}")
    basis, against = f"({', '.join(facts)})", _against(row)
    if row.verdict in ("better", "worse"):
        size = points(abs(row.difference))
        return f"{subject} is {row.verdict} than {against} by {size} points {basis}."
    if row.verdict == "equivalent":
        margin, size = count(100 * row.margin, "point"), points(row.difference, "+")
        return f"{subject} is as good as {against} within {margin}: it differs by {size} {basis}."
    if row.n_seeds < 2:
        return f"{subject} cannot be compared with {against}: two paired seeds are needed {basis}."
    if np.isnan(row.low):
        size = points(row.difference, "+")
        return (
            f"{subject} has no interval against {against}: the difference is {size} points in "
            f"every seed {basis}."
        )
    ending = "a difference between 0 and the margin may need many more seeds"
    if row.seeds_needed > row.n_seeds:
        ending = f"about {row.seeds_needed} paired seeds would settle it"
    size = points(row.difference, "+")
    return f"{subject} may be better or worse than {against}: {size} points {basis}; {ending}."
