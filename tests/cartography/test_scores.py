"""Scores, regions and datamap against hand-worked cases, slow loops and damage."""

import math

import numpy as np
import pandas as pd
import pytest
from cartography.test_log import GOLD, PROVENANCE, finished, random_dynamics, softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cartography import scores as scores_module
from kdlib.cartography.datamap import compute_datamap, read_datamap, regions, write_datamap
from kdlib.study.selections import SCORES

# --- the whole way from logits to datamap --------------------------------------------------------


def test_datamap_of_three_examples_is_as_worked_by_hand(tmp_path):
    table = compute_datamap(finished(tmp_path / "log"), el2n_epoch=2, window=3)
    expected = {
        "label": [0, 1, 1],
        "confidence": [0.5, 0.75, 0.25],
        "variability": [0.25, 0, 0],  # deviations of id 10 are all 1/4
        "correctness": [0.5, 1, 0],
        "forgetting_events": [1, 0, 0],  # id 10 falls once, from epoch 2 to 3
        "never_learned": [False, False, True],
        "aum": [0, math.log(3), -math.log(3)],  # margins -ln 3, ln 3 cancel
        # Both components of p - onehot are 1 - p[y]: sqrt(2) / 4 and sqrt(2) * 3 / 4 at epoch 2.
        "el2n": [math.sqrt(2) / 4, math.sqrt(2) / 4, math.sqrt(2) * 3 / 4],
        # H(1/4, 3/4) = ln 4 - 3/4 ln 3, the same in every epoch.
        "entropy": [math.log(4) - 0.75 * math.log(3)] * 3,
        # -ln(1/4) = ln 4 and -ln(3/4) = ln 4 - ln 3, in turn for id 10.
        "loss": [math.log(4) - math.log(3) / 2, math.log(4) - math.log(3), math.log(4)],
        # times -1.5 -0.5 0.5 1.5: sum t * p = (-1.5 - 1.5 + 0.5 + 4.5) / 4 = 0.5; sum t^2 = 5.
        "trend": [0.1, 0, 0],
        # Windows (1/4 3/4 1/4), (3/4 1/4 3/4): squared deviations sum to 1/6, over 2, root.
        "dyn_unc": [math.sqrt(1 / 12), 0, 0],
        # Every step of id 10 is KL(3/4 1/4 || 1/4 3/4) = ln(3) / 2 or its mirror image, which is
        # equal: the divergence never varies.
        "tdds": [0, 0, 0],
        # Means 5/12 and 7/12: (7/12 + 5/12) / 2 = 1/2 times the deviation above.
        "dual": [math.sqrt(1 / 12) / 2, 0, 0],
    }
    assert list(table.index) == [10, 20, 30]
    assert table.index.name == "example_id"
    assert table.index.dtype == np.int64
    assert list(table.columns) == [*expected, "region_variability", "region_corner"]
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, atol=2e-3, err_msg=name)
    assert list(table["region_variability"]) == ["ambiguous", "easy", "hard"]
    # id 10 at (0.25, 0.5): to easy and hard sqrt(0.3125), to ambiguous 0.75.
    assert list(table["region_corner"]) == ["easy", "easy", "hard"]
    assert list(table["region_corner"].cat.categories) == ["easy", "ambiguous", "hard"]


def test_score_columns_are_the_scores_of_the_schema(tmp_path):
    table = compute_datamap(finished(tmp_path / "log"), el2n_epoch=1, window=3)
    rest = {"label", "never_learned", "region_variability", "region_corner"}
    further = ["grand", "grand_last", "class_distance", "prototypicality"]  # not of the log alone
    assert [name for name in table.columns if name not in rest] + further == list(SCORES)
    assert all(callable(getattr(scores_module, name)) for name in SCORES if name not in further)


def test_without_logits_only_tdds_is_absent(tmp_path):
    full = compute_datamap(finished(tmp_path / "a"), el2n_epoch=1, window=3)
    slim_log = finished(tmp_path / "b", logits=False)
    slim = compute_datamap(slim_log, el2n_epoch=1, window=3)
    pd.testing.assert_frame_equal(slim, full.drop(columns="tdds"))
    with pytest.raises(KeyError, match=r"dynamics\.logits"):
        slim_log["logits"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"el2n_epoch": 5, "window": 3}, r"dynamics\.el2n_epoch"),
        ({"el2n_epoch": 0, "window": 3}, r"dynamics\.el2n_epoch"),
        ({"el2n_epoch": 1, "window": 5}, r"dynamics\.window"),
        ({"el2n_epoch": 1, "window": 2}, r"dynamics\.window"),  # too short for tdds
    ],
)
def test_more_epochs_than_recorded_name_the_study_key(tmp_path, arguments, key):
    log = finished(tmp_path / "log")
    with pytest.raises(ValueError, match=key):
        compute_datamap(log, **arguments)


