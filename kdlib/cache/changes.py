"""Whether the encoded images of a source are still those that a cache was made from."""

import contextlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache import index
from kdlib.cache.encoded import ImageError
from kdlib.cache.image_files import Payload, shown
from kdlib.cache.readings import (
    listed,
    names_of,
    read_record,
    record_path,
    sha256_of,
    state_of,
)
from kdlib.cache.shards import Cache
from kdlib.cache.sources import Encoded, Source
from kdlib.repro import files

CHUNK = 256  # images whose bytes are read at a time


@dataclass
class Changes:
    """Names of files by what happened to them since they were read, and shards without a record."""

    changed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    unknown: list[int] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.new)

    def listed(self) -> str:
        """In one line; empty when there is none."""
        parts = {"changed": self.changed, "missing": self.missing, "new": self.new}
        return "; ".join(f"{what}: {listed(names)}" for what, names in parts.items() if names)


def changed_since(
    source: Source, folder: Path, header: dict[str, Any], shards: Sequence[int]
) -> dict[int, list[str]]:
    """Shards whose images have other bytes now, with the names of these images.

    Files of the same size and time are taken for the same. Where the time alone is another, bytes
    are compared; equal ones pass, and the record takes the new time.
    """
    changed = {}
    for shard in shards:
        record = read_record(folder, shard)
        if record is None:
            continue
        of_bytes = None in record["mtime_ns"]
        if of_bytes and record["containers"] == source.encoded.containers:
            continue
        payload = source.encoded.fetch(*index.shard_span(header, shard))
        record, names = _compared(source.encoded, payload, record)
        names += _other_labels(folder, header, shard, payload)
        if names:
            changed[shard] = names
        elif record is not None:
            with contextlib.suppress(files.DiskError):  # of a cache that may only be read
                files.write_json(record_path(folder, shard), files.sealed(record))
    return changed


def _other_labels(folder: Path, header: dict[str, Any], shard: int, payload: Payload) -> list[str]:
    """Names of the examples of a shard whose label is another in the source now."""
    column = "original_labels" if "original_labels" in header["columns"] else "labels"
    try:
        then = np.load(folder / index.file_name(column, shard), allow_pickle=False)
    except (OSError, ValueError, EOFError):  # a damaged shard is found where it is read
        return []
    if then.shape != payload.labels.shape:
        return []
    differ = np.flatnonzero(then != payload.labels).tolist()
    return [f"label of example {payload.first_id + i}" for i in differ]


def _compared(
    encoded: Encoded, payload: Payload, record: dict[str, Any]
) -> tuple[dict[str, Any] | None, list[str]]:
    """The record with the times of now, None when it has them; names of images that differ."""
    names, times, differ = names_of(encoded, payload), [], []
    kept = zip(*(record[key] for key in ("names", "bytes", "mtime_ns", "sha256")), strict=True)
    for image, name, (name_then, n_bytes, mtime, sha256) in zip(
        payload.images, names, kept, strict=True
    ):
        try:
            now = state_of(image)
        except OSError:
            differ.append(shown(name))
            continue
        times.append(now[1])
        same = now == (n_bytes, mtime) and mtime is not None
        if name != name_then or now[0] != n_bytes or not (same or sha256_of(image) == sha256):
            differ.append(shown(name))
    updated = record | {"mtime_ns": times, "containers": encoded.containers}
    return (None if updated == record else updated), differ


def by_name(source: Source, folder: Path, shards: Iterable[int]) -> Changes:
    """Files by name and size against the records, for a source whose list of files differs."""
    then, changes = {}, Changes()
    for shard in shards:
        record = read_record(folder, shard)
        if record is not None and None not in record["mtime_ns"]:
            then |= dict(zip(record["names"], record["bytes"], strict=True))
    if not then or source.encoded.once:
        return changes
    payload = source.encoded.fetch(0, source.n_examples)
    if any(isinstance(image, bytes) for image in payload.images):
        return changes
    now = dict(zip(names_of(source.encoded, payload), payload.images, strict=True))
    changes.missing = [shown(name) for name in then if name not in now]
    changes.new = [shown(name) for name in now if name not in then]
    changes.changed = [
        shown(name) for name in then if name in now and os.stat(now[name]).st_size != then[name]
    ]
    return changes


def compare(source: Source, cache: Cache) -> Changes:
    """Every byte of the source's images against what was read.

    Shards without a record are compared by their pixels: the source is decoded again.
    """
    changes, then, header = Changes(), {}, cache.header
    same_list = header["identity"] == source.identity
    for shard in cache.shards.tolist():
        record = read_record(cache.folder, shard)
        if record is not None:
            then |= dict(zip(record["names"], record["sha256"], strict=True))
            continue
        changes.unknown.append(shard)
        if same_list:
            changes.changed += _other_pixels(source, cache, *index.shard_span(header, shard))
    if source.encoded is not None and then:
        _compare_bytes(source, cache, then, changes)
    if source.encoded is not None and same_list:
        for shard in cache.shards.tolist():
            payload = source.encoded.fetch(*index.shard_span(header, shard))
            changes.changed += _other_labels(cache.folder, header, shard, payload)
    if not changes and not same_list:  # of before there were records, or another order
        changes.changed += files.difference(source.identity, header["identity"], "identity.")
    return changes


def _compare_bytes(source: Source, cache: Cache, then: dict[str, str], changes: Changes) -> None:
    """Add to the changes what differs from the sha256 of each name."""
    held, now = set(cache.shards.tolist()) - set(changes.unknown), set()
    same_list = cache.header["identity"] == source.identity
    for first in range(0, source.n_examples, CHUNK):
        payload = source.encoded.fetch(first, min(first + CHUNK, source.n_examples))
        for i, name in enumerate(names_of(source.encoded, payload)):
            now.add(name)
            if name in then:
                try:
                    same = sha256_of(payload.images[i]) == then[name]
                except OSError:
                    same = False
                changes.changed += [] if same else [shown(name)]
            elif not same_list or (first + i) // cache.shard_size in held:
                changes.new.append(shown(name))
    changes.missing = [shown(name) for name in then if name not in now]


def _other_pixels(source: Source, cache: Cache, start: int, stop: int) -> list[str]:
    differ = []
    for i in range(start, stop):
        try:
            images, _ = source.read(i, i + 1)[:2]
            same = np.array_equal(images, cache.read("images", np.array([i])))
        except ImageError as error:
            differ.append(str(error))
            continue
        differ += [] if same else [f"example {i}"]
    return differ
