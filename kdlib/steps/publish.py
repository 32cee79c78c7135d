"""What a study gives to others, as commands: figures, findings, a report."""

# Each function is a command of `python -m kdlib`: its docstring is the help, and it imports what it
# needs when it runs.

import argparse
import sys

from kdlib.repro import files
from kdlib.study.load import load_study, study_file


def figures(arguments: argparse.Namespace) -> int:
    """Redraw all figures, from the run records or from committed tables."""
    from kdlib.steps.figures import drawable, redraw

    if arguments.study != "all":
        redraw(load_study(arguments.study))
        return 0
    code = 0
    for path in files.study_files():
        try:
            if drawable(study := load_study(path)):
                redraw(study)
            else:
                print(f"{study.name}: neither runs nor tables are here")
        except (ValueError, OSError, RuntimeError) as error:  # the other studies are still drawn
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            code = 1
    return code


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
