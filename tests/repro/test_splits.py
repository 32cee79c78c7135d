"""Rules on the two splits of a study: each fails once and passes once, on plain facts."""

import copy

import pytest

from kdlib.repro import checks

FACTS = {
    "class_names": {"train": ["cat", "dog"], "test": ["cat", "dog"]},
    "shape": {"train": [3, 4, 4], "test": [3, 4, 4]},
    "n_images": {"train": 6, "test": 2},
    "same_source": None,
    "per_class": {"train": [2, 2], "validation": [1, 1], "test": [1, 1]},
    "fewer": None,
}
HELD_OUT = {"per_class": {"train": [0, 4], "validation": [2, 0], "test": [1, 1]}}
ABSENT = {"per_class": {"train": [0, 4], "validation": [0, 2], "test": [0, 1]}}
TESTED = {"per_class": {"train": [0, 4], "validation": [0, 2], "test": [3, 1]}}


def named(train, test=None):
    n = len(train)
    counts = dict.fromkeys(("train", "validation", "test"), [1] * n)
    return {"class_names": {"train": train, "test": test or train}, "per_class": counts}


def agreed(changes):
    return checks.agree({"agree": copy.deepcopy(FACTS) | changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (named(["cat", "dog"], ["dog", "cat"]), "label 0 is 'cat' in train and 'dog' in test"),
        (named(["cat", "dog"], ["cat", "cow"]), "only in train ['dog'], only in test ['cow']"),
        (named(["cat", "dog"], ["cat", "dog", "cow"]), "only in test ['cow']; write both splits"),
        (named(["Cat", "dog"], ["cat", "dog"]), "['Cat', 'cat'] differ only in case"),
        (named(["cat", "cat ", "dog"]), "['cat', 'cat '] differ only in case, white space"),
        (named(["1", "01", "2"]), "['01', '1'] differ only in case, white space, zeros in front"),
        (named(["caf\u00e9", "cafe\u0301"]), "the form of their letters; give them one name"),
        (named(["cat"]), "there is one class only, 'cat'; a classifier needs two"),
        ({"shape": {"train": [3, 4, 4], "test": [3, 8, 8]}}, "3x4x4 .* 3x8x8; give one size"),
        ({"shape": {"train": [3, 4, 4], "test": [1, 4, 4]}}, "save both with the same channels"),
        ({"same_source": "both are x"}, "both are x; the test images must be others"),
        ({"n_images": {"train": 6, "test": 0}}, "the test split has no images"),
        (HELD_OUT, "['cat']: no image to learn from, while 2 of its images are held out; give"),
        (ABSENT, "names 2 classes; leave names without images out, and number the labels 0 to 0"),
        (TESTED, "['cat']: no image to learn from, while 3 of its images are in test; add some"),
        (ABSENT | {"fewer": "part 1/2 holds none"}, "no image to learn from; part 1/2 holds none"),
    ],
)
def test_splits_that_do_not_belong_together_fail_with_a_sentence(changes, said):
    passed, sentence = agreed(changes)
    assert not passed
    *before, after = said.split(" .* ")
    assert after in sentence
    assert all(part in sentence for part in before)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "6 training and 2 test images of the same 2 classes"),
        (named(["a", "A", "b"]), "the same 3 classes"),  # handwriting
        (named(["10", "1", "100"]), "the same 3 classes"),
        (
            {"class_names": {"train": []}, "n_images": {"train": 6}, "per_class": None},
            "6 training images without labels; there is no test split",
        ),
        (
            {"per_class": {"train": [2, 2], "validation": [2, 0], "test": [0, 2]}},
            "no validation images of 1 of 2 classes: ['dog']; no test images of 1 of 2 classes: "
            "['cat']",
        ),
    ],
)
def test_splits_that_belong_together_pass_and_what_is_unusual_is_said(changes, said):
    facts = copy.deepcopy(FACTS) | changes
    if facts["per_class"] is None:
        del facts["per_class"]
    passed, sentence = checks.agree({"agree": facts})
    assert passed
    assert said in sentence


COUNTS = {
    "n_images": {"train": 100, "test": 100},
    "pairs": {"train": 2, "test": 0, "across": 1},
    "contradicting": {"train": 1, "test": 0, "across": 0},
    "crossing": 1,
    "held_out": 1,
    "two_labels": 2,
    "limit": 0.01,
}
NONE = {"pairs": dict.fromkeys(COUNTS["pairs"], 0), "crossing": 0, "held_out": 0, "two_labels": 0}


@pytest.mark.parametrize(
    ("changes", "passed", "said"),
    [
        (NONE, True, "no two of 200 images have the same pixels"),
        ({}, True, "2 in train (1 with two labels), 0 in test (0 with two labels), 1 across (0"),
        ({}, True, "1.00% of the test images are in train too, 1.00% of all images have another"),
        ({}, True, "1 validation images are among those trained on"),
        ({"crossing": 2}, False, "2.00% of the test images are in train too"),
        ({"two_labels": 3}, False, "more than 1.00%. duplicates.parquet in the folder of step 01"),
        ({"crossing": 2, "limit": 0.02}, True, "2.00% of the test images are in train too"),
        ({"n_validation": 100}, True, "1.00% of the validation images are among those trained on"),
        ({"n_validation": 50}, False, "2.00% of the validation images are among those trained on"),
        (NONE | {"n_validation": 50}, True, "no two of 100 images have the same pixels"),
    ],
)
def test_duplicates_fail_beyond_the_share_that_the_study_allows(changes, passed, said):
    outcome = checks.duplicates({"duplicates": COUNTS | changes})
    assert outcome[0] is passed
    assert said in outcome[1]
