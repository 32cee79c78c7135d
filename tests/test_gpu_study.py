"""`benchmarks/gpu_study.py`: what of a study is done first, compared and brought home. Its whole
miniature is run in `test_benchmarks_gpu.py`."""

import io
import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import TINY, tiny_study
from torch.nn import functional

from kdlib.models.networks import build_network
from kdlib.steps.folders import student_folder
from kdlib.study.load import load_study

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu_study.py"


@pytest.fixture
def gpu_study(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_study

    return gpu_study


def ran(tmp_path, *arguments):
    """A miniature's process, its rows, and its tar unpacked in memory."""
    out = tmp_path / "out"
    command = [sys.executable, str(SCRIPT), "--dry", "--out", str(out), "--work",
               str(tmp_path / "work"), *arguments]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (out / "rows.jsonl").is_file(), done.stderr
    rows = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    with tarfile.open(out / "study.tar.gz") as tar:
        packed = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    assert (out / "errors.log").read_text() == ""
    assert [json.loads(x) for x in done.stdout.splitlines() if x.startswith("{")] == rows
    return done, rows, packed


@pytest.mark.long
def test_at_the_limit_everything_is_killed_and_the_evidence_comes_home(tmp_path):
    done, rows, packed = ran(tmp_path, "--seconds", "2", "--reserve", "1", "--workers", "2")
    assert done.returncode == 3
    assert [row["step"] for row in rows][-3:] == ["stopped", "compare", "packed"]
    assert rows[-2]["error"] == "no two seeds are complete: no comparison"
    assert rows[-1]["compared"] is False
    assert "params/dry.yaml" in packed
    left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if _is_of(path, tmp_path)]
    assert left == []


def _is_of(path: Path, folder: Path) -> bool:
    try:
        return str(folder).encode() in path.read_bytes()
    except OSError:  # it has just ended
        return False


def study_of_three_seeds(home):
    content = yaml.safe_load(TINY.read_text())
    content["seeds"] = [0, 1, 2]
    content["axes"]["strategy"] = ["random", "easy", "hard"]
    content["probe"]["strategy"] = ["full"]
    path = home / "three.yaml"
    path.write_text(f"# What?\n# Why?\n{yaml.safe_dump(content)}")
    return load_study(path), path


def test_the_compared_study_is_the_same_but_for_seeds_and_strategies(gpu_study, home):
    study, path = study_of_three_seeds(home)
    text = gpu_study.narrowed(path.read_text(), (0, 2), ("random", "hard"))
    assert text.startswith("# What?\n# Why?\n\n")
    (home / "three.yaml").write_text(text)
    axes = study.axes.model_copy(update={"strategy": ("random", "hard")})
    assert load_study(path) == study.model_copy(update={"seeds": (0, 2), "axes": axes})


def test_students_are_ordered_by_seed_behind_those_that_are_probed(gpu_study, home):
    study, _ = study_of_three_seeds(home)
    points = gpu_study.ordered(study)
    assert len(points) == len(set(points)) == 3 * len(study.cells())
    probed = study.probed_cells()
    assert points[: 2 * len(probed)] == [(cell, s) for s in (0, 1) for cell in probed]
    seeds = [seed for _, seed in points[2 * len(probed) :]]
    assert seeds == sorted(seeds)


def test_what_is_compared_is_complete_over_all_its_cells(gpu_study, home):
    study, _ = study_of_three_seeds(home)
    every = {(cell, seed) for cell in study.cells() for seed in study.seeds}
    names = ["random", "easy", "hard"]

    def without(*lost):
        return {(c, s) for c, s in every if (c.strategy, c.objective, s) not in lost}

    assert gpu_study.balanced(study, every) == ([0, 1, 2], names)
    assert gpu_study.balanced(study, without(("easy", "kd", 1))) == ([0, 2], names)
    # one seed alone is complete: the strategies that both first seeds have
    two = without(("hard", "kd", 1), ("full", "kd", 2))
    assert gpu_study.balanced(study, two) == ([0, 1], ["random", "easy"])
    assert gpu_study.balanced(study, without(("random", "kd", 1), ("random", "kd", 2))) is None
    assert gpu_study.balanced(study, without(("full", "kd", 1), ("full", "kd", 2))) is None
    assert gpu_study.balanced(study, set()) is None
    # what is probed must be there
    probed = study.probe.model_copy(update={"strategy": ("full", "hard")})
    assert gpu_study.balanced(study.model_copy(update={"probe": probed}), two) is None
    # a strategy of which a student failed is left out, and all seeds stay
    failed = (study.cell(strategy="easy", objective="kd"), 1)
    assert gpu_study.balanced(study, every - {failed}, [failed]) == ([0, 1, 2], ["random", "hard"])


