"""Figures over the steps of training: learning curves, probes, the shape of features.

A function takes tables and an axis (or a figure where several panels belong together), draws, and
returns it.
"""

import itertools
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.plots.layout import PANELS, End, label_ends, legend_in_rows, mark, name_rows, panel_grid
from kdlib.plots.theme import (
    BLACK,
    DASHES,
    GREY,
    OBJECTIVES,
    TEXT_PT,
    demand,
    held_axes,
    in_words,
    line_looks,
    name_of_spread,
    sorting_key,
    value_in_words,
    varying_axes,
)
from kdlib.repro.files import nearest
from kdlib.study.evaluation import AXES

REFERENCES = ("teacher", "untrained")

# Diagnostics of features: column, title, the level of theory (None: it depends on the network) and
# what it is the level of.
DIAGNOSTICS = (
    ("effective_rank", "effective rank", None, "isotropic"),
    ("mean_cosine", "mean cosine, centred", 0.0, "isotropic"),
    ("unit_variance", "variance of a unit feature", None, "at most 1 / D"),
    ("alignment", "alignment within classes", 2.0, "isotropic"),
    ("uniformity", "uniformity", None, "evenly spread"),
    ("cka_teacher", "linear CKA with the teacher", 1.0, "the teacher itself"),
)


def learning_curves(ax: Axes, curves: pd.DataFrame, by: str = "strategy") -> Axes:
    """Validation accuracy over optimiser steps: mean and standard deviation over seeds.

    Each cell (student, strategy, fraction, objective) is one line, named at its end by `by` and by
    what else tells it from the other cells of the same `by`.

    Args:
        ax: The axis.
        curves: The axes of the study, `seed`, `step`, `validation_accuracy` in [0, 1].
        by: The axis of the study that decides the colour.

    Returns: `ax`.
    Raises: ValueError for missing columns, an empty table, an unknown `by`, or a cell whose seeds
        were not all evaluated at the same steps.
    """
    demand(curves, (*AXES, "seed", "step", "validation_accuracy"), "curves")
    ends = _draw_cells(ax, curves, "validation_accuracy", by)
    ax.set(xlabel="optimiser steps", ylabel="validation accuracy (%)")
    ax.set_title(f"{held_axes(curves, by)}; {name_of_spread(curves)}", fontsize=TEXT_PT)
    _finish_lines(ax, ends)
    return ax


def probe_curves(
    ax: Axes,
    probes: pd.DataFrame,
    probe: str = "linear",
    on: str = "own",
    layer: str = "features",
) -> Axes:
    """Probe accuracy over optimiser steps, with the untrained student and the teacher as levels.

    Args:
        ax: The axis.
        probes: The axes of the study, `seed`, `step`, `probe`, `accuracy` in [0, 1]; rows whose
            `strategy` is `untrained` or `teacher` become horizontal lines at their mean.
        probe: Which rows: `linear`, `knn` or `few_shot_<n>`.
        on: On which data set; `own` means the study's images.
        layer: Of which layer. The teacher's level is that of its last one.

    Returns: `ax`.
    Raises: ValueError for missing columns, a probe that is not there, or a cell whose seeds were
        not all probed at the same steps.
    """
    demand(probes, (*AXES, "seed", "step", "on", "layer", "probe", "accuracy"), "probes")
    rows = probes
    for column, wanted in (("on", on), ("layer", layer), ("probe", probe)):
        of_teacher = (column == "layer") & (rows["strategy"] == "teacher")
        kept = rows[(rows[column] == wanted) | of_teacher]
        if kept[kept["strategy"] != "teacher"].empty:
            raise ValueError(
                f"no rows of {column} {wanted!r}; {nearest(wanted, set(rows[column]))}"
            )
        rows = kept
    is_reference = rows["strategy"].isin(REFERENCES)
    trained = rows[~is_reference]
    ends = _draw_cells(ax, trained, "accuracy", "strategy")
    for name, dash in zip(REFERENCES, ((0, (4, 2)), (0, (1, 2))), strict=True):
        reference = rows[rows["strategy"] == name]
        # One teacher is the reference of all students, the untrained network that of its student.
        groups = reference.groupby("student") if name == "untrained" else [("", reference)]
        for student, group in groups:
            if group.empty:
                continue
            level = 100 * group["accuracy"].mean()
            ax.axhline(level, color=BLACK, ls=dash, lw=0.9, zorder=1)
            several = name == "untrained" and reference["student"].nunique() > 1
            label = f"{name}, {in_words(student)}" if several else name
            ends.append((level, label, BLACK, None))
    ax.set(xlabel="optimiser steps", ylabel="test accuracy (%)")
    title = [f"{in_words(probe)} probe", held_axes(trained, "strategy")]
    title += [f"on {on}"] * (on != "own") + [layer] * (layer != "features")
    ax.set_title(f"{', '.join(title)}; {name_of_spread(trained)}", fontsize=TEXT_PT)
    _finish_lines(ax, ends)
    return ax


