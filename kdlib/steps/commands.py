"""Steps of a study without a notebook: what `python -m kdlib step` runs, a row of facts for each.

The students of many cells and seeds can be trained one after another in one process, so that a GPU
waits for the imports once.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.compare import compile_tables
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import open_student, train_student
from kdlib.steps.probe import probe_cell
from kdlib.steps.tables import finish_tables
from kdlib.steps.teacher import make_one_teacher, make_teacher
from kdlib.study.cells import Cell
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import SHARD_POLICIES
from kdlib.study.study import Study
from kdlib.trainer.distributed import this_process

SHARED = ("teacher", "distill")  # can be made by the processes that torchrun starts
Row = dict[str, Any]


def cache(study: Study, built: bool = False) -> Row:
    """Step 01, as `cache_images`."""
    images = cache_images(study, built)
    return {"n_train": len(images.train_ids), "n_test": images.test.n_examples}


def teacher(study: Study, name: str | None = None) -> Row | None:
    """Step 02: all teachers, or one of the study's further ones. None on all but the first of
    several processes."""
    images = open_images(study)
    evidence = make_one_teacher(study, images, name) if name else make_teacher(study, images)
    return None if evidence is None else {"test_accuracy": evidence["teacher"]["measured"]}


def datamap(study: Study) -> Row:
    """Step 03, without its figures."""
    return {"n_examples": len(make_datamap(study, open_images(study)))}


def probe(study: Study) -> Row:
    """Step 05 of all probed cells."""
    images = open_images(study)
    tables = [probe_cell(study, images, cell) for cell in study.probed_cells()]
    return {"n_cells": len(tables)}


def compare(study: Study) -> Row:
    """Step 06: its tables; `python -m kdlib figures` draws and writes what follows from them."""
    evidence = finish_tables(study, "compare", compile_tables(study))
    return {name: evidence[name] for name in ("n_runs", "n_accepted")}


def run_steps(
    study: Study,
    steps: Iterable[str],
    points: Iterable[tuple[Cell, int]],
    teacher_name: str | None = None,
    built: bool = False,
) -> Iterator[Row]:
    """Make steps one after another.

    Args:
        steps: Of cache, teacher, datamap, distill, probe and compare.
        points: Cells and seeds of `distill`.
        teacher_name: Of `teacher`: one of the study's `teachers` instead of all.
        built: Of `cache`: the cache is there; the data set is not opened.

    Returns: A row for each step, and for each student, as soon as it is made; none on all but the
        first of several processes.
    Raises: ValueError for a step of one process in one of several.
    """
    alone = this_process(study.compute.device).alone
    single = [step for step in steps if step not in SHARED]
    if single and not alone:
        raise ValueError(f"step {single[0]} is made by one process; start it without torchrun")
    make = {
        "cache": lambda: cache(study, built),
        "teacher": lambda: teacher(study, teacher_name),
        "datamap": lambda: datamap(study),
        "probe": lambda: probe(study),
        "compare": lambda: compare(study),
    }
    for step in steps:
        if step == "distill":
            yield from filter(None, distill(study, points))
            continue
        started = time.monotonic()
        row = make[step]()
        if row is not None:
            yield {"step": step} | row | {"seconds": round(time.monotonic() - started, 3)}


def read_points(lines: Iterable[str], study: Study) -> Iterator[tuple[Cell, int]]:
    """Cells and seeds from JSON lines `{"strategy": ..., ..., "seed": 0}`; an axis that a line does
    not name takes the study's first value.

    Raises: ValueError for a line that is no such object; StudyError for an unknown value.
    """
    for line in filter(str.strip, lines):
        point = json.loads(line)
        if not isinstance(point, dict) or not isinstance(point.get("seed"), int):
            raise ValueError(f'{line.strip()!r} is no point; expected {{"seed": 0, ...}}')
        seed = point.pop("seed")
        yield study.cell(**point), seed


def distill(study: Study, points: Iterable[tuple[Cell, int]]) -> Iterator[Row | None]:
    """Step 04: the students of some cells and seeds, one after another.

    A student that fails has `error` in its row, and the next one is trained. The images are opened
    at the first point, so that a process can be started before there are any.

    Returns: A row for each point; None on all but the first of several processes.
    """
    images = None
    for cell, seed in points:
        started = time.monotonic()
        row: Row = {"step": "distill"} | dict(cell.items()) | {"seed": seed}
        try:
            images = images or open_images(study)
            evidence = train_student(study, images, cell, seed)
        except (ValueError, OSError, RuntimeError) as error:
            if not this_process(study.compute.device).alone:
                raise
            row["error"] = f"{type(error).__name__}: {error}"
        else:
            if evidence is None:
                yield None
                continue
            row["test_accuracy"] = evidence["checkpoints"]["last"]["test_accuracy"]
        yield row | {"seconds": round(time.monotonic() - started, 3)}


def finished(study: Study) -> set[tuple[Cell, int]]:
    """The cells and seeds whose students are finished and were made with the settings the study has
    now."""
    students = set()
    for cell in study.cells():
        for seed in study.seeds:
            try:
                open_student(study, cell, seed)
            except (FileNotFoundError, KeyError, ValueError):
                continue
            students.add((cell, seed))
    return students


def needed(study: Study, cell: Cell) -> str:
    """The last of the steps `cache`, `teacher` and `datamap` that must be made before a student of
    this cell."""
    drawn = cell.strategy in ("full", *SHARD_POLICIES)
    if not drawn:
        rule = study.selection(cell.strategy)
        drawn = rule.kind == "random" and not rule.balanced
    if not drawn:
        return "datamap"
    return "teacher" if needs_teacher(study.objectives[cell.objective]) else "cache"
