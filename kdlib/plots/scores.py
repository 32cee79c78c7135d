"""Figures of scores: rank correlations, stability, detection of wrong labels."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.plots import theme
from kdlib.plots.layout import heat_map, label_ends
from kdlib.plots.theme import BLACK, BLUE, DASHES, GREY, TEXT_PT

MAX_DETECTORS = 8
RATES = ("false_positive_rate", "true_positive_rate", "recall", "precision")

DETECTORS = (
    (BLUE, "o"), (theme.ORANGE, "D"), (theme.GREEN, "s"), (theme.VERMILLION, "^"),
    (theme.PURPLE, "v"), (theme.SKY, "P"), (GREY, "X"), (BLUE, "*"),
)  # fmt: skip


def rank_correlations(
    ax: Axes, matrix: pd.DataFrame, groups: Mapping[str, Sequence[str]] | None = None
) -> Axes:
    """Heat map of Spearman correlations between scores, the half below the diagonal.

    Args:
        ax: The axis; about 0.3 in high and wide for each score, and its names.
        matrix: Correlations in [-1, 1], NaN where there is none; index = columns = score names, two
            or more. Only what stands below the diagonal is read, after the order of `groups`.
        groups: Group name -> its scores, every score in one group: the order of rows and columns.
            Lines part the groups, their names stand at their first row.

    Returns: `ax`. Up to 20 scores the correlations are written into the cells, of more the minus
        sign of those below -0.05.
    """
    names = list(matrix.columns)
    if groups is not None:
        names = [name for group in groups.values() for name in group]
    values, n = matrix.loc[names, names].to_numpy(float), len(names)
    below = np.tril(np.ones((n, n), bool), -1)
    texts = np.full(n * n, "", object)
    for cell in np.flatnonzero(below):
        value = values.flat[cell]
        if n > 20:
            texts[cell] = "–" if value < -0.05 else ""
        else:
            texts[cell] = "none" if np.isnan(value) else f"{round(value, 2) + 0:.2f}"
    image = heat_map(ax, np.where(below, values, np.nan), "PuOr", -1, 1, texts)
    # The first row and the last column are empty.
    ax.set(xlim=(-0.5, n - 1.5), ylim=(n - 0.5, 0.5))
    words = [theme.in_words(name) for name in names]
    ax.set_xticks(range(n - 1), words[:-1], rotation=90)
    ax.set_yticks(range(1, n), words[1:])
    ax.set_aspect("auto")
    start = 0
    for group, scores in (groups or {}).items():
        ax.text(start - 0.4, start, group, va="center", fontweight="bold")
        if start:
            ax.plot([-0.5, start - 0.5], [start - 0.5] * 2, color=BLACK, lw=0.8)
            ax.plot([start - 0.5] * 2, [start - 0.5, n - 0.5], color=BLACK, lw=0.8)
        start += len(scores)
    place = ax.inset_axes((0.6, 1.03, 0.4, 0.025))
    colours = ax.figure.colorbar(image, cax=place, orientation="horizontal", ticks=(-1, 0, 1))
    colours.outline.set_visible(False)
    colours.set_label("Spearman correlation ρ")
    place.xaxis.set_label_position("top")
    return ax


def stability(ax: Axes, table: pd.DataFrame) -> Axes:
    """How far two averages over different runs rank the examples alike, over the runs in each.

    Args:
        ax: The axis.
        table: Of one model: `score`, `n_runs` >= 1 (runs averaged on each side), `correlation`
            (mean over draws of disjoint groups of runs), `low`, `high` (range over the draws).

    Returns: `ax`, a line for each score, named at its end, the ranges side by side as bars.
    Raises: ValueError for missing columns or an empty table.
    """
    theme.demand(table, ("score", "n_runs", "correlation", "low", "high"), "stability")
    lines, ends = theme.line_looks(table["score"].unique()), []
    scores = list(dict.fromkeys(table["score"]))
    shifts = (np.arange(len(scores)) - (len(scores) - 1) / 2) * min(0.05, 0.4 / len(scores))
    for score, shift in zip(scores, shifts, strict=True):
        rows = table[table["score"] == score].sort_values("n_runs")
        colour, dash = lines[score]
        x = rows["n_runs"] + shift  # ranges side by side
        ax.vlines(x, rows["low"], rows["high"], color=colour, lw=0.7, alpha=0.7)
        ax.plot(x, rows["correlation"], color=colour, ls=dash, marker="o", ms=2.8, label=score)
        ends.append(
            (float(rows["correlation"].iloc[-1]), theme.in_words(score), colour, float(x.iloc[-1]))
        )
    n_runs = table["n_runs"]
    pad = shifts[-1] + 0.03 * max(1, n_runs.max() - n_runs.min())
    ax.set_xlim(n_runs.min() - pad, n_runs.max() + pad)
    ax.set_ylim(np.floor(10 * min(table["low"].min(), 0.9)) / 10, 1)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="runs averaged", ylabel="Spearman correlation ρ\nof two disjoint averages")
    ax.set_title("mean and range over draws", fontsize=TEXT_PT)
    label_ends(ax, ends)
    return ax


def detectors(
    fig: Figure,
    curves: pd.DataFrame,
    summary: pd.DataFrame,
    over_epochs: pd.DataFrame,
    noise_rate: float,
) -> Figure:
    """How well scores find wrong labels: ROC, precision against recall, and AUROC over the epochs
    recorded.

    Args:
        fig: An empty figure; `WIDE` by about 3 in.
        curves: `detector`, `false_positive_rate`, `true_positive_rate`, `recall`, `precision`, in
            [0, 1], a row for each threshold, in their order; some hundred rows of each detector are
            enough. A NaN leaves a row out of one of the two curves.
        summary: `detector`, `auroc`, `average_precision`, one row each: the order of the legend.
        over_epochs: `detector`, `epoch`, `auroc`. A detector of the summary that is not in it (such
            as a cross-validated one) is drawn as a level.
        noise_rate: Fraction of wrong labels, in (0, 1): the precision of guessing.

    Returns: `fig`, three panels and a legend below. A detector whose name starts with `cleanlab` is
        black and dashed.
    Raises: ValueError for missing columns, empty tables, or more than `MAX_DETECTORS` detectors.
    """
    theme.demand(curves, ("detector", *RATES), "curves")
    theme.demand(summary, ("detector", "auroc", "average_precision"), "summary")
    theme.demand(over_epochs, ("detector", "epoch", "auroc"), "over_epochs")
    if len(summary) > MAX_DETECTORS:
        raise ValueError(
            f"the summary has {len(summary)} rows ({', '.join(summary['detector'])}); expected one "
            f"row for each of at most {MAX_DETECTORS} detectors: draw some of them"
        )
    roc, precision, time = fig.subplots(1, 3)
    coloured, black = zip(DETECTORS, cycle(DASHES)), cycle(DASHES[1:])
    for row in summary.to_dict("records"):
        is_reference = str(row["detector"]).startswith("cleanlab")
        (colour, marker), dash = ((BLACK, "."), next(black)) if is_reference else next(coloured)
        look = {"color": colour, "ls": dash, "lw": 1.1}
        of_detector = curves[curves["detector"] == row["detector"]]
        line = of_detector[[*RATES[:2]]].dropna()
        roc.plot(line[RATES[0]], line[RATES[1]], **look)
        line = of_detector[[*RATES[2:]]].dropna()
        line = line[line["recall"] > 0]  # with nothing found the precision is 0 or undefined
        precision.plot(line["recall"], line["precision"], **look)
        areas = f"({row['auroc']:.3f}, {row['average_precision']:.3f})"
        look["label"] = f"{theme.in_words(row['detector'])} {areas}"
        steps = over_epochs[over_epochs["detector"] == row["detector"]].sort_values("epoch")
        if steps.empty:
            time.axhline(row["auroc"], **look)
        else:
            every = max(1, len(steps) // 8)
            time.plot(steps["epoch"], steps["auroc"], marker=marker, ms=3, markevery=every, **look)
    _draw_guessing(roc, precision, time, noise_rate)
    roc.set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
    precision.set(xlabel="recall", ylabel="precision", title="precision and recall")
    time.set(xlabel="epochs recorded", ylabel="AUROC", title="AUROC over training")
    for ax in (roc, precision):
        ax.set(xlim=(0, 1), ylim=(0, 1.01), box_aspect=1)
    time.set_ylim(top=1.01)
    time.set_box_aspect(1)
    time.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
    fig.legend(
        *time.get_legend_handles_labels(), loc="outside lower center", ncols=3, handlelength=3,
        title="detector (AUROC, average precision)", columnspacing=1.5,
    )  # fmt: skip
    return fig


def _draw_guessing(roc: Axes, precision: Axes, time: Axes, noise_rate: float) -> None:
    """What a detector reaches that guesses."""
    look = {"color": GREY, "ls": DASHES[2], "lw": 0.8, "zorder": 0}
    roc.plot([0, 1], [0, 1], **look)
    time.axhline(0.5, **look)
    precision.axhline(noise_rate, **{**look, "ls": DASHES[1]})
    below = noise_rate > 0.1  # where no curve is, if there is room
    precision.annotate(
        f"base rate {100 * noise_rate:.3g} %", (1, noise_rate), (0, -2 if below else 2),
        textcoords="offset points", ha="right", va="top" if below else "bottom",
        fontsize=TEXT_PT, color=GREY,
    )  # fmt: skip
