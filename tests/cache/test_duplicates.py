"""Images with the same pixels: found in every place, counted, and left out where asked."""

from hashlib import sha256

import numpy as np
import pytest

from kdlib.cache.build import build_images
from kdlib.cache.duplicates import count_duplicates, find_duplicates, pixel_digests
from kdlib.cache.sources import array_source
from kdlib.cache.study_source import relabelled
from kdlib.study.data import Relabel

# train: 0 and 2 are one image with two labels, 1 is also test 0; 3 and 4 are one image
TRAIN, TRAIN_LABELS = [10, 20, 10, 30, 30, 40], [0, 1, 1, 0, 0, 1]
TEST, TEST_LABELS = [20, 50, 60, 60], [0, 0, 1, 0]


@pytest.fixture
def caches(tmp_path):
    def cache(split, values, labels, relabel=None):
        images = np.array(values, np.uint8)[:, None, None, None].repeat(2, 2).repeat(2, 3)
        source = array_source("plain", split, images, np.array(labels), "ab")
        source = source if relabel is None else relabelled(source, relabel)
        return build_images(source, tmp_path / f"{split}-{relabel is None}", 4)

    return cache


def test_images_with_equal_pixels_are_found_wherever_they_are(caches):
    train, test = caches("train", TRAIN, TRAIN_LABELS), caches("test", TEST, TEST_LABELS)
    table = find_duplicates(train, test, np.array([4]))
    rows = [tuple(row) for row in table.itertuples(index=False)]
    assert rows == [
        (0, "train", 0, 0), (1, "train", 1, 1), (0, "train", 2, 1), (2, "train", 3, 0),
        (2, "validation", 4, 0), (1, "test", 0, 0), (3, "test", 2, 1), (3, "test", 3, 0),
    ]  # fmt: skip
    counts = count_duplicates(table, 6, 4, None)
    assert counts["pairs"] == {"train": 2, "test": 1, "across": 1}
    assert counts["contradicting"] == {"train": 1, "test": 1, "across": 1}
    assert counts["crossing"] == 1
    assert counts["held_out"] == 1
    assert counts["two_labels"] == 6


def test_where_no_image_occurs_twice_nothing_is_found(caches):
    table = find_duplicates(
        caches("train", [1, 2], [0, 1]), caches("test", [3], [0]), np.array([0])
    )
    assert table.empty
    counts = count_duplicates(table, 2, 1, 0.5)
    assert counts["pairs"] == {"train": 0, "test": 0, "across": 0}
    assert counts["crossing"] == counts["held_out"] == counts["two_labels"] == 0
    assert counts["limit"] == 0.5


def test_labels_that_a_study_replaces_contradict_nothing(caches):
    train = caches("train", [1, 1, 2, 3], [0, 0, 1, 1], Relabel(noise=0.5, seed=2))
    labels = train.read("labels", np.array([0, 1]))
    assert labels[0] != labels[1]  # as trained on
    table = find_duplicates(train, caches("test", [4], [0]), np.array([3]))
    assert table["label"].tolist() == [0, 0]
    assert count_duplicates(table, 4, 1, None)["two_labels"] == 0


def test_a_digest_is_of_the_pixels_alone(caches):
    cache = caches("train", TRAIN, TRAIN_LABELS)
    expected = sha256(bytes([40] * 4)).digest()[:16]
    assert pixel_digests(cache)[5].tobytes() == expected
