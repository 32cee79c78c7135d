"""A part of a cache under construction: a run of shards, its lock, and the files named after it."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache import index
from kdlib.cache.index import CacheError
from kdlib.repro import files

_TEMPORARY = re.compile(
    r"\.([a-z_]+\d*-(?P<shard>\d+)\.(npy|json)|(index|journal)(-\d+-\d+)?\.jsonl?)\.\d+\.tmp"
)


@dataclass(frozen=True)
class Part:
    """The shards [first, stop) of a cache in a folder."""

    folder: Path
    header: dict[str, Any]
    first: int
    stop: int

    @property
    def shards(self) -> range:
        """Its shards."""
        return range(self.first, self.stop)

    def path(self, stem: str, suffix: str = "") -> Path:
        """The file of this part with a stem such as `index`."""
        n_shards = index.count_shards(self.header)
        return self.folder / index.part_name(stem, self.first, self.stop, n_shards, suffix)

    def count_rows(self, shards: Iterable[int]) -> int:
        """Examples in some shards."""
        spans = (index.shard_span(self.header, shard) for shard in shards)
        return sum(stop - start for start, stop in spans)

    def indexed(self) -> index.Shards:
        """Its shards that are in an index of the folder.

        Raises: CacheError for indexes of another cache.
        """
        header, shards = index.read_indexes(self.folder)
        index.refuse_other(self.folder, self.header, header or self.header)
        return self._mine(shards)

    def collected(self) -> index.Shards:
        """Its shards that are in an index, or in a journal and whole.

        Raises: CacheError for an index or a journal of another cache.
        """
        done = {}
        for journal in index.journal_paths(self.folder):
            header, shards = index.read_journal(journal)
            index.refuse_other(journal, self.header, header or self.header)
            done |= index.whole_shards(self.folder, self._mine(shards))
        return dict(sorted((done | self.indexed()).items()))

    def superfluous(self) -> list[Path]:
        """Journals and indexes whose shards are all in the index of this part."""
        paths = (*index.journal_paths(self.folder), *index.index_paths(self.folder))
        own = self.path("index", ".json")
        return [path for path in paths if path != own and self._holds(*self._run_of(path))]

    def finish(self, done: index.Shards) -> None:
        """Write the index of this part, then drop what it makes superfluous."""
        index.write_index(self.path("index", ".json"), self.header, done)
        for path in self.superfluous():
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of this part while no other process builds any of its shards; remove
        temporary files before and after.

        Raises: BlockingIOError when another process does; DiskError when the folder cannot be
            written into.
        """
        lock = self.path(".lock")
        with files.locked(lock, wait=False):
            for other in sorted(self.folder.glob(".lock*")):
                begin, end = self._run_of(other)
                if other != lock and begin < self.stop and self.first < end:
                    _refuse_held(other)
            self._remove_temporary()  # of a builder that was killed
            try:
                yield
            finally:
                with suppress(OSError):
                    self._remove_temporary()  # of workers that were ended

    def demand_space(self, todo: list[int]) -> None:
        """Raises CacheError when the disk has less room than some shards need."""
        columns = self.header["columns"].values()
        row = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in columns)
        needed, free = row * self.count_rows(todo), shutil.disk_usage(self.folder).free
        if needed > free:
            raise CacheError(
                f"the {len(todo)} shards to be made need {needed / 1e9:.2f} GB, and the disk of "
                f"{self.folder} has {free / 1e9:.2f} GB free; make room there, or choose another "
                "folder"
            )

    def _mine(self, shards: index.Shards) -> index.Shards:
        return {shard: sums for shard, sums in shards.items() if shard in self.shards}

    def _run_of(self, path: Path) -> tuple[int, int]:
        return index.part_of(path, index.count_shards(self.header))

    def _holds(self, first: int, stop: int) -> bool:
        return self.first <= first and stop <= self.stop

    def _remove_temporary(self) -> None:
        for name in os.listdir(self.folder):
            if match := _TEMPORARY.fullmatch(name):
                if match["shard"]:
                    run = int(match["shard"]), int(match["shard"]) + 1
                else:  # the numbers of a part come before those of the process
                    run = self._run_of(Path(name.rsplit(".", 2)[0]))
                if self._holds(*run):
                    (self.folder / name).unlink(missing_ok=True)


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
        except OSError as error:
            raise files.LockError(lock, error) from error
