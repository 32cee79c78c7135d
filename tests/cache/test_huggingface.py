"""`kdlib.cache.huggingface`: the stated split and columns or an error that lists what there is,
the same bytes
from a stream as at random, and no network for local files."""

import json
import pickle
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cache.parquet_sets import BOTH, STRUCT, open_hub, pixels, png, write_parquet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdlib.cache.build import build_images
from kdlib.cache.image_files import Payload
from kdlib.cache.parquet import ParquetRows
from kdlib.cache.shards import Cache

pytestmark = pytest.mark.usefixtures("no_network")


@BOTH
def test_local_parquet_files_are_read_in_the_order_of_their_names(parquet, streaming):
    source = open_hub(parquet, streaming=streaming)
    assert (source.n_examples, source.image_shape) == (11, (3, 4, 6))
    assert source.class_names == ("a", "b", "c")
    assert source.parallel
    images, labels = source.read(0, 11)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    np.testing.assert_array_equal(images, pixels(11).transpose(0, 3, 1, 2))
    assert labels.tolist() == [i % 3 for i in range(11)]
    assert open_hub(parquet, "test", streaming=streaming).read(0, 3)[1].tolist() == [2, 1, 0]


@pytest.mark.parametrize("n_train", [None, 7])
def test_streaming_changes_neither_images_nor_labels_nor_identity(parquet, n_train):
    table, stream = (
        open_hub(parquet, streaming=s, n_train=n_train, image_size=4) for s in (False, True)
    )
    assert table.identity == stream.identity
    assert table.n_examples == stream.n_examples == (n_train or 11)
    for ours, theirs in zip(table.read(2, 7), stream.read(2, 7), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(ranges=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=5))
def test_a_stream_gives_any_range_in_order_with_gaps_and_going_back(parquet, ranges):
    source = open_hub(parquet, streaming=True, image_size=4)
    whole, all_labels = source.read(0, 11)
    for start, stop in map(sorted, ranges):
        images, labels = source.read(start, stop)
        np.testing.assert_array_equal(images, whole[start:stop])
        np.testing.assert_array_equal(labels, all_labels[start:stop])


def test_ascending_ranges_open_the_stream_once_and_a_gap_is_passed_over(parquet, row_groups):
    """Train: 5 + 6 images in two files of row groups of 2."""
    source = open_hub(parquet, streaming=True, image_size=4)
    for start, stop in ((3, 4), (4, 5), (5, 6)):
        source.fetch(start, stop)
    assert row_groups == [[1, 2], [0, 1, 2]]  # both files, row group 0 of the first left out
    source.fetch(9, 11)
    assert row_groups[2:] == [[2]]
    source.fetch(2, 3)  # going back
    assert row_groups[3:] == [[1, 2]]


