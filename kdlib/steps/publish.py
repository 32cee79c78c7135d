"""What a study gives to others, as commands: findings, a report."""

# Each function is a command of `python -m kdlib`: its docstring is the help, and it imports what it
# needs when it runs.

import argparse
import sys

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
