"""Data sets that the `datasets` library reads, from the Hugging Face hub or from local files, as
sources: their split and columns, and encoded images at random or from a stream."""

import errno
import itertools
import re
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.huggingface_files import Place, local_place, no_split
from kdlib.cache.image_files import Payload, common_size, decode_images, rules_of
from kdlib.cache.parquet import ParquetRows
from kdlib.cache.sources import Encoded, Source, check_labels, limited, size_identity
from kdlib.repro import files
from kdlib.study.data import Data, HuggingFace

ASK_TIMEOUT_S = 10  # for the one question that finds a data set's commit
_COMMIT = re.compile(r"[0-9a-f]{40}")
_UNLABELLED = ", or `labelled: false` for images without labels (study: data.labelled)"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def open_huggingface(data: Data, split: str) -> Source:
    """One split of a hub data set, a local parquet file, or a folder of parquet files or images.

    A path that exists (a relative one: in the data folder) comes before a hub name. A hub data set
    is identified by its commit; local parquet files by names, sizes and the sha256 of their
    footers, which hold the counts, offsets and statistics of all columns; images by names and
    sizes. What changes under the same identity is found by `kdlib.cache.readings`.

    Raises: FileNotFoundError when the data set cannot be had; ValueError for a split, column,
        label or layout that is absent or unfit; ModuleNotFoundError without `datasets`.
    """
    try:
        import datasets
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "source `huggingface` needs the datasets library; run `pip install datasets`"
        ) from None
    settings = data.huggingface
    name = settings.train_split if split == "train" else settings.test_split
    where = f"{settings.dataset} {name}"
    place, rows = _open(settings, name, settings.streaming)
    columns = [settings.image_column] + [settings.label_column] * data.labelled
    _check_columns(rows.features or {}, columns, where)
    class_names = _class_names(rows, settings, split, where) if data.labelled else ()
    rows = rows.select_columns(columns)
    rows = rows.cast_column(columns[0], datasets.Image(decode=False))  # as they are encoded
    n_known = _count(rows, place, name) if settings.streaming else len(rows)
    if n_known is None and (split != "train" or data.n_train is None):
        raise ValueError(
            f"the number of examples of {where} is not known before its stream has ended; give "
            + ("data.n_train, or " if split == "train" else "")
            + "`streaming: false` (study: data.huggingface.streaming)"
        )
    n_examples = data.n_train if n_known is None else limited(data, split, n_known)
    if n_examples == 0:
        raise ValueError(f"{where} has no examples")
    take = _Stream(rows, place, where) if settings.streaming else lambda i, j: rows[i:j]
    fetch_range = _reader(take, data, where, len(class_names))
    if data.labelled and not settings.streaming:  # before hours of building
        labels = _label_column(rows, settings.label_column)[:n_examples]
        check_labels(labels, len(class_names), where, hint=_UNLABELLED)
    rules, keys = rules_of(data)
    size = common_size(fetch_range, 1 if settings.streaming else n_examples, where, rules)
    identity = {
        "source": "huggingface",
        "split": name,
        **place.identity,
        "columns": columns,
        "n_examples": n_examples,
        **size_identity(data.image_size),
        **keys,
    }
    return Source(
        "huggingface", split, class_names, n_examples, (3, *size), identity, fetch_range,
        partial(decode_images, where, size, rules), parallel=True,
        encoded=Encoded(where, rules, size, fetch_range, once=settings.streaming, **place.files),
    )  # fmt: skip


def _reader(
    take: Callable[[int, int], dict[str, list]], data: Data, where: str, n_classes: int
) -> Callable[[int, int], Payload]:
    """From a range of example ids to their encoded images and labels."""
    settings = data.huggingface

    def fetch_range(start: int, stop: int) -> Payload:
        part = take(start, stop)
        images = [_encoded(image) for image in part[settings.image_column]]
        if not data.labelled:
            return Payload(start, images, np.full(stop - start, -1, np.int64))
        labels = [-1 if label is None else label for label in part[settings.label_column]]
        labels = np.array(labels, np.int64)
        check_labels(labels, n_classes, where, np.arange(start, stop), _UNLABELLED)
        return Payload(start, images, labels)

    return fetch_range


def _open(settings: HuggingFace, name: str, streaming: bool) -> tuple[Place, Any]:
    """The place of a split, and its rows as a Dataset or an IterableDataset."""
    import datasets

    path = files.data_root() / settings.dataset  # an absolute path stays as it is
    options = {"streaming": streaming, "cache_dir": str(files.data_root() / "huggingface")}
    if path.exists():
        datasets.disable_progress_bars()
        place = local_place(path, settings, name)
        try:
            opened = datasets.load_dataset(**place.arguments, **options)
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(
                f"{path} cannot be read by `datasets` "
                f"({files.one_line(error.__cause__ or error)}); repair its files or fetch them "
                "again"
            ) from error
    else:
        datasets.enable_progress_bars()  # a download can take hours
        place, opened = _from_hub(path, settings, name, options)
    if name not in opened:
        raise no_split(settings, name, opened)
    return place, opened[name]


