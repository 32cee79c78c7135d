"""Figures of paired differences, with their verdicts.

A function takes a comparison and an axis or an empty figure, draws, and returns it. Differences are
drawn in percentage points.
"""

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from kdlib.plots import layout, theme
from kdlib.study.evaluation import AXES, named_place

VERDICTS = {"better": "^", "worse": "v", "equivalent": "s", "inconclusive": "o"}  # markers, black

ACCURACIES = {  # column of results -> what it is called on an axis
    "test_accuracy": "test accuracy at the last step",
    "linear_accuracy": "linear probe's test accuracy",
    "knn_accuracy": "k-NN probe's test accuracy",
}


def accuracy_label(column: str) -> str:
    """What a column of accuracies is called on an axis.

    >>> accuracy_label("knn_accuracy_on_mnist")
    "k-NN probe's test accuracy on mnist"
    """
    base, on = named_place(column)
    return ACCURACIES[base] + (f" on {theme.in_words(on)}" if on else "")


def crossed(comparison: pd.DataFrame) -> pd.Series:
    """Which rows compare cells of different sizes, the full set aside: pairs that a study names."""
    across = comparison["against_fraction"] != comparison["fraction"]
    return across & (comparison["strategy"] != "full") & (comparison["against_strategy"] != "full")


def forest_plot_by_student(fig: Figure, comparison: pd.DataFrame, margin: float) -> Figure:
    """`forest_plot`, a panel for each student, with names and legend once.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        comparison, margin: As for `forest_plot`.

    Returns: `fig`.
    """
    theme.demand(comparison, (*AXES, "verdict"), "comparison")
    students = list(dict.fromkeys(comparison["student"]))
    rows = comparison.groupby("student").size().max()
    groups = comparison["strategy"].nunique()
    fig.set_figheight(min(1.15 + 0.125 * rows + 0.075 * groups, layout.TALL))
    axs = fig.subplots(1, len(students), squeeze=False)[0]
    for i, (ax, student) in enumerate(zip(axs, students, strict=True)):
        of_student = comparison[comparison["student"] == student]
        forest_plot(ax, of_student, margin, named=i == 0)
        if len(students) > 1:
            ax.set_title(theme.in_words(student))
    fig.supxlabel(axs[0].get_xlabel(), fontsize=theme.RC["axes.labelsize"])
    for ax in axs:
        ax.set_xlabel("")
    colours = _row_colours(comparison)
    objectives = [
        layout.mark(theme.in_words(name), color=colour, ls="-", lw=2.2)
        for name, colour in colours.items()
        if len(colours) > 1 and colour != theme.BLACK
    ]
    intervals = _interval_handles(margin, comparison["level"].iloc[0])
    layout.legend_in_rows(
        fig, verdict_handles(None), [*intervals, *objectives], loc="outside upper center"
    )
    return fig


def _row_colours(comparison: pd.DataFrame) -> dict[str, str]:
    """Colour of the rows of each objective: its own where strategies are compared, black of many
    objectives and where objectives are compared."""
    names = list(dict.fromkeys(comparison["objective"]))
    of_objectives = (comparison["against_objective"] != comparison["objective"]).any()
    if of_objectives or len(names) > theme.MOST_OBJECTIVES:
        return dict.fromkeys(names, theme.BLACK)
    return {name: look[0] for name, look in theme.line_looks(names, "objective").items()}


def forest_plot(ax: Axes, comparison: pd.DataFrame, margin: float, named: bool = True) -> Axes:
    """Each cell minus the cell it is paired with, in percentage points: a row for each.

    The thin line is the interval at the study's level, the thick one that at 90 %, which must lie
    inside the shaded margin for the verdict `equivalent`. Shapes are verdicts; lines between
    strategies have the colour of their objective, unless there are many.

    Args:
        ax: The axis; about 0.12 in high for each row.
        comparison: From `compare.paired_differences` or `compare.objective_differences`.
        margin: Smallest difference of accuracy that matters, in (0, 1): the one of the comparison.
        named: Whether the rows are named at the left.

    Returns: `ax`, a row for each comparison, strategy by strategy. A row without a pair of seeds
        says so.
    Raises: ValueError for missing columns, an empty table, or another margin than the verdicts'.
    """
    needed = ("difference", "low", "high", "low90", "high90", "verdict", "margin", "measure")
    against = ("against_strategy", "against_fraction", "against_objective")
    theme.demand(comparison, (*AXES, *against, *needed), "comparison")
    if not np.allclose(comparison["margin"], margin):
        raise ValueError(
            f"margin is {margin:g} but the verdicts were reached with "
            f"{comparison['margin'].iloc[0]:g}; draw the margin of the comparison "
            "(params: compare.margin)"
        )
    rows = _forest_rows(comparison)
    colours = _row_colours(comparison)
    for row in rows.to_dict("records"):
        _draw_difference(ax, row, colours[row["objective"]])
    ax.axvspan(-100 * margin, 100 * margin, color="#DDDDDD", lw=0, zorder=0)
    ax.axvline(0, color=theme.BLACK, lw=0.8, zorder=1)
    labels = list(rows["label"])
    ax.set_yticks(list(rows["y"]), labels if named else [""] * len(labels))
    ax.tick_params(axis="y", length=0)
    pad = max(map(layout.text_width_pt, labels)) + 12  # strategies stand left of the row labels
    for strategy, group in rows.groupby("strategy", sort=False):
        top, bottom = group["y"].iloc[0] - 0.5, group["y"].iloc[-1] + 0.5
        if named:
            ax.annotate(
                theme.in_words(strategy), (0, (top + bottom) / 2), (-pad, 0), annotation_clip=False,
                xycoords=ax.get_yaxis_transform(), textcoords="offset points", ha="right",
                va="center",
            )  # fmt: skip
        ax.axhspan(top, bottom, color="#F5F5F5", lw=0, zorder=-1)
    ax.set_ylim(rows["y"].iloc[-1] + 0.5, -0.9)
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(_difference_label(comparison))
    return ax


