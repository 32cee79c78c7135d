"""`kdlib.cache.survey` and `readings`: bad images are named at once before any is
cached, what was done to the others is counted, and a source that changed is noticed."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from cache.odd_images import build, data_of, encoded, image_folder, pixels, png16, turned, write
from cache.parquet_sets import open_hub, write_parquet
from PIL import Image

from kdlib.cache.build import build_images
from kdlib.cache.encoded import ImageError
from kdlib.cache.index import CacheError, read_index
from kdlib.cache.readings import compare, counted, read_record, record_path, sentence
from kdlib.cache.shards import Cache
from kdlib.cache.study_source import open_source
from kdlib.repro import files
from kdlib.study.data import Data, cache_folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path)


def same_size(path: Path, at: int = -14) -> None:
    """Another image in as many bytes, and the time it had."""
    state, content = path.stat(), bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))


# --- what is counted ---------------------------------------------------------------------------


def test_plain_images_say_nothing_and_odd_ones_are_counted_in_one_line(root, capsys):
    assert sentence(counted(build(root, "test"))) == ""
    assert capsys.readouterr().out == ""
    write(root / "train/cat/deep.png", png16())
    write(root / "train/cat/grey.png", encoded(pixels()[..., 0]))
    write(root / "train/dog/turned.png", turned(3))
    write(root / "train/dog/.DS_Store", b"x")
    write(root / "train/dog/Thumbs.db", b"x")
    write(root / "train/beside.png", encoded(pixels()))
    line = (
        "of 9 images: 1 turned upright by their EXIF orientation; 1 cut from 16 to 8 bits per "
        "channel; 1 made RGB from greyscale; 3 files passed over (.db 1, hidden 1, outside class "
        "folders 1)"
    )
    for n_workers in (0, 1):
        cache = build(root, exif="apply", n_workers=n_workers)
        assert sentence(counted(cache)) == line
        assert capsys.readouterr().out == f"folder train: {line}\n"
        shutil.rmtree(cache.folder)


def test_records_are_no_part_of_what_a_cache_is(root):
    cache = build(root)
    plain = {"source", "split", "sha256"}
    assert set(cache.header["identity"]) == plain
    before = cache.fingerprint
    for path in cache.folder.glob("read-*"):
        path.unlink()
    assert Cache(cache.folder).fingerprint == before
    shards = read_index(cache.folder / "index.json")[1]
    assert not any(name.startswith("read") for sums in shards.values() for name in sums)


def test_keys_enter_names_and_identities_only_where_they_are_given(root, home):
    names = {
        cache_folder(data_of(root, **options)).name
        for options in ({}, {"exif": "refuse", "alpha": "refuse"}, {"exif": None})
    }
    assert len(names) == 1
    assert cache_folder(data_of(root, exif="apply")).name not in names
    digits = Data(source="digits", n_validation=1)
    assert cache_folder(digits).name == "digits-d66cd639"
    assert open_source(data_of(root, exif="apply", alpha="drop"), "train").identity.items() >= {
        ("exif", "apply"),
        ("alpha", "drop"),
    }
    with pytest.raises(ValueError, match="`exif` is for images in files; digits has arrays"):
        Data(source="digits", n_validation=1, exif="apply")


@pytest.mark.parametrize("suffix", ["tif", "tiff", "gif", "jfif", "jpe", "ppm", "apng", "JPEG"])
def test_images_of_more_suffixes_are_read(root, suffix):
    kind = {"tif": "TIFF", "tiff": "TIFF", "gif": "GIF", "ppm": "PPM", "apng": "PNG"}
    write(root / f"train/cat/9.{suffix}", encoded(pixels(9), kind.get(suffix, "JPEG")))
    source = open_source(data_of(root), "train")
    assert source.n_examples == 7
    assert source.read(3, 4)[0].shape == (1, 3, 4, 6)


def test_relabelled_images_and_streams_are_counted_too(tmp_path):
    root = image_folder(tmp_path / "folder")
    write(root / "train/cat/grey.png", encoded(pixels()[..., 0]))
    assert counted(build(root, relabel={"noise": 0.5}))["counts"] == {"greyscale": 1}
    images = [encoded(pixels(i)) for i in range(4)] + [encoded(pixels()[..., 0])]
    write_parquet(tmp_path / "set/train.parquet", images, [0, 1, 2, 0, 1])
    for streaming in (False, True):
        source = open_hub(tmp_path / "set", streaming=streaming)
        cache = build_images(source, tmp_path / f"cache-{streaming}", 2)
        assert counted(cache)["counts"] == {"greyscale": 1}
        assert read_record(cache.folder, 1)["names"] == ["example 2", "example 3"]


# --- bad images ----------------------------------------------------------------------------------

FAULTS = {
    "train/cat/7.png": (lambda: turned(6), "carries EXIF orientation 6"),
    "train/cat/8.png": (lambda: encoded(pixels(channels=4)), "has transparent pixels"),
    "train/cat/9.png": (lambda: encoded(pixels(size=(5, 9))), "has 9x5 pixels but example 0 has"),
    "train/dog/6.png": (lambda: b"", "it is empty"),
    "train/dog/7.png": (lambda: b"text", "its format is unknown"),
    "train/dog/8.png": (lambda: encoded(pixels(size=(40, 60)))[:-40], "its data end too early"),
}


@pytest.mark.parametrize("n_workers", [0, 1])
def test_all_bad_images_are_named_at_once_before_a_byte_is_built(root, n_workers):
    for name, (content, _) in FAULTS.items():
        write(root / name, content())
    with pytest.raises(ImageError) as caught:
        build(root, n_workers=n_workers)
    message = str(caught.value)
    assert message.startswith("6 images of folder train are not read:\n")
    for name, (_, says) in FAULTS.items():
        [line] = [line for line in message.splitlines() if f"{root}/{name}" in line]
        assert says in line
    assert not (root / "cache-train").exists()


def test_one_bad_image_is_one_sentence_and_a_bad_first_one_is_no_reason_for_all(root):
    write(root / "train/cat/0.png", b"text")
    with pytest.raises(ImageError) as caught:
        build(root)
    assert str(caught.value) == (
        f"example 0 of folder train, {root}/train/cat/0.png cannot be read as an image (its format "
        "is unknown); repair or remove it"
    )


@pytest.mark.parametrize("remedy", ["remove", "repair"])
@pytest.mark.parametrize("part", [(1, 1), (2, 2)])
def test_what_the_message_names_is_enough_to_build(root, remedy, part):
    bad = [root / f"train/{name}.png" for name in ("cat/9", "dog/7", "dog/8", "dog/9")]
    for path in bad:
        write(path, b"text")
    with pytest.raises(ImageError, match="images of folder train are not read"):
        build(root, part=part)
    for seed, path in enumerate(bad):
        path.unlink() if remedy == "remove" else write(path, encoded(pixels(50 + seed)))
    assert build(root, part=part).header["n_examples"] == (6 if remedy == "remove" else 10)
    assert build(root).whole


def damaged_inside(seed: int) -> bytes:
    """What only decoding finds."""
    image = bytearray(encoded(pixels(seed, size=(40, 60))))
    image[2000] ^= 1
    return bytes(image)


@pytest.mark.parametrize("remedy", ["remove", "repair"])
def test_damage_that_only_decoding_finds_is_named_at_once_and_its_remedy_works(
    root, remedy, capsys
):
    bad = [root / "train/dog/7.png", root / "train/dog/9.png"]
    for path in bad:
        write(path, damaged_inside(0))
    with pytest.raises(ImageError, match=r"2 images of .*(\n.*dog/[79]\.png cannot be read.*){2}"):
        build(root, image_size=4)
    assert list((root / "cache-train").glob("journal*"))  # some shards were finished
    for seed, path in enumerate(bad):
        path.unlink() if remedy == "remove" else write(path, encoded(pixels(50 + seed)))
    cache = build(root, image_size=4)
    assert cache.whole
    assert "have changed since this build began" in capsys.readouterr().out
    cache.verify()
    source = open_source(data_of(root, image_size=4), "train")
    np.testing.assert_array_equal(
        cache.read("images", np.arange(source.n_examples)), source.read(0, source.n_examples)[0]
    )


def test_an_unfinished_build_of_other_settings_is_left_alone(root):
    write(root / "train/dog/7.png", damaged_inside(0))
    with pytest.raises(ImageError):
        build(root, image_size=4)
    (root / "train/dog/7.png").unlink()
    with pytest.raises(CacheError, match=r"journal\.jsonl was made of something else"):
        build(root, image_size=5)


def test_an_image_that_changes_while_a_build_lies_unfinished_is_read_again(root):
    write(root / "train/dog/7.png", damaged_inside(0))
    with pytest.raises(ImageError):
        build(root, image_size=4)
    write(root / "train/cat/0.png", encoded(pixels(77)))  # of a finished shard, as large as before
    image = bytearray(damaged_inside(0))
    image[2000] ^= 1
    write(root / "train/dog/7.png", bytes(image))
    cache = build(root, image_size=4)
    expected = open_source(data_of(root, image_size=4), "train").read(0, 1)[0]
    np.testing.assert_array_equal(cache.read("images", np.arange(1)), expected)


# --- a source that changed -----------------------------------------------------------------------


def test_an_image_replaced_by_one_of_the_same_size_is_refused_and_named(root):
    build(root)
    same_size(root / "train/dog/1.png")
    with pytest.raises(CacheError, match=r"other images .*changed since: dog/1\.png; .*--source"):
        build(root)
    same_size(root / "train/dog/1.png")  # the first remedy of the message: the old bytes
    assert build(root).whole
    same_size(root / "train/dog/1.png")
    with pytest.raises(CacheError, match="changed since"):
        build(root)
    shutil.rmtree(root / "cache-train")  # the second one
    assert build(root).whole


def test_another_time_with_equal_bytes_passes_and_is_noted(root):
    cache = build(root)
    path = root / "train/dog/1.png"
    os.utime(path, ns=(0, 5))
    assert build(root).fingerprint == cache.fingerprint
    assert 5 in read_record(cache.folder, 2)["mtime_ns"]


def test_files_that_came_or_went_are_named_with_the_command(root):
    build(root)
    (root / "train/cat/2.png").rename(root / "train/cat/new.png")
    write(root / "train/dog/1.png", encoded(pixels(5, size=(4, 6))) + b"longer")
    with pytest.raises(CacheError) as caught:
        build(root)
    for part in ("changed: dog/1.png", "missing: cat/2.png", "new: cat/new.png", "verify --source"):
        assert part in str(caught.value)


def test_a_changed_source_is_found_byte_by_byte_and_an_unchanged_one_is_not(root):
    cache, source = build(root), open_source(data_of(root), "train")
    assert not compare(source, cache)
    path = root / "train/dog/1.png"
    state = path.stat()
    same_size(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))  # neither size nor time tell
    assert compare(source, cache).changed == ["dog/1.png"]


def test_a_parquet_file_replaced_behind_the_same_footer_is_noticed(tmp_path):
    path = tmp_path / "set/train.parquet"
    images = [encoded(Image.fromarray(pixels(i)), "BMP") for i in range(5)]
    options = {"compression": "none", "use_dictionary": False, "write_statistics": False}
    write_parquet(path, images, [0, 1, 2, 0, 1], **options)
    cache = build_images(open_hub(tmp_path / "set"), tmp_path / "cache", 2)
    os.utime(path, ns=(0, 5))
    assert build_images(open_hub(tmp_path / "set"), tmp_path / "cache", 2).whole
    content = path.read_bytes()
    at = content.index(images[3]) + len(images[3]) - 1
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    source = open_hub(tmp_path / "set")
    assert source.identity == cache.header["identity"]
    with pytest.raises(CacheError, match="changed since: example 3; "):
        build_images(source, tmp_path / "cache", 2)
    assert compare(source, cache).changed == ["example 3"]
    at = content.index(np.array([1, 2, 0, 1], "<i8").tobytes())  # all but the first label
    path.write_bytes(content[:at] + b"\0" + content[at + 1 :])
    source = open_hub(tmp_path / "set")
    with pytest.raises(CacheError, match="changed since: label of example 1; "):
        build_images(source, tmp_path / "cache", 2)
    assert compare(source, cache).changed == ["label of example 1"]


def test_images_below_a_local_image_folder_of_datasets_are_compared_by_name(tmp_path):
    root = image_folder(tmp_path / "set")
    write(root / "train/cat/notes.txt", b"x")
    cache = build_images(open_hub(root), tmp_path / "cache", 4)
    assert read_record(cache.folder, 0)["names"][0] == "cat/0.png"
    assert counted(cache)["passed_over"] == {".txt": 1}
    same_size(root / "train/dog/1.png")
    with pytest.raises(CacheError, match=r"changed since: dog/1\.png"):
        build_images(open_hub(root), tmp_path / "cache", 4)
    assert compare(open_hub(root), cache).changed == ["dog/1.png"]


def test_an_absent_image_of_a_parquet_file_is_named_with_the_others(tmp_path):
    write_parquet(
        tmp_path / "set/train.parquet", [encoded(pixels()), None, b"text", None], [0, 1, 2, 0]
    )
    with pytest.raises(ImageError) as caught:
        build_images(open_hub(tmp_path / "set"), tmp_path / "cache", 2)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("3 images of")
    for line, says in zip(lines[1:4], ("is empty", "format is unknown", "is empty"), strict=True):
        assert says in line


def test_too_few_workers_are_refused_before_images_are_looked_at(root):
    with pytest.raises(ValueError, match="n_workers is -1; expected 0 or more"):
        build(root, n_workers=-1)


@pytest.mark.parametrize("harm", ["gone", "cut", "edited"])
def test_a_cache_without_records_says_so_and_is_compared_by_its_pixels(root, capsys, harm):
    cache = build(root)
    for path in cache.folder.glob("read-*"):
        if harm == "gone":
            path.unlink()
        elif harm == "cut":
            path.write_bytes(path.read_bytes()[:-9])
        else:
            path.write_text(json.dumps(json.loads(path.read_text()) | {"counts": {"turned": 1}}))
    assert build(root).whole
    assert "3 shards were built before kdlib noted what it reads" in capsys.readouterr().out
    source = open_source(data_of(root), "train")
    assert not compare(source, cache)
    write(root / "train/dog/1.png", encoded(pixels(77)))
    changes = compare(source, cache)
    assert changes.unknown == [0, 1, 2]
    assert changes.changed == ["example 4"]
    write(root / "train/dog/more.png", encoded(pixels(78)))  # another list of files
    changes = compare(open_source(data_of(root), "train"), cache)
    assert [line.split(":")[0] for line in changes.changed] == ["identity.sha256"]


@pytest.mark.parametrize(
    "change",
    [
        {"names": ["a"]},
        {"counts": {"turned": "1"}},
        {"passed_over": None},
        {"sha256": 3},
        {"format": 2},
    ],
)
def test_a_record_that_is_none_is_taken_for_absent(root, change):
    cache = build(root)
    path = record_path(cache.folder, 0)
    path.write_text(json.dumps(files.sealed(json.loads(path.read_text()) | change)))
    assert read_record(cache.folder, 0) is None
    assert counted(cache)["unknown"] == 1


def test_a_record_of_a_killed_writer_is_removed(root):
    cache = build(root)
    left = cache.folder / f".{record_path(cache.folder, 1).name}.7.tmp"
    left.touch()
    (cache.folder / "images-00001.npy").unlink()
    (cache.folder / "index.json").unlink()
    build(root)
    assert not left.exists()
