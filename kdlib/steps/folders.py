"""Where each run of a study lies, the settings it is made with, and the precision of trainings."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.repro import files
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES
from kdlib.study.fingerprints import dumped
from kdlib.study.study import Study

# keys of a training that stand in the settings of recordings also without a value
_NULLS: dict[str, Any] = dict.fromkeys(
    ("steps", "epochs", "clip_norm", "ema", "early_stopping", "evaluate_every_steps")
) | {"augment": dict.fromkeys(("resized_crop", "colour_jitter"))}


def teacher_folder(study: Study, name: str | None = None) -> Path:
    """The folder of the run of the study's teacher, or of a further one."""
    return study.upstream.runs / "teacher" if name is None else study.runs / "teachers" / name


def dynamics_settings(study: Study) -> dict[str, Any]:
    """The settings of the recorded network, where it is not the teacher."""
    settings = study.upstream.step_settings("teacher")
    return {key: settings[key] for key in ("dynamics", "compute")}


def student_folder(study: Study, cell: Cell, seed: int) -> Path:
    """The folder of the run of one cell and seed."""
    return study.runs / "distill" / cell.path / f"seed={seed}"


def axes_of(study: Study, cell: Cell) -> dict[str, Any]:
    """The axes of a cell as tables hold them: that of so many shards has its share of the cache's
    shards as `fraction`, and `shards`."""
    if cell.shards is None:
        return dict(cell.items())
    index, *_ = sorted((study.upstream.cache / "train").glob("index*.json"))
    header = files.read_json(index)["header"]
    n, (i, k) = -(-header["n_examples"] // header["shard_size"]), study.data.part_of("train")
    size = {"fraction": cell.shards / (n * i // k - n * (i - 1) // k), "shards": cell.shards}
    axes = {axis: (dict(cell.items()) | size)[axis] for axis in AXES}
    return axes | size


def counted(table: pd.DataFrame) -> pd.DataFrame:
    """A table of cells whose column `shards`, if it has one, is 0 of those that take a fraction."""
    if "shards" not in table:
        return table
    return table.assign(shards=table["shards"].fillna(0).astype(np.int64))


def student_settings(study: Study, cell: Cell, seed: int) -> dict[str, Any]:
    """The settings of the student of one cell and seed."""
    return study.step_settings("distill", cell) | {"seed": seed}


def datamap_folder(study: Study, seed: int | None = None) -> Path:
    """The folder of the datamap by which the subsets of a seed are chosen; None: of the study's."""
    of_seed = seed is not None and study.dynamics.per_seed
    return study.upstream.runs / (f"datamaps/seed={seed}" if of_seed else "datamap")


def datamap_settings(study: Study, seed: int | None = None) -> dict[str, Any]:
    """The settings of the same datamap."""
    of_seed = seed is not None and study.dynamics.per_seed
    return study.upstream.step_settings("datamap") | ({"seed": seed} if of_seed else {})


def recording_of_seed(study: Study, seed: int) -> tuple[str, str]:
    """Of a study with `per_seed`, the recording (model, part), of the study that it shares with,
    whose scores choose the subsets of a seed."""
    return next(iter(study.upstream.recordings.models)), f"seed={seed}"


def precision_file(study: Study) -> Path:
    """Where the measured precisions of a study are kept."""
    return study.runs / "precision.json"


def measured_precision(study: Study) -> dict[str, Any]:
    """What was measured for the compute settings of now: `taken`; the `seconds` of a step by
    precision; their `ratio`, float32 by the other one; of which `student`, on how many `images`, on
    which `device`. Empty where nothing was."""
    path = precision_file(study)
    kept = files.read_json(path, lambda path: f"delete {path}") if path.is_file() else {}
    return kept if kept.get("asked") == dumped(study)["compute"] else {}


def precision_input(study: Study) -> dict[str, str]:
    """The precision that was decided for `compute.precision: auto`, as an input of every training;
    nothing before that, and for other precisions."""
    kept = measured_precision(study)
    return {"precision": kept["taken"]} if kept and study.compute.precision == "auto" else {}


def probe_folder(study: Study, cell: Cell) -> Path:
    """The folder of the probes of one cell."""
    return study.runs / "probe" / cell.path


def recording_folder(study: Study, model: str, part: str) -> Path:
    """The folder of one recording."""
    return study.runs / "recorded" / f"model={model}" / part


def recording_settings(study: Study, model: str, part: str) -> dict[str, Any]:
    """The settings of one recording."""
    asked, (kind, number) = study.recordings, part.split("=")
    of_first = kind == "seed" and model == next(iter(asked.models))
    training = (asked.training or study.recorded_training).model_dump(
        mode="json", exclude_none=True
    )
    return {
        "model": asked.models[model].model_dump(mode="json"),
        "part": part,
        "folds": asked.folds if kind == "fold" else None,
        "seed": int(number) if kind == "seed" else asked.seeds[0],
        "gradient_epoch": study.dynamics.gradient_epoch if of_first else None,
        "observed": study.dynamics.observed if kind != "fold" else None,
        "logits": study.dynamics.logits and kind == "seed",
        "compute": study.step_settings("record")["compute"] | {"processes": 1},
        "training": _NULLS | training | {"augment": _NULLS["augment"] | training["augment"]},
    }
