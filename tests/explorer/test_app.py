"""The explorer without a browser: what is selected, shown, hidden, saved, trained and said."""

import base64
import html
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ipywidgets
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from nbclient import NotebookClient
from PIL import Image
from tiny import TINY

from kdlib.cache.shards import Cache
from kdlib.cartography.subset import Subset
from kdlib.explorer import app as app_module
from kdlib.explorer.app import App, explore
from kdlib.explorer.background import Training
from kdlib.explorer.html import counts_html, gallery_html, results_html
from kdlib.explorer.state import PAGE, Explorer, data_uri, drawn
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps import distill
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.datamap import make_datamap as datamap_make_datamap
from kdlib.steps.datamap import open_datamap
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml

# jupyter-scatter 1.0.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")
BAD_NAME = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def made(tmp_path_factory, make_datamap):
    """A workspace in which steps 01 to 03 of the tiny study are done."""
    home = tmp_path_factory.mktemp("made")
    make_datamap(home)
    return home


@pytest.fixture
def study(made, monkeypatch):
    """The tiny study, without saved selections."""
    monkeypatch.setenv("KDLIB_HOME", str(made))
    study = load_study("params/tiny.yaml")
    yield study
    shutil.rmtree(study.runs / "selections", ignore_errors=True)


@pytest.fixture
def state(study):
    return Explorer(study)


@pytest.fixture
def app(state):
    return App(state)


def said(app):
    return html.unescape(re.sub("<[^>]*>", "", app.status.value))


def lasso(plot, ids):
    """What a lasso in the browser does: row positions, in no order."""
    plot.widget.selection = plot.positions(np.asarray(ids))[::-1]


def synthetic(n, seed=0):
    """A datamap of 10 classes, one region of which is rare."""
    rng = np.random.default_rng(seed)
    region = pd.Categorical(rng.choice(["easy", "ambiguous", "hard"], n, p=[0.7, 0.29, 0.01]))
    return pd.DataFrame(
        {
            "label": rng.integers(0, 10, n),
            "confidence": rng.random(n),
            "variability": rng.random(n) / 2,
            "correctness": rng.random(n),
            "region_variability": region,
            "region_corner": region,
        },
        index=pd.Index(np.arange(n) * 3, name="example_id"),
    )


def test_a_selection_shows_its_images_with_names_and_scores_in_pages(state):
    ids = state.table.index[:130]
    assert state.select(ids) == "130 selected."
    assert state.n_pages == 3
    pages = [state.page(number) for number in range(3)]
    assert [len(page) for page in pages] == [48, 48, 34]
    shown = pd.concat(pages)
    assert sorted(shown.index) == list(ids)
    assert shown["confidence"].is_monotonic_increasing
    text = gallery_html(state)
    assert text.count("<img src='data:image/png;base64,") == 34
    assert f"{pages[2]['confidence'].iloc[0]:.3g}" in text
    assert f"example {pages[2].index[0]}: " in text


def test_the_gallery_is_sorted_either_way_by_any_score(state):
    state.select(state.table.index)
    state.order("aum", ascending=False)
    assert state.page(0)["aum"].iloc[0] == state.table["aum"].max()
    assert state.page()["aum"].is_monotonic_decreasing
    with pytest.raises(ValueError, match="did you mean 'aum'"):
        state.order("aumm", True)


def test_pages_out_of_range_are_moved_in(state):
    state.select(state.table.index[:60])
    assert len(state.page(9)) == 12
    assert state.number == 1
    assert len(state.page(-3)) == 48
    state.select([])
    assert (state.n_pages, len(state.page(5))) == (1, 0)


def test_counts_compare_the_selection_with_the_whole(state):
    state.select(state.table.index[state.table["label"] == 3][:20])
    counts = state.counts()
    assert counts["selected"].tolist() == [0, 0, 0, 20, 0, 0, 0, 0, 0, 0]
    assert counts["whole"].tolist() == state.table["label"].value_counts().sort_index().tolist()
    assert counts["share"][3] == 20 / counts["whole"][3]
    assert "20</td>" in counts_html(state)


