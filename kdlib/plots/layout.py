"""Where things stand in a figure: panels, legends, labels at the ends of lines, axes of maps."""

import functools
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from scipy.optimize import isotonic_regression

from kdlib.plots.theme import BLACK, CORRECTNESS, RC, TEXT_PT, WIDE

TALL = 9.2  # inches: what a page leaves a figure
PANELS = 3  # beside each other
BESIDE_LABEL = 40  # points that a mark and the gaps around it take in a legend

# The end of a line: height in %, label, colour, and last step (None: it runs over the whole axis).
End = tuple[float, str, str, float | None]


def panel_grid(
    fig: Figure, n: int, row_in: float, most: int = PANELS, sharey: bool = True, xlabel: str = ""
) -> list[Axes]:
    """n panels row by row, at most so many beside each other, in a figure as high as they need; the
    last ones have a label below."""
    n_columns = min(n, most)
    n_rows = -(-n // n_columns)
    fig.set_figheight(min(n_rows * row_in + 0.75, TALL))
    axs = fig.subplots(n_rows, n_columns, sharey=sharey, squeeze=False).ravel()
    for ax in axs[n:]:
        ax.remove()
    for ax in axs[n - n_columns : n]:
        ax.set_xlabel(xlabel)
    return list(axs[:n])


def name_rows(ax: Axes, names: Sequence[str], below: float) -> None:
    """Rows from top to bottom with their names, and light lines to read values by."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 1 + below, -below)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", lw=0.5)
    ax.set_axisbelow(True)


def mark(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **{"ls": "none", **look})


def legend_in_rows(
    fig: Figure, *rows: Sequence[Any], loc: str = "outside lower center", **more: Any
) -> int:
    """One legend below the panels, or elsewhere, each group of handles a row, or more where it is
    too wide; returns how many rows it has."""
    n = _most_columns(rows)
    rows = [row[i : i + n] for row in rows for i in range(0, len(row), n)]
    padded = [[*row, *[mark("")] * (n - len(row))] for row in rows]
    handles = [handle for column in zip(*padded, strict=True) for handle in column]
    fig.legend(
        handles=handles, loc=loc, ncols=n, columnspacing=1, handletextpad=0.5,
        **more,
    )  # fmt: skip
    return len(rows)


def _most_columns(rows: Sequence[Sequence[Any]]) -> int:
    """In how many columns a legend of these rows, wrapped, fits into a wide figure."""
    for n in range(max(map(len, rows)), 1, -1):
        widths = np.zeros(n)
        for row in rows:
            for i, handle in enumerate(row):
                widths[i % n] = max(widths[i % n], text_width_pt(handle.get_label()))
        if widths.sum() + n * BESIDE_LABEL < 72 * WIDE:
            return n
    return 1


def caption(fig: Figure, text: str) -> None:
    """Lines below all panels, wrapped to the width of the figure."""
    width_pt, lines = 72 * fig.get_figwidth() - 30, [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width_pt(longer) <= width_pt:
            lines[-1] = longer
        else:
            lines.append(word)
    fig.legend(
        handles=[], title="\n".join(lines), loc="outside lower left", borderpad=0.2,
        borderaxespad=0.3,
    )  # fmt: skip


def label_ends(ax: Axes, ends: Sequence[End]) -> None:
    """Write each label at the right of the axis, level with its line unless another label is there.

    Args:
        ax: The axis, its limits final.
        ends: For each line its last height, label, colour and last x (None: the end of the axis).
    """
    if not ends:
        return
    (first, last), (low, high) = ax.get_xlim(), ax.get_ylim()
    height_pt = 72 * ax.get_window_extent().height / ax.figure.dpi
    ends = sorted(ends, key=lambda end: end[0])
    levels = [(end[0] - low) / (high - low) for end in ends]
    places = spread(levels, 1.35 * TEXT_PT / height_pt)
    for (_, label, colour, step), level, place in zip(ends, levels, places, strict=True):
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
        heights: Wanted places, ascending, at least one.
        gap: Smallest distance of neighbours; labels that need more room than [0, 1] start at 0.

    Returns: Places, ascending, one per height.

    >>> spread([0.2, 0.5, 0.5], gap=0.1)
    [0.2, 0.45, 0.55]
    """
    gaps = gap * np.arange(len(heights))
    free = isotonic_regression(np.subtract(heights, gaps)).x
    return (np.clip(free, 0, max(0.0, 1 - gaps[-1])) + gaps).round(6).tolist()


def fitted(text: str, width_pt: float) -> str:
    """The text, or as much of its beginning as fits, and an ellipsis."""
    text = shown = text.replace("_", " ")
    while text and text_width_pt(shown) > width_pt:
        text = text[:-1].rstrip()
        shown = text + "…"
    return shown


@functools.lru_cache(maxsize=4096)
def text_width_pt(text: str, size: float = TEXT_PT) -> float:
    """Width of a line of text in points, before anything is drawn."""
    if not text.strip():
        return 0.0
    with mpl.rc_context({"text.parse_math": False}):
        path = TextPath((0, 0), text, size=size, prop=FontProperties(RC["font.family"]))
    return path.get_extents().x1


def heat_map(
    ax: Axes, values: np.ndarray, colours: str, low: float, high: float, texts: Sequence[str]
) -> mpl.image.AxesImage:
    """Cells with a text in each (row by row), black or white after the colour below it."""
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    for ((row, column), value), text in zip(np.ndenumerate(values), texts, strict=True):
        red, green, blue, _ = image.cmap(image.norm(0 if np.isnan(value) else value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        look = {"ha": "center", "va": "center", "fontsize": TEXT_PT}
        if text:
            ax.text(column, row, text, color="white" if dark else BLACK, **look)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    return image


def three_ticks(ax: Axes, top_x: float, top_y: float) -> None:
    for axis, top in ((ax.xaxis, top_x), (ax.yaxis, top_y)):
        axis.set_ticks((0, top / 2, top), [f"{tick:g}" for tick in (0, top / 2, top)])


def thousands(value: float, _: int) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"


def colour_bar(fig: Figure, ax: Axes) -> None:
    """The colours of correctness, opaque whatever is drawn."""
    colours = fig.colorbar(
        ScalarMappable(mpl.colors.Normalize(0, 1), CORRECTNESS), cax=ax, ticks=np.linspace(0, 1, 6)
    )
    colours.outline.set_visible(False)
    colours.set_label("correctness (fraction of epochs)")
