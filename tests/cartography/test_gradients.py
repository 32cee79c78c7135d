"""Norms of per-example gradients, against one backward pass for each example."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlib.cartography.gradients import gradient_norms
from kdlib.dataset.pixels import Pixels
from kdlib.models.networks import build_network
from kdlib.study.models import Model

PIXELS = Pixels([0.5], [0.25])


def batch(n=7, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (n, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return images, torch.randint(0, classes, (n,), generator=generator)


def network(name="tiny_cnn"):
    model = build_network(Model(name=name), n_classes=4, image_shape=(1, 8, 8), seed=3)
    with torch.no_grad():  # running statistics that are not those of a fresh network
        for _ in range(3):
            model(PIXELS.prepare(batch(40)[0]))
    return model


@pytest.mark.parametrize("name", ["tiny_cnn", "cifar_resnet8"])
def test_norms_are_those_of_one_backward_pass_for_each_example(name):
    model, (images, labels) = network(name), batch()
    grand, grand_last = gradient_norms(model, PIXELS, images, labels)
    model.eval()
    for i in range(len(labels)):
        model.zero_grad()
        F.cross_entropy(model(PIXELS.prepare(images[i : i + 1])), labels[i : i + 1]).backward()
        squares = {k: float(p.grad.double().square().sum()) for k, p in model.named_parameters()}
        last = squares["linear.weight"] + squares["linear.bias"]
        np.testing.assert_allclose(grand[i], sum(squares.values()) ** 0.5, rtol=1e-4)
        np.testing.assert_allclose(grand_last[i], last**0.5, rtol=1e-4)
    assert (grand > grand_last).all()


def test_an_example_s_norm_depends_on_no_other_example(monkeypatch):
    model, (images, labels) = network(), batch()
    together, _ = gradient_norms(model, PIXELS, images, labels)
    alone = [gradient_norms(model, PIXELS, images[i:][:1], labels[i:][:1])[0] for i in range(7)]
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-5)
    monkeypatch.setattr("kdlib.cartography.gradients.CHUNK_BYTES", 1)  # an example a chunk
    np.testing.assert_allclose(
        gradient_norms(model, PIXELS, images, labels)[0], together, rtol=1e-5
    )


def test_measuring_leaves_the_network_and_the_global_generator_as_they_were():
    model, (images, labels) = network(), batch()
    model.bn1.eval()  # a module in a mode of its own
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    gradient_norms(model, PIXELS, images, labels)
    assert model.training
    assert not model.bn1.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_no_images_give_no_norms():
    images, labels = batch()
    grand, grand_last = gradient_norms(network(), PIXELS, images[:0], labels[:0])
    assert len(grand) == len(grand_last) == 0
