"""What happens to a study when it is killed, its files are damaged or hostile, or the disk is full?

    python benchmarks/faults.py [--kills 100] [--seed 0] [--only kills flips ...] [--quick]

Does a small study of scikit-learn's digits in temporary workspaces, disturbs it in every way named
below, and prints one table. A fault is *detected* when the reader that trusts the file, or the
writer that cannot go on, stops with one sentence of ours that names the file or folder; *harmless*
when what was read is what was written; *recovered* when the same command afterwards, after what the
sentence asks for, ends with the bytes of an undisturbed run; *silent* when anything else was
accepted. Lost are bytes of work that was finished before: shards in an index or a journal, and
every file of a run with evidence. Exits with 1 when anything was silent or lost, or was neither
detected nor recovered.

The whole pipeline is killed with all its processes; what runs in one process is killed in a forked
child. A full disk is a tmpfs where one can be mounted, else a limit on the size of files.
Leaves to others: the trials themselves (`trials`), hostile and mutated files (`hostile`).
"""

import argparse
import contextlib
import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hostile
import numpy as np
import torch
import yaml
from trials import (
    HANGS_S,
    ROOT,
    Outcome,
    attempt,
    finished,
    limit_memory,
    lost_bytes,
    results,
    workspace,
)

from kdlib.cache.build import build_images, repair
from kdlib.cache.index import write_journal
from kdlib.cache.shards import Cache
from kdlib.cache.study_source import open_source
from kdlib.cartography.datamap import compute_datamap
from kdlib.cartography.log import QUANTITIES, DynamicsLog
from kdlib.cartography.subset import Subset
from kdlib.compare.report import objective_table, summary
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.compare import compile_tables, curves, finish_tables
from kdlib.steps.datamap import make_datamap, open_datamap
from kdlib.steps.distill import open_student, train_student
from kdlib.steps.figures import draw_comparison
from kdlib.steps.folders import probe_folder, student_folder
from kdlib.steps.probe import open_probes, probe_cell
from kdlib.steps.recordings import open_gradients, open_log, record
from kdlib.steps.results import results as run_table
from kdlib.steps.teacher import make_teacher
from kdlib.steps.teacher_outputs import open_teacher, outputs_folder, store_part
from kdlib.study.cells import Cell
from kdlib.study.load import load_study
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml
from kdlib.trainer import loop
from kdlib.trainer.step import Step

PIPED = 0.08  # of the kills, of the whole pipeline
QUICK_STEPS = ("cache", "teacher", "datamap", "students")
QUICK = {"flips": "evidence of a student", "truncations": "training state"}
STATE_EVERY_S = 0.05  # of a training: more states, and so more moments to be killed at
TORN = 3  # damaged files of a kind that are mended as their sentence says, and made again


@dataclass
class Row:
    """One kind of fault and what became of it."""

    kind: str
    n: int = 0
    detected: int = 0
    harmless: int = 0
    recovered: int = 0
    tried: int = 0  # to recover
    silent: int = 0
    lost: int = 0
    notes: Counter = field(default_factory=Counter)

    @property
    def sound(self) -> bool:
        noticed = self.detected + self.harmless == self.n
        return noticed and self.recovered == self.tried and not self.silent and not self.lost

    def cells(self) -> list[str]:
        recovered = f"{self.recovered} of {self.tried}" if self.tried else "-"
        numbers = (self.n, self.detected, self.harmless, recovered, self.silent, self.lost)
        return [self.kind, *map(str, numbers)]


# ----------------------------------------------------------------------------------------------
# A study, and a workspace from before each of its steps


