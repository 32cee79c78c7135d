"""Figures show every point they are given, say what they show in legible words, and are the same
files for the same tables."""

from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.text import Text

from kdlib.compare.differences import objective_differences, paired_differences
from kdlib.plots import results as results_module
from kdlib.plots import theme
from kdlib.plots.curves import DIAGNOSTICS, diagnostics, learning_curves, probe_curves, probe_places
from kdlib.plots.images import region_grid
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
    """Diagnostics of features that are isotropic, but for their rank."""
    table = probe_table()
    d = 16
    shape = {"effective_rank": 7.5, "rank_ratio": 0.5, "mean_cosine": 0.01, "unit_variance": 1 / d}
    shape |= {"alignment": 1.5, "uniformity": -3.0, "uniformity_even": -3.6, "cka_teacher": 0.4}
    return table.assign(**shape, n_features=d)


def compared(results):
    return paired_differences(results, "random", MARGIN, 0.95)


def grid_input(n=4, channels=3, names=("easy", "ambiguous", "hard")):
    rng = np.random.default_rng(3)
    images = {r: rng.integers(0, 256, (n, channels, 8, 8), dtype=np.uint8) for r in names}
    return images, {region: [f"class_{i}" for i in range(n)] for region in names}


def exhibit_table():
    return pd.DataFrame(
        {
            "study": ["A", "A", "B"],
            "name": ["a random third that was the full set", "seed + epoch", "a third defect"],
            "measure": ["test accuracy of a random third", "draws that are shared", "tensors"],
            "defect": [0.94, 1.0, 0.0],
            "honest": [0.85, 0.0, 1.0],
            "tripwire": ["checks.budget, checks.coverage", "checks.gradient", "states.read_state"],
            "caught": [True, True, False],
        }
    )


def draw(name):
    """Each figure as the lab draws it, at its print size."""
    with theme.style():
        heights = {"accuracy": 4.4, "differences": 5.0, "regions": 3.2}
        fig = Figure(figsize=(theme.WIDE, heights.get(name, 3.4)))
        if name == "accuracy":
            results_module.accuracy_by_strategy(fig, result_table(), compared(result_table()))
        elif name == "differences":
            results_module.paired_differences(
                fig.subplots(), compared(result_table()), margin=MARGIN
            )
        elif name == "curves":
            learning_curves(fig.subplots(), curve_table())
        elif name == "diagnostics":
            diagnostics(fig, diagnostics_table())
        elif name == "places":
            probe_places(fig, places_table())
        elif name == "probes":
            for ax, kind in zip(fig.subplots(1, 2), ("linear", "knn"), strict=True):
                probe_curves(ax, probe_table(), probe=kind)
        elif name == "defects":
            results_module.defects(
                fig.subplots(), exhibit_table(), "digits: 3 defects in miniature"
            )
        else:
            region_grid(fig, *grid_input())
    return fig


FIGURES = (
    "accuracy", "differences", "curves", "probes", "diagnostics", "places", "regions", "defects",
)  # fmt: skip


def words(where):
    return [text.get_text() for text in where.findobj(Text) if text.get_text()]


def title_of(ax):
    """The title, whichever style was on when it was set."""
    return ax.get_title(loc="left") or ax.get_title()


def axis():
    return Figure(figsize=(theme.WIDE, 3.4), layout="constrained").subplots()


@pytest.mark.parametrize("name", FIGURES)
def test_all_text_is_legible_and_inside_the_figure(name):
    with theme.style():
        fig = draw(name)
        fig.draw_without_rendering()
        extent = fig.get_tightbbox()  # inches, everything that is drawn
    sizes = [text.get_fontsize() for text in fig.findobj(Text) if text.get_text().strip()]
    assert len(sizes) > 5
    assert min(sizes) >= 7
    assert min(extent.x0, extent.y0) >= 0
    assert extent.x1 <= fig.get_figwidth()
    assert extent.y1 <= fig.get_figheight()


