"""Step 06: the table of a study's runs, one row each, accepted or refused, from their evidence.

Every check is evaluated again, and what a run did is derived again from its files. A run of which
one fails stays in the table, with the names of the failed checks and the reasons.
"""

import functools
import itertools
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.compare.classes import counts_in_words
from kdlib.compare.comparisons import PROBED, rerun_command
from kdlib.models.base import Origin
from kdlib.repro import checks, files
from kdlib.repro.commands import delete_and_run, run_to_make
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import reader_sentence
from kdlib.steps.distill import open_student, outcome
from kdlib.steps.folders import (
    axes_of,
    counted,
    datamap_folder,
    datamap_settings,
    probe_folder,
    student_folder,
)
from kdlib.steps.probe import open_probes
from kdlib.steps.recount import Recount
from kdlib.steps.recount_splits import pixel_disagreements, split_disagreements
from kdlib.steps.remeasure import Remeasure
from kdlib.steps.teacher_outputs import open_teacher
from kdlib.study.cells import Cell
from kdlib.study.evaluation import OWN, measured_column
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

# Settings in which compared runs may differ: the axes, and what follows from them.
FACTORS = (
    "step.seed", "step.subset.", "step.objective.", "step.student.", "step.teacher",
    "inputs.subset", "inputs.teacher_outputs", "inputs.weights_file",
)  # fmt: skip

Reasons = list[tuple[str, str]]  # to refuse a row: the name of a check, and a sentence

RANDOM = Origin().name
CIRCUMSTANCES = ("device", "threads", "git_commit", "code_sha256")
MADE = (*CIRCUMSTANCES, "git_clean", "versions")  # columns that are not committed


def results(study: Study) -> pd.DataFrame:
    """One row per declared run of the study, accepted or refused.

    Returns: The four axes, `seed`, `test_accuracy` of the last step, `test_accuracy_best` and
        `best_step` of the best epoch, `test_accuracy_distinct` of the last step on the test images
        whose pixels occur once in the data, `linear_accuracy` and `knn_accuracy` of the last step's
        probes, and `..._on_<name>` of the data sets that are compared on; the budget, recorded
        (`steps samples unique_examples`), `declared_...`, and its kind (`budget`);
        `test_precision test_recall test_f1`, averaged over classes; `parameters`,
        `megabytes` and `multiply_adds` of the student; `refused`, `reason`, and `failed_checks`,
        the names of the checks that fail; `class_counts`, the examples of each class in its subset,
        and `class_names` (absent without labels); `run`, its folder, and
        `command`, which makes it again; hashes of its inputs and its weights; `origin`, what its
        first weights were (absent where they were random in all rows); device and versions;
        `duplicates`, what step 01 says of images with the same pixels, and `reader`, what it
        converted or cut of images in files (absent where nothing), the same in all rows. Accuracies
        are in [0, 1], NaN where there is no evidence, and at the best epoch also where no image was
        held out or the teacher was trained on those.
    """
    rows, inputs = [], _Inputs(study)
    again = Remeasure(study, inputs.recount)
    unlike = pixel_disagreements(inputs.cache, again.mean, again.std)
    inputs.faults += [("images", fault) for fault in unlike]
    evidences: dict[Cell, list[tuple[dict, dict[str, Any]]]] = defaultdict(list)  # (row, evidence)
    reference: dict[str, Any] | None = None
    probed = {cell: _last_probes(study, cell) for cell in study.probed_cells()}
    for cell, seed in itertools.product(study.cells(), study.seeds):
        folder = student_folder(study, cell, seed)
        row = axes_of(study, cell) | {"seed": seed, "run": str(folder.relative_to(study.runs))}
        row |= {"command": rerun_command(study, cell), "duplicates": inputs.duplicates}
        row |= {"reader": inputs.reader} if inputs.reader else {}
        reasons: Reasons = []
        try:
            evidence = open_student(study, cell, seed)
            settings = files.read_json(folder / "settings.json")
            reference = reference or settings
            row |= measured(evidence)
            rules = checks.student_rules(study.data.labelled)
            reasons += _reasons(folder, evidence, settings, reference, rules)
            reasons += inputs.changed(cell, seed, evidence)
            row["test_accuracy_distinct"], unlike = again.student(cell, seed, evidence)
            reasons += [("derived_again", sentence) for sentence in unlike]
            cell_probes = probed.get(cell, f"{cell.path} is not probed")
            unprobed = _add_probes(study, row, cell_probes, again.recount)
            reasons += [("probed", sentence) for sentence in unprobed]
            row |= inputs.class_counts(folder)
            evidences[cell].append((row, evidence))
        except (FileNotFoundError, KeyError, ValueError) as error:
            reasons = [("evidence", str(error))]
        rows.append((row, reasons))
    again.save()
    for (_, reasons), twin in zip(
        rows, checks.twins([_did(study, r) for r, _ in rows]), strict=True
    ):
        reasons += [("twins", twin)] if twin else []
    of_row = {id(row): reasons for row, reasons in rows}
    for of_cell in evidences.values():
        verdicts = checks.distinct_seeds([evidence for _, evidence in of_cell])
        for (row, _), check in zip(of_cell, verdicts, strict=True):
            of_row[id(row)] += [] if check.passed else [(check.name, check.sentence)]
    table = pd.DataFrame([row | _refusal(reasons) for row, reasons in rows])
    numbers = ["test_accuracy", "test_accuracy_best", "test_accuracy_distinct", *PROBED.values()]
    numbers += study.compare.columns.values()
    for column in numbers:
        if column not in table:  # no run has it
            table[column] = np.nan
    if "origin" in table and table["origin"].dropna().eq(RANDOM).all():
        table = table.drop(columns="origin")
    return counted(table.assign(refused=table["reason"] != ""))


