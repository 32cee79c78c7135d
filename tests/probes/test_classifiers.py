"""Probes read the test features once, and only features of the same weights."""

import dataclasses
import warnings

import numpy as np
import pytest

from kdlib.probes import classifiers
from kdlib.probes.classifiers import Features, few_shot_probe, knn_probe, linear_probe

GRID = (0.01, 0.1, 1.0, 10.0, 100.0)
A, B = "a" * 64, "b" * 64


def clouds(seed, n, split="train", n_features=8, n_classes=4, spread=1.5, weights=A):
    """Gaussian classes around centres that all splits share, with ids in no order."""
    centres = np.random.default_rng(99).normal(size=(n_classes, n_features))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, n_classes, n)
    values = centres[labels] + spread * rng.normal(size=(n, n_features))
    return Features(values.astype(np.float32), labels, rng.permutation(10 * n)[:n], split, weights)


def noise(seed, n, split):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(n, 10)).astype(np.float32)
    return Features(values, rng.integers(0, 2, n), np.arange(n), split, A)


def reordered(features, order):
    return dataclasses.replace(
        features,
        values=features.values[order],
        labels=features.labels[order],
        example_ids=features.example_ids[order],
    )


def both(train, test):
    return linear_probe(train, test, GRID, seed=0), knn_probe(train, test, k=5)


def knn_by_loops(train, test, k):
    """The rule of the docstring, one similarity at a time."""
    correct = 0
    for x, label in zip(test.values.astype(float), test.labels, strict=True):
        neighbours = []
        rows = zip(train.values.astype(float), train.labels, train.example_ids, strict=True)
        for y, y_label, y_id in rows:
            norms = np.sqrt((x**2).sum()) * np.sqrt((y**2).sum())
            similarity = round((x * y).sum() / norms, 9) if norms else 0.0
            neighbours.append((-similarity, y_id, y_label))
        votes = {}
        for negative, _, y_label in sorted(neighbours)[:k]:
            votes[y_label] = votes.get(y_label, 0) + np.exp(-negative / 0.07)
        best = max(votes.values())
        winner = min(c for c in votes if votes[c] > best * (1 - 1e-9))
        correct += winner == label
    return correct / len(test.labels)


def test_linear_probe_agrees_with_a_plain_converged_fit_at_the_chosen_c():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    train, test = clouds(0, 600), clouds(1, 1000, "test")
    result = linear_probe(train, test, GRID, seed=0)
    plain = make_pipeline(
        StandardScaler(), LogisticRegression(C=result.chosen, tol=1e-9, max_iter=10_000)
    ).fit(train.values.astype(np.float64), train.labels)
    assert result.accuracy == pytest.approx(plain.score(test.values, test.labels), abs=0.002)
    assert result.accuracy > 0.6
    assert (result.probe, result.n_train, result.n_test) == ("linear", 600, 1000)
    assert result.weights_sha256 == A
    assert result.chosen in GRID
    assert result.converged


def test_probing_noise_labels_gives_chance_on_test():
    accuracies = [
        linear_probe(noise(s, 60, "train"), noise(1000 + s, 50, "test"), GRID, seed=s).accuracy
        for s in range(20)
    ]
    # 1000 fair coins: standard deviation 0.016; the best C on these test sets would give 0.55.
    assert np.mean(accuracies) == pytest.approx(0.5, abs=0.04)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_chosen_c_does_not_depend_on_the_test_features(seed):
    train, test = clouds(seed, 200), clouds(5, 100, "test")
    flipped = dataclasses.replace(test, values=-test.values, labels=(test.labels + 1) % 4)
    chosen = [linear_probe(train, other, GRID, seed=0).chosen for other in (test, flipped)]
    assert chosen[0] == chosen[1]


def test_a_separable_problem_is_solved_by_both_probes():
    train, test = clouds(0, 200, spread=0.05), clouds(1, 100, "test", spread=0.05)
    assert [r.accuracy for r in both(train, test)] == [1.0, 1.0]


def test_the_order_of_the_examples_changes_nothing():
    train, test = clouds(0, 150), clouds(1, 100, "test")
    rng = np.random.default_rng(3)
    shuffled = reordered(train, rng.permutation(150)), reordered(test, rng.permutation(100))
    assert both(train, test) == both(*shuffled)


def test_linear_probe_ignores_the_scale_and_offset_of_a_feature_and_a_constant_one():
    train, test = clouds(0, 300), clouds(1, 300, "test")
    accuracy = linear_probe(train, test, GRID, seed=0).accuracy

    def changed(features):
        values = features.values * np.float32(64) + np.float32(8)
        constant = np.repeat(np.array([[1000.1, 0.0]], np.float32), 300, axis=0)
        return dataclasses.replace(features, values=np.hstack([values, constant]))

    other = linear_probe(changed(train), changed(test), GRID, seed=0).accuracy
    assert other == pytest.approx(accuracy, abs=0.004)


