"""Figures of datamaps: a map, how it forms, map against map.

A function takes tables and an empty figure, draws, and returns it. Up to `DENSE` examples every one
is a point; of more, bins are drawn: the colour is the mean of the bin, the opacity the logarithm of
its count.

Sources:
    [Swayamdipta2020] Swayamdipta et al. Dataset Cartography. EMNLP 2020. arXiv 2009.10795.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kdlib.plots import theme
from kdlib.plots.layout import colour_bar, heat_map, thousands, three_ticks
from kdlib.plots.theme import BLACK, BLUE, CORRECTNESS, DASHES, GREY, REGIONS, TEXT_PT

DENSE = 30_000  # examples; above, points cover each other and bins are drawn
FAINTEST = 0.25  # opacity of a bin with one example
MAX_CLASSES = 20  # whose regions are drawn below a map
HIGHEST = {"confidence": 1.0, "variability": 0.5, "correctness": 1.0}  # all start at 0


def datamap(
    fig: Figure,
    table: pd.DataFrame,
    title: str,
    regions: str = "region_variability",
    class_names: Sequence[str] | None = None,
) -> Figure:
    """The map of a data set by training dynamics [Swayamdipta2020, fig. 1], every example a point
    (more than `DENSE`: every bin).

    Points end at the dotted line, which no example can cross: a variable in [0, 1] with mean c has
    a standard deviation of at most sqrt(c (1 - c)). The regions are named outside it.

    Args:
        fig: An empty figure; `WIDE` by about 4.5 in.
        table: The datamap: `confidence`, `variability`, `correctness` and the column `regions`.
        title: The line above: what it shows, and the number of examples N and of epochs E.
        regions: Column of region names, `region_variability` or `region_corner`.
        class_names: Of each label. With a column `label` in the table and at most `MAX_CLASSES`
            names, the share of each region in each class is drawn below, and `fig` grows by the
            height of that panel.

    Returns: `fig`; its axes are the map, the histograms of variability, confidence and
        correctness, the colour bar in fourth place, and the classes if they are drawn.
    Raises: ValueError for missing columns, an empty table, a score that is out of its range, an
        unknown region, or a label without a name.
    """
    x, y, colour = _scores(table, tuple(HIGHEST), "datamap", (regions,))
    codes = _regions(table[regions])
    by_class = class_names is not None and "label" in table and len(class_names) <= MAX_CLASSES
    height = fig.get_figheight()
    below = 0.6 + 0.15 * len(class_names) if by_class else 0
    fig.set_figheight(height + below)
    # Grids inside a grid: the long names of classes do not narrow the map.
    outer = fig.add_gridspec(1 + by_class, 1, height_ratios=(height, below)[: 1 + by_class])
    grid = outer[0].subgridspec(2, 4, width_ratios=(6, 1.1, 0.22, 1.1), height_ratios=(1, 5.5))
    ax = fig.add_subplot(grid[1, 0])
    above = fig.add_subplot(grid[0, 0], sharex=ax)
    right = fig.add_subplot(grid[1, 1], sharey=ax)
    bar = fig.add_subplot(grid[1, 2])
    far_right = fig.add_subplot(grid[1, 3])

    dense = _map(ax, x, y, colour, size=9)
    ax.text(
        0.5, 0.13, "largest variability\nat this confidence", ha="right", va="center",
        fontsize=TEXT_PT, color=GREY,
    )  # fmt: skip
    ax.set(xlabel="variability", ylabel="confidence")
    _name_regions(ax, x, y, codes)
    if dense:  # in the empty corner; the layout must not make room for it
        note = right.text(
            0, 1.05, f"density, N = {len(x):,}:\nthe stronger a colour,\nthe more examples\n"
            "(log scale)", transform=right.transAxes, va="bottom", fontsize=TEXT_PT,
        )  # fmt: skip
        note.set_in_layout(False)
    _draw_histograms((above, right, far_right), (x, y, colour))
    colour_bar(fig, bar)
    bar.yaxis.set_ticks_position("left")
    bar.yaxis.set_label_position("left")
    above.set_title(title)
    if by_class:
        _draw_classes(fig.add_subplot(outer[1]), table["label"], codes, class_names)
    return fig


def _draw_histograms(axs: Sequence[Axes], scores: Sequence[np.ndarray]) -> None:
    """Variability above the map, confidence and correctness right of it."""
    (above, right, far_right), (variability, confidence, correctness) = axs, scores
    look = {"color": "#9A9A9A", "edgecolor": "white", "linewidth": 0.3}
    above.hist(variability, bins=np.linspace(0, 0.5, 41), **look)
    right.hist(confidence, bins=np.linspace(0, 1, 41), orientation="horizontal", **look)
    n_steps = CORRECTNESS.N
    far_right.barh(
        np.arange(n_steps) / n_steps, np.bincount(_tenths(correctness), minlength=n_steps),
        height=1 / n_steps, align="edge", edgecolor="white", linewidth=0.3,
        color=CORRECTNESS(np.arange(n_steps)),
    )  # fmt: skip
    far_right.set(ylim=(0, 1), xlabel="examples")
    right.set_xlabel("examples")
    above.set_ylabel("examples")
    for axis in (above, right, far_right):
        axis.locator_params(axis="y" if axis is above else "x", nbins=2)
        (axis.yaxis if axis is above else axis.xaxis).set_major_formatter(thousands)
    above.tick_params(labelbottom=False)
    right.tick_params(labelleft=False)
    far_right.tick_params(left=False, labelleft=False)


def forming(fig: Figure, snapshots: Mapping[int, pd.DataFrame], title: str) -> Figure:
    """How a map forms: the map after each of some numbers of epochs, on the same scales.

    Args:
        fig: An empty figure; `WIDE` by about 2.5 in for up to three maps, 4.5 in for up to six.
        snapshots: Recorded epochs -> `confidence`, `variability`, `correctness` over the epochs so
            far; one to six of them, drawn by their number.
        title: Above all panels: what it shows.

    Returns: `fig`, a panel for each snapshot, then the colour bar.
    Raises: ValueError for tables as in `datamap`.
    """
    epochs = sorted(snapshots)
    rows = 1 + (len(epochs) > 3)
    columns = -(-len(epochs) // rows)
    grid = fig.add_gridspec(rows, columns + 1, width_ratios=(*[1] * columns, 0.06))
    sizes = []
    for i, epoch in enumerate(epochs):
        ax = fig.add_subplot(grid[i // columns, i % columns])
        x, y, colour = _scores(snapshots[epoch], tuple(HIGHEST), f"after {epoch} epochs")
        if _map(ax, x, y, colour, size=3, n_bins=150):
            sizes.append(len(x))
        ax.set_title(f"after {epoch} epoch{'s' if epoch != 1 else ''}")
        three_ticks(ax, 0.5, 1)
        ax.set_xlim(-0.01, 0.5)  # after one epoch all variability is 0
        ax.tick_params(labelbottom=i + columns >= len(epochs), labelleft=i % columns == 0)
    fig.supxlabel("variability", fontsize=theme.RC["axes.labelsize"])
    fig.supylabel("confidence", fontsize=theme.RC["axes.labelsize"])
    fig.suptitle(_with_density(title, max(sizes)) if sizes else title)
    colour_bar(fig, fig.add_subplot(grid[:, columns]))
    return fig


def against(
    fig: Figure, first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str], title: str
) -> Figure:
    """Map against map: confidence, variability and region of the same examples in two maps, the
    first one upwards, the second one to the right.

    Args:
        fig: An empty figure; `WIDE` by about 2.6 in.
        first: `confidence`, `variability`, `region_variability`; index the example ids.
        second: The same columns of the same examples, in any order.
        names: What the two maps are of, for the axes.
        title: Above all panels.

    Returns: `fig`: two panels with their Spearman correlation, and the regions, where a number is
        the fraction of all examples.
    Raises: ValueError for missing columns, ids that are not the same, scores out of their range,
        or an unknown region.
    """
    n_different = len(first.index.symmetric_difference(second.index))
    if n_different:
        raise ValueError(
            f"{n_different} example ids differ ({len(first)} in {names[0]!r}, {len(second)} in "
            f"{names[1]!r}); expected two maps of the same examples"
        )
    second = second.reindex(first.index)
    for name, table in zip(names, (first, second), strict=True):
        _scores(table, ("confidence", "variability"), name, ("region_variability",))
    axs = fig.subplots(1, 3)
    dense = False
    for ax, score in zip(axs, ("confidence", "variability"), strict=False):
        top = HIGHEST[score]
        y, x = (np.clip(table[score].to_numpy(float), 0, top) for table in (first, second))
        dense = _cloud(ax, x, y, (top, top), size=4, n_bins=200)
        ax.plot([0, top], [0, top], ls=DASHES[1], color=GREY, lw=0.8)
        constant = min(np.ptp(x), np.ptp(y)) == 0
        rho = "" if constant else f"= {pd.Series(x).rank().corr(pd.Series(y).rank()):.2f}"
        ax.set_title(f"{score}, ρ {rho or 'undefined'}")
        ax.set(ylabel=f"{score}, {names[0]}", xlabel=f"{score}, {names[1]}", box_aspect=1)
        three_ticks(ax, top, top)
    ax, n = axs[2], len(REGIONS)
    rows, columns = (_regions(table["region_variability"]) for table in (first, second))
    share = np.bincount(n * rows + columns, minlength=n * n).reshape(n, n) / len(first)
    heat_map(ax, share, "Blues", 0, max(2 / 3, share.max()), [f"{s:.3f}" for s in share.flat])
    ax.set_title(f"regions, {100 * np.trace(share):.1f} % the same")
    labels = [REGIONS[name].replace("-to-", "-to-\n") for name in REGIONS]
    ax.set_xticks(range(n), labels)
    ax.set_yticks(range(n), labels)
    ax.set(ylabel=f"region, {names[0]}", xlabel=f"region, {names[1]}", box_aspect=1)
    fig.suptitle(_with_density(title, len(first)) if dense else title)
    return fig


def binned(
    x: np.ndarray, y: np.ndarray, values: np.ndarray, tops: tuple[float, float], n_bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Counts and mean values of examples in a square grid of bins.

    Args:
        x: Shape (N,), in [0, tops[0]]; the end belongs to the last bin.
        y: Shape (N,), in [0, tops[1]].
        values: Shape (N,), what is averaged.
        tops: Where the last bins end.
        n_bins: Bins along each side.

    Returns: Counts (n_bins, n_bins) int64, a row for each bin of y, and means of the same shape,
        0 where a bin is empty.

    >>> counts, means = binned(
    ...     np.array([0.1, 0.2, 1]), np.array([0, 0.4, 1]), np.array([0.5, 0.7, 1]), (1, 1), 2
    ... )
    >>> counts.tolist(), means.round(3).tolist()
    ([[2, 0], [0, 1]], [[0.6, 0.0], [0.0, 1.0]])
    """
    columns, rows = (
        np.minimum((n_bins / top * side).astype(np.int64), n_bins - 1)
        for side, top in zip((x, y), tops, strict=True)
    )
    places = n_bins * rows + columns
    counts = np.bincount(places, minlength=n_bins**2)
    sums = np.bincount(places, values, minlength=n_bins**2)
    means = sums / np.maximum(counts, 1)
    return counts.reshape(n_bins, n_bins), means.reshape(n_bins, n_bins)


