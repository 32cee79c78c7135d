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
from kdlib.plots.curves import (
    DIAGNOSTICS,
    diagnostics,
    learning_curves,
    losses,
    probe_curves,
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
    assert "KD, 33 % of the data; mean ± s.d., S = 2" in words(ax)


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
    assert "k-NN probe, KD, 33 % of the data; mean ± s.d., S = 5" in words(ax)
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
        ({"on": "mnist"}, 60, "on mnist\nlinear probe, KD, 33 % of the data"),
        ({"layer": "stage1"}, 20, "linear probe, KD, 33 % of the data, stage1"),
        ({"probe": "few_shot_5"}, 30, "5-shot probe, KD, 33 % of the data"),
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
    assert means["random", "D"] == pytest.approx(20)
    assert means["teacher", "o"] == pytest.approx(97)
    assert means["untrained", "o"] == pytest.approx(10)
    assert ("teacher", "D") not in means
    assert {line.get_xdata()[0] for line in there.lines if len(line.get_xdata())} == {60}
    (legend,) = fig.legends
    assert {"last layer", "stage1"} <= {text.get_text() for text in legend.get_texts()}
    with pytest.raises(ValueError, match="no rows"):
        probe_places(Figure(), places_table(), probe="knn")


def test_diagnostics_have_a_panel_each_with_the_level_of_theory():
    fig = diagnostics(Figure(), diagnostics_table())
    assert len(fig.axes) == 6
    for ax, (name, label, level, bound) in zip(fig.axes, DIAGNOSTICS, strict=True):
        theory = {"effective_rank": 15, "unit_variance": 1 / 16, "uniformity": -3.6}.get(
            name, level
        )
        flat = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 2]
        assert [list(y) for y in flat] == [pytest.approx([theory, theory])]
        curves = [line for line in ax.lines if len(line.get_ydata()) == 4]
        assert len(curves) == diagnostics_table()["strategy"].nunique() - 2  # and the references
        assert all(line.get_ydata()[0] == diagnostics_table()[name].iloc[0] for line in curves)
        assert title_of(ax) == f"{label}\n(dotted: {bound})"
    (legend,) = fig.legends
    assert {"full set", "random"} <= {text.get_text() for text in legend.get_texts()}
    assert legend.get_title().get_text() == "KD, 33 % of the data; mean ± s.d., S = 5"
    table = diagnostics_table()
    with pytest.raises(ValueError, match=r"lacks the columns \['alignment'\]"):
        diagnostics(Figure(), table.drop(columns="alignment"))
    with pytest.raises(ValueError, match="no rows"):
        diagnostics(Figure(), table[table["strategy"] == "teacher"])


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


def test_losses_have_a_panel_for_each_term_and_draw_it_where_it_is():
    curves = curve_table(objectives=("kd", "plain"))
    with_teacher = curves["objective"] == "kd"
    curves = curves.assign(
        train_loss=2.0, validation_loss=1.0, train_loss_kd=np.where(with_teacher, 3.0, np.nan)
    )
    fig = losses(Figure(), curves)
    heights = {title_of(ax): {y for line in ax.lines for y in line.get_ydata()} for ax in fig.axes}
    assert heights == {
        "training loss": {2.0}, "validation loss": {1.0}, "KD, training": {3.0},
    }  # fmt: skip
    n_lines = [len(ax.lines) for ax in fig.axes]
    assert n_lines[0] == n_lines[1] == 2 * n_lines[2]
    fig = losses(Figure(), curves.assign(train_loss_kd=np.nan))
    assert [title_of(ax) for ax in fig.axes] == ["training loss", "validation loss"]
