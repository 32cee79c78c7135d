"""The widgets of the app and their places on the screen; what they do is attached by the app."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w

from kdlib.explorer.histograms import Histograms
from kdlib.explorer.map import MapWidget
from kdlib.explorer.state import Explorer
from kdlib.explorer.swatches import Swatches

KEYS = "Shift adds, Alt removes, Ctrl+Z undoes, Ctrl+Shift+Z redoes."


class Controls:
    """One attribute for each widget.

    Attributes:
        x, y, colour, density: Axes and colour of the map, lines of density on it.
        shape, operation, undo, redo: What selects on the map and how, and its steps.
        id, find: The example that is searched for.
        histograms, clear, take: The filter, and the button that selects what it shows.
        view, sort, ascending, back, forth: What `gallery` shows; order and page of the images.
        name, save, restore, swatches: Saved selections.
        train, stop: Training of students.
        status, page, gallery, log, results: Text and images, as HTML.
    """

    def __init__(
        self, state: Explorer, colours: Sequence[str], recolour: Callable[[], None]
    ) -> None:
        """Args: state, for scores and class names; colours, columns that can colour points;
        recolour, called when other saved selections are to be seen on the map."""
        scores = state.scores
        self.x = _menu("x", "Score on the horizontal axis", scores, "variability")
        self.y = _menu("y", "Score on the vertical axis", scores, "confidence")
        self.colour = _menu("colour", "Column that colours the points", colours, "correctness")
        self.density = _control(
            w.ToggleButton, "Lines that enclose 95, 80, 60, 40, 20 and 5 % of the shown points",
            description="density", icon="bullseye",
        )  # fmt: skip
        self.shape = _control(
            w.Dropdown, "Shape that selects on the map", "110px", description="draw",
            options=[("lasso", "freeform"), ("box", "rectangle"), ("brush", "brush")],
        )  # fmt: skip
        self.operation = _control(
            w.ToggleButtons, "What a lasso, a click or the filter does to the selection",
            options=[("new", "replace"), ("add", "add"), ("remove", "remove")],
            style={"button_width": "auto"},
        )  # fmt: skip
        self.undo = _button("", "Undo the last selection (Ctrl+Z)", "undo")
        self.redo = _button("", "Redo it (Ctrl+Shift+Z)", "repeat")
        self.id = _control(
            w.Text, "Id of an example", "130px", description="example", placeholder="id",
            continuous_update=False,
        )  # fmt: skip
        self.find = _button("Find", "Select the example of this id", "search")
        self.histograms = Histograms(state)
        self.clear = _button("Show all", "Take all ranges and classes away", "eye")
        self.take = _button("Select shown", "Select all examples that pass the filter", "check")
        self.sort = _menu("sort by", "Score that orders the images", scores, state.sort)
        self.ascending = _control(
            w.ToggleButtons, "Order of the images",
            options=[("low first", True), ("high first", False)], style={"button_width": "84px"},
        )  # fmt: skip
        self.view = _control(
            w.ToggleButtons, "The selected images, one of them, or a dozen that stand for all",
            options=[("images", "images"), ("one image", "one"), ("what is in it?", "groups")],
            style={"button_width": "auto"},
        )  # fmt: skip
        self.back = _button("", "Previous page", "chevron-left")
        self.forth = _button("", "Next page", "chevron-right")
        self.name = _control(
            w.Text, "Name of the selection", "220px", description="name",
            placeholder="letters, digits, _ -",
        )  # fmt: skip
        self.save = _button("Save", "Save the selected examples under this name", "save")
        self.restore = _menu("saved", "Select the examples of a saved selection", [""], "")
        self.swatches = Swatches(recolour)
        tip = "Save, and train the study's students on it and on as many random examples"
        self.train = _button("Train students on it", tip, "play")
        tip = "Stop the training; finished students stay"
        self.stop = _button("Stop", tip, "stop", disabled=True)
        self.status, self.page, self.gallery, self.log, self.results = (w.HTML() for _ in range(5))


def _control(kind: type, tip: str, width: str = "auto", **more: Any) -> Any:
    options = {"style": {"description_width": "auto"}, "layout": w.Layout(width=width)}
    return kind(**options | {"tooltip": tip} | more)


def _menu(text: str, tip: str, options: Sequence, value: str) -> Any:
    more = {"description": text, "options": options, "value": value}
    return _control(w.Dropdown, tip, "180px", **more)


def _button(text: str, tip: str, icon: str, **more: Any) -> Any:
    layout = w.Layout(width="auto")
    return w.Button(description=text, tooltip=tip, icon=icon, layout=layout, **more)


def arranged(controls: Controls, plots: Sequence[MapWidget], state: Explorer) -> Any:
    """All widgets in one box; `app.css` places filter, maps and images beside each other."""
    c, linked = controls, len(plots) > 1
    title = f"<b>{html.escape(state.study.name)}</b>. {html.escape(state.note)}"
    if linked:
        title += f" Beside it: <b>{html.escape(state.other_name)}</b>."
    title += f" <span class='kdlib-quiet'>{KEYS}</span>"
    # block: a flex box would not give the map of jupyter-scatter its width
    maps = [_part("map", plot.widget, plot.hand, box=w.Box, display="block") for plot in plots]
    parts = [
        _part("column", _line(c.clear, c.take), c.histograms),
        *maps,
        _part("side", c.view, _line(c.sort, c.ascending, c.back, c.forth, c.page),
              _part("scroll", c.gallery, box=w.Box, display="block")),
    ]  # fmt: skip
    app = w.VBox(
        [
            w.HTML(title),
            _line(c.x, c.y, c.colour, c.density, c.id, c.find),
            _line(c.shape, c.operation, c.undo, c.redo, c.name, c.save, c.restore, c.train, c.stop),
            _line(c.status, c.swatches.box),
            _part("main", *parts, box=w.Box),
            c.log,
            c.results,
        ]
    )
    app.add_class("kdlib-app")
    if linked:
        app.add_class("kdlib-linked")
    return app


def _line(*parts: Any) -> Any:
    layout = w.Layout(flex_flow="row wrap", align_items="center", width="100%")
    line = w.HBox(parts, layout=layout)
    line.add_class("kdlib-line")
    return line


def _part(name: str, *parts: Any, box: Callable = w.VBox, **layout: Any) -> Any:
    """A box that `app.css` places by its name."""
    part = box(parts, layout=w.Layout(**layout))
    part.add_class(f"kdlib-{name}")
    return part
