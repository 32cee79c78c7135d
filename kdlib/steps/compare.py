"""Every table of a study, from its run records, or from the tables of them that are committed.

A row that fails a tripwire stays in the table as refused, with the reason. Leaves to others:
statistics (`compare`, `ledger`), what is committed (`published`).
"""

import functools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.compare.committed import folder as committed_folder
from kdlib.compare.committed import read, there, write
from kdlib.compare.comparisons import PROBED, Tables, command, comparisons, with_untrained
from kdlib.repro import checks, files
from kdlib.repro.run import Run, read_evidence, read_metrics
from kdlib.steps.distill import open_student, outcome, student_folder
from kdlib.steps.probe import open_probes, probe_folder
from kdlib.steps.teacher_network import teacher_folder
from kdlib.steps.teacher_outputs import open_teacher
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

# Settings in which compared runs may differ: the axes, and what follows from them.
FACTORS = (
    "step.seed", "step.subset.", "step.objective.", "step.student.", "step.teacher",
    "inputs.subset", "inputs.teacher_outputs",
)  # fmt: skip


CIRCUMSTANCES = ("device", "threads", "git_commit", "code_sha256")


def results(study: Study) -> pd.DataFrame:
    """One row per declared run of the study, accepted or refused.

    Returns: The four axes, `seed`, `test_accuracy` of the last step, `test_accuracy_best` and
        `best_step` of the best epoch, `linear_accuracy` and `knn_accuracy` of the last step's
        probes; the budget, recorded (`steps samples unique_examples`), `declared_...`, and its kind
        (`budget`); `refused`, `reason`; `run`, its folder, and `command`, which makes it again;
        hashes of what it was made from and of what it left; device and versions. Accuracies are in
        [0, 1], NaN where there is no evidence, and at the best epoch also where the teacher has
        learnt from the images it was chosen on.
    """
    rows, evidences, made_from = [], {}, _MadeFrom(study)
    reference: dict[str, Any] | None = None
    probed = {cell: _last_probes(study, cell) for cell in study.probed_cells()}
    for cell in study.cells():
        for seed in study.seeds:
            folder = student_folder(study, cell, seed)
            row = dict(cell.items()) | {"seed": seed, "run": str(folder.relative_to(study.runs))}
            row["command"] = command(study, cell)
            try:
                evidence = open_student(study, cell, seed)
                settings = files.read_json(folder / "settings.json")
                reference = reference or settings
                row |= _measured(evidence)
                reasons = _reasons(folder, evidence, settings, reference)
                reasons += made_from.otherwise(cell, evidence)
                found = probed.get(cell, f"{cell.path} is not probed")
                reasons += _add_probes(row, found, study.compare.measure)
                evidences[cell, seed] = (len(rows), evidence)
            except (FileNotFoundError, KeyError, ValueError) as error:
                reasons = [str(error)]
            rows.append(row | {"reason": "; ".join(reasons)})
    by_cell = defaultdict(list)
    for (cell, _), found in evidences.items():
        by_cell[cell].append(found)
    for found in by_cell.values():
        verdicts = checks.distinct_seeds([evidence for _, evidence in found])
        for (index, _), check in zip(found, verdicts, strict=True):
            if not check.passed:
                rows[index]["reason"] = "; ".join(
                    filter(None, [rows[index]["reason"], check.sentence])
                )
    here = f"{files.workspace()}/"  # a table says the same wherever the study lies
    table = pd.DataFrame([row | {"reason": row["reason"].replace(here, "")} for row in rows])
    for column in ("test_accuracy", "test_accuracy_best", *PROBED.values()):
        if column not in table:  # no run has it
            table[column] = np.nan
    return table.assign(refused=table["reason"] != "")