def test_no_two_names_share_a_place_in_the_order():
    names = ["easy_random", "easy_hard", "easy_ambiguous", "aum_top", "aum_bottom", "hard"]
    order = ["hard", "aum_top", "aum_bottom", "easy_ambiguous", "easy_hard", "easy_random"]
    assert sorted(names, key=theme.sorting_key) == order
    assert len({theme.sorting_key(name) for name in names}) == len(names)


def test_a_legend_of_many_names_is_wrapped_and_stays_inside_the_figure():
    names = {"random": "easy_bottom_of_all_(refused)", "easy": "most_ambiguous_(refused)"}
    table = diagnostics_table()
    table["strategy"] = table["strategy"].replace(names)
    many = pd.concat([table, table.assign(objective="features")], ignore_index=True)
    objectives = ("kd", "a_smaller_teacher", "a_teacher_of_the_subset")
    results = result_table(objectives=objectives)
    with theme.style():
        figures = [Figure(figsize=(theme.WIDE, 4.4)) for _ in range(2)]
        diagnostics(figures[0], many)
        results_module.accuracy_by_strategy(figures[1], results, compared(results))
        for fig in figures:
            fig.draw_without_rendering()
            extent = fig.get_tightbbox()
            assert extent.x0 >= 0
            assert extent.x1 <= fig.get_figwidth()


@pytest.mark.parametrize("name", ["accuracy", "curves", "regions"])
def test_the_same_tables_give_the_same_bytes(name, tmp_path):
    again = draw(name)
    again.draw_without_rendering()  # as a notebook does that shows a figure before it is saved
    first = theme.save_figure(draw(name), tmp_path / "first", name)
    second = theme.save_figure(again, tmp_path / "second", name)
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_saved_files_have_print_size_embedded_fonts_and_no_date_or_version(tmp_path):
    from PIL import Image

    pdf, png = theme.save_figure(draw("curves"), tmp_path / "new" / "study", "curves")
    assert (pdf.name, png.name) == ("curves.pdf", "curves.png")
    assert {path.name for path in pdf.parent.iterdir()} == {"curves.pdf", "curves.png"}
    assert b"/Type42" not in pdf.read_bytes()
    assert b"/CIDFontType2" in pdf.read_bytes()  # how type 42 appears in a PDF
    for word in (b"CreationDate", b"Matplotlib", b"/Producer"):
        assert word not in pdf.read_bytes()
    with Image.open(png) as image:
        assert image.size == (round(theme.DPI * theme.WIDE), round(theme.DPI * 3.4))
        assert image.mode == "P"
        assert set(image.info) == {"dpi"}


def test_a_figure_that_cannot_be_drawn_leaves_the_old_files(tmp_path):
    pdf, png = theme.save_figure(draw("curves"), tmp_path, "curves")
    before = pdf.read_bytes(), png.read_bytes()
    broken = Figure()
    broken.text(0, 0, r"$\unknown$")
    with pytest.raises(ValueError, match="unknown"):
        theme.save_figure(broken, tmp_path, "curves")
    assert (pdf.read_bytes(), png.read_bytes()) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_style_ends_with_its_block_and_ignores_the_users_settings():
    with mpl.rc_context({"lines.linewidth": 9.0, "axes.grid": True}):
        with theme.style():
            assert mpl.rcParams["pdf.fonttype"] == 42
            assert not mpl.rcParams["axes.grid"]
            assert mpl.rcParams["lines.linewidth"] < 2
        assert mpl.rcParams["lines.linewidth"] == 9.0
        assert mpl.rcParams["axes.grid"]


def test_missing_columns_and_empty_tables_are_refused_by_name():
    with pytest.raises(ValueError, match="the table `curves` has no rows"):
        learning_curves(axis(), curve_table().iloc[:0])
    with pytest.raises(ValueError, match=r"lacks the columns \['test_accuracy'\]"):
        results_module.accuracy_by_strategy(
            Figure(), result_table().drop(columns="test_accuracy"), compared(result_table())
        )


