"""Runs are compared seed by seed; refused rows, missing pairs and mixed budgets enter no mean."""

import numpy as np
import pandas as pd
import pytest

from kdlib.compare.differences import objective_differences, paired_differences
from kdlib.compare.statistics import seeds_needed
from kdlib.compare.text import comparison_markdown, summary_lines

MARGIN, LEVEL = 0.01, 0.95


def cell(strategy, accuracies, fraction=0.33, objective="kd", student="tiny", **others):
    """Rows of one cell at equal steps: 100 steps of 16 images."""
    unique = round(900 * fraction)
    rows = pd.DataFrame({"seed": np.arange(len(accuracies)), "test_accuracy": accuracies})
    rows = rows.assign(
        student=student, strategy=strategy, fraction=fraction, objective=objective, steps=100,
        samples=1600, unique_examples=unique, refused=False,
    )  # fmt: skip
    return rows.assign(**others)


def table(*cells):
    return pd.concat(cells, ignore_index=True)


def compared(*cells):
    return paired_differences(table(*cells), "random", MARGIN, LEVEL)


RANDOM = [0.70, 0.72, 0.71, 0.74, 0.73]


EASY = [0.66, 0.69, 0.68, 0.70, 0.70]


def test_hand_worked_difference():
    row = compared(cell("random", RANDOM), cell("easy", EASY)).iloc[0]
    # Differences -.04 -.03 -.03 -.04 -.03: mean -.034, sd sqrt(.00003), standard error .0024495;
    # t(4): 2.7764 at 95 %, 2.1318 at 90 %.
    assert (row.strategy, row.against_strategy, row.n_seeds) == ("easy", "random", 5)
    assert row.difference == pytest.approx(-0.034)
    assert row.sd_difference == pytest.approx(np.sqrt(0.0012 / 40))
    assert (row.low, row.high) == pytest.approx((-0.0408008, -0.0271992), abs=1e-6)
    assert (row.low90, row.high90) == pytest.approx((-0.0392219, -0.0287781), abs=1e-6)
    assert (row["mean"], row.against_mean) == pytest.approx((0.686, 0.72))
    assert row.against_sd == pytest.approx(np.std(RANDOM, ddof=1))
    assert row.verdict == "worse"
    assert pd.isna(row.seeds_needed)


def test_differences_that_are_equal_in_every_seed_have_no_interval():
    same = compared(cell("random", RANDOM), cell("easy", RANDOM)).iloc[0]
    assert (same.difference, same.verdict) == (0.0, "inconclusive")
    assert same[["low", "high", "low90", "high90", "p_value", "seeds_needed"]].isna().all()


def test_seeds_are_paired_by_number_and_not_by_row():
    # Paired, the difference is 0.02 for each seed; in row order it would scatter.
    easy = cell("easy", [0.72, 0.94, 0.52]).iloc[[2, 0, 1]]
    row = compared(cell("random", [0.70, 0.92, 0.50]), easy).iloc[0]
    assert row.sd_difference == pytest.approx(0, abs=1e-12)
    assert row.verdict == "better"


def test_a_seed_missing_on_one_side_is_left_out_of_every_mean():
    short = cell("easy", EASY).query("seed != 1")
    row = compared(cell("random", [*RANDOM, 0.1]), short).iloc[0]
    keep = [0, 2, 3, 4]
    assert row.n_seeds == 4
    assert row["mean"] == pytest.approx(np.array(EASY)[keep].mean())
    assert row.against_mean == pytest.approx(np.array(RANDOM)[keep].mean())
    assert row.difference == pytest.approx(row["mean"] - row.against_mean)


def test_refused_rows_are_counted_and_enter_no_mean():
    random, easy = cell("random", RANDOM), cell("easy", EASY)
    clean = compared(random.drop(index=2), easy.drop(index=4)).iloc[0]
    random.loc[2, ["refused", "test_accuracy", "steps"]] = True, 0.99, 300
    easy.loc[4, ["refused", "test_accuracy"]] = True, np.nan
    row = compared(random, easy).iloc[0]
    assert (row.n_refused, row.n_seeds) == (2, 3)
    pd.testing.assert_series_equal(row.drop("n_refused"), clean.drop("n_refused"))


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_pairs_are_inconclusive(n):
    easy = cell("easy", EASY)
    easy["refused"] = easy["seed"] >= n
    comparison = compared(cell("random", RANDOM), easy)
    row = comparison.iloc[0]
    assert (row.n_seeds, row.n_refused, row.verdict) == (n, 5 - n, "inconclusive")
    assert np.isnan([row.low, row.high, row.low90, row.high90, row.p_value, row.p_holm]).all()
    assert pd.isna(row.seeds_needed)
    assert "two paired seeds are needed" in summary_lines(comparison)[-1]
    text = comparison_markdown(comparison)
    assert "nan" not in text + "".join(summary_lines(comparison))


