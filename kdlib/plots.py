"""The style of every figure of the lab, and the figures of runs: a function takes tables and an
axis (or a figure where several panels belong together), draws, and returns it.

Accuracies are drawn in %, their differences in percentage points. Colours are those of Okabe and
Ito, safe for colour-blind readers, and each has a second cue: a marker, a dash or a label. Leaves
to others: every number drawn, and the figures of datamaps and scores (maps).

Sources:
    [OkabeIto2008] Okabe, Ito. Color Universal Design. 2008. https://jfly.uni-koeln.de/color/.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from matplotlib.ticker import NullLocator

from kdlib.files import nearest, write_atomic

NARROW, WIDE = 3.25, 6.75  # inches: one column, two columns
TEXT_PT = 7  # the smallest text at print size
DPI = 300  # of the PNG and of what is rasterised inside the PDF

BLACK, GREY = "#000000", "#767676"
ORANGE, SKY, GREEN = "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
DASHES = (
    "-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (5, 1.5, 1.5, 1.5)), (0, (4, 1, 1, 1, 1, 1)),
    (0, (10, 1.5)),
)  # fmt: skip
OBJECTIVES = ((BLUE, "o"), (ORANGE, "D"), (GREEN, "s"), (PURPLE, "^"))  # colour, marker

# The same strategy looks the same in every figure; those not named here share what is left.
STRATEGIES = {
    "full": (BLACK, DASHES[0]),
    "random": (GREY, DASHES[1]),
    "easy": (BLUE, DASHES[5]),
    "ambiguous": (ORANGE, DASHES[3]),
    "ambiguous_corner": (PURPLE, DASHES[4]),
    "hard": (VERMILLION, DASHES[2]),
}
OTHER_COLOURS = (SKY, GREEN, BLUE, VERMILLION, PURPLE)
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

VERDICTS = {
    "better": (BLUE, "^"),
    "worse": (VERMILLION, "v"),
    "equivalent": (GREEN, "s"),
    "inconclusive": (GREY, "o"),
}
REGIONS = {"easy": "easy-to-learn", "ambiguous": "ambiguous", "hard": "hard-to-learn"}
# Yellow, the bright end of viridis, is lost on white paper.
_VIRIDIS = mpl.colormaps["viridis"](np.linspace(0, 0.93, 256))
CORRECTNESS = LinearSegmentedColormap.from_list("correctness", _VIRIDIS, N=10)

WORDS = {
    "full": "full set", "kd": "KD", "knn": "k-NN", "aum": "AUM", "el2n": "EL2N", "tdds": "TDDS",
    "dual": "DUAL", "dyn_unc": "Dyn-Unc", "grand": "GraNd", "grand_last": "GraNd (last layer)",
    "ccs": "CCS", "d2": "D2", "dual_beta": "DUAL (beta)", "k_center": "k-center",
    "random_balanced": "random (balanced)", "correctness_half": "correctness (p > 1/2)",
    "forgetting_unlearned_last": "forgetting (unlearned = E)", "aum_softmax": "AUM (softmax)",
    "aum_softmax_last": "AUM (softmax, last)", "entropy_last": "entropy (last)",
    "el2n_first_ten": "EL2N (sum of ten)",
    "dyn_unc_but_last": "Dyn-Unc (but last)", "tdds_absolute": "TDDS (absolute)",
    "tdds_still_window": "TDDS (still window)",
}  # fmt: skip
AXES = ("student", "strategy", "fraction", "objective")

MEASURED = {  # column of results -> what it is called on an axis
    "test_accuracy": "test accuracy at the last step",
    "linear_accuracy": "linear probe's test accuracy",
    "knn_accuracy": "k-NN probe's test accuracy",
}
TALL = 9.2  # inches: what a page leaves a figure
PANELS = 3  # beside each other
BESIDE_LABEL = 40  # points that a mark and the gaps around it take in a legend

RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": TEXT_PT,
    "ytick.labelsize": TEXT_PT,
    "legend.fontsize": TEXT_PT,
    "legend.title_fontsize": TEXT_PT,
    "figure.titlesize": 8,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,  # on the screen
    "savefig.dpi": DPI,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.titlelocation": "left",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
    "svg.hashsalt": "kdlib",
}
# Dates and versions would make an unchanged figure a changed file.
METADATA = {
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The lab's matplotlib settings while the block runs, whatever the user's own are."""
    with matplotlib.style.context(RC, after_reset=True):
        yield


