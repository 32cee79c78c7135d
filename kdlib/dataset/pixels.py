"""Pixel statistics, normalisation and memory format."""

from dataclasses import dataclass

import numpy as np
import torch

from kdlib.cache.shards import Cache


def pixel_scale(mean: list[float], std: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """`scale` and `shift`, (C,) float32 each, with which `pixel * scale + shift` normalises.

    Args:
        mean: C floats, for pixels in [0, 1].
        std: C floats > 0, for pixels in [0, 1].
    """
    shift = [-m / s for m, s in zip(mean, std, strict=True)]
    return np.array([1 / (255 * s) for s in std], np.float32), np.array(shift, np.float32)


def normalise(
    images: torch.Tensor, mean: list[float], std: list[float], out: torch.Tensor | None = None
) -> torch.Tensor:
    """uint8 pixels to float32 `(pixel / 255 - mean) / std`, per channel.

    A product and a sum, each rounded: one fused operation would give other bits.

    Args:
        images: (B, C, H, W) uint8.
        mean: As in `pixel_scale`.
        std: As in `pixel_scale`.
        out: (B, C, H, W) float32 to write to, in any memory format.

    Returns: (B, C, H, W) float32, `out` or new, in the memory format of the input.
    """
    scale, shift = (
        torch.from_numpy(x).to(images.device)[:, None, None] for x in pixel_scale(mean, std)
    )
    out = images.to(torch.float32, copy=True) if out is None else out.copy_(images)
    return out.mul_(scale).add_(shift)


@dataclass(frozen=True)
class Pixels:
    """How a network wants its pixels: per-channel mean and std of pixels in [0, 1]."""

    mean: list[float]
    std: list[float]
    channels_last: bool = False

    @property
    def memory_format(self) -> torch.memory_format:
        """Where the channels stand in memory."""
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def prepare(self, images: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(B, C, H, W) uint8 -> float32, normalised, in the memory format the study asks for."""
        images = images.contiguous(memory_format=self.memory_format)
        return normalise(images, self.mean, self.std, out)


def pixel_statistics(images: Cache, example_ids: np.ndarray) -> tuple[list[float], list[float]]:
    """Mean and population standard deviation of each channel over some images, pixels in [0, 1].

    Computed in exact integer sums, so that the order of the ids does not matter.

    Returns: (mean, std), one float per channel; a constant channel gets std 1.
    """
    n_channels = images.header["columns"]["images"][1][0]
    counts = np.zeros((n_channels, 256), np.int64)
    for chunk in np.array_split(np.sort(example_ids), max(1, len(example_ids) // 512)):
        pixels = images.read("images", chunk)  # (B, C, H, W)
        counts += [np.bincount(pixels[:, c].ravel(), minlength=256) for c in range(n_channels)]
    values, n_pixels = np.arange(256), counts.sum(1)
    mean, squares = counts @ values / n_pixels, counts @ values**2 / n_pixels
    std = np.sqrt(squares - mean**2)
    return [float(m) / 255 for m in mean], [float(s) / 255 if s > 1e-6 else 1.0 for s in std]
