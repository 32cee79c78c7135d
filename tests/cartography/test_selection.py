"""Strategies and ties."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cartography.selection import select
from kdlib.dataset.plan import budget
from kdlib.study.selections import CCS, D2, SCORES, SELECTIONS, DualBeta, Herding, Mixture, Ranking


def table_of(n, seed=0, ties=True):
    """A datamap whose scores take few values, so that nearly every cut goes through a tie."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(10 * n + 1, n, replace=False)
    columns = {name: rng.random(n) for name in SCORES}
    if ties:
        columns = {name: np.round(values, 1) for name, values in columns.items()}
    columns["label"], columns["never_learned"] = rng.integers(0, 3, n), rng.random(n) < 0.2
    return pd.DataFrame(columns, index=pd.Index(ids, name="example_id", dtype=np.int64))


def features_of(table):
    """Features that belong to the ids, in the order of the table's rows."""
    return np.stack([np.sin(table.index), np.cos(3 * table.index)], axis=1)


# Four examples, in (variability, confidence):
#   id 1 (0.0, 1.0)  id 2 (0.5, 0.5)  id 3 (0.1, 0.1)  id 4 (0.4, 0.9)
SMALL = pd.DataFrame(
    {"variability": [0.0, 0.5, 0.1, 0.4], "confidence": [1.0, 0.5, 0.1, 0.9]},
    index=pd.Index([1, 2, 3, 4], name="example_id"),
)


@pytest.mark.parametrize(
    ("strategy", "order"),
    [
        # squared distances to (0, 1): 0, 0.50, 0.82, 0.17
        ("easy", [1, 4, 2, 3]),
        ("ambiguous", [2, 4, 3, 1]),
        # to (1, 0.5): 1.25, 0.25, 0.97, 0.52
        ("ambiguous_corner", [2, 4, 3, 1]),
        # to (0, 0): 1, 0.50, 0.02, 0.97
        ("hard", [3, 2, 4, 1]),
        ("confidence_top", [1, 4, 2, 3]),
        ("confidence_bottom", [3, 2, 4, 1]),
    ],
)
def test_strategies_take_examples_in_the_order_worked_by_hand(strategy, order):
    for n in range(5):
        assert select(SMALL, n, strategy, seed=0).tolist() == sorted(order[:n])


# Never forgotten, forgotten twice, never learned (which has no forgetting events either).
FORGOTTEN = pd.DataFrame(
    {"forgetting_events": [0, 2, 0], "never_learned": [False, False, True], "label": [0, 1, 1]},
    index=pd.Index([1, 2, 3], name="example_id"),
)


@pytest.mark.parametrize(
    ("rule", "order"),
    [
        ("forgetting_events_top", [3, 2, 1]),
        ("forgetting_events_bottom", [1, 2, 3]),
        (Ranking(kind="forgetting_events_top", balanced=True), [None, (1, 3)]),
        (Mixture(shares={"forgetting_events_top": 1.0}), [3, 2, 1]),
        (D2(neighbours=1, gamma_forward=99.0, gamma_reverse=99.0), [3, 2, 1]),
        (CCS(score="forgetting_events", cutoff=0.4, n_strata=1), [None, (1, 2)]),
    ],
)
def test_an_example_never_learned_is_harder_than_any_that_was_forgotten(rule, order):
    features = np.array([[0.0], [9.0], [99.0]])
    for n, chosen in enumerate(order, 1):
        expected = chosen if isinstance(chosen, tuple) else sorted(order[:n])
        if chosen is not None:
            for seed in range(8):  # no tie to decide
                assert select(FORGOTTEN, n, rule, seed, features).tolist() == list(expected)


