"""Maps show every example, as a point or in a bin, and are the same files for the same tables."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from plots.example_tables import check_legible, check_same_files, title_of, words

from kdlib.cartography.datamap import regions
from kdlib.plots import theme
from kdlib.plots.datamaps import against, datamap, draw_map, draw_pair, forming
from kdlib.plots.map_tables import (
    BINS,
    binned,
    class_table,
    map_points,
    pair_table,
    region_table,
)

DENSE = 200_000
FIGURES = ("datamap", "classes", "dense", "forming", "against")


def trajectories(n=300, n_epochs=10, seed=0):
    """Maps after 1, n_epochs // 2 and n_epochs epochs of p(gold label) drawn from Beta laws."""
    skill = np.random.default_rng(9).beta(3, 1, n)  # the same examples whatever the seed
    rng = np.random.default_rng(seed)
    rise = np.clip(skill * (1 - np.exp(-np.arange(1, n_epochs + 1)[:, None] / 3)), 0.02, 0.98)
    p = rng.beta(8 * rise, 8 * (1 - rise))  # (E, N)
    found = {}
    for epochs in (1, n_epochs // 2, n_epochs):
        seen = p[:epochs]
        table = pd.DataFrame(
            {
                "label": np.arange(n) % 3,
                "confidence": seen.mean(0),
                "variability": seen.std(0),
                "correctness": (seen > 0.5).mean(0),
            },
            index=pd.Index(np.arange(n), name="example_id"),
        )
        for rule in ("variability", "corner"):
            names = regions(
                table["confidence"].to_numpy(), table["variability"].to_numpy(), rule=rule
            )
            table[f"region_{rule}"] = pd.Categorical(names, ["easy", "ambiguous", "hard"])
        found[epochs] = table
    return found


def map_table(n=300, seed=0):
    return trajectories(n, seed=seed)[10]


@pytest.fixture(scope="module")
def large():
    return map_table(DENSE)


def draw(name, large=None):
    """Each figure at its print size."""
    with theme.style():
        fig = Figure(figsize=(theme.WIDE, 2.6 if name in ("forming", "against") else 4.6))
        if name == "datamap":
            datamap(fig, map_table(), "digits, N = 300, E = 10")
        elif name == "classes":
            datamap(fig, map_table(), "digits", class_names=["cat", "dog", "automobile"])
        elif name == "dense":
            datamap(fig, large, "digits, N = 200,000, E = 10")
        elif name == "forming":
            forming(fig, trajectories(), "digits")
        else:
            against(fig, map_table(), map_table(seed=1), ("tiny", "wide"), "digits")
    return fig


def shown_bins(ax):
    """Which bins of a density are drawn, a row for each bin of y."""
    (image,) = ax.images
    return np.asarray(image.get_array())[..., 3] > 0


@pytest.mark.parametrize("name", FIGURES)
def test_all_text_is_legible_and_inside_the_figure(name, large):
    check_legible(draw(name, large))


@pytest.mark.parametrize("name", FIGURES[1:])  # the classes are drawn below the first
def test_the_same_tables_give_the_same_bytes(name, tmp_path, large):
    check_same_files(draw(name, large), draw(name, large), tmp_path)


def test_datamap_shows_every_example_once_in_the_colour_of_its_correctness():
    table = map_table(500)
    fig = datamap(Figure(), table, "N = 500, E = 10")
    ax, above, right, _, far_right = fig.axes
    (points,) = ax.collections
    assert points.get_rasterized()
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 0.5), (0, 1))
    places = pd.DataFrame(np.asarray(points.get_offsets()), columns=["variability", "confidence"])
    places["tenth"] = np.round(np.asarray(points.get_array()) * 10 - 0.5)
    # Correctness k / 10 lies in tenth k, and 1.0 in the last one.
    expected = table.assign(tenth=(10 * table["correctness"]).round().clip(upper=9))
    order = ["variability", "confidence"]
    np.testing.assert_allclose(
        places.sort_values(order), expected[[*order, "tenth"]].sort_values(order)
    )
    for histogram, size in ((above, "height"), (right, "width"), (far_right, "width")):
        assert sum(getattr(bar, f"get_{size}")() for bar in histogram.patches) == 500
    bars = [bar.get_width() for bar in far_right.patches]
    assert bars == [int((expected["tenth"] == k).sum()) for k in range(10)]


