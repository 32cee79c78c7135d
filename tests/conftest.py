"""Shared by all tests: one thread, no progress bars, and a small image cache."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported

import numpy as np
import pytest
import torch
from devices import DEVICES
from tiny import TINY, make_study, tiny_study

from kdlib.cache.build import build_images
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source
from kdlib.repro import files
from kdlib.steps.processes import prepare_device
from kdlib.study.load import load_study
from kdlib.study.study import Study
from kdlib.study.training import Compute

if TYPE_CHECKING:
    from matplotlib.figure import Figure

torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """`-m gpu` collects no docstrings: a GPU node may lack what some modules import."""
    if config.option.markexpr == "gpu":
        config.option.doctestmodules = False


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`-m gpu` collects the files of these tests alone, for the same reason."""
    if config.option.markexpr == "gpu" and collection_path.suffix == ".py":
        return not collection_path.name.startswith("test_gpu") or None
    return None


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Where a test runs, with the settings that a study gives it there."""
    yield prepare_device(Compute(device=request.param))
    if request.param == "cuda":
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
        torch.backends.cudnn.allow_tf32 = True


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace of this test's own."""
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    return tmp_path


@pytest.fixture
def make_images(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Cache]:
    """A function that caches n random 3x6x6 images with labels of 4 classes."""

    def make(n: int, shard_size: int = 7, seed: int = 0) -> Cache:
        rng = np.random.default_rng(seed)
        images = rng.integers(0, 256, (n, 3, 6, 6), np.uint8)
        source = array_source("noise", "train", images, rng.integers(0, 4, n), "abcd")
        return build_images(source, tmp_path_factory.mktemp("images"), shard_size)

    return make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which the whole tiny study has run, without notebooks; made once, whichever of
    the processes that share the tests comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    home, done = shared / "made", shared / "made.done"
    with files.locked(shared / "made.lock"), pytest.MonkeyPatch.context() as patch:
        if done.exists():
            return home
        patch.setenv("KDLIB_HOME", str(home))
        study = tiny_study(home)
        make_study(study)
        done.touch()
    return home


@pytest.fixture(scope="session")
def prepare_datamap(made: Path) -> Callable[[Path], Study]:
    """A function that copies steps 01 to 03 of it into a workspace."""

    def copy(home: Path) -> Study:
        (home / "params").mkdir()
        shutil.copy(TINY, home / "params")
        shutil.copytree(made / "cache", home / "cache")
        for step in ("cache", "teacher", "datamap"):
            shutil.copytree(made / "runs" / "tiny" / step, home / "runs" / "tiny" / step)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KDLIB_HOME", str(home))
            return load_study("params/tiny.yaml")

    return copy


@pytest.fixture
def lab(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to break."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def unwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of steps are laid out and drawn, but made no file: that takes most of the time."""
    from kdlib.plots.theme import style

    def drawn(figures: Mapping[str, "Figure"], folder: Path) -> dict[str, Path]:
        with style():
            for figure in figures.values():
                figure.draw_without_rendering()
        return {name: folder / f"{name}.png" for name in figures}

    monkeypatch.setattr("kdlib.steps.saved_figures.save_figures", drawn)
