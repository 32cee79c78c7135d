"""What was read of encoded images, one file beside each shard, and whether a source still has it.

`read-<shard>.json`, which is no part of the cache's fingerprint, holds the sha256, size and time of
each encoded image, how many were converted or cut, and what was passed over.
"""

import contextlib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache import index
from kdlib.cache.encoded import NOTES, ImageError
from kdlib.cache.image_files import Payload, shown, state_of
from kdlib.cache.shards import Cache
from kdlib.cache.sources import Encoded, Source
from kdlib.repro import files

FORMAT = 1
LISTED = 20  # names in a message; `cache check --all` lists all of them
CHUNK = 256  # images that are fetched at a time
COMPARE = "`python -m kdlib cache verify --source STUDY`"
TEXTS = NOTES | {"rounded": "of values that were rounded to 256 levels"}
_OF_IMAGES = ("names", "bytes", "mtime_ns", "sha256")  # lists of a record, an entry per image


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


def record_path(folder: Path, shard: int) -> Path:
    """The record of one shard."""
    return folder / f"read-{shard:05d}.json"


def noting(source: Source) -> Callable[[Path, int, Any], None] | None:
    """What writes the record of a shard of a source; None where there is nothing to note."""
    if source.encoded is not None:
        return partial(write_record, source.encoded)
    return None if source.counts is None else partial(_write_counts, source.counts)


def _write_counts(
    counts: Callable[[Any], dict[str, int]], folder: Path, shard: int, payload: Any
) -> None:
    """The record of a shard of arrays: what was converted, and no files."""
    record = {"format": FORMAT, "containers": "", "counts": counts(payload), "passed_over": {}}
    record |= {key: [] for key in _OF_IMAGES}
    files.write_json(record_path(folder, shard), files.sealed(record))


def write_record(encoded: Encoded, folder: Path, shard: int, payload: Any) -> None:
    """Note what the images of one shard are, as they are now.

    Args:
        payload: What the source's `fetch` gave, and what has been decoded of it.
    """
    if not isinstance(payload, Payload):  # of a relabelled source, with the first id before it
        payload = payload[1]
    counts = Counter(note for seen in payload.seen for note in seen.notes(encoded.rules))
    n_bytes, mtimes = zip(*map(state_of, payload.images), strict=True)
    record = {
        "format": FORMAT,
        "containers": encoded.containers,
        "counts": dict(counts),
        "passed_over": dict(encoded.passed_over),
        "names": names_of(encoded, payload),
        "bytes": list(n_bytes),
        "mtime_ns": list(mtimes),
        "sha256": [sha256_of(image) for image in payload.images],
    }
    files.write_json(record_path(folder, shard), files.sealed(record))


def read_record(folder: Path, shard: int) -> dict[str, Any] | None:
    """The record of one shard; None when there is none that can be trusted."""
    try:
        record = files.read_json(record_path(folder, shard))
    except (OSError, ValueError):
        return None
    return record if files.is_sealed(record) and _is_record(record) else None


def _is_record(record: dict[str, Any]) -> bool:
    lists = [record.get(key) for key in _OF_IMAGES]
    counts = [record.get(key) for key in ("counts", "passed_over")]
    return (
        record.get("format") == FORMAT
        and "containers" in record
        and all(isinstance(values, list) and len(values) == len(lists[0]) for values in lists)
        and all(isinstance(c, dict) and all(type(n) is int for n in c.values()) for c in counts)
    )


def names_of(encoded: Encoded, payload: Payload) -> list[str]:
    """A name for each image of a payload: its path below the folder of its split, or its number."""
    return [
        f"example {payload.first_id + i}"
        if isinstance(image, bytes)
        else image.removeprefix(encoded.base)
        for i, image in enumerate(payload.images)
    ]


def sha256_of(image: bytes | str) -> str:
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return files.sha256_file(Path(image))


def counted(cache: Cache) -> dict[str, Any] | None:
    """What the reader did with the images of a cache that are here.

    Returns: None for images that were no files. `images`, how many; `counts`, by keys of `TEXTS`;
        `passed_over`, files by what they are; `unknown`, shards of before records were kept.
    """
    if cache.header.get("source") not in ("folder", "huggingface", "tensors"):
        return None
    counts, passed, unknown = Counter(), {}, 0
    for shard in cache.shards.tolist():
        record = read_record(cache.folder, shard)
        if record is None:
            unknown += 1
            continue
        counts.update(record["counts"])
        passed = record["passed_over"]
    return {
        "images": len(cache.example_ids),
        "counts": dict(sorted(counts.items())),
        "passed_over": dict(sorted(passed.items())),
        "unknown": unknown,
    }


def sentence(done: dict[str, Any] | None) -> str:
    """What `counted` found, in one line; empty when there is nothing to say."""
    if done is None:
        return ""
    parts = [f"{done['counts'][key]:,} {text}" for key, text in TEXTS.items()
             if key in done["counts"]]  # fmt: skip
    if passed := done["passed_over"]:
        kinds = ", ".join(f"{shown(kind)} {n:,}" for kind, n in passed.items())
        parts.append(f"{sum(passed.values()):,} files passed over ({kinds})")
    if done["unknown"]:
        parts.append(
            f"{done['unknown']:,} shards were built before kdlib noted what it reads: what was "
            "converted there is not known, and their source cannot be compared by build; "
            f"{COMPARE} decodes it again"
        )
    return f"of {done['images']:,} images: {'; '.join(parts)}" if parts else ""


