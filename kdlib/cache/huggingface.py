"""Data sets read by the `datasets` library: of the Hugging Face hub, or local files it can read.

Holds how a data set, a split and its columns are found and refused, and how encoded images are read
at random or from a stream. Leaves decoding, and folders without that library, to `encoded`.
"""

import errno
import glob
import hashlib
import itertools
import os
import re
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.image_files import (
    SUFFIXES,
    Decoder,
    Encoded,
    Payload,
    all_files,
    limit_identity,
    limited,
    size_identity,
    size_of,
)
from kdlib.repro import files
from kdlib.study.data import Data, HuggingFace

ASK_TIMEOUT_S = 10  # for the one question that finds a data set's commit


_COMMIT = re.compile(r"[0-9a-f]{40}")


_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


# `train`, `train_3`, `train-00000-of-00002`, `train-00000-of-00001-0123456789abcdef` are of `train`
_SHARD_NAME = re.compile(r"(.+?)([-_.]?\d+)?(-of-\d+)?(-[0-9a-f]{16})?")


@dataclass(frozen=True)
class _Place:
    """Where a split is.

    Attributes:
        arguments: Of `datasets.load_dataset`.
        identity: What determines the bytes there.
        n_rows: Where it is known without loading.
    """

    arguments: dict[str, Any]
    identity: dict[str, Any]
    n_rows: int | None = None


def open_hub(data: Data, split: str) -> Encoded:
    """One split of a hub data set, a local parquet file, or a folder of parquet files or images.

    A path that exists (a relative one: in the data folder) comes before a hub name. A hub data set
    is identified by its commit; local parquet files by names, sizes and the sha256 of their
    footers, which hold the counts, offsets and statistics of all columns; images by names and
    sizes: an image replaced by another of the same name and size goes unnoticed here.

    Raises: FileNotFoundError when the data set cannot be had; ValueError for a split, column,
        label or layout that is absent or unfit; ModuleNotFoundError without `datasets`.
    """
    settings = data.huggingface
    name = settings.train_split if split == "train" else settings.test_split
    where = f"{settings.dataset} {name}"
    place, rows = _open(settings, name, settings.streaming)
    columns = [settings.image_column] + [settings.label_column] * data.labelled
    _check_columns(rows.features or {}, columns, where)
    class_names = _class_names(rows, settings, split, where) if data.labelled else ()
    rows = _narrowed(rows, columns)
    n_known = _count(rows, place, name) if settings.streaming else len(rows)
    if n_known is None and (split != "train" or data.n_train is None):
        raise ValueError(
            f"the number of examples of {where} is not known before its stream has ended; give "
            + ("data.n_train, or " if split == "train" else "")
            + "`streaming: false` (params: data.huggingface.streaming)"
        )
    n_examples = data.n_train if n_known is None else limited(data, split, n_known)
    if n_examples == 0:
        raise ValueError(f"{where} has no examples")
    take = _Stream(rows, where) if settings.streaming else lambda start, stop: rows[start:stop]

    def fetch_range(start: int, stop: int) -> Payload:
        part = take(start, stop)
        images = [
            _encoded(image, f"example {i} of {where}")
            for i, image in enumerate(part[settings.image_column], start)
        ]
        if not data.labelled:
            return Payload(start, images, np.full(stop - start, -1, np.int64))
        labels = [-1 if label is None else label for label in part[settings.label_column]]
        labels = np.array(labels, np.int64)
        return Payload(start, images, _checked(labels, start, len(class_names), where))

    if data.labelled and not settings.streaming:  # now rather than after hours of building
        labels = _label_column(rows, settings.label_column)[:n_examples]
        _checked(labels, 0, len(class_names), where)
    if data.image_size:
        size = (data.image_size, data.image_size)
    else:
        size = size_of(fetch_range(0, 1).images[0], f"example 0 of {where}")
    identity = {
        "source": "huggingface",
        "split": name,
        **place.identity,
        "columns": columns,
        "n_examples": n_examples,
        **limit_identity(data, split),
        **size_identity(data),
    }
    decode = Decoder(where, size, data.image_size)
    return Encoded(class_names, n_examples, (3, *size), identity, fetch_range, decode)


