"""Subsets and their files."""

import numpy as np
import pandas as pd
import pytest

from kdlib.cartography.selection import select
from kdlib.cartography.subset import Subset


def subset(ids=(3, 5, 8), **changes):
    fields = {
        "strategy": "easy",
        "fraction": 0.33,
        "seed": 1,
        "parent": "map0",
        "data_fingerprint": "data0",
    }
    return Subset(np.array(ids, dtype=np.int64), **(fields | changes))


@pytest.mark.parametrize(("ids", "parent"), [((3, 5, 8), "map0"), ((), "map0"), ((1,), None)])
def test_subset_returns_from_its_file_below_axis_folders(tmp_path, ids, parent):
    path = tmp_path / "strategy=easy" / "seed=7" / "subset.parquet"
    saved = subset(ids, parent=parent)
    saved.save(path)
    loaded = Subset.load(path, data_fingerprint="data0")
    assert loaded.example_ids.tolist() == list(ids)
    assert len(loaded) == len(ids)
    assert loaded.sha256 == saved.sha256
    for name in ("strategy", "fraction", "seed", "parent", "data_fingerprint"):
        assert getattr(loaded, name) == getattr(saved, name)


def test_the_hash_is_that_of_the_ids():
    rng = np.random.default_rng(0)
    ids = pd.Index(np.arange(100), name="example_id")
    table = pd.DataFrame({"variability": rng.random(100), "confidence": rng.random(100)}, ids)
    hashes = [
        subset(select(table, 33, strategy, seed)).sha256
        for strategy, seed in (("random", 0), ("random", 0), ("random", 1), ("easy", 0))
    ]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert subset(strategy="a").sha256 == subset(strategy="b").sha256


def test_saving_the_same_subset_again_leaves_the_file_alone(tmp_path):
    path = subset().save(tmp_path / "subset.parquet")
    before = path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()
    subset().save(path)
    assert (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) == before


@pytest.mark.parametrize(
    ("other", "line"),
    [
        (subset(seed=2), "seed: 1 -> 2"),
        (subset(parent="map1"), "parent: map0 -> map1"),
        (subset((3, 5, 9)), "sha256: "),
    ],
)
def test_another_subset_is_not_written_over_the_first(tmp_path, other, line):
    path = subset().save(tmp_path / "subset.parquet")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=line):
        other.save(path)
    assert path.read_bytes() == before


def test_a_subset_of_another_data_set_is_refused(tmp_path):
    path = subset().save(tmp_path / "subset.parquet")
    with pytest.raises(ValueError, match="data_fingerprint: data0 -> data1"):
        Subset.load(path, data_fingerprint="data1")


def test_cut_and_absent_files_are_refused_with_what_to_do(tmp_path):
    path = subset(range(1000)).save(tmp_path / "subset.parquet")
    whole = path.read_bytes()
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"cut or damaged.*delete .*, then run `"):
            Subset.load(path)
    with pytest.raises(FileNotFoundError, match="run `python -m kdlib study"):
        Subset.load(tmp_path / "absent.parquet")


def test_a_flipped_byte_among_the_ids_is_noticed(tmp_path):
    path = subset(range(1000)).save(tmp_path / "subset.parquet")
    whole = bytearray(path.read_bytes())
    for position in (100, len(whole) // 4, len(whole) // 3):
        damaged = bytearray(whole)
        damaged[position] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged"):
            Subset.load(path)


@pytest.mark.parametrize("ids", [(5, 3), (3, 3), (-1, 5)])
def test_ids_that_are_not_sorted_distinct_and_positive_are_refused(ids):
    with pytest.raises(ValueError, match="not sorted, distinct and >= 0"):
        subset(ids)


def test_ids_of_a_subset_are_read_only():
    chosen = subset()
    with pytest.raises(ValueError, match="read-only"):
        chosen.example_ids[0] = 1
