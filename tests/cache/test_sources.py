"""`kdlib.cache.sources`: stable ids, exact pixels, and errors that name the thing that is wrong."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from kdlib.cache.sources import SPLITS, Source, array_source
from kdlib.cache.study_source import open_source, relabelled
from kdlib.study.data import Data, Relabel


def write_image(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes; train has 2 cats and 1 dog, test 1 of each; 6x4 pixels, one grey, one JPEG."""
    rng = np.random.default_rng(0)
    for name in ("train/cat/b.png", "train/dog/a.bmp", "test/cat/x.png", "test/dog/y.JPG"):
        write_image(tmp_path / name, rng.integers(0, 256, (4, 6, 3), np.uint8))
    write_image(tmp_path / "train/cat/a.png", rng.integers(0, 256, (4, 6), np.uint8))
    return tmp_path


def open_folder(folder: Path, split: str = "train", image_size: int | None = None) -> Source:
    data = Data(source="folder", folder=str(folder), image_size=image_size, n_validation=1)
    return open_source(data, split)


def digits(split: str, image_size: int | None = None) -> Source:
    return open_source(Data(source="digits", image_size=image_size, n_validation=1), split)


def test_digits_are_all_of_scikit_learn_s_in_their_order_train_before_test():
    sources = [digits(split) for split in SPLITS]
    assert [s.n_examples for s in sources] == [1297, 500]
    assert all(s.image_shape == (1, 8, 8) for s in sources)
    images, labels = (
        np.concatenate(parts)
        for parts in zip(*(s.read(0, s.n_examples) for s in sources), strict=True)
    )
    reference = load_digits()
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(labels, reference.target)
    # 0 -> 0, 8 -> 127.5 -> 128 (half up), 16 -> 255
    for value, pixel in [(0, 0), (1, 16), (8, 128), (15, 239), (16, 255)]:
        assert set(images[:, 0][reference.images == value]) == {pixel}


def test_an_unknown_split_is_refused_with_the_known_names():
    with pytest.raises(ValueError, match="unknown split 'val'; known: test, train"):
        digits("val")
    with pytest.raises(ValueError, match="did you mean 'train'"):
        digits("trian")


def test_splits_and_sizes_have_different_identities_and_a_second_opening_the_same():
    identities = [digits("train").identity, digits("test").identity, digits("train", 16).identity]
    hashes = {hashlib.sha256(repr(i).encode()).hexdigest() for i in identities}
    assert len(hashes) == 3
    assert digits("train").identity == identities[0]
    assert digits("train", 8).identity == identities[0]  # the native size: the same images


@settings(deadline=None, max_examples=30)
@given(start=st.integers(0, 12), length=st.integers(0, 12), size=st.sampled_from([None, 4, 9]))
def test_a_range_is_a_slice_of_the_whole(start, length, size):
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (12, 3, 6, 5), np.uint8)
    source = array_source("toy", "train", images, np.arange(12) % 3, "abc", size)
    stop = min(start + length, 12)
    part, labels = source.read(start, stop)
    whole, all_labels = source.read(0, 12)
    assert part.shape == (stop - start, *source.image_shape)
    assert part.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(part, whole[start:stop])
    np.testing.assert_array_equal(labels, all_labels[start:stop])
    if size is None:
        np.testing.assert_array_equal(whole, images)


def test_what_is_read_can_be_changed_without_changing_the_source():
    source = digits("test")
    images, labels = source.read(0, 5)
    images[:], labels[:] = 0, -1
    again, labels = source.read(0, 5)
    assert again.any()
    assert (labels >= 0).all()


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (0, 501), (3, 2)])
def test_a_range_outside_the_split_is_refused(start, stop):
    with pytest.raises(IndexError, match=r"digits test; expected a range inside \[0, 500\)"):
        digits("test").read(start, stop)


def test_halving_an_image_averages_its_neighbours_and_a_wide_one_keeps_its_centre():
    # Two columns of 0 and two of 200 on each side are cut off; the centre is 4x4 of value 100.
    image = np.full((1, 1, 4, 8), 100, np.uint8)
    image[..., :2], image[..., 6:] = 0, 200
    part, _ = array_source("toy", "train", image, [0], ["a"], 4).read(0, 1)
    np.testing.assert_array_equal(part, np.full((1, 1, 4, 4), 100))
    # Antialiasing: fine stripes of 0 and 200 become grey; nearest would keep stripes.
    stripes = np.tile(np.array([0, 200], np.uint8), (1, 1, 16, 8))
    part, _ = array_source("toy", "train", stripes, [0], ["a"], 4).read(0, 1)
    assert part[..., 1:3].min() > 80
    assert part[..., 1:3].max() < 120


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 1, 4, 4)), [0, 0], "expected uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), [0, 0], "1 or 3 channels"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0], "one label per image"),
        (np.zeros((2, 1, 4, 4), np.uint8), [0, 2], r"example 1 .* label 2; expected \[0, 1\]"),
    ],
)
def test_unfit_arrays_are_refused(images, labels, message):
    with pytest.raises(ValueError, match=message):
        array_source("toy", "train", images, labels, ["a", "b"])


