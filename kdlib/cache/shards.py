"""Memory-mapped shards of arrays, one row per example id: images with labels, and teacher outputs.

A cache is a folder of plain NumPy files, `<column>-<shard>.npy`, and one index for each part that
was built, written last: `index.json` for a cache built whole, `index-<first>-<stop>.json` for the
shards [first, stop). Together the indexes say which shards are there; a cache with some missing is
a smaller cache that says so. The header, equal in all of them, holds everything that determines the
bytes; its fingerprint is the cache's name in all evidence.
Leaves to others: how shards are made (`building`), which rows are read when (`sampling`).
"""

import io
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from kdlib.repro import files

FORMAT = 1


_INDEX_NAME = re.compile(r"index(-\d{5,}-\d{5,})?\.json")


_FILE_NAME = re.compile(r"[a-z_]+\d*-\d{5,}\.npy")  # an index may not point outside its folder


_DTYPE = re.compile(r"[<|][biuf]\d")  # of rows; objects would have to be unpickled


_MOST_SHARDS = 10**7  # more is no cache of ours: the positions alone would fill a memory


_MOST_MAPS = 16384  # open at a time: Linux lets a process have 65,530


_DISTRUST = "do not trust this folder: delete it and build it again"


Columns = Mapping[str, tuple[str, tuple[int, ...]]]  # column -> (dtype, shape of one example's row)


Entries = dict[int, dict[str, Any]]  # shard -> {"first_id", "n", "sha256": {file name: sum}}


class CacheError(ValueError):
    """A cache that is unfinished, damaged, of another format, or made of other things than asked
    for."""


def file_name(column: str, shard: int) -> str:
    """Name of the file that holds one shard of one column."""
    return f"{column}-{shard:05d}.npy"


def part_name(stem: str, first: int, stop: int, n_shards: int, suffix: str) -> str:
    """Name of the file of one part, shards [first, stop); a part that is the whole has no range."""
    whole = (first, stop) == (0, n_shards)
    return f"{stem}{suffix}" if whole else f"{stem}-{first:05d}-{stop:05d}{suffix}"


def part_range(n_shards: int, part: tuple[int, int]) -> tuple[int, int]:
    """Shards [first, stop) of part i of k, as (i, k) with i counted from 1.

    Raises: ValueError for a part that holds no shard.

    >>> [part_range(7, (i, 3)) for i in (1, 2, 3)]
    [(0, 2), (2, 4), (4, 7)]
    """
    i, k = part
    if not 1 <= i <= k <= n_shards:
        raise ValueError(
            f"part {i}/{k} of {n_shards} shards; expected i/k with 1 <= i <= k <= {n_shards}"
        )
    return (i - 1) * n_shards // k, i * n_shards // k


def shard_span(header: Mapping[str, Any], shard: int) -> tuple[int, int]:
    """Example ids [start, stop) of one shard."""
    start = shard * header["shard_size"]
    return start, min(start + header["shard_size"], header["n_examples"])