def test_of_many_classes_those_with_most_are_counted(state):
    state.names = [f"class {i}" for i in range(30)]
    state.select(state.table.index[state.table["label"] == 7])
    text = counts_html(state)
    assert "the 20 most of 30 classes" in text
    assert text.count("<tr>") == 20
    assert text.index("class 7") < text.index("class 0")


def test_ids_of_no_example_are_ignored_and_counted(state):
    validation = state.images.validation_ids[:5]
    assert state.select([*state.table.index[:3], *validation]) == (
        "3 selected; 5 ignored (not in tiny)."
    )


def test_a_filter_hides_classes_and_ranges_and_a_selection_returns_with_it(state):
    table = state.table
    state.select(table.index)
    middle = table["confidence"].median()
    kept = table["label"].isin([2, 5]) & (table["confidence"] <= middle)
    assert state.filter([2, 5], confidence=(0, middle)) == (
        f"{kept.sum()} of 1,100 examples pass the filter."
    )
    assert state.selected.tolist() == table.index[kept].tolist()
    state.clear_filter()
    assert len(state.selected) == len(table)
    assert state.filter(confidence=(2, 3)) == "No example passes this filter."
    with pytest.raises(ValueError, match="unknown score"):
        state.filter(sharpness=(0, 1))


def test_only_visible_examples_can_be_selected(state):
    state.filter([4])
    assert state.select(state.table.index) == "109 selected; 991 ignored (hidden by the filter)."
    state.clear_filter()
    assert len(state.selected) == 109


def test_an_example_is_found_by_its_id(state):
    ids = state.table.index
    assert state.find(f" {ids[5]} ").startswith(f"Example {ids[5]}: ")
    assert state.selected.tolist() == [ids[5]]
    for unknown in ("99999", "-1", "seven", "", str(state.images.validation_ids[0])):
        with pytest.raises(ValueError, match="There is no example"):
            state.find(unknown)
    state.filter([(state.table["label"].iloc[5] + 1) % 10])
    with pytest.raises(ValueError, match="hidden by the filter"):
        state.find(ids[5])


def test_a_saved_selection_is_a_subset_and_comes_back(state, study):
    ids = state.table.index[100:211]
    state.select(ids)
    path = state.save("my-pick_1")
    data = files.fingerprint(state.images.fingerprints)
    subset = Subset.load(path, data)
    assert subset.example_ids.tolist() == ids.tolist()
    assert (subset.strategy, subset.seed) == ("picked_my-pick_1", 0)
    assert subset.fraction == 111 / 1100
    assert subset.parent == read_evidence(study.runs / "datamap")["datamap_sha256"]
    assert state.saved() == ["my-pick_1"]

    state.select([])
    state.filter([1])
    assert state.restore("my-pick_1") == "my-pick_1: 111 selected."
    assert state.selected.tolist() == ids.tolist()
    assert state.save("my-pick_1") == path  # the same once more
    made = distill.make_subset(study, state.images, study.cell(strategy="picked_my-pick_1"), 1)
    assert made.sha256 == subset.sha256


@pytest.mark.parametrize("name", ["", "_x", "a b", "../a", "a/b", "ä", "a.b", "-a", "a\n"])
def test_what_is_no_name_is_refused(state, name):
    state.select(state.table.index[:3])
    with pytest.raises(ValueError, match="names no selection"):
        state.save(name)
    assert state.saved() == []


def test_another_selection_of_the_same_name_is_left_alone(state):
    state.select(state.table.index[:10])
    path = state.save("mine")
    before = path.read_bytes()
    state.select(state.table.index[:11])
    with pytest.raises(ValueError, match="already names another selection, of 10 examples"):
        state.save("mine")
    assert path.read_bytes() == before


def test_nothing_is_not_saved(state):
    with pytest.raises(ValueError, match="Nothing is selected"):
        state.save("nothing")
    assert state.saved() == []


