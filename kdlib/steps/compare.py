"""Step 06: every table of a study, from its run records or from its committed tables.

A run that fails a check stays in the table as refused, with the reason.
"""

import itertools
from pathlib import Path
from typing import Any

import pandas as pd

from kdlib.compare.committed import (
    NAMES,
    committed_folder,
    is_committed,
    read_committed,
    write_committed,
)
from kdlib.compare.comparisons import Tables, comparisons, with_untrained
from kdlib.repro import checks, files
from kdlib.repro.run import Run, read_evidence, read_metrics
from kdlib.steps.done import read_by
from kdlib.steps.folders import (
    axes_of,
    counted,
    datamap_folder,
    datamap_settings,
    dynamics_settings,
    recording_folder,
    recording_of_seed,
    recording_settings,
    student_folder,
    student_settings,
    teacher_folder,
)
from kdlib.steps.probe import open_probes
from kdlib.steps.results import CIRCUMSTANCES, MADE, results
from kdlib.steps.summaries import show_verdicts
from kdlib.study.evaluation import AXES
from kdlib.study.study import Study


def curves(study: Study, table: pd.DataFrame) -> pd.DataFrame:
    """Metrics of all accepted runs: the axes and seed, then the columns of `metrics.parquet`."""
    axes = [*AXES, "seed"]
    parts = []
    for row in table[~table["refused"]].to_dict("records"):
        metrics = read_metrics(study.runs / row["run"])
        parts.append(metrics.assign(**{a: row[a] for a in axes}))
    return pd.concat(parts, ignore_index=True)


def probes(study: Study) -> pd.DataFrame:
    """Probe rows of all probed cells, with reference rows `untrained` and `teacher`."""
    parts = [open_probes(study, cell) for cell in study.probed_cells()]
    return counted(with_untrained(pd.concat(parts, ignore_index=True)))


def costs(study: Study) -> pd.DataFrame:
    """Wall times of the runs that were made with the settings of now: one row for each student, and
    one each for `cache`, `teacher` (its training, if any, and its stored outputs), `dynamics`
    (where another network is recorded than the teacher), `datamap` and each further teacher; the
    trainings of a teacher that learns from subsets are added up, and so are the `recordings` and
    `datamaps` of seeds.

    Returns: `what`, the axes and `seed` ("", 0 and -1 where there are none), `wall_s` of the
        process that finished it, `steps` of optimisation, and the circumstances.
    """
    up, no_cell = study.upstream, {"student": "", "strategy": "", "fraction": 0.0}
    no_cell |= {"objective": "", "seed": -1}
    runs = {what: [(up.runs / what, up.step_settings(what))] for what in ("cache", "teacher")}
    if study.dynamics.model is not None:
        runs["dynamics"] = [(study.recorded_run, dynamics_settings(study))]
    if study.recorded_training is not None:
        runs["datamap"] = [(datamap_folder(study), datamap_settings(study))]
    if study.dynamics.per_seed:
        places = [(up, *recording_of_seed(study, seed)) for seed in study.seeds]
        runs["recordings"] = [(recording_folder(*p), recording_settings(*p)) for p in places]
        runs["datamaps"] = [
            (datamap_folder(study, s), datamap_settings(study, s)) for s in study.seeds
        ]
    for name, teacher in study.teachers.items():
        settings = study.step_settings("teacher", teacher=name)
        runs[f"teacher {name}"] = [
            (path.parent, settings | (_seed_of(path) if teacher.of_subset else {}))
            for path in sorted(teacher_folder(study, name).glob("**/evidence.json"))
        ]
    rows = []
    for what, of_step in runs.items():
        found = list(filter(None, (_cost(*run) for run in of_step)))
        if found:
            total = {key: sum(run[key] for run in found) for key in ("wall_s", "steps")}
            rows.append({"what": what} | no_cell | found[0] | total)
    for cell, seed in itertools.product(study.cells(), study.seeds):
        folder = student_folder(study, cell, seed)
        if cost := _cost(folder, student_settings(study, cell, seed)):
            rows.append({"what": "student"} | axes_of(study, cell) | {"seed": seed} | cost)
    return counted(pd.DataFrame(rows))


