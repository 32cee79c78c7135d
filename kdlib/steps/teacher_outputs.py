"""The teacher's outputs for the study's images, stored by step 02 and read by later steps."""

from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache.outputs import open_outputs, stored_logits
from kdlib.cache.shards import Cache, CacheError
from kdlib.dataset.images import Images, probe_examples
from kdlib.models.base import Network
from kdlib.models.networks import network_for
from kdlib.models.outputs import (
    Replay,
    chance_accuracy,
    store_outputs,
    stored_accuracy,
    verify_outputs,
)
from kdlib.models.weights import weights_fingerprint
from kdlib.probes.classifiers import knn_probe
from kdlib.probes.features import labelled_features
from kdlib.repro.commands import run_to_make
from kdlib.repro.run import read_evidence
from kdlib.steps.folders import teacher_folder
from kdlib.steps.processes import prepare_device
from kdlib.steps.teacher_network import (
    load_teacher,
    teacher_network,
    teacher_pixels,
    teacher_settings,
)
from kdlib.steps.training import replay
from kdlib.study.base import StudyError
from kdlib.study.models import TrainedTeacher
from kdlib.study.objectives import Hint, Tokens
from kdlib.study.study import Study
from kdlib.trainer.objectives import student_outputs, teacher_columns

REPLAYED = "replayed"  # teacher outputs of the views that the students see


def store_all_outputs(
    study: Study, images: Images, network: Network, name: str | None, folder: Path, device: str
) -> dict[str, Any]:
    """Store a teacher's outputs in the folder of its run; returns its card, with the accuracy of
    the stored outputs where the images have labels."""
    teacher = teacher_settings(study, name)
    stored = {
        which: _store(study, images, network, name, folder, which, device) for which in kinds(study)
    }
    return (
        _measured(study, images, network.n_classes, stored)
        | {
            "name": name or "teacher",
            "claimed": teacher.expected_accuracy,
            "tolerance": teacher.tolerance,
            "uninformed": teacher.uninformed is True,
            "split": None if images.test is None else "test",
            "weights_sha256": weights_fingerprint(network),
            "n_stages": network.n_stages,
            "outputs": {which: cache.fingerprint for which, cache in stored.items()},
            "trained_here": isinstance(teacher, TrainedTeacher),
            "trained_on": teacher.trained_on,
        }
        | ({"live": True} if study.teacher.live else {})
    )


def _measured(
    study: Study, images: Images, n_classes: int, stored: dict[str, Cache]
) -> dict[str, Any]:
    """Accuracy of a teacher's stored logits; of a network without a classifier, accuracy of the
    k-NN probe of its stored features; nothing without labels."""
    if images.test is None:
        return dict.fromkeys(("chance", "measured", "measured_train", "measured_by"))
    if n_classes:
        ids = images.test.example_ids
        answers = stored_logits(stored["test"], ids).argmax(1).numpy()
        return {
            "chance": chance_accuracy(answers, images.test.read("labels", ids)),
            "measured": stored_accuracy(stored["test"], images.test),
            "measured_train": stored_accuracy(stored["train"], images.train),
            "measured_by": "logits",
        }
    pair = []
    for split, (cache, ids) in zip(("train", "test"), probe_examples(images), strict=True):
        values = stored[split].read("features", ids)[:, 0].astype(np.float32)
        pair.append(labelled_features(cache, ids, values, stored[split].header["teacher"]))
    result = knn_probe(*pair, study.probe.ks[0])
    return {
        "chance": result.chance,
        "measured": result.accuracy,
        "measured_train": None,
        "measured_by": "knn",
    }


def store_part(study: Study, images: Images, part: tuple[int, int]) -> list[Cache]:
    """Store part i of k of a loaded teacher's outputs for the training images, and for the replayed
    views where the study asks for them; several processes can do so at once, before step 02.

    Returns: The caches, restricted to the part.
    Raises: ValueError for a teacher that this study trains: step 02 stores its outputs.
    """
    study = study.upstream
    if isinstance(study.teacher, TrainedTeacher):
        raise ValueError(
            "the teacher of this study is trained here, and its outputs stored after that: "
            f"{run_to_make(teacher_folder(study))}; parts are for a loaded one "
            "(study: teacher.weights or teacher.pretrained)"
        )
    demand_grids(study, images, None)
    device = prepare_device(study.compute)
    network = teacher_network(study, images, device)
    place, of_train = teacher_folder(study), [which for which in kinds(study) if which != "test"]
    return [_store(study, images, network, None, place, which, device, part) for which in of_train]


def kinds(study: Study) -> tuple[str, ...]:
    """What is stored of a teacher: outputs of each split, and of replayed views."""
    splits = study.upstream.data.splits
    return splits if replay(study) is None else (*splits, REPLAYED)


