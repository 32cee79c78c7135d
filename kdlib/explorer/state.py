"""What is selected, hidden and shown of a datamap: the state behind the app, without widgets."""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.cartography.datamap import ranked
from kdlib.cartography.subset import Subset
from kdlib.explorer.crossfilter import LIMITS, Filters
from kdlib.explorer.history import History
from kdlib.explorer.selections import selection_path
from kdlib.repro import files
from kdlib.repro.seeds import hashed
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_map
from kdlib.steps.example import Examples
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

REGIONS = ("region_variability", "region_corner")
PAGE = 48  # images of the gallery at a time
SIDE = 96  # pixels: smaller images are enlarged without smoothing, larger ones shrunk


def drawn(table: pd.DataFrame, max_points: int) -> pd.DataFrame:
    """The rows of a datamap that are drawn: all, or a seeded sample that has of each class and
    region its share, and at least one example while there is room."""
    if len(table) <= max_points:
        return table
    strata = table.groupby(["label", *REGIONS], observed=True, sort=False).ngroup().to_numpy()
    ties = hashed(table.index.to_numpy(), 0, "subset")
    order = np.lexsort((ties, strata))
    first = np.searchsorted(strata[order], strata[order])
    size = np.bincount(strata)[strata[order]]
    quantile = (np.arange(len(order)) - first) / size  # of an example within its stratum
    kept = order[np.lexsort((ties[order], quantile))[:max_points]]
    return table.iloc[np.sort(kept)]


