"""How every figure of the lab looks: style, colours, words, legends, files.

Colours are those of Okabe and Ito, safe for colour-blind readers, and each has a second cue: a
marker, a dash or a label. Leaves to others: what is drawn (plots, progress, maps).

Sources:
    [OkabeIto2008] Okabe, Ito. Color Universal Design. 2008. https://jfly.uni-koeln.de/color/.
"""

import contextlib
import functools
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath
from PIL import Image, ImageChops, ImageStat  # matplotlib brings Pillow

from kdlib.repro.files import write_atomic
from kdlib.study.evaluation import AXES

NARROW, WIDE = 3.25, 6.75  # inches: one column, two columns


TEXT_PT = 7  # the smallest text at print size


DPI = 200  # of the PNG and of what is rasterised inside the PDF; text in the PDF is vectors
PALETTE_ERROR = 1.0  # grey levels of 255, mean over a picture: more than that is seen


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


TALL = 9.2  # inches: what a page leaves a figure


PANELS = 3  # beside each other


BESIDE_LABEL = 40  # points that a mark and the gaps around it take in a legend


# The end of a line: height in %, label, colour, and last step (None: it runs over the whole axis).
End = tuple[float, str, str, float | None]


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
    """Write `<name>.pdf` and `<name>.png` (200 dpi) at the figure's own size, each atomically.

    The files carry no date and no version: the same figure gives the same bytes. The PNG has a
    palette of 256 colours (a third of the bytes) unless that changes the picture by more than
    `PALETTE_ERROR`, as it does with photographs.

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
                    lambda file, kind=kind, metadata=metadata: _write(fig, file, kind, metadata),
                )
            )
    return tuple(paths)


def _write(fig: Figure, file: BinaryIO, kind: str, metadata: dict[str, None]) -> None:
    if kind == "pdf":
        fig.savefig(file, format=kind, dpi=DPI, metadata=metadata)
        return
    drawn = io.BytesIO()
    fig.savefig(drawn, format=kind, dpi=DPI, metadata=metadata)
    compact_png(Image.open(drawn).convert("RGB")).save(file, "png", optimize=True, dpi=(DPI, DPI))


def compact_png(picture: Image.Image) -> Image.Image:
    """The picture with a palette of 256 colours, or as it is where the palette would be seen.

    Args:
        picture: RGB.

    Returns: Mode P, with a mean absolute difference of at most `PALETTE_ERROR`; or mode RGB.
    """
    palette = picture.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    difference = ImageChops.difference(picture, palette.convert("RGB"))
    error = sum(ImageStat.Stat(difference).mean) / 3
    return palette if error <= PALETTE_ERROR else picture


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


def panel_grid(
    fig: Figure, n_panels: int, n_columns: int, row_in: float, sharey: bool = True
) -> list[Axes]:
    """Panels row by row, at most so many beside each other, in a figure as high as they need."""
    n_rows = -(-n_panels // n_columns)
    fig.set_figheight(min(n_rows * row_in + 0.75, TALL))
    axs = fig.subplots(n_rows, n_columns, sharey=sharey, squeeze=False).ravel()
    for ax in axs[n_panels:]:
        ax.remove()
    return list(axs[:n_panels])


def name_rows(ax: Axes, names: Sequence[str], below: float) -> None:
    """Rows from top to bottom with their names, and light lines to read values by."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 1 + below, -below)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#DDDDDD", lw=0.5)
    ax.set_axisbelow(True)


def mark(label: str, **look: Any) -> Line2D:
    return Line2D([], [], label=label, **{"ls": "none", **look})


def legend_in_rows(fig: Figure, *rows: Sequence[Line2D], **more: Any) -> int:
    """One legend below the panels, each group of handles a row, or more where it is too wide;
    returns how many rows it has."""
    n = _most_columns(rows)
    rows = [row[i : i + n] for row in rows for i in range(0, len(row), n)]
    padded = [[*row, *[mark("")] * (n - len(row))] for row in rows]
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
                widths[i % n] = max(widths[i % n], text_width_pt(handle.get_label()))
        if widths.sum() + n * BESIDE_LABEL < 72 * WIDE:
            return n
    return 1


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


def fitted(text: str, width_pt: float) -> str:
    """The text, or as much of its beginning as fits, and an ellipsis."""
    text = text.replace("_", " ")
    if text_width_pt(text) <= width_pt:
        return text
    while text and text_width_pt(text + "…") > width_pt:
        text = text[:-1].rstrip()
    return text + "…"


