"""Contour lines enclose the share of the points that they say."""

import numpy as np
from matplotlib.path import Path

from kdlib.explorer.density import SHARES, contours


def test_lines_enclose_their_share_of_the_points():
    rng = np.random.default_rng(0)
    points = np.concatenate([rng.normal((0.3, 0.7), 0.05, (20_000, 2)),
                             rng.normal((0.7, 0.2), 0.03, (10_000, 2))])  # fmt: skip
    lines = contours(*points.T, (0, 1), (0, 1))
    assert [share for share, _ in lines] == sorted((share for share, _ in lines), reverse=True)
    for share in SHARES:
        inside = np.zeros(len(points), int)
        for of, line in lines:
            if of == share:
                assert np.array_equal(line[0], line[-1])  # closed
                inside += Path(line).contains_points(points)
        assert abs((inside % 2).mean() - share) < 0.03


def test_points_at_the_ends_of_the_ranges_and_on_one_place_have_lines():
    corner = np.zeros(30_000)
    lines = contours(corner, corner, (0, 1), (0, 1))
    assert len(lines) >= 1
    assert all(np.array_equal(line[0], line[-1]) for _, line in lines)
    assert contours(np.empty(0), np.empty(0), (0, 1), (0, 1)) == []
