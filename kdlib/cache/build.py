"""How the shards of a cache are made: in one go or in parts, by one process or many, resumable.

A builder makes a contiguous run of shards under a lock of its own and notes each finished one in
its journal, so a killed build resumes after the last of them and a part of another machine is never
made twice. Its index is written last. Leaves to others: what the files mean (`cache`), and where
the rows come from (`data`, `teacher`).
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

from kdlib.cache.journal import _append, _journalled, _write_journal, journal_paths
from kdlib.cache.shards import (
    FORMAT,
    Cache,
    CacheError,
    Columns,
    count_shards,
    damaged_files,
    index_paths,
    part_name,
    part_range,
    read_index,
    read_indexes,
    refuse_other,
    shard_span,
)
from kdlib.cache.sources import Source
from kdlib.cache.workers import Make, _Job, _made, _spoken
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
    job = _Job(folder, columns, make)
    with _builder(folder, first, stop, n_shards):
        journal = folder / part_name("journal", first, stop, n_shards, ".jsonl")
        with _spoken(folder):
            done = _collect(folder, header, first, stop)
            todo = [shard for shard in range(first, stop) if shard not in done]
            _demand_space(folder, header, columns, todo)
            _write_journal(journal, header, done)  # anew: a torn last line would swallow the next
        with (
            contextlib.closing(_made(job, header, todo, fetch, n_workers)) as made,
            tqdm(
                total=_count_rows(header, range(first, stop)),
                initial=_count_rows(header, done),
                desc=describe,
                unit="img",
                leave=False,
            ) as progress,
        ):
            for shard, sums in made:
                done[shard] = sums
                with _spoken(folder):
                    _append(journal, {"shard": shard, "sha256": sums})
                progress.update(_count_rows(header, [shard]))
        with _spoken(folder):
            _finish(folder, header, done, first, stop)
    return Cache(folder, header, None if part == (1, 1) else part)


def _count_rows(header: dict[str, Any], shards: Iterable[int]) -> int:
    return sum(stop - start for start, stop in (shard_span(header, shard) for shard in shards))


def _indexed(folder: Path, header: dict[str, Any]) -> dict[int, dict[str, str]]:
    """Shards of the finished parts, and the checksums of their files."""
    found, entries = read_indexes(folder)
    if entries:
        refuse_other(folder, header, found)
    return {shard: entry["sha256"] for shard, entry in entries.items()}


def _collect(
    folder: Path, header: dict[str, Any], first: int, stop: int
) -> dict[int, dict[str, str]]:
    """Which of the shards [first, stop) need not be made: they are in an index or a journal."""
    done = {}
    for journal in journal_paths(folder):
        done |= _journalled(journal, header, first, stop)
    done |= _indexed(folder, header)
    return {shard: done[shard] for shard in sorted(done) if first <= shard < stop}


def part_of(path: Path, n_shards: int) -> tuple[int, int]:
    """Shards [first, stop) of the part that a journal, an index or a lock is named after."""
    numbers = re.findall(r"\d+", path.name)
    return (int(numbers[0]), int(numbers[1])) if numbers else (0, n_shards)


def _contained(folder: Path, first: int, stop: int, n_shards: int) -> list[Path]:
    """Journals and indexes that the index of the shards [first, stop) makes superfluous."""
    own = part_name("index", first, stop, n_shards, ".json")
    found = []
    for path in (*journal_paths(folder), *index_paths(folder)):
        begin, end = part_of(path, n_shards)
        found += [path] if first <= begin and end <= stop and path.name != own else []
    return found


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
    """Put finished parts under one index, where we may write and nobody else is at work."""
    with (
        contextlib.suppress(CacheError, BlockingIOError),
        _builder(folder, first, stop, count_shards(header)),
        _spoken(folder),
    ):
        done = _indexed(folder, header)
        if set(range(first, stop)) <= set(done):
            _finish(folder, header, done, first, stop)


@contextlib.contextmanager
def _builder(folder: Path, first: int, stop: int, n_shards: int) -> Iterator[None]:
    """Hold the lock of the shards [first, stop), when nobody builds any of them; tidy up."""
    with contextlib.ExitStack() as stack:
        with _spoken(folder):
            own = folder / part_name(".lock", first, stop, n_shards, "")
            stack.enter_context(files.locked(own, wait=False))
            for other in sorted(folder.glob(".lock*")):
                begin, end = part_of(other, n_shards)
                if other != own and begin < stop and first < end:
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
        if found := _TEMPORARY.fullmatch(name):
            shard = found["shard"]
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
        entries = read_indexes(folder)[1].values()
        damaged = damaged_files(folder, {n: s for e in entries for n, s in e["sha256"].items()})
        with _spoken(folder):
            for index in index_paths(folder):
                _, mine = read_index(index)
                sums = {shard: entry["sha256"] for shard, entry in mine.items()}
                whole = {s: names for s, names in sums.items() if not set(names) & set(damaged)}
                if len(whole) < len(sums):
                    part = part_of(index, n_shards)
                    journal = folder / part_name("journal", *part, n_shards, ".jsonl")
                    _write_journal(journal, header, whole)
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
    source; of one with other labels also its own (`original_labels`).

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