def test_learning_curve_is_the_mean_and_the_band_one_standard_deviation():
    # Two seeds, 0.5 and 0.7 at step 10: mean 60 %, sample s.d. 10 * sqrt(2) points.
    runs = cells(objectives=("kd",), fractions=(0.33,), n_seeds=2).query("strategy == 'easy'")
    curves = pd.concat(
        [
            runs.assign(step=0, validation_accuracy=[0.2, 0.2]),
            runs.assign(step=10, validation_accuracy=[0.5, 0.7]),
        ]
    )
    ax = learning_curves(axis(), curves)
    line = next(line for line in ax.lines if line.get_label() == "easy")
    np.testing.assert_allclose(line.get_xydata(), [[0, 20], [10, 60]])
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(20)
    assert sorted({round(h, 6) for h in heights}) == pytest.approx(
        [20, 60 - 10 * np.sqrt(2), 60 + 10 * np.sqrt(2)], abs=1e-5
    )
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("optimiser steps", "validation accuracy (%)")
    assert "KD, 33 % of the data; mean ± s.d., S = 2" in words(ax)


def test_one_seed_has_no_band_and_says_so():
    ax = learning_curves(axis(), curve_table(n_seeds=1))
    assert not ax.collections
    assert any(text.endswith("one seed") for text in words(ax))


def test_curves_of_different_cells_are_never_averaged():
    both = curve_table(objectives=("kd", "plain"), fractions=(0.33, 0.1))
    ax = learning_curves(axis(), both)
    names = {line.get_label() for line in ax.lines if not line.get_label().startswith("_")}
    expected = {
        f"{s}, {f} %, {o}" for s in ("easy", "hard") for f in (33, 10) for o in ("KD", "plain")
    }
    assert expected <= names
    assert len(names) == 2 * (1 + 2 * 4)  # objectives x (full set, fractions x strategies)


def test_curves_with_a_hole_are_refused():
    table = curve_table()
    with pytest.raises(ValueError, match="not all evaluated at the same steps"):
        learning_curves(axis(), table.drop(index=table.index[7]))


def test_each_strategy_keeps_its_look_and_no_two_share_one():
    every = [
        *theme.STRATEGIES,
        *(f"{s}_{end}" for s in ("aum", "el2n", "loss", "dual") for end in ("top", "bottom")),
    ]
    lines = theme.line_looks(every)
    assert len({lines[name] for name in every}) == len(every)
    assert theme.line_looks(["hard", "easy"])["easy"] == lines["easy"]


def test_probe_curves_label_every_line_and_both_references():
    table = probe_table()
    ax = probe_curves(axis(), table, probe="knn")
    levels = {round(line.get_ydata()[0], 3) for line in ax.lines if len(set(line.get_ydata())) == 1}
    assert {48.5, 5.0} <= levels  # teacher 0.97 / 2, untrained 0.1 / 2
    assert {"teacher", "untrained", "full set", "random", "ambiguous (corner)"} <= set(words(ax))
    assert "k-NN probe, KD, 33 % of the data; mean ± s.d., S = 5" in words(ax)
    with pytest.raises(ValueError, match="no rows of probe 'lineal'; did you mean 'linear'"):
        probe_curves(axis(), table, probe="lineal")


def test_probe_curves_draw_the_data_and_layer_they_are_asked_for():
    own = probe_table()
    rows = own[own["probe"] == "linear"]
    shots = rows.assign(probe="few_shot_5", accuracy=0.3)
    elsewhere = rows.assign(on="mnist", accuracy=0.6)
    stage = rows[rows["strategy"] != "teacher"].assign(layer="stage1", accuracy=0.2)
    table = pd.concat([own, shots, elsewhere, stage], ignore_index=True)
    same = probe_curves(axis(), table), probe_curves(axis(), own)
    heights = [[list(line.get_ydata()) for line in ax.lines] for ax in same]
    assert heights[0] == heights[1]
    for asked, level, told in (
        ({"on": "mnist"}, 60, "linear probe, KD, 33 % of the data, on mnist"),
        ({"layer": "stage1"}, 20, "linear probe, KD, 33 % of the data, stage1"),
        ({"probe": "few_shot_5"}, 30, "5-shot probe, KD, 33 % of the data"),
    ):
        ax = probe_curves(axis(), table, **asked)
        curves = [line for line in ax.lines if len(line.get_ydata()) == 4]
        assert curves
        assert all(np.allclose(line.get_ydata(), level) for line in curves)
        assert title_of(ax).startswith(told)
        assert "teacher" in words(ax)
    for asked, told in (({"on": "mnst"}, "did you mean 'mnist'"), ({"layer": "stage2"}, "stage1")):
        with pytest.raises(ValueError, match=told):
            probe_curves(axis(), table, **asked)


