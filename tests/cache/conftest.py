"""A cache of numbers, and a data set in parquet files without a network."""

import shutil
import socket
from pathlib import Path

import pytest
from cache.numbers import make_cache
from cache.parquet_sets import pixels, png, write_parquet


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A whole cache that no test writes into."""
    return make_cache(tmp_path_factory.mktemp("cache") / "whole").folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a whole cache, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every look-up of a host fails, as it does where there is no network."""

    def fail(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "root"))


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """Train: 5 + 6 images in two files of row groups of 2; test: 3 images."""
    folder = tmp_path / "sets" / "some [set]*"  # a glob reads these signs otherwise
    images = [png(image) for image in pixels(11)]
    labels = [i % 3 for i in range(11)]
    for i, part in enumerate((slice(0, 5), slice(5, 11))):
        path = folder / "data" / f"train-0000{i}-of-00002.parquet"
        write_parquet(path, images[part], labels[part], row_group_size=2)
    write_parquet(folder / "data" / "test-00000-of-00001.parquet", images[:3], [2, 1, 0])
    return folder


@pytest.fixture
def row_groups(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The row groups of each parquet file whose rows are read as a stream."""
    import pyarrow.parquet as pq

    read, batches = [], pq.ParquetFile.iter_batches

    def iter_batches(self: object, n: int, groups: range, columns: list[str]) -> object:
        read.append(list(groups))
        return batches(self, n, groups, columns)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    return read
