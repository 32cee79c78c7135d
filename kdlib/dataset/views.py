"""Random views of images as a pure function of (seed, epoch, example id), and pixel normalisation.

There is no generator whose state would depend on batch size, order, device or resume point: the
parameters of a view are a hash of what the view is. So a teacher's output for a view can be cached.
They are drawn on the CPU, and all arithmetic on pixels is that of integers (fixed point), so a
view is the same to the bit on every device and in the compiled loops of `kdlib.dataset.fused`.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from kdlib.repro.seeds import FACTOR_BITS, counter_hash
from kdlib.study.training import Augment, Blur, ColourJitter, ResizedCrop

ONE = 1 << FACTOR_BITS  # a blending factor of 1, and a sixth of a turn of hue
TAP_BITS = 11  # bits of a bilinear weight; two of them and a pixel stay below 2**31
KERNEL_BITS = 15  # of a weight of a blur's kernel
ROW_BITS = 8  # of a blurred row's fraction; a pixel and both of them stay below 2**31
RED, GREEN, BLUE = 19595, 38470, 7471  # 0.299, 0.587, 0.114 of 2**16, their sum: BT.601 grey
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NOTHING, GREY = -1, 4  # in an order: no operation, and saturation by a factor of 0
_TRIES = 10  # of a random resized crop, before the central one

# Streams of the hash. A resized crop's area and ratio take two for each try from _CROP on.
_FLIP, _X, _Y, _ORDER, _FACTORS, _CROP = 0, 1, 2, 3, 4, 8
_JITTERED, _GREY, _BLURRED, _SIGMA = range(_CROP + 2 * _TRIES, _CROP + 2 * _TRIES + 4)


@dataclass(frozen=True)
class Views:
    """What was drawn for B views: small tensors on the CPU; what is off is the identity.

    A view is a box cut out of the image (zeros outside), brought to the image's size, mirrored,
    recoloured, and blurred.
    """

    settings: Augment
    image_shape: tuple[int, int, int]
    flip: torch.Tensor  # (B,) bool
    box: torch.Tensor  # (B, 4) int32: top, left, height, width; padded: top, left from -pad to pad
    factors: torch.Tensor  # (B, 4) int32 of brightness, contrast, saturation, hue; unit 1 / ONE
    # (with GREY (B, 5), the last 0)
    order: torch.Tensor  # (B, K) int32: the K colour operations switched on, first to last
    blur: torch.Tensor  # (B, R + 1) int32: the kernel from its centre outwards; (B, 0): no blur

    def check(self, n: int, image_shape: tuple[int, ...]) -> None:
        """Raises ValueError unless drawn for `n` images of this (C, H, W)."""
        if (len(self.box), self.image_shape) != (n, tuple(image_shape)):
            raise ValueError(
                f"views were drawn for {len(self.box)} images of shape {self.image_shape}; "
                f"expected {n} of shape {tuple(image_shape)}, as the images have"
            )


def _crops(crop: ResizedCrop, hashes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(B, 4) int64 boxes by torchvision's rule: ten tries, then the largest allowed central box.

    In float64; an exponential that differs in its last bit between two CPUs moves a box's rounding
    in fewer than 1 of 10**12 views.
    """
    n, low, high = hashes.shape[1], *np.log(crop.ratio)
    uniform = hashes[_CROP : _CROP + 2 * _TRIES].reshape(_TRIES, 2, n) / 2**32
    area = height * width * (crop.scale[0] + (crop.scale[1] - crop.scale[0]) * uniform[:, 0])
    ratio = np.exp(low + (high - low) * uniform[:, 1])
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)  # (_TRIES, B)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(0)[None]
    w, h = np.take_along_axis(w, first, 0)[0], np.take_along_axis(h, first, 0)[0]
    top = hashes[_Y] % np.maximum(height - h + 1, 1)
    left = hashes[_X] % np.maximum(width - w + 1, 1)
    central_h = min(height, max(1, round(width / crop.ratio[0])))
    central_w = min(width, max(1, round(height * crop.ratio[1])))
    central = ((height - central_h) // 2, (width - central_w) // 2, central_h, central_w)
    return np.where(fits.any(0)[:, None], np.stack([top, left, h, w], 1), central)


def _strengths(jitter: ColourJitter) -> tuple[float, ...]:
    return jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue


def _jitters(jitter: ColourJitter, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(B, 4) factors and (B, K) order; an operation of strength 0 is in no order."""
    strengths = _strengths(jitter)
    factors = np.empty((hashes.shape[1], 4))
    for i, strength in enumerate(strengths):
        low, high = (-strength, strength) if i == HUE else (max(0.0, 1 - strength), 1 + strength)
        uniform = low + (high - low) * (hashes[_FACTORS + i] / 2**32)
        factors[:, i] = np.rint(uniform * (6 * ONE if i == HUE else ONE))
    factors[:, HUE] %= 6 * ONE
    orders = np.array(list(itertools.permutations(np.flatnonzero(strengths))))
    return factors, orders[hashes[_ORDER] % len(orders)]


def _kernels(blur: Blur, hashes: np.ndarray) -> np.ndarray:
    """(B, R + 1) int64 weights of Gaussian kernels from the centre outwards, whose sum over both
    sides is 2**KERNEL_BITS.

    In float64, as the crops are: 1 of 10**10 views may differ between two CPUs.
    """
    low, high = blur.sigma
    sigma = low + (high - low) * (hashes[1] / 2**32)
    weights = np.exp(-0.5 * (np.arange(blur.radius + 1) / sigma[:, None]) ** 2)
    weights *= 2**KERNEL_BITS / (2 * weights.sum(1, keepdims=True) - 1)  # the centre is 1
    weights = np.rint(weights).astype(np.int64)
    weights[:, 0] = 2**KERNEL_BITS - 2 * weights[:, 1:].sum(1)
    weights[hashes[0] >= blur.probability * 2**32] = [2**KERNEL_BITS] + [0] * blur.radius
    return weights


def check_shape(settings: Augment, image_shape: tuple[int, int, int]) -> None:
    """Demand that images of this (C, H, W) have the views.

    Raises: ValueError where colour is asked of images that have none, or of a kernel that is wider
        than they are.
    """
    n_channels, jitter, blur = image_shape[0], settings.colour_jitter, settings.blur
    if jitter and any(_strengths(jitter)) and n_channels not in (1, 3):
        raise ValueError(f"images have {n_channels} channels; colour_jitter expects 1 or 3")
    if jitter and (jitter.saturation or jitter.hue) and n_channels != 3:
        raise ValueError(
            f"colour_jitter has saturation {jitter.saturation} and hue {jitter.hue}, but images "
            "have 1 channel; grey images have neither, set both to 0"
        )
    if settings.grayscale and n_channels != 3:
        raise ValueError(
            f"grayscale is {settings.grayscale}, but images have {n_channels} channel(s); expected "
            "3, remove it (study: training.augment.grayscale)"
        )
    if blur and blur.radius >= min(image_shape[1:]):
        raise ValueError(
            f"blur has a kernel of {2 * blur.radius + 1} pixels, which reaches beyond the mirrored "
            f"image of {image_shape[1]} x {image_shape[2]}; expected a radius below its side: give "
            "a smaller kernel_size (study: training.augment.blur)"
        )


def draw(
    settings: Augment,
    seed: int,
    epochs: torch.Tensor,
    example_ids: torch.Tensor,
    image_shape: tuple[int, int, int],
) -> Views:
    """What is random about the views that belong to (seed, epoch, example id).

    Flip: mirrored with probability 1/2. Padded crop: of the native size out of the zero-padded
    image, each of the (2 * padding + 1)**2 places equally likely. Resized crop, colour jitter,
    grayscale and blur: distributed as torchvision's RandomResizedCrop, ColorJitter, RandomGrayscale
    and GaussianBlur, in this order; levels of colour are truncated there and rounded here.

    Args:
        settings: Which of them are on.
        seed: The run's augmentation seed, in [0, 2**63).
        epochs: (B,) int64, on the CPU; views of one image in two epochs are unrelated.
        example_ids: (B,) int64, on the CPU.
        image_shape: (C, H, W) of one image.

    Raises: ValueError as `check_shape`.
    """
    check_shape(settings, image_shape)
    _, height, width = image_shape
    crop, jitter, pad = settings.resized_crop, settings.colour_jitter, settings.crop_padding
    n = len(example_ids)
    n_streams = _CROP + 2 * _TRIES if crop else _CROP if jitter else _ORDER
    hashes = counter_hash(seed, epochs, example_ids, np.arange(n_streams)[:, None])
    flip = hashes[_FLIP] % 2 == 1 if settings.flip else np.zeros(n, bool)
    box = np.tile([0, 0, height, width], (n, 1))
    if pad:
        box[:, 0] = hashes[_Y] % (2 * pad + 1) - pad
        box[:, 1] = hashes[_X] % (2 * pad + 1) - pad
    elif crop:
        box = _crops(crop, hashes, height, width)
    factors, order = np.tile([ONE, ONE, ONE, 0], (n, 1)), np.empty((n, 0))
    if jitter:
        factors, order = _jitters(jitter, hashes)

    def later(*streams: int) -> np.ndarray:
        return counter_hash(seed, epochs, example_ids, np.array(streams)[:, None])

    if jitter and jitter.probability is not None:
        order[later(_JITTERED)[0] >= jitter.probability * 2**32] = NOTHING
    if settings.grayscale:
        grey = np.where(later(_GREY)[0] < settings.grayscale * 2**32, GREY, NOTHING)
        order, factors = np.column_stack([order, grey]), np.column_stack([factors, np.zeros(n)])
    blur = np.empty((n, 0))
    if settings.blur:
        blur = _kernels(settings.blur, later(_BLURRED, _SIGMA))
    drawn = (torch.from_numpy(x.astype(np.int32)) for x in (box, factors, order, blur))
    return Views(settings, tuple(image_shape), torch.from_numpy(flip), *drawn)


def _shifted(images: torch.Tensor, box: torch.Tensor, flip: torch.Tensor, pad: int) -> torch.Tensor:
    """(B, C, H, W) uint8: the window of each zero-padded image, mirrored where `flip`."""
    n, n_channels, height, width = images.shape
    x = torch.arange(width, device=images.device)
    x = torch.where(flip[:, None], width - 1 - x, x) + (pad + box[:, 1, None])  # (B, W)
    y = torch.arange(height, device=images.device) + (pad + box[:, 0, None])  # (B, H)
    if pad:
        images = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    pixels = y[:, :, None] * images.shape[3] + x[:, None, :]  # (B, H, W) places in the padded image
    index = pixels.reshape(n, 1, height * width).expand(n, n_channels, height * width)
    return images.flatten(2).gather(2, index).reshape(n, n_channels, height, width)


def _taps(start: torch.Tensor, size: torch.Tensor, n: int) -> tuple[torch.Tensor, ...]:
    """The two pixels, (B, n) int64 each, and the second's weight, (B, n) int32, of n samples of
    [start, start + size): bilinear, centres at half pixels, clamped to the box."""
    centres = 2 * torch.arange(n, device=start.device) + 1
    place = (centres * size[:, None] - n).clamp(min=0)  # 2 * n times the place in the box
    place = ((place << TAP_BITS) + n) // (2 * n)  # 2**TAP_BITS times it, rounded
    place = torch.minimum(place, (size[:, None] - 1) << TAP_BITS)
    first = place >> TAP_BITS
    second = torch.minimum(first + 1, size[:, None] - 1)
    weight = (place & ((1 << TAP_BITS) - 1)).int()
    return first + start[:, None], second + start[:, None], weight


def _resized(images: torch.Tensor, box: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) uint8: each box enlarged to (H, W), mirrored where `flip`.

    A box is never larger than the image, so nothing is made smaller and no filter against aliasing
    would change a pixel. The sum is exact and rounded once.
    """
    shape, (top, left, h, w) = images.shape, box.unbind(1)
    top_row, bottom_row, y = _taps(top, h, shape[2])  # (B, H)
    columns = _taps(left, w, shape[3])  # (B, W)
    first, second, x = (torch.where(flip[:, None], t.flip(1), t) for t in columns)

    def rows(index: torch.Tensor) -> torch.Tensor:
        return images.gather(2, index[:, None, :, None].expand(shape)).int()

    y, x = y[:, None, :, None], x[:, None, None, :]
    mixed = rows(top_row) * ((1 << TAP_BITS) - y) + rows(bottom_row) * y
    left, right = (mixed.gather(3, i[:, None, None].expand(shape)) for i in (first, second))
    total = left * ((1 << TAP_BITS) - x) + right * x
    return ((total + (1 << (2 * TAP_BITS - 1))) >> (2 * TAP_BITS)).to(torch.uint8)


def grey_levels(pixels: torch.Tensor) -> torch.Tensor:
    """(B, 1, H, W) int32 grey levels of 1 or 3 channels, rounded."""
    if pixels.shape[1] == 1:
        return pixels
    red, green, blue = pixels.split(1, 1)
    return (RED * red + GREEN * green + BLUE * blue + (1 << 15)) >> 16


def _turned(pixels: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Hue turned by `turn` sixths / ONE, in [0, 6); value and chroma stay.

    With the hue in units of the chroma no division is left: a channel is value minus
    chroma * clamp(min(k, 4 - k), 0, 1), k = (5, 3 or 1 + hue sixths) mod 6.
    Source: Wikipedia, HSL and HSV, "HSV to RGB alternative".
    """
    red, green, blue = pixels.split(1, 1)
    value = pixels.amax(1, keepdim=True)
    chroma = value - pixels.amin(1, keepdim=True)
    hue = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    hue = torch.where(value == red, green - blue, hue)  # in [-chroma, 5 * chroma]
    unit = chroma * ONE
    hue = (hue * ONE + chroma * turn).remainder((6 * unit).clamp(min=1))
    steps = torch.tensor([5, 3, 1], dtype=torch.int32, device=pixels.device).reshape(1, 3, 1, 1)
    k = hue + steps * unit  # (B, 3, H, W), in [0, 11 * unit)
    k = torch.where(k >= 6 * unit, k - 6 * unit, k)
    part = torch.minimum(torch.minimum(k, 4 * unit - k), unit).clamp(min=0)
    return value - ((part + ONE // 2) >> FACTOR_BITS)


def _recoloured(pixels: torch.Tensor, operation: int, factor: torch.Tensor) -> torch.Tensor:
    """One colour operation: (B, C, H, W) int32 pixels, (B, 1, 1, 1) int32 factors.

    Levels are rounded to the nearest; torchvision and PIL truncate them, and are darker by 0.4 to
    0.5 levels on average.
    """
    if operation == HUE:
        return _turned(pixels, factor)
    rest = torch.zeros_like(factor)  # ONE times what is added to factor * pixels
    if operation == CONTRAST:
        grey = grey_levels(pixels)
        total = grey.sum((1, 2, 3), keepdim=True, dtype=torch.int64)
        rest = ((ONE - factor) * total // grey[0].numel()).int()
    elif operation in (SATURATION, GREY):
        rest = (ONE - factor) * grey_levels(pixels)
    return ((factor * pixels + rest + ONE // 2) >> FACTOR_BITS).clamp(0, 255)


def _mirrored(n: int, radius: int, device: torch.device) -> torch.Tensor:
    """(n + 2 * radius,) int64: places in [0, n) of -radius to n + radius - 1, mirrored."""
    place = torch.arange(-radius, n + radius, device=device).abs()
    return torch.minimum(place, 2 * (n - 1) - place)


def _blurred(pixels: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) int32 pixels under their (B, R + 1) int32 kernels: rows, then columns."""
    radius = kernel.shape[1] - 1
    for axis, bits in ((3, KERNEL_BITS - ROW_BITS), (2, KERNEL_BITS + ROW_BITS)):
        n = pixels.shape[axis]
        wide = pixels.index_select(axis, _mirrored(n, radius, pixels.device))
        total = kernel[:, 0, None, None, None] * pixels
        for k in range(1, radius + 1):
            pair = wide.narrow(axis, radius - k, n) + wide.narrow(axis, radius + k, n)
            total += kernel[:, k, None, None, None] * pair
        pixels = (total + (1 << (bits - 1))) >> bits
    return pixels


def apply(images: torch.Tensor, views: Views) -> torch.Tensor:
    """The views of a batch in plain tensor operations, on the images' device.

    Args:
        images: (B, C, H, W) uint8.
        views: Of these B images, in their order.

    Returns: (B, C, H, W) uint8; the input itself when nothing is switched on.
    Raises: ValueError for views of other images.
    """
    views.check(len(images), images.shape[1:])
    settings, device = views.settings, images.device
    if settings.flip or settings.crop_padding or settings.resized_crop:
        box, flip = views.box.to(device).long(), views.flip.to(device)
        if settings.resized_crop:
            images = _resized(images, box, flip)
        else:
            images = _shifted(images, box, flip, settings.crop_padding)
    if views.order.shape[1] == 0 and views.blur.shape[1] == 0:
        return images
    pixels, factors = images.int(), views.factors.to(device)[:, :, None, None, None]
    for step in views.order.unbind(1):
        for operation in step.unique().tolist():  # of tensors on the CPU: waits for no device
            if operation != NOTHING:
                rows = (step == operation).nonzero()[:, 0].to(device)
                pixels[rows] = _recoloured(pixels[rows], operation, factors[rows, operation])
    if views.blur.shape[1]:
        blurred = (views.blur[:, 0] < 1 << KERNEL_BITS).nonzero()[:, 0]
        rows = blurred.to(device)
        pixels[rows] = _blurred(pixels[rows], views.blur[blurred].to(device))
    return pixels.to(torch.uint8)


def augment(
    images: torch.Tensor,
    example_ids: torch.Tensor,
    epochs: torch.Tensor,
    settings: Augment,
    seed: int,
) -> torch.Tensor:
    """The view of each image that belongs to (seed, epoch, example id): `apply` of a `draw`.

    Args:
        images: (B, C, H, W) uint8.
        example_ids: (B,) int64, on any device, as `epochs`; the others are as in `draw`.

    Returns: (B, C, H, W) uint8; the input itself when nothing is switched on.
    """
    shape = tuple(images.shape[1:])
    return apply(images, draw(settings, seed, epochs.cpu(), example_ids.cpu(), shape))
