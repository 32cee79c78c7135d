"""`kdlib.augment`: a view is a function of (seed, epoch, example id) and of nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.augment import augment, counter_hash, normalise
from kdlib.params import Augment

BOTH = Augment(crop_padding=2, flip=True)
MASK = 2**64 - 1


def images_of(n: int, shape: tuple[int, int, int] = (3, 5, 6), seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(1, 256, (n, *shape), np.uint8))


def split_mix(x: int) -> int:
    """SplitMix64's finaliser in Python's unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)


def slow_hash(seed: int, epoch: int, example_id: int, stream: int) -> int:
    key = seed
    for part in (example_id, epoch, stream):
        key = split_mix(key ^ split_mix(part))
    return key >> 32


def slow_view(image: np.ndarray, pad: int, flip: bool, seed: int, epoch: int, example_id: int):
    """One image at a time: pad with zeros, cut a window, mirror it."""
    _, height, width = image.shape
    padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
    left = slow_hash(seed, epoch, example_id, 1) % (2 * pad + 1)
    top = slow_hash(seed, epoch, example_id, 2) % (2 * pad + 1)
    window = padded[:, top : top + height, left : left + width]
    mirrored = flip and slow_hash(seed, epoch, example_id, 0) % 2 == 1
    return window[:, :, ::-1] if mirrored else window


def test_the_mixer_is_splitmix64():
    # the first outputs of SplitMix64 seeded with 0 and 1234567, from its reference implementation
    assert split_mix(0) == 0xE220A8397B1DCDAF
    assert split_mix(1234567) == 6457827717110365317


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    epochs=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    stream=st.integers(0, 3),
    data=st.data(),
)
def test_the_hash_is_that_of_unbounded_integers(seed, epochs, stream, data):
    ids = [data.draw(st.integers(0, 2**62)) for _ in epochs]
    drawn = counter_hash(seed, torch.tensor(epochs), torch.tensor(ids), stream)
    assert drawn.tolist() == [
        slow_hash(seed, e, i, stream) for e, i in zip(epochs, ids, strict=True)
    ]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("pad", [0, 1, 4])
def test_views_are_those_of_a_slow_loop(pad, flip):
    images, ids = images_of(40), torch.arange(40) * 7
    epochs = torch.arange(40) % 3
    views = augment(images, ids, epochs, Augment(crop_padding=pad, flip=flip), 11)
    assert (views.dtype, views.shape) == (torch.uint8, images.shape)
    for i in range(40):
        expected = slow_view(images[i].numpy(), pad, flip, 11, int(epochs[i]), int(ids[i]))
        np.testing.assert_array_equal(views[i].numpy(), expected)


def test_nothing_switched_on_is_the_image_itself():
    images = images_of(4)
    assert augment(images, torch.arange(4), torch.zeros(4, dtype=torch.int64), Augment(), 0) is (
        images
    )


def test_the_input_is_not_changed():
    images = images_of(20)
    before = images.clone()
    augment(images, torch.arange(20), torch.arange(20), BOTH, 0)
    assert torch.equal(images, before)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_view_does_not_depend_on_the_rest_of_its_batch(data):
    images, ids, epochs = images_of(12), torch.arange(12) * 31, torch.arange(12) % 5
    whole = augment(images, ids, epochs, BOTH, 3)
    order = torch.tensor(data.draw(st.permutations(range(12))))
    cut = data.draw(st.integers(1, 11))
    for part in (order[:cut], order[cut:]):
        view = augment(images[part], ids[part], epochs[part], BOTH, 3)
        assert torch.equal(view, whole[part])


def test_a_view_does_not_depend_on_the_memory_format():
    images, ids = images_of(12), torch.arange(12)
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(last, ids, ids, BOTH, 0), augment(images, ids, ids, BOTH, 0))


def test_views_differ_over_epochs_seeds_and_examples():
    ids, zero = torch.arange(400), torch.zeros(400, dtype=torch.int64)
    images = images_of(1).expand(400, -1, -1, -1)
    first = augment(images, ids, zero, BOTH, 0)
    for other in (
        augment(images, ids, zero + 1, BOTH, 0),
        augment(images, ids, zero, BOTH, 1),
        augment(images, ids + 1, zero, BOTH, 0),
    ):
        same = (first == other).flatten(1).all(1).float().mean().item()
        # two of 50 equally likely views agree in 1 of 50 cases; s.d. 0.007 over 400
        assert abs(same - 1 / 50) < 0.035


