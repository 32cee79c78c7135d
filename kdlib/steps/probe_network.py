"""Probes and diagnostics of one network, on the study's images and on those of other data sets."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from kdlib.cache.agreement import open_sources
from kdlib.cache.build import build_splits
from kdlib.cache.shards import Cache
from kdlib.cache.sources import SPLITS
from kdlib.compare.text import table
from kdlib.dataset.images import Images, probe_examples
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import split_ids
from kdlib.models.base import Network
from kdlib.models.networks import network_for
from kdlib.models.weights import read_weights
from kdlib.probes import diagnostics
from kdlib.probes.classifiers import Features, few_shot_probe, knn_probe, linear_probe
from kdlib.probes.features import labelled_features, layer_features
from kdlib.repro import files
from kdlib.repro.seeds import generator
from kdlib.steps.processes import prepare_device
from kdlib.study.data import Data, cache_folder
from kdlib.study.evaluation import OWN, Probe
from kdlib.study.models import Model
from kdlib.study.study import Study

Examples = list[tuple[Cache, np.ndarray]]  # (cache, example ids) to train and to test a probe on

LAST = "features"  # value of the column `layer` that checks read


def probe_network(
    places: dict[str, Examples],
    network: Network,
    weights: str,
    pixels: Pixels,
    image_shape: tuple[int, int, int],
    settings: Probe,
    teacher: tuple[np.ndarray, float] | None = None,
) -> Iterator[dict[str, Any]]:
    """The rows of every layer of one network on each data set, in one pass over each split; on the
    study's own compared with the teacher."""
    device = next(network.parameters()).device
    for on, examples in places.items():
        pair, beside = [], teacher if on == OWN else None
        for cache, ids in examples:
            raw = torch.from_numpy(cache.read("images", ids)).to(device)
            layers = layer_features(network, pixels, raw, image_shape, settings.layers)
            pair.append({k: labelled_features(cache, ids, v, weights) for k, v in layers.items()})
        for layer in settings.layers:
            row = {"on": on, "layer": layer}
            yield from probe_pair(row, pair[0][layer], pair[1][layer], settings, beside)


def probe_pair(
    row: dict[str, Any],
    train: Features,
    test: Features,
    settings: Probe,
    teacher: tuple[np.ndarray, float] | None = None,
) -> Iterator[dict[str, Any]]:
    with threadpool_limits(1, user_api="blas"):  # sums depend on the number of threads
        shape = _diagnostics(train, settings.seed, teacher)
    results = [linear_probe(train, test, settings.c_grid, settings.seed)]
    for i, k in enumerate(settings.ks):
        result = knn_probe(train, test, k)
        results.append(dataclasses.replace(result, probe=f"knn_{k}") if i else result)
    for n_shots in settings.few_shot:
        results.append(few_shot_probe(train, test, n_shots, settings.few_shot_draws, settings.seed))
    for result in results:
        is_knn = result.probe.startswith("knn")
        yield row | {
            "probe": result.probe,
            "accuracy": result.accuracy,
            "chosen": float(result.chosen),
            **({"k": int(result.chosen) if is_knn else 0} if isinstance(settings.k, tuple) else {}),
            "converged": result.converged,
            **shape,
            "n_features": train.values.shape[1],
            "n_train": result.n_train,
            "n_test": result.n_test,
            "train_examples": train.examples,
            "test_examples": test.examples,
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


def other_examples(data: Data) -> Examples:
    """The kept training examples and the test examples of another data set, cached on first use.

    Raises: ValueError for images without labels; checks.CheckError for splits that do not belong
        together; whatever opening the source raises.
    """
    if not data.labelled:
        raise ValueError(
            "images without labels cannot be probed, since a probe learns from labels (study: "
            "probe.others, data.labelled)"
        )
    folder, parts = cache_folder(data), {split: data.part_of(split) for split in SPLITS}
    with files.locked(folder.parent / f".{folder.name}.lock"):  # cells are probed side by side
        caches = build_splits(open_sources(data), folder, data.shard_size, parts)
    train, test = (caches[split] for split in SPLITS)
    kept, _ = split_ids(train.example_ids, data.n_validation, data.split_seed)
    return [(train, kept), (test, np.arange(test.n_examples))]


def probe_weights(
    study: Study, images: Images, model: Model, path: Path, pixels: Pixels | None = None
) -> pd.DataFrame:
    """Probes and diagnostics of a weight file from elsewhere, on a study's images.

    Args:
        model: The network the weights are of, for images and classes like the study's.
        path: Of the file; its last layer may be missing, or be for other classes.
        pixels: The normalisation of its training; None takes the study's.

    Returns: One row per data set, layer and probe, as of `probe_cell`, without the axes.
    Raises: FileNotFoundError or ValueError for a file that is not there or fits another network.
    """
    device = prepare_device(study.compute)
    network = network_for(images, model, 0, device)
    weights = read_weights(network, path, "any").weights_sha256
    own = probe_examples(images)  # none without labels
    places = {OWN: own} if own else {}
    places |= {name: other_examples(data) for name, data in study.probe.others.items()}
    shown = pixels or images.pixels
    return pd.DataFrame(
        probe_network(places, network, weights, shown, images.image_shape, study.probe)
    )


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
