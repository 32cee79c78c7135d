"""Step 06: every table of a study, from its run records or from its committed tables.

A run that fails a check stays in the table as refused, with the reason.
"""

import functools
import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.compare.committed import (
    NAMES,
    committed_folder,
    is_committed,
    read_committed,
    write_committed,
)
from kdlib.compare.comparisons import PROBED, Tables, comparisons, rerun_command, with_untrained
from kdlib.models.base import Origin
from kdlib.repro import checks, files
from kdlib.repro.commands import delete_and_run, run_to_make
from kdlib.repro.run import Run, read_evidence, read_metrics
from kdlib.steps.cache import reader_sentence
from kdlib.steps.distill import open_student, outcome
from kdlib.steps.done import read_by
from kdlib.steps.folders import (
    axes_of,
    counted,
    datamap_folder,
    datamap_settings,
    dynamics_settings,
    probe_folder,
    recording_folder,
    recording_of_seed,
    recording_settings,
    student_folder,
    student_settings,
    teacher_folder,
)
from kdlib.steps.probe import open_probes
from kdlib.steps.recount import Recount
from kdlib.steps.recount_splits import pixel_disagreements, split_disagreements
from kdlib.steps.remeasure import Remeasure
from kdlib.steps.summaries import show_verdicts
from kdlib.steps.teacher_outputs import open_teacher
from kdlib.study.cells import Cell
from kdlib.study.evaluation import AXES, OWN, measured_column
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

# Settings in which compared runs may differ: the axes, and what follows from them.
FACTORS = (
    "step.seed", "step.subset.", "step.objective.", "step.student.", "step.teacher",
    "inputs.subset", "inputs.teacher_outputs", "inputs.weights_file",
)  # fmt: skip

RANDOM = Origin().name
CIRCUMSTANCES = ("device", "threads", "git_commit", "code_sha256")


def results(study: Study) -> pd.DataFrame:
    """One row per declared run of the study, accepted or refused.

    Returns: The four axes, `seed`, `test_accuracy` of the last step, `test_accuracy_best` and
        `best_step` of the best epoch, `test_accuracy_distinct` of the last step on the test images
        whose pixels occur once in the data, `linear_accuracy` and `knn_accuracy` of the last step's
        probes, and `..._on_<name>` of the data sets that are compared on; the budget, recorded
        (`steps samples unique_examples`), `declared_...`, and its kind (`budget`);
        `test_precision test_recall test_f1`, averaged over classes; `parameters`,
        `megabytes` and `multiply_adds` of the student; `refused`, `reason`; `run`, its folder, and
        `command`, which makes it again; hashes of its inputs and its weights; `origin`, what its
        first weights were (absent where they were random in all rows); device and versions;
        `duplicates`, what step 01 says of images with the same pixels, and `reader`, what it
        converted or cut of images in files (absent where nothing), the same in all rows. Accuracies
        are in [0, 1], NaN where there is no evidence, and at the best epoch also where no image was
        held out or the teacher was trained on those.
    """
    rows, inputs = [], _Inputs(study)
    again = Remeasure(study, inputs.recount)
    inputs.faults += pixel_disagreements(inputs.cache, again.mean, again.std)
    evidences: dict[Cell, list[tuple[dict, dict[str, Any]]]] = defaultdict(list)  # (row, evidence)
    reference: dict[str, Any] | None = None
    probed = {cell: _last_probes(study, cell) for cell in study.probed_cells()}
    for cell, seed in itertools.product(study.cells(), study.seeds):
        folder = student_folder(study, cell, seed)
        row = axes_of(study, cell) | {"seed": seed, "run": str(folder.relative_to(study.runs))}
        row |= {"command": rerun_command(study, cell), "duplicates": inputs.duplicates}
        row |= {"reader": inputs.reader} if inputs.reader else {}
        try:
            evidence = open_student(study, cell, seed)
            settings = files.read_json(folder / "settings.json")
            reference = reference or settings
            row |= _measured(evidence)
            rules = checks.student_rules(study.data.labelled)
            reasons = _reasons(folder, evidence, settings, reference, rules)
            reasons += inputs.changed(cell, seed, evidence)
            row["test_accuracy_distinct"], unlike = again.student(cell, seed, evidence)
            reasons += unlike
            cell_probes = probed.get(cell, f"{cell.path} is not probed")
            reasons += _add_probes(study, row, cell_probes, again.recount)
            evidences[cell].append((row, evidence))
        except (FileNotFoundError, KeyError, ValueError) as error:
            reasons = [str(error)]
        rows.append(row)
        row["reason"] = "; ".join(reasons)
    again.save()
    further = list(zip(rows, checks.twins([_did(study, row) for row in rows]), strict=True))
    for of_cell in evidences.values():
        verdicts = checks.distinct_seeds([evidence for _, evidence in of_cell])
        failed = ["" if check.passed else check.sentence for check in verdicts]
        further += zip([row for row, _ in of_cell], failed, strict=True)
    for row, sentence in further:
        row["reason"] = "; ".join(filter(None, [row["reason"], sentence]))
    here = f"{files.workspace()}/"  # a table holds the same text wherever the study lies
    table = pd.DataFrame([row | {"reason": row["reason"].replace(here, "")} for row in rows])
    measured = ["test_accuracy", "test_accuracy_best", "test_accuracy_distinct", *PROBED.values()]
    measured += study.compare.columns.values()
    for column in measured:
        if column not in table:  # no run has it
            table[column] = np.nan
    if "origin" in table and table["origin"].dropna().eq(RANDOM).all():
        table = table.drop(columns="origin")
    return counted(table.assign(refused=table["reason"] != ""))


