"""What a page of a datamap shows: scores, curves, hard images and results, from a study's records.

Nothing here knows HTML: `kdlib.explorer.page` writes it.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from kdlib.cartography.course import courses
from kdlib.cartography.log import DynamicsLog
from kdlib.compare.committed import is_committed, read_committed
from kdlib.compare.comparisons import comparisons
from kdlib.compare.report import titled
from kdlib.compare.text import count, measured_on, summary_lines
from kdlib.dataset.images import Images
from kdlib.explorer.state import Explorer
from kdlib.explorer.thumbnails import Read
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.distill import make_subset
from kdlib.study.cells import Cell, shards_counted, share_in_words
from kdlib.study.evaluation import AXES
from kdlib.study.selections import PICKED, SHARD_POLICIES
from kdlib.study.study import Study

REGION = "region_variability"  # the rule by which a page names regions
IN_WORDS = {"easy": "easy-to-learn", "ambiguous": "ambiguous", "hard": "hard-to-learn"}
LISTED_CLASSES = 20  # with most hard images
LISTED = 8  # hard images of a class, those of lowest confidence
FEWEST_EPOCHS = 6  # of a curve
SENTENCES = 6  # about subsets without hard images, those of the largest differences
PAIRS = 5  # of classes that are taken for each other


@dataclass(frozen=True)
class Content:
    """What one page shows, without its look.

    Attributes:
        name: Of the study.
        network: Whose training was recorded, in words.
        table: Datamap, (N rows) sorted by example id.
        classes: Names by label.
        scores: Columns of the table that are numbers of an example.
        n_epochs, observed: Of the recorded training.
        epochs: Numbers (from 1) of the epochs that curves show; empty without curves.
        gold: (len(epochs), N), probability of the label.
        predicted: (len(epochs), N), predicted class; None where no logits were recorded.
        read: Pixels of examples; None for a page without pictures.
        data, parent: Fingerprints of the data set and of the datamap, which a selection carries.
        other_name, other: A second map of the same images.
        results: Comparisons of students, None where no tables are committed.
        remarks: Sentences about what the page leaves out.
    """

    name: str
    network: str
    table: pd.DataFrame
    classes: list[str]
    scores: list[str]
    n_epochs: int
    observed: str
    epochs: list[int]
    gold: np.ndarray | None
    predicted: np.ndarray | None
    read: Read | None
    data: str
    parent: str
    other_name: str = ""
    other: pd.DataFrame | None = None
    results: dict[str, Any] | None = None
    remarks: list[str] = field(default_factory=list)

    @property
    def region(self) -> np.ndarray:
        """(N,) region of each example."""
        return self.table[REGION].astype(str).to_numpy()

    def hard(self) -> dict[int, np.ndarray]:
        """Label -> positions of its hardest images, at most LISTED; classes with most hard images
        first. Hard is the region; the lowest confidence comes first."""
        rows = pd.DataFrame(
            {
                "label": self.table["label"].to_numpy(),
                "confidence": self.table["confidence"].to_numpy(),
            }
        )[self.region == "hard"]
        counts = rows["label"].value_counts()
        order = sorted(counts.index, key=lambda label: (-counts[label], label))
        return {
            int(label): rows[rows["label"] == label]
            .sort_values("confidence", kind="stable")
            .index[:LISTED]
            .to_numpy()
            for label in order[:LISTED_CLASSES]
        }

    def sentences(self) -> dict[str, list[str]]:
        """`map`: what the map shows; `regions`: what their names mean; `hard`: how many images are
        hard, and why."""
        n, counts = len(self.table), Counter(self.region.tolist())
        when = "as it learnt from it" if self.observed == "train" else "after the epoch"
        seen = f"in each of the {self.n_epochs} epochs of its training, {when}"
        return {
            "map": [
                f"Each point is one of {n:,} images from which {self.network} learnt in the study "
                f"{self.name}; its place says how the network judged it {seen}.",
                "Up: confidence, the mean probability that it gave to the image's label. To the "
                "right: variability, the standard deviation of that probability over the epochs. "
                "Colour: correctness, the share of epochs in which its prediction was right.",
            ],
            "regions": [
                f"Easy-to-learn ({counts['easy']:,}): learnt and kept, top left. Ambiguous "
                f"({counts['ambiguous']:,}): the third whose probability changed most, right. "
                f"Hard-to-learn ({counts['hard']:,}): of the others, those whose label had a mean "
                "probability below 0.5, bottom left; unusual and mislabelled images are among them."
            ],
            "hard": self._about_hard(counts["hard"], n),
        }

    def _about_hard(self, n_hard: int, n: int) -> list[str]:
        if not n_hard:
            return [f"None of the {n:,} images is hard-to-learn."]
        rows = self.table[self.region == "hard"]
        lines = [
            f"{n_hard:,} of {n:,} images ({100 * n_hard / n:.1f} %) are hard-to-learn: "
            f"{self.network} gave their label a mean probability below 0.5, which changed less "
            "from epoch to epoch than that of the ambiguous third."
        ]
        if "never_learned" in rows:
            never = int(rows["never_learned"].sum())
            again = int((~rows["never_learned"] & (rows["forgetting_events"] > 0)).sum())
            lines.append(
                f"{never:,} of them it classified rightly in no epoch; {again:,} it classified "
                "rightly at some time and wrongly in a later epoch."
            )
        if self.predicted is not None and (pairs := self._mistaken()):
            named = ", ".join(
                f"{self.classes[label]} taken for {self.classes[taken]} ({k:,})"
                for (label, taken), k in pairs[:PAIRS]
            )
            more = ", and others" if len(pairs) > PAIRS else ""
            lines.append(
                f"For {sum(k for _, k in pairs):,} of them its most frequent prediction was "
                f"another class: {named}{more}."
            )
        return lines

    def _mistaken(self) -> list[tuple[tuple[int, int], int]]:
        """(label, the class predicted most often) -> hard images, the most frequent first; without
        those whose label was predicted most often."""
        hard = np.flatnonzero(self.region == "hard")
        labels = self.table["label"].to_numpy()[hard]
        usual = [
            int(np.bincount(predictions, minlength=len(self.classes)).argmax())
            for predictions in np.asarray(self.predicted)[:, hard].T
        ]
        pairs = Counter(
            (int(label), taken) for label, taken in zip(labels, usual, strict=True)
            if label != taken
        )  # fmt: skip
        return sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))


def collect(
    study: Study,
    against: Study | pd.DataFrame | None = None,
    against_name: str = "",
    max_points: int = 1_000_000,
    most_cells: int = 4_000_000,
    pictures: bool = True,
) -> Content:
    """What a page of this study shows; steps 01 to 03 are done.

    Args:
        against, against_name: Another map of the same images, and its name where it is a table.
        max_points: As of `explore`.
        most_cells: Epochs times images of the curves; epochs are left out to keep it.
        pictures: Whether images are shown.
    """
    state = Explorer(study, against, max_points)
    table, images = state.shown, state.images
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints)
    remarks = [] if len(table) == len(state.table) else [state.note]
    gold = predicted = None
    epochs = shown_epochs(log.n_epochs, len(table), most_cells)
    if len(epochs):
        learnt = courses(log, table.index.to_numpy())
        gold = learnt.label_prob[epochs - 1]
        predicted = None if learnt.predicted is None else learnt.predicted[epochs - 1]
    if 0 < len(epochs) < log.n_epochs:
        remarks.append(f"Curves show {len(epochs)} of {log.n_epochs} epochs.")
    results = None
    if is_committed(study):
        try:
            results = student_results(study, images, state.table)
        except ValueError as error:  # tables from before the study was changed
            remarks.append(f"Results of students are left out: {error}")
    other = None if state.other is None else state.other[state.other.index.isin(table.index)]
    return Content(
        name=study.name,
        network=_network(study),
        table=table,
        classes=state.names,
        scores=state.scores,
        n_epochs=log.n_epochs,
        observed=log.observed,
        epochs=[int(e) for e in epochs],
        gold=gold,
        predicted=predicted,
        read=(lambda ids: images.train.read("images", ids)) if pictures else None,
        data=files.fingerprint(images.fingerprints),
        parent=read_evidence(study.upstream.runs / "datamap")["datamap_sha256"],
        other_name=against_name or state.other_name,
        other=other,
        results=results,
        remarks=remarks,
    )


def shown_epochs(n_epochs: int, n: int, most_cells: int) -> np.ndarray:
    """Numbers (from 1) of the epochs that curves of n images show: all, or evenly chosen ones with
    the first and the last; none where fewer than FEWEST_EPOCHS fit."""
    n_shown = min(n_epochs, most_cells // max(n, 1))
    if n_shown < min(FEWEST_EPOCHS, n_epochs):
        return np.empty(0, np.int64)
    return np.unique(np.linspace(1, n_epochs, n_shown).round().astype(np.int64))


def _network(study: Study) -> str:
    """Whose training was recorded, in words."""
    if study.dynamics.model is not None:
        return f"the recorded network ({study.dynamics.model.name})"
    return f"the teacher ({study.teacher.model.name})"


def student_results(study: Study, images: Images, table: pd.DataFrame) -> dict[str, Any]:
    """The comparison of strategies from committed tables, the largest losses first, each subset
    with the hard images in it; of several data sets the first.

    Returns: `title`, `about`, `n_hard`, `rows`, and `without`: sentences about the subsets that
        hold few hard images, at most a tenth as many as a random one.
    Raises: ValueError for tables of other settings.
    """
    tables = comparisons(study, read_committed(study))
    hard = table.index[table[REGION] == "hard"]
    with shards_counted(tables["results"]):
        _, title, rows = titled(study, tables)[0]
        rows = rows.sort_values("difference", kind="stable")
        held = {
            tuple(point): _held(
                study, images, study.cell(**dict(zip(AXES, point, strict=True))), hard
            )
            for point in rows[list(AXES)].drop_duplicates().itertuples(index=False)
        }
        counts = [held[tuple(point)] for point in rows[list(AXES)].itertuples(index=False)]
        few = np.array(
            [
                row.against_strategy == "random" and k is not None
                and k <= 0.1 * row.fraction * len(hard)
                for row, k in zip(rows.itertuples(), counts, strict=True)
            ],
            bool,
        )  # fmt: skip
        found = [
            {
                "student": row.student, "objective": row.objective,
                "share": share_in_words(row.fraction), "strategy": row.strategy,
                "against": row.against_strategy, "hard": k, "few": bool(is_few),
                "mean": _number(row.mean), "difference": _number(row.difference),
                "low": _number(row.low), "high": _number(row.high), "verdict": row.verdict,
            }
            for row, k, is_few in zip(rows.itertuples(), counts, few, strict=True)
        ]  # fmt: skip
        without = []
        if few.any():
            counted, *lines = summary_lines(rows[few])
            without = [counted, *lines[-few.sum() :][:SENTENCES]]
    about = ""
    if len(rows):
        first = rows.iloc[0]
        about = (
            f"Accuracy of students, {measured_on(rows['measure'].unique())}, over {first.n_seeds} "
            f"paired seeds; {100 * first.level:g} % intervals; differences within "
            f"{count(100 * first.margin, 'point')} count as equivalent. The count of hard images "
            f"is that of seed {study.seeds[0]}."
        )
    return {"title": title, "about": about, "n_hard": len(hard), "rows": found, "without": without}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _held(study: Study, images: Images, cell: Cell, hard: pd.Index) -> int | None:
    """How many hard images the subset of the first seed holds; None where choosing it reads more
    than the datamap of this study, or runs code of the study."""
    if cell.strategy in SHARD_POLICIES or cell.strategy.startswith(PICKED):
        return None
    rule = None if cell.strategy == "full" else study.selection(cell.strategy)
    if rule is not None and (rule.reads_features or rule.kind == "own"):
        return None
    if study.dynamics.per_seed and study.reads_datamap(cell.strategy):
        return None
    return int(np.isin(hard, make_subset(study, images, cell, study.seeds[0]).example_ids).sum())
