"""Memory-mapped shards of arrays, one row per example id: images with labels, and teacher outputs.

A cache is a folder of plain NumPy files, `<column>-<shard>.npy`, and an `index.json` written last:
its presence means that the cache is whole. While it is built, `journal.jsonl` lists the shards that
are safely on the disk, so a killed build resumes after the last of them. The header in the index
holds everything that determines the bytes; its fingerprint is the cache's name in all evidence.
Leaves to others: where images come from (`data`), which rows are read when (`sampling`).
"""

import json
import os
import re
import tokenize
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from kdlib import files
from kdlib.data import Source

FORMAT = 1
_FILE_NAME = re.compile(r"[a-z_]+-\d{5,}\.npy")  # an index may not point outside its folder
# What NumPy raises for a damaged header: it parses it as Python.
_NOT_NPY = (ValueError, OSError, EOFError, SyntaxError, TypeError, tokenize.TokenError)

_DISTRUST = "do not trust this folder: delete it and run the notebook that makes it"

Columns = Mapping[str, tuple[str, tuple[int, ...]]]  # column -> (dtype, shape of one example's row)


class CacheError(ValueError):
    """A cache that is unfinished, damaged, of another format, or made of other things than asked
    for."""


def _file_name(column: str, shard: int) -> str:
    return f"{column}-{shard:05d}.npy"