# --- scores --------------------------------------------------------------------------------------


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def sample_deviation(values):
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))


@pytest.mark.parametrize("window", [2, 4, 9])
def test_windowed_gold_scores_equal_slow_loops_from_the_papers(window):
    _, _, gold = random_dynamics(seed=1)
    for i in range(gold.shape[1]):
        p = [float(v) for v in gold[:, i]]
        windows = [p[k : k + window] for k in range(len(p) - window + 1)]
        dyn_unc = sum(map(sample_deviation, windows)) / len(windows)
        dual = sum((1 - sum(w) / window) * sample_deviation(w) for w in windows) / len(windows)
        one = gold[:, i : i + 1]
        assert scores_module.dyn_unc(one, window=window)[0] == pytest.approx(dyn_unc, abs=1e-12)
        assert scores_module.dual(one, window=window)[0] == pytest.approx(dual, abs=1e-12)


@pytest.mark.parametrize(("window", "decay"), [(3, 0.9), (5, 0.5), (9, 0.9), (4, 1.0)])
def test_tdds_equals_a_slow_loop_from_the_paper(window, decay):
    logits, _, _ = random_dynamics(seed=2, n_examples=12)
    scores = scores_module.tdds(logits, window=window, decay=decay)
    for i in range(12):
        p = [softmax(row) for row in logits[:, i]]
        average = 0.0
        for last in range(window - 1, len(p)):  # an exponential moving average, oldest first
            steps = [kl(p[t + 1], p[t]) for t in range(last - window + 1, last)]
            mean = sum(steps) / len(steps)
            norm = math.sqrt(sum((s - mean) ** 2 for s in steps))
            average = decay * norm + (1 - decay) * average
        assert scores[i] == pytest.approx(average, abs=1e-10)


def test_forgetting_equals_a_slow_loop_and_counts_falls_only():
    correct = np.random.default_rng(3).integers(0, 2, (11, 50)).astype(np.int8)
    for i, events in enumerate(scores_module.forgetting_events(correct)):
        assert events == sum(
            correct[t, i] == 1 and correct[t + 1, i] == 0 for t in range(len(correct) - 1)
        )


def test_el2n_of_several_runs_is_their_average_at_the_epoch_counted_from_one():
    runs = np.array([[[0.5, 1.0], [0.25, 0.0]], [[1.0, 0.5], [0.75, 0.5]]], dtype=np.float16)
    np.testing.assert_array_equal(scores_module.el2n(runs, epoch=1), [0.75, 0.75])
    np.testing.assert_array_equal(scores_module.el2n(runs, epoch=2), [0.5, 0.25])
    np.testing.assert_array_equal(scores_module.el2n(runs[0], epoch=1), [0.5, 1.0])


