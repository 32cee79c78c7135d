"""`benchmarks/pack.py`: what is unpacked is the cache that was packed, byte for byte."""

import numpy as np
import pytest
from PIL import features
from tiny import files_below

from kdlib.cache.build import build_images
from kdlib.cache.sources import array_source


@pytest.fixture
def pack(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import pack

    return pack


def cached(folder, channels, side=6, n=300, shard_size=140):
    """A cache of random images; shards of 140 make strips of 128 and 12."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, channels, side, side + 1), np.uint8)
    labels = rng.integers(0, 4, n)
    return build_images(array_source("noise", "train", images, labels, "abcd"), folder, shard_size)


def bytes_of(folder):
    return {name: b for name, b in files_below(folder).items() if not name.startswith(".lock")}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("part_bytes", [10**6, 5_000])
def test_an_unpacked_cache_is_the_packed_one_to_the_byte(pack, tmp_path, channels, part_bytes):
    cache = cached(tmp_path / "cache", channels)
    written = pack.pack(cache.folder, "noise-train", tmp_path / "packs", part_bytes)
    assert (len(written) > 1) == (part_bytes == 5_000)
    assert all(part.stat().st_size <= part_bytes for part in written)
    found = pack.packs([tmp_path / "packs"])
    assert list(found) == ["noise-train"]
    again = pack.unpack(found["noise-train"], tmp_path / "again")
    assert again.fingerprint == cache.fingerprint
    assert bytes_of(again.folder) == bytes_of(cache.folder)


def test_a_pack_is_smaller_than_images_that_can_be_compressed(pack, tmp_path):
    images = np.repeat(np.arange(200, dtype=np.uint8), 3 * 16 * 16).reshape(200, 3, 16, 16)
    source = array_source("flat", "train", images, np.zeros(200, np.int64), "a")
    cache = build_images(source, tmp_path / "cache", 200)
    (written,) = pack.pack(cache.folder, "flat-train", tmp_path / "packs")
    assert written.stat().st_size < images.nbytes / 5


def test_equal_caches_have_equal_packs(pack, tmp_path):
    packs = [
        pack.pack(cached(tmp_path / name, 3).folder, "noise", tmp_path / f"packs-{name}")[0]
        for name in ("one", "two")
    ]
    assert packs[0].read_bytes() == packs[1].read_bytes()


def test_parts_are_joined_from_several_folders_and_missing_ones_are_named(pack, tmp_path):
    cache = cached(tmp_path / "cache", 3)
    parts = pack.pack(cache.folder, "noise-train", tmp_path / "one", 5_000)
    (tmp_path / "two").mkdir()
    moved = parts[1].rename(tmp_path / "two" / parts[1].name)
    content = pack.packs([tmp_path / "two", tmp_path / "one"])["noise-train"]
    assert pack.unpack(content, tmp_path / "again").fingerprint == cache.fingerprint
    moved.unlink()
    with pytest.raises(FileNotFoundError, match=rf"are missing: {moved.name}$"):
        pack.packs([tmp_path / "one", tmp_path / "two"])


def test_a_damaged_pack_is_refused_and_leaves_no_index(pack, tmp_path):
    cache = cached(tmp_path / "cache", 1)
    (written,) = pack.pack(cache.folder, "noise-train", tmp_path / "packs")
    whole = bytearray(written.read_bytes())
    with pytest.raises(ValueError, match="no pack of ours, or it is cut"):
        pack.unpack(bytes(whole[:600]), tmp_path / "cut")
    place = whole.find(b"images-00001-0000.webp")
    for offset in (700, 3_000):  # inside the strip
        whole[place + offset] ^= 16
    with pytest.raises(ValueError, match=r"shard 1 are missing or damaged|images-00001.npy has"):
        pack.unpack(bytes(whole), tmp_path / "flipped")
    assert not (tmp_path / "flipped" / "index.json").exists()


@pytest.mark.parametrize(("channels", "kind"), [(4, np.uint8), (3, np.float32)])
def test_images_that_webp_cannot_hold_are_refused(pack, channels, kind):
    with pytest.raises(ValueError, match=rf"of {channels} channels; expected uint8 of 1 or 3"):
        pack.encode(np.zeros((2, channels, 8, 8), kind))


def test_a_pillow_without_webp_is_refused_with_a_sentence(pack, tmp_path, monkeypatch):
    cache = cached(tmp_path / "cache", 3)
    monkeypatch.setattr(features, "check", lambda name: name != "webp")
    for work in (
        lambda: pack.pack(cache.folder, "noise-train", tmp_path / "packs"),
        lambda: pack.unpack(b"", tmp_path / "again"),
    ):
        with pytest.raises(RuntimeError, match="has no WebP, in which packed images are stored"):
            work()


def test_the_pack_of_another_study_is_refused_by_name(pack, lab, tmp_path):
    parts = pack.pack_study("params/tiny.yaml", tmp_path / "packs")
    assert [part.name.split("-")[-1] for part in parts] == ["train.pack", "test.pack"]
    parts[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"no digits-\w+-test.pack; the packs there are of"):
        list(pack.unpack_study("params/tiny.yaml", [tmp_path / "packs"]))