def test_places_have_a_panel_for_each_data_set_and_a_marker_for_each_layer():
    fig, own = draw("places"), places_table()
    own = own[(own["on"] == "own") & (own["layer"] == "features")]
    here, there = fig.axes
    assert [title_of(ax) for ax in fig.axes] == ["own data", "on mnist"]
    names = [label.get_text() for label in here.get_yticklabels()]
    assert (names[0], names[-1]) == ("untrained", "teacher")
    assert names[1:-1] == ["full set", "random", "easy", "ambiguous (corner)", "hard"]
    means = {
        (names[round(line.get_ydata()[0])], line.get_marker()): line.get_xdata()[0]
        for line in here.lines
        if line.get_markersize() == 4.5
    }
    last = own[own["step"] == 300].groupby("strategy")["accuracy"].mean()
    assert means["random", "o"] == pytest.approx(100 * last["random"])
    assert means["random", "D"] == pytest.approx(20)
    assert means["teacher", "o"] == pytest.approx(97)
    assert means["untrained", "o"] == pytest.approx(10)
    assert ("teacher", "D") not in means
    assert {line.get_xdata()[0] for line in there.lines if len(line.get_xdata())} == {60}
    (legend,) = fig.legends
    assert {"last layer", "stage1"} <= {text.get_text() for text in legend.get_texts()}
    with pytest.raises(ValueError, match="no rows"):
        probe_places(Figure(), places_table(), probe="knn")


def test_diagnostics_have_a_panel_each_with_the_level_of_theory():
    fig = draw("diagnostics")
    assert len(fig.axes) == 6
    for ax, (name, label, level, told) in zip(fig.axes, DIAGNOSTICS, strict=True):
        theory = {"effective_rank": 15, "unit_variance": 1 / 16, "uniformity": -3.6}.get(
            name, level
        )
        flat = [line.get_ydata() for line in ax.lines if len(line.get_ydata()) == 2]
        assert [list(y) for y in flat] == [pytest.approx([theory, theory])]
        curves = [line for line in ax.lines if len(line.get_ydata()) == 4]
        assert len(curves) == diagnostics_table()["strategy"].nunique() - 2  # and the references
        assert all(line.get_ydata()[0] == diagnostics_table()[name].iloc[0] for line in curves)
        assert ax.get_title(loc="left") == f"{label}\n(dotted: {told})"
    (legend,) = fig.legends
    assert {"full set", "random"} <= {text.get_text() for text in legend.get_texts()}
    assert legend.get_title().get_text() == "KD, 33 % of the data; mean ± s.d., S = 5"
    table = diagnostics_table()
    with pytest.raises(ValueError, match=r"lacks the columns \['alignment'\]"):
        diagnostics(Figure(), table.drop(columns="alignment"))
    with pytest.raises(ValueError, match="no rows"):
        diagnostics(Figure(), table[table["strategy"] == "teacher"])


def test_each_untrained_student_has_a_level_of_its_own():
    ax = probe_curves(axis(), probe_table(students=("tiny", "wide")))
    assert {"untrained, tiny", "untrained, wide", "teacher", "easy, wide"} <= set(words(ax))


def test_labels_at_the_lines_do_not_overlap():
    with theme.style():
        fig = draw("curves")
        fig.draw_without_rendering()
        boxes = sorted(
            (text.get_window_extent() for text in fig.axes[0].texts), key=lambda box: box.y0
        )
    assert len(boxes) == len(ACCURACY)
    assert all(low.y1 <= high.y0 + 1 for low, high in pairwise(boxes))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.001, 0.1))
