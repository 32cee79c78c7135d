"""`python -m audit STUDY`: make the audit of a study's images, or open it, and write its figure."""

import argparse

from audit import report
from kdlib.compare.committed import is_committed_step
from kdlib.repro.files import study_files
from kdlib.steps.cache import open_images
from kdlib.study import load_study


def main() -> None:
    """Parse the command line, make the audit, write its text and figure."""
    parser = argparse.ArgumentParser(prog="python -m audit", description=__doc__)
    parser.add_argument("study", help="study file, such as params/digits.yaml; or all")
    text = "write text and figure again from the committed table; of all studies that have one"
    parser.add_argument("--redraw", action="store_true", help=text)
    arguments = parser.parse_args()
    if arguments.redraw:
        paths = study_files() if arguments.study == "all" else [arguments.study]
        for study in map(load_study, paths):
            if arguments.study != "all" or is_committed_step(study, "audit"):
                print(*report.redraw(study), sep="\n")
        return
    study = load_study(arguments.study)
    table = report.make(study, open_images(study))
    print(report.write(study, table), *report.draw(study, table).values(), sep="\n")


if __name__ == "__main__":
    main()
