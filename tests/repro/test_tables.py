"""Tables return unchanged or not at all."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kdlib.repro.tables import read_parquet, write_parquet


def test_table_with_texts_and_gaps_returns_unchanged_and_a_renamed_value_is_noticed(tmp_path):
    table = pd.DataFrame(
        {"probe": ["linear", None], "accuracy": [0.5, np.nan], "ok": [True, False]}
    )
    path = write_parquet(tmp_path / "t.parquet", table, {"a": 1})
    found, metadata = read_parquet(path)
    pd.testing.assert_frame_equal(found, table)
    assert metadata == {"a": 1}
    whole = path.read_bytes()
    assert whole.count(b"linear") >= 1
    path.write_bytes(whole.replace(b"linear", b"linera"))
    with pytest.raises(ValueError, match="does not match its sha256"):
        read_parquet(path)


def test_metadata_nested_without_end_are_refused(tmp_path):
    path = tmp_path / "deep.parquet"
    deep = {b"kdlib": b"[" * 100_000 + b"]" * 100_000}
    pq.write_table(pa.table({"x": [1]}).replace_schema_metadata(deep), path)
    with pytest.raises(
        ValueError, match=r"deep\.parquet is cut or damaged .*delete .*, then run `"
    ):
        read_parquet(path)
