"""What is picked, hidden and shown of a datamap: the state behind the walkable map, no widgets.

Holds the selection and what can be done with it (looked at, counted, saved, restored, trained on),
and the HTML that shows it. Leaves to others: drawing and controls (explorer), what a saved
selection is (selection), the training itself (`notebooks/04_distill.ipynb`).
"""

import atexit
import base64
import contextlib
import html
import io
import itertools
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import kdlib
from kdlib import dataset, distilling, experiment, files, mapping, runs
from kdlib.params import PICKED, Study
from kdlib.selection import Subset, tie_break

LIMITS = {"variability": (0.0, 0.5), "confidence": (0.0, 1.0), "correctness": (0.0, 1.0)}
REGIONS = ("region_variability", "region_corner")
PAGE = 48  # images of the gallery at a time
SIDE = 96  # pixels: smaller images are enlarged without smoothing, larger ones shrunk
LISTED = 20  # classes of the table of counts
LIT = "#D55E00"  # selected points, and their share of a class
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
# First line of an exception as Python and papermill print it: its class, then its message.
_RAISED = re.compile(r"(?:\w+\.)*\w*(?:Error|Exception|Exit|Interrupt|Iteration)(?::.*)?")


def drawn(table: pd.DataFrame, max_points: int) -> pd.DataFrame:
    """The rows of a datamap that are drawn: all, or a seeded sample that has of each class and
    region its share, and at least one example while there is room."""
    if len(table) <= max_points:
        return table
    strata = table.groupby(["label", *REGIONS], observed=True, sort=False).ngroup().to_numpy()
    ties = tie_break(table.index.to_numpy(), seed=0)
    order = np.lexsort((ties, strata))
    first = np.searchsorted(strata[order], strata[order])
    size = np.bincount(strata)[strata[order]]
    quantile = (np.arange(len(order)) - first) / size  # of an example within its stratum
    kept = order[np.lexsort((ties[order], quantile))[:max_points]]
    return table.iloc[np.sort(kept)]


