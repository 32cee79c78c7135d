"""Paired differences between the cells of a study, from its table of runs.

Seed s means the same random draws in every cell, so runs are compared seed by seed. A comparison
holds runs at equal steps or at equal epochs; a table that mixes both is refused.
"""

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

TEST_ACCURACY = "test_accuracy"  # the only measure that is also recorded at the best epoch
Cell = tuple[str, str, float, str]  # values of AXES


def paired_differences(
    results: pd.DataFrame,
    baseline: str,
    margin: float,
    level: float,
    measure: str = TEST_ACCURACY,
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

    Returns: The comparison, sorted by the axes: the four axes; `against_...`, the cell compared
        with; `budget`, its kind; `n_seeds`, the pairs of accepted runs; `n_refused`, the refused
        rows of both cells; mean and sample standard deviation (ddof=1) of both cells over the
        paired seeds; `difference` and `sd_difference`; the interval at `level` (`low`, `high`) and
        at 90 % (`low90`, `high90`); `p_value`, two-sided, and `p_holm`, the same corrected for all
        rows; `verdict`; `seeds_needed` where the verdict is inconclusive and at least two pairs
        give a spread; `best_mean` and `best_difference`, the same at the best epoch, NaN where one
        of its runs reports none, and, over the `n_inflation` runs of all rows that report one, by
        how much it lies above the last (`inflation_mean`, `inflation_max`); `measure`; `margin`;
        `level`. Accuracies are in [0, 1]; a seed that one cell lacks is left out. With fewer than
        two pairs the intervals are NaN and the verdict inconclusive.
    Raises: ValueError for missing columns, a baseline that is not there, two rows of one cell and
        seed, an accepted row whose accuracy is not in [0, 1], budgets that may not be compared, or
        a margin or level out of range.
    """
    runs = _Runs(results, measure)
    runs.check_known("strategy", baseline)
    fractions = sorted({cell[2] for cell in runs.cells if cell[1] == baseline})
    pairs = []
    for student, strategy, fraction, objective in runs.cells:
        if strategy != baseline:
            with_full = "full" in (strategy, baseline)
            for against_fraction in fractions if with_full else [fraction]:
                against = (student, baseline, against_fraction, objective)
                pairs.append(((student, strategy, fraction, objective), against))
    return runs.compare(pairs, margin, level)


def objective_differences(
    results: pd.DataFrame,
    reference: str,
    margin: float,
    level: float,
    measure: str = TEST_ACCURACY,
) -> pd.DataFrame:
    """Every objective minus the reference objective at the same student, strategy and fraction:
    what distillation adds to the same subset, or what another weight, temperature or teacher does.

    Args:
        results: As for `paired_differences`.
        reference: Objective to compare with, such as the one without a teacher.
        margin: Smallest difference of accuracy that matters, in (0, 1).
        level: Confidence level of `low` and `high`, in (0, 1).
        measure: Column that is compared.

    Returns: The comparison, as from `paired_differences`.
    Raises: ValueError as `paired_differences`.
    """
    runs = _Runs(results, measure)
    runs.check_known("objective", reference)
    pairs = [(cell, (*cell[:3], reference)) for cell in runs.cells if cell[3] != reference]
    return runs.compare(pairs, margin, level)


class _Runs:
    """The accepted runs of a results table: cell -> seed -> accuracy.

    Attributes:
        cells: All cells of the table, sorted.
        accuracy, best: Of the last step and of the best epoch, by cell and seed.
        n_refused: Refused rows by cell.
        budget: The kind of budget that the runs share.
    """

    def __init__(self, results: pd.DataFrame, measure: str) -> None:
        accepted = _accepted(results, measure)
        best = "test_accuracy_best"
        if measure != TEST_ACCURACY or best not in results:
            accepted = accepted.assign(**{best: np.nan})
        self.measure, self.budget = measure, _budget(accepted)
        self.cells = sorted(set(_cells(results)))
        self.accuracy = self._by_seed(accepted, measure)
        self.best = self._by_seed(accepted, best)
        self.n_refused = dict.fromkeys(self.cells, 0)
        for cell in _cells(results[results["refused"]]):
            self.n_refused[cell] += 1

    def _by_seed(self, accepted: pd.DataFrame, column: str) -> dict[Cell, dict[int, float]]:
        values: dict[Cell, dict[int, float]] = {cell: {} for cell in self.cells}
        numbers = accepted[column].to_numpy(np.float64).tolist()
        for cell, seed, value in zip(_cells(accepted), accepted["seed"], numbers, strict=True):
            values[cell][seed] = value
        return values

    def check_known(self, axis: str, name: str) -> None:
        """Raise ValueError when no row has `name` on `axis`."""
        known = {cell[AXES.index(axis)] for cell in self.cells}
        if name not in known:
            raise ValueError(
                f"no run of {axis} {name!r} to compare with; "
                f"{nearest(name, known) if known else 'the results are empty'}"
            )

    def compare(self, pairs: list[tuple[Cell, Cell]], margin: float, level: float) -> pd.DataFrame:
        """The comparison of each cell with the cell it is paired with."""
        check_fraction("margin", margin, "an accuracy; params: compare.margin")
        check_fraction("level", level, "params: compare.confidence_level")
        rows = [
            dict(zip([*AXES, *AGAINST], (*cell, *against[1:]), strict=True))
            | self._statistics(cell, against, margin, level)
            for cell, against in pairs
        ]
        table = pd.DataFrame(rows, columns=COLUMNS)
        inflations = self._inflations({cell for pair in pairs for cell in pair})
        if len(inflations):
            table["inflation_mean"], table["inflation_max"] = inflations.mean(), inflations.max()
        table["n_inflation"] = len(inflations)
        table["p_holm"] = holm(table["p_value"].to_numpy(np.float64))
        return table.astype({"seeds_needed": "Int64"})

    def _inflations(self, cells: set[Cell]) -> np.ndarray:
        """Best epoch minus last of each run that reports one, in the order of the cells."""
        inflations = [
            self.best[cell][seed] - accuracy
            for cell in sorted(cells & set(self.cells))
            for seed, accuracy in sorted(self.accuracy[cell].items())
        ]
        return np.array([x for x in inflations if np.isfinite(x)])

    def _statistics(self, cell: Cell, against: Cell, margin: float, level: float) -> dict:
        ours, theirs = self.accuracy[cell], self.accuracy.get(against, {})
        seeds = sorted(ours.keys() & theirs.keys())
        a, b = np.array([ours[s] for s in seeds]), np.array([theirs[s] for s in seeds])
        mean, low, high, p_value = paired_interval(a - b, level)
        _, low90, high90, _ = paired_interval(a - b, EQUIVALENCE_LEVEL)
        best = np.array([self.best[cell][s] for s in seeds])
        best_against = np.array([self.best[against][s] for s in seeds])
        decision, sd = verdict(low, high, low90, high90, margin), _sd(a - b)
        is_open = decision == "inconclusive" and len(seeds) > 1
        return {
            "budget": self.budget,
            "n_seeds": len(seeds),
            "n_refused": self.n_refused[cell] + self.n_refused.get(against, 0),
            "mean": a.mean() if seeds else np.nan,
            "sd": _sd(a),
            "against_mean": b.mean() if seeds else np.nan,
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
            "best_mean": best.mean() if seeds else np.nan,
            "best_difference": (best - best_against).mean() if seeds else np.nan,
            "measure": self.measure,
            "margin": margin,
            "level": level,
        }


def _accepted(results: pd.DataFrame, measure: str) -> pd.DataFrame:
    """The rows of accepted runs, once the table is checked."""
    needed = {*AXES, "seed", measure, "steps", "samples", "unique_examples", "refused"}
    missing = sorted(needed - set(results.columns))
    if missing:
        raise ValueError(f"results lack the columns {missing}; got {list(results.columns)}")
    if results["refused"].dtype != bool:
        raise ValueError(f"`refused` is {results['refused'].dtype}; expected bool")
    twice = results[results.duplicated([*AXES, "seed"])]
    if len(twice):
        raise ValueError(
            f"{len(twice)} rows repeat a cell and seed, first {_cell_name(twice.iloc[0])}, seed "
            f"{twice.iloc[0].seed}; expected one run per cell and seed: results of one study"
        )
    accepted = results[~results["refused"]]
    wrong = accepted[~accepted[measure].between(0, 1)]
    if len(wrong):
        raise ValueError(
            f"{measure} is {wrong.iloc[0][measure]} in {_cell_name(wrong.iloc[0])}, seed "
            f"{wrong.iloc[0].seed}; expected a number in [0, 1], or a refused row"
        )
    return accepted


def _budget(accepted: pd.DataFrame) -> str:
    """The one kind of budget these runs share: equal_steps, equal_epochs or early_stopping.

    Runs that a rule of the study stopped early share the rule, not the steps. Of the others, runs
    of one student and fraction have the same steps; across fractions steps are equal, or passes
    over the subset are, up to the one batch by which steps are rounded.
    """
    kinds = {}
    if "budget" in accepted and (accepted["budget"] == "early_stopping").any():
        if (accepted["budget"] != "early_stopping").any():
            raise _mixed("runs", (f"{kind}" for kind in accepted["budget"].unique()))
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
