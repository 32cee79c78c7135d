"""Command line: `python -m kdlib study | figures | findings | schema | record | step | probe |
cache`.

Commands import what they need when they run, so that help and errors come at once.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlib.repro import files
from kdlib.study.cells import Cell
from kdlib.study.data import parse_part
from kdlib.study.evaluation import AXES, Probe
from kdlib.study.load import load_study
from kdlib.study.models import Model
from kdlib.study.study import STEPS, Study

MADE = ("cache", "teacher", "datamap", "distill", "probe", "compare")  # of `step`
# options of Snakemake after which there may be no comparison
PARTLY = {"--until", "-U", "--omit-from", "-O", "--dry-run", "--dryrun", "-n", "--touch", "-t",
          "--summary", "-S"}  # fmt: skip


ROOT = Path(__file__).resolve().parents[1]  # the repository: the pipeline lives beside the package


def _study(arguments: argparse.Namespace, further: list[str]) -> int:
    """Run a study's pipeline under a lock of its own, then say what was found or what failed."""
    study = load_study(arguments.study)
    snakemake = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
    options = ["--config", f"study={arguments.study}"]
    if arguments.profile:
        options += ["--profile", arguments.profile]
    if arguments.cores or not arguments.profile:  # elsewhere it would cap the threads of each job
        options += ["--cores", str(arguments.cores or 2)]
    # Snakemake's own lock outlives a kill; the kernel frees ours. Jobs that outlive a killed
    # pipeline hold the locks of their runs, and the next pipeline's jobs wait for those.
    beside = str(Path(sys.executable).parent)  # papermill's, whether or not it is activated
    environment = os.environ | {"PATH": os.pathsep.join([beside, os.environ["PATH"]])}
    with files.locked(study.runs / ".lock", wait=False):
        step = [arguments.step] if arguments.step else []
        command = [*snakemake, *step, "--nolock", *options, *further]
        code = _wait(subprocess.Popen(command, env=environment))
    if code:
        _tell_failures(study)
        return code
    if arguments.step is None and not PARTLY & {option.split("=")[0] for option in further}:
        told = (study.figures / "summary.md").read_text().splitlines()
        print(*[line for line in told if not line.startswith("|")], sep="\n")
    print(f"Figures and tables: {study.figures}\nExecuted notebooks and runs: {study.runs}")
    return 0


def _wait(process: subprocess.Popen) -> int:
    """Exit code of a child that gets its own Ctrl-C from the terminal and may take time to stop."""
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            print("stopping: waiting for the jobs at work", file=sys.stderr)


def _tell_failures(study: Study) -> None:
    from kdlib.repro.run import failed_logs, failed_notebooks

    failed = failed_notebooks(study.runs) + failed_logs(study.runs)
    told = f"{len(failed)} step(s) failed:"
    if not failed:  # a job that is killed writes nothing
        told = (
            "No notebook holds an error: jobs were killed, or ran out of time or memory, and what "
            "stopped them stands above."
        )
    print(f"\nThe study is not complete. {told}", file=sys.stderr)
    for path, message in failed:
        print(f"  {path}\n    {message}", file=sys.stderr)
    print("What finished is kept; run the same command again to go on.", file=sys.stderr)


def _figures(arguments: argparse.Namespace, further: list[str]) -> int:
    """Redraw every figure of a study from its records, or from its committed tables; of all studies
    that have either, when none is named."""
    from kdlib.steps.figures import drawable, redraw

    if arguments.study != "all":
        redraw(load_study(arguments.study))
        return 0
    code = 0
    for path in sorted((files.workspace() / "params").glob("*.yaml")):
        try:
            if drawable(study := load_study(path)):
                redraw(study)
            else:
                print(f"{study.name}: neither runs nor tables are here")
        except (ValueError, OSError, RuntimeError) as error:  # says so, and draws the others
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            code = 1
    return code


def _findings(arguments: argparse.Namespace, further: list[str]) -> int:
    """Say what the studies found whose tables are committed."""
    from kdlib.compare.findings import findings

    print(*findings(), sep="\n")
    return 0


def _cache_build(arguments: argparse.Namespace, further: list[str]) -> int:
    """Build the image cache of a study, or a part of it."""
    from kdlib.cache.info import build as info_build

    study = load_study(arguments.study)
    info_build(study, arguments.split, arguments.part, arguments.workers)
    return 0


def _cache_outputs(arguments: argparse.Namespace, further: list[str]) -> int:
    """Store a part of a loaded teacher's outputs."""
    from kdlib.cache.info import state
    from kdlib.cache.shards import Cache
    from kdlib.steps.cache import open_images
    from kdlib.steps.teacher_outputs import store_part

    study = load_study(arguments.study)
    images = open_images(study)
    for stored in store_part(study, images, parse_part(arguments.part)):
        print(state(Cache(stored.folder)))  # all that is there, not the part alone
    return 0


