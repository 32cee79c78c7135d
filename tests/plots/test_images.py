"""Rows of images show every image unchanged, with a caption that fits."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from plots.example_tables import grid_input, words

from kdlib.plots import theme
from kdlib.plots.images import image_table, images_of, region_grid


@pytest.mark.parametrize("channels", [1, 3])
def test_region_grid_shows_every_image_unchanged_and_square(channels):
    images, titles = grid_input(channels=channels)
    images["hard"], titles["hard"] = images["hard"][:2], titles["hard"][:2]  # rows may be short
    fig = region_grid(Figure(figsize=(theme.WIDE, 4)), images, titles)
    (ax,) = fig.axes
    pixels = np.concatenate(list(images.values()))
    assert len(ax.images) == len(pixels) == 10
    for drawn, image in zip(ax.images, pixels, strict=True):
        shown = np.asarray(drawn.get_array())
        shown = shown[None] if channels == 1 else shown.transpose(2, 0, 1)
        np.testing.assert_array_equal(shown, image)
        assert drawn.get_interpolation() == "nearest"
        x0, x1, y0, y1 = drawn.get_extent()
        assert abs(x1 - x0) == pytest.approx(abs(y1 - y0))
    assert {"easy-to-learn", "ambiguous", "hard-to-learn", "class 3"} <= set(words(ax))
    assert fig.get_figheight() <= 4


def test_long_captions_are_cut_to_the_width_of_their_image():
    images, titles = grid_input(n=12)
    titles["easy"] = ["a caption far too long for a small image"] * 12
    fig = region_grid(Figure(figsize=(theme.WIDE, 3)), images, titles)
    captions = [text for text in words(fig) if text.startswith("a ")]
    assert len(captions) == 12
    assert all(text.endswith("…") and len(text) < 12 for text in captions)


@pytest.mark.parametrize(
    ("images", "titles", "message"),
    [
        ({}, {}, "no images"),
        ({"easy": np.zeros((2, 1, 8, 8))}, {"easy": ["a", "b"]}, "float64 of shape"),
        ({"easy": np.zeros((2, 8, 8), np.uint8)}, {"easy": ["a", "b"]}, r"expected uint8 \(n, C"),
        ({"easy": np.zeros((2, 1, 8, 8), np.uint8)}, {"easy": ["a"]}, "2 images and 1 captions"),
    ],
)
def test_region_grid_refuses_what_is_not_a_row_of_images(images, titles, message):
    with pytest.raises(ValueError, match=message):
        region_grid(Figure(), images, titles)


def test_rows_that_do_not_fit_are_refused():
    images, titles = grid_input(names=[f"class_{i}" for i in range(10)])
    with pytest.raises(ValueError, match="10 rows do not fit into a height of 1 in"):
        region_grid(Figure(figsize=(theme.WIDE, 1)), images, titles)


def test_images_come_back_from_their_table_as_they_were():
    images, titles = grid_input(names=("easy", "hard"))
    images["hard"] = images["hard"][:, :1, :4]  # rows may differ in size
    again, captions = images_of(image_table(images, titles))
    assert captions == titles
    assert list(again) == ["easy", "hard"]
    for name, pixels in images.items():
        np.testing.assert_array_equal(again[name], pixels)
    assert images_of(image_table({"easy": images["easy"][:0]}, {"easy": []})) == ({}, {})
