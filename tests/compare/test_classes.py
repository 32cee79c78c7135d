"""Subsets that lack classes are named, from the numbers that the results table holds."""

import json

import numpy as np
import pandas as pd
import pytest
from compare.test_differences import EASY, RANDOM, cell, compared

from kdlib.compare.classes import (
    class_counts,
    class_sentences,
    class_table,
    counts_in_words,
    fewest,
)
from kdlib.compare.text import comparison_latex, comparison_markdown

NAMES = ["cat", "dog", "owl"]


def results(*subsets, names=NAMES):
    """One row per seed of each (strategy, fraction, numbers of each seed)."""
    rows = [
        {"student": "tiny", "strategy": strategy, "fraction": fraction, "objective": "kd",
         "class_counts": numbers, "class_names": json.dumps(names)}
        for strategy, fraction, *seeds in subsets for numbers in seeds
    ]  # fmt: skip
    return pd.DataFrame(rows)


SCARCE = results(
    ("full", 1.0, "9 9 9", "9 9 9"),
    ("random", 0.1, "6 4 5", "5 6 4"),  # of seeds the fewest: 5 4 4
    ("easy", 0.1, "15 0 0", "15 0 0"),
)


def test_numbers_of_each_class_count_labels_also_of_classes_that_are_absent():
    assert counts_in_words(np.array([2, 0, 2, 2]), 4) == "1 0 3 0"


def test_of_several_seeds_the_fewest_of_each_class_count():
    table = class_counts(SCARCE)
    assert table.loc[("random", 0.1)].tolist() == [5, 4, 4]
    assert table.columns.tolist() == NAMES
    assert fewest(SCARCE).tolist() == ["9", "4", "0 (lacks 2 of 3 classes)"]


def test_a_sentence_names_what_a_subset_lacks_and_what_it_has_few_of():
    assert class_sentences(SCARCE) == [
        "At 10 %, easy lacks 2 of 3 classes (dog, owl): a student of it never sees what it lacks.",
        "At 10 %, random has fewer than 5 examples of 2 (dog: 4, owl: 4).",
    ]
    assert class_sentences(results(("full", 1.0, "9 9 9"), ("random", 0.1, "5 5 5"))) == []


def test_many_classes_are_named_in_part_and_tabled_by_their_range():
    names = [f"c{i}" for i in range(30)]
    table = results(("easy", 0.1, " ".join(["0"] * 12 + ["7"] * 18)), names=names)
    [sentence] = class_sentences(table)
    assert "lacks 12 of 30 classes (c0, c1, c2, c3, c4, c5, c6, c7 and 4 more)" in sentence
    written = class_table(table)
    assert written.head[3:] == ["fewest of a class", "median", "most"]
    assert written.rows == [["easy", "10 %", "18", "0", "7", "7"]]


@pytest.mark.parametrize("table", [SCARCE.drop(columns="class_counts"),
                                   SCARCE.assign(class_counts=None)])  # fmt: skip
def test_tables_from_before_say_nothing(table):
    assert class_counts(table).empty
    assert fewest(table).empty
    assert class_sentences(table) == []
    assert class_table(table) is None


def test_a_comparison_has_a_column_for_it_where_it_is_known():
    comparison = compared(cell("random", RANDOM), cell("easy", EASY))
    assert "fewest" not in comparison_markdown(comparison)
    known = comparison.assign(fewest=["0 (lacks 6 of 10 classes)"])
    head, _, row = comparison_markdown(known).splitlines()
    assert head.endswith("| fewest of a class |")
    assert row.endswith("| worse | 0 (lacks 6 of 10 classes) |")
    assert r"& 0 (lacks 6 of 10 classes) \\" in comparison_latex(known, "c", "l")
