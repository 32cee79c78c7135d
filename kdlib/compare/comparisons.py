"""Comparisons of a study, computed from its table of runs."""

import shlex

import pandas as pd

from kdlib.compare.costs import ledger
from kdlib.compare.statistics import objective_differences, paired_differences
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES, MEASURES
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import PICKED, SHARD_POLICIES
from kdlib.study.study import Study

PROBED = {measure: column for measure, column in MEASURES.items() if measure != "accuracy"}


Tables = dict[str, pd.DataFrame]


def command(study: Study, cell: Cell) -> str:
    """The one command that makes a cell's runs again, from the repository's folder."""
    axes = dict(cell.items()) | {"fraction": repr(cell.fraction)}
    given = {"study": f"params/{study.name}.yaml"} | axes
    told = " ".join(f"-p {name} {shlex.quote(str(value))}" for name, value in given.items())
    return f"papermill notebooks/04_distill.ipynb out.ipynb {told}"


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


def selection_s(study: Study, spent: pd.DataFrame, strategy: str, objective: str) -> float:
    """Seconds before the first subset of a strategy was there, that a student on the full set would
    not have needed.

    A strategy that reads the datamap needs it and the training recorded for it; where the teacher's
    own training was recorded, a student with that teacher would have needed it anyway. Further
    teachers are needed for the full set as well, and a subset's own one is charged to nobody.

    Args:
        spent: From `costs`.
    """
    if strategy in ("full", *SHARD_POLICIES):
        return 0.0
    if not strategy.startswith(PICKED) and study.selection(strategy).kind == "random":
        return 0.0
    needed = {"datamap"}
    if study.dynamics.model is not None:
        needed.add("dynamics")
    elif not needs_teacher(heard := study.objectives[objective]) or heard.teacher is not None:
        needed.add("teacher")
    return float(spent[spent["what"].isin(needed)]["wall_s"].sum())


def comparisons(study: Study, tables: Tables) -> Tables:
    """The tables, and what follows from them: `strategies` (each strategy minus the baseline),
    `objectives` (each objective minus the one without a teacher, when the study has one),
    `controls` (each minus `compare.objective`, when the study names one), `ledger`."""
    settings, table, names = study.compare, tables["results"], study.axes.objective
    how = (settings.margin, settings.confidence_level, MEASURES[settings.measure])
    made = {"strategies": paired_differences(table, settings.baseline, *how)}
    plain = [n for n in names if study.objectives[n].kind == "cross_entropy"][:1]
    against = {"objectives": plain[0] if plain else None, "controls": settings.objective}
    if against["controls"] == against["objectives"]:
        del against["controls"]
    for name, reference in against.items():
        if reference is not None and len(names) > 1:
            made[name] = objective_differences(table, reference, *how)
    axes = list(AXES)
    commands = table.drop_duplicates(axes).set_index(axes)["command"]
    for name, content in made.items():
        cells = zip(*(content[axis] for axis in AXES), strict=True)
        made[name] = content.assign(command=[commands[cell] for cell in cells])
    spent = tables["costs"]
    made["ledger"] = ledger(
        table,
        tables["curves"],
        spent[spent["what"] == "student"],
        settings.margin,
        lambda strategy, objective: selection_s(study, spent, strategy, objective),
    )
    return tables | made
