"""What jupyter-scatter lacks for one map, as a widget of no size in the same box."""

from pathlib import Path

import anywidget
import traitlets as t


class Hand(anywidget.AnyWidget):
    """Fits the map to its place, knows the theme, and says what a lasso does to the selection.

    Its messages: `{"operation": how}` before each selection that a lasso or a click makes,
    `{"key": "undo" or "redo"}`, and `{"example": id}` of an image that is clicked.
    """

    _esm = (Path(__file__).parent / "map.js").read_text()
    label = t.Unicode().tag(sync=True)  # of the map, for screen readers
    listens = t.Bool(False).tag(sync=True)  # to keys and clicks on images; one hand of an app does
    most = t.Int(800).tag(sync=True)  # pixels that the map is high at most
    operation = t.Unicode("replace").tag(sync=True)  # of a lasso, where no key is held
    height = t.Int(430).tag(sync=True)  # pixels; follows the window
    dark = t.Bool(False).tag(sync=True)  # whether the theme is
