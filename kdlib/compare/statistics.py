"""Is one cell of a study better than another? Paired statistics over the results table, verdicts,
and how many seeds would settle an open question.

Seed s means the same draws in every cell, so runs are compared seed by seed. Leaves to others:
compiling the results table and refusing its rows, wording (telling), and drawing.

Sources:
    [Student1908] Student. The Probable Error of a Mean. Biometrika 6, 1908.
        DOI 10.1093/biomet/6.1.1.
    [Schuirmann1987] Schuirmann. A comparison of the Two One-Sided Tests Procedure and the Power
        Approach for assessing the equivalence of average bioavailability. J. Pharmacokinet.
        Biopharm. 15, 1987. DOI 10.1007/BF01068419.
    [Holm1979] Holm. A Simple Sequentially Rejective Multiple Test Procedure. Scand. J. Stat. 6,
        1979. https://www.jstor.org/stable/4615733.
    [Efron1979] Efron. Bootstrap Methods: Another Look at the Jackknife. Ann. Stat. 7, 1979.
        DOI 10.1214/aos/1176344552.
"""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import nctdtr, stdtr, stdtrit

from kdlib.repro.files import nearest
from kdlib.repro.seeds import generator
from kdlib.study.evaluation import AXES

AGAINST = ["against_strategy", "against_fraction", "against_objective"]


COLUMNS = [
    *AXES, *AGAINST, "budget", "n_seeds", "n_refused", "mean", "sd", "against_mean", "against_sd",
    "difference", "sd_difference", "low", "high", "low90", "high90", "boot_low", "boot_high",
    "p_value", "p_holm", "verdict", "seeds_needed", "best_mean", "best_difference",
    "inflation_mean", "inflation_max", "n_inflation", "measure", "margin", "level",
]  # fmt: skip


VERDICTS = ("better", "worse", "equivalent", "inconclusive")


EQUIVALENCE_LEVEL = 0.90  # two one-sided tests at 5 % each


RESAMPLES = 10_000


OWN_HEAD = "test_accuracy"  # the measure that has a best epoch


Cell = tuple[str, str, float, str]  # values of AXES


