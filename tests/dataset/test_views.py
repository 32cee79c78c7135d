"""`kdlib.dataset.views`: a view is a function of (seed, epoch, example id) and of nothing else."""

import colorsys
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.dataset.pixels import Pixels
from kdlib.dataset.views import ONE, Views, apply, augment, draw
from kdlib.repro.seeds import counter_hash, torch_seeded
from kdlib.study.training import Augment, Blur, ColourJitter, ResizedCrop

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
JITTER = ColourJitter(brightness=0.4, contrast=0.5, saturation=0.6, hue=0.2)

# every kind of view, alone and together
KINDS = {
    "crop": Augment(resized_crop=ResizedCrop()),
    "crop, flip": Augment(resized_crop=ResizedCrop(scale=(0.3, 1.0), ratio=(0.5, 3.0)), flip=True),
    "jitter": Augment(colour_jitter=JITTER),
    "hue": Augment(colour_jitter=ColourJitter(hue=0.5)),
    "padded, flip, jitter": Augment(crop_padding=2, flip=True, colour_jitter=JITTER),
    "crop, flip, jitter": Augment(flip=True, resized_crop=ResizedCrop(), colour_jitter=JITTER),
    "grey": Augment(grayscale=0.5),
    "blur": Augment(blur=Blur(sigma=(0.3, 1.0))),
    "all": Augment(
        flip=True, resized_crop=ResizedCrop(),
        colour_jitter=JITTER.model_copy(update={"probability": 0.6}), grayscale=0.4,
        blur=Blur(probability=0.5, sigma=(0.1, 2.0), kernel_size=5),
    ),
}  # fmt: skip

BOTH = Augment(crop_padding=2, flip=True)
MASK = 2**64 - 1
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]


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


def test_a_jitter_of_strength_nought_is_the_image_itself():
    images, ids = images_of(4), torch.arange(4)
    nought = Augment(colour_jitter=ColourJitter())
    assert augment(images, ids, ids, nought, 0) is images
    assert draw(nought, 0, ids, ids, (3, 5, 6)).order.shape == (4, 0)


def test_the_input_is_not_changed():
    images = images_of(20)
    before = images.clone()
    for kind in (BOTH, *KINDS.values()):
        augment(images, torch.arange(20), torch.arange(20), kind, 0)
        assert torch.equal(images, before)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), kind=st.sampled_from([BOTH, *KINDS.values()]))
def test_a_view_does_not_depend_on_the_rest_of_its_batch(data, kind):
    images, ids, epochs = images_of(12), torch.arange(12) * 31, torch.arange(12) % 5
    whole = augment(images, ids, epochs, kind, 3)
    order = torch.tensor(data.draw(st.permutations(range(12))))
    cut = data.draw(st.integers(1, 11))
    for part in (order[:cut], order[cut:]):
        view = augment(images[part], ids[part], epochs[part], kind, 3)
        assert torch.equal(view, whole[part])


@pytest.mark.parametrize("kind", [BOTH, *KINDS.values()], ids=["padded, flip", *KINDS])
@pytest.mark.parametrize("device", DEVICES)
def test_a_view_does_not_depend_on_device_and_memory_format(kind, device):
    images, ids = images_of(40), torch.arange(40)
    here = augment(images, ids, ids, kind, 0)
    there = augment(images.to(device), ids.to(device), ids.to(device), kind, 0)
    assert torch.equal(there.cpu(), here)
    assert torch.equal(
        Pixels(MEAN, STD).prepare(there).cpu().view(torch.int32),
        Pixels(MEAN, STD).prepare(here).view(torch.int32),
    )
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(last, ids, ids, kind, 0), here)


def slow_crop(crop, height, width, seed, epoch, example_id) -> tuple[int, int, int, int]:
    """One image's box, with the standard library: ten tries, then the central one."""
    (s0, s1), (r0, r1) = crop.scale, crop.ratio
    for t in range(10):
        u, v = (slow_hash(seed, epoch, example_id, 8 + 2 * t + i) / 2**32 for i in (0, 1))
        area = height * width * (s0 + (s1 - s0) * u)
        ratio = math.exp(math.log(r0) + (math.log(r1) - math.log(r0)) * v)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = slow_hash(seed, epoch, example_id, 2) % (height - h + 1)
            return top, slow_hash(seed, epoch, example_id, 1) % (width - w + 1), h, w
    h, w = height, width
    if width / height < r0:
        h = max(1, round(width / r0))
    elif width / height > r1:
        w = max(1, round(height * r1))
    return (height - h) // 2, (width - w) // 2, h, w