def test_flips_and_crops_are_uniform():
    """Read off the views: a picture whose pixels say where they come from."""
    n = 20_000
    place = torch.arange(1, 26, dtype=torch.uint8).reshape(1, 1, 5, 5).expand(n, 1, 5, 5)
    views = augment(place, torch.arange(n), torch.full((n,), 4), BOTH, 9)
    centre = views[:, 0, 2, 2].long() - 1  # with at most 2 pixels of shift it is never padding
    inner = (centre % 5 > 0) & (centre % 5 < 4)  # both neighbours are pixels, not padding
    step = (views[:, 0, 2, 1].long() - 1 - centre)[inner]  # -1 as it was, +1 mirrored
    counts = torch.bincount(centre, minlength=25).double()
    # 24 degrees of freedom: 51.2 is exceeded by 1 uniform sample in 1,000
    assert float(((counts - n / 25) ** 2 / (n / 25)).sum()) < 51.2
    assert torch.all(step.abs() == 1)
    assert abs((step == 1).double().mean().item() - 0.5) < 5 * 0.5 / len(step) ** 0.5


def test_a_flip_says_nothing_about_the_crop():
    n = 20_000
    ids, epochs = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    flip, x, y = (counter_hash(5, epochs, ids, s) % m for s, m in enumerate((2, 5, 5)))
    cells = torch.bincount(flip * 25 + x * 5 + y, minlength=50).double()
    # 49 degrees of freedom: 85.4 is exceeded by 1 independent sample in 1,000
    assert float(((cells - n / 50) ** 2 / (n / 50)).sum()) < 85.4


def test_streams_epochs_seeds_and_ids_are_uncorrelated():
    n = 20_000
    ids, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    draws = [counter_hash(0, zero, ids, stream) for stream in range(4)]
    draws += [counter_hash(0, zero + 1, ids, 0), counter_hash(1, zero, ids, 0)]
    draws += [counter_hash(0, zero, ids + 1, 0), counter_hash(0, ids, zero, 0)]
    table = torch.stack(draws).double()
    assert table.min() >= 0
    assert table.max() < 2**32
    correlation = torch.corrcoef(table) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / n**0.5
    for bit in (0, 13, 31):
        rate = ((torch.stack(draws) >> bit) & 1).double().mean(1)
        assert (rate - 0.5).abs().max() < 5 * 0.5 / n**0.5


def test_augmenting_leaves_the_global_generators_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    augment(images_of(4), torch.arange(4), torch.arange(4), BOTH, 0)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


def test_normalised_pixels_are_numpy_s():
    images = images_of(6)
    ours = normalise(images, MEAN, STD)
    assert ours.dtype == torch.float32
    mean, std = (np.array(x)[:, None, None] for x in (MEAN, STD))
    expected = (images.numpy().astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-6)


def test_normalised_pixels_are_torchvision_s():
    from torchvision.transforms.v2.functional import normalize, to_dtype

    images = images_of(6)
    expected = normalize(to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(normalise(images, MEAN, STD), expected, rtol=0, atol=1e-6)


def test_black_and_white_of_one_channel_by_hand():
    # (0 - 0.5) / 0.25 = -2 and (1 - 0.5) / 0.25 = 2
    images = torch.tensor([0, 255], dtype=torch.uint8).reshape(1, 1, 1, 2)
    assert normalise(images, [0.5], [0.25]).flatten().tolist() == pytest.approx([-2, 2], abs=1e-6)


def test_normalising_keeps_the_memory_format():
    images = images_of(4)
    last = images.contiguous(memory_format=torch.channels_last)
    ours = normalise(last, MEAN, STD)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours, normalise(images, MEAN, STD))
    assert normalise(images, MEAN, STD).is_contiguous()


def test_a_mean_and_a_std_of_different_length_are_refused():
    with pytest.raises(ValueError, match="zip"):
        normalise(images_of(1), [0.5], [0.5, 0.5])
