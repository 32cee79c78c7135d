"""Figures of accuracies: of strategies, of objectives, over fractions of the data.

A function takes tables and an empty figure, draws, and returns it. Accuracies are drawn in %.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from kdlib.plots import layout, theme
from kdlib.plots.differences import accuracy_label, crossed, verdict_handles, verdict_mark
from kdlib.study.evaluation import AXES

NEUTRAL = "#404040"  # where the rows are named


def accuracy_by_strategy(
    fig: Figure, results: pd.DataFrame, comparison: pd.DataFrame, measure: str = "test_accuracy"
) -> Figure:
    """Accuracy of every strategy: a panel for each student and fraction.

    A small dot is one seed, a large marker the mean, a vertical line the mean of the full set; the
    sign at the right is the verdict of the paired comparison.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        results: Accepted runs: the axes of the study (at most `theme.MOST_OBJECTIVES`
            objectives), `seed`, the measure in [0, 1].
        comparison: From `compare.paired_differences`, for the verdicts.
        measure: Column that is drawn.

    Returns: `fig`, one axis per student and fraction; those of one student share their x-axis.
    Raises: ValueError for missing columns, an empty table, or refused rows.
    """
    theme.demand(results, (*AXES, "seed", measure), "results")
    needed = (*AXES, "against_strategy", "against_fraction", "verdict")
    theme.demand(comparison, needed, "comparison")
    objectives = sorted(set(results["objective"]))
    looks = theme.line_looks(objectives, "objective")
    is_full = results["strategy"] == "full"
    subsets, full = results[~is_full], results[is_full]
    students = list(dict.fromkeys(results["student"]))
    fractions = sorted(set(subsets["fraction"]), reverse=True)
    strategies = sorted(set(subsets["strategy"]), key=theme.sorting_key)
    baseline = next(iter(comparison["against_strategy"]), None)
    compared = comparison[~crossed(comparison)]
    panels = [(student, fraction) for student in students for fraction in fractions]
    most = len(fractions) if 1 < len(fractions) <= layout.PANELS else layout.PANELS
    most = 2 if len(panels) == 4 else most
    xlabel = f"{accuracy_label(measure)} (%)"
    row_in = len(strategies) * (0.09 + 0.1 * len(objectives)) + 0.4
    axs = layout.panel_grid(fig, len(panels), row_in, most, xlabel=xlabel)
    first: dict[str, Axes] = {}
    for ax, (student, fraction) in zip(axs, panels, strict=True):
        if student in first:
            ax.sharex(first[student])
        first.setdefault(student, ax)
        if baseline in strategies:
            y = strategies.index(baseline)
            ax.axhspan(y - 0.5, y + 0.5, color="#F0F0F0", lw=0, zorder=0)
        for k, (objective, (colour, dash, marker)) in enumerate(looks.items()):
            of_full = full[(full["student"] == student) & (full["objective"] == objective)]
            if len(of_full):
                level = 100 * of_full[measure].mean()
                ax.axvline(level, color=colour, ls=dash, lw=1, zorder=1)
            shift = (k - (len(objectives) - 1) / 2) * 0.7 / len(objectives)
            for y, strategy in enumerate(strategies):
                cell = (student, strategy, fraction, objective)
                values = 100 * theme.of_cell(subsets, cell)[measure]
                _draw_seeds(ax, values, y + shift, colour, marker, 0.25 / len(objectives))
                for verdict in theme.of_cell(compared, cell)["verdict"]:
                    where = {"transform": ax.get_yaxis_transform()}
                    verdict_mark(ax, 1.035, y + shift, verdict, **where)
        layout.name_rows(ax, [theme.in_words(name) for name in strategies], 0.5)
        title = theme.of_the_data(fraction)
        ax.set_title(f"{theme.in_words(student)}, {title}" if len(students) > 1 else title)
    layout.legend_in_rows(fig, _objective_handles(objectives, full), verdict_handles(baseline))
    return fig


def _draw_seeds(
    ax: Axes, values: pd.Series, row: float, colour: str, marker: str, below: float
) -> None:
    """A small dot for each seed, and above the dots a large marker for the mean."""
    ax.plot(values, [row + below] * len(values), "o", ms=2.6, color=colour, alpha=0.6, mew=0)
    if len(values):
        ax.plot(values.mean(), row, marker, ms=5.5, color=colour, mec="white", mew=0.7, zorder=4)


def _objective_handles(objectives: Sequence[str], full: pd.DataFrame) -> list[Line2D]:
    handles = []
    for name, (colour, dash, marker) in theme.line_looks(objectives, "objective").items():
        mean = layout.mark(
            f"{theme.in_words(name)}: mean", color=colour, marker=marker, ms=5.5, mew=0
        )
        handles.append(mean)
        if name in set(full["objective"]):
            handles.append(
                layout.mark(f"{theme.in_words(name)}: full set", color=colour, ls=dash, lw=1)
            )
    return [*handles, layout.mark("one seed", color=theme.GREY, marker="o", ms=2.6, mew=0)]


def accuracy_by_objective(
    fig: Figure, results: pd.DataFrame, objectives: Sequence[str], measure: str = "test_accuracy"
) -> Figure:
    """Accuracy of every objective, a panel for each student and subset: for studies of many
    objectives.

    A small dot is one seed, a large marker the mean; the vertical line is the mean of the first
    objective.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        results, measure: As for `accuracy_by_strategy`.
        objectives: From top to bottom.

    Returns: `fig`, one axis per student, strategy and fraction.
    Raises: ValueError for missing columns or an empty table.
    """
    theme.demand(results, (*AXES, "seed", measure), "results")
    several = results["student"].nunique() > 1
    subsets = list(results.groupby(list(AXES[:3]), sort=False).groups)
    row_in, xlabel = 0.21 * len(objectives) + 0.4, f"{accuracy_label(measure)} (%)"
    axs = layout.panel_grid(fig, len(subsets), row_in, xlabel=xlabel)
    for ax, (student, strategy, fraction) in zip(axs, subsets, strict=True):
        for y, objective in enumerate(objectives):
            cell = (student, strategy, fraction, objective)
            values = 100 * theme.of_cell(results, cell)[measure]
            _draw_seeds(ax, values, y, NEUTRAL, "o", 0.25)
            if y == 0 and len(values):
                ax.axvline(values.mean(), color=theme.GREY, lw=1, ls=theme.DASHES[1], zorder=1)
        layout.name_rows(ax, [theme.in_words(name) for name in objectives], 0.6)
        title = theme.in_words(strategy)
        title += "" if strategy == "full" else f", {theme.of_the_data(fraction)}"
        ax.set_title(f"{theme.in_words(student)}, {title}" if several else title)
    n_seeds = results["seed"].nunique()
    marks = [
        layout.mark(f"mean of {n_seeds} seeds", color=NEUTRAL, marker="o", ms=5.5, mew=0),
        layout.mark("one seed", color=NEUTRAL, marker="o", ms=2.6, mew=0),
        layout.mark(
            f"{theme.in_words(objectives[0])}: mean", color=theme.GREY, ls=theme.DASHES[1], lw=1
        ),
    ]
    layout.legend_in_rows(fig, marks)
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
        results, measure: As for `accuracy_by_strategy`.

    Returns: `fig`.
    Raises: ValueError for missing columns or an empty table.
    """
    theme.demand(results, (*AXES, "seed", measure), "results")
    strategies = sorted(set(results["strategy"]) - {"full"}, key=theme.sorting_key)
    objectives = list(dict.fromkeys(results["objective"]))
    students = list(dict.fromkeys(results["student"]))
    by = "strategy" if len(strategies) > 1 else "objective"
    if by == "strategy":
        panels, names = [(s, [o]) for s in students for o in objectives], strategies
    else:
        panels, names = [(s, objectives) for s in students], objectives
    looks = theme.line_looks(names, by)
    row_in = max(2.6, 0.5 + 0.14 * len(names))
    axs = layout.panel_grid(fig, len(panels), row_in, 2, sharey=False)
    is_full = results["strategy"] == "full"
    ticks = sorted(set(results[~is_full if by == "strategy" else slice(None)]["fraction"]))
    for ax, (student, shown) in zip(axs, panels, strict=True):
        rows = results[(results["student"] == student) & results["objective"].isin(shown)]
        ends = _draw_over_fractions(ax, rows, measure, by, looks)
        _fraction_axis(ax, ticks)
        title = [theme.in_words(student)] if len(students) > 1 else []
        title += [theme.in_words(strategies[0])] if by == "objective" else []
        title += [theme.in_words(shown[0])] if by == "strategy" and len(objectives) > 1 else []
        ax.set_title(f"{', '.join(title)}; {theme.name_of_spread(rows)}", fontsize=theme.TEXT_PT)
        layout.label_ends(ax, ends)
    fig.supxlabel("fraction of the data (%)", fontsize=theme.RC["axes.labelsize"])
    fig.supylabel(f"{accuracy_label(measure)} (%)", fontsize=theme.RC["axes.labelsize"])
    return fig


def _draw_over_fractions(
    ax: Axes, results: pd.DataFrame, measure: str, by: str, looks: dict[str, theme.Look]
) -> list[layout.End]:
    """The lines of one panel; returns where they end."""
    ends: list[layout.End] = []
    for name, (colour, dash, marker) in looks.items():
        rows, label = results[results[by] == name], theme.in_words(name)
        if rows.empty:
            continue
        values = 100 * rows.groupby("fraction")[measure].agg(["mean", "std"])
        ax.errorbar(
            values.index, values["mean"], values["std"].fillna(0), color=colour, ls=dash,
            marker=marker, ms=4, capsize=2, elinewidth=0.8, label=label, clip_on=False,
        )  # fmt: skip
        ends.append((float(values["mean"].iloc[-1]), label, colour, None))
    full = results[results["strategy"] == "full"]
    if by == "strategy" and len(full):
        level = 100 * full[measure].mean()
        ax.axhline(level, color=theme.BLACK, lw=1)
        ends.append((level, theme.in_words("full"), theme.BLACK, None))
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