def test_a_cell_whose_baseline_was_not_run_has_no_pairs():
    comparison = compared(cell("random", RANDOM), cell("easy", EASY, fraction=0.1))
    assert comparison["n_seeds"].tolist() == [0]


def test_the_full_set_is_compared_with_the_baseline_at_every_fraction():
    full = cell("full", [0.8, 0.81, 0.83, 0.82, 0.84], fraction=1.0)
    comparison = compared(
        full, cell("random", RANDOM), cell("random", EASY, fraction=0.1), cell("easy", EASY)
    )
    rows = comparison[comparison["strategy"] == "full"]
    assert rows["fraction"].tolist() == [1.0, 1.0]
    assert rows["against_fraction"].tolist() == [0.1, 0.33]
    assert rows["against_mean"].tolist() == pytest.approx([np.mean(EASY), np.mean(RANDOM)])
    assert len(comparison) == 3


def test_objectives_are_compared_at_the_same_subset():
    results = table(
        cell("random", RANDOM, objective="kd"),
        cell("random", EASY, objective="plain"),
        cell("easy", EASY, objective="kd"),
        cell("easy", EASY, objective="plain"),
    )
    comparison = objective_differences(results, "plain", MARGIN, LEVEL)
    assert comparison["strategy"].tolist() == ["easy", "random"]
    assert comparison["against_objective"].tolist() == ["plain", "plain"]
    assert comparison["difference"].tolist() == pytest.approx([0, 0.034])
    assert comparison["verdict"].tolist() == ["inconclusive", "better"]


def test_swapping_cell_and_baseline_turns_the_signs_and_the_verdict():
    results = table(cell("random", RANDOM), cell("easy", EASY))
    there = paired_differences(results, "random", MARGIN, LEVEL).iloc[0]
    back = paired_differences(results, "easy", MARGIN, LEVEL).iloc[0]
    assert (back.difference, back.low, back.high) == pytest.approx(
        (-there.difference, -there.high, -there.low)
    )
    assert back.p_value == pytest.approx(there.p_value)
    assert (there.verdict, back.verdict) == ("worse", "better")


def test_the_order_of_rows_and_the_names_of_seeds_change_nothing():
    results = table(cell("random", RANDOM), cell("easy", EASY), cell("hard", RANDOM[::-1]))
    expected = paired_differences(results, "random", MARGIN, LEVEL)
    shuffled = results.sample(frac=1, random_state=0)
    actual = paired_differences(shuffled, "random", MARGIN, LEVEL)
    pd.testing.assert_frame_equal(actual, expected)
    renamed = results.assign(seed=results["seed"].map({0: 4, 1: 0, 2: 3, 3: 1, 4: 2}))
    pd.testing.assert_frame_equal(paired_differences(renamed, "random", MARGIN, LEVEL), expected)


def test_other_steps_at_one_fraction_are_refused_by_name():
    easy = cell("easy", EASY, steps=300)
    with pytest.raises(ValueError, match=r"(?s)strategy=random.*100 steps.*strategy=easy.*300 ste"):
        compared(cell("random", RANDOM), easy)


