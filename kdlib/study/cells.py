"""The cells of a study: points of its axes, each with all seeds."""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdlib.study.base import StudyError, known
from kdlib.study.consistency import check_strategy
from kdlib.study.evaluation import AXES
from kdlib.study.selections import PICKED, SHARD_POLICIES

if TYPE_CHECKING:
    from kdlib.study.study import Study


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the axes; `path` names its folder."""

    student: str
    strategy: str
    fraction: float | None
    objective: str
    shards: int | None = None

    @property
    def path(self) -> Path:
        sizes = {axis: repr(value).removesuffix(".0") for axis, value in self.size.items()}
        return Path(*(f"{axis}={value}" for axis, value in (dict(self.items()) | sizes).items()))

    @property
    def size(self) -> dict[str, float]:
        """How much it learns from: a `fraction` of the images, or a number of `shards`."""
        if self.shards is None:
            return {"fraction": self.fraction}
        return {"shards": self.shards}

    def items(self) -> Iterable[tuple[str, str | float]]:
        """Its axes and their values: `fraction` or `shards`, as it has."""
        axes = {"student": self.student, "strategy": self.strategy}
        return (axes | self.size | {"objective": self.objective}).items()


def cells(study: "Study") -> list[Cell]:
    """All cells, the full set first; beside a picked selection its baseline of equal size.

    Raises: As `fraction_of`.
    """
    axes, baseline, subsets = study.axes, study.compare.baseline, [("full", 1.0, None)]
    for strategy in axes.strategy:
        fraction = fraction_of(study, strategy)
        if strategy in SHARD_POLICIES and axes.shards is not None:
            subsets += itertools.product([strategy], [None], axes.shards)
        elif fraction is None:
            subsets += itertools.product([strategy], axes.fraction, [None])
        else:
            subsets += [(strategy, fraction, None)]
            if fraction_of(study, baseline) is None and strategy != "full":
                subsets += [(baseline, fraction, None)]
    subsets = list(dict.fromkeys(subsets))
    points = itertools.product(axes.student, subsets, axes.objective)
    return [Cell(student, s, f, objective, n) for student, (s, f, n), objective in points]


def probed_cells(study: "Study") -> list[Cell]:
    """The cells whose checkpoints are probed."""
    probe = study.probe
    return [
        cell
        for cell in cells(study)
        if cell.strategy in probe.strategy
        and cell.objective in probe.objective
        and (cell.strategy == "full" or cell.shards or cell.fraction in probe.fractions)
    ]


def same_subset(study: "Study", cell: Cell) -> list[Cell]:
    """The cells of one subset: one for each objective of the axis."""
    return [replace(cell, objective=objective) for objective in study.axes.objective]


def cell_at(study: "Study", **axes: str | float) -> Cell:
    """The cell with these axis values; an axis that is not given takes the study's first value.

    Raises: StudyError for an unknown axis or value. A fraction or a number of shards off the
        study's axis is allowed: it makes a run beside the study's.
    """
    given = {axis: value for axis, value in axes.items() if value is not None}
    first = {axis: (getattr(study.axes, axis) or (None,))[0] for axis in (*AXES, "shards")}
    values = first | given
    by_shards = values["strategy"] in SHARD_POLICIES and values["shards"] is not None
    if not by_shards or "fraction" in given:
        values["shards"] = given.get("shards")
    if values["shards"] is not None:
        _check_shards(values["shards"], values["strategy"], given)
        fraction = None
    else:
        fixes_its_own = str(values["strategy"]).startswith(("full", PICKED))
        absent = values["fraction"] is None and fixes_its_own
        fraction = _fraction(1.0 if absent else values["fraction"])
    try:
        for axis in axes:
            known(axis, (*AXES, "shards"), "axis")
        check_strategy(str(values["strategy"]), study.selections)
        known(values["student"], study.students, "student")
        known(values["objective"], study.objectives, "objective")
    except ValueError as error:
        raise StudyError(str(error)) from None
    fixed = fraction_of(study, values["strategy"])
    fraction = fraction if fixed is None else fixed
    student, strategy, objective = (values[axis] for axis in ("student", "strategy", "objective"))
    return Cell(student, strategy, fraction, objective, values["shards"])


def checked_seeds(given: object) -> tuple[int, ...]:
    """The seeds of some runs, given as a list.

    Raises: StudyError for none, for a single number, and for what is no integer >= 0.
    """
    seeds = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    whole = all(isinstance(s, Integral) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not seeds or not whole:
        raise StudyError(f"seeds are {given!r}; expected a list of integers >= 0, such as [0, 1]")
    return tuple(map(int, seeds))


def _check_shards(value: object, strategy: object, given: Iterable[str]) -> None:
    if strategy not in SHARD_POLICIES or "fraction" in given:
        raise StudyError(
            f"shards are for {' and '.join(SHARD_POLICIES)}, in place of a fraction; leave them out"
        )
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise StudyError(f"shards are {value!r}; expected an integer >= 1")


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


_COUNTED: ContextVar[dict[float, int]] = ContextVar("_COUNTED", default={})  # noqa: B039 (unchanged)


@contextmanager
def shards_counted(results: Any) -> Iterator[None]:
    """While the block runs, `share_in_words` names the fractions that are numbers of shards in a
    results table by these, unless a strategy that takes no shards has the same fraction."""
    names: dict[float, int] = {}
    if "shards" in results:
        cells = results[["fraction", "shards"]].drop_duplicates()
        counts = cells.groupby("fraction")["shards"]
        names = counts.max()[counts.nunique() == 1].to_dict()
    token = _COUNTED.set(names)
    try:
        yield
    finally:
        _COUNTED.reset(token)


def share_in_words(fraction: float) -> str:
    """A fraction of the images in %, or as the number of shards that it is.

    >>> share_in_words(0.33)
    '33 %'
    """
    n = _COUNTED.get().get(fraction)
    return f"{n} shard{'s' * (n > 1)}" if n else f"{100 * fraction:.4g} %"
