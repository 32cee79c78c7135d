"""Image files: a folder of them as a source, and the decoding of encoded images.

Opening lists files without reading pixels. `fetch_range` gathers the paths or bytes of a range; a
`Decoder`, which may run in another process, makes them uint8 arrays of one size.
"""

import contextlib
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.sources import SPLITS, Source, fit, limit_identity, limited, size_identity
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


@dataclass(frozen=True)
class Decoder:
    """From a `Payload` to images and labels.

    Attributes:
        where: The data set and the split, for error messages.
        size: (height, width) of every image.
        image_size: Side to which images are cut and resized; None: each must have `size` already.
    """

    where: str
    size: tuple[int, int]
    image_size: int | None

    def __call__(self, payload: Payload) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (n, 3, *size) and int64 (n,).

        Raises: ValueError that names the example, and its file when it has one.
        """
        images = np.empty((len(payload.images), 3, *self.size), np.uint8)
        for i, encoded in enumerate(payload.images):
            name = f"example {payload.first_id + i} of {self.where}"
            pixels = _decode(encoded, name, self.image_size)  # (H, W, 3)
            if pixels.shape[:2] != self.size:
                raise ValueError(
                    f"{_named(encoded, name)} has {pixels.shape[1]}x{pixels.shape[0]} pixels but "
                    f"example 0 has {self.size[1]}x{self.size[0]}; give one size for all (study: "
                    "data.image_size)"
                )
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
        class_names, paths = (), _all_images(folders[split])
        paths = paths[: limited(data, split, len(paths))]
        labels = np.full(len(paths), -1, np.int64)
        identity |= {"labelled": False} | limit_identity(data, split)
    base = f"{folders[split]}/"
    listing = [[path.removeprefix(base), os.stat(path).st_size] for path in paths]
    identity |= {"sha256": files.fingerprint(listing)} | size_identity(data)
    size = (data.image_size,) * 2 if data.image_size else _common_size(paths)

    def fetch_range(start: int, stop: int) -> Payload:
        return Payload(start, paths[start:stop], labels[start:stop].copy())

    decode = Decoder(f"folder {split}", size, data.image_size)
    n, shape = len(paths), (3, *size)
    return Source(
        "folder", split, class_names, n, shape, identity, fetch_range, decode, parallel=True
    )


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
    by_class = [_image_paths(folders[split] / name) for name in classes[split]]
    labels = np.repeat(np.arange(len(by_class)), [len(paths) for paths in by_class])
    return tuple(classes[split]), list(itertools.chain(*by_class)), labels


def _class_names(folder: Path) -> list[str]:
    """Sorted names of the class folders of one split; hidden ones are passed over."""
    layout = "expected <folder>/train/<class>/ and <folder>/test/<class>/ (study: data.folder; "
    layout += "data.test_folder where the test images are elsewhere)"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {layout}")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
    if not names:
        raise ValueError(f"{folder} has no class folders; {layout}")
    return names


def _image_paths(folder: Path) -> list[str]:
    """Sorted images of one class folder; files of other kinds and hidden ones are passed over."""
    paths = sorted(p for p in folder.iterdir() if p.name[0] != ".")
    nested = next((p for p in paths if p.is_dir()), None)
    if nested is not None:
        raise ValueError(f"{nested} is a folder inside a class folder; expected images only")
    paths = [str(p) for p in paths if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise ValueError(
            f"class folder {folder} has no image; expected files that end in {', '.join(SUFFIXES)}"
        )
    return paths


def _all_images(folder: Path) -> list[str]:
    """Sorted images anywhere below a folder; files of other kinds and hidden ones are passed
    over."""
    layout = f"expected images ({', '.join(SUFFIXES)}) anywhere below it (study: data.folder)"
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; {layout}")
    paths = [path for path in all_files(folder) if path.lower().endswith(SUFFIXES)]
    if not paths:
        raise ValueError(f"{folder} has no image; {layout}")
    return paths


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


def _common_size(paths: Sequence[str]) -> tuple[int, int]:
    """(height, width) of all images, from their headers.

    Raises: ValueError that names two files, when they differ.
    """
    first = None
    for path in paths:
        size = size_of(path, path)
        first = first or size
        if size != first:
            raise ValueError(
                f"{path} has {size[1]}x{size[0]} pixels but {paths[0]} has {first[1]}x{first[0]}; "
                "give one size for all (study: data.image_size)"
            )
    return first


def size_of(encoded: bytes | str, name: str) -> tuple[int, int]:
    """(height, width) of one image, from its header."""
    with _opened(encoded, name) as image:
        return image.height, image.width


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
    except Image.UnidentifiedImageError:
        raise ValueError(
            f"{name} cannot be read as an image (its format is unknown); repair or remove it"
        ) from None
    # SyntaxError: Pillow raises it for a broken PNG chunk
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"{name} cannot be read as an image ({error}); repair or remove it"
        ) from None


def _decode(encoded: bytes | str, name: str, image_size: int | None) -> np.ndarray:
    """One image as uint8 (H, W, 3). EXIF rotation is not applied, as in torchvision's image
    folder."""
    name = _named(encoded, name)
    with _opened(encoded, name) as image:
        if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255 on conversion
            raise ValueError(
                f"{name} has more than 8 bits per channel (mode {image.mode}); save it with 8"
            )
        image = image.convert("RGB")
    return np.asarray(image if image_size is None else fit(image, image_size))
