"""Which shards a cache has, and the sha256 of their files: the indexes of the parts that are built,
and the journals of those that are not finished.

A cache is a folder of plain NumPy files, `<column>-<shard>.npy`, and one index for each part that
was built, written last: `index.json` for a cache built whole, `index-<first>-<stop>.json` for the
shards [first, stop). The header, equal in all of them, holds everything that determines the bytes.
While a part is built, its journal has a line for each whole shard.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.remedies import delete_and_run
from kdlib.repro import files

FORMAT = 1
_INDEX_NAME = re.compile(r"index(-\d{5,}-\d{5,})?\.json")
_COLUMN = re.compile(r"[a-z_]+\d*")  # a file's name begins with it: no path out of the folder
_DTYPE = re.compile(r"[<|][biuf]\d")  # of rows; objects would have to be unpickled
_MOST_SHARDS = 10**7  # a list of more of them would fill the memory
Columns = Mapping[str, tuple[str, tuple[int, ...]]]  # column -> (dtype, shape of one example's row)
Sums = dict[str, str]  # sha256 of each file, by name
Shards = dict[int, Sums]  # of the files of each shard


class CacheError(ValueError):
    """A cache that is unfinished, damaged, of another format, or of other images than expected."""


def file_name(column: str, shard: int) -> str:
    """Name of the file that holds one shard of one column."""
    return f"{column}-{shard:05d}.npy"


def part_name(stem: str, first: int, stop: int, n_shards: int, suffix: str) -> str:
    """Name of the file of one part, shards [first, stop); a part that is the whole has no range."""
    whole = (first, stop) == (0, n_shards)
    return f"{stem}{suffix}" if whole else f"{stem}-{first:05d}-{stop:05d}{suffix}"


def part_of(path: Path, n_shards: int) -> tuple[int, int]:
    """Shards [first, stop) of the part that a journal, an index or a lock is named after."""
    numbers = re.findall(r"\d+", path.name)
    return (int(numbers[0]), int(numbers[1])) if numbers else (0, n_shards)


def part_range(n_shards: int, part: tuple[int, int]) -> tuple[int, int]:
    """Shards [first, stop) of part i of k, as (i, k) with i counted from 1.

    Raises: ValueError for a part that holds no shard.

    >>> [part_range(7, (i, 3)) for i in (1, 2, 3)]
    [(0, 2), (2, 4), (4, 7)]
    """
    i, k = part
    if not 1 <= i <= k <= n_shards:
        raise ValueError(
            f"part {i}/{k} of {n_shards} shards; expected i/k with 1 <= i <= k <= {n_shards}"
        )
    return (i - 1) * n_shards // k, i * n_shards // k


def shard_span(header: Mapping[str, Any], shard: int) -> tuple[int, int]:
    """Example ids [start, stop) of one shard."""
    start = shard * header["shard_size"]
    return start, min(start + header["shard_size"], header["n_examples"])


def count_shards(header: Mapping[str, Any]) -> int:
    """How many shards the whole cache has."""
    return -(-header["n_examples"] // header["shard_size"])


def refuse_other(path: Path, expected: Mapping[str, Any], header: Mapping[str, Any]) -> None:
    """Compare the header that a cache, an index or a journal has with the one expected.

    Raises: CacheError that names each entry that differs.
    """
    if lines := files.difference(dict(expected), dict(header)):
        folder = path.parent if path.is_file() else path
        raise CacheError(
            f"{path} was made of something else (there -> expected): {'; '.join(lines)}; "
            f"nothing was changed: choose another folder, or {delete_and_run(folder)}"
        )


def index_paths(folder: Path) -> list[Path]:
    """The indexes of all finished parts in a folder, sorted."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    paths = [folder / name for name in names if _INDEX_NAME.fullmatch(name)]
    return [path for path in paths if path.exists()]  # a link to nothing is no index


def read_indexes(folder: Path) -> tuple[dict[str, Any], Shards]:
    """Header and shards of all parts in a folder; ({}, {}) when there is no index.

    Raises: CacheError for an index that is cut, foreign, of another format, or at odds with
        another one.
    """
    header: dict[str, Any] = {}
    shards: Shards = {}
    for path in index_paths(folder):
        try:
            one, listed = read_index(path)
        except FileNotFoundError:  # a builder has just replaced it by the index of a larger part
            return read_indexes(folder)
        refuse_other(path, header or one, one)
        for shard, sums in listed.items():
            if shards.get(shard, sums) != sums:
                raise CacheError(
                    f"{path} and another index differ on shard {shard}; "
                    f"{delete_and_run(path.parent)}"
                )
        header = one
        shards |= listed
    return header, shards


