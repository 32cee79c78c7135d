"""Rows of a cached column by position: resident on a device, or mapped from the disk and read ahead
of their use."""

import contextlib
import ctypes
import math
import mmap
import os
import sys
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from kdlib.cache.outputs import CLEAN_VIEW, decoded
from kdlib.cache.shards import Cache, CacheError, demand_uncut
from kdlib.dataset.batch import View
from kdlib.dataset.plan import Plan
from kdlib.repro import files

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64,
)  # fmt: skip
_MAP_FIXED = 0x10  # Linux and macOS
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0x40  # takes no swap for unused pages

# Bytes between addresses at which files may begin. Files that begin at any page are read 5% slower
# (2026-11, 10 shards of 6 MB): the kernel then cannot map large pages of the page cache as such.
_ALIGNMENT = 2**21

# Of madvise(2), since Linux 5.14. A cold pass over 20 shards of 56 MB waits 0.6 to 0.7 s in all,
# instead of 1.0 to 1.3 s for pages mapped as they are met (benchmarks/cache.py, 2026-11, 6 runs)
_POPULATE_READ = 22

READ_AHEAD = 16  # steps whose shards are asked for together
ASK_AGAIN = 256  # steps after which a shard may have left the page cache


def map_in_one(paths: Sequence[Path], sizes: Sequence[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Map files into one range of memory, one behind the other; pages are read on demand.

    The range is reserved first, then each file is mapped to its place in it, so that every byte of
    the tensor can be read: between two files there are zeros. Writing changes a private copy, and
    the range is unmapped with its last tensor.

    Args:
        paths: Files of at least `sizes` bytes.
        sizes: Bytes to map of each, > 0.

    Returns: The bytes, (n,) uint8, and where each file begins in them, (len(paths),) int64.
    Raises: OSError when a file cannot be mapped.
    """
    ends = np.cumsum([-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes], dtype=np.int64)
    begins = np.concatenate([[0], ends[:-1]])
    flags = mmap.MAP_PRIVATE | _MAP_NORESERVE
    reserved = mmap.mmap(-1, int(ends[-1]) + _ALIGNMENT, flags=flags | mmap.MAP_ANONYMOUS)
    memory = torch.from_numpy(np.frombuffer(reserved, np.uint8))  # keeps `reserved` alive
    memory = memory[-memory.data_ptr() % _ALIGNMENT :][: int(ends[-1])]
    for path, begin, size in zip(paths, begins.tolist(), sizes, strict=True):
        place, access = memory.data_ptr() + begin, mmap.PROT_READ | mmap.PROT_WRITE
        with open(path, "rb") as file:
            mapped = _LIBC.mmap(place, size, access, flags | _MAP_FIXED, file.fileno(), 0)
        if mapped != place:
            raise OSError(ctypes.get_errno(), "cannot be mapped", str(path))
    return memory, begins


class Rows:
    """Rows of one column for the examples of a plan, by their position in it.

    Attributes:
        source: (K, row bytes) uint8. Resident: the plan's rows, on the device. Mapped: the shards
            of these rows in one range of memory, as overlapping rows of which `index` names those
            to read, so that one gather reads from any number of shards.
        index: (N,) int64, the row of `source` for each position; None when it is the position.
        shard_of: (N,) int64, which of the mapped shards holds each position.
    """

    def __init__(
        self,
        cache: Cache,
        column: str,
        example_ids: np.ndarray,
        device: torch.device,
        resident: bool,
    ) -> None:
        """Read the rows onto the device, or map the shards they lie in.

        Raises: CacheError for a damaged shard, IndexError for ids that are not in the cache.
        """
        dtype, self.shape = cache.layout(column)
        self.dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        self.device, self.index = device, None
        self._on_cpu = device.type == "cpu"
        self._here = resident or self._on_cpu
        if resident:
            rows = torch.from_numpy(cache.read(column, example_ids)).flatten(1)
            self.source = rows.view(torch.uint8).to(device)
            return
        cache.positions(example_ids)
        shards, local = np.divmod(example_ids, cache.shard_size)
        known, self.shard_of = np.unique(shards, return_inverse=True)
        paths, starts, ends = zip(*(cache.located(column, s) for s in known.tolist()), strict=True)
        memory, self._begins = map_in_one(paths, ends)
        self._files = list(zip(map(str, paths), ends, strict=True))
        self._sizes, row_bytes = ends, cache.row_bytes()[column]
        first_rows = self._begins + starts
        step = int(np.gcd.reduce([*first_rows, row_bytes]))  # the largest that meets every row
        n_steps = (len(memory) - row_bytes) // step + 1
        self.source = memory.as_strided((n_steps, row_bytes), (step, 1))
        self.index = (first_rows[self.shard_of] + local * row_bytes) // step

    @property
    def images(self) -> torch.Tensor:
        """`source` as images: (K, C, H, W) uint8."""
        _, height, width = self.shape
        strides = (self.source.stride(0), height * width, width, 1)
        return self.source.as_strided((len(self.source), *self.shape), strides)

    def index_of(self, positions: np.ndarray) -> np.ndarray:
        """Rows of `source` of some positions: (B,) int64."""
        return positions if self.index is None else self.index[positions]

    def populate(self, number: int) -> None:
        """Read a mapped shard into the page cache and this process's page table; where the system
        cannot, pages are read when they are first used."""
        if sys.platform == "linux":
            begin = ctypes.c_void_p(self.source.data_ptr() + int(self._begins[number]))
            _LIBC.madvise(begin, ctypes.c_size_t(self._sizes[number]), _POPULATE_READ)

    def demand_uncut(self) -> None:
        """Raises: CacheError that names a mapped file that was cut since."""
        for path, end in self._files:
            demand_uncut(path, end)

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


class ReadAhead:
    """Brings mapped shards into memory on a thread before their rows are gathered."""

    def __init__(
        self, plan: Plan, rows: Rows, share: tuple[int, int], thread: ThreadPoolExecutor, fits: bool
    ) -> None:
        """Prepare to read.

        Args:
            rows: The mapped rows.
            share: Rank and world size of this process.
            thread: Where shards are read.
            fits: Whether all of them stay in memory once they are read.
        """
        self._plan, self._rows, self._share = plan, rows, share
        self._thread, self._fits = thread, fits
        self._reading: Future | None = None
        self._asked: dict[int, int] = {}  # shard -> step at which it was last asked for
        self._next_look = 0  # the step from which on it is time to look ahead again

    def at(self, step: int) -> None:
        """Start to read what the steps from this one on need, when it is time.

        Raises: What went wrong when the thread last read.
        """
        if step % READ_AHEAD == 0:  # 1.5 us a file
            self._rows.demand_uncut()
        if step < self._next_look:
            return
        self._next_look = step + READ_AHEAD
        if self._reading is not None and self._reading.done():
            self._reading.result()
        self._reading = self._thread.submit(self._read, step)

    def _read(self, step: int) -> None:
        """Bring the shards of the next two stretches of steps into memory."""
        steps = range(step, min(step + 2 * READ_AHEAD, self._plan.n_steps))
        positions = np.concatenate([self._plan.at(s, *self._share)[1] for s in steps])
        for number in np.unique(self._rows.shard_of[positions]).tolist():
            if self._asked.get(number, -np.inf) < step - ASK_AGAIN:
                self._asked[number] = step
                self._rows.populate(number)
        if len(self._asked) == self._plan.n_shards and self._fits:
            self._next_look = self._plan.n_steps


class TeacherRows:
    """Stored teacher outputs for the examples of a plan, by their position in it."""

    def __init__(
        self,
        teacher: Cache,
        columns: Collection[str],
        view: View | None,
        example_ids: np.ndarray,
        device: torch.device,
        resident: bool,
    ) -> None:
        """Open the columns that hold the outputs.

        Args:
            view: What the student sees: outputs of replayed views must be of the same ones.

        Raises: CacheError for outputs of other views; else as `Rows`.
        """
        self._replayed = _replays(teacher, view)
        self._n_classes = teacher.header["n_classes"]
        self._columns = {c: Rows(teacher, c, example_ids, device, resident) for c in columns}

    def gather(self, positions: np.ndarray, views: np.ndarray) -> dict[str, torch.Tensor]:
        """Outputs at some positions, each for one of its views: (B, ...) float32 by name."""
        parts = {c: rows.gather(rows.index_of(positions)) for c, rows in self._columns.items()}
        if self._replayed:
            device = next(iter(parts.values())).device
            every, chosen = torch.arange(len(views), device=device), torch.from_numpy(views)
            chosen = chosen.to(device)
            parts = {column: part[every, chosen] for column, part in parts.items()}
        else:
            parts = {column: part[:, 0] for column, part in parts.items()}
        return decoded(parts, self._n_classes)


def _replays(teacher: Cache, view: View | None) -> bool:
    """Whether the stored outputs are of replayed views, which must then be those of `view`."""
    stored = teacher.header["view"]
    if stored == CLEAN_VIEW:
        return False
    seen = {}
    if view is not None:
        augment = view.settings.model_dump(mode="json")
        seen = {"n": view.n_views, "augment": augment, "seed": view.seed}
    if lines := files.difference(seen, stored):
        raise CacheError(
            f"{teacher.folder} holds outputs of other views than the student would see (there -> "
            f"here): {'; '.join(lines)} (study: teacher.outputs, training.augment)"
        )
    return True


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device: of a CPU those that are available without swapping,
    within the memory limit of the job this process belongs to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # where only the memory in all is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(int(known["MemAvailable"].split()[0]) * 1024, _allowed())


def _allowed(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes left below the limit of this process's control group (a Slurm job, a container);
    infinity without a limit that can be read."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
        (path,) = [Path(part[2]) for part in lines if part[0] == "0"]  # version 2 has one
        for group in (path, *path.parents):
            folder = root / group.relative_to("/")
            most = folder / "memory.max"
            if most.is_file() and most.read_text().strip() != "max":
                used = int((folder / "memory.current").read_text())
                left = min(left, max(0, int(most.read_text()) - used))
    return left
