"""Step 01 compares the two splits before there is evidence, and a second call does as the first."""

import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from tiny import TINY, tiny_study

from kdlib.cache.agreement import open_sources
from kdlib.cache.build import build_images
from kdlib.cache.sources import array_source
from kdlib.dataset.plan import split_ids
from kdlib.repro import checks
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import cache_images, cache_sentences, open_duplicates, open_images
from kdlib.steps.probe_network import other_examples
from kdlib.study.data import Data
from kdlib.study.load import load_study


@pytest.fixture
def study(home):
    """A function: a study on a folder of PNG files or a data set of parquet files."""

    def make(**data):
        content = yaml.safe_load(TINY.read_text())
        content["data"] = {"n_validation": 2, "split_seed": 2, "shard_size": 4} | data
        path = home / "params" / "mine.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(content))
        return load_study(path)

    return make


@pytest.fixture
def pictures(home):
    """A function that writes images, each of one grey value, to <split>/<class>/<value>.png."""

    def write(split, **classes):
        for name, values in classes.items():
            folder = home / "data" / "pets" / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for value in values:
                Image.new("L", (4, 4), value).save(folder / f"{value}.png")
        return home / "data" / "pets"

    return write


def parquet(path, values, labels, names):
    import datasets

    label = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = {"image": datasets.Image(), "label": label}
    images = [Image.new("RGB", (4, 4), (v, v, v)) for v in values]
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": images, "label": labels}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)


def stops_twice(study, said):
    """Both calls stop with the sentence, and there is no evidence after either."""
    for _ in range(2):
        with pytest.raises(checks.CheckError, match=said):
            cache_images(study)
        with pytest.raises(FileNotFoundError):
            open_images(study)


def test_a_folder_whose_splits_agree_passes_and_says_so(study, pictures):
    pictures("train", cat=[1, 2, 3], dog=[4, 5, 6])
    pictures("test", cat=[7], dog=[8])
    mine = study(source="folder", folder="pets")
    assert cache_images(mine).n_classes == 2
    assert cache_sentences(mine) == [
        "agree: 6 training and 2 test images of the same 2 classes; no validation images of 1 of 2 "
        "classes: ['dog']",
        "duplicates: no two of 8 images have the same pixels",
        "reader: train, of 6 images: 6 made RGB from greyscale; test, of 2 images: 2 made RGB from "
        "greyscale",
    ]
    assert open_duplicates(mine).empty


def test_test_images_from_the_training_folder_are_refused(study, pictures):
    folder = pictures("train", cat=[1, 2, 3], dog=[4, 5, 6])
    mine = study(source="folder", folder="pets", test_folder="train")
    stops_twice(mine, r"both splits are read from the folder .*train \(study: data.test_folder\)")
    (folder / "test").symlink_to("train")
    stops_twice(study(source="folder", folder="pets"), "both splits are read from the folder")
    assert not mine.cache.exists()  # refused before a byte was built


def test_a_copy_of_the_training_folder_is_refused_until_the_copies_are_removed(study, pictures):
    folder = pictures("train", cat=[1, 2, 3], dog=[4, 5, 6])
    pictures("test", cat=[1, 7], dog=[8, 9])
    mine = study(source="folder", folder="pets")
    stops_twice(mine, "25.00% of the test images are in train too, .*: more than 1.00%")
    table = pd.read_parquet(mine.runs / "cache" / "duplicates.parquet")
    assert table["example_id"].tolist() == [0, 0]
    (folder / "test" / "cat" / "1.png").unlink()  # as the sentence says
    shutil.rmtree(mine.cache)
    assert cache_images(mine).test.n_examples == 3


def test_a_study_may_allow_more_duplicates(study, pictures):
    pictures("train", cat=[1, 2, 3], dog=[1, 5, 6])
    pictures("test", cat=[1, 7], dog=[8, 9])
    mine = study(source="folder", folder="pets")
    stops_twice(mine, "1 in train .1 with two labels., 0 in test .0 with two labels., 2 across")
    allowed = study(source="folder", folder="pets", duplicates=0.5)
    assert allowed.cache == mine.cache
    cache_images(allowed)
    counts = read_evidence(allowed.runs / "cache")["duplicates"]
    assert (counts["crossing"], counts["two_labels"], counts["limit"]) == (1, 3, 0.5)


def test_the_same_class_names_in_another_order_are_refused(study, home):
    pytest.importorskip("datasets")
    train, test = (home / "data" / "hub" / f"{s}.parquet" for s in ("train", "test"))
    parquet(train, [1, 2, 3, 4], [0, 0, 1, 1], ["a", "b"])
    parquet(test, [5, 6], [0, 1], ["b", "a"])
    mine = study(source="huggingface", huggingface={"dataset": "hub"}, n_validation=1)
    stops_twice(mine, "label 0 is 'a' in train and 'b' in test; write both splits with the same")
    parquet(test, [5, 6], [1, 0], ["a", "b"])  # as the sentence says
    assert cache_images(mine).n_classes == 2