def count_shards(header: Mapping[str, Any]) -> int:
    """How many shards the whole cache has."""
    return -(-header["n_examples"] // header["shard_size"])


def _remedy(folder: Path) -> str:
    return f"run `python -m kdlib cache verify --repair {folder}`, then build it again"


def refuse_other(folder: Path, expected: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Compare header entries.

    Raises: CacheError that names each entry that differs.
    """
    if lines := files.difference(dict(expected), dict(found)):
        raise CacheError(
            f"{folder} was made of something else (there -> expected): {'; '.join(lines)}; "
            "nothing was changed: choose another folder, or delete this one to make it anew"
        )


def index_paths(folder: Path) -> list[Path]:
    """The indexes of all finished parts in a folder, sorted."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    found = [folder / name for name in names if _INDEX_NAME.fullmatch(name)]
    return [path for path in found if path.exists()]  # a link to nothing is no index


def read_indexes(folder: Path) -> tuple[dict[str, Any], Entries]:
    """Header and shards of all parts in a folder; ({}, {}) when there is no index.

    Raises: CacheError for an index that is cut, foreign, of another format, or at odds with
        another one.
    """
    header: dict[str, Any] = {}
    entries: Entries = {}
    for path in index_paths(folder):
        try:
            found, shards = read_index(path)
        except (
            FileNotFoundError
        ):  # a builder has just replaced the indexes of parts by a larger one
            return read_indexes(folder)
        if header and found != header:
            lines = "; ".join(files.difference(found, header))
            raise CacheError(f"{path} is of another cache than the other parts ({lines})")
        for shard, entry in shards.items():
            if entries.get(shard, entry) != entry:
                raise CacheError(f"{path} and another index differ on shard {shard}; {_DISTRUST}")
        header = found
        entries.update(shards)
    return header, entries


def read_index(path: Path) -> tuple[dict[str, Any], Entries]:
    """Header and shards of one part.

    Raises: CacheError for an index that is cut, foreign or of another format.
    """
    try:
        index = files.read_json(path)
    except ValueError as error:
        raise CacheError(str(error)) from None
    header = index.get("header") if isinstance(index, dict) else None
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise CacheError(
            f"{path} has format {version}; this kdlib reads format {FORMAT}: build the cache "
            "again elsewhere"
        )
    try:
        n_shards, columns = count_shards(header), header["columns"]
        for dtype, shape in columns.values():
            if not _DTYPE.fullmatch(dtype) or min(shape, default=0) < 0:
                raise ValueError(f"rows of {dtype} {shape}")
            np.dtype(dtype)  # TypeError for one that NumPy does not know
        named = re.findall(r"\d+", path.stem)
        first, stop = map(int, named) if named else (0, n_shards)
        # looked at before shards are listed that an index only says it has
        right = n_shards <= _MOST_SHARDS and stop - first == len(index["shards"])
        found = [(entry["first_id"], entry["n"], set(entry["sha256"])) for entry in index["shards"]]
        spans = [shard_span(header, shard) for shard in (range(first, stop) if right else ())]
        expected = [
            (span[0], span[1] - span[0], {file_name(column, shard) for column in columns})
            for shard, span in enumerate(spans, first)
        ]
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise CacheError(f"{path} is not an index of ours ({error!r}); {_DISTRUST}") from None
    strange = sorted(
        name for _, _, names in found for name in names if not _FILE_NAME.fullmatch(name)
    )
    if strange:
        raise CacheError(
            f"{path} names a file that no cache of ours has: {strange[0]!r}; {_DISTRUST}"
        )
    if not right or found != expected or not 0 <= first < stop <= n_shards:
        raise CacheError(
            f"{path} lists {len(found)} shards that do not make up its part of "
            f"{header['n_examples']} examples in shards of {header['shard_size']}; {_DISTRUST}"
        )
    if not files.is_sealed(index):
        raise CacheError(f"{path} was changed after it was written; {_DISTRUST}")
    return header, dict(enumerate(index["shards"], first))


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
        self.header, self.entries = read_indexes(self.folder)
        if not self.entries:
            unfinished = any(self.folder.glob("journal*.jsonl"))
            state = "an unfinished build" if unfinished else "no cache"
            raise CacheError(
                f"{self.folder} holds {state} (index.json is missing); run notebooks/01_cache.ipynb"
                " or `python -m kdlib cache build STUDY` (teacher outputs: "
                "notebooks/02_teacher.ipynb)"
            )
        wanted = json.loads(files.canonical_json(dict(expected or {})))
        refuse_other(self.folder, wanted, {key: self.header.get(key) for key in wanted})
        self.n_examples: int = self.header["n_examples"]
        self.shard_size: int = self.header["shard_size"]
        if part is not None:
            self._restrict(part)
        self.shards = np.array(sorted(self.entries), np.int64)
        self.whole = len(self.shards) == count_shards(self.header)
        content = self.header if self.whole else {**self.header, "shards": self.shards.tolist()}
        self.fingerprint = files.fingerprint(content)
        self._slots = np.full(count_shards(self.header), -1, np.int64)
        self._slots[self.shards] = np.arange(len(self.shards))
        there = set(os.listdir(self.folder))
        for entry in self.entries.values():
            if absent := sorted(set(entry["sha256"]) - there):
                path = self.folder / absent[0]
                raise CacheError(f"shard file {path} is missing; {_remedy(self.folder)}")
        self._maps: dict[tuple[str, int], torch.Tensor] = {}
        self._preambles: dict[tuple[str, tuple[int, ...]], bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # another process maps the shards itself

    def _restrict(self, part: tuple[int, int]) -> None:
        first, stop = part_range(count_shards(self.header), part)
        absent = [shard for shard in range(first, stop) if shard not in self.entries]
        if absent:
            raise CacheError(
                f"{self.folder} has not all of part {part[0]}/{part[1]}: {_listed(absent)} of its "
                f"shards [{first}, {stop}) are missing; run notebooks/01_cache.ipynb or "
                f"`python -m kdlib cache build STUDY --part {part[0]}/{part[1]}`"
            )
        self.entries = {shard: self.entries[shard] for shard in range(first, stop)}

    @property
    def example_ids(self) -> np.ndarray:
        """Sorted int64 ids of the examples that are here."""
        spans = [shard_span(self.header, shard) for shard in self.shards.tolist()]
        return np.concatenate([np.arange(*span) for span in spans])

    @property
    def missing(self) -> list[int]:
        """Shards of the whole cache that are not here."""
        return np.flatnonzero(self._slots < 0).tolist()

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

    def mapped(self, column: str, shard: int) -> torch.Tensor:
        """One shard of one column as a tensor over the mapped file, pages read on demand.

        Writing into it changes a private copy, never the file.

        Raises: CacheError that names the file, when it is cut, damaged or of another layout.
        """
        key = (column, shard)
        if key not in self._maps:
            dtype, shape = self.layout(column)
            shape = (self.entries[shard]["n"], *shape)
            path = self.folder / file_name(column, shard)
            start = self._check(path, dtype, shape)
            # torch's map, unlike NumPy's, holds no file descriptor: shards can be many thousands
            plain = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
            rows = plain[start:].view(torch.from_numpy(np.empty(0, dtype)).dtype)
            while len(self._maps) >= _MOST_MAPS:
                del self._maps[next(iter(self._maps))]  # unmapped once nobody holds it
            self._maps[key] = rows.reshape(shape)
        return self._maps[key]

    def _check(self, path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> int:
        """Where the data of a whole .npy file of this dtype and shape begin."""
        expected = self._preambles.get((dtype.str, shape))
        if expected is None:
            expected = self._preambles[dtype.str, shape] = _preamble(dtype, shape)
        try:
            if path.exists() and not path.is_file():  # opening a pipe would wait for ever
                raise ValueError("it is no file")
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                whole = size == len(expected) + dtype.itemsize * int(np.prod(shape))
                if whole and file.read(len(expected)) == expected:
                    return len(expected)
            found = np.lib.format.open_memmap(path, mode="r")  # no pickles, and no zip archives
        except FileNotFoundError:
            raise CacheError(f"shard file {path} is missing; {_remedy(self.folder)}") from None
        except files.NOT_NPY as error:
            raise CacheError(
                f"shard file {path} is cut or damaged ({error}); {_remedy(self.folder)}"
            ) from None
        if found.dtype != dtype or found.shape != shape or not found.flags.c_contiguous:
            raise CacheError(
                f"shard file {path} holds {found.dtype.str} {found.shape}; its index says "
                f"{dtype.str} {shape}; {_remedy(self.folder)}"
            )
        if size != found.offset + found.nbytes or found.offset % dtype.itemsize:
            raise CacheError(
                f"shard file {path} is cut or damaged (its data begin at byte {found.offset} of "
                f"{size}); {_remedy(self.folder)}"
            )
        return found.offset

    def check(self, columns: Iterable[str], shards: Iterable[int]) -> None:
        """Look at size and layout of some shards now, rather than when they are first read.

        Raises: CacheError that names the first unfit file.
        """
        for column in columns:
            dtype, shape = self.layout(column)
            for shard in shards:
                path = self.folder / file_name(column, shard)
                self._check(path, dtype, (self.entries[shard]["n"], *shape))

    def positions(self, example_ids: np.ndarray) -> np.ndarray:
        """Row of each id in `resident`: the id itself in a whole cache.

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
        slots = self._slots[shards]
        if (slots < 0).any():
            absent = np.unique(shards[slots < 0]).tolist()
            raise IndexError(
                f"{self.folder} is partial: shards {_listed(absent)} are not built yet; build them "
                "with `python -m kdlib cache build`, or choose among Cache.example_ids"
            )
        return slots * self.shard_size + ids % self.shard_size  # only the last shard is shorter

    def read(self, column: str, example_ids: np.ndarray) -> np.ndarray:
        """Rows of some example ids, in the order given.

        Args:
            example_ids: (B,) int64 in [0, n_examples).

        Returns: (B, *row shape), a copy.
        Raises: As `positions`.
        """
        self.positions(example_ids)
        ids = np.asarray(example_ids).astype(np.int64)
        dtype, shape = self.layout(column)
        shards = ids // self.shard_size
        self.check([column], shards[:1].tolist())  # before memory is taken for what an index says
        rows = np.empty((len(ids), *shape), dtype)
        order = np.argsort(shards, kind="stable")
        cuts = np.flatnonzero(np.diff(shards[order])) + 1
        for mine in np.split(order, cuts) if len(ids) else ():
            shard = int(shards[mine[0]])
            local = torch.from_numpy(ids[mine] - shard * self.shard_size)
            rows[mine] = self.mapped(column, shard).index_select(0, local).numpy()
        return rows

    def resident(self, column: str) -> torch.Tensor:
        """A whole column as one tensor: (rows here, *row shape), row `positions(id)` is example
        id."""
        dtype, shape = self.layout(column)
        n_rows = sum(entry["n"] for entry in self.entries.values())
        self.check([column], self.shards[:1].tolist())
        whole = torch.from_numpy(np.empty((n_rows, *shape), dtype))
        start = 0
        for shard in self.shards.tolist():
            rows = self.mapped(column, shard)
            whole[start : start + len(rows)] = rows
            start += len(rows)
        self._maps = {key: rows for key, rows in self._maps.items() if key[0] != column}
        return whole

    def damaged(self, n_threads: int | None = None) -> list[str]:
        """Names of the files whose bytes differ from their checksums; every byte is read."""
        sums = {n: good for e in self.entries.values() for n, good in e["sha256"].items()}
        return damaged_files(self.folder, sums, n_threads)

    def verify(self) -> None:
        """Compare every byte with the checksums of the index, and every layout with its header.

        Raises: CacheError that names each file that differs.
        """
        if bad := self.damaged():
            raise CacheError(
                f"{self.folder}: {', '.join(bad)} differ from their checksums; "
                f"{_remedy(self.folder)}"
            )
        self.check(self.header["columns"], self.shards.tolist())


def damaged_files(folder: Path, sums: Mapping[str, str], n_threads: int | None = None) -> list[str]:
    """Which files of a folder are missing or differ from their checksums; every byte is read.

    Args:
        sums: sha256 of each file, by name.
        n_threads: Files hashed at the same time; None: one per CPU.
    """

    def size(name: str) -> int:
        return (folder / name).stat().st_size if (folder / name).is_file() else 0

    def matches(name: str) -> bool:
        return (folder / name).is_file() and files.sha256_file(folder / name) == sums[name]

    bad = []
    pool = ThreadPoolExecutor(n_threads or files.n_cpus())  # hashing frees the GIL
    with tqdm(
        total=sum(map(size, sums)),
        desc=f"verifying {folder.name}",
        unit="B",
        unit_scale=True,
        leave=False,
        delay=1,  # seconds: what is read in less needs no bar
    ) as progress:
        try:
            for name, whole in zip(sums, pool.map(matches, sums), strict=True):
                progress.update(size(name))
                bad += [] if whole else [name]
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all other files
    return bad


def _preamble(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """The first bytes of an .npy file as NumPy writes them."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer,
        {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape},
    )
    return buffer.getvalue()


def _listed(shards: list[int], most: int = 5) -> str:
    """`0, 1, 2 and 40 more`."""
    shown = ", ".join(map(str, shards[:most]))
    return shown if len(shards) <= most else f"{shown} and {len(shards) - most} more"


def pixel_statistics(cache: Cache, example_ids: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel over some images, pixels in [0, 1].

    Computed in exact integer sums, so that the order of the ids does not matter.

    Returns: (mean, std), one float per channel; a constant channel gets std 1.
    """
    n_channels = cache.header["columns"]["images"][1][0]
    counts = np.zeros((n_channels, 256), np.int64)
    for chunk in np.array_split(np.sort(example_ids), max(1, len(example_ids) // 512)):
        images = cache.read("images", chunk)  # (B, C, H, W)
        counts += [np.bincount(images[:, c].ravel(), minlength=256) for c in range(n_channels)]
    values, n_pixels = np.arange(256), counts.sum(1)
    mean, squares = counts @ values / n_pixels, counts @ values**2 / n_pixels
    std = np.sqrt(squares - mean**2)
    return [float(m) / 255 for m in mean], [float(s) / 255 if s > 1e-6 else 1.0 for s in std]
