"""The cells of a study: points of its axes, each with all seeds."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING

from kdlib.study.base import StudyError, known
from kdlib.study.consistency import check_strategy
from kdlib.study.evaluation import AXES
from kdlib.study.selections import PICKED

if TYPE_CHECKING:
    from kdlib.study.study import Study


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the axes; `path` names its folder."""

    student: str
    strategy: str
    fraction: float
    objective: str

    @property
    def path(self) -> Path:
        parts = dict(self.items()) | {"fraction": repr(self.fraction).removesuffix(".0")}
        return Path(*(f"{axis}={value}" for axis, value in parts.items()))

    def items(self) -> Iterable[tuple[str, str | float]]:
        return asdict(self).items()


def cells(study: "Study") -> list[Cell]:
    """All cells, the full set first; beside a picked selection its baseline of equal size.

    Raises: As `fraction_of`.
    """
    axes, baseline, subsets = study.axes, study.compare.baseline, [("full", 1.0)]
    for strategy in axes.strategy:
        fraction = fraction_of(study, strategy)
        if fraction is None:
            subsets += itertools.product([strategy], axes.fraction)
        else:
            subsets += [(strategy, fraction)]
            if fraction_of(study, baseline) is None and strategy != "full":
                subsets += [(baseline, fraction)]
    subsets = list(dict.fromkeys(subsets))
    return [Cell(st, s, f, o) for st in axes.student for s, f in subsets for o in axes.objective]


def probed_cells(study: "Study") -> list[Cell]:
    """The cells whose checkpoints are probed."""
    probe = study.probe
    return [
        cell
        for cell in cells(study)
        if cell.strategy in probe.strategy
        and cell.objective in probe.objective
        and (cell.strategy == "full" or cell.fraction in probe.fractions)
    ]


def same_subset(study: "Study", cell: Cell) -> list[Cell]:
    """The cells of one subset: one for each objective of the axis."""
    return [replace(cell, objective=objective) for objective in study.axes.objective]


def cell_at(study: "Study", **axes: str | float) -> Cell:
    """The cell with these axis values; an axis that is not given takes the study's first value.

    Raises: StudyError for an unknown axis or value. A fraction off the study's axis is allowed: it
        makes a run beside the study's.
    """
    values = {
        axis: axes.get(axis) if axes.get(axis) is not None else getattr(study.axes, axis)[0]
        for axis in AXES
    }
    fraction = _fraction(values["fraction"])
    try:
        for axis in axes:
            known(axis, AXES, "axis")
        check_strategy(str(values["strategy"]), study.selections)
        known(values["student"], study.students, "student")
        known(values["objective"], study.objectives, "objective")
    except ValueError as error:
        raise StudyError(str(error)) from None
    fixed = fraction_of(study, values["strategy"])
    fraction = fraction if fixed is None else fixed
    return Cell(values["student"], values["strategy"], fraction, values["objective"])


def checked_seeds(given: object) -> tuple[int, ...]:
    """The seeds of some runs, given as a list.

    Raises: StudyError for none, for a single number, and for what is no integer >= 0.
    """
    seeds = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not seeds or not whole:
        raise StudyError(f"seeds are {given!r}; expected a list of integers >= 0, such as [0, 1]")
    return tuple(map(int, seeds))


def _fraction(value: object) -> float:
    """The value as a number in (0, 1].

    Raises: StudyError for another value, `True` among them.
    """
    try:
        fraction = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise StudyError(
            f"fraction is {value!r}; expected a number in (0, 1], or none for the study's first"
        )
    return fraction


def fraction_of(study: "Study", strategy: str) -> float | None:
    """The fraction that a strategy fixes: 1 of `full`, that of a saved selection; else None.

    Raises: FileNotFoundError for a picked selection that was not saved; ValueError for one that was
        changed.
    """
    if strategy == "full":
        return 1.0
    if not strategy.startswith(PICKED):
        return None
    from kdlib.repro.tables import read_parquet  # pandas, only here

    _, metadata = read_parquet(study.picked(strategy))
    return float(metadata["fraction"])
