"""One datamap as a jupyter-scatter widget."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from kdlib.explorer.crossfilter import LIMITS, range_of
from kdlib.explorer.density import MANY, contours
from kdlib.explorer.example import VERMILLION, region_name, tooltip_picture
from kdlib.explorer.membership import BESIDES, COLUMN, OTHERS, SEVERAL, membership
from kdlib.explorer.state import REGIONS, Explorer

PAPER = {False: "white", True: "#111111"}  # behind the points; dark theme or not: JupyterLab's own
INK = {False: "#333333", True: "#dddddd"}  # lines of density


class MapWidget:
    """One map as a jupyter-scatter widget: points by position, selections by example id.

    Attributes:
        widget: The map, `hand` the widget of no size that stands beside it.
        operation: What the next selection does: `replace` the former one, `add` or `remove`.
        density: Whether lines show where points lie dense.
        pointed: Id of the example on which a cross lies, or None.
    """

    def __init__(self, state: Explorer, table: pd.DataFrame, most: int) -> None:
        """Args: most, pixels that the map is high at most; a low window makes it lower."""
        import jscatter

        from kdlib.explorer.hand import Hand

        self.state, self.table, n = state, table, len(table)
        self.hand = Hand(most=most, label=f"Datamap of {n:,} examples")
        self.dark, self.operation, self.density = False, "replace", n >= MANY
        self._axes, self._marks = ("variability", "confidence"), {}
        self._dense, self.pointed = [], None
        frame = table.reset_index(drop=True)
        short = [name if len(name) <= 18 else name[:17] + "…" for name in state.names]
        kinds = [n if short.count(n) == 1 else f"{i} {n}" for i, n in enumerate(short)]
        frame["example"] = table.index
        frame["class"] = pd.Categorical.from_codes(frame["label"], kinds)
        for flag in frame.select_dtypes(bool):
            frame[flag] = frame[flag].map({False: "no", True: "yes"}).astype("category")
        for region in REGIONS:
            kept = frame[region].cat.remove_unused_categories()
            frame[region] = kept.cat.rename_categories(region_name)
        self.frame = frame
        self.scatter = jscatter.Scatter(
            data=frame, x="variability", y="confidence", height=self.hand.height,
            background_color=PAPER[False], mouse_mode="lasso",
            size=7 if n < 5_000 else 4 if n < 100_000 else 2, opacity=0.8,
        )  # fmt: skip
        self.scatter.axes(grid=True, labels=True)
        self.scatter.options(transition_points=False)
        keys = {"merge": "shift", "remove": "alt"}
        self.scatter.options(regl_scatterplot_options={"actionKeyMap": keys})
        self.scatter.tooltip(
            enable=True, properties=["example", "class", *LIMITS], histograms=False,
            preview="class", preview_type="image", preview_image_size="contain",
            preview_image_position="center", preview_image_height=170,
        )  # fmt: skip
        self.widget = self.scatter.widget
        # jupyter-scatter would look the image up in a column; this asks for one at a time. Private:
        # test_a_tooltip_asks_for_one_image guards it
        self.widget._handle_tooltip = self.answer_tooltip
        self.hand.observe(lambda change: setattr(self.widget, "height", change["new"]), "height")

    def answer_tooltip(self, event: dict[str, Any]) -> None:
        """Send image, class, scores and why it is hard of the one point under the mouse."""
        row = self.frame.iloc[event["index"]]
        about = {s: f"{row[s]:.3f}" for s in LIMITS}
        about |= {"example": str(row["example"]), "class": str(row["class"])}
        uri = tooltip_picture(self.state, int(row["example"]))
        message = {"type": event["type"], "index": event["index"], "preview": uri}
        self.widget.send(message | {"properties": about})

    def ids(self, positions: Iterable[int]) -> np.ndarray:
        """Example ids of some points."""
        return self.table.index.to_numpy()[np.asarray(positions, np.int64)]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Points of some examples, sorted, without those that are not drawn."""
        positions = self.table.index.get_indexer(ids)
        return np.sort(positions[positions >= 0]).astype(np.uint32)

    def chosen(self) -> tuple[np.ndarray, str]:
        """Example ids that the lasso or the click on the map is about, and what it does with them.

        The browser adds to the drawn points that are selected, or removes from them.
        """
        ids = self.ids(self.widget.selection)
        before = self.ids(self.positions(self.state.selected))
        if self.operation == "add":
            return np.setdiff1d(ids, before), "add"
        if self.operation == "remove":
            return np.setdiff1d(before, ids), "remove"
        return ids, "replace"

    def show_selection(self) -> None:
        """Highlight the selected points."""
        new, old = self.positions(self.state.selected), self.widget.selection
        if old is None or not np.array_equal(np.sort(old), new):
            self.widget.selection = new

    def show_filter(self) -> None:
        """Hide the points that the filter hides."""
        visible = self.state.visible
        ids = self.state.table.index[visible].to_numpy()
        self.scatter.filter(None if visible.all() else self.positions(ids))
        self.show_density()

    def show_density(self) -> None:
        """Draw lines around the densest places of the shown points, or take them away."""
        lines = []
        if self.density:
            x, y = (self.frame[score].to_numpy(float) for score in self._axes)
            ids = self.state.table.index[self.state.visible]
            shown = self.table.index.isin(ids) & np.isfinite(x) & np.isfinite(y)
            limits = [self._limits(score) for score in self._axes]
            lines = contours(x[shown], y[shown], *limits)
        self._dense = [vertices for _, vertices in lines]
        self._annotate()

    def point_at(self, example_id: int | None) -> None:
        """Draw a cross through one example, if it is drawn, or take the cross away."""
        self.pointed = example_id
        self._annotate()

    def _annotate(self) -> None:
        from jscatter import Line

        lines = [Line(vertices, INK[self.dark], 1) for vertices in self._dense]
        if self.pointed in self.table.index:
            row = self.frame.iloc[self.table.index.get_loc(self.pointed)]
            (x, y), (of_x, of_y) = row[list(self._axes)], map(self._limits, self._axes)
            if np.isfinite([x, y]).all():
                cross = [(of_x[0], y), (of_x[1], y)], [(x, of_y[0]), (x, of_y[1])]
                lines += [Line(vertices, VERMILLION, 1) for vertices in cross]
        if lines or self.widget.annotations:
            self.scatter.annotations(lines)

    def mark(self, colours: Mapping[str, str], ids: Mapping[str, np.ndarray]) -> None:
        """Make the column of saved selections, from name to colour and to ids."""
        self.frame[COLUMN] = membership(self.table.index, {name: ids[name] for name in colours})
        self._marks = dict(colours)

    def wear(self, dark: bool) -> None:
        """Take the colours of a dark or a light theme; `look` brings those of the points."""
        self.dark = dark
        self.scatter.background(PAPER[dark])

    def look(self, x: str, y: str, colour: str) -> None:
        """Put scores on the axes and a column into the colour, in one message to the browser."""
        if absent := {x, y, colour} - set(self.frame.columns):
            raise ValueError(f"One of the maps has no {' and no '.join(sorted(absent))}.")
        self._axes = x, y
        with self.widget.hold_sync():
            self.scatter.x(x, scale=self._limits(x))
            self.scatter.y(y, scale=self._limits(y))
            self.scatter.axes(labels=[x, y])
            self._colour(colour)
            self.widget.points = self.scatter.get_point_list()  # a column can have changed
            self.widget.non_spatial_points_update = False  # places may be new as well as colours
            self.show_density()

    def _limits(self, score: str) -> tuple[float, float]:
        """Ends of an axis, a little beyond the values."""
        low, high = range_of(self.frame, score)
        wider = 0.02 * (high - low) or 1.0
        return low - wider, high + wider

    def _colour(self, column: str) -> None:
        from kdlib.plots.theme import STRATEGIES, VIRIDIS, VIRIDIS_ON_BLACK

        values, few = self.frame[column], True
        if isinstance(values.dtype, pd.CategoricalDtype):
            kinds = list(values.cat.categories)
            # lists: a dict would stay as the order of the next column's legend, whose error in the
            # browser keeps the axes as they are (jupyter-scatter 1.0.1)
            mapped = "auto"
            if column in REGIONS:
                mapped = [STRATEGIES[kind.removesuffix("-to-learn")][0] for kind in kinds]
            elif column == COLUMN:
                every = self._marks | dict(zip((SEVERAL, OTHERS), BESIDES[self.dark], strict=True))
                mapped = [every[kind] for kind in kinds]
            self.scatter.color(by=column, order=None, map=mapped)
            few = len(kinds) <= 12
        else:
            norm = range_of(self.frame, column)
            ramp = (VIRIDIS_ON_BLACK if self.dark else VIRIDIS).tolist()
            self.scatter.color(by=column, order=None, map=ramp, norm=norm)
        self.scatter.legend(few)
