"""Saved selections of a study, and the students that are trained on them."""

import contextlib
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.cartography.subset import Subset
from kdlib.steps.distill import open_student
from kdlib.steps.processes import write_study
from kdlib.steps.teacher_outputs import open_teacher
from kdlib.study.cells import Cell
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def selection_path(study: Study, name: str) -> Path:
    """File of a saved selection.

    Raises: ValueError for a name with other signs than letters, digits, _ and -.
    """
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} names no selection: expected letters, digits, _ and -, a letter or "
            "digit first."
        )
    return study.picked(PICKED + name)


def saved_selections(study: Study) -> list[str]:
    """Names of the saved selections."""
    return sorted(path.stem for path in (study.runs / "selections").glob("*.parquet"))


def saved_ids(study: Study, name: str) -> np.ndarray:
    """Example ids of a saved selection, sorted."""
    return Subset.load(selection_path(study, name)).example_ids


def training_commands(study: Study, name: str) -> list[list[str]]:
    """The commands that train the study's students on a saved selection, and on a random subset of
    the same size.

    Raises: FileNotFoundError that names the command, before the teacher is made.
    """
    open_teacher(study.upstream)
    path, file = write_study(study), selection_path(study, name)
    fraction = repr(Subset.load(file).fraction)
    return [
        [sys.executable, "-m", "kdlib.papermill_engine", "--no-progress-bar",
         "notebooks/04_distill.ipynb", str(file.with_name(f"{executed}-04_distill.ipynb")),
         "-p", "study", str(path), "-p", "strategy", *strategy]
        for executed, strategy in (
            (name, [PICKED + name]), (f"{name}-random", ["random", "-p", "fraction", fraction])
        )
    ]  # fmt: skip


def _students(study: Study, name: str) -> list[tuple[Cell, Cell, int]]:
    """(cell of the selection, cell of the random subset of equal size, seed)."""
    fraction = Subset.load(selection_path(study, name)).fraction
    return [
        (
            study.cell(strategy=PICKED + name, objective=objective),
            study.cell(strategy="random", fraction=fraction, objective=objective),
            seed,
        )
        for objective in study.axes.objective
        for seed in study.seeds
    ]


def training_progress(study: Study, name: str) -> tuple[int, int]:
    """How many of the students of `training_commands` are finished, and how many there will be."""
    wanted = [(cell, seed) for *pair, seed in _students(study, name) for cell in pair]
    n_done = 0
    for cell, seed in wanted:
        # missing, or made with settings from before the study was changed
        with contextlib.suppress(FileNotFoundError, ValueError):
            open_student(study, cell, seed)
            n_done += 1
    return n_done, len(wanted)


def selection_results(study: Study, name: str) -> pd.DataFrame:
    """Test accuracies of the last step: objective, seed, picked, random, difference.

    Raises: FileNotFoundError when not all students are trained.
    """
    rows = []
    for picked, random, seed in _students(study, name):
        accuracies = [
            open_student(study, cell, seed)["checkpoints"]["last"]["test_accuracy"]
            for cell in (picked, random)
        ]
        rows.append((picked.objective, seed, *accuracies, accuracies[0] - accuracies[1]))
    return pd.DataFrame(rows, columns=["objective", "seed", "picked", "random", "difference"])
