"""The datamap as an app: select images on it, look at them, save them, train students on them.

`explore` shows the app where a front end can show widgets, else the datamap as a picture.
"""

import base64
import html
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from kdlib.explorer.background import BackgroundTraining
from kdlib.explorer.density import MANY
from kdlib.explorer.example import RULES, detail_html
from kdlib.explorer.html import gallery_html
from kdlib.explorer.map import MapWidget
from kdlib.explorer.membership import COLUMN
from kdlib.explorer.representatives import representatives_html
from kdlib.explorer.results import failure_html, progress_html, progress_of, results_html
from kdlib.explorer.selections import saved_ids, saved_selections, training_commands
from kdlib.explorer.state import Explorer
from kdlib.explorer.still import still_map
from kdlib.study.study import Study

A_CLICK_S = 0.6  # a click on a point so soon after a lasso is the end of the lasso


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


def _kernel() -> Any:
    if "IPython" not in sys.modules:  # a kernel has imported it
        return None
    return getattr(sys.modules["IPython"].get_ipython(), "kernel", None)


def _front_end() -> bool:
    """Whether a person sees this cell: JupyterLab, Notebook 7 and VS Code send its id with it;
    papermill, nbclient and nbconvert do not (ipykernel 7.4, nbclient 0.11, JupyterLab 4.6)."""
    kernel = _kernel()
    return kernel is not None and "cellId" in kernel.get_parent("shell").get("metadata", {})