def _map(
    ax: Axes, x: np.ndarray, y: np.ndarray, correctness: np.ndarray, size: float, n_bins: int = 500
) -> bool:
    """Examples in the colours of their correctness, inside the line that bounds them; returns
    whether bins were drawn."""
    limit = np.linspace(0, np.pi, 200)
    ax.plot(np.sin(limit) / 2, (1 + np.cos(limit)) / 2, ":", color=GREY, lw=0.8, zorder=0)
    return _cloud(ax, x, y, (HIGHEST["variability"], 1), size, n_bins, correctness)


def _cloud(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    tops: tuple[float, float],
    size: float,
    n_bins: int,
    correctness: np.ndarray | None = None,
) -> bool:
    """Points of at most `size`, or bins where there are more than `DENSE`; freezes the limits and
    returns whether bins were drawn."""
    n, dense = len(x), len(x) > DENSE
    if dense:
        values = np.zeros(n) if correctness is None else correctness
        counts, means = binned(x, y, values, tops, n_bins)
        colours = np.empty((n_bins, n_bins, 4), np.float32)
        colours[..., :3] = to_rgb(BLUE)
        if correctness is not None:
            colours[..., :3] = CORRECTNESS(_tenths(means))[..., :3]
        shade = np.log(np.maximum(counts, 1)) / np.log(max(counts.max(), 2))
        colours[..., 3] = np.where(counts > 0, FAINTEST + (1 - FAINTEST) * shade, 0)
        ax.imshow(
            colours, origin="lower", extent=(0, tops[0], 0, tops[1]), aspect="auto",
            interpolation="nearest", rasterized=True, zorder=1,
        )  # fmt: skip
    else:
        # Examples of one class may lie side by side in the source: the order is shuffled.
        order = np.random.default_rng(0).permutation(n)
        look = {"color": BLUE, "alpha": 0.4}
        if correctness is not None:
            steps = (_tenths(correctness[order]) + 0.5) / CORRECTNESS.N
            look = {"c": steps, "cmap": CORRECTNESS, "vmin": 0, "vmax": 1, "alpha": 0.85}
        area = np.clip(1000 * size / n, 0.13 * size, size)
        ax.scatter(x[order], y[order], s=area, linewidths=0, rasterized=True, clip_on=False, **look)
    ax.set(xlim=(0, tops[0]), ylim=(0, tops[1]))
    return dense