class _MadeFrom:
    """What the study's runs must be made from, as it is now."""

    def __init__(self, study: Study) -> None:
        up = study.upstream
        read_evidence(up.runs / "cache", up.step_settings("cache"))  # refuses a changed split
        made = {
            step: read_evidence(up.runs / step, up.step_settings(step))
            for step in ("teacher", "datamap")
        }
        self.study, self.data = study, made["teacher"]["data"]
        self.datamap = made["datamap"]["datamap_sha256"]
        self.card = functools.cache(lambda name: open_teacher(study, name))

    def otherwise(self, cell: Cell, evidence: dict[str, Any]) -> list[str]:
        """Of what else a run was made."""
        found, parent = [], evidence["subset"]["parent_datamap"]
        name = self.study.objectives[cell.objective].teacher
        of_subset = name is not None and self.study.teachers[name].of_subset
        if evidence["data"] != self.data:
            found.append("images")
        if evidence["teacher"] and not of_subset and evidence["teacher"] != self.card(name):
            found.append("teacher outputs")
        if not cell.strategy.startswith(PICKED) and parent not in (None, self.datamap):
            found.append("datamap")
        return [f"made of another study's {', '.join(found)}: run notebook 04 again"] * bool(found)


def _measured(evidence: dict[str, Any]) -> dict[str, Any]:
    last = evidence["checkpoints"]["last"]
    budget, made, teacher = evidence["budget"], evidence["made"], evidence["teacher"]
    return {
        **outcome(evidence),
        **{f"declared_{key}": value for key, value in budget["declared"].items()},
        "budget": budget["comparison"],
        "weights_sha256": last["weights_sha256"],
        "checkpoint_sha256": last["file_sha256"],
        "subset_sha256": evidence["subset"]["sha256"],
        "teacher_sha256": teacher["weights_sha256"] if teacher else "",
        **{f"data_{part}": value for part, value in evidence["data"].items()},
        "settings_sha256": evidence["settings_sha256"],
        **{key: str(made[key]) for key in CIRCUMSTANCES},
        "versions": ", ".join(f"{name} {found}" for name, found in made["versions"].items()),
    }


def _last_probes(study: Study, cell: Cell) -> pd.DataFrame | str:
    """Probe rows of a cell, or why there are none that count."""
    try:
        evidence = read_evidence(probe_folder(study, cell))
        judged = checks.run_all(checks.PROBE, evidence)
        if failed := [f"{check.name}: {check.sentence}" for check in judged if not check.passed]:
            return "; ".join(failed)
        return open_probes(study, cell)
    except (FileNotFoundError, KeyError, ValueError) as error:
        return str(error)


def _add_probes(row: dict[str, Any], found: pd.DataFrame | str, measure: str) -> list[str]:
    """Add the probes of a run's last step to its row; why the row lacks the compared one."""
    lacking = {measure: found} if isinstance(found, str) else {}
    for probe, column in PROBED.items() if not lacking else ():
        last = found[
            (found["strategy"] == row["strategy"])
            & (found["seed"] == row["seed"])
            & (found["step"] == row["steps"])
            & (found["probe"] == probe)
            & (found["on"] == "own")
            & (found["layer"] == "features")
        ]
        if len(last) != 1:
            lacking[probe] = f"{len(last)} {probe} probes of its last step; expected one"
        elif last["weights_sha256"].iloc[0] != row["weights_sha256"]:
            lacking[probe] = f"its {probe} probe is of other weights: run notebook 05 again"
        else:
            row[column] = float(last["accuracy"].iloc[0])
    return [lacking[measure]] if measure in PROBED and measure in lacking else []


def _reasons(folder: Path, evidence: dict, settings: dict, reference: dict) -> list[str]:
    """Why this row must not be believed; empty when it may."""
    judged = checks.run_all(checks.STUDENT, evidence)
    judged.append(checks.checkpoint_hashes(folder, evidence))
    reasons = [f"{check.name}: {check.sentence}" for check in judged if not check.passed]
    if lines := checks.differing(settings, reference, FACTORS):
        reasons.append(f"differs from the other runs in {', '.join(lines)}")
    return reasons


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
    return with_untrained(pd.concat(parts, ignore_index=True))


