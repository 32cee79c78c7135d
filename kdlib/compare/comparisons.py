"""Comparisons of a study, computed from its table of runs."""

import shlex

import pandas as pd

from kdlib.compare.costs import ledger
from kdlib.compare.differences import objective_differences, paired_differences
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES, MEASURES
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import PICKED, SHARD_POLICIES
from kdlib.study.study import Study

PROBED = {measure: column for measure, column in MEASURES.items() if measure != "accuracy"}
Tables = dict[str, pd.DataFrame]


def rerun_command(study: Study, cell: Cell) -> str:
    """The command that makes a cell's runs again, from the repository's folder."""
    axes = dict(cell.items()) | {"fraction": repr(cell.fraction)}
    parameters = {"study": f"params/{study.name}.yaml"} | axes
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
    `controls` (each minus `compare.objective`, when the study names one), `ledger`."""
    settings, results, names = study.compare, tables["results"], study.axes.objective
    how = (settings.margin, settings.confidence_level, MEASURES[settings.measure])
    compared = {"strategies": paired_differences(results, settings.baseline, *how)}
    plain = [n for n in names if study.objectives[n].kind == "cross_entropy"][:1]
    against = {"objectives": plain[0] if plain else None, "controls": settings.objective}
    if against["controls"] == against["objectives"]:
        del against["controls"]
    for name, reference in against.items():
        if reference is not None and len(names) > 1:
            compared[name] = objective_differences(results, reference, *how)
    axes = list(AXES)
    commands = results.drop_duplicates(axes).set_index(axes)["command"]
    for name, table in compared.items():
        cells = zip(*(table[axis] for axis in AXES), strict=True)
        compared[name] = table.assign(command=[commands[cell] for cell in cells])
    costs = tables["costs"]
    compared["ledger"] = ledger(
        results,
        tables["curves"],
        costs[costs["what"] == "student"],
        settings.margin,
        lambda strategy, objective: selection_s(study, costs, strategy, objective),
    )
    return tables | compared
