"""Images that look alike to the teacher: every pair is what the stored features say."""

import numpy as np
import pytest
from tiny import tiny_study

from kdlib.lab import Lab
from kdlib.steps import near
from kdlib.steps.near import near_duplicates, near_file, near_images
from kdlib.steps.teacher_outputs import teacher_features


def test_pairs_have_the_similarity_of_their_features_and_are_drawn(lab, capsys):
    mine = Lab(tiny_study(lab))
    table = mine.near_duplicates(similarity=0.9, most=50)
    assert len(table) == 50
    assert "pairs reach 0.9; the 50 most similar are kept" in capsys.readouterr().out
    images, caches = mine.images, {"test": mine.images.test}
    for row in table.head(5).itertuples():
        pair = []
        for split, i, label in (
            (row.split, row.example_id, row.label),
            (row.other_split, row.other_example_id, row.other_label),
        ):
            cache = caches.get(split, images.train)
            assert (i in images.validation_ids) == (split == "validation") or split == "test"
            assert cache.read("labels", np.array([i])) == [label]
            pair.append(teacher_features(mine.study, cache, np.array([i]))[0].astype(float))
        cosine = pair[0] @ pair[1] / np.linalg.norm(pair[0]) / np.linalg.norm(pair[1])
        assert cosine == pytest.approx(row.similarity, abs=1e-6)
    assert not table["same_pixels"].any()  # no two digits are equal
    assert near_file(mine.study).is_file()
    assert (mine.study.figures / "near_duplicates.png").is_file()
    pixels, captions = near_images(images, table)
    assert pixels["its twin"].shape == (near.SHOWN, 1, 8, 8)
    first = table.iloc[0]
    assert captions["image"][0] == f"{first['split']} {first['example_id']}"


def test_images_without_a_twin_give_an_empty_table(lab):
    mine = Lab(tiny_study(lab))
    assert near_duplicates(mine.study, mine.images, similarity=1.0, most=1).empty
    assert mine.near_duplicates(similarity=1.0).empty
