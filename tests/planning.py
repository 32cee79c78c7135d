"""Snakemake's dry runs, each in a process forked from one that has imported Snakemake already: the
import takes longer than the plan."""

import os
from collections.abc import Mapping
from multiprocessing import get_context
from pathlib import Path

from tiny import ROOT

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["snakemake.cli", "kdlib.steps.done", "kdlib.repro.processor"])


def dry_run(
    study: Path, home: Path, log: Path, *options: str, environment: Mapping[str, str]
) -> str:
    """What a dry run of the pipeline prints; it must succeed.

    Args:
        log: A file for it.
    """
    command = [*options, "--snakefile", str(ROOT / "Snakefile"), "--dry-run"]
    command += ["--workflow-profile", "none", "--directory", str(home)]
    command += ["--rerun-triggers", "mtime"]
    command += ["--config", f"study={study}"]
    process = PROCESSES.Process(target=_snakemake, args=(command, log, dict(environment)))
    process.start()
    process.join()
    printed = log.read_text()
    assert process.exitcode == 0, printed
    return printed


def planned(
    study: Path, home: Path, log: Path, target: str = "all", *, environment: Mapping[str, str]
) -> dict[str, int]:
    """How many jobs of each rule a dry run plans; arguments as of `dry_run`."""
    options = ["--quiet", "rules", "--cores", "1"]
    printed = dry_run(study, home, log, target, *options, environment=environment)
    lines = [line.split() for line in printed.splitlines()]
    counts = {line[0]: int(line[1]) for line in lines if len(line) == 2 and line[1].isdigit()}
    counts.pop("total", None)  # none where nothing is to be done
    return counts


def _snakemake(command: list[str], log: Path, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from snakemake.cli import main

    main(command)