def probe_places(fig: Figure, probes: pd.DataFrame, probe: str = "linear") -> Figure:
    """Probe accuracy of every layer on every data set at the last step, a panel for each data set,
    between the untrained student and the teacher.

    Args:
        fig: An empty figure; its height is set to what the rows need.
        probes: As of `probe_curves`.
        probe: Which rows: `linear`, `knn` or `few_shot_<n>`.

    Returns: `fig`, one axis per data set; a small dot is one seed, a large marker the mean.
    Raises: ValueError for missing columns, or a table without such a probe.
    """
    demand(probes, (*AXES, "seed", "step", "on", "layer", "probe", "accuracy"), "probes")
    rows = probes[probes["probe"] == probe]
    demand(rows, (), f"probes, {probe}")
    trained = rows[~rows["strategy"].isin(REFERENCES)]
    trained = trained[trained["step"] == trained.groupby(list(AXES))["step"].transform("max")]
    others = varying_axes(trained, "strategy")
    networks = {}  # what it is called -> its rows
    for (student,), of in rows[rows["strategy"] == "untrained"].groupby(["student"], sort=False):
        several = rows["student"].nunique() > 1
        networks[f"untrained, {in_words(student)}" if several else "untrained"] = of
    cells = trained.groupby(["strategy", *others], sort=False)
    for key, of in sorted(cells, key=lambda cell: tuple(sorting_key(part) for part in cell[0])):
        networks[", ".join(map(value_in_words, key))] = of
    networks["teacher"] = rows[rows["strategy"] == "teacher"]
    places, layers = list(dict.fromkeys(rows["on"])), list(dict.fromkeys(rows["layer"]))
    n_columns = min(len(places), PANELS)
    axs = panel_grid(fig, len(places), n_columns, 0.21 * len(networks) + 0.4)
    shift = 0.5 / len(layers)
    for ax, place in zip(axs, places, strict=True):
        for y, of in enumerate(networks.values()):
            for i, layer in enumerate(layers):
                here = of[(of["on"] == place) & (of["layer"] == layer)]
                values = 100 * here.drop_duplicates(["seed", "accuracy"])["accuracy"]
                colour, marker = OBJECTIVES[i % len(OBJECTIVES)]
                at = y + shift * (i - (len(layers) - 1) / 2)
                ax.plot(values, [at] * len(values), "o", ms=2, color=colour, alpha=0.5, mew=0)
                if len(values):
                    ax.plot(values.mean(), at, marker, ms=4.5, color=colour, mec="white", mew=0.6)
        name_rows(ax, list(networks), 0.6)
        ax.set_title("own data" if place == "own" else f"on {in_words(place)}")
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"test accuracy of a {in_words(probe)} probe (%)")
    marks = [
        mark("last layer" if layer == "features" else layer, color=colour, marker=marker,
                ms=4.5, mew=0)
        for layer, (colour, marker) in zip(layers, itertools.cycle(OBJECTIVES), strict=False)
    ]  # fmt: skip
    few = mark(f"one seed of {trained['seed'].nunique()}", color=GREY, marker="o", ms=2, mew=0)
    legend_in_rows(fig, [*marks, few])
    return fig


