"""A study of images without labels: digits as PNG files, and probes on the labelled digits."""

from pathlib import Path
from typing import Any

from PIL import Image
from sklearn.datasets import load_digits

from kdlib.models.networks import build_network
from kdlib.models.weights import save_weights
from kdlib.study.models import Model

N_IMAGES = 48

TOKENS = {"kind": "tokens", "cls_weight": 1.0, "patch_weight": 0.5}
UNLABELLED = {
    "data": {"source": "folder", "folder": "wild", "labelled": False, "n_validation": 16,
             "shard_size": 8},
    "teacher": {"model": {"name": "tiny_cnn", "options": {"width": 12}},
                "weights": "teacher.safetensors", "trained_on": "elsewhere"},
    "students": {"tiny": {"model": {"name": "tiny_cnn"}}},
    "training": {"steps": 12, "batch_size": 8, "lr_peak": 0.05, "evaluate_every_steps": 4,
                 "checkpoint_fractions": [0, 1]},
    "objectives": {"tokens": TOKENS},
    "axes": {"student": ["tiny"], "strategy": ["random", "fixed_shards"], "fraction": [0.5],
             "objective": ["tokens"]},
    "seeds": [0, 1],
    "probe": {"strategy": ["full", "random", "fixed_shards"], "fraction": 0.5,
              "objective": ["tokens"], "k": 3, "c_grid": [1.0],
              "others": {"digits": {"source": "digits", "n_train": 200, "n_validation": 20}}},
    "compare": {"measure": "linear", "on": ["digits"]},
}  # fmt: skip


def write_images(home: Path) -> None:
    """The first digits as PNG files, and the weights of a classifier of ten classes."""
    folder = home / "data" / "wild" / "train"
    folder.mkdir(parents=True)
    for i, image in enumerate(load_digits().images[:N_IMAGES]):
        Image.fromarray((image * 15).astype("uint8")).save(folder / f"{i:03d}.png")
    model = Model.model_validate(UNLABELLED["teacher"]["model"])
    network = build_network(model, n_classes=10, image_shape=(3, 8, 8), seed=1)
    save_weights(network, home / "data" / "teacher.safetensors", {})


def with_objective(**settings: Any) -> dict[str, Any]:
    return UNLABELLED | {"objectives": {"tokens": settings}}
