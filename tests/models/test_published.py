"""`kdlib.models.published`: published networks, with stand-ins for what lies on the network."""

import pytest
import safetensors.torch
import torch

from kdlib.models.networks import build_network
from kdlib.models.published import load_pretrained
from kdlib.models.weights import weights_fingerprint
from kdlib.study.models import Model

HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]


class Dino(nn.Module):
    embed_dim = 6

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 6, 14, 14)

    def forward_features(self, x):
        patches = self.patch(x).flatten(2).transpose(1, 2)
        return {"x_norm_clstoken": patches.mean(1), "x_norm_patchtokens": patches}


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer1 = nn.Conv2d(3, 4, 3, 2, 1)
        self.layer2 = nn.Conv2d(4, 5, 3, 2, 1)
        self.fc = nn.Linear(5, 10)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(x).relu()).relu().mean((2, 3)))


def dinov2_vits14():
    return Dino()


def cifar10_resnet20():
    return Classifier()


class TwoHeads(Classifier):
    def __init__(self):
        super().__init__()
        self.other = nn.Linear(5, 10)  # registered last, as an auxiliary classifier may be

    def forward(self, x):
        x = self.layer2(self.layer1(x).relu()).relu().mean((2, 3))
        return (self.fc(x) + self.other(x)) / 2


def two_heads():
    return TwoHeads()


def nothing():
    return nn.Conv2d(3, 3, 1)
"""
HERE = "hub/owner/networks:v1"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A torch.hub folder in which one repository lies, as after a download."""
    folder = tmp_path / "hub" / "owner_networks_v1"
    folder.mkdir(parents=True)
    (folder / "hubconf.py").write_text(HUBCONF)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return folder


def loaded(name: str, n_classes: int = 10, shape=(3, 28, 28), trust_code: bool = True, **options):
    return load_pretrained(
        Model(name=name, options=options),
        n_classes=n_classes, image_shape=shape, trust_code=trust_code,
    )  # fmt: skip


def test_a_vision_transformer_of_torch_hub_gives_cls_and_patches(hub):
    network = loaded(f"{HERE}/dinov2_vits14")
    assert (network.n_classes, network.n_features, network.n_stages) == (0, 6, 1)
    images = torch.zeros(2, 3, 28, 28)
    images[:, :, :14, 14:] = 1.0  # the patch at the top right
    found = network.outputs(images, ("features", "stage1"))
    assert found["stage1"].shape == (2, 6, 2, 2)
    plain = found["stage1"][:, :, 1, 0]
    assert torch.allclose(found["stage1"][:, :, 0, 0], plain)
    assert not torch.allclose(found["stage1"][:, :, 0, 1], plain)
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())


def test_a_classifier_of_torch_hub_gives_features_stages_and_logits(hub):
    network = loaded(f"{HERE}/cifar10_resnet20")
    x = torch.rand(2, 3, 8, 8)
    found = network.outputs(x, ("logits", "features", "stage1", "stage2"))
    assert [tuple(v.shape[1:]) for v in found.values()] == [(10,), (5,), (4, 4, 4), (5, 2, 2)]
    assert torch.equal(found["logits"], network.body(x))
    assert len(weights_fingerprint(network)) == 64


def test_a_classifier_of_other_classes_is_known_by_its_features(hub, capsys):
    network = loaded(f"{HERE}/cifar10_resnet20", n_classes=7)
    assert network.n_classes == 0
    assert "without a classifier of 7 classes; its features are scored" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"has no output 'logits'; it has features, stage1 to"):
        network.outputs(torch.rand(1, 3, 8, 8), ("logits",))


def test_which_of_two_heads_answers_is_not_guessed(hub):
    with pytest.raises(ValueError, match=r"two_heads does not answer by its last linear layer"):
        loaded(f"{HERE}/two_heads")


def test_code_of_others_does_not_run_unasked(hub):
    (hub / "hubconf.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match="owner/networks:v1 is downloaded code"):
        loaded(f"{HERE}/dinov2_vits14", trust_code=False)


def test_a_module_of_another_kind_is_refused(hub):
    with pytest.raises(ValueError, match=r"neither a vision transformer .* nor a classifier"):
        loaded(f"{HERE}/nothing")


def test_a_network_that_is_not_here_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_get_cache_or_reload", _unreachable)
    with pytest.raises(RuntimeError, match=r"could not be downloaded .*copy \$TORCH_HOME"):
        loaded(f"{HERE}/dinov2_vits14")


def test_timm_weights_that_are_not_here_say_what_to_do(tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr(timm, "create_model", _unreachable)
    with pytest.raises(RuntimeError, match=r"timm/resnet18 are not on this machine .*or give a"):
        loaded("timm/resnet18")


def _unreachable(*_, **__):
    raise OSError("name resolution failed")


@pytest.mark.parametrize("n_classes", [10, 4])
def test_a_timm_network_comes_with_its_published_weights(tmp_path, monkeypatch, n_classes):
    """The weights lie in a file, as in the cache of the hub; the tag names them."""
    import timm

    real, path = timm.create_model, tmp_path / "weights.safetensors"
    published = real("vit_tiny_patch16_224", num_classes=10, depth=2, img_size=28, patch_size=14)
    safetensors.torch.save_file(published.state_dict(), path)

    def create(name, pretrained, **options):
        assert pretrained
        return real(
            name, pretrained=True, pretrained_cfg_overlay={"file": str(path), "num_classes": 10},
            num_classes=10, **options,
        )  # fmt: skip

    monkeypatch.setattr(timm, "create_model", create)
    network = loaded("timm/vit_tiny_patch16_224", n_classes=n_classes, depth=2, patch_size=14)
    assert network.n_classes == (10 if n_classes == 10 else 0)
    x = torch.rand(2, 3, 28, 28)
    published.eval()
    tokens = published.forward_features(x)
    found = network.outputs(x, ("features", f"stage{network.n_stages}"))
    assert torch.allclose(found["features"], tokens[:, 0], atol=1e-5)
    grid = tokens[:, 1:].transpose(1, 2).unflatten(2, (2, 2))
    assert torch.allclose(found[f"stage{network.n_stages}"], grid, atol=1e-5)


def test_a_resized_teacher_sees_larger_images_under_the_same_names():
    network, large = (
        build_network(Model(name="tiny_cnn"), n_classes=3, image_shape=(3, 16, 16), seed=0)
        for _ in range(2)
    )
    large.image_size = 16
    assert weights_fingerprint(large) == weights_fingerprint(network)
    found = large.eval().outputs(torch.rand(2, 3, 8, 8), ("logits", "stage1"))
    assert found["stage1"].shape[-2:] == (16, 16)
    same = torch.rand(2, 3, 16, 16)
    assert torch.equal(large(same), network.eval()(same))
