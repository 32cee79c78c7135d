"""Tables of a study's runs, small enough to be committed beside its figures, and enough to redraw
them where the runs are not.

`figures/<study>/tables/<name>.parquet`, and `tables/<step>/<name>.parquet` for the figures of other
steps than the comparison, hold a hash of their content and the settings of the study they were
compiled from; a file that was changed, or that belongs to other settings, is refused. Times,
devices and commits stand in no committed file: the same study gives the same bytes again.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.repro import files
from kdlib.repro.commands import run_to_make
from kdlib.repro.tables import read_parquet, write_parquet
from kdlib.study.evaluation import AXES
from kdlib.study.fingerprints import dumped
from kdlib.study.study import Study

NAMES = ("results", "curves", "probes")
# Step -> its tables, and the sections of a study file that they depend on
STEPS = {
    "datamap": ("points", "regions", "classes", "images"),
    "scores": ("correlations", "runs", "stability", "models", "pairs"),
    "noise": ("detectors", "curves", "over_epochs", "rules", "labels", "images"),
    "near": ("images",),
    "audit": ("exhibits",),
}
SECTIONS = {
    "datamap": ("data", "teacher", "dynamics"),
    "scores": ("data", "dynamics", "recordings"),
    "noise": ("data", "dynamics", "recordings"),
    "near": ("data", "teacher"),
    "audit": ("data",),
}
POINTS = 8_000  # rows of all curves together, where each then has between LEAST and MOST
LEAST, MOST = 12, 40

# keys of `compare` that are read after the tables are compiled
READ_LATER = ("baseline", "objective", "margin", "confidence_level")


def committed_folder(study: Study) -> Path:
    """Folder of a study's committed tables."""
    return study.figures / "tables"


def is_committed(study: Study) -> bool:
    """Whether any table of the study's comparison is committed."""
    return any((committed_folder(study) / f"{name}.parquet").is_file() for name in NAMES)


def is_committed_step(study: Study, step: str) -> bool:
    """Whether any table of a step of `STEPS` is committed."""
    return any((committed_folder(study) / step).glob("*.parquet"))


def write_step(study: Study, step: str, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Write the tables of a step of `STEPS`, and return them as `read_step` does. A table that is
    not there is written without rows."""
    settings = _sections(study, step)
    for name in STEPS[step]:
        table = tables.get(name, pd.DataFrame())
        metadata = {"table": f"{step}/{name}", "study": study.name, "settings": settings}
        path = committed_folder(study) / step / f"{name}.parquet"
        write_parquet(path, table, metadata, compression="zstd")
    return read_step(study, step)


def read_step(study: Study, step: str) -> dict[str, pd.DataFrame]:
    """The committed tables of a step.

    Raises: As `read_committed`.
    """
    now = _sections(study, step), _sections(study, step, exclude_defaults=True)
    folder = committed_folder(study) / step
    return {name: _read(study, folder / f"{name}.parquet", f"{step}/{name}", *now)
            for name in STEPS[step]}  # fmt: skip


def _sections(study: Study, step: str, **options: Any) -> dict[str, Any]:
    """The settings that the tables of a step depend on."""
    sections = list(SECTIONS[step])
    if step == "datamap" and study.dynamics.per_seed:
        sections.append("recordings")
    dump = dumped(study, **options)
    return {key: dump[key] for key in sections if key in dump}


def write_committed(study: Study, tables: dict[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Write the tables, and return them as `read_committed` does.

    Figures are drawn from what is returned, so that they are the same with and without the runs.

    Args:
        tables: The tables of `NAMES`; numbers become float32 in `curves` and `probes`, and curves
            are thinned.
    """
    for name in NAMES:
        table = thin(tables[name]) if name == "curves" else tables[name]
        if name in ("curves", "probes"):  # the axis `fraction` keeps its exact value
            measured = table.select_dtypes("float64").columns.drop("fraction")
            table = table.astype(dict.fromkeys(measured, np.float32))
        metadata = {"table": name, "study": study.name, "settings": _settings(study)}
        path = committed_folder(study) / f"{name}.parquet"
        write_parquet(path, table, metadata, compression="zstd")
    return read_committed(study)


def read_committed(study: Study) -> dict[str, pd.DataFrame]:
    """The committed tables of a study.

    Raises: FileNotFoundError for a table that is not there; ValueError for one that was changed, of
        another name, or of other settings than the study file has now, with the difference.
    """
    now = _settings(study), _settings(study, exclude_defaults=True)
    folder = committed_folder(study)
    return {name: _read(study, folder / f"{name}.parquet", name, *now) for name in NAMES}


def _read(
    study: Study, path: Path, name: str, now: dict[str, Any], written: dict[str, Any]
) -> pd.DataFrame:
    """A table that belongs to a name, to the study, and to its settings of now."""
    table, metadata = read_parquet(path)
    belongs = {"table": metadata.get("table"), "study": metadata.get("study")}
    lines = files.difference({"table": name, "study": study.name}, belongs)
    lines += files.difference(now, _completed(metadata.get("settings", {}), now, written))
    if lines:
        raise ValueError(
            f"{path} was compiled before the study was changed (there -> now): "
            f"{'; '.join(lines)}; {run_to_make(study.runs)}, or take the change back"
        )
    return table


def thin(curves: pd.DataFrame) -> pd.DataFrame:
    """Some rows of each run's curve: at steps evenly chosen from those of its cell, the same for
    every seed, the first among them, and at its last step.

    Args:
        curves: One row per run and evaluation: `student strategy fraction objective seed`, `step`
            and numbers.

    Returns: Rows of `curves` in their order: all of a cell that has few steps, else about 12 to 40
        of each run, as many as keep the whole near 8,000 rows.
    """
    runs = curves.groupby([*AXES, "seed"])
    most = int(np.clip(POINTS // max(runs.ngroups, 1), LEAST, MOST))
    kept = curves["step"] == runs["step"].transform("max")
    for _, rows in curves.groupby(list(AXES)):
        steps = np.unique(rows["step"])
        chosen = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
        kept.loc[rows.index[rows["step"].isin(steps[chosen])]] = True
    return curves[kept].reset_index(drop=True)


def _settings(study: Study, **options: Any) -> dict[str, Any]:
    """The settings that the tables depend on."""
    aside = ("recordings", "audit")
    dump = {key: value for key, value in dumped(study, **options).items() if key not in aside}
    for key in READ_LATER:
        dump.get("compare", {}).pop(key, None)
    return dump


def _completed(stored: dict, now: dict, written: dict) -> dict:
    """The stored settings, with the present value of each key that settings did not have yet and
    that the study leaves at its default."""
    whole = {key: value for key, value in now.items() if key not in written} | stored
    for key, value in now.items():
        if isinstance(value, dict) and isinstance(stored.get(key), dict):
            whole[key] = _completed(stored[key], value, written.get(key) or {})
    return whole
