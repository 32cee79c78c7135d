"""Saved selections of a study, and the students that are trained on them."""

import contextlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.cartography.subset import Subset
from kdlib.repro import files
from kdlib.steps.distill import open_student, run_table
from kdlib.steps.processes import write_study
from kdlib.steps.teacher_outputs import open_teacher
from kdlib.study.cells import Cell
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

BASELINE = "random"  # strategy that a selection is compared with
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


def students(study: Study, name: str) -> list[tuple[Cell, int]]:
    """The students that are trained on a saved selection and on a random subset of the same size,
    in this order: the pairs of the first seed first."""
    fraction = Subset.load(selection_path(study, name)).fraction
    subsets = {"strategy": PICKED + name}, {"strategy": BASELINE, "fraction": fraction}
    return [
        (study.cell(objective=objective, **subset), seed)
        for seed in study.seeds
        for objective in study.axes.objective
        for subset in subsets
    ]


def training_commands(study: Study, name: str) -> list[list[str]]:
    """The command that trains these students; their cells and seeds lie beside the selection.

    Raises: FileNotFoundError that names the command, before the teacher is made.
    """
    open_teacher(study.upstream)
    path, points = write_study(study), selection_path(study, name).with_suffix(".points.jsonl")
    lines = [json.dumps(dict(cell.items()) | {"seed": s}) for cell, s in students(study, name)]
    files.write_atomic(points, lambda file: file.write("\n".join(lines).encode()))
    return [[sys.executable, "-m", "kdlib", "step", "distill", str(path), "--points", str(points)]]


def selection_runs(study: Study, name: str) -> pd.DataFrame:
    """Those of these students that are finished: one row each, by cell and seed, as of
    `kdlib.steps.distill.run_table`, and `refused`, False."""
    found = {}
    for cell, seed in students(study, name):
        # missing, or made with settings from before the study was changed
        with contextlib.suppress(FileNotFoundError, ValueError):
            found[cell, seed] = open_student(study, cell, seed)
    table = run_table(study, found)
    return table.assign(refused=np.zeros(len(table), bool))
