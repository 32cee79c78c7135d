"""Commands of figures and pages: `figures`, `page`, and `pick`, which reads what a page wrote.

As in `kdlib.__main__`, a command imports what it needs when it runs, and its docstring is its help.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdlib.repro import files
from kdlib.study.load import load_study
from kdlib.study.study import Study


def _figures(arguments: argparse.Namespace) -> int:
    """Redraw all figures and pages, from the run records or from committed tables."""
    from kdlib.steps.figures import drawable

    if arguments.study != "all":
        _redraw(load_study(arguments.study))
        return 0
    code = 0
    for path in files.study_files():
        try:
            if drawable(study := load_study(path)):
                _redraw(study)
            else:
                print(f"{study.name}: neither runs nor tables are here")
        except (ValueError, OSError, RuntimeError) as error:  # the other studies are still drawn
            print(f"{path.name}: {type(error).__name__}: {error}", file=sys.stderr)
            code = 1
    return code


def _redraw(study: Study) -> None:
    """Redraw figures, and the page of a datamap that is here."""
    from kdlib.explorer.page import write_page
    from kdlib.steps.figures import redraw

    redraw(study)
    if study.shares is None and (study.runs / "datamap" / "evidence.json").is_file():
        print(write_page(study))


def _page(arguments: argparse.Namespace) -> None:
    """Write a study's datamap as one HTML file that needs no kernel and no network."""
    from kdlib.explorer.page import named_map, write_page

    study = load_study(arguments.study)
    against, name = None, ""
    if arguments.against is not None:
        against, name = named_map(study, arguments.against)
    path = write_page(study, against, name, not arguments.without_images, arguments.megabytes)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def _pick(arguments: argparse.Namespace) -> None:
    """Make a selection that a page wrote the strategy `picked_<name>` of a study."""
    from kdlib.explorer.sent import read_selection

    subset = read_selection(load_study(arguments.study), arguments.file, arguments.name)
    print(f"{subset.strategy}: {len(subset):,} images")


def add_commands(commands: Any, command: Callable[..., Any]) -> None:
    """Add them to the command line.

    Args:
        command: As `_command` of `kdlib.__main__`: makes the parser of a function.
    """
    digits = "params/digits.yaml"
    figures = command(commands, "figures", _figures)
    text = f"study file, such as {digits}; without one, all studies that have either"
    figures.add_argument("study", nargs="?", default="all", help=text)
    page = command(commands, "page", _page, digits)
    text = "a second map, linked: a study file, or a recording such as resnet8/seed=0"
    page.add_argument("--against", metavar="MAP", help=text)
    text = "size of the small images of all points, at most; 3"
    page.add_argument("--megabytes", type=float, default=3.0, help=text)
    page.add_argument("--without-images", action="store_true", help="points alone")
    pick = command(commands, "pick", _pick, digits)
    pick.add_argument("file", type=Path, help="that a page wrote")
    pick.add_argument("--name", help="of the selection; without it, that in the file")