def test_each_test_example_is_judged_without_the_others():
    train, test = clouds(0, 200), clouds(1, 100, "test")
    whole = both(train, test)
    by_label = np.split(np.argsort(test.labels), [1, 20])
    parts = [both(train, reordered(test, rows)) for rows in by_label]
    for i, result in enumerate(whole):
        right = [round(part[i].accuracy * part[i].n_test) for part in parts]
        assert sum(right) == round(100 * result.accuracy)


def test_the_seed_decides_what_is_held_out_and_the_grid_has_no_order():
    train, test = clouds(0, 60, spread=3.0), clouds(1, 60, "test", spread=3.0)
    chosen = [linear_probe(train, test, GRID, seed).chosen for seed in range(8)]
    assert len(set(chosen)) > 1
    backwards = [linear_probe(train, test, GRID[::-1] + GRID, seed).chosen for seed in range(8)]
    assert backwards == chosen


def test_a_fit_cut_short_is_reported_without_a_warning(monkeypatch):
    monkeypatch.setattr("kdlib.probes.logistic.MAX_ITERATIONS", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = linear_probe(clouds(0, 100), clouds(1, 50, "test"), GRID, seed=0)
    assert not result.converged
    assert caught == []


def test_equally_good_values_of_c_give_the_smallest():
    train, test = clouds(0, 200, spread=0.05), clouds(1, 100, "test", spread=0.05)
    assert linear_probe(train, test, (100.0, 1.0, 10.0), seed=0).chosen == 1.0


@pytest.mark.parametrize("k", [1, 4, 60])
def test_knn_agrees_with_a_slow_loop_whatever_the_chunk(k, monkeypatch):
    train, test = clouds(0, 60), clouds(1, 40, "test")
    values = train.values.copy()
    values[:10] = values[10:20]  # neighbours at equal distance, of other classes
    values[20] = 0
    train = dataclasses.replace(train, values=values)
    expected = knn_by_loops(train, test, k)
    assert knn_probe(train, test, k).accuracy == expected
    monkeypatch.setattr(classifiers, "CHUNK", 7 * 60)
    assert knn_probe(train, test, k).accuracy == expected
    assert 0.25 <= expected < 1


def test_knn_ties_go_to_the_smallest_id_and_then_to_the_smallest_label():
    values = np.ones((4, 2), np.float32)
    train = Features(values, np.array([3, 2, 1, 2]), np.array([7, 5, 9, 8]), "train", A)
    test = Features(values[:1], np.array([2]), np.array([0]), "test", A)
    # Ids in order 5, 7, 8, 9 carry the labels 2, 3, 2, 1.
    assert knn_probe(train, test, 1).accuracy == 1  # id 5
    assert knn_probe(train, test, 2).accuracy == 1  # labels 2 and 3 tie
    tied = dataclasses.replace(train, labels=np.array([1, 2, 1, 2]))  # in order 2, 1, 2, 1
    assert knn_probe(tied, test, 4).accuracy == 0  # labels 1 and 2 tie, 1 wins


def test_a_nearer_neighbour_outvotes_two_far_ones():
    values = np.array([[1, 0], [0.8, 0.6], [0.8, -0.6]], np.float32)
    train = Features(values, np.array([1, 0, 0]), np.arange(3), "train", A)
    test = Features(np.array([[2, 0]], np.float32), np.array([1]), np.array([0]), "test", A)
    # exp(1 / 0.07) against 2 * exp(0.8 / 0.07): ratio exp(0.2 / 0.07) / 2 = 8.7.
    assert knn_probe(train, test, 3).accuracy == 1
    assert knn_probe(train, test, 3).chosen == 3


def test_knn_finds_what_a_full_sort_finds_among_many_and_among_hardly_different_examples():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 800)
    for values in (rng.normal(size=(800, 6)), 1 + 1e-4 * rng.normal(size=(800, 6))):
        values = values.astype(np.float32)
        train = Features(values, labels, rng.permutation(800), "train", A)
        test = Features(values[:20] + np.float32(1e-3), labels[:20], np.arange(20), "test", A)
        for k in (1, 20):
            assert knn_probe(train, test, k).accuracy == knn_by_loops(train, test, k)


def test_few_shots_are_drawn_by_class_and_more_of_them_give_a_higher_accuracy():
    train, test = clouds(0, 400), clouds(1, 500, "test")
    found = [few_shot_probe(train, test, n, 5, seed=0) for n in (1, 5, 50)]
    accuracies = [result.accuracy for result in found]
    assert 0.25 < accuracies[0] < accuracies[1] < accuracies[2]
    assert accuracies[2] < linear_probe(train, test, GRID, seed=0).accuracy + 0.03
    assert [result.n_train for result in found] == [4, 20, 200]
    assert [result.probe for result in found] == ["few_shot_1", "few_shot_5", "few_shot_50"]
    assert all(result.converged and result.weights_sha256 == A for result in found)


