"""`kdlib.cartography.imported`: scores of dynamics that another program wrote, by example id."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_study

from kdlib.cartography import Subset, random_split_ids, read_dynamics_json, select
from kdlib.repro.files import fingerprint
from kdlib.steps.cache import cache_images
from kdlib.steps.distill import make_subset

GOLD = np.array([[0.25, 0.75, 0.5, 0.5], [0.9, 0.9, 0.9, 0.9], [0.0, 0.25, 0.5, 0.75]], np.float32)
CORRECT = [0.5, 1.0, 0.25]


def entries(gold: np.ndarray = GOLD, correct: list[float] = CORRECT) -> dict[str, Any]:
    """As study A's callback writes them: scores of float32 beside the probabilities."""
    return {
        str(i): {
            "gold_label_probs": row.tolist(),
            "confidence": float(np.mean(row)),
            "variability": float(np.std(row)),
            "correctness": float(correct[i]),
            "forgetfulness": float(np.polyfit(np.arange(len(row)), row, 1)[0]),
        }
        for i, row in enumerate(gold)
    }


def written(folder: Path, content: Any) -> Path:
    path = folder / "teacher_training_dynamics.json"
    path.write_text(json.dumps(content, indent=4))
    return path


def test_scores_are_those_of_the_probabilities_by_example_id(tmp_path):
    table = read_dynamics_json(written(tmp_path, entries()), np.array([7, 2, 5]))
    assert table.index.tolist() == [2, 5, 7]
    row = table.loc[7]  # 0.25, 0.75, 0.5, 0.5: mean 0.5, squares of the deviations 2 / 16
    assert (row["confidence"], row["correctness"]) == (0.5, 0.5)
    assert row["variability"] == pytest.approx((1 / 32) ** 0.5)
    assert row["trend"] == pytest.approx(0.05)  # (-1.5 * .25 - .5 * .75 + .5 * .5 + 1.5 * .5) / 5
    assert table.loc[5, "trend"] == pytest.approx(0.25)
    assert table["region_corner"].tolist() == ["easy", "hard", "easy"]
    assert read_dynamics_json(written(tmp_path, entries())).index.tolist() == [0, 1, 2]
    short = {k: {"gold_label_probs": v["gold_label_probs"][:1]} for k, v in entries().items()}
    columns = read_dynamics_json(written(tmp_path, short)).columns
    assert list(columns) == ["confidence", "variability", "region_variability", "region_corner"]


@pytest.mark.parametrize("seed", [42, 0, None])
def test_positions_are_those_of_torch_s_random_split(seed):
    drawn = torch.Generator()
    if seed:
        drawn.manual_seed(seed)
    first, _ = torch.utils.data.random_split(range(101), [80, 21], generator=drawn)
    assert random_split_ids(101, seed).tolist() == list(first.indices)


def changed(**entry: Any) -> dict[str, Any]:
    content = entries()
    content["1"] = {k: v for k, v in (content["1"] | entry).items() if v is not None}
    return content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], r"holds list; expected an object: expected \{\"0\": \{\"gold_label_probs\""),
        ({}, r"has 0 entries, .*; expected \{\"0\""),
        ({"0": entries()["0"], "2": entries()["1"]}, "has 2 entries, among them '2'"),
        ({"0": [0.5, 0.5]}, "not every entry has gold_label_probs"),
        ({"0": {"gold_label_probs": []}}, "not every entry has gold|no list of gold_label_probs"),
        ({"0": {"gold_label_probs": 0.5}}, "no list of gold_label_probs in each"),
        (changed(gold_label_probs=None), r"not every entry has gold_label_probs in \[0, 1\]"),
        (changed(gold_label_probs=[0.9]), "the same number of them"),
        (changed(gold_label_probs=[0.9, 0.9, 0.9, 1.2]), r"gold_label_probs in \[0, 1\]"),
        (changed(gold_label_probs=[0.9, 0.9, 0.9, float("nan")]), r"gold_label_probs in \[0, 1\]"),
        (
            changed(gold_label_probs=[0.9, 0.9, 0.9, 0.5]),
            "entry 1 has confidence 0.9, and its gold",
        ),
        (changed(variability=0.25), "entry 1 has variability 0.25, and its gold_label_probs give"),
        (changed(correctness=None), r"not every entry has correctness in \[0, 1\]"),
        (changed(correctness=True), None),  # one epoch in one, as an integer of JSON would be
    ],
)
def test_another_layout_is_refused_with_what_was_expected(tmp_path, content, said):
    path = written(tmp_path, content)
    if said is None:
        assert read_dynamics_json(path)["correctness"].tolist() == CORRECT
        return
    with pytest.raises(ValueError, match=said):
        read_dynamics_json(path)


def test_ids_that_are_not_one_for_each_entry_are_refused(tmp_path):
    path = written(tmp_path, entries())
    for ids in ([1, 2], [1, 1, 2]):
        with pytest.raises(ValueError, match="expected an example id for each entry"):
            read_dynamics_json(path, np.array(ids))


def test_a_subset_of_foreign_dynamics_is_learnt_from_as_one_that_was_picked(home):
    """The example of docs/earlier-studies.md, up to the students."""
    study = tiny_study(home)
    images, rng = cache_images(study), np.random.default_rng(0)
    n = images.train.n_examples
    ids = random_split_ids(n, 42)
    gold = rng.random((len(ids), 3)).astype(np.float32)
    path = written(home, entries(gold, rng.random(len(ids)).tolist()))
    datamap = read_dynamics_json(path, ids)
    datamap = datamap[datamap.index.isin(images.train_ids)]
    assert 0 < len(datamap) < len(ids)
    n = len(images.train_ids) // 3
    chosen = select(datamap, n, "ambiguous", seed=0)
    fraction = n / len(images.train_ids)
    data = fingerprint(images.fingerprints)
    Subset(chosen, "picked_theirs", fraction, 0, None, data).save(study.picked("picked_theirs"))
    cell = study.cell(strategy="picked_theirs")
    np.testing.assert_array_equal(make_subset(study, images, cell, 1).example_ids, chosen)
