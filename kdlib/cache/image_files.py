"""Image files: a folder of them as a source, and the decoding of encoded images.

Opening lists files without reading pixels. `fetch_range` gathers the paths or bytes of a range;
`decode_images`, which may run in another process, makes them uint8 arrays of one size.
"""

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.sources import SPLITS, Source, fit, limited, size_identity
from kdlib.repro import files
from kdlib.study.data import Data

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Payload:
    """What decoding the example ids from `first_id` on needs.

    Attributes:
        images: Per example the bytes of an image file, or the path of one.
        labels: (n,) int64; -1 where there are none.
    """

    first_id: int
    images: Sequence[bytes | str]
    labels: np.ndarray


def decode_images(
    where: str, size: tuple[int, int], image_size: int | None, payload: Payload
) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, 3, *size), and labels, int64 (n,), of a payload.

    Args:
        where: The data set and the split, for error messages.
        size: (height, width) of every image.
        image_size: Side to which images are cut and resized; None: each must have `size` already.

    Raises: ValueError that names the example, and its file when it has one.
    """
    images = np.empty((len(payload.images), 3, *size), np.uint8)
    for i, encoded in enumerate(payload.images):
        name = _named(encoded, f"example {payload.first_id + i} of {where}")
        pixels = _decode(encoded, name, image_size)  # (H, W, 3)
        _demand_size(pixels.shape[:2], name, size, "example 0")
        images[i] = pixels.transpose(2, 0, 1)
    return images, payload.labels


def open_folder(data: Data, split: str) -> Source:
    """Images in <folder>/<split>/<class>/: classes sorted by name, files sorted within their class.
    Unlabelled: images anywhere below <folder>/<split>/, sorted by their path from there.

    All images become RGB. A relative folder is looked up in the data folder. The identity is a
    sha256 over names and file sizes, so that opening reads no pixels: an image replaced by another
    of the same name and size goes unnoticed here.
    """
    root = files.data_root() / data.folder  # an absolute folder stays as it is
    folders = {"train": root / "train", "test": root / data.test_folder}
    identity = {"source": "folder", "split": split}
    if data.labelled:
        if data.n_train is not None:
            raise ValueError(
                "n_train takes the first images, which in a folder sorted by class are those of "
                "its first classes; leave it out, or give `labelled: false` (study: data.n_train)"
            )
        class_names, paths, labels = _class_images(folders, split)
    else:
        layout = f"expected images ({', '.join(SUFFIXES)}) anywhere below it (study: data.folder)"
        _demand_folder(folders[split], layout)
        class_names, paths = (), _images_below(folders[split])
        paths = paths[: limited(data, split, len(paths))]
        labels = np.full(len(paths), -1, np.int64)
        identity["labelled"] = False
    base = f"{folders[split]}/"
    listing = [[path.removeprefix(base), os.stat(path).st_size] for path in paths]
    identity |= {"sha256": files.fingerprint(listing)} | size_identity(data.image_size)
    if data.image_size:
        size = (data.image_size, data.image_size)
    else:
        size = size_of(paths[0], paths[0])
        for path in paths:
            _demand_size(size_of(path, path), path, size, paths[0])

    def fetch_range(start: int, stop: int) -> Payload:
        return Payload(start, paths[start:stop], labels[start:stop].copy())

    decode = partial(decode_images, f"folder {split}", size, data.image_size)
    return Source(
        "folder", split, class_names, len(paths), (3, *size), identity, fetch_range, decode,
        parallel=True,
    )  # fmt: skip


def _class_images(
    folders: dict[str, Path], split: str
) -> tuple[tuple[str, ...], list[str], np.ndarray]:
    """Class names, and path and label of each image."""
    classes = {s: _class_names(folders[s]) for s in SPLITS}
    only = {s: sorted(set(classes[s]) - set(classes[o])) for s, o in (SPLITS, SPLITS[::-1])}
    if any(only.values()):
        raise ValueError(
            f"{folders['train']} and {folders['test']} differ in their classes: only in train "
            f"{only['train']}, only in test {only['test']}; expected the same class folders in both"
        )
    by_class = [_images_below(folders[split] / name) for name in classes[split]]
    for path in map(Path, itertools.chain(*by_class)):
        if path.parent.parent != folders[split]:
            raise ValueError(f"{path.parent} is a folder inside a class folder; expected images")
    labels = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class])
    return tuple(classes[split]), list(itertools.chain(*by_class)), labels


def _class_names(folder: Path) -> list[str]:
    """Sorted names of the class folders of one split; hidden ones are passed over."""
    layout = "expected <folder>/train/<class>/ and <folder>/test/<class>/ (study: data.folder; "
    layout += "data.test_folder where the test images are elsewhere)"
    _demand_folder(folder, layout)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not names:
        raise ValueError(f"{folder} has no class folders; {layout}")
    return names


def _demand_folder(folder: Path, layout: str) -> None:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {layout}")


def is_image(path: str) -> bool:
    """Whether a file's name ends like that of an image."""
    return path.lower().endswith(SUFFIXES)


def _images_below(folder: Path) -> list[str]:
    """Sorted images anywhere below a folder; files of other kinds and hidden ones are passed
    over."""
    if paths := [path for path in all_files(folder) if is_image(path)]:
        return paths
    raise ValueError(f"{folder} has no image; expected files that end in {', '.join(SUFFIXES)}")


def all_files(folder: Path) -> list[str]:
    """Sorted files anywhere below a folder; hidden ones are passed over."""

    def refuse(error: OSError) -> None:  # os.walk would pass over what it may not list
        raise error

    paths = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if name[0] != "."]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        if links:
            raise ValueError(
                f"{os.path.join(parent, links[0])} is a link to a folder, which could be read "
                "twice or for ever; expected folders and files"
            )
        paths += [os.path.join(parent, name) for name in names if name[0] != "."]
    return sorted(paths)


def size_of(encoded: bytes | str, name: str) -> tuple[int, int]:
    """(height, width) of one image, from its header."""
    with _opened(encoded, name) as image:
        return image.height, image.width


def _demand_size(size: tuple[int, int], name: str, expected: tuple[int, int], first: str) -> None:
    if size != expected:
        raise ValueError(
            f"{name} has {size[1]}x{size[0]} pixels but {first} has {expected[1]}x{expected[0]}; "
            "give one size for all (study: data.image_size)"
        )


def _named(encoded: bytes | str, name: str) -> str:
    return name if isinstance(encoded, bytes) else f"{name}, {encoded}"


@contextlib.contextmanager
def _opened(encoded: bytes | str, name: str) -> Iterator[Any]:
    """An open PIL image; any error of Pillow becomes a ValueError with the name."""
    from PIL import Image

    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded
    try:
        with Image.open(file) as image:
            yield image
    # SyntaxError: Pillow raises it for a broken PNG chunk
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        unknown = isinstance(error, Image.UnidentifiedImageError)
        raise ValueError(
            f"{name} cannot be read as an image ({'its format is unknown' if unknown else error}); "
            "repair or remove it"
        ) from None


def _decode(encoded: bytes | str, name: str, image_size: int | None) -> np.ndarray:
    """One image as uint8 (H, W, 3). EXIF rotation is not applied, as in torchvision's image
    folder."""
    with _opened(encoded, name) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255 on conversion
            raise ValueError(
                f"{name} has more than 8 bits per channel (mode {image.mode}); save it with 8"
            )
        image = image.convert("RGB")
    return np.asarray(image if image_size is None else fit(image, image_size))
