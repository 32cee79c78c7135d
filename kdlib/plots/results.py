"""Figures of finished runs: accuracies, differences, defects; and of images and shards.

A function takes tables and an axis (or a figure where several panels belong together), draws, and
returns it. Accuracies are drawn in %, their differences in percentage points. Leaves to others:
how it looks (looks), what changes during training (progress), datamaps and scores (maps), every
number drawn.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import NullLocator

from kdlib.plots.theme import (
    BLACK,
    BLUE,
    DASHES,
    GREEN,
    GREY,
    OBJECTIVES,
    PANELS,
    RC,
    TALL,
    TEXT_PT,
    VERMILLION,
    demand,
    held_axes,
    in_words,
    label_ends,
    legend_in_rows,
    line_looks,
    mark,
    name_of_spread,
    name_rows,
    of_cell,
    panel_grid,
    percent,
    sorting_key,
    text_width_pt,
    value_in_words,
)
from kdlib.repro.files import nearest
from kdlib.study.evaluation import AXES

VERDICTS = {
    "better": (BLUE, "^"),
    "worse": (VERMILLION, "v"),
    "equivalent": (GREEN, "s"),
    "inconclusive": (GREY, "o"),
}


MEASURED = {  # column of results -> what it is called on an axis
    "test_accuracy": "test accuracy at the last step",
    "linear_accuracy": "linear probe's test accuracy",
    "knn_accuracy": "k-NN probe's test accuracy",
}


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
    demand(results, (*AXES, "seed", measure), "results")
    demand(comparison, (*AXES, "against_strategy", "verdict"), "comparison")
    if "refused" in results and results["refused"].any():
        raise ValueError(
            f"{int(results['refused'].sum())} of {len(results)} rows are refused; draw accepted "
            "rows only: results[~results['refused']]"
        )
    is_full = results["strategy"] == "full"
    subsets, full = results[~is_full], results[is_full]
    if subsets.empty:
        raise ValueError("the results hold the full set alone; expected runs on subsets to compare")
    students = list(dict.fromkeys(results["student"]))
    fractions = sorted(set(subsets["fraction"]), reverse=True)
    strategies = sorted(set(subsets["strategy"]), key=sorting_key)
    objectives = sorted(set(results["objective"]))
    if len(objectives) > len(OBJECTIVES):
        raise ValueError(
            f"{len(objectives)} objectives ({', '.join(objectives)}); expected at most "
            f"{len(OBJECTIVES)}: draw some of them"
        )
    baseline = next(iter(comparison["against_strategy"]), None)
    panels = [(student, fraction) for student in students for fraction in fractions]
    n_columns = len(fractions) if 1 < len(fractions) <= PANELS else min(len(panels), PANELS)
    n_columns = 2 if len(panels) == 4 else n_columns
    row_in = len(strategies) * (0.09 + 0.1 * len(objectives)) + 0.4
    axs = panel_grid(fig, len(panels), n_columns, row_in)
    offsets = (np.arange(len(objectives)) - (len(objectives) - 1) / 2) * 0.7 / len(objectives)
    first = {}
    for ax, (student, fraction) in zip(axs, panels, strict=True):
        if student in first:
            ax.sharex(first[student])
        first.setdefault(student, ax)
        if baseline in strategies:
            y = strategies.index(baseline)
            ax.axhspan(y - 0.5, y + 0.5, color="#F0F0F0", lw=0, zorder=0)
        for k, objective in enumerate(objectives):
            colour, marker = OBJECTIVES[k]
            of_full = full[(full["student"] == student) & (full["objective"] == objective)]
            if len(of_full):
                level = 100 * of_full[measure].mean()
                ax.axvline(level, color=colour, ls=DASHES[k], lw=1, zorder=1)
            for y, strategy in enumerate(strategies):
                cell = (student, strategy, fraction, objective)
                values = 100 * of_cell(subsets, cell)[measure]
                row = y + offsets[k]
                below = row + 0.25 / len(objectives)  # where the mean does not cover the seeds
                ax.plot(values, [below] * len(values), "o", ms=2.6, color=colour, alpha=0.6, mew=0)
                if len(values):
                    ax.plot(
                        values.mean(), row, marker, ms=5.5, color=colour, mec="white", mew=0.7,
                        zorder=4,
                    )  # fmt: skip
                for verdict in of_cell(comparison, cell)["verdict"]:
                    _verdict_mark(ax, 1.035, row, verdict, transform=ax.get_yaxis_transform())
        name_rows(ax, [in_words(name) for name in strategies], 0.5)
        title = f"{percent(fraction)} of the data"
        ax.set_title(f"{in_words(student)}, {title}" if len(students) > 1 else title)
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"{MEASURED[measure]} (%)")
    legend_in_rows(fig, _objective_handles(objectives, full), _verdict_handles(baseline))
    return fig


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
            ax.plot(values, [y + 0.25] * len(values), "o", ms=2.6, color=BLUE, alpha=0.6, mew=0)
            if len(values):
                ax.plot(values.mean(), y, "o", ms=5.5, color=BLUE, mec="white", mew=0.7, zorder=4)
                if y == 0:
                    ax.axvline(values.mean(), color=GREY, lw=1, ls=DASHES[1], zorder=1)
        name_rows(ax, [in_words(name) for name in objectives], 0.6)
        title = in_words(strategy)
        title += "" if strategy == "full" else f", {percent(fraction)} of the data"
        ax.set_title(f"{in_words(student)}, {title}" if several else title)
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"{MEASURED[measure]} (%)")
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
    by_strategy = len(strategies) > 1
    panels = [(s, [o]) for s in students for o in objectives] if by_strategy else [
        (s, objectives) for s in students
    ]  # fmt: skip
    if by_strategy:
        looks = {s: (*line_looks(strategies)[s], "o") for s in strategies}
    elif len(objectives) <= len(OBJECTIVES):
        looks = {o: (c, DASHES[i], m) for i, (o, (c, m)) in
                 enumerate(zip(objectives, OBJECTIVES, strict=False))}  # fmt: skip
    else:
        looks = {o: (*look, "o") for o, look in line_looks(objectives).items()}
    n_lines = len(strategies) if by_strategy else len(objectives)
    axs = panel_grid(
        fig, len(panels), min(len(panels), 2), max(2.6, 0.5 + 0.14 * n_lines), sharey=False
    )
    is_full = results["strategy"] == "full"
    ticks = sorted(set(results[~is_full if by_strategy else slice(None)]["fraction"]))
    for ax, (student, shown) in zip(axs, panels, strict=True):
        of_student = results[(results["student"] == student) & results["objective"].isin(shown)]
        ends = []
        for strategy, objective in ((s, o) for o in shown for s in strategies):
            wanted = [strategy] if by_strategy else [strategy, "full"]
            rows = of_student[
                of_student["strategy"].isin(wanted) & (of_student["objective"] == objective)
            ]
            if rows.empty:
                continue
            values = 100 * rows.groupby("fraction")[measure].agg(["mean", "std"])
            colour, dash, marker = looks[strategy if by_strategy else objective]
            label = in_words(strategy if by_strategy else objective)
            ax.errorbar(
                values.index, values["mean"], values["std"].fillna(0), color=colour, ls=dash,
                marker=marker, ms=4, capsize=2, elinewidth=0.8, label=label, clip_on=False,
            )  # fmt: skip
            ends.append((float(values["mean"].iloc[-1]), label, colour, None))
        full = of_student[of_student["strategy"] == "full"]
        if by_strategy and len(full):
            level = 100 * full[measure].mean()
            ax.axhline(level, color=BLACK, lw=1)
            ends.append((level, in_words("full"), BLACK, None))
        ax.set_xscale("log")
        ax.set_xlim(0.9 * ticks[0], ticks[-1])
        ax.set_xticks(_apart(ticks), [f"{100 * t:.4g}" for t in _apart(ticks)], minor=False)
        ax.xaxis.set_minor_locator(NullLocator())
        ax.grid(color="#DDDDDD", lw=0.5)
        ax.set_axisbelow(True)
        told = [in_words(student)] if len(students) > 1 else []
        told += [in_words(strategies[0])] if not by_strategy else []
        told += [in_words(shown[0])] if by_strategy and len(objectives) > 1 else []
        ax.set_title(f"{', '.join(told)}; {name_of_spread(of_student)}", fontsize=TEXT_PT)
        label_ends(ax, ends)
    fig.supxlabel("fraction of the data (%)", fontsize=RC["axes.labelsize"])
    fig.supylabel(f"{MEASURED[measure]} (%)", fontsize=RC["axes.labelsize"])
    return fig


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


def _objective_handles(objectives: Sequence[str], full: pd.DataFrame) -> list[Line2D]:
    handles = []
    for (colour, marker), dash, name in zip(OBJECTIVES, DASHES, objectives, strict=False):
        mean = mark(f"{in_words(name)}: mean", color=colour, marker=marker, ms=5.5, mew=0)
        handles.append(mean)
        if name in set(full["objective"]):
            handles.append(mark(f"{in_words(name)}: full set", color=colour, ls=dash, lw=1))
    return [*handles, mark("one seed", color=GREY, marker="o", ms=2.6, mew=0)]


def _verdict_handles(baseline: str | None) -> list[Line2D]:
    heading = [] if baseline is None else [mark(f"against {in_words(baseline)}:")]
    marks = [
        mark(name, color=colour, marker=marker, ms=4.5, mfc=_face(name))
        for name, (colour, marker) in VERDICTS.items()
    ]
    return heading + marks


def _face(verdict: str) -> str:
    """Open markers say that nothing is settled, in grey print as well."""
    return "white" if verdict == "inconclusive" else VERDICTS[verdict][0]


def _verdict_mark(ax: Axes, x: float, y: float, verdict: str, **where: Any) -> None:
    if verdict not in VERDICTS:
        raise ValueError(f"unknown verdict {verdict!r}; {nearest(verdict, VERDICTS)}")
    colour, marker = VERDICTS[verdict]
    ax.plot(
        x, y, marker, ms=4.5, color=colour, mfc=_face(verdict), clip_on=False, zorder=4, **where
    )


def differences(fig: Figure, comparison: pd.DataFrame, margin: float) -> Figure:
    """`paired_differences`, a panel for each student, with names and legend once.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        comparison, margin: As for `paired_differences`.

    Returns: `fig`.
    """
    demand(comparison, (*AXES, "verdict"), "comparison")
    students = list(dict.fromkeys(comparison["student"]))
    rows = comparison.groupby("student").size().max()
    groups = comparison["strategy"].nunique()
    fig.set_figheight(min(1.15 + 0.125 * rows + 0.075 * groups, TALL))
    axs = fig.subplots(1, len(students), squeeze=False)[0]
    for i, (ax, student) in enumerate(zip(axs, students, strict=True)):
        of_student = comparison[comparison["student"] == student]
        paired_differences(ax, of_student, margin, named=i == 0, legend=False)
        if len(students) > 1:
            ax.set_title(in_words(student))
    fig.supxlabel(axs[0].get_xlabel(), fontsize=RC["axes.labelsize"])
    for ax in axs:
        ax.set_xlabel("")
    handles = [*_verdict_handles(None), *_interval_handles(margin, comparison["level"].iloc[0])]
    fig.legend(
        handles=handles, loc="outside upper right", ncols=len(handles), columnspacing=1,
        handletextpad=0.5, handlelength=1.3,
    )  # fmt: skip
    return fig


def paired_differences(
    ax: Axes, comparison: pd.DataFrame, margin: float, named: bool = True, legend: bool = True
) -> Axes:
    """Forest plot: each cell minus the cell it is paired with, in percentage points.

    The thin line is the interval at the study's level, the thick one that at 90 %, which must lie
    inside the shaded margin for the verdict `equivalent`.

    Args:
        ax: The axis; about 0.12 in high for each row.
        comparison: From `compare.paired_differences` or `compare.objective_differences`.
        margin: Smallest difference of accuracy that matters, in (0, 1): the one of the comparison.
        named: Whether the rows are named at the left.
        legend: Whether there is one.

    Returns: `ax`, a row for each comparison, strategy by strategy. A row without a pair of seeds
        says so.
    Raises: ValueError for missing columns, an empty table, or another margin than the verdicts'.
    """
    needed = ("difference", "low", "high", "low90", "high90", "verdict", "margin", "level")
    against = ("against_strategy", "against_fraction", "against_objective")
    demand(comparison, (*AXES, *against, *needed), "comparison")
    if not np.allclose(comparison["margin"], margin):
        raise ValueError(
            f"margin is {margin:g} but the verdicts were reached with "
            f"{comparison['margin'].iloc[0]:g}; draw the margin of the comparison "
            "(params: compare.margin)"
        )
    rows = comparison.assign(
        # The full set has one fraction; its rows are told apart by what they are compared with.
        shown=comparison["against_fraction"].where(
            comparison["strategy"] == "full", comparison["fraction"]
        ),
        rank=comparison["strategy"].map(sorting_key),
    ).sort_values(["rank", "student", "shown", "objective"], ascending=[True, True, False, True])
    naming = [a for a in ("shown", "objective", "student") if rows[a].nunique() > 1]
    y, places, labels, groups = 0.0, [], [], {}
    for strategy, group in rows.groupby("strategy", sort=False):
        groups[strategy] = (y - 0.5, y + len(group) - 0.5)
        for row in group.to_dict("records"):
            places.append(y)
            label = ", ".join(value_in_words(row[a]) for a in naming)
            across = row["against_fraction"] != row["fraction"]
            labels.append(f"against {label}" if across and label else label)
            if np.isnan(row["difference"]):
                ax.text(0, y, " no paired seeds", va="center", fontsize=TEXT_PT, color=GREY)
            else:
                colour = VERDICTS[row["verdict"]][0] if row["verdict"] in VERDICTS else GREY
                for ends, width in ((("low", "high"), 0.8), (("low90", "high90"), 2.2)):
                    line = [100 * row[end] for end in ends]
                    ax.plot(line, [y, y], color=colour, lw=width, solid_capstyle="butt")
                _verdict_mark(ax, 100 * row["difference"], y, row["verdict"])
            y += 1
        y += 0.6
    ax.axvspan(-100 * margin, 100 * margin, color="#DDDDDD", lw=0, zorder=0)
    ax.axvline(0, color=BLACK, lw=0.8, zorder=1)
    ax.set_yticks(places, labels if named else [""] * len(places))
    ax.tick_params(axis="y", length=0)
    pad = max(map(text_width_pt, labels)) + 12  # strategies stand left of the row labels
    for strategy, (top, bottom) in groups.items():
        if named:
            ax.annotate(
                in_words(strategy), xy=(0, (top + bottom) / 2), xycoords=ax.get_yaxis_transform(),
                xytext=(-pad, 0), textcoords="offset points", ha="right", va="center",
                annotation_clip=False,
            )  # fmt: skip
        ax.axhspan(top, bottom, color="#F5F5F5", lw=0, zorder=-1)
    ax.set_ylim(y - 1.1, -0.9)
    ax.spines["left"].set_visible(False)
    subtraction, held = _subtraction(comparison)
    held = f"\n{held}" if held else ""
    measured = "test accuracy"
    if "measure" in comparison:
        measured = MEASURED[comparison["measure"].iloc[0]].removesuffix(" at the last step")
    ax.set_xlabel(f"{measured}, {subtraction}, seed by seed (points){held}")
    if legend:
        level = comparison["level"].iloc[0]
        handles = [*_verdict_handles(None), *_interval_handles(margin, level)]
        ax.legend(
            handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=len(handles),
            columnspacing=1, handletextpad=0.5, handlelength=1.3, borderaxespad=0.2,
        )  # fmt: skip
    return ax


def _interval_handles(margin: float, level: float) -> list[Any]:
    size = "1 point" if margin == 0.01 else f"{100 * margin:g} points"
    return [
        Patch(color="#DDDDDD", lw=0, label=f"margin, ±{size}"),
        mark(f"{100 * level:g} % interval", color=BLACK, ls="-", lw=0.8),
        mark("90 %", color=BLACK, ls="-", lw=2.2),
    ]


def _subtraction(comparison: pd.DataFrame) -> tuple[str, str]:
    """What is subtracted from what (strategies, or objectives on the same subset), and what is the
    same in all rows."""
    if (comparison["against_strategy"] != comparison["strategy"]).any():
        words = f"strategy minus {_one_of(comparison['against_strategy'])}"
        return words, held_axes(comparison, "strategy")
    several = comparison["objective"].nunique() > 2
    what = "objective" if several else _one_of(comparison["objective"])
    words = f"{what} minus {_one_of(comparison['against_objective'])}"
    return words, held_axes(comparison, "objective")


def _one_of(names: pd.Series) -> str:
    return " or ".join(in_words(name) for name in names.unique())


def defects(ax: Axes, exhibits: pd.DataFrame, title: str = "") -> Axes:
    """Each defect's number against the honest one: one row each, with the tripwire that caught it.

    Args:
        ax: The axis.
        exhibits: One row per defect, drawn from top to bottom: `study`, `name`, `measure`,
            `defect` and `honest` (shares in [0, 1]), `tripwire`, and whether it was `caught`.
        title: Above the rows.

    Returns: `ax`, its x axis in %.
    Raises: ValueError for missing columns, an empty table, or numbers that are no shares.
    """
    columns = ("study", "name", "measure", "defect", "honest", "tripwire", "caught")
    demand(exhibits, columns, "exhibits")
    numbers = 100 * exhibits[["defect", "honest"]].to_numpy()
    if not ((numbers >= 0) & (numbers <= 100)).all():
        raise ValueError(f"numbers span [{numbers.min()}, {numbers.max()}] %; expected [0, 100]")
    rows = exhibits.reset_index(drop=True)

    def note(text: str, side: int, y: float, points: tuple[float, float], **look: Any) -> None:
        """Text beside the left (0) or right (1) edge of the axis, at a distance in points."""
        ax.annotate(
            text, (side, y), points, ax.get_yaxis_transform(), "offset points",
            annotation_clip=False, fontsize=TEXT_PT, **look,
        )  # fmt: skip

    for y, row in rows.iterrows():
        wrong, honest = 100 * row["defect"], 100 * row["honest"]
        ax.plot([wrong, honest], [y, y], color=GREY, linewidth=0.8, zorder=1)
        look = {"linestyle": "", "clip_on": False}
        ax.plot(honest, y, marker="o", color=BLUE, markersize=5.5, zorder=2, **look)
        ax.plot(wrong, y, marker="X", color=VERMILLION, markersize=5, zorder=3, **look)
        name = f"{row['study']}  {row['name']}"
        note(name, 0, y, (-7, 0.5), ha="right", va="bottom")
        note(row["measure"], 0, y, (-7, -0.5), ha="right", va="top", color=GREY)
        note(f"{wrong:.1f}", 1, y, (30, 0), ha="right", va="center", color=VERMILLION)
        note(f"{honest:.1f}", 1, y, (57, 0), ha="right", va="center", color=BLUE)
        told = "\n".join(row["tripwire"].split(", "))
        told = told if row["caught"] else f"not caught by\n{told}"
        note(told, 1, y, (65, 0), ha="left", va="center", linespacing=1.05)
    for y in np.flatnonzero(rows["study"].to_numpy()[1:] != rows["study"].to_numpy()[:-1]):
        ax.axhline(y + 0.5, color=BLACK, linewidth=0.6)
    top = -0.6
    ax.set(xlim=(0, 100), ylim=(len(rows) - 0.4, top), yticks=[])
    ax.set_xlabel("what each row measures (%)")
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x", color="#DDDDDD", linewidth=0.5)
    ax.set_axisbelow(True)
    handles = [
        mark("with the defect", marker="X", color=VERMILLION, linestyle=""),
        mark("without", marker="o", color=BLUE, linestyle=""),
    ]
    ax.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=0.8,
        handletextpad=0.2, borderaxespad=0.1, borderpad=0.1,
    )  # fmt: skip
    note("tripwire", 1, top, (65, 2), ha="left", va="bottom", fontweight="bold")
    note(title, 0, top, (-7, 2), ha="right", va="bottom", fontweight="bold")
    return ax
