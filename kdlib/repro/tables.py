"""Tables on the disk: parquet files that carry what they were made from and a hash of themselves.

Leaves to others: what the columns mean.
"""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kdlib.repro import files

MOST_BYTES = 2**28  # in memory; a larger table must be as large on the disk, give or take


MOST_RATIO = 64  # of the bytes in memory to those on the disk


def check_provenance(expected: dict | None, found: dict, path: Path) -> None:
    """Compare what a reader expects with what a file says it was made from.

    Args:
        expected: The keys the reader knows, all of which must match; None compares nothing.
        found: The provenance stored in the file; further keys are allowed.
        path: The file, for the message.

    Raises: ValueError that names each differing key, what the file has and what was expected.
    """
    lines = files.difference(expected or {}, {k: found[k] for k in (expected or {}) if k in found})
    if lines:
        raise ValueError(
            f"{path} was made from something else (key: found -> expected):\n  "
            + "\n  ".join(lines)
            + "\nrun the step that makes it again, or point to the file that belongs to this study"
        )


def _content_sha256(table: pd.DataFrame, metadata: dict) -> str:
    """sha256 over metadata, names, index and values; parquet's own checksums leave names out."""
    numbers, rest = [], [metadata]
    for column in (table.index.to_series(), *(table[name] for name in table.columns)):
        rest.append(str(column.name))
        if isinstance(column.dtype, pd.CategoricalDtype):
            rest.append([str(level) for level in column.cat.categories])
            column = column.cat.codes
        if pd.api.types.is_numeric_dtype(column.dtype):  # bool is one of them
            numbers.append(column.to_numpy())
        else:
            rest.append([None if pd.isna(value) else str(value) for value in column])
    return files.fingerprint([rest, files.sha256_array(*numbers)])


def write_parquet(
    path: Path, table: pd.DataFrame, metadata: dict, compression: str = "snappy"
) -> Path:
    """Write a table of numbers, categories and texts with JSON metadata in the file itself.

    The file is written atomically; the same content gives the same bytes, and carries a hash.
    """
    stored = {"content": metadata, "sha256": _content_sha256(table, metadata)}
    content = pa.Table.from_pandas(table)
    content = content.replace_schema_metadata(
        {**content.schema.metadata, b"kdlib": files.canonical_json(stored).encode()}
    )
    return files.write_atomic(
        Path(path), lambda f: pq.write_table(content, f, compression=compression)
    )


# A damaged footer can fail in any of these ways inside pyarrow and pandas.
_DAMAGE = (
    pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError,
    MemoryError, IndexError,
)  # fmt: skip


def _remedy(maker: str) -> str:
    return f"delete it, and the evidence.json beside it where there is one, and run {maker} again"


def read_parquet(path: Path, maker: str) -> tuple[pd.DataFrame, dict]:
    """Read what `write_parquet` wrote.

    Args:
        path: The file.
        maker: The step that makes it, for the messages.

    Returns: The table and its metadata.
    Raises: FileNotFoundError that names the maker; ValueError for a file that is cut, changed, or
        not ours.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; run {maker}, which makes it")
    try:
        # One file as it is: pq.read_table looks for a data set, and reads `axis=value` in paths.
        with pq.ParquetFile(path) as file:
            told = file.metadata
            n_bytes = 8 * told.num_rows * told.num_columns
            if n_bytes > max(MOST_BYTES, MOST_RATIO * path.stat().st_size):
                raise ValueError(f"{told.num_rows} rows in a file of {path.stat().st_size} bytes")
            content = file.read()
        stored = (content.schema.metadata or {}).get(b"kdlib")
        if stored is not None:
            stored, table = json.loads(stored), content.to_pandas()
            metadata = stored["content"]
            intact = stored["sha256"] == _content_sha256(table, metadata)
    except _DAMAGE as error:
        raise ValueError(f"{path} is cut or damaged ({error}); {_remedy(maker)}") from None
    if stored is None:
        raise ValueError(f"{path} carries no kdlib metadata; expected a file made by {maker}")
    if not intact:
        raise ValueError(
            f"{path} is cut or damaged (its content does not match its sha256); {_remedy(maker)}"
        )
    return table, metadata
