"""Worker processes that decode and write shards."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.index import CacheError, Columns, Sums, file_name, shard_span
from kdlib.repro import files
from kdlib.repro.npy import write_npy

Make = Callable[[Any], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Job:
    """What a worker process needs to write a shard."""

    folder: Path
    columns: Columns
    make: Make

    def write(self, shard: int, n: int, payload: Any) -> Sums:
        """Make and write one shard of n rows; returns the checksum of each of its files."""
        arrays = self.make(payload)
        if set(arrays) != set(self.columns):
            raise ValueError(
                f"shard {shard} was made with columns {sorted(arrays)}; expected "
                f"{sorted(self.columns)}"
            )
        sums = {}
        for name, (dtype, shape) in self.columns.items():
            array, expected = arrays[name], (n, *shape)
            if array.dtype != np.dtype(dtype) or array.shape != expected:
                raise ValueError(
                    f"column {name} of shard {shard} is {array.dtype} {array.shape}; expected "
                    f"{dtype} {expected}"
                )
            path = self.folder / file_name(name, shard)
            write_npy(path, np.ascontiguousarray(array))
            sums[path.name] = files.sha256_file(path)
        return sums


def finished_shards(
    job: Job,
    header: dict[str, Any],
    todo: list[int],
    fetch: Callable[[int, int], Any] | None,
    n_workers: int,
) -> Iterator[tuple[int, Sums]]:
    """Each shard to be made and its checksums, as they are finished."""

    def order(shard: int) -> tuple[int, int, Any]:
        start, stop = shard_span(header, shard)
        return shard, stop - start, fetch(start, stop) if fetch else (start, stop)

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


def _finished(running: dict[Future, int]) -> Iterator[tuple[int, Sums]]:
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


def _write(shard: int, n: int, payload: Any) -> Sums:
    return _worker_job.write(shard, n, payload)