def _from_hub(
    path: Path, settings: HuggingFace, split: str, options: dict
) -> tuple[Place, dict[str, Any]]:
    import datasets
    from huggingface_hub import HfApi

    name, parquet = settings.dataset, ()
    if not _HUB_NAME.fullmatch(name) or name.endswith(".parquet"):
        raise FileNotFoundError(
            f"there is no {path}, and {name!r} is no name on the Hugging Face hub (study: "
            "data.huggingface.dataset)"
        )
    if Path(name).exists():  # `datasets` would take it, and call it by the hub's commit
        raise ValueError(
            f"{Path(name).resolve()} is named like the hub's {name}; give its absolute path "
            "(study: data.huggingface.dataset), or start elsewhere"
        )
    commit = settings.revision or ""
    try:
        if not _COMMIT.fullmatch(commit):
            api = HfApi()
            commit = api.dataset_info(name, revision=settings.revision, timeout=ASK_TIMEOUT_S).sha
        arguments = {"path": name, "name": settings.config, "revision": commit}
        if options.pop("streaming"):
            builder = datasets.load_dataset_builder(**arguments, **options)
            opened, parquet = builder.as_streaming_dataset(), _parquet_files(builder.config, split)
        else:
            opened = datasets.load_dataset(**arguments, **options)
    except ValueError as error:  # a configuration that is not there, and the like
        raise ValueError(f"{name} cannot be opened: {files.one_line(error)}") from error
    except Exception as error:  # of three libraries, with no common base
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise  # of this machine, not of the hub
        raise FileNotFoundError(
            f"data set {name} is not in {path}, and the Hugging Face hub did not give it "
            f"({files.one_line(error)}): run `hf download --repo-type dataset {name} --local-dir "
            f"{path}` on a machine with network, or give a local path (study: "
            "data.huggingface.dataset)"
        ) from error
    identity = {"dataset": name, "config": settings.config, "commit": commit}
    return Place(arguments, identity, parquet), opened


def _parquet_files(config: Any, split: str) -> tuple[str, ...]:
    """Addresses of the files of a split, where all of its rows lie in parquet files."""
    found = [str(file) for file in (config.data_files or {}).get(split, ())]
    plain = getattr(config, "filters", None) is None
    return tuple(found) if plain and all(file.endswith(".parquet") for file in found) else ()


def _check_columns(features: dict[str, Any], columns: list[str], where: str) -> None:
    import datasets

    for column, key in zip(columns, ("image_column", "label_column"), strict=False):
        if column not in features:
            raise ValueError(
                f"{where} has no column {column!r}; there are: {', '.join(features)} (study: "
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
            "image files (study: data.huggingface.image_column)"
        )


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
            "(study: data.huggingface.label_column, or data.labelled)"
        )
    if settings.streaming:
        raise ValueError(
            f"label column {column!r} of {where} is {feature}, which does not say how many classes "
            "there are; to stream it, give it ClassLabel features, or `labelled: false` (study: "
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


def _encoded(image: dict[str, Any] | None) -> bytes | str:
    """Bytes of an image file, or the path of a local one; no bytes where there is no image."""
    image = image or {}
    if image.get("bytes") is not None:
        return image["bytes"]
    path = image.get("path")
    if path is None:
        return b""  # the decoder names it, with all others that cannot be read
    if "://" not in path:
        return path
    import fsspec

    with fsspec.open(path) as file:  # of a streamed image folder
        return file.read()


def _count(rows: Any, place: Place, name: str) -> int | None:
    """Rows of a stream, as far as they are known."""
    if place.counts:
        return sum(place.counts)
    if "data_files" in place.arguments:  # an image folder: a pass over paths, not over images
        return sum(1 for _ in rows)
    splits = rows.info.splits or {}
    return (splits[name].num_examples or None) if name in splits else None


class _Stream:
    """Rows of a stream by ascending ranges: one iterator stays open. Going back opens it again; a
    gap is passed over by the metadata of parquet files, and read where there are none."""

    def __init__(self, rows: Any, place: Place, where: str) -> None:
        self._columns, self._where, self._next_id = rows.column_names, where, 0
        self._is_local = "data_files" in place.arguments  # paths are passed over, not images
        self._rows, self._parquet = rows, None
        if place.parquet:
            features = {column: rows.features[column] for column in self._columns}
            self._parquet = ParquetRows(place.parquet, place.counts, features, where)
        self._open = []  # the iterator, unless it has ended or failed
        # at the latest before the interpreter ends: an iterator cannot close itself after pyarrow
        weakref.finalize(self, self._open.clear)

    def __call__(self, start: int, stop: int) -> dict[str, list]:
        """Columns of the rows [start, stop).

        Raises: ValueError that says where, when the stream ends too early; FileNotFoundError as
            `ParquetRows.since`.
        """
        if start < self._next_id or (start > self._next_id and self._parquet):
            self._open.clear()
        if not self._open:
            self._open.append(self._since(start))
            self._next_id = start
        iterator, gap = self._open.pop(), start - self._next_id
        rows = list(itertools.islice(iterator, gap, gap + stop - start))
        if len(rows) < stop - start:
            raise ValueError(
                f"the stream of {self._where} ended before example {start + len(rows)}, though "
                f"example {stop - 1} was expected; give data.n_train, or `streaming: false` "
                "(study: data.huggingface.streaming)"
            )
        self._open.append(iterator)
        self._next_id = stop
        return {column: [row[column] for row in rows] for column in self._columns}

    def _since(self, start: int) -> Iterator[dict[str, Any]]:
        if self._parquet:
            return self._parquet.since(start)
        if start and not self._is_local:
            print(
                f"{self._where} is no set of parquet files, whose metadata would say where "
                f"example {start:,} lies: its stream is read from the start up to there"
            )
        return iter(self._rows.skip(start))
