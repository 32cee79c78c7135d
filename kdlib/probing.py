"""Step 05: probes of every kept checkpoint of a cell, beside the teacher's.

Leaves to others: probes and diagnostics themselves (probe), where students and stored outputs are
(steps).
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib import checks, files, params, probe, runs
from kdlib.evaluation import all_outputs
from kdlib.params import Cell, Study
from kdlib.steps import (
    Images,
    labelled_features,
    load_step,
    open_student,
    open_teacher,
    probe_examples,
    student_folder,
    teacher_features,
    use,
)
from kdlib.tables import read_parquet, write_parquet


def probe_cell(study: Study, images: Images, cell: Cell) -> pd.DataFrame:
    """Step 05: linear and k-NN probes of every kept checkpoint of a cell, and of the teacher.

    Returns: One row per seed, step and probe; the teacher's rows have strategy `teacher`.
    Raises: TripwireError when features are collapsed, or a trained probe lies below the random
        initialisation's: both say that something is wrong with the features, not with the subset.
    """
    device = use(study.compute)
    evidences = {s: open_student(study, cell, s) for s in study.seeds}
    teacher = open_teacher(study)
    settings = {
        "own": study.step_settings("probe", cell),
        "inputs": images.fingerprints
        | {"students": {str(s): e["checkpoints"]["last"] for s, e in evidences.items()}}
        | {"series": {str(s): e["series"] for s, e in evidences.items()}}
        | {"teacher": teacher["outputs"]},
    }
    folder = probe_folder(study, cell)
    with runs.open_run(study, folder, settings) as run:
        if not run.finished:
            for cache in (images.train, images.test):
                cache.verify()
            table = pd.DataFrame(
                [*_probe_students(study, images, cell, evidences, device),
                 *_probe_teacher(study, images, cell, teacher)]
            )  # fmt: skip
            write_parquet(folder / "probes.parquet", table, {"settings": run.settings_sha256})
            evidence = _probe_evidence(table, images) | {
                "step": "probe",
                "study": study.name,
                "cell": dict(cell.items()),
                "table_sha256": files.sha256_file(folder / "probes.parquet"),
            }
            evidence["checks"] = checks.demand(checks.PROBE, evidence)
            run.finish(evidence, device)
    return open_probes(study, cell)


def open_probes(study: Study, cell: Cell) -> pd.DataFrame:
    """What step 05 made for one cell.

    Raises: FileNotFoundError that names notebook 05; ValueError for a table that was changed.
    """
    folder = probe_folder(study, cell)
    evidence = runs.read_evidence(folder, study.step_settings("probe"))
    table, _ = read_parquet(folder / "probes.parquet", "notebooks/05_probe.ipynb")
    if files.sha256_file(folder / "probes.parquet") != evidence["table_sha256"]:
        raise ValueError(f"{folder / 'probes.parquet'} differs from its evidence; run 05 again")
    return table


def probe_folder(study: Study, cell: Cell) -> Path:
    """Where the probes of one cell are."""
    return study.runs / "probe" / cell.path


def _probe_students(
    study: Study, images: Images, cell: Cell, evidences: dict[int, dict], device: str
) -> Iterator[dict[str, Any]]:
    network = images.network(study.students[cell.student].model, 0, device)
    for seed, evidence in evidences.items():
        for step in evidence["series"]:
            weights = load_step(network, student_folder(study, cell, seed), evidence, step)
            pair = []
            for cache, ids in probe_examples(images):
                pixels = torch.from_numpy(cache.read("images", ids)).to(device)
                (features,) = all_outputs(network, images.pixels, pixels, ("features",))
                pair.append(labelled_features(cache, ids, features.cpu().numpy(), weights))
            row = dict(cell.items()) | {"seed": seed, "step": int(step)}
            yield from _probe_pair(row, *pair, study.probe)


def _probe_teacher(
    study: Study, images: Images, cell: Cell, teacher: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    pair = []
    for cache, ids in probe_examples(images):
        values = teacher_features(study, cache, ids)
        pair.append(labelled_features(cache, ids, values, teacher["weights_sha256"]))
    row = dict(cell.items()) | {"strategy": "teacher", "seed": -1, "step": -1}
    yield from _probe_pair(row, *pair, study.probe)


def _probe_pair(
    row: dict[str, Any], train: probe.Features, test: probe.Features, settings: params.Probe
) -> Iterator[dict[str, Any]]:
    spread = probe.collapse(train.values)
    for result in (
        probe.linear_probe(train, test, settings.c_grid, settings.seed),
        probe.knn_probe(train, test, settings.k),
    ):
        yield row | {
            "probe": result.probe,
            "accuracy": result.accuracy,
            "chosen": result.chosen,
            "converged": result.converged,
            "effective_rank": spread.effective_rank,
            "rank_ratio": spread.ratio,
            "rank_threshold": spread.threshold_rank / spread.isotropic_rank,
            "n_features": train.values.shape[1],
            "n_test": result.n_test,
            "train_weights": train.weights_sha256,
            "test_weights": test.weights_sha256,
            "weights_sha256": result.weights_sha256,
        }


def _probe_evidence(table: pd.DataFrame, images: Images) -> dict[str, Any]:
    students = table[table["strategy"] != "teacher"]
    linear = students[students["probe"] == "linear"]
    by_step = linear.groupby("step")["accuracy"].mean()
    floor, trained = by_step.iloc[0], by_step.iloc[-1]
    last = linear[linear["step"] == by_step.index[-1]]
    worst = last.loc[last["rank_ratio"].idxmin()]
    pairs = table[["train_weights", "test_weights"]].drop_duplicates()
    return {
        "floor": {
            "trained": float(trained),
            "untrained": float(floor),
            "untrained_step": int(by_step.index[0]),
            "slack": float(2 * np.sqrt(floor * (1 - floor) / images.test.n_examples)),
        },
        "collapse": {
            "ratio": float(worst["rank_ratio"]),
            "threshold": float(worst["rank_threshold"]),
        },
        "probes": pairs.to_dict("records"),
    }
