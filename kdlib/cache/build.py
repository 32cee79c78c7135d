"""Builds the shards of a cache: in one go or in parts, by one process or many, resumable.

A builder makes a contiguous run of shards under a lock and notes each finished one in a journal, so
that a killed build resumes after the last of them. The index is written last.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdlib.cache.index import (
    FORMAT,
    CacheError,
    Columns,
    Sums,
    all_sums,
    count_shards,
    index_paths,
    part_name,
    part_of,
    part_range,
    read_index,
    read_indexes,
    refuse_other,
    shard_span,
)
from kdlib.cache.journal import append, journal_paths, whole_shards, write_journal
from kdlib.cache.shards import Cache
from kdlib.cache.sources import Source
from kdlib.cache.workers import Job, Make, finished_shards, refused_by_disk
from kdlib.repro import files

WORTH_WORKERS = 4096  # examples; fewer are decoded before worker processes have started

_TEMPORARY = re.compile(
    r"\.([a-z_]+\d*-(?P<shard>\d+)\.npy|(index|journal)(-\d+-\d+)?\.jsonl?)\.\d+\.tmp"
)


def build_shards(
    folder: Path,
    header: dict[str, Any],
    columns: Columns,
    make: Make,
    *,
    n_examples: int,
    shard_size: int,
    fetch: Callable[[int, int], Any] | None = None,
    part: tuple[int, int] = (1, 1),
    n_workers: int = 0,
    describe: str = "cache",
) -> Cache:
    """Write a cache or a part of one, or finish one that was interrupted, or just open it when it
    is whole.

    Args:
        header: JSON-able; everything that determines the bytes.
        columns: Per column the dtype and the shape of one row.
        make: From what `fetch` returns to the arrays of all columns, each (n, *row shape). With
            workers it is pickled, and runs in other processes.
        n_examples: Rows in all. Row i belongs to example id i.
        shard_size: Rows per shard; the last shard may be shorter.
        fetch: From example ids [start, stop) to the argument of `make`; called in this process, in
            ascending order. None: that argument is (start, stop).
        part: (i, k): only the i-th of k equal runs of shards. Several processes may build different
            parts of one cache at the same time.
        n_workers: Processes that run `make`; 0 runs it here. At most `n_workers` + 1 shards are in
            memory.
        describe: Word in front of the progress bar.

    Returns: The open cache, restricted to the part unless that is the whole.
    Raises: CacheError when the folder holds a cache with another header (the difference is printed,
        nothing is touched), or cannot be written into; what is finished is kept.
        BlockingIOError when another process builds some of the same shards; ValueError when `make`
        returns other arrays than declared, or there is nothing to build. Whatever `fetch` and
        `make` raise comes through.
    """
    folder = Path(folder)
    if n_examples < 1 or shard_size < 1:
        raise ValueError(
            f"asked for {n_examples} examples in shards of {shard_size}; expected at least 1 each"
        )
    if n_workers < 0:
        raise ValueError(f"n_workers is {n_workers}; expected 0 or more")
    header = {"format": FORMAT, "n_examples": n_examples, "shard_size": shard_size, **header}
    header["columns"] = {name: [dtype, list(shape)] for name, (dtype, shape) in columns.items()}
    header = json.loads(files.canonical_json(header))
    n_shards = count_shards(header)
    first, stop = part_range(n_shards, part)
    if set(range(first, stop)) <= set(_indexed(folder, header)):
        if _contained(folder, first, stop, n_shards):
            _merge(folder, header, first, stop)
        return Cache(folder, header, None if part == (1, 1) else part)
    with _builder(folder, first, stop, n_shards):
        done = _make_missing(
            Job(folder, columns, make), header, first, stop, fetch, n_workers, describe
        )
        with refused_by_disk(folder):
            _finish(folder, header, done, first, stop)
    return Cache(folder, header, None if part == (1, 1) else part)


def _make_missing(
    job: Job,
    header: dict[str, Any],
    first: int,
    stop: int,
    fetch: Callable[[int, int], Any] | None,
    n_workers: int,
    describe: str,
) -> dict[int, Sums]:
    """Make those of the shards [first, stop) that are not there; the checksums of all of them."""
    folder = job.folder
    journal = folder / part_name("journal", first, stop, count_shards(header), ".jsonl")
    with refused_by_disk(folder):
        done = _collect(folder, header, first, stop)
        todo = [shard for shard in range(first, stop) if shard not in done]
        _demand_space(folder, header, job.columns, todo)
        write_journal(journal, header, done)  # anew: a torn last line would swallow the next
    with (
        contextlib.closing(finished_shards(job, header, todo, fetch, n_workers)) as shards,
        tqdm(
            total=_count_rows(header, range(first, stop)),
            initial=_count_rows(header, done),
            desc=describe,
            unit="img",
            leave=False,
        ) as progress,
    ):
        for shard, sums in shards:
            done[shard] = sums
            with refused_by_disk(folder):
                append(journal, shard, sums)
            progress.update(_count_rows(header, [shard]))
    return done


def _count_rows(header: dict[str, Any], shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in (shard_span(header, shard) for shard in shards))


def _indexed(folder: Path, header: dict[str, Any]) -> dict[int, Sums]:
    """Shards of the finished parts, and the checksums of their files."""
    indexed, entries = read_indexes(folder)
    if entries:
        refuse_other(folder, header, indexed)
    return {shard: entry["sha256"] for shard, entry in entries.items()}


def _collect(folder: Path, header: dict[str, Any], first: int, stop: int) -> dict[int, Sums]:
    """Which of the shards [first, stop) need not be made: they are in an index or a journal."""
    done = {}
    for journal in journal_paths(folder):
        done |= whole_shards(journal, header, first, stop)
    done |= _indexed(folder, header)
    return {shard: done[shard] for shard in sorted(done) if first <= shard < stop}


def _contained(folder: Path, first: int, stop: int, n_shards: int) -> list[Path]:
    """Journals and indexes that the index of the shards [first, stop) makes superfluous."""
    paths = []
    for path in (*journal_paths(folder), *index_paths(folder)):
        begin, end = part_of(path, n_shards)
        itself = path.name == part_name("index", first, stop, n_shards, ".json")
        paths += [path] if first <= begin and end <= stop and not itself else []
    return paths


def _finish(folder: Path, header: dict, done: Mapping, first: int, stop: int) -> None:
    """Write the index of the shards [first, stop), then drop what it makes superfluous."""
    shards = []
    for shard in range(first, stop):
        start, end = shard_span(header, shard)
        shards.append({"first_id": start, "n": end - start, "sha256": done[shard]})
    name = part_name("index", first, stop, count_shards(header), ".json")
    content = {"header": header, "shards": shards}
    files.write_json(folder / name, files.sealed(content))
    for path in _contained(folder, first, stop, count_shards(header)):
        path.unlink(missing_ok=True)


def _merge(folder: Path, header: dict[str, Any], first: int, stop: int) -> None:
    """Put finished parts under one index, unless the folder is read-only or being built in."""
    with (
        contextlib.suppress(CacheError, BlockingIOError),
        _builder(folder, first, stop, count_shards(header)),
        refused_by_disk(folder),
    ):
        done = _indexed(folder, header)
        if set(range(first, stop)) <= set(done):
            _finish(folder, header, done, first, stop)


@contextlib.contextmanager
def _builder(folder: Path, first: int, stop: int, n_shards: int) -> Iterator[None]:
    """Hold the lock of the shards [first, stop) while no other process builds any of them; remove
    temporary files before and after."""
    with contextlib.ExitStack() as stack:
        with refused_by_disk(folder):
            lock = folder / part_name(".lock", first, stop, n_shards, "")
            stack.enter_context(files.locked(lock, wait=False))
            for other in sorted(folder.glob(".lock*")):
                begin, end = part_of(other, n_shards)
                if other != lock and begin < stop and first < end:
                    _refuse_held(other)
            _remove_temporary(folder, first, stop, n_shards)  # of a builder that was killed
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                _remove_temporary(folder, first, stop, n_shards)  # of workers that were ended


def _refuse_held(lock: Path) -> None:
    with open(lock) as file:
        try:
            # shared: the builders of two parts may look at the whole's lock at the same time
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is building some of these shards: {lock} is locked; wait for it "
                "or stop it"
            ) from None


def _remove_temporary(folder: Path, first: int, stop: int, n_shards: int) -> None:
    for name in os.listdir(folder):
        if match := _TEMPORARY.fullmatch(name):
            shard = match["shard"]
            # the numbers of a part come before those of the process
            begin, end = (
                (int(shard), int(shard) + 1)
                if shard
                else part_of(Path(name.rsplit(".", 2)[0]), n_shards)
            )
            if first <= begin and end <= stop:
                (folder / name).unlink(missing_ok=True)


def _demand_space(folder: Path, header: dict[str, Any], columns: Columns, todo: list[int]) -> None:
    row = sum(np.dtype(d).itemsize * int(np.prod(shape)) for d, shape in columns.values())
    needed, free = row * _count_rows(header, todo), shutil.disk_usage(folder).free
    if needed > free:
        raise CacheError(
            f"the {len(todo)} shards to be made need {needed / 1e9:.2f} GB, and the disk of "
            f"{folder} has {free / 1e9:.2f} GB free; make room there, or choose another folder"
        )


def repair(folder: Path) -> list[str]:
    """Turn a damaged cache back into an unfinished build that keeps every whole shard.

    The next build makes only the shards that are missing or damaged.

    Returns: the names of the damaged files.
    Raises: CacheError when the folder holds no index, or cannot be written into.
    """
    folder = Path(folder)
    header, _ = read_indexes(folder)
    if not header:
        Cache(folder)  # raises, and says what is there
    n_shards = count_shards(header)
    with _builder(folder, 0, n_shards, n_shards):
        damaged = files.damaged_files(folder, all_sums(read_indexes(folder)[1]))
        with refused_by_disk(folder):
            for index in index_paths(folder):
                sums = {s: entry["sha256"] for s, entry in read_index(index)[1].items()}
                whole = {s: names for s, names in sums.items() if not set(names) & set(damaged)}
                if len(whole) < len(sums):
                    part = part_of(index, n_shards)
                    journal = folder / part_name("journal", *part, n_shards, ".jsonl")
                    write_journal(journal, header, whole)
                    index.unlink()
    return damaged


def build_images(
    source: Source,
    folder: Path,
    shard_size: int,
    part: tuple[int, int] = (1, 1),
    n_workers: int | None = None,
) -> Cache:
    """Cache the images (`images`, uint8 (C, H, W)) and labels (`labels`, int64; -1: none) of a
    source; of a relabelled one also the labels it had before (`original_labels`).

    Args:
        part: As in `build`.
        n_workers: Processes that decode; None takes one per CPU for encoded images worth it, else
            none.

    Returns: The open cache; its header carries source, split, class names and the source's
        identity.
    Raises: As `build`.
    """
    header = {
        "kind": "images",
        "source": source.name,
        "split": source.split,
        "class_names": list(source.class_names),
        "identity": source.identity,
    }
    if n_workers is None:
        worth = source.parallel and source.n_examples >= WORTH_WORKERS
        n_workers = files.n_cpus() if worth else 0
    return build_shards(
        folder,
        header,
        {c: ("|u1", source.image_shape) if c == "images" else ("<i8", ()) for c in source.columns},
        _Decode(source),
        n_examples=source.n_examples,
        shard_size=shard_size,
        fetch=source.fetch,
        part=part,
        n_workers=n_workers,
        describe=f"caching {source.name} {source.split}",
    )


@dataclass(frozen=True)
class _Decode:
    source: Source

    def __call__(self, payload: Any) -> dict[str, np.ndarray]:
        return dict(zip(self.source.columns, self.source.decode(payload), strict=True))
