"""`kdlib.models.networks`: sizes, shapes and seeds of networks."""

import numpy as np
import pytest
import torch

from kdlib.models.base import Network
from kdlib.models.networks import build_network
from kdlib.models.weights import weights_fingerprint
from kdlib.repro.seeds import torch_seeded
from kdlib.study.models import MODELS, Model

torch.set_num_threads(1)
SMALL = ("timm/resnet10t", "timm/mobilenetv3_small_050", "timm/vit_tiny_patch16_224")


def build(name: str, shape=(3, 32, 32), seed: int = 0, n_classes: int = 10, **options) -> Network:
    model = Model(name=name, options=options)
    return build_network(model, n_classes=n_classes, image_shape=shape, seed=seed)


def images(shape: tuple[int, int, int], n: int = 2) -> torch.Tensor:
    return torch.randn((n, *shape), generator=torch.Generator().manual_seed(0))


def shape_after(network: Network, layer: torch.nn.Module, x: torch.Tensor) -> tuple[int, ...]:
    """Height and width of what one layer hands on."""
    seen = []
    handle = layer.register_forward_hook(lambda module, given, output: seen.append(output.shape))
    network.eval()(x)
    handle.remove()
    return tuple(seen[0][2:])


@pytest.mark.parametrize(
    ("name", "shape", "n_parameters"),
    [
        # 1*8*9 + 2*8 + 8*16*9 + 2*16 + 16*10 + 10
        ("tiny_cnn", (1, 8, 8), 1_442),
        ("mlperf_resnet8", (3, 32, 32), 78_186),
        ("cifar_resnet20", (3, 32, 32), 269_722),
        ("cifar_resnet32", (3, 32, 32), 464_154),
        ("cifar_resnet44", (3, 32, 32), 658_586),
        ("cifar_resnet56", (3, 32, 32), 853_018),
    ],
)
def test_networks_have_their_published_number_of_parameters(name, shape, n_parameters):
    assert sum(p.numel() for p in build(name, shape).parameters()) == n_parameters


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (2, 7, 9)])
@pytest.mark.parametrize("name", [m for m in MODELS if m != "cifar_resnet56"])
def test_logits_are_the_head_of_the_features_for_any_image_shape(name, shape):
    network, x = build(name, shape, n_classes=5).eval(), images(shape)
    features = network.features(x)
    assert features.shape == (2, network.n_features)
    assert network(x).shape == (2, 5)
    assert torch.equal(network.head(features), network(x))


@pytest.mark.parametrize("name", [*MODELS, *SMALL])
def test_a_gradient_reaches_every_parameter(name):
    network = build(name)
    network(images((3, 32, 32))).square().sum().backward()
    assert network.training
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    silent = [k for k, p in network.named_parameters() if not p.grad.any()]
    # A bias in front of BatchNorm is subtracted again; timm draws the last layer of some zero.
    assert not silent or name == "mlperf_resnet8" or name in SMALL


@pytest.mark.parametrize("name", ["tiny_cnn", "cifar_resnet8", "mlperf_resnet8", *SMALL])
def test_the_seed_alone_decides_the_weights_and_the_global_generator_is_untouched(name):
    before = torch.get_rng_state()
    first = weights_fingerprint(build(name, seed=0))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)  # whoever draws from the global generator changes nothing
    assert weights_fingerprint(build(name, seed=0)) == first
    assert weights_fingerprint(build(name, seed=1)) != first


def test_the_tiny_network_without_batchnorm_and_with_dropout():
    network = build("tiny_cnn", batch_norm=False, dropout=0.5)
    names = {
        f"{layer}.{part}" for layer in ("conv1", "conv2", "linear") for part in ("weight", "bias")
    }
    assert set(network.state_dict()) == names
    features = torch.ones(1, 16)
    with torch_seeded(0, "dropout"):
        dropped = network.head(features)
    assert not torch.equal(dropped, network.linear(features))
    assert torch.equal(network.eval().head(features), network.linear(features))


def test_convolutions_are_drawn_kaiming_normal():
    weight = build("cifar_resnet20").layer3[1].conv1.weight  # 64 x 64 x 3 x 3
    assert weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert abs(weight.mean().item()) < 1e-3


def test_the_shortcut_takes_every_second_pixel_and_pads_channels_on_both_sides():
    block = build("cifar_resnet8").layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)  # the residual is 0: what comes out is the shortcut
    x = images((16, 6, 6)).abs()
    y = block(x)
    assert y.shape == (2, 32, 3, 3)
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])


