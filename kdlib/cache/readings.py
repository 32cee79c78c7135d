"""Records of what the reader of encoded images did, one file beside each shard.

`read-<shard>.json`, which is no part of the cache's fingerprint, holds the sha256, size and time of
each encoded image, how many were converted or cut, and what was passed over.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdlib.cache.encoded import NOTES
from kdlib.cache.image_files import Payload, shown
from kdlib.cache.shards import Cache
from kdlib.cache.sources import Encoded
from kdlib.repro import files

FORMAT = 1
LISTED = 20  # names in a message; `cache check` lists all of them
COMPARE = "`python -m kdlib cache verify --source STUDY`"


def record_path(folder: Path, shard: int) -> Path:
    """The record of one shard."""
    return folder / f"read-{shard:05d}.json"


def write_record(encoded: Encoded, folder: Path, shard: int, payload: Any) -> None:
    """Note what the images of one shard are, as they are now.

    Args:
        payload: What the source's `fetch` gave, and what has been decoded of it.
    """
    if not isinstance(payload, Payload):  # of a relabelled source, with the first id before it
        payload = payload[1]
    counts = Counter(note for seen in payload.seen for note in seen.notes(encoded.rules))
    states = [(*state_of(image), sha256_of(image)) for image in payload.images]
    n_bytes, mtimes, sums = map(list, zip(*states, strict=True))
    record = {
        "format": FORMAT,
        "containers": encoded.containers,
        "counts": dict(counts),
        "passed_over": dict(encoded.passed_over),
        "names": names_of(encoded, payload),
        "bytes": n_bytes,
        "mtime_ns": mtimes,
        "sha256": sums,
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
    lists = [record.get(key) for key in ("names", "bytes", "mtime_ns", "sha256")]
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


def state_of(image: bytes | str) -> tuple[int, int | None]:
    """Size, and time of the last change where it is a file."""
    if isinstance(image, bytes):
        return len(image), None
    state = os.stat(image)
    return state.st_size, state.st_mtime_ns


def sha256_of(image: bytes | str) -> str:
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    return files.sha256_file(Path(image))


def counted(cache: Cache) -> dict[str, Any] | None:
    """What the reader did with the images of a cache that are here.

    Returns: None for images that were no files. `images`, how many; `counts`, by keys of `NOTES`;
        `passed_over`, files by what they are; `unknown`, shards of before records were kept.
    """
    if cache.header.get("source") not in ("folder", "huggingface"):
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
    parts = [f"{done['counts'][key]:,} {text}" for key, text in NOTES.items()
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


def listed(names: Sequence[str], most: int = LISTED, sep: str = ", ") -> str:
    """`a, b, c and 40 more`."""
    text = sep.join(names[:most])
    return text if len(names) <= most else f"{text}{sep}and {len(names) - most:,} more"