class Explorer:
    """What is selected, hidden and shown of one datamap, and what can be done with it.

    Attributes:
        table: The whole datamap; index of N example ids, sorted.
        shown: Its rows that are drawn.
        other: The drawn rows of the second map, None without one; `other_name` names it.
        names: Class names by label.
        scores: Columns that can be an axis, a colour, an order or a filter.
        picked: (n,) int64, sorted: what was selected; `selected` is the visible part of it.
        visible: (N,) bool: which examples the filter lets pass.
        sort, ascending, number: Order and page (from 0) of the gallery.
    """

    def __init__(
        self, study: Study, against: pd.DataFrame | Study | None = None, max_points: int = 1_000_000
    ) -> None:
        if max_points < 1:
            raise ValueError(f"max_points is {max_points}; expected at least 1")
        self.study, self.images = study, dataset.open_images(study)
        self.table = mapping.open_datamap(study, self.images)
        self.names = [str(name) for name in self.images.train.header["class_names"]]
        self.shown = drawn(self.table, max_points)
        self.other, self.other_name = None, getattr(against, "name", "the other map")
        if against is not None:
            self.other = drawn(self._checked(against), max_points)
        numbers = self.table.select_dtypes("number").columns
        self.scores = [c for c in numbers if c != "label" and np.isfinite(self.table[c]).any()]
        self.picked = np.empty(0, np.int64)
        self.sort, self.ascending, self.number = "confidence", True, 0
        self.clear_filter()

    def _checked(self, against: pd.DataFrame | Study) -> pd.DataFrame:
        """The other datamap, which must be of the same images."""
        if isinstance(against, Study):
            images = dataset.open_images(against)
            mine, other = (
                i.train.header["identity"] | {"relabel": 0} for i in (self.images, images)
            )
            if mine != other:  # other labels of the same images do not matter
                raise ValueError(
                    f"{against.name} has other images than {self.study.name}, so that equal ids "
                    "are different images; expected a study of the same data"
                )
            return mapping.open_datamap(against, images)
        lacking = {"label", *LIMITS, *REGIONS} - set(against.columns)
        if lacking or not against.index.isin(self.table.index).any():
            raise ValueError(
                f"the other datamap lacks {sorted(lacking) or 'every example of this one'}; "
                "expected a table as mapping.open_datamap returns it, indexed by example id"
            )
        return against.sort_index()

    @property
    def note(self) -> str:
        """What is drawn, in one sentence."""
        n, total = len(self.shown), len(self.table)
        if n == total:
            return f"All {total:,} training examples are drawn."
        return (
            f"{n:,} of {total:,} examples are drawn: a seeded sample, stratified by class and "
            "region. Only drawn examples can be selected on the map."
        )

    @property
    def selected(self) -> np.ndarray:
        """(n,) int64, sorted: the selected examples that no filter hides."""
        return self.picked[self.visible[self.table.index.get_indexer(self.picked)]]

    def select(self, ids: Iterable[int]) -> str:
        """Select these examples and no others.

        Returns: A sentence that counts those that are in one map alone, or hidden, and so ignored.
        """
        ids = np.unique(np.asarray(ids, np.int64))
        mine = self.table.index.get_indexer(ids) >= 0
        self.picked, self.number = ids[mine], 0
        chosen = self.selected
        self.picked = chosen  # what is hidden now was not selected
        said = [f"{len(chosen):,} selected"]
        for n, why in (
            ((~mine).sum(), f"not in {self.study.name}"),
            (mine.sum() - len(chosen), "hidden by the filter"),
        ):
            said += [f"{n:,} ignored ({why})"] if n else []
        if self.other is not None and (n := (~np.isin(chosen, self.other.index)).sum()):
            said.append(f"{n:,} of them not in {self.other_name}")
        return "; ".join(said) + "."

    def filter(self, classes: Iterable[int] = (), **ranges: tuple[float, float]) -> str:
        """Hide all but these classes (none given: all stay) and these ranges `score=(low, high)`,
        both ends included. The hidden part of a selection returns when it is shown again."""
        visible = np.ones(len(self.table), bool)
        if classes := list(classes):
            visible &= self.table["label"].isin(classes).to_numpy()
        for score, (low, high) in ranges.items():
            self._known(score)
            visible &= self.table[score].between(low, high).to_numpy()
        self.visible, self.number = visible, 0
        if not visible.any():
            return "No example passes this filter."
        return f"{visible.sum():,} of {len(visible):,} examples pass the filter."

    def clear_filter(self) -> str:
        """Show all."""
        return self.filter()

    def find(self, text: str | int) -> str:
        """Select the one example of this id.

        Raises: ValueError for what is no id of the map, or hidden.
        """
        try:
            place = self.table.index.get_loc(int(text))
        except (ValueError, KeyError):
            ids = self.table.index
            raise ValueError(
                f"There is no example {str(text)!r} in this map; its ids lie between {ids[0]} and "
                f"{ids[-1]}, without those of the validation images."
            ) from None
        if not self.visible[place]:
            raise ValueError(f"Example {int(text)} is hidden by the filter; clear it first.")
        self.select([int(text)])
        where = "" if int(text) in self.shown.index else " It is not among the drawn points."
        return f"Example {int(text)}: {self.class_name(self.table['label'].iloc[place])}.{where}"

    def order(self, score: str, ascending: bool) -> None:
        """Sort the gallery."""
        self._known(score)
        self.sort, self.ascending, self.number = score, ascending, 0

    @property
    def n_pages(self) -> int:
        """Pages of the gallery; 1 when nothing is selected."""
        return max(1, -(-len(self.selected) // PAGE))

    def page(self, number: int | None = None) -> pd.DataFrame:
        """The rows of one page of the gallery, in its order; a number out of range is moved in."""
        self.number = min(max(self.number if number is None else number, 0), self.n_pages - 1)
        rows = self.table.loc[self.selected]
        rows = rows.sort_values(self.sort, ascending=self.ascending, kind="stable")
        return rows.iloc[self.number * PAGE : (self.number + 1) * PAGE]

    def counts(self) -> pd.DataFrame:
        """Per class, in the order of the labels: name, how many are selected, how many there are,
        and the selected share."""
        n, labels = len(self.names), self.table["label"]
        chosen = np.bincount(labels.loc[self.selected], minlength=n)
        whole = np.bincount(labels, minlength=n)
        share = chosen / np.maximum(whole, 1)
        return pd.DataFrame(
            {"class": self.names, "selected": chosen, "whole": whole, "share": share}
        )

    def pictures(self, ids: Sequence[int]) -> list[str]:
        """PNGs of some examples as data URIs; these alone are read."""
        return [data_uri(pixels) for pixels in self.images.train.read("images", np.asarray(ids))]

    def class_name(self, label: int) -> str:
        """Name of a class, as the source gave it: escape it where it enters HTML."""
        return self.names[int(label)]

    def _known(self, score: str) -> None:
        if score not in self.scores:
            raise ValueError(f"unknown score {score!r}; {files.nearest(score, self.scores)}")

    # Saved selections

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name!r} names no selection: expected letters, digits, _ and -, a letter or "
                "digit first."
            )
        return self.study.picked(PICKED + name)

    def saved(self) -> list[str]:
        """Names of the saved selections."""
        return sorted(path.stem for path in (self.study.runs / "selections").glob("*.parquet"))

    def save(self, name: str) -> Path:
        """Save what is selected as a subset, the strategy `picked_<name>` of the study.

        Raises: ValueError for a name that is no name or is taken, and when nothing is selected.
        """
        path, ids = self._path(name), self.selected
        if not len(ids):
            raise ValueError("Nothing is selected; draw a lasso around some points first.")
        if path.exists() and not np.array_equal(there := Subset.load(path).example_ids, ids):
            raise ValueError(
                f"{name!r} already names another selection, of {len(there):,} examples, which "
                "stays as it is; choose another name."
            )
        parent = runs.read_evidence(self.study.upstream.runs / "datamap")["datamap_sha256"]
        data = files.fingerprint(self.images.fingerprints)
        fraction = len(ids) / len(self.images.train_ids)
        return Subset(ids, PICKED + name, fraction, 0, parent, data).save(path)

    def restore(self, name: str) -> str:
        """Select what was saved under a name; the filter is cleared."""
        data = files.fingerprint(self.images.fingerprints)
        subset = Subset.load(self._path(name), data)
        self.clear_filter()
        return f"{name}: {self.select(subset.example_ids)}"

    # Students

    def commands(self, name: str) -> list[list[str]]:
        """The commands that train the study's students on a saved selection, and on a random one
        of the same size."""
        path = experiment.written(self.study)
        fraction = Subset.load(self._path(name)).fraction
        made = []
        for strategy, more in ((PICKED + name, []), ("random", ["-p", "fraction", repr(fraction)])):
            executed = self._path(name).with_name(f"{name}-{strategy}-04_distill.ipynb")
            if strategy != "random":
                executed = self._path(name).with_name(f"{name}-04_distill.ipynb")
            made.append(
                [sys.executable, "-m", "papermill", "--engine", "ipc", "--no-progress-bar",
                 "notebooks/04_distill.ipynb", str(executed),
                 "-p", "study", str(path), "-p", "strategy", strategy, *more]
            )  # fmt: skip
        return made

    def _students(self, name: str) -> list[tuple[Any, Any, int]]:
        """(cell of the selection, cell of the random subset of equal size, seed)."""
        fraction = Subset.load(self._path(name)).fraction
        return [
            (
                self.study.cell(strategy=PICKED + name, objective=objective),
                self.study.cell(strategy="random", fraction=fraction, objective=objective),
                seed,
            )
            for objective in self.study.axes.objective
            for seed in self.study.seeds
        ]

    def trained(self, name: str) -> tuple[int, int]:
        """How many of the students of `commands` are done, and how many there will be."""
        wanted = [(c, seed) for *pair, seed in self._students(name) for c in pair]
        done = 0
        for cell, seed in wanted:
            # not there, or of settings from before the study was changed
            with contextlib.suppress(FileNotFoundError, ValueError):
                distilling.open_student(self.study, cell, seed)
                done += 1
        return done, len(wanted)

    def results(self, name: str) -> pd.DataFrame:
        """Test accuracies of the last step: objective, seed, picked, random, difference.

        Raises: FileNotFoundError when not all students are trained.
        """
        rows = []
        for picked, random, seed in self._students(name):
            accuracy = [
                distilling.open_student(self.study, c, seed)["checkpoints"]["last"]["test_accuracy"]
                for c in (picked, random)
            ]
            rows.append((picked.objective, seed, *accuracy, accuracy[0] - accuracy[1]))
        return pd.DataFrame(rows, columns=["objective", "seed", "picked", "random", "difference"])


