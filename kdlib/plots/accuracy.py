"""Figures of accuracies: of strategies, of objectives, over fractions of the data.

A function takes tables and an empty figure, draws, and returns it. Accuracies are drawn in %.
"""

from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from kdlib.plots.differences import ACCURACIES, verdict_handles, verdict_mark
from kdlib.plots.layout import (
    PANELS,
    End,
    label_ends,
    legend_in_rows,
    mark,
    name_rows,
    panel_grid,
)
from kdlib.plots.theme import (
    BLACK,
    BLUE,
    DASHES,
    GREY,
    OBJECTIVES,
    RC,
    TEXT_PT,
    demand,
    in_words,
    line_looks,
    name_of_spread,
    of_cell,
    percent,
    sorting_key,
)
from kdlib.study.evaluation import AXES


def accuracy_by_strategy(
    fig: Figure, results: pd.DataFrame, comparison: pd.DataFrame, measure: str = "test_accuracy"
) -> Figure:
    """Accuracy of every strategy: a panel for each student and fraction.

    A small dot is one seed, a large marker the mean, a vertical line the mean of the full set; the
    sign at the right is the verdict of the paired comparison.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        results: Accepted runs: the axes of the study, `seed`, the measure in [0, 1].
        comparison: From `compare.paired_differences`, for the verdicts.
        measure: Column that is drawn.

    Returns: `fig`, one axis per student and fraction; those of one student share their x-axis.
    Raises: ValueError for missing columns, an empty table, refused rows, or more objectives than
        there are markers.
    """
    _check_by_strategy(results, comparison, measure)
    is_full = results["strategy"] == "full"
    subsets, full = results[~is_full], results[is_full]
    students = list(dict.fromkeys(results["student"]))
    fractions = sorted(set(subsets["fraction"]), reverse=True)
    strategies = sorted(set(subsets["strategy"]), key=sorting_key)
    objectives = sorted(set(results["objective"]))
    baseline = next(iter(comparison["against_strategy"]), None)
    panels = [(student, fraction) for student in students for fraction in fractions]
    n_columns = len(fractions) if 1 < len(fractions) <= PANELS else min(len(panels), PANELS)
    n_columns = 2 if len(panels) == 4 else n_columns
    row_in = len(strategies) * (0.09 + 0.1 * len(objectives)) + 0.4
    axs = panel_grid(fig, len(panels), n_columns, row_in)
    first: dict[str, Axes] = {}
    for ax, (student, fraction) in zip(axs, panels, strict=True):
        if student in first:
            ax.sharex(first[student])
        first.setdefault(student, ax)
        if baseline in strategies:
            y = strategies.index(baseline)
            ax.axhspan(y - 0.5, y + 0.5, color="#F0F0F0", lw=0, zorder=0)
        for k, objective in enumerate(objectives):
            of_full = full[(full["student"] == student) & (full["objective"] == objective)]
            if len(of_full):
                level = 100 * of_full[measure].mean()
                ax.axvline(level, color=OBJECTIVES[k][0], ls=DASHES[k], lw=1, zorder=1)
            shift = (k - (len(objectives) - 1) / 2) * 0.7 / len(objectives)
            for y, strategy in enumerate(strategies):
                cell = (student, strategy, fraction, objective)
                values = 100 * of_cell(subsets, cell)[measure]
                _draw_seeds(ax, values, y + shift, *OBJECTIVES[k], 0.25 / len(objectives))
                for verdict in of_cell(comparison, cell)["verdict"]:
                    where = {"transform": ax.get_yaxis_transform()}
                    verdict_mark(ax, 1.035, y + shift, verdict, **where)
        name_rows(ax, [in_words(name) for name in strategies], 0.5)
        title = f"{percent(fraction)} of the data"
        ax.set_title(f"{in_words(student)}, {title}" if len(students) > 1 else title)
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"{ACCURACIES[measure]} (%)")
    legend_in_rows(fig, _objective_handles(objectives, full), verdict_handles(baseline))
    return fig


def _check_by_strategy(results: pd.DataFrame, comparison: pd.DataFrame, measure: str) -> None:
    demand(results, (*AXES, "seed", measure), "results")
    demand(comparison, (*AXES, "against_strategy", "verdict"), "comparison")
    if "refused" in results and results["refused"].any():
        raise ValueError(
            f"{int(results['refused'].sum())} of {len(results)} rows are refused; draw accepted "
            "rows only: results[~results['refused']]"
        )
    if (results["strategy"] == "full").all():
        raise ValueError("the results hold the full set alone; expected runs on subsets to compare")
    objectives = sorted(set(results["objective"]))
    if len(objectives) > len(OBJECTIVES):
        raise ValueError(
            f"{len(objectives)} objectives ({', '.join(objectives)}); expected at most "
            f"{len(OBJECTIVES)}: draw some of them"
        )


