"""Sources of images with stable example ids, all behind one interface.

An example id is the position of an image in its split's own order, for ever. Holds where images
come from and how they become uint8 arrays of one size. Leaves to others: storing them (`cache`),
normalising and augmenting them, and holding out a validation split.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kdlib import files
from kdlib.params import Data

SPLITS = ("train", "test")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
N_DIGITS_TRAIN = 1297  # of 1,797; the last 500 are the test split
_RESIZE_RULE = "largest centred square, bilinear with antialiasing"

Range = Callable[[int, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Source:
    """One split of one data set.

    Attributes:
        image_shape: (channels, height, width) of every image.
        identity: JSON-able; everything that determines the images, the labels and their order.
        read_range: What `read` calls once it has checked the range.
    """

    name: str
    split: str
    class_names: tuple[str, ...]
    n_examples: int
    image_shape: tuple[int, int, int]
    identity: dict[str, Any]
    read_range: Range = field(repr=False, compare=False)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of the example ids [start, stop); only these are decoded.

        Returns: uint8 (stop - start, *image_shape) and int64 (stop - start,), labels in
            [0, n_classes).
        Raises: IndexError for a range outside [0, n_examples]; ValueError that names the file, for
            an image that cannot be read.
        """
        if not 0 <= start <= stop <= self.n_examples:
            raise IndexError(
                f"asked for example ids [{start}, {stop}) of {self.name} {self.split}; expected a "
                f"range inside [0, {self.n_examples})"
            )
        return self.read_range(start, stop)


def open_source(data: Data, split: str) -> Source:
    """The images of one split, as the `data` section of a study names them.

    Args:
        split: `train` or `test`.

    Raises: ValueError for another split, or for a folder whose layout or images are unfit;
        FileNotFoundError when the data are not there and cannot be downloaded.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; {files.nearest(split, SPLITS)}")
    if data.source == "folder":
        return _open_folder(data, split)
    arrays = _read_digits(split) if data.source == "digits" else _read_torchvision(data, split)
    return array_source(data.source, split, *arrays, image_size=data.image_size)


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
        identity |= {"image_size": image_size, "resize": _RESIZE_RULE}

    def read_range(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        part = images[start:stop]
        part = _resize_batch(part, image_size) if resize else part.copy(order="C")
        return part, labels[start:stop].copy()

    side = (image_size, image_size) if resize else images.shape[2:]
    return Source(
        name=name,
        split=split,
        class_names=tuple(class_names),
        n_examples=len(images),
        image_shape=(images.shape[1], *side),
        identity=identity,
        read_range=read_range,
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


def _open_folder(data: Data, split: str) -> Source:
    """Images in <folder>/<split>/<class>/: classes sorted by name, files sorted within their class.

    All images become RGB. A relative folder is looked up in the data folder. The identity is a
    sha256 over names and file sizes, so that opening reads no pixels: an image replaced by another
    of the same name and size goes unnoticed here.
    """
    root = files.data_root() / data.folder  # an absolute folder stays as it is
    classes = {s: _class_names(root / s) for s in SPLITS}
    only = {s: sorted(set(classes[s]) - set(classes[o])) for s, o in (SPLITS, SPLITS[::-1])}
    if any(only.values()):
        raise ValueError(
            f"train and test of {root} differ in their classes: only in train {only['train']}, "
            f"only in test {only['test']}; expected the same class folders in both"
        )
    class_names = classes[split]
    paths, labels = [], []
    for label, class_name in enumerate(class_names):
        found = _image_paths(root / split / class_name)
        paths += found
        labels += [label] * len(found)
    listing = [[f"{path.parent.name}/{path.name}", path.stat().st_size] for path in paths]
    identity = {"source": "folder", "split": split, "sha256": files.fingerprint(listing)}
    if data.image_size is None:
        height, width = _common_size(paths)
    else:
        height = width = data.image_size
        identity |= {"image_size": data.image_size, "resize": _RESIZE_RULE}
    all_labels = np.array(labels, np.int64)

    def read_range(start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        images = np.empty((stop - start, 3, height, width), np.uint8)
        for image, path in zip(images, paths[start:stop], strict=True):
            image[:] = _decode(path, data.image_size)
        return images, all_labels[start:stop].copy()

    return Source(
        name="folder",
        split=split,
        class_names=tuple(class_names),
        n_examples=len(paths),
        image_shape=(3, height, width),
        identity=identity,
        read_range=read_range,
    )


def _class_names(folder: Path) -> list[str]:
    """Sorted names of the class folders of one split; hidden ones are passed over."""
    layout = "expected <folder>/train/<class>/ and <folder>/test/<class>/ (params: data.folder)"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {layout}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not names:
        raise ValueError(f"{folder} has no class folders; {layout}")
    return names


def _image_paths(folder: Path) -> list[Path]:
    """Sorted images of one class folder; files of other kinds and hidden ones are passed over."""
    paths = sorted(p for p in folder.iterdir() if p.name[0] != ".")
    nested = next((p for p in paths if p.is_dir()), None)
    if nested is not None:
        raise ValueError(f"{nested} is a folder inside a class folder; expected images only")
    paths = [p for p in paths if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"class folder {folder} has no image; expected files that end in {', '.join(SUFFIXES)}"
        )
    return paths


def _common_size(paths: Sequence[Path]) -> tuple[int, int]:
    """(height, width) of all images, from their headers.

    Raises: ValueError that names two files, when they differ.
    """
    first = None
    for path in paths:
        with _opened(path) as image:
            size = image.size
        first = first or size
        if size != first:
            raise ValueError(
                f"{path} has {size[0]}x{size[1]} pixels but {paths[0]} has {first[0]}x{first[1]}; "
                "give one size for all (params: data.image_size)"
            )
    return first[1], first[0]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """An open PIL image; whatever Pillow says of a file it cannot read becomes a ValueError with
    the path."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    # SyntaxError: Pillow's word for a broken PNG chunk
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path} cannot be read as an image ({error}); repair or remove it"
        ) from None


def _decode(path: Path, image_size: int | None) -> np.ndarray:
    """One file as uint8 (3, H, W). EXIF rotation is not applied, as in torchvision's image
    folder."""
    with _opened(path) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255 on conversion
            raise ValueError(
                f"{path} has more than 8 bits per channel (mode {image.mode}); save it with 8"
            )
        image = image.convert("RGB")
    return np.asarray(image if image_size is None else _fit(image, image_size)).transpose(2, 0, 1)


def _fit(image: Any, size: int) -> Any:
    """The largest centred square of a PIL image, resized to `size` x `size`."""
    from PIL import Image

    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _resize_batch(images: np.ndarray, size: int) -> np.ndarray:
    """(n, channels, H, W) -> (n, channels, size, size), each channel on its own."""
    from PIL import Image

    resized = np.empty((*images.shape[:2], size, size), np.uint8)
    for i, channel in np.ndindex(images.shape[:2]):
        resized[i, channel] = np.asarray(_fit(Image.fromarray(images[i, channel]), size))
    return resized
