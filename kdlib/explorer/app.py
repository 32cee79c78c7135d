"""The datamap to walk in: select images on it, look at them, save them, train students on them.

`explore` is the door, `App` what it shows. The only module that imports widgets, and only where
they are shown. Leaves to others: what is picked and what becomes of it (picking), scores
(cartography).
"""

import asyncio
import base64
import html
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.explorer.background import Training
from kdlib.explorer.html import LIT, counts_html, failure_html, gallery_html, results_html
from kdlib.explorer.state import LIMITS, REGIONS, SIDE, Explorer
from kdlib.study.study import Study

A_CLICK_S = 0.6  # a click on a point so soon after a lasso is the end of the lasso

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


def explore(
    study: Study,
    against: pd.DataFrame | Study | None = None,
    max_points: int = 1_000_000,
    widgets: bool | None = None,
) -> "App | None":
    """The map of a study whose steps 01 to 03 are done, as an app; make it the last line of a cell.

    Args:
        against: Another datamap of the same images, beside the first: what is selected in one is
            selected in the other.
        max_points: Draw at most so many examples of a map, sampled by class and region.
        widgets: Whether the front end can show them; None finds out.

    Returns: The app, which a cell shows; None where no front end can, after the still map.
    """
    if _front_end() if widgets is None else widgets:
        return App(Explorer(study, against, max_points))
    path = still_map(study)
    print(
        f"No widgets can be shown here, so this is the still map, {path}: open the notebook in "
        "JupyterLab to walk in it (widgets=True insists)."
    )
    if _kernel() is not None:
        from IPython.display import Image, display

        display(Image(path, width=800))
    return None


def still_map(study: Study) -> Path:
    """The datamap as a picture, drawn when there is none or an older one."""
    path, table = study.figures / "datamap.png", study.upstream.runs / "datamap/datamap.parquet"
    if path.exists() and path.stat().st_mtime > table.stat().st_mtime:
        return path
    from kdlib.steps.figures import draw_datamap

    return draw_datamap(study)["datamap"]


def _kernel() -> Any:
    if "IPython" not in sys.modules:  # a kernel has imported it
        return None
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None)


def _front_end() -> bool:
    """Whether a person sees this cell: JupyterLab, Notebook 7 and VS Code send its id with it;
    papermill, nbclient and nbconvert do not (ipykernel 7.4, nbclient 0.11, JupyterLab 4.6)."""
    kernel = _kernel()
    return kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})


class _Plot:
    """One map as a jupyter-scatter widget: takes and gives example ids."""

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
        told = {"type": event["type"], "index": event["index"], "preview": uri}
        self.widget.send(told | {"properties": about})

    def ids(self, positions: Iterable[int]) -> np.ndarray:
        """Example ids of some points."""
        return self.table.index.to_numpy()[np.asarray(positions, np.int64)]

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """Points of some examples, sorted, without those that are not drawn."""
        found = self.table.index.get_indexer(ids)
        return np.sort(found[found >= 0]).astype(np.uint32)

    def show_selection(self) -> None:
        """Light up what is selected."""
        new, old = self.positions(self.state.selected), self.widget.selection
        if old is None or not np.array_equal(np.sort(old), new):
            self.widget.selection = new

    def show_filter(self) -> None:
        """Hide what is hidden."""
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
        low, high = _range_of(self.frame, score)
        wider = 0.02 * (high - low) or 1.0
        return low - wider, high + wider

    def _colour(self, column: str) -> None:
        import matplotlib as mpl

        from kdlib.plots.theme import STRATEGIES

        values, few = self.frame[column], True
        if isinstance(values.dtype, pd.CategoricalDtype):
            kinds = list(values.cat.categories)
            mapped = {k: STRATEGIES[k][0] for k in kinds} if column in REGIONS else "auto"
            self.scatter.color(by=column, order=None, map=mapped)
            few = len(kinds) <= 12
        else:
            colours = mpl.colormaps["viridis"](np.linspace(0, 0.93, 256)).tolist()
            norm = _range_of(self.frame, column)
            self.scatter.color(by=column, order=None, map=colours, norm=norm)
        self.scatter.legend(few)


def _fitting() -> Any:
    """A widget of no size that fits the map in the same box to the width of its canvas."""
    import anywidget

    return anywidget.AnyWidget(_esm=FIT)