def test_a_sample_has_of_each_class_and_region_its_share():
    table = synthetic(50_000)
    sample = drawn(table, 5_000)
    assert len(sample) == 5_000
    assert sample.index.is_monotonic_increasing
    groups = ["label", "region_variability"]
    whole, part = (t.groupby(groups, observed=True).size() for t in (table, sample))
    assert len(part) == len(whole)  # none is lost, however rare
    assert (part - whole / 10).abs().max() <= 1
    pd.testing.assert_frame_equal(
        sample, drawn(table.sample(frac=1, random_state=1), 5_000).sort_index()
    )
    assert drawn(table, 50_000) is table


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
    app.restore.value = "half-drawn"
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
    assert asked == [("images", 48)] * 2
    assert sum(mapped) == 96


def test_small_images_are_enlarged_without_smoothing_and_large_ones_shrunk(tmp_path):
    def back(pixels):
        uri = data_uri(pixels)
        path = tmp_path / "image.png"
        path.write_bytes(base64.b64decode(uri.split(",")[1]))
        return np.asarray(Image.open(path))

    rng = np.random.default_rng(0)
    grey, colour = (rng.integers(0, 256, (c, 8, 8), np.uint8) for c in (1, 3))
    assert np.array_equal(back(grey), grey[0].repeat(12, 0).repeat(12, 1))
    assert np.array_equal(back(colour)[::12, ::12], colour.transpose(1, 2, 0))
    assert back(rng.integers(0, 256, (3, 200, 100), np.uint8)).shape == (96, 48, 3)


def test_a_lasso_on_the_map_fills_the_gallery_and_the_counts(app):
    ids = app.state.table.index[10:40]
    lasso(app.plots[0], ids)
    assert app.state.selected.tolist() == ids.tolist()
    assert said(app) == "30 selected."
    assert app.gallery.value.count("<figure") == 30
    assert "page 1 of 1, 30 selected" in app.page.value


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
    app.sort.value, app.ascending.value = "aum", False
    assert state.page().index[0] == state.table["aum"].idxmax()
    app.forth.click()
    assert state.number == 1
    app.classes.value = (1, 2)
    n = int(state.table["label"].isin([1, 2]).sum())
    assert len(plot.widget.filter) == len(plot.widget.selection) == n
    assert np.all(np.diff(plot.widget.filter.astype(int)) > 0)  # jupyter-scatter sorts by insertion
    app.by.value = "aum"
    assert app.range.min == state.table["aum"].min()
    app.range.value = (0, app.range.max)
    assert (
        state.visible.sum() == ((state.table["aum"] >= 0) & state.table["label"].isin([1, 2])).sum()
    )
    app.clear.click()
    assert plot.widget.filter is None
    assert len(plot.widget.selection) == 1100
    app.x.value, app.y.value = "aum", "el2n"
    assert (plot.widget.x_title, plot.widget.y_title) == ("aum", "el2n")
    for colour in app.colour.options:
        app.colour.value = colour
        assert plot.widget.color_title == colour, said(app)
    app.id.value = "7"
    assert said(app).startswith("Example 7: ")


def test_regions_have_the_colours_of_their_strategies(app):
    from matplotlib.colors import to_hex

    from kdlib.plots.theme import STRATEGIES

    [plot] = app.plots
    app.colour.value = "class"  # whose order of colours must not stay
    for column in ("region_corner", "region_variability"):
        app.colour.value = column
        codes = plot.widget.color_domain
        assert set(codes) == set(app.state.table[column])
        shown = {kind: to_hex(plot.widget.color[code]).upper() for kind, code in codes.items()}
        assert shown == {kind: STRATEGIES[kind][0] for kind in codes}
        points = plot.widget.points[:, 2]
        assert points.tolist() == app.state.table[column].map(codes).tolist()


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
    assert sent[0]["preview"] == app.state.pictures([example])[0]
    assert sent[0]["properties"]["example"] == str(example)
    shown = set(plot.widget.tooltip_properties_non_visual_info)
    assert shown == {"example", "class", "confidence", "variability", "correctness"}
    assert set(sent[0]["properties"]) == shown


