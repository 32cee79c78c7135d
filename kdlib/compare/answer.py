"""The answer of a study in one sentence with its interval, and what it covers.

A study compares many cells; its answer is about the first of them: the first student, objective and
fraction of its axes, on the first data set that is compared on (of comparisons of objectives the
first student, strategy and fraction). There the sentence names the alternative that the verdicts
put first: the best of those that are better than the baseline; else, where any is undecided, that
of the largest difference, with the seeds that would settle it; else the nearest one.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.compare.comparisons import Tables, asked_comparison, by_place, names_shards
from kdlib.compare.statistics import EQUIVALENCE_LEVEL
from kdlib.compare.text import count, measured_on, place_in_words, points
from kdlib.study.cells import share_in_words
from kdlib.study.data import Data
from kdlib.study.evaluation import AXES, OWN
from kdlib.study.models import Model, Teacher
from kdlib.study.study import Study

HOUR = 3600  # seconds
UNDECIDED = "undecided"


@dataclass(frozen=True)
class Answer:
    """A sentence about the cells of one point of the axes.

    Attributes:
        sentence: With the interval.
        verdict: Of the row that it names; `UNDECIDED` for an inconclusive one.
        comparison: The table of `comparisons` that holds the row.
        row: The label of the row there; None where no two runs can be compared.
    """

    sentence: str
    verdict: str
    comparison: str
    row: Any = None


def first_comment(path: Path) -> str:
    """The first comment of a study file, in one line."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), path.read_text().split("\n"))
    return " ".join(line.removeprefix("#").strip() for line in lines).strip()


def question(path: Path) -> str:
    """What a study asks: the first comment of its file up to the last `?`, or its first sentence
    where it has none."""
    comment = first_comment(path)
    if "?" in comment:
        return comment[: comment.rindex("?") + 1]
    return comment.split(". ")[0] or path.stem


@names_shards
def answers(study: Study, tables: Tables) -> list[Answer]:
    """The answers at every point of the axes, that of the study first."""
    kind = asked_comparison(study, tables)
    found = []
    for on, rows in by_place(tables[kind]):
        for point, rows_of_point in _points(study, kind, rows):
            place = f"On {place_in_words(on)}, " if on else ""
            found.append(_answer(study, tables, kind, point, rows_of_point, place))
    return found or [Answer("There is nothing to compare.", UNDECIDED, kind)]