class Explorer:
    """What is selected, hidden and shown of one datamap.

    Attributes:
        table: The whole datamap; index of N example ids, sorted.
        shown: Its rows that are drawn.
        other: The drawn rows of the second map, None without one; `other_name` names it.
        examples: What the study's files say about single images.
        names: Class names by label.
        scores: Columns that can be an axis, a colour, an order or a filter.
        picked: (n,) int64, sorted ids of the selection; `selected` is the visible part of it.
        history: Earlier selections.
        filters: Which examples each filter lets pass; `visible` are those that pass all.
        sort, ascending, number: Order and page (from 0) of the gallery.
    """

    def __init__(
        self, study: Study, against: pd.DataFrame | Study | None = None, max_points: int = 1_000_000
    ) -> None:
        if max_points < 1:
            raise ValueError(f"max_points is {max_points}; expected at least 1")
        self.study, self.images = study, open_images(study)
        self.examples = Examples(study, self.images)
        self.table, self.file = open_map(study, self.images)
        self.names = [str(name) for name in self.images.train.header["class_names"]]
        self.shown = drawn(self.table, max_points)
        self.other, self.other_name = None, getattr(against, "name", "the other map")
        if against is not None:
            self.other = drawn(self._checked(against), max_points)
        numbers = self.table.select_dtypes("number").columns
        self.scores = [c for c in numbers if c != "label" and np.isfinite(self.table[c]).any()]
        self.picked, self.history = np.empty(0, np.int64), History()
        self.sort, self.ascending, self.number = "confidence", True, 0
        self.clear_filter()

    def _checked(self, against: pd.DataFrame | Study) -> pd.DataFrame:
        """The other datamap, which must be of the same images."""
        if isinstance(against, Study):
            images = open_images(against)
            mine, other = (
                i.train.header["identity"] | {"relabel": 0} for i in (self.images, images)
            )
            if mine != other:  # other labels of the same images do not matter
                raise ValueError(
                    f"{against.name} has other images than {self.study.name}, so that equal ids "
                    "are different images; expected a study of the same data"
                )
            return open_map(against, images)[0]
        missing = {"label", *LIMITS, *REGIONS} - set(against.columns)
        if missing or not against.index.isin(self.table.index).any():
            raise ValueError(
                f"the other datamap lacks {sorted(missing) or 'every example of this one'}; "
                "expected a datamap of the same images, indexed by example id"
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

    @property
    def visible(self) -> np.ndarray:
        """(N,) bool: which examples the filter lets pass."""
        return self.filters.visible

    def select(self, ids: Iterable[int], how: str = "replace") -> str:
        """Select these examples and no others; or `add` them to the selection, or `remove` them.

        Returns: A sentence that counts what is selected, and the ids ignored: not in the map, or
            hidden.
        """
        ids = np.unique(np.asarray(ids, np.int64))
        positions = self.table.index.get_indexer(ids)
        chosen = ids[positions >= 0][self.visible[positions[positions >= 0]]]
        n_before, before = len(self.selected), self.picked
        if how == "add":
            self.picked = np.union1d(before, chosen)
        elif how == "remove":
            self.picked = np.setdiff1d(before, chosen, assume_unique=True)
        else:
            self.picked = chosen  # hidden examples are not selected
        self.number, n = 0, len(self.selected)
        self.history.record(self.picked)
        said = {"add": f" ({n - n_before:,} added)", "remove": f" ({n_before - n:,} removed)"}
        parts = [f"{n:,} selected{said.get(how, '')}"]
        n_mine = int((positions >= 0).sum())
        for n, why in (
            (len(ids) - n_mine, f"not in {self.study.name}"),
            (n_mine - len(chosen), "hidden by the filter"),
        ):
            parts += [f"{n:,} ignored ({why})"] if n else []
        if self.other is not None and (n := (~np.isin(self.selected, self.other.index)).sum()):
            parts.append(f"{n:,} of them not in {self.other_name}")
        return "; ".join(parts) + "."

    def select_visible(self, how: str = "replace") -> str:
        """Select all examples that pass the filter; or add them, or remove them."""
        return self.select(self.table.index[self.visible], how)

    def undo(self) -> str:
        """Take the last change of the selection back."""
        return self._go("Undone", self.history.undo())

    def redo(self) -> str:
        """Make the change again that was taken back last."""
        return self._go("Redone", self.history.redo())

    def _go(self, what: str, ids: np.ndarray) -> str:
        self.picked, self.number = ids, 0
        return f"{what}: {len(self.selected):,} selected."

    def filter(self, classes: Iterable[int] = (), **ranges: tuple[float, float]) -> str:
        """Hide all but these classes (none given: all stay) and these ranges `score=(low, high)`,
        both ends included. The hidden part of a selection returns when it is shown again."""
        for score in ranges:
            self._known(score)
        self.filters = Filters(self.table, classes, ranges, self.filters)
        self.number = 0
        if not self.visible.any():
            return "No example passes this filter."
        return f"{self.visible.sum():,} of {len(self.visible):,} examples pass the filter."

    def clear_filter(self) -> str:
        """Show all."""
        self.filters = Filters(self.table)
        return self.filter()

    def find(self, text: str | int) -> str:
        """Select the one example of this id.

        Raises: ValueError for what is no id of the map, or hidden.
        """
        try:
            position = self.table.index.get_loc(int(text))
        except (ValueError, KeyError):
            ids = self.table.index
            raise ValueError(
                f"There is no example {str(text)!r} in this map; its ids lie between {ids[0]} and "
                f"{ids[-1]}, without those of the validation images."
            ) from None
        if not self.visible[position]:
            raise ValueError(f"Example {int(text)} is hidden by the filter; clear it first.")
        self.select([int(text)])
        where = "" if int(text) in self.shown.index else " It is not among the drawn points."
        return f"Example {int(text)}: {self.class_name(self.table['label'].iloc[position])}.{where}"

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
        order = pd.Series(ranked(rows, self.sort)).sort_values(
            ascending=self.ascending, kind="stable"
        )
        rows = rows.iloc[order.index]
        return rows.iloc[self.number * PAGE : (self.number + 1) * PAGE]

    def counts(self) -> pd.DataFrame:
        """Per class, in the order of the labels: name, how many are selected, how many the filters
        but that of the classes let pass, and how many there are."""
        n, labels = len(self.names), self.table["label"].to_numpy()
        chosen = self.table.index.get_indexer(self.selected)
        passing = self.filters.visible_without("class")
        columns = {"class": self.names}
        for name, some in (("selected", chosen), ("passing", passing), ("whole", slice(None))):
            columns[name] = np.bincount(labels[some], minlength=n)
        return pd.DataFrame(columns)

    def pictures(self, ids: Sequence[int], side: int = SIDE) -> list[str]:
        """PNGs of some examples as data URIs, of about so many pixels; no other image is read."""
        read = self.images.train.read("images", np.asarray(ids))
        return [data_uri(pixels, side) for pixels in read]

    def class_name(self, label: int) -> str:
        """Name of a class, as the source gave it: escape it where it enters HTML."""
        return self.names[int(label)]

    def class_of(self, example_id: int) -> str:
        """Name of the class of an example; escape it too."""
        return self.class_name(self.table["label"].loc[example_id])

    def _known(self, score: str) -> None:
        if score not in self.scores:
            raise ValueError(f"unknown score {score!r}; {files.nearest(score, self.scores)}")

    def save(self, name: str) -> Path:
        """Save the selected examples as a subset, the strategy `picked_<name>` of the study.

        Raises: ValueError for a name that is no name or is taken, and when nothing is selected.
        """
        path, ids = selection_path(self.study, name), self.selected
        if not len(ids):
            raise ValueError("Nothing is selected; draw a lasso around some points first.")
        if path.exists() and not np.array_equal(saved := Subset.load(path).example_ids, ids):
            raise ValueError(
                f"{name!r} already names another selection, of {len(saved):,} examples, which "
                "stays as it is; choose another name."
            )
        parent, data = files.sha256_file(self.file), files.fingerprint(self.images.fingerprints)
        fraction = len(ids) / len(self.images.train_ids)
        return Subset(ids, PICKED + name, fraction, 0, parent, data).save(path)

    def restore(self, name: str) -> str:
        """Select the examples of a saved selection; the filter is cleared."""
        data = files.fingerprint(self.images.fingerprints)
        subset = Subset.load(selection_path(self.study, name), data)
        self.clear_filter()
        return f"{name}: {self.select(subset.example_ids)}"


def data_uri(pixels: np.ndarray, side: int = SIDE) -> str:
    """A (C, H, W) uint8 image as a PNG of about so many pixels."""
    from PIL import Image

    n_channels, height, width = pixels.shape
    plain = pixels[0] if n_channels != 3 else pixels.transpose(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(plain))
    if (times := side // max(height, width)) > 1:
        image = image.resize((times * width, times * height), Image.Resampling.NEAREST)
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