@pytest.fixture
def five_files(tmp_path: Path) -> Path:
    """30 images in 5 files of row groups of 2."""
    images = [png(image) for image in pixels(30)]
    for i in range(5):
        path = tmp_path / f"set/train-{i:05d}-of-00005.parquet"
        write_parquet(path, images[6 * i : 6 * i + 6], [0, 1, 2] * 2, row_group_size=2)
    return tmp_path / "set"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the parquet files whose rows are asked for."""
    names, whole = [], ParquetRows._opened

    def _opened(self: ParquetRows, path: str) -> object:
        names.append(Path(path).name[:11])
        return whole(self, path)

    monkeypatch.setattr(ParquetRows, "_opened", _opened)
    return names


def test_a_part_opens_no_file_before_its_own_and_parts_make_the_bytes_of_a_whole(
    five_files, opened, tmp_path
):
    whole = build_images(open_hub(five_files, streaming=True, image_size=4), tmp_path / "whole", 5)
    opened.clear()
    for part in ((3, 3), (1, 3), (2, 3)):  # shards 4-5, 0-1, 2-3
        source = open_hub(five_files, streaming=True, image_size=4)
        build_images(source, tmp_path / "parts", 5, part)
    assert opened == [
        "train-00003", "train-00004", "train-00000", "train-00001", "train-00001", "train-00002",
        "train-00003",
    ]  # fmt: skip
    assert Cache(tmp_path / "parts").fingerprint == whole.fingerprint
    for path in sorted((tmp_path / "whole").glob("[ilr]*-0*")):  # images, labels, what was read
        assert (tmp_path / "parts" / path.name).read_bytes() == path.read_bytes()


def test_a_resumed_build_opens_no_file_before_the_one_it_stopped_in(five_files, opened, tmp_path):
    source = open_hub(five_files, streaming=True, image_size=4)

    def fetch(start: int, stop: int) -> Payload:
        if start >= 20:
            raise InterruptedError
        return source.fetch_range(start, stop)

    with pytest.raises(InterruptedError):
        build_images(replace(source, fetch_range=fetch), tmp_path / "cache", 5)
    opened.clear()
    source = open_hub(five_files, streaming=True, image_size=4)
    assert build_images(source, tmp_path / "cache", 5).whole
    assert opened == ["train-00003", "train-00004"]


def test_rows_of_files_of_unknown_length_are_found_by_their_metadata(five_files, row_groups):
    import datasets

    paths, features = sorted(map(str, five_files.iterdir())), {"text": datasets.Value("string")}
    features["label"] = datasets.Value("int64")
    rows = ParquetRows(paths, (), features, "here")
    assert [row["label"] for row in rows.since(25)] == [1, 2, 0, 1, 2]
    assert row_groups == [[0, 1, 2]]  # of the last file; of the others the metadata alone
    assert list(rows.since(30)) == []
    Path(paths[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"train-00001-of-00005\.parquet of here cannot be "
    ):
        list(ParquetRows(paths, (), features, "here").since(25))


def test_a_process_may_end_with_a_stream_half_read(parquet):
    code = (
        "from kdlib.cache.study_source import open_source\n"
        "from kdlib.study.data import Data, HuggingFace\n"
        f"hub = HuggingFace(dataset={str(parquet)!r}, streaming=True)\n"
        "data = Data(source='huggingface', huggingface=hub, n_validation=1)\n"
        "source = open_source(data, 'train')\n"
        "print(len(source.fetch(0, 3).images))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")


def test_a_stream_that_ends_early_says_where(tmp_path):
    path = tmp_path / "set" / "train.parquet"
    write_parquet(path, [png(image) for image in pixels(6)], [0] * 6)
    source = open_hub(path.parent, streaming=True, image_size=4)
    write_parquet(path, [png(image) for image in pixels(4)], [0] * 4)
    assert source.read(0, 3)[1].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="ended before example 4, though example 5 was expected"):
        source.fetch(3, 6)
    assert source.read(0, 4)[1].tolist() == [0, 0, 0, 0]


def test_streaming_holds_one_payload_and_not_the_data_set(tmp_path):
    n, n_files = 3000, 10  # 3 KB each; Arrow reads ahead by up to 32 MB, but not into another file
    images = [png(image) for image in pixels(n, size=(32, 32))]
    for i in range(n_files):
        part = images[i * n // n_files : (i + 1) * n // n_files]
        write_parquet(tmp_path / f"set/train-{i:05d}.parquet", part, [0] * len(part))
    total = sum(map(len, images))
    del images, part
    source = open_hub(tmp_path / "set", streaming=True)
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for start in range(0, n, 100):
            source.fetch(start, start + 100)
            most = max(most, pa.total_allocated_bytes() - before)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < total / 3  # of Python's objects; a payload is total / 30
    assert most < total / 3  # of Arrow's buffers


@pytest.mark.parametrize("kind", [STRUCT, pa.binary(), pa.large_binary()])
def test_integers_without_features_have_the_classes_of_the_training_split(tmp_path, kind):
    images = [png(image) for image in pixels(4)]
    for split, labels in (("train", [0, 3, 1, 0]), ("test", [1, 0, 0, 1])):
        write_parquet(tmp_path / "set" / split / "0000.parquet", images, labels, None, kind)
    for split, expected in (("train", [0, 3, 1, 0]), ("test", [1, 0, 0, 1])):
        source = open_hub(tmp_path / "set", split)
        assert source.class_names == ("0", "1", "2", "3")
        assert source.read(0, 4)[1].tolist() == expected
        np.testing.assert_array_equal(source.read(0, 4)[0], pixels(4).transpose(0, 3, 1, 2))
    with pytest.raises(ValueError, match=r"does not say how many classes.*`labelled: false`"):
        open_hub(tmp_path / "set", streaming=True)
    assert open_hub(tmp_path / "set", streaming=True, labelled=False).n_examples == 4


def test_one_parquet_file_is_the_training_split_and_no_other(tmp_path):
    path = tmp_path / "some.parquet"
    write_parquet(path, [png(image) for image in pixels(3)], [0, 1, 2])
    assert open_hub(path).n_examples == 3
    with pytest.raises(ValueError, match="has no split 'test'; there are: train"):
        open_hub(path, "test")
    assert open_hub(path, "test", test_split="train").n_examples == 3


@BOTH
def test_another_split_is_never_taken_for_the_stated_one(parquet, streaming):
    with pytest.raises(ValueError, match=r"no split 'validation'; there are: test, train .*study"):
        open_hub(parquet, "test", test_split="validation", streaming=streaming)


def test_files_named_alike_are_not_one_split(tmp_path):
    images = [png(image) for image in pixels(5)]
    names = ("train-00000-of-00001-0123456789abcdef", "train_extra", "training", "test_2", "test_1")
    for i, name in enumerate(names):
        write_parquet(tmp_path / "set" / f"{name}.parquet", images[i : i + 1], [i % 3])
    assert open_hub(tmp_path / "set").read(0, 1)[1].tolist() == [0]
    assert open_hub(tmp_path / "set").n_examples == 1
    assert open_hub(tmp_path / "set", "test").read(0, 2)[1].tolist() == [1, 0]  # 1 before 2
    assert open_hub(tmp_path / "set", train_split="train_extra").read(0, 1)[1].tolist() == [1]


def test_a_configuration_is_a_folder_of_a_local_data_set(tmp_path):
    write_parquet(tmp_path / "set/plain/train.parquet", [png(pixels(1)[0])], [1])
    assert open_hub(tmp_path / "set", config="plain").read(0, 1)[1].tolist() == [1]
    with pytest.raises(ValueError, match=r"no split 'train'; there are: plain .*config"):
        open_hub(tmp_path / "set")


def test_a_relative_path_is_looked_up_in_the_data_folder(parquet, monkeypatch):
    monkeypatch.setenv("KDLIB_DATA", str(parquet.parent))
    assert open_hub(parquet.name).identity == open_hub(parquet).identity


@BOTH
def test_absent_columns_are_named_with_those_there_are(parquet, streaming):
    with pytest.raises(
        ValueError, match=r"no column 'img'; there are: image, text, label .*image_"
    ):
        open_hub(parquet, image_column="img", streaming=streaming)
    with pytest.raises(ValueError, match=r"no column 'fine'; there are: image, .*label_column"):
        open_hub(parquet, label_column="fine", streaming=streaming)


@BOTH
def test_columns_of_other_types_are_refused(parquet, streaming):
    with pytest.raises(ValueError, match=r"column 'text' .*Value\('string'\); expected images"):
        open_hub(parquet, image_column="text", streaming=streaming)
    with pytest.raises(ValueError, match=r"column 'text' .*expected ClassLabel or integers"):
        open_hub(parquet, label_column="text", streaming=streaming)


@BOTH
def test_unlabelled_images_need_no_label_column_and_have_no_classes(tmp_path, streaming):
    path = tmp_path / "set" / "train.parquet"
    write_parquet(path, [png(image) for image in pixels(3)], None)
    with pytest.raises(ValueError, match="no column 'label'"):
        open_hub(path, streaming=streaming)
    source = open_hub(path, labelled=False, streaming=streaming)
    assert source.class_names == ()
    assert source.read(0, 3)[1].tolist() == [-1, -1, -1]
    assert source.read(0, 3)[1].dtype == np.int64


@pytest.mark.parametrize(("bad", "says"), [(-1, "-1"), (None, "-1"), (3, "3")])
def test_a_label_outside_the_classes_is_named_when_it_is_used(tmp_path, bad, says):
    path = tmp_path / "set" / "train.parquet"
    names = "abc" if bad != 3 else None
    write_parquet(path, [png(image) for image in pixels(4)], [0, 1, bad, 2], names)
    if bad == 3:  # plain integers: the classes are those of the training split
        write_parquet(tmp_path / "set/test.parquet", [png(pixels(1)[0])] * 3, [0, 3, 4], None)
        with pytest.raises(
            ValueError, match=r"example 2 of .* test has label 4; expected \[0, 3\]"
        ):
            open_hub(tmp_path / "set", "test")
        return
    message = rf"example 2 of .* train has label {says}; expected \[0, 2\], or `labelled: false`"
    with pytest.raises(ValueError, match=message):
        open_hub(path)
    stream = open_hub(path, streaming=True)
    assert stream.read(0, 2)[1].tolist() == [0, 1]
    with pytest.raises(ValueError, match=message):
        stream.fetch(2, 4)
    assert open_hub(path, n_train=2).read(0, 2)[1].tolist() == [0, 1]


@BOTH
def test_an_image_that_cannot_be_decoded_names_data_set_split_and_example(tmp_path, streaming):
    whole = png(pixels(1)[0])
    images = [whole, whole, whole[:-30], b"no image", None]
    write_parquet(tmp_path / "set" / "train.parquet", images, [0] * 5)
    source = open_hub(tmp_path / "set", streaming=streaming)
    assert source.read(0, 2)[0].shape == (2, 3, 4, 6)
    for i in (2, 3):
        with pytest.raises(ValueError, match=rf"example {i} of .*set train cannot be read as an"):
            source.read(i, i + 1)
    with pytest.raises(ValueError, match=r"example 4 of .*set train cannot .* \(it is empty\)"):
        source.read(4, 5)


@BOTH
def test_an_image_at_an_address_is_fetched_and_a_local_one_is_left_to_the_decoder(
    tmp_path, streaming
):
    import fsspec

    images = pixels(2)
    with fsspec.open("memory://a.png", "wb") as file:
        file.write(png(images[0]))
    (tmp_path / "b.png").write_bytes(png(images[1]))
    rows = [{"bytes": None, "path": p} for p in ("memory://a.png", f"{tmp_path}/b.png")]
    (tmp_path / "set").mkdir()
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), tmp_path / "set/train.parquet")
    source = open_hub(tmp_path / "set", labelled=False, streaming=streaming)
    assert source.fetch(0, 2).images == [png(images[0]), f"{tmp_path}/b.png"]
    np.testing.assert_array_equal(source.read(0, 2)[0], images.transpose(0, 3, 1, 2))


def test_a_pickled_source_decodes_and_carries_no_rows(parquet):
    source = open_hub(parquet, streaming=True)
    content = pickle.dumps(source)
    assert len(content) < 1500
    images, labels = pickle.loads(content).decode(pickle.loads(pickle.dumps(source.fetch(2, 5))))
    np.testing.assert_array_equal(images, pixels(11)[2:5].transpose(0, 3, 1, 2))
    assert labels.tolist() == [2, 0, 1]


@BOTH
def test_another_size_is_an_error_that_names_the_example_unless_a_size_is_given(
    tmp_path, streaming
):
    images = [*pixels(2), *pixels(1, size=(5, 9))]
    write_parquet(tmp_path / "set" / "train.parquet", [png(image) for image in images], [0] * 3)
    source = open_hub(tmp_path / "set", streaming=streaming)
    with pytest.raises(
        ValueError, match=r"example 2 of .* has 9x5 pixels but example 0 has 6x4.*data\.image_size"
    ):
        source.read(1, 3)
    source = open_hub(tmp_path / "set", image_size=8, streaming=streaming)
    assert source.read(0, 3)[0].shape == (3, 3, 8, 8)


@BOTH
def test_n_train_takes_the_first_training_images_and_leaves_the_test_split(parquet, streaming):
    source = open_hub(parquet, n_train=4, streaming=streaming)
    assert source.n_examples == 4
    assert source.read(0, 4)[1].tolist() == [0, 1, 2, 0]
    assert source.identity["n_train"] == 4
    test = open_hub(parquet, "test", n_train=4, streaming=streaming)
    assert test.n_examples == 3
    assert "n_train" not in test.identity
    with pytest.raises(ValueError, match=r"n_train is 12 but the training split .* 11 images"):
        open_hub(parquet, n_train=12, streaming=streaming)


def test_the_identity_follows_bytes_columns_and_sizes_but_not_the_place(parquet, tmp_path):
    first = open_hub(parquet).identity
    moved = tmp_path / "moved"
    parquet.rename(moved)
    assert open_hub(moved).identity == first
    for other in ({"image_size": 4}, {"labelled": False}, {"n_train": 3}):
        assert open_hub(moved, **other).identity != first
    path = moved / "data/train-00000-of-00002.parquet"
    images = [png(image) for image in pixels(5)]
    write_parquet(path, images, [0, 1, 2, 0, 2], row_group_size=2)  # the last label was 1
    assert open_hub(moved).identity != first


def test_rows_are_read_anew_from_a_file_that_was_replaced(tmp_path):
    path = tmp_path / "set" / "train.parquet"
    for labels in ([0, 1], [2, 2, 1]):
        write_parquet(path, [png(image) for image in pixels(len(labels))], labels)
        assert open_hub(path).read(0, len(labels))[1].tolist() == labels


def test_a_cut_parquet_file_is_named(parquet):
    path = parquet / "data/train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"train-00001-of-00002\.parquet is not a whole parquet"):
        open_hub(parquet)


def test_damage_inside_a_parquet_file_is_one_sentence(parquet):
    path = parquet / "data/train-00001-of-00002.parquet"
    content = bytearray(path.read_bytes())
    content[4:104] = bytes(100)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read by `datasets` \(.*\); repair"):
        open_hub(parquet)


def test_an_empty_split_is_refused(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", [], [])
    with pytest.raises(ValueError, match="set train has no examples"):
        open_hub(tmp_path / "set", streaming=True)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Train: 2 cats and a dog; test: one owl, which makes three classes; a hidden file."""
    folder = tmp_path / "images"
    names = ("train/cat/b.png", "train/cat/a.png", "train/dog/c.png", "test/owl/d.png")
    for name, image in zip(names, pixels(4), strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(image))
    (folder / "train/cat/.hidden.png").write_bytes(b"")
    return folder


