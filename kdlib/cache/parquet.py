"""Rows of parquet files, here or on the hub, from any row on: files and row groups that lie before
it are passed over by their metadata, and their rows are not read."""

import errno
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from kdlib.repro import files

AT_ONCE = 16  # files whose metadata are asked for at the same time
BATCH = 64  # rows in memory as Python objects


class ParquetRows:
    """The rows of some files, one after another.

    Args:
        paths: Local paths, or addresses such as `hf://datasets/owner/name@commit/train.parquet`.
        counts: Rows of each of them; empty where they are not known yet: then the metadata of
            files before a row are read to find it.
        features: Of `datasets`, by column; other columns are not read.
        where: The data set and the split, for messages.
    """

    def __init__(
        self, paths: Sequence[str], counts: Sequence[int], features: dict[str, Any], where: str
    ) -> None:
        import datasets

        self._paths, self._counts, self._where = list(paths), list(counts), where
        self._columns = list(features)
        self._schema = datasets.Features(features).arrow_schema

    def since(self, start: int) -> Iterator[dict[str, Any]]:
        """The rows from `start` on, as `datasets` gives them undecoded.

        Raises: FileNotFoundError that names the file which cannot be read.
        """
        import pyarrow as pa
        from datasets.table import table_cast

        number, before = self._file_of(start)
        for path in self._paths[number:]:
            with self._opened(path) as file:
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                group = 0
                while group < len(sizes) and before + sizes[group] <= start:
                    before += sizes[group]
                    group += 1
                if group == len(sizes):
                    continue
                groups = range(group, len(sizes))
                for batch in file.iter_batches(BATCH, groups, self._columns):
                    table = pa.Table.from_batches([batch]).select(self._columns)
                    rows = table_cast(table, self._schema).to_pylist()
                    yield from rows[max(start - before, 0) :]
                    before += len(rows)

    def _file_of(self, start: int) -> tuple[int, int]:
        """The file that has a row, and the rows of all files before it."""
        counts = self._counts
        while sum(counts) <= start and len(counts) < len(self._paths):
            with ThreadPoolExecutor(AT_ONCE) as pool:
                counts += pool.map(self._count, self._paths[len(counts) :][:AT_ONCE])
        number = before = 0
        while number < len(counts) and before + counts[number] <= start:
            before += counts[number]
            number += 1
        return number, before

    def _count(self, path: str) -> int:
        with self._opened(path) as file:
            return file.metadata.num_rows

    @contextmanager
    def _opened(self, path: str) -> Iterator[Any]:
        import pyarrow.parquet as pq
        from fsspec.core import url_to_fs

        try:
            system, name = url_to_fs(path)
            with system.open(name, "rb") as content, pq.ParquetFile(content) as file:
                yield file
        except Exception as error:  # of three libraries, with no common base
            if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOSPC:
                raise
            raise FileNotFoundError(
                f"{path} of {self._where} cannot be read ({files.one_line(error)}); shards that "
                "are whole are kept: run the same again where it can be reached"
            ) from error