def test_names_are_never_html(study):
    state = Explorer(study)
    state.names[3] = BAD_NAME
    app = App(state)
    lasso(app.plots[0], state.table.index[state.table["label"] == 3])
    texts = [w.value for w in vars(app).values() if isinstance(w, ipywidgets.HTML)]
    assert any(html.escape(BAD_NAME) in text for text in texts)
    assert not any("<img src=x" in text for text in texts)
    app.say(f"no example {BAD_NAME}")
    assert "<img" not in app.status.value


def test_a_failure_is_one_sentence_in_the_status_line(app, monkeypatch):
    app.id.value = "99999"
    assert said(app).startswith("There is no example '99999'")
    app.save.click()
    assert "names no selection" in said(app)
    app.name.value = "x"
    app.save.click()
    assert said(app).startswith("Nothing is selected")

    def broken(ids):
        raise OSError("the disk is gone")

    monkeypatch.setattr(app.state, "pictures", broken)
    lasso(app.plots[0], app.state.table.index[:3])
    assert said(app) == "OSError: the disk is gone"


def test_saving_and_restoring_by_the_buttons(app):
    ids = app.state.table.index[:25]
    lasso(app.plots[0], ids)
    app.name.value = "first"
    app.save.click()
    assert said(app).startswith("25 examples saved in ")
    lasso(app.plots[0], app.state.table.index[30:40])
    assert [value for _, value in app.restore.options] == ["", "first"]
    app.restore.value = "first"
    assert said(app) == "first: 25 selected."
    assert len(app.plots[0].widget.selection) == 25
    assert app.name.value == "first"


def test_two_maps_are_brushed_together(study, made):
    first = open_datamap(study, open_images(study))
    other = first.iloc[100:].assign(confidence=1 - first["confidence"].iloc[100:])
    app = App(Explorer(study, against=other))
    left, right = app.plots
    lasso(right, other.index[:30])
    assert left.ids(left.widget.selection).tolist() == other.index[:30].tolist()
    lasso(left, first.index[90:110])
    assert right.ids(right.widget.selection).tolist() == first.index[100:110].tolist()
    assert said(app) == "20 selected; 10 of them not in the other map."
    app.classes.value = (3,)
    assert len(right.widget.filter) == (other["label"] == 3).sum()


def test_another_study_of_the_same_images_can_stand_beside(study, made):
    content = parse_yaml(TINY.read_text())
    content["data"] |= {"n_validation": 297, "shard_size": 400, "relabel": {"noise": 0.1}}
    path = made / "params" / "fewer.yaml"
    path.write_text(yaml.safe_dump(content))
    fewer = load_study(path)
    images = cache_images(fewer)
    make_teacher(fewer, images)
    datamap_make_datamap(fewer, images)
    app = App(Explorer(fewer, against=study))
    lasso(app.plots[1], app.state.other.index)
    n = np.isin(app.state.other.index, app.state.table.index).sum()
    assert said(app).startswith(f"{n:,} selected; {1100 - n} ignored (not in fewer)")
    assert "tiny" in app.box.children[0].value


def test_a_map_of_other_images_or_without_scores_is_refused(study, made):
    content = parse_yaml(TINY.read_text())
    content["data"]["n_train"] = 1000
    path = made / "params" / "other.yaml"
    path.write_text(yaml.safe_dump(content))
    other = load_study(path)
    cache_images(other)
    with pytest.raises(ValueError, match="other has other images than tiny"):
        Explorer(study, against=other)
    with pytest.raises(ValueError, match=r"lacks .*confidence"):
        Explorer(study, against=pd.DataFrame({"label": [1]}, index=[0]))


