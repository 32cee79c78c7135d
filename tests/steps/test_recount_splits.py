"""What step 01 says of the splits is what the shards give, and edited evidence is seen."""

import copy

import numpy as np
import pytest
from tiny import tiny_study

from kdlib.cache.build import build_images
from kdlib.cache.duplicates import count_duplicates, find_duplicates
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source
from kdlib.dataset.plan import split_ids
from kdlib.repro.run import read_evidence
from kdlib.steps import recount_splits
from kdlib.steps.recount import Recount
from kdlib.steps.recount_splits import split_disagreements


def test_both_count_random_duplicates_alike(home):
    """Images of few grey values, so that every kind of duplicate is there."""
    study = tiny_study(home)
    rng, caches = np.random.default_rng(0), {}
    for split, n in (("train", 400), ("test", 50)):
        images = rng.integers(0, 60 if split == "train" else 90, (n, 1, 1, 1)).astype(np.uint8)
        labels = np.where(rng.random(n) < 0.9, images[:, 0, 0, 0] % 2, rng.integers(0, 2, n))
        source = array_source("digits", split, images, labels, "ab")
        caches[split] = build_images(source, study.cache / split, 60)
    recount = Recount(study)
    _, held_out = split_ids(caches["train"].example_ids, 197, 0)
    table = find_duplicates(caches["train"], caches["test"], held_out)
    counted = count_duplicates(table, 400, 50, None)
    assert counted.pop("limit") == 0.01
    assert recount_splits._duplicates(recount) == counted
    assert all(min(counted[key].values()) > 0 for key in ("pairs", "contradicting"))
    twins = table.loc[table["split"] == "test", "example_id"]
    expected = np.setdiff1d(caches["test"].example_ids, twins)
    assert np.flatnonzero(recount.distinct).tolist() == expected.tolist()
    assert 0 < len(expected) < 50
    assert min(counted["crossing"], counted["held_out"], counted["two_labels"]) > 0


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("duplicates", "crossing", 1),
        ("duplicates", "limit", 1.0),
        ("agree", "shape", {"train": [1, 8, 8], "test": [1, 9, 9]}),
        ("agree", "class_names", {"train": ["0"], "test": ["0"]}),
    ],
)
def test_evidence_that_was_edited_disagrees_with_the_shards(lab, part, name, value):
    study = tiny_study(lab)
    evidence = read_evidence(study.runs / "cache")
    assert split_disagreements(Recount(study), evidence) == []
    edited = copy.deepcopy(evidence)
    edited[part][name] = value
    [sentence] = split_disagreements(Recount(study), edited)
    assert sentence.startswith(f"step 01 recorded {part}.{name} as {value}, and the shards give ")


def test_evidence_without_the_facts_disagrees_in_each(lab):
    study = tiny_study(lab)
    assert Cache(study.cache / "train").whole
    assert len(split_disagreements(Recount(study), {})) == 11
