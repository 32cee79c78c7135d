"""Progress, failures and paired results of students of a selection, below the button."""

import html
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from kdlib.compare.statistics import paired_interval
from kdlib.explorer import results
from kdlib.explorer.results import failure_html, progress_html, progress_of, results_html
from kdlib.explorer.selections import students


def text(shown):
    return " ".join(html.unescape(re.sub("<title>.*?</title>|<[^>]*>", " ", shown)).split())


def row(cell, seed, **more):
    return json.dumps({"step": "distill"} | dict(cell.items()) | {"seed": seed} | more)


@pytest.fixture
def mine(state):
    state.select(state.table.index[:110])
    state.save("mine")
    return state.study


def finished_runs(study, monkeypatch, accuracies):
    """Runs whose accuracy is `accuracies[objective, is_picked][seed]`."""
    rows = [
        dict(cell.items()) | {"seed": seed, "steps": 60, "samples": 3840, "unique_examples": 110,
                              "refused": False,
                              "test_accuracy": accuracies[cell.objective, picked][seed]}
        for cell, seed in students(study, "mine")
        for picked in [cell.strategy == "picked_mine"]
        if seed in accuracies.get((cell.objective, picked), {})
    ]  # fmt: skip
    monkeypatch.setattr(results, "selection_runs", lambda study, name: pd.DataFrame(rows))


def test_progress_tells_the_step_of_the_student_that_is_trained(mine):
    wanted = students(mine, "mine")
    bar = "random 0.1 kd, seed 0:  40%|####      | 24/60 [00:03<00:05, 7.1step/s, loss 1.2]"
    lines = ["some warning", row(*wanted[0], test_accuracy=0.5), bar, '{"step": "dis']
    progress = progress_of(lines)
    assert progress.done == {("kd", "picked_mine", 0): ""}
    assert (progress.step, progress.n_steps) == (24, 60)
    shown = text(progress_html(mine, "mine", lines))
    assert shown.startswith("1 of 8 students done. seed 0 seed 1 kd, mine done to come")
    assert "kd, random step 24 of 60 to come" in shown
    assert text(progress_html(mine, "mine", ())).count("begins") == 1
    everything = [row(cell, seed) for cell, seed in wanted]
    assert "8 of 8 students done" in progress_html(mine, "mine", everything)


def test_a_student_that_fails_is_named_with_its_error(mine, tmp_path):
    wanted = students(mine, "mine")
    lines = [row(*wanted[0]), row(*wanted[1], error="TrainingError: loss <b>is</b> nan"), ""]
    assert "kd, random failed" in text(progress_html(mine, "mine", lines))
    training = SimpleNamespace(lines=lambda: lines, log=tmp_path / "a.log")
    shown = failure_html("mine", training)
    assert text(shown) == (
        "The training of students on mine failed (kd, random, seed 0): TrainingError: loss "
        f"<b>is</b> nan The whole log: {tmp_path / 'a.log'}"
    )
    assert "<b>is" not in shown


def test_results_are_paired_differences_with_interval_and_verdict(mine, monkeypatch):
    random = {seed: 0.5 + 0.1 * seed for seed in mine.seeds}
    gains = {"kd": [0.05, 0.052], "plain": [0.03, -0.02]}
    finished_runs(mine, monkeypatch, {
        (objective, picked): {s: random[s] + gain[s] * picked for s in mine.seeds}
        for objective, gain in gains.items() for picked in (True, False)
    })  # fmt: skip
    shown = results_html(mine, "mine")
    mean, low, high, _ = paired_interval(np.array(gains["kd"]), 0.95)
    told = f"kd 60.10 % 55.00 % {100 * mean:+.2f} {100 * low:+.1f} to {100 * high:+.1f} better"
    assert told in text(shown)
    told = r"plain 55.50 % 55.00 % \+0.50 -\S+ to \S+ inconclusive; about \d+ seeds"
    assert re.search(told, text(shown))
    assert shown.count("<circle") == 4
    assert "<title>seed 1: -2.00 points</title>" in shown


def test_one_seed_gives_no_interval_and_no_verdict(mine, monkeypatch):
    finished_runs(mine, monkeypatch, {("kd", True): {0: 0.6, 1: 0.6}, ("kd", False): {0: 0.5}})
    shown = text(results_html(mine, "mine"))
    assert "kd 60.00 % 50.00 % +10.00 none: one seed none: one seed" in shown
    for word in ("better", "inconclusive", "plain"):
        assert word not in shown


def test_equal_differences_give_no_interval(mine, monkeypatch):
    finished_runs(mine, monkeypatch, {("kd", p): {0: 0.5, 1: 0.5} for p in (True, False)})
    assert text(results_html(mine, "mine")).count("none: no spread between the seeds") == 2


def test_without_a_pair_nothing_is_compared(mine, monkeypatch):
    for runs in ({}, {("kd", True): {0: 0.6}}, {("kd", True): {0: 0.6}, ("kd", False): {1: 0.5}}):
        finished_runs(mine, monkeypatch, runs)
        assert results_html(mine, "mine") == ""
