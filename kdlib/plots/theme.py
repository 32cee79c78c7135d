"""The look of every figure: style, colours, words on axes, files.

Colours are those of Okabe and Ito, safe for colour-blind readers, and each has a second cue: a
marker, a dash or a label.

Sources:
    [OkabeIto2008] Okabe, Ito. Color Universal Design. 2008. https://jfly.uni-koeln.de/color/.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageStat  # matplotlib brings Pillow

from kdlib.repro.files import write_atomic
from kdlib.study.cells import share_in_words
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
VIRIDIS = mpl.colormaps["viridis"](np.linspace(0, 0.93, 256))
VIRIDIS_ON_BLACK = mpl.colormaps["viridis"](np.linspace(0.25, 1, 256))  # its dark end is lost there
CORRECTNESS = LinearSegmentedColormap.from_list("correctness", VIRIDIS, N=10)

WORDS = {
    "full": "full set", "kd": "KD", "knn": "k-NN", "aum": "AUM", "el2n": "EL2N", "tdds": "TDDS",
    "dual": "DUAL", "dyn_unc": "Dyn-Unc", "grand": "GraNd", "grand_last": "GraNd (last layer)",
    "ccs": "CCS", "d2": "D2", "dual_beta": "DUAL (beta)", "k_center": "k-center",
    "random_balanced": "random (balanced)", "correctness_half": "correctness (p > 1/2)",
    "forgetting_unlearned_first": "forgetting (unlearned = 0)", "aum_softmax": "AUM (softmax)",
    "aum_softmax_last": "AUM (softmax, last)", "entropy_last": "entropy (last)",
    "el2n_first_ten": "EL2N (sum of ten)",
    "dyn_unc_but_last": "Dyn-Unc (but last)", "tdds_absolute": "TDDS (absolute)",
    "tdds_still_window": "TDDS (still window)",
}  # fmt: skip

RC = {
    "font.family": "DejaVu Sans",  # ships with matplotlib
    "text.parse_math": False,  # names of classes and studies are no formulas
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
    """Matplotlib settings of the figures while the block runs; the user's settings come back."""
    with matplotlib.style.context(RC, after_reset=True):
        yield


def save_figures(figures: Mapping[str, Figure], folder: str | Path) -> dict[str, Path]:
    """`save_figure` for each figure; returns figure name -> its PNG."""
    return {name: save_figure(figure, folder, name)[1] for name, figure in figures.items()}


def save_figure(fig: Figure, folder: str | Path, name: str) -> tuple[Path, Path]:
    """Write `<name>.pdf` and `<name>.png` (200 dpi) at the size of the figure, each atomically.

    The files carry no date and no version: the same figure gives the same bytes. The PNG has a
    palette of 256 colours (a third of the bytes) unless that changes the picture by more than
    `PALETTE_ERROR`, as it does with photographs.

    Args:
        fig: The figure.
        folder: Destination; created when it is missing.
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
            drawn = io.BytesIO()
            fig.savefig(drawn, format=kind, dpi=DPI, metadata=metadata)
            if kind == "png":
                picture = compact_png(Image.open(drawn).convert("RGB"))
                drawn = io.BytesIO()
                picture.save(drawn, kind, optimize=True, dpi=(DPI, DPI))
            path = Path(folder) / f"{name}.{kind}"
            paths.append(write_atomic(path, lambda file, drawn=drawn: file.write(drawn.getvalue())))
    return tuple(paths)


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
    if stem in ("few_shot", "knn"):
        return f"{end}-{stem.removeprefix('few_').replace('knn', 'NN')}"
    return WORDS.get(name, name.replace("_", " "))


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
    """Sorting key: the full set and the regions first, the top of a score before its bottom; of a
    tuple, the keys of its parts."""
    if isinstance(name, tuple):
        return tuple(map(sorting_key, name))
    if not isinstance(name, str):
        return (0, name)
    known = list(STRATEGIES)
    if name in known:
        return (known.index(name), "", False)
    stem, _, end = name.rpartition("_")
    return (len(known), stem if end in ("top", "bottom") else name, end == "bottom")


def varying_axes(table: pd.DataFrame, by: str) -> list[str]:
    """The axes besides `by` in which cells differ; the fraction of the full set does not count."""
    subsets = table[table["strategy"] != "full"]
    counted = {a: (subsets if a == "fraction" else table)[a].nunique() for a in AXES}
    return [axis for axis in AXES if axis != by and counted[axis] > 1]


def held_axes(table: pd.DataFrame, by: str) -> str:
    """What all cells have in common, for the title: objective and fraction."""
    subsets = table[table["strategy"] != "full"]
    words = []
    for axis, rows in (("objective", table), ("fraction", subsets if len(subsets) else table)):
        if axis != by and rows[axis].nunique() == 1:
            value = rows[axis].iloc[0]
            words.append(of_the_data(value) if axis == "fraction" else value_in_words(value))
    return ", ".join(words)


def name_of_spread(table: pd.DataFrame) -> str:
    """The name of the spread that is drawn."""
    counts = table.groupby(list(AXES))["seed"].nunique()
    fewest, most = counts.min(), counts.max()
    if most == 1:
        return "one seed"
    return f"mean ± s.d., S = {most}" if fewest == most else f"mean ± s.d., S = {fewest} to {most}"


def value_in_words(value: Any) -> str:
    return in_words(value) if isinstance(value, str) else share_in_words(value)


def of_the_data(fraction: float) -> str:
    share = share_in_words(fraction)
    return f"{share} of the data" if share.endswith("%") else share


def of_cell(table: pd.DataFrame, cell: tuple[str, str, float, str]) -> pd.DataFrame:
    return table[(table[list(AXES)] == list(cell)).all(axis=1)]


def demand(table: pd.DataFrame, columns: Iterable[str], what: str) -> None:
    """Refuse a table without rows, without one of the columns, or with rows of refused runs."""
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"the table `{what}` lacks the columns {missing}; got {list(table.columns)}"
        )
    if table.empty:
        raise ValueError(f"the table `{what}` has no rows; there is nothing to draw")
    if "refused" in table and table["refused"].any():
        raise ValueError(
            f"{table['refused'].sum()} of {len(table)} rows are refused; draw accepted rows only: "
            f"{what}[~{what}['refused']]"
        )
