"""Variants of the scores, worked by hand and against slow loops."""

import itertools
import math

import numpy as np
from cartography.test_log import LOGITS, finished, random_dynamics, softmax

from kdlib.cartography import scores
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.variants import SAME_NAME, tdds_still_window, variants
from kdlib.study.selections import SCORES


def recorded(folder, seed=0, n_epochs=12):
    logits, labels, _ = random_dynamics(seed, n_epochs)
    log = DynamicsLog.create(
        folder, np.arange(len(labels)), labels, n_epochs=n_epochs, n_classes=5, observed="eval",
        logits=True, provenance={},
    )  # fmt: skip
    for epoch in range(n_epochs):
        log.record(np.full(40, epoch), np.arange(40), logits[epoch], labels)
    return log.finish(), logits.astype(np.float64), labels


def test_variants_of_three_examples_are_as_worked_by_hand(tmp_path):
    # id 10: p = 1/4 3/4 1/4 3/4; id 20: 3/4 always; id 30: 1/4 always, never right
    table = variants(finished(tmp_path), window=3)
    expected = {
        "correctness_half": [0.5, 1, 0],
        "forgetting_unlearned_first": [1, 0, 0],
        # H(1/4, 3/4) in every epoch
        "entropy_last": [math.log(4) - 0.75 * math.log(3)] * 3,
        "aum_softmax_last": [0.5, 0.5, -0.5],
        "el2n_first_ten": [4 * math.sqrt(2) / 2, math.sqrt(2), 3 * math.sqrt(2)],
        "dyn_unc_but_last": [math.sqrt(1 / 12), 0, 0],  # one window of the first three epochs
        "aum_softmax": [0, 0.5, -0.5],
        # each step of id 10: |3/4 ln 3| + |1/4 ln(1/3)| = ln 3, the same in both directions
        "tdds_absolute": [0, 0, 0],
        # logits are (0, 0) to (ln 3) and 0: one log is of 1e-8, another of a negative number
        "tdds_still_window": tdds_still_window(LOGITS, window=3),
    }
    assert set(table.columns) == set(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(table[name], values, atol=2e-3, err_msg=name)


def test_variants_of_logits_equal_slow_loops(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "CHUNK_VALUES", 12 * 5 * 7)  # several blocks
    log, logits, labels = recorded(tmp_path)
    table = variants(log, window=4)
    for i in range(40):
        probs = [softmax(logits[e, i]) for e in range(12)]
        margins = [p[labels[i]] - max(q for k, q in enumerate(p) if k != labels[i]) for p in probs]
        np.testing.assert_allclose(table["aum_softmax"][i], np.mean(margins), atol=1e-9)
        steps = [
            sum(
                abs((b + 1e-8) * math.log((b + 1e-8) / (a + 1e-8)))
                for a, b in zip(*pair, strict=True)
            )
            for pair in itertools.pairwise(probs)
        ]
        total, n_windows = 0.0, 12 - 4 + 1
        for k in range(n_windows):
            inside = steps[k : k + 3]
            norm = math.sqrt(sum((s - sum(inside) / 3) ** 2 for s in inside))
            total += 0.9 * 0.1 ** (n_windows - 1 - k) * norm
        np.testing.assert_allclose(table["tdds_absolute"][i], total, atol=1e-9)
        first = [_raw_step(logits[e, i], logits[e + 1, i]) for e in range(3)]
        norm = math.sqrt(sum((s - sum(first) / 3) ** 2 for s in first))
        weight = sum(0.9 * 0.1**k for k in range(n_windows))
        np.testing.assert_allclose(table["tdds_still_window"][i], norm * weight, atol=1e-9)
        last = margins[-1]
        np.testing.assert_allclose(table["aum_softmax_last"][i], last, atol=1e-9)


def _raw_step(before, after):
    """What that port takes for a divergence: logits, 0 where a logarithm is of a negative one."""
    total = 0.0
    for a, b in zip(before, after, strict=True):
        known = a + 1e-8 > 0 and b + 1e-8 > 0
        total += abs(b * (math.log(b + 1e-8) - math.log(a + 1e-8))) if known else 0.0
    return total


def test_el2n_is_summed_over_ten_epochs_at_most(tmp_path):
    log, _, _ = recorded(tmp_path)
    expected = log["el2n"][:10].astype(float).sum(axis=0)
    np.testing.assert_allclose(variants(log, window=4)["el2n_first_ten"], expected)


def test_without_logits_and_epochs_to_spare_fewer_variants_are_there(tmp_path):
    table = variants(finished(tmp_path, logits=False), window=4)  # as many epochs as the window
    assert set(table.columns) == {
        "correctness_half", "forgetting_unlearned_first", "entropy_last", "el2n_first_ten",
    }  # fmt: skip


def test_every_name_of_the_table_is_a_score_or_a_variant(tmp_path):
    log, _, _ = recorded(tmp_path)
    columns = set(variants(log, window=4).columns)
    assert set(SAME_NAME) <= set(SCORES)
    others = {name for names in SAME_NAME.values() for name in names}
    assert others - set(SCORES) == columns
