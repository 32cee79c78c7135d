"""Images without labels that stand as tensors in `.pt` files, such as the shards of another cache:
float16 or float32 (n, C, H, W) in [0, 1], as torchvision's ToTensor gives them, or uint8."""

import itertools
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdlib.cache.sources import Source, fitted, limited, size_identity
from kdlib.repro import files
from kdlib.study.data import Data, data_path

if TYPE_CHECKING:
    import torch

CHUNK = 256  # images that are compared with the 256 levels at a time


@dataclass
class Values:
    """Some images as they are stored; once they are decoded, how many were rounded."""

    first_id: int
    images: list[np.ndarray]
    rounded: int = 0

    def counts(self) -> dict[str, int]:
        """For the record of a shard."""
        return {"rounded": self.rounded} if self.rounded else {}


def open_tensors(data: Data, split: str) -> Source:
    """The `.pt` files of a folder, one after another: by `global_start` where the folder has
    `index*.json` with `shards` of `shard_path`, `num_samples` and `global_start`, else by name.

    The identity is a sha256 over names, sizes and checksums that the files hold of their content.

    Raises: FileNotFoundError without files; ValueError for other content, for code, for files that
        an index does not have or that it has otherwise.
    """
    folder = data_path(data.folder)
    names = _names(folder)
    tensors = [(name, *_described(folder / name)) for name in names]
    shape = tensors[0][2]
    for name, n, one, _ in tensors:
        if one != shape:
            raise ValueError(
                f"{folder / name} has images of shape {one}, and {tensors[0][0]} of {shape}; "
                "expected one shape"
            )
        if names[name] not in (None, n):
            raise ValueError(
                f"{folder / name} has {n} images, and its index says {names[name]}; fetch it again"
            )
    starts = np.cumsum([0, *(n for _, n, _, _ in tensors)])
    n_examples = limited(data, split, int(starts[-1]))
    size = None if shape[1:] == (data.image_size,) * 2 else data.image_size

    def fetch_range(start: int, stop: int) -> Values:
        """Each file is mapped: what is not asked for is not read."""
        found = Values(start, [])
        for i in range(len(tensors)):
            first, last = max(start, starts[i]), min(stop, starts[i + 1])
            if first < last:
                rows = _tensor(folder / tensors[i][0])[first - starts[i] : last - starts[i]]
                found.images.append(rows.numpy())
        return found

    listing = [(name, state) for name, _, _, state in tensors]
    return Source(
        name="tensors",
        split=split,
        class_names=(),
        n_examples=n_examples,
        image_shape=(shape[0], *((size, size) if size else shape[1:])),
        identity={"source": "tensors", "split": split, "sha256": files.fingerprint(listing)}
        | size_identity(size),
        fetch_range=fetch_range,
        decode=partial(_decode, str(folder), size, shape),
        counts=Values.counts,
    )


def _names(folder: Path) -> dict[str, int | None]:
    """Files in their order, with the number of images where an index says it."""
    here = {path.name for path in folder.glob("*.pt")}
    if not here:
        raise FileNotFoundError(
            f"{folder} has no .pt files; expected tensors of images (study: data.folder)"
        )
    entries = []
    for path in sorted(folder.glob("index*.json")):
        content = files.read_json(path, lambda _: "fetch it again")
        try:
            entries += [
                (int(e["global_start"]), str(e["shard_path"]), int(e["num_samples"]))
                for e in content["shards"]
            ]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is no index of .pt files ({error!r}); expected `shards`, each with "
                "shard_path, num_samples and global_start"
            ) from None
    if not entries:
        return dict.fromkeys(sorted(here))
    entries.sort()
    listed = {name for _, name, _ in entries}
    for what, names in (("not there", listed - here), ("in no index", here - listed)):
        if names:
            raise ValueError(
                f"of the .pt files of {folder}, {len(names)} are {what}, such as "
                f"{min(names)}: fetch them, or move the files or the index away"
            )
    for (start, name, n), (after, other, _) in itertools.pairwise(entries):
        if start + n > after:
            raise ValueError(f"{folder}: by its index {name} and {other} hold the same images")
    return {name: n for _, name, n in entries}


def _tensor(path: Path) -> "torch.Tensor":
    """The tensor (n, C, H, W) of a file, mapped; or the only such one of its dictionary."""
    import torch

    mapped = zipfile.is_zipfile(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:  # of this machine, not of the file
        raise
    except Exception as error:  # of torch, pickle and zipfile, with no common base
        raise ValueError(
            f"{path} cannot be read as plain tensors ({files.one_line(error).split('. ')[0]}); "
            "what would execute code is refused"
        ) from None
    found = list(content.values()) if isinstance(content, dict) else [content]
    found = [x for x in found if isinstance(x, torch.Tensor) and x.ndim == 4]
    kinds = (torch.float16, torch.float32, torch.uint8)
    if len(found) != 1 or found[0].dtype not in kinds or found[0].shape[1] not in (1, 3):
        shown = [(str(x.dtype), tuple(x.shape)) for x in found] or type(content).__name__
        raise ValueError(
            f"{path} holds {shown}; expected one tensor (n, 1 or 3, H, W) of float16, float32 or "
            "uint8, or a dictionary with one"
        )
    return found[0]


def _described(path: Path) -> tuple[int, tuple[int, ...], Any]:
    """Images, shape of one, and what determines the bytes: of a zip file its list of checksums."""
    n, *shape = _tensor(path).shape
    if not zipfile.is_zipfile(path):
        return n, tuple(shape), files.sha256_file(path)
    with zipfile.ZipFile(path) as content:
        return n, tuple(shape), [[e.filename, e.file_size, e.CRC] for e in content.infolist()]


def _decode(
    where: str, size: int | None, shape: tuple[int, ...], values: Values
) -> tuple[np.ndarray, np.ndarray]:
    parts, first = [np.empty((0, *shape), np.uint8)], values.first_id
    for stored in values.images:
        for start in range(0, len(stored), CHUNK):
            part = stored[start : start + CHUNK]
            images, n_rounded = _levels(where, first, part)
            parts.append(images)
            values.rounded += n_rounded
            first += len(part)
    images = np.concatenate(parts)
    return fitted(images, size), np.full(len(images), -1, np.int64)


def _levels(where: str, first_id: int, values: np.ndarray) -> tuple[np.ndarray, int]:
    """uint8 images, and how many of them hold a value that is not k / 255 in its own precision.

    Raises: ValueError that names the first image with values outside [0, 1].
    """
    if values.dtype == np.uint8:
        return values, 0
    low, high = (getattr(values, end)((1, 2, 3)) for end in ("min", "max"))
    if (bad := ~((low >= 0) & (high <= 1))).any():  # true of NaN
        i = int(bad.argmax())
        raise ValueError(
            f"example {first_id + i} of {where} has values in [{low[i]:.3g}, {high[i]:.3g}]; "
            "expected [0, 1]: images before they are normalised"
        )
    images = np.rint(values.astype(np.float32) * np.float32(255)).astype(np.uint8)
    exact = (np.arange(256, dtype=np.float32) / np.float32(255)).astype(values.dtype)
    return images, int((values != exact[images]).any((1, 2, 3)).sum())
