"""The app without a browser: controls reach the state and the map."""

import html

import ipywidgets
import numpy as np
import pytest
import torch
import yaml
from explorer.on_screen import BAD_NAME, lasso, status, synthetic
from tiny import TINY

from kdlib.cache.shards import Cache
from kdlib.explorer import app as app_module
from kdlib.explorer.app import App
from kdlib.explorer.example import RULES, region_name
from kdlib.explorer.html import gallery_html
from kdlib.explorer.map import MapWidget
from kdlib.explorer.state import PAGE, Explorer, drawn
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.datamap import make_datamap, open_datamap
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml

# jupyter-scatter 1.0.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")


def test_a_sample_is_said_and_the_rest_can_still_be_found_and_restored(study):
    state = Explorer(study, max_points=300)
    assert "300 of 1,100 examples are drawn: a seeded sample, stratified" in state.note
    app = App(state)
    assert len(app.plots[0].table) == len(app.plots[0].widget.points) == 300
    absent = np.setdiff1d(state.table.index, state.shown.index)
    assert "not among the drawn points" in state.find(absent[0])
    lasso(app.plots[0], state.shown.index[:7])
    assert state.selected.tolist() == state.shown.index[:7].tolist()
    state.select([absent[0], *state.shown.index[:2]])
    state.save("half-drawn")
    app._list_saved()
    app.controls.restore.value = "half-drawn"
    assert len(app.plots[0].widget.selection) == 2
    assert len(state.selected) == 3
    with pytest.raises(ValueError, match="max_points is 0"):
        Explorer(study, max_points=0)


def test_pictures_read_only_what_is_shown(study, monkeypatch):
    asked, mapped = [], []
    read, select = Cache.read, torch.Tensor.index_select
    monkeypatch.setattr(
        Cache, "read", lambda self, c, ids: asked.append((c, len(ids))) or read(self, c, ids)
    )
    monkeypatch.setattr(
        torch.Tensor, "index_select",
        lambda self, dim, ids: mapped.append(len(ids)) or select(self, dim, ids),
    )  # fmt: skip
    monkeypatch.setattr(Cache, "resident", None)
    app = App(Explorer(study))
    assert asked == []
    lasso(app.plots[0], app.state.table.index)  # all of them
    app._turn(1)
    assert [item for item in asked if item[0] == "images"] == [("images", 48)] * 2
    assert {n for _, n in asked} == {48}  # of the teacher's logits, too
    assert sum(mapped) == 2 * 96


def test_a_lasso_on_the_map_fills_the_gallery_and_the_counts(app):
    ids = app.state.table.index[10:40]
    lasso(app.plots[0], ids)
    assert app.state.selected.tolist() == ids.tolist()
    assert status(app) == "30 selected."
    assert app.controls.gallery.value.count("<figure") == 30
    assert "page 1 of 1, 30 selected" in app.controls.page.value


def test_a_click_that_ends_a_lasso_does_not_replace_it(app, monkeypatch):
    ids = app.state.table.index
    lasso(app.plots[0], ids[10:40])
    lasso(app.plots[0], ids[[500]])
    assert len(app.state.selected) == len(app.plots[0].widget.selection) == 30
    monkeypatch.setattr(app_module, "A_CLICK_S", 0)
    lasso(app.plots[0], ids[[500]])
    assert app.state.selected.tolist() == [ids[500]]


def test_controls_reach_the_state_and_the_map(app):
    state, [plot] = app.state, app.plots
    lasso(plot, state.table.index)
    app.controls.sort.value, app.controls.ascending.value = "aum", False
    assert state.page().index[0] == state.table["aum"].idxmax()
    app.controls.forth.click()
    assert state.number == 1
    histograms = app.controls.histograms
    histograms.chosen = [1, 2]
    n = int(state.table["label"].isin([1, 2]).sum())
    assert len(plot.widget.filter) == len(plot.widget.selection) == n
    assert np.all(np.diff(plot.widget.filter.astype(int)) > 0)  # jupyter-scatter sorts by insertion
    histograms.shown = [*histograms.shown, "aum"]
    edges = histograms.bins["aum"]["edges"]
    assert (edges[0], edges[40]) == (state.table["aum"].min(), state.table["aum"].max())
    histograms.ranges = {"aum": [20, 40]}
    high = state.table["aum"] >= edges[20]
    assert state.visible.sum() == (high & state.table["label"].isin([1, 2])).sum()
    app.controls.clear.click()
    assert (histograms.ranges, histograms.chosen) == ({}, [])
    assert plot.widget.filter is None
    assert len(plot.widget.selection) == 1100
    app.controls.x.value, app.controls.y.value = "aum", "el2n"
    assert (plot.widget.x_title, plot.widget.y_title) == ("aum", "el2n")
    for colour in app.controls.colour.options:
        app.controls.colour.value = colour
        assert plot.widget.color_title == colour, status(app)
    app.controls.id.value = "7"
    assert status(app).startswith("Example 7: ")


