"""Outputs of a network, stored in shards by example id, and their verification."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import bdtrc

from kdlib.cache.build import build_shards
from kdlib.cache.outputs import CLEAN_VIEW, KIND, SPARSE, encoded, stored_columns, stored_logits
from kdlib.cache.remedies import delete_and_run
from kdlib.cache.shards import Cache, CacheError
from kdlib.dataset import views
from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network, resized
from kdlib.models.evaluation import accuracy, all_outputs
from kdlib.models.weights import weights_fingerprint
from kdlib.study.training import Augment


@dataclass(frozen=True)
class Replay:
    """`n` augmented views that teacher and students share: pass p of a student sees view p % n."""

    n: int
    augment: Augment
    seed: int


def output_header(
    network: Network,
    pixels: Pixels,
    images: Cache,
    replay: Replay | None,
    top_k: int | None,
    grid: int | None = None,
) -> dict[str, Any]:
    """All that determines a teacher's stored outputs: weights, normalisation, images, views, and
    how logits and grids are stored."""
    view: Any = CLEAN_VIEW
    if replay is not None:
        augment = replay.augment.model_dump(mode="json")
        view = {"n": replay.n, "augment": augment, "seed": replay.seed}
    optional = {"image_size": network.image_size, "grid": grid}
    return {
        "kind": KIND,
        "split": images.header["split"],
        "teacher": weights_fingerprint(network),
        "pixels": {"mean": pixels.mean, "std": pixels.std},
        "images": images.fingerprint,
        "view": view,
        "n_classes": network.n_classes,
        "top_k": top_k,
    } | {key: value for key, value in optional.items() if value is not None}


def store_outputs(
    network: Network,
    pixels: Pixels,
    images: Cache,
    folder: Path,
    device: str = "cpu",
    *,
    replay: Replay | None = None,
    top_k: int | None = None,
    grid: int | None = None,
    wanted: Collection[str] = ("logits", "features"),
    part: tuple[int, int] = (1, 1),
) -> Cache:
    """Store a teacher's outputs for all images of a cache, resuming a killed build.

    Columns, all but `indices` in float16, for V views (1 without `replay`): `logits` (V, C), or
    with `top_k` `values` (V, k), `indices` int16 or int32 (V, k) and `log_tail` (V,), the log of
    the probability of all other classes; `features` (V, D); `stage<k>` (V, D_k, H_k, W_k), the
    feature grid of a stage; `attention<k>` (V, H_k, W_k), its attention map.

    Args:
        replay: Views to store; None stores outputs for the images without augmentation.
        top_k: In [1, C); None stores all logits.
        grid: Side to which feature grids are resized; None stores whole ones.
        wanted: Names of `Network.outputs`.
        part: (i, k): the i-th of k equal runs of shards.

    Returns: The open cache of outputs, aligned with the image cache by example id.
    Raises: CacheError when the folder holds outputs of another teacher, of other images or views;
        OverflowError when an output does not fit into float16; ValueError for a `top_k` outside its
        range, or an output the network does not have.
    """
    n_views = 1 if replay is None else replay.n
    columns = output_columns(network, images.layout("images")[1], replay, top_k, grid, wanted)

    def make(span: tuple[int, int]) -> dict[str, np.ndarray]:
        ids = np.arange(*span)
        values = (
            view_outputs(network, pixels, images, ids, v, replay, device, wanted, grid)
            for v in range(n_views)
        )
        parts = [encoded(of_view, top_k) for of_view in values]
        return {column: np.stack([part[column] for part in parts], 1) for column in columns}

    return build_shards(
        folder,
        output_header(network, pixels, images, replay, top_k, grid),
        columns,
        make,
        n_examples=images.n_examples,
        shard_size=images.shard_size,
        part=part,
        describe=f"teacher outputs, {images.header['split']}",
    )


def output_columns(
    network: Network,
    image_shape: tuple[int, ...],
    replay: Replay | None,
    top_k: int | None,
    grid: int | None,
    wanted: Collection[str],
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of one example's row in each column of stored outputs; arguments as of
    `store_outputs`.

    Raises: ValueError as `store_outputs`.
    """
    n_classes, n_views = network.n_classes, 1 if replay is None else replay.n
    if top_k is not None and not 1 <= top_k < n_classes:
        raise ValueError(f"top_k is {top_k} of {n_classes} classes; expected [1, {n_classes})")
    shapes = network.output_shapes(image_shape, wanted)
    rows = {name: torch.zeros(1, *shape) for name, shape in shapes.items()}
    zeros = encoded(_shrunk(rows, grid), top_k)
    return {c: (rows.dtype.str, (n_views, *rows.shape[1:])) for c, rows in zeros.items()}


