"""The widgets of the app and their places on the screen; what they do is attached by the app."""

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w

from kdlib.explorer.map import MapWidget, fitting_widget
from kdlib.explorer.state import Explorer


class Controls:
    """One attribute for each widget.

    Attributes:
        x, y, colour, shape: Axes and colour of the map, shape that selects on it.
        id, find: The example that is searched for.
        classes, by, range, clear: The filter.
        sort, ascending, back, forth: Order and page of the gallery.
        name, save, restore: Saved selections.
        train, stop: Training of students.
        status, page, gallery, counts, log, results: Text and images, as HTML.
    """

    def __init__(self, state: Explorer, colours: Sequence[str]) -> None:
        """Args: state, for scores and class names; colours, columns that can colour points."""
        scores = state.scores
        self.x = _menu("x", "Score on the horizontal axis", scores, "variability")
        self.y = _menu("y", "Score on the vertical axis", scores, "confidence")
        self.colour = _menu("colour", "Column that colours the points", colours, "correctness")
        self.shape = _control(
            w.Dropdown, "Shape that selects on the map", "130px", description="draw",
            options=[("lasso", "freeform"), ("box", "rectangle"), ("brush", "brush")],
        )  # fmt: skip
        self.id = _control(
            w.Text, "Id of an example", "130px", description="example", placeholder="id",
            continuous_update=False,
        )  # fmt: skip
        self.find = _button("Find", "Select the example of this id", "search")
        self.classes = _control(
            w.SelectMultiple, "Show these classes alone (Ctrl: several); none: all", "220px",
            description="classes", rows=5,
            options=[(name, label) for label, name in enumerate(state.names)],
        )  # fmt: skip
        self.by = _menu("range of", "Score of which a range is shown", scores, "confidence")
        self.range = _control(
            w.FloatRangeSlider, "Show examples whose score lies in this range", "300px", min=0,
            max=1, step=0.01, value=(0, 1), continuous_update=False, readout_format=".3g",
        )  # fmt: skip
        self.clear = _button("Show all", "Clear the filter", "eye")
        self.sort = _menu("sort by", "Score that orders the images", scores, state.sort)
        self.ascending = _control(
            w.ToggleButtons, "Order of the images",
            options=[("low first", True), ("high first", False)], style={"button_width": "84px"},
        )  # fmt: skip
        self.back = _button("", "Previous page", "chevron-left")
        self.forth = _button("", "Next page", "chevron-right")
        self.name = _control(
            w.Text, "Name of the selection", "220px", description="name",
            placeholder="letters, digits, _ -",
        )  # fmt: skip
        self.save = _button("Save", "Save the selected examples under this name", "save")
        self.restore = _menu("saved", "Select the examples of a saved selection", [""], "")
        tip = "Save, and train the study's students on it and on as many random examples"
        self.train = _button("Train students on it", tip, "play")
        tip = "Stop the training; finished students stay"
        self.stop = _button("Stop", tip, "stop", disabled=True)
        self.status, self.page, self.gallery, self.counts, self.log, self.results = (
            w.HTML() for _ in range(6)
        )


def _control(kind: type, tip: str, width: str = "auto", **more: Any) -> Any:
    options = {"style": {"description_width": "auto"}, "layout": w.Layout(width=width)}
    return kind(**options | {"tooltip": tip} | more)


def _menu(text: str, tip: str, options: Sequence, value: str) -> Any:
    more = {"description": text, "options": options, "value": value}
    return _control(w.Dropdown, tip, "220px", **more)


def _button(text: str, tip: str, icon: str, **more: Any) -> Any:
    layout = w.Layout(width="auto")
    return w.Button(description=text, tooltip=tip, icon=icon, layout=layout, **more)


def arranged(controls: Controls, plots: Sequence[MapWidget], state: Explorer) -> Any:
    """All widgets in one box: the maps and the gallery above, work and counts below; with two maps
    the maps above, the rest below."""
    c, linked = controls, len(plots) > 1
    title = f"<b>{html.escape(state.study.name)}</b>. {html.escape(state.note)}"
    if linked:
        title += f" Beside it: <b>{html.escape(state.other_name)}</b>."
    maps = [
        _share(plot.widget, fitting_widget(), part=1.3, box=w.Box, display="block")
        for plot in plots
    ]
    for box in maps:
        box.add_class("kdlib-map")
    scrolled = w.Layout(height="400px", overflow="auto", display="block")
    order, turn = _line(c.sort, c.ascending), _line(c.back, c.forth, c.page)
    gallery = _share(order, turn, w.Box([c.gallery], layout=scrolled), margin="0 0 0 12px")
    ranges = w.VBox([c.by, c.range, c.clear], layout=w.Layout(align_items="flex-start"))
    work = _share(
        _line(c.classes, ranges, align_items="flex-start"),
        _line(c.name, c.save, c.restore, margin="12px 0 0 0"),
        _line(c.train, c.stop),
        c.log,
        c.results,
        part=1.3,
    )
    counts = _share(c.counts, margin="0 0 0 12px")
    rows = [[*maps, gallery], [work, counts]]
    if linked:
        work.layout.flex = counts.layout.flex = "0 0 auto"  # one above the other
        rows = [maps, [_share(work, counts), gallery]]
    top = [w.HTML(title), _line(c.x, c.y, c.colour, c.shape, c.id, c.find), c.status]
    return w.VBox([*top, *(w.HBox(row, layout=w.Layout(margin="0 0 8px 0")) for row in rows)])


def _line(*parts: Any, **layout: Any) -> Any:
    look = {"flex_flow": "row wrap", "align_items": "center", "width": "100%"}
    return w.HBox(parts, layout=w.Layout(**look | layout))


def _share(*parts: Any, part: float = 1, box: Callable = w.VBox, **layout: Any) -> Any:
    """A box that takes `part` parts of its row."""
    return box(parts, layout=w.Layout(flex=f"{part} 1 0%", min_width="0", **layout))
