"""Paired differences between the cells of a study, from its table of runs.

Seed s means the same random draws in every cell, so runs are compared seed by seed. A comparison
holds runs at equal steps or at equal epochs; a table that mixes both is refused.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from kdlib.compare.statistics import (
    EQUIVALENCE_LEVEL,
    check_fraction,
    holm,
    paired_interval,
    seeds_needed,
    verdict,
)
from kdlib.repro.files import nearest
from kdlib.study.evaluation import AXES

AGAINST = ["against_strategy", "against_fraction", "against_objective"]

COLUMNS = [
    *AXES, *AGAINST, "budget", "n_seeds", "n_refused", "mean", "sd", "against_mean", "against_sd",
    "difference", "sd_difference", "low", "high", "low90", "high90", "p_value", "p_holm", "verdict",
    "seeds_needed", "best_mean", "best_difference", "inflation_mean", "inflation_max",
    "n_inflation", "measure", "margin", "level",
]  # fmt: skip

TEST_ACCURACY, BEST = "test_accuracy", "test_accuracy_best"  # of the last and the best epoch
Cell = tuple[str, str, float, str]  # values of AXES


def paired_differences(
    results: pd.DataFrame,
    baseline: str,
    margin: float,
    level: float,
    measure: str = TEST_ACCURACY,
    pairs: Iterable[tuple[tuple[str, int], tuple[str, int]]] = (),
) -> pd.DataFrame:
    """Every strategy minus the baseline strategy at the same student, fraction and objective.

    The full set, whose fraction is 1, is compared with the baseline at each of the baseline's
    fractions: `against_fraction` says which.

    Args:
        results: One row per run: the four axes, `seed`, the measure in [0, 1], `steps`, `samples`,
            `unique_examples`, `refused`; and `test_accuracy_best`, of the best epoch, if it is
            known.
        baseline: Strategy to compare with.
        margin: Smallest difference of accuracy that matters, in (0, 1).
        level: Confidence level of `low` and `high`, in (0, 1).
        measure: Column that is compared.
        pairs: Further pairs, each of two (strategy, number of shards), by the column `shards`.

    Returns: The comparison, sorted by the axes, further pairs last: the four axes; `against_...`,
        the cell compared with; `budget`, its kind; `n_seeds`, the pairs of accepted runs;
        `n_refused`, the refused rows of both cells; mean and sample standard deviation (ddof=1) of
        both cells over the paired seeds; `difference` and `sd_difference`; the interval at `level`
        (`low`, `high`) and at 90 % (`low90`, `high90`); `p_value`, two-sided, and `p_holm`, the
        same corrected for all rows; `verdict`; `seeds_needed` where the verdict is inconclusive and
        at least two pairs give a spread; `best_mean` and `best_difference`, the same at the best
        epoch, NaN where one of its runs reports none, and, over the `n_inflation` runs of all rows
        that report one, by how much it lies above the last (`inflation_mean`, `inflation_max`);
        `measure`; `margin`; `level`. Accuracies are in [0, 1]; a seed that one cell lacks is left
        out. With fewer than two pairs the intervals are NaN and the verdict inconclusive.
    Raises: ValueError for missing columns, a baseline that is not there, two rows of one cell and
        seed, an accepted row whose accuracy is not in [0, 1], budgets that may not be compared, or
        a margin or level out of range.
    """
    cells = _known_cells(results, "strategy", baseline, measure)
    fractions = sorted({cell[2] for cell in cells if cell[1] == baseline})
    known, further, pairs = set(cells), pairs, []
    for student, strategy, fraction, objective in cells:
        if strategy != baseline:
            with_full = "full" in (strategy, baseline)
            for against_fraction in fractions if with_full else [fraction]:
                against = (student, baseline, against_fraction, objective)
                if "shards" in results and against not in known:
                    continue  # the baseline takes shards and this one a fraction, or the reverse
                pairs.append(((student, strategy, fraction, objective), against))
    for pair in further:
        first, second = (_of_shards(results, *cell) for cell in pair)
        for student, objective in dict.fromkeys((cell[0], cell[3]) for cell in cells):
            both = [(student, strategy, f, objective) for strategy, f in (first, second)]
            pairs += [tuple(both)] if known.issuperset(both) else []
    return _compared(results, pairs, margin, level, measure)


def objective_differences(
    results: pd.DataFrame, reference: str, margin: float, level: float, measure: str = TEST_ACCURACY
) -> pd.DataFrame:
    """Every objective minus the reference objective at the same student, strategy and fraction:
    what distillation adds to the same subset, or what another weight, temperature or teacher does.

    Args:
        results, margin, level, measure: As for `paired_differences`.
        reference: Objective to compare with, such as the one without a teacher.

    Returns: The comparison, as from `paired_differences`.
    Raises: ValueError as `paired_differences`.
    """
    cells = _known_cells(results, "objective", reference, measure)
    pairs = [(cell, (*cell[:3], reference)) for cell in cells if cell[3] != reference]
    return _compared(results, pairs, margin, level, measure)


def _known_cells(results: pd.DataFrame, axis: str, name: str, measure: str) -> list[Cell]:
    """All cells of a table, sorted; ValueError where none has `name` on `axis`, and for a table
    that lacks columns, repeats a run, or holds an accuracy out of range."""
    needed = {*AXES, "seed", measure, "steps", "samples", "unique_examples", "refused"}
    if missing := sorted(needed - set(results.columns)):
        raise ValueError(f"results lack the columns {missing}; got {list(results.columns)}")
    if results["refused"].dtype != bool:
        raise ValueError(f"`refused` is {results['refused'].dtype}; expected bool")
    twice = results[results.duplicated([*AXES, "seed"])]
    if len(twice):
        raise ValueError(
            f"{len(twice)} rows repeat a cell and seed, first {_cell_name(twice.iloc[0])}, seed "
            f"{twice.iloc[0].seed}; expected one run per cell and seed: results of one study"
        )
    wrong = results[~results["refused"] & ~results[measure].between(0, 1)]
    if len(wrong):
        raise ValueError(
            f"{measure} is {wrong.iloc[0][measure]} in {_cell_name(wrong.iloc[0])}, seed "
            f"{wrong.iloc[0].seed}; expected a number in [0, 1], or a refused row"
        )
    known = set(results[axis])
    if name not in known:
        raise ValueError(
            f"no run of {axis} {name!r} to compare with; "
            f"{nearest(name, known) if known else 'the results are empty'}"
        )
    return sorted(set(_cells(results)))


def _of_shards(results: pd.DataFrame, strategy: str, shards: int) -> tuple[str, float]:
    """The strategy and the fraction of its cells of so many shards."""
    rows = results[(results["strategy"] == strategy) & (results["shards"] == shards)]
    return strategy, rows["fraction"].iloc[0]


def _compared(
    results: pd.DataFrame, pairs: list[tuple[Cell, Cell]], margin: float, level: float, measure: str
) -> pd.DataFrame:
    """The comparison of each cell with the cell it is paired with."""
    check_fraction("margin", margin, "an accuracy; params: compare.margin")
    check_fraction("level", level, "params: compare.confidence_level")
    accepted = results[~results["refused"]]
    if measure != TEST_ACCURACY or BEST not in results:
        accepted = accepted.assign(**{BEST: np.nan})
    budget, n_refused = _budget(accepted), Counter(_cells(results[results["refused"]]))
    numbers = accepted.set_index("seed")[[measure, BEST]].astype(np.float64)
    by_cell = {
        cell: numbers.iloc[rows].sort_index()
        for cell, rows in accepted.groupby(list(AXES)).indices.items()
    }
    no_runs, rows = numbers.iloc[:0], []
    for cell, against in pairs:
        ours, theirs = by_cell.get(cell, no_runs), by_cell.get(against, no_runs)
        seeds = ours.index.intersection(theirs.index)
        row = dict(zip([*AXES, *AGAINST], (*cell, *against[1:]), strict=True))
        row |= {"budget": budget, "n_refused": n_refused[cell] + n_refused[against]}
        row |= _statistics(ours.loc[seeds], theirs.loc[seeds], margin, level)
        rows.append(row | {"measure": measure, "margin": margin, "level": level})
    table = pd.DataFrame(rows, columns=COLUMNS)
    used = [by_cell[cell] for cell in sorted({c for pair in pairs for c in pair} & set(by_cell))]
    inflations = pd.concat([no_runs, *used]).eval(f"{BEST} - {measure}").to_numpy()
    inflations = inflations[np.isfinite(inflations)]
    if len(inflations):
        table["inflation_mean"], table["inflation_max"] = inflations.mean(), inflations.max()
    table["n_inflation"] = len(inflations)
    table["p_holm"] = holm(table["p_value"].to_numpy(np.float64))
    return table.astype({"seeds_needed": "Int64"})


def _statistics(ours: pd.DataFrame, theirs: pd.DataFrame, margin: float, level: float) -> dict:
    """The statistics of two cells.

    Args:
        ours, theirs: A row for each paired seed: the measure, and the accuracy of the best epoch.
    """
    (a, best), (b, best_against) = ours.to_numpy().T, theirs.to_numpy().T
    n = len(a)
    mean, low, high, p_value = paired_interval(a - b, level)
    _, low90, high90, _ = paired_interval(a - b, EQUIVALENCE_LEVEL)
    decision, sd = verdict(low, high, low90, high90, margin), _sd(a - b)
    is_open = decision == "inconclusive" and n > 1 and sd > 0
    return {
        "n_seeds": n,
        "mean": a.mean() if n else np.nan,
        "sd": _sd(a),
        "against_mean": b.mean() if n else np.nan,
        "against_sd": _sd(b),
        "difference": mean,
        "sd_difference": sd,
        "low": low,
        "high": high,
        "low90": low90,
        "high90": high90,
        "p_value": p_value,
        "verdict": decision,
        "seeds_needed": seeds_needed(sd, margin, level) if is_open else None,
        "best_mean": best.mean() if n else np.nan,
        "best_difference": (best - best_against).mean() if n else np.nan,
    }


def _budget(accepted: pd.DataFrame) -> str:
    """The one kind of budget these runs share: equal_steps, equal_epochs or early_stopping.

    Runs that a rule of the study stopped early share the rule, not the steps. Of the others, runs
    of one student and fraction have the same steps; across fractions steps are equal, or passes
    over the subset are, up to the one batch by which steps are rounded.
    """
    kinds, declared = {}, set(accepted.get("budget", ()))
    if "early_stopping" in declared:
        if len(declared) > 1:
            raise _mixed("runs", sorted(declared))
        return "early_stopping"
    for (student, fraction), group in accepted.groupby(["student", "fraction"]):
        different = group.drop_duplicates("steps")
        if len(different) > 1:
            raise _mixed(
                f"runs of student {student} at fraction {fraction:g}",
                (f"{_cell_name(row)}: {row.steps} steps" for row in different.itertuples()),
            )
    for student, group in accepted.groupby("student"):
        if group["fraction"].nunique() == 1:
            continue
        if group["steps"].nunique() == 1:
            kinds[student] = "equal_steps"
            continue
        passes = group["samples"] / group["unique_examples"]
        one_batch = passes / group["steps"]
        if (passes - one_batch).max() > (passes + one_batch).min():
            extremes = group.loc[[passes.idxmin(), passes.idxmax()]]
            lines = (
                f"{_cell_name(row)}: {row.steps} steps, "
                f"{row.samples / row.unique_examples:.3g} epochs"
                for row in extremes.itertuples()
            )
            raise _mixed(f"runs of student {student}", lines)
        kinds[student] = "equal_epochs"
    if len(set(kinds.values())) > 1:
        raise _mixed("students", (f"{student}: {kind}" for student, kind in kinds.items()))
    return next(iter(kinds.values()), "equal_steps")


def _mixed(what: str, lines: Iterable[str]) -> ValueError:
    return ValueError(
        f"{what} had different budgets; a comparison is either at equal steps or at equal epochs. "
        "Compare them in two tables, or refuse the rows whose budget is wrong:\n  "
        + "\n  ".join(lines)
    )


def _cells(results: pd.DataFrame) -> list[Cell]:
    return list(zip(*(results[axis].tolist() for axis in AXES), strict=True))


def _cell_name(row: Any) -> str:
    return ", ".join(f"{axis}={getattr(row, axis)}" for axis in AXES)


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan
