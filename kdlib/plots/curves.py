"""Figures over the steps of training: learning curves, probes, the shape of features.

A function takes tables and an axis (or a figure where several panels belong together), draws, and
returns it.
"""

import itertools
import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from kdlib.plots import layout, theme
from kdlib.repro.files import nearest
from kdlib.study.evaluation import AXES, OWN

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
    """Validation accuracy over optimiser steps, training accuracy where no image was held out, or
    without labels the validation loss: mean and standard deviation over seeds.

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
    unlabelled = "validation_loss" in curves and "validation_accuracy" not in curves
    measured = "loss" if unlabelled else "accuracy"
    theme.demand(curves, (*AXES, "seed", "step", f"validation_{measured}"), "curves")
    which = "validation" if curves[f"validation_{measured}"].notna().any() else "train"
    name, unit = f"{which.replace('train', 'training')} {measured}", " (%)" * (measured != "loss")
    ends = _draw_cells(ax, curves, f"{which}_{measured}", by, scale=100 if unit else 1)
    ax.set(xlabel="optimiser steps", ylabel=f"{name}{unit}")
    ax.set_title(
        f"{theme.held_axes(curves, by)}; {theme.name_of_spread(curves)}", fontsize=theme.TEXT_PT
    )
    _finish_lines(ax, ends, 100 if unit else math.inf)
    return ax


def losses(fig: Figure, curves: pd.DataFrame, by: str = "strategy") -> Figure:
    """Training loss, validation loss and each term of the training loss over optimiser steps, a
    panel for each.

    Args:
        fig: An empty figure; its height is set to what the panels need.
        curves: The axes of the study, `seed`, `step`, `train_loss`, `validation_loss`, and
            `train_loss_<term>`, NaN of cells whose loss has no such term.
        by: The axis of the study that decides the colour.

    Returns: `fig`.
    Raises: ValueError as `learning_curves`.
    """
    theme.demand(curves, (*AXES, "seed", "step", "train_loss", "validation_loss"), "curves")
    terms = [name for name in curves if name.startswith("train_loss_")]
    drawn = {"train_loss": "training loss", "validation_loss": "validation loss"}
    drawn |= {
        name: theme.in_words(name.removeprefix("train_loss_")) + ", training" for name in terms
    }
    rows = {name: curves[curves[name].notna()] for name in drawn}
    drawn = {name: title for name, title in drawn.items() if len(rows[name])}
    axs = layout.panel_grid(fig, len(drawn), 2.1, 3, xlabel="optimiser steps", sharey=False)
    handles = {}
    for ax, (name, title) in zip(axs, drawn.items(), strict=True):
        _draw_cells(ax, rows[name], name, by, scale=1)
        ax.set_xlim(0, max(1, curves["step"].max()))
        ax.set_title(title, fontsize=theme.TEXT_PT)
        found, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, found, strict=True))
    title = f"{theme.held_axes(curves, by)}; {theme.name_of_spread(curves)}"
    layout.legend_in_rows(fig, list(handles.values()), title=title, handlelength=3.5)
    return fig


def probe_curves(
    ax: Axes, probes: pd.DataFrame, probe: str = "linear", on: str = OWN, layer: str = "features"
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
    theme.demand(probes, (*AXES, "seed", "step", "on", "layer", "probe", "accuracy"), "probes")
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
        networks = reference["student" if name == "untrained" else "strategy"]
        for student, group in reference.groupby(networks):
            level = 100 * group["accuracy"].mean()
            ax.axhline(level, color=theme.BLACK, ls=dash, lw=0.9, zorder=1)
            several = networks.nunique() > 1
            label = f"{name}, {theme.in_words(student)}" if several else name
            ends.append((level, label, theme.BLACK, None))
    ax.set(xlabel="optimiser steps", ylabel="test accuracy (%)")
    title = [f"{theme.in_words(probe)} probe", theme.held_axes(trained, "strategy")]
    title += [layer] * (layer != "features")
    title = f"{', '.join(title)}; {theme.name_of_spread(trained)}"
    title = title if on == OWN else f"on {theme.in_words(on)}\n{title}"
    ax.set_title(title, fontsize=theme.TEXT_PT)
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
    theme.demand(probes, (*AXES, "seed", "step", "on", "layer", "probe", "accuracy"), "probes")
    rows = probes[probes["probe"] == probe]
    theme.demand(rows, (), f"probes, {probe}")
    trained = rows[~rows["strategy"].isin(REFERENCES)]
    trained = trained[trained["step"] == trained.groupby(list(AXES))["step"].transform("max")]
    others = theme.varying_axes(trained, "strategy")
    networks = {}  # what it is called -> its rows
    for (student,), of in rows[rows["strategy"] == "untrained"].groupby(["student"], sort=False):
        several = rows["student"].nunique() > 1
        networks[f"untrained, {theme.in_words(student)}" if several else "untrained"] = of
    cells = trained.groupby(["strategy", *others], sort=False)
    for key, of in sorted(cells, key=lambda cell: theme.sorting_key(cell[0])):
        networks[", ".join(map(theme.value_in_words, key))] = of
    networks["teacher"] = rows[rows["strategy"] == "teacher"]
    places, layers = list(dict.fromkeys(rows["on"])), list(dict.fromkeys(rows["layer"]))
    xlabel = f"test accuracy of a {theme.in_words(probe)} probe (%)"
    axs = layout.panel_grid(fig, len(places), 0.21 * len(networks) + 0.4, xlabel=xlabel)
    shift = 0.5 / len(layers)
    for ax, place in zip(axs, places, strict=True):
        for y, of in enumerate(networks.values()):
            for i, layer in enumerate(layers):
                here = of[(of["on"] == place) & (of["layer"] == layer)]
                values = 100 * here.drop_duplicates(["seed", "accuracy"])["accuracy"]
                colour, marker = theme.OBJECTIVES[i % len(theme.OBJECTIVES)]
                at = y + shift * (i - (len(layers) - 1) / 2)
                ax.plot(values, [at] * len(values), "o", ms=2, color=colour, alpha=0.5, mew=0)
                if len(values):
                    ax.plot(values.mean(), at, marker, ms=4.5, color=colour, mec="white", mew=0.6)
        layout.name_rows(ax, list(networks), 0.6)
        ax.set_title("own data" if place == OWN else f"on {theme.in_words(place)}")
    marks = [
        layout.mark("last layer" if layer == "features" else layer, color=colour, marker=marker,
                ms=4.5, mew=0)
        for layer, (colour, marker) in zip(layers, itertools.cycle(theme.OBJECTIVES), strict=False)
    ]  # fmt: skip
    few = layout.mark(
        f"one seed of {trained['seed'].nunique()}", color=theme.GREY, marker="o", ms=2, mew=0
    )
    layout.legend_in_rows(fig, [*marks, few])
    return fig


def diagnostics(fig: Figure, probes: pd.DataFrame, on: str = OWN) -> Figure:
    """Diagnostics of the features over optimiser steps, a panel for each. Dotted lines are values
    that theory gives features without structure, or the largest possible ones.

    Args:
        fig: An empty figure.
        probes: The axes of the study, `seed`, `step`, `on`, `layer`, `probe`, and the diagnostics;
            rows of the last layer are drawn. On other images than the study's nothing is
            compared with the teacher.
        on: On which data set; `own` means the study's images.

    Returns: `fig`.
    Raises: ValueError for missing columns or a table without such rows.
    """
    columns = [name for name, *_ in DIAGNOSTICS]
    needed = (*AXES, "seed", "step", "on", "layer", "probe", *columns)
    theme.demand(probes, (*needed, "n_features", "rank_ratio", "uniformity_even"), "probes")
    last_layer = (probes["on"] == on) & (probes["layer"] == "features")
    rows = probes[last_layer & ~probes["strategy"].isin(REFERENCES)]
    theme.demand(rows, (), "probes")
    rows = rows[rows["probe"] == rows["probe"].iloc[0]]  # they are the same in every probe's row
    levels = {
        "effective_rank": rows["effective_rank"] / rows["rank_ratio"],
        "unit_variance": 1 / rows["n_features"],
        "uniformity": rows["uniformity_even"],
    }
    axs = fig.subplots(2, 3, sharex=True)
    for ax, (name, label, level, bound) in zip(axs.flat, DIAGNOSTICS, strict=True):
        if rows[name].isna().all():
            ax.set_axis_off()
            continue
        _draw_cells(ax, rows, name, "strategy", scale=1)
        for height in sorted(set(levels[name].round(9)) if level is None else [level]):
            ax.axhline(height, color=theme.BLACK, ls=(0, (1, 2)), lw=0.9, zorder=1)
        ax.set_xlim(0, max(1, rows["step"].max()))
        ax.set_title(f"{label}\n(dotted: {bound})", fontsize=theme.TEXT_PT)
    for ax in axs[1]:
        ax.set_xlabel("optimiser steps")
    handles, _ = axs.flat[0].get_legend_handles_labels()
    title = f"{theme.held_axes(rows, 'strategy')}; {theme.name_of_spread(rows)}"
    title = title if on == OWN else f"on {theme.in_words(on)}, {title}"
    # handles are long enough to tell dashes apart
    n_rows = layout.legend_in_rows(fig, handles, title=title, handlelength=3.5)
    fig.set_figheight(4.0 + 0.2 * n_rows)
    return fig


def _draw_cells(
    ax: Axes, table: pd.DataFrame, value: str, by: str, scale: float = 100
) -> list[layout.End]:
    """One line with a band for each cell, in % or times `scale`; returns where the lines end."""
    if by not in AXES:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(AXES)}")
    looks = theme.line_looks(table[by].unique())
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
        colour, dash = looks[key[0]]
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


def _finish_lines(ax: Axes, ends: Sequence[layout.End], most: float = 100) -> None:
    """Freeze the limits (x from 0 to the last step, y inside [0, most]) and name the lines."""
    ax.set_xlim(0, max((step for *_, step in ends if step is not None), default=1.0))
    ax.margins(y=0.04)
    low, high = ax.get_ylim()
    ax.set_ylim(max(low, 0), min(high, most))
    layout.label_ends(ax, ends)


def learning_curves_by_student(fig: Figure, curves: pd.DataFrame, by: str = "strategy") -> Figure:
    """`learning_curves`, a panel for each student, with its name where there are several."""
    theme.demand(curves, AXES, "curves")
    students = list(dict.fromkeys(curves["student"]))
    axs = layout.panel_grid(fig, len(students), 2.8, 2, sharey=False)
    for ax, student in zip(axs, students, strict=True):
        learning_curves(ax, curves[curves["student"] == student], by)
        if len(students) > 1:
            ax.set_title(
                f"{theme.in_words(student)}\n{ax.get_title(loc='left')}", fontsize=theme.TEXT_PT
            )
    return fig
