"""Pixel statistics, normalisation and memory format."""

from dataclasses import dataclass

import numpy as np
import torch

from kdlib.cache.shards import Cache


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

    @property
    def scale(self) -> tuple[np.ndarray, np.ndarray]:
        """Factor and summand, (C,) float32 each, with which uint8 pixels are normalised."""
        factor = [1 / (255 * s) for s in self.std]
        summand = [-m / s for m, s in zip(self.mean, self.std, strict=True)]
        return np.array(factor, np.float32), np.array(summand, np.float32)

    def prepare(self, images: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Pixels as `(pixel / 255 - mean) / std`, per channel, in the study's memory format.

        A product and a sum, each rounded: one fused operation would give other bits.

        Args:
            images: (B, C, H, W) uint8.
            out: (B, C, H, W) float32 to write to, in any memory format.

        Returns: (B, C, H, W) float32, `out` or new.
        """
        images = images.contiguous(memory_format=self.memory_format)
        factor, summand = (torch.from_numpy(x).to(images.device)[:, None, None] for x in self.scale)
        out = images.to(torch.float32, copy=True) if out is None else out.copy_(images)
        return out.mul_(factor).add_(summand)


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
