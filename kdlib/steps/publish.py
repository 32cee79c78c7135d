"""What a study gives to others, as commands: findings, a report, a paper, a pack."""

# Each function is a command of `python -m kdlib`: its docstring is the help, and it imports what it
# needs when it runs.

import argparse
import os
import sys
from pathlib import Path

from kdlib.repro import files
from kdlib.study.load import load_study, study_file


def findings(arguments: argparse.Namespace) -> None:
    """Print the findings of the studies whose tables are committed."""
    from kdlib.compare.findings import findings

    print(*findings(), sep="\n")


def report(arguments: argparse.Namespace) -> None:
    """Write a study's report, one HTML file and a PDF, from its runs or from committed tables."""
    from kdlib.steps.report import write_report

    study = load_study(arguments.study)
    made = write_report(study, study_file(arguments.study), pdf=not arguments.html)
    print(f"{study.name}: the report is made from {made['origin']}")
    print(*(made[kind] for kind in ("html", "pdf") if kind in made), sep="\n")
    if "no_pdf" in made:
        print(made["no_pdf"], file=sys.stderr)


def paper(arguments: argparse.Namespace) -> None:
    """Write the figures and tables of several studies as LaTeX, and a PDF where LaTeX is."""
    from kdlib.compare.committed import is_committed
    from kdlib.steps.paper import compile_paper, write_paper

    paths = [study_file(name) for name in arguments.study]
    if not paths:
        paths = [path for path in files.study_files() if is_committed(load_study(path))]
    path, origins = write_paper([(load_study(path), path) for path in paths])
    print(*origins, path, sep="\n")
    try:
        print(compile_paper(path))
    except RuntimeError as error:
        print(error, file=sys.stderr)


def pack(arguments: argparse.Namespace) -> None:
    """Pack a study's evidence, tables, settings, subsets and datamap into one zip file."""
    from kdlib.steps.pack import pack as write

    study, target = load_study(arguments.study), Path(arguments.file)
    manifest = write(study, study_file(arguments.study), target, arguments.weights)
    size = target.stat().st_size / 1e6
    print(f"{target}: {len(manifest['files']):,} files, {size:.2f} MB, {files.sha256_file(target)}")


def unpack(arguments: argparse.Namespace) -> int:
    """Check a pack, unpack it, and check its records against each other."""
    from kdlib.steps.pack import fetch
    from kdlib.steps.pack import unpack as write
    from kdlib.steps.recheck import recheck

    into = files.workspace() if arguments.into is None else arguments.into.resolve()
    manifest = write(fetch(arguments.source), into, int(arguments.most_gb * 1e9))
    os.environ["KDLIB_HOME"] = str(into)
    path = into / manifest["file"]
    found = recheck(load_study(path))
    print(*found["faults"], sep="\n", end="\n" if found["faults"] else "")
    print(
        f"{into}: {len(manifest['files']):,} files with the hashes of the manifest; "
        f"{found['with_evidence']} of {found['runs']} rows have evidence here, "
        f"{len(found['faults']) or 'no'} fault(s) in it"
    )
    print(f"KDLIB_HOME={into} python -m kdlib report {manifest['file']}")
    return 1 if found["faults"] else 0
