"""The command that makes a cache again: of images, which studies share, or of teacher outputs."""

import contextlib
from pathlib import Path

from kdlib.repro import commands, files
from kdlib.study.data import cache_folder
from kdlib.study.load import load_study


def run_to_make(folder: Path, part: tuple[int, int] | None = None) -> str:
    """`run` and the command that makes a cache, or a part (i, k) of it, which is not there or
    unfinished.

    Args:
        folder: Of outputs, below `runs/`, or of images, which do not lie there.
    """
    if Path(folder).absolute().is_relative_to(files.workspace() / "runs"):
        return commands.run_to_make(folder)
    of_part = f" --part {part[0]}/{part[1]}" if part else ""
    name = _study_of(folder)
    if name is None:
        return (
            f"run `{commands.KDLIB} cache build STUDY{of_part}` with a study file of these images"
        )
    return f"run `{commands.KDLIB} cache build {name}{of_part}`"


def delete_and_run(folder: Path) -> str:
    """The same of a cache that is there and cannot be trusted."""
    return f"delete {folder}, then {run_to_make(folder)}"


def repair_and_run(folder: Path) -> str:
    """The same of a cache that is partly damaged: what is whole is kept."""
    return (
        f"run `{commands.KDLIB} cache verify --repair {folder}`, which keeps what is whole, then "
        f"{run_to_make(folder)}"
    )


def _study_of(folder: Path) -> str | None:
    """The first study file that asks for the images of a cache."""
    folder = Path(folder).absolute()
    if folder.is_relative_to(files.workspace() / "cache"):
        for path in files.study_files(miniatures=True):
            with contextlib.suppress(ValueError, OSError):  # a study file that is wrong
                study = load_study(path)
                data = (study.data, *study.probe.others.values())
                if any(folder.is_relative_to(cache_folder(images)) for images in data):
                    return str(path.relative_to(files.workspace()))
    return None
