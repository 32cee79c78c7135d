"""Curves are means over seeds with their spread, one line for each cell, each with a name."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from plots.example_tables import (
    ACCURACY,
    axis,
    cells,
    curve_table,
    diagnostics_table,
    learning_curves_figure,
    places_table,
    probe_table,
    title_of,
    words,
)

from kdlib.plots import theme
from kdlib.plots.curves import apart, difference_curves, learning_curves, losses
from kdlib.plots.probes import (
    DIAGNOSTICS,
    diagnostics,
    probe_curves,
    probe_levels,
    probe_places,
)


def test_learning_curve_is_the_mean_and_the_band_one_standard_deviation():
    # Two seeds, 0.5 and 0.7 at step 10: mean 60 %, sample s.d. 10 * sqrt(2) points.
    runs = cells(objectives=("kd",), fractions=(0.33,), n_seeds=2).query("strategy == 'easy'")
    curves = pd.concat(
        [
            runs.assign(step=0, validation_accuracy=[0.2, 0.2]),
            runs.assign(step=10, validation_accuracy=[0.5, 0.7]),
        ]
    )
    ax = learning_curves(axis(), curves)
    line = next(line for line in ax.lines if line.get_label() == "easy")
    np.testing.assert_allclose(line.get_xydata(), [[0, 20], [10, 60]])
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(20)
    assert sorted({round(h, 6) for h in heights}) == pytest.approx(
        [20, 60 - 10 * np.sqrt(2), 60 + 10 * np.sqrt(2)], abs=1e-5
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimiser steps", "validation accuracy (%)")
    assert "KD, 33 % of the data\nmean ± s.d., S = 2" in words(ax)


def test_one_seed_has_no_band_and_says_so():
    ax = learning_curves(axis(), curve_table(n_seeds=1))
    assert not ax.collections
    assert any(text.endswith("one seed") for text in words(ax))


def test_curves_of_different_cells_are_never_averaged():
    both = curve_table(objectives=("kd", "plain"), fractions=(0.33, 0.1))
    ax = learning_curves(axis(), both)
    names = {line.get_label() for line in ax.lines if not line.get_label().startswith("_")}
    expected = {
        f"{s}, {f} %, {o}" for s in ("easy", "hard") for f in (33, 10) for o in ("KD", "plain")
    }
    assert expected <= names
    assert len(names) == 2 * (1 + 2 * 4)  # objectives x (full set, fractions x strategies)


def test_curves_with_a_hole_are_refused():
    table = curve_table()
    with pytest.raises(ValueError, match="not all evaluated at the same steps"):
        learning_curves(axis(), table.drop(index=table.index[7]))


def test_probe_curves_label_every_line_and_both_references():
    table = probe_table()
    ax = probe_curves(axis(), table, probe="knn")
    levels = {round(line.get_ydata()[0], 3) for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert {48.5, 5.0} <= levels  # teacher 0.97 / 2, untrained 0.1 / 2
    assert {"teacher", "untrained", "full set", "random", "ambiguous (corner)"} <= set(words(ax))
    assert "k-NN probe, KD, subsets of 33 % of the data\nmean ± s.d., S = 5" in words(ax)
    with pytest.raises(ValueError, match="no rows of probe 'lineal'; did you mean 'linear'"):
        probe_curves(axis(), table, probe="lineal")


def test_probe_curves_draw_the_data_and_layer_they_are_asked_for():
    own = probe_table()
    rows = own[own["probe"] == "linear"]
    shots = rows.assign(probe="few_shot_5", accuracy=0.3)
    elsewhere = rows.assign(on="mnist", accuracy=0.6)
    stage = rows[rows["strategy"] != "teacher"].assign(layer="stage1", accuracy=0.2)
    table = pd.concat([own, shots, elsewhere, stage], ignore_index=True)
    same = probe_curves(axis(), table), probe_curves(axis(), own)
    heights = [[list(line.get_ydata()) for line in ax.lines] for ax in same]
    assert heights[0] == heights[1]
    for asked, level, title in (
        ({"on": "mnist"}, 60, "linear probe, KD, subsets of 33 % of the data, on mnist"),
        ({"layer": "stage1"}, 20, "linear probe, KD, subsets of 33 % of the data, stage1"),
        ({"probe": "few_shot_5"}, 30, "5-shot probe, KD, subsets of 33 % of the data"),
    ):
        ax = probe_curves(axis(), table, **asked)
        curves = [line for line in ax.lines if len(line.get_ydata()) == 4]
        assert curves
        assert all(np.allclose(line.get_ydata(), level) for line in curves)
        assert title_of(ax).startswith(title)
        assert "teacher" in words(ax)
    for asked, hint in (({"on": "mnst"}, "did you mean 'mnist'"), ({"layer": "stage2"}, "stage1")):
        with pytest.raises(ValueError, match=hint):
            probe_curves(axis(), table, **asked)


def test_places_have_a_panel_for_each_data_set_and_a_marker_for_each_layer():
    fig, own = probe_places(Figure(), places_table()), places_table()
    own = own[(own["on"] == "own") & (own["layer"] == "features")]
    here, there = fig.axes
    assert [title_of(ax) for ax in fig.axes] == ["own data", "on mnist"]
    names = [label.get_text() for label in here.get_yticklabels()]
    assert (names[0], names[-1]) == ("untrained", "teacher")
    assert names[1:-1] == ["full set", "random", "easy", "ambiguous (corner)", "hard"]
    means = {
        (names[round(line.get_ydata()[0])], line.get_marker()): line.get_xdata()[0]
        for line in here.lines
        if line.get_markersize() == 4.5
    }
    last = own[own["step"] == 300].groupby("strategy")["accuracy"].mean()
    assert means["random", "o"] == pytest.approx(100 * last["random"])
    assert means["random", "s"] == pytest.approx(20)
    assert means["teacher", "o"] == pytest.approx(97)
    assert means["untrained", "o"] == pytest.approx(10)
    assert ("teacher", "s") not in means
    assert {line.get_xdata()[0] for line in there.lines if len(line.get_xdata())} == {60}
    (legend,) = fig.legends
    assert {"last layer", "stage1"} <= {text.get_text() for text in legend.get_texts()}
    with pytest.raises(ValueError, match="no rows"):
        probe_places(Figure(), places_table(), probe="knn")


def test_diagnostics_have_a_panel_each_in_which_cells_differ_with_the_level_of_theory():
    table = diagnostics_table()
    fig = diagnostics(Figure(), table)
    known = {name: (label, bound) for name, label, _, bound in DIAGNOSTICS}
    drawn = {"effective_rank": 15.0, "cka_teacher": 1.0}  # in the others all curves are one
    assert [title_of(ax) for ax in fig.axes] == [
        "{}\n(dotted: {})".format(*known[name]) for name in drawn
    ]
    for ax, (name, theory) in zip(fig.axes, drawn.items(), strict=True):
        flat = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 2]
        assert [list(y) for y in flat] == [pytest.approx([theory, theory])]
        curves = {x.get_label(): x.get_ydata()[0] for x in ax.lines if len(x.get_ydata()) == 4}
        assert len(curves) == table["strategy"].nunique() - 2  # and the references
        for strategy, height in (("full", "full set"), ("easy", "easy")):
            rows = table[table["strategy"] == strategy]
            assert curves[height] == pytest.approx(rows[name].iloc[0])
    (legend,) = fig.legends
    assert {"full set", "random"} <= {text.get_text() for text in legend.get_texts()}
    assert legend.get_title().get_text() == "KD, subsets of 33 % of the data; mean ± s.d., S = 5"
    same = table.assign(effective_rank=7.5, rank_ratio=0.5, cka_teacher=0.4)
    assert not diagnostics(Figure(), same).axes
    with pytest.raises(ValueError, match=r"lacks the columns \['alignment'\]"):
        diagnostics(Figure(), table.drop(columns="alignment"))
    with pytest.raises(ValueError, match="no rows"):
        diagnostics(Figure(), table[table["strategy"] == "teacher"])


def test_curves_are_apart_where_their_means_differ_by_more_than_their_spread_and_can_be_seen():
    table = curve_table()
    assert apart(table, "validation_accuracy")
    two = table[table["strategy"].isin(["random", "ambiguous_corner"])]  # 0.90 and 0.899
    assert not apart(two, "validation_accuracy")
    # One seed has no spread: whatever can be seen is apart, 0.01 of 0.8 cannot.
    one = two[two["seed"] == 0]
    shifted = one["strategy"] == "random"
    for shift, seen in ((0.01, False), (0.2, True)):
        moved = one.assign(
            validation_accuracy=0.1 + one["step"] / 375 + np.where(shifted, shift, 0.0)
        )
        assert apart(moved, "validation_accuracy") == seen
    # 0.1 at one step of 16 is an accident
    late = one.assign(
        validation_accuracy=np.where(shifted & (one["step"] == 300), 0.9, one["step"] / 375)
    )
    assert not apart(late, "validation_accuracy")


def test_differences_of_curves_are_those_of_paired_seeds():
    # Both seeds are 2 points above random; their accuracies lie 20 apart.
    runs = cells(objectives=("kd",), fractions=(0.33,), n_seeds=2)
    runs = runs[runs["strategy"].isin(["random", "easy", "full"])]
    above = runs["strategy"].map({"random": 0.0, "easy": 0.02, "full": 0.04})
    curves = pd.concat(
        [runs.assign(step=s, validation_accuracy=0.5 + 0.2 * runs["seed"] + above) for s in (1, 2)]
    )
    ax = difference_curves(axis(), curves, "validation_accuracy", "strategy", "random")
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_allclose(lines["easy"], [[1, 2], [2, 2]])
    np.testing.assert_allclose(lines["full set"], [[1, 4], [2, 4]])
    assert "random" not in lines
    heights = [band.get_paths()[0].vertices[:, 1] for band in ax.collections]
    assert all(np.ptp(h) == pytest.approx(0) for h in heights)  # no spread of the pairs
    assert ax.get_ylabel() == "validation accuracy, minus random\n(points)"
    assert title_of(ax) == ("KD, subsets of 33 % of the data\nseed by seed; mean ± s.d., S = 2")
    with pytest.raises(ValueError, match="no curve of the baseline 'hard'"):
        difference_curves(axis(), curves, "validation_accuracy", "strategy", "hard")


def test_few_probes_are_dots_of_the_last_step_between_untrained_and_teacher():
    table = probe_table()
    fig = probe_levels(Figure(), table)
    assert [title_of(ax) for ax in fig.axes] == ["linear probe", "k-NN probe"]
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert names == [
        "untrained", "full set", "random", "easy", "ambiguous (corner)", "hard", "teacher"
    ]  # fmt: skip
    last = table[(table["step"] == 300) & (table["strategy"] == "hard")]
    for ax, probe in zip(fig.axes, ("linear", "knn"), strict=True):
        means = [x.get_xdata()[0] for x in ax.lines if x.get_markersize() == 4.5]
        assert means[5] == pytest.approx(100 * last[last["probe"] == probe]["accuracy"].mean())
    (legend,) = fig.legends
    assert "KD, subsets of 33 % of the data" in {text.get_text() for text in legend.get_texts()}


def test_each_untrained_student_has_a_level_of_its_own():
    ax = probe_curves(axis(), probe_table(students=("tiny", "wide")))
    assert {"untrained, tiny", "untrained, wide", "teacher", "easy, wide"} <= set(words(ax))


def test_labels_at_the_lines_do_not_overlap():
    with theme.style():
        fig = learning_curves_figure()
        fig.draw_without_rendering()
        boxes = sorted(
            (text.get_window_extent() for text in fig.axes[0].texts), key=lambda box: box.y0
        )
    assert len(boxes) == len(ACCURACY)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


def test_the_way_from_a_short_line_to_its_label_is_level_and_dotted():
    table = curve_table()
    short = table[(table["strategy"] != "easy") | (table["step"] <= 100)]
    ax = learning_curves(axis(), short)
    dotted = [x for x in ax.lines if not x.get_label().startswith(("easy", "full")) and
              x.get_linestyle() == "--" and x.get_transform() == ax.transAxes]  # fmt: skip
    (leader,) = dotted
    (start, end), (low, high) = leader.get_xdata(), leader.get_ydata()
    assert (start, end) == (pytest.approx(1 / 3), 1.0)
    assert low == high


def test_losses_have_a_panel_for_each_objective_and_term_in_which_cells_differ():
    curves = curve_table(objectives=("kd", "plain"))
    with_teacher, easy = curves["objective"] == "kd", curves["strategy"] == "easy"
    curves = curves.assign(
        train_loss=np.where(easy, 2.0, 2.5), validation_loss=np.where(easy, 1.0, 3.0),
        train_loss_kd=np.where(with_teacher, np.where(easy, 3.0, 4.0), np.nan),
        train_loss_cross_entropy=1.0,
    )  # fmt: skip
    fig = losses(Figure(), curves)
    heights = {title_of(ax): {y for line in ax.lines for y in line.get_ydata()} for ax in fig.axes}
    assert heights == {
        "KD: training loss": {2.0, 2.5}, "KD: training, KD term": {3.0, 4.0},
        "KD: validation loss": {1.0, 3.0}, "plain: training loss": {2.0, 2.5},
        "plain: validation loss": {1.0, 3.0},
    }  # fmt: skip
    assert {len(ax.lines) for ax in fig.axes} == {5}
    one = curves[with_teacher].assign(train_loss_kd=np.nan)
    fig = losses(Figure(), one)
    assert [title_of(ax) for ax in fig.axes] == ["training loss", "validation loss"]
    assert not losses(Figure(), one.assign(train_loss=1.0, validation_loss=1.0)).axes


def test_a_loss_that_falls_far_has_a_logarithmic_axis():
    curves = curve_table()
    fall = np.exp(-curves["step"] / 50) * np.where(curves["strategy"] == "easy", 2.0, 1.0)
    fig = losses(Figure(), curves.assign(train_loss=fall, validation_loss=1 + fall))
    assert [ax.get_yscale() for ax in fig.axes] == ["log", "linear"]
    fig.draw_without_rendering()
    assert not any("$" in text for text in words(fig))  # mathematics is off
