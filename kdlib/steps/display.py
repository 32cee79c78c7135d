"""What a notebook shows of a step: figures and texts by name, and the meaning of columns."""

import base64
import html
import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pandas as pd

from kdlib.cartography import feature_scores, scores
from kdlib.compare.answer import answers
from kdlib.compare.comparisons import Tables
from kdlib.compare.report import (
    comparison_texts,
    costs_text,
    ledger_text,
    objective_table,
    summary,
)
from kdlib.compare.text import table as markdown_table
from kdlib.dataset.images import Images
from kdlib.repro.files import nearest
from kdlib.steps.noise import describe_noise
from kdlib.steps.scores import describe_scores
from kdlib.study.defaults import changed
from kdlib.study.evaluation import named_place
from kdlib.study.study import Study

WIDTH = 800  # pixels of a figure in a notebook
FIGURES = {  # step -> the figures that it may have
    "datamap": ("datamap", "forming", "regions"),
    "compare": ("accuracy", "differences", "objective_differences", "control_differences",
                "fractions", "curves", "losses", "probes", "diagnostics", "places"),
    "scores": ("same_name", "stability", "map_against"),
    "noise": ("detectors", "suspects"),
    "near": ("near_duplicates",),
}  # fmt: skip
TEXTS = {
    "compare": {"summary": summary, "comparison": comparison_texts, "objectives": objective_table,
                "ledger": ledger_text, "costs": costs_text},
    "scores": {"scores": describe_scores},
    "noise": {"noise": describe_noise},
}  # fmt: skip

WHY_NOT = {  # figure -> the sentence where it is not drawn
    "accuracy": "`fractions` shows the same numbers",
    "differences": "no strategy or objective is compared with another one",
    "objective_differences": "no objective is compared with a training without a teacher, or "
    "`differences` shows it",
    "control_differences": "the study names no `compare.objective`, or `objective_differences` "
    "shows it",
    "fractions": "a strategy at three fractions or more is needed, and 20 strategies at most",
    "curves": "a run is evaluated fewer than four times, or no two cells are compared",
    "losses": "a run is evaluated fewer than four times, its losses cannot be told apart, or lines "
    "would be objectives, whose losses do not compare",
    "probes": "fewer than two trained cells are probed",
    "diagnostics": "checkpoints are fewer than four, or cells cannot be told apart by any of them",
    "places": "one layer is probed on one data set",
    "map_against": "one network is recorded",
    "same_name": "no score has a variant that differs between images",
}

SCORES = {**vars(scores), **vars(feature_scores)}  # the column of a score has its function's name

MEANINGS = {
    "label": "class of the example, as trained",
    "region_variability": "region, `easy` for easy-to-learn, `hard` for hard-to-learn; the third "
    "of highest variability is ambiguous",
    "region_corner": "the same by the nearest corner of the map",
    "grand": "norm of the loss gradient over all weights, early in the recorded training",
    "grand_last": "norm of the loss gradient over the last layer",
    "student": "name of the student in the study file",
    "strategy": "how its training examples were chosen; of probes also `untrained` and `teacher`",
    "fraction": "share of the training images it learnt from",
    "shards": "number of shards of the cache that each pass reads; 0 where a fraction is taken",
    "objective": "name of its loss in the study file",
    "seed": "decides initial weights, order of batches and the draw of the subset",
    "test_accuracy": "share of the test images it classifies rightly after the last step",
    "test_accuracy_best": "the same at the best epoch on validation images; NaN where there are "
    "none or the teacher learnt from them",
    "validation_loss": "loss of the objective on held-out images after the last step",
    "validation_loss_best": "the lowest one of the training",
    "best_step": "the step of that epoch",
    "test_precision": "precision of each class on the test images, averaged over classes; that of "
    "a class it never names counts 0",
    "test_recall": "the same of recall",
    "test_f1": "the same of F1",
    "parameters": "of the network",
    "megabytes": "of its weights as they are stored, 10^6 bytes",
    "multiply_adds": "of its forward pass of one image, in convolutions, linear layers, attention",
    "steps": "optimiser steps",
    "samples": "images seen, repetitions counted",
    "unique_examples": "distinct images seen",
    "checks": "number of checks on the run's evidence that passed; the others stop the run",
    "folder": "of the run: weights, metrics and evidence",
    "weights_sha256": "fingerprint of the weights",
    "class_counts": "examples of each class in its subset, in the order of `class_names`",
    "class_names": "names of the classes",
    "failed_checks": "names of the checks that fail",
    "refused": "whether a check fails, so that the run enters no mean",
    "reason": "why it is refused",
    "run": "folder of the run, below `runs/<study>/`",
    "command": "makes the run again",
    "declared_steps": "optimiser steps as planned; likewise the next two",
    "declared_samples": "images seen, as planned",
    "declared_unique_examples": "distinct images seen, as planned",
    "duplicates": "what step 01 says of images with the same pixels",
    "reader": "what step 01 converted, cut or passed over of images in files",
    "test_accuracy_distinct": "the same on the test images whose pixels occur only once",
    "budget": "what is equal in all runs: `equal_steps` or `equal_epochs`",
    "linear_accuracy": "test accuracy of a linear classifier on the frozen features",
    "knn_accuracy": "test accuracy of the nearest neighbours on the frozen features",
    "step": "optimiser step of the checkpoint; 0 is untrained",
    "on": "the data set of the probe; `own` is the study's",
    "layer": "where the features are from; `features` is the input of the last layer",
    "probe": "`linear`, `knn` (`knn_<k>` of a further number of neighbours) or few-shot",
    "k": "number of neighbours, 0 of other probes",
    "accuracy": "test accuracy of the probe, or of the teacher",
    "chosen": "regularisation or number of neighbours of the probe",
    "converged": "whether the fit of the probe converged",
    "effective_rank": "exponential of the entropy of the features' spectrum",
    "rank_ratio": "effective rank over that of isotropic features",
    "rank_threshold": "ratio below which features count as collapsed",
    "mean_cosine": "mean cosine of two images' features; 0 when isotropic",
    "unit_variance": "variance of unit features per dimension; 1 / D when isotropic",
    "alignment": "mean squared distance of unit features of one class",
    "uniformity": "log of the mean Gaussian potential of unit features; lower is more even",
    "uniformity_even": "the same of evenly spread features",
    "cka_teacher": "linear CKA with the teacher's features",
    "n_features": "dimensions of the features",
    "n_train": "examples the probe learnt from",
    "n_test": "examples it was tested on",
}


