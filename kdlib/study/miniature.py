"""The miniature of a study: its file with few images, few steps and small networks of the same
families, which shows within minutes whether the whole study runs. Its numbers mean nothing."""

import copy
import re
from typing import Any

STEPS, EPOCHS, BATCH = 8, 3, 16  # at most so many, of any training
IMAGES = {"cifar100": 1000, "digits": None, "folder": None}  # first ones that hold every class
OTHER_IMAGES = 200  # of every other source
SIZES = {"cifar10": 50_000, "cifar100": 50_000, "mnist": 60_000}  # training images
HELD_OUT = 32
SHARD = 64  # examples
SIDE = 112  # pixels of a teacher's images, at most: a multiple of patches of 14 and 16
SMALL_VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}

# A network -> the smallest one of its family, and options that make it small; the first match
FAMILIES: tuple[tuple[str, str, dict[str, int]], ...] = (
    (r"cifar_resnet\d+", "cifar_resnet8", {}),
    (r"hub/.*dinov2_vit.*", "timm/vit_base_patch14_dinov2", SMALL_VIT),
    (r"hub/.*resnet\d+", "cifar_resnet8", {}),
    (r"timm/((?:vit|deit)\w*).*", r"timm/\1", SMALL_VIT),
    (r"timm/resnet.*", "timm/test_resnet", {}),
    (r"timm/(efficientnet|mobilenet).*", "timm/test_efficientnet", {}),
    (r"timm/convnext.*", "timm/test_convnext", {}),
    (r"timm/vgg.*", "timm/vgg11", {}),
)


def miniature(content: dict[str, Any]) -> dict[str, Any]:
    """The content of a study file, made small.

    Axes, objectives, strategies and views stay; where strategies take numbers of shards, a shard
    holds the same part of the images. There are two seeds, trainings of at most `STEPS` steps or
    `EPOCHS` epochs, and networks by `FAMILIES`, but for those whose weights are in a file;
    everything is computed in float32 on one CPU thread. Networks to train begin at random weights;
    every teacher and all features pass, however bad.

    Args:
        content: As YAML gives it, laid over its base.
    """
    small = copy.deepcopy(content)
    _shrink_images(small["data"], "shards" in small["axes"])
    for data in small["probe"].get("others", {}).values():
        _shrink_images(data, False)
    for section in (small, *_sections(small)):
        if "training" in section:
            _shrink_training(section["training"])
        if "model" in section and "weights" not in section:
            section["model"] = small_network(section["model"])
    trained = [teacher for teacher in teachers(small).values() if "training" in teacher]
    for section in (*trained, *small["students"].values()):
        for key in ("pretrained", "freeze"):
            section.pop(key, None)
    for teacher in teachers(small).values():
        teacher["uninformed"] = True
        if "image_size" in teacher and "weights" not in teacher:
            teacher["image_size"] = min(teacher["image_size"], SIDE)
        if small["data"].get("labelled", True):
            teacher["expected_accuracy"] = 0.0
    small["seeds"] = list(small["seeds"][:2])
    _shrink_questions(small)
    small["compute"] = {"threads": 1}
    for key in ("tracking", "audit"):
        small.pop(key, None)
    return small


def small_network(model: dict[str, Any]) -> dict[str, Any]:
    """A small network of the same family: name and options; other families stay as they are."""
    for pattern, name, options in FAMILIES:
        if match := re.fullmatch(pattern, model["name"]):
            return {"name": match.expand(name), "options": model.get("options", {}) | options}
    return model


def teachers(study: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The sections of a study's teachers, its own as `teacher`."""
    return {"teacher": study["teacher"]} | study.get("teachers", {})


def _sections(study: dict[str, Any]) -> list[dict[str, Any]]:
    """The sections that hold networks and trainings beside the students' training."""
    named = [*study["students"].values(), *teachers(study).values()]
    return [*named, study.get("dynamics", {}), study.get("recordings", {})]


def _shrink_images(data: dict[str, Any], counted: bool) -> None:
    """Take the first few images.

    Args:
        counted: Strategies take numbers of shards, and there must be as many.
    """
    few, size = IMAGES.get(data["source"], OTHER_IMAGES), data.get("shard_size", 2048)
    data["shard_size"] = min(size, SHARD)
    if few is not None:
        all_images = data.get("n_train", SIZES.get(data["source"], 32 * size))
        data["n_train"] = min(few, all_images)
        if counted:
            data["shard_size"] = -(-size * data["n_train"] // all_images)
    data["n_validation"] = min(HELD_OUT, data["n_validation"])
    data["duplicates"] = 1.0  # a few images of some sets are mostly look-alikes
    data.pop("part", None)


def _shrink_training(training: dict[str, Any]) -> None:
    for budget, most in (("steps", STEPS), ("epochs", EPOCHS)):
        if budget in training:
            training[budget] = min(training[budget], most)
    training["batch_size"] = min(training["batch_size"], BATCH)
    training["accumulate"] = 1
    training["checkpoint_fractions"] = [0, 1]
    if "warmup_steps" in training:
        training["warmup_steps"] = min(training["warmup_steps"], 2)
    if "evaluate_every_steps" in training:
        training["evaluate_every_steps"] = min(training["evaluate_every_steps"], STEPS // 4)


def _shrink_questions(study: dict[str, Any]) -> None:
    """Scores that read few epochs; further recordings and probes that are few."""
    dynamics, recordings = study.get("dynamics", {}), study.get("recordings", {})
    if dynamics or "training" in study["teacher"]:
        study["dynamics"] = dynamics | {"el2n_epoch": 2, "window": 3}
    if "gradient_epoch" in dynamics:
        study["dynamics"]["gradient_epoch"] = 2
    if recordings:
        recordings["models"] = {k: small_network(m) for k, m in recordings["models"].items()}
        recordings["seeds"] = list(study["seeds"])
        if "folds" in recordings:
            recordings["folds"] = 2
    probe = study["probe"]
    probe |= {"c_grid": [0.01, 1.0], "uninformed": True}
    probe |= {"few_shot": [1], "few_shot_draws": 2} if probe.get("few_shot") else {}
