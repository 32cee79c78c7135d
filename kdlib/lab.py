"""A study as an object: one method for each notebook, with plain DataFrames and arrays as results.

    lab = open_study("params/digits.yaml")
    lab.cache(); lab.teacher(); lab.datamap()                                   # 01, 02, 03
    lab.distill("ambiguous", fraction=0.33); lab.probe(); lab.compare()         # 04, 05, 06

A method makes what is not there yet and opens what is. The functions behind it, for scripts, are
those of `kdlib.steps`.
"""

import sys
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib.cache.outputs import stored_logits
from kdlib.cache.shards import Cache
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.subset import Subset
from kdlib.compare.comparisons import Tables
from kdlib.dataset.images import Images
from kdlib.models.base import Network
from kdlib.models.evaluation import evaluate
from kdlib.repro.files import nearest
from kdlib.repro.run import read_evidence, read_metrics
from kdlib.steps.cache import (
    cache_images,
    cache_sentences,
    open_duplicates,
    open_images,
    split_table,
)
from kdlib.steps.compare import compile_tables, finish_tables, open_tables
from kdlib.steps.datamap import demand_recorded, make_datamap, open_datamap
from kdlib.steps.display import (
    FIGURES,
    TEXTS,
    Picture,
    Text,
    answer_text,
    describe,
    draw,
    folded,
    meanings,
    not_drawn,
    settings_text,
    step_of,
)
from kdlib.steps.distill import make_subset, new_student, run_table, student_network, train_student
from kdlib.steps.near import near_duplicates
from kdlib.steps.noise import demand_relabelled, noise_tables
from kdlib.steps.output_costs import output_costs
from kdlib.steps.probe import probe_cell
from kdlib.steps.recordings import record_all, recording_table
from kdlib.steps.scores import score_tables
from kdlib.steps.teacher import make_teacher, teacher_table
from kdlib.steps.teacher_outputs import open_stored
from kdlib.study.cells import Cell, checked_seeds
from kdlib.study.evaluation import AXES, named_place
from kdlib.study.load import load_study, study_file
from kdlib.study.parameters import check_history
from kdlib.study.study import Study

Name, Share = str | None, float | None


