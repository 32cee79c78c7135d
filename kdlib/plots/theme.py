"""The look of every figure: style, colours, words on axes, files.

Colours are those of Okabe and Ito, safe for colour-blind readers, and each has a second cue: a
marker, a dash or a label.

Sources:
    [OkabeIto2008] Okabe, Ito. Color Universal Design. 2008. https://jfly.uni-koeln.de/color/.
"""

import contextlib
import io
import itertools
import zlib
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

Look = tuple[Any, Any, str]  # colour, dash, marker

# What has a name looks the same in every figure. Markers of verdicts (`differences.VERDICTS`) are
# no markers of objectives.
OBJECTIVES: dict[str, Look] = {
    "kd": (BLUE, DASHES[0], "o"),
    "plain": (ORANGE, DASHES[1], "D"),
    "features": (GREEN, DASHES[3], "P"),
}
MOST_OBJECTIVES = 4  # that colours tell apart; of more, names of rows do

STRATEGIES: dict[str, Look] = {
    "full": (BLACK, DASHES[0], "o"),
    "random": (GREY, DASHES[1], "o"),
    "easy": (GREEN, DASHES[5], "o"),
    "ambiguous": (PURPLE, DASHES[3], "o"),
    "ambiguous_corner": (PURPLE, DASHES[4], "o"),
    "hard": (VERMILLION, DASHES[2], "o"),
    "random_shards": (GREY, DASHES[4], "o"),
    "fixed_shards": (SKY, DASHES[3], "o"),
}

SCORES: dict[str, Look] = {
    "confidence": (BLUE, DASHES[0], "o"),
    "variability": (ORANGE, DASHES[1], "D"),
    "correctness": (SKY, DASHES[5], "s"),
    "forgetting_events": (VERMILLION, DASHES[2], "v"),
    "aum": (GREEN, DASHES[0], "^"),
    "el2n": (PURPLE, DASHES[3], "P"),
    "loss": (SKY, DASHES[1], "X"),
    "entropy": (SKY, DASHES[4], "*"),
    "trend": (GREEN, DASHES[4], "<"),
    "dyn_unc": (ORANGE, DASHES[4], "h"),
    "dual": (SKY, DASHES[2], "p"),
    "tdds": (GREY, DASHES[3], "H"),
    "grand": (BLACK, DASHES[5], "d"),
    "grand_last": (BLACK, DASHES[3], "8"),
    "class_distance": (VERMILLION, DASHES[4], ">"),
    "prototypicality": (PURPLE, DASHES[5], "p"),
    "held-out margin": (ORANGE, DASHES[2], "s"),
    "cleanlab": (BLACK, DASHES[1], "."),
}

NAMED = {"strategy": STRATEGIES, "objective": OBJECTIVES, "score": SCORES}
OTHER_COLOURS = (SKY, GREEN, VERMILLION, PURPLE, BLUE, ORANGE)
OTHER_MARKERS = ("X", "*", "p", "d", ">", "<")
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


def line_looks(names: Iterable[Any], axis: str = "strategy") -> dict[Any, Look]:
    """Colour, dash and marker of each name, in order of `sorting_key`.

    A name of `NAMED` has the look that stands there, the top or bottom of a score the colour of the
    score; another name has the one that its hash chooses, or the next where that is another name's.
    Numbers go from dark to light.

    Args:
        names: Values of the axis.
        axis: An axis of a study, or `score`.

    Raises: ValueError for more names than there are looks.
    """
    names = sorted(set(names), key=sorting_key)
    if not any(isinstance(name, str) for name in names):
        colours = CORRECTNESS(np.linspace(0, 1, len(names)))
        pairs = zip(colours, itertools.cycle(DASHES), strict=False)
        return {name: (*pair, "o") for name, pair in zip(names, pairs, strict=False)}
    known = NAMED.get(axis, {})
    looks = {name: known[name] for name in names if name in known}
    taken = {look[:2] for look in known.values()}
    pool = [pair for pair in itertools.product(OTHER_COLOURS, DASHES) if pair not in taken]
    if len(names) - len(looks) > len(pool):
        raise ValueError(f"{len(names)} kinds of line; expected at most {len(pool)}: draw some")
    for name in names:
        if name not in looks:
            start = zlib.crc32(str(name).encode())
            wanted = _of_score(name) if axis == "strategy" else []
            turned = [pool[(start + i) % len(pool)] for i in range(len(pool))]
            pair = next(pair for pair in (*wanted, *turned) if pair not in taken)
            taken.add(pair)
            marker = "o" if axis == "strategy" else OTHER_MARKERS[start % len(OTHER_MARKERS)]
            looks[name] = (*pair, marker)
    return {name: looks[name] for name in names}


def _of_score(name: Any) -> list[tuple[str, Any]]:
    """The looks that the top or bottom of a score may have: in its colour; of another name none."""
    stem, _, end = str(name).rpartition("_")
    if stem not in SCORES or end not in ("top", "bottom"):
        return []
    dashes = DASHES if end == "top" else (*DASHES[1:], DASHES[0])
    return [(SCORES[stem][0], dash) for dash in dashes]


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
    """What all cells have in common, for the title: objective, and the fraction of the subsets."""
    words, is_full = [], table["strategy"] == "full"
    if by != "objective" and table["objective"].nunique() == 1:
        words.append(value_in_words(table["objective"].iloc[0]))
    fractions = table.loc[~is_full, "fraction"]
    if by != "fraction" and is_full.all():
        words.append("full set")
    elif by != "fraction" and fractions.nunique() == 1:
        size = of_the_data(fractions.iloc[0])
        words.append(f"subsets of {size}" if is_full.any() else size)
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
