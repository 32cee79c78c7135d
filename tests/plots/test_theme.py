"""Style, names, looks and saved files of every figure."""

from itertools import pairwise

import matplotlib as mpl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from plots.example_tables import learning_curves_figure

from kdlib.plots import theme
from kdlib.plots.differences import VERDICTS
from kdlib.plots.layout import spread
from kdlib.study.selections import SCORES


def test_no_two_names_share_a_place_in_the_order():
    names = ["easy_random", "easy_hard", "easy_ambiguous", "aum_top", "aum_bottom", "hard"]
    order = ["hard", "aum_top", "aum_bottom", "easy_ambiguous", "easy_hard", "easy_random"]
    assert sorted(names, key=theme.sorting_key) == order
    assert len({theme.sorting_key(name) for name in names}) == len(names)


def test_saved_files_have_print_size_embedded_fonts_and_no_date_or_version(tmp_path):
    from PIL import Image

    pdf, png = theme.save_figure(learning_curves_figure(), tmp_path / "new" / "study", "curves")
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
    pdf, png = theme.save_figure(learning_curves_figure(), tmp_path, "curves")
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


def test_each_strategy_keeps_its_look_and_no_two_share_one():
    every = [
        *theme.STRATEGIES,
        *(f"{s}_{end}" for s in ("aum", "el2n", "loss", "dual") for end in ("top", "bottom")),
    ]
    lines = theme.line_looks(every)
    assert len({lines[name] for name in every}) == len(every)
    assert theme.line_looks(["hard", "easy"])["easy"] == lines["easy"]
    for score in ("aum", "el2n", "loss", "dual"):  # in the colour of the score
        assert lines[f"{score}_top"][0] == theme.SCORES[score][0]


def test_an_objective_looks_the_same_whatever_stands_beside_it():
    names = ["kd", "plain", "features", "sure", "hint", "own_teacher", "temperature_10"]
    together = theme.line_looks(names, "objective")
    assert len(set(together.values())) == len({look[:2] for look in together.values()}) == 7
    for name in names:
        assert theme.line_looks([name], "objective")[name] == together[name]
    assert {together[name][0] for name in ("kd", "plain")} == {theme.BLUE, theme.ORANGE}


def test_what_has_a_name_has_a_look_of_its_own_in_two_ways():
    for looks in theme.NAMED.values():
        assert len({(colour, dash) for colour, dash, _ in looks.values()}) == len(looks)
    assert set(theme.SCORES) >= set(SCORES)
    shapes = {marker for *_, marker in theme.OBJECTIVES.values()} | set(theme.OTHER_MARKERS)
    assert not shapes & ({*VERDICTS.values()} - {"o"})  # "o" is open for a verdict, filled else


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.001, 0.1))
def test_spread_labels_keep_order_and_distance_and_stay_near(heights, gap):
    heights = sorted(heights)
    places = spread(heights, gap)
    assert len(places) == len(heights)
    assert all(b - a >= gap - 1e-5 for a, b in pairwise(places))
    assert min(places) >= 0
    assert max(places) <= 1 + 1e-5
    if all(b - a >= gap for a, b in pairwise(heights)):
        assert places == pytest.approx(heights, abs=1e-5)
