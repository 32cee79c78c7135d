"""A small cache of numbers that tell their example id, and builds of it that end early."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdlib.cache.build import build_shards
from kdlib.cache.shards import Cache

N, SIZE = 17, 5  # four shards: 5, 5, 5, 2
COLUMNS = {"values": ("<i4", (2, 3)), "labels": ("<i8", ())}
HEADER = {"kind": "numbers", "nested": {"a": 1}}


def make(span: tuple[int, int]) -> dict[str, np.ndarray]:
    """Rows that say which example they belong to: 6 * id + place."""
    ids = np.arange(*span)
    values = 6 * ids[:, None] + np.arange(6)
    return {"values": values.reshape(-1, 2, 3).astype("<i4"), "labels": ids}


def make_cache(
    folder: Path,
    function: Callable = make,
    n: int = N,
    shard_size: int = SIZE,
    part: tuple[int, int] = (1, 1),
    **changes,
) -> Cache:
    header = HEADER | changes
    return build_shards(
        folder, header, COLUMNS, function, n_examples=n, shard_size=shard_size, part=part
    )


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but the locks, and its bytes."""
    paths = (p for p in sorted(folder.iterdir()) if not p.name.startswith(".lock"))
    return {path.name: path.read_bytes() for path in paths}


def recording(starts: list[int]) -> Callable:
    """`make`, which also notes where the shards it makes begin."""
    return lambda span: (starts.append(span[0]), make(span))[1]


def never(span: tuple[int, int]) -> None:
    pytest.fail(f"examples {span} were made again")


def stopping(shard: int, error: BaseException) -> Callable:
    """`make`, which raises at one shard."""

    def makes(span):
        if span[0] == shard * SIZE:
            raise error
        return make(span)

    return makes


def interrupted(folder: Path, shard: int = 3, part: tuple[int, int] = (1, 1)) -> Path:
    """Begin a build that ends before one of its shards; returns its journal."""
    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, stopping(shard, KeyboardInterrupt()), part=part)
    [journal] = folder.glob("journal*")
    return journal
