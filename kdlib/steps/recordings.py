"""Further recorded trainings of a study's images: several seeds and models, cross-validation, and
the threshold samples of AUM. Notebooks 07 and 08 read what they leave.

Each is a run of its own with evidence, trained from labels alone. Leaves to others: what the logs
say about each other (agreement) and about wrong labels (noise).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib.cartography.log import DynamicsLog, begin_log
from kdlib.dataset.images import Images
from kdlib.models.evaluation import all_outputs
from kdlib.models.networks import network_for
from kdlib.repro import checks, files
from kdlib.repro.run import open_run, read_evidence, read_table
from kdlib.repro.seeds import derive, hashed
from kdlib.repro.tables import write_parquet
from kdlib.steps.datamap import gradients
from kdlib.steps.teacher_network import keep_epoch
from kdlib.steps.training import CROSS_ENTROPY, load_checked, load_step, plan_run, train_run, use
from kdlib.study.base import StudyError
from kdlib.study.study import Study
from kdlib.study.training import Training
from kdlib.trainer.distributed import World


def recording_folder(study: Study, model: str, part: str) -> Path:
    """Where one recording is."""
    return study.runs / "recorded" / f"model={model}" / part


def fold_of(example_ids: np.ndarray, n_folds: int) -> np.ndarray:
    """The fold in [1, n_folds] of each example, of sizes that differ by one at most: (N,) int64."""
    order = np.argsort(hashed(example_ids, 0, "folds"))
    folds = np.empty(len(order), np.int64)
    folds[order] = np.arange(len(order)) % n_folds + 1
    return folds


def threshold_samples(example_ids: np.ndarray, n_classes: int, which: int) -> np.ndarray:
    """Sorted ids of the N / (n_classes + 1) examples that pretend to be of one more class.

    Args:
        which: 1 or 2; the two draws have no example in common.

    Source: Pleiss et al. 2020, arXiv 2001.10528, sec. 3.2.
    """
    n = len(example_ids) // (n_classes + 1)
    order = np.argsort(hashed(example_ids, 0, "threshold"))
    return np.sort(example_ids[order[(which - 1) * n : which * n]])


def recording_settings(study: Study, model: str, part: str) -> dict[str, Any]:
    """What the study asks of one recording."""
    asked, (kind, number) = study.recordings, part.split("=")
    of_first = kind == "seed" and model == next(iter(asked.models))
    return {
        "model": asked.models[model].model_dump(mode="json"),
        "part": part,
        "folds": asked.folds if kind == "fold" else None,
        "seed": int(number) if kind == "seed" else asked.seeds[0],
        "gradient_epoch": study.dynamics.gradient_epoch if of_first else None,
        "observed": study.dynamics.observed if kind != "fold" else None,
        "logits": study.dynamics.logits and kind == "seed",
        "compute": study.step_settings("record")["compute"] | {"processes": 1},
        "training": _training(study).model_dump(mode="json"),
    }


def _training(study: Study) -> Training:
    return study.recordings.training or study.recorded_training


def record(study: Study, images: Images, model: str, part: str) -> dict[str, Any]:
    """Train and record one of `study.recordings.runs()`, unless it is there already.

    `seed=S` learns all training images; `fold=K` those of the other folds, and leaves
    `held_out.parquet`, its probabilities of each class for each image of fold K; `threshold=K`
    all of them, of which some pretend to be of one more class. Seeds of the first model leave
    `gradients.parquet` where the study asks for gradients.

    Returns: Its evidence.
    Raises: StudyError for a recording the study does not ask for; checks.TripwireError.
    """
    asked = study.recordings.runs() if study.recordings else []
    if (model, part) not in asked:
        told = ", ".join("/".join(run) for run in asked) or "none (study: recordings)"
        raise StudyError(f"no recording {model}/{part} in this study; it has {told}")
    device = use(study.compute)
    own = recording_settings(study, model, part)
    kind, number = part.split("=")
    training, seed, epoch = _training(study), own["seed"], own["gradient_epoch"]
    ids, n_more = images.train_ids, 0
    if kind == "fold":
        ids = ids[fold_of(ids, study.recordings.folds) != int(number)]
    labels = images.train.read("labels", ids)
    if kind == "threshold":
        pretending = threshold_samples(ids, images.n_classes, int(number))
        labels[np.isin(ids, pretending)], n_more = images.n_classes, 1
    settings = {"step": own, "inputs": images.fingerprints}
    with open_run(study.runs, recording_folder(study, model, part), settings) as run:
        if run.finished:
            return read_evidence(run.folder)
        network = network_for(
            images, study.recordings.models[model], derive(seed, "init"), device, n_more
        )
        plan = plan_run(images, training, ids, seed)
        training = keep_epoch(training, plan, epoch)
        log = None
        if kind != "fold":
            log = begin_log(
                run.folder / "dynamics",
                images,
                plan,
                observed=study.dynamics.observed,
                logits=own["logits"],
                labels=labels,
                n_classes=images.n_classes + n_more,
                settings=run.settings_sha256,
            )
        evidence = train_run(
            run, study, images, network, training, plan, CROSS_ENTROPY, seed, f"{model} {part}",
            World(device=device), log=log, labels=labels,
        )  # fmt: skip
        if log is not None:
            log.finish()
        if epoch is not None:
            step = round(epoch * evidence["epochs_in_steps"])
            load_step(network, run.folder, evidence, step)
            norms = gradients(images, network, ids, device)
            table = dict(zip(("grand", "grand_last"), norms, strict=True))
            table = pd.DataFrame(table, pd.Index(ids, name="example_id"))
            path = write_parquet(run.folder / "gradients.parquet", table, {"epoch": epoch})
            evidence["gradients_sha256"] = files.sha256_file(path)
        if kind == "fold":
            last = evidence["checkpoints"]["last"]
            load_checked(network, run.folder, last["file"], last["weights_sha256"])
            held_out = np.setdiff1d(images.train_ids, ids)
            pixels = torch.from_numpy(images.train.read("images", held_out)).to(device)
            (logits,) = all_outputs(network, images.pixels, pixels, ("logits",))
            probs = torch.softmax(logits.double(), 1).cpu().numpy()
            table = pd.DataFrame(probs, pd.Index(held_out, name="example_id"))
            table.columns = [f"p{c}" for c in range(images.n_classes)]
            path = write_parquet(run.folder / "held_out.parquet", table, {"fold": int(number)})
            evidence["held_out_sha256"] = files.sha256_file(path)
        evidence |= {"step": "record", "study": study.name, "data": images.fingerprints}
        evidence["checks"] = checks.demand(checks.RUN, evidence)
        return run.finish(evidence, device)


def record_all(study: Study, images: Images) -> dict[tuple[str, str], dict[str, Any]]:
    """Every recording the study asks for; finished ones are not trained again.

    Raises: StudyError when it asks for none.
    """
    if study.recordings is None:
        raise StudyError(
            f"{study.name} asks for no further recordings: give it a section `recordings` "
            "(models, seeds), as params/digits.yaml has"
        )
    return {run: record(study, images, *run) for run in study.recordings.runs()}


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

    Raises: FileNotFoundError when it is not finished; ValueError when the study has been changed
        since it was made.
    """
    folder = recording_folder(study, model, part)
    read_evidence(folder, recording_settings(study, model, part))
    return DynamicsLog.open(folder / "dynamics", images.fingerprints, verify=True)