def save_figure(fig: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write `<name>.pdf` and `<name>.png` (300 dpi) at the figure's own size, each atomically.

    The files carry no date and no version: the same figure gives the same bytes.

    Args:
        fig: The figure.
        folder: Where to; made when it is not there.
        name: File name without its ending.

    Returns: The paths of the PDF and the PNG.
    """
    paths = []
    with style():
        for kind, metadata in METADATA.items():
            # Constrained layout starts from the last layout; bytes are equal from an equal start.
            for ax in fig.axes:
                if ax.get_subplotspec() is not None:
                    ax.set_subplotspec(ax.get_subplotspec())
            paths.append(
                write_atomic(
                    Path(folder) / f"{name}.{kind}",
                    lambda file, kind=kind, metadata=metadata: fig.savefig(
                        file, format=kind, dpi=DPI, metadata=metadata
                    ),
                )
            )
    return tuple(paths)


def in_words(name: str) -> str:
    """The name of a strategy, objective or probe as a reader wants it.

    >>> in_words("ambiguous_corner"), in_words("forgetting_events_top"), in_words("full")
    ('ambiguous (corner)', 'forgetting events (top)', 'full set')
    """
    stem, _, end = name.rpartition("_")
    if stem and end in ("top", "bottom", "corner"):
        return f"{in_words(stem)} ({end})"
    if stem == "few_shot":
        return f"{end}-shot"
    return WORDS.get(name, name.replace("_", " "))


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
    ax.set_title(f"{_held(curves, by)}; {_seeds(curves)}", fontsize=TEXT_PT)
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
        on: On which data set; `own` is the study's.
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
        # The teacher is the same for all students; an untrained student is its own reference.
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
    told = [f"{in_words(probe)} probe", _held(trained, "strategy")]
    told += [f"on {on}"] * (on != "own") + [layer] * (layer != "features")
    held = ", ".join(told)
    ax.set_title(f"{held}; {_seeds(trained)}", fontsize=TEXT_PT)
    _finish_lines(ax, ends)
    return ax


def probe_places(fig: Figure, probes: pd.DataFrame, probe: str = "linear") -> Figure:
    """What the features of every layer know of every data set, a panel for each set: those of the
    last step, between the untrained student's and the teacher's.

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
    others = _varying(trained, "strategy")
    networks = {}  # what it is called -> its rows
    for (student,), of in rows[rows["strategy"] == "untrained"].groupby(["student"], sort=False):
        several = rows["student"].nunique() > 1
        networks[f"untrained, {in_words(student)}" if several else "untrained"] = of
    cells = trained.groupby(["strategy", *others], sort=False)
    for key, of in sorted(cells, key=lambda cell: tuple(_rank(part) for part in cell[0])):
        networks[", ".join(map(_told, key))] = of
    networks["teacher"] = rows[rows["strategy"] == "teacher"]
    places, layers = list(dict.fromkeys(rows["on"])), list(dict.fromkeys(rows["layer"]))
    n_columns = min(len(places), PANELS)
    axs = _grid(fig, len(places), n_columns, 0.21 * len(networks) + 0.4)
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
        _name_rows(ax, list(networks), 0.6)
        ax.set_title("own data" if place == "own" else f"on {in_words(place)}")
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"test accuracy of a {in_words(probe)} probe (%)")
    marks = [
        _handle("last layer" if layer == "features" else layer, color=colour, marker=marker,
                ms=4.5, mew=0)
        for layer, (colour, marker) in zip(layers, itertools.cycle(OBJECTIVES), strict=False)
    ]  # fmt: skip
    few = _handle(f"one seed of {trained['seed'].nunique()}", color=GREY, marker="o", ms=2, mew=0)
    _legend_in_rows(fig, [*marks, few])
    return fig