def _write_studies(home: Path) -> None:
    """`small.yaml`, and `loaded.yaml`, whose teacher is a weight file that sees replayed views."""
    content = parse_yaml((ROOT / "params" / "tiny.yaml").read_text())
    content["data"]["shard_size"] = 100
    content["axes"]["strategy"] = ["random"]
    content["recordings"]["models"] = {"tiny": content["teacher"]["model"]}
    content["probe"]["strategy"] = ["random"]
    content["training"]["steps"] = 120
    (home / "params").mkdir(parents=True)
    (home / "params/small.yaml").write_text(yaml.safe_dump(content))
    taught = content["teacher"].pop("training")
    content["teacher"] |= {
        "weights": "teacher.safetensors",
        "trained_on": "kept",
        "outputs": {"views": 6, "top_k": 3},
    }
    content["dynamics"] |= {"model": content["teacher"]["model"], "training": taught}
    content["training"]["augment"] = {"crop_padding": 1}
    (home / "params/loaded.yaml").write_text(yaml.safe_dump(content))


def _study(name: str = "small") -> Study:
    return load_study(f"params/{name}.yaml")


def _cell(study: Study) -> Cell:
    return study.cell(strategy="random", objective="kd")


def make_cache() -> None:
    cache_images(_study())


def make_cache_with_workers() -> None:
    data, cache = _study().data, _study().cache
    for split in ("train", "test"):
        source = open_source(data, split)
        build_images(source, cache / split, data.shard_size, n_workers=2)
    make_cache()


def run_teacher() -> None:
    study = _study()
    make_teacher(study, open_images(study))


def make_outputs() -> None:
    study = _study("loaded")
    store_part(study, cache_images(study), (1, 1))


def run_datamap() -> None:
    study = _study()
    make_datamap(study, open_images(study))


def make_recording() -> None:
    study = _study()
    record(study, open_images(study), "tiny", "seed=0")


def make_student() -> None:
    study = _study()
    train_student(study, open_images(study), _cell(study), 0)


def make_students() -> None:
    study = _study()
    images = open_images(study)
    for cell in study.cells():
        for seed in study.seeds:
            train_student(study, images, cell, seed)


def make_probe() -> None:
    study = _study()
    probe_cell(study, open_images(study), _cell(study))


def make_comparison() -> None:
    study = _study()
    tables = compile_tables(study)
    draw_comparison(study, tables)
    summary(study, tables)
    objective_table(study, tables)
    finish_tables(study, "compare", tables)


STEPS = {  # in their order; each begins in a workspace in which the ones before it are done
    "cache": make_cache,
    "teacher": run_teacher,
    "outputs": make_outputs,
    "datamap": run_datamap,
    "recording": make_recording,
    "students": make_students,
    "probe": make_probe,
    "comparison": make_comparison,
}


class Shop:
    """Workspaces `before/<step>`, one `done`, and copies of them to be spoilt."""

    def __init__(self, folder: Path, steps: Iterable[str] = STEPS) -> None:
        self.folder, self._n = folder, 0
        home = folder / "done"
        _write_studies(home)
        with workspace(home):
            for name in steps:
                make = STEPS[name]
                shutil.copytree(home, folder / "before" / name)
                with (
                    contextlib.redirect_stdout(io.StringIO()),
                    contextlib.redirect_stderr(io.StringIO()),
                ):
                    make()  # here, so that every forked child finds compiled what it needs
                if name == "teacher":
                    _keep_weights(home)

    def before(self, step: str) -> Path:
        folder = self.folder / "before" / step
        return folder if folder.exists() else self.folder / "done"  # of a quick call, too

    @contextlib.contextmanager
    def copy(self, step: str, folder: Path | None = None) -> Iterator[Path]:
        """A workspace of one's own, from before a step, inside `folder`."""
        self._n += 1
        home = (folder or self.folder / "spoilt") / f"{self._n:05d}"
        shutil.copytree(self.before(step), home)
        try:
            with workspace(home):
                yield home
        finally:
            shutil.rmtree(home, ignore_errors=True)


def _keep_weights(home: Path) -> None:
    evidence = files.read_json(home / "runs/small/teacher/evidence.json")
    file = evidence["checkpoints"]["last"]["file"]
    (home / "data").mkdir()
    shutil.copy(home / "runs/small/teacher" / file, home / "data" / "teacher.safetensors")


