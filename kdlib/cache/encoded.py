"""One encoded image: what its header says, what its reader converts or cuts, and its pixels.

The border to Pillow: each of its errors becomes an `ImageError` in words of ours.
"""

import contextlib
import errno
import io
import os
import re
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from kdlib.cache.sources import fit
from kdlib.repro import files

_PILLOW_RAISES = (
    OSError, SyntaxError, EOFError, ValueError, ArithmeticError, LookupError, TypeError,
    AttributeError, NotImplementedError, struct.error, zlib.error,
)  # fmt: skip
_ORIENTATION = 274  # of EXIF and TIFF
# Orientation -> how the image lies as stored, and Pillow's name of what turns it upright
_TURNS = {
    2: ("mirrored", "FLIP_LEFT_RIGHT"),
    3: ("upside down", "ROTATE_180"),
    4: ("mirrored and upside down", "FLIP_TOP_BOTTOM"),
    5: ("mirrored on its side", "TRANSPOSE"),
    6: ("on its side", "ROTATE_270"),
    7: ("mirrored on its side", "TRANSVERSE"),
    8: ("on its side", "ROTATE_90"),
}
_DEEP = ("I", "F")  # modes that begin so; Pillow would clip these to 255 on conversion
_READABLE = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")
_GREY = ("1", "L", "LA", "La")
_PNG_END = b"IEND\xaeB`\x82"

# What a reader did with an image -> what is said of so many of them
NOTES = {
    "turned": "turned upright by their EXIF orientation",
    "not_turned": "read as stored although their EXIF orientation is another",
    "on_white": "transparent, laid on white",
    "on_black": "transparent, laid on black",
    "alpha_dropped": "transparent, their alpha channel dropped",
    "opaque_alpha": "without their alpha channel, which is opaque everywhere",
    "cut_to_8_bits": "cut from 16 to 8 bits per channel",
    "first_frame": "of several frames, of which the first was read",
    "greyscale": "made RGB from greyscale",
    "palette": "made RGB from a palette",
    "cmyk": "made RGB from CMYK",
    "other_mode": "made RGB from another colour space",
    "profile": "with a colour profile other than sRGB, which was not applied",
    "resized": "resized",
    "enlarged": "enlarged",
    "cut_to_square": "cut to their centred square",
}


class ImageError(ValueError):
    """An image that cannot be read, or not before a study has decided how."""


@dataclass(frozen=True)
class Rules:
    """How images are read.

    Attributes:
        image_size: Side to which they are cut and resized; None: they keep their size.
        exif: `apply` turns an image as its EXIF orientation says, `ignore` reads it as stored; None
            refuses one with an orientation.
        alpha: What transparent pixels lie on, `white` or `black`; `drop` reads their colour as
            stored; None refuses an image that has some.
    """

    image_size: int | None = None
    exif: str | None = None
    alpha: str | None = None


