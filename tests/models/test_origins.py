"""`kdlib.models.origins`: drawn, published and loaded first weights, and what is frozen."""

import pytest
import timm
import torch
from models.test_networks import build, images
from torch import nn

from kdlib.models.base import Network
from kdlib.models.origins import begin, begun
from kdlib.models.weights import save_weights, weights_fingerprint
from kdlib.study.models import Student

SHAPE = (3, 16, 16)
PUBLISHED = {"model": {"name": "timm/resnet10t"}, "pretrained": True}


@pytest.fixture
def published(monkeypatch) -> nn.Module:
    """What stands for timm's published ResNet-10-T, for 10 classes."""
    return stand_in(monkeypatch, "resnet10t")


def stand_in(monkeypatch, name: str, **options) -> nn.Module:
    real = timm.create_model
    body = real(name, num_classes=10, **options)

    def create(name, pretrained=False, **options):
        if pretrained:  # the tensors in the place of the file that timm would fetch
            options["pretrained_cfg_overlay"] = {"state_dict": body.state_dict(), "num_classes": 10}
            options.setdefault("num_classes", 10)
        return real(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", create)
    return body


def started(settings: dict, seed: int = 0, n_classes: int = 10, path=None, shape=SHAPE) -> Network:
    student = Student.model_validate(settings)
    network = build(student.model.name, shape, seed, n_classes, **student.model.options)
    begin(network, student, shape, path)
    return network


@pytest.mark.parametrize(("n_classes", "last"), [(10, "loaded"), (4, "drawn")])
def test_published_weights_are_those_of_the_body_and_a_last_layer_of_other_classes_is_drawn(
    published, n_classes, last
):
    one, two = (started(PUBLISHED, seed, n_classes) for seed in (0, 1))
    for network in (one, two):
        for name, tensor in network.body.state_dict().items():
            if not name.startswith("fc."):
                assert torch.equal(tensor, published.state_dict()[name]), name
    facts = begun(one)
    assert facts["origin"] == "pretrained: resnet10t.c3_in1k"  # the tag is timm's own
    assert (facts["last"], facts["body_sha256"]) == (last, begun(two)["body_sha256"])
    same = torch.equal(one.body.fc.weight, two.body.fc.weight)
    assert same == (facts["drawn_sha256"] is None) == (last == "loaded")
    assert (facts["drawn_sha256"] == begun(two)["drawn_sha256"]) == same


def test_a_stem_that_published_weights_do_not_have_is_refused(monkeypatch):
    stand_in(monkeypatch, "resnet18")
    small = {"model": {"name": "timm/resnet18", "options": {"stem": "small"}}, "pretrained": True}
    with pytest.raises(ValueError, match=r"in 1 keys the file .*body\.conv1\.weight.*; name"):
        started(small)


def test_published_weights_that_are_not_here_say_what_to_do(monkeypatch):
    real = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("name resolution failed")
        return real(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(RuntimeError, match=r"timm/resnet10t are not on this machine .*or give a"):
        started(PUBLISHED)


def test_a_file_s_body_is_the_beginning_of_every_seed(tmp_path):
    given, path = build("tiny_cnn", SHAPE, seed=7, n_classes=3), tmp_path / "w.safetensors"
    save_weights(given, path, {})
    settings = {"model": {"name": "tiny_cnn"}, "weights": "w.safetensors"}
    one, two = (started(settings, seed, path=path) for seed in (0, 1))
    assert torch.equal(one.conv2.weight, given.conv2.weight)
    assert torch.equal(one.linear.weight, build("tiny_cnn", SHAPE, 0).linear.weight)
    facts, others = begun(one), begun(two)
    assert facts["origin"].startswith("file: ")
    assert facts["notes"] == ["left out the last layer, of 3 classes"]
    assert facts["body_sha256"] == others["body_sha256"]
    assert facts["drawn_sha256"] != others["drawn_sha256"]
    assert begun(build("tiny_cnn", SHAPE)) == {"origin": "random"}


def test_a_network_without_a_last_layer_leaves_the_published_one_out(published, tmp_path):
    network = build("timm/resnet10t", SHAPE, stem="original")
    network.drop_last()
    begin(network, Student.model_validate(PUBLISHED), SHAPE, None)
    facts = begun(network)
    assert (facts["last"], facts["drawn_sha256"]) == ("none", None)
    assert facts["notes"] == ["left out the last layer, body.fc.bias, body.fc.weight"]
    assert torch.equal(network.body.conv1[0].weight, published.conv1[0].weight)


def test_a_last_layer_that_is_drawn_as_zeros_says_nothing_of_the_seed(tmp_path):
    given, path = build("tiny_cnn", SHAPE, n_classes=3), tmp_path / "w.safetensors"
    save_weights(given, path, {})
    network = started({"model": {"name": "tiny_cnn"}, "weights": "w"}, path=path)
    nn.init.zeros_(network.linear.weight)
    assert begun(network)["drawn_sha256"] is None


def test_a_frozen_backbone_keeps_weights_and_statistics(tmp_path):
    path = tmp_path / "w.safetensors"
    save_weights(build("tiny_cnn", SHAPE, seed=7), path, {})
    settings = {"model": {"name": "tiny_cnn"}, "weights": "w", "freeze": "backbone"}
    network = started(settings, path=path)
    assert begun(network)["frozen"] == 6  # two convolutions, and weight and bias of two norms
    before = {k: v.clone() for k, v in network.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], 0.1)
    network.eval().train()
    assert network.training
    assert network.linear.training
    assert not network.bn1.training
    network(images(SHAPE)).square().sum().backward()
    optimiser.step()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"linear.weight", "linear.bias"}


def test_a_network_without_its_last_layer_gives_features(tmp_path):
    for name, last in (("tiny_cnn", "linear"), ("timm/resnet10t", "body.fc")):
        network = build(name, SHAPE).eval()
        x = images(SHAPE)
        features = network.features(x)
        assert network.last_names() == {f"{last}.weight", f"{last}.bias"}
        network.drop_last()
        assert torch.equal(network.outputs(x, ("features",))["features"], features)
        assert not any(key.startswith(last) for key in network.state_dict())
        with pytest.raises(ValueError, match="has no output 'logits'"):
            network.outputs(x, ("logits",))
        assert len(weights_fingerprint(network)) == 64
