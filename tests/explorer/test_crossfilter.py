"""Filters, and the bins of the histograms that brush each other."""

import numpy as np
import pandas as pd
import pytest
from explorer.on_screen import synthetic

from kdlib.explorer.crossfilter import Filters, make_bins


def test_a_histogram_counts_what_all_other_filters_let_pass():
    table = synthetic(1000)
    ranges = {"confidence": (0.2, 0.6), "variability": (0.1, 0.3)}
    filters = Filters(table, [1, 2], ranges)
    label = table["label"].isin([1, 2])
    confidence, variability = (table[s].between(*ends) for s, ends in ranges.items())
    expected = {
        "confidence": label & variability,
        "variability": label & confidence,
        "class": confidence & variability,
        "correctness": label & confidence & variability,
    }
    for name, passing in expected.items():
        assert filters.visible_without(name).tolist() == passing.tolist()
    assert filters.visible.tolist() == expected["correctness"].tolist()


def test_a_filter_of_before_is_taken_over_only_where_it_is_equal():
    table = synthetic(1000)
    former = Filters(table, [1], {"confidence": (0.2, 0.6), "correctness": (0, 0.5)})
    later = Filters(table, [1], {"confidence": (0.2, 0.7)}, former)
    assert (
        later.visible.tolist() == Filters(table, [1], {"confidence": (0.2, 0.7)}).visible.tolist()
    )
    assert later._passing[("class", 1)] is former._passing[("class", 1)]


@pytest.mark.parametrize("score", ["confidence", "correctness", "forgetting_events", "loss", "one"])
def test_a_range_of_bins_lets_pass_what_its_bins_count(score):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "label": 0,
            "confidence": rng.integers(0, 41, 500) / 40,  # on the edges of bins
            "correctness": rng.integers(2, 25, 500) / 30,
            "forgetting_events": rng.integers(0, 9, 500),
            "loss": np.where(rng.random(500) < 0.1, np.nan, rng.gamma(1, 1, 500)),
            "one": 3.0,
        }
    )
    bins = make_bins(table, score)
    n = len(bins.whole)
    assert bins.whole.sum() == table[score].notna().sum()
    for first, last in ((0, n), (0, 1), (n - 1, n), (n // 3, n // 2 + 1)):
        passing = Filters(table, ranges={score: bins.ends(first, last)}).visible
        assert passing.sum() == bins.whole[first:last].sum()
        assert bins.counts(passing)[first:last].tolist() == bins.whole[first:last].tolist()
        assert bins.counts(np.flatnonzero(passing)).tolist() == bins.counts(passing).tolist()


def test_few_values_at_equal_distances_have_a_bin_each():
    table = pd.DataFrame({"correctness": np.array([0.1, 0.4, 0.4, 0.9]), "k": [3, 5, 5, 11],
                          "z": [0.0, 0.1, 0.35, 1.0]})  # fmt: skip
    bins = make_bins(table, "correctness")  # from 0 to 1 in steps of 0.3 does not fit
    assert len(bins.whole) == 40
    bins = make_bins(table, "k")
    assert bins.centres.tolist() == [3, 5, 7, 9, 11]
    assert bins.whole.tolist() == [1, 2, 0, 0, 1]
    assert make_bins(table, "z").centres is None