def at_equal_epochs(strategy, accuracies, fraction, epochs=3, **others):
    n = round(900 * fraction)
    steps = -(-epochs * n // 16)
    return cell(strategy, accuracies, fraction, steps=steps, samples=16 * steps, **others)


def test_equal_epochs_compare_the_full_set_with_fewer_steps_and_say_so():
    cells = [
        at_equal_epochs("full", RANDOM, 1.0),
        at_equal_epochs("random", EASY, 0.33),
        at_equal_epochs("random", EASY, 0.01),
    ]
    comparison = compared(*cells)
    assert comparison["budget"].tolist() == ["equal_epochs"] * 2
    assert "at equal epochs" in summary_lines(comparison)[0]
    with pytest.raises(ValueError, match=r"(?s)fraction=0.33.*3\.\d* epochs.*6\.\d* epochs"):
        compared(cells[1], at_equal_epochs("full", RANDOM, 1.0, epochs=6))


def test_students_with_different_kinds_of_budget_are_refused():
    cells = [
        *(at_equal_epochs("random", EASY, f) for f in (0.33, 1.0)),
        *(cell("random", EASY, f, student="other") for f in (0.33, 1.0)),
    ]
    with pytest.raises(ValueError, match=r"(?s)other: equal_steps.*tiny: equal_epochs"):
        compared(*cells)
    assert compared(*cells[2:], cell("easy", EASY, student="other"))["budget"][0] == "equal_steps"


def test_tables_that_cannot_be_right_are_refused():
    random, easy = cell("random", RANDOM), cell("easy", EASY)
    with pytest.raises(ValueError, match=r"2 rows repeat .* strategy=easy.*, seed 0"):
        compared(random, easy, easy.head(2))
    with pytest.raises(ValueError, match=r"test_accuracy is 70.0 in .*strategy=easy"):
        compared(random, easy.assign(test_accuracy=70.0))
    with pytest.raises(ValueError, match=r"lack the columns \['steps'\]"):
        compared(random.drop(columns="steps"))
    with pytest.raises(ValueError, match="expected bool"):
        compared(random.assign(refused="False"))
    with pytest.raises(ValueError, match=r"no run of strategy 'radnom'.*did you mean 'random'"):
        paired_differences(random, "radnom", MARGIN, LEVEL)
    for margin, level in ((0, LEVEL), (1.0, LEVEL), (MARGIN, 95)):
        with pytest.raises(ValueError, match=r"expected a number in \(0, 1\)"):
            paired_differences(table(random, easy), "random", margin, level)


def test_holm_correction_is_that_of_the_paper():
    rng = np.random.default_rng(0)
    gains = {"a": 0.0, "b": 0.02, "c": 0.03, "d": -0.02}
    cells = [cell(s, np.add(RANDOM, g) + 0.01 * rng.normal(size=5)) for s, g in gains.items()]
    comparison = compared(cell("random", RANDOM), *cells)
    ordered = comparison.sort_values("p_value")
    p = ordered["p_value"].to_numpy()
    expected = [min(1, max((4 - j) * p[j] for j in range(i + 1))) for i in range(4)]
    assert ordered["p_holm"].tolist() == pytest.approx(expected)
    assert (p[:3] < expected[:3]).all()
    assert expected[2] < 1


def test_an_open_comparison_says_how_many_seeds_would_settle_it():
    noisy = cell("hard", np.add(RANDOM, [0.03, -0.03, 0.02, -0.01, 0.01]))
    comparison = compared(cell("random", RANDOM), noisy)
    row = comparison.iloc[0]
    assert row.verdict == "inconclusive"
    assert row.seeds_needed == seeds_needed(row.sd_difference, MARGIN, LEVEL) > 5
    assert f"about {row.seeds_needed} paired seeds would settle it" in summary_lines(comparison)[1]


def test_the_best_epoch_stands_beside_the_last_with_its_measured_inflation():
    random = cell("random", RANDOM, test_accuracy_best=np.add(RANDOM, 0.01))
    easy = cell("easy", EASY, test_accuracy_best=np.add(EASY, [0, 0, 0.05, 0, 0]))
    row = compared(random, easy).iloc[0]
    assert row.difference == pytest.approx(-0.034)  # of the last epoch, as ever
    assert row.best_mean == pytest.approx(0.696)
    assert row.best_difference == pytest.approx(-0.034)  # +0.01 both
    # ten runs: five by .01, one by .05, four by 0
    assert (row.inflation_mean, row.inflation_max) == pytest.approx((0.01, 0.05))
    assert row.n_inflation == 10
    easy.loc[2, "test_accuracy_best"] = np.nan
    row = compared(random, easy).iloc[0]
    assert np.isnan([row.best_mean, row.best_difference]).all()
    assert (row.n_inflation, row.inflation_max) == (9, pytest.approx(0.01))
    row = compared(random.drop(columns="test_accuracy_best"), cell("easy", EASY)).iloc[0]
    assert row.n_inflation == 0
    assert np.isnan([row.best_mean, row.inflation_mean]).all()


def test_a_probe_is_compared_where_it_is_asked_for_and_has_no_best_epoch():
    probes = [np.add(RANDOM, 0.1), np.add(RANDOM, 0.2)]
    cells = [
        cell(s, a, linear_accuracy=p, test_accuracy_best=a)
        for s, a, p in zip(("random", "easy"), (RANDOM, EASY), probes, strict=True)
    ]
    rows = paired_differences(table(*cells), "random", MARGIN, LEVEL, "linear_accuracy")
    assert rows["difference"].tolist() == pytest.approx([0.1])
    assert rows["measure"].tolist() == ["linear_accuracy"]
    assert rows["n_inflation"].tolist() == [0]
    cells[1].loc[1, "linear_accuracy"] = np.nan
    with pytest.raises(ValueError, match=r"linear_accuracy is nan in .*easy.*, seed 1"):
        paired_differences(table(*cells), "random", MARGIN, LEVEL, "linear_accuracy")
    cells[1].loc[1, "refused"] = True
    rows = paired_differences(table(*cells), "random", MARGIN, LEVEL, "linear_accuracy")
    assert (rows["n_seeds"].tolist(), rows["n_refused"].tolist()) == ([4], [1])


def test_objectives_are_compared_with_any_named_one():
    results = table(
        cell("random", RANDOM, objective="kd"),
        cell("random", np.add(RANDOM, 0.02), objective="kd_hot"),
        cell("random", EASY, objective="plain"),
    )
    rows = objective_differences(results, "kd", MARGIN, LEVEL)
    assert rows["objective"].tolist() == ["kd_hot", "plain"]
    assert rows["against_objective"].tolist() == ["kd", "kd"]
    assert rows["difference"].tolist() == pytest.approx([0.02, -0.034])