def test_the_map_of_a_study_that_shares_another_one_s_is_walked_in(study, made):
    path = made / "params" / "sharing.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", "shares": "tiny.yaml"}))
    sharing = load_study(path)
    assert app_module.still_map(sharing).is_file()
    walk = Explorer(sharing)
    walk.select(walk.images.train_ids[:5])
    saved = Subset.load(walk.save("mine"))
    assert saved.parent == read_evidence(study.runs / "datamap")["datamap_sha256"]


def test_the_commands_train_the_selection_and_as_many_random_examples(state, study):
    state.select(state.table.index[:110])
    state.save("mine")
    first, second = state.commands("mine")
    assert first[3:8] == ["--engine", "ipc", "--no-progress-bar", "notebooks/04_distill.ipynb",
                          str(study.runs / "selections" / "mine-04_distill.ipynb")]  # fmt: skip
    assert first[-2:] == ["strategy", "picked_mine"]
    assert second[-5:] == ["strategy", "random", "-p", "fraction", "0.1"]
    launched = load_study(first[first.index("study") + 1])
    assert launched == study
    assert state.trained("mine") == (0, 8)


def test_results_are_paired_seed_by_seed(state, monkeypatch):
    state.select(state.table.index[:110])
    state.save("mine")
    with pytest.raises(FileNotFoundError):
        state.results("mine")

    def open_student(study, cell, seed):
        accuracy = 0.5 + 0.1 * seed + (0.02 * (seed + 1)) * (cell.strategy == "picked_mine")
        return {"checkpoints": {"last": {"test_accuracy": accuracy}}}

    monkeypatch.setattr(distill, "open_student", open_student)
    table = state.results("mine")
    assert table["objective"].tolist() == ["kd", "kd", "plain", "plain"]
    assert np.allclose(table["difference"], [0.02, 0.04] * 2)
    text = re.sub("<[^>]*>", " ", results_html(state, "mine"))
    assert re.search(r"kd\s+58.00 %\s+55.00 %\s+\+3.00\s+\+2.0 \+4.0", text)


def finished(app):
    app.training.thread.join(30)
    assert not app.training.thread.is_alive()


def train(app, monkeypatch, *code):
    commands = [[sys.executable, "-c", line] for line in code]
    monkeypatch.setattr(app.state, "commands", lambda name: commands)
    lasso(app.plots[0], app.state.table.index[:110])
    app.name.value = "mine"
    app.train.click()


def test_training_runs_beside_the_kernel_and_its_log_is_followed(app, monkeypatch):
    heard = []
    app.log.observe(lambda change: heard.append(change.new), "value")
    monkeypatch.setattr(app_module, "results_html", lambda state, name: f"results of {name}")
    line = "import time; print('Executing Cell 3', flush=True); time.sleep(1.2)"
    train(app, monkeypatch, line, "print('second')")
    assert (app.train.disabled, app.stop.disabled) == (True, False)
    finished(app)
    assert any("0 of 8 students done; Executing Cell 3" in text for text in heard)
    assert said(app) == "The students of mine are trained."
    assert app.results.value == "results of mine"
    assert (app.train.disabled, app.stop.disabled) == (False, True)
    assert app.training.log.read_text() == "Executing Cell 3\nsecond\n"


def below_the_button(app):
    return html.unescape(re.sub("<[^>]*>", "", app.log.value))


def test_a_failed_training_says_why_and_where_its_log_lies_and_stops_there(app, monkeypatch):
    code = "print('Output Notebook: out.ipynb')\nraise ValueError('no <b>such</b> thing:\\n  here')"
    train(app, monkeypatch, code, "print('second')")
    finished(app)
    assert (
        said(app) == "The training of students on mine failed; its error stands below the button."
    )
    assert below_the_button(app) == (
        "The training of students on mine failed: ValueError: no <b>such</b> thing: here"
        f"The whole log: {app.training.log}"
    )
    assert "<b>such" not in app.log.value
    assert "second" not in app.training.log.read_text()
    assert (app.train.disabled, app.stop.disabled) == (False, True)