def test_a_tar_that_is_too_large_leaves_subsets_out_first(gpu_study, lab, tmp_path):
    study = load_study("params/tiny.yaml")
    whole = gpu_study.write_tar(tmp_path / "a.tar.gz", study, None)
    less = gpu_study.write_tar(tmp_path / "b.tar.gz", study, None, most=whole - 1)
    assert less < whole

    def names(path):
        with tarfile.open(fileobj=io.BytesIO(path.read_bytes())) as tar:
            return {Path(name).name for name in tar.getnames()}

    assert "subset.parquet" in names(tmp_path / "a.tar.gz")
    assert "subset.parquet" not in names(tmp_path / "b.tar.gz")
    assert {"evidence.json", "datamap.parquet"} <= names(tmp_path / "b.tar.gz")
    with pytest.raises(ValueError, match=r"the evidence of tiny takes [\d,]+ bytes; most is 1,000"):
        gpu_study.write_tar(tmp_path / "c.tar.gz", study, None, most=1000)


@pytest.mark.parametrize("name", ["phase1", "phase1_mnist"])
def test_the_phase_1_studies_ask_for_ten_passes_over_their_third_on_a_gpu(name):
    study = load_study(ROOT / "params" / f"{name}.yaml")
    n_train = {"cifar10": 50_000, "mnist": 60_000}[study.data.source] - study.data.n_validation
    third = round(0.33 * n_train)
    assert round(study.training.steps * study.training.batch_size / third, 2) == 10
    assert (study.compute.device, study.compute.precision) == ("cuda", "bf16")
    assert len(study.axes.strategy) == 12
    assert len(study.seeds) == 5
    assert len(study.cells()) == 26
    same = load_study(ROOT / "params" / "subsets.yaml")
    assert study.axes.strategy == same.axes.strategy
    assert study.objectives.keys() <= (same.objectives.keys())
    assert replace(study.cell(), student="x") == replace(same.cell(), student="x")
    assert load_study(ROOT / "params" / f"{name}.yaml").dynamics.window == 5


@pytest.mark.parametrize("name", ["phase1", "phase1_mnist"])
def test_every_tensor_of_their_networks_has_a_gradient_in_the_first_step(name):
    study = load_study(ROOT / "params" / f"{name}.yaml")
    images = torch.rand(4, 3, 8, 8)
    for model in (study.dynamics.model, study.students["resnet18"].model):
        network = build_network(model, n_classes=10, image_shape=(3, 8, 8), seed=0)
        functional.cross_entropy(network(images), torch.arange(4)).backward()
        assert all(p.grad.norm() > 0 for p in network.parameters())


def test_finished_students_are_those_of_the_settings_of_now(gpu_study, lab):
    study = load_study("params/tiny.yaml")
    every = {(cell, seed) for cell in study.cells() for seed in study.seeds}
    assert gpu_study.finished(study) == every
    cell = study.cell(strategy="easy")
    (student_folder(study, cell, 1) / "evidence.json").unlink()
    assert gpu_study.finished(study) == every - {(cell, 1)}
    assert gpu_study.finished(tiny_study(lab, training__steps=61)) == set()


def test_what_a_student_needs_follows_from_its_subset_and_objective(gpu_study, lab):
    study = load_study("params/tiny.yaml")
    found = {(c.strategy, c.objective): gpu_study.needed(study, c) for c in study.cells()}
    assert found == {
        ("full", "kd"): "teacher", ("full", "plain"): "cache",
        ("random", "kd"): "teacher", ("random", "plain"): "cache",
        ("easy", "kd"): "datamap", ("easy", "plain"): "datamap",
    }  # fmt: skip
    assert (
        gpu_study.needed(study, study.cell(strategy="random_shards", objective="plain")) == "cache"
    )
    balanced = study.cell(strategy="random_balanced", objective="plain")
    assert gpu_study.needed(study, balanced) == "datamap"  # it reads the labels there
