"""Step 05: probes and diagnostics of every kept checkpoint of a cell, beside the teacher's.

Every row says which data it is `on` (`own`: the study's, or one of `probe.others`) and of which
`layer`. The tripwires judge the study's own data and the last layer. Leaves to others: probes and
diagnostics themselves (probe, diagnostics), where features come from (extracting), where students
are (distilling) and stored outputs (teaching).
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from kdlib.cache.build import build_images
from kdlib.cache.open import open_source
from kdlib.cache.shards import Cache
from kdlib.compare.text import table
from kdlib.dataset.images import Images, probe_examples
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import split_ids
from kdlib.models.base import Network
from kdlib.models.networks import network_for
from kdlib.models.weights import load_weights
from kdlib.probes import diagnostics
from kdlib.probes.classifiers import Features, few_shot_probe, knn_probe, linear_probe
from kdlib.probes.features import labelled_features, layer_features
from kdlib.repro import checks, files
from kdlib.repro.run import open_run, read_evidence, read_table
from kdlib.repro.seeds import generator
from kdlib.repro.tables import write_parquet
from kdlib.steps.checkpoints import load_step
from kdlib.steps.distill import open_student, student_folder
from kdlib.steps.processes import prepare_device
from kdlib.steps.teacher_network import load_teacher, teacher_folder, teacher_pixels
from kdlib.steps.teacher_outputs import open_teacher, teacher_features
from kdlib.study.cells import Cell
from kdlib.study.data import Data, cache_folder
from kdlib.study.evaluation import Probe
from kdlib.study.models import Model
from kdlib.study.study import Study

Examples = list[tuple[Cache, np.ndarray]]  # (cache, ids): what a probe learns from, is tested on


OWN, LAST = "own", "features"  # what the tripwires judge


MAKER = "notebooks/05_probe.ipynb"


def probe_cell(study: Study, images: Images, cell: Cell) -> pd.DataFrame:
    """Step 05: probes and diagnostics of every kept checkpoint of a cell, and of the teacher.

    Returns: One row per seed, step, data set, layer and probe; the teacher's rows have strategy
        `teacher`. Diagnostics are of the training features, the same in every row of one network,
        data set and layer; `cka_teacher` is NaN on other data.
    Raises: TripwireError when features are collapsed, or a trained probe lies below the random
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
            heard = _teacher_pair(study, images, teacher)
            table = pd.DataFrame(
                [*_probe_students(
                    study, images, cell, evidences, heard[0], teacher["outputs"], others, device
                 ),
                 *_probe_teacher(study, images, cell, heard, teacher["outputs"], others, device)]
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
    path = probe_folder(study, cell) / "probes.parquet"
    return read_table(path, study.step_settings("probe"), MAKER)


def probe_folder(study: Study, cell: Cell) -> Path:
    """Where the probes of one cell are."""
    return study.runs / "probe" / cell.path


def probe_weights(
    study: Study, images: Images, model: Model, path: Path, pixels: Pixels | None = None
) -> pd.DataFrame:
    """Probes and diagnostics of a weight file that no study has made, on a study's images.

    Args:
        model: The network the weights are of, for images and classes like the study's.
        path: Where the file is.
        pixels: The normalisation it was trained with; None: the study's.

    Returns: One row per data set, layer and probe, as of `probe_cell`, without the axes.
    Raises: FileNotFoundError or ValueError for a file that is not there or fits another network.
    """
    device = prepare_device(study.compute)
    network = network_for(images, model, 0, device)
    weights = load_weights(network, path)
    places = {OWN: probe_examples(images)}
    places |= {name: other_examples(data) for name, data in study.probe.others.items()}
    rows = []
    for on, examples in places.items():
        rows += _probe_network(
            on, examples, network, weights, pixels or images.pixels, images.image_shape, study.probe
        )  # fmt: skip
    return pd.DataFrame(rows)


def probe_text(probes: pd.DataFrame) -> str:
    """The table of `probe_weights` as Markdown: accuracies in %, then diagnostics beside the values
    that theory gives."""
    first, accuracies, diagnostics = probes.iloc[0], [], []
    for (on, layer), rows in probes.groupby(["on", "layer"], sort=False):
        row = rows.iloc[0]
        cells = (
            f"{100 * r.accuracy:.2f}{'' if r.converged else ' (not converged)'}"
            for r in rows.itertuples()
        )
        accuracies.append((on, layer, row["n_features"], *cells))
        diagnostics.append(
            (
                on, layer,
                f"{row['effective_rank']:.1f} ({row['effective_rank'] / row['rank_ratio']:.1f})",
                f"{row['mean_cosine']:.4f}",
                f"{row['unit_variance']:.3g} ({1 / row['n_features']:.3g})",
                f"{row['alignment']:.3f}",
                f"{row['uniformity']:.3f} ({row['uniformity_even']:.3f})",
            )
        )  # fmt: skip
    kinds = probes["probe"].unique()
    theory = (
        "on", "layer", "effective rank (isotropic)", "mean cosine (0)", "unit variance (1 / D)",
        "alignment (2)", "uniformity (even)",
    )  # fmt: skip
    parts = [
        f"weights {first['weights_sha256'][:12]}, {first['n_test']:,} test images of the study",
        table(("on", "layer", "D", *kinds), accuracies, "ll" + "r" * (1 + len(kinds))),
        table(theory, diagnostics, "ll" + "r" * 5),
    ]
    return "\n\n".join(parts)


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
    places = {OWN: probe_examples(images)} | others
    inputs = images.fingerprints | {"teacher": outputs}
    inputs |= {"others": _fingerprints(others)} if others else {}

    def rows(evidence: dict, seed: int, step: str) -> Iterator[dict[str, Any]]:
        weights = load_step(network, student_folder(study, cell, seed), evidence, step)
        for on, examples in places.items():
            yield from _probe_network(
                on, examples, network, weights, images.pixels, images.image_shape, study.probe,
                (teacher.values, norm) if on == OWN else None,
            )  # fmt: skip

    for seed, evidence in evidences.items():
        untrained = evidence["initialisation"]["weights_sha256"]
        for step in evidence["series"]:
            row = dict(cell.items()) | {"seed": seed, "step": int(step)}
            found = partial(rows, evidence, seed, step)
            if step == "0":  # the same network in every cell
                found = partial(_once, study, inputs | {"weights": untrained}, found, device)
            yield from (row | of for of in found())


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
    found = _once(
        study, inputs | images.fingerprints,
        lambda: _probe_pair({"on": OWN, "layer": LAST}, *pair, study.probe), device,
    )  # fmt: skip
    for name, examples in others.items():
        found += _once(
            study, inputs | _fingerprints({name: examples}),
            partial(_teacher_elsewhere, study, images, name, examples, device), device,
        )  # fmt: skip
    yield from (row | of for of in found)


def _teacher_elsewhere(
    study: Study, images: Images, name: str, examples: Examples, device: str
) -> Iterator[dict[str, Any]]:
    """Probes of the teacher's features on another data set."""
    folder = teacher_folder(study)
    evidence = read_evidence(folder)
    network = load_teacher(study, images, device, folder, evidence)
    weights = evidence["teacher"]["weights_sha256"]
    last = study.probe.model_copy(update={"layers": (LAST,)})
    yield from _probe_network(
        name, examples, network, weights, teacher_pixels(study, images), images.image_shape, last
    )


def _once(
    study: Study,
    inputs: dict[str, Any],
    make: Callable[[], Iterator[dict[str, Any]]],
    device: str,
) -> list[dict[str, Any]]:
    """Rows of a network that many cells show, made by the first of them.

    Args:
        inputs: All that determines the rows, beside the study's own settings of probes.
    """
    own, folder = study.step_settings("probe"), study.runs / "probe" / "once"
    path = folder / files.fingerprint(inputs)[:12] / "probes.parquet"
    with open_run(study.runs, path.parent, {"step": own, "inputs": inputs}) as run:
        if not run.finished:
            write_parquet(path, pd.DataFrame(make()), {"settings": run.settings_sha256})
            sha256 = files.sha256_file(path)
            run.finish({"step": "probe", "study": study.name, "table_sha256": sha256}, device)
    return read_table(path, own, MAKER).to_dict("records")


def _probe_network(
    on: str,
    examples: Examples,
    network: Network,
    weights: str,
    pixels: Pixels,
    image_shape: tuple[int, int, int],
    settings: Probe,
    teacher: tuple[np.ndarray, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of every layer of one network on one data set, in one pass over each split."""
    place, pair = next(network.parameters()).device, []
    for cache, ids in examples:
        seen = torch.from_numpy(cache.read("images", ids)).to(place)
        found = layer_features(network, pixels, seen, image_shape, settings.layers)
        pair.append({k: labelled_features(cache, ids, v, weights) for k, v in found.items()})
    for layer in settings.layers:
        yield from _probe_pair(
            {"on": on, "layer": layer}, pair[0][layer], pair[1][layer], settings, teacher
        )


def _probe_pair(
    row: dict[str, Any],
    train: Features,
    test: Features,
    settings: Probe,
    teacher: tuple[np.ndarray, float] | None = None,
) -> Iterator[dict[str, Any]]:
    with threadpool_limits(1, user_api="blas"):  # sums depend on the number of threads
        shape = _diagnostics(train, settings.seed, teacher)
    results = [
        linear_probe(train, test, settings.c_grid, settings.seed),
        knn_probe(train, test, settings.k),
    ]
    for n_shots in settings.few_shot:
        results.append(few_shot_probe(train, test, n_shots, settings.few_shot_draws, settings.seed))
    for result in results:
        yield row | {
            "probe": result.probe,
            "accuracy": result.accuracy,
            "chosen": float(result.chosen),
            "converged": result.converged,
            **shape,
            "n_features": train.values.shape[1],
            "n_train": result.n_train,
            "n_test": result.n_test,
            "train_weights": train.weights_sha256,
            "test_weights": test.weights_sha256,
            "weights_sha256": result.weights_sha256,
        }


def _diagnostics(
    train: Features, seed: int, teacher: tuple[np.ndarray, float] | None
) -> dict[str, float]:
    """Columns of one network, data set and layer; `teacher` is its features of the same examples
    and their `shared` with themselves."""
    values, spread = train.values, diagnostics.collapse(train.values)
    rows = generator(seed, "probe", 0, 0).permutation(len(values))[: diagnostics.PAIRED]
    return {
        "effective_rank": spread.effective_rank,
        "rank_ratio": spread.ratio,
        "rank_threshold": spread.threshold_rank / spread.isotropic_rank,
        "mean_cosine": diagnostics.mean_cosine(values),
        "unit_variance": diagnostics.unit_variance(values),
        "alignment": diagnostics.alignment(values, train.labels),
        "uniformity": diagnostics.uniformity(values, rows),
        "uniformity_even": diagnostics.even_uniformity(values.shape[1]),
        "cka_teacher": float("nan")
        if teacher is None
        else diagnostics.linear_cka(values, teacher[0], teacher[1]),
    }


def _probe_evidence(table: pd.DataFrame, images: Images) -> dict[str, Any]:
    """What the tripwires judge: the study's own data and the last layer alone; that training and
    test features are of the same weights, everywhere."""
    students = table[(table["strategy"] != "teacher") & (table["on"] == OWN)]
    linear = students[(students["probe"] == "linear") & (students["layer"] == LAST)]
    steps = linear.groupby("seed")["step"]  # seeds that stop early have a last step of their own
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


def other_examples(data: Data) -> Examples:
    """The kept training examples and the test examples of another data set, cached on first use.

    Raises: ValueError for images without labels; whatever opening the source raises.
    """
    folder, found = cache_folder(data), []
    with files.locked(folder.parent / f".{folder.name}.lock"):  # cells are probed side by side
        for split in ("train", "test"):
            part = data.part_of(split)
            found.append(
                build_images(open_source(data, split), folder / split, data.shard_size, part)
            )
    train, test = found
    if not train.header["class_names"]:
        raise ValueError(
            f"the images of {train.folder} have no labels, and a probe learns from labels (params: "
            "probe.others)"
        )
    kept, _ = split_ids(train.example_ids, data.n_validation, data.split_seed)
    return [(train, kept), (test, np.arange(test.n_examples))]