@dataclass(frozen=True)
class Look:
    """What an image is before it is read.

    Attributes:
        size: (height, width) of the image as these rules read it.
        mode: Pillow's name of its colour space, such as RGB, L, P, CMYK.
        bits: Per channel.
        orientation: 1 to 8, of its EXIF data; 1 where there are none.
        alpha: `opaque` or `transparent` where there is an alpha channel or a transparent colour.
        frames: Whether there are several.
        profile: Whether its colour profile is another than sRGB.
    """

    size: tuple[int, int]
    mode: str
    bits: int = 8
    orientation: int = 1
    alpha: str | None = None
    frames: bool = False
    profile: bool = False

    @property
    def deep(self) -> bool:
        """Whether its colours are more than 8 bits in a mode that cannot be made RGB."""
        return self.mode.startswith(_DEEP) or self.mode not in _READABLE

    def refusal(self, rules: Rules) -> str | None:
        """Why these rules do not read the image: what follows its name in a sentence."""
        if self.mode.startswith(_DEEP):
            return f"has more than 8 bits per channel (mode {self.mode}); save it with 8"
        if self.mode not in _READABLE:
            return f"has colours in mode {self.mode}; save it as RGB"
        if self.orientation != 1 and rules.exif is None:
            lies, _ = _TURNS[self.orientation]
            return (
                f"carries EXIF orientation {self.orientation}: as stored it lies {lies}; `exif: "
                "apply` turns it upright, `exif: ignore` reads it as stored (study: data.exif)"
            )
        if self.alpha == "transparent" and rules.alpha is None:
            return (
                "has transparent pixels; `alpha: white` or `alpha: black` says what they lie on, "
                "`alpha: drop` reads the colours stored under them (study: data.alpha)"
            )
        return None

    def notes(self, rules: Rules) -> list[str]:
        """Keys of `NOTES`: what reading it by these rules converts or cuts."""
        laid, fitted = self.alpha == "transparent", rules.image_size is not None
        true = {
            "turned": self.orientation != 1 and rules.exif == "apply",
            "not_turned": self.orientation != 1 and rules.exif == "ignore",
            "on_white": laid and rules.alpha == "white",
            "on_black": laid and rules.alpha == "black",
            "alpha_dropped": laid and rules.alpha == "drop",
            "opaque_alpha": self.alpha == "opaque",
            "cut_to_8_bits": self.bits > 8 and not self.deep,
            "first_frame": self.frames,
            "greyscale": self.mode in _GREY,
            "palette": self.mode in ("P", "PA"),
            "cmyk": self.mode == "CMYK",
            "other_mode": self.mode in ("YCbCr", "HSV"),
            "profile": self.profile,
            "resized": fitted and self.size != (rules.image_size, rules.image_size),
            "enlarged": fitted and min(self.size) < rules.image_size,
            "cut_to_square": fitted and self.size[0] != self.size[1],
        }
        return [key for key, is_so in true.items() if is_so]


def look(encoded: bytes | str, name: str, rules: Rules) -> Look:
    """What the header of an image says.

    Its pixels are decoded only where the header cannot tell: whether an alpha channel is used, and
    whether data that do not end like a whole file are whole.

    Args:
        encoded: The bytes of an image file, or the path of one.
        name: For error messages.

    Raises: ImageError that begins with the name, for an image that Pillow cannot read.
    """
    with _opened(encoded, name) as (image, file):
        seen = _look(image, file, rules)
        if not _ends_well(image.format, file):
            image.load()
        return seen


def decode(encoded: bytes | str, name: str, rules: Rules) -> tuple[np.ndarray, Look]:
    """One image as uint8 (H, W, 3), and what it was before.

    Raises: ImageError that begins with the name, for one that cannot be read, or not by these
        rules.
    """
    with _opened(encoded, name) as (image, file):
        seen = _look(image, file, rules)
        if refusal := seen.refusal(rules):
            raise ImageError(refusal)  # with its name in front where the block ends
        return _pixels(image, seen, rules), seen


def _look(image: Any, file: BinaryIO, rules: Rules) -> Look:
    bits, orientation = _bits(image), _orientation(image, file)  # before the pixels are decoded
    width, height = image.size  # of TIFF files: upright
    swap = orientation >= 5 and (image.format == "TIFF") != (rules.exif == "apply")
    size, frames = (width, height) if swap else (height, width), False
    with contextlib.suppress(*_PILLOW_RAISES):  # only the first one is read
        frames = bool(getattr(image, "is_animated", False))
    alpha = None
    if image.has_transparency_data and not image.mode.startswith(_DEEP):
        used = image.convert("RGBA").getchannel("A").getextrema()[0] < 255
        alpha = "transparent" if used else "opaque"
    profile = image.info.get("icc_profile") or b"sRGB"
    other = b"sRGB" not in profile and "sRGB".encode("utf-16-be") not in profile
    return Look(size, image.mode, bits, orientation, alpha, frames, other)


def _pixels(image: Any, seen: Look, rules: Rules) -> np.ndarray:
    from PIL import Image

    stored_upright = image.format == "TIFF"  # Pillow itself turns these
    if seen.alpha == "transparent" and rules.alpha != "drop":
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, rules.alpha), image)
    image = image.convert("RGB")
    if (rules.exif == "apply") != stored_upright and seen.orientation != 1:
        back = {6: 8, 8: 6} if stored_upright else {}  # each other turn is its own inverse
        _, turn = _TURNS[back.get(seen.orientation, seen.orientation)]
        image = image.transpose(Image.Transpose[turn])
    return np.asarray(image if rules.image_size is None else fit(image, rules.image_size))