def diagnostics(fig: Figure, probes: pd.DataFrame) -> Figure:
    """Diagnostics of the features over optimiser steps, a panel for each. Dotted lines are values
    that theory gives features without structure, or the largest possible ones.

    Args:
        fig: An empty figure.
        probes: The axes of the study, `seed`, `step`, `on`, `layer`, `probe`, and the diagnostics;
            rows of the study's images and the last layer are drawn.

    Returns: `fig`.
    Raises: ValueError for missing columns or a table without such rows.
    """
    columns = [name for name, *_ in DIAGNOSTICS]
    needed = (*AXES, "seed", "step", "on", "layer", "probe", *columns)
    demand(probes, (*needed, "n_features", "rank_ratio", "uniformity_even"), "probes")
    last_layer = (probes["on"] == "own") & (probes["layer"] == "features")
    rows = probes[last_layer & ~probes["strategy"].isin(REFERENCES)]
    demand(rows, (), "probes")
    rows = rows[rows["probe"] == rows["probe"].iloc[0]]  # they are the same in every probe's row
    levels = {
        "effective_rank": rows["effective_rank"] / rows["rank_ratio"],
        "unit_variance": 1 / rows["n_features"],
        "uniformity": rows["uniformity_even"],
    }
    axs = fig.subplots(2, 3, sharex=True)
    for ax, (name, label, level, bound) in zip(axs.flat, DIAGNOSTICS, strict=True):
        _draw_cells(ax, rows, name, "strategy", scale=1)
        for height in sorted(set(levels[name].round(9)) if level is None else [level]):
            ax.axhline(height, color=BLACK, ls=(0, (1, 2)), lw=0.9, zorder=1)
        ax.set_xlim(0, max(1, rows["step"].max()))
        ax.set_title(f"{label}\n(dotted: {bound})", fontsize=TEXT_PT)
    for ax in axs[1]:
        ax.set_xlabel("optimiser steps")
    handles, _ = axs.flat[0].get_legend_handles_labels()
    title = f"{held_axes(rows, 'strategy')}; {name_of_spread(rows)}"
    n_rows = legend_in_rows(
        fig, handles, title=title, handlelength=3.5
    )  # long enough to tell dashes apart
    fig.set_figheight(4.0 + 0.2 * n_rows)
    return fig


def _draw_cells(
    ax: Axes, table: pd.DataFrame, value: str, by: str, scale: float = 100
) -> list[End]:
    """One line with a band for each cell, in % or times `scale`; returns where the lines end."""
    if by not in AXES:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(AXES)}")
    looks = line_looks(table[by].unique())
    ends = []
    others = varying_axes(table, by)
    cells = table.groupby([by, *others], sort=False)
    turns = dict.fromkeys(looks, 0)
    for key, runs in sorted(cells, key=lambda cell: tuple(sorting_key(part) for part in cell[0])):
        grid = runs.pivot(index="step", columns="seed", values=value)  # (steps, S)
        if grid.isna().any(axis=None):
            raise ValueError(
                f"{', '.join(map(str, key))}: the seeds {list(grid.columns)} were not all "
                "evaluated at the same steps; expected one row per seed and step"
            )
        colour, dash = looks[key[0]]
        if others:
            dash = DASHES[turns[key[0]] % len(DASHES)]
            turns[key[0]] += 1
        mean = scale * grid.mean(axis=1)
        label = ", ".join(value_in_words(value) for value in key)
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


def _finish_lines(ax: Axes, ends: Sequence[End]) -> None:
    """Freeze the limits (x from 0 to the last step, y inside [0, 100]) and name the lines."""
    ax.set_xlim(0, max((step for *_, step in ends if step is not None), default=1.0))
    ax.margins(y=0.04)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 0), min(high, 100))
    label_ends(ax, ends)


def learning_curves_by_student(fig: Figure, curves: pd.DataFrame, by: str = "strategy") -> Figure:
    """`learning_curves`, a panel for each student, with its name where there are several."""
    demand(curves, AXES, "curves")
    students = list(dict.fromkeys(curves["student"]))
    axs = panel_grid(fig, len(students), min(len(students), 2), 2.8, sharey=False)
    for ax, student in zip(axs, students, strict=True):
        learning_curves(ax, curves[curves["student"] == student], by)
        if len(students) > 1:
            ax.set_title(f"{in_words(student)}\n{ax.get_title(loc='left')}", fontsize=TEXT_PT)
    return fig
