"""Gather, view and normalise images in one pass over the pixels, compiled for the CPU by numba.

The result is equal to the bit to that of `views.apply` and `Pixels.prepare`, which explain the
formulas. The functions below `available` are plain Python over flat arrays, which numba compiles on
first use; without numba `available` is False. Two habits let the compiler vectorise the loops: an
unsigned index, which numba need not test for being negative (5x), and a cast to int32 after each
sum, which numba widens to int64.
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kdlib.dataset.pixels import Pixels
from kdlib.dataset.views import (
    BLUE,
    CONTRAST,
    GREEN,
    HUE,
    KERNEL_BITS,
    NOTHING,
    ONE,
    RED,
    ROW_BITS,
    SATURATION,
    TAP_BITS,
    Views,
    draw,
)
from kdlib.repro.seeds import FACTOR_BITS
from kdlib.study.training import Augment

_LOCK = threading.Lock()
_TAP = 1 << TAP_BITS


@functools.cache
def available() -> bool:
    """Whether numba can be imported."""
    try:
        import numba  # noqa: F401
    except ImportError:
        return False
    return True


def _columns(y, top, left, flip, height, width):
    """[low, high): the columns of row y of a window that come from the image, not from padding."""
    if y + top < 0 or y + top >= height:
        return width, width
    start = left if flip else -left
    low = min(max(start, 0), width)
    return low, max(min(width + start, width), low)


def _write(image, shape, top, left, flip, scale, shift, last, out):
    """The window at (top, left) of a flat (C, H, W) image, zeros outside, mirrored where `flip`,
    times scale plus shift into `out`: flat (C, H, W), or (H, W, C) if `last`."""
    n_channels, height, width = shape
    plane = height * width
    if top == 0 and left == 0 and not flip:
        height, width = 1, plane  # nothing moves: one long row
    step = np.uint64(n_channels if last else 1)
    for c in range(n_channels):
        a, b = scale[c], shift[c]
        zero = np.float32(0) * a + b
        for y in range(height):
            low, high = _columns(y, top, left, flip, height, width)
            o = np.uint64(y * width * n_channels + c if last else c * plane + y * width)
            for x in range(np.uint64(low)):
                out[o + x * step] = zero
            for x in range(np.uint64(high), np.uint64(width)):
                out[o + x * step] = zero
            n = np.uint64(high - low)
            o += np.uint64(low) * step
            s = np.uint64(c * plane + (y + top) * width + max(left, 0))
            if flip:
                s += n - np.uint64(1)
                for x in range(n):
                    out[o + x * step] = np.float32(image[s - x]) * a + b
            else:
                for x in range(n):
                    out[o + x * step] = np.float32(image[s + x]) * a + b


def _write_colours(image, shape, top, left, flip, scale, shift, out):
    """`_write` of (3, H, W) to (H, W, 3): all channels in one loop, 2 to 3 times as fast."""
    height, width = shape[1:]
    plane, two_planes = np.uint64(height * width), np.uint64(2 * height * width)
    if top == 0 and left == 0 and not flip:
        height, width = 1, height * width
    a0, a1, a2 = scale
    b0, b1, b2 = shift
    zero, one, two, three = np.float32(0), np.uint64(1), np.uint64(2), np.uint64(3)
    for y in range(height):
        low, high = _columns(y, top, left, flip, height, width)
        o = np.uint64(3 * y * width)
        for begin, end in ((0, low), (high, width)):
            for x in range(np.uint64(begin), np.uint64(end)):
                out[o + x * three] = zero * a0 + b0
                out[o + x * three + one] = zero * a1 + b1
                out[o + x * three + two] = zero * a2 + b2
        n = np.uint64(high - low)
        o += np.uint64(low) * three
        s = np.uint64((y + top) * width + max(left, 0))
        if flip:
            s += n - one
            for x in range(n):
                out[o + x * three] = np.float32(image[s - x]) * a0 + b0
                out[o + x * three + one] = np.float32(image[s - x + plane]) * a1 + b1
                out[o + x * three + two] = np.float32(image[s - x + two_planes]) * a2 + b2
        else:
            for x in range(n):
                out[o + x * three] = np.float32(image[s + x]) * a0 + b0
                out[o + x * three + one] = np.float32(image[s + x + plane]) * a1 + b1
                out[o + x * three + two] = np.float32(image[s + x + two_planes]) * a2 + b2


def _taps(size, n, first, second, weight):
    """Fills (n,) int32: two places in [0, size) and the weight of the second."""
    for i in range(n):
        place = min((max((2 * i + 1) * size - n, 0) * _TAP + n) // (2 * n), (size - 1) * _TAP)
        first[i] = place >> TAP_BITS
        second[i] = min(first[i] + 1, size - 1)
        weight[i] = place & (_TAP - 1)


def _resize(image, shape, box, flip, out):
    """`out`, flat (C, H, W) uint8: the box enlarged to the image's size, mirrored where `flip`."""
    n_channels, height, width = shape
    top, left, h, w = box
    y0, y1, fy = np.empty((3, height), np.int32)
    x0, x1, fx = np.empty((3, width), np.int32)
    _taps(h, height, y0, y1, fy)
    _taps(w, width, x0, x1, fx)
    if flip:
        x0, x1, fx = x0[::-1].copy(), x1[::-1].copy(), fx[::-1].copy()
    mixed = np.empty(w, np.int32)
    for c in range(n_channels):
        for y in range(height):
            s0 = np.uint64((c * height + top + y0[y]) * width + left)
            s1 = np.uint64((c * height + top + y1[y]) * width + left)
            b = np.int32(fy[y])
            a = np.int32(_TAP - b)
            for x in range(np.uint64(w)):
                mixed[x] = np.int32(image[s0 + x]) * a + np.int32(image[s1 + x]) * b
            o = np.uint64((c * height + y) * width)
            for x in range(np.uint64(width)):
                t = mixed[np.uint64(x0[x])] * (_TAP - fx[x]) + mixed[np.uint64(x1[x])] * fx[x]
                out[o + x] = (t + (1 << (2 * TAP_BITS - 1))) >> (2 * TAP_BITS)


