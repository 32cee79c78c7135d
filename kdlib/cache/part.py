"""A part of a cache under construction: a run of shards, its lock, and the files named after it."""

import fcntl
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.index import (
    CacheError,
    Sums,
    count_shards,
    index_paths,
    part_name,
    part_of,
    read_indexes,
    refuse_other,
    shard_span,
)
from kdlib.cache.journal import journal_paths, whole_shards
from kdlib.repro import files

_TEMPORARY = re.compile(
    r"\.([a-z_]+\d*-(?P<shard>\d+)\.npy|(index|journal)(-\d+-\d+)?\.jsonl?)\.\d+\.tmp"
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

    @property
    def finished(self) -> bool:
        """Whether every shard is in an index."""
        return set(self.shards) <= set(self.indexed())

    def path(self, stem: str, suffix: str) -> Path:
        """The file of this part with a stem such as `index`."""
        return self.folder / part_name(stem, self.first, self.stop, self._n_shards, suffix)

    def count_rows(self, shards: Iterable[int]) -> int:
        """Examples in some shards."""
        spans = (shard_span(self.header, shard) for shard in shards)
        return sum(stop - start for start, stop in spans)

    def indexed(self) -> dict[int, Sums]:
        """All shards that the indexes of the folder have, and the checksums of their files.

        Raises: CacheError for indexes of another cache.
        """
        header, entries = read_indexes(self.folder)
        if entries:
            refuse_other(self.folder, self.header, header)
        return {shard: entry["sha256"] for shard, entry in entries.items()}

    def collected(self) -> dict[int, Sums]:
        """Its shards that are in an index or a journal, and the checksums of their files.

        Raises: CacheError for an index or a journal of another cache.
        """
        done = {}
        for journal in journal_paths(self.folder):
            done |= whole_shards(journal, self.header, self.first, self.stop)
        done |= self.indexed()
        return {shard: done[shard] for shard in sorted(done) if shard in self.shards}

    def superfluous(self) -> list[Path]:
        """Journals and indexes whose shards are all in the index of this part."""
        paths = (*journal_paths(self.folder), *index_paths(self.folder))
        index = self.path("index", ".json")
        return [p for p in paths if p != index and self._holds(*part_of(p, self._n_shards))]

    def finish(self, done: Mapping[int, Sums]) -> None:
        """Write the index of this part, then drop what it makes superfluous."""
        shards = []
        for shard in self.shards:
            start, stop = shard_span(self.header, shard)
            shards.append({"first_id": start, "n": stop - start, "sha256": done[shard]})
        content = files.sealed({"header": self.header, "shards": shards})
        files.write_json(self.path("index", ".json"), content)
        for path in self.superfluous():
            path.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the lock of this part while no other process builds any of its shards; remove
        temporary files before and after.

        Raises: BlockingIOError when another process does; DiskError when the folder cannot be
            written into.
        """
        with ExitStack() as stack:
            lock = self.path(".lock", "")
            stack.enter_context(files.locked(lock, wait=False))
            for other in sorted(self.folder.glob(".lock*")):
                begin, end = part_of(other, self._n_shards)
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

    @property
    def _n_shards(self) -> int:
        return count_shards(self.header)

    def _holds(self, first: int, stop: int) -> bool:
        return self.first <= first and stop <= self.stop

    def _remove_temporary(self) -> None:
        for name in os.listdir(self.folder):
            if match := _TEMPORARY.fullmatch(name):
                if match["shard"]:
                    shards = int(match["shard"]), int(match["shard"]) + 1
                else:  # the numbers of a part come before those of the process
                    shards = part_of(Path(name.rsplit(".", 2)[0]), self._n_shards)
                if self._holds(*shards):
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