def _draw_seeds(
    ax: Axes, values: pd.Series, row: float, colour: str, marker: str, below: float
) -> None:
    """A small dot for each seed, and above the dots a large marker for the mean."""
    ax.plot(values, [row + below] * len(values), "o", ms=2.6, color=colour, alpha=0.6, mew=0)
    if len(values):
        ax.plot(values.mean(), row, marker, ms=5.5, color=colour, mec="white", mew=0.7, zorder=4)


def _objective_handles(objectives: Sequence[str], full: pd.DataFrame) -> list[Line2D]:
    handles = []
    for (colour, marker), dash, name in zip(OBJECTIVES, DASHES, objectives, strict=False):
        mean = mark(f"{in_words(name)}: mean", color=colour, marker=marker, ms=5.5, mew=0)
        handles.append(mean)
        if name in set(full["objective"]):
            handles.append(mark(f"{in_words(name)}: full set", color=colour, ls=dash, lw=1))
    return [*handles, mark("one seed", color=GREY, marker="o", ms=2.6, mew=0)]


def accuracy_by_objective(
    fig: Figure, results: pd.DataFrame, objectives: Sequence[str], measure: str = "test_accuracy"
) -> Figure:
    """Accuracy of every objective, a panel for each student and subset: for studies of many
    objectives.

    A small dot is one seed, a large marker the mean; the vertical line is the mean of the first
    objective.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        results: Accepted runs: the axes of the study, `seed`, the measure in [0, 1].
        objectives: From top to bottom.
        measure: Column that is drawn.

    Returns: `fig`, one axis per student, strategy and fraction.
    Raises: ValueError for missing columns or an empty table.
    """
    demand(results, (*AXES, "seed", measure), "results")
    several = results["student"].nunique() > 1
    columns = (results["student"], results["strategy"], results["fraction"])
    subsets = list(dict.fromkeys(zip(*columns, strict=True)))
    n_columns = min(len(subsets), PANELS)
    axs = panel_grid(fig, len(subsets), n_columns, 0.21 * len(objectives) + 0.4)
    for ax, (student, strategy, fraction) in zip(axs, subsets, strict=True):
        chosen = results[
            (results["student"] == student)
            & (results["strategy"] == strategy)
            & (results["fraction"] == fraction)
        ]
        for y, objective in enumerate(objectives):
            values = 100 * chosen[chosen["objective"] == objective][measure]
            _draw_seeds(ax, values, y, BLUE, "o", 0.25)
            if y == 0 and len(values):
                ax.axvline(values.mean(), color=GREY, lw=1, ls=DASHES[1], zorder=1)
        name_rows(ax, [in_words(name) for name in objectives], 0.6)
        title = in_words(strategy)
        title += "" if strategy == "full" else f", {percent(fraction)} of the data"
        ax.set_title(f"{in_words(student)}, {title}" if several else title)
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"{ACCURACIES[measure]} (%)")
    n_seeds = results["seed"].nunique()
    marks = [
        mark(f"mean of {n_seeds} seeds", color=BLUE, marker="o", ms=5.5, mew=0),
        mark("one seed", color=BLUE, marker="o", ms=2.6, mew=0),
        mark(f"{in_words(objectives[0])}: mean", color=GREY, ls=DASHES[1], lw=1),
    ]
    legend_in_rows(fig, marks)
    return fig