def test_regions_have_the_colours_of_their_strategies(app):
    from matplotlib.colors import to_hex

    from kdlib.plots.theme import STRATEGIES

    [plot] = app.plots
    for column in ("region_corner", "region_variability"):
        app.controls.colour.value = column
        codes = plot.widget.color_domain
        assert set(codes) == {region_name(kind) for kind in app.state.table[column]}
        assert not {"easy", "hard"} & set(codes)  # the names of strategies
        kinds = {kind.removesuffix("-to-learn"): code for kind, code in codes.items()}
        shown = {kind: to_hex(plot.widget.color[code]).upper() for kind, code in kinds.items()}
        assert shown == {kind: STRATEGIES[kind][0] for kind in kinds}
        points = plot.widget.points[:, 2]
        assert points.tolist() == app.state.table[column].map(kinds).tolist()
        assert status(app) == f"{column}: {RULES[column]}."


def test_every_colour_has_its_legend_whatever_was_shown_before(app):
    [plot] = app.plots
    for column in ("class", "region_corner", "class", "correctness", "region_variability", "class"):
        app.controls.colour.value = column
        shown = plot.widget.legend_encoding["color"]["values"]
        kinds = plot.frame[column]
        wanted = list(kinds.cat.categories) if hasattr(kinds, "cat") else np.linspace(0, 1, 5)
        assert [value for value, *_ in shown] == list(wanted)


def test_the_map_shows_the_whole_range_of_the_paper_s_axes(app):
    low, high = app.plots[0].widget.x_scale_domain
    assert low < 0 < 0.5 < high < 0.52
    low, high = app.plots[0].widget.y_scale_domain
    assert low < 0 < 1 < high < 1.03


def test_a_tooltip_asks_for_one_image(app, monkeypatch):
    from jscatter.widget import JupyterScatter

    plot, sent = app.plots[0], []
    assert callable(JupyterScatter._handle_tooltip)  # private: what the explorer overrides
    monkeypatch.setattr(plot.widget, "send", sent.append)
    event = {"type": "tooltip", "index": 5, "properties": [], "preview": "class"}
    plot.widget._handle_custom_msg(event, None)
    example = app.state.table.index[5]
    assert app.state.pictures([example])[0] in sent[0]["preview"]
    assert sent[0]["preview"].startswith("data:image/svg+xml,")
    assert not set(sent[0]["preview"]) & set("'\"() ")  # it stands in url() without quotes
    assert sent[0]["properties"]["example"] == str(example)
    shown = set(plot.widget.tooltip_properties_non_visual_info)
    assert shown == {"example", "class", "confidence", "variability", "correctness"}
    assert set(sent[0]["properties"]) == shown


def test_names_are_never_html(study):
    state = Explorer(study)
    state.names[3] = BAD_NAME
    app = App(state)
    lasso(app.plots[0], state.table.index[state.table["label"] == 3])
    texts = [w.value for w in vars(app.controls).values() if isinstance(w, ipywidgets.HTML)]
    assert any(html.escape(BAD_NAME) in text for text in texts)
    assert BAD_NAME in app.controls.histograms.classes["names"]  # text, which the browser escapes
    assert not any("<img src=x" in text for text in texts)
    app.say(f"no example {BAD_NAME}")
    assert "<img" not in app.controls.status.value


