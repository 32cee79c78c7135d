"""Sentences, Markdown and LaTeX of a comparison hold the numbers of its rows."""

import re

import numpy as np
from compare.test_differences import EASY, RANDOM, cell, compared

from kdlib.compare.differences import COLUMNS
from kdlib.compare.text import (
    comparison_latex,
    comparison_markdown,
    escaped,
    summary_lines,
)


def test_summary_counts_verdicts_then_lists_the_largest_differences():
    nearly = np.array([0.001, -0.001, 0.001, -0.001, 0.0])
    refused = cell("hard", RANDOM + nearly)
    refused["refused"] = refused["seed"] == 3
    comparison = compared(
        cell("random", RANDOM),
        cell("easy", EASY),
        refused,
        cell("full", np.array(RANDOM) + 0.1 + nearly, fraction=1.0),
    )
    assert summary_lines(comparison) == [
        "3 comparisons at equal steps with a margin of 1 point: 1 better, 1 worse, 1 equivalent, "
        "0 inconclusive.",
        "Of the 2 better or worse, 2 stay significant after Holm's correction for 3 tests.",
        "With kd, the full set is better than random at 33 % by 10.0 points (95 % interval 9.9 to "
        "10.1, 5 paired seeds).",
        "At 33 % with kd, easy is worse than random by 3.4 points (95 % interval -4.1 to -2.7, 5 "
        "paired seeds).",
        "At 33 % with kd, hard is as good as random within 1 point: it differs by 0.0 (90 % "
        "interval -0.1 to 0.1, 4 paired seeds, 1 refused run left out).",
    ]


def test_summary_names_the_student_where_there_are_several_and_an_empty_table():
    cells = [cell(s, a, student=n) for n in "ab" for s, a in (("random", RANDOM), ("easy", EASY))]
    lines = summary_lines(compared(*cells))
    assert [line[-12:] for line in lines[2:]] == [" student a).", " student b)."]
    nothing = compared(cell("random", RANDOM))
    assert nothing.columns.tolist() == COLUMNS
    assert summary_lines(nothing) == [
        "There is nothing to compare: no cell but those to compare with."
    ]


def test_markdown_table_is_in_percent_with_spread_and_verdict():
    full = cell("full", np.array(RANDOM) + 0.1, fraction=1.0)
    text = comparison_markdown(compared(cell("random", RANDOM), cell("easy", EASY), full))
    lines = text.splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == (
        "| tiny | kd | 33 % | easy | 68.6 ± 1.7 | random | 72.0 ± 1.6 | "
        "-3.4 (95 %: -4.1 to -2.7) | < 0.001 | 5 | worse |"
    )
    assert "| full | 82.0 ± 1.6 | random at 33 % | 72.0 ± 1.6 | +10.0 (" in lines[3]


def test_a_best_epoch_has_a_column_where_one_is_reported():
    rows = [cell(s, a, test_accuracy_best=np.add(a, 0.01)) for s, a in
            (("random", RANDOM), ("easy", EASY))]  # fmt: skip
    head, _, line = comparison_markdown(compared(*rows)).splitlines()
    assert head.endswith("| verdict | best epoch (%) |")
    assert line.endswith("| worse | 69.6 (-3.4) |")
    assert "best epoch" not in comparison_markdown(
        compared(cell("random", RANDOM), cell("easy", EASY))
    )


def cells_of(row):
    return [part.strip() for part in re.split(r"(?<!\\\\)&", row.removesuffix(r"\\\\"))]


def test_latex_has_the_rules_of_booktabs_and_every_row_of_the_markdown():
    rows = [cell(s, a) for s, a in (("random", RANDOM), ("aum_top", EASY), ("hard", EASY))]
    comparison = compared(*rows, cell("full", RANDOM, fraction=1.0))
    text = comparison_latex(comparison, "50 % of x_1 & more", "a study_x")
    lines = text.splitlines()
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert r"\caption{50 \% of x\_1 \& more}\label{tab:a-study-x}" in lines
    body = lines[lines.index(r"\midrule") + 1 : lines.index(r"\bottomrule")]
    assert len(body) == len(comparison) == 3
    (columns,) = re.findall(r"begin\{tabular\}\{(\w+)\}", text)
    assert {len(cells_of(line)) for line in body} == {len(columns)}
    assert cells_of(body[0])[3:8] == [
        r"aum\_top", r"68.6 $\pm$ 1.7", "random", r"72.0 $\pm$ 1.6",
        r"$-3.4$ (95 \%: $-4.1$ to $-2.7$)",
    ]  # fmt: skip
    assert cells_of(body[0])[8] == "$<$ 0.001"
    assert text.count(r"\begin") == text.count(r"\end{")
    for bare in re.findall(r"(?<!\\)[_%&#]", re.sub(r"tab:[\w-]+", "", text)):
        assert bare == "&"


def test_a_long_latex_table_may_break_over_pages_and_says_its_head_again():
    rows = [cell(f"s{i}", EASY) for i in range(41)]
    text = comparison_latex(compared(cell("random", RANDOM), *rows), "c", "l")
    assert text.startswith(r"\begin{longtable}")
    assert text.count("student & objective") == 2
    assert text.count("worse") == 41


def test_every_sign_that_latex_reads_is_escaped():
    assert escaped(r"\&%$#_{}~^±a") == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}$\pm$a"
    )
