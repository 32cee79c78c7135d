"""Steps of a study without a notebook: what `python -m kdlib step` makes, a row of facts for each.

The students of many cells and seeds can be trained one after another in one process, so that a GPU
waits for the imports once.
"""

import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.compare import compile_tables, finish_tables
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.probe import probe_cell
from kdlib.steps.teacher import make_one_teacher, make_teacher
from kdlib.study.cells import Cell, checked_seeds
from kdlib.study.study import Study
from kdlib.trainer.distributed import this_process

SHARED = ("teacher", "distill")  # can be made by the processes that torchrun starts
Row = dict[str, Any]


def run_steps(
    study: Study,
    steps: Iterable[str],
    points: Iterable[tuple[Cell, int]],
    teacher: str | None = None,
    built: bool = False,
) -> Iterator[Row]:
    """Make steps one after another.

    Args:
        steps: Of cache, teacher, datamap, distill, probe (of all probed cells) and compare.
        points: Cells and seeds of `distill`.
        teacher: Of `teacher`: one of the study's `teachers` instead of all.
        built: Of `cache`: the cache is there; the data set is not opened.

    Returns: A row for each step, and for each student, as soon as it is made; none on all but the
        first of several processes.
    Raises: ValueError for a step of one process in one of several.
    """
    single = [step for step in steps if step not in SHARED]
    if single and not this_process(study.compute.device).alone:
        raise ValueError(f"step {single[0]} is made by one process; start it without torchrun")
    for step in steps:
        if step == "distill":
            yield from distill(study, points)
            continue
        started = time.monotonic()
        row = _make(study, step, teacher, built)
        if row is not None:
            yield {"step": step} | row | {"seconds": round(time.monotonic() - started, 3)}


def _make(study: Study, step: str, teacher: str | None, built: bool) -> Row | None:
    if step == "cache":
        images = cache_images(study, built)
        n_test = {} if images.test is None else {"n_test": images.test.n_examples}
        return {"n_train": len(images.train_ids)} | n_test
    if step == "compare":  # `python -m kdlib figures` draws and writes what follows from the tables
        evidence = finish_tables(study, "compare", compile_tables(study))
        return {name: evidence[name] for name in ("n_runs", "n_accepted")}
    images = open_images(study)
    if step == "datamap":
        return {"n_examples": len(make_datamap(study, images))}
    if step == "probe":
        return {"n_cells": len([probe_cell(study, images, c) for c in study.probed_cells()])}
    evidence = (
        make_teacher(study, images) if teacher is None else make_one_teacher(study, images, teacher)
    )
    measured = None if evidence is None else evidence["teacher"]["measured"]
    facts = {} if measured is None else {"test_accuracy": measured}  # none without labels
    return None if evidence is None else facts


def read_points(lines: Iterable[str], study: Study) -> Iterator[tuple[Cell, int]]:
    """Cells and seeds from JSON lines `{"strategy": ..., ..., "seed": 0}`; an axis that a line does
    not name takes the study's first value.

    Raises: ValueError for a line that is no such object; StudyError for an unknown value.
    """
    for line in filter(str.strip, lines):
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            point = None
        if not isinstance(point, dict) or "seed" not in point:
            raise ValueError(f'{line.strip()!r} is no point; expected {{"seed": 0, ...}}')
        (seed,) = checked_seeds([point.pop("seed")])
        yield study.cell(**point), seed


def distill(study: Study, points: Iterable[tuple[Cell, int]]) -> Iterator[Row]:
    """Step 04: the students of some cells and seeds, one after another.

    A student that fails has `error` in its row, and the next one is trained. The images are opened
    at the first point, so that a process can be started before there are any.

    Returns: A row for each point; none on all but the first of several processes.
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
                continue
            last = evidence["checkpoints"]["last"]
            measured = "test_accuracy" if "test_accuracy" in last else "validation_loss"
            row[measured] = last[measured]
        yield row | {"seconds": round(time.monotonic() - started, 3)}