def test_a_failure_is_one_sentence_in_the_status_line(app, monkeypatch):
    app.controls.id.value = "99999"
    assert status(app).startswith("There is no example '99999'")
    app.controls.save.click()
    assert "names no selection" in status(app)
    app.controls.name.value = "x"
    app.controls.save.click()
    assert status(app).startswith("Nothing is selected")

    def broken(ids):
        raise OSError("the disk is gone")

    monkeypatch.setattr(app.state, "pictures", broken)
    lasso(app.plots[0], app.state.table.index[:3])
    assert status(app) == "OSError: the disk is gone"


def test_saving_and_restoring_by_the_buttons(app):
    ids = app.state.table.index[:25]
    lasso(app.plots[0], ids)
    app.controls.name.value = "first"
    app.controls.save.click()
    assert status(app).startswith("25 examples saved in ")
    lasso(app.plots[0], app.state.table.index[30:40])
    assert [value for _, value in app.controls.restore.options] == ["", "first"]
    app.controls.restore.value = "first"
    assert status(app) == "first: 25 selected."
    assert len(app.plots[0].widget.selection) == 25
    assert app.controls.name.value == "first"


def test_two_maps_are_brushed_together(study, workspace):
    first = open_datamap(study, open_images(study))
    other = first.iloc[100:].assign(confidence=1 - first["confidence"].iloc[100:])
    app = App(Explorer(study, against=other))
    left, right = app.plots
    lasso(right, other.index[:30])
    assert left.ids(left.widget.selection).tolist() == other.index[:30].tolist()
    lasso(left, first.index[90:110])
    assert right.ids(right.widget.selection).tolist() == first.index[100:110].tolist()
    assert status(app) == "20 selected; 10 of them not in the other map."
    app.controls.histograms.chosen = [3]
    assert len(right.widget.filter) == (other["label"] == 3).sum()


def test_another_study_of_the_same_images_can_stand_beside(study, workspace):
    content = parse_yaml(TINY.read_text())
    content["data"] |= {"n_validation": 297, "shard_size": 400, "relabel": {"noise": 0.1}}
    path = workspace / "params" / "fewer.yaml"
    path.write_text(yaml.safe_dump(content))
    fewer = load_study(path)
    images = cache_images(fewer)
    make_teacher(fewer, images)
    make_datamap(fewer, images)
    app = App(Explorer(fewer, against=study))
    lasso(app.plots[1], app.state.other.index)
    n = np.isin(app.state.other.index, app.state.table.index).sum()
    assert status(app).startswith(f"{n:,} selected; {1100 - n} ignored (not in fewer)")
    assert "tiny" in app.box.children[0].value


def test_the_box_of_a_map_holds_what_fits_it_to_its_width(app):
    [plot] = app.plots
    boxes = []

    def search(box):
        boxes.extend([box] if "kdlib-map" in box._dom_classes else [])
        for child in getattr(box, "children", ()):
            search(child)

    search(app.box)
    assert [box.children for box in boxes] == [(plot.widget, plot.hand)]


def test_the_shape_that_selects_can_be_chosen(app):
    for shape in ("rectangle", "brush", "freeform"):
        app.controls.shape.value = shape
        assert app.plots[0].scatter.lasso()["type"] == shape


def test_every_control_says_what_it_does(app):
    controls = [v for v in vars(app.controls).values() if isinstance(v, ipywidgets.ValueWidget)
                and not isinstance(v, ipywidgets.HTML)]  # fmt: skip
    controls += [v for v in vars(app.controls).values() if isinstance(v, ipywidgets.Button)]
    assert len(controls) == 22
    assert all(control.tooltip for control in controls)


def test_a_million_points_are_drawn_and_brushed(state):
    state.table = synthetic(1_000_000)
    state.shown = drawn(state.table, 1_000_000)
    state.scores = ["confidence", "variability"]
    state.picked = np.empty(0, np.int64)
    state.clear_filter()
    state.pictures = lambda ids: ["data:,"] * len(ids)
    plot = MapWidget(state, state.shown, 400)
    state.select(plot.ids(np.arange(100_000, 300_000)))
    plot.show_selection()
    assert len(plot.widget.selection) == 200_000
    assert gallery_html(state).count("<img") == PAGE
    assert state.counts()["selected"].sum() == 200_000
