"""A study's pipeline: run by Snakemake under a lock, and what failed in it."""

import itertools
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from kdlib.repro import files
from kdlib.study.study import Study

SNAKEFILE = Path(__file__).resolve().parents[2] / "Snakefile"  # beside the package


def run_pipeline(
    study: Study,
    file: str,
    step: str | None = None,
    cores: int | None = None,
    profile: str | None = None,
    options: Sequence[str] = (),
) -> int:
    """Run a study's pipeline, or one step of it; returns the exit code of Snakemake.

    Args:
        file: The study file.
        step: One of `STEPS`; None: the whole study.
        cores: Cores used at a time; None: 2, or what the profile says.
        profile: Folder of a Snakemake profile.
        options: Further options of Snakemake.

    Raises: BlockingIOError when another pipeline of this study runs.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]
    command += [step] if step else []
    command += ["--nolock", "--config", f"study={file}"]
    command += ["--profile", profile] if profile else []
    if cores or not profile:  # with a profile it would cap the threads of each job
        command += ["--cores", str(cores or 2)]
    # papermill is found whether or not the environment is activated
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Snakemake's lock outlives a kill; the kernel frees ours. Jobs that outlive a killed pipeline
    # hold the locks of their runs, and the next pipeline's jobs wait for those.
    with files.locked(study.runs / ".lock", wait=False):
        process = subprocess.Popen([*command, *options], env=os.environ | {"PATH": path})
        return wait(process)


def wait(process: subprocess.Popen) -> int:
    """Exit code of a child that gets Ctrl-C from the terminal too and may take time to stop."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("stopping: waiting for running jobs", file=sys.stderr)


def failures(root: Path) -> list[tuple[Path, str]]:
    """Notebooks and logs of a study's runs that hold an error: (path, message)."""
    return failed_notebooks(root) + failed_logs(root)


def failed_notebooks(root: Path) -> list[tuple[Path, str]]:
    """Executed notebooks of a study in which a cell failed: (path, `Error: message` of that cell).

    Reads papermill's mark; a killed notebook carries none and shows as an unfinished run instead.
    """
    failed = []
    for path in sorted(root.glob("**/*.ipynb")):
        if "archive" in path.parts:
            continue
        if path.stat().st_size == 0:  # Snakemake creates it before it starts the job
            failed.append((path, "did not start; the reason is printed above"))
            continue
        try:
            cells = files.read_json(path)["cells"]
        except (ValueError, KeyError, TypeError) as error:  # cut by a full disk, say
            failed.append((path, str(error)))
            continue
        for cell in cells:
            for output in cell.get("outputs", ()):
                if output.get("output_type") == "error":
                    failed.append((path, f"{output['ename']}: {output['evalue']}"))
    return failed


def failed_logs(root: Path) -> list[tuple[Path, str]]:
    """Logs of recordings and further teachers that have begun and are not finished: (path, last
    line)."""
    failed = []
    logs = (root.glob(where) for where in ("recorded/model=*/*.log", "teachers/*.log"))
    for path in sorted(itertools.chain(*logs)):
        if not (path.with_suffix("") / "evidence.json").exists():
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            failed.append((path, lines[-1] if lines else "stopped before it printed anything"))
    return failed