def _with_density(title: str, n: int) -> str:
    size = f"N = {n:,}"
    return f"{title}; density" if size in title else f"{title}; density, {size}"


def _tenths(correctness: np.ndarray) -> np.ndarray:
    """The step of the colour map; 7 of 10 may be stored as 0.69999999."""
    n_steps = CORRECTNESS.N
    return np.clip(np.floor(correctness * n_steps + 1e-6), 0, n_steps - 1).astype(np.int64)


def _scores(
    table: pd.DataFrame, scores: Sequence[str], what: str, more: Sequence[str] = ()
) -> list[np.ndarray]:
    """Variability, confidence and what comes after these as float64, checked, rounding cut off."""
    theme.demand(table, (*scores, *more), what)
    for score in scores:
        column, top = table[score], HIGHEST[score]
        if not column.between(-1e-6, top + 1e-6).all():  # rounded to float32
            raise ValueError(
                f"{score} runs from {column.min():g} to {column.max():g}, "
                f"{column.isna().sum()} are NaN; expected numbers in [0, {top:g}], "
                "which `python -m kdlib step datamap STUDY` makes"
            )
    ordered = ("variability", "confidence", *scores[2:])
    return [np.clip(table[score].to_numpy(float), 0, HIGHEST[score]) for score in ordered]