def test_forgetting_events_without_those_never_learned_order_nothing():
    table = FORGOTTEN.drop(columns="never_learned")
    with pytest.raises(ValueError, match="together with the column never_learned, which the table"):
        select(table, 1, "forgetting_events_top", seed=0)


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from(SELECTIONS),
    n_examples=st.integers(1, 40),
    share=st.sampled_from(["0", "1/N", "third", "N-1", "1"]),
    seed=st.integers(0, 1000),
)
def test_every_strategy_returns_exactly_its_budget_of_distinct_ids(
    strategy, n_examples, share, seed
):
    fraction = {
        "0": 0.0,
        "1/N": 1 / n_examples,
        "third": 0.33,
        "N-1": (n_examples - 1) / n_examples,
        "1": 1.0,
    }[share]
    table = table_of(n_examples, seed)
    n = n_examples if strategy == "full" else budget(n_examples, fraction)
    chosen = select(table, n, strategy, seed, features_of(table))
    assert chosen.dtype == np.int64
    assert len(chosen) == n
    assert (np.diff(chosen) > 0).all()
    assert set(chosen) <= set(table.index)


@settings(max_examples=60, deadline=None)
@given(
    strategy=st.sampled_from([name for name in SELECTIONS if name != "full"]),
    n=st.integers(0, 30),
    seed=st.integers(0, 1000),
)
def test_permuting_the_data_set_permutes_the_selection(strategy, n, seed):
    table = table_of(30, seed)
    order = np.random.default_rng(seed + 1).permutation(30)
    chosen = select(table, n, strategy, seed, features_of(table))
    # The rows in another order: the same ids are chosen.
    again = select(table.iloc[order], n, strategy, seed, features_of(table.iloc[order]))
    np.testing.assert_array_equal(again, chosen)
    # Other examples appended: a tie between two examples is decided as before.
    both = table.index[:2]
    alone = select(table.assign(aum=0.0).loc[both], 1, "aum_top", seed)
    others = table.index.difference(both)
    crowd = table.assign(aum=np.where(table.index.isin(others), -1.0, 0.0))
    np.testing.assert_array_equal(select(crowd, 1, "aum_top", seed), alone)


RULES = [
    Mixture(shares={"easy": 0.5, "hard": 0.3, "aum_top": 0.2}),
    Mixture(shares={"easy": 1.0}, balanced=True),
    CCS(score="loss", cutoff=0.3, n_strata=5),
    CCS(balanced=True),
    D2(score="aum", neighbours=3, gamma_forward=0.5, gamma_reverse=0.0),
    Herding(balanced=True),
    DualBeta(concentration=5.0, exponent=2.0, balanced=True),
    Ranking(kind="hard", balanced=True),
]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(RULES), st.integers(0, 30), st.integers(0, 1000))
def test_a_rule_returns_exactly_its_budget_whatever_the_order_of_rows(rule, n, seed):
    table = table_of(30, seed)
    if getattr(rule, "cutoff", None) == 0.3 and n > 21:  # nine of thirty are cut off
        with pytest.raises(ValueError, match="cutoff"):
            select(table, n, rule, seed)
        return
    chosen = select(table, n, rule, seed, features_of(table))
    assert len(np.unique(chosen)) == len(chosen) == n
    assert set(chosen) <= set(table.index)
    other = table.iloc[::-1]
    np.testing.assert_array_equal(select(other, n, rule, seed, features_of(other)), chosen)
    if rule.balanced:
        sizes = table["label"].value_counts()
        taken = table.loc[chosen, "label"].value_counts().reindex(sizes.index, fill_value=0)
        spare = taken[taken < sizes]  # classes that could have given more
        assert spare.empty or taken.max() - spare.min() <= 1


def test_a_mixture_takes_its_shares_though_its_regions_overlap():
    # easy: 1 4 2 3; ambiguous: 2 4 3 1. Of two each, in turns: easy 1, ambiguous 2, easy 4, then
    # ambiguous the next that is free, 3.
    rule = Mixture(shares={"easy": 0.5, "ambiguous": 0.5})
    assert select(SMALL, 2, rule, seed=0).tolist() == [1, 2]
    assert select(SMALL, 3, rule, seed=0).tolist() == [1, 2, 4]


def test_moderate_takes_the_middle_of_the_distances_to_the_class():
    table = SMALL.assign(class_distance=[0.9, 0.2, 0.5, 0.1])  # in order: 4 2 3 1
    assert select(table, 2, "moderate", seed=0).tolist() == [2, 3]