def _shrunk(outputs: Mapping[str, torch.Tensor], grid: int | None) -> dict[str, torch.Tensor]:
    """Outputs with their feature grids resized to a side, as losses resize them."""
    return {
        name: resized(values, (grid, grid)) if grid and name.startswith("stage") else values
        for name, values in outputs.items()
    }


def view_outputs(
    network: Network,
    pixels: Pixels,
    images: Cache,
    ids: np.ndarray,
    view: int | torch.Tensor,
    replay: Replay | None,
    device: str | torch.device,
    wanted: Collection[str],
    grid: int | None = None,
) -> dict[str, torch.Tensor]:
    """Outputs of one view of some examples, by name.

    Args:
        view: The same of all, or of each (B,) int64; without `replay` the images are not augmented.
    """
    raw = torch.from_numpy(images.read("images", ids)).to(device)
    if replay is not None:
        epochs = torch.as_tensor(view).expand(len(ids))
        raw = views.augment(raw, torch.from_numpy(ids), epochs, replay.augment, replay.seed)
    wanted = tuple(wanted)
    values = dict(zip(wanted, all_outputs(network, pixels, raw, wanted), strict=True))
    return _shrunk(values, grid)


def stored_accuracy(stored: Cache, images: Cache, example_ids: np.ndarray | None = None) -> float:
    """The accuracy of a teacher's stored outputs for the first view, in [0, 1].

    Args:
        example_ids: None takes all examples of the cache.
    """
    ids = images.example_ids if example_ids is None else example_ids
    return accuracy(stored_logits(stored, ids), images.read("labels", ids))


def chance_accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """The accuracy that answers in these shares exceed in at most one of 100 cases when they have
    nothing to do with the labels.

    Args:
        predicted, labels: (N,) integers from 0, N > 0.

    Returns: In [0, 1]; 1 when N answers are too few to differ from chance.

    >>> chance_accuracy(np.arange(500) % 10, np.arange(500) % 10)
    0.132
    """
    n, size = len(labels), 1 + int(max(predicted.max(), labels.max()))
    shares = [np.bincount(values, minlength=size) / n for values in (predicted, labels)]
    more = bdtrc(np.arange(n + 1), n, min(1.0, float(shares[0] @ shares[1])))  # P(right > k)
    return int(np.argmax(more <= 0.01)) / n


def verify_outputs(
    network: Network,
    pixels: Pixels,
    images: Cache,
    stored: Cache,
    replay: Replay | None = None,
    n: int = 256,
) -> float:
    """Compute the outputs of `n` evenly spaced examples again, of each view in turn, and compare
    them with the stored ones.

    Returns: Largest absolute difference of an output, relative to its largest value in the sample;
        with top-k, the difference of the probability of all other classes when that is larger.
    Raises: CacheError when it exceeds 1 %: the stored rows are then not those of these examples.
    """
    known = stored.example_ids
    ids = known[np.linspace(0, len(known) - 1, min(n, len(known))).astype(np.int64)]
    n_views, drift = 1 if replay is None else replay.n, 0.0
    wanted = dict.fromkeys("logits" if c in SPARSE else c for c in stored.header["columns"])
    device = next(network.parameters()).device
    for view, some in enumerate(np.array_split(ids, min(n_views, len(ids)))):
        grid = stored.header.get("grid")
        fresh = view_outputs(network, pixels, images, some, view, replay, device, wanted, grid)
        drift = float(np.maximum(drift, _drift(stored, some, view, fresh)))  # keeps NaN
    if not drift <= 0.01:  # NaN, too
        raise CacheError(
            f"stored teacher outputs in {stored.folder} differ from recomputed ones by {drift:.1%} "
            f"of the largest value; {delete_and_run(stored.folder)}"
        )
    return drift


def _drift(stored: Cache, ids: np.ndarray, view: int, fresh: Mapping[str, torch.Tensor]) -> float:
    drifts = [0.0]
    for name, values in fresh.items():
        columns = stored_columns(stored, (name,))
        parts = {c: torch.from_numpy(stored.read(c, ids)[:, view]) for c in columns}
        values = values.float().cpu()
        largest = values.abs().max().clamp(min=torch.finfo(values.dtype).tiny)
        if name in parts:
            drifts.append(float((values - parts[name].float()).abs().max() / largest))
            continue
        indices = parts["indices"].long()
        kept = (values.gather(1, indices) - parts["values"].float()).abs().max() / largest
        tail = 1 - values.double().softmax(1).gather(1, indices).sum(1)
        lost = (tail - parts["log_tail"].double().exp()).abs().max()
        drifts += [float(kept), float(lost)]
    return float(np.max(drifts))  # NaN stays
