"""The journal of an unfinished build: which shards are whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlib.cache.index import CacheError, Sums, file_name
from kdlib.repro import files


def journal_paths(folder: Path) -> list[Path]:
    """The journals of all unfinished parts in a folder, sorted."""
    return sorted(folder.glob("journal*.jsonl"))


def write_journal(journal: Path, header: dict[str, Any], done: Mapping[int, Sums]) -> None:
    """Begin a journal with the header of a cache and the shards that are whole already."""
    lines = [{"header": header}, *({"shard": i, "sha256": sums} for i, sums in done.items())]
    text = "".join(files.canonical_json(line) + "\n" for line in lines)
    files.write_atomic(journal, lambda file: file.write(text.encode()))


def append(journal: Path, shard: int, sums: Sums) -> None:
    """Note a finished shard; it is on the disk when this returns."""
    entry = {"shard": shard, "sha256": sums}
    with files.writing(journal), open(journal, "a") as log:
        log.write(files.canonical_json(entry) + "\n")
        log.flush()
        os.fsync(log.fileno())


def read_journal(journal: Path) -> tuple[dict[str, Any], dict[int, Sums]]:
    """Header of an unfinished part, and the checksums of the shards it has finished.

    Reading ends at a torn line. A journal that has just become an index gives ({}, {}).
    """
    header: dict[str, Any] = {}
    shards: dict[int, Sums] = {}
    try:
        lines = journal.read_bytes().splitlines()
        for line in lines:
            entry = json.loads(line)
            if not header:
                header = dict(entry["header"])
            else:
                names = {file_name(column, entry["shard"]) for column in header["columns"]}
                if names != set(entry["sha256"]):
                    break
                shards[entry["shard"]] = dict(entry["sha256"])
    except FileNotFoundError:
        return {}, {}
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return header, shards


def whole_shards(journal: Path, header: dict[str, Any], first: int, stop: int) -> dict[int, Sums]:
    """Shards in [first, stop) that a journal has and whose files are whole.

    Raises: CacheError for the journal of a cache with another header.
    """
    noted, shards = read_journal(journal)
    if noted and (lines := files.difference(header, noted)):
        raise CacheError(
            f"{journal} is of an unfinished cache of something else ({'; '.join(lines)}); finish "
            "or delete that one, or choose another folder"
        )
    shards = {shard: sums for shard, sums in shards.items() if first <= shard < stop}
    sums = {name: good for names in shards.values() for name, good in names.items()}
    damaged = set(files.damaged_files(journal.parent, sums))
    return {shard: names for shard, names in shards.items() if not damaged & set(names)}