@pytest.mark.parametrize(("side", "before"), [(6, 0), (7, 1)])
def test_mlperf_pads_as_tensorflow_does(side, before):
    # SAME, kernel 3, stride 2: ceil(n / 2) outputs; the total is 1 for even n and 2 for odd n, and
    # the smaller half comes first. Output o then starts at pixel 2 * o - before.
    block = build("mlperf_resnet8").layer2.eval()
    x, seen = images((16, side, side), n=1), []
    block.conv1.register_forward_hook(lambda module, given, output: seen.append(output))
    block(x)
    weight, bias = block.conv1.weight.detach().numpy(), block.conv1.bias.detach().numpy()
    pixels = np.zeros((16, side + 4, side + 4), np.float32)  # a margin of 2 zeros
    pixels[:, 2:-2, 2:-2] = x[0].numpy()
    n_out = -(-side // 2)
    expected = np.empty((32, n_out, n_out), np.float32)
    for i, j in np.ndindex(n_out, n_out):
        top, left = 2 * i - before + 2, 2 * j - before + 2
        patch = pixels[:, top : top + 3, left : left + 3]
        expected[:, i, j] = (weight * patch).sum((1, 2, 3)) + bias
    np.testing.assert_allclose(seen[0][0].detach().numpy(), expected, atol=1e-4)


def test_small_images_keep_their_resolution_in_the_stem_and_large_ones_do_not():
    x = images((3, 32, 32))
    resnet = build("timm/resnet18")
    assert resnet.body.conv1.kernel_size == (3, 3)
    assert shape_after(resnet, resnet.body.maxpool, x) == (32, 32)
    deep = build("timm/resnet10t")
    assert shape_after(deep, deep.body.maxpool, x) == (32, 32)
    for name in ("timm/mobilenetv3_small_050", "timm/mobilenetv2_035"):
        mobile = build(name)
        assert shape_after(mobile, mobile.body.conv_stem, x) == (32, 32)
    regnet = build("timm/regnetx_002")
    assert shape_after(regnet, regnet.body.stem, x) == (32, 32)
    convnext = build("timm/convnext_atto")
    assert shape_after(convnext, convnext.body.stem, x) == (32, 32)
    large = build("timm/resnet10t", (3, 96, 96))
    assert shape_after(large, large.body.maxpool, images((3, 96, 96))) == (24, 24)
    original = build("timm/resnet10t", stem="original")
    assert shape_after(original, original.body.maxpool, x) == (8, 8)


def test_a_vit_gets_patches_that_suit_the_image():
    for side, patch in [(32, 4), (28, 4), (64, 8)]:
        vit = build("timm/vit_tiny_patch16_224", (3, side, side), depth=1)
        assert vit.body.patch_embed.patch_size == (patch, patch)
    assert (
        build("timm/vit_tiny_patch16_224", depth=1, patch_size=8).body.patch_embed.num_patches == 16
    )
    with pytest.raises(ValueError, match=r"patch_size .* is 5; expected a divisor .*\(32, 32\)"):
        build("timm/vit_tiny_patch16_224", depth=1, patch_size=5)


FAMILIES = {  # the networks of the first earlier study, each family with its smallest one first
    "resnet": ("resnet18", "resnet34", "resnet50"),
    "mobilenet": ("mobilenetv2_035", "mobilenetv2_075", "mobilenetv2_100"),
    "efficientnet": ("efficientnet_b0", "efficientnet_b2", "efficientnet_b4"),
    "vgg": ("vgg11", "vgg13", "vgg16"),
    "vit": ("vit_small_patch32_224", "vit_base_patch32_224", "vit_large_patch32_224"),
}


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28)])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_networks_takes_small_images(family, shape):
    for name in FAMILIES[family]:
        real = name == FAMILIES[family][0] and shape[1] == 28
        with torch.device("cpu" if real else "meta"):  # on meta: shapes alone, without weights
            network, x = build(f"timm/{name}", shape), torch.zeros(2, *shape)
        x = images(shape) if real else x
        network(x).square().sum().backward()
        torch.optim.SGD(network.parameters(), lr=0.01).step()
        wanted = ("logits", "features", f"stage{network.n_stages}")
        found = network.outputs(x, wanted)
        assert found["logits"].shape == (2, 10)
        assert found["features"].shape == (2, network.n_features)
        assert all(p.grad is not None for p in network.parameters()), name
        if real:
            assert found["logits"].isfinite().all()
        if family == "vit":
            assert network.body.patch_embed.patch_size == (4, 4)
        if family == "vgg":  # the last of its pools would leave no pixel of 28
            pooled = isinstance(network.body.features[-1], torch.nn.MaxPool2d)
            assert pooled == (shape[1] == 32)


