"""Paired differences are drawn in points with their intervals and verdicts."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from plots.example_tables import MARGIN, axis, compared, result_table, title_of, words

from kdlib.compare.differences import objective_differences
from kdlib.plots import theme
from kdlib.plots.differences import VERDICTS, forest_plot, forest_plot_by_student


def test_differences_are_drawn_in_points_with_their_intervals_and_verdicts():
    comparison = compared(result_table())
    ax = forest_plot(axis(), comparison, margin=MARGIN)
    markers = {"better": "^", "worse": "v", "equivalent": "s", "inconclusive": "o"}
    points = [line for line in ax.lines if line.get_marker() in markers.values()]
    assert {line.get_color() for line in points} == {theme.BLACK}  # verdicts are shapes
    intervals = [line for line in ax.lines if line.get_linewidth() == 2.2]
    colours = {theme.OBJECTIVES[name][0] for name in ("kd", "plain")}
    assert {line.get_color() for line in intervals} == colours
    drawn = sorted((line.get_marker(), round(float(line.get_xdata()[0]), 6)) for line in points)
    assert drawn == sorted(
        (markers[row.verdict], round(100 * row.difference, 6)) for row in comparison.itertuples()
    )
    assert len({row.verdict for row in comparison.itertuples()}) > 1
    spans = {
        tuple(np.round(line.get_xdata(), 6)) for line in ax.lines if len(line.get_xdata()) == 2
    }
    for row in comparison.itertuples():
        assert (round(100 * row.low, 6), round(100 * row.high, 6)) in spans
        assert (round(100 * row.low90, 6), round(100 * row.high90, 6)) in spans
    assert any(
        patch.get_x() == pytest.approx(-1) and patch.get_width() == pytest.approx(2)
        for patch in ax.patches
    )
    assert ax.get_xlabel() == "test accuracy, strategy minus random, seed by seed (points)"
    labels = [label.get_text() for label in ax.get_yticklabels()]
    # The full set comes first, and says what it is compared with.
    assert labels[:2] == ["KD, against random 33 %", "plain, against random 33 %"]
    assert len(labels) == len(comparison)
    assert {"full set", "ambiguous (corner)"} <= set(words(ax))


def test_differences_of_objectives_say_what_is_subtracted():
    comparison = objective_differences(result_table(), "plain", MARGIN, 0.95)
    ax = forest_plot(axis(), comparison, margin=MARGIN)
    assert ax.get_xlabel() == "test accuracy, KD minus plain, seed by seed (points)"
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:3] == ["", "33 %", "10 %"]  # of the full set, then of random
    intervals = [line for line in ax.lines if line.get_linewidth() == 2.2]
    assert {line.get_color() for line in intervals} == {theme.BLACK}


def test_differences_at_one_fraction_and_objective_name_them_below():
    comparison = compared(result_table(objectives=("kd",), fractions=(0.33,)))
    ax = forest_plot(axis(), comparison, margin=MARGIN)
    assert ax.get_xlabel().endswith("\nKD, subsets of 33 % of the data")
    only = comparison[comparison["strategy"] == "full"]
    label = forest_plot(axis(), only, margin=MARGIN).get_xlabel()
    assert label == "test accuracy, full set minus random, seed by seed (points)"


def test_a_comparison_without_pairs_is_shown_as_such():
    results = result_table()
    results.loc[results["strategy"] == "hard", "refused"] = True
    ax = forest_plot(axis(), compared(results), margin=MARGIN)
    assert sum(text.strip() == "no paired seeds" for text in words(ax)) == 4


def test_another_margin_than_that_of_the_verdicts_is_refused():
    with pytest.raises(ValueError, match=r"margin is 0.02 but the verdicts were reached with 0.01"):
        forest_plot(axis(), compared(result_table()), margin=0.02)


def test_two_students_share_the_names_and_the_legend_of_their_differences():
    comparison = compared(result_table(students=("tiny", "wide")))
    fig = forest_plot_by_student(Figure(figsize=(theme.WIDE, 5)), comparison, MARGIN)
    assert [title_of(ax) for ax in fig.axes] == ["tiny", "wide"]
    left, right = fig.axes
    assert left.get_yticks().tolist() == right.get_yticks().tolist()
    assert {label.get_text() for label in right.get_yticklabels()} == {""}
    assert left.get_legend() is None
    (legend,) = fig.legends
    assert {"better", "worse", "equivalent", "inconclusive", "margin, ±1 point", "KD"} <= set(
        words(legend)
    )
    n_marks = [sum(line.get_marker() in VERDICTS.values() for line in ax.lines) for ax in fig.axes]
    assert n_marks == [len(comparison) // 2] * 2
