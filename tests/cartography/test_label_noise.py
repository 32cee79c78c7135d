"""Detectors of wrong labels: against slow loops and by hand."""

import math

import numpy as np
import pytest
from cartography.test_log import finished
from cartography.test_variants import recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from kdlib.cartography import label_noise

SOME = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=40).filter(
    lambda rows: 0 < sum(wrong for _, wrong in rows) < len(rows)
)


def curves_by_loops(suspicion, wrong):
    """Rates and precision, flagging everything at least as suspicious as each value in turn."""
    rows = [(0.0, 0.0)]
    precision = []
    for threshold in sorted(set(suspicion), reverse=True):
        flagged = suspicion >= threshold
        hits = (flagged & wrong).sum()
        rows.append(((flagged & ~wrong).sum() / (~wrong).sum(), hits / wrong.sum()))
        precision.append(hits / flagged.sum())
    return *np.transpose(rows), [precision[0], *precision]


@settings(max_examples=60, deadline=None)
@given(SOME)
def test_curves_are_those_of_a_slow_loop_ties_included(rows):
    suspicion, wrong = (np.array(column) for column in zip(*rows, strict=True))
    table = label_noise.curves(suspicion, wrong)
    x, y, precision = curves_by_loops(suspicion, wrong)
    np.testing.assert_array_equal(table["false_positive_rate"], x)
    np.testing.assert_array_equal(table["true_positive_rate"], y)
    np.testing.assert_array_equal(table["precision"], precision)
    assert (table["recall"] == table["true_positive_rate"]).all()


def test_curves_worked_by_hand():
    table = label_noise.curves(np.array([3.0, 2.0, 2.0, 0.0]), np.array([True, False, True, False]))
    assert table["recall"].tolist() == [0, 0.5, 1, 1]
    assert table["precision"].tolist() == [1, 1, pytest.approx(2 / 3), 0.5]
    assert table["false_positive_rate"].tolist() == [0, 0, 0.5, 1]


def test_a_thinned_curve_keeps_its_ends():
    rng = np.random.default_rng(0)
    table = label_noise.curves(rng.random(5000), rng.random(5000) < 0.3)
    few = label_noise.thinned(table)
    assert len(few) == label_noise.CURVE_POINTS
    assert few.iloc[0].equals(table.iloc[0])
    assert few.iloc[-1].equals(table.iloc[-1])


def test_over_epochs_each_score_sees_only_the_epochs_so_far(tmp_path):
    log, _, labels = recorded(tmp_path, n_epochs=6)
    wrong = labels == 0
    table = label_noise.over_epochs(log, wrong, n_points=3).set_index(["detector", "epoch"])[
        "auroc"
    ]
    assert set(table.index.get_level_values("epoch")) == {1, 4, 6}
    margins = log["margin"][:4].astype(float).mean(axis=0)
    assert table["aum", 4] == pytest.approx(roc_auc_score(wrong, -margins))
    assert table["el2n", 4] == pytest.approx(roc_auc_score(wrong, log["el2n"][3].astype(float)))


def test_a_label_that_is_never_learned_is_more_suspicious_than_one_that_was_forgotten(tmp_path):
    # id 10 is forgotten once, id 20 never, id 30 is never right
    log, wrong = finished(tmp_path), np.array([False, False, True])
    table = label_noise.over_epochs(log, wrong, n_points=2).set_index(["detector", "epoch"])
    assert table.loc[("forgetting_events", 4), "auroc"] == 1


def test_examples_below_99_percent_of_the_pretending_ones_are_flagged():
    aum = np.concatenate([np.linspace(-2, -1, 100), [-5.0, -1.005, 0.0, 3.0]])
    first, second = np.zeros(104, bool), np.zeros(104, bool)
    first[:50], second[50:100] = True, True
    flagged = label_noise.below_threshold_samples((aum, aum), (first, second))
    # of the second training: 50 samples up to -1, their 99th percentile lies just below
    cutoffs = [np.percentile(aum[mask], 99) for mask in (first, second)]
    assert flagged[100]
    assert not flagged[102:].any()
    assert flagged[101] == (cutoffs[1] > -1.005)
    # an example that pretends in the second training is judged by the first
    assert (flagged[50:100] == (aum[50:100] < cutoffs[0])).all()


def test_held_out_scores_worked_by_hand():
    probs = np.array([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
    scores = label_noise.held_out_scores(probs, np.array([0, 1, 2]))
    np.testing.assert_allclose(
        scores["held-out loss"], [-math.log(0.7), -math.log(0.1), -math.log(1e-12)]
    )
    np.testing.assert_allclose(scores["held-out margin"], [-0.5, 0.7, 1.0])


def test_confident_learning_finds_labels_that_were_turned():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 600)
    probs = rng.dirichlet([1, 1, 1], 600) * 0.3
    probs[np.arange(600), truth] += 0.7
    wrong = rng.random(600) < 0.1
    labels = np.where(wrong, (truth + 1) % 3, truth)
    suspicion, flagged = label_noise.confident_learning(probs, labels)
    assert roc_auc_score(wrong, suspicion) > 0.99
    judged = label_noise.precision_recall(flagged, wrong)
    assert judged["flagged"] == flagged.sum()
    assert judged["precision"] > 0.95
    assert judged["recall"] > 0.8


def test_flagging_nothing_has_no_precision():
    judged = label_noise.precision_recall(np.zeros(3, bool), np.array([True, False, False]))
    assert math.isnan(judged["precision"])
    assert judged["recall"] == 0