def _regions(column: pd.Series) -> np.ndarray:
    """Regions as their place in `REGIONS`, (N,) int64."""
    named = column.astype("category").cat.set_categories(list(REGIONS))
    codes = named.cat.codes.to_numpy(np.int64)  # -1: another name or NaN
    if (codes < 0).any():
        raise ValueError(
            f"unknown region {column.iloc[int(np.argmin(codes))]!r} in {column.name!r}; expected "
            f"one of {', '.join(REGIONS)}"
        )
    return codes


def _name_regions(ax: Axes, x: np.ndarray, y: np.ndarray, codes: np.ndarray) -> None:
    """Region names and counts where no point can be, each with a line to the region's middle."""
    places = {"easy": (0.27, 0.97), "ambiguous": (0.5, 0.885), "hard": (0.27, 0.03)}
    for code, region in enumerate(REGIONS):
        inside = codes == code
        if not inside.any():
            continue
        middle = float(np.median(x[inside])), float(np.median(y[inside]))
        line = {"arrowstyle": "-", "lw": 0.7, "color": BLACK, "shrinkA": 1, "shrinkB": 3}
        ax.annotate(
            f"{REGIONS[region]} ({int(inside.sum()):,})", middle, places[region], arrowprops=line,
            ha="right" if region == "ambiguous" else "left", va="center",
        )  # fmt: skip
        # An open ring: the points inside it stay in sight.
        ax.plot(*middle, "o", ms=6, mfc="none", mec=BLACK, mew=0.9)


def _draw_classes(
    ax: Axes, labels: pd.Series, codes: np.ndarray, class_names: Sequence[str]
) -> None:
    """A bar for each class, parted by the regions of its examples."""
    n = len(class_names)
    if not labels.between(0, n - 1).all():
        raise ValueError(
            f"labels run from {labels.min()} to {labels.max()} but there are {n} class names; "
            f"expected labels in [0, {n - 1}]"
        )
    counts = np.bincount(
        len(REGIONS) * labels.to_numpy(np.int64) + codes, minlength=len(REGIONS) * n
    ).reshape(n, len(REGIONS))
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    left = np.zeros(n)
    for width, region in zip(share.T, REGIONS, strict=True):
        colour, _ = theme.STRATEGIES[region]
        hatch = "////" if region == "ambiguous" else ""  # the second cue
        bars = ax.barh(
            range(n), width, left=left, height=0.8, color=colour, hatch=hatch, edgecolor="white",
            linewidth=0.3, label=REGIONS[region],
        )  # fmt: skip
        texts = [f"{w:.0f}" if w >= 4 else "" for w in width]
        ink = {"color": BLACK if hatch else "white", "bbox": {"fc": colour, "lw": 0, "pad": 0.6}}
        ax.bar_label(bars, texts, label_type="center", fontsize=TEXT_PT, **ink)
        left = left + width
    names = [f"{name} ({size:,})" for name, size in zip(class_names, counts.sum(1), strict=True)]
    ax.set_yticks(range(n), names, parse_math=False)  # they are no formulas
    ax.set(xlim=(0, 100), ylim=(n - 0.5, -0.5), xlabel="% of the class")
    ax.tick_params(axis="y", length=0)
    ax.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=len(REGIONS), borderaxespad=0.2,
        columnspacing=1.2,
    )  # fmt: skip