def test_a_folder_is_read_in_the_order_of_class_and_file_names_as_rgb(folder):
    source = open_folder(folder)
    assert source.class_names == ("cat", "dog")
    assert source.image_shape == (3, 4, 6)
    images, labels = source.read(0, 3)
    assert labels.tolist() == [0, 0, 1]
    for image, name in zip(images, ("cat/a.png", "cat/b.png", "dog/a.bmp"), strict=True):
        expected = np.asarray(Image.open(folder / "train" / name).convert("RGB"))
        np.testing.assert_array_equal(image, expected.transpose(2, 0, 1))
    np.testing.assert_array_equal(source.read(1, 2)[0], images[1:2])
    assert open_folder(folder, "test").read(0, 2)[1].tolist() == [0, 1]


def test_the_order_of_a_folder_does_not_depend_on_the_file_system(folder, monkeypatch):
    first = open_folder(folder)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    again = open_folder(folder)
    assert again.class_names == first.class_names
    assert again.identity == first.identity
    np.testing.assert_array_equal(again.read(0, 3)[0], first.read(0, 3)[0])


def test_a_relative_folder_is_looked_up_in_the_data_folder(folder, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(folder.parent))
    assert open_folder(Path(folder.name)).identity == open_folder(folder).identity


def test_reading_a_range_of_a_folder_decodes_nothing_else(folder):
    (folder / "train/dog/a.bmp").write_bytes(b"not an image")
    source = open_folder(folder, image_size=4)
    assert source.read(0, 2)[0].shape == (2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"a\.bmp cannot be read as an image"):
        source.read(2, 3)


def test_a_folder_s_identity_follows_names_sizes_and_image_size(folder):
    first = open_folder(folder).identity
    (folder / "train/cat/.hidden.png").write_bytes(b"")
    (folder / "train/cat/notes.txt").write_text("passed over")
    assert open_folder(folder).identity == first
    assert open_folder(folder, image_size=4).identity != first
    with open(folder / "train/dog/a.bmp", "ab") as file:
        file.write(b"longer")
    longer = open_folder(folder).identity
    assert longer != first
    (folder / "train/cat/a.png").rename(folder / "train/cat/c.png")
    assert open_folder(folder).identity not in (first, longer)


def test_images_of_different_sizes_need_an_image_size(folder):
    write_image(folder / "train/dog/z.png", np.zeros((5, 9, 3), np.uint8))
    with pytest.raises(ValueError, match=r"z\.png has 9x5 .*example 0 has 6x4.*data\.image_size"):
        open_folder(folder).read(0, 4)
    assert open_folder(folder, image_size=8).read(0, 4)[0].shape == (4, 3, 8, 8)


def test_a_cut_image_is_named(folder):
    path = folder / "train/cat/b.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"b\.png cannot be read as an image") as caught:
        open_folder(folder).read(0, 3)
    assert caught.value.__suppress_context__


def test_an_image_of_more_than_8_bits_is_refused_instead_of_clipped(folder):
    write_image(folder / "train/cat/deep.png", np.full((4, 6), 40000, np.uint16))
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits"):
        open_folder(folder).read(0, 4)


def test_an_unfit_layout_is_refused_with_the_folder_s_name(folder):
    (folder / "train/empty").mkdir()
    with pytest.raises(ValueError, match=r"only in train \['empty'\], only in test \[\]"):
        open_folder(folder)
    (folder / "test/empty").mkdir()
    with pytest.raises(ValueError, match=r"train/empty has no image"):
        open_folder(folder)
    write_image(folder / "train/empty/inner/a.png", np.zeros((4, 6, 3), np.uint8))
    with pytest.raises(ValueError, match="inner is a folder inside a class folder"):
        open_folder(folder)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere/train; expect"):
        open_folder(folder / "nowhere")
    (folder / "bare/train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no class folders"):
        open_folder(folder / "bare")


