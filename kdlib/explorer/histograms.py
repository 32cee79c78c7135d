"""The filter as a widget: histograms of scores with a range each, and a toggle for each class."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets as t

from kdlib.explorer.crossfilter import LIMITS, Bins, make_bins
from kdlib.explorer.state import Explorer

HERE = Path(__file__).parent


class Histograms(anywidget.AnyWidget):
    """Histograms of the shown scores, and the classes; ranges and classes hide the rest.

    The kernel counts, so that a million examples cost the browser no more than a thousand. A
    histogram counts what all filters but its range let pass.
    """

    _esm = (HERE / "histograms.js").read_text()
    _css = (HERE / "app.css").read_text()  # of the whole app
    scores = t.List(t.Unicode()).tag(sync=True)
    shown = t.List(t.Unicode()).tag(sync=True)
    bins = t.Dict().tag(sync=True)  # score -> edges, whole, note
    counts = t.Dict().tag(sync=True)  # score -> passing, selected
    ranges = t.Dict().tag(sync=True)  # score -> first bin, and the first bin after the range
    classes = t.Dict().tag(sync=True)  # names, whole
    class_counts = t.Dict().tag(sync=True)  # passing, selected
    chosen = t.List(t.Int()).tag(sync=True)  # labels; none: all
    dragging = t.Bool(False).tag(sync=True)  # whether the ranges are about to change again

    def __init__(self, state: Explorer) -> None:
        counts = state.counts()
        super().__init__(
            scores=list(state.scores),
            classes={"names": state.names, "whole": counts["whole"].tolist()},
        )
        self.state, self._made = state, {}
        self._show([score for score in LIMITS if score in state.scores])
        self.observe(lambda change: self._show(change["new"]), "shown")

    def _show(self, scores: list[str]) -> None:
        """Count, then show the histograms of these scores."""
        for score in set(scores) - set(self._made):
            self._made[score] = make_bins(self.state.table, score)
        made = {score: _sent(self._made[score]) for score in self._made}
        self.bins = made
        self.shown = scores
        self.update()

    def filter(self) -> str:
        """Let the state hide what ranges and classes leave out; returns its sentence."""
        ranges = {score: self._made[score].ends(*range_) for score, range_ in self.ranges.items()}
        return self.state.filter(self.chosen, **ranges)

    def clear(self) -> None:
        """Take all ranges and classes away."""
        with self.hold_sync():
            self.ranges, self.chosen, self.dragging = {}, [], False

    def update(self) -> None:
        """Show how many examples of each bin pass the other filters and are selected."""
        state = self.state
        chosen = state.table.index.get_indexer(state.selected)
        with self.hold_sync():
            self.counts = {
                score: {
                    "passing": bins.counts(state.filters.visible_without(score)).tolist(),
                    "selected": bins.counts(chosen).tolist(),
                }
                for score in self.shown
                for bins in [self._made[score]]
            }
            table = state.counts()
            self.class_counts = {name: table[name].tolist() for name in ("passing", "selected")}


def _sent(bins: Bins) -> dict[str, Any]:
    n_missing = len(bins.places) - int(bins.whole.sum())
    note = f"{n_missing:,} without a value" if n_missing else ""
    centres = None if bins.centres is None else bins.centres.tolist()
    sent = {"edges": bins.edges.tolist(), "whole": bins.whole.tolist()}
    return sent | {"centres": centres, "note": note}