def test_spread_labels_keep_order_and_distance_and_stay_near(heights, gap):
    heights = sorted(heights)
    places = theme.spread(heights, gap)
    assert len(places) == len(heights)
    assert all(b - a >= gap - 1e-5 for a, b in pairwise(places))
    assert min(places) >= 0
    assert max(places) <= 1 + 1e-5
    if all(b - a >= gap for a, b in pairwise(heights)):
        assert places == pytest.approx(heights, abs=1e-5)


def test_accuracy_shows_each_run_the_means_and_the_full_set():
    results = result_table()
    fig = results_module.accuracy_by_strategy(Figure(), results, compared(results))
    assert [title_of(ax) for ax in fig.axes] == [
        "33 % of the data",
        "10 % of the data",
    ]
    for ax, fraction in zip(fig.axes, (0.33, 0.1), strict=True):
        shown = results[results["fraction"] == fraction]
        dots = [line for line in ax.lines if line.get_markersize() == 2.6]
        seen = np.sort(np.concatenate([line.get_xdata() for line in dots]))
        np.testing.assert_allclose(seen, np.sort(100 * shown["test_accuracy"]))
        means = [line.get_xdata()[0] for line in ax.lines if line.get_markersize() == 5.5]
        expected = 100 * shown.groupby(["strategy", "objective"])["test_accuracy"].mean()
        np.testing.assert_allclose(np.sort(means), np.sort(expected))
        full = (
            100
            * results[results["strategy"] == "full"].groupby("objective")["test_accuracy"].mean()
        )
        upright = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2
                   and line.get_marker() == "None"]  # fmt: skip
        np.testing.assert_allclose(np.sort(upright), np.sort(full))
        assert ax.get_xlabel() == "test accuracy at the last step (%)"
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert names in ([], ["random", "easy", "ambiguous (corner)", "hard"])
    (legend,) = fig.legends
    assert {"KD: mean", "KD: full set", "one seed", "against random:", "worse"} <= set(
        words(legend)
    )


def test_each_student_has_a_row_of_panels():
    results = result_table(students=("tiny", "wide"))
    fig = results_module.accuracy_by_strategy(Figure(), results, compared(results))
    titles = [title_of(ax) for ax in fig.axes]
    assert titles == [f"{s}, {f} % of the data" for s in ("tiny", "wide") for f in (33, 10)]


def test_refused_runs_are_not_drawn():
    results = result_table()
    comparison = compared(results)
    results.loc[3, "refused"] = True
    with pytest.raises(ValueError, match="1 of 90 rows are refused"):
        results_module.accuracy_by_strategy(Figure(), results, comparison)


def test_results_without_subsets_are_refused():
    results = result_table()
    with pytest.raises(ValueError, match="full set alone"):
        results_module.accuracy_by_strategy(
            Figure(), results[results["strategy"] == "full"], compared(results)
        )


def test_differences_are_drawn_in_points_with_their_intervals_and_verdicts():
    comparison = compared(result_table())
    ax = results_module.paired_differences(axis(), comparison, margin=MARGIN)
    markers = {"better": "^", "worse": "v", "equivalent": "s", "inconclusive": "o"}
    points = [line for line in ax.lines if line.get_marker() in markers.values()]
    drawn = sorted((line.get_marker(), round(float(line.get_xdata()[0]), 6)) for line in points)
    assert drawn == sorted(
        (markers[row.verdict], round(100 * row.difference, 6)) for row in comparison.itertuples()
    )
    assert len({row.verdict for row in comparison.itertuples()}) > 1
    spans = {
        tuple(np.round(line.get_xdata(), 6)) for line in ax.lines if len(line.get_xdata()) == 2
    }
    for row in comparison.itertuples():
        assert (round(100 * row.low, 6), round(100 * row.high, 6)) in spans
        assert (round(100 * row.low90, 6), round(100 * row.high90, 6)) in spans
    assert any(
        patch.get_x() == pytest.approx(-1) and patch.get_width() == pytest.approx(2)
        for patch in ax.patches
    )
    assert ax.get_xlabel() == "test accuracy, strategy minus random, seed by seed (points)"
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert labels[:2] == ["against 33 %, KD", "against 33 %, plain"]  # the full set comes first
    assert len(labels) == len(comparison)
    assert {"full set", "ambiguous (corner)", "margin, ±1 point"} <= set(words(ax))