def _bits(image: Any) -> int:
    if image.mode.startswith(_DEEP):
        return 16 if "16" in image.mode else 32
    stored = [tile[3] for tile in image.tile]
    deep = re.search(r";16[BLN]", str(stored)) is not None  # BGR;16 is 16 bits of three channels
    if image.format == "PPM":  # (mode, largest value)
        deep = any(isinstance(args, tuple) and args[-1] > 255 for args in stored)
    return 16 if deep else 8


def _orientation(image: Any, file: BinaryIO) -> int:
    """EXIF orientation, 1 where there is none that Pillow understands."""
    from PIL import Image

    with contextlib.suppress(*_PILLOW_RAISES):
        if image.format == "PNG" and "exif" not in image.info and _has_late_exif(file):
            image.load()
        orientation = Image.Image.getexif(image).get(_ORIENTATION, 1)
        return orientation if orientation in _TURNS else 1
    return 1


def _has_late_exif(file: BinaryIO) -> bool:
    """Whether a PNG has its EXIF data behind its pixels, where opening does not come to."""
    at = 8
    while len(head := _read_at(file, at, 8)) == 8:
        if head[4:] == b"eXIf":
            return True
        at += 12 + int.from_bytes(head[:4], "big")
    return False


def _read_at(file: BinaryIO, at: int, n: int) -> bytes:
    """Some bytes of a file, which stays where it was."""
    place = file.tell()
    file.seek(at)
    content = file.read(n)
    file.seek(place)
    return content


def _ends_well(kind: str, file: BinaryIO) -> bool:
    """Whether a file ends like a whole one of its format; False where that cannot be seen."""
    place, n_bytes = file.tell(), file.seek(0, os.SEEK_END)
    file.seek(place)
    if kind == "WEBP":
        return int.from_bytes(_read_at(file, 4, 4), "little") + 8 <= n_bytes
    tail = _read_at(file, max(0, n_bytes - 64), 64)
    if kind == "PNG":
        return _PNG_END in tail
    return kind in ("JPEG", "MPO") and tail.rstrip(b"\0").endswith(b"\xff\xd9")


@contextlib.contextmanager
def _opened(encoded: bytes | str, name: str) -> Iterator[tuple[Any, BinaryIO]]:
    """An open PIL image and its file; any error of Pillow in the block becomes an ImageError."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large images, odd EXIF data
            with _file(encoded) as file, Image.open(file) as image:
                yield image, file
    except ImageError as error:
        raise ImageError(f"{name} {error}") from None
    except Image.DecompressionBombError:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise ImageError(
            f"{name} cannot be read as an image (its header claims more than {most:,} pixels, and "
            "none so large is decoded); make it smaller or remove it"
        ) from None
    except _PILLOW_RAISES as error:
        raise ImageError(
            f"{name} cannot be read as an image ({_reason(error)}); repair or remove it"
        ) from None


def _file(encoded: bytes | str) -> BinaryIO:
    """Opens the bytes or the path of an image.

    Raises: ImageError without a name, for what is no file with content.
    """
    if isinstance(encoded, str):
        state = os.stat(encoded)
        if not stat.S_ISREG(state.st_mode):  # opening a pipe would wait for ever
            raise ImageError("is a folder, a pipe or a device; expected an image file")
    if (len(encoded) if isinstance(encoded, bytes) else state.st_size) == 0:
        raise ImageError("cannot be read as an image (it is empty); repair or remove it")
    return io.BytesIO(encoded) if isinstance(encoded, bytes) else open(encoded, "rb")


def _reason(error: BaseException) -> str:
    from PIL import UnidentifiedImageError

    reasons = {
        "its format is unknown": isinstance(error, UnidentifiedImageError),
        "the file is gone, or a link to nothing": isinstance(error, FileNotFoundError),
        "this user may not read it": isinstance(error, PermissionError),
        "it is a link that leads to itself": getattr(error, "errno", None) == errno.ELOOP,
        "its data end too early": isinstance(error, EOFError) or "truncated" in str(error).lower(),
    }
    said = f"its data are damaged; Pillow says: {files.one_line(error)}"
    return next((reason for reason, is_so in reasons.items() if is_so), said)
