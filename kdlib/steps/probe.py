"""Step 05: probes and diagnostics of every checkpoint of a cell's students, and of the teacher.

The columns `on` and `layer` of the table name the data set (`own`: the study's, or one of
`probe.others`) and the layer. The checks read the rows of the study's data and the last layer.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.dataset.images import Images, probe_examples
from kdlib.models.networks import network_for
from kdlib.probes import diagnostics
from kdlib.probes.classifiers import Features
from kdlib.probes.features import labelled_features
from kdlib.repro import checks, files
from kdlib.repro.run import open_run, read_evidence, read_table
from kdlib.repro.tables import write_parquet
from kdlib.steps.checkpoints import load_step
from kdlib.steps.distill import open_student, student_folder
from kdlib.steps.probe_network import (
    LAST,
    STUDY_DATA,
    Examples,
    other_examples,
    probe_network,
    probe_pair,
)
from kdlib.steps.processes import prepare_device
from kdlib.steps.teacher_network import load_teacher, teacher_folder, teacher_pixels
from kdlib.steps.teacher_outputs import open_teacher, teacher_features
from kdlib.study.cells import Cell
from kdlib.study.study import Study

MAKER = "notebooks/05_probe.ipynb"


def probe_cell(study: Study, images: Images, cell: Cell) -> pd.DataFrame:
    """Step 05: probes and diagnostics of every checkpoint of a cell's students, and of the teacher.

    Returns: One row per seed, step, data set, layer and probe; the teacher's rows have strategy
        `teacher`. Diagnostics are of the training features, the same in every row of one network,
        data set and layer; `cka_teacher` is NaN on other data.
    Raises: CheckError when features are collapsed, or a trained probe lies below the random
        initialisation's: both say that something is wrong with the features, not with the subset.
    """
    device = prepare_device(study.compute)
    evidences = {s: open_student(study, cell, s) for s in study.seeds}
    teacher = open_teacher(study)
    others = {name: other_examples(data) for name, data in study.probe.others.items()}
    settings = {
        "step": study.step_settings("probe", cell),
        "inputs": images.fingerprints
        | {"students": {str(s): e["checkpoints"]["last"] for s, e in evidences.items()}}
        | {"series": {str(s): e["series"] for s, e in evidences.items()}}
        | {"teacher": teacher["outputs"]}
        | ({"others": _fingerprints(others)} if others else {}),
    }
    folder = probe_folder(study, cell)
    with open_run(study.runs, folder, settings) as run:
        if not run.finished:
            further = (cache for examples in others.values() for cache, _ in examples)
            for cache in (images.train, images.test, *further):
                cache.verify()
            pair = _teacher_pair(study, images, teacher)
            table = pd.DataFrame(
                [*_probe_students(
                    study, images, cell, evidences, pair[0], teacher["outputs"], others, device
                 ),
                 *_probe_teacher(study, images, cell, pair, teacher["outputs"], others, device)]
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
    """The table of step 05 for one cell.

    Raises: FileNotFoundError that names notebook 05; ValueError for a table that was changed.
    """
    path = probe_folder(study, cell) / "probes.parquet"
    return read_table(path, study.step_settings("probe"), MAKER)


def probe_folder(study: Study, cell: Cell) -> Path:
    """The folder of the probes of one cell."""
    return study.runs / "probe" / cell.path


def _fingerprints(others: dict[str, Examples]) -> dict[str, list[str]]:
    return {
        name: [cache.fingerprint for cache, _ in examples] + [files.sha256_array(examples[0][1])]
        for name, examples in others.items()
    }


def _probe_students(
    study: Study,
    images: Images,
    cell: Cell,
    evidences: dict[int, dict],
    teacher: Features,
    outputs: dict[str, str],
    others: dict[str, Examples],
    device: str,
) -> Iterator[dict[str, Any]]:
    network = network_for(images, study.students[cell.student].model, 0, device)
    norm = diagnostics.shared(teacher.values, teacher.values)
    places = {STUDY_DATA: probe_examples(images)} | others
    inputs = images.fingerprints | {"teacher": outputs}
    inputs |= {"others": _fingerprints(others)} if others else {}

    def rows(evidence: dict, seed: int, step: str) -> Iterator[dict[str, Any]]:
        weights = load_step(network, student_folder(study, cell, seed), evidence, step)
        for on, examples in places.items():
            yield from probe_network(
                on, examples, network, weights, images.pixels, images.image_shape, study.probe,
                (teacher.values, norm) if on == STUDY_DATA else None,
            )  # fmt: skip

    for seed, evidence in evidences.items():
        untrained = evidence["initialisation"]["weights_sha256"]
        for step in evidence["series"]:
            row = dict(cell.items()) | {"seed": seed, "step": int(step)}
            make = partial(rows, evidence, seed, step)
            if step == "0":  # the same network in every cell
                make = partial(_once, study, inputs | {"weights": untrained}, make, device)
            yield from (row | more for more in make())


def _teacher_pair(
    study: Study, images: Images, teacher: dict[str, Any]
) -> tuple[Features, Features]:
    train, test = (
        labelled_features(
            cache, ids, teacher_features(study, cache, ids), teacher["weights_sha256"]
        )
        for cache, ids in probe_examples(images)
    )
    return train, test


def _probe_teacher(
    study: Study,
    images: Images,
    cell: Cell,
    pair: tuple[Features, Features],
    outputs: dict[str, str],
    others: dict[str, Examples],
    device: str,
) -> Iterator[dict[str, Any]]:
    """The teacher's rows: of its stored features, and of other data."""
    row = dict(cell.items()) | {"strategy": "teacher", "seed": -1, "step": -1}
    inputs = {"weights": pair[0].weights_sha256, "outputs": outputs}
    rows = _once(
        study, inputs | images.fingerprints,
        lambda: probe_pair({"on": STUDY_DATA, "layer": LAST}, *pair, study.probe), device,
    )  # fmt: skip
    for name, examples in others.items():
        rows += _once(
            study, inputs | _fingerprints({name: examples}),
            partial(_teacher_elsewhere, study, images, name, examples, device), device,
        )  # fmt: skip
    yield from (row | more for more in rows)


