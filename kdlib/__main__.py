"""Command line: `python -m kdlib study | demo | status | figures | page | pick | report |
paper | findings | pack | unpack | schema | record | step | probe | near | cache`."""

# Commands import what they need when they run, so that help and errors come at once. The docstring
# of a command's function is its help; the function returns the exit code, or None for 0.

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdlib.explorer.commands import add_commands
from kdlib.repro import files
from kdlib.steps import publish
from kdlib.study.cells import Cell, checked_seeds
from kdlib.study.data import parse_part
from kdlib.study.evaluation import AXES, Probe
from kdlib.study.load import load_study, study_file
from kdlib.study.models import Model
from kdlib.study.study import STEPS, Study

STEP_COMMANDS = ("cache", "teacher", "datamap", "distill", "probe", "compare")

OPTIONS = (*AXES, "shards")  # of `step distill`, that name a cell
# options of Snakemake after which there may be no comparison
PARTLY = {"--until", "-U", "--omit-from", "-O", "--dry-run", "--dryrun", "-n", "--touch", "-t",
          "--summary", "-S"}  # fmt: skip


def _study(arguments: argparse.Namespace) -> int | None:
    """Run a study, or a step of it such as `scores`; further options go to snakemake."""
    from kdlib.steps.pipeline import closing_message, run_pipeline

    path, options, step = study_file(arguments.study), arguments.further, arguments.step
    if arguments.miniature:
        from kdlib.steps.miniature import write_miniature

        path = write_miniature(path)
        print(f"The miniature: {path}", file=sys.stderr)
    study = load_study(path)
    code = run_pipeline(study, path, step, arguments.cores, arguments.profile, options)
    if not PARTLY.isdisjoint(option.split("=")[0] for option in options):
        return code
    if message := closing_message(load_study(path), step, code):
        print(f"\n{message}", file=sys.stderr)
        return code or 1
    if step is None:
        _print_summary(study)
    print(f"Figures and tables: {study.figures}\nExecuted notebooks and runs: {study.runs}")


def _print_summary(study: Study) -> None:
    """Print the sentences of a finished study's summary, from its tables of now."""
    from kdlib.compare.committed import read_committed
    from kdlib.compare.comparisons import comparisons
    from kdlib.compare.report import summary

    lines = summary(study, comparisons(study, read_committed(study))).splitlines()
    print(*[line for line in lines if not line.startswith("|")], sep="\n")


def _demo(arguments: argparse.Namespace) -> int:
    """Open the map of the digits before any training; further options go to JupyterLab."""
    from kdlib.explorer.demo import demo

    return demo(arguments.further)


def _status(arguments: argparse.Namespace) -> int:
    """Say which steps of a study are not finished, and why."""
    from kdlib.steps.done import unfinished

    study = load_study(arguments.study)
    found = unfinished(study)
    for folder, why in found.items():
        print(f"{folder.relative_to(files.workspace())}: {why}")
    print(f"{study.name}: {len(found) or 'no'} run(s) are not finished")
    return 1 if found else 0


def _schema(arguments: argparse.Namespace) -> None:
    """Write the schema of study files for editors, and docs/studies.md."""
    from kdlib.study.schema import write

    print(*write(), sep="\n")


def _record(arguments: argparse.Namespace) -> None:
    """Make one further recording (study: recordings)."""
    from kdlib.steps.cache import open_images
    from kdlib.steps.recordings import record

    study = load_study(arguments.study)
    record(study, open_images(study), arguments.model, arguments.part)


def _step(arguments: argparse.Namespace) -> int:
    """Make steps of a study without notebooks; teachers and students also under torchrun."""
    from kdlib.steps.step_command import run_steps
    from kdlib.trainer.distributed import joined

    _refuse_unused(arguments)
    study, code = load_study(arguments.study), 0
    with joined(study.compute.device):
        points = _points(arguments, study)
        for row in run_steps(study, arguments.step, points, arguments.teacher, arguments.built):
            print(json.dumps(row), flush=True)  # a line for each step
            code = max(code, int("error" in row))
    return code