def _forest_rows(comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison in the order of the plot, strategy by strategy, with `label` and height `y` of
    each row."""
    rows = comparison.assign(
        # The full set has one fraction; its rows differ in what they are compared with.
        shown=comparison["against_fraction"].where(
            comparison["strategy"] == "full", comparison["fraction"]
        ),
        order=comparison["strategy"].map(theme.sorting_key),
        crossed=crossed(comparison),
    ).sort_values(["order", "student", "shown", "objective"], ascending=[True, True, False, True])
    subsets = rows[rows["strategy"] != "full"]
    naming = [a for a in ("fraction", "objective", "student") if subsets[a].nunique() > 1]
    labels, heights, y = [], [], 0.0
    for strategy, group in rows.groupby("strategy", sort=False):
        for row in group.to_dict("records"):
            is_full = strategy == "full"
            words = [row[axis] for axis in naming if not (is_full and axis == "fraction")]
            if is_full and rows["objective"].nunique() > 1 and "objective" not in naming:
                words.append(row["objective"])
            label = ", ".join(map(theme.value_in_words, words))
            if row["crossed"] or row["against_fraction"] != row["fraction"]:
                other = (row["against_strategy"], row["against_fraction"])
                against = f"against {' '.join(map(theme.value_in_words, other))}"
                label = f"{label}, {against}" if label else against
            labels.append(label)
            heights.append(y)
            y += 1
        y += 0.6
    return rows.assign(label=labels, y=heights)


def _draw_difference(ax: Axes, row: dict[str, Any], colour: str) -> None:
    y = row["y"]
    if np.isnan(row["difference"]):
        ax.text(0, y, " no paired seeds", va="center", fontsize=theme.TEXT_PT, color=theme.GREY)
        return
    for ends, width in ((("low", "high"), 0.8), (("low90", "high90"), 2.2)):
        line = [100 * row[end] for end in ends]
        ax.plot(line, [y, y], color=colour, lw=width, solid_capstyle="butt")
    verdict_mark(ax, 100 * row["difference"], y, row["verdict"])


def _difference_label(comparison: pd.DataFrame) -> str:
    """Label of the axis: the accuracy, what is subtracted from what (strategies, or objectives on
    the same subset), and what all rows share."""
    of_strategies = (comparison["against_strategy"] != comparison["strategy"]).any()
    by = "strategy" if of_strategies else "objective"
    what = _one_of(comparison[by]) if comparison[by].nunique() < (2 if of_strategies else 3) else by
    accuracy = accuracy_label(comparison["measure"].iloc[0]).removesuffix(" at the last step")
    words = (
        f"{accuracy}, {what} minus {_one_of(comparison[f'against_{by}'])}, seed by seed (points)"
    )
    held = "" if (comparison["strategy"] == "full").all() else theme.held_axes(comparison, by)
    return f"{words}\n{held}" if held else words


def verdict_handles(baseline: str | None) -> list[Line2D]:
    heading = [] if baseline is None else [layout.mark(f"against {theme.in_words(baseline)}:")]
    marks = [
        layout.mark(name, color=theme.BLACK, marker=marker, ms=4.5, mfc=_face(name))
        for name, marker in VERDICTS.items()
    ]
    return heading + marks


def _face(verdict: str) -> str:
    """Open markers say that nothing is settled, in grey print as well."""
    return "white" if verdict == "inconclusive" else theme.BLACK


def verdict_mark(ax: Axes, x: float, y: float, verdict: str, **where: Any) -> None:
    look = {"ms": 4.5, "color": theme.BLACK, "mfc": _face(verdict), "clip_on": False, "zorder": 4}
    ax.plot(x, y, VERDICTS[verdict], **look, **where)


def _interval_handles(margin: float, level: float) -> list[Any]:
    size = "1 point" if margin == 0.01 else f"{100 * margin:g} points"
    return [
        Patch(color="#DDDDDD", lw=0, label=f"margin, ±{size}"),
        layout.mark(f"{100 * level:g} % interval", color=theme.BLACK, ls="-", lw=0.8),
        layout.mark("90 %", color=theme.BLACK, ls="-", lw=2.2),
    ]


def _one_of(names: pd.Series) -> str:
    return " or ".join(theme.in_words(name) for name in names.unique())