def test_datamap_of_many_examples_is_a_raster_that_counts_each_of_them(large):
    fig = datamap(Figure(), large, "many")
    ax, above, right, _, far_right = fig.axes
    assert not [drawn for drawn in ax.get_children() if isinstance(drawn, PathCollection)]
    x, y, correctness = (large[c].to_numpy() for c in ("variability", "confidence", "correctness"))
    counts, means = binned(x, y, correctness, np.ones(DENSE), (0.5, 1))
    assert counts.sum() == DENSE
    assert (counts * means).sum() == pytest.approx(correctness.sum())
    np.testing.assert_array_equal(shown_bins(ax), counts > 0)
    (image,) = ax.images
    assert image.get_rasterized()
    assert image.get_extent() == [0, 0.5, 0, 1]
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 0.5), (0, 1))
    colours = np.asarray(image.get_array())
    opacity = colours[..., 3]
    assert opacity[counts == 1].max() == pytest.approx(0.4) == opacity[counts > 0].min()
    assert opacity[counts == counts.max()].min() == pytest.approx(1)
    row, column = np.argwhere((counts > 0) & (means > 0.81) & (means < 0.89))[0]
    np.testing.assert_allclose(colours[row, column, :3], theme.CORRECTNESS(8)[:3], atol=1e-6)
    for histogram, size in ((above, "height"), (right, "width"), (far_right, "width")):
        assert sum(getattr(bar, f"get_{size}")() for bar in histogram.patches) == DENSE
    assert any("N = 200,000 training images" in text and "Bins:" in text for text in words(fig))
    assert not any("Bins:" in text for text in words(draw("datamap")))


def test_bins_agree_with_a_slow_loop_and_keep_both_ends():
    rng = np.random.default_rng(2)
    x, y, values = rng.uniform(0, 0.5, 200), rng.uniform(0, 1, 200), rng.uniform(0, 1, 200)
    x[:2], y[:2] = (0, 0.5), (0, 1)
    weights = rng.integers(1, 4, 200)
    counts, sums = np.zeros((BINS, BINS), int), np.zeros((BINS, BINS))
    for a, b, value, n in zip(x, y, values, weights, strict=True):
        place = min(int(b * BINS), BINS - 1), min(int(a / 0.5 * BINS), BINS - 1)
        counts[place] += n
        sums[place] += n * value
    found, means = binned(x, y, values, weights, (0.5, 1))
    np.testing.assert_array_equal(found, counts)
    np.testing.assert_allclose(means, sums / np.maximum(counts, 1))


def test_a_map_is_the_same_drawn_from_its_small_tables(large, tmp_path):
    for table in (map_table(), large):
        points, of_regions = map_points(table), region_table(table, "region_variability")
        of_classes = class_table(table, "region_variability", ["cat", "dog", "fox"])
        assert points["n"].sum() == len(table)
        assert len(points) <= min(len(table), 30_000)
        again = map_points(points.astype({"variability": "float32", "confidence": "float32"}))
        np.testing.assert_allclose(again, points, atol=1e-6)
        with theme.style():
            fig, direct = (Figure(figsize=(theme.WIDE, 4.6)) for _ in range(2))
            draw_map(fig, points, of_regions, of_classes, "t")
            datamap(direct, table, "t", class_names=["cat", "dog", "fox"])
        check_same_files(fig, direct, tmp_path)


def test_the_caption_of_a_map_says_what_n_e_circles_and_regions_are():
    for rule, said in (
        ("region_variability", "the third of highest variability"),
        ("region_corner", "nearest of three corners"),
    ):
        (legend,) = datamap(Figure(figsize=(theme.WIDE, 4.6)), map_table(), "t", rule).legends
        caption = " ".join(legend.get_title().get_text().split())
        for words_of in ("N = 300 training images", "E = recorded epochs", "Circles mark", said):
            assert words_of in caption