def _refusal(reasons: Reasons) -> dict[str, str]:
    """The columns that say whether and why a row is refused; the same text wherever the study
    lies."""
    sentences = "; ".join(sentence for _, sentence in reasons)
    failed = " ".join(dict.fromkeys(name for name, _ in reasons))
    return {"reason": sentences.replace(f"{files.workspace()}/", ""), "failed_checks": failed}


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
        self.faults = _failed(outcomes)
        self.faults += [("images", fault) for fault in split_disagreements(self.recount, cache)]
        self.reader = reader_sentence(cache)
        self.study = study
        self.data = read_evidence(up.runs / "teacher", up.step_settings("teacher"))["data"]
        self.datamaps = {
            seed: read_evidence(datamap_folder(study, seed), datamap_settings(study, seed))
            for seed in (study.seeds if study.recorded_training else ())
        }
        self.teacher = functools.cache(lambda name: open_teacher(study, name))

    def class_counts(self, folder: Path) -> dict[str, str]:
        """The numbers of examples of each class in the subset of a run, and the classes' names;
        nothing of images without labels."""
        if not self.study.data.labelled:
            return {}
        names = self.cache["agree"]["class_names"]["train"]
        ids = pd.read_parquet(folder / "subset.parquet", partitioning=None)["example_id"]
        numbers = counts_in_words(self.recount.labels[ids.to_numpy(np.int64)], len(names))
        return {"class_counts": numbers, "class_names": json.dumps(names, ensure_ascii=False)}

    def changed(self, cell: Cell, seed: int, evidence: dict[str, Any]) -> Reasons:
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
        sentence = f"made from another study's {', '.join(changed)}: {remedy}"
        return [*self.faults, ("inputs", sentence)]


def measured(evidence: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that its evidence holds."""
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
        **{key: str(made[key]) for key in MADE[:-1]},
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
        failed = "; ".join(sentence for _, sentence in _failed(outcomes))
        return failed or open_probes(study, cell)
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
) -> Reasons:
    """Reasons to refuse a run: failed checks, and settings that differ beside the axes."""
    outcomes = checks.run_all(rules, evidence)
    outcomes.append(checks.checkpoint_hashes(folder, evidence))
    reasons = _failed(outcomes)
    if lines := checks.differing(settings, reference, FACTORS):
        reasons.append(("one_factor", f"differs from the other runs in {', '.join(lines)}"))
    return reasons


def _failed(outcomes: list[checks.Check]) -> Reasons:
    return [(c.name, f"{c.name}: {c.sentence}") for c in outcomes if not c.passed]
