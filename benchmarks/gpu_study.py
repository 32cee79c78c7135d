"""As much of a study as a machine with one GPU makes in so many seconds, as tables to bring home.

    python benchmarks/gpu_study.py --out FOLDER --seconds 360 [--study params/phase1.yaml]
        [--packed FOLDER ...] [--workers 6] [--reserve 60] [--work FOLDER] [--dry]

Image cache, teacher, datamap and students are made by `python -m kdlib step` in processes of their
own; several students train at once on the GPU, each process one after another. Students are trained
seed by seed over all cells, so that what is finished at any moment is a balanced table and a rest.
When the time is over, running students are killed, and the comparison is made of the seeds that are
complete over all cells: of the study with these `seeds`, in a file of its own. Needs torch and what
kdlib imports, no Jupyter, papermill or Snakemake.

Writes FOLDER/rows.jsonl (a row as soon as a step is done; also printed), FOLDER/errors.log and
FOLDER/study.tar.gz, of at most 16 MiB: params/<study>.yaml with the seeds that are compared, the
tables of figures/<study>/, and of each run its evidence without weights.

`--dry` makes a miniature of the study on the CPU, packing and unpacking of its images included.
"""

import argparse
import contextlib
import io
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pack
import yaml

from kdlib.cache.info import build_caches
from kdlib.repro import files
from kdlib.steps.distill import open_student
from kdlib.study.cells import Cell
from kdlib.study.load import load_study
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import SHARD_POLICIES
from kdlib.study.study import Study

MOST_BYTES = 16 * 2**20  # of the tar
# What a run leaves beside weights, states and outputs; what is left out first where it is too much.
KEPT = ("evidence.json", "settings.json", "metrics.parquet", "probes.parquet", "datamap.parquet",
        "subset.parquet")  # fmt: skip
LEFT_OUT = ((), ("subset.parquet",), ("subset.parquet", "datamap.parquet"))
POLL_S = 0.2
# Weights of 130 ResNet-18 take 12 to 18 GB; written and hashed in memory they wait for no disk.
MEMORY, MEMORY_BYTES = "/dev/shm", 32e9
Point = tuple[Cell, int]


def narrowed(text: str, seeds: Iterable[int], strategies: Iterable[str]) -> str:
    """The text of a study file with other seeds and strategies; the comments before its first key
    are kept, others are not."""
    head = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        head.append(line)
    content = yaml.safe_load(text)
    content["seeds"] = list(seeds)
    content.setdefault("axes", {})["strategy"] = list(strategies)
    body = yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120)
    return "\n".join([*head, "", body])


def ordered(study: Study) -> list[Point]:
    """All students in the order of training: seed by seed over all cells, but first what is probed
    of the first two seeds, since probes take the longest after the students."""
    first = [(cell, seed) for seed in study.seeds[:2] for cell in study.probed_cells()]
    rest = [(cell, seed) for seed in study.seeds for cell in study.cells()]
    return list(dict.fromkeys(first + rest))


def balanced(
    study: Study, done: set[Point], failed: Iterable[Point] = ()
) -> tuple[list[int], list[str]] | None:
    """Seeds and strategies whose students are all finished, two seeds at least.

    Args:
        done: The finished students.
        failed: Students that cannot be finished; their strategies are left out.

    Returns: All seeds that are complete over all strategies; where fewer than two are, the first
        two seeds with the strategies that are complete in both. None where these lack the full set,
        the baseline, or anything to compare with it.
    """
    lost = {cell.strategy for cell, _ in failed}
    strategies = [name for name in study.axes.strategy if name not in lost]

    def complete(strategy: str, seed: int) -> bool:
        cells = [cell for cell in study.cells() if cell.strategy == strategy]
        return all((cell, seed) in done for cell in cells)

    seeds = [s for s in study.seeds if all(complete(name, s) for name in ("full", *strategies))]
    if len(seeds) < 2:
        seeds = list(study.seeds[:2])
        strategies = [n for n in strategies if all(complete(n, s) for s in seeds)]
    asked = {study.compare.baseline, *study.probe.strategy} - {"full"}
    there = asked <= set(strategies) and all(complete("full", s) for s in seeds)
    return (seeds, strategies) if there and len(strategies) > 1 else None


def finished(study: Study) -> set[Point]:
    """The cells and seeds whose students are finished and were made with the settings the study has
    now."""
    students = set()
    for cell in study.cells():
        for seed in study.seeds:
            with contextlib.suppress(FileNotFoundError, KeyError, ValueError):
                open_student(study, cell, seed)
                students.add((cell, seed))
    return students