@pytest.mark.parametrize("image_size", [None, 4])
def test_n_train_takes_the_first_training_images_and_leaves_the_test_split(image_size):
    whole = digits("train", image_size)
    data = Data(source="digits", image_size=image_size, n_train=30, n_validation=1)
    part = open_source(data, "train")
    assert part.n_examples == 30
    for ours, theirs in zip(part.read(0, 30), whole.read(0, 30), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    changed = {k for k in part.identity if part.identity[k] != whole.identity.get(k)}
    assert changed == {"sha256", "n_train"}
    assert part.identity["n_train"] == 30
    assert open_source(data, "test").identity == digits("test", image_size).identity


def test_more_training_images_than_there_are_is_refused_with_both_numbers():
    data = Data(source="digits", n_train=1298, n_validation=1)
    with pytest.raises(ValueError, match=r"n_train is 1298 but the training split .* has 1297 im"):
        open_source(data, "train")


def test_identities_are_those_of_the_caches_that_exist():
    # any change here would refuse all of them
    images = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    assert array_source("toy", "train", images, [0, 1], "ab", 2).identity == {
        "source": "toy",
        "split": "train",
        "sha256": "83b21575266081b643cd882b3d25ae9fe321470f4815a03a05862019699b4244",
        "image_size": 2,
        "resize": "largest centred square, bilinear with antialiasing",
    }


@pytest.mark.parametrize("image_size", [None, 4])
def test_arrays_are_decoded_from_a_payload_of_their_range_alone(image_size):
    source = digits("train", image_size)
    assert not source.parallel
    payload = source.fetch(5, 9)
    assert len(pickle.dumps(payload)) < 1000
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 1000
    for ours, theirs in zip(copy.decode(payload), source.read(5, 9), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def write_mnist(root: Path, n: int) -> tuple[np.ndarray, np.ndarray]:
    """MNIST's own file format (big-endian sizes, then bytes), with n random images per split."""
    rng = np.random.default_rng(2)
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (n, 28, 28), np.uint8)
        labels = rng.integers(0, 10, n).astype(np.uint8)
        for kind, magic, array in (("images-idx3", 2051, images), ("labels-idx1", 2049, labels)):
            header = np.array([magic, *array.shape], ">i4").tobytes()
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + array.tobytes())
    return images, labels


def test_mnist_is_read_from_the_data_folder_without_network(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    expected, expected_labels = write_mnist(tmp_path, 7)
    source = open_source(Data(source="mnist", n_validation=1), "test")
    assert (source.n_examples, source.image_shape) == (7, (1, 28, 28))
    images, labels = source.read(2, 7)
    np.testing.assert_array_equal(images[:, 0], expected[2:])
    np.testing.assert_array_equal(labels, expected_labels[2:])


def write_cifar100(root: Path, split: str, pixels: np.ndarray, fine: list[int]) -> list[str]:
    """The archive's files of one split, with coarse labels beside the fine ones; fine names."""
    folder = root / "cifar-100-python"
    folder.mkdir(exist_ok=True)
    coarse = [label // 5 for label in fine]
    content = {"data": pixels, "fine_labels": fine, "coarse_labels": coarse}
    (folder / split).write_bytes(pickle.dumps(content))
    names = [f"class {c}" for c in range(100)]
    meta = {"fine_label_names": names, "coarse_label_names": names[:20]}
    (folder / "meta").write_bytes(pickle.dumps(meta))
    return names


def write_cifar10(root: Path, split: str, pixels: np.ndarray, labels: list[int]) -> list[str]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    (folder / f"{split}_batch").write_bytes(pickle.dumps({"data": pixels, "labels": labels}))
    names = [f"class {c}" for c in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    return names


@pytest.mark.parametrize(
    ("name", "write", "labels"),
    [("cifar10", write_cifar10, [3, 0, 9, 1]), ("cifar100", write_cifar100, [42, 0, 99, 7])],
)
def test_cifar_keeps_its_planes_and_its_fine_classes(tmp_path, monkeypatch, name, write, labels):
    from torchvision.datasets import CIFAR10

    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    rng = np.random.default_rng(3)
    pixels = rng.integers(0, 256, (4, 3072), np.uint8)  # red, green, blue plane of each image
    names = write(tmp_path, "test", pixels, labels)
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)  # of CIFAR100 too
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    source = open_source(Data(source=name, n_validation=1), "test")
    images, read = source.read(0, 4)
    assert source.class_names == tuple(names)
    assert read.tolist() == labels
    np.testing.assert_array_equal(images, pixels.reshape(4, 3, 32, 32))


@pytest.mark.parametrize("source", ["mnist", "cifar10", "cifar100"])
def test_absent_data_without_network_give_one_clear_sentence(source, tmp_path, monkeypatch):
    from torchvision import datasets

    def fail(self) -> None:
        raise OSError("<urlopen error no\n network>")

    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    monkeypatch.setattr(getattr(datasets, source.upper()), "download", fail)
    with pytest.raises(FileNotFoundError) as caught:
        open_source(Data(source=source, n_validation=1), "train")
    message = str(caught.value)
    for part in (source, str(tmp_path), "<urlopen error no network>", "KDLIB_DATA"):
        assert part in message
    assert "\n" not in message
    assert caught.value.__suppress_context__


def test_a_damaged_file_is_never_unpickled(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    monkeypatch.setattr(CIFAR10, "download", lambda self: None)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list, ("batches.meta", "")):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(FileNotFoundError, match="cifar10 is missing or damaged"):
        open_source(Data(source="cifar10", n_validation=1), "train")
    assert not (tmp_path / "exploded").exists()


def test_cut_mnist_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path))
    write_mnist(tmp_path, 7)
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FileNotFoundError, match="mnist is missing or damaged"):
        open_source(Data(source="mnist", n_validation=1), "train")