# ----------------------------------------------------------------------------------------------
# What readers make of what is there: fingerprints of what they were given


def _table(table: Any) -> str:
    return files.fingerprint(table.reset_index().to_json(orient="split", double_precision=15))


def _without_circumstances(evidence: dict[str, Any]) -> str:
    return files.fingerprint({k: v for k, v in evidence.items() if k not in ("made", "seal")})


def _evidence(step: str) -> Callable[[], str]:
    """The evidence of one step as the steps after it open it."""

    def read() -> str:
        study = _study()
        own, folder = study.step_settings(step) if step != "distill" else None, study.runs / step
        if step == "distill":
            return _without_circumstances(open_student(study, _cell(study), 0))
        if step == "probe":
            folder = probe_folder(study, _cell(study))
        return _without_circumstances(read_evidence(folder, own))

    return read


def read_cache() -> str:
    images = open_images(_study())
    arrays = [
        c.resident(n).numpy() for c in (images.train, images.test) for n in ("images", "labels")
    ]
    return files.fingerprint([images.fingerprints, images.pixels.mean, files.sha256_array(*arrays)])


def read_teacher() -> list[str]:
    study = _study()
    log = DynamicsLog.open(study.recorded_run / "dynamics", verify=True)
    arrays = [log[quantity] for quantity in QUANTITIES]
    return [files.fingerprint(open_teacher(study)), files.sha256_array(*arrays)]


def read_outputs() -> str:
    study, found = _study("loaded"), []
    for which in ("train", "replayed"):
        stored = Cache(outputs_folder(study, which))
        found += [stored.resident(column).numpy() for column in sorted(stored.header["columns"])]
    return files.sha256_array(*found)


def read_student() -> str:
    return _evidence("distill")()


def learn() -> str:
    """Train a student: it trusts images, labels and the teacher's outputs."""
    make_student()
    return read_student()


def learn_views() -> str:
    """The same from the replayed views of a loaded teacher."""
    study = _study("loaded")
    images = cache_images(study)
    make_teacher(study, images)
    return _without_circumstances(train_student(study, images, _cell(study), 0))


def read_probe() -> str:
    return _table(open_probes(_study(), _cell(_study())))


def read_comparison() -> str:
    return _evidence("compare")()


def read_datamap() -> str:
    study = _study()
    return _table(open_datamap(study, open_images(study)))


def map_dynamics() -> str:
    run_datamap()
    return read_datamap()


def read_subset() -> str:
    study = _study()
    subset = Subset.load(student_folder(study, _cell(study), 0) / "subset.parquet")
    return files.fingerprint([subset.sha256, subset._metadata()])


def read_recording() -> str:
    study = _study()
    log = open_log(study, open_images(study), "tiny", "seed=0")
    table = compute_datamap(log, el2n_epoch=2, window=3)
    return _table(table.join(open_gradients(study, "tiny", "seed=0")))


class RefusedRow(ValueError):
    """A row that the table of results shows as refused, with its reason."""

    refused = True


def _accepted(study: Study) -> Any:
    """The table of results, in which no row is refused."""
    table = run_table(study)
    for row in table[table["refused"]].to_dict("records"):
        raise RefusedRow(f"{study.runs / row['run']}: {row['reason']}")
    return table


def read_metrics() -> str:
    study = _study()
    return _table(curves(study, _accepted(study)))


def probe_again() -> str:
    make_probe()
    return read_probe()


def read_results() -> str:
    return _table(_accepted(_study()))


