"""The teacher's network: its folder, weights and pixels."""

from pathlib import Path
from typing import Any

from kdlib.dataset.images import Images
from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network
from kdlib.models.networks import build_network, network_for
from kdlib.models.origins import begin
from kdlib.models.published import load_pretrained
from kdlib.models.weights import load_weights, read_weights, weights_fingerprint
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run
from kdlib.repro.seeds import derive
from kdlib.study.base import StudyError
from kdlib.study.data import data_path
from kdlib.study.models import (
    Begun,
    LoadedTeacher,
    PretrainedTeacher,
    Teacher,
    TrainedTeacher,
)
from kdlib.study.study import Study


def teacher_settings(study: Study, name: str | None) -> Teacher:
    """The settings of the study's teacher (`name` None), or of a further one.

    Raises: StudyError for a teacher that the study does not have.
    """
    if name is None:
        return study.teacher
    if name not in study.teachers:
        known = files.nearest(name, study.teachers) if study.teachers else "it has none"
        raise StudyError(f"no teacher {name!r} in this study's `teachers`; {known}")
    return study.teachers[name]


def teacher_network(
    study: Study, images: Images, device: str, name: str | None = None, seed: int | None = None
) -> Network:
    """The teacher, or a further one, with its published or loaded weights; one that is trained, as
    drawn at random, to which `begun_network` gives the weights it begins from.

    Args:
        seed: Of random weights; None takes the teacher's.
    """
    teacher = teacher_settings(study, name)
    shape, size = images.image_shape, teacher.image_size
    seen = shape if size is None else (shape[0], size, size)
    if isinstance(teacher, PretrainedTeacher):
        network = load_pretrained(
            teacher.model,
            n_classes=images.n_classes,
            image_shape=seen,
            trust_code=teacher.trust_code,
        )
    else:
        network = build_network(
            teacher.model,
            n_classes=images.n_classes,
            image_shape=seen,
            seed=derive(teacher.seed if seed is None else seed, "init"),
        )
        if isinstance(teacher, LoadedTeacher):
            file = weights_file(teacher.weights)
            if not read_weights(network, file, "optional").head:
                network.drop_last()
                print(f"{file}: without a last layer; its features are scored by k-NN")
    network.image_size = size
    return network.to(device, memory_format=images.pixels.memory_format)


def begun_network(network: Network, settings: Begun, images: Images) -> Network:
    """A network as drawn at random, with the first weights of its settings."""
    shape, size = images.image_shape, network.image_size
    seen = shape if size is None else (shape[0], size, size)
    path = None if settings.weights is None else weights_file(settings.weights)
    begin(network, settings, seen, path)
    return network


def load_teacher(
    study: Study,
    images: Images,
    device: str,
    folder: Path,
    evidence: dict[str, Any],
    name: str | None = None,
) -> Network:
    """A finished teacher, with the weights that its card names.

    Args:
        folder, evidence: Of its run.

    Raises: ValueError for other weights.
    """
    network = teacher_network(study, images, device, name)
    if isinstance(teacher_settings(study, name), TrainedTeacher):
        load_weights(network, folder / evidence["checkpoints"]["last"]["file"])
    if weights_fingerprint(network) != evidence["teacher"]["weights_sha256"]:
        raise ValueError(
            f"the teacher's weights are not those of {folder}; {delete_and_run(folder)}"
        )
    return network


def weights_file(weights: str) -> Path:
    """The file of a teacher's or student's weights.

    Raises: FileNotFoundError when it is not there.
    """
    path = data_path(weights)
    if not path.is_file():
        raise FileNotFoundError(
            f"the weights {path} are not there; put the file into the data folder "
            f"({files.data_root()}), set KDLIB_DATA, or write an absolute path (`weights`)"
        )
    return path


def of_file(settings: Begun | Teacher) -> dict[str, str]:
    """The sha256 of the file of a network's weights as one of the inputs of its run; empty where
    it is not read from a file.

    Raises: FileNotFoundError when it is not there.
    """
    weights = getattr(settings, "weights", None)
    return {} if weights is None else {"weights_file": files.sha256_file(weights_file(weights))}


def teacher_pixels(study: Study, images: Images, name: str | None = None) -> Pixels:
    """The normalisation the teacher, or a further one, was trained with."""
    teacher = teacher_settings(study, name)
    if isinstance(teacher, TrainedTeacher) or teacher.mean is None:
        return images.pixels
    if len(teacher.mean) != images.image_shape[0]:
        raise StudyError(
            f"teacher.mean and std have {len(teacher.mean)} numbers; expected one for each of "
            f"{images.image_shape[0]} channels"
        )
    return Pixels(list(teacher.mean), list(teacher.std), study.compute.channels_last)


def recorded_network(study: Study, images: Images, device: str) -> Network:
    """The network whose training dynamics make the datamap, with its initial weights."""
    if study.dynamics.model is None:
        return teacher_network(study, images, device)
    return network_for(images, study.dynamics.model, derive(study.dynamics.seed, "init"), device)
