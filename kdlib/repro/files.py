"""Files: workspace paths, atomic writes, locks, fingerprints and checksums."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from difflib import get_close_matches
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm.auto import tqdm


def workspace() -> Path:
    """The folder that holds `params/`, `runs/`, `cache/` and `figures/`.

    Returns: `$KDLIB_HOME` when it is set, else the repository this package is installed from, so
        that JupyterLab (started in `lab/`), papermill (started anywhere) and pytest agree.
    """
    return _folder_of("KDLIB_HOME") or Path(__file__).resolve().parents[2]


def settle() -> None:
    """Make `$KDLIB_HOME` and `$KDLIB_DATA` absolute, for this process and those it starts: a
    relative folder would be another one where they work."""
    for name in ("KDLIB_HOME", "KDLIB_DATA"):
        if os.environ.get(name, "").strip():
            os.environ[name] = os.path.abspath(os.environ[name])


def study_files(miniatures: bool = False) -> list[Path]:
    """The study files in `params/` and its folders.

    Args:
        miniatures: Also those that `--miniature` writes.
    """
    places = [workspace() / "params"] + [workspace() / "runs" / "miniatures"] * miniatures
    return [path for place in places for path in sorted(place.glob("**/*.yaml"))]


def data_root() -> Path:
    """The folder of downloaded data and weights: `$KDLIB_DATA`, or `data/` in the workspace."""
    return _folder_of("KDLIB_DATA") or workspace() / "data"


def _folder_of(variable: str) -> Path | None:
    """The folder that a variable of the environment names; None where it is not set.

    Raises: ValueError for one that is set and empty.
    """
    folder = os.environ.get(variable)
    if folder is not None and not folder.strip():
        raise ValueError(
            f"${variable} is set and empty; expected a folder: give one, or `unset {variable}`"
        )
    return None if folder is None else Path(folder).resolve()


def n_cpus() -> int:
    """CPUs this process may use: those it was given, where the system says, else all."""
    given = getattr(os, "sched_getaffinity", None)
    return len(given(0)) if given else os.cpu_count() or 1


def canonical_json(content: Any) -> str:
    """JSON text that is equal for equal content: sorted keys, no spaces, no NaN."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(content: Any) -> str:
    """sha256 (64 hex digits) of any JSON-able content: the name of all that determines a result."""
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_array(*arrays: np.ndarray) -> str:
    """sha256 over dtype, shape and bytes of one or more arrays, in the order given."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def write_atomic(path: Path, write: Callable[[BinaryIO], Any]) -> Path:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it into
    place.

    A reader sees the old file or the whole new one; on any error (a full disk, Ctrl-C) the
    temporary file is removed and the old one is untouched.

    Raises: DiskError where there is no room or no permission; whatever `write` raises.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    return path


class DiskError(OSError):
    """A file that cannot be written, in one sentence; its cause is the system's error."""


class LockError(OSError):
    """A file system that does not lock files, in one sentence; its cause is the system's error."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"{path} cannot be locked ({error.strerror}): its file system has no locks, without "
            "which two processes would write the same files; put the workspace on another disk "
            "(KDLIB_HOME), or mount this one with locks"
        )


CANNOT_WRITE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
)  # fmt: skip


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusal to write a file into a `DiskError` while the block runs."""
    try:
        yield
    except OSError as error:
        if error.errno not in CANNOT_WRITE:  # as of a DiskError, which has none
            raise
        raise DiskError(
            f"cannot write {path} ({error.strerror}); what is finished is kept: make room or get "
            "permission there, and run the same again"
        ) from error


def write_json(path: Path, content: Any) -> Path:
    """Write indented, key-sorted JSON atomically."""
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False) + "\n"
    return write_atomic(path, lambda file: file.write(text.encode()))


def read_json(path: Path, remedy: Callable[[Path], str] | None = None) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        remedy: Says what to do with a damaged one; None: delete its run, and run what makes it.

    Raises: FileNotFoundError; ValueError that names the file when it is cut, is not JSON, or holds
        anything but an object.
    """
    from kdlib.repro.commands import delete_and_run  # which itself reads files

    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:  # ValueError: no text, no JSON, endless digits
        fault = f"is not valid JSON ({error});"
    else:
        if isinstance(content, dict):
            return content
        fault = f"holds {type(content).__name__}; expected an object:"
    raise ValueError(f"{path} {fault} {(remedy or delete_and_run)(path)}")


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a fingerprint of itself, by which a reader sees that it was changed."""
    plain = {key: value for key, value in content.items() if key != "seal"}
    return plain | {"seal": fingerprint(plain)}


def is_sealed(content: dict[str, Any]) -> bool:
    """Whether the content is as `sealed` left it."""
    return content.get("seal") == sealed(content)["seal"]


def damaged_files(folder: Path, sums: Mapping[str, str], n_threads: int | None = None) -> list[str]:
    """Which files of a folder are missing or differ from their checksums; every byte is read.

    Args:
        sums: sha256 of each file, by name.
        n_threads: Files hashed at the same time; None: one per CPU.
    """

    def size(name: str) -> int:
        return (folder / name).stat().st_size if (folder / name).is_file() else 0

    def matches(name: str) -> bool:
        return (folder / name).is_file() and sha256_file(folder / name) == sums[name]

    damaged = []
    pool = ThreadPoolExecutor(n_threads or n_cpus())  # hashing frees the GIL
    with tqdm(
        total=sum(map(size, sums)),
        desc=f"verifying {folder.name}",
        unit="B",
        unit_scale=True,
        leave=False,
        delay=1,  # seconds: what is read in less needs no bar
    ) as progress:
        try:
            for name, whole in zip(sums, pool.map(matches, sums), strict=True):
                progress.update(size(name))
                damaged += [] if whole else [name]
        finally:
            pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for all other files
    return damaged


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says, in one line of at most `most` signs; its type when it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]}..."


def nearest(word: str, known: Iterable[str]) -> str:
    """For an error message: the nearest known name, or all of them when none is near."""
    known = sorted(set(known))
    close = get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def difference(new: dict, old: dict, prefix: str = "") -> list[str]:
    """The lines `key: old -> new` in which two nested dictionaries differ."""
    lines = []
    for key in sorted(new.keys() | old.keys()):
        now, before = new.get(key, "(absent)"), old.get(key, "(absent)")
        if isinstance(now, dict) and isinstance(before, dict):
            lines += difference(now, before, f"{prefix}{key}.")
        elif now != before:
            lines.append(f"{prefix}{key}: {before} -> {now}")
    return lines


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on `path` while the block runs; the kernel frees it when the process
    dies.

    Args:
        wait: True waits for the present holder; False raises at once.

    Raises: BlockingIOError that names the file, when it is held and `wait` is False; LockError on
        a file system without locks.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")  # noqa: SIM115
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"another process is working here: {path} is locked; wait for it or stop it"
            ) from None
        except OSError as error:
            raise LockError(path, error) from error
        yield