@pytest.mark.parametrize("name", SMALL)
def test_timm_networks_are_the_head_of_their_features(name):
    network, x = build(name, (1, 28, 28), n_classes=7).eval(), images((1, 28, 28))
    features = network.features(x)
    assert features.shape == (2, network.n_features)
    assert torch.equal(network(x), network.body(x))
    assert network(x).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cifar_resnet20", {"width": 3}, "unknown option 'width' .* takes no options"),
        ("tiny_cnn", {"widht": 3}, "unknown option 'widht' .* did you mean 'width'"),
        ("tiny_cnn", {"width": 0}, "width of tiny_cnn is 0; expected an integer >= 1"),
        ("tiny_cnn", {"dropout": 1}, "batch_norm and dropout of tiny_cnn are True and 1; expected"),
        ("tiny_cnn", {"width": 2.5}, r"width of tiny_cnn is 2\.5"),
        ("timm/resnet81", {}, "no network 'resnet81' .* nearest: resnet18"),
        ("timm/hf-hub:timm/resnet18", {}, "no network 'hf-hub:timm/resnet18'"),
        ("timm/resnet10t", {"drop_rat": 0.1}, "did you mean 'drop_rate'"),
        ("timm/resnet10t", {"pretrained": True}, "unknown option 'pretrained'"),
        ("timm/resnet10t", {"checkpoint_path": "x.pth"}, "unknown option 'checkpoint_path'"),
        ("timm/resnet10t", {"num_classes": 3}, "unknown option 'num_classes'"),
        ("timm/resnet10t", {"stem": "tiny"}, "is 'tiny'; expected small or original"),
        ("timm/resnet10t", {"block": "x"}, r"cannot be built for images of shape \(3, 32, 32\)"),
        ("timm/densenet121", {}, "no stem for small images .* `stem: original`"),
    ],
)
def test_unknown_names_and_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.parametrize(("shape", "n_classes"), [((3, 32, 32), -1), ((3, 32), 10), ((0, 8, 8), 2)])
def test_impossible_sizes_are_refused(shape, n_classes):
    with pytest.raises(ValueError, match=r"expected 0 or more classes and \(channels, height, wi"):
        build("tiny_cnn", shape, n_classes=n_classes)


# -- weights


# -- outputs of one pass

STAGED = [
    ("tiny_cnn", (1, 8, 8), {}, [(8, 8, 8), (16, 4, 4)]),
    ("cifar_resnet20", (3, 32, 32), {}, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
    ("mlperf_resnet8", (3, 32, 32), {}, [(16, 32, 32), (32, 16, 16), (64, 8, 8)]),
    ("timm/resnet10t", (3, 32, 32), {}, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
    (
        "timm/vit_tiny_patch16_224", (3, 32, 32), {"depth": 6, "embed_dim": 24, "num_heads": 2},
        [(24, 8, 8)] * 4,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "shape", "options", "grids"), STAGED)
def test_one_pass_gives_logits_features_and_the_grid_of_every_stage(name, shape, options, grids):
    network = build(name, shape, **options).eval()
    assert network.n_stages == len(grids)
    wanted = ["logits", "features", *(f"stage{k}" for k in range(1, len(grids) + 1))]
    assert list(network.output_shapes(shape, wanted).values())[2:] == grids
    x = images(shape)
    with torch.no_grad():
        found = network.outputs(x, wanted)
        assert torch.equal(found["logits"], network(x))
        assert torch.equal(found["features"], network.features(x))


def test_the_last_grid_of_a_vision_transformer_is_its_patch_tokens():
    network = build("timm/vit_tiny_patch16_224", (3, 32, 32), depth=3, embed_dim=24, num_heads=2)
    x = images((3, 32, 32))
    with torch.no_grad():
        tokens = network.eval().body.forward_features(x)
        grid = network.outputs(x, ("stage3",))["stage3"]
    assert network.n_stages == 3
    assert torch.equal(grid.flatten(2).transpose(1, 2), tokens[:, 1:])


def test_an_attention_map_has_norm_1_and_is_of_its_stage():
    network, x = build("tiny_cnn", (1, 8, 8)).eval(), images((1, 8, 8))
    with torch.no_grad():
        found = network.outputs(x, ("attention2", "stage2"))
    energy = found["stage2"].square().mean(1).flatten(1)
    norms = energy.norm(dim=1)
    assert torch.allclose(found["attention2"].flatten(1), energy / norms[:, None], atol=1e-6)


def test_an_output_that_is_not_there_is_refused_with_those_that_are():
    network = build("tiny_cnn", (1, 8, 8))
    for name in ("stage3", "stage0", "logit", "attention9"):
        with pytest.raises(ValueError, match=rf"no output '{name}'; it has logits, features, sta"):
            network.outputs(images((1, 8, 8)), (name,))


def test_finding_shapes_leaves_no_trace():
    network = build("tiny_cnn", (1, 8, 8))
    before = weights_fingerprint(network)
    network.output_shapes((1, 8, 8), ("logits",))
    assert weights_fingerprint(network) == before
    assert all(module.training for module in network.modules())


def test_a_network_of_torch_hub_cannot_be_drawn_at_random():
    with pytest.raises(ValueError, match="comes with its weights and can be a teacher"):
        build("hub/owner/repo:v1/entry")