def _did(study: Study, row: dict[str, Any]) -> dict[str, Any] | None:
    """A row as `checks.twins` takes it."""
    if "weights_sha256" not in row:
        return None
    settings = files.read_json(study.runs / row["run"] / "settings.json")["step"]
    did = {key: settings[key] for key in ("student", "objective", "training", "seed")}
    did |= {key: row[key] for key in ("subset_sha256", "teacher_sha256")}
    if row["strategy"] == "random_shards":
        did["shards_per_pass"] = row["fraction"]
    return {"run": row["run"], "weights_sha256": row["weights_sha256"], "did": did}


class _Inputs:
    """The images, teachers and datamap that the study's runs must be made from, as they are now."""

    def __init__(self, study: Study) -> None:
        up = study.upstream
        cache = read_evidence(up.runs / "cache", up.step_settings("cache"))  # refuses another split
        outcomes = checks.run_all(checks.CACHE, cache)
        self.duplicates = {check.name: check.sentence for check in outcomes}["duplicates"]
        self.cache = cache
        self.recount = Recount(study)
        self.faults = _failed(outcomes) + split_disagreements(self.recount, cache)
        self.reader = reader_sentence(cache)
        self.study = study
        self.data = read_evidence(up.runs / "teacher", up.step_settings("teacher"))["data"]
        self.datamaps = {
            seed: read_evidence(datamap_folder(study, seed), datamap_settings(study, seed))
            for seed in (study.seeds if study.recorded_training else ())
        }
        self.teacher = functools.cache(lambda name: open_teacher(study, name))

    def changed(self, cell: Cell, seed: int, evidence: dict[str, Any]) -> list[str]:
        """The inputs that changed since a run was made, as a reason to refuse it."""
        changed, parent = [], evidence["subset"]["parent_datamap"]
        name = self.study.objectives[cell.objective].teacher
        shared = name in self.study.shared_teachers
        if evidence["data"] != self.data:
            changed.append("images")
        if evidence["teacher"] and shared and evidence["teacher"] != self.teacher(name):
            changed.append("teacher outputs")
        datamap = self.datamaps.get(seed, {}).get("datamap_sha256")
        if not cell.strategy.startswith(PICKED) and parent not in (None, datamap):
            changed.append("datamap")
        if not changed:
            return self.faults
        remedy = delete_and_run(student_folder(self.study, cell, seed))
        return [*self.faults, f"made from another study's {', '.join(changed)}: {remedy}"]


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
        "origin": _origin(evidence["initialisation"]),
        **{key: str(made[key]) for key in (*CIRCUMSTANCES, "git_clean")},
        "versions": ", ".join(f"{name} {version}" for name, version in made["versions"].items()),
    }