def _points(
    study: Study, kind: str, table: pd.DataFrame
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """Points of the axes and the rows that are compared there, in the order of the study."""
    orders = {axis: list(getattr(study.axes, axis) or ()) for axis in AXES}
    if kind == "strategies":
        subsets = table[table["strategy"] != "full"]
        by = ["student", "objective", "fraction"]
        if subsets.empty:  # the full set is all that is compared, with each size of the baseline
            subsets, by = table, ["student", "objective", "against_fraction"]
        table = subsets
    else:
        by = ["student", "strategy", "fraction"]

    def place(point: tuple) -> list[int]:
        known = [orders[axis.removeprefix("against_")] for axis in by]
        return [o.index(v) if v in o else len(o) for o, v in zip(known, point, strict=True)]

    groups = dict(list(table.groupby(by, sort=False)))
    for point in sorted(groups, key=place):
        yield dict(zip(by, point, strict=True)), groups[point]


def _answer(
    study: Study, tables: Tables, kind: str, point: dict[str, Any], rows: pd.DataFrame, place: str
) -> Answer:
    varied = "strategy" if kind == "strategies" else "objective"
    against = rows.iloc[0][f"against_{varied}"]
    if "against_fraction" in point:
        against += f" at {share_in_words(point['against_fraction'])}"
    where = place + _where(point, kind)
    where = where[0].upper() + where[1:]
    paired = rows[rows["difference"].notna()]
    if paired.empty:
        sentence = f"{where}, nothing can be compared: no pair of runs was accepted."
        return Answer(sentence, UNDECIDED, kind)
    label = _leading(paired)
    row, verdict, n = paired.loc[label], paired.loc[label, "verdict"], len(paired)
    name = "the full set" if row[varied] == "full" else row[varied]
    size, facts = points(abs(row["difference"])), _facts(row, paired)
    of = "strategies" if kind == "strategies" else "objectives"
    none, each = (f"none of {n} {of} is", f"all {n} {of} are")
    if n == 2:
        none, each = f"neither of 2 {of} is", f"both {of} are"
    if verdict == "better":
        several = f", the most of {n} {of}" if n > 1 else ""
        sentence = f"{where}, {name} is better than {against} by {size} points{several} ({facts})."
    elif verdict == "equivalent":
        margin = count(100 * row["margin"], "point")
        none = f"{none} better than {against} by {margin} or more: " if n > 1 else ""
        same = f"{name} is as good as {against} within {margin}"
        signed = points(row["difference"], "+")
        sentence = f"{where}, {none}{same}, at {signed} points ({facts})."
    elif verdict == "worse":
        worse = f"{each} worse than {against}; the nearest, {name}, is so"
        worse = worse if n > 1 else f"{name} is worse than {against}"
        sentence = f"{where}, {worse} by {size} points ({facts})."
    else:
        signed = points(row["difference"], "+")
        none += f" known to be better than {against}; the largest difference, of {name},"
        begun = none if n > 1 else f"{name} may be better or worse than {against}:"
        sentence = (
            f"Undecided: {where[0].lower()}{where[1:]}, {begun} {signed} points ({facts})"
            f"{_to_settle(row, tables)}."
        )
        verdict = UNDECIDED
    return Answer(sentence, verdict, kind, label)


def _where(point: dict[str, Any], kind: str) -> str:
    """The point of a sentence in words."""
    learner = f"{point['student']} learns"
    if "against_fraction" in point:
        return f"where {learner} with {point['objective']}"
    if kind == "strategies":
        size = share_in_words(point["fraction"])
        return f"where {learner} from {size} of the images with {point['objective']}"
    if point["strategy"] == "full":
        return f"where {learner} from all images"
    size = share_in_words(point["fraction"])
    return f"where {learner} from {size} of the images, chosen by {point['strategy']}"


def _leading(rows: pd.DataFrame) -> Any:
    """The label of the row that an answer names."""
    for verdict in ("better", "inconclusive", "equivalent", "worse"):
        some = rows[rows["verdict"] == verdict]
        if len(some):
            return some["difference"].idxmax()
    raise ValueError(f"verdicts are {sorted(set(rows['verdict']))}")


def _facts(row: pd.Series, rows: pd.DataFrame) -> str:
    """Interval, seeds, and whether the verdict outlives the correction for many tests."""
    level, ends = row["level"], (row["low"], row["high"])
    if row["verdict"] == "equivalent":
        level, ends = EQUIVALENCE_LEVEL, (row["low90"], row["high90"])
    seeds = count(int(row["n_seeds"]), "paired seed")
    if np.isnan(ends[0]):
        same = "the same in every seed, " if row["n_seeds"] > 1 else ""
        return f"no interval: {same}{seeds}{_lacks(row)}"
    facts = f"{100 * level:g} % interval {points(ends[0], '+')} to {points(ends[1], '+')}, {seeds}"
    if row["verdict"] in ("better", "worse") and row["p_holm"] >= 1 - row["level"]:
        facts += f", p {row['p_holm']:.3f} after Holm's correction for all comparisons"
    return facts + _lacks(row)


def _lacks(row: pd.Series) -> str:
    """That the subset of a row lacks classes, where it does."""
    _, lacks, classes = str(row.get("fewest", "")).partition(" (lacks ")
    return f", and its subset lacks {classes.removesuffix(')')}" if lacks else ""


def _to_settle(row: pd.Series, tables: Tables) -> str:
    """What it would cost to decide a comparison: seeds, runs, steps and, where the times of its
    runs are known, hours of training."""
    needed, n = row["seeds_needed"], int(row["n_seeds"])
    if pd.isna(needed):
        return "; two paired seeds or more are needed" if n < 2 else ""
    if needed <= n:
        return "; a difference between 0 and the margin may need many more seeds"
    runs, cells = 2 * int(needed - n), _runs_of(row, tables["results"])
    steps = f"{runs} further runs of {cells['steps'].median():,.0f} steps"
    cost, costs = "", tables.get("costs")
    if costs is not None and "wall_s" in costs:
        took = _runs_of(row, costs[costs["what"] == "student"])["wall_s"]
        if len(took):
            cost = f", some {_duration(runs * took.mean())} of training"
    return f"; about {needed} paired seeds would settle it: {steps}{cost}"


def _runs_of(row: pd.Series, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the two cells that a comparison holds."""
    first = [row[axis] for axis in AXES]
    second = [row["student"], *(row[f"against_{axis}"] for axis in AXES[1:])]
    axes = list(zip(*(table[axis] for axis in AXES), strict=True))
    return table[[list(cell) in (first, second) for cell in axes]]


def _duration(seconds: float) -> str:
    """A time in the unit that a reader wants.

    >>> _duration(90), _duration(5400), _duration(400_000)
    ('2 minutes', '1.5 hours', '111 hours')
    """
    if seconds < HOUR:
        return count(max(1, round(seconds / 60)), "minute")
    hours = seconds / HOUR
    return f"{hours:.1f} hours" if hours < 10 else f"{hours:.0f} hours"


@names_shards
def covers(study: Study, tables: Tables) -> dict[str, str]:
    """What the answer is about, by subject: data, networks, budget, seeds, measure, runs."""
    results, probed = tables["results"], tables["probes"]
    accepted = results[~results["refused"]]
    whole = accepted[accepted["strategy"] == "full"]
    counts = {  # a run whose steps are fewer than a pass has not seen all
        "training images": whole[whole["samples"] > whole["unique_examples"]]["unique_examples"],
        "held out": pd.Series([study.data.n_validation]),
        "test images": probed["n_test"][probed["on"] == OWN] if "n_test" in probed else pd.Series(),
    }
    numbers = [f"{int(n.max()):,} {of}" for of, n in counts.items() if len(n) and n.max()]
    steps = accepted["steps"].unique()
    each = f"{steps[0]:,} steps" if len(steps) == 1 else f"{steps.min():,} to {steps.max():,} steps"
    kind = accepted["budget"].iloc[0] if "budget" in accepted and len(accepted) else ""
    fixed = "split, teacher and test images are the same for all"
    if study.dynamics.per_seed:
        fixed = f"each seed has a recording of its own, by which its subsets are chosen; {fixed}"
    seeds = f"{count(len(study.seeds), 'paired seed')} ({', '.join(map(str, study.seeds))})"
    level, margin = 100 * study.compare.confidence_level, count(100 * study.compare.margin, "point")
    return {
        "Data": ", ".join([_data(study.data), *numbers]),
        "Students": "; ".join(_student(study, name, accepted) for name in study.axes.student),
        "Teacher": _teacher(study.upstream.teacher),
        "Budget": ", ".join(
            filter(None, [f"{each} of {study.training.batch_size} images", kind.replace("_", " ")])
        ),
        "Seeds": f"{seeds} of initial weights, order and draws; {fixed}",
        "Measure": f"accuracy of the {measured_on(study.compare.columns.values())}",
        "Verdicts": f"{level:g} % intervals of paired differences; within {margin} a difference "
        "does not matter",
        "Runs": f"{len(accepted)} of {len(results)} accepted",
    }


def covered(study: Study, tables: Tables) -> str:
    """The same in one sentence."""
    of = covers(study, tables)
    students = "the student" if len(study.axes.student) == 1 else "the students"
    return (
        f"This holds for {of['Data']}; {students} {of['Students']}; the teacher {of['Teacher']}; "
        f"{of['Budget']}; {count(len(study.seeds), 'paired seed')} on one split and one teacher."
    )


def _data(data: Data) -> str:
    """The name of a study's images."""
    name = data.huggingface.dataset if data.huggingface else data.folder or data.source
    size = f" at {data.image_size} pixels" if data.image_size else ""
    labels = "" if data.relabel is None else ", some labels replaced"
    return f"{name}{size}{labels}{'' if data.labelled else ', without labels'}"


def _student(study: Study, name: str, results: pd.DataFrame) -> str:
    words = f"{name} ({_model(study.students[name].model)}"
    of_student = results[results["student"] == name]
    if "parameters" in of_student and of_student["parameters"].notna().any():
        words += f", {int(of_student['parameters'].max()):,} parameters"
    return words + ")"


def _teacher(teacher: Teacher) -> str:
    trained = getattr(teacher, "training", None)
    origin = "trained here" if trained is not None else "trained elsewhere"
    live = ", its outputs computed in each step" if teacher.live else ""
    return f"{_model(teacher.model)}, {origin}{live}"


def _model(model: Model) -> str:
    options = ", ".join(f"{key} {value}" for key, value in (model.options or {}).items())
    return model.name + (f" of {options}" if options else "")