def _refuse_unused(arguments: argparse.Namespace) -> None:
    """Refuse options of `step` that none of the steps reads.

    Raises: ValueError.
    """
    students = (*OPTIONS, "seed")
    of_step = {"distill": (*students, "points"), "teacher": ("teacher",), "cache": ("built",)}
    for step, names in of_step.items():
        given = [name for name in names if getattr(arguments, name) not in (None, False)]
        if given and step not in arguments.step:
            raise ValueError(
                f"--{given[0]} is read by step {step} alone, and the step is "
                f"{', '.join(arguments.step)}: leave it out, or add the step"
            )
    if arguments.points is not None:
        for name in students:
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} and --points both name students: give one of them")


def _points(arguments: argparse.Namespace, study: Study) -> Iterator[tuple[Cell, int]]:
    """The cells and seeds of `step distill`: of a file, of standard input, or one cell."""
    from kdlib.steps.step_command import read_points

    if arguments.points == "-":
        yield from read_points(iter(sys.stdin.readline, ""), study)  # each line as it comes
    elif arguments.points is not None:
        yield from read_points(Path(arguments.points).read_text().splitlines(), study)
    else:
        cell = study.cell(**{axis: getattr(arguments, axis) for axis in OPTIONS})
        for seed in [0] if arguments.seed is None else checked_seeds(arguments.seed):
            yield cell, seed


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _named_steps(text: str) -> list[str]:
    for name in text.split(","):
        if name not in STEP_COMMANDS:
            near = files.nearest(name, STEP_COMMANDS)
            raise argparse.ArgumentTypeError(f"no step {name!r}; {near}")
    return text.split(",")


def _probe(arguments: argparse.Namespace) -> None:
    """Probe a weight file from outside, print a table."""
    from pydantic import ValidationError

    from kdlib.dataset.pixels import Pixels
    from kdlib.steps.cache import open_images
    from kdlib.steps.probe_network import probe_text, probe_weights

    study, pixels = load_study(arguments.study), None
    given = {key: getattr(arguments, key) for key in ("layers", "few_shot")}
    asked = {key: value for key, value in given.items() if value is not None}
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
    probes = probe_weights(study, open_images(study), model, arguments.weights, pixels)
    print(probe_text(probes))


def _near(arguments: argparse.Namespace) -> None:
    """List images that look alike to the teacher, after step 02."""
    from kdlib.compare.text import table
    from kdlib.steps.cache import open_images
    from kdlib.steps.figures import draw_near
    from kdlib.steps.near import near_duplicates, near_file

    study = load_study(arguments.study)
    images = open_images(study)
    pairs = near_duplicates(study, images, arguments.similarity, arguments.most)
    print(table(pairs.columns, pairs.head(arguments.show).itertuples(index=False)))
    print(f"{len(pairs):,} pairs: {near_file(study)}")
    print(*(f"drawn: {path}" for path in draw_near(study, images, pairs).values()), sep="\n")


def _cache_build(arguments: argparse.Namespace) -> None:
    """Build the image cache of a study, or a part of it."""
    from kdlib.cache.info import build_caches

    study = load_study(arguments.study)
    build_caches(study, arguments.split, arguments.part, arguments.workers)


def _cache_seal(arguments: argparse.Namespace) -> None:
    """Make what an unfinished build has of the training images a smaller cache to learn from."""
    from kdlib.cache.info import seal

    seal(load_study(arguments.study))


def _cache_outputs(arguments: argparse.Namespace) -> None:
    """Store a part of a loaded teacher's outputs; or print what storing them costs."""
    from kdlib.cache.info import state
    from kdlib.cache.shards import Cache
    from kdlib.steps.cache import open_images
    from kdlib.steps.output_costs import output_costs
    from kdlib.steps.teacher_outputs import store_part

    study = load_study(arguments.study)
    if arguments.costs:
        table, number = output_costs(study, open_images(study)), "{:,}".format
        printed = {"index": False, "float_format": "{:.4g}".format}
        print(table.to_string(formatters={"stored_bytes": number}, **printed))
        return
    for stored in store_part(study, open_images(study), parse_part(arguments.part)):
        print(state(Cache(stored.folder)))  # all parts that are there


