"""`kdlib.dataset.pixels`: normalisation, and the statistics it takes."""

import numpy as np
import pytest
import torch
from dataset.test_views import images_of

from kdlib.cache.build import build_images
from kdlib.cache.sources import array_source
from kdlib.dataset.pixels import Pixels, pixel_statistics

MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
PIXELS = Pixels(MEAN, STD)


def test_normalised_pixels_are_numpy_s():
    images = images_of(6)
    ours = PIXELS.prepare(images)
    assert ours.dtype == torch.float32
    mean, std = (np.array(x)[:, None, None] for x in (MEAN, STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-6)


def test_normalised_pixels_are_torchvision_s():
    from torchvision.transforms.v2.functional import normalize, to_dtype

    images = images_of(6)
    expected = normalize(to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(PIXELS.prepare(images), expected, rtol=0, atol=1e-6)


def test_black_and_white_of_one_channel_by_hand():
    # (0 - 0.5) / 0.25 = -2 and (1 - 0.5) / 0.25 = 2
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    ours = Pixels([0.5], [0.25]).prepare(images)
    assert ours.flatten().tolist() == pytest.approx([-2, 2], abs=1e-6)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalised_pixels_can_be_written_to_memory_at_hand(memory_format):
    images = images_of(4)
    out = torch.empty(4, 3, 5, 6).to(memory_format=memory_format)
    assert PIXELS.prepare(images, out=out) is out
    assert torch.equal(out, PIXELS.prepare(images))


def test_a_product_and_a_sum_are_rounded_one_by_one():
    scale, shift = PIXELS.scale
    assert scale.dtype == shift.dtype == np.float32
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
    expected = images.numpy().astype(np.float32) * scale[:, None, None]
    expected = expected + shift[:, None, None]
    np.testing.assert_array_equal(PIXELS.prepare(images).numpy(), expected)


def test_a_mean_and_a_std_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        Pixels([0.5], [0.5, 0.5]).prepare(images_of(1))


def test_pixel_statistics_are_numpy_s_whatever_the_order(make_images, monkeypatch):
    images = make_images(30)
    ids = np.random.default_rng(1).permutation(30)[:22]
    mean, std = pixel_statistics(images, ids)
    pixels = images.read("images", ids).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    assert pixel_statistics(images, ids[::-1]) == (mean, std)  # to the last bit


def test_pixel_statistics_of_many_images_are_summed_over_chunks(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9000, 1, 1, 2), np.uint8)
    labels = np.zeros(9000, np.int64)
    built = build_images(array_source("noise", "train", pixels, labels, "a"), tmp_path, 2048)
    mean, std = pixel_statistics(built, np.arange(9000))
    np.testing.assert_allclose([*mean, *std], [pixels.mean() / 255, pixels.std() / 255], rtol=1e-12)


def test_a_constant_channel_has_standard_deviation_1(tmp_path):
    pixels = np.zeros((4, 3, 2, 2), np.uint8)
    pixels[:, 1], pixels[:2, 2] = 51, 255
    built = build_images(array_source("flat", "train", pixels, np.zeros(4), "a"), tmp_path, 4)
    assert pixel_statistics(built, np.arange(4)) == ([0.0, 0.2, 0.5], [1.0, 1.0, 0.5])
