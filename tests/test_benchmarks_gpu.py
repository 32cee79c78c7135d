"""`benchmarks/gpu.py`: every part leaves its rows, and none stops the next."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kdlib.compare.committed import read_committed
from kdlib.compare.comparisons import comparisons
from kdlib.study.load import load_study

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The modules of benchmarks can be imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def _environment():
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _rows(folder):
    lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The folder of a dry run of every part, and its process."""
    out = tmp_path_factory.mktemp("dry") / "out"
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(out), "--dry"]
    command += ["--minutes", "60"]  # however busy this machine is
    return out, subprocess.run(command, capture_output=True, text=True)


@pytest.mark.long
def test_a_dry_run_leaves_the_rows_of_every_part(dry):
    out, done = dry
    told, rows = done.stdout + done.stderr, _rows(out)
    found = {part: [r for r in rows if r["part"] == part] for part in ("facts", "right", "fast")}
    ends = {row["part"]: row["state"] for row in rows if row["row"] == "part"}
    assert set(ends) == {"facts", "right", "fast", "study"}, told
    assert ends["facts"] == ends["fast"] == "done", told
    kinds = {part: {row["row"] for row in some} for part, some in found.items()}
    assert kinds["facts"] >= {"versions", "processor", "card", "latency", "copy", "product"}
    assert kinds["fast"] == {"settings", "speed", "waits", "crowd", "part"}, found["fast"]
    speeds = [row for row in found["fast"] if row["row"] == "speed"]
    assert {row["contestant"] for row in speeds} >= {
        "bare loop", "kdlib", "kdlib, stored teacher", "kdlib, dynamics recorded",
    }  # fmt: skip
    assert {row["precision"] for row in speeds} == {"bf16", "float32"}
    for row in speeds:
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["ms"] * 1e3)
        assert row["ratio"] == 1 or row["contestant"] != "bare loop"
    assert [row["students"] for row in found["fast"] if row["row"] == "crowd"] == [1, 2]
    assert kinds["right"] >= {"collected", "test"}
    assert ends["right"] == ends["study"] == "done", told
    steps = {row.get("step") for row in _rows(out / "study")}
    assert steps >= {"cache", "teacher", "datamap", "distill", "compare", "packed"}, told
    assert done.returncode == 0, told
    assert len(list(out.rglob("*"))) <= 8
    summary = (out / "summary.md").read_text()
    assert "over 16 MiB" not in summary
    assert "| kdlib, stored teacher |" in summary


@pytest.mark.long
def test_a_miniature_comes_home_as_tables_of_the_complete_seeds(dry, tmp_path, monkeypatch):
    # 3 strategies with the full set, 2 objectives, 2 seeds, and one student of the third seed
    folder = dry[0] / "study"
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    with tarfile.open(folder / "study.tar.gz") as tar:
        packed = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
    assert (folder / "errors.log").read_text() == ""
    by_step = {}
    for row in rows:
        assert "error" not in row
        by_step.setdefault(row["step"], []).append(row)
    assert [row["n"] for row in by_step["unpacked"]] == [1297, 500]
    assert [row["seed"] for row in by_step["distill"]] == [0, 1, *[0] * 5, *[1] * 5, 2]
    assert all({"seconds", "test_accuracy", "elapsed"} <= set(r) for r in by_step["distill"])
    assert by_step["stopped"][0]["finished"] == 13
    assert by_step["stopped"][0]["killed"] == 1
    assert by_step["compare"][0]["n_accepted"] == by_step["compare"][0]["n_runs"] == 12
    assert by_step["comparing"][0]["seeds"] == [0, 1]

    assert not [name for name in packed if "weights" in name or "outputs" in name]
    evidence = [name for name in packed if name.endswith("evidence.json") and "distill" in name]
    assert len(evidence) == 13  # and nothing of the one that was killed
    assert "runs/dry/datamap/datamap.parquet" in packed
    card = json.loads(packed["runs/dry/teacher/evidence.json"])["teacher"]
    assert card["measured"] == by_step["teacher"][0]["test_accuracy"]

    home = tmp_path / "home"
    for name, content in packed.items():
        if name.startswith(("params/", "figures/")):
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            (home / name).write_bytes(content)
    monkeypatch.setenv("KDLIB_HOME", str(home))
    study = load_study("params/dry.yaml")
    assert study.seeds == (0, 1)
    tables = comparisons(study, read_committed(study))
    assert len(tables["results"]) == 12
    assert not tables["results"]["refused"].any()
    assert set(tables["strategies"]["n_seeds"]) == {2}
    accuracies = {
        (r["strategy"], r["objective"], r["seed"]): r["test_accuracy"] for r in by_step["distill"]
    }
    for row in tables["results"].itertuples():
        assert accuracies[row.strategy, row.objective, row.seed] == row.test_accuracy