def paired_differences(
    results: pd.DataFrame, baseline: str, margin: float, level: float, measure: str = OWN_HEAD
) -> pd.DataFrame:
    """Every strategy minus the baseline strategy at the same student, fraction and objective.

    The full set, which has one fraction of its own, is compared with the baseline at each of the
    baseline's fractions: `against_fraction` says which.

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
        at 90 % (`low90`, `high90`); `boot_low` and `boot_high`, at `level`, of
        `bootstrap_interval`; `p_value`, two-sided, and `p_holm`, the same corrected for all rows
        [Holm1979]; `verdict`; `seeds_needed` where the verdict is inconclusive and at least two
        pairs give a spread; `best_mean` and `best_difference`, the same at the best epoch, NaN
        where one of its runs reports none, and, over the `n_inflation` runs of all rows that report
        one, by how much it lies above the last (`inflation_mean`, `inflation_max`); `measure`;
        `margin`; `level`. Accuracies are in [0, 1]; a seed that one cell lacks is left out. With
        fewer than two pairs the intervals are NaN and the verdict inconclusive.
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
            across = "full" in (strategy, baseline)
            for against_fraction in fractions if across else [fraction]:
                against = (student, baseline, against_fraction, objective)
                pairs.append(((student, strategy, fraction, objective), against))
    return runs.compared(pairs, margin, level)


def objective_differences(
    results: pd.DataFrame, reference: str, margin: float, level: float, measure: str = OWN_HEAD
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
    return runs.compared(pairs, margin, level)


def paired_interval(differences: np.ndarray, level: float) -> tuple[float, float, float, float]:
    """Mean of paired differences, its confidence interval and two-sided p value.

    Args:
        differences: shape (S,), finite, one per seed.
        level: Confidence level, in (0, 1).

    Returns: (mean, low, high, p_value). Without pairs all are NaN; one pair has a mean and nothing
        else. Equal differences are the limit of a vanishing spread: low = high = mean, and p is 0,
        or 1 when the mean is 0.
    Raises: ValueError for another shape, non-finite differences, or a level out of range.
    Source: [Student1908], with S - 1 degrees of freedom; assumes roughly normal differences.

    >>> mean, low, high, p = paired_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    >>> mean, round(low, 3), round(high, 3), round(p, 3)  # t = 4.303, standard error 1 / sqrt(3)
    (2.0, -0.484, 4.484, 0.074)
    """
    differences, n = _checked(differences, level), len(differences)
    mean = float(differences.mean()) if n else np.nan
    if n < 2:
        return mean, np.nan, np.nan, np.nan
    if np.ptp(differences) < np.finfo(np.float32).tiny:  # squares of smaller spreads underflow
        mean = float(differences[0])
        return mean, mean, mean, float(mean == 0)
    error = differences.std(ddof=1) / np.sqrt(n)
    half = stdtrit(n - 1, (1 + level) / 2) * error
    p_value = 2 * stdtr(n - 1, -abs(mean) / error)
    return mean, float(mean - half), float(mean + half), float(p_value)


def bootstrap_interval(differences: np.ndarray, level: float) -> tuple[float, float]:
    """Percentile interval of the mean of paired differences, over 10,000 resamples of the pairs.

    It assumes no shape of the differences, and with few seeds it is too narrow: the resampled means
    spread like the standard error times sqrt((S - 1) / S), and their tails end at the extremes. Of
    20,000 sets of S = 5 normal differences the interval at 95 % held the true mean in 84 %, the t
    interval in 95 %; of 4,000 sets of S = 3 it did in 75 %, of S = 10 in 91 % (a test measures
    this on fewer). So it stands beside the t interval and decides no verdict.

    Args:
        differences: shape (S,), finite, one per seed.
        level: Confidence level, in (0, 1).

    Returns: (low, high); NaN without two pairs. The resamples are drawn from a generator of their
        own, the same for every row of S pairs, so that a row does not depend on its neighbours.
    Raises: ValueError as `paired_interval`.
    Source: [Efron1979]; the percentile method.

    >>> low, high = bootstrap_interval(np.array([1.0, 2.0, 3.0]), 0.95)
    >>> low, high  # each extreme alone is drawn in 1 of 27 resamples, more often than 2.5 %
    (1.0, 3.0)
    """
    differences = _checked(differences, level)
    if len(differences) < 2:
        return np.nan, np.nan
    # sorted: seeds have names, and names must change nothing
    means = np.sort(differences)[_resamples(len(differences))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@functools.lru_cache(maxsize=8)
def _resamples(n: int) -> np.ndarray:
    """Which pairs each resample draws: (10,000, n) int64 in [0, n)."""
    return generator(0, "bootstrap", n).integers(0, n, (RESAMPLES, n))


def verdict(low: float, high: float, low90: float, high90: float, margin: float) -> str:
    """What two confidence intervals of one difference allow to say.

    Equivalence is asked first. A difference can be unlike 0 and yet certainly smaller than the
    margin; the margin is what matters, so that is a tie. With ever more seeds every difference
    inside the margin becomes equivalent and every difference outside better or worse; asked the
    other way round, any difference at all would become better or worse.

    Args:
        low, high: Interval at the study's level, NaN without one.
        low90, high90: Interval at 90 %, NaN without one.
        margin: Smallest difference that matters, > 0.

    Returns: "equivalent" when the 90 % interval lies strictly inside +-margin (two one-sided tests
        at 5 %); else "better" when low > 0, "worse" when high < 0; else "inconclusive".
    Source: [Schuirmann1987]; the precedence is ours.

    >>> verdict(0.001, 0.005, 0.002, 0.004, margin=0.01), verdict(0.001, 0.05, 0.01, 0.04, 0.01)
    ('equivalent', 'better')
    """
    if -margin < low90 and high90 < margin:
        return "equivalent"
    if low > 0:
        return "better"
    return "worse" if high < 0 else "inconclusive"


def seeds_needed(sd: float, margin: float, level: float = 0.95, power: float = 0.8) -> int:
    """How many paired seeds would settle a comparison.

    The smallest S that does both, for normal differences of standard deviation `sd`: finds a true
    difference as large as the margin significant at `level` with probability `power`, and finds a
    true difference of 0 equivalent with probability `power`. A true difference between 0 and the
    margin may need more. `sd` is itself an estimate: from few seeds, S is an order of magnitude.

    Args:
        sd: Standard deviation (ddof=1) of the paired differences, >= 0.
        margin: Smallest difference that matters, > 0, in the unit of `sd`.
        level: Confidence level of better and worse, in (0, 1).
        power: Probability wanted, in (0, 1).

    Returns: S >= 2.
    Raises: ValueError for a number out of range.
    Source: noncentral t; for equivalence the Bonferroni lower bound of the power, which never asks
        for too few.

    >>> seeds_needed(sd=0.01, margin=0.01), seeds_needed(sd=0.001, margin=0.01)
    (11, 3)
    """
    if not (0 <= sd < np.inf and 0 < margin < np.inf):
        raise ValueError(
            f"sd is {sd} and margin {margin}; expected finite sd >= 0 and margin > 0 (sd needs at "
            "least 2 pairs)"
        )
    _check_fraction("level", level, "params: compare.confidence_level")
    _check_fraction("power", power, "0.8 is usual")
    if sd == 0:
        return 2

    def settles(n: int) -> bool:
        shift = margin / sd * np.sqrt(n)
        fails_difference = nctdtr(n - 1, shift, stdtrit(n - 1, (1 + level) / 2))
        fails_one_side = nctdtr(n - 1, shift, stdtrit(n - 1, (1 + EQUIVALENCE_LEVEL) / 2))
        return max(fails_difference, 2 * fails_one_side) <= 1 - power

    enough = 2
    while not settles(enough):
        enough *= 2
    short = enough // 2  # settles(short) is False, or enough is 2
    while enough - short > 1:
        middle = (short + enough) // 2
        short, enough = (short, middle) if settles(middle) else (middle, enough)
    return enough


class _Runs:
    """The results table, checked and keyed by cell: accepted accuracies by seed, and how many rows
    were refused."""

    def __init__(self, results: pd.DataFrame, measure: str) -> None:
        self.measure = measure
        needed = {*AXES, "seed", measure, "steps", "samples", "unique_examples", "refused"}
        missing = sorted(needed - set(results.columns))
        if missing:
            raise ValueError(f"results lack the columns {missing}; got {list(results.columns)}")
        if results["refused"].dtype != bool:
            raise ValueError(f"`refused` is {results['refused'].dtype}; expected bool")
        twice = results[results.duplicated([*AXES, "seed"])]
        if len(twice):
            raise ValueError(
                f"{len(twice)} rows repeat a cell and seed, first {_named(twice.iloc[0])}, seed "
                f"{twice.iloc[0].seed}; expected one run per cell and seed: results of one study"
            )
        accepted = results[~results["refused"]]
        wrong = accepted[~accepted[measure].between(0, 1)]
        if len(wrong):
            raise ValueError(
                f"{measure} is {wrong.iloc[0][measure]} in {_named(wrong.iloc[0])}, seed "
                f"{wrong.iloc[0].seed}; expected a number in [0, 1], or a refused row"
            )
        self.budget = _budget(accepted)
        self.cells: list[Cell] = sorted(set(_keys(results)))
        self.accuracy: dict[Cell, dict[int, float]] = {cell: {} for cell in self.cells}
        self.best: dict[Cell, dict[int, float]] = {cell: {} for cell in self.cells}
        self.n_refused = dict.fromkeys(self.cells, 0)
        best = np.full(len(results), np.nan)
        if measure == OWN_HEAD and "test_accuracy_best" in results:
            best = results["test_accuracy_best"].to_numpy(np.float64)
        for cell, seed, accuracy, of_best, refused in zip(
            _keys(results),
            results["seed"].tolist(),
            results[measure].tolist(),
            best.tolist(),
            results["refused"].tolist(),
            strict=True,
        ):
            if refused:
                self.n_refused[cell] += 1
            else:
                self.accuracy[cell][seed] = accuracy
                self.best[cell][seed] = of_best

    def check_known(self, axis: str, name: str) -> None:
        """Raise ValueError when no row has `name` on `axis`."""
        known = {cell[AXES.index(axis)] for cell in self.cells}
        if name not in known:
            raise ValueError(
                f"no run of {axis} {name!r} to compare with; "
                f"{nearest(name, known) if known else 'the results are empty'}"
            )

    def compared(self, pairs: list[tuple[Cell, Cell]], margin: float, level: float) -> pd.DataFrame:
        """The comparison of each cell with the cell it is paired with."""
        _check_fraction("margin", margin, "an accuracy; params: compare.margin")
        _check_fraction("level", level, "params: compare.confidence_level")
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
        table["p_holm"] = _holm(table["p_value"].to_numpy(np.float64))
        return table.astype({"seeds_needed": "Int64"})

    def _inflations(self, cells: set[Cell]) -> np.ndarray:
        """Best epoch minus last of each run that reports one, in the order of the cells."""
        found = [
            self.best[cell][seed] - accuracy
            for cell in sorted(cells & set(self.cells))
            for seed, accuracy in sorted(self.accuracy[cell].items())
        ]
        return np.array([x for x in found if np.isfinite(x)])

    def _statistics(self, cell: Cell, against: Cell, margin: float, level: float) -> dict:
        ours, theirs = self.accuracy[cell], self.accuracy.get(against, {})
        seeds = sorted(ours.keys() & theirs.keys())
        a, b = np.array([ours[s] for s in seeds]), np.array([theirs[s] for s in seeds])
        mean, low, high, p_value = paired_interval(a - b, level)
        _, low90, high90, _ = paired_interval(a - b, EQUIVALENCE_LEVEL)
        boot_low, boot_high = bootstrap_interval(a - b, level)
        best = np.array([self.best[cell][s] for s in seeds])
        best_against = np.array([self.best[against][s] for s in seeds])
        said, sd = verdict(low, high, low90, high90, margin), _sd(a - b)
        is_open = said == "inconclusive" and len(seeds) > 1
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
            "boot_low": boot_low,
            "boot_high": boot_high,
            "p_value": p_value,
            "verdict": said,
            "seeds_needed": seeds_needed(sd, margin, level) if is_open else None,
            "best_mean": best.mean() if seeds else np.nan,
            "best_difference": (best - best_against).mean() if seeds else np.nan,
            "measure": self.measure,
            "margin": margin,
            "level": level,
        }


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
                (f"{_named(row)}: {row.steps} steps" for row in different.itertuples()),
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
            raise _mixed(
                f"runs of student {student}",
                (
                    f"{_named(row)}: {row.steps} steps, {row.samples / row.unique_examples:.3g} "
                    "epochs"
                    for row in extremes.itertuples()
                ),
            )
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


def _keys(results: pd.DataFrame) -> list[Cell]:
    return list(zip(*(results[axis].tolist() for axis in AXES), strict=True))


def _named(row: Any) -> str:
    return ", ".join(f"{axis}={getattr(row, axis)}" for axis in AXES)


def _sd(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else np.nan


def _holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's adjusted p values (N,) -> (N,), high = not significant; NaN stays and does not count
    [Holm1979]."""
    adjusted = np.full(len(p_values), np.nan)
    order = np.argsort(p_values, kind="stable")[: np.isfinite(p_values).sum()]  # NaN sorts last
    steps = p_values[order] * np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted


def _checked(differences: np.ndarray, level: float) -> np.ndarray:
    differences = np.asarray(differences, np.float64)
    if differences.ndim != 1 or not np.isfinite(differences).all():
        raise ValueError(f"differences are {differences}; expected finite numbers of shape (S,)")
    _check_fraction("level", level, "params: compare.confidence_level")
    return differences


def _check_fraction(name: str, value: float, hint: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} is {value}; expected a number in (0, 1) ({hint})")
