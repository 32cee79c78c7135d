"""Trials of `faults`: one action in a forked child that may be killed, crash, hang or run out of
memory, and what it left on the disk.

A fork costs milliseconds where a process that imports torch costs seconds. Leaves to others: what
is done, and what is wrong with it (`faults`).
"""

import contextlib
import io
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdlib.repro import files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = (".npy", ".parquet", ".safetensors", ".png", ".pdf", ".md", ".tex")
TIMES = ("costs", "ledger")  # files that tell how long it took
HANGS_S = 120.0
MOST_BYTES = 512 * 2**20  # that a trial may add to the memory of its parent
SPOKEN = (ValueError, OSError, RuntimeError, ModuleNotFoundError)  # what `python -m kdlib` prints


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        how: `value`, `error` (an exception), `killed` (by the moment that was asked for), `crash`
            (another signal), `hang`.
        value: What the action returned, JSON.
        error: Name of the exception's class.
        message: Its text.
        ours: Whether a frame of kdlib raised it, and `python -m kdlib` prints it as a sentence.
        peak: Bytes by which the child outgrew its parent.
        elapsed_s: Until its end.
    """

    how: str
    value: Any = None
    error: str = ""
    message: str = ""
    ours: bool = False
    peak: int = 0
    elapsed_s: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether the child ended by itself, within its time and memory."""
        return self.how in ("value", "error") and self.peak <= MOST_BYTES

    def says(self, *names: str) -> bool:
        """Whether it is an error of ours whose sentence has one of some names."""
        return self.how == "error" and self.ours and any(name in self.message for name in names)


def attempt(
    action: Callable[[], Any], *, kill_at: float | None = None, limit_s: float = HANGS_S
) -> Outcome:
    """Run an action in a forked child.

    Args:
        action: Returns JSON-able content; what it prints is thrown away.
        kill_at: Seconds after which the child gets SIGKILL; None lets it end.
    """
    here, there = os.pipe()
    started, before = time.monotonic(), _rss()
    pid = os.fork()
    if pid == 0:
        os.close(here)
        _child(action, there)
    os.close(there)
    told, code, usage = b"", None, None
    until = started + (limit_s if kill_at is None else kill_at)
    while True:
        ready, _, _ = select.select([here], [], [], max(0.0, until - time.monotonic()))
        chunk = os.read(here, 65536) if ready else None
        if chunk:
            told += chunk
            continue
        if chunk is None:  # time is up
            os.kill(pid, signal.SIGKILL)
        break
    _, code, usage = os.wait4(pid, 0)
    os.close(here)
    elapsed, peak = time.monotonic() - started, max(0, usage.ru_maxrss * 1024 - before)
    if os.WIFSIGNALED(code):
        asked = chunk is None and os.WTERMSIG(code) == signal.SIGKILL
        how = ("hang" if kill_at is None else "killed") if asked else "crash"
        name = signal.Signals(os.WTERMSIG(code)).name
        return Outcome(how, message=name, peak=peak, elapsed_s=elapsed)
    try:
        return Outcome(**json.loads(told), peak=peak, elapsed_s=elapsed)
    except ValueError:
        return Outcome("crash", message=f"exit code {code}", peak=peak, elapsed_s=elapsed)


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def limit_memory(more: int = 3 * 2**30) -> None:
    """Let this process and its children take only so many bytes more, so that a fault which fills
    the memory ends the trial and not the machine."""
    virtual = int(Path("/proc/self/statm").read_text().split()[0])
    most = virtual * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _child(action: Callable[[], Any], there: int) -> None:
    """Run the action, tell how it ended, and be gone without the parent's exit handlers."""
    try:
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        sys.stdout = sys.stderr = io.StringIO()
        try:
            told = {"how": "value", "value": action()}
        except BaseException as error:
            frames = traceback.extract_tb(error.__traceback__)
            raised = Path(frames[-1].filename).resolve()
            ours = raised.is_relative_to(ROOT / "kdlib") or getattr(error, "refused", False)
            ours = ours and isinstance(error, SPOKEN)
            told = {"how": "error", "error": type(error).__name__, "message": str(error)[:4000],
                    "ours": ours}  # fmt: skip
        with open(there, "wb") as pipe:
            pipe.write(json.dumps(told).encode())
    finally:
        os._exit(0)


@contextlib.contextmanager
def workspace(home: Path) -> Iterator[None]:
    """Make a folder the workspace of this process while the block runs."""
    before = os.environ.get("KDLIB_HOME")
    os.environ["KDLIB_HOME"] = str(home)
    try:
        yield
    finally:
        if before is None:
            del os.environ["KDLIB_HOME"]
        else:
            os.environ["KDLIB_HOME"] = before


def results(home: Path) -> dict[str, str]:
    """Fingerprints of everything in a workspace that must not depend on when it was made: files of
    results by their bytes, evidence without the circumstances of its making."""
    found = {}
    for path in sorted(home.rglob("*")):
        if "archive" in path.parts or not path.is_file():
            continue
        name = str(path.relative_to(home))
        if path.suffix in RESULTS and path.stem not in TIMES:
            found[name] = files.sha256_file(path)
        elif path.name == "evidence.json":
            content = files.read_json(path)
            aside = {"made", "seal"}
            if content.get("step") == "compare":  # its settings name the table of costs
                aside.add("settings_sha256")
            found[name] = files.fingerprint({k: v for k, v in content.items() if k not in aside})
    return found


def finished(home: Path) -> dict[str, str]:
    """sha256 of everything in a workspace that counts as done: shards in an index or a journal, and
    all files of runs with evidence."""
    from kdlib.cache.index import journal_paths, read_indexes, read_journal

    found = {}
    for folder in sorted(path for path in home.rglob("*") if path.is_dir()):
        there = []
        if "archive" not in folder.parts and (folder / "evidence.json").exists():
            there = [p for p in folder.rglob("*") if p.is_file() and not _passing(p)]
        if any(folder.glob("*-?????.npy")):
            done = list(read_indexes(folder)[1].values())
            done += [sums for j in journal_paths(folder) for sums in read_journal(j)[1].values()]
            there += [folder / name for sums in done for name in sums]
        found |= {str(path.relative_to(home)): files.sha256_file(path) for path in there}
    return found


def _passing(path: Path) -> bool:
    """Whether a file is no result: locks, notebooks, logs, states, temporary files."""
    return (
        path.name.startswith(".")
        or path.suffix in (".ipynb", ".log", ".tmp", ".new")
        or (path.name.startswith("state."))
    )


def lost_bytes(home: Path, before: dict[str, str]) -> int:
    """Bytes of finished work that are gone or different now; 0 when all of it is as it was, or was
    moved to an archive."""
    lost = 0
    kept = {files.sha256_file(p) for p in home.glob("runs/*/archive/**/*") if p.is_file()}
    for name, sha256 in before.items():
        path = home / name
        if sha256 in kept:
            continue
        if not path.exists():
            lost += 1
        elif files.sha256_file(path) != sha256:
            lost += path.stat().st_size
    return lost