def needed(study: Study, cell: Cell) -> str:
    """The last of the steps `cache`, `teacher` and `datamap` that must be made before a student of
    this cell."""
    drawn = cell.strategy in ("full", *SHARD_POLICIES)
    if not drawn:
        rule = study.selection(cell.strategy)
        drawn = rule.kind == "random" and not rule.balanced
    if not drawn:
        return "datamap"
    return "teacher" if needs_teacher(study.objectives[cell.objective]) else "cache"


class Process:
    """A `python -m kdlib step`; its rows arrive in a queue as (this, row), its end as (this, None).

    Attributes:
        point: The student it is at work on.
    """

    def __init__(self, arguments: list[str], rows: queue.Queue, log: Path) -> None:
        self.name, self.point = arguments[0], None
        with open(log, "ab") as errors:
            self.child = subprocess.Popen(
                [sys.executable, "-m", "kdlib", "step", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | {"TQDM_DISABLE": "1"},
                start_new_session=True,
            )
        threading.Thread(target=self._read, args=(rows,), daemon=True).start()

    def _read(self, rows: queue.Queue) -> None:
        for line in self.child.stdout:
            if line.startswith("{"):
                rows.put((self, json.loads(line)))
        self.child.wait()
        rows.put((self, None))

    def send(self, point: Point) -> None:
        """Give a worker its next student."""
        cell, seed = point
        self.point = point
        with contextlib.suppress(BrokenPipeError):  # its end arrives in the queue
            self.child.stdin.write(json.dumps(dict(cell.items()) | {"seed": seed}) + "\n")
            self.child.stdin.flush()

    def kill(self) -> None:
        """End it and its children at once; finished runs are whole."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()


class Campaign:
    """One study on one machine within a time."""

    def __init__(
        self, study: Path, out: Path, started: float, seconds: float, reserve: float
    ) -> None:
        """
        Args:
            study: The study's file in the workspace of the campaign.
            started: When the time began (`time.monotonic`).
            seconds: From then to the end.
            reserve: Seconds before the end at which students are killed.
        """
        self.started = started
        self.end, self.stop = self.started + seconds, self.started + seconds - reserve
        self.path, self.out, self.study = study, out, load_study(study)
        self.rows: queue.Queue = queue.Queue()
        self.made: set[str] = set()
        self.failed: list[Point] = []
        self.alive: list[Process] = []
        self.probing: Process | None = None
        self.probed: list[int] = []  # seeds of the last probe that was begun
        self.probe_s = 0.0
        self._log = open(out / "rows.jsonl", "w")  # noqa: SIM115

    def tell(self, row: dict[str, Any]) -> None:
        """Print a row and keep it."""
        line = json.dumps(row | {"elapsed": round(time.monotonic() - self.started, 1)})
        print(line, flush=True)
        self._log.write(line + "\n")
        self._log.flush()

    def start(self, *arguments: str) -> Process:
        """Start steps of the study in a process of their own."""
        process = Process(list(arguments), self.rows, self.out / "errors.log")
        self.alive.append(process)
        return process

    def next_row(self, until: float) -> tuple[Process, dict[str, Any] | None] | None:
        """The next row, told; None when there is none until then."""
        wait = min(POLL_S, until - time.monotonic())
        try:
            process, row = self.rows.get(timeout=max(0.0, wait))
        except queue.Empty:
            return None
        if row is None:
            self.alive.remove(process)
            if process is self.probing:
                self.probing = None
            if process.child.returncode and process.child.returncode != -signal.SIGKILL:
                self.tell({"step": process.name, "error": f"status {process.child.returncode}"})
        else:
            if row["step"] == "probe":
                self.probe_s = row["seconds"]
            self.tell(row)
        return process, row

    def train(self, built: bool, n_workers: int, most: int | None) -> None:
        """Make cache, teacher and datamap, and train students until the time, or `most` of them, or
        all are done. The process that made the map trains students afterwards.

        Args:
            built: The image cache is there.
            n_workers: Students at once.
        """
        waiting, n_done = ordered(self.study), 0
        done = finished(self.study) if self.study.runs.exists() else set()
        waiting = [point for point in waiting if point not in done]
        path, points = str(self.path), ("--points", "-")
        whole = "cache,teacher,datamap,distill"
        preparing = self.start(whole, path, *points, *(["--built"] if built else []))
        others = [self.start("distill", path, *points) for _ in range(n_workers - 1)]
        while True:
            workers = [w for w in (preparing, *others) if w in self.alive]
            ready = "datamap" in self.made
            if not ready:  # meanwhile the GPU is that process's own but for one student
                workers = [w for w in workers if w is not preparing][:1]
            for worker in (w for w in workers if w.point is None):
                point = next((p for p in waiting if self._possible(p)), None)
                if point is not None:
                    waiting.remove(point)
                    worker.send(point)
            busy = any(w.point is not None for w in workers)
            over = time.monotonic() >= self.stop or (most is not None and n_done >= most)
            lost = not workers if ready else preparing not in self.alive  # and told why
            if over or (not busy and (lost or not waiting)):
                break
            process, row = self.next_row(self.stop) or (None, None)
            if process is None:
                continue
            if row is None:
                if process.point is not None:  # it died at work
                    self.failed.append(process.point)
                    process.point = None
            elif row["step"] != "distill":
                self.made.add(row["step"])
            else:
                if "error" in row:
                    self.failed.append(process.point)
                else:
                    done.add(process.point)
                    n_done += 1
                process.point = None
                self._probe_if_possible(done)
        running = sum(process.point is not None for process in self.alive)
        for process in [p for p in self.alive if p is not self.probing]:
            process.kill()
        self.tell({"step": "stopped", "finished": len(done), "killed": running})
        while any(process is not self.probing for process in self.alive):  # their last words
            self.next_row(self.end)

    def _possible(self, point: Point) -> bool:
        """Whether what a student needs is made; before the map is there, of the first two seeds."""
        early = "datamap" in self.made or point[1] in self.study.seeds[:2]
        return early and needed(self.study, point[0]) in self.made

    def _probe_if_possible(self, done: set[Point]) -> None:
        """Probe beside the students as soon as it is clear of which seeds: of the first two when
        what is probed of them is there, of more when these are complete."""
        first = list(self.study.seeds[:2])
        found = balanced(self.study, done, self.failed)
        seeds = found[0] if found else first
        wanted = all((c, s) in done for c in self.study.probed_cells() for s in seeds)
        time_left = self.end - time.monotonic()
        if self.probing or not wanted or len(seeds) <= len(self.probed):
            return
        if self.probed and time_left < 1.5 * self.probe_s * len(seeds) / len(self.probed):
            return
        path = self.write("probing", seeds, self.study.axes.strategy)
        self.probed, self.probing = seeds, self.start("probe", str(path))

    def write(self, folder: str, seeds: Iterable[int], strategies: Iterable[str]) -> Path:
        """A file of the study with other seeds and strategies, the other studies beside it."""
        place = files.workspace() / folder
        shutil.copytree(self.path.parent, place, dirs_exist_ok=True)
        path = place / self.path.name
        path.write_text(narrowed(self.path.read_text(), seeds, strategies))
        return path

    def compare(self) -> Path | None:
        """Compare what is complete, in the time that is left; the file of the study compared."""
        done = finished(self.study)
        found = balanced(self.study, done, self.failed)
        if found is None:
            self.tell({"step": "compare", "error": "no two seeds are complete: no comparison"})
            if self.probing:
                self.probing.kill()
            return None
        seeds, strategies = found
        if 2 <= len(self.probed) < len(seeds):  # too late to probe the others
            seeds = self.probed
        path = self.write("compared", seeds, strategies)
        told = {"seeds": list(seeds), "strategies": list(strategies), "finished": len(done)}
        self.tell({"step": "comparing"} | told)
        process = self.start("probe,compare", str(path))  # waits for a probe that is at work
        compared = False
        while process in self.alive and time.monotonic() < self.end:
            row = (self.next_row(self.end) or (None, None))[1]
            compared = compared or (row is not None and row["step"] == "compare")
        for left in list(self.alive):
            left.kill()
        if not compared:
            self.tell({"step": "compare", "error": "not done in time, or failed: see errors.log"})
        return path if compared else None


def write_tar(path: Path, study: Study, compared: Path | None, most: int = MOST_BYTES) -> int:
    """Everything of a study but weights, states and outputs, as a tar of at most so many bytes; its
    size.

    Args:
        compared: The file of the study as it was compared; None: as it was asked for.

    Raises: ValueError where evidence alone is too much.
    """
    home = files.workspace()
    for without in LEFT_OUT:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz", compresslevel=6) as tar:
            asked = compared or home / "params" / f"{study.name}.yaml"
            tar.add(asked, f"params/{study.name}.yaml")
            kept = [p for p in sorted(study.runs.rglob("*")) if p.name in KEPT]
            kept = [p for p in kept if p.name not in without and "archive" not in p.parts]
            for file in [*kept, *sorted(study.figures.rglob("*"))]:
                if file.is_file() and (file.parent / "settings.json").exists() | (
                    study.figures in file.parents
                ):
                    tar.add(file, str(file.relative_to(home)))
        if content.tell() <= most:
            packed = content.getvalue()
            files.write_atomic(path, lambda file, packed=packed: file.write(packed))
            return len(packed)
    raise ValueError(
        f"the evidence of {study.name} takes {content.tell():,} bytes; most is {most:,}"
    )


def miniature(study: Study) -> dict[str, Any]:
    """A study of the same form that a CPU makes in seconds: digits, a tiny network, few steps."""
    content = study.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    tiny = {"name": "tiny_cnn", "options": {"width": 8}}
    content["data"] = {"source": "digits", "n_validation": 197, "shard_size": 300}
    learning = {"batch_size": 64, "lr_peak": 0.1}
    content["teacher"] = {
        "model": tiny, "training": {"epochs": 4} | learning, "expected_accuracy": 0.3,
    }  # fmt: skip
    content["dynamics"] = {
        "model": tiny, "training": {"epochs": 3} | learning, "el2n_epoch": 2, "window": 3,
    }  # fmt: skip
    content["students"] = {name: {"model": tiny} for name in content["students"]}
    content["training"] = {"steps": 20, "checkpoint_fractions": [0, 1]} | learning
    content["axes"]["strategy"] = content["axes"]["strategy"][:2]
    content["seeds"] = list(range(20))  # more than there is time for
    content["probe"] |= {"k": 5, "c_grid": [0.1]}
    content["compute"] = {"threads": 1, "device": "cpu"}
    return content


def set_up_dry(path: str, home: Path, scratch: Path) -> tuple[Path, list[Path]]:
    """Write the miniature of a study, build its cache in a workspace of its own, and pack it.

    Returns: The study file in the campaign's workspace, and where the packs are.
    """
    place = home / "params" / "dry.yaml"
    text = f"# A miniature of {Path(path).name}.\n{json.dumps(miniature(load_study(path)))}\n"
    for folder in (home, scratch):
        (folder / "params").mkdir(parents=True)
        (folder / "params" / "dry.yaml").write_text(text)
    os.environ["KDLIB_HOME"] = str(scratch)
    build_caches(load_study(scratch / "params" / "dry.yaml"))
    parts = pack.pack_study(str(scratch / "params" / "dry.yaml"), scratch / "packed", 20_000)
    places = [scratch / "one", scratch / "two"]  # as parts that came one after another
    for number, part in enumerate(parts):
        target = places[number % 2]
        target.mkdir(exist_ok=True)
        shutil.move(part, target)
    return place, [place for place in places if place.exists()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of what comes home")
    parser.add_argument("--seconds", type=float, required=True, help="for everything")
    parser.add_argument("--study", default="params/phase1.yaml")
    parser.add_argument("--workers", type=int, help="students at once; 6, or 1 with --dry")
    parser.add_argument("--packed", type=Path, nargs="+", default=[], help="folders of packs")
    of = "seconds at the end for the comparison; a sixth of all, 90 at most"
    parser.add_argument("--reserve", type=float, help=of)
    parser.add_argument("--students", type=int, help="stop as if in time once so many are trained")
    of = "workspace with caches and weights; a temporary folder, in memory where there is one"
    parser.add_argument("--work", type=Path, help=of)
    parser.add_argument("--dry", action="store_true", help="a miniature of the study, on the CPU")
    arguments = parser.parse_args()
    arguments.started = time.monotonic()
    arguments.out.mkdir(parents=True, exist_ok=True)
    roomy = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free >= MEMORY_BYTES
    memory = MEMORY if roomy else None
    with contextlib.ExitStack() as stack:
        make = tempfile.TemporaryDirectory
        home = arguments.work or Path(stack.enter_context(make(dir=memory, prefix="gpu_study-")))
        try:
            return _run(arguments, home.resolve(), lambda: Path(stack.enter_context(make())))
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1


def _run(arguments: argparse.Namespace, home: Path, scratch: Callable[[], Path]) -> int:
    source = load_study(arguments.study)
    os.environ.setdefault("KDLIB_DATA", str(files.data_root()))  # before the workspace moves
    packed = arguments.packed
    if arguments.dry:
        study, packed = set_up_dry(arguments.study, home, scratch())
    else:
        given = Path(arguments.study)
        given = given if given.is_file() else files.workspace() / given
        study = home / "params" / f"{source.name}.yaml"
        shutil.copytree(given.resolve().parent, study.parent, dirs_exist_ok=True)
    os.environ["KDLIB_HOME"] = str(home)
    reserve = arguments.reserve or min(90.0, arguments.seconds / 6)
    campaign = Campaign(study, arguments.out, arguments.started, arguments.seconds, reserve)
    for cache in pack.unpack_study(str(study), packed) if packed else ():
        campaign.tell({"step": "unpacked", "n": cache.n_examples, "cache": cache.fingerprint[:12]})
    try:
        n_workers = arguments.workers or (1 if arguments.dry else 6)
        campaign.train(bool(packed), n_workers, arguments.students)
        compared = campaign.compare()
    finally:
        for process in list(campaign.alive):
            process.kill()
    size = write_tar(arguments.out / "study.tar.gz", campaign.study, compared)
    campaign.tell({"step": "packed", "bytes": size, "compared": compared is not None})
    return 0 if compared is not None else 3


if __name__ == "__main__":
    sys.exit(main())
