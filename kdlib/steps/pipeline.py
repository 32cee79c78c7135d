"""A study's pipeline: run by Snakemake under a lock, and what failed in it."""

import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from kdlib.repro import files
from kdlib.steps.done import CUT, end_of_notebook, unfinished
from kdlib.study.study import Study

SNAKEFILE = Path(__file__).resolve().parents[2] / "Snakefile"  # beside the package


def run_pipeline(
    study: Study,
    file: Path,
    step: str | None = None,
    cores: int | None = None,
    profile: str | None = None,
    options: Sequence[str] = (),
) -> int:
    """Run a study's pipeline, or one step of it; returns the exit code of Snakemake.

    Paths are handed on as absolute ones, and jobs run in this process's environment, wherever the
    pipeline is started and whatever PATH says.

    Args:
        file: The study file.
        step: One of `STEPS`; None: the whole study.
        cores: Cores used at a time; None: 2, or what the profile says.
        profile: Folder of a Snakemake profile; a relative path that is not in the current folder is
            looked up beside the package.
        options: Further options of Snakemake.

    Raises: BlockingIOError when another pipeline of this study runs; ValueError for an option that
        Snakemake does not have.
    """
    refuse_unknown(options)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(SNAKEFILE)]
    command += [step] if step else []
    command += ["--nolock", "--rerun-triggers", "mtime", "--directory", str(study.runs.parent)]
    command += ["--config", f"study={os.path.abspath(file)}"]
    command += [] if profile is None else ["--profile", _profile_folder(profile)]
    if cores is not None or profile is None:  # with a profile it would cap the threads of each job
        command += ["--cores", str(2 if cores is None else cores)]
    files.settle()
    # a kernel named python3 of the user's would else be taken before that of this environment
    kernels = [os.path.join(sys.prefix, "share", "jupyter"), os.environ.get("JUPYTER_PATH")]
    path = [str(Path(sys.executable).parent), os.environ.get("PATH")]
    places = {"PATH": path, "JUPYTER_PATH": kernels}
    environment = {name: os.pathsep.join(filter(None, of)) for name, of in places.items()}
    # Snakemake's lock outlives a kill; the kernel frees ours. Jobs that outlive a killed pipeline
    # hold the locks of their runs, and the next pipeline's jobs wait for those.
    with files.locked(study.runs / ".lock", wait=False):
        (study.runs / ".lock").touch()  # its time, by the clock of the disk, is that of the start
        process = subprocess.Popen([*command, *options], env=os.environ | environment)
        return wait(process)


def _profile_folder(profile: str) -> str:
    """Absolute, where there is such a folder; else a name that Snakemake looks up."""
    for folder in (Path(profile), SNAKEFILE.parent / profile):
        if folder.exists():
            return os.path.abspath(folder)
    return profile


def refuse_unknown(options: Sequence[str]) -> None:
    """Refuse an option that neither this command nor Snakemake has, with the nearest that they
    have.

    Raises: ValueError.
    """
    if any(o.split("=")[0] in ("--directory", "-d") for o in options):
        raise ValueError(
            "--directory is no option here: jobs run beside the study's runs, on a cluster too; "
            "set KDLIB_HOME to run in another workspace"
        )
    given = [o.split("=")[0] for o in options if o.startswith("--") and o != "--"]
    if not given:
        return
    from snakemake.cli import get_argument_parser  # takes a second

    known = set(get_argument_parser()._option_string_actions) | {"--cores", "--profile"}
    for option in given:
        if option not in known:
            raise ValueError(
                f"neither this command nor Snakemake has an option {option}; "
                f"{files.nearest(option, known)}"
            )


def wait(process: subprocess.Popen) -> int:
    """Exit code of a child that gets Ctrl-C from the terminal too and may take time to stop."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("stopping: waiting for running jobs", file=sys.stderr)


def closing_message(study: Study, step: str | None, code: int) -> str:
    """What to say of a pipeline that is over and did not finish: what failed in it, what an earlier
    one left, and which steps are not finished. Empty for a study that is complete.

    Args:
        step: One of `STEPS`; None: the whole study.
        code: Exit code of Snakemake.
    """
    open_steps = unfinished(study, step)
    if not code and not open_steps:
        return ""
    started = (study.runs / ".lock").stat().st_mtime_ns
    roots = dict.fromkeys((study.upstream.runs, study.runs))
    found = [one for root in roots for one in failed_notebooks(root) + failed_logs(root)]
    now = [one for one in found if one[0].stat().st_mtime_ns >= started]
    ended = [one for one in now if one[1] == CUT]
    failed = [one for one in now if one[1] != CUT]
    earlier = [
        one for one in found if one not in now and one[1] != CUT and _is_of(one[0], open_steps)
    ]
    parts = [
        (failed, "step(s) failed"),
        (ended, "notebook(s) ended before their last cell and without an error: they were killed, "
                "or ran out of time or memory"),
        (earlier, "step(s) failed in an earlier call and were not tried in this one"),
        ([] if code else list(open_steps.items()), "run(s) are not finished"),
    ]  # fmt: skip
    lines = ["The study is not complete."]
    if code and not now:
        lines += [
            f"Snakemake stopped with exit code {code}; no notebook or log of this call holds an "
            "error, and the reason is printed above."
        ]
    for of_part, what in parts:
        lines += [f"{len(of_part)} {what}:", *_listed(of_part)] if of_part else []
    return "\n".join([*lines, "What is finished is kept; run the same command again to go on."])


def _is_of(path: Path, folders: Iterable[Path]) -> bool:
    """Whether a notebook or log is of one of these runs."""
    place = path.with_suffix("") if path.suffix == ".log" else path.parent
    return any(folder.is_relative_to(place) for folder in folders)


def _listed(found: Sequence[tuple[Path, str]], most: int = 20) -> list[str]:
    lines = [f"  {path}\n    {why}" for path, why in found[:most]]
    return lines + ([f"  and {len(found) - most} more"] if found[most:] else [])


def failed_notebooks(root: Path) -> list[tuple[Path, str]]:
    """Executed notebooks of a study that failed: (path, `Error: message` of the cell), or `CUT` for
    one that was killed."""
    failed = []
    for path in sorted(root.glob("**/*.ipynb")):
        if "archive" in path.parts:
            continue
        if path.stat().st_size == 0:  # Snakemake creates it before it starts the job
            failed.append((path, "did not start; the reason is printed above"))
            continue
        try:
            outputs = [o for c in files.read_json(path)["cells"] for o in c.get("outputs", ())]
        except (ValueError, KeyError, TypeError) as error:  # cut by a full disk, say
            failed.append((path, str(error)))
            continue
        errors = [o for o in outputs if o.get("output_type") == "error"]
        failed += [(path, f"{error['ename']}: {error['evalue']}") for error in errors]
        if end_of_notebook(path, path.stat().st_mtime_ns) == CUT:
            failed.append((path, CUT))
    return failed


def failed_logs(root: Path) -> list[tuple[Path, str]]:
    """Logs of recordings and further teachers that have begun and are not finished: (path, last
    line)."""
    failed = []
    for path in sorted([*root.glob("recorded/model=*/*.log"), *root.glob("teachers/*.log")]):
        if not (path.with_suffix("") / "evidence.json").exists():
            lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
            failed.append((path, lines[-1] if lines else "stopped before it printed anything"))
    return failed