def test_datamap_names_title_axes_and_the_size_of_each_region():
    table = map_table(500)
    for column in ("region_variability", "region_corner"):
        shown = words(datamap(Figure(), table, "digits, N = 500, E = 10", column))
        for text in (
            "digits, N = 500, E = 10", "variability", "confidence",
            "correctness (fraction of epochs)",
        ):  # fmt: skip
            assert text in shown
        for region, count in table[column].value_counts().items():
            assert (f"{theme.REGIONS[region]} ({count})" in shown) == (count > 0)


def test_datamap_region_names_stand_where_no_example_can_be(large):
    for table in (map_table(), large):
        with theme.style():
            fig = datamap(Figure(figsize=(theme.WIDE, 4.6)), table, "t")
            fig.draw_without_rendering()
            ax = fig.axes[0]
            names = [
                t for t in ax.texts if t.get_text().startswith(("easy", "ambi", "hard", "large"))
            ]
            corners = [
                ax.transData.inverted().transform(Text.get_window_extent(t).corners())
                for t in names
            ]
        assert len(corners) == 4
        for x, y in np.concatenate(corners):
            assert x**2 > y * (1 - y)


def test_datamap_without_examples_of_a_region_does_not_name_it():
    table = map_table()
    shown = words(datamap(Figure(), table[table["region_variability"] != "hard"], "t"))
    assert not any(text.startswith("hard-to-learn") for text in shown)


def test_classes_are_drawn_below_as_shares_of_their_regions():
    table = map_table(31)  # 11, 10, 10 of each class
    fig = datamap(Figure(figsize=(theme.WIDE, 4.6)), table, "t", class_names=["cat", "dog", "fox"])
    ax = fig.axes[5]
    expected = pd.crosstab(table["label"], table["region_variability"], normalize="index")
    widths = [[bar.get_width() for bar in bars] for bars in ax.containers]
    np.testing.assert_allclose(widths, 100 * expected[["easy", "ambiguous", "hard"]].to_numpy().T)
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "cat (11)", "dog (10)", "fox (10)"
    ]  # fmt: skip
    assert (ax.get_xlim(), ax.get_xlabel()) == ((0, 100), "% of the class")
    assert {"easy-to-learn", "ambiguous", "hard-to-learn"} <= set(words(ax.get_legend()))
    assert fig.get_figheight() > 4.6


def test_classes_are_left_out_without_labels_without_names_and_when_there_are_many():
    table = map_table()
    for given, names in (
        (table.drop(columns="label"), ["cat", "dog", "fox"]),
        (table, None),
        (table, [str(i) for i in range(21)]),
    ):
        fig = datamap(Figure(figsize=(6, 4)), given, "t", class_names=names)
        assert (len(fig.axes), fig.get_figheight()) == (5, 4.45)  # with room for the caption
    with pytest.raises(ValueError, match="labels run from 0 to 2 but there are 2 class names"):
        datamap(Figure(), table, "t", class_names=["cat", "dog"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variability": 0.7}, r"variability runs from 0.7 to 0.7.*\[0, 0.5\].*step datamap"),
        ({"correctness": 7.0}, r"correctness runs from 7"),
        ({"confidence": np.nan}, r"300 are NaN"),
        ({"region_variability": "simple"}, "unknown region 'simple' in 'region_variability'"),
        ({"region_variability": None}, "unknown region None"),
    ],
)
def test_datamap_refuses_scores_out_of_range_and_unknown_regions(change, message):
    with pytest.raises(ValueError, match=message):
        datamap(Figure(), map_table().assign(**change), "t")


def test_missing_columns_and_empty_tables_are_refused_by_name():
    with pytest.raises(ValueError, match=r"`datamap` lacks the columns \['region_other'\]"):
        datamap(Figure(), map_table(), "t", regions="region_other")
    with pytest.raises(ValueError, match="the table `datamap` has no rows"):
        datamap(Figure(), map_table().iloc[:0], "t")
    with pytest.raises(ValueError, match=r"`after 3 epochs` lacks the columns \['correctness'\]"):
        forming(Figure(), {3: map_table().drop(columns="correctness")}, "t")


