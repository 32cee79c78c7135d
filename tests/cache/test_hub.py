"""`kdlib.cache.huggingface`: data sets of the Hugging Face hub, with and without a network."""

import glob
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache.parquet_sets import BOTH, open_hub

from kdlib.cache.sources import SPLITS

pytestmark = pytest.mark.usefixtures("no_network")


@BOTH
def test_a_hub_without_network_is_one_clear_sentence_and_soon(streaming):
    began = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        open_hub("someone/something", streaming=streaming)
    assert time.monotonic() - began < 10
    message = str(caught.value)
    for part in (
        "someone/something",
        "Name or service not known",
        "hf download --repo-type dataset someone/something --local-dir",
        "data.huggingface.dataset",
    ):
        assert part in message
    assert "\n" not in message


def test_offline_mode_is_said_and_nothing_is_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"someone/something .*offline mode is enabled"):
        open_hub("someone/something")


def test_a_path_that_is_not_there_is_not_asked_of_the_hub(tmp_path):
    for name in (tmp_path / "nowhere", "some/where/deep", "some.parquet"):
        with pytest.raises(FileNotFoundError, match=r"there is no .* is no name on the Hugging"):
            open_hub(name)


def test_a_folder_here_is_not_read_in_the_name_of_the_hub_s(tmp_path, monkeypatch):
    (tmp_path / "someone/something").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="is named like the hub's someone/something"):
        open_hub("someone/something")


@pytest.fixture
def fake_hub(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict]]:
    """A hub that has `someone/something`: its `main` is the commit 111..., its files are
    `parquet`'s."""
    import datasets
    import huggingface_hub

    load, load_builder, asked = datasets.load_dataset, datasets.load_dataset_builder, []

    class Api:
        def dataset_info(self, name: str, revision: str | None, timeout: float) -> object:
            assert name == "someone/something"
            assert timeout <= 30
            return type("Info", (), {"sha": {None: "1" * 40, "v2": "2" * 40}[revision]})

    def with_files(call: Callable) -> Callable:
        def loaded(path: str, name: str | None, revision: str, **options: object) -> object:
            if name == "absent":
                raise ValueError("BuilderConfig 'absent' not found.\nAvailable: ['plain']")
            asked.append({"path": path, "name": name, "revision": revision})
            folder = glob.escape(str(parquet / "data"))
            paths = {s: [f"{folder}/{s}*"] for s in SPLITS}
            return call("parquet", data_files=paths, **options)

        return loaded

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", with_files(load))
    monkeypatch.setattr(datasets, "load_dataset_builder", with_files(load_builder))
    return asked


def test_a_hub_data_set_is_read_at_its_commit_and_identified_by_it(fake_hub):
    source = open_hub("someone/something")
    assert source.identity == {
        "source": "huggingface",
        "split": "train",
        "dataset": "someone/something",
        "config": None,
        "commit": "1" * 40,
        "columns": ["image", "label"],
        "n_examples": 11,
    }
    assert fake_hub[-1] == {"path": "someone/something", "name": None, "revision": "1" * 40}
    assert open_hub("someone/something", revision="v2").identity["commit"] == "2" * 40
    pinned = open_hub("someone/something", "test", revision="3" * 40, config="plain")
    assert (pinned.identity["commit"], pinned.identity["config"]) == ("3" * 40, "plain")
    assert fake_hub[-1] == {"path": "someone/something", "name": "plain", "revision": "3" * 40}
    with pytest.raises(ValueError, match="no split 'dev'; there are: train, test"):
        open_hub("someone/something", train_split="dev")
    with pytest.raises(ValueError, match=r"BuilderConfig 'absent' not found\. Available: "):
        open_hub("someone/something", config="absent")


def test_a_stream_of_unknown_length_needs_n_train(fake_hub, monkeypatch):
    import datasets

    monkeypatch.setattr(
        datasets.IterableDataset, "info", property(lambda self: datasets.DatasetInfo())
    )
    label = datasets.ClassLabel(names=list("abc"))
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"), label=label)
    monkeypatch.setattr(datasets.IterableDataset, "features", property(lambda self: features))
    with pytest.raises(ValueError, match=r"not known before its stream has ended; give data\.n_tr"):
        open_hub("someone/something", streaming=True)
    with pytest.raises(ValueError, match="ended; give `streaming: false`"):
        open_hub("someone/something", "test", streaming=True, n_train=5)
    source = open_hub("someone/something", streaming=True, n_train=5, image_size=4)
    assert source.n_examples == 5


def test_a_stream_of_the_hub_is_read_from_the_row_group_of_a_part_on(fake_hub, row_groups):
    """The files of the split are found; the metadata alone of those before the part are read."""
    whole = open_hub("someone/something", image_size=4).read(0, 11)
    row_groups.clear()
    source = open_hub("someone/something", streaming=True, n_train=11, image_size=4)
    for ours, theirs in zip(source.read(8, 11), whole, strict=True):
        np.testing.assert_array_equal(ours, theirs[8:])
    assert row_groups == [[1, 2]]  # of the second file, which begins with example 5
    assert source.identity == open_hub("someone/something", n_train=11, image_size=4).identity


def test_a_stream_that_is_no_parquet_is_read_from_its_start_and_says_so(
    fake_hub, parquet, tmp_path, monkeypatch, capsys
):
    import datasets

    lines = [json.dumps({"image": None, "label": i}) for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    label = datasets.ClassLabel(names=list("abcdef"))
    features = datasets.Features(image=datasets.Image(), label=label)
    of_json = {"data_files": str(tmp_path / "rows.jsonl"), "features": features}
    builder = datasets.load.load_dataset_builder("json", **of_json)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    source = open_hub("someone/something", streaming=True, n_train=6, image_size=4)
    assert source.fetch(0, 2).labels.tolist() == [0, 1]
    assert capsys.readouterr().out == ""
    source = open_hub("someone/something", streaming=True, n_train=6, image_size=4)
    assert source.fetch(4, 6).labels.tolist() == [4, 5]
    assert "no set of parquet files" in (said := capsys.readouterr().out)
    assert "where example 4 lies: its stream is read from the start up to there" in said


def test_without_the_library_the_error_says_how_to_install_it(parquet, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install datasets"):
        open_hub(parquet)
