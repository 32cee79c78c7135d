"""What a notebook costs as a job of Slurm, alone and grouped, beside the same on one machine.

    PYTHONPATH=tests python benchmarks/slurm_jobs.py [--subsets 5]

Brings up a Slurm of one node (tests/slurm.py; Debian: slurm-wlm, munge) and trains the students of
the tiny study on so many subsets, a notebook each. CPU time is that of everything the cluster ran,
its jobs included, and of nothing else: a busy machine makes waits longer, not this.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import slurm
import yaml

from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.teacher import make_teacher
from kdlib.study.load import load_study
from kdlib.study.selections import REGION_STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
PROFILE = ["--profile", str(ROOT / "profiles" / "slurm")]
PROFILE += ["--slurm-init-seconds-before-status-checks", "1"]
ONE_JOB = ["--groups", "distill=students", "--cores", "1", "--group-components"]


def start(home: Path, n_subsets: int) -> None:
    """The tiny study as far as its datamap, about to train on `n_subsets` subsets."""
    (home / "params").mkdir()
    shutil.copy(ROOT / "params" / "tiny.yaml", home / "params")
    strategies = ["random", *REGION_STRATEGIES][: n_subsets - 1]  # and the full set
    axes = {"strategy": strategies, "objective": ["kd"]}
    content = {"base": "tiny.yaml", "recordings": None, "axes": axes, "compare": None}
    content |= {"objectives": {"plain": None}, "probe": {"strategy": ["full"]}}
    (home / "params" / "jobs.yaml").write_text(yaml.safe_dump(content))
    os.environ["KDLIB_HOME"] = str(home)
    study = load_study("params/jobs.yaml")
    images = cache_images(study)
    make_teacher(study, images)
    make_datamap(study, images)


def children_s() -> float:
    """CPU seconds of this process's ended children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(home: Path, environment: dict[str, str], *options: str) -> float:
    """Train all students; seconds that passed."""
    command = [sys.executable, "-m", "kdlib", "study", str(home / "params" / "jobs.yaml")]
    command += ["--until", "distill", *options]
    begun = time.monotonic()
    environment = environment | {"KDLIB_HOME": str(home)}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return time.monotonic() - begun


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--subsets", type=int, default=5)
    subsets = parser.parse_args().subsets
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "first")
        first.mkdir()
        start(first, subsets)
        print(f"| {subsets} notebooks of students | wall, s | CPU, s | CPU a notebook, s |")
        print("| --- | ---: | ---: | ---: |")
        for row, options in (
            ("one machine, 2 at once", ["--cores", "2"]),
            ("Slurm, a job each", PROFILE),
            (f"Slurm, {subsets} in one job", [*PROFILE, *ONE_JOB, f"students={subsets}"]),
        ):
            home = Path(shutil.copytree(first, Path(folder, "next")))
            if options[0] == "--cores":
                before = children_s()
                wall_s = train(home, dict(os.environ), *options)
                cpu_s = children_s() - before
            else:
                with slurm.cluster() as cluster:
                    wall_s = train(home, cluster.environment, *options)
                cpu_s = cluster.cpu_s
            print(f"| {row} | {wall_s:.0f} | {cpu_s:.0f} | {cpu_s / subsets:.1f} |", flush=True)
            shutil.rmtree(home)


if __name__ == "__main__":
    main()