def _part(gpu, name, code):
    return gpu.Part(name, BENCHMARKS / "gpu.py", lambda limit_s: [sys.executable, "-c", code])


def test_a_part_that_fails_is_killed_or_late_leaves_a_row_and_the_next_begins(
    scripts, tmp_path, monkeypatch
):
    import gpu

    monkeypatch.setattr(gpu, "SHARES", {"late": 1, "last": 9})
    codes = {
        "broken": "import sys; sys.exit('no card')",
        "dead": "import os; os.kill(os.getpid(), 9)",
        "late": "import time; time.sleep(600)",
        "last": "print('here')",
    }
    parts = [_part(gpu, name, code) for name, code in codes.items()]
    parts.insert(2, gpu.Part("gone", tmp_path / "gone.py", None))
    gpu.run_parts(parts, 5 + 20, tmp_path)
    ends = {row["part"]: row for row in _rows(tmp_path)}
    states = {name: row["state"] for name, row in ends.items()}
    assert states == {
        "broken": "failed", "dead": "killed", "gone": "missing", "late": "out of time",
        "last": "done",
    }  # fmt: skip
    assert (ends["broken"]["exit_code"], ends["broken"]["why"]) == (1, "no card")
    assert ends["late"]["seconds"] < 10
    assert ends["last"]["limit_s"] > ends["late"]["limit_s"]
    assert "| late | out of time |" in (tmp_path / "summary.md").read_text()
    assert "here" in (tmp_path / "log.txt").read_text()


def test_a_part_for_which_no_time_is_left_has_a_row(scripts, tmp_path):
    import gpu

    gpu.run_parts([_part(gpu, "facts", "")], 1, tmp_path)
    assert [row["state"] for row in _rows(tmp_path)] == ["no time left"]


def test_time_that_a_part_leaves_goes_to_the_next_ones(scripts):
    import gpu

    assert gpu.limit_of("facts", ["right", "fast", "study"], 500) == 25
    assert gpu.limit_of("fast", ["study"], 450) == 240
    assert gpu.limit_of("study", [], 100) == 100


def test_a_terminated_run_ends_its_part_and_leaves_a_summary(scripts, tmp_path):
    out = tmp_path / "out"
    busy = "import os, time; print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(600)"
    code = f"""
import signal, sys
from pathlib import Path
import gpu
signal.signal(signal.SIGTERM, gpu._terminated)
def command(limit_s):
    return [sys.executable, "-c", {busy!r}]
parts = [gpu.Part(name, Path(gpu.__file__), command) for name in "ab"]
gpu.run_parts(parts, 600, Path({str(out)!r}))
"""
    environment = _environment() | {"PYTHONPATH": f"{BENCHMARKS}:{_environment()['PYTHONPATH']}"}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, cwd=tmp_path)
    pid = tmp_path / "pid"
    for _ in range(1200):
        if pid.exists() and pid.read_text().strip():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert [(row["part"], row["state"]) for row in _rows(out)] == [("a", "interrupted")]
    assert "| a | interrupted |" in (out / "summary.md").read_text()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_row_cut_by_a_kill_is_counted(scripts, tmp_path):
    import gpu
    from gpu_rows import Rows, read_rows

    Rows(tmp_path, "fast").write("crowd", students=2)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"part": "fast", "row": "spe')
    rows = read_rows(tmp_path)
    assert [row["row"] for row in rows] == ["crowd", "cut"]
    assert "1 rows were cut by a kill" in gpu.summary(rows, [])


