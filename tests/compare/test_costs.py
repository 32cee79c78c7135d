"""What a selection costs is set against what it saves, and a curve that never arrives saves
nothing."""

import numpy as np
import pandas as pd
import pytest

from kdlib.compare.costs import ledger, ledger_table, pays_after, steps_table


def runs(strategy, fraction, curve, wall_s, steps=100, seeds=(0, 1), objective="kd"):
    """Results, curves and costs of one cell; the seeds lie 0.01 below and above the curve."""
    cell = {"student": "tiny", "strategy": strategy, "fraction": fraction, "objective": objective}
    results, curves, costs = [], [], []
    for seed, shift in zip(seeds, (-0.01, 0.01), strict=True):
        run = cell | {"seed": seed}
        results.append(run | {"refused": False})
        costs.append(run | {"wall_s": wall_s, "steps": steps})
        curves += [run | {"step": s, "validation_accuracy": a + shift} for s, a in curve.items()]
    return tuple(map(pd.DataFrame, (results, curves, costs)))


FULL = runs("full", 1.0, {25: 0.5, 50: 0.7, 75: 0.79, 100: 0.8}, 20.0)
EASY = runs("easy", 0.3, {25: 0.6, 50: 0.8, 75: 0.75, 100: 0.75}, 20.0)
HARD = runs("hard", 0.3, {25: 0.2, 50: 0.3, 75: 0.4, 100: 0.5}, 20.0)
RANDOM = runs("random", 0.3, {25: 0.5, 50: 0.7, 75: 0.75, 100: 0.795}, 20.0)


def of(*cells, margin=0.015, selection=lambda strategy, objective: 0.0):
    tables = [pd.concat(parts, ignore_index=True) for parts in zip(*cells, strict=True)]
    return ledger(*tables, margin, selection).set_index("strategy")


def test_a_ledger_worked_by_hand():
    table = of(
        FULL, EASY, HARD, RANDOM, selection=lambda s, _: {"random": 0.0}.get(s, 32.0)
    )  # fmt: skip
    # The full set ends at 0.8; within 0.015 of that it is at step 75 (0.79), easy at step 50, hard
    # never, random at step 100. A step costs 20 s / 100. Easy saves 25 steps, 5 s: 32 s are paid
    # after 6.4 students, so after 7. Random needs 25 steps more, which its being free cannot mend.
    assert table["target"].unique() == pytest.approx(0.785)
    assert table.loc["easy", ["full_steps", "steps", "s_per_step"]].tolist() == [75, 50, 0.2]
    assert table.loc["easy", ["saved_s", "selection_s", "pays_after"]].tolist() == [5, 32, 7]
    assert table.loc["random", ["steps", "saved_s"]].tolist() == [100, -5]
    assert np.isnan(table.loc[["random", "hard"], "pays_after"]).all()
    assert np.isnan(table.loc["hard", ["steps", "saved_s"]].astype(float)).all()
    assert "full" not in table.index


def test_both_sides_are_read_alike_so_that_the_full_set_pays_nothing_against_itself():
    again = runs("copy", 0.5, {25: 0.5, 50: 0.7, 75: 0.79, 100: 0.8}, 20.0)
    for margin in (0.001, 0.05, 0.4):
        assert of(FULL, again, margin=margin).loc["copy", "saved_s"] == 0


def test_a_step_costs_the_same_whatever_it_is_drawn_from():
    slow = runs("easy", 0.3, {25: 0.6, 50: 0.8, 100: 0.8}, 30.0)  # another job beside it
    row = of(FULL, slow).loc["easy"]
    assert (row["s_per_step"], row["run_s"], row["full_run_s"]) == (0.25, 30.0, 20.0)


def test_refused_runs_cost_and_save_nothing():
    results, curves, costs = EASY
    dear = costs.assign(wall_s=[2000.0, 20.0])
    refused = results.assign(refused=[True, False])
    row = of(FULL, (refused, curves[curves["seed"] == 1], dear)).loc["easy"]
    assert row["s_per_step"] == 0.2
    assert of((FULL[0].assign(refused=True), FULL[1].iloc[:0], FULL[2]), EASY).empty


def test_evaluations_that_one_seed_lacks_are_left_out():
    results, curves, costs = EASY
    short = curves[(curves["seed"] == 0) | (curves["step"] != 50)]
    assert np.isnan(of(FULL, (results, short, costs)).loc["easy", "steps"])


def test_pays_after_is_never_without_a_saving():
    assert pays_after(0.0, 5.0) == 0
    assert pays_after(10.0, 5.0) == 2
    assert pays_after(10.1, 5.0) == 3
    assert all(np.isnan(pays_after(10.0, saved)) for saved in (0.0, -1.0, float("nan")))


def test_the_markdown_says_never_in_words():
    table = of(FULL, EASY, HARD, selection=lambda s, _: 32.0)
    lines = ledger_table(table.reset_index()).markdown().splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| 50 | 75 | +5 | 32 | 7 students |")
    assert lines[3].endswith("| never | 75 | - | 32 | never |")
    steps = steps_table(table.reset_index()).markdown().splitlines()
    assert steps[2].endswith("| 50 | 75 |")
    assert steps[3].endswith("| never | 75 |")


def test_without_times_steps_are_the_same_and_seconds_unknown():
    timed, untimed = of(FULL, EASY), of((*FULL[:2], FULL[2][:0]), (*EASY[:2], EASY[2][:0]))
    assert untimed[["steps", "full_steps", "target"]].equals(
        timed[["steps", "full_steps", "target"]]
    )
    assert untimed[["s_per_step", "saved_s", "run_s"]].isna().all(axis=None)
