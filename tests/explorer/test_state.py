"""What is selected, hidden, counted and shown of a datamap, without widgets."""

import base64

import numpy as np
import pandas as pd
import pytest
import yaml
from explorer.on_screen import synthetic
from PIL import Image
from tiny import TINY

from kdlib.explorer.html import gallery_html
from kdlib.explorer.state import Explorer, data_uri, drawn
from kdlib.steps.cache import cache_images
from kdlib.study.load import load_study
from kdlib.study.yaml_text import parse_yaml


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


def test_the_gallery_ends_with_what_was_never_learned_by_forgetting_events(state):
    ids = state.table.index[:9]
    state.table.loc[ids, "forgetting_events"], state.table["never_learned"] = 1, False
    state.table.loc[ids[4], ["forgetting_events", "never_learned"]] = 0, True
    state.select(ids)
    state.order("forgetting_events", ascending=True)
    assert state.page().index.tolist() == [*ids[:4], *ids[5:], ids[4]]


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
    assert counts["passing"].tolist() == counts["whole"].tolist()
    middle = state.table["confidence"].median()
    state.filter([3], confidence=(0, middle))  # classes count what the other filters let pass
    low = state.table["label"][state.table["confidence"] <= middle]
    assert state.counts()["passing"].tolist() == low.value_counts().sort_index().tolist()


def test_examples_are_added_and_removed_and_the_steps_undone(state):
    ids = state.table.index
    said = [
        state.select(ids[:30]),
        state.select(ids[20:50], "add"),
        state.select(ids[:10], "remove"),
        state.undo(), state.undo(), state.redo(),
    ]  # fmt: skip
    assert said == [
        "30 selected.", "50 selected (20 added).", "40 selected (10 removed).",
        "Undone: 50 selected.", "Undone: 30 selected.", "Redone: 50 selected.",
    ]  # fmt: skip
    state.select([])  # a new step after an undone one: that one is gone
    assert state.redo() == "Redone: 0 selected."
    assert [state.undo() for _ in range(3)][1:] == ["Undone: 30 selected.", "Undone: 0 selected."]


def test_adding_and_removing_leave_what_a_filter_hides(state):
    threes, others = (state.table.index[(state.table["label"] == 3) == is_three] for is_three in
                      (True, False))  # fmt: skip
    state.select([*threes[:5], *others[:7]])
    state.filter([3])
    assert state.select_visible("add") == f"{len(threes)} selected ({len(threes) - 5} added)."
    state.select(threes, "remove")
    state.clear_filter()
    assert state.selected.tolist() == sorted(others[:7])


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


def test_a_map_of_other_images_or_without_scores_is_refused(study, workspace):
    content = parse_yaml(TINY.read_text())
    content["data"]["n_train"] = 1000
    path = workspace / "params" / "other.yaml"
    path.write_text(yaml.safe_dump(content))
    other = load_study(path)
    cache_images(other)
    with pytest.raises(ValueError, match="other has other images than tiny"):
        Explorer(study, against=other)
    with pytest.raises(ValueError, match=r"lacks .*confidence"):
        Explorer(study, against=pd.DataFrame({"label": [1]}, index=[0]))
