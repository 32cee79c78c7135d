"""Features of each layer equal those of a pass of its own, and other images are brought to the
network's input shape."""

import numpy as np
import pytest
import torch

from kdlib.dataset.pixels import Pixels
from kdlib.models.networks import TinyCNN
from kdlib.probes import features as features_module
from kdlib.probes.features import adapted, layer_features

PIXELS = Pixels([0.5], [0.25])
SHAPE = (1, 8, 8)


def images(n=7, channels=1, height=8, width=8, seed=0):
    shape = (n, channels, height, width)
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, shape, dtype=np.uint8))


def network():
    generator = torch.Generator().manual_seed(0)
    net = TinyCNN(10, 1, width=4)
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return net


def test_images_that_fit_pass_unchanged():
    for channels in (1, 3):
        given = images(channels=channels)
        assert adapted(given, (channels, 8, 8)) is given


def test_grey_is_repeated_and_colour_becomes_luma():
    grey = images()
    coloured = adapted(grey, (3, 8, 8))
    assert coloured.shape == (7, 3, 8, 8)
    assert all(torch.equal(coloured[:, [i]], grey) for i in range(3))
    assert torch.equal(adapted(coloured, SHAPE), grey)
    # BT.601: 0.299, 0.587 and 0.114 of 255
    pure = (255 * torch.eye(3)).to(torch.uint8)[:, :, None, None]
    assert adapted(pure, (1, 1, 1)).flatten().tolist() == [76, 150, 29]


def test_other_sizes_are_resized_and_flat_images_stay_flat():
    resized = adapted(images(channels=3, height=28, width=20), SHAPE)
    assert resized.shape == (7, *SHAPE)
    assert resized.dtype == torch.uint8
    assert (adapted(torch.full((1, 1, 28, 20), 93, dtype=torch.uint8), (3, 32, 32)) == 93).all()
    halves = torch.zeros(1, 1, 4, 4, dtype=torch.uint8)
    halves[..., 2:] = 200
    assert adapted(halves, (1, 2, 2))[0, 0, :, 1].min() > 150  # what was right stays right
    assert adapted(halves, (1, 2, 2))[0, 0, :, 0].max() < 50


def test_other_numbers_of_channels_are_refused():
    with pytest.raises(ValueError, match="2 channels and the network takes 3; expected 1 or 3"):
        adapted(torch.zeros(1, 2, 4, 4, dtype=torch.uint8), (3, 4, 4))


def test_every_layer_is_the_mean_of_its_grid_in_whatever_batches(monkeypatch):
    net, seen = network().eval(), images(23)
    found = layer_features(net, PIXELS, seen, SHAPE, ("features", "stage1", "stage2"))
    with torch.no_grad():
        features, grids = net.staged(PIXELS.prepare(seen))
    np.testing.assert_allclose(found["features"], features.numpy(), rtol=1e-5, atol=1e-6)
    for k, grid in enumerate(grids, start=1):
        pooled = grid.mean(dim=(2, 3)).numpy()
        np.testing.assert_allclose(found[f"stage{k}"], pooled, rtol=1e-5, atol=1e-6)
    # the network pools its last stage itself
    np.testing.assert_allclose(found["stage2"], found["features"], rtol=1e-5, atol=1e-6)
    assert all(v.dtype == np.float32 for v in found.values())
    monkeypatch.setattr(features_module, "BATCH", 5)
    again = layer_features(net, PIXELS, seen, SHAPE, ("stage1",))["stage1"]
    np.testing.assert_allclose(again, found["stage1"], rtol=1e-5, atol=1e-6)


def test_features_are_those_of_evaluation_mode_and_of_adapted_images():
    net, large = network().train(), images(channels=3, height=16, width=16)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    found = layer_features(net, PIXELS, large, SHAPE)["features"]
    assert net.training
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    small = layer_features(net.eval(), PIXELS, adapted(large, SHAPE), SHAPE)["features"]
    assert found.tobytes() == small.tobytes()


def test_a_layer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"no output 'stage3'; it has .*stage1 to stage2"):
        layer_features(network(), PIXELS, images(), SHAPE, ("features", "stage3"))
