"""Figures of images and of shard visits."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from kdlib.plots.layout import fitted, text_width_pt
from kdlib.plots.theme import BLUE, RC, REGIONS, TEXT_PT, in_words


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


def shard_visits(fig: Figure, visits: Mapping[str, np.ndarray], title: str = "") -> Figure:
    """How often each shard was read under several policies: one panel each, on the same scales.

    Args:
        fig: An empty figure.
        visits: Policy -> (shards,) mean visits per example, >= 0; as many shards in each.
        title: Above all panels.

    Returns: `fig`. The title of a panel has the share of samples from the last third of the shards.
    """
    axs = fig.subplots(len(visits), 1, sharex=True, sharey=True)
    for ax, (policy, counts) in zip(np.atleast_1d(axs), visits.items(), strict=True):
        ax.bar(np.arange(len(counts)), counts, width=1.0, color=BLUE, linewidth=0)
        late = counts[-(len(counts) // 3) :].sum() / counts.sum()
        never = int((counts == 0).sum())
        caption = f"{policy}: {late:.1%} of the samples from the last third of the shards"
        caption += f", {never} shards never read" if never else ""
        ax.set_title(caption, fontsize=TEXT_PT)
        ax.margins(x=0.01)
    fig.supxlabel("shard", fontsize=RC["axes.labelsize"])
    fig.supylabel("mean visits per image", fontsize=RC["axes.labelsize"])
    if title:
        fig.suptitle(title)
    return fig
