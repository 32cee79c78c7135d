"""Features of any layer of a network, for the study's images and for those of other data sets.

Images of other data sets are brought to the network's input shape: grey ones are repeated over
three channels, coloured ones reduced to their luma (BT.601), then resized bilinearly with
antialiasing to the network's height and width; they are normalised as the study's images are.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from kdlib.cache.shards import Cache
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.views import grey_levels
from kdlib.models.base import Network
from kdlib.models.evaluation import outputs
from kdlib.probes.classifiers import Features

BATCH = 500


def adapted(images: torch.Tensor, image_shape: tuple[int, int, int]) -> torch.Tensor:
    """Images in the input shape of a network.

    Args:
        images: (N, C, H, W) uint8; C is 1 or 3.
        image_shape: (channels, height, width) wanted; channels 1 or 3.

    Returns: (N, *image_shape) uint8; the images themselves where they fit.
    Raises: ValueError for other numbers of channels.

    >>> adapted(torch.full((1, 3, 2, 2), 80, dtype=torch.uint8), (1, 2, 2)).flatten().tolist()
    [80, 80, 80, 80]
    """
    channels, side = images.shape[1], tuple(image_shape[1:])
    if channels == 3 and image_shape[0] == 1:
        images = grey_levels(images.to(torch.int32)).to(torch.uint8)
    elif channels == 1 and image_shape[0] == 3:
        images = images.expand(-1, 3, -1, -1)
    elif channels != image_shape[0]:
        raise ValueError(
            f"images have {channels} channels and the network takes {image_shape[0]}; expected 1 "
            "or 3 of each"
        )
    if images.shape[2:] == side:
        return images
    resized = F.interpolate(
        images.float(), side, mode="bilinear", antialias=True, align_corners=False
    )
    return resized.round().clamp(0, 255).to(torch.uint8)


def layer_features(
    network: Network,
    pixels: Pixels,
    images: torch.Tensor,
    image_shape: tuple[int, int, int],
    layers: Sequence[str] = ("features",),
) -> dict[str, np.ndarray]:
    """Features of each layer, in one pass over clean images in evaluation mode.

    Args:
        images: (N, C, H, W) uint8, on the network's device.
        image_shape: The network's input shape; images of another shape are `adapted`.
        layers: Names of `Network.outputs`; `features` are the input of the last layer, and a
            stage's grid is reduced to its mean over height and width.

    Returns: (N, D) float32 for each layer.
    Raises: ValueError for a layer that the network does not have.
    """
    parts: dict[str, list[np.ndarray]] = {layer: [] for layer in layers}
    for chunk in torch.split(images, BATCH):
        for batch in outputs(network, pixels, adapted(chunk, image_shape), layers):
            for layer, values in zip(layers, batch, strict=True):
                pooled = values.float().flatten(2).mean(2) if values.ndim > 2 else values.float()
                parts[layer].append(pooled.cpu().numpy())
    return {layer: np.concatenate(arrays) for layer, arrays in parts.items()}


def labelled_features(cache: Cache, ids: np.ndarray, values: np.ndarray, weights: str) -> Features:
    """Features with their labels, ids and split.

    Args:
        cache: Of the images.
        ids: (N,) int64 example ids.
        values: (N, D) float32, one row per id.
        weights: Fingerprint of the network's weights.

    Raises: As `Features`.
    """
    return Features(values, cache.read("labels", ids), ids, cache.header["split"], weights)