def test_a_folder_over_its_limits_is_told(scripts, tmp_path):
    import gpu

    for number in range(8):
        (tmp_path / f"{number}.txt").touch()
    with open(tmp_path / "0.txt", "wb") as file:
        file.truncate(gpu.MOST_BYTES + 1)
    found = gpu.oversize(tmp_path)
    assert found == ["0.txt is over 16 MiB", "9 files; expected at most 8"]
    assert "- 0.txt is over 16 MiB" in gpu.summary([], found)


TESTS = """
import pytest
pytestmark = pytest.mark.gpu

@pytest.fixture
def broken():
    raise OSError("no memory")

def test_right(): pass
def test_wrong(): assert 1 == 2, "one is not two"
def test_apart(): pytest.skip("one card")
def test_of_a_fixture(broken): pass
"""


@pytest.fixture
def marked(tmp_path):
    """A folder with tests for GPUs, one file of them broken, and a file of other tests."""
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    (folder / "test_gpu.py").write_text(TESTS)
    (folder / "test_gpu_import.py").write_text("import none_such\n")
    (folder / "test_other.py").write_text("raise SystemExit('is not to be imported')\n")
    return folder


def _right(folder, out, *more):
    command = [sys.executable, str(BENCHMARKS / "gpu_right.py"), "--out", str(out)]
    done = subprocess.run(
        [*command, "--tests", str(folder), *more], env=_environment(), capture_output=True
    )
    return done.returncode, _rows(out)


def test_each_marked_test_has_a_row(marked, tmp_path):
    code, rows = _right(marked, tmp_path / "out")
    found = {
        row["test"].rpartition("/")[2]: (row["outcome"], row["why"])
        for row in rows
        if row["row"] == "test"
    }
    assert found == {
        "test_gpu.py::test_right": ("passed", None),
        "test_gpu.py::test_wrong": ("failed", "AssertionError: one is not two"),
        "test_gpu.py::test_apart": ("skipped", "Skipped: one card"),
        "test_gpu.py::test_of_a_fixture": ("error", "OSError: no memory"),
        "test_gpu_import.py": ("error", "ModuleNotFoundError: No module named 'none_such'"),
    }
    assert code == 1


def test_a_dry_run_tries_a_handful(marked, tmp_path):
    (marked / "test_gpu_import.py").unlink()
    variants = "\n".join(f"def test_{n}(): pass" for n in range(9))
    (marked / "test_gpu_more.py").write_text(variants)
    code, rows = _right(marked, tmp_path / "out", "--dry")
    assert [row["row"] for row in rows] == ["collected", *["test"] * 4]
    assert (rows[0]["marked"], rows[0]["others"], code) == (4, 9, 0)


def test_without_marked_tests_a_row_says_so(tmp_path):
    (tmp_path / "tests").mkdir()
    code, rows = _right(tmp_path / "tests", tmp_path / "out")
    assert (code, [row["row"] for row in rows]) == (0, ["missing"])


def test_a_trace_is_counted_per_step(scripts):
    import gpu_speed

    def event(category, name, start, length):
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}

    events = [
        event("kernel", "gemm", 0, 400),
        event("kernel", "gemm", 300, 200),  # beside the first on another stream
        event("kernel", "add", 1000, 100),
        event("gpu_memcpy", "Memcpy HtoD (Pageable -> Device)", 1500, 300),
        event("gpu_user_annotation", "Optimizer.step#SGD.step", 0, 5000),
        event("cuda_runtime", "cudaLaunchKernel", 0, 5),
        event("cuda_runtime", "cudaStreamSynchronize", 5, 900),
        event("cuda_driver", "cuLaunchKernelEx", 5, 5),
        event("cpu_op", "aten::add", 0, 5),
        {"ph": "M", "name": "process_name", "ts": 0},
    ]
    found = gpu_speed.trace_counts(events, 2)
    assert found == {
        "kernels": 1.5,
        "copies": {"Memcpy HtoD": 0.5},
        "waits": {"cudaStreamSynchronize": 0.5},
        "launches": 1.0,
        "busy_ms": pytest.approx(0.45),  # [0, 500), [1000, 1100), [1500, 1800) us of two steps
        "slowest_ms": {"gemm": pytest.approx(0.3), "add": pytest.approx(0.05)},
    }


