"""Opens the source that a study names: digits, torchvision's sets, folders, Hugging Face, tensors;
its labels may be others: noisy ones drawn from a seed, or those of a file."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from kdlib.cache.huggingface import open_huggingface
from kdlib.cache.image_files import open_folder
from kdlib.cache.sources import Source, array_source, check_labels, limited
from kdlib.cache.tensor_files import open_tensors
from kdlib.repro import files
from kdlib.repro.seeds import hashed
from kdlib.study.data import Data, Relabel, data_path

N_DIGITS_TRAIN = 1297  # of 1,797; the last 500 are the test split


def open_source(data: Data, split: str) -> Source:
    """The images of one split, as the `data` section of a study names them; the training split with
    other labels where the section says so.

    Args:
        split: `train` or, of labelled images, `test`.

    Raises: ValueError for another split, for `n_train` beyond the split, or for a folder or data
        set whose layout, images or labels are unfit; FileNotFoundError when the data are not there
        and cannot be downloaded.
    """
    if split not in data.splits:  # images without labels have no test split
        raise ValueError(f"unknown split {split!r}; {files.nearest(split, data.splits)}")
    openers = {"folder": open_folder, "huggingface": open_huggingface, "tensors": open_tensors}
    source = openers.get(data.source, _open_arrays)(data, split)
    if split == "train" and data.n_train is not None:
        source.identity["n_train"] = data.n_train
    if split == "train" and data.relabel is not None:
        source = relabelled(source, data.relabel, first=data.n_train is not None)
    return source


def _open_arrays(data: Data, split: str) -> Source:
    read = _read_digits(split) if data.source == "digits" else _read_torchvision(data, split)
    images, labels, class_names = read
    if not data.labelled:
        labels, class_names = np.full(len(images), -1), ()
    n = limited(data, split, len(images))
    return array_source(
        data.source, split, images[:n], labels[:n], class_names, image_size=data.image_size
    )


def _read_digits(split: str) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """scikit-learn's digits, 1x8x8: ships with the library, no download.

    Its values 0..16 become 0..255 by `(value * 255 + 8) // 16`, that is times 255/16, rounded half
    up. Train is the first 1,297 images, test the last 500: the images stand in the order of their
    writers, so that (but for one writer at the border) the test digits are by other hands.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images.astype(np.int64) * 255 + 8) // 16
    part = slice(None, N_DIGITS_TRAIN) if split == "train" else slice(N_DIGITS_TRAIN, None)
    return images.astype(np.uint8)[part, None], digits.target[part], [str(d) for d in range(10)]


def _read_torchvision(data: Data, split: str) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
    """MNIST, CIFAR-10 or CIFAR-100 from the data folder, in the official order; downloaded first if
    it is not there.

    torchvision unpickles the CIFAR archives, but only after it has compared their md5 sums with the
    official ones.
    """
    from torchvision import datasets

    root, kind = files.data_root(), getattr(datasets, data.source.upper())
    try:
        opened = kind(root, train=split == "train", download=True)
    except (RuntimeError, ValueError, AssertionError, EOFError, OSError) as error:
        raise FileNotFoundError(
            f"{data.source} is missing or damaged in {root}, and downloading it there failed "
            f"({files.one_line(error)}): delete what is there of it and let torchvision.datasets."
            f"{kind.__name__} download it on a machine with network, or set KDLIB_DATA to a "
            "folder that has it"
        ) from None
    labels = np.asarray(opened.targets)
    if data.source == "mnist":
        return opened.data.numpy()[:, None], labels, [str(d) for d in range(10)]
    return opened.data.transpose(0, 3, 1, 2), labels, opened.classes


def relabelled(source: Source, relabel: Relabel, first: bool = False) -> Source:
    """A source whose labels are replaced, the old ones beside them as `original_labels`.

    Whether and how a label changes is a function of the seed and the example id.

    Args:
        first: The source is the beginning of a split, and a file may have labels for all of it.

    Raises: FileNotFoundError for an absent file; ValueError for labels that are not one per example
        or out of range, or for a source without labels.
    """
    if not source.class_names:
        raise ValueError(f"{source.name} has no labels to replace (study: data.relabel)")
    n_classes, labels = len(source.class_names), None
    identity = {"noise": relabel.noise, "kind": relabel.kind, "seed": relabel.seed}
    if relabel.file is not None:
        labels = _labels_of(relabel, source.n_examples, n_classes, first)
        identity = {"key": relabel.key, "sha256": files.sha256_array(labels)}
    return replace(
        source,
        identity=source.identity | {"relabel": identity},
        fetch_range=lambda start, stop: (start, source.fetch_range(start, stop)),
        decode=partial(_relabel, source.decode, relabel, n_classes, labels),
        columns=(*source.columns, "original_labels"),
    )


def _labels_of(relabel: Relabel, n_examples: int, n_classes: int, first: bool) -> np.ndarray:
    path = data_path(relabel.file)
    if not path.is_file():
        raise FileNotFoundError(
            f"labels {path} are not there; put the file into the data folder "
            f"({files.data_root()}), set KDLIB_DATA, or write an absolute path (data.relabel.file)"
        )
    try:
        with np.lib.npyio.NpzFile(path, allow_pickle=False) as stored:
            names = stored.files
            labels = stored[relabel.key] if relabel.key in names else None
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole .npz file of plain arrays ({error})") from None
    if labels is None:
        raise ValueError(f"{path}: no array {relabel.key!r}; {files.nearest(relabel.key, names)}")
    fits = labels.shape == (n_examples,) or (first and labels.shape[:1] > (n_examples,))
    if labels.ndim != 1 or not fits or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{relabel.key} of {path} is {labels.dtype} {labels.shape}; expected one integer for "
            f"each of {n_examples} training images"
        )
    labels = labels[:n_examples].astype(np.int64)
    check_labels(labels, n_classes, f"{relabel.key} in {path}")
    return labels


def _relabel(
    decode: Callable[[Any], tuple[np.ndarray, np.ndarray]],
    relabel: Relabel,
    n_classes: int,
    labels: np.ndarray | None,
    payload: tuple[int, Any],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    start, inner = payload
    images, originals = decode(inner)
    ids = np.arange(start, start + len(originals))
    if labels is not None:
        return images, labels[ids], originals
    changed = hashed(ids, relabel.seed, "labels").astype(np.float64) * 2.0**-64 < relabel.noise
    shift = np.ones(len(ids), np.int64)
    if relabel.kind == "symmetric":
        shift += (hashed(~ids, relabel.seed, "labels") % (n_classes - 1)).astype(int)
    return images, np.where(changed, (originals + shift) % n_classes, originals), originals