def accuracy_by_fraction(
    fig: Figure, results: pd.DataFrame, measure: str = "test_accuracy"
) -> Figure:
    """Accuracy over the fraction of the data, on a logarithmic axis: mean and standard deviation
    over seeds.

    With one strategy a panel for each student and a line for each objective, which ends at the full
    set; with several a panel for each student and objective, a line for each strategy, and a level
    for the full set.

    Args:
        fig: An empty figure; its height is set to what the panels need.
        results: Accepted runs: the axes of the study, `seed`, the measure in [0, 1].
        measure: Column that is drawn.

    Returns: `fig`.
    Raises: ValueError for missing columns or an empty table.
    """
    demand(results, (*AXES, "seed", measure), "results")
    strategies = sorted(set(results["strategy"]) - {"full"}, key=sorting_key)
    objectives = list(dict.fromkeys(results["objective"]))
    students = list(dict.fromkeys(results["student"]))
    by = "strategy" if len(strategies) > 1 else "objective"
    if by == "strategy":
        panels, names = [(s, [o]) for s in students for o in objectives], strategies
    else:
        panels, names = [(s, objectives) for s in students], objectives
    looks = _fraction_looks(names, by)
    row_in = max(2.6, 0.5 + 0.14 * len(names))
    axs = panel_grid(fig, len(panels), min(len(panels), 2), row_in, sharey=False)
    is_full = results["strategy"] == "full"
    ticks = sorted(set(results[~is_full if by == "strategy" else slice(None)]["fraction"]))
    for ax, (student, shown) in zip(axs, panels, strict=True):
        rows = results[(results["student"] == student) & results["objective"].isin(shown)]
        ends = _draw_over_fractions(ax, rows, measure, strategies, shown, by, looks)
        _fraction_axis(ax, ticks)
        title = [in_words(student)] if len(students) > 1 else []
        title += [in_words(strategies[0])] if by == "objective" else []
        title += [in_words(shown[0])] if by == "strategy" and len(objectives) > 1 else []
        ax.set_title(f"{', '.join(title)}; {name_of_spread(rows)}", fontsize=TEXT_PT)
        label_ends(ax, ends)
    fig.supxlabel("fraction of the data (%)", fontsize=RC["axes.labelsize"])
    fig.supylabel(f"{ACCURACIES[measure]} (%)", fontsize=RC["axes.labelsize"])
    return fig


def _fraction_looks(names: Sequence[str], by: str) -> dict[str, tuple[str, Any, str]]:
    """Colour, dash and marker of each line."""
    if by == "objective" and len(names) <= len(OBJECTIVES):
        pairs = zip(names, OBJECTIVES, DASHES, strict=False)
        return {name: (colour, dash, marker) for name, (colour, marker), dash in pairs}
    looks = line_looks(names)
    return {name: (*looks[name], "o") for name in names}


def _draw_over_fractions(
    ax: Axes,
    results: pd.DataFrame,
    measure: str,
    strategies: Sequence[str],
    objectives: Sequence[str],
    by: str,
    looks: dict[str, tuple[str, Any, str]],
) -> list[End]:
    """The lines of one panel; returns where they end."""
    ends: list[End] = []
    for strategy, objective in ((s, o) for o in objectives for s in strategies):
        wanted = [strategy] if by == "strategy" else [strategy, "full"]
        rows = results[results["strategy"].isin(wanted) & (results["objective"] == objective)]
        if rows.empty:
            continue
        values = 100 * rows.groupby("fraction")[measure].agg(["mean", "std"])
        name = strategy if by == "strategy" else objective
        (colour, dash, marker), label = looks[name], in_words(name)
        ax.errorbar(
            values.index, values["mean"], values["std"].fillna(0), color=colour, ls=dash,
            marker=marker, ms=4, capsize=2, elinewidth=0.8, label=label, clip_on=False,
        )  # fmt: skip
        ends.append((float(values["mean"].iloc[-1]), label, colour, None))
    full = results[results["strategy"] == "full"]
    if by == "strategy" and len(full):
        level = 100 * full[measure].mean()
        ax.axhline(level, color=BLACK, lw=1)
        ends.append((level, in_words("full"), BLACK, None))
    return ends


def _fraction_axis(ax: Axes, ticks: Sequence[float]) -> None:
    ax.set_xscale("log")
    ax.set_xlim(0.9 * ticks[0], ticks[-1])
    ax.set_xticks(_apart(ticks), [f"{100 * t:.4g}" for t in _apart(ticks)], minor=False)
    ax.xaxis.set_minor_locator(NullLocator())
    ax.grid(color="#DDDDDD", lw=0.5)
    ax.set_axisbelow(True)


def _apart(ticks: Sequence[float]) -> list[float]:
    """Of ascending ticks on a logarithmic axis those whose labels have room, the last one always.

    >>> _apart([0.1, 0.3, 0.33, 1.0])
    [0.1, 0.33, 1.0]
    """
    kept = [ticks[-1]]
    for tick in reversed(ticks[:-1]):
        if kept[-1] / tick >= 1.3:
            kept.append(tick)
    return kept[::-1]