def test_a_forming_map_has_a_panel_for_each_number_of_epochs_in_order():
    snapshots = trajectories()
    fig = forming(Figure(), dict(reversed(snapshots.items())), "digits, tiny")
    *axs, bar = fig.axes
    assert [title_of(ax) for ax in axs] == ["after 1 epoch", "after 5 epochs", "after 10 epochs"]
    for ax, table in zip(axs, snapshots.values(), strict=True):
        (points,) = ax.collections
        places = np.asarray(points.get_offsets())
        np.testing.assert_allclose(np.sort(places[:, 1]), np.sort(table["confidence"]))
        assert ax.get_xlim() == (-0.01, 0.5)  # so that the first epoch is not below the axis
        assert ax.get_ylim() == (0, 1)
    assert bar.get_ylabel() == "correctness (fraction of epochs)"
    shown = set(words(fig))
    assert {"digits, tiny, 300 training images", "variability", "confidence"} <= shown


def test_a_forming_map_of_many_examples_is_a_raster(large):
    fig = forming(Figure(), dict.fromkeys((1, 2, 3, 4), large), "many")
    assert len(fig.axes) == 5
    for ax in fig.axes[:4]:
        assert not ax.collections
        x, y = large["variability"].to_numpy(), large["confidence"].to_numpy()
        counts, _ = binned(x, y, np.zeros(DENSE), np.ones(DENSE), (0.5, 1))
        np.testing.assert_array_equal(shown_bins(ax), counts > 0)
    assert "many, 200,000 training images" in words(fig)
    assert any(text.startswith("Bins: colour") for text in words(fig))


def test_maps_against_each_other_show_correlations_and_where_regions_went():
    first, second = map_table(), map_table(seed=1)
    shuffled = second.sample(frac=1, random_state=0)
    fig = against(Figure(), first, shuffled, ("tiny", "wide"), "digits")
    for ax, score in zip(fig.axes, ("confidence", "variability"), strict=False):
        rho = first[score].corr(second[score], method="spearman")
        assert title_of(ax) == f"{score}, ρ = {rho:.2f}"
        assert (ax.get_ylabel(), ax.get_xlabel()) == (f"{score}, tiny", f"{score}, wide")
        (points,) = ax.collections
        drawn = pd.DataFrame(np.asarray(points.get_offsets())).sort_values([0, 1])
        expected = pd.DataFrame({0: second[score], 1: first[score]}).sort_values([0, 1])
        np.testing.assert_allclose(drawn, expected)
    ax = fig.axes[2]
    share = pd.crosstab(first["region_variability"], second["region_variability"], normalize=True)
    share = share.reindex(index=list(theme.REGIONS), columns=list(theme.REGIONS), fill_value=0)
    np.testing.assert_allclose(ax.images[0].get_array(), share)
    assert [t.get_text() for t in ax.texts] == [f"{s:.3f}" for s in share.to_numpy().flat]
    assert title_of(ax) == f"regions, {100 * np.trace(share):.1f} % the same"
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("region, tiny", "region, wide")


def test_a_map_against_itself_agrees_even_where_nothing_varies(large):
    fig = against(Figure(), large, large.assign(variability=0.0), ("a", "b"), "t")
    assert [title_of(ax) for ax in fig.axes] == [
        "confidence, ρ = 1.00", "variability, ρ undefined", "regions, 100.0 % the same"
    ]  # fmt: skip
    assert not fig.axes[0].collections
    rows, columns = np.nonzero(shown_bins(fig.axes[0]))
    np.testing.assert_array_equal(rows, columns)
    assert "t, 200,000 training images" in words(fig)
    assert any("Bins: the darker" in text for text in words(fig))


def test_maps_against_each_other_are_the_same_drawn_from_their_small_table(large, tmp_path):
    for first in (map_table(), large):
        second = first.assign(confidence=first["confidence"].to_numpy()[::-1])
        pairs = pair_table(first, second, ("a", "b"))
        assert len(pairs) <= min(2 * len(first), 20_000) + 9
        with theme.style():
            fig, direct = (Figure(figsize=(theme.WIDE, 2.6)) for _ in range(2))
            draw_pair(fig, pairs, ("a", "b"), "t")
            against(direct, first, second, ("a", "b"), "t")
        check_same_files(fig, direct, tmp_path)


def test_maps_of_other_examples_are_refused():
    table = map_table()
    moved = table.set_axis(table.index + 2)
    with pytest.raises(ValueError, match=r"4 example ids differ \(300 in 'a', 300 in 'b'\)"):
        against(Figure(), table, moved, ("a", "b"), "t")