def test_the_error_of_an_earlier_training_goes_with_the_next_one(app, monkeypatch):
    monkeypatch.setattr(app_module, "results_html", lambda state, name: f"results of {name}")
    train(app, monkeypatch, "raise SystemExit(3)")
    finished(app)
    assert "exit code 3; its last line: none" in below_the_button(app)
    app.restore.value = "mine"
    assert app.log.value == ""
    train(app, monkeypatch, "raise SystemExit(3)")
    finished(app)
    train(app, monkeypatch, "pass")
    finished(app)
    assert (app.log.value, app.results.value) == ("", "results of mine")


def test_a_training_that_cannot_start_says_so(app, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    train(app, monkeypatch, "pass")
    finished(app)
    assert "FileNotFoundError: [Errno 2]" in below_the_button(app)
    assert "/no/such/python" in below_the_button(app)
    assert not app.train.disabled


def test_a_training_whose_commands_cannot_be_made_leaves_the_button_free(app, monkeypatch):
    def broken(name):
        raise OSError("the disk is full")

    lasso(app.plots[0], app.state.table.index[:110])
    app.name.value = "mine"
    monkeypatch.setattr(app.state, "commands", broken)
    app.train.click()
    assert said(app) == "OSError: the disk is full"
    assert (app.train.disabled, app.stop.disabled) == (False, True)


@pytest.mark.parametrize(
    ("log", "code", "error"),
    [
        (
            "Executing notebook with kernel: python3\nTraceback (most recent call last):\n"
            "papermill.exceptions.PapermillExecutionError: \n---\n"
            'Exception encountered at "In [3]":\n---\n'
            "\x1b[31mStudyError\x1b[39m        Traceback (most recent call last)\n"
            "\x1b[31mStudyError\x1b[39m: a.yaml is not a valid study:\n  probe.k: not a number\n\n",
            1,
            "StudyError: a.yaml is not a valid study: probe.k: not a number",
        ),
        ("torch.OutOfMemoryError: CUDA\r\n\r\nleaked semaphores\n", 1,
         "torch.OutOfMemoryError: CUDA"),
        ("KeyError: 1\n\nDuring handling of it:\n\nAssertionError\n", 1, "AssertionError"),
        ("Output Notebook: out.ipynb\n\n", 1,
         "the process ended with exit code 1; its last line: Output Notebook: out.ipynb"),
        ("", -9, "the process ended with signal 9; its last line: none"),
    ],
)  # fmt: skip
def test_the_error_of_a_log_is_its_last_exception(tmp_path, log, code, error):
    training = Training([], tmp_path / "log", lambda line: None, lambda t: None)
    training.thread.join()
    training.log.write_text(log, newline="")
    training.code = code
    assert training.error() == error


def test_the_box_of_a_map_holds_what_fits_it_to_its_width(app):
    [plot] = app.plots
    boxes = []

    def search(box):
        boxes.extend([box] if "kdlib-map" in box._dom_classes else [])
        for child in getattr(box, "children", ()):
            search(child)

    search(app.box)
    [[drawn_map, fitting]] = [box.children for box in boxes]
    assert drawn_map is plot.widget
    assert fitting._esm == app_module.FIT


def test_a_training_can_be_stopped(app, monkeypatch):
    line = "import time; print('started', flush=True); time.sleep(60)"
    train(app, monkeypatch, line, line)
    end = time.monotonic() + 20
    while "started" not in app.log.value and time.monotonic() < end:
        time.sleep(0.1)
    app.stop.click()
    finished(app)
    assert said(app).startswith("Stopped; finished students stay")
    assert app.training.log.read_text().count("started") == 1


def test_stopping_papermill_takes_its_kernel_down(study, tmp_path):
    cell = nbformat.v4.new_code_cell(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(60)"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(notebook, tmp_path / "slow.ipynb")
    names = [str(tmp_path / "slow.ipynb"), str(tmp_path / "out.ipynb")]
    command = [sys.executable, "-m", "papermill", "--engine", "ipc", *names, "--cwd", str(tmp_path)]
    training = Training([command], tmp_path / "log", lambda line: None, lambda t: None)
    pid, end = tmp_path / "pid", time.monotonic() + 40
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end, training.last_line()
        time.sleep(0.1)
    training.stop()
    training.thread.join(30)
    assert training.code not in (0, None)
    while Path(f"/proc/{pid.read_text()}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_without_a_front_end_the_still_map_is_shown(study, capsys):
    assert explore(study) is None
    text = capsys.readouterr().out
    assert text.count("\n") == 1
    assert str(study.figures / "datamap.png") in text
    with Image.open(study.figures / "datamap.png") as picture:
        assert picture.width > 1000


def test_a_newer_datamap_is_drawn_again(study, monkeypatch):
    from kdlib.steps import figures

    path = app_module.still_map(study)
    monkeypatch.setattr(figures, "draw_datamap", lambda study: {"datamap": "drawn again"})
    assert app_module.still_map(study) == path
    os.utime(path, (0, 0))
    assert app_module.still_map(study) == "drawn again"


def test_plain_python_can_explore_without_importing_widgets(study):
    code = (
        "import sys; from kdlib.explorer import explore\nfrom kdlib.study import load_study\n"
        "explore(load_study('params/tiny.yaml'))\n"
        "print(sorted({'ipywidgets', 'jscatter', 'IPython'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "still map" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_a_notebook_run_without_a_person_holds_the_still_map(study, made):
    cell = nbformat.v4.new_code_cell(
        "from kdlib.explorer import explore\nfrom kdlib.study import load_study\n"
        "explore(load_study('params/tiny.yaml'))"
    )
    kernel = {"kernelspec": {"name": "python3", "display_name": "", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    NotebookClient(notebook, timeout=120).execute(cwd=str(made))
    outputs = notebook.cells[0].outputs
    data = [o["data"] for o in outputs if "data" in o]
    assert "still map" in outputs[0]["text"]
    assert [sorted(d) for d in data] == [["image/png", "text/plain"]]


@pytest.mark.parametrize(
    ("metadata", "person"), [({"cellId": "a1"}, True), ({}, False), (None, False)]
)
def test_a_person_is_known_by_the_id_of_the_cell(monkeypatch, metadata, person):
    class Kernel:
        def get_parent(self, channel):
            return {} if metadata is None else {"metadata": metadata}

    monkeypatch.setattr(app_module, "_kernel", Kernel)
    assert app_module._front_end() is person


def test_an_app_carries_the_still_map_for_where_no_widget_is(study):
    app = explore(study, widgets=True)
    data, metadata = app._repr_mimebundle_()
    assert set(data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert json.dumps([data, metadata])


def test_the_shape_that_selects_can_be_chosen(app):
    for shape in ("rectangle", "brush", "freeform"):
        app.shape.value = shape
        assert app.plots[0].scatter.lasso()["type"] == shape


def test_every_control_says_what_it_does(app):
    controls = [v for v in vars(app).values() if isinstance(v, ipywidgets.ValueWidget)
                and not isinstance(v, ipywidgets.HTML)]  # fmt: skip
    controls += [v for v in vars(app).values() if isinstance(v, ipywidgets.Button)]
    assert len(controls) == 19
    assert all(control.tooltip for control in controls)


def test_a_million_points_are_drawn_and_brushed(state):
    state.table = synthetic(1_000_000)
    state.shown = drawn(state.table, 1_000_000)
    state.scores = ["confidence", "variability"]
    state.picked = np.empty(0, np.int64)
    state.clear_filter()
    state.pictures = lambda ids: ["data:,"] * len(ids)
    plot = app_module._Plot(state, state.shown, 400)
    state.select(plot.ids(np.arange(100_000, 300_000)))
    plot.show_selection()
    assert len(plot.widget.selection) == 200_000
    assert gallery_html(state).count("<img") == PAGE
    assert state.counts()["selected"].sum() == 200_000