def listed(names: Sequence[str], sep: str = ", ") -> str:
    """`a, b, c and 40 more`."""
    text = sep.join(names[:LISTED])
    more = len(names) - LISTED
    return text if more <= 0 else f"{text}{sep}and {more:,} more"


def changed_since(
    source: Source, folder: Path, header: dict[str, Any], shards: Sequence[int]
) -> dict[int, list[str]]:
    """Shards whose images have other bytes now, with the names of these images.

    Files of the same size and time are taken for the same. Where the time alone is another, bytes
    are compared; equal ones pass, and the record takes the new time.
    """
    changed, encoded = {}, source.encoded
    for shard in shards:
        record = read_record(folder, shard)
        if record is None:
            continue
        if None in record["mtime_ns"] and record["containers"] == encoded.containers:
            continue  # bytes from files that are the same
        payload = encoded.fetch(*index.shard_span(header, shard))
        times, names = _compared(encoded, payload, record)
        names += _other_labels(folder, header, shard, payload)
        updated = record | {"mtime_ns": times, "containers": encoded.containers}
        if names:
            changed[shard] = names
        elif updated != record:
            with contextlib.suppress(files.DiskError):  # of a cache that may only be read
                files.write_json(record_path(folder, shard), files.sealed(updated))
    return changed


def _compared(
    encoded: Encoded, payload: Payload, record: dict[str, Any]
) -> tuple[list[int | None], list[str]]:
    """The times of now, and names of the images that differ from a record."""
    times, differ = [], []
    then = zip(*(record[key] for key in _OF_IMAGES), strict=True)
    for image, name, (name_then, n_bytes, mtime, sha256) in zip(
        payload.images, names_of(encoded, payload), then, strict=True
    ):
        now = state_of(image)
        times.append(now[1])
        same = now == (n_bytes, mtime) and mtime is not None
        if name != name_then or now[0] != n_bytes or not (same or sha256_of(image) == sha256):
            differ.append(shown(name))
    return times, differ


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


def by_name(source: Source, folder: Path, shards: Iterable[int]) -> Changes:
    """Files by name and size against the records, for a source whose list of files differs."""
    records = {shard: read_record(folder, shard) for shard in shards}
    noted = {i: r for i, r in records.items() if r is not None and None not in r["mtime_ns"]}
    encoded = source.encoded
    if not noted or encoded.once or isinstance(encoded.fetch(0, 1).images[0], bytes):
        return Changes()
    return _against(source, noted, "bytes", lambda image: state_of(image)[0], lambda i: True)


def compare(source: Source, cache: Cache) -> Changes:
    """Every byte of the source's images against what was read.

    Shards without a record are compared by their pixels: the source is decoded again.
    """
    header, changes = cache.header, Changes()
    same_list = header["identity"] == source.identity
    records = {shard: read_record(cache.folder, shard) for shard in cache.shards.tolist()}
    noted = {shard: record for shard, record in records.items() if record is not None}
    if source.encoded is None:  # tensors, whose records name no images
        noted = {}
    if noted:
        changes = _against(
            source, noted, "sha256", sha256_of,
            lambda i: not same_list or i // cache.shard_size in noted,
        )  # fmt: skip
    changes.unknown = [shard for shard in records if shard not in noted]
    for shard in records if same_list else ():
        span = index.shard_span(header, shard)
        if shard not in noted:
            changes.changed += _other_pixels(source, cache, *span)
        if source.encoded is not None:
            payload = source.encoded.fetch(*span)
            changes.changed += _other_labels(cache.folder, header, shard, payload)
    if not changes and not same_list:  # of before there were records, or another order
        changes.changed += files.difference(source.identity, header["identity"], "identity.")
    return changes


def _against(
    source: Source,
    records: dict[int, dict[str, Any]],
    key: str,
    value_of: Callable[[bytes | str], Any],
    is_new: Callable[[int], bool],
) -> Changes:
    """What some records hold of each image, found by its name, against what it is now.

    Args:
        is_new: Whether an example id without an entry is an image that came.
    """
    changes, then, now = Changes(), {}, set()
    for record in records.values():
        then |= dict(zip(record["names"], record[key], strict=True))
    for first in range(0, source.n_examples, CHUNK):
        payload = source.encoded.fetch(first, min(first + CHUNK, source.n_examples))
        for i, name in enumerate(names_of(source.encoded, payload)):
            now.add(name)
            if name in then:
                try:
                    same = value_of(payload.images[i]) == then[name]
                except OSError:
                    same = False
                changes.changed += [] if same else [shown(name)]
            elif is_new(first + i):
                changes.new.append(shown(name))
    changes.missing = [shown(name) for name in then if name not in now]
    return changes


def _other_pixels(source: Source, cache: Cache, start: int, stop: int) -> list[str]:
    differ = []
    for i in range(start, stop):
        try:
            same = np.array_equal(source.read(i, i + 1)[0], cache.read("images", np.array([i])))
        except ImageError as error:
            differ.append(str(error))
            continue
        differ += [] if same else [f"example {i}"]
    return differ
