"""Figures of datamaps: a map, how it forms, map against map.

A function takes tables and an empty figure, draws, and returns it. Each figure can be drawn from a
datamap, or from the small tables of `map_tables`: examples as points, or bins whose colour is their
mean correctness and whose opacity is the logarithm of their number of examples.

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
from kdlib.plots.layout import caption, colour_bar, heat_map, thousands, three_ticks
from kdlib.plots.map_tables import (
    DENSE,
    HIGHEST,
    binned,
    class_table,
    map_points,
    pair_table,
    region_table,
    tenths,
)
from kdlib.plots.theme import BLACK, BLUE, CORRECTNESS, DASHES, GREY, REGIONS, TEXT_PT

FAINTEST = 0.4  # opacity of a bin with one example
MAX_CLASSES = 20  # whose regions are drawn below a map
RULES = {  # column of regions -> the rule in words
    "region_variability": "ambiguous: the third of highest variability; of the others, "
    "easy-to-learn from confidence 0.5 upwards, hard-to-learn below",
    "region_corner": "each example belongs to the nearest of three corners: easy-to-learn (0, 1), "
    "ambiguous (1, 0.5), hard-to-learn (0, 0)",
}
BINNED = " Bins: colour is the mean correctness, opacity the number of examples (log scale)."


def datamap(
    fig: Figure,
    table: pd.DataFrame,
    title: str,
    regions: str = "region_variability",
    class_names: Sequence[str] | None = None,
) -> Figure:
    """The map of a data set by training dynamics [Swayamdipta2020, fig. 1]: every example a point,
    of more than `DENSE` every bin.

    Args:
        fig, title: As for `draw_map`.
        table: The datamap: `confidence`, `variability`, `correctness` and the column `regions`.
        regions: Column of region names, `region_variability` or `region_corner`.
        class_names: Of each label. With a column `label` in the table and at most `MAX_CLASSES`
            names, the share of each region in each class is drawn below.

    Returns: As `draw_map`.
    Raises: ValueError for missing columns, an empty table, a score that is out of its range, an
        unknown region, or a label without a name.
    """
    points, of_regions = map_points(table), region_table(table, regions)
    by_class = class_names is not None and "label" in table and len(class_names) <= MAX_CLASSES
    of_classes = class_table(table, regions, class_names) if by_class else None
    return draw_map(fig, points, of_regions, of_classes, title, regions)


def draw_map(
    fig: Figure,
    points: pd.DataFrame,
    regions: pd.DataFrame,
    classes: pd.DataFrame | None,
    title: str,
    rule: str = "region_variability",
) -> Figure:
    """A datamap from its small tables.

    Points end at the dotted line, which no example can cross: a variable in [0, 1] with mean c has
    a standard deviation of at most sqrt(c (1 - c)). The regions are named outside it.

    Args:
        fig: An empty figure; `WIDE` by about 4.5 in.
        points: From `map_points`.
        regions: From `region_table`.
        classes: From `class_table`, or None; with it `fig` grows by the height of their panel.
        title: The line above: what is shown, and the number of epochs.
        rule: The rule of the regions, which is said below.

    Returns: `fig`; its axes are the map, the histograms of variability, confidence and
        correctness, the colour bar in fourth place, and the classes if they are drawn.
    """
    height, by_class = fig.get_figheight(), classes is not None
    below = 0.6 + 0.15 * (len(classes) // len(REGIONS)) if by_class else 0
    fig.set_figheight(height + below + 0.45)
    # Grids inside a grid: the long names of classes do not narrow the map.
    outer = fig.add_gridspec(1 + by_class, 1, height_ratios=(height, below)[: 1 + by_class])
    grid = outer[0].subgridspec(2, 4, width_ratios=(6, 1.1, 0.22, 1.1), height_ratios=(1, 5.5))
    ax = fig.add_subplot(grid[1, 0])
    above = fig.add_subplot(grid[0, 0], sharex=ax)
    right = fig.add_subplot(grid[1, 1], sharey=ax)
    bar = fig.add_subplot(grid[1, 2])
    far_right = fig.add_subplot(grid[1, 3])
    dense = _draw_points(ax, points, size=9)
    ax.text(
        0.5, 0.13, "largest variability\nat this confidence", ha="right", va="center",
        fontsize=TEXT_PT, color=GREY,
    )  # fmt: skip
    ax.set(xlabel="variability", ylabel="confidence")
    _name_regions(ax, regions)
    _draw_histograms((above, right, far_right), points)
    colour_bar(fig, bar)
    bar.yaxis.set_ticks_position("left")
    bar.yaxis.set_label_position("left")
    above.set_title(title)
    if by_class:
        _draw_classes(fig.add_subplot(outer[1]), classes)
    caption(
        fig,
        f"N = {points['n'].sum():,} training images, E = recorded epochs. Confidence and "
        "variability: mean and standard deviation, over the epochs, of the probability of the "
        "label. Circles mark the median of each region; the number is that of its images. "
        f"Regions: {RULES[rule]}.{BINNED if dense else ''}",
    )
    return fig


def _draw_histograms(axs: Sequence[Axes], points: pd.DataFrame) -> None:
    """Variability above the map, confidence and correctness right of it."""
    above, right, far_right = axs
    look = {"color": "#9A9A9A", "edgecolor": "white", "linewidth": 0.3, "weights": points["n"]}
    # Edges of bins that hold whole bins of the map.
    above.hist(points["variability"], bins=np.linspace(0, 0.5, 51), **look)
    right.hist(points["confidence"], bins=np.linspace(0, 1, 51), orientation="horizontal", **look)
    n_steps = CORRECTNESS.N
    counts = np.bincount(tenths(points["correctness"].to_numpy()), points["n"], n_steps)
    far_right.barh(
        np.arange(n_steps) / n_steps, counts, height=1 / n_steps, align="edge", edgecolor="white",
        linewidth=0.3, color=CORRECTNESS(np.arange(n_steps)),
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
            far, or the `map_points` of these; one to six of them, drawn by their number.
        title: Above all panels: what is shown.

    Returns: `fig`, a panel for each snapshot, then the colour bar.
    Raises: ValueError for tables as in `datamap`.
    """
    epochs = sorted(snapshots)
    rows = 1 + (len(epochs) > 3)
    columns = -(-len(epochs) // rows)
    grid = fig.add_gridspec(rows, columns + 1, width_ratios=(*[1] * columns, 0.06))
    for i, epoch in enumerate(epochs):
        ax = fig.add_subplot(grid[i // columns, i % columns])
        points = map_points(snapshots[epoch], f"after {epoch} epochs")
        dense = _draw_points(ax, points, size=3)
        ax.set_title(f"after {epoch} epoch{'s' if epoch != 1 else ''}")
        three_ticks(ax, 0.5, 1)
        ax.set_xlim(-0.01, 0.5)  # after one epoch all variability is 0
        ax.tick_params(labelbottom=i + columns >= len(epochs), labelleft=i % columns == 0)
    fig.supxlabel("variability", fontsize=theme.RC["axes.labelsize"])
    fig.supylabel("confidence", fontsize=theme.RC["axes.labelsize"])
    fig.suptitle(f"{title}, {points['n'].sum():,} training images")
    if dense:
        caption(fig, BINNED.strip())
    colour_bar(fig, fig.add_subplot(grid[:, columns]))
    return fig


def against(
    fig: Figure, first: pd.DataFrame, second: pd.DataFrame, names: tuple[str, str], title: str
) -> Figure:
    """Map against map: `draw_pair` of the `pair_table` of two datamaps."""
    return draw_pair(fig, pair_table(first, second, names), names, title)


def draw_pair(fig: Figure, pairs: pd.DataFrame, names: tuple[str, str], title: str) -> Figure:
    """Map against map: confidence, variability and region of the same examples in two maps, the
    first one upwards, the second one to the right.

    Args:
        fig: An empty figure; `WIDE` by about 2.6 in.
        pairs: From `pair_table`.
        names: What the two maps are of, for the axes.
        title: Above all panels.

    Returns: `fig`: two panels with their Spearman correlation, and the regions, where a number is
        the fraction of all examples.
    """
    theme.demand(pairs, ("panel", "x", "y", "n", "rho"), "pairs")
    axs = fig.subplots(1, 3)
    for ax, score in zip(axs, ("confidence", "variability"), strict=False):
        top, rows = HIGHEST[score], pairs[pairs["panel"] == score]
        x, y, n = (rows[name].to_numpy() for name in ("x", "y", "n"))
        dense = _cloud(ax, x, y, n, (top, top), size=4)
        ax.plot([0, top], [0, top], ls=DASHES[1], color=GREY, lw=0.8)
        rho = rows["rho"].iloc[0]
        ax.set_title(f"{score}, ρ {'undefined' if np.isnan(rho) else f'= {rho:.2f}'}")
        ax.set(ylabel=f"{score}, {names[0]}", xlabel=f"{score}, {names[1]}", box_aspect=1)
        three_ticks(ax, top, top)
    ax, n, rows = axs[2], len(REGIONS), pairs[pairs["panel"] == "regions"]
    counts = np.zeros((n, n))
    counts[rows["y"].astype(int), rows["x"].astype(int)] = rows["n"]
    share = counts / counts.sum()
    heat_map(ax, share, "Blues", 0, max(2 / 3, share.max()), [f"{s:.3f}" for s in share.flat])
    ax.set_title(f"regions, {100 * np.trace(share):.1f} % the same")
    labels = [REGIONS[name].replace("-to-", "-to-\n") for name in REGIONS]
    ax.set_xticks(range(n), labels)
    ax.set_yticks(range(n), labels)
    ax.set(ylabel=f"region, {names[0]}", xlabel=f"region, {names[1]}", box_aspect=1)
    fig.suptitle(f"{title}, {int(counts.sum()):,} training images")
    words = "ρ: Spearman's correlation. Numbers in the cells are shares of all images."
    caption(fig, words + " Bins: the darker, the more images (log scale)." * dense)
    return fig


def _draw_points(ax: Axes, points: pd.DataFrame, size: float) -> bool:
    """Examples in the colours of their correctness, inside the line that bounds them; returns
    whether they are bins."""
    limit = np.linspace(0, np.pi, 200)
    ax.plot(np.sin(limit) / 2, (1 + np.cos(limit)) / 2, ":", color=GREY, lw=0.8, zorder=0)
    names = ("variability", "confidence", "n", "correctness")
    x, y, n, correctness = (points[name].to_numpy() for name in names)
    return _cloud(ax, x, y, n, (HIGHEST["variability"], 1), size, correctness)


def _cloud(
    ax: Axes,
    x: np.ndarray,
    y: np.ndarray,
    n: np.ndarray,
    tops: tuple[float, float],
    size: float,
    correctness: np.ndarray | None = None,
) -> bool:
    """Points of at most `size`, or bins of more than `DENSE` examples; freezes the limits and
    returns whether bins were drawn."""
    dense = bool(n.sum() > DENSE)
    if dense:
        values = np.zeros(len(x)) if correctness is None else correctness
        counts, means = binned(x, y, values, n, tops)
        colours = np.empty((*counts.shape, 4), np.float32)
        colours[..., :3] = to_rgb(BLUE)
        if correctness is not None:
            colours[..., :3] = CORRECTNESS(tenths(means))[..., :3]
        shade = np.log(np.maximum(counts, 1)) / np.log(max(counts.max(), 2))
        colours[..., 3] = np.where(counts > 0, FAINTEST + (1 - FAINTEST) * shade, 0)
        ax.imshow(
            colours, origin="lower", extent=(0, tops[0], 0, tops[1]), aspect="auto",
            interpolation="nearest", rasterized=True, zorder=1,
        )  # fmt: skip
    else:
        # Examples of one class may lie side by side in the source: the order is shuffled.
        order = np.random.default_rng(0).permutation(len(x))
        look = {"color": BLUE, "alpha": 0.4}
        if correctness is not None:
            steps = (tenths(correctness[order]) + 0.5) / CORRECTNESS.N
            look = {"c": steps, "cmap": CORRECTNESS, "vmin": 0, "vmax": 1, "alpha": 0.85}
        area = np.clip(1000 * size / len(x), 0.13 * size, size)
        ax.scatter(x[order], y[order], s=area, linewidths=0, rasterized=True, clip_on=False, **look)
    ax.set(xlim=(0, tops[0]), ylim=(0, tops[1]))
    return dense


def _name_regions(ax: Axes, regions: pd.DataFrame) -> None:
    """Region names and counts where no point can be, each with a line to the region's middle."""
    places = {"easy": (0.27, 0.97), "ambiguous": (0.5, 0.885), "hard": (0.27, 0.03)}
    for row in regions.to_dict("records"):
        region, middle = row["region"], (row["variability"], row["confidence"])
        line = {"arrowstyle": "-", "lw": 0.7, "color": BLACK, "shrinkA": 1, "shrinkB": 3}
        ax.annotate(
            f"{REGIONS[region]} ({row['n']:,})", middle, places[region], arrowprops=line,
            ha="right" if region == "ambiguous" else "left", va="center",
        )  # fmt: skip
        # An open ring: the points inside it stay in sight.
        ax.plot(*middle, "o", ms=6, mfc="none", mec=BLACK, mew=0.9)


def _draw_classes(ax: Axes, classes: pd.DataFrame) -> None:
    """A bar for each class, parted by the regions of its examples."""
    class_names = classes["class_name"].iloc[:: len(REGIONS)]
    counts, n = classes["n"].to_numpy().reshape(-1, len(REGIONS)), len(class_names)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    left = np.zeros(n)
    for width, region in zip(share.T, REGIONS, strict=True):
        colour = theme.STRATEGIES[region][0]
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
