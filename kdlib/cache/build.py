"""Builds the shards of a cache: in one go or in parts, by one process or many, resumable.

A builder makes a contiguous run of shards under a lock and notes each finished one in a journal, so
that a killed build resumes after the last of them. The index is written last.
"""

import contextlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from kdlib.cache import index, readings, survey
from kdlib.cache.encoded import ImageError
from kdlib.cache.index import CacheError
from kdlib.cache.part import Part
from kdlib.cache.shards import Cache
from kdlib.cache.sources import Source
from kdlib.repro import files
from kdlib.repro.npy import write_npy

Make = Callable[[Any], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Job:
    """What a worker process needs to write a shard."""

    folder: Path
    columns: index.Columns
    make: Make
    note: Callable[[Path, int, Any], None] | None = None  # what is kept beside a shard

    def write(self, shard: int, n: int, payload: Any) -> index.Sums:
        """Make and write one shard of n rows; returns the checksum of each of its files."""
        arrays = self.make(payload)
        made = {name: (array.dtype.str, array.shape) for name, array in arrays.items()}
        expected = {name: (dtype, (n, *shape)) for name, (dtype, shape) in self.columns.items()}
        if made != expected:
            raise ValueError(f"shard {shard} was made with columns {made}; expected {expected}")
        paths = [
            write_npy(self.folder / index.file_name(c, shard), arrays[c]) for c in self.columns
        ]
        if self.note is not None:
            self.note(self.folder, shard, payload)
        return {path.name: files.sha256_file(path) for path in paths}


def build_shards(
    folder: Path,
    header: dict[str, Any],
    columns: index.Columns,
    make: Make,
    *,
    n_examples: int,
    shard_size: int,
    fetch: Callable[[int, int], Any] = lambda start, stop: (start, stop),
    part: tuple[int, int] = (1, 1),
    n_workers: int = 0,
    describe: str = "cache",
    note: Callable[[Path, int, Any], None] | None = None,
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
            ascending order.
        part: (i, k): only the i-th of k equal runs of shards. Several processes may build different
            parts of one cache at the same time.
        n_workers: Processes that run `make`; 0 runs it here. At most `n_workers` + 1 shards are in
            memory.
        describe: Word in front of the progress bar.
        note: Called where `make` is, with the folder, the number of a shard and its payload, after
            the files of the shard are written.

    Returns: The open cache, restricted to the part unless that is the whole.
    Raises: CacheError when the folder holds a cache with another header (the difference is printed,
        nothing is touched), or the disk has too little room; DiskError when the folder cannot be
        written into, finished shards are kept; BlockingIOError when another process builds some of
        the same shards; ValueError when `make` returns other arrays than declared, or there is
        nothing to build. Errors of `fetch` and `make` come through.
    """
    folder = Path(folder)
    survey.demand_workers(n_workers)
    header = _full(header, columns, n_examples, shard_size)
    mine = Part(folder, header, *index.part_range(index.count_shards(header), part))
    indexed = mine.indexed()
    if len(indexed) < len(mine.shards):
        with mine.locked():
            job = Job(folder, columns, make, note)
            mine.finish(_make_missing(mine, job, fetch, n_workers, describe))
    elif mine.superfluous():
        with contextlib.suppress(files.DiskError, BlockingIOError), mine.locked():
            mine.finish(indexed)  # one index instead of those of smaller parts
    return Cache(folder, header, None if part == (1, 1) else part)


def _full(
    header: dict[str, Any], columns: index.Columns, n_examples: int, shard_size: int
) -> dict[str, Any]:
    """A header with what every cache has in it, as it is read again from JSON."""
    if n_examples < 1 or shard_size < 1:
        raise ValueError(
            f"asked for {n_examples} examples in shards of {shard_size}; expected at least 1 each"
        )
    header = {"format": index.FORMAT, "n_examples": n_examples, "shard_size": shard_size, **header}
    header["columns"] = {name: [dtype, list(shape)] for name, (dtype, shape) in columns.items()}
    return json.loads(files.canonical_json(header))


def _make_missing(
    part: Part,
    job: Job,
    fetch: Callable[[int, int], Any],
    n_workers: int,
    describe: str,
) -> index.Shards:
    """Make the shards of a part that are not there; the checksums of all its shards."""
    done, journal = part.collected(), part.path("journal", ".jsonl")
    todo = [shard for shard in part.shards if shard not in done]
    n, n_done = part.count_rows(part.shards), part.count_rows(done)
    part.demand_space(todo)
    index.write_journal(journal, part.header, done)  # anew: a torn last line would swallow the next
    with (
        contextlib.closing(_finished_shards(job, part.header, todo, fetch, n_workers)) as shards,
        tqdm(total=n, initial=n_done, desc=describe, unit="img", leave=False) as progress,
    ):
        for shard, sums in shards:
            done[shard] = sums
            index.append(journal, shard, sums)
            progress.update(part.count_rows([shard]))
    return done


def repair(folder: Path) -> list[str]:
    """Turn a damaged cache back into an unfinished build that keeps every whole shard.

    The next build makes only the shards that are missing or damaged.

    Returns: the names of the damaged files.
    Raises: CacheError when the folder holds no index; DiskError when it cannot be written into.
    """
    folder = Path(folder)
    header, _ = index.read_indexes(folder)
    if not header:
        Cache(folder)  # raises, and says what is there
    n_shards = index.count_shards(header)
    with Part(folder, header, 0, n_shards).locked():
        damaged = files.damaged_files(folder, index.all_sums(index.read_indexes(folder)[1]))
        for path in index.index_paths(folder):
            shards = index.read_index(path)[1]
            whole = {s: sums for s, sums in shards.items() if not set(sums) & set(damaged)}
            if len(whole) < len(shards):
                part = Part(folder, header, *index.part_of(path, n_shards))
                index.write_journal(part.path("journal", ".jsonl"), header, whole)
                path.unlink()
    return damaged


def build_images(
    source: Source,
    folder: Path,
    shard_size: int,
    part: tuple[int, int] = (1, 1),
    n_workers: int | None = None,
    looked: bool = False,
) -> Cache:
    """Cache the images (`images`, uint8 (C, H, W)) and labels (`labels`, int64; -1: none) of a
    source; of a relabelled one also the labels it had before (`original_labels`).

    Of images that are files, one line says what was converted, cut or passed over.

    Args:
        part: As in `build_shards`.
        n_workers: Processes that decode; None takes one per CPU for many encoded images, else none.
        looked: `look_at` has been called.

    Returns: The open cache; its header carries source, split, class names and the source's
        identity.
    Raises: As `build_shards` and `look_at`.
    """
    folder = Path(folder)
    n_workers = survey.count_workers(source, n_workers)
    if not looked:
        look_at(source, folder, shard_size, part, n_workers)
    header, columns = _header_of(source)
    try:
        cache = build_shards(
            folder,
            header,
            columns,
            partial(_decode, source),
            n_examples=source.n_examples,
            shard_size=shard_size,
            fetch=source.fetch,
            part=part,
            n_workers=n_workers,
            describe=f"caching {source.name} {source.split}",
            note=readings.noting(source),
        )
    except ImageError:  # damage that the header does not show: find all of it now
        if not source.encoded.once:
            full = _full(header, columns, source.n_examples, shard_size)
            shards = range(*index.part_range(index.count_shards(full), part))
            survey.demand_readable(source, full, shards, n_workers, pixels=True)
        raise
    if line := readings.sentence(readings.counted(cache)):
        print(f"{source.name} {source.split}: {line}")
    return cache


def look_at(
    source: Source,
    folder: Path,
    shard_size: int,
    part: tuple[int, int] = (1, 1),
    n_workers: int | None = None,
) -> None:
    """Look at the images of a source before any is cached; arguments as of `build_images`.

    Raises: ImageError that names every image that cannot be read; CacheError for a finished cache
        whose files have changed since.
    """
    if source.encoded is None:
        return
    full = _full(*_header_of(source), source.n_examples, shard_size)
    survey.prepare(source, Path(folder), full, part, survey.count_workers(source, n_workers))


def build_splits(
    sources: Mapping[str, Source],
    folder: Path,
    shard_size: int,
    parts: Mapping[str, tuple[int, int]],
    n_workers: int | None = None,
) -> dict[str, Cache]:
    """Cache several splits, each in the folder of its name below `folder`, once all of them have
    been looked at; arguments and errors else as of `build_images`."""
    bad = []
    for split, source in sources.items():
        try:
            look_at(source, folder / split, shard_size, parts[split], n_workers)
        except ImageError as error:
            bad.append(str(error))
    if bad:
        raise ImageError("\n".join(bad))
    return {
        split: build_images(
            source, folder / split, shard_size, parts[split], n_workers, looked=True
        )
        for split, source in sources.items()
    }


def _header_of(source: Source) -> tuple[dict[str, Any], index.Columns]:
    """What determines the bytes of a source's cache, and its columns."""
    header = {
        "kind": "images",
        "source": source.name,
        "split": source.split,
        "class_names": list(source.class_names),
        "identity": source.identity,
    }
    columns = {
        c: ("|u1", source.image_shape) if c == "images" else ("<i8", ()) for c in source.columns
    }
    return header, columns


def _decode(source: Source, payload: Any) -> dict[str, np.ndarray]:
    return dict(zip(source.columns, source.decode(payload), strict=True))


def _finished_shards(
    job: Job,
    header: dict[str, Any],
    todo: list[int],
    fetch: Callable[[int, int], Any],
    n_workers: int,
) -> Iterator[tuple[int, index.Sums]]:
    """Each shard to be made and its checksums, as they are finished."""

    def order(shard: int) -> tuple[int, int, Any]:
        start, stop = index.shard_span(header, shard)
        return shard, stop - start, fetch(start, stop)

    if n_workers == 0:
        for shard in todo:
            yield shard, job.write(*order(shard))
        return
    context = get_context("spawn")  # not forked: this process has threads
    here, there = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(n_workers, context, _start_worker, (job, here))
    running: dict[Future, int] = {}

    def submit(shard: int, n: int, payload: Any) -> None:
        with _uninterrupted():
            running[pool.submit(_write, shard, n, payload)] = shard

    try:
        for shard in todo:
            submit(*order(shard))  # no name here keeps a payload beyond its turn
            if len(running) > n_workers:
                yield from _finished(running)
        while running:
            yield from _finished(running)
    except BrokenProcessPool:
        raise CacheError(
            f"a worker process died while shards {sorted(running.values())} were made, most often "
            "because memory ran out; finished shards are kept: run the same again with fewer "
            'workers (in a script, under `if __name__ == "__main__":`)'
        ) from None
    except BaseException:
        there.close()  # ends the workers now, whatever they are doing
        raise
    finally:
        pool.shutdown()
        there.close()
        here.close()


def _finished(running: dict[Future, int]) -> Iterator[tuple[int, index.Sums]]:
    done = wait(running, return_when=FIRST_COMPLETED).done
    for future in sorted(done, key=lambda f: f.exception() is not None):  # keep what is whole
        sums = future.result()
        yield running.pop(future), sums


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let processes that are started in this block ignore Ctrl-C: the builder ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_worker_job: Job | None = None  # in a worker: sent once, not with every shard


def _start_worker(job: Job, builder: Connection) -> None:
    """Begin a worker, which ends as soon as the builder closes its end of the pipe or is gone."""

    def outlive() -> None:
        builder.poll(None)
        os._exit(1)

    global _worker_job
    _worker_job = job
    threading.Thread(target=outlive, daemon=True).start()


def _write(shard: int, n: int, payload: Any) -> index.Sums:
    return _worker_job.write(shard, n, payload)
