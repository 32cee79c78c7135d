"""Batch augmentation as a pure function of (seed, epoch, example id), and pixel normalisation.

There is no generator whose state would depend on batch size, order, device or resume point: the
parameters of a view are a hash of what the view is. So a teacher's output for a view can be cached.
"""

import torch

from kdlib.params import Augment

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as signed 64 bits, as in SplitMix64
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _shifted(x: torch.Tensor, bits: int) -> torch.Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # logical shift; >> on int64 copies the sign


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = x + _GOLDEN
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def counter_hash(
    seed: int, epochs: torch.Tensor, example_ids: torch.Tensor, stream: int
) -> torch.Tensor:
    """Independent-looking 32-bit integers, one per view, equal on every device.

    SplitMix64's finaliser over seed, epoch, example id and stream in turn; int64 products wrap the
    same way on CPU and GPU.

    Args:
        seed: In [0, 2**63).
        epochs: (B,) int64.
        example_ids: (B,) int64.
        stream: Which of the view's parameters is drawn.

    Returns: (B,) int64, uniform on [0, 2**32).
    Source: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    key = torch.full_like(example_ids, seed)
    for part in (example_ids, epochs, torch.full_like(example_ids, stream)):
        key = _mix(key ^ _mix(part))
    return _shifted(key, 32)


def augment(
    images: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    settings: Augment,
    seed: int,
) -> torch.Tensor:
    """The view of each image that belongs to (seed, epoch, example id).

    Args:
        images: (B, C, H, W) uint8.
        example_ids: (B,) int64.
        epochs: (B,) int64; views of one image in two epochs are unrelated.
        settings: Flip with probability 1/2; crop of the native size out of the zero-padded image,
            each of the (2 * padding + 1)**2 places equally likely.
        seed: The run's augmentation seed.

    Returns: (B, C, H, W) uint8; the input itself when nothing is switched on.
    """
    pad = settings.crop_padding
    if not (pad or settings.flip):
        return images
    n, n_channels, height, width = images.shape
    x = torch.arange(width, device=images.device).expand(n, width)
    y = torch.arange(height, device=images.device).expand(n, height)
    if settings.flip:
        flipped = counter_hash(seed, epochs, example_ids, 0) & 1
        x = torch.where(flipped[:, None] == 1, width - 1 - x, x)
    if pad:
        images = torch.nn.functional.pad(images, (pad, pad, pad, pad))
        places = 2 * pad + 1
        x = x + (counter_hash(seed, epochs, example_ids, 1) % places)[:, None]
        y = y + (counter_hash(seed, epochs, example_ids, 2) % places)[:, None]
    pixels = y[:, :, None] * images.shape[3] + x[:, None, :]  # (B, H, W) places in the padded image
    index = pixels.reshape(n, 1, height * width).expand(n, n_channels, height * width)
    return images.flatten(2).gather(2, index).reshape(n, n_channels, height, width)


def normalise(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """uint8 pixels to float32 `(pixel / 255 - mean) / std`, per channel.

    Args:
        images: (B, C, H, W) uint8.
        mean: C floats, for pixels in [0, 1].
        std: C floats > 0, for pixels in [0, 1].

    Returns: (B, C, H, W) float32, in the memory format of the input.
    """
    shape = (1, -1, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in std], device=images.device).reshape(shape)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=images.device)
    return torch.addcmul(shift.reshape(shape), images.float(), scale)