def open_study(study: str | Path = "params/digits.yaml", **axes: str | float | None) -> "Lab":
    """Read a study file, and print its absolute path.

    Args:
        study: The file: absolute, else relative to the current folder, else to the workspace.
        axes: `student`, `strategy`, `fraction`, `objective` of the calls that name none. As in the
            parameters cell of a notebook, None leaves an axis open.

    Raises: ValueError for a papermill parameter that this notebook does not have, for a study or a
        value that is not valid; FileNotFoundError that lists the studies there are.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is not None:
        check_history(shell.user_ns.get("In", ()))
    path = study_file(study)
    lab = Lab(load_study(path), **{a: v for a, v in axes.items() if v is not None})
    print(f"study {lab.study.name}: {path}")
    return lab


class Lab:
    """A study with its images, runs, tables and figures.

    Methods about students take `strategy`, `fraction`, `objective` and `student`, and of shard
    strategies `shards` in place of `fraction`. One that is not given has the value of `open_study`,
    else the first of the study's axis. `study` holds the settings.
    """

    def __init__(self, study: Study, **point: str | float) -> None:
        """Args: study, the settings; point, values of axes for calls that name none."""
        self.study, self._point = study, point
        self._tables: dict[str, Tables] = {}
        self._figures: dict[str, dict[str, Picture]] = {}
        if point:
            self.cell()  # raises StudyError for a value that the study does not have

    @cached_property
    def images(self) -> Images:
        """The cached images and their split: `train_ids`, `validation_ids`, `dataset("train")`."""
        return open_images(self.study)

    def cell(self, **point: str | float | None) -> Cell:
        """One cell of the study: a student, strategy, fraction or number of shards, objective."""
        given = {axis: value for axis, value in point.items() if value is not None}
        return self.study.cell(**self._point | given)

    def cache(self) -> pd.DataFrame:
        """Step 01: cache the images, and print what was checked. Returns: One row per split."""
        self.images = cache_images(self.study)
        print(*cache_sentences(self.study), sep="\n")
        return split_table(self.images)

    def duplicates(self) -> pd.DataFrame:
        """The images whose pixels occur more than once. Returns: One row per image: `group`, equal
        for the same pixels, `split`, `example_id`, `label`."""
        return open_duplicates(self.study)

    def near_duplicates(self, similarity: float = 0.99, most: int = 1000) -> pd.DataFrame:
        """Pairs of images whose teacher features have at least this cosine, after step 02; also
        drawn as `near_duplicates` in `figures/<study>/`. Arguments as of `kdlib.steps.near`."""
        from kdlib.steps.figures import draw_near  # matplotlib, where something is drawn

        table = near_duplicates(self.study, self.images, similarity, most)
        draw_near(self.study, self.images, table)
        return table

    def teacher_costs(self, teacher: Name = None) -> pd.DataFrame:
        """What it costs to store the teacher's outputs or to compute them live, measured on one
        batch before step 02; columns as of `kdlib.steps.output_costs`."""
        return output_costs(self.study, self.images, teacher)

    def teacher(self) -> pd.DataFrame:
        """Step 02: train or load the teachers, store their outputs. Returns: One row each."""
        make_teacher(self.study, self.images)
        return teacher_table(self.study)

    def dynamics(self) -> DynamicsLog:
        """The recorded training dynamics: an array (E, N) for each quantity, `log["gold_prob"]`.

        Raises: StudyError for a study without a recorded training.
        """
        demand_recorded(self.study)
        return DynamicsLog.open(self.study.recorded_run / "dynamics", self.images.fingerprints)

    def datamap(self, seed: int | None = None) -> pd.DataFrame:
        """Step 03: every score of every training example.

        Args:
            seed: The map by which the subsets of this seed are chosen, which is another one in a
                study with `dynamics.per_seed`.

        Returns: Index `example_id`; `lab.columns(table)` explains the columns.
        """
        table = make_datamap(self.study, self.images)
        if seed is None:
            return table
        return open_datamap(self.study, self.images, *checked_seeds([seed]))

    def explore(self, **options: Any) -> Any:
        """The datamap as an app, the last line of a cell; options of `kdlib.explorer.explore`."""
        from kdlib.explorer import explore  # widgets, where they are shown

        return explore(self.study, **options)

    def page(self, **options: Any) -> Path:
        """The datamap as one HTML file to send; options of `kdlib.explorer.write_page`."""
        from kdlib.explorer import write_page

        return write_page(self.study, **options)

    def select(
        self,
        strategy: Name = None,
        fraction: Share = None,
        seed: int = 0,
        shards: int | None = None,
    ) -> Subset:
        """The training examples of a strategy, fraction and seed: `subset.example_ids`."""
        cell = self.cell(strategy=strategy, fraction=fraction, shards=shards)
        return make_subset(self.study, self.images, cell, *checked_seeds([seed]))

    def distill(
        self,
        strategy: Name = None,
        fraction: Share = None,
        objective: Name = None,
        student: Name = None,
        seeds: Iterable[int] | None = None,
        shards: int | None = None,
    ) -> pd.DataFrame:
        """Step 04: train the students of one subset: all seeds, and all objectives unless one is
        given.

        Returns: One row per run; `lab.columns(table)` explains the columns.
        """
        cell = self.cell(
            student=student, objective=objective,
            strategy=strategy, fraction=fraction, shards=shards,
        )  # fmt: skip
        one = objective is not None or "objective" in self._point
        seeds = self.study.seeds if seeds is None else checked_seeds(seeds)
        runs = {
            (c, seed): train_student(self.study, self.images, c, seed)
            for c in ([cell] if one else self.study.same_subset(cell))
            for seed in seeds
        }
        return run_table(self.study, runs)

    def student(
        self,
        strategy: Name = None,
        fraction: Share = None,
        objective: Name = None,
        student: Name = None,
        seed: int = 0,
        shards: int | None = None,
    ) -> Network:
        """The network of one finished student, with the weights of its last step, in evaluation
        mode."""
        cell = self.cell(
            student=student, objective=objective,
            strategy=strategy, fraction=fraction, shards=shards,
        )  # fmt: skip
        return student_network(self.study, self.images, cell, *checked_seeds([seed]))

    def untrained(self, student: Name = None, seed: int = 0) -> Network:
        """A student's network with the weights from which its runs of a seed begin."""
        cell = self.cell(student=student)
        return new_student(self.study, self.images, cell, *checked_seeds([seed]))

    def evaluate(self, network: Network, split: str = "test") -> tuple[float, float]:
        """(mean cross-entropy in nats, accuracy in [0, 1]) of a network on a split's images."""
        data, place = self.images.dataset(split), next(network.parameters()).device
        images, labels = (
            torch.from_numpy(data.images.read(column, data.example_ids)).to(place)
            for column in ("images", "labels")
        )
        measured = evaluate(network, self.images.pixels, images, labels)
        return measured.loss, measured.accuracy

    def teacher_outputs(self, split: str = "train") -> Cache:
        """The teacher's stored outputs for clean images.

        Args:
            split: `train`, which holds the validation images too, or, of labelled images, `test`.

        Raises: ValueError for another split.
        """
        splits = self.images.caches
        if split not in splits:
            raise ValueError(f"no teacher outputs of split {split!r}; {nearest(split, splits)}")
        return open_stored(self.study, splits[split])

    def teacher_logits(self, subset: Subset | np.ndarray, split: str = "train") -> np.ndarray:
        """The teacher's stored logits for a subset or example ids: (n, C) float32."""
        ids = getattr(subset, "example_ids", subset)
        return stored_logits(self.teacher_outputs(split), ids).numpy()

    def probe(
        self,
        strategy: Name = None,
        fraction: Share = None,
        objective: Name = None,
        student: Name = None,
        shards: int | None = None,
    ) -> pd.DataFrame:
        """Step 05: probes and diagnostics of every kept checkpoint of a cell, and of the teacher.

        Returns: One row per seed, step, data set, layer and probe.
        """
        cell = self.cell(
            student=student, objective=objective,
            strategy=strategy, fraction=fraction, shards=shards,
        )  # fmt: skip
        return probe_cell(self.study, self.images, cell)

    def compare(self) -> Tables:
        """Step 06, once all runs and probes of the study are finished (`python -m kdlib study`).

        Returns: `results`, one row per run; what follows from it: `strategies`, `objectives`,
            `controls` and `ledger`; and `curves`, `probes`, `costs`, `made`.
        Raises: FileNotFoundError for probes that are not there yet.
        """
        return self._keep("compare", compile_tables(self.study))

    def record(self) -> pd.DataFrame:
        """Train and record what the study's `recordings` name. Returns: One row each."""
        return recording_table(self.study, record_all(self.study, self.images))

    def scores(self) -> Tables:
        """Step 07: how scores agree with each other, from seed to seed and between networks. Trains
        the recordings that are missing."""
        record_all(self.study, self.images)
        return self._keep("scores", score_tables(self.study, self.images))

    def noise(self) -> Tables:
        """Step 08: how well scores find training labels that are wrong. Trains the recordings that
        are missing.

        Raises: StudyError for a study whose labels are those of its source, before any training.
        """
        demand_relabelled(self.study)
        record_all(self.study, self.images)
        return self._keep("noise", noise_tables(self.study, self.images))

    def _keep(self, step: str, tables: Tables) -> Tables:
        finish_tables(self.study, step, tables)
        self._tables[step] = tables
        self._figures.pop(step, None)
        return tables

    def _open(self, step: str) -> Tables:
        """The tables of `compare`, `scores` or `noise`, of this session, else from the files."""
        if step == "compare" and step not in self._tables:
            self._tables[step], _ = open_tables(self.study)
        return self._tables[step] if step in self._tables else getattr(self, step)()

    def figures(self, step: str) -> dict[str, Picture]:
        """All figures of `datamap`, `compare`, `scores` or `noise` by name, drawn and written to
        `figures/<study>/`."""
        if step not in self._figures:
            tables = self._open(step) if step in TEXTS else {}
            self._figures[step] = draw(self.study, self.images, step, tables)
        return self._figures[step]

    def figure(self, name: str) -> Picture | Text:
        """One figure of `figures` by name, such as `datamap`; where it is not drawn, a sentence
        that says why. Raises: KeyError for a name that no figure has."""
        drawn = self.figures(step_of(name, FIGURES))
        return drawn[name] if name in drawn else not_drawn(self.study, name)

    def text(self, name: str) -> Text:
        """The results of a step as Markdown, also written to `figures/<study>/`: `summary`,
        `comparison`, `objectives`, `ledger`, `scores` or `noise`; `costs`, whose times differ from
        machine to machine, is written to `runs/<study>/compare/`."""
        return describe(self.study, name, self._open(step_of(name, TEXTS)))

    def answer(self) -> Text:
        """What the study found, in sentences with their intervals, the first one in bold."""
        return answer_text(self.study, self._open("compare"))

    def fold(self, title: str, *names: str) -> Text:
        """Figures and texts under a title that a click opens, with a figure also those of further
        data sets (`probes_on_mnist`), or the sentence why it is not drawn."""
        texts = {name for of_step in TEXTS.values() for name in of_step}
        shown = {n: self.text(n) if n in texts else self.figure(n) for n in names}
        for step in {step_of(name, FIGURES) for name in names if name not in texts}:
            shown |= self.figures(step)
        of = (shown[n] for name in names for n in shown if named_place(n)[0] == name)
        return folded(title, of)

    def settings(self, *sections: str) -> Text:
        """The settings of sections, such as `data` or `data.relabel`, that differ from the defaults
        or have none, as a table under a title."""
        return settings_text(self.study, *sections)

    def curves(self, runs: pd.DataFrame) -> pd.DataFrame:
        """The metrics of runs, one row per evaluation: accuracy and loss by epoch and step.

        Args:
            runs: Rows with a `folder`: of `distill`, `record`, or a `teacher` trained here.
        """
        return _of_each(runs, read_metrics)

    def checks(self, runs: pd.DataFrame) -> pd.DataFrame:
        """What each run was checked for: `name`, `passed`, and `sentence` with the numbers.

        Args:
            runs: As in `curves`.
        """
        return _of_each(runs, lambda folder: pd.DataFrame(read_evidence(folder)["checks"]))

    def columns(self, table: pd.DataFrame) -> Text:
        """What the columns of a table mean, for those of the datamap, of runs, of probes."""
        lines = (f"- `{name}`: {text}" for name, text in meanings(table).items())
        return Text("\n".join(lines), "What the columns mean")


def _of_each(runs: pd.DataFrame, read: Any) -> pd.DataFrame:
    if "folder" not in runs or runs.empty:
        raise ValueError(
            f"a table of {len(runs)} rows with columns {list(runs.columns)}; expected a row for "
            "each run with its `folder`, as of lab.distill() or lab.record()"
        )
    axes = [axis for axis in (*AXES, "seed", "teacher", "model", "part") if axis in runs]
    tables = (read(Path(run["folder"])).assign(**run[axes]) for _, run in runs.iterrows())
    return pd.concat(tables, ignore_index=True)
