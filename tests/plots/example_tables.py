"""Tables of made-up studies for the tests of figures, and what these tests read off a figure."""

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.text import Text

from kdlib.compare.differences import paired_differences
from kdlib.plots import theme
from kdlib.plots.curves import learning_curves
from kdlib.study.evaluation import AXES

MARGIN = 0.01
ACCURACY = {"full": 0.94, "random": 0.90, "easy": 0.87, "ambiguous_corner": 0.899, "hard": 0.78}


def cells(students=("tiny",), objectives=("kd", "plain"), fractions=(0.33, 0.1), n_seeds=5):
    """One row per run, without what was measured."""
    subsets = [(s, f) for s in ACCURACY if s != "full" for f in fractions]
    rows = [
        (student, strategy, fraction, objective, seed)
        for student in students
        for objective in objectives
        for strategy, fraction in [("full", 1.0), *subsets]
        for seed in range(n_seeds)
    ]
    return pd.DataFrame(rows, columns=[*AXES, "seed"])


def result_table(**axes):
    runs = cells(**axes)
    noise = np.random.default_rng(1).normal(0, 0.004, len(runs))
    return runs.assign(
        test_accuracy=runs["strategy"].map(ACCURACY) + noise,
        steps=100,
        samples=1600,
        unique_examples=(900 * runs["fraction"]).round(),
        refused=False,
    )


def series(steps, value, **axes):
    """Every run at every step, accuracy rising from 0.1 with a seeded wobble."""
    runs = cells(**axes).merge(pd.Series(steps, name="step"), how="cross")
    noise = np.random.default_rng(2).normal(0, 0.004, len(runs))
    rise = 1 - np.exp(-runs["step"] / 50)
    return runs.assign(
        **{value: 0.1 + (runs["strategy"].map(ACCURACY) - 0.1) * rise + noise * rise}
    )


def curve_table(**axes):
    axes = {"objectives": ("kd",), "fractions": (0.33,), **axes}
    return series(range(0, 301, 20), "validation_accuracy", **axes)


def probe_table(**axes):
    axes = {"objectives": ("kd",), "fractions": (0.33,), **axes}
    table = series([0, 30, 100, 300], "accuracy", **axes)
    teacher = table.iloc[:1].assign(strategy="teacher", seed=-1, step=-1, accuracy=0.97)
    untrained = table[table["step"] == 0].assign(strategy="untrained", accuracy=0.1)
    table = pd.concat([table, teacher, untrained], ignore_index=True)
    table = table.assign(on="own", layer="features")
    return pd.concat(
        [table.assign(probe="linear"), table.assign(probe="knn", accuracy=table["accuracy"] / 2)],
        ignore_index=True,
    )


def places_table():
    """Linear probes of two layers on own data, and of the last one on MNIST."""
    own = probe_table()
    own = own[own["probe"] == "linear"]
    stage = own[own["strategy"] != "teacher"].assign(layer="stage1", accuracy=0.2)
    return pd.concat([own, stage, own.assign(on="mnist", accuracy=0.6)], ignore_index=True)


def diagnostics_table():
    """Diagnostics of features that are isotropic, but for their rank and their CKA with the
    teacher, which differ from strategy to strategy."""
    table = probe_table()
    d, better = 16, table["strategy"].map({**dict.fromkeys(ACCURACY, 0.0), "easy": 0.5}).fillna(0)
    shape = {"effective_rank": 7.5, "rank_ratio": 0.5, "mean_cosine": 0.01, "unit_variance": 1 / d}
    shape |= {"alignment": 1.5, "uniformity": -3.0, "uniformity_even": -3.6, "cka_teacher": 0.4}
    table = table.assign(**shape, n_features=d)
    for name in ("effective_rank", "rank_ratio", "cka_teacher"):
        table[name] *= 1 + better
    return table


def compared(results):
    return paired_differences(results, "random", MARGIN, 0.95)


def grid_input(n=4, channels=3, names=("easy", "ambiguous", "hard")):
    rng = np.random.default_rng(3)
    images = {r: rng.integers(0, 256, (n, channels, 8, 8), dtype=np.uint8) for r in names}
    return images, {region: [f"class_{i}" for i in range(n)] for region in names}


def words(where):
    return [text.get_text() for text in where.findobj(Text) if text.get_text()]


def title_of(ax):
    """The title, whichever style was on when it was set."""
    return ax.get_title(loc="left") or ax.get_title()


def check_legible(fig):
    """All text is at least 7 pt high, and all that is drawn lies inside the figure."""
    with theme.style():
        fig.draw_without_rendering()
        extent = fig.get_tightbbox()  # inches, everything that is drawn
    sizes = [text.get_fontsize() for text in fig.findobj(Text) if text.get_text().strip()]
    assert len(sizes) > 5
    assert min(sizes) >= 7
    assert min(extent.x0, extent.y0) >= 0
    assert extent.x1 <= fig.get_figwidth()
    assert extent.y1 <= fig.get_figheight()


def check_same_files(fig, again, folder):
    """Two figures of the same tables are saved as the same bytes."""
    again.draw_without_rendering()  # as a notebook does that shows a figure before it is saved
    first = theme.save_figure(fig, folder / "first", "figure")
    second = theme.save_figure(again, folder / "second", "figure")
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def axis():
    return Figure(figsize=(theme.WIDE, 3.4), layout="constrained").subplots()


def learning_curves_figure():
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 3.4))
        learning_curves(fig.subplots(), curve_table())
    return fig
