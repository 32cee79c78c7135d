"""The cost of a selection, and the number of students after which it is recovered.

At equal steps a subset saves nothing: a step costs the same whatever it is drawn from. It saves
time where its student gets as far in fewer steps, which the learning curves show.
"""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd

from kdlib.compare.text import Table, numbers_of
from kdlib.study.cells import share_in_words
from kdlib.study.evaluation import AXES

CELL = list(AXES)

COLUMNS = [
    "student", "objective", "strategy", "fraction", "full_run_s", "run_s", "target", "full_steps",
    "steps", "s_per_step", "saved_s", "selection_s", "pays_after",
]  # fmt: skip


def ledger(
    results: pd.DataFrame,
    curves: pd.DataFrame,
    costs: pd.DataFrame,
    margin: float,
    selection_s: Callable[[str, str], float],
) -> pd.DataFrame:
    """For each cell on a subset: what its student saves against one on the full set, and how many
    students it takes to save what the selection cost.

    The target is the mean validation accuracy (over seeds) of the full set's students at their last
    step, less the margin. Either side is charged the steps after which its mean curve is first at
    the target, `full_steps` and `steps`, so that the full set is not charged for steps that add
    less than the margin; a curve that does not reach the target saves nothing. A step costs the
    median over all runs of the student and objective of wall time / steps, evaluations included.
    Of images without labels no accuracy is followed, and no cell has a row.
    Limits: steps are read from evaluations, between which nothing is known, and from curves of one
    schedule, which a shorter training would run through faster; the curves are of validation
    images; and wall times are those of machines that may have done other things.

    Args:
        results: One row per run: the four axes, `seed`, `refused`.
        curves: The axes, `seed`, `step`, `validation_accuracy` in [0, 1] of the accepted runs.
        costs: One row per run: the axes, `seed`, `wall_s`, `steps`; without rows, where the runs
            are elsewhere, seconds are NaN.
        margin: Accuracy that does not matter, in (0, 1).
        selection_s: (strategy, objective) -> seconds spent before the first such subset was there,
            that a student on the full set would not have needed; 0 for a random one.

    Returns: Sorted by student, objective, fraction and strategy: `full_run_s` and `run_s`, the
        median wall times of whole runs as the study asks for them; `target`; `full_steps`; `steps`,
        NaN for never; `s_per_step`; `saved_s` for each student, NaN for never; `selection_s`;
        `pays_after`, a number of students, NaN for never. Cells whose full set has no accepted run
        are left out.
    """
    accepted = results[~results["refused"]][[*CELL, "seed"]]
    timed = costs.merge(accepted, on=[*CELL, "seed"])
    timed = timed.assign(s_per_step=timed["wall_s"] / timed["steps"])
    run_s = timed.groupby(CELL)["wall_s"].median()
    per_step = timed.groupby(["student", "objective"])["s_per_step"].median()
    followed = "validation_accuracy" in curves
    means = {c: _mean_curve(rows) for c, rows in curves.groupby(CELL)} if followed else {}
    means = {cell: curve for cell, curve in means.items() if len(curve)}  # NaN: nothing held out
    rows = []
    for (student, strategy, fraction, objective), curve in means.items():
        whole = (student, "full", 1.0, objective)
        if strategy == "full" or whole not in means:
            continue
        target = means[whole].iloc[-1] - margin
        full_steps, steps = _first(means[whole], target), _first(curve, target)
        s_per_step = per_step.get((student, objective), np.nan)
        saved = (full_steps - steps) * s_per_step
        spent, cell = selection_s(strategy, objective), (student, strategy, fraction, objective)
        rows.append(
            (
                student, objective, strategy, fraction, run_s.get(whole, np.nan),
                run_s.get(cell, np.nan), target, full_steps, steps, s_per_step, saved,
                spent, pays_after(spent, saved),
            )
        )  # fmt: skip
    order = ["student", "objective", "fraction", "strategy"]
    return pd.DataFrame(rows, columns=COLUMNS).sort_values(order, ignore_index=True)


def pays_after(spent: float, saved: float) -> float:
    """Students after which a cost is saved: spent / saved, rounded up; NaN for never.

    >>> pays_after(100.0, 30.0), pays_after(0.0, 1.0), pays_after(100.0, -1.0)
    (4.0, 0.0, nan)
    """
    return float(math.ceil(spent / saved)) if saved > 0 else math.nan


def steps_table(cells: pd.DataFrame) -> Table:
    """The steps of `ledger`, without seconds."""
    rows = [
        (
            row.student, row.objective, row.strategy, share_in_words(row.fraction),
            f"{100 * row.target:.1f}", "never" if math.isnan(row.steps) else f"{row.steps:.0f}",
            f"{row.full_steps:.0f}",
        )
        for row in cells.itertuples()
    ]  # fmt: skip
    head = ("student", "objective", "strategy", "fraction", "target (%)", "steps",
            "of the full set")  # fmt: skip
    return Table(head, rows, "llll" + "r" * 3)


def ledger_table(cells: pd.DataFrame) -> Table:
    """What `ledger` returns, as text."""
    head = (
        "student", "objective", "strategy", "fraction", "whole run (s)", "on the full set (s)",
        "target (%)", "steps", "of the full set", "saved per student (s)", "selection (s)",
        "pays after",
    )  # fmt: skip
    rows = []
    for row in cells.itertuples():
        never = math.isnan(row.steps)
        pays = "never" if math.isnan(row.pays_after) else _students(row.pays_after)
        rows.append(
            (
                row.student, row.objective, row.strategy, share_in_words(row.fraction),
                f"{row.run_s:.3g}", f"{row.full_run_s:.3g}", f"{100 * row.target:.1f}",
                "never" if never else f"{row.steps:.0f}", f"{row.full_steps:.0f}",
                "-" if never else f"{row.saved_s:+.3g}", f"{row.selection_s:.3g}", pays,
            )
        )  # fmt: skip
    of = cells[CELL].itertuples(index=False, name=None)
    return Table(head, rows, "llll" + "r" * 8, numbers_of(of, range(4, len(head))))


def _students(n: float) -> str:
    return "at once" if n == 0 else f"{n:.0f} student{'s' if n > 1 else ''}"


def _mean_curve(rows: pd.DataFrame) -> pd.Series:
    """Step -> mean validation accuracy, at the steps at which every seed was evaluated."""
    by_seed = rows.pivot(index="step", columns="seed", values="validation_accuracy")
    return by_seed.astype(np.float64).dropna().mean(axis=1)


def _first(curve: pd.Series, target: float) -> float:
    """First step at which a curve is at the target; NaN when it never is."""
    reached = curve.index[curve >= target]
    return float(reached[0]) if len(reached) else math.nan
