"""Tables return unchanged or not at all."""

import numpy as np
import pandas as pd
import pytest

from kdlib import tables


def test_table_with_texts_and_gaps_returns_unchanged_and_a_renamed_value_is_noticed(tmp_path):
    table = pd.DataFrame(
        {"probe": ["linear", None], "accuracy": [0.5, np.nan], "ok": [True, False]}
    )
    path = tables.write_parquet(tmp_path / "t.parquet", table, {"a": 1})
    found, metadata = tables.read_parquet(path, "a test")
    pd.testing.assert_frame_equal(found, table)
    assert metadata == {"a": 1}
    whole = path.read_bytes()
    assert whole.count(b"linear") >= 1
    path.write_bytes(whole.replace(b"linear", b"linera"))
    with pytest.raises(ValueError, match="does not match its sha256"):
        tables.read_parquet(path, "a test")