def _cache_info(arguments: argparse.Namespace, further: list[str]) -> int:
    """Say what caches hold and what they miss."""
    from kdlib.cache.info import describe, find_caches

    for folder in (folder for path in arguments.path for folder in find_caches(path)):
        print(describe(folder))
    return 0


def _cache_verify(arguments: argparse.Namespace, further: list[str]) -> int:
    """Compare every byte of caches with their checksums."""
    from kdlib.cache.info import find_caches
    from kdlib.cache.info import verify as info_verify

    whole = True
    for path in arguments.path:
        study = path if Path(path).suffix in (".yaml", ".yml") else "STUDY"
        for folder in find_caches(path):
            whole &= info_verify(folder, arguments.repair, study)
    return 0 if whole else 1


def _step(arguments: argparse.Namespace, further: list[str]) -> int:
    """Make steps of a study, alone or, of teachers and students, as one of several processes; print
    a line of JSON for each."""
    from kdlib.steps import commands
    from kdlib.trainer.distributed import joined

    study, code = load_study(arguments.study), 0
    with joined(study.compute.device) as world:
        lone = [step for step in arguments.step if step not in commands.SHARED]
        if lone and not world.alone:
            raise ValueError(f"step {lone[0]} is made by one process; start it without torchrun")
        for step in arguments.step:
            started = time.monotonic()
            if step == "distill":
                for row in commands.distill(study, _points(arguments, study)):
                    if row is not None:
                        print(json.dumps(row), flush=True)
                        code = max(code, int("error" in row))
                continue
            if step == "cache":
                row = commands.cache(study, arguments.built)
            elif step == "teacher":
                row = commands.teacher(study, arguments.teacher)
            else:
                row = {
                    "datamap": commands.datamap,
                    "probe": commands.probe,
                    "compare": commands.compare,
                }[step](study)
            if row is not None:
                seconds = round(time.monotonic() - started, 3)
                print(json.dumps({"step": step} | row | {"seconds": seconds}), flush=True)
    return code


def _points(arguments: argparse.Namespace, study: Study) -> Iterator[tuple[Cell, int]]:
    """The cells and seeds of `step distill`: of a file, of standard input, or one cell."""
    from kdlib.steps import commands

    if arguments.points == "-":
        yield from commands.read_points(iter(sys.stdin.readline, ""), study)  # each as it comes
    elif arguments.points:
        yield from commands.read_points(Path(arguments.points).read_text().splitlines(), study)
    else:
        point = {axis: getattr(arguments, axis) for axis in AXES}
        for seed in arguments.seed or [0]:
            yield study.cell(**point), seed


def _record(arguments: argparse.Namespace, further: list[str]) -> int:
    """Make one further recording of a study's images."""
    from kdlib.steps.cache import open_images
    from kdlib.steps.recordings import record as recordings_record

    study = load_study(arguments.study)
    recordings_record(study, open_images(study), arguments.model, arguments.part)
    return 0


def _probe(arguments: argparse.Namespace, further: list[str]) -> int:
    """Probe a weight file that no study has made, on a study's images."""
    from pydantic import ValidationError

    from kdlib.dataset.pixels import Pixels
    from kdlib.steps.cache import open_images
    from kdlib.steps.probe import probe_weights
    from kdlib.steps.probe import told as probe_told

    study, pixels = load_study(arguments.study), None
    asked = {k: getattr(arguments, k) for k in ("layers", "few_shot") if getattr(arguments, k)}
    try:
        probe = Probe.model_validate(study.probe.model_dump() | asked)
        model = Model(name=arguments.model, options=arguments.options)
    except ValidationError as error:
        reasons = [e["msg"].removeprefix("Value error, ") for e in error.errors()]
        raise ValueError("; ".join(reasons)) from None
    study = study.model_copy(update={"probe": probe})
    if (arguments.mean is None) != (arguments.std is None):
        raise ValueError("--mean and --std go together")
    if arguments.mean is not None:
        pixels = Pixels(arguments.mean, arguments.std, study.compute.channels_last)
    images = open_images(study)
    table = probe_weights(study, images, model, arguments.weights, pixels)
    print(probe_told(table))
    return 0


def _schema(arguments: argparse.Namespace, further: list[str]) -> int:
    """Write what is generated from the schema of a study."""
    from kdlib.study.schema import write

    print(*write(), sep="\n")
    return 0


def _add_probe(commands: Any) -> None:
    probe = commands.add_parser("probe", help="probe a weight file from outside, print a table")
    probe.add_argument("study", help="study file, such as params/cifar10.yaml: images and settings")
    probe.add_argument("--weights", type=Path, required=True, help="safetensors or a checkpoint")
    probe.add_argument("--model", required=True, help="network of the weights, as in a study")
    probe.add_argument("--options", type=json.loads, default={}, help="its options, as JSON")
    probe.add_argument("--mean", type=float, nargs="+", help="of each channel, as it was trained")
    probe.add_argument("--std", type=float, nargs="+", help="likewise; else those of the study")
    probe.add_argument("--layers", nargs="+", help="features stage1 ...; else the study's")
    probe.add_argument("--few-shot", type=int, nargs="+", help="examples of each class")
    probe.set_defaults(run=_probe)