class Picture:
    """A PNG file that JupyterLab shows."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __repr__(self) -> str:
        return str(self.path)

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        return self.path.read_bytes(), {"width": WIDTH}


class Text(str):
    """Markdown that JupyterLab shows formatted; with a title, below that title once it is clicked.

    Attributes:
        title: The line that is shown at first; "" shows the whole text.
    """

    def __new__(cls, markdown: str, title: str = "") -> Self:
        text = super().__new__(cls, markdown)
        text.title = title
        return text

    def _repr_markdown_(self) -> str:
        if not self.title:
            return str(self)
        summary = f"<summary>{html.escape(self.title)}</summary>"
        return f"<details>{summary}\n\n{self}\n\n</details>"


def folded(title: str, shown: Iterable[Picture | Text]) -> Text:
    """Pictures and texts as one text, under a title that a click opens; the pictures are in it."""
    parts = []
    for part in shown:
        if isinstance(part, Picture):
            data = base64.b64encode(part.path.read_bytes()).decode()
            source = f'width="{WIDTH}" src="data:image/png;base64,{data}"'
            part = f'<img alt="{part.path.stem}" {source}>'
        parts.append(part.strip())
    return Text("\n\n".join(parts) or "This study has none.", title)


def step_of(name: str, of: dict) -> str:
    """The step that makes a figure or text.

    Args:
        name: Of a figure, also with its data set, such as `probes_on_mnist`.
        of: `FIGURES` or `TEXTS`.

    Raises: KeyError with the nearest name.
    """
    for step, names in of.items():
        if named_place(name)[0] in names:
            return step
    raise KeyError(f"no {name!r}; {nearest(name, [n for names in of.values() for n in names])}")


def draw(study: Study, images: Images, step: str, tables: Tables) -> dict[str, Picture]:
    """Draw all figures of one step of `FIGURES` that the study has, and save them."""
    from kdlib.steps import comparison_figures, figures  # matplotlib, where something is drawn

    drawn = {
        "datamap": lambda: figures.draw_datamap(study),
        "compare": lambda: comparison_figures.draw_comparison(study, tables),
        "scores": lambda: figures.draw_scores(study, images, tables),
        "noise": lambda: figures.draw_noise(study, images, tables),
    }[step]()
    return {name: Picture(path) for name, path in drawn.items()}


def not_drawn(study: Study, name: str) -> Text:
    """Why a study has no such figure, in one sentence."""
    why = WHY_NOT.get(named_place(name)[0], "the study has no data for it")
    return Text(f"*{study.name} has no figure `{name}`: {why}.*")


def describe(study: Study, name: str, tables: Tables) -> Text:
    """One text of `TEXTS`, also written to the figures folder."""
    return Text(TEXTS[step_of(name, TEXTS)][name](study, tables))


def answer_text(study: Study, tables: Tables) -> Text:
    """What a study found: its answer with the interval, and those at the other points of its
    axes."""
    first, *others = (answer.sentence for answer in answers(study, tables))
    return Text("\n".join([f"**{first}**", "", *[f"- {sentence}" for sentence in others]]))


def settings_text(study: Study, *sections: str) -> Text:
    """The settings of sections that differ from the defaults, or have none, as a folded table."""
    rows = changed(study, *sections)
    title = f"Settings of {study.name} that differ from the defaults"
    return Text(markdown_table(("setting", "here", "default"), rows), title)


def meanings(table: pd.DataFrame) -> dict[str, str]:
    """Column -> what it means, for the columns that are known: those of the datamap, of tables of
    runs and of probes. A score's meaning is the first sentence of its function."""
    known = {}
    for name in table.columns:
        base, on = named_place(name)
        if base in MEANINGS:
            known[name] = MEANINGS[base][0].upper() + MEANINGS[base][1:]
            known[name] += f", on {on}" if on else ""
        elif callable(SCORES.get(name)):
            first = inspect.getdoc(SCORES[name]).split("\n\n")[0]
            known[name] = " ".join(first.split()).removesuffix(".")
    return known
