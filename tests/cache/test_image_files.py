"""`kdlib.cache.image_files`: payloads that decode in any process, folders without labels, and
limits."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdlib.cache.encoded import Rules
from kdlib.cache.image_files import Payload, decode_images
from kdlib.cache.sources import Source
from kdlib.cache.study_source import open_source
from kdlib.study.data import Data

NAMES = ("a.png", "b/a.png", "b/c/z.bmp", "b.JPG", "d/a.webp")  # sorted as paths: b.JPG before b/


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, lossless=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ with 5 images at three depths, and what is passed over; no test/."""
    rng = np.random.default_rng(0)
    for name in (*NAMES, ".hidden.png", ".hidden/a.png", "b/.trash/x.png"):
        write_image(tmp_path / "train" / name, rng.integers(0, 256, (4, 6, 3), np.uint8))
    (tmp_path / "train/notes.txt").write_text("passed over")
    return tmp_path


def open_folder(folder: Path, split: str = "train", **options: int | bool | None) -> Source:
    options = {"labelled": False, **options}
    return open_source(Data(source="folder", folder=str(folder), n_validation=1, **options), split)


def test_an_unlabelled_folder_holds_all_images_below_it_in_the_order_of_their_paths(folder):
    source = open_folder(folder)
    assert source.class_names == ()
    assert source.parallel
    images, labels = source.read(0, 5)
    assert labels.dtype == np.int64
    assert labels.tolist() == [-1] * 5
    for image, name in zip(images, sorted(NAMES), strict=True):
        expected = np.asarray(Image.open(folder / "train" / name).convert("RGB"))
        np.testing.assert_array_equal(image, expected.transpose(2, 0, 1))


def test_images_without_labels_have_no_test_split(folder):
    with pytest.raises(ValueError, match="unknown split 'test'; known: train"):
        open_folder(folder, "test")


def test_a_link_to_a_folder_is_refused_and_one_to_a_file_is_read(folder):
    (folder / "train/e.png").symlink_to(folder / "train/a.png")
    assert open_folder(folder).n_examples == 6
    (folder / "train/b/loop").symlink_to(folder / "train")
    with pytest.raises(ValueError, match=r"b/loop is a link to a folder"):
        open_folder(folder)


def test_an_unlabelled_identity_follows_names_sizes_and_limits_but_not_the_place(folder):
    first = open_folder(folder).identity
    assert open_folder(folder, image_size=4).identity != first
    assert open_folder(folder, n_train=4).identity != first
    moved = folder / "moved"
    moved.mkdir()
    (folder / "train").rename(moved / "train")
    assert open_folder(moved).identity == first
    (moved / "train/a.png").rename(moved / "train/aa.png")
    assert open_folder(moved).identity != first


def test_n_train_takes_the_first_images_of_an_unlabelled_folder(folder):
    source = open_folder(folder, n_train=3)
    assert source.n_examples == 3
    assert source.identity["n_train"] == 3
    np.testing.assert_array_equal(source.read(0, 3)[0], open_folder(folder).read(0, 3)[0])
    with pytest.raises(ValueError, match="n_train is 6 but the training split of folder has 5 im"):
        open_folder(folder, n_train=6)


def test_n_train_is_refused_for_a_folder_sorted_by_class(folder):
    with pytest.raises(
        ValueError, match=r"those of its first classes; leave it out.*data\.n_train"
    ):
        open_folder(folder, labelled=True, n_train=3)


def decode(source: Source, payload: Payload) -> tuple[np.ndarray, np.ndarray]:
    return source.decode(payload)


def test_a_pickled_source_decodes_in_a_spawned_process(folder):
    source = open_folder(folder, image_size=4)
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        images, labels = pool.submit(decode, source, source.fetch(1, 4)).result()
    np.testing.assert_array_equal(images, source.read(1, 4)[0])
    assert labels.tolist() == [-1] * 3


def test_a_pickled_source_does_not_carry_the_paths_and_does_not_fetch(folder):
    before = len(pickle.dumps(open_folder(folder)))
    for i in range(50):
        write_image(folder / f"train/more/{i}.png", np.zeros((4, 6, 3), np.uint8))
    source = open_folder(folder)
    assert len(pickle.dumps(source)) < before + 50
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.identity, copy.n_examples) == (source.identity, source.n_examples)
    np.testing.assert_array_equal(copy.decode(source.fetch(0, 2))[0], source.read(0, 2)[0])
    with pytest.raises(RuntimeError, match="call `fetch` where it was opened"):
        copy.fetch(0, 2)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 6), (3, 2)])
def test_a_range_outside_the_split_is_not_fetched(folder, start, stop):
    with pytest.raises(IndexError, match=r"folder train; expected a range inside \[0, 5\)"):
        open_folder(folder).fetch(start, stop)


def test_an_image_that_changed_its_size_since_opening_is_named(folder):
    source = open_folder(folder)
    write_image(folder / "train/b/a.png", np.zeros((5, 9, 3), np.uint8))
    with pytest.raises(
        ValueError, match=r"example 2 of folder train, .*b/a\.png has 9x5 pixels but example 0 has"
    ):
        source.read(0, 5)


def test_bytes_that_are_no_image_are_named_by_their_example():
    with pytest.raises(ValueError) as caught:
        decode_images("toy train", (4, 4), Rules(4), Payload(7, [b"no image"], np.array([0])))
    message = "example 7 of toy train cannot be read as an image (its format is unknown); "
    assert str(caught.value) == message + "repair or remove it"


def test_test_images_may_lie_in_another_folder_than_test(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    write_image(tmp_path / "train/a/0.png", pixels[0])
    write_image(tmp_path / "val/a/0.png", pixels[1])
    options = {"folder": str(tmp_path), "n_validation": 1}
    source = open_source(Data(source="folder", test_folder="val", **options), "test")
    np.testing.assert_array_equal(source.read(0, 1)[0][0], pixels[1].transpose(2, 0, 1))
    with pytest.raises(FileNotFoundError, match=r"no folder .*/test; .*data\.test_folder"):
        open_source(Data(source="folder", **options), "test")
