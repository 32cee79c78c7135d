"""`kdlib.compare.findings`: verdicts counted, largest differences named, sentences with numbers."""

import re

import pandas as pd
import pytest

from kdlib.compare.findings import _groups, budgets, in_words


def row(strategy, difference, verdict, seeds_needed=None, **more):
    ends = {"low": difference - 0.01, "high": difference + 0.01}
    fixed = {"student": "small", "objective": "kd", "fraction": 0.33, "n_seeds": 5,
             "seeds_needed": seeds_needed}  # fmt: skip
    return (
        fixed | {"strategy": strategy, "difference": difference, "verdict": verdict} | ends | more
    )


def lines_of(rows, kind="strategies"):
    return list(_groups(pd.DataFrame(rows), kind))


def test_verdicts_are_counted_and_the_largest_differences_named():
    rows = [row("easy", 0.02, "better"), row("hard", -0.05, "worse")]
    rows += [row(f"s{k}", -0.001 * k - 0.01, "worse") for k in range(4)]
    (line,) = lines_of(rows)
    assert line == (
        "kd: 1 better: easy +2.0 (+1.0 to +3.0); 5 worse: hard -5.0 (-6.0 to -4.0), "
        "s3 -1.3 (-2.3 to -0.3) and 3 more"
    )


def test_what_is_inconclusive_says_how_many_seeds_would_settle_it():
    (line,) = lines_of([row("easy", 0.004, "inconclusive", seeds_needed=17)])
    assert line == "kd: 1 inconclusive: easy +0.4 (-0.6 to +1.4, about 17 seeds)"


def test_students_and_objectives_are_listed_apart_and_the_full_set_left_out():
    rows = [row("full", 0.02, "better"), row("easy", 0.02, "better")]
    rows += [row("refused", float("nan"), "inconclusive")]
    rows += [row("easy", 0.03, "better", objective="plain", student="large")]
    assert [line.split(":")[0] for line in lines_of(rows)] == ["small, kd", "large, plain"]


def test_where_only_the_full_set_is_compared_it_is_compared_with_each_fraction():
    rows = [row("full", 0.04, "better", fraction=1.0, against_fraction=0.01)]
    assert lines_of(rows) == ["kd: 1 better: full against 1 % +4.0 (+3.0 to +5.0)"]


def test_controls_are_grouped_by_fraction_and_objective():
    rows = [row("random", 0.02, "better", objective="hot", fraction=0.1)]
    assert lines_of(rows, "controls") == ["10 % of the images: 1 better: hot +2.0 (+1.0 to +3.0)"]


def test_one_pair_of_seeds_and_equal_differences_have_no_interval():
    none = {"low": float("nan"), "high": float("nan")}
    for n, words in ((1, "one seed"), (3, "the same in every seed")):
        (line,) = lines_of([row("easy", 0.02, "inconclusive", n_seeds=n, **none)])
        assert line == f"kd: 1 inconclusive: easy +2.0 ({words})"


def test_a_sentence_has_the_numbers_and_the_verdict_of_its_row():
    row = {"strategy": "correctness_top", "student": "resnet8", "objective": "kd"}
    text = in_words(("It changes by {}.", (("subsets", "strategies", row),)))
    number = r"[+-]\d+\.\d"
    assert re.fullmatch(
        rf"It changes by {number} points \(95 % interval {number} to {number}, better\)\.", text
    )


def test_a_sentence_whose_row_is_not_there_is_refused():
    with pytest.raises(ValueError, match="unpack"):
        in_words(("{}", (("subsets", "strategies", {"strategy": "strange"}),)))


def test_budgets_side_by_side_are_those_of_the_committed_tables():
    _, _, *lines = budgets(["subsets", "subsets"], "resnet8", "kd").splitlines()
    names, short, long = zip(*(line.strip("| ").split(" | ") for line in lines), strict=True)
    assert "correctness_top, 33 %" in names
    assert not any(name.startswith("full") for name in names)
    assert short == long
    differences = [float(cell.split()[0]) for cell in long]
    assert differences == sorted(differences, reverse=True)