def diagnostics(fig: Figure, probes: pd.DataFrame) -> Figure:
    """The shape of the features over optimiser steps, a panel for each diagnostic, with what theory
    says of features without structure, or the most there can be.

    Args:
        fig: An empty figure.
        probes: The axes of the study, `seed`, `step`, `on`, `layer`, `probe`, and the diagnostics;
            rows of the study's own data and the last layer are drawn.

    Returns: `fig`.
    Raises: ValueError for missing columns or a table without such rows.
    """
    columns = [name for name, *_ in DIAGNOSTICS]
    needed = (*AXES, "seed", "step", "on", "layer", "probe", *columns)
    demand(probes, (*needed, "n_features", "rank_ratio", "uniformity_even"), "probes")
    own = (probes["on"] == "own") & (probes["layer"] == "features")
    rows = probes[own & ~probes["strategy"].isin(REFERENCES)]
    demand(rows, (), "probes")
    rows = rows[rows["probe"] == rows["probe"].iloc[0]]  # they are the same in every probe's row
    levels = {
        "effective_rank": rows["effective_rank"] / rows["rank_ratio"],
        "unit_variance": 1 / rows["n_features"],
        "uniformity": rows["uniformity_even"],
    }
    axs = fig.subplots(2, 3, sharex=True)
    for ax, (name, label, level, told) in zip(axs.flat, DIAGNOSTICS, strict=True):
        _draw_cells(ax, rows, name, "strategy", scale=1)
        for height in sorted(set(levels[name].round(9)) if level is None else [level]):
            ax.axhline(height, color=BLACK, ls=(0, (1, 2)), lw=0.9, zorder=1)
        ax.set_xlim(0, max(1, rows["step"].max()))
        ax.set_title(f"{label}\n(dotted: {told})", fontsize=TEXT_PT)
    for ax in axs[1]:
        ax.set_xlabel("optimiser steps")
    handles, _ = axs.flat[0].get_legend_handles_labels()
    title = f"{_held(rows, 'strategy')}; {_seeds(rows)}"
    n_rows = _legend_in_rows(fig, handles, title=title, handlelength=3.5)  # dashes are told apart
    fig.set_figheight(4.0 + 0.2 * n_rows)
    return fig


# The end of a line: height in %, label, colour, and last step (None: it runs over the whole axis).
End = tuple[float, str, str, float | None]


def _draw_cells(
    ax: Axes, table: pd.DataFrame, value: str, by: str, scale: float = 100
) -> list[End]:
    """One line with a band for each cell, in % or times `scale`; returns where the lines end."""
    if by not in AXES:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(AXES)}")
    looks = line_looks(table[by].unique())
    ends = []
    others = _varying(table, by)
    cells = table.groupby([by, *others], sort=False)
    turns = dict.fromkeys(looks, 0)
    for key, runs in sorted(cells, key=lambda cell: tuple(_rank(part) for part in cell[0])):
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
        label = ", ".join(_told(value) for value in key)
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


