"""Cached images of a study: their parts and their damage."""

import shutil

import pytest
from tiny import flip, tiny_study

from kdlib.cache.shards import CacheError
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.teacher import make_teacher


@pytest.mark.parametrize(
    "files_of",
    ["cache/*/train/images-00001.npy", "cache/*/train/labels-00000.npy",
     "cache/*/test/images-00000.npy", "runs/tiny/teacher/outputs-train/logits-00002.npy"],
)  # fmt: skip
def test_a_flipped_bit_in_a_shard_stops_the_next_training(lab, files_of):
    study = tiny_study(lab)
    shutil.rmtree(study.runs / "distill")
    (path,) = lab.glob(files_of)
    flip(path)
    with pytest.raises(CacheError, match=rf"{path.name} differ from their checksums; run"):
        train_student(study, open_images(study), study.cell(objective="kd"), 0)
    assert not list(study.runs.glob("distill/**/evidence.json"))


def test_a_study_on_part_of_the_shards_learns_from_those_alone(lab):
    study = tiny_study(
        lab, data__part="1/2", data__n_validation=100, teacher__expected_accuracy=0.3
    )
    images = cache_images(study)
    assert images.train.example_ids.tolist() == list(range(600))
    assert max(images.train_ids.max(), images.validation_ids.max()) == 599
    make_teacher(study, images)
    make_datamap(study, images)
    evidence = train_student(study, images, study.cell(strategy="easy"), 0)
    assert all(check["passed"] for check in evidence["checks"])
    assert evidence["subset"]["n_examples"] == 165  # 33 % of 500
    assert open_images(study).fingerprints == images.fingerprints
