"""Further recorded trainings on a study's images, with labels only: several seeds and models,
cross-validation, and the threshold samples of AUM. Notebooks 07 and 08 read their logs and tables.
"""

from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib.cartography.gradients import gradient_norms
from kdlib.cartography.log import DynamicsLog
from kdlib.dataset.images import Images
from kdlib.models.base import Network
from kdlib.models.evaluation import all_outputs
from kdlib.models.networks import network_for
from kdlib.repro import checks, files
from kdlib.repro.commands import run_to_make
from kdlib.repro.run import open_run, read_evidence, read_table
from kdlib.repro.seeds import derive, hashed
from kdlib.repro.tables import write_parquet
from kdlib.steps.checkpoints import load_epoch, load_last
from kdlib.steps.folders import recording_folder, recording_settings
from kdlib.steps.precision import decided
from kdlib.steps.processes import prepare_device
from kdlib.steps.training import finish_run, train_run
from kdlib.study.base import StudyError
from kdlib.study.selections import ExtraRecordings
from kdlib.study.study import Study
from kdlib.trainer.distributed import World


def fold_of(example_ids: np.ndarray, n_folds: int) -> np.ndarray:
    """The fold in [1, n_folds] of each example, of sizes that differ by one at most: (N,) int64."""
    order = np.argsort(hashed(example_ids, 0, "folds"))
    folds = np.empty(len(order), np.int64)
    folds[order] = np.arange(len(order)) % n_folds + 1
    return folds


def threshold_samples(example_ids: np.ndarray, n_classes: int, which: int) -> np.ndarray:
    """Sorted ids of the N / (n_classes + 1) examples that get the label of one more class.

    Args:
        which: 1 or 2; the two sets have no example in common.

    Source: Pleiss et al. 2020, arXiv 2001.10528, sec. 3.2; the authors' code takes N / n_classes of
        them.
    """
    n = len(example_ids) // (n_classes + 1)
    order = np.argsort(hashed(example_ids, 0, "threshold"))
    return np.sort(example_ids[order[(which - 1) * n : which * n]])


def record(study: Study, images: Images, model: str, part: str) -> dict[str, Any]:
    """Train and record one of `study.recordings.runs()`, unless it is there already.

    `seed=S` trains on all training images. `fold=K` trains on the other folds and writes
    `held_out.parquet`, the probabilities of each class for each image of fold K. `threshold=K`
    trains on all images, some of them with the label of one more class. Seeds of the first model
    write `gradients.parquet` where the study asks for gradients.

    Returns: Its evidence.
    Raises: StudyError for a recording the study does not ask for; checks.CheckError.
    """
    asked = study.recordings.runs() if study.recordings else []
    if (model, part) not in asked:
        known = ", ".join("/".join(run) for run in asked) or "none (study: recordings)"
        raise StudyError(f"no recording {model}/{part} in this study; it has {known}")
    device = prepare_device(study.compute)
    settings, (kind, number) = recording_settings(study, model, part), part.split("=")
    folder = recording_folder(study, model, part)
    inputs = {"step": settings, "inputs": images.fingerprints | decided(study, images)}
    with open_run(study.runs, folder, inputs) as run:
        if run.finished:
            return read_evidence(folder)
        ids, n_more = images.train_ids, 0
        if kind == "fold":
            ids = ids[fold_of(ids, study.recordings.folds) != int(number)]
        labels = images.train.read("labels", ids)
        if kind == "threshold":
            pretending = threshold_samples(ids, images.n_classes, int(number))
            labels[np.isin(ids, pretending)], n_more = images.n_classes, 1
        kept = {name: settings[name] for name in ("gradient_epoch", "logits")}
        seed, network_settings = settings["seed"], study.recordings.models[model]
        network = network_for(images, network_settings, derive(seed, "init"), device, n_more)
        evidence = train_run(
            run,
            study,
            images,
            network,
            study.recordings.training or study.recorded_training,
            ids,
            seed,
            f"{model} {part}",
            labels=labels,
            dynamics=study.dynamics.model_copy(update=kept) if kind != "fold" else None,
            world=World(device=device),
        )
        if (epoch := settings["gradient_epoch"]) is not None:
            load_epoch(network, folder, evidence, epoch)
            norms = gradients(images, network, ids, device)
            table = dict(zip(("grand", "grand_last"), norms, strict=True))
            table = pd.DataFrame(table, pd.Index(ids, name="example_id"))
            path = write_parquet(folder / "gradients.parquet", table, {"epoch": epoch})
            evidence["gradients_sha256"] = files.sha256_file(path)
        if kind == "fold":
            load_last(network, folder, evidence)
            table = _held_out(images, network, np.setdiff1d(images.train_ids, ids), device)
            path = write_parquet(folder / "held_out.parquet", table, {"fold": int(number)})
            evidence["held_out_sha256"] = files.sha256_file(path)
        return finish_run(run, study, images, "record", evidence, checks.RUN)