def label_ends(ax: Axes, ends: Sequence[End]) -> None:
    """Write each label at the right of the axis, level with its line unless another label is there.

    Args:
        ax: The axis, its limits final.
        ends: For each line its last height, label, colour and last x (None: the end of the axis).
    """
    (first, last), (low, high) = ax.get_xlim(), ax.get_ylim()
    height_pt = 72 * ax.get_window_extent().height / ax.figure.dpi
    ends = sorted(ends, key=lambda end: end[0])
    levels = [(end[0] - low) / (high - low) for end in ends]
    for (_, label, colour, step), level, place in zip(
        ends, levels, spread(levels, 1.35 * TEXT_PT / height_pt), strict=True
    ):
        start = 1.0 if step is None else (step - first) / (last - first)
        leader = {"color": colour, "lw": 0.7, "clip_on": False, "transform": ax.transAxes}
        leader |= {"scalex": False, "scaley": False}
        if start < 0.98:  # a way to the label that is not taken for a part of the line
            ax.plot([start, 1.0], [level, level], ls=(0, (0.6, 2.4)), **leader)
        ax.plot([1.0, 1.02, 1.05], [level, place, place], **leader)
        ax.text(1.06, place, label, transform=ax.transAxes, va="center_baseline", fontsize=TEXT_PT)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Places for labels in [0, 1], at least `gap` apart and as near to their heights as squares
    allow.

    Args:
        heights: Wanted places, ascending.
        gap: Smallest distance of neighbours; labels that need more room than [0, 1] start at 0.

    Returns: Places, ascending, one per height.

    >>> spread([0.2, 0.5, 0.5], gap=0.1)
    [0.2, 0.45, 0.55]
    """
    blocks: list[list[float]] = []  # pool adjacent violators on what is left without the gaps
    for i, height in enumerate(heights):
        blocks.append([height - i * gap])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    top = max(0.0, 1 - (len(heights) - 1) * gap)
    free = [min(max(float(np.mean(block)), 0.0), top) for block in blocks for _ in block]
    return [round(place + i * gap, 6) for i, place in enumerate(free)]


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
    strategies = sorted(set(subsets["strategy"]), key=_rank)
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
    axs = _grid(fig, len(panels), n_columns, row_in)
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
                values = 100 * _of_cell(subsets, cell)[measure]
                row = y + offsets[k]
                below = row + 0.25 / len(objectives)  # where the mean does not cover the seeds
                ax.plot(values, [below] * len(values), "o", ms=2.6, color=colour, alpha=0.6, mew=0)
                if len(values):
                    ax.plot(
                        values.mean(), row, marker, ms=5.5, color=colour, mec="white", mew=0.7,
                        zorder=4,
                    )  # fmt: skip
                for verdict in _of_cell(comparison, cell)["verdict"]:
                    _verdict_mark(ax, 1.035, row, verdict, transform=ax.get_yaxis_transform())
        _name_rows(ax, [in_words(name) for name in strategies], 0.5)
        title = f"{_percent(fraction)} of the data"
        ax.set_title(f"{in_words(student)}, {title}" if len(students) > 1 else title)
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"{MEASURED[measure]} (%)")
    _legend_in_rows(fig, _objective_handles(objectives, full), _verdict_handles(baseline))
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
    axs = _grid(fig, len(subsets), n_columns, 0.21 * len(objectives) + 0.4)
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
        _name_rows(ax, [in_words(name) for name in objectives], 0.6)
        title = in_words(strategy)
        title += "" if strategy == "full" else f", {_percent(fraction)} of the data"
        ax.set_title(f"{in_words(student)}, {title}" if several else title)
    for ax in axs[-n_columns:]:
        ax.set_xlabel(f"{MEASURED[measure]} (%)")
    n_seeds = results["seed"].nunique()
    marks = [
        _handle(f"mean of {n_seeds} seeds", color=BLUE, marker="o", ms=5.5, mew=0),
        _handle("one seed", color=BLUE, marker="o", ms=2.6, mew=0),
        _handle(f"{in_words(objectives[0])}: mean", color=GREY, ls=DASHES[1], lw=1),
    ]
    _legend_in_rows(fig, marks)
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
    strategies = sorted(set(results["strategy"]) - {"full"}, key=_rank)
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
    axs = _grid(fig, len(panels), min(len(panels), 2), max(2.6, 0.5 + 0.14 * n_lines), sharey=False)
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
        ax.set_title(f"{', '.join(told)}; {_seeds(of_student)}", fontsize=TEXT_PT)
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


def learning_curves_by_student(fig: Figure, curves: pd.DataFrame, by: str = "strategy") -> Figure:
    """`learning_curves`, a panel for each student, with its name where there are several."""
    demand(curves, AXES, "curves")
    students = list(dict.fromkeys(curves["student"]))
    axs = _grid(fig, len(students), min(len(students), 2), 2.8, sharey=False)
    for ax, student in zip(axs, students, strict=True):
        learning_curves(ax, curves[curves["student"] == student], by)
        if len(students) > 1:
            ax.set_title(f"{in_words(student)}\n{ax.get_title(loc='left')}", fontsize=TEXT_PT)
    return fig


def _grid(
    fig: Figure, n_panels: int, n_columns: int, row_in: float, sharey: bool = True
) -> list[Axes]:
    """Panels row by row, at most so many beside each other, in a figure as high as they need."""
    n_rows = -(-n_panels // n_columns)
    fig.set_figheight(min(n_rows * row_in + 0.75, TALL))
    axs = fig.subplots(n_rows, n_columns, sharey=sharey, squeeze=False).ravel()
    for ax in axs[n_panels:]:
        ax.remove()
    return list(axs[:n_panels])


def _name_rows(ax: Axes, names: Sequence[str], below: float) -> None:
    """Rows from top to bottom with their names, and light lines to read values by."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 1 + below, -below)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", lw=0.5)
    ax.set_axisbelow(True)


