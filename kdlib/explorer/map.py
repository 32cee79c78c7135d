"""One datamap as a jupyter-scatter widget."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from kdlib.explorer.state import LIMITS, REGIONS, SIDE, Explorer

# jupyter-scatter 1.0.1 draws the ranges of both axes as a square as high as the canvas; a canvas
# narrower than high cuts off both ends of x. This narrows the square to the canvas, at first and
# after each change of the canvas's size. Setting the view again redraws the axes.
FIT = """
export default {
  render({ el }) {
    let ended = false;
    let observer;
    function start() {
      const divs = el.closest(".kdlib-map")?.querySelectorAll("div") ?? [];
      const map = [...divs].find((div) => div.api);
      if (!map) {
        if (!ended) requestAnimationFrame(start); // the map is not there yet
        return;
      }
      const [plot, canvas] = [map.api, map.querySelector("canvas")];
      async function fit() {
        if (ended || !canvas.clientWidth || !canvas.clientHeight) return;
        const width = Math.max(1, canvas.clientWidth - 16); // room for the labels of both ends
        await plot.set({ aspectRatio: Math.min(1, width / canvas.clientHeight) });
        plot.view(plot.get("cameraView"));
      }
      observer = new ResizeObserver(() => requestAnimationFrame(fit));
      observer.observe(canvas);
    }
    start();
    return () => {
      ended = true;
      observer?.disconnect();
    };
  },
};
"""


class MapWidget:
    """One map as a jupyter-scatter widget: points by position, selections by example id."""

    def __init__(self, state: Explorer, table: pd.DataFrame, height: int) -> None:
        import jscatter

        self.state, self.table, n = state, table, len(table)
        frame = table.reset_index(drop=True)
        short = [name if len(name) <= 18 else name[:17] + "…" for name in state.names]
        kinds = [n if short.count(n) == 1 else f"{i} {n}" for i, n in enumerate(short)]
        frame["example"] = table.index
        frame["class"] = pd.Categorical.from_codes(frame["label"], kinds)
        for flag in frame.select_dtypes(bool):
            frame[flag] = frame[flag].map({False: "no", True: "yes"}).astype("category")
        for region in REGIONS:
            frame[region] = frame[region].cat.remove_unused_categories()
        self.frame = frame
        self.scatter = jscatter.Scatter(
            data=frame, x="variability", y="confidence", height=height, background_color="white",
            size=7 if n < 5_000 else 4 if n < 100_000 else 2, opacity=0.8, mouse_mode="lasso",
        )  # fmt: skip
        self.scatter.axes(grid=True, labels=True)
        self.scatter.options(transition_points=False)
        self.scatter.tooltip(
            enable=True, properties=["example", "class", *LIMITS], histograms=False,
            preview="class", preview_type="image", preview_image_size="contain",
            preview_image_position="center", preview_image_height=SIDE,
        )  # fmt: skip
        self.widget = self.scatter.widget
        # jupyter-scatter would look the image up in a column; this asks for one at a time. Private:
        # test_a_tooltip_asks_for_one_image guards it
        self.widget._handle_tooltip = self.answer_tooltip

    def answer_tooltip(self, event: dict[str, Any]) -> None:
        """Send image, class and scores of the one point under the mouse."""
        row = self.frame.iloc[event["index"]]
        about = {s: f"{row[s]:.3f}" for s in LIMITS}
        about |= {"example": str(row["example"]), "class": str(row["class"])}
        [uri] = self.state.pictures([row["example"]])
        message = {"type": event["type"], "index": event["index"], "preview": uri}
        self.widget.send(message | {"properties": about})

    def ids(self, positions: Iterable[int]) -> np.ndarray:
        """Example ids of some points."""
        return self.table.index.to_numpy()[np.asarray(positions, np.int64)]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Points of some examples, sorted, without those that are not drawn."""
        positions = self.table.index.get_indexer(ids)
        return np.sort(positions[positions >= 0]).astype(np.uint32)

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

    def look(self, x: str, y: str, colour: str) -> None:
        """Put scores on the axes and a column into the colour, in one message to the browser."""
        if absent := {x, y, colour} - set(self.frame.columns):
            raise ValueError(f"One of the maps has no {' and no '.join(sorted(absent))}.")
        with self.widget.hold_sync():
            self.scatter.x(x, scale=self._limits(x))
            self.scatter.y(y, scale=self._limits(y))
            self.scatter.axes(labels=[x, y])
            self._colour(colour)
            self.widget.non_spatial_points_update = False  # places may be new as well as colours

    def _limits(self, score: str) -> tuple[float, float]:
        """Ends of an axis, a little beyond the values."""
        low, high = range_of(self.frame, score)
        wider = 0.02 * (high - low) or 1.0
        return low - wider, high + wider

    def _colour(self, column: str) -> None:
        from kdlib.plots.theme import STRATEGIES, VIRIDIS

        values, few = self.frame[column], True
        if isinstance(values.dtype, pd.CategoricalDtype):
            kinds = list(values.cat.categories)
            mapped = {k: STRATEGIES[k][0] for k in kinds} if column in REGIONS else "auto"
            self.scatter.color(by=column, order=None, map=mapped)
            few = len(kinds) <= 12
        else:
            norm = range_of(self.frame, column)
            self.scatter.color(by=column, order=None, map=VIRIDIS.tolist(), norm=norm)
        self.scatter.legend(few)


def fitting_widget() -> Any:
    """A widget of no size that fits the map in the same box to the width of its canvas."""
    import anywidget

    return anywidget.AnyWidget(_esm=FIT)


def range_of(table: pd.DataFrame, score: str) -> tuple[float, float]:
    """Ends of a score: the possible ones where they are known, else those of the table."""
    values = table[score][np.isfinite(table[score])]
    return LIMITS.get(score, (float(values.min()), float(values.max())))