@pytest.mark.parametrize(
    ("strategy", "columns", "message"),
    [
        ("herding", [], "needs the teacher's features"),
        ("k_center", [], "needs the teacher's features"),
        ("random_balanced", ["label"], "needs the column 'label'"),
        ("moderate", ["class_distance"], "needs the score 'class_distance'"),
        ("grand_top", ["grand"], r"it needs dynamics\.gradient_epoch in the study"),
        ("tdds_top", ["tdds"], r"it needs dynamics\.logits: true in the study"),
    ],
)
def test_a_rule_names_the_missing_column_or_features(strategy, columns, message):
    with pytest.raises(ValueError, match=message):
        select(table_of(9).drop(columns=columns), 3, strategy, 0)


def test_features_must_be_one_row_for_each_example():
    with pytest.raises(ValueError, match=r"features have shape \(8, 2\); expected \(9, D\)"):
        select(table_of(9), 3, "herding", 0, np.zeros((8, 2)))


def test_ties_depend_on_the_seed_and_not_on_the_position():
    table = table_of(200).assign(aum=0.0)
    chosen = {seed: select(table, 100, "aum_top", seed) for seed in range(20)}
    assert all(not np.array_equal(chosen[0], chosen[seed]) for seed in range(1, 20))
    position = table.index.get_indexer(np.concatenate(list(chosen.values())))
    # 20 samples of 100 from the positions 0..199 without replacement: mean 99.5, standard error
    # 57.7 / sqrt(100) * sqrt(1 / 2) / sqrt(20) = 0.9.
    assert abs(position.mean() - 99.5) < 5


def test_random_is_uniform_and_seeds_are_unrelated():
    table = table_of(100, ties=False)
    counts = pd.Series(0, index=table.index)
    overlaps, previous = [], None
    for seed in range(400):
        chosen = select(table, 30, "random", seed)
        counts[chosen] += 1
        if previous is not None:
            overlaps.append(len(np.intersect1d(chosen, previous)))
        previous = chosen
    # Each id is drawn Binomial(400, 0.3): mean 120, s.d. 9.2; the statistic is about chi-square
    # with 99 degrees of freedom once scaled by (1 - 0.3): mean 99, s.d. 14.
    statistic = ((counts - 120) ** 2 / 120 / 0.7).sum()
    assert 50 < statistic < 160
    # Two independent draws of 30 from 100 share 9 on average, s.d. 2.5; 399 pairs: s.e. 0.13.
    assert abs(np.mean(overlaps) - 9) < 0.6


def test_smaller_random_subset_lies_within_a_larger_one():
    table = table_of(50)
    small, large = (select(table, n, "random", 3) for n in (10, 25))
    assert set(small) < set(large)


def test_unknown_strategy_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'ambiguous'"):
        select(SMALL, 1, "ambigous", 0)


@pytest.mark.parametrize("n", [-1, 5])
def test_budget_beyond_the_data_set_is_refused(n):
    with pytest.raises(ValueError, match=rf"budget is {n} examples; expected \[0, 4\]"):
        select(SMALL, n, "random", 0)


def test_full_with_a_smaller_budget_is_refused():
    assert select(SMALL, 4, "full", 0).tolist() == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="all 4 examples"):
        select(SMALL, 3, "full", 0)


def test_scores_that_are_absent_or_nan_are_refused():
    with pytest.raises(ValueError, match=r"'tdds'.*dynamics\.logits"):
        select(SMALL, 1, "tdds_top", 0)
    broken = SMALL.assign(variability=[0.0, np.nan, 0.1, 0.2])
    for strategy in ("easy", "hard", "ambiguous", "ambiguous_corner", "variability_bottom"):
        with pytest.raises(ValueError, match=r"variability is NaN .* 1 of 4 .* id 2"):
            select(broken, 1, strategy, 0)
    assert len(select(broken, 2, "random", 0)) == 2


def test_double_or_fractional_ids_are_refused():
    for index in ([1, 1, 2, 3], [0.5, 1.0, 2.0, 3.0]):
        with pytest.raises(ValueError, match="distinct int64"):
            select(SMALL.set_axis(pd.Index(index)), 1, "random", 0)