def test_trend_is_the_slope_of_a_fitted_line():
    _, _, gold = random_dynamics(seed=5)
    fitted = np.polyfit(np.arange(9), gold.astype(np.float64), 1)[0]
    np.testing.assert_allclose(scores_module.trend(gold), fitted, atol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        scores_module.trend(gold[:1])


def all_scores(logits, gold, correct):
    return {
        "confidence": scores_module.confidence(gold),
        "variability": scores_module.variability(gold),
        "correctness": scores_module.correctness(correct),
        "forgetting_events": scores_module.forgetting_events(correct),
        "trend": scores_module.trend(gold),
        "dyn_unc": scores_module.dyn_unc(gold, window=4),
        "dual": scores_module.dual(gold, window=4),
        "tdds": scores_module.tdds(logits, window=4),
    }


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_order_of_examples_does_not_matter_and_ranges_hold(seed):
    logits, labels, gold = random_dynamics(seed, n_examples=23)
    correct = (logits.argmax(axis=2) == labels).astype(np.int8)
    order = np.random.default_rng(seed).permutation(23)
    scores = all_scores(logits, gold, correct)
    permuted = all_scores(logits[:, order], gold[:, order], correct[:, order])
    for name, values in scores.items():
        np.testing.assert_array_equal(permuted[name], values[order], err_msg=name)
    for name, top in (("confidence", 1), ("variability", 0.5), ("correctness", 1)):
        assert ((scores[name] >= 0) & (scores[name] <= top)).all()
    assert (scores["forgetting_events"] <= 9 // 2).all()


def test_scores_do_not_depend_on_the_block_size(monkeypatch):
    logits, labels, gold = random_dynamics(seed=6)
    correct = (logits.argmax(axis=2) == labels).astype(np.int8)
    whole = all_scores(logits, gold, correct)
    monkeypatch.setattr(
        scores_module, "CHUNK_VALUES", 9 * 5 * 7
    )  # about 7 of 40 examples per block of logits
    for name, values in all_scores(logits, gold, correct).items():
        np.testing.assert_array_equal(values, whole[name], err_msg=name)


def test_unrecorded_cells_are_refused_by_scores():
    gold = GOLD.astype(np.float16)
    gold[1, 1] = np.nan
    with pytest.raises(ValueError, match="never recorded"):
        scores_module.confidence(gold)
    with pytest.raises(ValueError, match="never recorded"):
        scores_module.correctness(np.array([[1, 0], [-1, 0]], dtype=np.int8))


# --- regions -------------------------------------------------------------------------------------


def test_variability_rule_takes_the_top_third_and_splits_the_rest_at_one_half():
    confidence = np.array([0.9, 0.5, 0.49, 0.1, 0.7, 0.2])
    variability = np.array([0.1, 0.1, 0.1, 0.1, 0.4, 0.3])
    found = regions(confidence, variability, rule="variability")
    assert found.tolist() == ["easy", "easy", "hard", "hard", "ambiguous", "ambiguous"]


def test_variability_rule_leaves_ties_across_the_border_out():
    variability = np.array([0.4, 0.3, 0.3, 0.1, 0.1, 0.1])  # two places, three candidates
    found = regions(np.full(6, 0.2), variability, rule="variability")
    assert found.tolist() == ["ambiguous"] + ["hard"] * 5


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_corner_rule_takes_the_nearest_pole(seed):
    rng = np.random.default_rng(seed)
    confidence, variability = rng.random(30), rng.random(30) / 2
    found = regions(confidence, variability, rule="corner")
    poles = {"easy": (0, 1), "hard": (0, 0), "ambiguous": (1, 0.5)}
    for x, y, region in zip(variability, confidence, found, strict=True):
        distance = {name: math.dist((x, y), pole) for name, pole in poles.items()}
        assert distance[region] == pytest.approx(min(distance.values()), abs=1e-12)


def test_unknown_rule_lists_the_rules():
    with pytest.raises(ValueError, match="'variability' or 'corner'"):
        regions(np.zeros(2), np.zeros(2), rule="nearest")


def test_datamap_returns_from_its_file_unchanged_even_below_axis_folders(tmp_path):
    table = compute_datamap(finished(tmp_path / "log"), el2n_epoch=1, window=3)
    path = tmp_path / "strategy=easy" / "fraction=0.5" / "datamap.parquet"
    write_datamap(table, path, PROVENANCE)
    pd.testing.assert_frame_equal(read_datamap(path, PROVENANCE), table)
    first = path.read_bytes()
    write_datamap(table, path, PROVENANCE)
    assert path.read_bytes() == first


def test_datamap_of_other_provenance_or_damaged_is_refused(tmp_path):
    table = compute_datamap(finished(tmp_path / "log"), el2n_epoch=1, window=3)
    path = write_datamap(table, tmp_path / "datamap.parquet", PROVENANCE)
    with pytest.raises(ValueError, match="data: d0 -> d1"):
        read_datamap(path, PROVENANCE | {"data": "d1"})
    with pytest.raises(FileNotFoundError, match=r"no file .*absent.parquet; run `python -m kdlib"):
        read_datamap(tmp_path / "absent.parquet")
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 0):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="cut or damaged"):
            read_datamap(path)
    table.to_parquet(path)
    with pytest.raises(ValueError, match="no kdlib metadata"):
        read_datamap(path)


def test_a_flipped_byte_in_a_datamap_is_noticed_or_changes_nothing_that_is_read(tmp_path):
    table = compute_datamap(finished(tmp_path / "log"), el2n_epoch=1, window=3)
    path = write_datamap(table, tmp_path / "datamap.parquet", PROVENANCE)
    whole, noticed = path.read_bytes(), 0
    positions = range(4, len(whole), 43)
    for position in positions:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        try:
            found = read_datamap(path, PROVENANCE)
        except ValueError:
            noticed += 1
        else:
            pd.testing.assert_frame_equal(found, table)
    # The rest is statistics, padding and descriptions that are not read back.
    assert noticed > len(positions) / 4
