"""What can be checked of a study without its images and weights: records against each other.

Seals of evidence, its settings, its checks, subsets and metrics by their hashes, and the rows of
the committed table against the evidence of their runs.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.cartography.subset import Subset
from kdlib.compare.committed import read_committed
from kdlib.repro import checks
from kdlib.repro.run import read_metrics
from kdlib.steps.distill import open_student
from kdlib.steps.results import measured
from kdlib.study.study import Study

EXACT = ("weights_sha256", "checkpoint_sha256", "subset_sha256", "teacher_sha256", "data_train",
         "data_test", "data_split", "settings_sha256", "steps", "samples",
         "unique_examples")  # fmt: skip
MEASURED = ("test_accuracy", "validation_loss")
_FAULTS = (OSError, ValueError, KeyError, TypeError)


def recheck(study: Study) -> dict[str, Any]:
    """Check every record of a study against the others.

    Returns: `runs`, how many rows the table has; `with_evidence`, of how many the evidence is here;
        `faults`, a sentence each.
    Raises: As `read_committed`.
    """
    results = read_committed(study)["results"]
    faults, found = [], 0
    for row in results.to_dict("records"):
        folder = study.runs / row["run"]
        if not (folder / "evidence.json").is_file():
            continue
        found += 1
        faults += [f"{row['run']}: {fault}" for fault in _faults(study, row, folder)]
    return {"runs": len(results), "with_evidence": found, "faults": faults}


def _faults(study: Study, row: dict[str, Any], folder: Path) -> Iterator[str]:
    """What is wrong with the records of one run; nothing is asked of a refused one but its seal."""
    size = {"shards": row["shards"]} if row.get("shards") else {"fraction": row["fraction"]}
    axes = {axis: row[axis] for axis in ("student", "strategy", "objective")} | size
    try:
        evidence = open_student(study, study.cell(**axes), row["seed"])
    except _FAULTS as error:
        yield str(error)
        return
    if row["refused"]:
        return
    for check in checks.run_all(checks.student_rules(study.data.labelled), evidence):
        if not check.passed:
            yield f"{check.name}: {check.sentence}"
    try:
        if Subset.load(folder / "subset.parquet").sha256 != evidence["subset"]["sha256"]:
            yield "its subset is not that of its evidence"
        read_metrics(folder)
        here = measured(evidence)
    except _FAULTS as error:
        yield str(error)
        return
    known = {key: row[key] for key in (*EXACT, *MEASURED) if key in row and not pd.isna(row[key])}
    unlike = [key for key, value in known.items() if here.get(key) != value]
    if unlike:
        yield f"the table has another {', '.join(unlike)} than its evidence"