def test_differences_of_objectives_say_what_is_subtracted():
    comparison = objective_differences(result_table(), "plain", MARGIN, 0.95)
    ax = results_module.paired_differences(axis(), comparison, margin=MARGIN)
    assert ax.get_xlabel() == "test accuracy, KD minus plain, seed by seed (points)"


def test_differences_at_one_fraction_and_objective_name_them_below():
    comparison = compared(result_table(objectives=("kd",), fractions=(0.33,)))
    ax = results_module.paired_differences(axis(), comparison, margin=MARGIN)
    assert ax.get_xlabel().endswith("\nKD, 33 % of the data")


def test_a_comparison_without_pairs_is_shown_as_such():
    results = result_table()
    results.loc[results["strategy"] == "hard", "refused"] = True
    ax = results_module.paired_differences(axis(), compared(results), margin=MARGIN)
    assert sum(text.strip() == "no paired seeds" for text in words(ax)) == 4


def test_another_margin_than_that_of_the_verdicts_is_refused():
    with pytest.raises(ValueError, match=r"margin is 0.02 but the verdicts were reached with 0.01"):
        results_module.paired_differences(axis(), compared(result_table()), margin=0.02)


@pytest.mark.parametrize("channels", [1, 3])
def test_region_grid_shows_every_image_unchanged_and_square(channels):
    images, titles = grid_input(channels=channels)
    images["hard"], titles["hard"] = images["hard"][:2], titles["hard"][:2]  # rows may be short
    fig = region_grid(Figure(figsize=(theme.WIDE, 4)), images, titles)
    (ax,) = fig.axes
    pixels = np.concatenate(list(images.values()))
    assert len(ax.images) == len(pixels) == 10
    for drawn, image in zip(ax.images, pixels, strict=True):
        shown = np.asarray(drawn.get_array())
        shown = shown[None] if channels == 1 else shown.transpose(2, 0, 1)
        np.testing.assert_array_equal(shown, image)
        assert drawn.get_interpolation() == "nearest"
        x0, x1, y0, y1 = drawn.get_extent()
        assert abs(x1 - x0) == pytest.approx(abs(y1 - y0))
    assert {"easy-to-learn", "ambiguous", "hard-to-learn", "class 3"} <= set(words(ax))
    assert fig.get_figheight() <= 4


def test_long_captions_are_cut_to_the_width_of_their_image():
    images, titles = grid_input(n=12)
    titles["easy"] = ["a caption far too long for a small image"] * 12
    fig = region_grid(Figure(figsize=(theme.WIDE, 3)), images, titles)
    captions = [text for text in words(fig) if text.startswith("a ")]
    assert len(captions) == 12
    assert all(text.endswith("…") and len(text) < 12 for text in captions)


@pytest.mark.parametrize(
    ("images", "titles", "message"),
    [
        ({}, {}, "no images"),
        ({"easy": np.zeros((2, 1, 8, 8))}, {"easy": ["a", "b"]}, "float64 of shape"),
        ({"easy": np.zeros((2, 8, 8), np.uint8)}, {"easy": ["a", "b"]}, r"expected uint8 \(n, C"),
        ({"easy": np.zeros((2, 1, 8, 8), np.uint8)}, {"easy": ["a"]}, "2 images and 1 captions"),
    ],
)
def test_region_grid_refuses_what_is_not_a_row_of_images(images, titles, message):
    with pytest.raises(ValueError, match=message):
        region_grid(Figure(), images, titles)


def test_rows_that_do_not_fit_are_refused():
    images, titles = grid_input(names=[f"class_{i}" for i in range(10)])
    with pytest.raises(ValueError, match="10 rows do not fit into a height of 1 in"):
        region_grid(Figure(figsize=(theme.WIDE, 1)), images, titles)