def test_a_few_shot_probe_is_the_mean_of_its_draws_whatever_the_order():
    train, test = clouds(0, 200), clouds(1, 100, "test")
    whole = few_shot_probe(train, test, 2, 3, seed=4)
    drawn = []
    for n_draws in (1, 2, 3):  # the sum over draws grows by what each draw adds
        drawn.append(n_draws * few_shot_probe(train, test, 2, n_draws, seed=4).accuracy)
    assert len(set(np.diff([0, *drawn]).round(9))) > 1
    assert whole.accuracy == pytest.approx(drawn[-1] / 3)
    shuffled = reordered(train, np.random.default_rng(3).permutation(200))
    assert few_shot_probe(shuffled, test, 2, 3, seed=4) == whole
    assert few_shot_probe(train, test, 2, 3, seed=5) != whole


def test_few_shots_see_only_the_examples_they_draw():
    train, test = clouds(0, 200), clouds(1, 100, "test")
    before = few_shot_probe(train, test, 1, 1, seed=0)
    order = np.argsort(train.example_ids)
    order = order[np.argsort(train.labels[order], kind="stable")]
    used = []
    for i in order:  # an example matters when its absence from the values changes the answer
        values = train.values.copy()
        values[i] = -50 * values[i]
        changed = few_shot_probe(dataclasses.replace(train, values=values), test, 1, 1, seed=0)
        if changed != before:
            used.append(train.labels[i])
    assert 1 <= len(used) <= 4
    assert len(set(used)) == len(used)


def test_few_shots_of_a_class_that_has_fewer_are_refused():
    train, test = clouds(0, 40), clouds(1, 20, "test")
    least = np.bincount(train.labels).min()
    for n_shots, n_draws in ((least + 1, 1), (0, 1), (1, 0)):
        with pytest.raises(ValueError, match=rf"expected at least one draw of 1 to {least}"):
            few_shot_probe(train, test, int(n_shots), n_draws, seed=0)


@pytest.mark.parametrize(
    "run",
    [
        lambda a, b: linear_probe(a, b, GRID, 0),
        lambda a, b: few_shot_probe(a, b, 1, 1, 0),
        lambda a, b: knn_probe(a, b, 1),
    ],
)
def test_all_probes_refuse_features_that_do_not_belong_together(run):
    train, test = clouds(0, 40), clouds(1, 20, "test")
    with pytest.raises(ValueError, match="expected the same weights: extract both splits again"):
        run(train, dataclasses.replace(test, weights_sha256=B))
    with pytest.raises(ValueError, match="both of split 'train'; expected two splits"):
        run(train, clouds(1, 20))
    with pytest.raises(ValueError, match="8 dimensions, test features 3; expected the same layer"):
        run(train, dataclasses.replace(test, values=test.values[:, :3]))
    with pytest.raises(ValueError, match="single class 2; expected at least 2"):
        run(dataclasses.replace(train, labels=np.full(40, 2)), test)


def test_invalid_features_are_refused_when_they_are_made():
    good = clouds(0, 10)

    def broken(**changes):
        return dataclasses.replace(good, **changes)

    for wrong in (np.nan, np.inf):
        values = good.values.copy()
        values[3, 2] = wrong
        with pytest.raises(ValueError, match="1 NaN or infinite values, the first in row 3"):
            broken(values=values)
    with pytest.raises(ValueError, match=r"shape \(10,\); expected \(N, D\)"):
        broken(values=good.values[:, 0])
    with pytest.raises(ValueError, match="10 rows, 9 labels, 10 example ids; expected one of"):
        broken(labels=good.labels[:9])
    with pytest.raises(ValueError, match="2 unlabelled examples"):
        broken(labels=np.array([-1, -1] + [0] * 8))
    with pytest.raises(ValueError, match="an example id twice"):
        broken(example_ids=np.zeros(10, np.int64))


def test_impossible_settings_are_refused():
    train, test = clouds(0, 40), clouds(1, 20, "test")
    for grid in ((), (0.0, 1.0), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="expected numbers > 0"):
            linear_probe(train, test, grid, seed=0)
    for k in (0, 41):
        with pytest.raises(ValueError, match=r"k in \[1, 40\]"):
            knn_probe(train, test, k)
    few = reordered(train, np.unique(train.labels, return_index=True)[1])
    with pytest.raises(ValueError, match="too few to hold a fifth out"):
        linear_probe(few, test, GRID, seed=0)
    assert linear_probe(few, test, (1.0,), seed=0).chosen == 1.0


def test_a_class_that_training_lacks_is_counted_as_wrong():
    train, test = clouds(0, 100, spread=0.05), clouds(1, 50, "test", spread=0.05)
    unseen = dataclasses.replace(test, labels=test.labels + 10)
    assert [r.accuracy for r in both(train, unseen)] == [0.0, 0.0]