class App:
    """An explorer on the screen; show the app as a cell's last line.

    Attributes:
        state: What is selected, hidden and shown.
        plots: The maps.
        controls: All other widgets.
        box: Everything, arranged.
        training: The training that was started last, None before.
        example: Id of the image that was clicked last, None before.
    """

    def __init__(self, state: Explorer) -> None:
        from kdlib.explorer.controls import Controls, arranged  # imports ipywidgets

        self.state, self.training, self.example = state, None, None
        self._muted = True  # changes of widgets call no callback
        self._lassoed = -np.inf  # monotonic time
        self._filtered = None
        linked = state.other is not None
        tables = [state.shown] + ([state.other] if linked else [])
        self.plots = [MapWidget(state, table, 520 if linked else 800) for table in tables]
        self.plots[0].hand.listens = True
        frame = self.plots[0].frame
        kinds = [c for c in frame.select_dtypes("category") if c in state.table]
        colours = ["class", *kinds, *state.scores]
        self.controls = Controls(state, colours, self._callback(self._mark))
        self.controls.density.value = self.plots[0].density
        self.box = arranged(self.controls, self.plots, state)
        self._connect()
        self._look()
        self._list_saved()
        self._refresh()
        self._muted = False
        self.say("Draw a lasso on the map to select examples.")

    def _connect(self) -> None:
        """Let each control call its action."""
        c = self.controls
        for control, action in (
            (c.x, self._look), (c.y, self._look), (c.colour, self._recolour),
            (c.shape, self._shape), (c.density, self._draw_density), (c.operation, self._operate),
            (c.id, self._find), (c.sort, self._order), (c.ascending, self._order),
            (c.view, self._show_page), (c.restore, self._restore),
        ):  # fmt: skip
            control.observe(self._callback(action), names="value")
        for button, action in (
            (c.find, self._find), (c.clear, self._clear), (c.take, self._take),
            (c.undo, self._undo), (c.redo, self._redo), (c.back, lambda: self._turn(-1)),
            (c.forth, lambda: self._turn(1)), (c.save, self._save), (c.train, self._train),
            (c.stop, self._stop),
        ):  # fmt: skip
            button.on_click(self._callback(action))
        c.histograms.observe(self._callback(self._filter), ["ranges", "chosen", "dragging"])
        for plot in self.plots:
            plot.widget.observe(self._callback(lambda plot=plot: self._lasso(plot)), "selection")
            plot.hand.observe(self._callback(lambda plot=plot: self._wear(plot)), "dark")
            plot.hand.on_msg(lambda _, message, buffers, plot=plot: self._hear(plot, message))

    def _callback(self, action: Callable[[], str | None]) -> Callable:
        """The action as a callback of widgets, attempted once; its changes call no callback."""

        def call(*_: Any) -> None:
            if self._muted:
                return
            self._muted = True
            try:
                self._attempt(action)
            finally:
                self._muted = False

        return call

    def _attempt(self, action: Callable[[], str | None]) -> None:
        """Do it, and show the sentence it returns, or its error."""
        try:
            sentence = action()
        except Exception as error:  # whatever it is, it belongs on the screen
            known = isinstance(error, (ValueError, FileNotFoundError))
            self.say(str(error) if known else f"{type(error).__name__}: {error}", wrong=True)
        else:
            if sentence:
                self.say(sentence)

    def say(self, sentence: str, wrong: bool = False) -> None:
        """Show one sentence in the status line."""
        look = "kdlib-status kdlib-wrong" if wrong else "kdlib-status"
        text = html.escape(" ".join(sentence.split()))
        self.controls.status.value = f"<span class='{look}' role='status'>{text}</span>"

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        """The app, and the still map for where no widget can be shown, such as GitHub."""
        bundle = dict(self.box._repr_mimebundle_())
        bundle["image/png"] = base64.b64encode(still_map(self.state.study).read_bytes()).decode()
        bundle["text/plain"] = f"the datamap of {self.state.study.name}"
        return bundle, {"image/png": {"width": 800}}

    # The map

    def _shape(self) -> None:
        for plot in self.plots:
            plot.scatter.lasso(type=self.controls.shape.value)

    def _look(self) -> None:
        """Bring axes and colour to the map."""
        c = self.controls
        for plot in self.plots:
            plot.look(c.x.value, c.y.value, c.colour.value)

    def _recolour(self) -> str:
        """Colour by another column than that of the saved selections, whose buttons go up."""
        c = self.controls
        if c.colour.value != COLUMN and c.swatches.colours:
            c.swatches.clear()
            self._offer(c.colour.value)
        self._look()
        rule = RULES.get(c.colour.value)
        return f"{c.colour.value}: {rule}." if rule else ""

    def _mark(self) -> None:
        """Show other saved selections in their colours; without any, the colours from before."""
        c, colours = self.controls, self.controls.swatches.colours
        if c.colour.value != COLUMN:
            self._colour = c.colour.value
        ids = {name: saved_ids(self.state.study, name) for name in colours}
        for plot in self.plots:
            plot.mark(colours, ids)
        self._offer(COLUMN if colours else self._colour)
        self._look()

    def _offer(self, colour: str) -> None:
        """Choose the column that colours; saved selections are one while some are shown."""
        menu = self.controls.colour
        menu.options = [o for o in menu.options if o != COLUMN] + [COLUMN] * (colour == COLUMN)
        menu.value = colour

    def _wear(self, plot: MapWidget) -> None:
        plot.wear(plot.hand.dark)
        self._look()

    def _draw_density(self) -> None:
        for plot in self.plots:
            plot.density = self.controls.density.value
            plot.show_density()

    def _lasso(self, plot: MapWidget) -> str:
        ids, how = plot.chosen()
        # jupyter-scatter takes a lasso that ends where it began for a click on a point as well
        if len(ids) == 1 and time.monotonic() - self._lassoed < A_CLICK_S:
            plot.show_selection()
            return ""
        sentence = self.state.select(ids, how)
        self._show_one_or_all()
        self._refresh()
        self._lassoed = time.monotonic() if len(ids) > 1 else -np.inf
        return sentence

    def _hear(self, plot: MapWidget, message: dict[str, str]) -> None:
        """What the hand of a map says: how its next selection counts, or a key."""
        plot.operation = message.get("operation", plot.operation)
        if "key" in message:
            self._callback({"undo": self._undo, "redo": self._redo}[message["key"]])()
        if "example" in message:
            self._callback(lambda: self._show_example(int(message["example"])))()

    def _show_example(self, example_id: int) -> str:
        """Show one image in its panel and on the map."""
        if example_id not in self.state.table.index:
            raise ValueError(f"There is no example {example_id} in this map.")
        self.example, self.controls.view.value = example_id, "one"
        for plot in self.plots:
            plot.point_at(example_id)
        self._show_page()
        return f"Example {example_id}: {self.state.class_of(example_id)}."

    def _show_one_or_all(self) -> None:
        """Where one example alone is selected its panel, else the images."""
        view, selected = self.controls.view, self.state.selected
        if len(selected) == 1:
            self._show_example(int(selected[0]))
        elif view.value == "one":
            view.value = "images"

    def _operate(self) -> None:
        for plot in self.plots:
            plot.hand.operation = self.controls.operation.value

    def _undo(self) -> str:
        sentence = self.state.undo()
        self._refresh()
        return sentence

    def _redo(self) -> str:
        sentence = self.state.redo()
        self._refresh()
        return sentence

    def _take(self) -> str:
        sentence = self.state.select_visible(self.controls.operation.value)
        self._refresh()
        return sentence

    def _find(self) -> str:
        sentence = self.state.find(self.controls.id.value.strip())
        self._show_one_or_all()
        self._refresh()
        return sentence

    def _refresh(self) -> None:
        for plot in self.plots:
            plot.show_selection()
        c, history = self.controls, self.state.history
        c.undo.disabled, c.redo.disabled = not history.can_undo, not history.can_redo
        c.histograms.update()
        self._show_page()

    # Filter and gallery

    def _filter(self) -> str:
        """Hide what the histograms leave out; on a large map when a range has come to rest."""
        c = self.controls
        asked = c.histograms.ranges, c.histograms.chosen, c.histograms.dragging
        if asked == self._filtered:  # one message of the browser changes several of them
            return ""
        self._filtered = asked
        sentence = c.histograms.filter()
        if c.histograms.dragging and len(self.state.table) > MANY:
            c.histograms.update()
            return sentence
        for plot in self.plots:
            plot.show_filter()
        self._refresh()
        return sentence

    def _clear(self) -> str:
        self.controls.histograms.clear()
        return self._filter()

    def _order(self) -> None:
        self.state.order(self.controls.sort.value, self.controls.ascending.value)
        self._show_page()

    def _turn(self, by: int) -> None:
        self.state.number += by
        self._show_page()

    def _show_page(self) -> None:
        s, view = self.state, self.controls.view.value
        if view == "one":
            shown = detail_html(s, self.example)
        else:
            shown = representatives_html(s) if view == "groups" else gallery_html(s)
        self.controls.gallery.value = shown
        text = f"page {s.number + 1} of {s.n_pages}, {len(s.selected):,} selected"
        self.controls.page.value = f"<span class='kdlib-page'>{text}</span>"

    # Saved selections and their students

    def _list_saved(self) -> None:
        names = saved_selections(self.state.study)
        self.controls.restore.options = [("choose one", ""), *((name, name) for name in names)]
        self.controls.restore.value = ""
        self.controls.swatches.list(names)

    def _save(self) -> str:
        path = self.state.save(self.controls.name.value.strip())
        self._list_saved()
        return f"{len(self.state.selected):,} examples saved in {path}."

    def _restore(self) -> str:
        c = self.controls
        if not (name := c.restore.value):
            return ""
        sentence = self.state.restore(name)
        if not c.train.disabled:  # of an earlier training
            c.log.value = ""
        self._clear()
        c.name.value = name
        self._list_saved()
        c.results.value = results_html(self.state.study, name)
        return sentence

    def _train(self) -> str:
        c, name = self.controls, self.controls.name.value.strip()
        self.state.save(name)
        self._list_saved()
        log = self.state.study.runs / "selections" / f"{name}-train.log"
        commands = training_commands(self.state.study, name)
        c.train.disabled, c.stop.disabled = True, False
        c.log.value, c.results.value = progress_html(self.state.study, name, ()), ""
        self._n_shown = 0
        self.training = BackgroundTraining(  # calls back in its thread
            commands,
            log,
            lambda lines: self._attempt(lambda: self._show_progress(name, lines)),
            lambda training: self._attempt(lambda: self._show_end(name, training)),
        )
        return f"Training students on {name}; the kernel stays free meanwhile."

    def _stop(self) -> str:
        self.training.stop()
        return "Stopping ..."

    def _show_progress(self, name: str, lines: list[str]) -> None:
        c, n = self.controls, len(progress_of(lines).done)
        c.log.value = progress_html(self.state.study, name, lines)
        if n > self._n_shown:  # what is finished is compared while others are trained
            self._n_shown, c.results.value = n, results_html(self.state.study, name)

    def _show_end(self, name: str, training: BackgroundTraining) -> str:
        c = self.controls
        c.train.disabled, c.stop.disabled, c.log.value = False, True, ""
        c.results.value = results_html(self.state.study, name)
        if training.stopped:
            return "Stopped; finished students stay and are not trained again."
        if training.code:
            c.log.value = failure_html(name, training)
            raise ValueError(
                f"The training of students on {name} failed; its error stands below the button."
            )
        return f"The students of {name} are trained."
