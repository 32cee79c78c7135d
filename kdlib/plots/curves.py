"""Figures over the steps of training: learning curves and losses.

A function takes tables and an axis (or a figure where several panels belong together), draws, and
returns it. Where the curves of compared cells lie on each other (`apart`), their differences can be
drawn.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from kdlib.plots import layout, theme
from kdlib.study.evaluation import AXES

OFTEN = 0.25  # share of the steps at which cells must differ, to be told apart
SEEN = 0.08  # share of the height of a panel by which they must differ


def apart(table: pd.DataFrame, value: str, levels: Sequence[float] = ()) -> bool:
    """Whether curves of different cells can be told apart.

    They can where the means of two cells lie further apart than two standard deviations over seeds
    (pooled over cells; of one seed, further than nothing), and than `SEEN` of the height of the
    panel, at a quarter of the steps after the first or more.

    Args:
        table: The axes of the study, `seed`, `step` and the value; rows of trained cells.
        value: Name of a column.
        levels: What else stands in the panel.
    """
    means = table.groupby([*AXES, "step"])[value].mean()
    height = max([means.max(), *levels]) - min([means.min(), *levels])
    after = table[table["step"] > table["step"].min()]
    of_cells = after.groupby(["step", *AXES])[value].agg(["mean", "var"]).groupby("step")
    spread = of_cells["mean"].max() - of_cells["mean"].min()
    sd = np.sqrt(of_cells["var"].mean().fillna(0.0))
    seen = (spread > 2 * sd) & (spread > SEEN * height)
    return len(spread) > 0 and float(seen.mean()) >= OFTEN


def measured(curves: pd.DataFrame) -> str:
    """The column that learning curves show: validation accuracy, training accuracy where no image
    was held out, or the validation loss without labels.

    Raises: ValueError for missing columns or an empty table.
    """
    unlabelled = "validation_loss" in curves and "validation_accuracy" not in curves
    kind = "loss" if unlabelled else "accuracy"
    theme.demand(curves, (*AXES, "seed", "step", f"validation_{kind}"), "curves")
    which = "validation" if curves[f"validation_{kind}"].notna().any() else "train"
    return f"{which}_{kind}"


def learning_curves(ax: Axes, curves: pd.DataFrame, by: str = "strategy") -> Axes:
    """What is `measured` over optimiser steps: mean and standard deviation over seeds.

    Each cell (student, strategy, fraction, objective) is one line, named at its end by `by` and by
    what else tells it from the other cells of the same `by`.

    Args:
        ax: The axis.
        curves: The axes of the study, `seed`, `step`, `validation_accuracy` in [0, 1], and where
            all of these are NaN, `train_accuracy`; or `validation_loss`.
        by: The axis of the study that decides the colour.

    Returns: `ax`.
    Raises: ValueError for missing columns, an empty table, an unknown `by`, or a cell whose seeds
        were not all evaluated at the same steps.
    """
    value = measured(curves)
    is_loss = value.endswith("loss")
    ends = draw_cells(ax, curves, value, by, scale=1 if is_loss else 100)
    ax.set(xlabel="optimiser steps", ylabel=_named(value) + ("" if is_loss else " (%)"))
    _title(ax, curves, by)
    finish_lines(ax, ends, math.inf if is_loss else 100)
    return ax


def difference_curves(
    ax: Axes, table: pd.DataFrame, value: str, by: str, baseline: str, what: str = ""
) -> Axes:
    """Each cell minus the cell of `baseline` at the same steps, seed by seed: mean and standard
    deviation over seeds; for cells whose curves lie on each other.

    Args:
        ax: The axis.
        table: The axes of the study, `seed`, `step` and the value, of cells that differ in `by`;
            one of them is the baseline.
        value: Name of a column: an accuracy in [0, 1], drawn in points, or a loss.
        by: The axis of the study in which cells differ.
        baseline: Its value in the cell that is subtracted.
        what: What the value is called; else by its column.

    Returns: `ax`.
    Raises: ValueError for missing columns, or a table without the baseline.
    """
    theme.demand(table, (*AXES, "seed", "step", value), "curves")
    keys = ["seed", "step"] + [a for a in AXES if a not in (by, "strategy", "fraction")]
    reference = table[table[by] == baseline]
    if reference.empty:
        raise ValueError(f"no curve of the baseline {baseline!r}: {by} has {set(table[by])}")
    reference = reference.set_index(keys)[value].rename("subtracted")
    pairs = table[table[by] != baseline].join(reference, on=keys, how="inner")
    pairs = pairs.assign(difference=pairs[value] - pairs["subtracted"])
    is_loss = value.endswith("loss")
    ends = draw_cells(ax, pairs, "difference", by, scale=1 if is_loss else 100)
    ax.axhline(0, color=theme.BLACK, lw=0.8, zorder=1)
    unit = "" if is_loss else "\n(points)"
    minus = f"minus {theme.value_in_words(baseline)}"
    ax.set(xlabel="optimiser steps", ylabel=f"{what or _named(value)}, {minus}{unit}")
    _title(ax, table, by, "seed by seed; ")
    finish_lines(ax, ends, math.inf, -math.inf)
    return ax


def _named(value: str) -> str:
    which, _, kind = value.partition("_")
    return f"{which.replace('train', 'training')} {kind}"


def _title(ax: Axes, table: pd.DataFrame, by: str, before: str = "") -> None:
    lines = theme.held_axes(table, by), f"{before}{theme.name_of_spread(table)}"
    ax.set_title("\n".join(filter(None, lines)), fontsize=theme.TEXT_PT)


def losses(fig: Figure, curves: pd.DataFrame, by: str = "strategy") -> Figure:
    """Training loss, each of its terms, and validation loss over optimiser steps, a panel for each
    in which the cells can be told `apart`, and for each objective: losses of different objectives
    do not compare. A loss that falls to less than a fiftieth has a logarithmic axis.

    Args:
        fig: An empty figure; its height is set to what the panels need.
        curves: The axes of the study, `seed`, `step`, `train_loss`, `validation_loss`, and
            `train_loss_<term>`, NaN of cells whose loss has no such term. A loss of one term is
            that term.
        by: The axis of the study that decides the colour.

    Returns: `fig`; without an axis where no panel is left.
    Raises: ValueError as `learning_curves`.
    """
    theme.demand(curves, (*AXES, "seed", "step", "train_loss", "validation_loss"), "curves")
    terms = [name for name in curves if name.startswith("train_loss_")]
    apart_by = by != "objective" and curves["objective"].nunique() > 1
    panels = []
    for objective, rows in curves.groupby("objective", sort=False) if apart_by else [("", curves)]:
        there = [name for name in terms if rows[name].notna().any()]
        shown = {"train_loss": "training loss"}
        if len(there) > 1 or not apart_by:
            shown |= {name: theme.in_words(name.removeprefix("train_loss_")) for name in there}
        shown |= {"validation_loss": "validation loss"}
        for name, title in shown.items():
            title = f"training, {title} term" if name in terms else title
            kept = rows[rows[name].notna()]
            shown_as = np.log(kept[name]) if _falls_far(kept, name) else kept[name]
            seen = len(kept) and apart(kept.assign(shown=shown_as), "shown")
            kept = kept if seen else kept.iloc[:0]
            title = f"{theme.in_words(objective)}: {title}" if apart_by else title
            panels += [(name, title, kept)] if len(kept) else []
    if not panels:
        return fig
    axs = layout.panel_grid(fig, len(panels), 2.1, 3, xlabel="optimiser steps", sharey=False)
    handles = {}
    for ax, (name, title, rows) in zip(axs, panels, strict=True):
        draw_cells(ax, rows, name, by, scale=1)
        ax.set_xlim(0, max(1, curves["step"].max()))
        if _falls_far(rows, name):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(NullFormatter())
        else:
            ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
        ax.set_title(title, fontsize=theme.TEXT_PT)
        found, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    title = f"{theme.held_axes(curves, by)}; {theme.name_of_spread(curves)}".removeprefix("; ")
    layout.legend_in_rows(fig, list(handles.values()), title=title, handlelength=3.5)
    return fig


def _falls_far(rows: pd.DataFrame, name: str) -> bool:
    """Whether a positive loss spans more than a linear axis shows."""
    means = rows.groupby([*AXES, "step"])[name].mean()
    return rows[name].min() > 0 and means.min() < means.max() / 50


def draw_cells(
    ax: Axes, table: pd.DataFrame, value: str, by: str, scale: float = 100
) -> list[layout.End]:
    """One line with a band for each cell, in % or times `scale`; returns where the lines end."""
    if by not in AXES:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(AXES)}")
    looks = theme.line_looks(table[by].unique(), by)
    ends = []
    others = theme.varying_axes(table, by)
    cells = table.groupby([by, *others], sort=False)
    turns = dict.fromkeys(looks, 0)
    for key, runs in sorted(cells, key=lambda cell: theme.sorting_key(cell[0])):
        grid = runs.pivot(index="step", columns="seed", values=value)  # (steps, S)
        if grid.isna().any(axis=None):
            raise ValueError(
                f"{', '.join(map(str, key))}: the seeds {list(grid.columns)} were not all "
                "evaluated at the same steps; expected one row per seed and step"
            )
        colour, dash, _ = looks[key[0]]
        if others:
            dash = theme.DASHES[turns[key[0]] % len(theme.DASHES)]
            turns[key[0]] += 1
        mean = scale * grid.mean(axis=1)
        label = ", ".join(theme.value_in_words(value) for value in key)
        marker = "o" if len(mean) <= 12 else None  # few steps: show where something was measured
        ax.plot(
            mean.index, mean, color=colour, ls=dash, marker=marker, ms=2.8, label=label, zorder=3,
            clip_on=False,
        )  # fmt: skip
        if grid.shape[1] > 1:
            sd = scale * grid.std(axis=1, ddof=1)
            ax.fill_between(mean.index, mean - sd, mean + sd, color=colour, alpha=0.18, lw=0)
        ends.append((float(mean.iloc[-1]), label, colour, float(mean.index[-1])))
    return ends


def finish_lines(ax: Axes, ends: Sequence[layout.End], most: float = 100, least: float = 0) -> None:
    """Freeze the limits (x from 0 to the last step, y inside [least, most]) and name the lines."""
    ax.set_xlim(0, max((step for *_, step in ends if step is not None), default=1.0))
    ax.margins(y=0.04)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, least), min(high, most))
    layout.label_ends(ax, ends)