def open_gradients(study: Study, model: str, part: str) -> pd.DataFrame | None:
    """`grand` and `grand_last` of one finished recording, index `example_id`; None where the study
    asks for no gradients of it.

    Raises: FileNotFoundError and ValueError as `open_log`; ValueError for a table that was changed.
    """
    own, folder = recording_settings(study, model, part), recording_folder(study, model, part)
    if own["gradient_epoch"] is None:
        return None
    path, maker = folder / "gradients.parquet", f"recording {model}/{part}"
    return read_table(path, own, maker, "gradients_sha256")


def open_held_out(study: Study, images: Images) -> pd.DataFrame:
    """Probabilities of every class for every training image, by the network of cross-validation
    that has not learnt it.

    Returns: Index `example_id` (sorted, all training ids), columns `p0`, `p1`, ...
    Raises: FileNotFoundError for a fold that is not finished; ValueError for folds that are not
        those of this study's images, or were changed.
    """
    model = next(iter(study.recordings.models))
    parts = []
    for fold in range(1, study.recordings.folds + 1):
        part = f"fold={fold}"
        path = recording_folder(study, model, part) / "held_out.parquet"
        own, maker = recording_settings(study, model, part), f"recording {model}/{part}"
        parts.append(read_table(path, own, maker, "held_out_sha256"))
    whole = pd.concat(parts).sort_index()
    if not np.array_equal(whole.index, images.train_ids):
        raise ValueError("the folds do not make up this study's training images; record them again")
    return whole
