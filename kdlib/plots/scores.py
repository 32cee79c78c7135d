"""Figures of scores: rank correlations, stability, detection of wrong labels."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kdlib.plots import theme
from kdlib.plots.layout import heat_map, mark, name_rows
from kdlib.plots.theme import BLACK, DASHES, GREY, TEXT_PT

MAX_DETECTORS = 8
RATES = ("false_positive_rate", "true_positive_rate", "recall", "precision")


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
    """How far two averages over different runs rank the examples alike, a row for each score and a
    mark for each number of runs in an average.

    Args:
        ax: The axis; about 0.25 in high for each score.
        table: Of one model: `score`, `n_runs` >= 1 (runs averaged on each side), `correlation`
            (mean over draws of disjoint groups of runs), `low`, `high` (range over the draws).

    Returns: `ax`, the score on which single runs agree best first; of more runs a larger mark, and
        below it.
    Raises: ValueError for missing columns or an empty table.
    """
    theme.demand(table, ("score", "n_runs", "correlation", "low", "high"), "stability")
    counts, looks = sorted(table["n_runs"].unique()), theme.line_looks(table["score"], "score")
    single = table[table["n_runs"] == counts[0]].sort_values("correlation", ascending=False)
    shift, order = 0.5 / len(counts), list(single["score"])
    for row in table[table["score"].isin(order)].to_dict("records"):
        place = counts.index(row["n_runs"])
        y = order.index(row["score"]) + shift * (place - (len(counts) - 1) / 2)
        colour, _, marker = looks[row["score"]]
        ax.plot([row["low"], row["high"]], [y, y], color=colour, lw=0.8)
        face = "white" if place == 0 and len(counts) > 1 else colour
        ax.plot(row["correlation"], y, marker, ms=3.5 + 1.2 * place, color=colour, mfc=face)
    name_rows(ax, [theme.in_words(score) for score in order], 0.6)
    ax.set_xlim(np.floor(10 * min(table["low"].min(), 0.9)) / 10, 1.005)
    ax.set_xlabel("Spearman correlation ρ of two averages over different runs")
    ax.set_title("mark: mean over draws of runs; line: their range", fontsize=TEXT_PT)
    handles = [
        mark(
            f"{n} run{'s' if n > 1 else ''} in each average", marker="o", color=BLACK,
            ms=3.5 + 1.2 * i, mfc="white" if i == 0 and len(counts) > 1 else BLACK,
        )
        for i, n in enumerate(counts)
    ]  # fmt: skip
    ax.legend(handles=handles, loc="upper left")
    return ax


def detectors(
    fig: Figure,
    curves: pd.DataFrame,
    summary: pd.DataFrame,
    over_epochs: pd.DataFrame,
    noise_rate: float,
    el2n_epoch: int | None = None,
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
        el2n_epoch: Epoch of EL2N in `curves` and `summary`, for the legend; over the epochs it is
            that of each epoch alone.

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
    looks = theme.line_looks(summary["detector"], "score")
    black = cycle(DASHES[1:])
    for row in summary.to_dict("records"):
        colour, dash, marker = looks[row["detector"]]
        if str(row["detector"]).startswith("cleanlab"):
            colour, dash = BLACK, next(black)
        look = {"color": colour, "ls": dash, "lw": 1.1}
        of_detector = curves[curves["detector"] == row["detector"]]
        line = of_detector[[*RATES[:2]]].dropna()
        roc.plot(line[RATES[0]], line[RATES[1]], **look)
        line = of_detector[[*RATES[2:]]].dropna()
        line = line[line["recall"] > 0]  # with nothing found the precision is 0 or undefined
        precision.plot(line["recall"], line["precision"], **look)
        areas = f"({row['auroc']:.3f}, {row['average_precision']:.3f})"
        epoch = f" of epoch {el2n_epoch}" if el2n_epoch and row["detector"] == "el2n" else ""
        look["label"] = f"{theme.in_words(row['detector'])}{epoch} {areas}"
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
    if el2n_epoch and "el2n" in set(over_epochs["detector"]):
        time.set_xlabel("epochs recorded\n(EL2N: of that epoch alone)")

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
