"""Sources of images with stable example ids, all behind one interface.

An example id is the position of an image in its split's own order, for ever. Holds the interface,
and images that are arrays in memory. Leaves to others: images that must be decoded (`encoded`,
`hub`), storing (`cache`), normalising and augmenting, and holding out a validation split.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from kdlib.cache.huggingface import open_hub
from kdlib.cache.image_files import RESIZE_RULE, SPLITS, fit, limit_identity, limited, open_folder
from kdlib.repro import files
from kdlib.repro.seeds import hashed
from kdlib.study.data import Data, Relabel, data_path

N_DIGITS_TRAIN = 1297  # of 1,797; the last 500 are the test split


@dataclass(frozen=True)
class Source:
    """One split of one data set.

    A range is read in two steps: `fetch`, which is cheap, where the source was opened, and `decode`
    anywhere. A pickled source is small and can decode but not fetch: only payloads travel.

    Attributes:
        class_names: Empty for images without labels.
        image_shape: (channels, height, width) of every image.
        identity: JSON-able; everything that determines the images, the labels and their order.
        fetch_range: What `fetch` calls once it has checked the range.
        decode: From what `fetch` returns to images, uint8 (n, *image_shape), and labels, int64
            (n,), in [0, n_classes), or -1 where there are none. Raises ValueError that names the
            example, for an image that cannot be read.
        parallel: Whether decoding is worth worker processes.
        columns: What `decode` returns, in this order.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    n_examples: int
    image_shape: tuple[int, int, int]
    identity: dict[str, Any]
    fetch_range: Callable[[int, int], Any] = field(repr=False, compare=False)
    decode: Callable[[Any], tuple[np.ndarray, np.ndarray]] = field(repr=False, compare=False)
    parallel: bool = False
    columns: tuple[str, ...] = ("images", "labels")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fetch_range": _fetch_elsewhere}

    def fetch(self, start: int, stop: int) -> Any:
        """What `decode` needs of the example ids [start, stop), and nothing else; picklable.

        Raises: IndexError for a range outside [0, n_examples].
        """
        if not 0 <= start <= stop <= self.n_examples:
            raise IndexError(
                f"asked for example ids [{start}, {stop}) of {self.name} {self.split}; expected a "
                f"range inside [0, {self.n_examples})"
            )
        return self.fetch_range(start, stop)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the example ids [start, stop); only these are decoded.

        Returns: As `decode`; raises as `fetch` and `decode`.
        """
        return self.decode(self.fetch(start, stop))


def relabelled(source: Source, relabel: Relabel, limited: bool = False) -> Source:
    """A source whose labels are replaced, the old ones beside them as `original_labels`.

    Whether and how a drawn label changes depends on the seed and the example id alone.

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
    if not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(
            f"{relabel.key} of {path} spans [{labels.min()}, {labels.max()}]; expected "
            f"[0, {n_classes - 1}]"
        )
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


def _fetch_elsewhere(start: int, stop: int) -> Any:
    raise RuntimeError(
        "a source that came from another process decodes only; call `fetch` where it was opened"
    )


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
        found = (open_folder if data.source == "folder" else open_hub)(data, split)
        return Source(data.source, split, **vars(found), parallel=True)
    read = _read_digits(split) if data.source == "digits" else _read_torchvision(data, split)
    images, labels, class_names = read
    n = limited(data, split, len(images))
    source = array_source(
        data.source, split, images[:n], labels[:n], class_names, image_size=data.image_size
    )
    source.identity.update(limit_identity(data, split))
    return source


def array_source(
    name: str,
    split: str,
    images: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    image_size: int | None = None,
) -> Source:
    """A source over arrays in memory; its identity is their sha256.

    Args:
        images: (N, channels, H, W) uint8; channels 1 or 3.
        labels: (N,), integers in [0, n_classes).
        image_size: Side in pixels to which images are resized as they are read; None keeps H, W.

    Raises: ValueError for other shapes, dtypes or labels.
    """
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"images of {name} {split} are {images.dtype} {images.shape}; expected uint8 "
            "(N, channels, H, W) with 1 or 3 channels"
        )
    labels = np.asarray(labels, np.int64)
    if labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} {split} has {len(images)} images but labels of shape {labels.shape}; expected "
            "one label per image"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(class_names):
        raise ValueError(
            f"labels of {name} {split} span [{labels.min()}, {labels.max()}]; expected "
            f"[0, {len(class_names) - 1}] for its {len(class_names)} classes"
        )
    identity = {"source": name, "split": split, "sha256": files.sha256_array(images, labels)}
    resize = image_size is not None and images.shape[2:] != (image_size, image_size)
    if resize:
        identity |= {"image_size": image_size, "resize": RESIZE_RULE}

    def fetch_range(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        return images[start:stop], labels[start:stop]

    side = (image_size, image_size) if resize else images.shape[2:]
    return Source(
        name=name,
        split=split,
        class_names=tuple(class_names),
        n_examples=len(images),
        image_shape=(images.shape[1], *side),
        identity=identity,
        fetch_range=fetch_range,
        decode=_DecodeArrays(image_size if resize else None),
    )


@dataclass(frozen=True)
class _DecodeArrays:
    image_size: int | None

    def __call__(self, payload: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        images, labels = payload
        if self.image_size is None:
            return images.copy(order="C"), labels.copy()
        return _resize_batch(images, self.image_size), labels.copy()


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


def _resize_batch(images: np.ndarray, size: int) -> np.ndarray:
    """(n, channels, H, W) -> (n, channels, size, size), each channel on its own."""
    from PIL import Image

    resized = np.empty((*images.shape[:2], size, size), np.uint8)
    for i, channel in np.ndindex(images.shape[:2]):
        resized[i, channel] = np.asarray(fit(Image.fromarray(images[i, channel]), size))
    return resized
