"""`kdlib.models.size`: parameters, bytes and multiply-adds, by hand."""

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from kdlib.models.networks import build_network
from kdlib.models.published import TimmNetwork
from kdlib.models.size import network_size
from kdlib.study.models import Model


def size(name: str, shape: tuple[int, int, int], **options) -> dict[str, float]:
    model = Model(name=name, options=options)
    network = build_network(model, n_classes=10, image_shape=shape, seed=0)
    before = network.training
    found = network_size(network, shape)
    assert network.training == before
    return found


def test_a_network_of_two_convolutions_by_hand():
    # 3x3 over 6x6 and 3x3 pixels, 3 -> 8 -> 16 channels, then 16 -> 10; BatchNorm has two weights,
    # two buffers of float32 and a counter of 8 bytes
    convolutions = 3 * 8 * 9, 8 * 16 * 9
    n = sum(convolutions) + 2 * 8 + 2 * 16 + 16 * 10 + 10
    assert size("tiny_cnn", (3, 6, 6)) == {
        "parameters": n,
        "megabytes": pytest.approx((4 * (n + 2 * 8 + 2 * 16) + 2 * 8) / 1e6),
        "multiply_adds": convolutions[0] * 36 + convolutions[1] * 9 + 16 * 10,
    }


def test_the_products_of_attention_are_counted():
    # 4 patches of 4x4 and a class token: T = 5; width 6, one head, one block, an MLP of 12
    found = size(
        "timm/vit_tiny_patch16_224", (1, 8, 8), patch_size=4, depth=1, embed_dim=6, num_heads=1,
        mlp_ratio=2,
    )  # fmt: skip
    patches, per_token = 4 * 16 * 6, 6 * 18 + 6 * 6 + 2 * 6 * 12
    assert found["multiply_adds"] == patches + 5 * per_token + 2 * 5 * 5 * 6 + 6 * 10


@pytest.mark.parametrize("name", ["timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224"])
def test_multiply_adds_are_half_the_operations_that_torch_counts(name):
    network = build_network(Model(name=name), n_classes=10, image_shape=(3, 32, 32), seed=0)
    with FlopCounterMode(display=False) as counted:
        network.eval()(torch.zeros(1, 3, 32, 32))
    found = network_size(network, (3, 32, 32))["multiply_adds"]
    assert found == counted.get_total_flops() / 2


def test_a_network_without_a_classifier_is_counted_to_its_features():
    body = timm.create_model("resnet10t", num_classes=0)
    assert network_size(TimmNetwork(body, (3, 32, 32)), (3, 32, 32))["multiply_adds"] > 0
