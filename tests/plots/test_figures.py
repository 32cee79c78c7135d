"""Every figure is legible, fits its page, and is the same file for the same tables."""

from itertools import pairwise

import pandas as pd
import pytest
from matplotlib.figure import Figure
from plots.example_tables import (
    MARGIN,
    axis,
    check_legible,
    check_same_files,
    compared,
    curve_table,
    diagnostics_table,
    grid_input,
    places_table,
    probe_table,
    result_table,
)

from kdlib.plots import theme
from kdlib.plots.accuracy import accuracy_by_fraction, accuracy_by_strategy
from kdlib.plots.curves import learning_curves, losses
from kdlib.plots.differences import forest_plot_by_student
from kdlib.plots.images import region_grid
from kdlib.plots.layout import TALL
from kdlib.plots.probes import diagnostics, probe_curves, probe_levels, probe_places
from kdlib.study.evaluation import AXES

FIGURES = (
    "accuracy", "differences", "curves", "losses", "probes", "probe_levels", "diagnostics",
    "places", "regions",
)  # fmt: skip


def draw(name):
    """Each figure as the lab draws it, at its print size."""
    with theme.style():
        heights = {"accuracy": 4.4, "differences": 5.0, "regions": 3.2}
        fig = Figure(figsize=(theme.WIDE, heights.get(name, 3.4)))
        if name == "accuracy":
            accuracy_by_strategy(fig, result_table(), compared(result_table()))
        elif name == "differences":
            forest_plot_by_student(fig, compared(result_table()), margin=MARGIN)
        elif name == "curves":
            learning_curves(fig.subplots(), curve_table())
        elif name == "losses":
            rise = curve_table(objectives=("kd", "plain"))
            loss = 1 - rise["validation_accuracy"]
            losses(fig, rise.assign(train_loss=loss, validation_loss=2 * loss))
        elif name == "probe_levels":
            probe_levels(fig, probe_table())
        elif name == "diagnostics":
            diagnostics(fig, diagnostics_table())
        elif name == "places":
            probe_places(fig, places_table())
        elif name == "probes":
            for ax, kind in zip(fig.subplots(1, 2), ("linear", "knn"), strict=True):
                probe_curves(ax, probe_table(), probe=kind)
        else:
            region_grid(fig, *grid_input())
    return fig


@pytest.mark.parametrize("name", FIGURES)
def test_all_text_is_legible_and_inside_the_figure(name):
    check_legible(draw(name))


@pytest.mark.parametrize("name", ["accuracy", "curves", "regions"])
def test_the_same_tables_give_the_same_bytes(name, tmp_path):
    check_same_files(draw(name), draw(name), tmp_path)


def test_a_legend_of_many_names_is_wrapped_and_stays_inside_the_figure():
    names = {"random": "easy_bottom_of_all_(refused)", "easy": "most_ambiguous_(refused)"}
    table = diagnostics_table()
    table["strategy"] = table["strategy"].replace(names)
    many = pd.concat([table, table.assign(objective="features")], ignore_index=True)
    objectives = ("kd", "a_smaller_teacher", "a_teacher_of_the_subset")
    results = result_table(objectives=objectives)
    with theme.style():
        figures = [Figure(figsize=(theme.WIDE, 4.4)) for _ in range(2)]
        diagnostics(figures[0], many)
        accuracy_by_strategy(figures[1], results, compared(results))
        for fig in figures:
            fig.draw_without_rendering()
            extent = fig.get_tightbbox()
            assert extent.x0 >= 0
            assert extent.x1 <= fig.get_figwidth()


@pytest.mark.parametrize("kind", ["accuracy", "differences", "fractions"])
def test_large_studies_stay_legible_and_inside_a_page(kind):
    students = ("resnet8", "mobilenetv2")
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 3.0))
        if kind == "fractions":
            fractions = (0.01, 0.05, 0.1, 0.25, 0.33, 0.55)
            accuracy_by_fraction(fig, result_table(students=students, fractions=fractions))
        else:
            parts = [
                result_table(students=students, fractions=(0.33,)).assign(
                    strategy=lambda t, i=i: t["strategy"].where(
                        t["strategy"].isin(["random", "full"]), t["strategy"] + f"_{i}_bottom"
                    )
                )
                for i in range(4)
            ]
            results = pd.concat(parts).drop_duplicates([*AXES, "seed"])
            assert results["strategy"].nunique() == 14
            if kind == "accuracy":
                accuracy_by_strategy(fig, results, compared(results))
            else:
                forest_plot_by_student(fig, compared(results), MARGIN)
        fig.draw_without_rendering()
        extent = fig.get_tightbbox()
        rows = [label.get_window_extent() for label in fig.axes[0].get_yticklabels()]
    assert fig.get_figheight() <= TALL
    assert min(extent.x0, extent.y0) >= -0.01
    assert extent.x1 <= fig.get_figwidth() + 0.01
    assert extent.y1 <= fig.get_figheight() + 0.01
    tops = sorted((box.y0, box.y1) for box in rows if box.height)
    assert all(low[1] <= high[0] + 1 for low, high in pairwise(tops))
    (below,) = [a for a in [fig.axes[0].get_xlabel() or fig.get_supxlabel()] if a]
    assert "accuracy" in below or "fraction" in below


def test_missing_columns_and_empty_tables_are_refused_by_name():
    with pytest.raises(ValueError, match="the table `curves` has no rows"):
        learning_curves(axis(), curve_table().iloc[:0])
    with pytest.raises(ValueError, match=r"lacks the columns \['test_accuracy'\]"):
        accuracy_by_strategy(
            Figure(), result_table().drop(columns="test_accuracy"), compared(result_table())
        )