def replay_of(study: Study, which: str) -> Replay | None:
    """The views of which outputs are stored; None for images without augmentation."""
    return replay(study) if which == REPLAYED else None


def stored_outputs(study: Study, network: Network, name: str | None, which: str) -> tuple[str, ...]:
    """The outputs of a teacher that are stored, by name: what datamap and probes read, and what
    students read, unless those of a live teacher are computed while they are trained."""
    wanted = ["logits"] if network.n_classes else []
    if which != REPLAYED:
        wanted.append("features")
    if which == REPLAYED or (which == "train" and kinds(study)[-1] != REPLAYED):
        wanted += [] if study.teacher.live else read_by_students(study, network, name)
    return tuple(dict.fromkeys(wanted))


def _store(
    study: Study,
    images: Images,
    network: Network,
    name: str | None,
    folder: Path,
    which: str,
    device: str,
    part: tuple[int, int] | None = None,
) -> Cache:
    """Store a teacher's outputs for one split or for the replayed views, and verify a sample.

    Args:
        folder: Of its run.
        which: `train`, `test` or `REPLAYED`, which is of the training images.
    """
    views = replay_of(study, which)
    cache = images.test if which == "test" else images.train
    pixels, place = teacher_pixels(study, images, name), folder / f"outputs-{which}"
    # refuses what the network does not have, also where it is not stored
    network.output_shapes(images.image_shape, read_by_students(study, network, name))
    stored = store_outputs(
        network,
        pixels,
        cache,
        place,
        device,
        replay=views,
        top_k=study.teacher.stored.top_k,
        grid=study.teacher.stored.grid,
        wanted=stored_outputs(study, network, name, which),
        part=part or study.data.part_of(cache.header["split"]),
    )
    verify_outputs(network, pixels, cache, stored, views)
    return stored


def demand_grids(study: Study, images: Images, name: str | None) -> None:
    """Compare the side at which a teacher's grids are to be stored with the students' grids.

    Raises: StudyError for a student whose grid has another side: its loss would resize the grid a
        second time.
    """
    grid = study.teacher.stored.grid
    if grid is None:
        return
    for key, objective in study.objectives.items():
        if objective.teacher != name or not isinstance(objective, Hint | Tokens):
            continue
        for student in study.axes.student:
            network = network_for(images, study.students[student].model, 0, "cpu")
            wanted = student_outputs(objective, network.n_stages, network.n_classes > 0)
            shapes = network.output_shapes(images.image_shape, wanted)
            sides = {shape[1:] for n, shape in shapes.items() if n.startswith("stage")}
            if other := sides - {(grid, grid)}:
                height, width = other.pop()
                raise StudyError(
                    f"teacher.outputs.grid is {grid}, and student {student} has a grid of {height} "
                    f"x {width} in objective {key}: store grids of the students' side, or leave "
                    "`grid` out"
                )


def read_by_students(study: Study, network: Network, name: str | None) -> list[str]:
    """The outputs of a teacher that the study's objectives read."""
    return [
        column
        for objective in study.objectives.values()
        if objective.teacher == name
        for column in teacher_columns(objective, network.n_stages)
    ]


def restore_outputs(
    study: Study,
    images: Images,
    name: str | None,
    folder: Path,
    evidence: dict[str, Any],
    device: str,
) -> None:
    """Store those outputs of a finished teacher again that were removed as damaged."""
    network = None
    for which in evidence["teacher"]["outputs"]:
        try:
            part = study.data.part_of("test" if which == "test" else "train")
            Cache(folder / f"outputs-{which}", part=part)
        except CacheError:
            if network is None:
                network = load_teacher(study, images, device, folder, evidence, name)
            _store(study, images, network, name, folder, which, device)


def open_teacher(study: Study, name: str | None = None) -> dict[str, Any]:
    """The card of the teacher, or of a further one: name, accuracy, fingerprints.

    Raises: FileNotFoundError when there is no teacher; ValueError when the study has changed since
        the teacher's run.
    """
    study = study.upstream if name is None else study
    settings = study.step_settings("teacher", teacher=name)
    return read_evidence(teacher_folder(study, name), settings)["teacher"]


def outputs_folder(study: Study, which: str) -> Path:
    """The folder of the stored teacher outputs of one split, or of the replayed views."""
    return teacher_folder(study) / f"outputs-{which}"


def open_stored(study: Study, cache: Cache) -> Cache:
    """The teacher's stored outputs for the clean images of one split."""
    teacher, split = open_teacher(study), cache.header["split"]
    folder = outputs_folder(study, split)
    return open_outputs(folder, cache, teacher["weights_sha256"], study.data.part_of(split))


def teacher_features(study: Study, cache: Cache, ids: np.ndarray) -> np.ndarray:
    """The teacher's stored features of some examples of one split, (n, D) float32."""
    stored = open_stored(study, cache)
    stored.verify()
    return stored.read("features", ids)[:, 0].astype(np.float32)
