"""Images that stand for a selection."""

import numpy as np

from kdlib.cartography.representatives import representatives, sample


def clusters(rng, centres, n):
    labels = rng.integers(0, len(centres), n)
    return labels, centres[labels] + rng.normal(0, 0.05, (n, centres.shape[1]))


def test_each_cluster_is_stood_for_by_the_example_in_its_middle():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [9, 0], [0, 9], [9, 9]])
    labels, features = clusters(rng, centres, 80)
    ids = np.arange(80) * 7
    table = representatives(ids, features, labels, n=4)
    assert table["label"].tolist() == [0, 1, 2, 3]
    assert table["size"].tolist() == np.bincount(labels).tolist()
    for row in table.itertuples():
        members = np.flatnonzero(labels == row.label)
        middle = features[members].mean(axis=0)
        nearest = members[np.linalg.norm(features[members] - middle, axis=1).argmin()]
        assert row.example_id == ids[nearest]
        assert row.labels == {row.label: row.size}


def test_a_group_counts_its_classes_and_is_named_by_the_most_frequent():
    features = np.array([[0.0], [0.1], [0.2], [7.0]])
    table = representatives(np.arange(4), features, np.array([5, 2, 5, 1]), n=2)
    assert table["labels"].tolist() == [{1: 1}, {5: 2, 2: 1}]
    assert table["size"].tolist() == [1, 3]


def test_there_are_no_more_groups_than_different_images():
    features = np.zeros((5, 3))
    assert len(representatives(np.arange(5), features, np.zeros(5, np.int64))) == 1
    assert representatives(np.arange(0), features[:0], np.zeros(0, np.int64)).empty


def test_a_sample_is_the_same_for_the_same_ids():
    ids = np.arange(100) * 3
    few = sample(ids, 10)
    assert len(np.unique(few)) == 10
    assert np.array_equal(few, np.sort(few))
    assert np.array_equal(few, sample(ids.copy(), 10))
    assert np.array_equal(sample(ids, 1000), ids)