def _check_file(path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    """Raise CacheError unless `path` is a whole .npy file of this dtype and shape; reads its header
    only."""
    try:
        found = np.lib.format.open_memmap(path, mode="r")  # no pickles, and no zip archives either
    except FileNotFoundError:
        raise CacheError(f"shard file {path} is missing; {_remedy(path.parent)}") from None
    except _NOT_NPY as error:
        raise CacheError(
            f"shard file {path} is cut or damaged ({error}); {_remedy(path.parent)}"
        ) from None
    if found.dtype != np.dtype(dtype) or found.shape != shape:
        raise CacheError(
            f"shard file {path} holds {found.dtype} {found.shape}; its index says {dtype} "
            f"{shape}; {_remedy(path.parent)}"
        )


def _remedy(folder: Path) -> str:
    return f"run `kdlib.cache.repair` on {folder}, then the notebook that makes it"


def build(
    folder: Path,
    header: dict[str, Any],
    columns: Columns,
    make: Callable[[int, int], Mapping[str, np.ndarray]],
    *,
    n_examples: int,
    shard_size: int,
    describe: str = "cache",
) -> "Cache":
    """Write a cache, or finish one that was interrupted, or just open it when it is whole.

    Args:
        header: JSON-able; everything that determines the bytes.
        columns: Per column the dtype and the shape of one row.
        make: From example ids [start, stop) to the arrays of all columns, each (stop - start, *row
            shape). n_examples: Rows in all, > 0. Row i belongs to example id i. shard_size: Rows
            per shard; the last shard may be shorter. describe: Word in front of the progress bar.

    Raises: CacheError when the folder holds a cache with another header (the difference is printed,
        nothing is touched);
        BlockingIOError when another process is building it; ValueError when `make` returns other
        arrays than declared.
    """
    header = {"format": FORMAT, "n_examples": n_examples, "shard_size": shard_size, **header}
    header["columns"] = {name: [dtype, list(shape)] for name, (dtype, shape) in columns.items()}
    if (folder / "index.json").exists():
        return Cache(folder, header)
    with files.locked(folder / ".lock", wait=False):
        journal = folder / "journal.jsonl"
        done = _read_journal(journal, header)
        n_shards = -(-n_examples // shard_size)
        rows = tqdm(total=n_examples, desc=describe, unit="img", leave=False)
        _write_journal(journal, header, done)  # anew: a torn last line would swallow the next one
        with open(journal, "a") as log:
            for shard in range(n_shards):
                start, stop = shard * shard_size, min((shard + 1) * shard_size, n_examples)
                if shard not in done:
                    done[shard] = _write_shard(
                        folder, shard, start, stop, columns, make(start, stop)
                    )
                    _append(log, {"shard": shard, "sha256": done[shard]})
                rows.update(stop - start)
        rows.close()
        shards = [
            {
                "first_id": i * shard_size,
                "n": min(shard_size, n_examples - i * shard_size),
                "sha256": done[i],
            }
            for i in range(n_shards)
        ]
        files.write_json(folder / "index.json", {"header": header, "shards": shards})
        journal.unlink()
    return Cache(folder, header)


def _write_shard(
    folder: Path, shard: int, start: int, stop: int, columns: Columns, arrays: Mapping
) -> dict[str, str]:
    if set(arrays) != set(columns):
        raise ValueError(
            f"shard {shard} was made with columns {sorted(arrays)}; expected {sorted(columns)}"
        )
    sums = {}
    for name, (dtype, shape) in columns.items():
        array, expected = arrays[name], (stop - start, *shape)
        if array.dtype != np.dtype(dtype) or array.shape != expected:
            raise ValueError(
                f"column {name} of shard {shard} is {array.dtype} {array.shape}; expected {dtype} "
                f"{expected}"
            )
        path = files.write_npy(folder / _file_name(name, shard), array)
        sums[path.name] = files.sha256_file(path)
    return sums


def _write_journal(journal: Path, header: dict, done: Mapping[int, dict[str, str]]) -> None:
    lines = [{"header": header}, *({"shard": i, "sha256": sums} for i, sums in done.items())]
    text = "".join(files.canonical_json(line) + "\n" for line in lines)
    files.write_atomic(journal, lambda file: file.write(text.encode()))


def _append(log: Any, entry: dict) -> None:
    log.write(files.canonical_json(entry) + "\n")
    log.flush()
    os.fsync(log.fileno())


def _read_journal(journal: Path, header: dict) -> dict[int, dict[str, str]]:
    """Shards an earlier, interrupted build has finished; a torn last line is not one of them."""
    if not journal.exists():
        return {}
    entries = []
    for line in journal.read_text().splitlines():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    if not entries:
        return {}
    if lines := files.difference(header, entries[0]["header"]):
        raise CacheError(
            f"{journal.parent} holds an unfinished cache of something else ({'; '.join(lines)}); "
            "finish or delete it, or choose another folder"
        )
    done = {}
    for entry in entries[1:]:
        try:
            for name, sha256 in entry["sha256"].items():
                if files.sha256_file(journal.parent / name) != sha256:
                    raise CacheError(name)
        except (FileNotFoundError, CacheError):
            continue  # not whole after all: it is made again
        done[entry["shard"]] = entry["sha256"]
    return done


def repair(folder: Path) -> list[str]:
    """Turn a damaged cache back into an unfinished build that keeps every whole shard.

    The next build makes only the shards that are missing or damaged. Returns: the names of the
    damaged files.
    """
    index = _read_index(folder)
    with files.locked(folder / ".lock", wait=False):
        done, bad = {}, []
        for shard, entry in enumerate(index["shards"]):
            wrong = [
                name
                for name, sha256 in entry["sha256"].items()
                if not _matches(folder / name, sha256)
            ]
            bad += wrong
            if not wrong:
                done[shard] = entry["sha256"]
        if bad:
            _write_journal(folder / "journal.jsonl", index["header"], done)
            (folder / "index.json").unlink()
    return bad


def _matches(path: Path, sha256: str) -> bool:
    return path.is_file() and files.sha256_file(path) == sha256


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / "index.json"
    if not path.exists():
        state = "an unfinished build" if (folder / "journal.jsonl").exists() else "no cache"
        raise CacheError(
            f"{folder} holds {state} (index.json is missing); run the notebook that makes it"
        )
    try:
        index = files.read_json(path)
    except ValueError as error:
        raise CacheError(str(error)) from None
    header = index.get("header") if isinstance(index, dict) else None
    version = header.get("format") if isinstance(header, dict) else None
    if version != FORMAT:
        raise CacheError(
            f"{path} has format {version}; this kdlib reads format {FORMAT}: build the cache "
            f"again elsewhere"
        )
    try:
        n_examples, shard_size, columns = (
            header[key] for key in ("n_examples", "shard_size", "columns")
        )
        found = [(entry["first_id"], entry["n"], set(entry["sha256"])) for entry in index["shards"]]
        expected = [
            (start, min(shard_size, n_examples - start), {_file_name(c, i) for c in columns})
            for i, start in enumerate(range(0, n_examples, shard_size))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise CacheError(f"{path} is not an index of ours ({error!r}); {_DISTRUST}") from None
    names = set().union(*(names for _, _, names in (*found, *expected)))
    if strange := sorted(name for name in names if not _FILE_NAME.fullmatch(name)):
        raise CacheError(
            f"{path} names a file that no cache of ours has: {strange[0]!r}; {_DISTRUST}"
        )
    if found != expected:
        raise CacheError(
            f"{path} lists {len(found)} shards that do not make up its {n_examples} examples in "
            f"shards of {shard_size}; {_DISTRUST}"
        )
    return index


class Cache:
    """An open cache: rows by example id, mapped from the disk and read on demand.

    Attributes:
        header: What determines the bytes.
        fingerprint: sha256 of the header.
        n_examples: Rows; example ids are [0, n_examples).
    """

    def __init__(self, folder: Path, expected: Mapping[str, Any] | None = None) -> None:
        """Open a whole cache.

        Args:
            expected: Header entries that must be as given; others are not looked at.

        Raises: CacheError for an unfinished, foreign, cut or incomplete cache, or one with other
            header entries.
        """
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.header: dict[str, Any] = index["header"]
        wanted = json.loads(files.canonical_json(dict(expected or {})))
        found = {key: self.header.get(key) for key in wanted}
        if lines := files.difference(wanted, found):
            raise CacheError(
                f"{self.folder} was made of something else (there -> expected): "
                f"{'; '.join(lines)}; "
                "nothing was changed: choose another folder, or delete this one to make it anew"
            )
        self.fingerprint = files.fingerprint(self.header)
        self.n_examples: int = self.header["n_examples"]
        self._shard_size: int = self.header["shard_size"]
        self._shards = index["shards"]
        self._maps: dict[tuple[str, int], np.ndarray] = {}
        for shard, entry in enumerate(self._shards):
            for column, (dtype, shape) in self.header["columns"].items():
                _check_file(self.folder / _file_name(column, shard), dtype, (entry["n"], *shape))

    def _layout(self, column: str) -> tuple[str, list[int]]:
        """dtype and row shape of a column; CacheError with the nearest name when there is none."""
        if column not in self.header["columns"]:
            known = files.nearest(column, self.header["columns"])
            raise CacheError(f"{self.folder} has no column {column!r}; {known}")
        return self.header["columns"][column]

    def shard(self, column: str, shard: int) -> np.ndarray:
        """One shard of one column, memory-mapped, read-only."""
        self._layout(column)
        key = (column, shard)
        if key not in self._maps:
            path = self.folder / _file_name(column, shard)
            self._maps[key] = np.load(path, mmap_mode="r", allow_pickle=False)
        return self._maps[key]

    def read(self, column: str, example_ids: np.ndarray) -> np.ndarray:
        """Rows of some example ids, in the order given.

        Args:
            example_ids: (B,) int64 in [0, n_examples).

        Returns: (B, *row shape), a copy.
        Raises: IndexError when an id lies outside the cache; TypeError when ids are no integers.
        """
        ids = np.asarray(example_ids)
        if ids.size and not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"example ids are {ids.dtype}; expected integers")
        ids = ids.astype(np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.n_examples:
            raise IndexError(
                f"example ids [{ids.min()}, {ids.max()}] asked of {self.folder}, which has ids "
                f"[0, {self.n_examples})"
            )
        dtype, shape = self._layout(column)
        rows = np.empty((len(ids), *shape), dtype)
        shards = ids // self._shard_size
        for shard in np.unique(shards):
            mine = shards == shard
            rows[mine] = self.shard(column, int(shard))[ids[mine] - shard * self._shard_size]
        return rows

    def resident(self, column: str) -> torch.Tensor:
        """A whole column as one tensor: (n_examples, *row shape); row i is example id i."""
        dtype, shape = self._layout(column)
        whole = np.empty((self.n_examples, *shape), dtype)
        for shard, entry in enumerate(self._shards):
            whole[entry["first_id"] : entry["first_id"] + entry["n"]] = self.shard(column, shard)
        return torch.from_numpy(whole)

    def verify(self) -> None:
        """Compare every byte with the checksums of the index.

        Raises: CacheError that names each file that differs.
        """
        sums = [item for entry in self._shards for item in entry["sha256"].items()]
        bad = [name for name, sha256 in sums if not _matches(self.folder / name, sha256)]
        if bad:
            raise CacheError(
                f"{self.folder}: {', '.join(bad)} differ from their checksums; "
                f"{_remedy(self.folder)}"
            )


def build_images(source: Source, folder: Path, shard_size: int) -> Cache:
    """Cache all images (`images`, uint8 (C, H, W)) and labels (`labels`, int64) of a source.

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
    columns = {"images": ("|u1", source.image_shape), "labels": ("<i8", ())}
    return build(
        folder,
        header,
        columns,
        lambda start, stop: dict(zip(("images", "labels"), source.read(start, stop), strict=True)),
        n_examples=source.n_examples,
        shard_size=shard_size,
        describe=f"caching {source.name} {source.split}",
    )


def pixel_statistics(cache: Cache, example_ids: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel over some images, pixels in [0, 1].

    Computed in exact integer sums, so that the order of the ids does not matter.

    Returns: (mean, std), one float per channel; a constant channel gets std 1.
    """
    n_channels = cache.header["columns"]["images"][1][0]
    count, total, squares = 0, np.zeros(n_channels, np.int64), np.zeros(n_channels, np.int64)
    for chunk in np.array_split(np.sort(example_ids), max(1, len(example_ids) // 4096)):
        images = cache.read("images", chunk).astype(np.int64)  # (B, C, H, W)
        count += images[:, 0].size
        total += images.sum(axis=(0, 2, 3))
        squares += (images**2).sum(axis=(0, 2, 3))
    mean = total / count
    std = np.sqrt(squares / count - mean**2)
    return [float(m) / 255 for m in mean], [float(s) / 255 if s > 1e-6 else 1.0 for s in std]