def _objective_handles(objectives: Sequence[str], full: pd.DataFrame) -> list[Line2D]:
    handles = []
    for (colour, marker), dash, name in zip(OBJECTIVES, DASHES, objectives, strict=False):
        mean = _handle(f"{in_words(name)}: mean", color=colour, marker=marker, ms=5.5, mew=0)
        handles.append(mean)
        if name in set(full["objective"]):
            handles.append(_handle(f"{in_words(name)}: full set", color=colour, ls=dash, lw=1))
    return [*handles, _handle("one seed", color=GREY, marker="o", ms=2.6, mew=0)]


def _verdict_handles(baseline: str | None) -> list[Line2D]:
    heading = [] if baseline is None else [_handle(f"against {in_words(baseline)}:")]
    marks = [
        _handle(name, color=colour, marker=marker, ms=4.5, mfc=_face(name))
        for name, (colour, marker) in VERDICTS.items()
    ]
    return heading + marks


def _handle(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **{"ls": "none", **look})


def _face(verdict: str) -> str:
    """Open markers say that nothing is settled, in grey print as well."""
    return "white" if verdict == "inconclusive" else VERDICTS[verdict][0]


def _legend_in_rows(fig: Figure, *rows: Sequence[Line2D], **more: Any) -> int:
    """One legend below the panels, each group of handles a row, or more where it is too wide;
    returns how many rows it has."""
    n = _most_columns(rows)
    rows = [row[i : i + n] for row in rows for i in range(0, len(row), n)]
    padded = [[*row, *[_handle("")] * (n - len(row))] for row in rows]
    handles = [handle for column in zip(*padded, strict=True) for handle in column]
    fig.legend(
        handles=handles, loc="outside lower center", ncols=n, columnspacing=1, handletextpad=0.5,
        **more,
    )  # fmt: skip
    return len(rows)


def _most_columns(rows: Sequence[Sequence[Any]]) -> int:
    """In how many columns a legend of these rows, wrapped, fits into a wide figure."""
    for n in range(max(map(len, rows)), 1, -1):
        widths = np.zeros(n)
        for row in rows:
            for i, handle in enumerate(row):
                widths[i % n] = max(widths[i % n], _width_pt(handle.get_label()))
        if widths.sum() + n * BESIDE_LABEL < 72 * WIDE:
            return n
    return 1


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
        rank=comparison["strategy"].map(_rank),
    ).sort_values(["rank", "student", "shown", "objective"], ascending=[True, True, False, True])
    naming = [a for a in ("shown", "objective", "student") if rows[a].nunique() > 1]
    y, places, labels, groups = 0.0, [], [], {}
    for strategy, group in rows.groupby("strategy", sort=False):
        groups[strategy] = (y - 0.5, y + len(group) - 0.5)
        for row in group.to_dict("records"):
            places.append(y)
            label = ", ".join(_told(row[a]) for a in naming)
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
    pad = max(map(_width_pt, labels)) + 12  # strategies stand left of the row labels
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
        _handle(f"{100 * level:g} % interval", color=BLACK, ls="-", lw=0.8),
        _handle("90 %", color=BLACK, ls="-", lw=2.2),
    ]


def _subtraction(comparison: pd.DataFrame) -> tuple[str, str]:
    """What is subtracted from what (strategies, or objectives on the same subset), and what is the
    same in all rows."""
    if (comparison["against_strategy"] != comparison["strategy"]).any():
        words = f"strategy minus {_one_of(comparison['against_strategy'])}"
        return words, _held(comparison, "strategy")
    several = comparison["objective"].nunique() > 2
    what = "objective" if several else _one_of(comparison["objective"])
    words = f"{what} minus {_one_of(comparison['against_objective'])}"
    return words, _held(comparison, "objective")


def _one_of(names: pd.Series) -> str:
    return " or ".join(in_words(name) for name in names.unique())