@BOTH
def test_a_local_image_folder_has_the_classes_of_both_splits(image_folder, streaming):
    source = open_hub(image_folder, streaming=streaming)
    assert source.class_names == ("cat", "dog", "owl")
    images, labels = source.read(0, 3)
    assert labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(images, pixels(4)[[1, 0, 2]].transpose(0, 3, 1, 2))
    assert open_hub(image_folder, "test", streaming=streaming).read(0, 1)[1].tolist() == [2]
    assert source.identity == open_hub(image_folder, streaming=not streaming).identity
    (image_folder / "train/cat/a.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"example 0 of .*a\.png cannot be read as an image"):
        source.read(0, 1)


@BOTH
def test_images_outside_class_folders_have_no_labels(image_folder, streaming):
    (image_folder / "test/owl/d.png").rename(image_folder / "test/d.png")
    with pytest.raises(ValueError, match="no column 'label'; there are: image"):
        open_hub(image_folder, streaming=streaming)
    source = open_hub(image_folder, labelled=False, streaming=streaming)
    assert source.read(0, 3)[1].tolist() == [-1, -1, -1]


def test_a_metadata_file_gives_the_labels_of_an_image_folder_and_is_part_of_its_identity(
    image_folder,
):
    (image_folder / "test/owl/d.png").rename(image_folder / "test/d.png")

    def write(split: str, **kinds: int) -> None:
        rows = [json.dumps({"file_name": f"{k}.png", "kind": v}) for k, v in kinds.items()]
        (image_folder / split / "metadata.jsonl").write_text("\n".join(rows) + "\n")

    for name in ("cat/a", "cat/b", "dog/c"):
        path = image_folder / "train" / f"{name}.png"
        path.rename(image_folder / "train" / path.name)
    write("test", d=0)
    write("train", a=1, b=0, c=1)
    first = open_hub(image_folder, label_column="kind")
    assert first.class_names == ("0", "1")
    assert first.read(0, 3)[1].tolist() == [1, 0, 1]
    write("train", a=1, b=0, c=0)
    assert open_hub(image_folder, label_column="kind").identity != first.identity


def test_a_folder_with_neither_parquet_nor_images_says_what_was_expected(tmp_path):
    (tmp_path / "set/train").mkdir(parents=True)
    (tmp_path / "set/train/notes.txt").write_text("none")
    with pytest.raises(ValueError, match=r"has neither parquet files .* nor images"):
        open_hub(tmp_path / "set")


def test_local_files_write_nothing_to_the_screen(parquet, capfd):
    for streaming in (False, True):
        open_hub(parquet, streaming=streaming).read(0, 5)
    assert capfd.readouterr() == ("", "")
