"""The tiny study, changed at will, and what tests do to its records."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from kdlib.dataset.images import Images
from kdlib.repro import files
from kdlib.steps.cache import cache_images
from kdlib.steps.datamap import make_datamap
from kdlib.steps.distill import train_student
from kdlib.steps.folders import student_folder
from kdlib.steps.probe import probe_cell
from kdlib.steps.teacher import make_teacher
from kdlib.study.cells import Cell
from kdlib.study.load import load_study
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[1]  # of the repository
TINY = ROOT / "params" / "tiny.yaml"


def tiny_study(home: Path, **changes: Any) -> Study:
    """The tiny study, some values changed (`section__key=...`), as a file of its own in `home`."""
    content = parse_yaml(TINY.read_text())
    for dotted, value in changes.items():
        *path, key = dotted.split("__")
        place = content
        for part in path:
            place = place[part]
        place[key] = value
    path = home / "params" / "tiny.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return load_study(path)


def make_study(study: Study) -> None:
    """Steps 01 to 05 of a study, without notebooks."""
    images = cache_images(study)
    make_teacher(study, images)
    make_datamap(study, images)
    for cell in study.cells():
        for seed in study.seeds:
            train_student(study, images, cell, seed)
    for cell in study.probed_cells():
        probe_cell(study, images, cell)


def first_run(study: Study) -> Path:
    """The folder of its first student."""
    return student_folder(study, study.cells()[0], study.seeds[0])


def student(study: Study, images: Images, **axes: Any) -> tuple[Cell, dict[str, Any]]:
    """The student of one cell and seed 0, and its evidence."""
    cell = study.cell(**axes)
    return cell, train_student(study, images, cell, 0)


def forge(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change evidence by hand, and seal it again."""
    path = folder / "evidence.json"
    evidence = json.loads(path.read_text())
    change(evidence)
    path.write_text(json.dumps(files.sealed(evidence)))


def flip(path: Path) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)


def files_below(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