def _cache_info(arguments: argparse.Namespace) -> None:
    """Print what caches hold, and what is missing."""
    from kdlib.cache.info import describe, find_caches

    for folder in (folder for path in arguments.path for folder in find_caches(path)):
        print(describe(folder))


def _cache_check(arguments: argparse.Namespace) -> int:
    """List every odd image of a study's data before a byte is built."""
    from kdlib.cache.check import check_study

    good = check_study(load_study(arguments.study), arguments.workers, arguments.all)
    return 0 if good else 1


def _cache_verify(arguments: argparse.Namespace) -> int:
    """Compare every byte with the checksums."""
    from kdlib.cache.info import compare_source, find_caches, verify_cache

    whole = True
    for path in arguments.path:
        if arguments.source and arguments.repair:
            raise ValueError("--repair mends shards, and --source compares images: give one")
        if arguments.source and Path(path).suffix not in (".yaml", ".yml"):
            raise ValueError(f"--source needs a study file, which names the images; {path} is none")
        if arguments.source:
            whole &= compare_source(load_study(path))
            continue
        for folder in find_caches(path):
            whole &= verify_cache(folder, arguments.repair)
    return 0 if whole else 1


def _command(commands: Any, name: str, run: Any, study: str = "") -> Any:
    """The parser of a command, whose help is what its function says; with `study`, its first
    argument is a study file, described so."""
    about = run.__doc__.rstrip(".")
    parser = commands.add_parser(name, help=about[0].lower() + about[1:], allow_abbrev=False)
    parser.set_defaults(run=run, parser=parser)
    if study:
        parser.add_argument("study", help=f"study file, such as {study}")
    return parser


def _add_commands(commands: Any) -> None:
    digits = "params/digits.yaml"
    study = _command(commands, "study", _study, digits)
    study.add_argument("step", nargs="?", choices=STEPS, help="only this, without the students")
    study.add_argument("--cores", type=_count, help="at once; 2 where no profile is given")
    study.add_argument("--profile", help="how and where jobs run, such as profiles/slurm")
    text = "few images, few steps, small networks: does the whole study run here?"
    study.add_argument("--miniature", action="store_true", help=text)
    _command(commands, "demo", _demo)
    _command(commands, "status", _status, digits)
    add_commands(commands, _command)  # figures, page, pick
    report = _command(commands, "report", publish.report, digits)
    report.add_argument("--html", action="store_true", help="no PDF")
    _command(commands, "findings", publish.findings)
    paper = _command(commands, "paper", publish.paper)
    text = f"study files, such as {digits}; without one, all whose tables are committed"
    paper.add_argument("study", nargs="*", help=text)
    pack = _command(commands, "pack", publish.pack, digits)
    pack.add_argument("file", help="the zip file to write")
    pack.add_argument("--weights", action="store_true", help="also those of teacher and students")
    unpack = _command(commands, "unpack", publish.unpack)
    text = "a pack, or hf://datasets/OWNER/NAME[@REVISION]/FILE of the Hugging Face hub"
    unpack.add_argument("source", help=text)
    unpack.add_argument("--into", type=Path, help="the folder of a workspace; else this one")
    unpack.add_argument("--most-gb", type=float, default=4, help="that may be written; 4")
    _command(commands, "schema", _schema)
    record = _command(commands, "record", _record, digits)
    record.add_argument("--model", required=True, help="one of recordings.models")
    record.add_argument("--part", required=True, help="seed=S, fold=K or threshold=K")
    _add_step(_command(commands, "step", _step))
    probe = _command(commands, "probe", _probe, "params/cifar10.yaml: images and settings")
    probe.add_argument("--weights", type=Path, required=True, help="safetensors or a checkpoint")
    probe.add_argument("--model", required=True, help="network of the weights, as in a study")
    probe.add_argument("--options", type=json.loads, default={}, help="its options, as JSON")
    probe.add_argument("--mean", type=float, nargs="+", help="of each channel, as it was trained")
    probe.add_argument("--std", type=float, nargs="+", help="likewise; else those of the study")
    probe.add_argument("--layers", nargs="+", help="features stage1 ...; else the study's")
    probe.add_argument("--few-shot", type=int, nargs="+", help="examples of each class")
    near = _command(commands, "near", _near, digits)
    near.add_argument("--similarity", type=float, default=0.99, help="smallest cosine; 0.99")
    near.add_argument("--most", type=int, default=1000, help="pairs that are kept; 1000")
    near.add_argument("--show", type=int, default=20, help="pairs that are printed; 20")
    text = "build, inspect or verify caches of images and teacher outputs"
    _add_cache(commands.add_parser("cache", help=text).add_subparsers(required=True))