def _blend(pixel, factor, rest):
    total = np.int32(np.int32(pixel) * factor + rest + ONE // 2)
    return np.uint8(min(max(np.int32(total >> FACTOR_BITS), np.int32(0)), np.int32(255)))


def _grey(red, green, blue):
    return np.int32(np.int32(red * RED + green * GREEN + blue * BLUE + (1 << 15)) >> 16)


def _turned(value, hue, unit, steps):
    k = np.int32(hue + steps * unit)
    if k >= 6 * unit:
        k = np.int32(k - 6 * unit)
    part = max(min(min(k, np.int32(4 * unit - k)), unit), np.int32(0))
    return np.uint8(value - np.int32(np.int32(part + ONE // 2) >> FACTOR_BITS))


def _recolour(pixels, n_channels, operation, factor):
    """One colour operation on flat (C, H, W) uint8 pixels, in place."""
    size = np.uint64(len(pixels))
    n = np.uint64(len(pixels) // n_channels)
    factor = np.int32(factor)
    if operation < SATURATION:
        rest = np.int32(0)
        if operation == CONTRAST:
            total = 0
            for i in range(n):
                if n_channels == 1:
                    total += np.int64(pixels[i])
                else:
                    total += np.int64(_grey(pixels[i], pixels[n + i], pixels[n + n + i]))
            rest = np.int32((ONE - np.int64(factor)) * total // np.int64(n))
        for i in range(size):
            pixels[i] = _blend(pixels[i], factor, rest)
        return
    for i in range(n):
        red, green, blue = (
            np.int32(pixels[i]),
            np.int32(pixels[n + i]),
            np.int32(pixels[n + n + i]),
        )
        if operation == HUE:
            value = max(red, max(green, blue))
            chroma = np.int32(value - min(red, min(green, blue)))
            hue = np.int32(4 * chroma + red - green)
            if value == green:
                hue = np.int32(2 * chroma + blue - red)
            if value == red:
                hue = np.int32(green - blue)
            unit = np.int32(chroma * ONE)
            hue = np.int32(hue * ONE + chroma * factor)
            if hue < 0:
                hue = np.int32(hue + 6 * unit)
            elif hue >= 6 * unit:
                hue = np.int32(hue - 6 * unit)
            pixels[i] = _turned(value, hue, unit, 5)
            pixels[n + i] = _turned(value, hue, unit, 3)
            pixels[n + n + i] = _turned(value, hue, unit, 1)
        else:
            rest = np.int32((ONE - factor) * _grey(red, green, blue))
            pixels[i] = _blend(red, factor, rest)
            pixels[n + i] = _blend(green, factor, rest)
            pixels[n + n + i] = _blend(blue, factor, rest)


def _mirrored(i, n):
    return min(abs(i), 2 * (n - 1) - abs(i))


def _tap(memory, first, second, weight, total):
    """Adds the weighted sum of two runs of `memory` to `total`: int32, vectorised."""
    a, b, weight = np.uint64(first), np.uint64(second), np.int32(weight)
    for x in range(np.uint64(len(total))):
        pair = np.int32(memory[a + x] + memory[b + x])
        total[x] = np.int32(total[x] + np.int32(weight * pair))


def _blur(pixels, shape, kernel):
    """Flat (C, H, W) uint8 pixels under a kernel, in place: rows, then columns."""
    n_channels, height, width = shape
    radius = len(kernel) - 1
    wide, total = np.empty(width + 2 * radius, np.int32), np.empty(width, np.int32)
    rows = np.empty(height * width, np.int32)
    for c in range(n_channels):
        for y in range(height):
            o = (c * height + y) * width
            for x in range(width + 2 * radius):
                wide[x] = pixels[o + _mirrored(x - radius, width)]
            for x in range(width):
                total[x] = kernel[0] * wide[radius + x] + (1 << (KERNEL_BITS - ROW_BITS - 1))
            for k in range(1, radius + 1):
                _tap(wide, radius - k, radius + k, kernel[k], total)
            for x in range(width):
                rows[y * width + x] = total[x] >> (KERNEL_BITS - ROW_BITS)
        for y in range(height):
            o = (c * height + y) * width
            for x in range(width):
                total[x] = kernel[0] * rows[y * width + x] + (1 << (KERNEL_BITS + ROW_BITS - 1))
            for k in range(1, radius + 1):
                above, below = _mirrored(y - k, height), _mirrored(y + k, height)
                _tap(rows, above * width, below * width, kernel[k], total)
            for x in range(width):
                pixels[o + x] = total[x] >> (KERNEL_BITS + ROW_BITS)


def _block(memory, begins, shape, flip, box, factors, order, blur, scale, shift, last, out):
    """`out` from the images at `begins` in `memory`."""
    n_channels, height, width = shape
    size = n_channels * height * width
    scratch = np.empty(size, np.uint8)
    ones, zeros = np.ones(n_channels, np.float32), np.zeros(n_channels, np.float32)
    for i in range(len(begins)):
        image = memory[begins[i] : begins[i] + size]
        (top, left, h, w), flipped, target = box[i], flip[i], out[i]
        resized = h != height or w != width
        if resized or order.shape[1] or blur.shape[1]:
            if resized:
                _resize(image, shape, (top, left, h, w), flipped, scratch)
            else:
                _write(image, shape, top, left, flipped, ones, zeros, False, scratch)
            for k in range(order.shape[1]):
                operation = order[i, k]
                if operation != NOTHING:
                    _recolour(scratch, n_channels, operation, factors[i, operation])
            if blur.shape[1] and blur[i, 0] < 1 << KERNEL_BITS:
                _blur(scratch, shape, blur[i])
            image, top, left, flipped = scratch, 0, 0, False
        if last and n_channels == 3:
            _write_colours(image, shape, top, left, flipped, scale, shift, target)
        else:
            _write(image, shape, top, left, flipped, scale, shift, last, target)


@functools.cache
def _compiled() -> Callable[..., None]:
    """`_block` as machine code, kept on disk where numba finds a folder it may write to."""
    import numba
    from numba import types
    from numba.extending import register_jitable

    def array(dtype: types.Type, ndim: int, readonly: bool = True) -> types.Array:
        return types.Array(dtype, ndim, "C", readonly=readonly)  # writable ones are taken, too

    helpers = (_columns, _write, _write_colours, _taps, _resize, _blend, _grey, _turned, _recolour,
               _mirrored, _tap, _blur)  # fmt: skip
    for function in helpers:
        register_jitable(function)
    i32, i64, f32 = types.int32, types.int64, types.float32
    signature = types.void(
        array(types.uint8, 1), array(i64, 1), types.UniTuple(i64, 3),
        array(types.boolean, 1), array(i32, 2), array(i32, 2), array(i32, 2), array(i32, 2),
        array(f32, 1), array(f32, 1), types.boolean, array(f32, 2, readonly=False),
    )  # fmt: skip
    try:
        return numba.njit(signature, nogil=True, cache=True)(_block)
    except (RuntimeError, OSError):  # no such folder
        return numba.njit(signature, nogil=True)(_block)


@functools.cache
def _pool(process_id: int) -> ThreadPoolExecutor:
    # by process, as a forked child has none of its parent's threads
    return ThreadPoolExecutor(os.cpu_count(), "kdlib-fused")


def deliver(
    source: torch.Tensor | np.ndarray,
    rows: torch.Tensor | np.ndarray,
    views: Views | None,
    pixels: Pixels,
    out: torch.Tensor,
    n_threads: int = 1,
) -> None:
    """Write the normalised views of `source[rows]` to `out`.

    Equal to the bit to `pixels.prepare(apply(source[rows], views))`.

    Args:
        source: (N, C, H, W) uint8 on the CPU, each image C-contiguous, whatever the stride >= 0
            from one to the next; may be a read-only memory map.
        rows: (B,) int64, in [0, N).
        views: Of these B images; None for the images themselves.
        pixels: How they are normalised.
        out: (B, C, H, W) float32 on the CPU, contiguous or channels_last.
        n_threads: Threads among which the batch is divided, this one included.

    Raises: ValueError for rows outside the source, or views of other images. ImportError without
        numba.
    """
    source, rows = np.asarray(source), np.ascontiguousarray(rows, np.int64)
    n, shape, size = len(rows), tuple(out.shape[1:]), int(np.prod(out.shape[1:]))
    if n and not 0 <= rows.min() <= rows.max() < len(source):  # the loops would read beyond it
        raise ValueError(
            f"rows span [{rows.min()}, {rows.max()}]; expected integers in [0, {len(source)})"
        )
    assert (source.dtype, source.shape[1:], len(out)) == (np.uint8, shape, n)
    assert not n or source[0].flags.c_contiguous
    assert out.is_contiguous() or out.is_contiguous(memory_format=torch.channels_last)
    if views is None:
        ids = torch.zeros(n, dtype=torch.int64)
        views = draw(Augment(), 0, ids, ids, shape)
    views.check(n, shape)
    scale, shift = pixels.scale
    drawn = [x.numpy() for x in (views.flip, views.box, views.factors, views.order, views.blur)]
    last = not out.is_contiguous()
    flat = (out.permute(0, 2, 3, 1) if last else out).numpy().reshape(n, size)
    begins, n_bytes = rows * source.strides[0], 0
    if len(source):
        n_bytes = (len(source) - 1) * source.strides[0] + size
    memory = np.lib.stride_tricks.as_strided(source, (n_bytes,), (1,), writeable=False)
    with _LOCK:
        kernel = _compiled()

    def block(part: slice) -> None:
        chosen = (x[part] for x in drawn)
        kernel(memory, begins[part], shape, *chosen, scale, shift, last, flat[part])

    ends = [n * i // n_threads for i in range(n_threads + 1)]
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    submitted = [_pool(os.getpid()).submit(block, part) for part in parts[1:]]
    block(parts[0])
    for future in submitted:
        future.result()
