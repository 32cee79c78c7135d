"""A source with other labels: noisy ones drawn from a seed, or those of a file."""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kdlib.cache.sources import Source, check_labels
from kdlib.repro import files
from kdlib.repro.seeds import hashed
from kdlib.study.data import Relabel, data_path


def relabelled(source: Source, relabel: Relabel, limited: bool = False) -> Source:
    """A source whose labels are replaced, the old ones beside them as `original_labels`.

    Whether and how a label changes is a function of the seed and the example id.

    Args:
        limited: The source is the beginning of a split, and a file may have labels for all of it.

    Raises: FileNotFoundError for an absent file; ValueError for labels that are not one per example
        or out of range, or for a source without labels.
    """
    if not source.class_names:
        raise ValueError(f"{source.name} has no labels to replace (study: data.relabel)")
    n_classes, labels = len(source.class_names), None
    identity = {"noise": relabel.noise, "kind": relabel.kind, "seed": relabel.seed}
    if relabel.file is not None:
        labels = _labels_of(relabel, source.n_examples, n_classes, limited)
        identity = {"key": relabel.key, "sha256": files.sha256_array(labels)}
    return replace(
        source,
        identity=source.identity | {"relabel": identity},
        fetch_range=lambda start, stop: (start, source.fetch_range(start, stop)),
        decode=_DecodeRelabelled(source.decode, relabel, n_classes, labels),
        columns=(*source.columns, "original_labels"),
    )


def _labels_of(relabel: Relabel, n_examples: int, n_classes: int, limited: bool) -> np.ndarray:
    path = data_path(relabel.file)
    if not path.is_file():
        raise FileNotFoundError(
            f"labels {path} are not there; put the file into the data folder "
            f"({files.data_root()}), set KDLIB_DATA, or write an absolute path (data.relabel.file)"
        )
    try:
        with zipfile.ZipFile(path) as archive:  # an .npz: anything else is refused here
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        with np.load(path, allow_pickle=False) as stored:
            labels = stored[relabel.key] if relabel.key in names else None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole .npz file of plain arrays ({error})") from None
    if labels is None:
        raise ValueError(f"{path}: no array {relabel.key!r}; {files.nearest(relabel.key, names)}")
    fits = labels.shape == (n_examples,) or (limited and labels.shape[:1] > (n_examples,))
    if labels.ndim != 1 or not fits or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{relabel.key} of {path} is {labels.dtype} {labels.shape}; expected one integer for "
            f"each of {n_examples} training images"
        )
    labels = labels[:n_examples].astype(np.int64)
    check_labels(labels, n_classes, f"{relabel.key} in {path}")
    return labels


@dataclass(frozen=True)
class _DecodeRelabelled:
    decode: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    relabel: Relabel
    n_classes: int
    labels: np.ndarray | None

    def __call__(self, payload: tuple[int, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        start, inner = payload
        images, originals = self.decode(inner)
        ids = np.arange(start, start + len(originals))
        if self.labels is not None:
            return images, self.labels[ids], originals
        drawn = hashed(ids, self.relabel.seed, "labels")
        changed = drawn.astype(np.float64) * 2.0**-64 < self.relabel.noise
        shift = np.ones(len(ids), np.int64)
        if self.relabel.kind == "symmetric":
            shift += (hashed(~ids, self.relabel.seed, "labels") % (self.n_classes - 1)).astype(int)
        return images, np.where(changed, (originals + shift) % self.n_classes, originals), originals