def _seed_of(path: Path) -> dict[str, int]:
    return {"seed": int(path.parent.name.removeprefix("seed="))}


def _cost(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a finished run cost, if it was made with these settings."""
    try:
        evidence = read_evidence(folder, settings)
    except (FileNotFoundError, ValueError):  # missing, refused, or of other settings
        return None
    made, recorded = evidence["made"], evidence.get("budget", {}).get("recorded", {})
    circumstances = {key: str(made[key]) for key in CIRCUMSTANCES}
    return {"wall_s": made["wall_s"], "steps": recorded.get("steps", 0)} | circumstances


def compile_tables(study: Study) -> Tables:
    """All tables of a study from its runs; those from which all others follow are written to
    `figures/<study>/tables/`, to be committed.

    Returns: `results`, `curves`, `probes`, what `comparisons` makes of them, and of these runs
        alone `costs` and `made`: device, threads, commit, code and versions of each.
    Raises: checks.CheckError when no row is left to compare.
    """
    table = results(study)
    if table["refused"].all():
        raise checks.CheckError(f"every row is refused; the first: {table['reason'].iloc[0]}")
    probed = probes(study)
    hashes = [name for name in probed if name.endswith(("_examples", "_weights", "weights_sha256"))]
    made = [name for name in MADE if name in table]
    records = {
        "results": table.drop(columns=made),
        "curves": curves(study, table).drop(columns=["epoch", "learning_rate"]),
        "probes": probed.drop(columns=hashes),  # `results` has those of the last step
    }
    here = {"costs": costs(study), "made": table[[*AXES, "seed", "run", *made]]}
    return comparisons(study, write_committed(study, records) | here)


def finish_tables(study: Study, step: str, tables: Tables) -> dict[str, Any]:
    """Write each table of step `compare`, `scores` or `noise` to
    `runs/<study>/<step>/<name>.parquet`, then the evidence, which marks the step finished: their
    hashes, the seals of the runs that they were made of, and of `compare` the hashes of the
    committed tables, how many runs there are and how many were accepted.

    Returns: The evidence.
    """
    folder, hashes = study.runs / step, {}
    for name, table in tables.items():
        path = folder / f"{name}.parquet"
        files.write_atomic(path, lambda file, table=table: table.to_parquet(file))
        hashes[name] = files.sha256_file(path)
    settings = {"step": study.step_settings(step), "inputs": hashes}
    files.write_json(folder / "settings.json", settings)
    evidence = {"step": step, "study": study.name, "read": read_by(study, step)}
    if step == "compare":
        paths = {name: committed_folder(study) / f"{name}.parquet" for name in NAMES}
        evidence["committed"] = {name: files.sha256_file(path) for name, path in paths.items()}
        refused = tables["results"]["refused"]
        evidence |= {"n_runs": len(refused), "n_accepted": int((~refused).sum())}
        show_verdicts(study, tables)
    return Run(folder, settings).finish(evidence)


def open_tables(study: Study) -> tuple[Tables, str]:
    """All tables of a study, and their origin in words: compiled from its runs where step 06 is
    finished, else the committed ones.

    Raises: FileNotFoundError where there are neither; ValueError for committed tables that were
        changed or belong to other settings.
    """
    compared = (study.runs / "compare" / "evidence.json").is_file()
    if compared or not is_committed(study):
        if not (study.runs / "distill").is_dir():
            raise FileNotFoundError(
                f"{study.name} has neither runs ({study.runs}) nor committed tables "
                f"({committed_folder(study)}); run python -m kdlib study params/{study.name}.yaml"
            )
        return compile_tables(study), "its runs"
    return comparisons(study, read_committed(study)), "its committed tables"
