"""`kdlib.cache.tensor_files`: tensors of images come back to the level, and nothing is executed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from kdlib.cache.build import build_images
from kdlib.cache.readings import compare, counted
from kdlib.cache.sources import Source
from kdlib.cache.study_source import open_source
from kdlib.study.data import Data


def levels(n: int, seed: int = 0, size: int = 5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (n, 3, size, size), np.uint8))


def opened(folder: Path, **options: int) -> Source:
    data = Data(source="tensors", folder=str(folder), labelled=False, n_validation=1, **options)
    return open_source(data, "train")


def write_index(folder: Path, part: int, *entries: tuple[str, int, int]) -> None:
    """As the earlier study's builder writes the index of one part."""
    keys = ("shard_path", "num_samples", "global_start")
    shards = [dict(zip(keys, entry, strict=True)) for entry in entries]
    content = {"shard_id": part, "num_shards": 2, "cache_dtype": "float16", "shards": shards}
    (folder / f"index_shard_{part:03d}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8])
def test_all_256_levels_come_back_from_every_precision(tmp_path, dtype):
    images = torch.arange(768, dtype=torch.int32).remainder(256).to(torch.uint8)
    images = images.reshape(1, 3, 16, 16)
    stored = images if dtype == torch.uint8 else images.float().div(255).to(dtype)
    torch.save({"images": stored}, tmp_path / "images_shard_00000.pt")
    source = opened(tmp_path)
    values = source.fetch(0, 1)
    read, labels = source.decode(values)
    np.testing.assert_array_equal(read, images.numpy())
    assert (labels.tolist(), source.class_names, values.counts()) == ([-1], (), {})


def test_parts_are_read_by_their_indexes_and_ranges_cross_files(tmp_path):
    images = levels(11)
    stored = images.float().div(255).half()
    for name, part in (("s001_00000", slice(6, 11)), ("s000_00000", slice(0, 4)),
                       ("s000_00001", slice(4, 6))):  # fmt: skip
        torch.save({"images": stored[part]}, tmp_path / f"images_{name}.pt")
    write_index(tmp_path, 1, ("images_s001_00000.pt", 5, 6))
    write_index(tmp_path, 0, ("images_s000_00001.pt", 2, 4), ("images_s000_00000.pt", 4, 0))
    source = opened(tmp_path)
    assert (source.n_examples, source.image_shape) == (11, (3, 5, 5))
    np.testing.assert_array_equal(source.read(0, 11)[0], images.numpy())
    np.testing.assert_array_equal(source.read(3, 7)[0], images[3:7].numpy())
    assert opened(tmp_path, n_train=5).n_examples == 5
    assert opened(tmp_path, image_size=4).read(2, 4)[0].shape == (2, 3, 4, 4)
    cache = build_images(source, tmp_path / "cache", 4)
    np.testing.assert_array_equal(cache.read("images", np.arange(11)), images.numpy())
    assert counted(cache) == {"images": 11, "counts": {}, "passed_over": {}, "unknown": 0}


def test_values_between_levels_are_rounded_counted_and_said(tmp_path, capsys):
    stored = levels(6).float() / 255
    stored[4, 0, 0, 0], stored[1] = (
        0.4999,
        torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)),
    )
    torch.save(stored, tmp_path / "a.pt")
    cache = build_images(opened(tmp_path), tmp_path / "cache", 4)
    assert counted(cache)["counts"] == {"rounded": 2}
    assert "of 6 images: 2 of values that were rounded to 256 levels" in capsys.readouterr().out
    assert cache.read("images", np.array([4]))[0, 0, 0, 0] == 127  # of 127.47


def test_other_content_of_the_same_size_is_another_source(tmp_path):
    torch.save(levels(4), tmp_path / "a.pt")
    source = opened(tmp_path)
    cache = build_images(source, tmp_path / "cache", 4)
    assert not compare(opened(tmp_path), cache)
    n_bytes = (tmp_path / "a.pt").stat().st_size
    torch.save(levels(4, seed=1), tmp_path / "a.pt")
    assert (tmp_path / "a.pt").stat().st_size == n_bytes
    assert opened(tmp_path).identity != source.identity
    assert compare(opened(tmp_path), cache).changed


@pytest.mark.parametrize("value", [-0.01, 1.02, float("nan")])
def test_normalised_images_are_refused_by_their_first_example(tmp_path, value):
    stored = levels(3).float() / 255
    stored[2, 0, 0, 0] = value
    torch.save(stored, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"example 2 of .* expected \[0, 1\]: images before"):
        opened(tmp_path).read(0, 3)


class Harmful:
    def __reduce__(self) -> tuple:
        return os.system, ("touch harmed",)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (Harmful(), "as plain tensors .*; what would execute code is refused"),
        (torch.zeros(3, 5, 5), r"holds \w+; expected one tensor \(n, 1 or 3, H, W\)"),
        (torch.zeros(2, 3, 5, 5, dtype=torch.float64), r"float64.* expected one tensor"),
        ({"a": levels(2), "b": levels(2)}, r"uint8.*uint8.*; expected one tensor"),
    ],
)
def test_other_files_are_refused(tmp_path, monkeypatch, content, said):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        opened(tmp_path)
    assert not (tmp_path / "harmed").exists()


def test_files_and_indexes_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \.pt files"):
        opened(tmp_path)
    for name, n in (("a", 2), ("b", 3)):
        torch.save(levels(n), tmp_path / f"{name}.pt")
    assert opened(tmp_path).n_examples == 5
    for entries, said in (
        ([("a.pt", 2, 0)], r"1 are in no index, such as b\.pt"),
        ([("a.pt", 2, 0), ("b.pt", 3, 2), ("c.pt", 1, 5)], r"1 are not there, such as c\.pt"),
        ([("a.pt", 2, 0), ("b.pt", 3, 1)], r"a\.pt and b\.pt hold the same images"),
        ([("a.pt", 2, 0), ("b.pt", 4, 2)], r"b\.pt has 3 images, and its index says 4"),
        ([("a.pt", "two", 0)], "is no index of"),
    ):
        write_index(tmp_path, 0, *entries)
        with pytest.raises(ValueError, match=said):
            opened(tmp_path)
    (tmp_path / "index_shard_000.json").unlink()
    torch.save(levels(3, size=6), tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b\.pt has images of shape \(3, 6, 6\), and a\.pt of"):
        opened(tmp_path)
    with pytest.raises(ValueError, match="have no labels: give `labelled: false`"):
        Data(source="tensors", folder=str(tmp_path), n_validation=1)
