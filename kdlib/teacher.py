"""A teacher's outputs for every example, stored once in the shards of `cache` and bound to it.

The stored header names the teacher's weights, the images and the view, so that outputs of another
teacher, of other images or of another view are refused. Leaves to others: how a teacher is trained
(`trainer`) and which student reads what (`steps`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib.cache import Cache, CacheError, build
from kdlib.evaluation import Pixels, accuracy, all_outputs, outputs
from kdlib.models import Network
from kdlib.weights import weights_fingerprint

CLEAN_VIEW = "clean"  # one view per example, without augmentation


def output_header(network: Network, pixels: Pixels, images: Cache) -> dict[str, Any]:
    """What determines a teacher's outputs: weights, normalisation, images, view."""
    return {
        "kind": "teacher_outputs",
        "teacher": weights_fingerprint(network),
        "pixels": {"mean": pixels.mean, "std": pixels.std},
        "images": images.fingerprint,
        "view": CLEAN_VIEW,
    }


def store_outputs(
    network: Network, pixels: Pixels, images: Cache, folder: Path, device: str = "cpu"
) -> Cache:
    """Store logits and penultimate features of all images of a cache, resuming a killed build.

    Columns: `logits` float16 (V, C) and `features` float16 (V, D), with V = 1, the clean view.

    Returns: The open cache of outputs, aligned with the image cache by example id.
    Raises: CacheError when the folder holds outputs of another teacher or of other images;
        OverflowError when an output does not fit into float16.
    """
    n_classes = len(images.header["class_names"])
    columns = {"logits": ("<f2", (1, n_classes)), "features": ("<f2", (1, network.n_features))}

    def make(start: int, stop: int) -> dict[str, np.ndarray]:
        pixels_u8 = torch.from_numpy(images.read("images", np.arange(start, stop))).to(device)
        parts = list(outputs(network, pixels, pixels_u8))
        features, logits = (torch.cat(column) for column in zip(*parts, strict=True))
        return {
            "features": _to_float16(features, "features"),
            "logits": _to_float16(logits, "logits"),
        }

    return build(
        folder,
        output_header(network, pixels, images),
        columns,
        make,
        n_examples=images.n_examples,
        shard_size=images.header["shard_size"],
        describe=f"teacher outputs, {images.header['split']}",
    )


def _to_float16(values: torch.Tensor, name: str) -> np.ndarray:
    half = values.half()
    if not bool(torch.isfinite(half).all()):
        raise OverflowError(
            f"teacher {name} reach {float(values.abs().max()):.4g}, beyond float16's 65,504; "
            "check the teacher's normalisation (study: teacher.mean, teacher.std)"
        )
    return half.cpu().numpy()[:, None]  # (B, X) -> (B, V=1, X)


def open_outputs(folder: Path, images: Cache, teacher: str) -> Cache:
    """Open stored outputs for reading.

    Args:
        images: The image cache they must belong to.
        teacher: Fingerprint of the weights they must come from.

    Raises: CacheError that says which of the two differs, or that the outputs are unfinished.
    """
    return Cache(folder, {"images": images.fingerprint, "teacher": teacher, "view": CLEAN_VIEW})


def logits_by_id(stored: Cache) -> torch.Tensor:
    """Logits of the clean view, (n_examples, C) float32; row i is example id i."""
    return stored.resident("logits")[:, 0].float()


def stored_accuracy(stored: Cache, images: Cache) -> float:
    """The teacher's accuracy as read back from its stored outputs, in [0, 1]."""
    return accuracy(logits_by_id(stored), images.resident("labels"))


def verify_outputs(
    network: Network, pixels: Pixels, images: Cache, stored: Cache, n: int = 256
) -> float:
    """Recompute `n` evenly spaced examples and compare with what is stored.

    Returns: Largest absolute difference of a logit, relative to the largest logit of the sample.
    Raises: CacheError when it exceeds 1 %: the rows are then not those of these examples.
    """
    ids = np.linspace(0, images.n_examples - 1, min(n, images.n_examples)).astype(np.int64)
    sample = torch.from_numpy(images.read("images", ids))
    _, fresh = all_outputs(network, pixels, sample.to(next(network.parameters()).device))
    old = torch.from_numpy(stored.read("logits", ids))[:, 0].float()
    largest = fresh.abs().max().cpu().clamp(min=torch.finfo(fresh.dtype).tiny)
    drift = float((fresh.cpu() - old).abs().max() / largest)
    if not drift <= 0.01:  # NaN, too
        raise CacheError(
            f"stored teacher outputs in {stored.folder} differ from recomputed ones by {drift:.1%} "
            "of the largest logit; delete the folder and run notebooks/02_teacher.ipynb"
        )
    return drift
