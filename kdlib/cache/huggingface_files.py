"""Local parquet files and image folders that the `datasets` library can read: their splits, files
and identity."""

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdlib.cache.image_files import SUFFIXES, all_files, is_image, passed_over, state_of
from kdlib.repro import files
from kdlib.study.data import HuggingFace

# `train`, `train_3`, `train-00000-of-00002`, `train-00000-of-00001-0123456789abcdef` are of `train`
_SHARD_NAME = re.compile(r"(.+?)([-_.]?\d+)?(-of-\d+)?(-[0-9a-f]{16})?")


@dataclass(frozen=True)
class Place:
    """Where a split is.

    Attributes:
        arguments: Of `datasets.load_dataset`.
        identity: What determines the bytes there.
        parquet: The parquet files that its rows lie in, one after another; empty where they lie
            elsewhere.
        counts: Rows of each of these files; empty where they are not known without a network.
        files: What `Encoded` says of them: `base`, and `containers` or `passed_over`.
    """

    arguments: dict[str, Any]
    identity: dict[str, Any]
    parquet: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    files: Mapping[str, Any] = field(default_factory=dict)


def local_place(path: Path, settings: HuggingFace, name: str) -> Place:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kind, splits = _local_files(path, settings)
    if name not in splits:
        raise no_split(settings, name, splits)
    base = path.parent if path.is_file() else path
    listing = [[os.path.relpath(file, base), state_of(file)[0]] for file in splits[name]]
    if kind == "imagefolder":
        for file, entry in zip(splits[name], listing, strict=True):
            if os.path.basename(file).startswith("metadata."):  # where labels may stand
                entry.append(files.sha256_file(Path(file)))
        root = _split_folder(path, settings) / name
        found = {"base": f"{root}/", "passed_over": Counter(kind for kind, _ in passed_over(root))}
        identity = {"sha256": files.fingerprint(listing)}
        return Place(_image_folder(path, settings, splits), identity, files=found)
    counts = []
    for file, entry in zip(splits[name], listing, strict=True):
        try:
            counts.append(pq.read_metadata(file).num_rows)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is not a whole parquet file ({files.one_line(error)}); fetch it again"
            ) from None
        entry.append(_sha256_footer(file))
    # `datasets` takes every path for a pattern
    arguments = {"path": kind, "data_files": {name: [glob.escape(file) for file in splits[name]]}}
    identity = {"sha256": files.fingerprint(listing)}
    times = [[entry[0], *state_of(file)] for file, entry in zip(splits[name], listing, strict=True)]
    found = {"base": f"{base}/", "containers": files.fingerprint(times)}
    return Place(arguments, identity, tuple(splits[name]), tuple(counts), found)


def _image_folder(path: Path, settings: HuggingFace, splits: dict[str, list[str]]) -> dict:
    """Arguments for a folder of images: both splits together, so that they number their classes
    alike; with labels where all images lie equally deep in class folders."""
    root = _split_folder(path, settings)
    used = sorted({settings.train_split, settings.test_split} & splits.keys())
    depths = {
        len(Path(file).relative_to(root).parts)
        for split in used
        for file in splits[split]
        if is_image(file)
    }
    return {
        "path": "imagefolder",
        "data_files": {split: [f"{glob.escape(str(root / split))}/**"] for split in used},
        "drop_labels": len(depths) > 1 or min(depths) < 3,  # <split>/<class>/<file>
    }


def _split_folder(path: Path, settings: HuggingFace) -> Path:
    return path / settings.config if settings.config else path


def _local_files(path: Path, settings: HuggingFace) -> tuple[str, dict[str, list[str]]]:
    """`parquet` or `imagefolder`, and the sorted files of each split.

    One file is the split `train`. In a folder, as on the hub, files are named after their split, or
    lie in a folder of that name; either in the folder itself, or in its folder `data`.
    """
    if path.is_file():
        return "parquet", {"train": [str(path)]}
    root, splits = _split_folder(path, settings), {}
    for base in (root / "data", root):
        for file in sorted((*base.glob("*.parquet"), *base.glob("*/*.parquet"))):
            split = _SHARD_NAME.fullmatch(file.stem)[1] if file.parent == base else file.parent.name
            if not file.name.startswith((".", "metadata.")):
                splits.setdefault(split, []).append(str(file))
        if splits:
            return "parquet", splits
    folders = sorted(p for p in root.glob("*/") if p.name[0] != ".")
    splits = {folder.name: all_files(folder) for folder in folders}
    splits = {s: paths for s, paths in splits.items() if any(map(is_image, paths))}
    if not splits:
        raise ValueError(
            f"{root} has neither parquet files (train*.parquet or train/*.parquet) nor images "
            f"({', '.join(SUFFIXES)}) in folders train/ and test/ (study: data.huggingface)"
        )
    return "imagefolder", splits


def _sha256_footer(file: str) -> str:
    """sha256 of a parquet file's metadata, whose length stands before the last four bytes."""
    with open(file, "rb") as opened:
        opened.seek(-8, os.SEEK_END)
        length = int.from_bytes(opened.read(4), "little")
        opened.seek(-8 - length, os.SEEK_END)
        return hashlib.sha256(opened.read(length)).hexdigest()


def no_split(settings: HuggingFace, name: str, known: Any) -> ValueError:
    """The error for a split that a data set has not."""
    return ValueError(
        f"{settings.dataset} has no split {name!r}; there are: {', '.join(known)} (study: "
        "data.huggingface.train_split, test_split, config)"
    )
