"""Why an image is hard: its curve, its predictions, the teacher, other seeds, its neighbours."""

import html
import re
import urllib.parse

import numpy as np
import pandas as pd
import pytest
from explorer.on_screen import BAD_NAME, lasso, status

from kdlib.cache.shards import CacheError
from kdlib.explorer.app import App
from kdlib.explorer.example import RULES, curve_svg, detail_html, reasons, tooltip_picture
from kdlib.explorer.representatives import representatives_html

# jupyter-scatter 1.0.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")


@pytest.fixture
def hard(state):
    """Id of an example whose prediction changes."""
    return int(state.table.sort_values("confidence").index[200])


def regions(state, **others):
    """Let two recordings hold the regions of the map, but for some examples."""
    here = state.table["region_variability"].astype(str)
    table = pd.DataFrame({"tiny seed=0": here, "tiny seed=1": here})
    for i, region in others.items():
        table.loc[int(i[1:]), "tiny seed=1"] = region
    table = table.astype(state.table["region_variability"].dtype)
    state.examples.__dict__["regions_by_recording"] = table


def test_the_reasons_are_the_record_the_teacher_and_the_other_seeds(state, hard):
    other = "easy" if state.table["region_variability"].loc[hard] == "hard" else "hard"
    regions(state, **{f"i{hard}": other})
    [why, calm] = reasons(state, [hard, int(state.table["confidence"].idxmax())])
    course = state.examples.courses([hard])
    assert np.array_equal(why.prob, course.label_prob[:, 0])
    first, teacher, stability = why.lines
    told = [f"{name} from epoch {epoch}" for epoch, name in course.changes(0)[1:]]
    assert first == f"Predicted {', '.join([str(course.predicted[0, 0]), *told])}."
    assert re.fullmatch(r"Predicted \d in every epoch\.", calm.lines[0])
    probs = state.examples.teacher_probs([hard])[0]
    assert teacher.startswith(f"The teacher: {probs.argmax()} ({100 * probs.max():.0f} %)")
    assert stability == f"Another region in 1 of 2 recordings: {other}-to-learn in 1."
    assert calm.lines[-1] == "The same region in all 2 recordings."
    assert why.missing == []


def test_what_is_not_stored_is_named_with_its_setting(state, hard, monkeypatch):
    monkeypatch.setattr(state.examples.log, "has_logits", False)

    def absent(*_):
        raise CacheError("no features of the teacher")

    monkeypatch.setattr(state.examples, "neighbours", absent)
    shown = detail_html(state, hard)
    assert "dynamics: {logits: true}" in shown
    assert "no further training is recorded" in html.unescape(shown)  # recordings were not copied
    assert "neighbours are not known: no features of the teacher" in shown
    assert "kdlib-curve" in shown


def test_the_curve_has_a_point_for_each_epoch_at_its_height(state, hard):
    [why] = reasons(state, [hard])
    svg = curve_svg(why, 100, 50)
    n = len(why.prob)
    heights = [float(y) for y in re.findall("cy='([^']*)'", svg)]
    assert np.allclose(heights, 2 + 46 * (1 - why.prob), atol=0.06)
    assert svg.count("#0072B2") == why.correct.sum()
    assert svg.count("<circle") == n
    assert ">recorded epoch<" in curve_svg(why, 200, 100, axes=True)


def test_the_panel_of_an_image_shows_scores_regions_and_neighbours(state, hard):
    shown = detail_html(state, hard)
    plain = html.unescape(re.sub("<[^>]*>", " ", shown))
    for score in state.scores:
        assert f"{score}" in plain
    assert f"{state.table['aum'].loc[hard]:.4g}" in plain
    for rule, meaning in RULES.items():
        kind = state.table[rule].loc[hard]
        assert f"{kind if kind == 'ambiguous' else kind + '-to-learn'}  by {rule}" in plain
        assert meaning in plain
    near = state.examples.neighbours(hard, 8)
    assert re.findall("data-example='([^']*)'", shown) == [str(i) for i in near["example_id"]]


def test_representatives_are_grouped_by_class_and_name_theirs(state):
    ids = state.table.index[:300]
    state.select(ids)
    shown = representatives_html(state)
    groups, _ = state.examples.representatives(ids)
    assert re.findall("data-example='([^']*)'", shown) == [str(i) for i in groups["example_id"]]
    assert re.findall("<section><b>(.)</b>", shown) == [str(c) for c in groups["label"].unique()]
    assert "300 images of 10 classes in 12 groups" in shown
    state.select([])
    assert "Nothing is selected" in representatives_html(state)


def test_a_click_on_an_image_opens_its_panel_and_marks_it_on_the_map(state, hard):
    app = App(state)
    [plot] = app.plots
    lasso(plot, state.table.index[:30])
    assert f"data-example='{state.page().index[0]}'" in app.controls.gallery.value
    app._hear(plot, {"example": hard})
    assert status(app) == f"Example {hard}: {state.class_of(hard)}."
    assert "kdlib-detail" in app.controls.gallery.value
    across, down = plot.scatter.annotations()["annotations"]
    row = state.table.loc[hard]
    assert [y for _, y in across.vertices] == [row["confidence"]] * 2
    assert [x for x, _ in down.vertices] == [row["variability"]] * 2
    app.controls.x.value = "aum"
    assert [x for x, _ in plot.scatter.annotations()["annotations"][1].vertices] == [row["aum"]] * 2
    app.controls.view.value = "groups"
    assert "kdlib-representatives" in app.controls.gallery.value
    app._hear(plot, {"example": hard})
    lasso(plot, state.table.index[40:60])  # another selection: its images
    assert app.controls.gallery.value.count("<figure") == 20
    app._hear(plot, {"example": -5})
    assert status(app) == "There is no example -5 in this map."
    assert len(state.selected) == 20


def test_a_click_on_a_point_and_a_search_open_the_panel(app, hard):
    lasso(app.plots[0], [hard])
    assert app.example == hard
    assert "kdlib-detail" in app.controls.gallery.value
    other = int(app.state.table.index[3])
    app.controls.id.value = str(other)
    assert app.example == other


def test_names_of_the_data_are_escaped_wherever_they_stand(state, hard):
    state.names[:] = [BAD_NAME] * 10
    state.select(state.table.index[:40])
    picture = urllib.parse.unquote(tooltip_picture(state, hard))
    for shown in (detail_html(state, hard), representatives_html(state), picture):
        assert html.escape("<img src=x") in shown
        assert "<img src=x" not in shown