def region_grid(
    fig: Figure, images: Mapping[str, np.ndarray], titles: Mapping[str, Sequence[str]]
) -> Figure:
    """Rows of images, a region (or class) each, as they are: no smoothing, no stretching.

    Args:
        fig: An empty figure; its height is lowered to what the rows need.
        images: Row name -> uint8 (n, C, H, W) in [0, 255], C = 1 or 3; rows may differ in n.
        titles: Row name -> n captions; one too wide for its image is cut with an ellipsis.

    Returns: `fig`, with one axis.
    Raises: ValueError for no images, another dtype or shape, or captions that do not match.
    """
    if not images or max(map(len, images.values())) == 0:
        raise ValueError(f"no images to draw in rows {list(images)}; expected at least one")
    for name, pixels in images.items():
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"images of {name!r} are {pixels.dtype} of shape {pixels.shape}; expected uint8 "
                "(n, C, H, W) with C = 1 or 3"
            )
        if len(titles.get(name, ())) != len(pixels):
            raise ValueError(
                f"{name!r} has {len(pixels)} images and {len(titles.get(name, ()))} captions; "
                "expected one caption per image"
            )
    names = {name: REGIONS.get(name, in_words(name)) for name in images}
    left = max(_width_pt(name, RC["font.size"]) for name in names.values()) + 10
    step_x = (72 * fig.get_figwidth() - left - 2) / max(map(len, images.values()))
    step_y = 72 * fig.get_figheight() / len(images)
    below = 2 * TEXT_PT  # room for the caption and the gap to the next row
    # Points per pixel: one scale for all, so that sizes compare.
    scale = min(
        min(0.9 * step_x / pixels.shape[3], (step_y - below) / pixels.shape[2])
        for pixels in images.values()
    )
    if scale <= 0:
        raise ValueError(
            f"{len(images)} rows do not fit into a height of {fig.get_figheight():g} in; "
            f"expected more than {below / 72:.2f} in a row"
        )
    step_y = min(step_y, scale * max(pixels.shape[2] for pixels in images.values()) + below)
    width, height = 72 * fig.get_figwidth(), step_y * len(images)
    fig.set_layout_engine("none")
    fig.set_figheight(height / 72)
    ax = fig.add_axes((0, 0, 1, 1))  # data units are points, so that text and images fit
    for i, (name, pixels) in enumerate(images.items()):
        top = i * step_y + 2
        half_x, half_y = scale * pixels.shape[3] / 2, scale * pixels.shape[2] / 2
        ax.text(left - 6, top + half_y, names[name], ha="right", va="center")
        for j, (image, title) in enumerate(zip(pixels, titles[name], strict=True)):
            x, bottom = left + (j + 0.5) * step_x, top + 2 * half_y
            ax.imshow(
                image[0] if len(image) == 1 else image.transpose(1, 2, 0),  # (C, H, W) -> (H, W, C)
                cmap="gray", vmin=0, vmax=255, interpolation="nearest",
                extent=(x - half_x, x + half_x, bottom, top),
            )  # fmt: skip
            ax.text(
                x, bottom + 1, _fitted(title, step_x - 2), ha="center", va="top", fontsize=TEXT_PT
            )
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig


def shard_visits(fig: Figure, visits: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """How often each shard was read under several policies: one panel each, on the same scales.

    Args:
        fig: An empty figure.
        visits: Policy -> (shards,) mean visits per example, >= 0; as many shards in each.
        title: Above all panels.

    Returns: `fig`. Each panel says what share of all samples the last third of the shards supplied.
    Raises: ValueError for no policies, or for policies over different numbers of shards.
    """
    sizes = {len(counts) for counts in visits.values()}
    if len(sizes) != 1:
        raise ValueError(f"policies have {sorted(sizes)} shards; expected one number for all")
    axs = fig.subplots(len(visits), 1, sharex=True, sharey=True)
    for ax, (policy, counts) in zip(np.atleast_1d(axs), visits.items(), strict=True):
        ax.bar(np.arange(len(counts)), counts, width=1.0, color=BLUE, linewidth=0)
        late = counts[-(len(counts) // 3) :].sum() / counts.sum()
        never = int((counts == 0).sum())
        told = f"{policy}: {late:.1%} of the samples from the last third of the shards"
        ax.set_title(told + (f", {never} shards never read" if never else ""), fontsize=TEXT_PT)
        ax.margins(x=0.01)
    fig.supxlabel("shard", fontsize=RC["axes.labelsize"])
    fig.supylabel("mean visits per image", fontsize=RC["axes.labelsize"])
    if title:
        fig.suptitle(title)
    return fig


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
        _handle("with the defect", marker="X", color=VERMILLION, linestyle=""),
        _handle("without", marker="o", color=BLUE, linestyle=""),
    ]
    ax.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, columnspacing=0.8,
        handletextpad=0.2, borderaxespad=0.1, borderpad=0.1,
    )  # fmt: skip
    note("tripwire", 1, top, (65, 2), ha="left", va="bottom", fontweight="bold")
    note(title, 0, top, (-7, 2), ha="right", va="bottom", fontweight="bold")
    return ax


def _fitted(text: str, width_pt: float) -> str:
    """The text, or as much of its beginning as fits, and an ellipsis."""
    text = text.replace("_", " ")
    if _width_pt(text) <= width_pt:
        return text
    while text and _width_pt(text + "…") > width_pt:
        text = text[:-1].rstrip()
    return text + "…"


@functools.lru_cache(maxsize=4096)
def _width_pt(text: str, size: float = TEXT_PT) -> float:
    """Width of a line of text in points, before anything is drawn."""
    if not text.strip():
        return 0.0
    return (
        TextPath((0, 0), text, size=size, prop=FontProperties(RC["font.family"])).get_extents().x1
    )


def line_looks(names: Iterable[Any]) -> dict[Any, tuple[str, Any]]:
    """Colour and dash of each name, in the order of `_rank`; numbers go from dark to light."""
    names = sorted(names, key=_rank)
    if not any(isinstance(name, str) for name in names):
        colours = CORRECTNESS(np.linspace(0, 1, len(names)))
        return {n: (c, DASHES[i % 6]) for i, (n, c) in enumerate(zip(names, colours, strict=True))}
    # 5 colours and 6 dashes have no common divisor: 30 different pairs.
    pairs = [(OTHER_COLOURS[i % 5], DASHES[i % 6]) for i in range(30)]
    free = [pair for pair in pairs if pair not in STRATEGIES.values()]
    others = [name for name in names if name not in STRATEGIES]
    if len(others) > len(free):
        raise ValueError(f"{len(others)} kinds of line; expected at most {len(free)}: draw some")
    return {**STRATEGIES, **dict(zip(others, free, strict=False))}


def _rank(name: Any) -> tuple:
    """Sorting key: the full set and the regions first, the top of a score before its bottom."""
    if not isinstance(name, str):
        return (0, name)
    known = list(STRATEGIES)
    if name in known:
        return (known.index(name), "", False)
    stem, _, end = name.rpartition("_")
    return (len(known), stem if end in ("top", "bottom") else name, end == "bottom")


def _varying(table: pd.DataFrame, by: str) -> list[str]:
    """The axes besides `by` that tell cells apart; that the full set has a fraction of its own does
    not count."""
    subsets = table[table["strategy"] != "full"]
    counted = {a: (subsets if a == "fraction" else table)[a].nunique() for a in AXES}
    return [axis for axis in AXES if axis != by and counted[axis] > 1]


def _held(table: pd.DataFrame, by: str) -> str:
    """What all cells have in common, for the title: fraction and objective where they are held."""
    subsets = table[table["strategy"] != "full"]
    told = []
    for axis, rows in (("objective", table), ("fraction", subsets if len(subsets) else table)):
        if axis != by and rows[axis].nunique() == 1:
            told.append(_told(rows[axis].iloc[0]))
            told[-1] += " of the data" if axis == "fraction" else ""
    return ", ".join(told)


def _seeds(table: pd.DataFrame) -> str:
    """The name of the spread that is drawn."""
    counts = table.groupby(list(AXES))["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    if most == 1:
        return "one seed"
    return f"mean ± s.d., S = {most}" if fewest == most else f"mean ± s.d., S = {fewest} to {most}"


def _told(value: Any) -> str:
    return in_words(value) if isinstance(value, str) else _percent(value)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def _of_cell(table: pd.DataFrame, cell: tuple[str, str, float, str]) -> pd.DataFrame:
    return table[(table[list(AXES)] == list(cell)).all(axis=1)]


def demand(table: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """Refuse a table without rows, or without one of the columns; the error names what lacks."""
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"the table `{what}` lacks the columns {missing}; got {list(table.columns)}"
        )
    if table.empty:
        raise ValueError(f"the table `{what}` has no rows; there is nothing to draw")
