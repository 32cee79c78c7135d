"""Step 05: probes and diagnostics of every checkpoint of a cell's students, and of the teacher.

The columns `on` and `layer` of the table name the data set (`own`: the study's, or one of
`probe.others`) and the layer. The checks read the rows of the last layer and of the study's data,
or, where these have no labels, of the first data set that is compared on.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from kdlib.dataset.images import Images, probe_examples
from kdlib.models.base import Origin
from kdlib.models.networks import network_for
from kdlib.probes import diagnostics
from kdlib.probes.features import labelled_features
from kdlib.repro import checks, files
from kdlib.repro.run import open_run, read_evidence, read_table
from kdlib.repro.tables import write_parquet
from kdlib.steps.checkpoints import load_step
from kdlib.steps.distill import open_student
from kdlib.steps.folders import axes_of, probe_folder, student_folder, teacher_folder
from kdlib.steps.probe_network import (
    LAST,
    Examples,
    other_examples,
    probe_network,
    probe_pair,
)
from kdlib.steps.processes import prepare_device
from kdlib.steps.summaries import show_probes
from kdlib.steps.teacher_network import load_teacher, teacher_pixels
from kdlib.steps.teacher_outputs import open_teacher, teacher_features
from kdlib.study.cells import Cell
from kdlib.study.evaluation import OWN
from kdlib.study.study import Study


def probe_cell(study: Study, images: Images, cell: Cell) -> pd.DataFrame:
    """Step 05: probes and diagnostics of every checkpoint of a cell's students, and of the teacher.

    Returns: One row per seed, step, data set, layer and probe; the teacher's rows have strategy
        `teacher`. Diagnostics are of the training features, the same in every row of one network,
        data set and layer; `cka_teacher` is NaN on other data.
    Raises: CheckError when features are collapsed, or a trained probe lies below the random
        initialisation's: both say that something is wrong with the features, not with the subset.
    """
    device, folder = prepare_device(study.compute), probe_folder(study, cell)
    evidences = {s: open_student(study, cell, s) for s in study.seeds}
    teacher = open_teacher(study)
    others = {name: other_examples(data) for name, data in study.probe.others.items()}
    inputs = {
        "students": {str(s): e["checkpoints"]["last"] for s, e in evidences.items()},
        "series": {str(s): e["series"] for s, e in evidences.items()},
        "teacher": teacher["outputs"],
    }
    settings = {
        "step": study.step_settings("probe", cell),
        "inputs": images.fingerprints | inputs | _named_fingerprints(others),
    }
    with open_run(study.runs, folder, settings) as run:
        if not run.finished:
            further = (cache for examples in others.values() for cache, _ in examples)
            for cache in (*images.caches.values(), *further):
                cache.verify()
            probing = _Probing(study, images, cell, teacher, others, device)
            table = pd.DataFrame([*probing.students(evidences), *probing.teacher()])
            write_parquet(folder / "probes.parquet", table, {"settings": run.settings_sha256})
            begun = [e["initialisation"].get("origin") for e in evidences.values()]
            facts = _probe_evidence(table, OWN if images.n_classes else study.compare.places[0])
            facts["floor"]["given"] = bool(set(begun) - {None, Origin().name})
            evidence = facts | {
                "step": "probe",
                "study": study.name,
                "cell": dict(cell.items()),
                "table_sha256": files.sha256_file(folder / "probes.parquet"),
                "uninformed": study.probe.uninformed is True,
            }
            evidence["checks"] = checks.demand(checks.PROBE, evidence)
            run.finish(evidence, device)
            show_probes(study, cell, table)
    return open_probes(study, cell)


def open_probes(study: Study, cell: Cell) -> pd.DataFrame:
    """The table of step 05 for one cell.

    Raises: FileNotFoundError that names the command; ValueError for a table that was changed.
    """
    path = probe_folder(study, cell) / "probes.parquet"
    return read_table(path, study.step_settings("probe"))


def _fingerprints(others: dict[str, Examples]) -> dict[str, list[str]]:
    return {
        name: [cache.fingerprint for cache, _ in examples] + [files.sha256_array(examples[0][1])]
        for name, examples in others.items()
    }


def _named_fingerprints(others: dict[str, Examples]) -> dict[str, Any]:
    return {"others": _fingerprints(others)} if others else {}


class _Probing:
    """Probes of one cell: of its students' checkpoints, and of the teacher.

    Attributes:
        card: The teacher's.
        others: Examples of other data sets, by name.
        pair: The teacher's stored features of the study's training and test examples; empty where
            these have no labels.
    """

    def __init__(
        self,
        study: Study,
        images: Images,
        cell: Cell,
        card: dict[str, Any],
        others: dict[str, Examples],
        device: str,
    ) -> None:
        self.study, self.images, self.cell = study, images, cell
        self.card, self.others, self.device = card, others, device
        self.pair = [
            labelled_features(
                cache, ids, teacher_features(study, cache, ids), card["weights_sha256"]
            )
            for cache, ids in probe_examples(images)
        ]

    @property
    def own(self) -> dict[str, Examples]:
        """The study's examples, where they have labels."""
        examples = probe_examples(self.images)
        return {OWN: examples} if examples else {}

    def students(self, evidences: dict[int, dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The rows of every checkpoint of the seeds' runs."""
        study, images, cell = self.study, self.images, self.cell
        network = network_for(images, study.students[cell.student].model, 0, self.device)
        teacher = None
        if self.pair:
            values = self.pair[0].values
            teacher = values, diagnostics.shared(values, values)
        places = self.own | self.others
        inputs = images.fingerprints | {"teacher": self.card["outputs"]}
        inputs |= _named_fingerprints(self.others)

        def rows(evidence: dict, seed: int, step: str) -> Iterator[dict[str, Any]]:
            weights = load_step(network, student_folder(study, cell, seed), evidence, step)
            yield from probe_network(
                places, network, weights, images.pixels, images.image_shape, study.probe, teacher
            )

        for seed, evidence in evidences.items():
            untrained = {"weights": evidence["initialisation"]["weights_sha256"]}
            for step in evidence["series"]:
                row = axes_of(study, cell) | {"seed": seed, "step": int(step)}
                make = partial(rows, evidence, seed, step)
                if step == "0":  # the same network in every cell
                    make = partial(self._once, inputs | untrained, make)
                yield from (row | more for more in make())

    def teacher(self) -> Iterator[dict[str, Any]]:
        """The teacher's rows: of its stored features, and of other data."""
        row = axes_of(self.study, self.cell) | {"strategy": "teacher", "seed": -1, "step": -1}
        inputs = {"weights": self.card["weights_sha256"], "outputs": self.card["outputs"]}
        rows = []
        if self.pair:
            place = {"on": OWN, "layer": LAST}
            make = partial(probe_pair, place, *self.pair, self.study.probe)
            rows += self._once(inputs | self.images.fingerprints, make)
        for name, examples in self.others.items():
            make = partial(self._teacher_elsewhere, name, examples)
            rows += self._once(inputs | _fingerprints({name: examples}), make)
        yield from (row | more for more in rows)

    def _teacher_elsewhere(self, name: str, examples: Examples) -> Iterator[dict[str, Any]]:
        """Probes of the teacher's features on another data set."""
        study, images, folder = self.study, self.images, teacher_folder(self.study)
        network = load_teacher(study, images, self.device, folder, read_evidence(folder))
        last = study.probe.model_copy(update={"layers": (LAST,)})
        yield from probe_network(
            {name: examples}, network, self.card["weights_sha256"], teacher_pixels(study, images),
            images.image_shape, last,
        )  # fmt: skip

    def _once(
        self, inputs: dict[str, Any], make: Callable[[], Iterator[dict[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Rows of a network that is the same in many cells, computed for the first of them.

        Args:
            inputs: All that determines the rows, beside the study's settings of probes.
        """
        study, asked = self.study, self.study.step_settings("probe")
        path = study.runs / "probe" / "once" / files.fingerprint(inputs)[:12] / "probes.parquet"
        with open_run(study.runs, path.parent, {"step": asked, "inputs": inputs}) as run:
            if not run.finished:
                write_parquet(path, pd.DataFrame(make()), {"settings": run.settings_sha256})
                evidence = {"step": "probe", "study": study.name}
                evidence["table_sha256"] = files.sha256_file(path)
                run.finish(evidence, self.device)
        return read_table(path, asked).to_dict("records")


def _probe_evidence(table: pd.DataFrame, on: str) -> dict[str, Any]:
    """The facts that the checks read: of one data set and the last layer; and for all rows, that
    training and test features are of the same weights."""
    students = table[(table["strategy"] != "teacher") & (table["on"] == on)]
    linear = students[(students["probe"] == "linear") & (students["layer"] == LAST)]
    steps = linear.groupby("seed")["step"]  # seeds that stop early have other last steps
    first, last = linear.loc[steps.idxmin()], linear.loc[steps.idxmax()]
    floor, trained = float(first["accuracy"].mean()), float(last["accuracy"].mean())
    kept = bool((first["step"] == 0).all())  # else no seed's untrained network is among the rows
    worst = last.loc[last["rank_ratio"].idxmin()]
    pairs = table[["train_weights", "test_weights"]].drop_duplicates()
    return {
        "floor": {
            "trained": trained,
            "untrained": floor if kept else None,
            "slack": float(2 * np.sqrt(floor * (1 - floor) / int(last["n_test"].iloc[0]))),
        },
        "collapse": {
            "ratio": float(worst["rank_ratio"]),
            "threshold": float(worst["rank_threshold"]),
        },
        "probes": pairs.to_dict("records"),
    }
