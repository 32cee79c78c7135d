"""The miniature of every study is a valid study, and small."""

from pathlib import Path

import pytest

from kdlib.study.load import load_study, read_content, study_from
from kdlib.study.miniature import BATCH, EPOCHS, STEPS, miniature, small_network

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "params").glob("**/*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_a_miniature_with_its_axes(path):
    whole = load_study(path)
    small = study_from({"name": "case", **miniature(read_content(path, ()))})
    assert small.axes == whole.axes
    assert small.objectives.keys() == whole.objectives.keys()
    assert len(small.seeds) == 2
    assert small.compute.device == "cpu"
    for training in small.trainings:
        assert training.batch_size <= BATCH
        assert (training.steps or 0) <= STEPS
        assert (training.epochs or 0) <= EPOCHS


def test_a_shard_holds_the_same_part_of_the_images():
    data = {"source": "huggingface", "n_train": 250_000, "n_validation": 2000, "shard_size": 2048}
    study = {
        "data": data, "teacher": {"model": {"name": "timm/resnet50"}}, "students": {},
        "probe": {}, "seeds": [0, 1, 2], "axes": {"shards": [25]},
    }  # fmt: skip
    small = miniature(study)
    # 200 of 250,000 images: 2048 * 200 / 250,000 = 1.6, rounded up
    assert small["data"]["n_train"] == 200
    assert small["data"]["shard_size"] == 2
    assert data["n_train"] == 250_000
    assert small["seeds"] == [0, 1]


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("cifar_resnet56", "cifar_resnet8"),
        ("hub/facebookresearch/dinov2:main/dinov2_vitb14", "timm/vit_base_patch14_dinov2"),
        ("hub/chenyaofo/pytorch-cifar-models:main/cifar100_resnet56", "cifar_resnet8"),
        ("timm/vit_base_patch14_dinov2.lvd142m", "timm/vit_base_patch14_dinov2"),
        ("timm/resnet50", "timm/test_resnet"),
        ("timm/mobilenetv2_035", "timm/test_efficientnet"),
        ("timm/vgg16", "timm/vgg11"),
        ("tiny_cnn", "tiny_cnn"),
    ],
)
def test_a_network_shrinks_within_its_family(name, small):
    assert small_network({"name": name})["name"] == small


def test_options_of_a_network_stay():
    found = small_network(
        {"name": "timm/vit_small_patch16_224", "options": {"drop_path_rate": 0.1}}
    )
    assert found["options"]["drop_path_rate"] == 0.1
    assert found["options"]["depth"] == 2


def test_a_teacher_of_a_file_sees_the_images_its_weights_are_made_for():
    teacher = {"model": {"name": "timm/vit_base_patch14_dinov2"}, "image_size": 224}
    study = {
        "data": {"source": "digits", "n_validation": 97}, "teacher": teacher | {"weights": "a.pt"},
        "teachers": {"b": teacher}, "students": {}, "probe": {}, "seeds": [0, 1], "axes": {},
    }  # fmt: skip
    small = miniature(study)
    assert small["teacher"]["image_size"] == 224
    assert small["teacher"]["model"] == teacher["model"]
    assert small["teachers"]["b"]["image_size"] == 112
