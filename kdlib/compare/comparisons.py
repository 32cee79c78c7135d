"""Comparisons of a study, computed from its table of runs."""

import functools
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from kdlib.compare.classes import fewest
from kdlib.compare.costs import ledger
from kdlib.compare.differences import objective_differences, paired_differences
from kdlib.study.cells import Cell, shards_counted
from kdlib.study.evaluation import AXES, MEASURES
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import PICKED, SHARD_POLICIES
from kdlib.study.study import Study

PROBED = {measure: column for measure, column in MEASURES.items() if measure != "accuracy"}
Tables = dict[str, pd.DataFrame]


def names_shards(describe: Callable[[Study, Tables], Any]) -> Callable[[Study, Tables], Any]:
    """A function of a study and its tables, in whose texts numbers of shards stand as such."""

    @functools.wraps(describe)
    def counted(study: Study, tables: Tables) -> Any:
        with shards_counted(tables["results"]):
            return describe(study, tables)

    return counted


def rerun_command(study: Study, cell: Cell) -> str:
    """The command that makes a cell's runs again, from the repository's folder."""
    sizes = {size: repr(value) for size, value in cell.size.items()}
    parameters = {"study": f"params/{study.name}.yaml"} | dict(cell.items()) | sizes
    options = (f"-p {name} {shlex.quote(str(value))}" for name, value in parameters.items())
    return f"papermill notebooks/04_distill.ipynb out.ipynb {' '.join(options)}"


def with_untrained(table: pd.DataFrame) -> pd.DataFrame:
    """Probe rows with the rows of step 0 once more under the strategy `untrained`.

    The untrained network of a seed is the same in every cell, and so is the teacher: each of these
    reference rows is kept once.
    """
    untrained = table[table["step"] == 0].assign(strategy="untrained")
    whole = pd.concat([table, untrained], ignore_index=True)
    is_reference = whole["strategy"].isin(["untrained", "teacher"])
    keys = ["student", "strategy", "objective", "seed", "on", "layer", "probe"]
    return whole[~(is_reference & whole.duplicated(keys))].reset_index(drop=True)


def selection_s(study: Study, costs: pd.DataFrame, strategy: str, objective: str) -> float:
    """Seconds spent on a strategy's selection that a student on the full set does not need.

    A strategy that reads the datamap needs it and the training recorded for it. Where that is the
    training of the teacher, a student with this teacher needs it anyway. Where each seed has a
    recording and a datamap of its own, it needs those of one seed. Teachers of the study's
    `teachers` are not charged: the full set needs them as well.

    Args:
        costs: From `kdlib.steps.compare.costs`.
    """
    if strategy in ("full", *SHARD_POLICIES):
        return 0.0
    if not strategy.startswith(PICKED) and study.selection(strategy).kind == "random":
        return 0.0
    if study.dynamics.per_seed:
        of_seeds = costs["what"].isin(("recordings", "datamaps"))
        return float(costs[of_seeds]["wall_s"].sum()) / len(study.seeds)
    needed = {"datamap"}
    if study.dynamics.model is not None:
        needed.add("dynamics")
    elif not needs_teacher(settings := study.objectives[objective]) or settings.teacher is not None:
        needed.add("teacher")
    return float(costs[costs["what"].isin(needed)]["wall_s"].sum())


def comparisons(study: Study, tables: Tables) -> Tables:
    """The tables, and what follows from them: `strategies` (each strategy minus the baseline),
    `objectives` (each objective minus the one without a teacher, when the study has one),
    `controls` (each minus `compare.objective`, when the study names one), `ledger`, whose seconds
    are NaN without the table of costs. Where
    `compare.on` names data sets, a comparison holds the rows of each, by the column `on`; p-values
    are corrected within one data set."""
    parts = {on: _compared(study, tables["results"], c) for on, c in study.compare.columns.items()}
    compared = next(iter(parts.values()))
    if study.compare.on is not None:
        for name in compared:
            of_name = [part[name].assign(on=on) for on, part in parts.items()]
            compared[name] = pd.concat(of_name, ignore_index=True)
    costs = tables.get("costs", pd.DataFrame(columns=["what", *AXES, "seed", "wall_s", "steps"]))
    compared["ledger"] = ledger(
        tables["results"],
        tables["curves"],
        costs[costs["what"] == "student"],
        study.compare.margin,
        lambda strategy, objective: selection_s(study, costs, strategy, objective),
    )
    return tables | compared


def asked_comparison(study: Study, tables: Tables) -> str:
    """The name of the comparison that a study is about: `strategies`, or of one that names an
    objective to compare with `controls`, or `objectives` where that is the one without a teacher.
    """
    if study.compare.objective is None:
        return "strategies"
    return "controls" if "controls" in tables else "objectives"


def by_place(comparison: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each data set of a comparison and its rows; "" where the study names none."""
    if "on" not in comparison or comparison.empty:
        yield "", comparison
    else:
        yield from comparison.groupby("on", sort=False)


def _compared(study: Study, results: pd.DataFrame, measure: str) -> Tables:
    """The comparisons of one column of the results table."""
    settings, names = study.compare, study.axes.objective
    how = (settings.margin, settings.confidence_level, measure)
    pairs = [pair.cells for pair in settings.pairs or ()]
    compared = {"strategies": paired_differences(results, settings.baseline, *how, pairs=pairs)}
    plain = [n for n in names if study.objectives[n].kind == "cross_entropy"][:1]
    against = {"objectives": plain[0] if plain else None, "controls": settings.objective}
    if against["controls"] == against["objectives"]:
        del against["controls"]
    for name, reference in against.items():
        if reference is not None and len(names) > 1:
            compared[name] = objective_differences(results, reference, *how)
    axes = list(AXES)
    commands, scarce = results.drop_duplicates(axes).set_index(axes)["command"], fewest(results)
    for name, table in compared.items():
        cells = zip(*(table[axis] for axis in AXES), strict=True)
        compared[name] = table.assign(command=[commands[cell] for cell in cells])
        if len(scarce):
            subsets = zip(table["strategy"], table["fraction"], strict=True)
            compared[name]["fewest"] = [scarce.get(subset, "-") for subset in subsets]
    return compared