def read_index(path: Path) -> tuple[dict[str, Any], Shards]:
    """Header and shards of one part.

    Raises: CacheError for an index that is cut, foreign or of another format.
    """
    try:
        index = files.read_json(path, lambda path: delete_and_run(path.parent))
    except ValueError as error:
        raise CacheError(str(error)) from None
    header = index.get("header") if isinstance(index, dict) else None
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise CacheError(
            f"{path} has format {version}; this kdlib reads format {FORMAT}: move its folder away, "
            f"or {delete_and_run(path.parent)}"
        )
    if not files.is_sealed(index):
        raise CacheError(f"{path} was changed after it was written; {delete_and_run(path.parent)}")
    try:
        return header, _checked(path, header, index["shards"])
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CacheError(
            f"{path} is no index of a cache ({error!r}); {delete_and_run(path.parent)}"
        ) from None


def _checked(path: Path, header: dict[str, Any], listed: list[dict[str, Any]]) -> Shards:
    """The shards of an index that may be hostile: it must name the files of its shards only, no
    type that is unpickled, and as many shards as it lists."""
    n_shards, columns = count_shards(header), header["columns"]
    first, stop = part_of(path, n_shards)
    if not 0 <= first < stop <= n_shards <= _MOST_SHARDS or stop - first != len(listed):
        raise ValueError(f"{len(listed)} shards for the part [{first}, {stop}) of {n_shards}")
    for column, (dtype, shape) in columns.items():
        if not (_COLUMN.fullmatch(column) and _DTYPE.fullmatch(dtype)) or min(shape, default=0) < 0:
            raise ValueError(f"column {column!r} has rows of {dtype} {shape}")
        np.dtype(dtype)  # TypeError for one that NumPy does not know
    shards = {}
    for shard, entry in enumerate(listed, first):
        shards[shard] = entry["sha256"]
        if entry != _entry(header, shard, shards[shard]) or not _names_files(header, shard, entry):
            raise ValueError(f"shard {shard} has other files or examples than its place says")
    return shards


def _entry(header: dict[str, Any], shard: int, sums: Sums) -> dict[str, Any]:
    start, stop = shard_span(header, shard)
    return {"first_id": start, "n": stop - start, "sha256": sums}


def _names_files(header: dict[str, Any], shard: int, entry: dict[str, Any]) -> bool:
    """Whether an entry of an index or a journal has the files of its shard, and no others."""
    return set(entry["sha256"]) == {file_name(column, shard) for column in header["columns"]}


def write_index(path: Path, header: dict[str, Any], shards: Shards) -> None:
    """Write the index of a part whose shards are whole."""
    listed = [_entry(header, shard, sums) for shard, sums in sorted(shards.items())]
    files.write_json(path, files.sealed({"header": header, "shards": listed}))


def journal_paths(folder: Path) -> list[Path]:
    """The journals of all unfinished parts in a folder, sorted."""
    return sorted(folder.glob("journal*.jsonl"))


def write_journal(journal: Path, header: dict[str, Any], shards: Shards) -> None:
    """Begin a journal with the header of a cache and the shards that are whole already."""
    lines = [{"header": header}, *({"shard": i, "sha256": sums} for i, sums in shards.items())]
    text = "".join(files.canonical_json(line) + "\n" for line in lines)
    files.write_atomic(journal, lambda file: file.write(text.encode()))


def append(journal: Path, shard: int, sums: Sums) -> None:
    """Note a finished shard; it is on the disk when this returns."""
    with files.writing(journal), open(journal, "a") as log:
        log.write(files.canonical_json({"shard": shard, "sha256": sums}) + "\n")
        log.flush()
        os.fsync(log.fileno())


def read_journal(journal: Path) -> tuple[dict[str, Any], Shards]:
    """Header of an unfinished part, and the shards it has finished.

    Reading ends at a torn line. A journal that has just become an index gives ({}, {}).
    """
    header: dict[str, Any] = {}
    shards: Shards = {}
    try:
        for line in journal.read_bytes().splitlines():
            entry = json.loads(line)
            if not header:
                header = dict(entry["header"])
            elif not _names_files(header, entry["shard"], entry):
                break
            else:
                shards[entry["shard"]] = dict(entry["sha256"])
    except (FileNotFoundError, ValueError, TypeError, KeyError, RecursionError):
        pass
    return header, shards


def all_sums(shards: Shards) -> Sums:
    """Checksums of the files of all shards."""
    return {name: sha256 for sums in shards.values() for name, sha256 in sums.items()}


def whole_shards(folder: Path, shards: Shards) -> Shards:
    """The shards whose files are there and have their checksums; every byte is read."""
    damaged = set(files.damaged_files(folder, all_sums(shards)))
    return {shard: sums for shard, sums in shards.items() if not damaged & set(sums)}
