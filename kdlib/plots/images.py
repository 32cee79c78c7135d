"""Figures of images."""

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from kdlib.plots.layout import fitted, text_width_pt
from kdlib.plots.theme import RC, REGIONS, TEXT_PT, in_words


def region_grid(
    fig: Figure, images: Mapping[str, np.ndarray], titles: Mapping[str, Sequence[str]]
) -> Figure:
    """Rows of images, a region (or class) each, as they are: no smoothing, no stretching.

    Args:
        fig: An empty figure; its height is lowered to what the rows need.
        images: Row name -> uint8 (n, C, H, W) in [0, 255], C = 1 or 3; rows may differ in n.
        titles: Row name -> n captions; one too wide for its image is cut with an ellipsis.

    Returns: `fig`, with one axis.
    Raises: ValueError for no images, another dtype or shape, or captions that do not match.
    """
    if not images or max(map(len, images.values())) == 0:
        raise ValueError(f"no images to draw in rows {list(images)}; expected at least one")
    for name, pixels in images.items():
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1] not in (1, 3):
            raise ValueError(
                f"images of {name!r} are {pixels.dtype} of shape {pixels.shape}; expected uint8 "
                "(n, C, H, W) with C = 1 or 3"
            )
        if len(titles.get(name, ())) != len(pixels):
            raise ValueError(
                f"{name!r} has {len(pixels)} images and {len(titles.get(name, ()))} captions; "
                "expected one caption per image"
            )
    names = {name: REGIONS.get(name, in_words(name)) for name in images}
    left = max(text_width_pt(name, RC["font.size"]) for name in names.values()) + 10
    step_x = (72 * fig.get_figwidth() - left - 2) / max(map(len, images.values()))
    step_y = 72 * fig.get_figheight() / len(images)
    below = 2 * TEXT_PT  # room for the caption and the gap to the next row
    # Points per pixel: one scale for all, so that sizes compare.
    scale = min(
        min(0.9 * step_x / pixels.shape[3], (step_y - below) / pixels.shape[2])
        for pixels in images.values()
    )
    if scale <= 0:
        raise ValueError(
            f"{len(images)} rows do not fit into a height of {fig.get_figheight():g} in; "
            f"expected more than {below / 72:.2f} in a row"
        )
    step_y = min(step_y, scale * max(pixels.shape[2] for pixels in images.values()) + below)
    width, height = 72 * fig.get_figwidth(), step_y * len(images)
    fig.set_layout_engine("none")
    fig.set_figheight(height / 72)
    ax = fig.add_axes((0, 0, 1, 1))  # data units are points, so that text and images fit
    for i, (name, pixels) in enumerate(images.items()):
        top = i * step_y + 2
        half_x, half_y = scale * pixels.shape[3] / 2, scale * pixels.shape[2] / 2
        plain = {"parse_math": False}  # names are no formulas, with and without `style`
        ax.text(left - 6, top + half_y, names[name], ha="right", va="center", **plain)
        for j, (image, title) in enumerate(zip(pixels, titles[name], strict=True)):
            x, bottom = left + (j + 0.5) * step_x, top + 2 * half_y
            ax.imshow(
                image[0] if len(image) == 1 else image.transpose(1, 2, 0),  # (C, H, W) -> (H, W, C)
                cmap="gray", vmin=0, vmax=255, interpolation="nearest",
                extent=(x - half_x, x + half_x, bottom, top),
            )  # fmt: skip
            ax.text(
                x, bottom + 1, fitted(title, step_x - 2), ha="center", va="top",
                fontsize=TEXT_PT, **plain,
            )  # fmt: skip
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.axis("off")
    return fig


def image_table(
    images: Mapping[str, np.ndarray], titles: Mapping[str, Sequence[str]]
) -> pd.DataFrame:
    """Images and captions of a `region_grid` as a table, to be committed.

    Returns: A row per image: `row`, `caption`, `shape` (C, H, W) and `pixels`, their bytes in
        base64.
    """
    rows = [
        (row, caption, " ".join(map(str, image.shape)), b64encode(image.tobytes()).decode())
        for row, pixels in images.items()
        for image, caption in zip(pixels, titles[row], strict=True)
    ]
    return pd.DataFrame(rows, columns=["row", "caption", "shape", "pixels"])


def images_of(table: pd.DataFrame) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Images and captions of a table of `image_table`, as `region_grid` takes them."""
    pixels, captions = {}, {}
    for name, rows in table.groupby("row", sort=False):
        pixels[name] = np.array([
            np.frombuffer(b64decode(row.pixels), np.uint8).reshape(*map(int, row.shape.split()))
            for row in rows.itertuples()
        ])  # fmt: skip
        captions[name] = list(rows["caption"])
    return pixels, captions
