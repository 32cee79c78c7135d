"""Rows of a cached column by position, mapped or resident on a device."""

import ctypes
import mmap
import sys

import numpy as np
import torch

from kdlib.cache.shards import Cache

_LIBC = ctypes.CDLL(None)


# Of madvise(2), since Linux 5.14. A cold pass over 20 shards of 56 MB waits 0.6 to 0.7 s in all,
# instead of 1.0 to 1.3 s for pages mapped as they are met (benchmarks/cache.py, 2026-11, 6 runs)
_POPULATE_READ = 22


class Rows:
    """Rows of one column for the examples of a plan, by their position in it.

    Attributes:
        source: (K, row bytes) uint8. Resident: the plan's rows, on the device. Mapped: all memory
            from the first mapped shard to the last as overlapping rows, of which only those of
            `index` are meant, so that one gather reads from any number of shards.
        index: (N,) int64, the row of `source` for each position; None when it is the position.
    """

    def __init__(
        self, cache: Cache, column: str, example_ids: np.ndarray, device: str, resident: bool
    ) -> None:
        """Read the rows onto the device, or map the shards they lie in.

        Raises: CacheError for a damaged shard, IndexError for ids that are not in the cache.
        """
        dtype, self.shape = cache.layout(column)
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self.device, self.index = torch.device(device), None
        self._on_cpu = self.device.type == "cpu"
        self._here = resident or self._on_cpu
        if resident:
            rows = torch.from_numpy(cache.read(column, example_ids)).flatten(1)
            self.source = rows.view(torch.uint8).to(self.device)
            return
        cache.positions(example_ids)
        shards, local = np.divmod(example_ids, cache.shard_size)
        known, self.shard_of = np.unique(shards, return_inverse=True)
        self._maps = [cache.mapped(column, shard) for shard in known.tolist()]  # kept alive
        begins = np.array([rows.data_ptr() for rows in self._maps], np.int64)
        base, row_bytes = int(begins.min()), cache.row_bytes()[column]
        span = int(begins.max()) - base + max(rows.nbytes for rows in self._maps)
        # the largest step that meets the beginning of every row
        step = int(np.gcd.reduce([*(begins - base), row_bytes]))
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * span).from_address(base))
        n_steps = (span - row_bytes) // step + 1
        self.source = torch.from_numpy(memory).as_strided((n_steps, row_bytes), (step, 1))
        self.index = (begins[self.shard_of] - base + local * row_bytes) // step

    def populate(self, number: int) -> None:
        """Read a mapped shard into the page cache and this process's page table; where the system
        cannot, pages are read when they are first used."""
        if sys.platform != "linux":
            return
        rows = self._maps[number]
        begin = rows.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        size = rows.data_ptr() + rows.nbytes - begin
        _LIBC.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _POPULATE_READ)

    def gather(self, index: np.ndarray, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of `source`, (B, *row shape), on the device; into `out` when it is given."""
        if out is None:
            out = torch.empty((len(index), *self.shape), dtype=self.dtype, device=self.device)
        # index_select gathers bytes an order of magnitude faster than source[index] does
        rows = torch.from_numpy(index)
        if self._here:
            flat = out.view(len(index), -1)
            flat = flat if self.dtype is torch.uint8 else flat.view(torch.uint8)
            torch.index_select(
                self.source, 0, rows if self._on_cpu else rows.to(out.device), out=flat
            )
            return out
        fetched = torch.index_select(self.source, 0, rows).pin_memory().view(self.dtype)
        return out.copy_(fetched.view(out.shape), non_blocking=True)


def _index(rows: Rows, positions: np.ndarray) -> np.ndarray:
    return positions if rows.index is None else rows.index[positions]