def _open(settings: HuggingFace, name: str, streaming: bool) -> tuple[_Place, Any]:
    """The place of a split, and its rows as a Dataset or an IterableDataset."""
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "source `huggingface` needs the datasets library; run `pip install datasets`"
        ) from None
    path = files.data_root() / settings.dataset  # an absolute path stays as it is
    options = {"streaming": streaming, "cache_dir": str(files.data_root() / "huggingface")}
    if path.exists():
        datasets.disable_progress_bars()
        place = _local_place(path, settings, name)
        try:
            opened = datasets.load_dataset(**place.arguments, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(
                f"{path} cannot be read by `datasets` ({_short(error.__cause__ or error)}); repair "
                "its files or fetch them again"
            ) from error
    else:
        datasets.enable_progress_bars()  # a download can take hours
        place, opened = _from_hub(path, settings, options)
    if name not in opened:
        raise _no_split(settings, name, opened)
    return place, opened[name]


def _from_hub(path: Path, settings: HuggingFace, options: dict) -> tuple[_Place, dict[str, Any]]:
    import datasets
    from huggingface_hub import HfApi

    name = settings.dataset
    if not _HUB_NAME.fullmatch(name) or name.endswith(".parquet"):
        raise FileNotFoundError(
            f"there is no {path}, and {name!r} is no name on the Hugging Face hub (params: "
            "data.huggingface.dataset)"
        )
    if Path(name).exists():  # `datasets` would take it, and call it by the hub's commit
        raise ValueError(
            f"{Path(name).resolve()} is named like the hub's {name}; give its absolute path "
            "(params: data.huggingface.dataset), or start elsewhere"
        )
    commit = settings.revision or ""
    try:
        if not _COMMIT.fullmatch(commit):
            api = HfApi()
            commit = api.dataset_info(name, revision=settings.revision, timeout=ASK_TIMEOUT_S).sha
        arguments = {"path": name, "name": settings.config, "revision": commit}
        opened = datasets.load_dataset(**arguments, **options)
    except ValueError as error:  # a configuration that is not there, and the like
        raise ValueError(f"{name} cannot be opened: {_short(error)}") from error
    except Exception as error:  # of three libraries, with no common base
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise  # ours, not the hub's
        raise FileNotFoundError(
            f"data set {name} is not in {path}, and the Hugging Face hub did not give it "
            f"({_short(error)}): run `hf download --repo-type dataset {name} --local-dir {path}` "
            "on a machine with network, or give a local path (params: data.huggingface.dataset)"
        ) from error
    identity = {"dataset": name, "config": settings.config, "commit": commit}
    return _Place(arguments, identity), opened


def _local_place(path: Path, settings: HuggingFace, name: str) -> _Place:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, splits = _local_files(path, settings)
    if name not in splits:
        raise _no_split(settings, name, splits)
    base = path.parent if path.is_file() else path
    listing = [[os.path.relpath(file, base), os.stat(file).st_size] for file in splits[name]]
    if kind == "imagefolder":
        for file, entry in zip(splits[name], listing, strict=True):
            if os.path.basename(file).startswith("metadata."):  # where labels may stand
                entry.append(files.sha256_file(Path(file)))
        return _Place(_image_folder(path, settings, splits), {"sha256": files.fingerprint(listing)})
    n_rows = 0
    for file, entry in zip(splits[name], listing, strict=True):
        try:
            n_rows += pq.read_metadata(file).num_rows
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a whole parquet file ({_short(error)}); fetch it again"
            ) from None
        entry.append(_sha256_footer(file))
    # `datasets` takes every path for a pattern
    arguments = {"path": kind, "data_files": {name: [glob.escape(file) for file in splits[name]]}}
    return _Place(arguments, {"sha256": files.fingerprint(listing)}, n_rows)


def _image_folder(path: Path, settings: HuggingFace, splits: dict[str, list[str]]) -> dict:
    """Arguments for a folder of images: both splits together, so that they number their classes
    alike; with labels where all images lie equally deep in class folders."""
    root = _split_folder(path, settings)
    used = sorted({settings.train_split, settings.test_split} & splits.keys())
    depths = {
        len(Path(file).relative_to(root).parts)
        for split in used
        for file in splits[split]
        if _is_image(file)
    }
    return {
        "path": "imagefolder",
        "data_files": {split: [f"{glob.escape(str(root / split))}/**"] for split in used},
        "drop_labels": len(depths) > 1 or min(depths) < 3,  # <split>/<class>/<file>
    }


def _split_folder(path: Path, settings: HuggingFace) -> Path:
    return path / settings.config if settings.config else path


def _local_files(path: Path, settings: HuggingFace) -> tuple[str, dict[str, list[str]]]:
    """`parquet` or `imagefolder`, and the sorted files of each split.

    One file is the split `train`. In a folder, as on the hub, files are named after their split, or
    lie in a folder of that name; either in the folder itself, or in its folder `data`.
    """
    if path.is_file():
        return "parquet", {"train": [str(path)]}
    root, splits = _split_folder(path, settings), {}
    for base in (root / "data", root):
        for file in sorted((*base.glob("*.parquet"), *base.glob("*/*.parquet"))):
            split = _SHARD_NAME.fullmatch(file.stem)[1] if file.parent == base else file.parent.name
            if not file.name.startswith((".", "metadata.")):
                splits.setdefault(split, []).append(str(file))
        if splits:
            return "parquet", splits
    folders = sorted(p for p in root.glob("*/") if p.name[0] != ".")
    found = {folder.name: all_files(folder) for folder in folders}
    found = {s: paths for s, paths in found.items() if any(_is_image(path) for path in paths)}
    if not found:
        raise ValueError(
            f"{root} has neither parquet files (train*.parquet or train/*.parquet) nor images "
            f"({', '.join(SUFFIXES)}) in folders train/ and test/ (params: data.huggingface)"
        )
    return "imagefolder", found


def _is_image(path: str) -> bool:
    return path.lower().endswith(SUFFIXES)