def test_labels_from_1_on_are_refused_until_they_begin_with_0(study, home):
    pytest.importorskip("datasets")
    train, test = (home / "data" / "hub" / f"{s}.parquet" for s in ("train", "test"))
    parquet(train, [1, 2, 3, 4, 5], [1, 1, 2, 2, 2], None)
    parquet(test, [6, 7], [1, 2], None)
    mine = study(source="huggingface", huggingface={"dataset": "hub"}, n_validation=1)
    stops_twice(mine, r"class \['0'\]: no image to learn from, .* number the labels 0 to 1")
    parquet(train, [1, 2, 3, 4, 5], [0, 0, 1, 1, 1], None)
    parquet(test, [6, 7], [0, 1], None)
    shutil.rmtree(mine.cache)
    assert cache_images(mine).n_classes == 2


def test_one_split_of_a_data_set_is_not_both(study, home):
    pytest.importorskip("datasets")
    parquet(home / "data" / "hub" / "train.parquet", [1, 2, 3], [0, 1, 0], ["a", "b"])
    hub = {"dataset": "hub", "test_split": "train"}
    mine = study(source="huggingface", huggingface=hub, n_validation=1)
    stops_twice(mine, "both splits are the split 'train' of hub")


def test_a_class_of_which_all_images_are_held_out_is_refused(study, pictures):
    pictures("train", cat=[1], dog=[4, 5, 6])
    pictures("test", cat=[7], dog=[8])
    held = [0 in split_ids(np.arange(4), 2, seed)[1] for seed in range(6)]
    mine = study(source="folder", folder="pets", split_seed=held.index(True))
    stops_twice(mine, r"\['cat'\]: no image to learn from, while 1 of its images are held out")
    mine = study(source="folder", folder="pets", split_seed=held.index(False))
    assert len(cache_images(mine).train_ids) == 2
    assert "no validation images of 1 of 2 classes: ['cat']" in cache_sentences(mine)[0]


def test_a_part_without_a_class_is_refused_and_the_whole_passes(study, pictures):
    pictures("train", cat=[1, 2, 3, 4], dog=[5, 6, 7, 8])
    pictures("test", cat=[9], dog=[10])
    part = study(source="folder", folder="pets", part="1/2", n_validation=1)
    stops_twice(part, "part 1/2 of the shards holds none .study: data.part, data.shard_size.")
    assert cache_images(study(source="folder", folder="pets", n_validation=1)).n_classes == 2


def test_images_of_two_sizes_are_refused_until_one_is_given(study, pictures, home):
    pictures("train", cat=[1, 2, 3], dog=[4, 5, 6])
    folder = pictures("test", cat=[], dog=[])
    for name, value in (("cat", 7), ("dog", 8)):
        Image.new("L", (6, 6), value).save(folder / "test" / name / "1.png")
    mine = study(source="folder", folder="pets")
    stops_twice(mine, "3x4x4 .* test images 3x6x6; give one size for all .study: data.image_size")
    assert cache_images(study(source="folder", folder="pets", image_size=4)).image_shape == (
        3,
        4,
        4,
    )


def test_a_table_of_duplicates_that_is_gone_is_made_again(study, pictures):
    pictures("train", cat=[1, 2, 3], dog=[4, 5, 6])
    pictures("test", cat=[7], dog=[8])
    mine = study(source="folder", folder="pets")
    cache_images(mine)
    (mine.runs / "cache" / "duplicates.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"run `python -m kdlib step cache"):
        open_duplicates(mine)
    cache_images(mine)
    assert open_duplicates(mine).empty


def test_caches_that_were_brought_here_are_compared_too(home):
    mine = tiny_study(home, data__n_validation=1)
    for split, names in (("train", "ab"), ("test", "ba")):
        images = np.arange(4, dtype=np.uint8)[:, None, None, None] + (split == "test") * 9
        build_images(array_source("digits", split, images, np.arange(4) % 2, names),
                     mine.cache / split, 4)  # fmt: skip
    for _ in range(2):
        with pytest.raises(checks.CheckError, match="label 0 is 'a' in train and 'b' in test"):
            cache_images(mine, built=True)


def test_the_data_sets_of_probes_are_compared_too(pictures, home):
    pictures("train", cat=[1, 2, 3], dog=[4, 5, 6])
    data = Data(source="folder", folder="pets", test_folder="train", n_validation=2)
    with pytest.raises(checks.CheckError, match="both splits are read from the folder"):
        other_examples(data)
    with pytest.raises(checks.CheckError, match="the training and the test split do not belong"):
        open_sources(data)


def test_views_that_the_images_cannot_have_are_refused_before_a_network_is_trained(home):
    mine = tiny_study(home, training__augment={"grayscale": 0.2})
    with pytest.raises(ValueError, match=r"1 channel\(s\).* training.augment.grayscale"):
        cache_images(mine)
    with pytest.raises(FileNotFoundError):
        open_images(mine)