# --- other labels ----------------------------------------------------------------------------


def labelled(n=5000, n_classes=10):
    rng = np.random.default_rng(1)
    images = np.zeros((n, 1, 2, 2), np.uint8)
    names = [str(c) for c in range(n_classes)]
    return array_source("blank", "train", images, rng.integers(0, n_classes, n), names)


def test_drawn_noise_replaces_about_its_share_evenly_and_keeps_the_old_labels():
    source = relabelled(labelled(), Relabel(noise=0.4, seed=3))
    _, labels, own = source.read(0, 5000)
    np.testing.assert_array_equal(own, labelled().read(0, 5000)[1])
    assert source.columns == ("images", "labels", "original_labels")
    assert abs((labels != own).mean() - 0.4) < 0.03  # s.d. 0.007
    shifts = np.bincount((labels - own)[labels != own] % 10, minlength=10)
    assert shifts[0] == 0
    assert abs(shifts[1:] - shifts.sum() / 9).max() < 5 * np.sqrt(shifts.sum() / 9)


def test_a_drawn_label_depends_on_seed_and_id_alone():
    source = relabelled(labelled(), Relabel(noise=0.4, seed=3))
    whole = source.read(0, 5000)[1]
    np.testing.assert_array_equal(source.read(700, 900)[1], whole[700:900])
    other = relabelled(labelled(), Relabel(noise=0.4, seed=4)).read(0, 5000)[1]
    assert (other != whole).mean() > 0.4
    more = relabelled(labelled(), Relabel(noise=0.6, seed=3)).read(0, 5000)[1]
    own = labelled().read(0, 5000)[1]
    np.testing.assert_array_equal(more[whole != own], whole[whole != own])  # more noise, not other


def test_noise_to_the_next_class_goes_nowhere_else():
    _, labels, own = relabelled(labelled(), Relabel(noise=1.0, kind="next_class")).read(0, 5000)
    np.testing.assert_array_equal(labels, (own + 1) % 10)


def test_labels_of_a_file_replace_those_of_the_source(home):
    (home / "data").mkdir()
    given = np.arange(5000) % 10
    arrays = {"people": given, "floats": given / 2, "few": given[:9], "big": given + 9}
    arrays |= {"many": np.append(given, 0), "objects": given.astype(object)}
    np.savez(home / "data" / "mine.npz", **arrays)
    (home / "data" / "cut.npz").write_bytes((home / "data" / "mine.npz").read_bytes()[:500])
    np.save(home / "data" / "one.npy", given)
    for name in ("cut.npz", "one.npy"):
        with pytest.raises(ValueError, match=rf"{name} is no whole \.npz file"):
            relabelled(labelled(), Relabel(file=name, key="people"))
    source = relabelled(labelled(), Relabel(file="mine.npz", key="people"))
    np.testing.assert_array_equal(source.read(3, 70)[1], given[3:70])
    for key, message in [
        ("peopl", "no array 'peopl'; did you mean 'people'"),
        ("floats", r"floats .* is float64"),
        ("many", r"many .* \(5001,\); expected one integer for each of 5000"),
        ("objects", r"no whole \.npz file of plain arrays"),
        ("few", r"few .* \(9,\); expected one integer for each of 5000"),
        ("big", r"example 1 of big .* has label 10; expected \[0, 9\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            relabelled(labelled(), Relabel(file="mine.npz", key=key))
    limited = relabelled(labelled(), Relabel(file="mine.npz", key="many"), first=True)
    np.testing.assert_array_equal(limited.read(0, 9)[1], given[:9])
    with pytest.raises(FileNotFoundError, match=r"none\.npz are not there; put the file into"):
        relabelled(labelled(), Relabel(file="none.npz", key="people"))


def test_other_labels_are_another_identity():
    source, noise = labelled(), Relabel(noise=0.4)
    identities = [source.identity] + [
        relabelled(source, r).identity
        for r in (noise, Relabel(noise=0.5), Relabel(noise=0.4, seed=1))
    ]
    assert len({str(i) for i in identities}) == 4
