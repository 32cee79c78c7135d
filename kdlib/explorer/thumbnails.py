"""Small images of many examples in one picture, within a size."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Read = Callable[[np.ndarray], np.ndarray]  # example ids -> (n, C, H, W) uint8
SIDES = (64, 48, 32, 16, 8)  # pixels that are tried, the image's own size first
BLOCK = 4096  # images in memory at a time
WEBP_SIDE = 16383  # pixels at most
WORST = 0.03  # bytes a pixel: no picture of small images is smaller


@dataclass(frozen=True)
class Atlas:
    """Images in rows of one picture: `uri`, a data URI; `side` of each in pixels; `columns`;
    `n_bytes` of the picture."""

    uri: str
    side: int
    columns: int
    n_bytes: int


def atlas(read: Read, ids: np.ndarray, limit: int) -> Atlas | None:
    """The largest small images of all these examples that fit into `limit` bytes, in their order;
    None where none fit.

    Without loss where that fits, else with loss (WebP). Images that are not square are fitted into
    one.
    """
    if not len(ids):
        return None
    own = max(read(ids[:1]).shape[2:])
    columns = int(np.ceil(np.sqrt(len(ids))))
    for side in [own] * (own <= SIDES[0]) + [side for side in SIDES if side < own]:
        n_pixels = len(ids) * side**2
        if columns * side > WEBP_SIDE or WORST * n_pixels > limit:
            continue
        picture = _drawn(read, ids, side, columns)
        for options in ({"lossless": True}, {"quality": 70}):
            if "lossless" in options and n_pixels > limit:
                continue
            buffer = io.BytesIO()
            picture.save(buffer, "WEBP", method=4, **options)
            if (n_bytes := buffer.tell()) <= limit:
                text = base64.b64encode(buffer.getvalue()).decode()
                return Atlas(f"data:image/webp;base64,{text}", side, columns, n_bytes)
    return None


def _drawn(read: Read, ids: np.ndarray, side: int, columns: int) -> Any:
    from PIL import Image

    picture = Image.new("RGB", (columns * side, -(-len(ids) // columns) * side))
    for start in range(0, len(ids), BLOCK):
        for i, pixels in enumerate(read(ids[start : start + BLOCK]), start):
            plain = pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels[0]
            image = Image.fromarray(np.ascontiguousarray(plain))
            if max(image.size) != side:
                image.thumbnail((side, side), Image.Resampling.BOX)
            corner = (side - image.width) // 2, (side - image.height) // 2
            place = (i % columns * side + corner[0], i // columns * side + corner[1])
            picture.paste(image.convert("RGB"), place)
    return picture
