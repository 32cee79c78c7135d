"""The miniature of a study as a file, beside that of the study it shares images with."""

from pathlib import Path
from typing import Any

import yaml

from kdlib.models.networks import build_network
from kdlib.models.weights import save_weights
from kdlib.repro.files import workspace, write_atomic
from kdlib.study.load import load_study, read_content
from kdlib.study.miniature import miniature, teachers
from kdlib.study.models import Model

FOLDER = "miniatures"  # in runs/


def write_miniature(path: Path) -> Path:
    """Write the miniature of a study file, and of the one whose images it shares.

    Args:
        path: The study file.

    Returns: `runs/miniatures/<name>_miniature.yaml`, which is a study file like any other.
    Raises: StudyError for a file that is no study.
    """
    load_study(path)  # the sentences about a study that is wrong are those of its own file
    content = miniature(read_content(path, ()))
    if "shares" in content:
        beside = path.parent / content["shares"]
        other = beside if beside.exists() else workspace() / "params" / content["shares"]
        content["shares"] = write_miniature(other).name
    for name, teacher in teachers(content).items():
        if teacher.pop("pretrained", None):  # and not trained: random weights, in a file
            file = workspace() / "runs" / FOLDER / f"{path.stem}-{name}.safetensors"
            teacher["weights"] = str(file)
            teacher.pop("trust_code", None)
            _draw(teacher, content["data"], file)
    target = workspace() / "runs" / FOLDER / f"{path.stem}_miniature.yaml"
    head = (
        f"# The miniature of {path.name}: few images, few steps, small networks.\n"
        "# Its numbers mean nothing.\n\n"
    )
    text = head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, lambda file: file.write(text.encode()))
    return target


def _draw(teacher: dict[str, Any], data: dict[str, Any], file: Path) -> None:
    """Write random weights of a teacher without its last layer."""
    side = teacher.get("image_size") or data.get("image_size") or 32
    shape = (1 if data["source"] in ("digits", "mnist") else 3, side, side)
    model = Model.model_validate(teacher["model"])
    network = build_network(model, n_classes=1, image_shape=shape, seed=0)
    network.drop_last()
    file.parent.mkdir(parents=True, exist_ok=True)
    save_weights(network.state_dict(), file, {})
