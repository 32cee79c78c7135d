"""Saved selections side by side, in colours."""

import numpy as np
import pandas as pd
import pytest
from explorer.on_screen import lasso, status

from kdlib.explorer.membership import COLOURS, COLUMN, membership
from kdlib.explorer.swatches import Swatches

# jupyter-scatter 1.0.1 under pandas 3.1
pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword")


def test_an_example_is_in_one_in_several_or_in_none():
    shown = {"a": np.array([1, 2, 3]), "b": np.array([3, 4])}
    found = membership(pd.Index([0, 1, 2, 3, 4]), shown)
    assert found.tolist() == ["in none", "a", "a", "in several", "b"]


def test_saved_selections_colour_the_map_until_another_column_does(app):
    [plot], c, ids = app.plots, app.controls, app.state.table.index
    for name, some in (("first", ids[:30]), ("second", ids[20:50])):
        lasso(plot, some)
        c.name.value = name
        c.save.click()
    buttons = {button.description: button for button in c.swatches.box.children[1:]}
    assert list(buttons) == ["first", "second"]
    assert COLUMN not in c.colour.options
    for button in buttons.values():
        button.value = True
    assert (c.colour.value, plot.widget.color_title) == (COLUMN, COLUMN)
    codes = plot.widget.color_domain
    points = pd.Series(plot.widget.points[:, 2]).map({code: kind for kind, code in codes.items()})
    assert points.value_counts().to_dict() == {
        "in none": 1050, "first": 20, "second": 20, "in several": 10,
    }  # fmt: skip
    assert buttons["first"].layout.border_left == f"8px solid {COLOURS[0]}"
    buttons["second"].value = False
    assert (plot.frame[COLUMN] == "first").sum() == 30
    codes = plot.widget.color_domain
    assert (plot.widget.points[:, 2] == codes["first"]).sum() == 30  # the browser has them too
    c.colour.value = "class"
    assert not any(button.value for button in buttons.values())
    assert COLUMN not in c.colour.options
    buttons["second"].value = True
    buttons["second"].value = False
    assert c.colour.value == plot.widget.color_title == "class", status(app)


def test_the_first_gives_its_colour_away_where_none_is_left():
    changes = []
    swatches = Swatches(lambda: changes.append(list(swatches.colours)))
    names = [f"s{i}" for i in range(len(COLOURS) + 1)]
    swatches.list(names)
    for button in swatches.box.children[1:]:
        button.value = True
    assert swatches.colours == {**dict(zip(names[1:-1], COLOURS[1:], strict=True)),
                                names[-1]: COLOURS[0]}  # fmt: skip
    assert not swatches.box.children[1].value
    assert len(changes) == len(names)