def _origin(initialisation: dict[str, Any]) -> str:
    """What a run began from, in words; a record that does not say it is of random weights."""
    frozen = ", its backbone frozen" if initialisation.get("frozen") else ""
    return initialisation.get("origin", RANDOM) + frozen


def _last_probes(study: Study, cell: Cell) -> pd.DataFrame | str:
    """Probe rows of a cell, or the reason why they are missing or refused."""
    try:
        evidence = read_evidence(probe_folder(study, cell))
        outcomes = checks.run_all(checks.PROBE, evidence)
        return "; ".join(_failed(outcomes)) or open_probes(study, cell)
    except (FileNotFoundError, KeyError, ValueError) as error:
        return str(error)


def _add_probes(
    study: Study, row: dict[str, Any], table: pd.DataFrame | str, recount: Recount
) -> list[str]:
    """Add the probe accuracies of a run's last step to its row, of the study's data and of those
    that are compared on; reasons to refuse the row where a compared one is missing, or read other
    weights or examples."""
    compare, again = study.compare, run_to_make(study.runs / "probe")
    if isinstance(table, str):
        return [table] if compare.measure in PROBED else []
    reasons = []
    for on, probe in itertools.product(dict.fromkeys((OWN, *compare.places)), PROBED):
        name = probe if on == OWN else f"{probe} ({on})"
        last = table[
            (table["strategy"] == row["strategy"])
            & (table["seed"] == row["seed"])
            & (table["step"] == row["steps"])
            & (table["probe"] == probe)
            & (table["on"] == on)
            & (table["layer"] == "features")
        ]
        if len(last) != 1:
            reason = f"{len(last)} {name} probes of its last step; expected one: {again}"
        elif last["weights_sha256"].iloc[0] != row["weights_sha256"]:
            reason = f"its {name} probe is of other weights: {again}"
        elif others := [c for c, read in recount.probed(on).items() if last[c].iloc[0] != read]:
            reason = f"its {name} probe read other {' and '.join(others)} than the study's: {again}"
        else:
            row[measured_column(probe, on)] = float(last["accuracy"].iloc[0])
            continue
        reasons += [reason] if probe == compare.measure and on in compare.places else []
    return reasons


def _reasons(
    folder: Path, evidence: dict, settings: dict, reference: dict, rules: checks.Rules
) -> list[str]:
    """Reasons to refuse a run: failed checks, and settings that differ beside the axes."""
    outcomes = checks.run_all(rules, evidence)
    outcomes.append(checks.checkpoint_hashes(folder, evidence))
    reasons = _failed(outcomes)
    if lines := checks.differing(settings, reference, FACTORS):
        reasons.append(f"differs from the other runs in {', '.join(lines)}")
    return reasons


def _failed(outcomes: list[checks.Check]) -> list[str]:
    return [f"{check.name}: {check.sentence}" for check in outcomes if not check.passed]


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

    Returns: `results`, `curves`, `probes` and `costs`, and what `comparisons` makes of them.
    Raises: checks.CheckError when no row is left to compare.
    """
    table = results(study)
    if table["refused"].all():
        raise checks.CheckError(f"every row is refused; the first: {table['reason'].iloc[0]}")
    probed = probes(study)
    hashes = [name for name in probed if name.endswith(("_examples", "_weights", "weights_sha256"))]
    records = {
        "results": table,
        "curves": curves(study, table).drop(columns=["epoch", "learning_rate"]),
        "probes": probed.drop(columns=hashes),  # `results` has those of the last step
        "costs": costs(study),
    }
    return comparisons(study, write_committed(study, records))


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
