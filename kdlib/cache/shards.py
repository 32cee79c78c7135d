"""An open cache: images with labels, or teacher outputs, one row per example id, in memory-mapped
shards.

A cache of which some shards are not built can be read as far as it is there. Evidence names a cache
by the fingerprint of its header.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlib.cache import index
from kdlib.cache.index import CacheError
from kdlib.cache.remedies import repair_and_run, run_to_make
from kdlib.repro import files
from kdlib.repro.npy import npy_start

if TYPE_CHECKING:
    import torch  # imported late below: builders and workers need no tensors

_MOST_MAPS = 16384  # open at a time: Linux lets a process have 65,530


class Cache:
    """An open cache: rows by example id, mapped from the disk and read on demand.

    Opening reads the indexes and the folder's list of names; a shard is looked at when it is first
    read.

    Attributes:
        header: What determines the bytes.
        fingerprint: Names the content: sha256 of the header, and of the shards when some are
            missing.
        n_examples: Rows of the whole cache; example ids are [0, n_examples).
        shards: (n,) int64, sorted: the shards that are here.
    """

    def __init__(
        self,
        folder: Path,
        expected: Mapping[str, Any] | None = None,
        part: tuple[int, int] | None = None,
    ) -> None:
        """Open a cache.

        Args:
            expected: Header entries that must be as given; others are not looked at.
            part: (i, k): only this part, whose shards must all be here. None: all that is here.

        Raises: CacheError for an unfinished, foreign or incomplete cache, or one with other header
            entries.
        """
        self.folder = Path(folder)
        self.header, self.entries = index.read_indexes(self.folder)
        if not self.entries:
            state = "an unfinished build" if index.journal_paths(self.folder) else "no cache"
            raise CacheError(
                f"{self.folder} holds {state} (index.json is missing); {run_to_make(self.folder)}"
            )
        wanted = json.loads(files.canonical_json(dict(expected or {})))
        index.refuse_other(self.folder, wanted, {key: self.header.get(key) for key in wanted})
        self.n_examples: int = self.header["n_examples"]
        self.shard_size: int = self.header["shard_size"]
        if part is not None:
            self._restrict(part)
        self.shards = np.array(sorted(self.entries), np.int64)
        self.whole = len(self.shards) == index.count_shards(self.header)
        content = self.header if self.whole else {**self.header, "shards": self.shards.tolist()}
        self.fingerprint = files.fingerprint(content)
        self._places = np.full(index.count_shards(self.header), -1, np.int64)
        self._places[self.shards] = np.arange(len(self.shards))
        if absent := sorted(index.all_sums(self.entries).keys() - set(os.listdir(self.folder))):
            raise self._missing(self.folder / absent[0])
        self._maps: dict[tuple[str, int], torch.Tensor] = {}
        self._mapped: dict[tuple[str, int], tuple[str, int]] = {}  # path and end of each map

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {
            "_maps": {},
            "_mapped": {},
        }  # another process maps the shards itself

    def _missing(self, path: Path) -> CacheError:
        return CacheError(f"shard file {path} is missing; {repair_and_run(self.folder)}")

    def _restrict(self, part: tuple[int, int]) -> None:
        first, stop = index.part_range(index.count_shards(self.header), part)
        if absent := [shard for shard in range(first, stop) if shard not in self.entries]:
            raise CacheError(
                f"{self.folder} has not all of part {part[0]}/{part[1]}: {_listed(absent)} of its "
                f"shards [{first}, {stop}) are missing; {run_to_make(self.folder, part)}"
            )
        self.entries = {shard: self.entries[shard] for shard in range(first, stop)}

    @property
    def example_ids(self) -> np.ndarray:
        """Sorted int64 ids of the examples that are here."""
        spans = [index.shard_span(self.header, shard) for shard in self.shards.tolist()]
        return np.concatenate([np.arange(*span) for span in spans])

    @property
    def missing(self) -> list[int]:
        """Shards of the whole cache that are not here."""
        return np.flatnonzero(self._places < 0).tolist()

    def layout(self, column: str) -> tuple[np.dtype, tuple[int, ...]]:
        """dtype and row shape of a column.

        Raises: CacheError with the nearest name when there is none.
        """
        if column not in self.header["columns"]:
            known = files.nearest(column, self.header["columns"])
            raise CacheError(f"{self.folder} has no column {column!r}; {known}")
        dtype, shape = self.header["columns"][column]
        return np.dtype(dtype), tuple(shape)

    def row_bytes(self) -> dict[str, int]:
        """Bytes of one example's row in each column."""
        layouts = {column: self.layout(column) for column in self.header["columns"]}
        return {c: dtype.itemsize * int(np.prod(shape)) for c, (dtype, shape) in layouts.items()}

    def mapped(self, column: str, shard: int) -> "torch.Tensor":
        """One shard of one column as a tensor over the mapped file, pages read on demand.

        Writing into it changes a private copy of the pages.

        Raises: CacheError that names the file, when it is cut, damaged or of another layout.
        """
        key = (column, shard)
        if key in self._maps:
            demand_uncut(*self._mapped[key])
        else:
            import torch

            path, start, end = self.located(column, shard)
            dtype, shape = self.layout(column)
            # torch's map, unlike NumPy's, holds no file descriptor: shards can be many thousands
            plain = torch.from_file(str(path), size=end, dtype=torch.uint8)
            rows = plain[start:].view(torch.from_numpy(np.empty(0, dtype)).dtype)
            while len(self._maps) >= _MOST_MAPS:
                del self._maps[next(iter(self._maps))]  # unmapped with its last tensor
            self._mapped[key] = str(path), end  # first, for other threads
            self._maps[key] = rows.reshape(-1, *shape)
        return self._maps[key]

    def located(self, column: str, shard: int) -> tuple[Path, int, int]:
        """The file of one shard of one column, and where its data begin and end in it.

        Raises: CacheError that names the file, when it is cut, damaged or of another layout.
        """
        dtype, shape = self.layout(column)
        begin, end = index.shard_span(self.header, shard)
        shape, path = (end - begin, *shape), self.folder / index.file_name(column, shard)
        try:
            start = npy_start(path, dtype, shape)
        except FileNotFoundError:
            raise self._missing(path) from None
        except ValueError as error:
            raise CacheError(f"shard file {error}; {repair_and_run(self.folder)}") from None
        return path, start, start + dtype.itemsize * math.prod(shape)

    def check(self, columns: Iterable[str], shards: Iterable[int]) -> None:
        """Look at size and layout of some shards now, rather than when they are first read.

        Raises: CacheError that names the first unfit file.
        """
        for column in columns:
            for shard in shards:
                self.located(column, shard)

    def positions(self, example_ids: np.ndarray) -> np.ndarray:
        """Row of each id among those that are here, (B,) int64: the id itself in a whole cache.

        Args:
            example_ids: (B,) integers.

        Raises: IndexError when an id lies outside the cache or in a shard that is not here;
            TypeError when ids are no integers.
        """
        ids = np.asarray(example_ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"example ids are {ids.dtype}; expected integers")
        ids = ids.astype(np.int64, copy=False)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_examples:
            raise IndexError(
                f"example ids [{ids.min()}, {ids.max()}] asked of {self.folder}, which has ids "
                f"[0, {self.n_examples})"
            )
        if self.whole:
            return ids
        shards = ids // self.shard_size
        places = self._places[shards]
        if (places < 0).any():
            absent = np.unique(shards[places < 0]).tolist()
            raise IndexError(
                f"{self.folder} is partial: shards {_listed(absent)} are not built yet; build them "
                "with `python -m kdlib cache build`, or choose among Cache.example_ids"
            )
        return places * self.shard_size + ids % self.shard_size  # only the last shard is shorter

    def read(self, column: str, example_ids: np.ndarray) -> np.ndarray:
        """Rows of some example ids, in the order given.

        Args:
            example_ids: (B,) int64 in [0, n_examples).

        Returns: (B, *row shape), a copy.
        Raises: As `positions`.
        """
        import torch

        self.positions(example_ids)
        ids = np.asarray(example_ids).astype(np.int64)
        dtype, shape = self.layout(column)
        shards = ids // self.shard_size
        self.check([column], shards[:1].tolist())  # before memory is taken for what an index says
        rows = np.empty((len(ids), *shape), dtype)
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for chosen in np.split(order, cuts) if len(ids) else ():
            shard = int(shards[chosen[0]])
            local = torch.from_numpy(ids[chosen] - shard * self.shard_size)
            rows[chosen] = self.mapped(column, shard).index_select(0, local).numpy()
        return rows

    def resident(self, column: str) -> "torch.Tensor":
        """A whole column as one tensor: (rows here, *row shape), row `positions(id)` is example
        id."""
        import torch

        dtype, shape = self.layout(column)
        self.check([column], self.shards[:1].tolist())
        whole = torch.from_numpy(np.empty((len(self.example_ids), *shape), dtype))
        start = 0
        for shard in self.shards.tolist():
            rows = self.mapped(column, shard)
            whole[start : start + len(rows)] = rows
            start += len(rows)
        self._maps = {key: rows for key, rows in self._maps.items() if key[0] != column}
        return whole

    def verify(self) -> None:
        """Compare every byte with the checksums of the index, and every layout with its header.

        Raises: CacheError that names each file that differs.
        """
        if bad := files.damaged_files(self.folder, index.all_sums(self.entries)):
            raise CacheError(
                f"{self.folder}: {', '.join(bad)} differ from their checksums; "
                f"{repair_and_run(self.folder)}"
            )
        self.check(self.header["columns"], self.shards.tolist())


def demand_uncut(path: str, end: int) -> None:
    """Look whether a mapped file still reaches as far as it was mapped: reading beyond its end
    would end the process without a word (SIGBUS).

    Raises: CacheError that names the file.
    """
    try:
        n_bytes = os.stat(path).st_size
    except FileNotFoundError:  # what is mapped stays as long as it is
        return
    if n_bytes < end:
        raise CacheError(
            f"shard file {path} was cut to {n_bytes:,} of {end:,} bytes while it was open; "
            f"{repair_and_run(Path(path).parent)}"
        )


def _listed(shards: list[int], most: int = 5) -> str:
    """`0, 1, 2 and 40 more`."""
    shown = ", ".join(map(str, shards[:most]))
    return shown if len(shards) <= most else f"{shown} and {len(shards) - most} more"
