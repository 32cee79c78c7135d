"""The two earlier studies at their scale, run in miniature, each from its one file."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml
from cache.parquet_sets import pixels, png, write_parquet

from kdlib.steps.miniature import write_miniature
from kdlib.steps.step_command import run_steps
from kdlib.study.load import load_study

ROOT = Path(__file__).parents[2]


def write_cifar(root: Path, n_classes: int, n_train: int, n_test: int) -> None:
    """The files of CIFAR-10 or CIFAR-100, in which each class has one brightness, with noise."""
    rng = np.random.default_rng(0)
    folder = root / ("cifar-10-batches-py" if n_classes == 10 else "cifar-100-python")
    folder.mkdir(parents=True)
    train = [f"data_batch_{i}" for i in range(1, 6)] if n_classes == 10 else ["train"]
    test = "test_batch" if n_classes == 10 else "test"
    for name, n in [(name, n_train // len(train)) for name in train] + [(test, n_test)]:
        labels = np.arange(n) % n_classes
        levels = labels[:, None] * (200 // n_classes) + rng.integers(0, 20, (n, 3072))
        content = {"data": levels.astype(np.uint8)}
        content["labels" if n_classes == 10 else "fine_labels"] = labels.tolist()
        (folder / name).write_bytes(pickle.dumps(content))
    names = [f"class {c}" for c in range(n_classes)]
    key, file = ("label_names", "batches.meta") if n_classes == 10 else ("fine_label_names", "meta")
    (folder / file).write_bytes(pickle.dumps({key: names}))


@pytest.fixture
def data(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    for name, folder in (("KDLIB_HOME", "home"), ("KDLIB_DATA", "data")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    return tmp_path / "data"


def run_whole(file: Path, *steps: str, **axes: list) -> None:
    """Every step of a study's miniature, on some values of its axes; no run may fail or be refused
    in the tables."""
    small = write_miniature(file)
    content = yaml.safe_load(small.read_text())
    content["axes"] |= axes
    small.write_text(yaml.safe_dump(content))
    study = load_study(small)
    points = [(cell, seed) for cell in study.cells() for seed in study.seeds]
    for row in run_steps(study, steps, points):
        assert "error" not in row, row.get("error")
    assert row["n_accepted"] == row["n_runs"] == len(points)


def test_study_a_runs_whole(data):
    write_cifar(data, 10, 200, 20)
    steps = ("cache", "teacher", "datamap", "distill", "probe", "compare")
    file = ROOT / "params/study_a/cifar10_phase1.yaml"
    axes = {"strategy": ["random", "trend_top"], "student": ["resnet18", "efficientnet"]}
    run_whole(file, *steps, objective=["kd"], **axes)


def test_study_b_runs_whole(data):
    write_cifar(data, 10, 200, 20)
    write_cifar(data, 100, 1000, 100)
    images = [png(image) for image in pixels(200, size=(96, 96))]
    write_parquet(data / "tsbpp/fall2025_deeplearning/train.parquet", images, None)
    run_whole(ROOT / "params/study_b.yaml", "cache", "teacher", "distill", "probe", "compare")