def resume() -> list[Any]:
    """Go on from a saved state: what came out, and whether a state was passed over."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        found = learn()
    return [found, "is not a whole training state" in said.getvalue()]


def build_again() -> dict[str, str]:
    make_cache()
    return results(files.workspace())


# ----------------------------------------------------------------------------------------------
# kill -9


@dataclass(frozen=True)
class Killed:
    """A step to be killed: where it begins, what does it, what reads it, its share of the kills."""

    name: str
    before: str
    make: Callable[[], None]
    read: Callable[[], Any]
    share: float


KILLED = (
    Killed("cache build", "cache", make_cache, read_cache, 0.16),
    Killed("cache build, 2 workers", "cache", make_cache_with_workers, read_cache, 0.06),
    Killed("teacher, dynamics, outputs", "teacher", run_teacher, read_teacher, 0.18),
    Killed("outputs of a loaded teacher", "outputs", make_outputs, read_outputs, 0.14),
    Killed("distillation", "students", make_student, read_student, 0.20),
    Killed("probe", "probe", make_probe, read_probe, 0.10),
    Killed("comparison", "comparison", make_comparison, read_comparison, 0.10),
)


def kill(shop: Shop, step: Killed, n: int, rng: np.random.Generator) -> Row:
    """Kill a step at `n` moments drawn uniformly over its duration, then do it again."""
    row = Row(f"kill -9: {step.name}")
    with shop.copy(step.before) as home:
        whole = attempt(step.make, limit_s=5 * HANGS_S)
        assert whole.how == "value", whole
        expected, content = results(home), attempt(step.read).value
    for _ in range(4 * n):
        if row.n == n:
            break
        with shop.copy(step.before) as home:
            outcome = attempt(step.make, kill_at=rng.uniform(0, whole.elapsed_s))
            if outcome.how != "killed":
                assert outcome.how == "value", outcome
                continue  # it had ended before
            row.n += 1
            done, seen = finished(home), attempt(step.read)
            if seen.how == "value":
                row.silent += seen.value != content
                row.harmless += seen.value == content
            else:
                row.detected += seen.ours
                row.notes[f"{seen.error}: {seen.message[:160]}"] += not seen.ours
            _again(row, home, step.make, expected, done)
    return row


def _again(row: Row, home: Path, make: Callable[[], None], expected: dict, done: dict) -> None:
    """Do a step again after its fault: does it end with the results of one that had none?"""
    again = attempt(make, limit_s=5 * HANGS_S)
    row.tried += 1
    row.recovered += again.how == "value" and results(home) == expected
    row.lost += lost_bytes(home, done)
    if again.how != "value":
        row.notes[f"not recovered: {again.error} {again.message[:200]}"] += 1


def _pipeline(home: Path) -> subprocess.Popen:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {
        "KDLIB_HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "kdlib", "study", str(home / "params/piped.yaml")]
    return subprocess.Popen(
        [*command, "--cores", "2"], env=environment, cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip


def _descendants(pid: int) -> list[int]:
    """A process and all processes below it, itself first."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                told = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(told[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill_pipeline(shop: Shop, n: int, rng: np.random.Generator) -> Row:
    """Kill `python -m kdlib study` with all its processes, `n` times, in two studies one after
    another: each goes on where it was until it is killed again, and at last is left to end."""
    row = Row("kill -9: the whole pipeline")
    content = parse_yaml((shop.before("cache") / "params/small.yaml").read_text())
    del content["recordings"]

    def prepared(home: Path) -> None:
        (home / "params/piped.yaml").write_text(yaml.safe_dump(content))

    with shop.copy("cache") as home:
        prepared(home)
        started = time.monotonic()
        assert _pipeline(home).wait() == 0
        duration, expected = time.monotonic() - started, results(home)
    for chain in range(2):
        with shop.copy("cache") as home:
            prepared(home)
            done: dict[str, str] = {}
            for _ in range(n // 2 + (n % 2) * (1 - chain)):
                process = _pipeline(home)
                try:
                    process.wait(timeout=rng.uniform(0, duration / 2))
                except subprocess.TimeoutExpired:
                    for pid in _descendants(process.pid):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
                    process.wait()
                    row.n += 1
                    row.lost += lost_bytes(home, done)
                    done = finished(home)
                    unfinished = not (home / "runs/piped/compare/evidence.json").exists()
                    row.detected += unfinished
                    row.harmless += not unfinished
            killed = row.n - row.tried
            row.tried += killed
            ended = _pipeline(home).wait() == 0 and results(home) == expected
            row.recovered += killed * ended
            row.lost += lost_bytes(home, done)
    return row


# ----------------------------------------------------------------------------------------------
# Damaged files


@dataclass(frozen=True)
class Kind:
    """A kind of file: where it lies, who trusts it, and how it is made again.

    Attributes:
        before: The step before which the files are there and the reader has something to do.
        paths: Glob patterns below the workspace.
        read: What trusts the file.
        delete: What a person deletes, as the sentence says, below the folder of the file; a name
            that begins with `cache:` is repaired.
    """

    name: str
    before: str
    paths: tuple[str, ...]
    read: Callable[[], Any]
    delete: tuple[str, ...] = ()
    spoil: Callable[[Path], None] | None = None


def _half_built(home: Path) -> None:
    """Leave the training split of a cache with three shards and a journal."""
    (folder,) = home.glob("cache/*/train")
    shutil.rmtree(home / "runs/small/cache")
    header = files.read_json(folder / "index.json")["header"]
    entries = files.read_json(folder / "index.json")["shards"]
    done = {shard: entry["sha256"] for shard, entry in enumerate(entries[:3])}
    write_journal(folder / "journal.jsonl", header, done)
    (folder / "index.json").unlink()
    for path in folder.glob("*.npy"):
        if int(path.stem.rsplit("-")[-1]) >= 3:
            path.unlink()


def _half_trained(home: Path) -> None:
    """Leave a student with two states and no evidence."""

    def train() -> None:
        loop.STATE_EVERY_S = 0.0
        real, left = Step.__call__, [70]

        def step(*arguments: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os._exit(0)  # the states before it are whole
            return real(*arguments)

        Step.__call__ = step
        make_student()

    attempt(train)


def _no_student(home: Path) -> None:
    shutil.rmtree(home / "runs/small/distill")


def _no_probe(home: Path) -> None:
    shutil.rmtree(home / "runs/small/probe")


RUN = "runs/small"
STUDENT = f"{RUN}/distill/student=tiny/strategy=random/fraction=0.33/objective=kd/seed=0"
KINDS = (
    Kind("image shard", "students", ("cache/*/*/images-*.npy",), learn, ("repair",)),
    Kind("label shard", "students", ("cache/*/*/labels-*.npy",), learn, ("repair",)),
    Kind("index of a cache", "students", ("cache/*/*/index.json",), learn, (".",)),
    Kind("journal of a build", "done", ("cache/*/train/journal.jsonl",), build_again,
         ("journal.jsonl",), _half_built),
    Kind("teacher output shard", "students", (f"{RUN}/teacher/outputs-train/*.npy",), learn,
         ("repair",)),
    Kind("index of teacher outputs", "students", (f"{RUN}/teacher/outputs-train/index.json",),
         learn, (".",)),
    Kind("replayed outputs, top k", "datamap", ("runs/loaded/teacher/outputs-replayed/*.npy",),
         learn_views, (".",)),
    Kind("dynamics array", "datamap", (f"{RUN}/teacher/dynamics/*.npy",), map_dynamics,
         ("run",)),
    Kind("dynamics index", "datamap", (f"{RUN}/teacher/dynamics/index.json",), map_dynamics,
         ("run",)),
    Kind("recorded log, gradients", "students",
         (f"{RUN}/recorded/*/*/dynamics/*", f"{RUN}/recorded/*/*/gradients.parquet"),
         read_recording, ("run",)),
    Kind("datamap", "students", (f"{RUN}/datamap/datamap.parquet",), read_datamap,
         ("datamap.parquet", "evidence.json")),
    Kind("subset", "done", (f"{STUDENT}/subset.parquet",), read_subset, ("run",)),
    Kind("weights at a step", "probe", (f"{STUDENT}/weights-*",), probe_again, ("run",)),
    Kind("weights measured", "comparison", (f"{STUDENT}/weights-00000120.safetensors",),
         read_results, ("run",)),
    Kind("training state", "students", (f"{STUDENT}/state/state.safetensors",), resume, ("run",),
         _half_trained),
    Kind("metrics", "comparison", (f"{STUDENT}/metrics.parquet",), read_metrics, ("run",)),
    Kind("probes", "comparison", (f"{RUN}/probe/**/probes.parquet",), read_probe, ("run",)),
    Kind("evidence of the cache", "teacher", (f"{RUN}/cache/evidence.json",), read_cache,
         ("evidence.json",)),
    Kind("evidence of the teacher", "students", (f"{RUN}/teacher/evidence.json",), learn,
         ("evidence.json",)),
    Kind("evidence of a student", "comparison", (f"{STUDENT}/evidence.json",), read_student,
         ("evidence.json",)),
    Kind("evidence of a probe", "comparison", (f"{RUN}/probe/**/evidence.json",), read_probe,
         ("evidence.json",)),
    Kind("settings of a run", "comparison",
         (f"{RUN}/teacher/settings.json", f"{STUDENT}/settings.json"), read_student, ()),
)  # fmt: skip


def flip(path: Path, rng: np.random.Generator) -> str:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    at, bit = int(rng.integers(len(data))), int(rng.integers(8))
    data[at] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {at}"


def truncate(path: Path, rng: np.random.Generator) -> str:
    """Cut a file somewhere."""
    size = int(rng.integers(path.stat().st_size))
    os.truncate(path, size)
    return f"cut to {size} bytes"


def damage(
    shop: Shop, kind: Kind, how: Callable[[Path, np.random.Generator], str], n: int,
    rng: np.random.Generator,
) -> Row:  # fmt: skip
    """Damage `n` files of a kind, one at a time, and let their reader loose."""
    row = Row(f"{how.__name__}: {kind.name}")
    with shop.copy(kind.before) as home:
        if kind.spoil is not None:
            kind.spoil(home)
        content = attempt(kind.read)
        assert content.how == "value", (kind.name, content)
        _redo(kind)
        expected = results(home)
    for _ in range(n):
        with shop.copy(kind.before) as home:
            if kind.spoil is not None:
                kind.spoil(home)
            paths = sorted(path for p in kind.paths for path in home.glob(p) if path.is_file())
            path = paths[rng.integers(len(paths))]
            done = finished(home)
            told = how(path, rng)
            seen = attempt(kind.read)
            row.n += 1
            _judge(row, seen, content, path, told)
            if row.tried < TORN and seen.how == "error":
                row.tried += 1
                _mend(kind, path, seen.message)
                again = _redo(kind)
                ended = again.how == "value" and results(home) == expected
                row.recovered += ended
                if not ended:
                    row.notes[
                        f"not recovered {path.name}: {again.error} {again.message[:300]}"
                    ] += 1
                done.pop(str(path.relative_to(home)), None)
                mended = {k: v for k, v in done.items() if not k.endswith(".json")}
                row.lost += lost_bytes(home, mended)
    return row


def _judge(row: Row, seen: Outcome, content: Outcome, path: Path, told: str) -> None:
    if seen.says(path.name, str(path.parent)) and seen.bounded:
        row.detected += 1
    elif seen.how == "value" and seen.value == content.value:
        row.harmless += 1
    elif seen.how == "value" and isinstance(seen.value, list) and seen.value[-1] is True:
        row.detected += seen.value[0] == content.value[0]  # passed over, and said
        row.silent += seen.value[0] != content.value[0]
    elif seen.how == "value":
        row.silent += 1
        row.notes[f"silent: {path.name}, {told}"] += 1
    else:
        row.notes[f"{path.name}, {told}: {seen.how} {seen.error} {seen.message[:200]}"] += 1


def _mend(kind: Kind, path: Path, told: str) -> None:
    """Do what the sentence says."""
    if not kind.delete and "delete it" in told:
        path.unlink()
    for name in kind.delete:
        if name == "repair":
            repair(path.parent)
            continue
        target = path.parent / name
        if name == "run":  # the folder of the run
            target = next(p for p in (path.parent, *path.parents) if (p / "settings.json").exists())
        shutil.rmtree(target, ignore_errors=True) if target.is_dir() else target.unlink(
            missing_ok=True
        )


def _redo(kind: Kind) -> Outcome:
    """Every step again as far as the kind's files go, then its reader."""

    def again() -> None:
        for name, make in STEPS.items():
            if name == kind.before and kind.spoil is None:
                break
            if name != "comparison":
                make()
        kind.read()

    return attempt(again)


# ----------------------------------------------------------------------------------------------
# A full disk


FILLED = (
    ("cache", make_cache),
    ("teacher", run_teacher),
    ("outputs", make_outputs),
    ("datamap", run_datamap),
    ("students", make_student),
    ("probe", make_probe),
    ("comparison", make_comparison),
)


@contextlib.contextmanager
def small_disk(folder: Path, size: int = 48 * 2**20) -> Iterator[bool]:
    """A tmpfs at `folder`; False where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def fill_disk(shop: Shop, step: str, make: Callable[[], None], n: int) -> Row:
    """Let a step run out of room at `n` places, then make room and do it again."""
    with small_disk(shop.folder / "disk") as mounted:
        row = Row(f"full disk{'' if mounted else ' (file size limit)'}: {step}")
        folder = shop.folder / "disk" if mounted else None
        with shop.copy(step, folder) as home:
            before = _size(home)
            whole = attempt(make)
            assert whole.how == "value", whole
            expected, written = results(home), _size(home) - before
        for i in range(n):
            with shop.copy(step, folder) as home:
                done = finished(home)
                room = int(written * (i + 0.5) / (n + 1))
                if mounted:
                    _fill(home.parent / "filler", room)
                    seen = attempt(make)
                    (home.parent / "filler").unlink()
                else:
                    seen = attempt(lambda room=room: _limited(make, 64 + room // 8))
                row.n += 1
                row.harmless += seen.how == "value" and results(home) == expected
                row.silent += seen.how == "value" and results(home) != expected
                if seen.how != "value":
                    clear = seen.says(str(home)) and seen.bounded
                    row.detected += clear
                    if not clear:
                        row.notes[f"{seen.how} {seen.error} {seen.message[:200]}"] += 1
                _again(row, home, make, expected, done)
    return row


def _size(home: Path) -> int:
    return sum(-(-p.stat().st_size // 4096) * 4096 for p in home.rglob("*") if p.is_file())


def _fill(path: Path, room: int) -> None:
    free = shutil.disk_usage(path.parent).free
    with open(path, "wb") as file:
        file.write(bytes(max(0, free - room)))


def _limited(make: Callable[[], None], most: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an error then
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    make()


# ----------------------------------------------------------------------------------------------
# Hostile and mutated files


def be_hostile(shop: Shop, cases: list[hostile.Case]) -> Row:
    """Put hostile files where readers look. None may run code, hang, or fill the memory."""
    row = Row("hostile files")
    for case in cases:
        with shop.copy(case.before) as home:
            if case.paths:
                paths = sorted(path for path in home.glob(case.paths))
                path = paths[0]
            else:
                path = home
            canary, done = home / "canary", finished(home)
            case.make(path, canary)
            done.pop(str(path.relative_to(home)), None)
            seen = attempt(lambda case=case, home=home: case.read(home), limit_s=30)
            row.n += 1
            refused = seen.how == "error" and seen.ours
            if canary.exists():
                row.silent += 1
                row.notes[f"executed: {case.name}"] += 1
            elif not seen.bounded:
                row.notes[f"{case.name}: {seen.how}, {seen.peak >> 20} MiB"] += 1
            elif refused:
                row.detected += 1
            elif seen.how == "value" and seen.value == case.harmless:
                row.harmless += 1
            elif seen.how == "value":
                row.silent += 1
                row.notes[f"accepted: {case.name}: {str(seen.value)[:100]}"] += 1
            else:
                row.notes[f"{case.name}: {seen.error} {seen.message[:200]}"] += 1
            row.lost += lost_bytes(home, done)
    return row


def fuzz(n: int, seed: int, folder: Path) -> Row:
    """Mutate study files: each is a study or a StudyError with one message."""
    row = Row("mutated study files")
    for start in range(0, n, 50):
        numbers = range(start, min(start + 50, n))
        seen = attempt(lambda numbers=numbers: hostile.load_mutants(numbers, seed, folder))
        row.n += len(numbers)
        if seen.how != "value" or not seen.bounded:
            row.notes[f"{seen.how} {seen.error} {seen.message[:200]}, {seen.peak >> 20} MiB"] += 1
            continue
        for number, how, told in seen.value:
            row.detected += how == "refused"
            row.harmless += how == "valid"
            if how not in ("refused", "valid"):
                row.notes[f"mutant {number}: {told[:200]}"] += 1
    return row


# ----------------------------------------------------------------------------------------------


def campaign(shop: Shop, kills: int, seed: int, only: list[str], quick: bool) -> Iterator[Row]:
    """Every kind of fault; `quick` tries a few of each."""
    rng = np.random.default_rng(seed)
    piped = round(kills * PIPED)
    if "kills" in only:
        loop.STATE_EVERY_S = STATE_EVERY_S
        left = kills - piped
        for step in KILLED:
            n = min(left, max(1, round(kills * step.share)))
            left -= n
            if not quick:
                yield kill(shop, step, n, rng)
            elif step.name == "distillation":
                yield kill(shop, step, 1, rng)
        loop.STATE_EVERY_S = 20.0
    if "pipeline" in only and not quick:
        yield kill_pipeline(shop, max(2, piped), rng)
    for name, how, n in (("flips", flip, 10), ("truncations", truncate, 5)):
        if name in only:
            for kind in KINDS:
                if not quick:
                    yield damage(shop, kind, how, n, rng)
                elif kind.name == QUICK[name]:
                    yield damage(shop, kind, how, 1, rng)
    if "disk" in only:
        for step, make in FILLED:
            if not quick:
                yield fill_disk(shop, step, make, 4)
            elif make == make_student:
                yield fill_disk(shop, step, make, 1)
    if "hostile" in only:
        yield be_hostile(shop, hostile.CASES[::20] if quick else hostile.CASES)
    if "studies" in only:
        yield fuzz(20 if quick else 600, seed, shop.folder)


def total(rows: list[Row]) -> Row:
    """One row for all of one group of faults."""
    whole = Row(f"{rows[0].kind.partition(':')[0]}, all")
    for row in rows:
        for name in ("n", "detected", "harmless", "recovered", "tried", "silent", "lost"):
            setattr(whole, name, getattr(whole, name) + getattr(row, name))
    return whole


GROUPS = ("kills", "pipeline", "flips", "truncations", "disk", "hostile", "studies")


def main() -> int:
    """Run the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="at random moments, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--quick", action="store_true", help="a few of each: does this still work?")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started, kills, sound = time.monotonic(), 6 if arguments.quick else arguments.kills, True
    print("| fault | n | detected | harmless | recovered | silent | bytes lost |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    groups: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory() as folder:
        shop = Shop(Path(folder), QUICK_STEPS if arguments.quick else STEPS)
        limit_memory()
        for row in campaign(shop, kills, arguments.seed, arguments.only, arguments.quick):
            print(f"| {' | '.join(row.cells())} |", flush=True)
            for note, n in row.notes.items():
                if n:
                    print(f"  {row.kind}: {note}", file=sys.stderr, flush=True)
            groups.setdefault(row.kind.partition(":")[0], []).append(row)
            sound &= row.sound
    for rows in groups.values():
        if len(rows) > 1:
            print(f"| **{'** | **'.join(total(rows).cells())}** |")
    print(f"\n{time.monotonic() - started:.0f} s", file=sys.stderr)
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