def _range_of(table: pd.DataFrame, score: str) -> tuple[float, float]:
    """Ends of a score: what is possible where that is known, else what is there."""
    values = table[score][np.isfinite(table[score])]
    return LIMITS.get(score, (float(values.min()), float(values.max())))


class App:
    """An explorer on the screen: `state` is what it shows; show the app as a cell's last line."""

    def __init__(self, state: Explorer) -> None:
        self.state, self.training, self._silent = state, None, False
        self._lassoed = self._drawing_until = -np.inf  # monotonic times
        self._waiting = None
        linked = state.other is not None
        tables = [state.shown] + ([state.other] if linked else [])
        self.plots = [_Plot(state, table, 420 if linked else 470) for table in tables]
        self._make_controls()
        self.box = self._arranged(linked)
        for plot in self.plots:
            plot.widget.observe(self._told(lambda plot=plot: self._lasso(plot)), "selection")
        with self._quietly():
            self._look()
            self._range()
            self._list_saved()
            self._refresh()
        self.say("Draw a lasso on the map to select examples.")

    def _make_controls(self) -> None:
        import ipywidgets as w

        def control(kind: str, act: Callable, tip: str, width: str = "auto", **more: Any) -> Any:
            style = {} if kind == "Button" else {"style": {"description_width": "auto"}}
            layout = w.Layout(width=width)
            made = getattr(w, kind)(**style | {"tooltip": tip, "layout": layout} | more)
            if kind == "Button":
                made.on_click(self._told(act))
            else:
                made.observe(self._told(act), names="value")
            return made

        def menu(text: str, act: Callable, tip: str, options: Sequence, value: str) -> Any:
            more = {"description": text, "options": options, "value": value}
            return control("Dropdown", act, tip, "220px", **more)

        def button(text: str, act: Callable, tip: str, icon: str, **more: Any) -> Any:
            return control("Button", act, tip, description=text, icon=icon, **more)

        scores, frame = self.state.scores, self.plots[0].frame
        kinds = [c for c in frame.select_dtypes("category") if c in self.state.table]
        self.x = menu("x", self._look, "Score on the horizontal axis", scores, "variability")
        self.y = menu("y", self._look, "Score on the vertical axis", scores, "confidence")
        colours = ["class", *kinds, *scores]
        tip = "What the colour of a point says"
        self.colour = menu("colour", self._look, tip, colours, "correctness")
        self.shape = control(
            "Dropdown", self._shape, "Shape that selects on the map", "130px", description="draw",
            options=[("lasso", "freeform"), ("box", "rectangle"), ("brush", "brush")],
        )  # fmt: skip
        self.id = control(
            "Text", self._find, "Id of an example", "130px", description="example",
            placeholder="id", continuous_update=False,
        )  # fmt: skip
        self.find = button("Find", self._find, "Select the example of this id", "search")
        self.classes = control(
            "SelectMultiple", self._filter, "Show these classes alone (Ctrl: several); none: all",
            "220px", description="classes", rows=5,
            options=[(name, label) for label, name in enumerate(self.state.names)],
        )  # fmt: skip
        tip = "Score of which a range is shown"
        self.by = menu("range of", self._range, tip, scores, "confidence")
        self.range = control(
            "FloatRangeSlider", self._filter, "Show examples whose score lies in this range",
            "300px", min=0, max=1, step=0.01, value=(0, 1), continuous_update=False,
            readout_format=".3g",
        )  # fmt: skip
        self.clear = button("Show all", self._clear, "Clear the filter", "eye")
        self.sort = menu("sort by", self._order, "Score that orders the images", scores,
                         self.state.sort)  # fmt: skip
        self.ascending = control(
            "ToggleButtons", self._order, "Order of the images",
            options=[("low first", True), ("high first", False)], style={"button_width": "84px"},
        )  # fmt: skip
        self.back = button("", lambda: self._turn(-1), "Previous page", "chevron-left")
        self.forth = button("", lambda: self._turn(1), "Next page", "chevron-right")
        self.name = control("Text", lambda: None, "Name of the selection", "220px",
                            description="name", placeholder="letters, digits, _ -")  # fmt: skip
        tip = "Save what is selected under this name"
        self.save = button("Save", self._save, tip, "save")
        self.restore = menu("saved", self._restore, "Select what was saved", [""], "")
        tip = "Save, and train the study's students on it and on as many random examples"
        self.train = button("Train students on it", self._train, tip, "play")
        tip = "Stop the training; finished students stay"
        self.stop = button("Stop", self._stop, tip, "stop", disabled=True)
        self.status, self.page, self.gallery, self.counts, self.log, self.results = (
            w.HTML() for _ in range(6)
        )

    def _arranged(self, linked: bool) -> Any:
        import ipywidgets as w

        def line(*parts: Any, **layout: Any) -> Any:
            look = {"flex_flow": "row wrap", "align_items": "center", "width": "100%"}
            return w.HBox(parts, layout=w.Layout(**look | layout))

        def share(*parts: Any, part: float = 1, box: Callable = w.VBox, **layout: Any) -> Any:
            return box(parts, layout=w.Layout(flex=f"{part} 1 0%", min_width="0", **layout))

        title = f"<b>{html.escape(self.state.study.name)}</b>. {html.escape(self.state.note)}"
        if linked:
            title += f" Beside it: <b>{html.escape(self.state.other_name)}</b>."
        maps = [
            share(plot.widget, _fitting(), part=1.3, box=w.Box, display="block")
            for plot in self.plots
        ]
        for box in maps:
            box.add_class("kdlib-map")
        scrolled = w.Layout(height="400px", overflow="auto", display="block")
        order, turn = line(self.sort, self.ascending), line(self.back, self.forth, self.page)
        images = w.Box([self.gallery], layout=scrolled)
        gallery = share(order, turn, images, margin="0 0 0 12px")
        start = w.Layout(align_items="flex-start")
        ranges = w.VBox([self.by, self.range, self.clear], layout=start)
        work = share(
            line(self.classes, ranges, align_items="flex-start"),
            line(self.name, self.save, self.restore, margin="12px 0 0 0"),
            line(self.train, self.stop),
            self.log,
            self.results,
            part=1.3,
        )
        counts = share(self.counts, margin="0 0 0 12px")
        rows = [[*maps, gallery], [work, counts]]
        if linked:
            work.layout.flex = counts.layout.flex = "0 0 auto"  # one above the other
            rows = [maps, [share(work, counts), gallery]]
        top = [
            w.HTML(title),
            line(self.x, self.y, self.colour, self.shape, self.id, self.find),
            self.status,
        ]
        return w.VBox([*top, *(w.HBox(row, layout=w.Layout(margin="0 0 8px 0")) for row in rows)])

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """The app, and the still map for where no widget can be shown, such as GitHub."""
        bundle = dict(self.box._repr_mimebundle_())
        png = still_map(self.state.study).read_bytes()
        bundle["image/png"] = base64.b64encode(png).decode()
        bundle["text/plain"] = f"the datamap of {self.state.study.name}"
        return bundle, {"image/png": {"width": 800}}

    def _shape(self) -> None:
        for plot in self.plots:
            plot.scatter.lasso(type=self.shape.value)

    def say(self, sentence: str, wrong: bool = False) -> None:
        """Show one sentence in the status line."""
        look = f"color:{LIT};font-weight:bold" if wrong else "color:#333333"
        text = html.escape(" ".join(sentence.split()))
        self.status.value = f"<span class='kdlib-status' style='{look}'>{text}</span>"

    def _attempt(self, act: Callable) -> None:
        """Do it, and show what it says, or why it failed."""
        try:
            said = act()
        except Exception as error:  # whatever it is, the person at the screen shall see it
            known = isinstance(error, (ValueError, FileNotFoundError))
            self.say(str(error) if known else f"{type(error).__name__}: {error}", wrong=True)
        else:
            if said:
                self.say(said)

    def _told(self, act: Callable) -> Callable:
        """A callback out of an action; what the action changes calls nothing back."""

        def call(*_: Any) -> None:
            if not self._silent:
                with self._quietly():
                    self._attempt(act)

        return call

    @contextmanager
    def _quietly(self):
        """Changes of widgets made here call nothing back."""
        before, self._silent = self._silent, True
        try:
            yield
        finally:
            self._silent = before

    def _refresh(self) -> None:
        for plot in self.plots:
            plot.show_selection()
        self.counts.value = counts_html(self.state)
        self._show_page()

    def _show_page(self) -> None:
        self.gallery.value = gallery_html(self.state)
        about = (self.state.number + 1, self.state.n_pages, len(self.state.selected))
        text = "page {} of {}, {:,} selected".format(*about)
        self.page.value = f"<span class='kdlib-page'>{text}</span>"

    def _lasso(self, plot: _Plot) -> str:
        ids = plot.ids(plot.widget.selection)
        # jupyter-scatter takes a lasso that ends where it began for a click on a point as well
        if len(ids) == 1 and time.monotonic() - self._lassoed < A_CLICK_S:
            plot.show_selection()
            return ""
        said = self.state.select(ids)
        self._refresh()
        self._lassoed = time.monotonic() if len(ids) > 1 else -np.inf
        return said

    def _look(self) -> None:
        """Bring axes and colour to the map, though not while it is still drawing: jupyter-scatter
        loses, without a word, points that come then (1.0.1)."""
        wait = self._drawing_until - time.monotonic()
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # no kernel, and so no browser
            wait = 0
        if wait > 0:
            if not self._waiting:
                self._waiting = loop.call_later(wait, self._told(self._look_again))
            return
        for plot in self.plots:
            plot.look(self.x.value, self.y.value, self.colour.value)
        n = max(len(plot.table) for plot in self.plots)
        self._drawing_until = time.monotonic() + 0.5 + 5e-6 * n

    def _look_again(self) -> None:
        self._waiting = None
        self._look()

    def _find(self) -> str:
        said = self.state.find(self.id.value.strip())
        self._refresh()
        return said

    def _range(self) -> str:
        """Take the slider to the range of another score, which shows all of it."""
        low, high = _range_of(self.state.table, self.by.value)
        step = (high - low) / 100 or 0.01
        self.range.min, self.range.max = min(low, self.range.min), max(high, self.range.max)
        self.range.value = low, high
        self.range.min, self.range.max, self.range.step = low, high, step
        return self._filter()

    def _filter(self) -> str:
        chosen, whole = self.range.value, (self.range.min, self.range.max)
        ranges = {} if tuple(chosen) == whole else {self.by.value: chosen}
        said = self.state.filter(self.classes.value, **ranges)
        for plot in self.plots:
            plot.show_filter()
        self._refresh()
        return said

    def _clear(self) -> str:
        self.classes.value = ()
        return self._range()

    def _order(self) -> None:
        self.state.order(self.sort.value, self.ascending.value)
        self._show_page()

    def _turn(self, by: int) -> None:
        self.state.number += by
        self._show_page()

    def _list_saved(self) -> None:
        self.restore.options = [("choose one", ""), *((name, name) for name in self.state.saved())]
        self.restore.value = ""

    def _save(self) -> str:
        path = self.state.save(self.name.value.strip())
        self._list_saved()
        return f"{len(self.state.selected):,} examples saved in {path}."

    def _restore(self) -> str:
        name = self.restore.value
        if not name:
            return ""
        said = self.state.restore(name)
        if not self.train.disabled:  # of an earlier training
            self.log.value = ""
        self._clear()
        self.name.value = name
        self._list_saved()
        done, wanted = self.state.trained(name)
        self.results.value = results_html(self.state, name) if done == wanted else ""
        return said

    def _train(self) -> str:
        name = self.name.value.strip()
        self.state.save(name)
        self._list_saved()
        log = self.state.study.runs / "selections" / f"{name}-train.log"
        commands = self.state.commands(name)
        self.train.disabled, self.stop.disabled = True, False
        self.log.value = self.results.value = ""
        self.training = Training(
            commands, log, lambda last: self._heard(name, last),
            lambda training: self._ended(name, training),
        )  # fmt: skip
        return f"Training students on {name}; the kernel stays free meanwhile."

    def _heard(self, name: str, last: str) -> None:
        def tell() -> None:
            done, wanted = self.state.trained(name)
            text = html.escape(f"{done} of {wanted} students done; {last}")
            self.log.value = f"<code class='kdlib-log' style='font-size:11px'>{text}</code>"

        self._attempt(tell)  # in the thread of the training

    def _ended(self, name: str, training: Training) -> None:
        def tell() -> str:
            self.train.disabled, self.stop.disabled, self.log.value = False, True, ""
            if training.stopped:
                return "Stopped; finished students stay and are not trained again."
            if training.code:
                self.log.value = failure_html(name, training)
                raise ValueError(
                    f"The training of students on {name} failed; its error stands below the button."
                )
            self.results.value = results_html(self.state, name)
            return f"The students of {name} are trained."

        self._attempt(tell)  # in the thread of the training

    def _stop(self) -> str:
        self.training.stop()
        return "Stopping ..."
