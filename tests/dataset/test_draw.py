"""`kdlib.dataset.views.draw`: draws are distributed as torchvision's, and unrelated."""

import numpy as np
import torch
from dataset.test_views import BOTH, images_of
from scipy import stats

from kdlib.dataset.views import GREY, ONE, augment, draw
from kdlib.repro.seeds import counter_hash, torch_seeded
from kdlib.study.training import Augment, Blur, ColourJitter, ResizedCrop


def test_boxes_are_distributed_as_torchvision_s():
    from torchvision.transforms import RandomResizedCrop

    n, (height, width) = 4000, (32, 48)
    crop = ResizedCrop(scale=(0.1, 1.0), ratio=(0.6, 2.0))
    ids, image = torch.arange(n), torch.empty(3, height, width)
    views = draw(Augment(resized_crop=crop), 8, torch.zeros_like(ids), ids, (3, height, width))
    with torch_seeded(0, "augment"):
        theirs = np.array(
            [RandomResizedCrop.get_params(image, list(crop.scale), list(crop.ratio)) for _ in ids]
        )

    def numbers(box: np.ndarray) -> dict[str, np.ndarray]:
        top, left, h, w = box.T.astype(float)
        return {
            "area": h * w, "log ratio": np.log(w / h), "height": h, "width": w, "top": top,
            "left": left, "place": (left + 0.5) / (width - w + 1) + (top + 0.5) / (height - h + 1),
        }  # fmt: skip

    for name, ours in numbers(views.box.numpy()).items():
        assert stats.ks_2samp(ours, numbers(theirs)[name]).pvalue > 1e-3, name


def test_factors_and_orders_are_distributed_as_torchvision_s():
    from torchvision.transforms import ColorJitter

    n, ids = 4800, torch.arange(4800)
    jitter = ColourJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    views = draw(Augment(colour_jitter=jitter), 8, torch.zeros_like(ids), ids, (3, 8, 8))
    theirs = ColorJitter(0.4, 1.5, 0.2, 0.1)
    limits = theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue
    with torch_seeded(0, "augment"):
        factors = np.array([ColorJitter.get_params(*limits)[1:] for _ in ids])
    ours = views.factors.double().numpy() / ONE
    ours[:, 3] = np.where(ours[:, 3] > 3, ours[:, 3] - 6, ours[:, 3]) / 6
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], factors[:, column]).pvalue > 1e-3
    correlation = np.corrcoef(ours.T) - np.eye(4)
    assert np.abs(correlation).max() < 5 / n**0.5
    _, counts = np.unique(views.order.numpy(), axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3


def test_probabilities_are_kept_and_unrelated():
    n, ids = 20_000, torch.arange(20_000)
    jitter = ColourJitter(contrast=0.4, hue=0.1, probability=0.8)
    blur = Blur(probability=0.5, sigma=(0.5, 2.0))
    plain = draw(Augment(colour_jitter=jitter.model_copy(update={"probability": None})),
                 8, ids * 0, ids, (3, 9, 9))  # fmt: skip
    settings = Augment(colour_jitter=jitter, grayscale=0.2, blur=blur)
    views = draw(settings, 8, ids * 0, ids, (3, 9, 9))
    order, kernel = views.order.numpy(), views.blur.numpy()
    jittered, grey, blurred = order[:, 0] >= 0, order[:, 2] == GREY, kernel[:, 0] < 2**15
    for chosen, probability in ((jittered, 0.8), (grey, 0.2), (blurred, 0.5)):
        sd = (probability * (1 - probability) / n) ** 0.5
        assert abs(chosen.mean() - probability) < 5 * sd
    assert np.abs(np.corrcoef([jittered, grey, blurred]) - np.eye(3)).max() < 5 / n**0.5
    # a view that is recoloured is the one that would be without a probability
    np.testing.assert_array_equal(order[jittered, :2], plain.order.numpy()[jittered])
    assert (order[~jittered, :2] == -1).all()
    assert (kernel[:, 0] + 2 * kernel[:, 1:].sum(1) == 2**15).all()
    sigma = (1 / np.log(kernel[blurred, 0] / kernel[blurred, 1]) / 2) ** 0.5  # of w1 / w0
    assert stats.kstest(sigma, stats.uniform(0.5, 1.5).cdf).pvalue > 1e-3


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
    cells = np.bincount(flip * 25 + x * 5 + y, minlength=50)
    # 49 degrees of freedom: 85.4 is exceeded by 1 independent sample in 1,000
    assert float(((cells - n / 50) ** 2 / (n / 50)).sum()) < 85.4


def test_streams_epochs_seeds_and_ids_are_uncorrelated():
    n = 20_000
    ids, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    draws = [counter_hash(0, zero, ids, stream) for stream in range(4)]
    draws += [counter_hash(0, zero + 1, ids, 0), counter_hash(1, zero, ids, 0)]
    draws += [counter_hash(0, zero, ids + 1, 0), counter_hash(0, ids, zero, 0)]
    table = np.stack(draws)
    assert table.min() >= 0
    assert table.max() < 2**32
    correlation = np.corrcoef(table) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / n**0.5
    for bit in (0, 13, 31):
        rate = ((table >> bit) & 1).mean(1)
        assert np.abs(rate - 0.5).max() < 5 * 0.5 / n**0.5


def test_several_streams_at_once_are_the_streams_one_by_one():
    ids, epochs = torch.arange(9), torch.arange(9) % 2
    table = counter_hash(7, epochs, ids, np.array([[0], [5], [27]]))
    for row, stream in zip(table, (0, 5, 27), strict=True):
        np.testing.assert_array_equal(row, counter_hash(7, epochs, ids, stream))