def test_synchronising_calls_are_counted_by_place(scripts):
    import gpu_speed

    def warning(message, path, line):
        return SimpleNamespace(message=message, filename=str(path), lineno=line)

    called = "called a synchronizing CUDA operation (Triggered internally at CUDAFunctions.cpp)"
    trainer = ROOT / "kdlib" / "trainer.py"
    caught = [warning(called, trainer, 7)] * 4 + [
        warning(called, "/site-packages/torch/functional.py", 9),
        warning("does not yet detect all synchronizing operations", trainer, 1),
    ]
    found = gpu_speed.synchronising_places(caught, 2)
    assert found == {"kdlib/trainer.py:7": 2.0, "torch/functional.py:9": 0.5}


def test_the_bare_loop_crops_as_kdlib_does(scripts, make_images):
    import gpu_speed
    import torch.nn.functional as F

    from kdlib.dataset.views import Views, apply

    images = make_images(5).resident("images")
    chosen, flip = torch.tensor([4, 0, 2]), torch.tensor([True, False, True])
    box = torch.tensor([[-4, 2, 6, 6], [0, 0, 6, 6], [3, -1, 6, 6]], dtype=torch.int32)
    order = torch.empty((3, 0), dtype=torch.int32)
    views = Views(gpu_speed.VIEWS, (3, 6, 6), flip, box, torch.empty((3, 4)), order, order)
    padded = F.pad(images.float().permute(0, 2, 3, 1), (0, 0, 4, 4, 4, 4))
    top, left = (box[:, k, None].long() + gpu_speed.PADDING for k in (0, 1))
    found = gpu_speed.cropped(padded, chosen, top, left, flip[:, None])
    assert torch.equal(found.permute(0, 3, 1, 2), apply(images[chosen], views).float())


def test_a_contestant_that_fails_leaves_a_row_and_the_others_go_on(scripts, tmp_path, monkeypatch):
    import gpu_speed
    from gpu_rows import Rows, read_rows

    def broken(*_, **options):
        raise RuntimeError("CUDA error: out of memory\nsecond line")

    bench = gpu_speed.Bench(
        Rows(tmp_path, "fast"), tmp_path / "scratch", "cpu", gpu_speed.DRY, time.monotonic() + 60
    )
    monkeypatch.setattr(gpu_speed, "ours", broken)
    gpu_speed.speeds(bench, gpu_speed.Case("tiny_cnn", 8, 8, "bf16"))
    failed, fast = read_rows(tmp_path)
    assert failed["row"] == "error"
    assert (failed["contestant"], failed["why"]) == (
        "kdlib", "RuntimeError: CUDA error: out of memory",
    )  # fmt: skip
    assert (fast["row"], fast["contestant"]) == ("speed", "bare loop")


def test_the_networks_of_the_full_run_can_be_built_and_every_case_comes_once(scripts):
    import gpu_speed
    from training import network_of

    for name, side in gpu_speed.FULL.sides.items():
        assert network_of(name, True, (3, side, side)).n_classes == 10
        assert side in gpu_speed.FULL.n_images
    planned = gpu_speed.schedule(gpu_speed.FULL)
    assert len(set(planned)) == len(planned)
    size = gpu_speed.FULL
    grid = {(case.network, case.batch, case.precision) for _, case in planned}
    assert len(grid) == len(size.sides) * len(size.batches) * len(size.precisions)
