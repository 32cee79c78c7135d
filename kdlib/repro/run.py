"""The folder of a run: its settings, its lock, its evidence.

A run is finished when `evidence.json` stands in its folder and names the fingerprint of the
`settings.json` beside it; the evidence is renamed into place last. A folder made with other
settings moves to the study's `archive/`.
"""

import contextlib
import hashlib
import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.repro import commands, files, processor
from kdlib.repro.tables import read_parquet

# since 3, settings.json holds every default and no null; since 4, what was read and executed
FORMAT = 4
KEPT = (".json", ".npy", ".parquet", ".safetensors")  # suffixes of the files of a run


class Run:
    """An open run: the holder may write into its folder.

    Attributes:
        folder: Where the run's files are.
        settings: `step`, the settings of the step, and `inputs`, the fingerprints of what it reads.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.settings_sha256 = files.fingerprint(settings)
        self._started = time.monotonic()

    @property
    def state(self) -> Path:
        """Folder of the resumable state of a training that is not finished."""
        return self.folder / "state"

    @property
    def finished(self) -> bool:
        """Whether there is valid evidence for these settings, and what it names is there."""
        path = self.folder / "evidence.json"
        if not path.exists() or (whole := _whole(path))["settings_sha256"] != self.settings_sha256:
            return False
        return not incomplete(self.folder, whole)

    def finish(self, evidence: dict[str, Any], device: str = "cpu") -> dict[str, Any]:
        """Write the evidence, and with it mark the run finished.

        Args:
            evidence: JSON-able facts of the run; format, settings fingerprint, names of the run's
                files and circumstances (versions, machine, commit, wall time, when it ended) are
                added.

        Returns: The evidence as written, with a seal.
        """
        wall_s = round(time.monotonic() - self._started, 3)
        added = {
            "format": FORMAT,
            "settings_sha256": self.settings_sha256,
            "files": _files_of(self.folder),
            "made": circumstances(device) | {"wall_s": wall_s, "at": _disk_time(self.folder)},
        }
        evidence = files.sealed(evidence | added)
        files.write_json(self.folder / "evidence.json", evidence)
        if self.state.exists():
            shutil.rmtree(self.state)
        return evidence


@contextlib.contextmanager
def open_run(root: Path, folder: Path, settings: dict[str, Any]) -> Iterator[Run]:
    """Open a run's folder under its lock, creating it when there is none.

    When the folder was made with other settings, the difference is printed and the old folder
    moves to `runs/<study>/archive/<fingerprint of its settings>/`.

    Args:
        root: The study's runs.
        folder: A folder below it.
        settings: JSON-able; all that determines the run's result.
    """
    with files.locked(folder.parent / f".{folder.name}.lock"):
        before = folder / "settings.json"
        if before.exists() and (
            lines := files.difference(settings, old := files.read_json(before))
        ):
            aside = root / "archive" / files.fingerprint(old)[:12]
            target = aside / folder.relative_to(root)
            while target.exists():
                target = target.with_name(target.name + "+")
            target.parent.mkdir(parents=True, exist_ok=True)
            folder.rename(target)
            print(f"{folder} was made with other settings (there -> now):", *lines, sep="\n  ")
            print(f"the old run is kept in {target}")
        if not before.exists():
            files.write_json(before, settings)
        yield Run(folder, settings)


def read_evidence(folder: Path, expected: dict[str, Any] | None = None) -> dict[str, Any]:
    """The evidence of a finished run.

    Args:
        expected: The settings of the step by the study as it is now; None compares nothing.

    Raises: FileNotFoundError that says which run is missing; ValueError for evidence of another
        format, evidence that does not belong to the settings beside it, or a run made before the
        study was changed, with the difference.
    """
    path = folder / "evidence.json"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no finished run; {commands.run_to_make(folder)}")
    evidence = _whole(path)
    settings = files.read_json(folder / "settings.json")
    if evidence["settings_sha256"] != files.fingerprint(settings):
        raise ValueError(
            f"{path} belongs to other settings than the settings.json beside it; "
            f"{commands.delete_and_run(folder)}"
        )
    if expected is not None and (lines := files.difference(expected, settings["step"])):
        raise ValueError(
            f"{folder} was made before the study was changed (there -> now): {'; '.join(lines)}; "
            f"{commands.run_to_make(folder)}"
        )
    return evidence


def incomplete(folder: Path, evidence: dict[str, Any]) -> str:
    """Why a run with evidence is not finished all the same: a failed check, or a file that is gone;
    empty for a finished one."""
    for check in evidence.get("checks", ()):
        if not check["passed"]:
            return f"the check {check['name']} failed: {check['sentence']}"
    gone = [name for name in evidence.get("files", ()) if not (folder / name).is_file()]
    more = f" and {len(gone) - 1} more files" if gone[1:] else ""
    return f"{gone[0]}{more} of the run are gone" if more else f"{gone[0]} is gone" if gone else ""


def _disk_time(folder: Path) -> float:
    """Now, in seconds of the clock that stamps files in a folder: of the machine that holds it."""
    stamp = folder / ".time"
    stamp.touch()
    now = stamp.stat().st_mtime
    stamp.unlink()
    return now


def _files_of(folder: Path) -> list[str]:
    """The files that a run leaves; stored outputs of a teacher can be made again without it."""
    aside = ("state", "outputs-", ".")
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix in KEPT)
    names = (name for name in names if not any(p.startswith(aside) for p in name.parts))
    return sorted({str(name) for name in names} - {"evidence.json", "settings.json"})


def _whole(path: Path) -> dict[str, Any]:
    """Evidence as it was written.

    Raises: ValueError for evidence that is cut, was changed, or is of another format.
    """
    evidence = files.read_json(path)
    if evidence.get("format") != FORMAT:
        fault = f"has format {evidence.get('format')}; expected {FORMAT}"
    elif not files.is_sealed(evidence) or "settings_sha256" not in evidence:
        fault = "was changed after it was written"
    else:
        return evidence
    raise ValueError(f"{path} {fault}: {commands.delete_and_run(path)}")


def read_metrics(folder: Path, name: str = "metrics") -> pd.DataFrame:
    """The metrics of a finished training, one row per evaluation.

    Args:
        name: `steps`: one row per step, where the study has `training.record_steps`.

    Raises: As `read_evidence`; ValueError for a table that is missing or was changed.
    """
    path = folder / f"{name}.parquet"
    expected = read_evidence(folder).get(f"{name}_sha256")
    if not path.is_file() or files.sha256_file(path) != expected:
        raise ValueError(
            f"{path} is missing or was changed after the training; "
            f"{commands.delete_and_run(folder)}"
        )
    return pd.read_parquet(path, partitioning=None)


def read_table(path: Path, expected: dict[str, Any], key: str = "table_sha256") -> pd.DataFrame:
    """A table of a finished run, in its folder.

    Args:
        expected: As of `read_evidence`.
        key: Where the evidence holds the hash of the file.

    Raises: As `read_evidence` and `tables.read_parquet`; ValueError for a table that differs from
        the evidence.
    """
    evidence = read_evidence(path.parent, expected)
    table, _ = read_parquet(path)
    if files.sha256_file(path) != evidence[key]:
        raise ValueError(f"{path} differs from its evidence; {commands.delete_and_run(path)}")
    return table


def code_sha256() -> str:
    """Fingerprint of this package's source: runs that share it were made by the same code."""
    digest = hashlib.sha256()
    package = Path(__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def circumstances(device: str) -> dict[str, Any]:
    """What computes here: device, versions, git commit, code fingerprint."""
    import torch  # loaded late: those who read evidence need none

    names = ("torch", "numpy", "pandas", "scikit-learn")
    # of the code: a study draws figures and tables into tracked files while it runs
    code = [f":/{name}" for name in ("kdlib", "audit", "notebooks", "Snakefile", "*.lock")]
    git = ["git", "-C", str(Path(__file__).parent), "status", "--porcelain=v2", "--branch"]
    try:
        asked = subprocess.run([*git, "--", *code], capture_output=True, text=True)
        state = asked.stdout.splitlines()
    except FileNotFoundError:  # no git on this machine
        state = []
    hardware = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor.name()
    return {
        "device": f"{device} ({hardware})",
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in names},
        "git_commit": state[0].removeprefix("# branch.oid ") if state else None,
        "git_clean": all(line.startswith("#") for line in state) if state else None,
        "code_sha256": code_sha256(),
    }
