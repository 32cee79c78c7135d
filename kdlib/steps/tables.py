"""Tables that a step computes from runs: written as parquet, then marked finished."""

from typing import Any

from kdlib.compare.comparisons import Tables
from kdlib.repro import files
from kdlib.repro.run import Run
from kdlib.study.study import Study


def write_tables(study: Study, step: str, tables: Tables) -> Tables:
    """Write each table to `runs/<study>/<step>/<name>.parquet`; returns the tables."""
    for name, table in tables.items():
        path = study.runs / step / f"{name}.parquet"
        files.write_atomic(path, lambda file, table=table: table.to_parquet(file))
    return tables


def finish_tables(study: Study, step: str, tables: Tables) -> dict[str, Any]:
    """Write the evidence of a step whose result are tables: their hashes, and of step `compare` how
    many runs there are and how many were accepted.

    Returns: The evidence.
    """
    folder = study.runs / step
    hashes = {name: files.sha256_file(folder / f"{name}.parquet") for name in tables}
    settings = {"step": study.step_settings(step), "inputs": hashes}
    files.write_json(folder / "settings.json", settings)
    evidence = {"step": step, "study": study.name}
    if step == "compare":
        refused = tables["results"]["refused"]
        evidence |= {"n_runs": len(refused), "n_accepted": int((~refused).sum())}
    return Run(folder, settings).finish(evidence)
