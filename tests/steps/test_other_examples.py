"""Data sets that a study names for its probes only: cached once, split, and refused unlabelled."""

import pytest

from kdlib.steps import probe_network
from kdlib.steps.probe_network import other_examples
from kdlib.study.data import Data


def test_examples_of_another_data_set_are_cached_once_and_split_as_it_says(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    data = Data(source="digits", n_validation=197)
    (train, kept), (test, every) = other_examples(data)
    assert len(kept) == 1100
    assert every.tolist() == list(range(500))
    assert train.header["split"] == "train"
    assert test.header["split"] == "test"
    monkeypatch.setattr(probe_network, "split_ids", lambda ids, n, seed: (ids[:3], ids[3:]))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")}
    assert other_examples(data)[0][1].tolist() == [0, 1, 2]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.npy")} == before


def test_other_images_without_labels_are_refused():
    data = Data(source="folder", folder="pictures", labelled=False, n_validation=1)
    with pytest.raises(ValueError, match="a probe learns from labels"):
        other_examples(data)
