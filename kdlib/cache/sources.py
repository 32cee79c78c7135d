"""The interface of an image source, what all sources share, and images that are arrays in memory.

An example id is the position of an image in its split's order, for ever.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlib.repro import files
from kdlib.study.data import Data

if TYPE_CHECKING:
    from kdlib.cache.encoded import Rules

SPLITS = ("train", "test")
RESIZE_RULE = "largest centred square, bilinear with antialiasing"


@dataclass(frozen=True)
class Encoded:
    """The encoded images behind a source.

    Attributes:
        where: The data set and the split, for messages.
        rules: How they are read.
        size: (height, width) of every image as it is cached.
        fetch: From example ids [start, stop) to their payload; called where the source was opened.
        base: Folder from which the names of files count.
        containers: Fingerprint over name, size and time of the files that hold many images each,
            such as parquet files.
        passed_over: Files beside the images that were not read, by what they are.
        once: The images come from a stream, and are read while the cache is built, not before.
    """

    where: str
    rules: "Rules"
    size: tuple[int, int]
    fetch: Callable[[int, int], Any] = field(repr=False, compare=False)
    base: str = ""
    containers: str = ""
    passed_over: Mapping[str, int] = field(default_factory=dict)
    once: bool = False

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fetch": _fetch_elsewhere}


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
        encoded: What is behind images that are files, or bytes of files; None for arrays.
        counts: From what `fetch` returned and `decode` has read to the number of images that were
            converted, by keys of `readings.TEXTS`; None where none can be.
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
    encoded: Encoded | None = None
    counts: Callable[[Any], dict[str, int]] | None = None

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


def _fetch_elsewhere(start: int, stop: int) -> Any:
    raise RuntimeError(
        "a source that came from another process decodes only; call `fetch` where it was opened"
    )


def check_labels(
    labels: np.ndarray, n_classes: int, where: str, ids: np.ndarray | None = None, hint: str = ""
) -> None:
    """Demand that labels are in [0, n_classes).

    Args:
        labels: (n,) integers.
        where: The data set and the split, for the message.
        ids: (n,) example ids of the labels; None: 0 to n - 1.
        hint: What else may be done about it.

    Raises: ValueError that names the first example with another label.
    """
    wrong = np.flatnonzero((labels < 0) | (labels >= n_classes))
    if len(wrong):
        example_id = wrong[0] if ids is None else ids[wrong[0]]
        raise ValueError(
            f"example {example_id} of {where} has label {labels[wrong[0]]}; expected "
            f"[0, {n_classes - 1}]{hint}"
        )


def limited(data: Data, split: str, n_examples: int) -> int:
    """How many examples of a split are used: all, or the first `n_train` of the training split.

    Raises: ValueError when there are fewer than `n_train`.
    """
    if split != "train" or data.n_train is None:
        return n_examples
    if data.n_train > n_examples:
        raise ValueError(
            f"n_train is {data.n_train} but the training split of {data.source} has {n_examples} "
            "images; give at most that (study: data.n_train)"
        )
    return data.n_train


def size_identity(image_size: int | None) -> dict[str, Any]:
    """What resizing adds to an identity."""
    return {"image_size": image_size, "resize": RESIZE_RULE} if image_size else {}


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
        labels: (N,), integers in [0, n_classes), or -1 without classes.
        class_names: Empty for images without labels.
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
    if len(class_names) or (labels != -1).any():
        check_labels(labels, len(class_names), f"{name} {split}")
    if images.shape[2:] == (image_size, image_size):
        image_size = None
    identity = {"source": name, "split": split, "sha256": files.sha256_array(images, labels)}
    return Source(
        name=name,
        split=split,
        class_names=tuple(class_names),
        n_examples=len(images),
        image_shape=(images.shape[1], *((image_size,) * 2 if image_size else images.shape[2:])),
        identity=identity | size_identity(image_size),
        fetch_range=lambda start, stop: (images[start:stop], labels[start:stop]),
        decode=partial(_decode_arrays, image_size),
    )


def _decode_arrays(
    size: int | None, payload: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    images, labels = payload
    return fitted(images, size), labels.copy()


def fitted(images: np.ndarray, size: int | None) -> np.ndarray:
    """A copy of (n, C, H, W) uint8 images, each fitted to `size`, where one is given."""
    from PIL import Image

    if size is None:
        return images.copy(order="C")
    resized = np.empty((*images.shape[:2], size, size), np.uint8)
    for i, channel in np.ndindex(images.shape[:2]):
        resized[i, channel] = np.asarray(fit(Image.fromarray(images[i, channel]), size))
    return resized


def fit(image: Any, size: int) -> Any:
    """The largest centred square of a PIL image, resized to `size` x `size`."""
    from PIL import Image

    side = min(image.size)
    left, top = ((length - side) / 2 for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)
