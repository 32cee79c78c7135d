"""Builds the shards of a cache: in one go or in parts, by one process or many, resumable.

A builder makes a contiguous run of shards under a lock and notes each finished one in a journal, so
that a killed build resumes after the last of them. The index is written last.
"""

import json
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdlib.cache.index import (
    FORMAT,
    Columns,
    Sums,
    all_sums,
    count_shards,
    index_paths,
    part_of,
    part_range,
    read_index,
    read_indexes,
)
from kdlib.cache.journal import append, write_journal
from kdlib.cache.part import Part
from kdlib.cache.shards import Cache
from kdlib.cache.sources import Source
from kdlib.cache.workers import Job, Make, finished_shards
from kdlib.repro import files

WORTH_WORKERS = 4096  # examples; fewer are decoded before worker processes have started


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
        nothing is touched), or the disk has too little room; DiskError when the folder cannot be
        written into, finished shards are kept; BlockingIOError when another process builds some of
        the same shards; ValueError when `make` returns other arrays than declared, or there is
        nothing to build. Errors of `fetch` and `make` come through.
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
    mine = Part(folder, header, *part_range(count_shards(header), part))
    if mine.finished:
        if mine.superfluous():
            with suppress(files.DiskError, BlockingIOError), mine.locked():
                mine.finish(mine.indexed())  # one index instead of those of smaller parts
    else:
        with mine.locked():
            mine.finish(_make_missing(mine, Job(folder, columns, make), fetch, n_workers, describe))
    return Cache(folder, header, None if part == (1, 1) else part)


def _make_missing(
    part: Part,
    job: Job,
    fetch: Callable[[int, int], Any] | None,
    n_workers: int,
    describe: str,
) -> dict[int, Sums]:
    """Make the shards of a part that are not there; the checksums of all its shards."""
    done, journal = part.collected(), part.path("journal", ".jsonl")
    todo = [shard for shard in part.shards if shard not in done]
    part.demand_space(todo)
    write_journal(journal, part.header, done)  # anew: a torn last line would swallow the next
    with (
        closing(finished_shards(job, part.header, todo, fetch, n_workers)) as shards,
        tqdm(
            total=part.count_rows(part.shards),
            initial=part.count_rows(done),
            desc=describe,
            unit="img",
            leave=False,
        ) as progress,
    ):
        for shard, sums in shards:
            done[shard] = sums
            append(journal, shard, sums)
            progress.update(part.count_rows([shard]))
    return done


def repair(folder: Path) -> list[str]:
    """Turn a damaged cache back into an unfinished build that keeps every whole shard.

    The next build makes only the shards that are missing or damaged.

    Returns: the names of the damaged files.
    Raises: CacheError when the folder holds no index; DiskError when it cannot be written into.
    """
    folder = Path(folder)
    header, _ = read_indexes(folder)
    if not header:
        Cache(folder)  # raises, and says what is there
    n_shards = count_shards(header)
    with Part(folder, header, 0, n_shards).locked():
        damaged = files.damaged_files(folder, all_sums(read_indexes(folder)[1]))
        for index in index_paths(folder):
            sums = {s: entry["sha256"] for s, entry in read_index(index)[1].items()}
            whole = {s: names for s, names in sums.items() if not set(names) & set(damaged)}
            if len(whole) < len(sums):
                part = Part(folder, header, *part_of(index, n_shards))
                write_journal(part.path("journal", ".jsonl"), header, whole)
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
        part: As in `build_shards`.
        n_workers: Processes that decode; None takes one per CPU for many encoded images, else none.

    Returns: The open cache; its header carries source, split, class names and the source's
        identity.
    Raises: As `build_shards`.
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