def gradients(
    images: Images, network: Network, ids: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """`grand` and `grand_last` of some training examples under a network's weights."""
    pixels = torch.from_numpy(images.train.read("images", ids)).to(device)
    labels = torch.from_numpy(images.train.read("labels", ids)).to(device)
    return gradient_norms(network, images.pixels, pixels, labels, describe="gradients")


def _held_out(images: Images, network: Network, ids: np.ndarray, device: str) -> pd.DataFrame:
    """Probabilities of each class for the training images that were left out."""
    pixels = torch.from_numpy(images.train.read("images", ids)).to(device)
    (logits,) = all_outputs(network, images.pixels, pixels, ("logits",))
    probs = torch.softmax(logits.double(), 1).cpu().numpy()
    columns = [f"p{c}" for c in range(images.n_classes)]
    return pd.DataFrame(probs, pd.Index(ids, name="example_id"), columns)


def record_all(study: Study, images: Images) -> dict[tuple[str, str], dict[str, Any]]:
    """Every recording that the study asks for; those that are finished are read.

    Raises: As `recordings_of`.
    """
    return {run: record(study, images, *run) for run in recordings_of(study).runs()}


def recordings_of(study: Study) -> ExtraRecordings:
    """The study's section `recordings`.

    Raises: StudyError when it has none.
    """
    if study.recordings is None:
        raise StudyError(
            f"{study.name} asks for no further recordings: give it a section `recordings` "
            "(models, seeds), as params/digits.yaml has"
        )
    return study.recordings


def recording_table(study: Study, evidences: dict[tuple[str, str], dict[str, Any]]) -> pd.DataFrame:
    """One row per recording: its test accuracy and its folder, by model and part."""
    rows = [
        {"model": model, "part": part,
         "test_accuracy": evidence["checkpoints"]["last"]["test_accuracy"],
         "folder": str(recording_folder(study, model, part))}
        for (model, part), evidence in evidences.items()
    ]  # fmt: skip
    return pd.DataFrame(rows)


def open_log(study: Study, images: Images, model: str, part: str) -> DynamicsLog:
    """The dynamics of one finished recording.

    Raises: FileNotFoundError when it is not finished; ValueError when the study has changed since.
    """
    folder = recording_folder(study, model, part)
    read_evidence(folder, recording_settings(study, model, part))
    return DynamicsLog.open(folder / "dynamics", images.fingerprints, verify=True)


def open_gradients(study: Study, model: str, part: str) -> pd.DataFrame | None:
    """`grand` and `grand_last` of one finished recording, index `example_id`; None for a recording
    without gradients.

    Raises: FileNotFoundError and ValueError as `open_log`; ValueError for a table that was changed.
    """
    if recording_settings(study, model, part)["gradient_epoch"] is None:
        return None
    return _read(study, model, part, "gradients")


def _read(study: Study, model: str, part: str, name: str) -> pd.DataFrame:
    path = recording_folder(study, model, part) / f"{name}.parquet"
    settings = recording_settings(study, model, part)
    return read_table(path, settings, f"{name}_sha256")


def open_held_out(study: Study, images: Images) -> pd.DataFrame:
    """Probabilities of every class for every training image, from the network of cross-validation
    that was not trained on it.

    Returns: Index `example_id` (sorted, all training ids), columns `p0`, `p1`, ...
    Raises: FileNotFoundError for a fold that is not finished; ValueError for folds that are not
        those of this study's images, or were changed.
    """
    model = next(iter(study.recordings.models))
    folds = range(1, study.recordings.folds + 1)
    parts = [_read(study, model, f"fold={fold}", "held_out") for fold in folds]
    whole = pd.concat(parts).sort_index()
    if not np.array_equal(whole.index, images.train_ids):
        folder = recording_folder(study, model, f"fold={folds[0]}").parent
        raise ValueError(
            f"the folds in {folder} do not make up this study's training images; delete its "
            f"folders fold=..., then {run_to_make(study.runs / 'noise')}"
        )
    return whole