def _add_step(commands: Any) -> None:
    described = "make steps of a study without notebooks; teachers and students also under torchrun"
    step = commands.add_parser("step", help=described)
    of = f"one of {', '.join(MADE)}, or several separated by commas"
    step.add_argument("step", type=_named_steps, help=of)
    step.add_argument("study", help="study file, such as params/digits.yaml")
    for axis in AXES:
        step.add_argument(f"--{axis}", type=float if axis == "fraction" else str)
    step.add_argument("--seed", type=int, action="append", help="0; given twice, one after another")
    of = 'of distill: a file of lines {"strategy": "easy", ..., "seed": 0}; - reads standard input'
    step.add_argument("--points", metavar="FILE", help=of)
    step.add_argument("--teacher", help="of teacher: only this one of the study's `teachers`")
    of = "of cache: it is there (unpacked, say); do not open the data set"
    step.add_argument("--built", action="store_true", help=of)
    step.set_defaults(run=_step)


def _named_steps(text: str) -> list[str]:
    named = text.split(",")
    for name in named:
        if name not in MADE:
            raise argparse.ArgumentTypeError(f"no step {name!r}; {files.nearest(name, MADE)}")
    return named


def _add_cache(commands: Any) -> None:
    described = "build, inspect or verify caches of images and teacher outputs"
    cache = commands.add_parser("cache", help=described).add_subparsers(required=True)
    build = cache.add_parser("build", help="build the image cache of a study, or a part of it")
    build.add_argument("study", help="study file, such as params/digits.yaml")
    build.add_argument("--split", choices=("train", "test"), help="with --part: train, else both")
    build.add_argument("--part", metavar="I/K", help="only the i-th of k equal runs of shards")
    build.add_argument("--workers", type=int, help="processes that decode images")
    build.set_defaults(run=_cache_build)
    outputs = cache.add_parser("outputs", help="store a part of a loaded teacher's outputs")
    outputs.add_argument("study", help="study file, such as params/cifar10.yaml")
    outputs.add_argument("--part", metavar="I/K", required=True, help="the i-th of k equal runs")
    outputs.set_defaults(run=_cache_outputs)
    info = cache.add_parser("info", help="what caches hold, and what is missing")
    verify = cache.add_parser("verify", help="compare every byte with the checksums")
    for parser in (info, verify):
        parser.add_argument("path", nargs="+", help="folder of a cache or of caches, or study file")
    verify.add_argument(
        "--repair", action="store_true", help="make what is damaged an unfinished build"
    )
    info.set_defaults(run=_cache_info)
    verify.set_defaults(run=_cache_verify)


def main() -> int:
    """Parse the command line and run one command."""
    parser = argparse.ArgumentParser(prog="python -m kdlib", description=__doc__)
    commands = parser.add_subparsers(required=True)
    described = "run a study, or a step of it such as `scores`; further options go to snakemake"
    study = commands.add_parser("study", help=described)
    study.add_argument("study", help="study file, such as params/digits.yaml")
    study.add_argument("step", nargs="?", choices=STEPS, help="only this, without the students")
    study.add_argument("--cores", type=int, help="at once; 2 where no profile is given")
    study.add_argument("--profile", help="how and where jobs run, such as profiles/slurm")
    study.set_defaults(run=_study)
    described = "redraw all figures, from the run records or from committed tables"
    figures = commands.add_parser("figures", help=described)
    of = "study file, such as params/digits.yaml; without one, all studies that have either"
    figures.add_argument("study", nargs="?", default="all", help=of)
    figures.set_defaults(run=_figures)
    described = "what the studies found whose tables are committed, a line each"
    commands.add_parser("findings", help=described).set_defaults(run=_findings)
    described = "write the schema of study files for editors, and docs/studies.md"
    commands.add_parser("schema", help=described).set_defaults(run=_schema)
    record = commands.add_parser("record", help="make one further recording (study: recordings)")
    record.add_argument("study", help="study file, such as params/digits.yaml")
    record.add_argument("--model", required=True, help="one of recordings.models")
    record.add_argument("--part", required=True, help="seed=S, fold=K or threshold=K")
    record.set_defaults(run=_record)
    _add_step(commands)
    _add_probe(commands)
    _add_cache(commands)
    arguments, further = parser.parse_known_args()
    if further and arguments.run is not _study:
        parser.error(f"unknown arguments: {' '.join(further)}")
    try:
        return arguments.run(arguments, further)
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is finished is kept: run the same again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