@functools.lru_cache(maxsize=4096)
def text_width_pt(text: str, size: float = TEXT_PT) -> float:
    """Width of a line of text in points, before anything is drawn."""
    if not text.strip():
        return 0.0
    return (
        TextPath((0, 0), text, size=size, prop=FontProperties(RC["font.family"])).get_extents().x1
    )


def line_looks(names: Iterable[Any]) -> dict[Any, tuple[str, Any]]:
    """Colour and dash of each name, in order of `sorting_key`; numbers go from dark to light."""
    names = sorted(names, key=sorting_key)
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


def sorting_key(name: Any) -> tuple:
    """Sorting key: the full set and the regions first, the top of a score before its bottom."""
    if not isinstance(name, str):
        return (0, name)
    known = list(STRATEGIES)
    if name in known:
        return (known.index(name), "", False)
    stem, _, end = name.rpartition("_")
    return (len(known), stem if end in ("top", "bottom") else name, end == "bottom")


def varying_axes(table: pd.DataFrame, by: str) -> list[str]:
    """The axes besides `by` that tell cells apart; that the full set has a fraction of its own does
    not count."""
    subsets = table[table["strategy"] != "full"]
    counted = {a: (subsets if a == "fraction" else table)[a].nunique() for a in AXES}
    return [axis for axis in AXES if axis != by and counted[axis] > 1]


def held_axes(table: pd.DataFrame, by: str) -> str:
    """What all cells have in common, for the title: fraction and objective where they are held."""
    subsets = table[table["strategy"] != "full"]
    told = []
    for axis, rows in (("objective", table), ("fraction", subsets if len(subsets) else table)):
        if axis != by and rows[axis].nunique() == 1:
            told.append(value_in_words(rows[axis].iloc[0]))
            told[-1] += " of the data" if axis == "fraction" else ""
    return ", ".join(told)


def name_of_spread(table: pd.DataFrame) -> str:
    """The name of the spread that is drawn."""
    counts = table.groupby(list(AXES))["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    if most == 1:
        return "one seed"
    return f"mean ± s.d., S = {most}" if fewest == most else f"mean ± s.d., S = {fewest} to {most}"


def value_in_words(value: Any) -> str:
    return in_words(value) if isinstance(value, str) else percent(value)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.4g} %"


def of_cell(table: pd.DataFrame, cell: tuple[str, str, float, str]) -> pd.DataFrame:
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


def _within(
    table: pd.DataFrame, columns: Iterable[str], low: float, high: float, hint: str | None = None
) -> None:
    """Refuse numbers out of [low, high], as far as rounding to float32 goes. Where there is a hint
    on what to do, NaN is refused as well."""
    for name in columns:
        column = table[name]
        is_nan = column.isna()
        if not (column.between(low - 1e-6, high + 1e-6) | (is_nan & (hint is None))).all():
            raise ValueError(
                f"{name} runs from {column.min():g} to {column.max():g}, {int(is_nan.sum())} are "
                f"NaN; expected numbers in [{low:g}, {high:g}]{hint or ''}"
            )


def _heat_map(
    ax: Axes, values: np.ndarray, colours: str, low: float, high: float, texts: Sequence[str]
) -> mpl.image.AxesImage:
    """Cells with a text in each (row by row), black or white after the colour below it."""
    image = ax.imshow(values, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    for (row, column), value in np.ndenumerate(values):
        if not texts[row * values.shape[1] + column]:
            continue
        red, green, blue, _ = image.cmap(image.norm(0 if np.isnan(value) else value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        ax.text(
            column, row, texts[row * values.shape[1] + column], ha="center", va="center",
            fontsize=TEXT_PT, color="white" if dark else BLACK,
        )  # fmt: skip
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.tick_params(length=0)
    return image


def _three_ticks(ax: Axes, top_x: float, top_y: float) -> None:
    ax.set_xticks((0, top_x / 2, top_x), [f"{tick:g}" for tick in (0, top_x / 2, top_x)])
    ax.set_yticks((0, top_y / 2, top_y), [f"{tick:g}" for tick in (0, top_y / 2, top_y)])


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}" if value < 10_000 else f"{value / 1000:,.0f}k"


def _colour_bar(fig: Figure, ax: Axes) -> None:
    """The colours of correctness, opaque whatever is drawn."""
    colours = fig.colorbar(
        ScalarMappable(mpl.colors.Normalize(0, 1), CORRECTNESS), cax=ax, ticks=np.linspace(0, 1, 6)
    )
    colours.outline.set_visible(False)
    colours.set_label("correctness (fraction of epochs)")
