"""Rows of the parts of `gpu.py`: JSON lines, on the disk as soon as they are measured."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Rows:
    """Appends the rows of one part to `rows.jsonl`.

    Attributes:
        part: Its name, the key `part` of every row.
    """

    def __init__(self, folder: Path, part: str) -> None:
        self.part, self._path = part, Path(folder) / "rows.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, row: str, **values: Any) -> None:
        """Append a row of kind `row`; it is on the disk when this returns."""
        content = {"part": self.part, "row": row, "unix_s": round(time.time(), 3)} | values
        with open(self._path, "a") as file:  # one write each: several processes may append
            file.write(json.dumps(content) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """All rows of the `.jsonl` files in a folder and in those of its parts; a line that was cut by
    a kill is a row `cut`."""
    rows, folder = [], Path(folder)
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("*/*.jsonl")]):
        for line in path.read_text(errors="replace").splitlines():
            try:
                content = json.loads(line)
            except json.JSONDecodeError:
                content = {"row": "cut"}
            if not isinstance(content, dict):
                content = {"value": content}
            part = path.stem if path.parent == folder else path.parent.name
            rows.append({"part": part, "row": "row"} | content)
    return rows


def first_line(error: BaseException | str) -> str:
    """The type and the first line of an error, at most 300 characters."""
    text = str(error).strip().splitlines()
    head = "" if isinstance(error, str) else f"{type(error).__name__}: "
    return (head + (text[0] if text else ""))[:300]
