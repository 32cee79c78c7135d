"""Image files: a folder of them as a source, and the decoding of encoded images.

Opening lists files without reading pixels. `fetch_range` gathers the paths or bytes of a range;
`decode_images`, which may run in another process, makes them uint8 arrays of one size.
"""

import itertools
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from kdlib.cache.encoded import ImageError, Look, Rules, decode, look
from kdlib.cache.sources import SPLITS, Encoded, Source, limited, size_identity
from kdlib.repro import files
from kdlib.study.data import Data

SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".webp", ".bmp", ".jfif", ".jpe", ".gif", ".tif", ".tiff", ".apng",
    ".dib", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip


@dataclass(frozen=True)
class Payload:
    """What decoding the example ids from `first_id` on needs.

    Attributes:
        images: Per example the bytes of an image file, or the path of one.
        labels: (n,) int64; -1 where there are none.
        seen: What each image was, once they are decoded in this process.
    """

    first_id: int
    images: Sequence[bytes | str]
    labels: np.ndarray
    seen: list[Look] = field(default_factory=list, repr=False, compare=False)


def decode_images(
    where: str, size: tuple[int, int], rules: Rules, payload: Payload
) -> tuple[np.ndarray, np.ndarray]:
    """Images, uint8 (n, 3, *size), and labels, int64 (n,), of a payload.

    Args:
        where: The data set and the split, for error messages.
        size: (height, width) of every image.
        rules: How they are read; without an `image_size`, each must have `size` already.

    Raises: ImageError that names the example, and its file when it has one.
    """
    images = np.empty((len(payload.images), 3, *size), np.uint8)
    payload.seen.clear()
    for i, encoded in enumerate(payload.images):
        name = named(encoded, f"example {payload.first_id + i} of {where}")
        pixels, seen = decode(encoded, name, rules)  # (H, W, 3)
        payload.seen.append(seen)
        if pixels.shape[:2] != size:
            raise ImageError(f"{name} {other_size(pixels.shape[:2], size)}")
        images[i] = pixels.transpose(2, 0, 1)
    return images, payload.labels


def named(encoded: bytes | str, name: str) -> str:
    """The name of an example in messages, with its file when it has one."""
    return name if isinstance(encoded, bytes) else f"{name}, {shown(encoded)}"


def shown(path: str) -> str:
    """A path as it can be printed: in one line, with the bytes that are no text as numbers."""
    if path.isprintable():  # so are most
        return path
    text = path.encode("utf-8", "backslashreplace").decode()
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def other_size(size: tuple[int, int], expected: tuple[int, int]) -> str:
    """What is said of an image of another size than the first one."""
    return (
        f"has {size[1]}x{size[0]} pixels but example 0 has {expected[1]}x{expected[0]}; give "
        "one size for all (study: data.image_size)"
    )


def rules_of(data: Data) -> tuple[Rules, dict[str, str]]:
    """How a study reads encoded images, and what its keys add to the identity of a source."""
    given = {key: getattr(data, key) for key in ("exif", "alpha")}
    rules = Rules(data.image_size, **given)
    return rules, {key: value for key, value in given.items() if value is not None}


def common_size(
    fetch: Callable[[int, int], Payload], n_examples: int, where: str, rules: Rules
) -> tuple[int, int]:
    """(height, width) of all images: that of the rules, or of the first one that can be read.

    Raises: ImageError, where none of the first 100 can be read, with what is said of the first.
    """
    if rules.image_size is not None:
        return rules.image_size, rules.image_size
    first = None
    for i in range(min(n_examples, 100)):
        encoded = fetch(i, i + 1).images[0]
        try:
            return look(encoded, named(encoded, f"example {i} of {where}"), rules).size
        except ImageError as error:
            first = first or error
    raise first


def open_folder(data: Data, split: str) -> Source:
    """Images in <folder>/<split>/<class>/: classes sorted by name, files sorted within their class.
    Unlabelled: images anywhere below <folder>/<split>/, sorted by their path from there.

    All images become RGB. A relative folder is looked up in the data folder. The identity is a
    sha256 over names and file sizes, so that opening reads no pixels; what replaces an image under
    the same name and size is found by `kdlib.cache.readings`.
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
    base, where = f"{folders[split]}/", f"folder {split}"
    listing = [[path.removeprefix(base), state_of(path)[0]] for path in paths]
    rules, keys = rules_of(data)
    identity |= {"sha256": files.fingerprint(listing)} | size_identity(data.image_size) | keys

    def fetch_range(start: int, stop: int) -> Payload:
        return Payload(start, paths[start:stop], labels[start:stop].copy())

    size = common_size(fetch_range, len(paths), where, rules)
    passed = Counter(kind for kind, _ in passed_over(folders[split], data.labelled))
    return Source(
        "folder", split, class_names, len(paths), (3, *size), identity, fetch_range,
        partial(decode_images, where, size, rules), parallel=True,
        encoded=Encoded(where, rules, size, fetch_range, base, passed_over=dict(passed)),
    )  # fmt: skip


def state_of(image: bytes | str) -> tuple[int, int | None]:
    """Size, and time of the last change where it is a file; -1 and None of one that is not there,
    such as a link to nothing."""
    if isinstance(image, bytes):
        return len(image), None
    try:
        state = os.stat(image)
    except OSError:
        return -1, None
    return state.st_size, state.st_mtime_ns


def passed_over(folder: Path, labelled: bool = False) -> list[tuple[str, str]]:
    """What it is, and the path, of each file below a split's folder that is not read: hidden ones,
    those with another suffix than an image's, images beside the class folders, and folders
    that are named like an image."""
    found, roots = [], [str(folder)]
    for root in roots:  # which grows by the class folders that are links
        for parent, folders, names in os.walk(root):
            hidden = "/." in parent.removeprefix(str(folder))
            folders.sort()
            for name in folders:
                path = os.path.join(parent, name)
                if is_image(name) and not hidden:
                    found.append(("folder", path))
                if parent == str(folder) and os.path.islink(path):
                    roots.append(path)
            for name in sorted(names):
                path = os.path.join(parent, name)
                if hidden or name[0] == ".":
                    found.append(("hidden", path))
                elif not is_image(name):
                    found.append((os.path.splitext(name)[1].lower() or "no suffix", path))
                elif labelled and parent == str(folder):
                    found.append(("outside class folders", path))
    return found


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
