"""Figures of accuracy show every run, the means and the full set."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from plots.example_tables import MARGIN, axis, compared, result_table, title_of, words

from kdlib.compare.differences import paired_differences
from kdlib.plots.accuracy import accuracy_by_fraction, accuracy_by_objective, accuracy_by_strategy
from kdlib.plots.differences import forest_plot
from kdlib.plots.theme import in_words


def test_accuracy_shows_each_run_the_means_and_the_full_set():
    results = result_table()
    fig = accuracy_by_strategy(Figure(), results, compared(results))
    assert [title_of(ax) for ax in fig.axes] == [
        "33 % of the data",
        "10 % of the data",
    ]
    for ax, fraction in zip(fig.axes, (0.33, 0.1), strict=True):
        shown = results[results["fraction"] == fraction]
        dots = [line for line in ax.lines if line.get_markersize() == 2.6]
        seen = np.sort(np.concatenate([line.get_xdata() for line in dots]))
        np.testing.assert_allclose(seen, np.sort(100 * shown["test_accuracy"]))
        means = [line.get_xdata()[0] for line in ax.lines if line.get_markersize() == 5.5]
        expected = 100 * shown.groupby(["strategy", "objective"])["test_accuracy"].mean()
        np.testing.assert_allclose(np.sort(means), np.sort(expected))
        full = (
            100
            * results[results["strategy"] == "full"].groupby("objective")["test_accuracy"].mean()
        )
        upright = [line.get_xdata()[0] for line in ax.lines if len(line.get_xdata()) == 2
                   and line.get_marker() == "None"]  # fmt: skip
        np.testing.assert_allclose(np.sort(upright), np.sort(full))
        assert ax.get_xlabel() == "test accuracy at the last step (%)"
        names = [label.get_text() for label in ax.get_yticklabels()]
        assert names in ([], ["random", "easy", "ambiguous (corner)", "hard"])
    (legend,) = fig.legends
    assert {"KD: mean", "KD: full set", "one seed", "against random:", "worse"} <= set(
        words(legend)
    )


def test_each_student_has_a_row_of_panels():
    results = result_table(students=("tiny", "wide"))
    fig = accuracy_by_strategy(Figure(), results, compared(results))
    titles = [title_of(ax) for ax in fig.axes]
    assert titles == [f"{s}, {f} % of the data" for s in ("tiny", "wide") for f in (33, 10)]


def test_refused_runs_are_not_drawn():
    results = result_table()
    comparison = compared(results)
    results.loc[3, "refused"] = True
    with pytest.raises(ValueError, match="1 of 90 rows are refused"):
        accuracy_by_strategy(Figure(), results, comparison)


def test_many_objectives_stand_below_each_other_in_a_panel_for_each_subset():
    names = [f"objective{i}" for i in range(7)]
    results = pd.DataFrame(
        {
            "student": "tiny", "strategy": strategy, "fraction": fraction, "objective": name,
            "seed": seed, "test_accuracy": 0.5 + 0.01 * number + 0.001 * seed,
        }
        for strategy, fraction in (("full", 1.0), ("random", 0.1))
        for number, name in enumerate(names)
        for seed in (0, 1, 2)
    )  # fmt: skip
    fig = accuracy_by_objective(Figure(), results, names)
    full, random = fig.axes
    assert [label.get_text() for label in full.get_yticklabels()] == [
        in_words(name) for name in names
    ]
    assert random.get_title() == f"{in_words('random')}, 10 % of the data"
    means = [line.get_xdata()[0] for line in full.lines if len(line.get_xdata()) == 1]
    assert means == pytest.approx([50.1 + i for i in range(7)])
    both = pd.concat([results, results.assign(student="other")])
    fig = accuracy_by_objective(Figure(), both, names)
    assert [title_of(ax) for ax in fig.axes] == [
        f"{student}, {subset}"
        for student in ("tiny", "other")
        for subset in ("full set", "random, 10 % of the data")
    ]


def test_fractions_show_the_mean_and_spread_of_each_objective_up_to_the_full_set():
    results = result_table(fractions=(0.1, 0.25, 0.5)).query("strategy in ('full', 'random')")
    (ax,) = accuracy_by_fraction(Figure(), results).axes
    assert ax.get_xscale() == "log"
    drawn = {c.get_label(): c for c in ax.containers}
    assert set(drawn) == {"KD", "plain"}
    for name, objective in (("KD", "kd"), ("plain", "plain")):
        line, _, (bars,) = drawn[name]
        of = results[results["objective"] == objective].groupby("fraction")["test_accuracy"]
        x, y = line.get_xydata().T
        np.testing.assert_allclose(x, [0.1, 0.25, 0.5, 1.0])
        np.testing.assert_allclose(y, 100 * of.mean())
        heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
        np.testing.assert_allclose(heights, 200 * of.std())
    assert [t.get_text() for t in ax.get_xticklabels()] == ["10", "25", "50", "100"]
    assert "random; mean ± s.d., S = 5" in words(ax)


def test_fractions_of_many_strategies_have_a_level_for_the_full_set():
    results = result_table(fractions=(0.1, 0.25, 0.5))
    kd, _ = accuracy_by_fraction(Figure(), results).axes
    assert {c.get_label() for c in kd.containers} == {
        "random",
        "easy",
        "ambiguous (corner)",
        "hard",
    }
    level = 100 * results.query("strategy == 'full' and objective == 'kd'")["test_accuracy"].mean()
    assert any(np.allclose(line.get_ydata(), level) for line in kd.lines)
    assert "full set" in words(kd)


def test_a_probe_is_named_where_it_is_what_is_compared():
    results = result_table().assign(linear_accuracy=lambda t: t["test_accuracy"] / 2)
    fig = accuracy_by_strategy(Figure(), results, compared(results), "linear_accuracy")
    assert fig.axes[0].get_xlabel() == "linear probe's test accuracy (%)"
    seen = np.concatenate([x.get_xdata() for x in fig.axes[0].lines if x.get_markersize() == 2.6])
    assert seen.max() < 50
    rows = paired_differences(results, "random", MARGIN, 0.95, "linear_accuracy")
    ax = forest_plot(axis(), rows, MARGIN)
    assert ax.get_xlabel().startswith("linear probe's test accuracy, strategy minus random")