def _add_step(step: Any) -> None:
    text = f"one of {', '.join(STEP_COMMANDS)}, or several separated by commas"
    step.add_argument("step", type=_named_steps, help=text)
    step.add_argument("study", help="study file, such as params/digits.yaml")
    for axis in OPTIONS:
        step.add_argument(f"--{axis}", type={"fraction": float, "shards": int}.get(axis, str))
    step.add_argument("--seed", type=int, action="append", help="0; given twice, one after another")
    text = 'of distill: a file of lines {"strategy": "easy", ..., "seed": 0}; - is standard input'
    step.add_argument("--points", metavar="FILE", help=text)
    step.add_argument("--teacher", help="of teacher: only this one of the study's `teachers`")
    text = "of cache: it is there (unpacked, say); do not open the data set"
    step.add_argument("--built", action="store_true", help=text)


def _add_cache(commands: Any) -> None:
    build = _command(commands, "build", _cache_build, "params/digits.yaml")
    build.add_argument("--split", choices=("train", "test"), help="with --part: train, else both")
    build.add_argument("--part", metavar="I/K", help="only the i-th of k equal runs of shards")
    build.add_argument("--workers", type=int, help="processes that decode images")
    _command(commands, "seal", _cache_seal, "params/cifar10.yaml")
    outputs = _command(commands, "outputs", _cache_outputs, "params/cifar10.yaml")
    what = outputs.add_mutually_exclusive_group(required=True)
    what.add_argument("--part", metavar="I/K", help="the i-th of k equal runs")
    text = "print bytes and seconds of each way to read the teacher, and store nothing"
    what.add_argument("--costs", action="store_true", help=text)
    check = _command(commands, "check", _cache_check, "params/cifar10.yaml")
    check.add_argument("--workers", type=int, help="processes that read images")
    text = "name every image, and compare the pixels of any number of them"
    check.add_argument("--all", action="store_true", help=text)
    info = _command(commands, "info", _cache_info)
    verify = _command(commands, "verify", _cache_verify)
    for parser in (info, verify):
        parser.add_argument("path", nargs="+", help="folder of a cache or of caches, or study file")
    text = "make what is damaged an unfinished build"
    verify.add_argument("--repair", action="store_true", help=text)
    text = "of study files: compare the images they name with what was cached of them"
    verify.add_argument("--source", action="store_true", help=text)


def main() -> int:
    """Parse the command line and run one command."""
    files.settle()
    parser = argparse.ArgumentParser(
        prog="python -m kdlib", description=__doc__, allow_abbrev=False
    )
    _add_commands(parser.add_subparsers(required=True))
    arguments, further = parser.parse_known_args()
    if further and arguments.run not in (_study, _demo):
        unknown = [option for option in further if option.startswith("-")]
        near = ""
        if unknown:
            known = arguments.parser._option_string_actions
            near = f"; {files.nearest(unknown[0].split('=')[0], known)}"
        arguments.parser.error(f"unknown arguments: {' '.join(further)}{near}")
    arguments.further = further  # options of Snakemake
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; what is finished is kept: run the same again to go on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