def _teacher_elsewhere(
    study: Study, images: Images, name: str, examples: Examples, device: str
) -> Iterator[dict[str, Any]]:
    """Probes of the teacher's features on another data set."""
    folder = teacher_folder(study)
    evidence = read_evidence(folder)
    network = load_teacher(study, images, device, folder, evidence)
    weights = evidence["teacher"]["weights_sha256"]
    last = study.probe.model_copy(update={"layers": (LAST,)})
    yield from probe_network(
        name, examples, network, weights, teacher_pixels(study, images), images.image_shape, last
    )


def _once(
    study: Study,
    inputs: dict[str, Any],
    make: Callable[[], Iterator[dict[str, Any]]],
    device: str,
) -> list[dict[str, Any]]:
    """Rows of a network that is the same in many cells, computed for the first of them.

    Args:
        inputs: All that determines the rows, beside the study's settings of probes.
    """
    asked, folder = study.step_settings("probe"), study.runs / "probe" / "once"
    path = folder / files.fingerprint(inputs)[:12] / "probes.parquet"
    with open_run(study.runs, path.parent, {"step": asked, "inputs": inputs}) as run:
        if not run.finished:
            write_parquet(path, pd.DataFrame(make()), {"settings": run.settings_sha256})
            sha256 = files.sha256_file(path)
            run.finish({"step": "probe", "study": study.name, "table_sha256": sha256}, device)
    return read_table(path, asked, MAKER).to_dict("records")


def _probe_evidence(table: pd.DataFrame, images: Images) -> dict[str, Any]:
    """The facts that the checks read: of the study's data and the last layer; and for all rows,
    that training and test features are of the same weights."""
    students = table[(table["strategy"] != "teacher") & (table["on"] == STUDY_DATA)]
    linear = students[(students["probe"] == "linear") & (students["layer"] == LAST)]
    steps = linear.groupby("seed")["step"]  # seeds that stop early have other last steps
    first, last = linear.loc[steps.idxmin()], linear.loc[steps.idxmax()]
    floor, trained = first["accuracy"].mean(), last["accuracy"].mean()
    worst = last.loc[last["rank_ratio"].idxmin()]
    pairs = table[["train_weights", "test_weights"]].drop_duplicates()
    return {
        "floor": {
            "trained": float(trained),
            "untrained": float(floor),
            "slack": float(2 * np.sqrt(floor * (1 - floor) / images.test.n_examples)),
        },
        "collapse": {
            "ratio": float(worst["rank_ratio"]),
            "threshold": float(worst["rank_threshold"]),
        },
        "probes": pairs.to_dict("records"),
    }
