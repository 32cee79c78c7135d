"""Opens the source that a study names: digits, torchvision's data sets, folders, Hugging Face."""

from collections.abc import Sequence

import numpy as np

from kdlib.cache.huggingface import open_huggingface
from kdlib.cache.image_files import open_folder
from kdlib.cache.relabel import relabelled
from kdlib.cache.sources import SPLITS, Source, array_source, limit_identity, limited
from kdlib.repro import files
from kdlib.study.data import Data

N_DIGITS_TRAIN = 1297  # of 1,797; the last 500 are the test split


def open_source(data: Data, split: str) -> Source:
    """The images of one split, as the `data` section of a study names them; the training split with
    other labels where the section says so.

    Args:
        split: `train` or `test`.

    Raises: ValueError for another split, for `n_train` beyond the split, or for a folder or data
        set whose layout, images or labels are unfit; FileNotFoundError when the data are not there
        and cannot be downloaded.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; {files.nearest(split, SPLITS)}")
    source = _open(data, split)
    if data.relabel is None or split != "train":
        return source
    return relabelled(source, data.relabel, limited=data.n_train is not None)


def _open(data: Data, split: str) -> Source:
    if data.source in ("folder", "huggingface"):
        return (open_folder if data.source == "folder" else open_huggingface)(data, split)
    read = _read_digits(split) if data.source == "digits" else _read_torchvision(data, split)
    images, labels, class_names = read
    n = limited(data, split, len(images))
    source = array_source(
        data.source, split, images[:n], labels[:n], class_names, image_size=data.image_size
    )
    source.identity.update(limit_identity(data, split))
    return source


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

    root, train = files.data_root(), split == "train"
    names = {"mnist": "MNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    kind = getattr(datasets, names[data.source])
    damage = (RuntimeError, ValueError, AssertionError, EOFError)
    try:
        try:
            opened = kind(root, train=train, download=False)
        except damage:  # not there, or not the official bytes
            opened = kind(root, train=train, download=True)
    except (*damage, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{data.source} is missing or damaged in {root}, and downloading it there failed "
            f"({reason}): delete what is there of it and let torchvision.datasets."
            f"{names[data.source]} download it on a machine with network, or set KDLIB_DATA to a "
            "folder that has it"
        ) from None
    labels = np.asarray(opened.targets)
    if data.source == "mnist":
        return opened.data.numpy()[:, None], labels, [str(d) for d in range(10)]
    return opened.data.transpose(0, 3, 1, 2), labels, opened.classes
