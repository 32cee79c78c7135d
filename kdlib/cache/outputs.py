"""A teacher's stored outputs for every example and view: their form in shards, and their reading.

The stored header names the teacher's weights, the images and the views, so that outputs of another
teacher, of other images or of other views are refused. Logits are kept whole, or as the k largest
and the probability mass of the remaining classes.
Sources: [Hinton2015] Distilling the Knowledge in a Neural Network, arXiv:1503.02531; [Wu2022]
TinyViT: Fast Pretraining Distillation, arXiv:2207.10666 (sparse logits of replayed views).
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch

from kdlib.cache.remedies import run_to_make
from kdlib.cache.shards import Cache, CacheError

KIND = "teacher_outputs"
CLEAN_VIEW = "clean"  # one view per example, without augmentation
SPARSE = ("values", "indices", "log_tail")  # columns of the k largest logits


def encoded(outputs: Mapping[str, torch.Tensor], top_k: int | None) -> dict[str, np.ndarray]:
    """The stored form of some outputs.

    Args:
        outputs: By name, (B, ...) float.

    Returns: Per column the rows without their view axis.
    """
    rows = {}
    for name, values in outputs.items():
        if name != "logits" or top_k is None:
            rows[name] = _to_float16(values, name)
            continue
        kept, indices = values.topk(top_k)
        others = values.double().scatter(1, indices, -torch.inf)
        log_tail = others.logsumexp(1) - values.double().logsumexp(1)
        rows["values"] = _to_float16(kept, "logits")
        rows["indices"] = indices.cpu().numpy().astype("<i2" if values.shape[1] <= 2**15 else "<i4")
        rows["log_tail"] = _to_float16(log_tail, "log tail")
    return rows


def decoded(parts: Mapping[str, torch.Tensor], n_classes: int) -> dict[str, torch.Tensor]:
    """Outputs by name, float32, from their stored form without its view axis.

    What top-k left out shares its mass evenly: the softmax at temperature 1 gives the stored
    classes their probabilities, and all remaining ones together theirs.
    """
    rows = {name: part.float() for name, part in parts.items() if name not in SPARSE}
    if "values" in parts:
        values, log_tail = parts["values"].float(), parts["log_tail"].float()
        log_total = values.logsumexp(1) - torch.log(-torch.expm1(log_tail))
        rest = log_tail + log_total - float(np.log(n_classes - values.shape[1]))
        dense = rest[:, None].expand(len(values), n_classes).clone()
        rows["logits"] = dense.scatter_(1, parts["indices"].long(), values)
    return rows


def _to_float16(values: torch.Tensor, name: str) -> np.ndarray:
    half = values.half()
    if not bool(torch.isfinite(half).all()):
        raise OverflowError(
            f"teacher {name} reach {float(values.abs().max()):.4g}, beyond float16's 65,504; "
            "check the teacher's normalisation (study: teacher.mean, teacher.std)"
        )
    return half.cpu().numpy()


def open_outputs(
    folder: Path, images: Cache, teacher: str, part: tuple[int, int] | None = None
) -> Cache:
    """Open stored outputs for reading.

    Args:
        images: The image cache they must belong to.
        teacher: Fingerprint of the weights they must come from.
        part: (i, k): only the i-th of k equal runs of shards; None: all.

    Raises: CacheError that says which of the two differs, or that the outputs are unfinished.
    """
    expected = {"kind": KIND, "images": images.fingerprint, "teacher": teacher}
    return Cache(folder, expected, part)


def stored_columns(stored: Cache, wanted: Collection[str]) -> tuple[str, ...]:
    """The columns that hold some outputs; logits are whole, or the largest and the remaining mass.

    Raises: CacheError for an output that was not stored.
    """
    logits = ("logits",) if stored.header["top_k"] is None else SPARSE
    columns = [c for name in wanted for c in (logits if name == "logits" else (name,))]
    if missing := [c for c in columns if c not in stored.header["columns"]]:
        raise CacheError(
            f"{stored.folder} holds {', '.join(stored.header['columns'])} of the teacher, and no "
            f"{', '.join(missing)}; {run_to_make(stored.folder)} of a study whose objectives "
            "read them"
        )
    return tuple(columns)


def stored_logits(stored: Cache, example_ids: np.ndarray, view: int = 0) -> torch.Tensor:
    """Logits of one view of some examples as they are stored: (B, C) float32."""
    columns = stored_columns(stored, ("logits",))
    parts = {c: torch.from_numpy(stored.read(c, example_ids)[:, view]) for c in columns}
    return decoded(parts, stored.header["n_classes"])["logits"]