def costs(study: Study) -> pd.DataFrame:
    """What took how long: one row for each finished run of a student, and one each for `cache`,
    `teacher` (its training, if any, and its stored outputs), `dynamics` (where it is a training of
    its own), `datamap` and each further teacher, or all those of it that learn from a subset alone.

    Returns: `what`, the axes and `seed` ("", 0 and -1 where there are none), `wall_s` of the
        process that finished it, `steps` of optimisation, and the circumstances.
    """
    made, nowhere = study.upstream.runs, {"student": "", "strategy": "", "fraction": 0.0}
    nowhere |= {"objective": "", "seed": -1}
    folders = {what: [made / what] for what in ("cache", "teacher")}
    if study.dynamics.model is not None:
        folders["dynamics"] = [study.recorded_run]
    folders["datamap"] = [made / "datamap"]
    for name in study.teachers:
        found = sorted(teacher_folder(study, name).glob("**/evidence.json"))
        folders[f"teacher {name}"] = [path.parent for path in found]
    rows = []
    for what, places in folders.items():
        spent = [_cost(e) for e in map(_finished, places) if e is not None]
        if spent:
            total = {key: sum(one[key] for one in spent) for key in ("wall_s", "steps")}
            rows.append({"what": what} | nowhere | spent[0] | total)
    for cell in study.cells():
        for seed in study.seeds:
            evidence = _finished(student_folder(study, cell, seed))
            if evidence is not None:
                row = {"what": "student"} | dict(cell.items()) | {"seed": seed}
                rows.append(row | _cost(evidence))
    return pd.DataFrame(rows)


def _finished(folder: Path) -> dict[str, Any] | None:
    try:
        return read_evidence(folder)
    except (FileNotFoundError, ValueError):  # not made, or refused with its row
        return None


def _cost(evidence: dict[str, Any]) -> dict[str, Any]:
    made, recorded = evidence["made"], evidence.get("budget", {}).get("recorded", {})
    told = {key: str(made[key]) for key in CIRCUMSTANCES}
    return {"wall_s": made["wall_s"], "steps": recorded.get("steps", 0)} | told


def compile_tables(study: Study) -> Tables:
    """All tables of a study from its runs, written to `runs/<study>/compare/` as parquet; those
    from which all others follow are written to `figures/<study>/tables/` too, to be committed.

    Returns: `results`, `curves`, `probes` and `costs`, and what `comparisons` makes of them.
    Raises: checks.TripwireError when no row is left to compare.
    """
    table = results(study)
    if table["refused"].all():
        raise checks.TripwireError(f"every row is refused; the first: {table['reason'].iloc[0]}")
    found = probes(study)
    hashes = [name for name in found if name.endswith(("_weights", "weights_sha256"))]
    records = {
        "results": table,
        "curves": curves(study, table).drop(columns=["epoch", "learning_rate"]),
        "probes": found.drop(columns=hashes),  # `results` has those of the last step
        "costs": costs(study),
    }
    tables = comparisons(study, write(study, records))
    folder = study.runs / "compare"
    for name, content in tables.items():
        files.write_atomic(folder / f"{name}.parquet", lambda f, c=content: c.to_parquet(f))
    return tables


def open_tables(study: Study) -> tuple[Tables, str]:
    """All tables of a study, compiled from its runs where they are compared, else the committed
    ones; and which of them.

    Raises: FileNotFoundError where there are neither; ValueError for committed tables that were
        changed or belong to other settings.
    """
    compared = (study.runs / "compare" / "evidence.json").is_file()
    if compared or not there(study):
        if not (study.runs / "distill").is_dir():
            raise FileNotFoundError(
                f"{study.name} has neither runs ({study.runs}) nor committed tables "
                f"({committed_folder(study)}); run python -m kdlib study params/{study.name}.yaml"
            )
        return compile_tables(study), "its runs"
    return comparisons(study, read(study)), "its committed tables"


def finish(study: Study, tables: Tables) -> dict[str, Any]:
    """Mark the comparison made: what it was compiled from and how many rows it holds."""
    folder = study.runs / "compare"
    table = tables["results"]
    settings = {"step": study.step_settings("compare"), "inputs": {}}
    for name in tables:
        settings["inputs"][name] = files.sha256_file(folder / f"{name}.parquet")
    files.write_json(folder / "settings.json", settings)
    return Run(folder, settings).finish(
        {
            "step": "compare",
            "study": study.name,
            "n_runs": len(table),
            "n_accepted": int((~table["refused"]).sum()),
        }
    )