def slow_resize(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    """Bilinear, pixel by pixel; weights are multiples of 1/2048, sums exact."""
    top, left, h, w = box

    def taps(i: int, size: int, n: int) -> list[tuple[int, Fraction]]:
        place = min(
            max(Fraction((2 * i + 1) * size, 2 * n) - Fraction(1, 2), Fraction(0)), size - 1
        )
        place = Fraction(math.floor(place * 2048 + Fraction(1, 2)), 2048)
        first = math.floor(place)
        return [(first, 1 - place + first), (min(first + 1, size - 1), place - first)]

    out = np.empty_like(image)
    n_channels, height, width = image.shape
    for c, y, x in itertools.product(range(n_channels), range(height), range(width)):
        total = sum(
            int(image[c, top + i, left + j]) * a * b
            for (i, a), (j, b) in itertools.product(taps(y, h, height), taps(x, w, width))
        )
        out[c, y, x] = math.floor(total + Fraction(1, 2))
    return out


def slow_colour(image: np.ndarray, operation: int, factor: int) -> np.ndarray:
    """One colour operation in exact fractions, pixel by pixel; hue by the six sectors."""
    f, half = Fraction(factor, 4096), Fraction(1, 2)
    grey = {}
    out = np.empty_like(image)
    n_channels, height, width = image.shape
    places = list(itertools.product(range(height), range(width)))
    for y, x in places:
        pixel = [int(p) for p in image[:, y, x]]
        grey[y, x] = pixel[0]
        if n_channels == 3:
            weights = (19595, 38470, 7471)
            grey[y, x] = sum(w * p for w, p in zip(weights, pixel, strict=True)) + 2**15 >> 16
    for y, x in places:
        pixel = [int(p) for p in image[:, y, x]]
        if operation == 3:
            value, low = max(pixel), min(pixel)
            red, green, blue = pixel
            if value > low:
                hue = (
                    Fraction(green - blue, value - low) % 6
                    if value == red
                    else 2 + Fraction(blue - red, value - low)
                    if value == green
                    else 4 + Fraction(red - green, value - low)
                )
                hue = (hue + f) % 6
                sector, rest = math.floor(hue), hue - math.floor(hue)
                falls = value - math.floor((value - low) * rest + half)
                rises = value - math.floor((value - low) * (1 - rest) + half)
                pixel = [
                    (value, rises, low),
                    (falls, value, low),
                    (low, value, rises),
                    (low, falls, value),
                    (rises, low, value),
                    (value, low, falls),
                ][sector]
        else:
            other = 0
            if operation == 1:  # ONE times what is added is a whole number, rounded down
                other = math.floor((4096 - factor) * Fraction(sum(grey.values()), len(places)))
            elif operation == 2:
                other = (4096 - factor) * grey[y, x]
            pixel = [math.floor(f * p + Fraction(other, 4096) + half) for p in pixel]
        out[:, y, x] = np.clip(pixel, 0, 255)
    return out


def slow_chance(key: tuple[int, int, int], stream: int, probability: float | None) -> bool:
    return probability is not None and slow_hash(*key, stream) / 2**32 < probability


def slow_blur(image: np.ndarray, blur: Blur, key: tuple[int, int, int]) -> np.ndarray:
    """Under the whole square kernel, pixel by pixel, mirrored by NumPy; rows keep 8 bits."""
    low, high = blur.sigma
    sigma, r = low + (high - low) * (slow_hash(*key, 31) / 2**32), blur.radius
    density = [math.exp(-(i * i) / (2 * sigma * sigma)) for i in range(-r, r + 1)]
    kernel = [round(d / sum(density) * 2**15) for d in density]
    kernel[r] = 0
    kernel[r] = 2**15 - sum(kernel)
    wide = np.pad(image.astype(int), ((0, 0), (r, r), (r, r)), mode="reflect").astype(object)
    height, width = image.shape[1:]
    rows = sum(Fraction(w, 2**15) * wide[:, :, i : i + width] for i, w in enumerate(kernel))
    rows = np.vectorize(lambda x: Fraction(math.floor(x * 256 + Fraction(1, 2)), 256))(rows)
    both = sum(Fraction(w, 2**15) * rows[:, i : i + height] for i, w in enumerate(kernel))
    return np.vectorize(lambda x: math.floor(x + Fraction(1, 2)))(both).astype(np.uint8)


def slow_jitter(image, jitter, seed, epoch, example_id) -> np.ndarray:
    if jitter.probability and not slow_chance((seed, epoch, example_id), 28, jitter.probability):
        return image
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    on = [i for i in range(4) if strengths[i]]
    orders = list(itertools.permutations(on))
    for i in orders[slow_hash(seed, epoch, example_id, 3) % len(orders)]:
        low, high = max(0, 1 - strengths[i]), 1 + strengths[i]
        if i == 3:
            low, high = -6 * strengths[i], 6 * strengths[i]  # in sixths of a turn
        uniform = slow_hash(seed, epoch, example_id, 4 + i) / 2**32
        image = slow_colour(image, i, round((low + (high - low) * uniform) * 4096))
    return image


@pytest.mark.parametrize("shape", [(3, 5, 6), (3, 7, 3), (1, 4, 4)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_crops_and_colours_are_those_of_a_slow_loop(kind, shape):
    if shape[0] == 1 and kind.colour_jitter:
        grey = ColourJitter(brightness=0.8, contrast=0.7)
        kind = kind.model_copy(update={"colour_jitter": grey})
    if shape[0] == 1:
        kind = kind.model_copy(update={"grayscale": None})
    images, ids, epochs = images_of(12, shape), torch.arange(12) * 7, torch.arange(12) % 3
    images[0, :, :2] = images[0, :1, :2]  # grey pixels, and two channels alike
    images[1, 0] = images[1, -1]
    views = augment(images, ids, epochs, kind, 11)
    for i in range(12):
        key = (11, int(epochs[i]), int(ids[i]))
        if kind.resized_crop:
            expected = slow_resize(
                images[i].numpy(), slow_crop(kind.resized_crop, *shape[1:], *key)
            )
            expected = expected[:, :, ::-1] if kind.flip and slow_hash(*key, 0) % 2 else expected
        else:
            expected = slow_view(images[i].numpy(), kind.crop_padding, kind.flip, *key)
        if kind.colour_jitter:
            expected = slow_jitter(expected, kind.colour_jitter, *key)
        if slow_chance(key, 29, kind.grayscale):
            expected = slow_colour(expected, 2, 0)
        if kind.blur and slow_chance(key, 30, kind.blur.probability):
            expected = slow_blur(expected, kind.blur, key)
        np.testing.assert_array_equal(views[i].numpy(), expected)


def test_the_slow_hue_is_the_standard_library_s():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (3, 8, 8), np.uint8)
    for factor in (0, 1, 5000, -9000, 12288):
        turned = slow_colour(image, 3, factor)
        for pixel, ours in zip(image.reshape(3, -1).T / 255, turned.reshape(3, -1).T, strict=True):
            h, s, v = colorsys.rgb_to_hsv(*pixel)
            expected = np.array(colorsys.hsv_to_rgb((h + factor / 6 / 4096) % 1, s, v)) * 255
            assert np.abs(ours - expected).max() <= 0.5 + 1e-6


def smooth_images(n: int, size: tuple[int, int]) -> torch.Tensor:
    """Half noise, half soft blobs: the hardest and the usual picture."""
    images = images_of(n, (3, *size), seed=1)
    coarse = images[: n // 2, :, :4, :4].float()
    soft = torch.nn.functional.interpolate(coarse, size, mode="bicubic", align_corners=False)
    images[: n // 2] = soft.clamp(0, 255).to(torch.uint8)
    return images


@pytest.mark.parametrize("size", [(32, 32), (24, 41)])
def test_resized_crops_are_torchvision_s_within_one_grey_level(size):
    from torchvision.transforms.v2.functional import resized_crop

    images, ids = smooth_images(200, size), torch.arange(200)
    views = draw(Augment(resized_crop=ResizedCrop()), 3, ids, ids, (3, *size))
    ours = apply(images, views)
    for image, our, box in zip(images, ours, views.box.tolist(), strict=True):
        theirs = resized_crop(image, *box, size=list(size), antialias=True)
        assert (our.int() - theirs.int()).abs().max() <= 1


# Where torchvision cuts off the fraction, we round (1 level); its grey is cut off, too, and its
# weights add up to 0.9999, which a factor far from 1 enlarges.
@pytest.mark.parametrize(
    ("name", "strength", "bound"),
    [
        ("brightness", 1.0, 1), ("contrast", 0.8, 2), ("saturation", 0.8, 2), ("hue", 0.5, 1),
    ],
)  # fmt: skip
def test_colours_are_torchvision_s_within_two_grey_levels(name, strength, bound):
    from torchvision.transforms.v2 import functional

    images, ids = smooth_images(200, (16, 16)), torch.arange(200)
    settings = Augment(colour_jitter=ColourJitter(**{name: strength}))
    views = draw(settings, 3, ids, ids, (3, 16, 16))
    column = ("brightness", "contrast", "saturation", "hue").index(name)
    factors = views.factors[:, column].double() / (6 * ONE if name == "hue" else ONE)
    if name == "hue":
        factors = factors - (factors > 0.5).double()  # torchvision takes [-0.5, 0.5]
    worst = 0
    for image, our, factor in zip(images, apply(images, views), factors.tolist(), strict=True):
        theirs = getattr(functional, f"adjust_{name}")(image, factor)
        worst = max(worst, int((our.int() - theirs.int()).abs().max()))
    assert worst <= bound


@pytest.mark.parametrize("blur", [Blur(), Blur(sigma=(0.1, 8.0), kernel_size=23)])
def test_blurs_are_torchvision_s_within_one_grey_level(blur):
    """Measured over noise and soft pictures: another level in 1 of 500 pixels."""
    from torchvision.transforms.v2.functional import gaussian_blur

    images, ids = smooth_images(100, (32, 24)), torch.arange(100)
    ours = apply(images, draw(Augment(blur=blur), 3, ids, ids, (3, 32, 24)))
    differ, (low, high) = [], blur.sigma
    for i, our in enumerate(ours):
        sigma = low + (high - low) * slow_hash(3, i, i, 31) / 2**32
        theirs = gaussian_blur(images[i], [2 * blur.radius + 1] * 2, [sigma] * 2)
        differ.append((our.int() - theirs.int()).abs())
    assert torch.stack(differ).max() <= 1
    assert (torch.stack(differ) > 0).float().mean() < 1 / 200
    assert not torch.equal(ours, images)


def test_grey_views_are_pil_s_and_torchvision_s_within_one_level():
    from PIL import Image
    from torchvision.transforms.v2.functional import rgb_to_grayscale

    images, ids = smooth_images(40, (16, 16)), torch.arange(40)
    ours = augment(images, ids, ids, Augment(grayscale=1.0), 0)
    assert (ours.int() - rgb_to_grayscale(images, 3).int()).abs().max() <= 1
    for image, our in zip(images, ours, strict=True):
        pil = np.array(Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L"))
        np.testing.assert_array_equal(our.numpy(), np.broadcast_to(pil, our.shape))


@pytest.mark.parametrize("size", [(4, 40), (40, 4)])
def test_an_image_no_box_fits_into_is_cut_in_the_middle_as_torchvision_does(size):
    from torchvision.transforms import RandomResizedCrop

    crop, ids = ResizedCrop(scale=(0.5, 1.0)), torch.arange(20)
    views = draw(Augment(resized_crop=crop), 0, ids, ids, (3, *size))
    with torch_seeded(0, "augment"):
        theirs = RandomResizedCrop.get_params(torch.empty(3, *size), crop.scale, crop.ratio)
    assert views.box.tolist() == [list(theirs)] * 20


def test_boxes_lie_in_the_image_and_are_whole_even_where_it_is_tiny():
    ids = torch.arange(300)
    for size in itertools.product((1, 2, 9), (1, 2, 9)):
        crop = ResizedCrop(scale=(0.01, 1.0), ratio=(0.1, 10.0))
        box = draw(Augment(resized_crop=crop), 0, ids, ids, (1, *size)).box
        assert box[:, :2].min() >= 0
        assert box[:, 2:].min() >= 1
        assert torch.all(box[:, :2] + box[:, 2:] <= torch.tensor(size))


def test_colours_switched_off_are_in_no_order():
    ids = torch.arange(50)
    jitter = ColourJitter(contrast=0.4, hue=0.1)
    views = draw(Augment(colour_jitter=jitter), 0, ids, ids, (3, 4, 4))
    assert {tuple(o) for o in views.order.tolist()} == {(1, 3), (3, 1)}


def test_a_factor_of_one_and_a_turn_of_nought_change_nothing():
    images = images_of(24)
    order = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.int32)
    factors = torch.tensor([[ONE, ONE, ONE, 0]] * 24, dtype=torch.int32)
    box = torch.tensor([[0, 0, 5, 6]] * 24, dtype=torch.int32)
    on = Augment(colour_jitter=JITTER, resized_crop=ResizedCrop())
    kernel = torch.tensor([[2**15, 0, 0]] * 24, dtype=torch.int32)
    views = Views(on, (3, 5, 6), torch.zeros(24, dtype=torch.bool), box, factors, order, kernel)
    assert torch.equal(apply(images, views), images)


def test_views_of_other_images_are_refused():
    ids = torch.arange(3)
    views = draw(BOTH, 0, ids, ids, (3, 5, 6))
    with pytest.raises(ValueError, match=r"drawn for 3 images of .*expected 2 of shape"):
        apply(images_of(2), views)
    with pytest.raises(ValueError, match=r"expected 3 of shape \(3, 6, 5\)"):
        apply(images_of(3, (3, 6, 5)), views)


@pytest.mark.parametrize("jitter", [{"saturation": 0.1}, {"hue": 0.1}])
def test_grey_images_have_neither_saturation_nor_hue(jitter):
    images, ids = images_of(3, (1, 4, 4)), torch.arange(3)
    both = ColourJitter(brightness=0.4, contrast=0.4)
    assert augment(images, ids, ids, Augment(colour_jitter=both), 0).shape == images.shape
    with pytest.raises(ValueError, match="grey images have neither"):
        draw(Augment(colour_jitter=ColourJitter(**jitter)), 0, ids, ids, (1, 4, 4))
    with pytest.raises(ValueError, match="4 channels; colour_jitter expects 1 or 3"):
        draw(Augment(colour_jitter=both), 0, ids, ids, (4, 4, 4))


def test_views_that_images_cannot_have_are_refused():
    ids = torch.arange(3)
    with pytest.raises(ValueError, match=r"grayscale is 0.2, but images have 1 channel.*remove it"):
        draw(Augment(grayscale=0.2), 0, ids, ids, (1, 8, 8))
    with pytest.raises(ValueError, match=r"kernel of 9 pixels.* 8 x 4; .* a smaller kernel_size"):
        draw(Augment(blur=Blur()), 0, ids, ids, (1, 8, 4))
    assert draw(Augment(blur=Blur()), 0, ids, ids, (1, 8, 5)).blur.shape == (3, 5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sigma": (2.0, 0.1)}, "the lower end first"),
        ({"kernel_size": 8}, "an odd number"),
        ({"probability": 0.0}, "greater than 0"),
    ],
)
def test_a_blur_that_cannot_be_is_refused(section, message):
    with pytest.raises(ValueError, match=message):
        Blur(**section)


def test_settings_without_the_later_views_are_dumped_as_before():
    jitter = {"brightness": 0.1, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    assert Augment(colour_jitter=ColourJitter(brightness=0.1)).model_dump() == {
        "crop_padding": 0, "flip": False, "resized_crop": None, "colour_jitter": jitter,
    }  # fmt: skip
    assert Augment(grayscale=0.2).model_dump()["grayscale"] == 0.2


def test_augmenting_leaves_the_global_generators_alone():
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    augment(images_of(4), torch.arange(4), torch.arange(4), BOTH, 0)
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)