def _sha256_footer(file: str) -> str:
    """sha256 of a parquet file's metadata, whose length stands before the last four bytes."""
    with open(file, "rb") as opened:
        opened.seek(-8, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(opened.read(length)).hexdigest()


def _no_split(settings: HuggingFace, name: str, known: Any) -> ValueError:
    return ValueError(
        f"{settings.dataset} has no split {name!r}; there are: {', '.join(known)} (params: "
        "data.huggingface.train_split, test_split, config)"
    )


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def _check_columns(features: dict[str, Any], columns: list[str], where: str) -> None:
    import datasets

    for column, key in zip(columns, ("image_column", "label_column"), strict=False):
        if column not in features:
            raise ValueError(
                f"{where} has no column {column!r}; there are: {', '.join(features)} (params: "
                f"data.huggingface.{key})"
            )
    feature = features[columns[0]]
    if isinstance(feature, dict):  # a struct that was written without `datasets`
        fits = "bytes" in feature
    else:
        fits = isinstance(feature, datasets.Image) or feature.dtype in ("binary", "large_binary")
    if not fits:
        raise ValueError(
            f"column {columns[0]!r} of {where} is {feature}; expected images, or the bytes of "
            "image files (params: data.huggingface.image_column)"
        )


def _narrowed(rows: Any, columns: list[str]) -> Any:
    """Only these columns, the first of them as encoded images."""
    import datasets

    return rows.select_columns(columns).cast_column(columns[0], datasets.Image(decode=False))


def _class_names(rows: Any, settings: HuggingFace, split: str, where: str) -> tuple[str, ...]:
    """From the label column's features; for plain integers `0` to the largest of the training
    split."""
    import datasets

    column = settings.label_column
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return tuple(feature.names)
    if not re.fullmatch(r"u?int\d+", getattr(feature, "dtype", "")):
        raise ValueError(
            f"label column {column!r} of {where} is {feature}; expected ClassLabel or integers "
            "(params: data.huggingface.label_column, or data.labelled)"
        )
    if settings.streaming:
        raise ValueError(
            f"label column {column!r} of {where} is {feature}, which does not say how many classes "
            "there are; to stream it, give it ClassLabel features, or `labelled: false` (params: "
            "data.labelled)"
        )
    if split != "train":
        _, rows = _open(settings, settings.train_split, streaming=False)
        _check_columns(rows.features, [settings.image_column, column], settings.dataset)
    return tuple(map(str, range(_label_column(rows, column).max(initial=-1) + 1)))


def _label_column(rows: Any, column: str) -> np.ndarray:
    """All labels of a Dataset, int64; -1 where one is missing. No image is read."""
    table = rows.select_columns([column]).with_format("arrow")[:]
    return table[column].cast("int64").fill_null(-1).to_numpy()


def _checked(labels: np.ndarray, first_id: int, n_classes: int, where: str) -> np.ndarray:
    bad = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(bad):
        raise ValueError(
            f"example {first_id + bad[0]} of {where} has label {labels[bad[0]]}; expected "
            f"[0, {n_classes - 1}], or `labelled: false` for images without labels (params: "
            "data.labelled)"
        )
    return labels


def _encoded(image: dict[str, Any] | None, name: str) -> bytes | str:
    """Bytes of an image file, or the path of a local one."""
    image = image or {}
    if image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path")
    if path is None:
        raise ValueError(f"{name} has no image; repair or remove it")
    if "://" not in path:
        return path
    import fsspec

    with fsspec.open(path) as file:  # of a streamed image folder
        return file.read()


def _count(rows: Any, place: _Place, name: str) -> int | None:
    """Rows of a stream, as far as they are known."""
    if place.n_rows is not None:
        return place.n_rows
    if "data_files" in place.arguments:  # an image folder: a pass over paths, not over images
        return sum(1 for _ in rows)
    splits = rows.info.splits or {}
    return (splits[name].num_examples or None) if name in splits else None


class _Stream:
    """Rows of a stream by ascending ranges: one iterator stays open, and a gap is skipped. Going
    back opens the stream again."""

    def __init__(self, rows: Any, where: str) -> None:
        self._rows, self._where, self._next_id = rows, where, 0
        self._open = []  # the iterator, unless it has ended or failed
        # at the latest before the interpreter ends: an iterator cannot close itself after pyarrow
        weakref.finalize(self, self._open.clear)

    def __call__(self, start: int, stop: int) -> dict[str, list]:
        """Columns of the rows [start, stop).

        Raises: ValueError that says where, when the stream ends too early.
        """
        if start < self._next_id:
            self._open.clear()
        if not self._open:
            self._open.append(iter(self._rows.skip(start)))
            self._next_id = start
        iterator, gap = self._open.pop(), start - self._next_id
        rows = list(itertools.islice(iterator, gap, gap + stop - start))
        if len(rows) < stop - start:
            raise ValueError(
                f"the stream of {self._where} ended before example {start + len(rows)}, though "
                f"example {stop - 1} was expected; give data.n_train, or `streaming: false` "
                "(params: data.huggingface.streaming)"
            )
        self._open.append(iterator)
        self._next_id = stop
        return {column: [row[column] for row in rows] for column in self._rows.column_names}