def data_uri(pixels: np.ndarray) -> str:
    """A (C, H, W) uint8 image as a PNG of about SIDE pixels."""
    from PIL import Image

    n_channels, height, width = pixels.shape
    plain = pixels[0] if n_channels != 3 else pixels.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(plain))
    if (times := SIDE // max(height, width)) > 1:
        image = image.resize((times * width, times * height), Image.Resampling.NEAREST)
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# HTML; every text that came from data passes through html.escape

_CELL = "padding:0 .6em;line-height:1.6"


def gallery_html(state: Explorer) -> str:
    """The present page of the gallery."""
    rows = state.page()
    if not len(rows):
        return (
            "<div style='color:#767676;padding:1em'>Draw a lasso around some points: their images "
            "appear here. The buttons beside the map switch between lasso and moving.</div>"
        )
    shown = []
    for uri, (i, row) in zip(state.pictures(rows.index), rows.iterrows(), strict=True):
        name = html.escape(state.class_name(row["label"]))
        score = f"{row[state.sort]:.3g}"
        about = ", ".join(f"{s} {row[s]:.3g}" for s in LIMITS)
        shown.append(
            f"<figure style='margin:0;text-align:center' title='example {i}: {name}&#10;{about}'>"
            f"<img src='{uri}' alt='{name}' style='width:100%;image-rendering:pixelated'>"
            "<figcaption style='font-size:11px;line-height:1.2;white-space:nowrap;overflow:hidden;"
            f"text-overflow:ellipsis'>{name}<br><span style='color:#767676'>{score}</span>"
            "</figcaption></figure>"
        )
    return (
        "<div class='kdlib-gallery' style='display:grid;gap:6px;align-content:start;"
        f"grid-template-columns:repeat(auto-fill,minmax(56px,1fr))'>{''.join(shown)}</div>"
    )


def counts_html(state: Explorer) -> str:
    """How many of each class are selected, with bars; of many classes those with most."""
    table = state.counts()
    title = "selected, of all"
    if len(table) > LISTED:
        title += f" (the {LISTED} most of {len(table):,} classes)"
        table = table.sort_values("selected", ascending=False, kind="stable").head(LISTED)
    lines = "".join(
        f"<tr><td style='{_CELL}'>{html.escape(row['class'])}</td><td style='width:120px'><div "
        f"style='background:{LIT};height:9px;width:{100 * row.share:.1f}%'></div></td>"
        f"<td style='{_CELL};text-align:right'>{row.selected:,}</td>"
        f"<td style='{_CELL};text-align:right;color:#767676'>of {row.whole:,}</td></tr>"
        for _, row in table.iterrows()
    )
    return f"<b>{title}</b><table class='kdlib-counts' style='font-size:12px'>{lines}</table>"


def results_html(state: Explorer, name: str) -> str:
    """Students of a selection beside those of a random one, in points of test accuracy."""
    heads = ("objective", name, "random", "difference", "seed by seed")
    size = len(Subset.load(state._path(name)))
    lines = ""
    for objective, rows in state.results(name).groupby("objective", sort=False):
        mean = 100 * rows[["picked", "random", "difference"]].mean()
        each = " ".join(f"{100 * d:+.1f}" for d in rows["difference"])
        texts = (
            objective,
            f"{mean.iloc[0]:.2f} %",
            f"{mean.iloc[1]:.2f} %",
            f"{mean.iloc[2]:+.2f}",
        )
        lines += "<tr>" + "".join(
            f"<td style='{_CELL}'>{html.escape(str(text))}</td>" for text in (*texts, each)
        )
    head = "".join(f"<th style='{_CELL};text-align:left'>{html.escape(h)}</th>" for h in heads)
    return (
        f"<div style='line-height:1.4'>Test accuracy of students trained on <b>{html.escape(name)}"
        f"</b> and on as many random examples ({size:,}), mean over {len(state.study.seeds)} seeds:"
        "</div>"
        f"<table class='kdlib-results' style='font-size:12px'><tr>{head}</tr>{lines}</table>"
    )


def failure_html(name: str, training: "Training") -> str:
    """Why the students of a selection are not trained, and where all that was printed lies."""
    return (
        f"<div class='kdlib-failure' style='line-height:1.4;color:{LIT}'><b>The training of "
        f"students on {html.escape(name)} failed:</b> {html.escape(training.error())}<br>"
        f"The whole log: <code>{html.escape(str(training.log))}</code></div>"
    )


class Training:
    """Commands that run one after another in the background; they end with the kernel.

    Attributes: code, the first exit code that is not 0, or 0 at the end; None before. stopped.
    """

    def __init__(
        self, commands: list[list[str]], log: Path, tell: Callable[[str], Any], end: Callable
    ) -> None:
        """Start.

        Args:
            log: File of what they print.
            tell: Called twice a second with the log's last line.
            end: Called with this training when all is over.
        """
        self.commands, self.log, self.tell, self.end = commands, log, tell, end
        self.code: int | None = None
        self.stopped, self._process = False, None
        atexit.register(self.stop)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        code = 0
        with open(self.log, "w") as log:
            for command in self.commands:
                if self.stopped or code:
                    break
                try:  # a session of its own: interrupting a cell leaves it alone
                    self._process = subprocess.Popen(
                        command, cwd=Path(kdlib.__file__).parents[1], stdin=subprocess.DEVNULL,
                        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                    )  # fmt: skip
                except OSError as error:
                    log.write(f"{type(error).__name__}: {error}")
                    code = 1
                    break
                while (code := self._wait()) is None:
                    self.tell(self.last_line())
        self.code = code
        atexit.unregister(self.stop)
        self.end(self)

    def _wait(self) -> int | None:
        try:
            return self._process.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            return None

    def lines(self) -> list[str]:
        """What is printed so far, line by line, without colours."""
        text = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))
        return re.split(r"\r?\n|\r", text)

    def last_line(self) -> str:
        """The last line printed so far that is not empty."""
        return next((line for line in reversed(self.lines()) if line.strip()), "")

    def error(self) -> str:
        """Why it failed: class and message of the last exception in the log, in one line; where no
        exception is printed, the exit code and the last line."""
        lines = self.lines()
        starts = [i for i, line in enumerate(lines) if _RAISED.fullmatch(line.strip())]
        if not starts:
            how = f"exit code {self.code}" if self.code > 0 else f"signal {-self.code}"
            return f"the process ended with {how}; its last line: {self.last_line() or 'none'}"
        message = itertools.takewhile(str.strip, lines[starts[-1] :])
        return " ".join(line.strip() for line in message)

    def stop(self) -> None:
        """End the running command: papermill takes its kernel down on an interrupt."""
        self.stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            threading.Timer(10, self._process.kill).start()
