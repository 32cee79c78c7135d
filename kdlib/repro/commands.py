"""The command and the notebook that make a file again, by the place of the file.

Messages about something missing, unfinished, changed or of another format name them. Steps write
below `runs/<study>/`, tables to commit lie in `figures/<study>/tables/`.
"""

import shlex
from pathlib import Path

from kdlib.repro import files

KDLIB = "python -m kdlib"
_COMMANDS = {  # of a step's folder, with the study file
    "cache": "step cache {}", "teacher": "step teacher {}", "dynamics": "step teacher {}",
    "datamap": "step datamap {}", "compare": "step compare {}", "measured.json": "step compare {}",
    "scores": "study {} scores", "noise": "study {} noise", "audit": "study {} audit",
}  # fmt: skip
_NOTEBOOKS = {  # of a command: its step
    "cache": "01_cache", "teacher": "02_teacher", "datamap": "03_datamap", "distill": "04_distill",
    "probe": "05_probe", "compare": "06_compare", "record": "07_scores", "scores": "07_scores",
    "noise": "08_noise", "audit": "09_audit",
}  # fmt: skip
_MAP = "notebooks/03_datamap.ipynb, opened by `make lab`"
_N_AXES = 4  # of a student's folder, before its seed


def run_to_make(path: Path) -> str:
    """`run` and the command that makes a file or folder which is not there, unfinished, or made
    with other settings, or the notebook that does. A picked selection is made by hand.

    Args:
        path: Of the file, or of a folder above it.
    """
    return _made_by(path)[1]


def delete_and_run(path: Path) -> str:
    """The same of a file that is there and cannot be used: first the folder of its run has to be
    deleted, or of stored teacher outputs, since a step makes nothing again whose evidence is there.
    """
    folder, command = _made_by(path)
    return f"delete {folder}, then {command}"


def _made_by(given: Path) -> tuple[Path, str]:
    """The folder of the run that wrote a file, and how to write it."""
    home, path = files.workspace(), Path(given).absolute()
    for root in (home / "runs", home / "figures"):
        if path.is_relative_to(root) and path != root:
            name, *parts = path.relative_to(root).parts
            known = [file for file in files.study_files(miniatures=True) if file.stem == name]
            study = known[0].relative_to(home) if known else f"params/{name}.yaml"
            study = shlex.quote(str(study))
            if root.name == "figures":
                return path, f"run {_said(f'step compare {study}')}"
            if parts[:1] == ["selections"]:
                return path, f"save a selection named {path.stem} in the map: {_MAP}"
            depth, command = _of_run(root / name, parts, study)
            depth += len(parts) > depth and parts[depth].startswith("outputs-")
            return root.joinpath(name, *parts[:depth]), f"run {_said(command)}"
    return given, f"run `{KDLIB} study STUDY` with the study file that it belongs to"


def _of_run(runs: Path, parts: list[str], study: str) -> tuple[int, str]:
    """How many parts of a path below a study's runs name its run, and the run's command."""
    step, *below = parts or [""]
    if step == "teachers" and below:
        if not below[1:2] or not below[1].startswith("subset="):
            return 2, f"step teacher {study} --teacher {shlex.quote(below[0])}"
        student = _student_of(runs, below)
        return 4, _of_run(runs, student, study)[1] if student else f"study {study}"
    if step == "distill" and len(below) > _N_AXES:
        pairs = (part.split("=", 1) for part in below[: _N_AXES + 1])
        axes = shlex.join(word for axis, value in pairs for word in (f"--{axis}", value))
        return _N_AXES + 2, f"step distill {study} {axes}"
    if step == "recorded" and len(below) > 1:
        model = shlex.quote(below[0].removeprefix("model="))
        return 3, f"record {study} --model {model} --part {shlex.quote(below[1])}"
    if step == "datamaps" and below:
        return 2, f"step datamap {study}"
    if step == "probe":
        return (3 if below[:1] == ["once"] else _N_AXES + 1), f"step probe {study}"
    if step in _COMMANDS:
        return 1, _COMMANDS[step].format(study)
    return len(parts), f"study {study}"


def _said(command: str) -> str:
    """A command in a message, and the notebook that does the same, where it is a step of one."""
    first, *rest = shlex.split(command)
    step = {"step": rest[0], "study": rest[-1]}.get(first, first)
    notebook = _NOTEBOOKS.get(step)
    same = f" or notebooks/{notebook}.ipynb with this study" if notebook else ""
    return f"`{KDLIB} {command}`{same}"


def _student_of(runs: Path, below: list[str]) -> list[str] | None:
    """The place of a student whose run makes a teacher of its subset, which lies in
    `teachers/<name>/subset=.../seed=...`."""
    name, subset, seed = below[0], below[1].removeprefix("subset="), below[2:3]
    for path in sorted(runs.glob(f"distill/*/*/*/*/{seed[0] if seed else '*'}/settings.json")):
        try:
            settings = files.read_json(path)
            asked, drawn = settings["step"]["objective"], settings["inputs"]["subset"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged as well: another may be whole
            continue
        if asked.get("teacher") == name and drawn.startswith(subset):
            return list(path.parent.relative_to(runs).parts)
    return None
