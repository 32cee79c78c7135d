"""The journal of an unfinished build: which shards are whole."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdlib.cache.shards import CacheError, damaged_files, file_name
from kdlib.repro import files


def journal_paths(folder: Path) -> list[Path]:
    """The journals of all unfinished parts in a folder, sorted."""
    return sorted(folder.glob("journal*.jsonl"))


def _write_journal(journal: Path, header: dict, done: Mapping[int, dict[str, str]]) -> None:
    lines = [{"header": header}, *({"shard": i, "sha256": sums} for i, sums in done.items())]
    text = "".join(files.canonical_json(line) + "\n" for line in lines)
    files.write_atomic(journal, lambda file: file.write(text.encode()))


def _append(journal: Path, entry: dict) -> None:
    with open(journal, "a") as log:
        log.write(files.canonical_json(entry) + "\n")
        log.flush()
        os.fsync(log.fileno())


def read_journal(journal: Path) -> tuple[dict[str, Any], dict[int, dict[str, str]]]:
    """Header of an unfinished part, and the checksums of the shards it has finished.

    A torn line and what follows it count for nothing; a journal that has just become an index is
    ({}, {}).
    """
    header: dict[str, Any] = {}
    shards: dict[int, dict[str, str]] = {}
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


def _journalled(journal: Path, header: dict, first: int, stop: int) -> dict[int, dict[str, str]]:
    """Shards in [first, stop) that a journal has and whose files are whole."""
    found, shards = read_journal(journal)
    if found and (lines := files.difference(header, found)):
        raise CacheError(
            f"{journal} is of an unfinished cache of something else ({'; '.join(lines)}); finish "
            "or delete that one, or choose another folder"
        )
    shards = {shard: sums for shard, sums in shards.items() if first <= shard < stop}
    sums = {name: good for names in shards.values() for name, good in names.items()}
    bad = set(damaged_files(journal.parent, sums))
    return {shard: names for shard, names in shards.items() if not bad & set(names)}
