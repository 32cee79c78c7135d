"""Encoded images that a reader converts, cuts or cannot read."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from kdlib.cache.build import build_images
from kdlib.cache.shards import Cache
from kdlib.cache.study_source import open_source
from kdlib.study.data import Data


def pixels(seed: int = 0, size: tuple[int, int] = (4, 6), channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, kind: str = "PNG", seed: int = 0) -> bytes:
    """An image with an EXIF orientation, without losses but for JPEG."""
    exif = Image.Exif()
    exif[274] = orientation
    options = {"lossless": True} if kind == "WEBP" else {}
    return encoded(pixels(seed), kind, exif=exif, **options)


def chunk(kind: bytes, content: bytes) -> bytes:
    """One chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def png16(value: int = 0x12FF, size: tuple[int, int] = (4, 6)) -> bytes:
    """An RGB image of 16 bits per channel, all of one value."""
    height, width = size
    row = b"\0" + np.full((width, 3), value, ">u2").tobytes()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(row * height))
    return b"\x89PNG\r\n\x1a\n" + header + rows + chunk(b"IEND", b"")


def late_exif(orientation: int) -> bytes:
    """A PNG whose EXIF data stand behind its pixels."""
    exif = Image.Exif()
    exif[274] = orientation
    whole, end = encoded(pixels()), chunk(b"IEND", b"")
    return whole.removesuffix(end) + chunk(b"eXIf", exif.tobytes()[6:]) + end


def write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def image_folder(root: Path, n: int = 3) -> Path:
    """Cats and dogs, n of each to train on and one of each to test; none is odd."""
    for i in range(n):
        for j, name in enumerate(("cat", "dog")):
            write(root / f"train/{name}/{i}.png", encoded(pixels(2 * i + j)))
            write(root / f"test/{name}/{i}.png", encoded(pixels(100 + 2 * i + j)))
    return root


def data_of(root: Path, **options) -> Data:
    return Data(source="folder", folder=str(root), n_validation=1, shard_size=2, **options)


def build(root: Path, split: str = "train", part=(1, 1), n_workers=0, **options) -> Cache:
    data = data_of(root, **options)
    return build_images(open_source(data, split), root / f"cache-{split}", 2, part, n_workers)
