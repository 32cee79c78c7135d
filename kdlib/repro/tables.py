"""Tables on the disk: parquet files with their provenance and a hash of their content."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from kdlib.repro import commands, files


def check_provenance(expected: dict | None, stored: dict, path: Path) -> None:
    """Compare the provenance that a reader expects with that of a file.

    Args:
        expected: The keys the reader knows, all of which must match; None compares nothing.
        stored: The provenance in the file; further keys are allowed.

    Raises: ValueError that names each differing key, what the file has and what was expected.
    """
    wanted = expected or {}
    lines = files.difference(wanted, {k: stored[k] for k in wanted if k in stored})
    if lines:
        raise ValueError(
            f"{path} was made from something else (key: there -> expected):\n  "
            + "\n  ".join(lines)
            + f"\n{commands.delete_and_run(path)}, or point to the file that belongs to this study"
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
    """Write a table of numbers, categories and texts with JSON metadata and a hash of both in the
    file itself, atomically; the same content gives the same bytes."""
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


def read_parquet(path: Path) -> tuple[pd.DataFrame, dict]:
    """Read what `write_parquet` wrote.

    Returns: The table and its metadata.
    Raises: FileNotFoundError that names the command which makes it; ValueError for a file that is
        cut, changed, or was not written by `write_parquet`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; {commands.run_to_make(path)}")
    try:
        # One file as it is: pq.read_table looks for a data set, and reads `axis=value` in paths.
        with pq.ParquetFile(path) as file:
            content = file.read()
        stored = json.loads((content.schema.metadata or {}).get(b"kdlib", b"null"))
        if stored is None:
            raise ValueError("it carries no kdlib metadata")
        table = content.to_pandas()
        if stored["sha256"] != _content_sha256(table, stored["content"]):
            raise ValueError("its content does not match its sha256")
    except _DAMAGE as error:
        raise ValueError(
            f"{path} is cut or damaged ({files.one_line(error)}); {commands.delete_and_run(path)}"
        ) from None
    return table, stored["content"]
