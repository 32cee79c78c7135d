"""`python -m audit STUDY`: make the audit of a study's images, or open it, and write its figure."""

import argparse

from audit import report
from kdlib.steps.cache import open_images
from kdlib.study import load_study


def main() -> None:
    """Parse the command line, make the audit, write its text and figure."""
    parser = argparse.ArgumentParser(prog="python -m audit", description=__doc__)
    parser.add_argument("study", help="study file, such as params/digits.yaml")
    study = load_study(parser.parse_args().study)
    table = report.make(study, open_images(study))
    print(report.write(study, table), *report.draw(study, table).values(), sep="\n")


if __name__ == "__main__":
    main()
