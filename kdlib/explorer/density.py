"""Where the points of a large map lie dense: contour lines of a smoothed count."""

import numpy as np

MANY = 20_000  # points, from which single ones wash out
SHARES = (0.95, 0.8, 0.6, 0.4, 0.2, 0.05)  # of the points, that the lines enclose
SIDE = 160  # cells of the grid a side


def contours(
    x: np.ndarray, y: np.ndarray, x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[tuple[float, np.ndarray]]:
    """Lines of equal density of some points, outermost first.

    Each encloses the smallest area that holds a share of the points.

    Returns: (share, (V, 2) vertices) of each line; of one share there can be several.
    """
    import contourpy
    from scipy.ndimage import gaussian_filter

    counts, xs, ys = np.histogram2d(x, y, SIDE, (x_range, y_range))
    if not counts.any():
        return []
    # half of Scott's width, in cells: two groups of points stay apart
    width = [max(1.0, 0.5 * len(x) ** (-1 / 6) * np.std(v) / (e[1] - e[0]))
             for v, e in ((x, xs), (y, ys))]  # fmt: skip
    # a border wider than the kernel closes the lines of points that lie at an end of the ranges
    border = int(4 * max(width)) + 2
    counts = np.pad(counts, border)
    density = gaussian_filter(counts, width, mode="constant")
    order = np.argsort(-density, axis=None, kind="stable")
    falling, held = density.ravel()[order], np.cumsum(counts.ravel()[order]) / counts.sum()
    cells = np.arange(-border, SIDE + border) + 0.5
    centres = [low + cells * (high - low) / SIDE for low, high in (x_range, y_range)]
    drawing = contourpy.contour_generator(*centres, density.T)
    found, former = [], None
    for share in SHARES:
        last = np.searchsorted(held, share)  # of the cells inside
        level = falling[last : last + 2].mean()
        if level != former:  # points on a few places: one cell can hold several shares
            found += [(share, line) for line in drawing.lines(level)]
        former = level
    return found
