"""The golden study: a whole study whose every number is committed and compared to the bit.

    python tests/golden.py

makes it anew and writes golden.json. That is right only after a change that is meant to change
numbers, such as another definition, and the commit says which; after any other change a number that
differs is the sign of a mistake.
"""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.repro import files
from kdlib.repro.processor import KERNELS, LIBRARIES
from kdlib.study.load import load_study

STUDY = Path(__file__).with_name("golden.yaml")
GOLDEN = Path(__file__).with_name("golden.json")
COMMAND = "python tests/golden.py"
STEPS = "cache,teacher,datamap,distill,probe,compare"
LIBRARY_NAMES = ("numpy", "scipy", "scikit-learn", "torch")

AXES = ["student", "strategy", "fraction", "objective"]
AGAINST = [*AXES, *(f"against_{axis}" for axis in AXES[1:])]
# The columns that say which row it is. Other columns are numbers, or are named in `ASIDE`.
KEYS = {
    "results": [*AXES, "seed"],
    "probes": [*AXES, "seed", "step", "on", "layer", "probe"],
    "strategies": AGAINST,
    "objectives": AGAINST,
}
# Circumstances, sentences, and hashes of settings and files, which change without a number; and
# numbers that are younger than golden.json, and follow from its weights
ASIDE = {
    "test_precision", "test_recall", "test_f1", "parameters", "megabytes", "multiply_adds",
    "run", "command", "reason", "device", "threads", "git_commit", "git_clean", "code_sha256",
    "versions", "settings_sha256", "checkpoint_sha256", "duplicates",
}  # fmt: skip

Table = dict[str, dict[str, Any]]  # row -> column -> value


def made(home: Path) -> dict[str, Table]:
    """Make the study in an empty workspace, in a process that computes with AVX2 alone, and read
    its numbers."""
    study = load_study(STUDY)
    points = [dict(cell.items()) | {"seed": s} for cell in study.cells() for s in study.seeds]
    told = subprocess.run(
        [sys.executable, "-m", "kdlib", "step", STEPS, str(STUDY), "--points", "-"],
        input="\n".join(map(json.dumps, points)), capture_output=True, text=True, cwd=home,
        env=os.environ | KERNELS | LIBRARIES | {"KDLIB_HOME": str(home), "TQDM_DISABLE": "1"},
    )  # fmt: skip
    if told.returncode:
        raise RuntimeError(f"the golden study was not made:\n{told.stdout}\n{told.stderr}")
    return numbers(home / "runs" / study.name)


def numbers(runs: Path) -> dict[str, Table]:
    """Every number of a study's tables, and a hash of each column of its datamap."""
    tables = {
        name: _rows(pd.read_parquet(runs / "compare" / f"{name}.parquet"), keys)
        for name, keys in KEYS.items()
    }
    datamap = pd.read_parquet(runs / "datamap" / "datamap.parquet").select_dtypes(["number", bool])
    hashes = {name: files.sha256_array(datamap[name].to_numpy()) for name in datamap}
    return tables | {"datamap": {name: {"sha256": value} for name, value in hashes.items()}}


def _rows(table: pd.DataFrame, keys: list[str]) -> Table:
    rows = {}
    for row in table.drop(columns=ASIDE & set(table.columns)).to_dict("records"):
        name = " ".join(str(row.pop(key)) for key in keys)
        if name in rows:
            raise ValueError(f"two rows are named {name}; expected keys that tell them apart")
        rows[name] = {column: _plain(value) for column, value in row.items()}
    return rows


def _plain(value: Any) -> Any:
    """A value as JSON holds it exactly; NaN, which equals nothing, as a text."""
    value = value.item() if isinstance(value, np.generic) else value
    return str(value) if value != value else value


def changes(before: dict[str, Table], after: dict[str, Table]) -> list[str]:
    """A line for each cell that differs: `table / row / column: before -> after`."""
    lines = []
    for table in sorted(before.keys() | after.keys()):
        old, new = before.get(table, {}), after.get(table, {})
        for row in [*old, *(row for row in new if row not in old)]:
            was, now = old.get(row, {}), new.get(row, {})
            lines += [
                f"{table} / {row} / {column}: {was.get(column)} -> {now.get(column)}"
                for column in dict.fromkeys([*was, *now])
                if was.get(column) != now.get(column)
            ]
    return lines


def versions() -> dict[str, str]:
    """Of the libraries that compute."""
    return {name: version(name) for name in LIBRARY_NAMES}


def read() -> dict[str, Any]:
    """What is committed: `versions`, and the tables."""
    return json.loads(GOLDEN.read_text())


def write(tables: dict[str, Table]) -> None:
    """Write the golden file, one row of a table a line."""
    parts = [f'"versions": {json.dumps(versions())}']
    for name, rows in tables.items():
        lines = ",\n".join(f"  {json.dumps(row)}: {json.dumps(v)}" for row, v in rows.items())
        parts.append(f'"{name}": {{\n{lines}\n}}')
    GOLDEN.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        tables = made(Path(home))
    lines = changes({k: v for k, v in read().items() if k != "versions"}, tables)
    write(tables)
    print(*lines[:40], f"{len(lines)} cells changed in {GOLDEN}", sep="\n")