def test_many_objectives_stand_below_each_other_in_a_panel_for_each_subset():
    names = [f"objective{i}" for i in range(7)]
    results = pd.DataFrame(
        {
            "student": "tiny", "strategy": strategy, "fraction": fraction, "objective": name,
            "seed": seed, "test_accuracy": 0.5 + 0.01 * number + 0.001 * seed,
        }
        for strategy, fraction in (("full", 1.0), ("random", 0.1))
        for number, name in enumerate(names)
        for seed in (0, 1, 2)
    )  # fmt: skip
    fig = results_module.accuracy_by_objective(Figure(), results, names)
    full, random = fig.axes
    assert [label.get_text() for label in full.get_yticklabels()] == [
        theme.in_words(name) for name in names
    ]
    assert random.get_title() == f"{theme.in_words('random')}, 10 % of the data"
    means = [line.get_xdata()[0] for line in full.lines if len(line.get_xdata()) == 1]
    assert means == pytest.approx([50.1 + i for i in range(7)])
    both = pd.concat([results, results.assign(student="other")])
    fig = results_module.accuracy_by_objective(Figure(), both, names)
    assert [title_of(ax) for ax in fig.axes] == [
        f"{student}, {subset}"
        for student in ("tiny", "other")
        for subset in ("full set", "random, 10 % of the data")
    ]


def test_two_students_share_the_names_and_the_legend_of_their_differences():
    comparison = compared(result_table(students=("tiny", "wide")))
    fig = results_module.differences(Figure(figsize=(theme.WIDE, 5)), comparison, MARGIN)
    assert [title_of(ax) for ax in fig.axes] == ["tiny", "wide"]
    left, right = fig.axes
    assert left.get_yticks().tolist() == right.get_yticks().tolist()
    assert {label.get_text() for label in right.get_yticklabels()} == {""}
    assert left.get_legend() is None
    (legend,) = fig.legends
    assert {"better", "worse", "equivalent", "inconclusive", "margin, ±1 point"} <= set(
        words(legend)
    )
    n_marks = [
        sum(
            line.get_marker() in {m for _, m in results_module.VERDICTS.values()}
            for line in ax.lines
        )
        for ax in fig.axes
    ]
    assert n_marks == [len(comparison) // 2] * 2


@pytest.mark.parametrize("kind", ["accuracy", "differences", "fractions"])
def test_large_studies_stay_legible_and_inside_a_page(kind):
    students = ("resnet8", "mobilenetv2")
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 3.0))
        if kind == "fractions":
            fractions = (0.01, 0.05, 0.1, 0.25, 0.33, 0.55)
            results_module.accuracy_by_fraction(
                fig, result_table(students=students, fractions=fractions)
            )
        else:
            parts = [
                result_table(students=students, fractions=(0.33,)).assign(
                    strategy=lambda t, i=i: t["strategy"].where(
                        t["strategy"].isin(["random", "full"]), t["strategy"] + f"_{i}_bottom"
                    )
                )
                for i in range(4)
            ]
            results = pd.concat(parts).drop_duplicates([*AXES, "seed"])
            assert results["strategy"].nunique() == 14
            if kind == "accuracy":
                results_module.accuracy_by_strategy(fig, results, compared(results))
            else:
                results_module.differences(fig, compared(results), MARGIN)
        fig.draw_without_rendering()
        extent = fig.get_tightbbox()
        rows = [label.get_window_extent() for label in fig.axes[0].get_yticklabels()]
    assert fig.get_figheight() <= theme.TALL
    assert min(extent.x0, extent.y0) >= -0.01
    assert extent.x1 <= fig.get_figwidth() + 0.01
    assert extent.y1 <= fig.get_figheight() + 0.01
    tops = sorted((box.y0, box.y1) for box in rows if box.height)
    assert all(low[1] <= high[0] + 1 for low, high in pairwise(tops))
    (below,) = [a for a in [fig.axes[0].get_xlabel() or fig.get_supxlabel()] if a]
    assert "accuracy" in below or "fraction" in below


