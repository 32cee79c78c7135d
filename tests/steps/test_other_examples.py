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


def test_other_images_without_labels_are_refused(tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    for split in ("train", "test"):
        (tmp_path / "pictures" / split).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "pictures" / split / f"{i}.png")
    data = Data(
        source="folder", folder=str(tmp_path / "pictures"), labelled=False, image_size=8,
        n_validation=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="have no labels, and a probe learns from labels"):
        other_examples(data)