def test_fractions_show_the_mean_and_spread_of_each_objective_up_to_the_full_set():
    results = result_table(fractions=(0.1, 0.25, 0.5)).query("strategy in ('full', 'random')")
    (ax,) = results_module.accuracy_by_fraction(Figure(), results).axes
    assert ax.get_xscale() == "log"
    drawn = {c.get_label(): c for c in ax.containers}
    assert set(drawn) == {"KD", "plain"}
    for name, objective in (("KD", "kd"), ("plain", "plain")):
        line, _, (bars,) = drawn[name]
        of = results[results["objective"] == objective].groupby("fraction")["test_accuracy"]
        x, y = line.get_xydata().T
        np.testing.assert_allclose(x, [0.1, 0.25, 0.5, 1.0])
        np.testing.assert_allclose(y, 100 * of.mean())
        heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
        np.testing.assert_allclose(heights, 200 * of.std())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["10", "25", "50", "100"]
    assert "random; mean ± s.d., S = 5" in words(ax)


def test_fractions_of_many_strategies_have_a_level_for_the_full_set():
    results = result_table(fractions=(0.1, 0.25, 0.5))
    kd, _ = results_module.accuracy_by_fraction(Figure(), results).axes
    assert {c.get_label() for c in kd.containers} == {
        "random",
        "easy",
        "ambiguous (corner)",
        "hard",
    }
    level = 100 * results.query("strategy == 'full' and objective == 'kd'")["test_accuracy"].mean()
    assert any(np.allclose(line.get_ydata(), level) for line in kd.lines)
    assert "full set" in words(kd)


def test_a_probe_is_named_where_it_is_what_is_compared():
    results = result_table().assign(linear_accuracy=lambda t: t["test_accuracy"] / 2)
    fig = results_module.accuracy_by_strategy(
        Figure(), results, compared(results), "linear_accuracy"
    )
    assert fig.axes[0].get_xlabel() == "linear probe's test accuracy (%)"
    seen = np.concatenate([x.get_xdata() for x in fig.axes[0].lines if x.get_markersize() == 2.6])
    assert seen.max() < 50
    rows = paired_differences(results, "random", MARGIN, 0.95, "linear_accuracy")
    ax = results_module.paired_differences(axis(), rows, MARGIN)
    assert ax.get_xlabel().startswith("linear probe's test accuracy, strategy minus random")


def test_the_way_from_a_short_line_to_its_label_is_level_and_dotted():
    table = curve_table()
    short = table[(table["strategy"] != "easy") | (table["step"] <= 100)]
    ax = learning_curves(axis(), short)
    dotted = [x for x in ax.lines if not x.get_label().startswith(("easy", "full")) and
              x.get_linestyle() == "--" and x.get_transform() == ax.transAxes]  # fmt: skip
    (leader,) = dotted
    (start, end), (low, high) = leader.get_xdata(), leader.get_ydata()
    assert (start, end) == (pytest.approx(1 / 3), 1.0)
    assert low == high


def test_defects_stand_beside_honest_numbers_with_their_tripwires():
    table = exhibit_table()
    ax = results_module.defects(axis(), table, "title")
    marks = {
        marker: [(x, y) for line in ax.lines if line.get_marker() == marker
                 for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
        for marker in ("X", "o")
    }  # fmt: skip
    assert marks["X"] == [(94.0, 0), (100.0, 1), (0.0, 2)]
    assert marks["o"] == [(85.0, 0), (0.0, 1), (100.0, 2)]
    told = [text.get_text() for text in ax.texts]
    for row in table.itertuples():
        assert f"{row.study}  {row.name}" in told
        assert row.measure in told
        assert f"{100 * row.defect:.1f}" in told
    assert "checks.budget\nchecks.coverage" in told
    assert "not caught by\nstates.read_state" in told
    assert sum("not caught" in text for text in told) == 1
    assert ax.get_xlabel() == "what each row measures (%)"
    with pytest.raises(ValueError, match=r"expected \[0, 100\]"):
        results_module.defects(axis(), table.assign(defect=-0.1))
    with pytest.raises(ValueError, match="lacks the columns"):
        results_module.defects(axis(), table.drop(columns="honest"))
