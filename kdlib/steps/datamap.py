"""Step 03: the datamap of a study: every score of every training example. With
`dynamics.per_seed` also one for each seed, of a recording of its own.

The map of a small data set is also written among the tables to commit, so that it can be looked at
where no step has run.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.cartography.datamap import compute_datamap, read_datamap, write_datamap
from kdlib.cartography.feature_scores import class_distance, prototypicality
from kdlib.cartography.log import DynamicsLog
from kdlib.compare.committed import committed_folder
from kdlib.dataset.images import Images
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run, run_to_make
from kdlib.repro.run import open_run, read_evidence
from kdlib.repro.seeds import derive
from kdlib.repro.tables import read_parquet, write_parquet
from kdlib.steps.checkpoints import load_epoch
from kdlib.steps.folders import (
    datamap_folder,
    datamap_settings,
    recording_folder,
    recording_of_seed,
    recording_settings,
)
from kdlib.steps.processes import prepare_device
from kdlib.steps.recordings import gradients, open_gradients, open_log, record
from kdlib.steps.teacher_network import recorded_network
from kdlib.steps.teacher_outputs import open_teacher, teacher_features
from kdlib.study.base import StudyError
from kdlib.study.fingerprints import dumped
from kdlib.study.study import Study

_OF_TEACHER = ["prototypicality", "class_distance"]  # scores that read no dynamics
_OF_GRADIENTS = ["grand", "grand_last"]  # whose last bits differ between processors
LARGEST_COMMITTED = 5_000  # examples


def make_datamap(study: Study, images: Images) -> pd.DataFrame:
    """Step 03: every score of every training example, from the recorded dynamics, the recorded
    network's gradients where the study asks for them, and the teacher's features.

    With `dynamics.per_seed` the datamap of each seed is made too, and its recording where there is
    none yet.

    Returns: The study's datamap, of its recorded network.
    Raises: StudyError for a study without a recorded training.
    """
    demand_recorded(study)
    whole = _make(study, images, None)
    for seed in study.seeds if study.dynamics.per_seed else ():
        record(study.upstream, images, *recording_of_seed(study, seed))
        _make(study, images, seed)
    commit_map(study, images, whole)
    return whole


def commit_map(study: Study, images: Images, whole: pd.DataFrame) -> None:
    """Write the datamap of a study that shares none, of few images, beside the tables to commit."""
    if study.shares is None and len(whole) <= LARGEST_COMMITTED:
        of = {"images": images.fingerprints, "settings": _settings(study)}
        shown = whole.drop(columns=_OF_GRADIENTS, errors="ignore")
        write_parquet(_committed(study), shown, of, compression="zstd")


def _committed(study: Study) -> Path:
    return committed_folder(study) / "datamap.parquet"


def _settings(study: Study) -> dict[str, Any]:
    """The settings on which a datamap depends."""
    return {key: dumped(study).get(key) for key in ("data", "teacher", "dynamics")}


def open_map(study: Study, images: Images) -> tuple[pd.DataFrame, Path]:
    """The datamap to look at, and its file: that of step 03, or the committed one, without the
    scores of gradients, where the step has not run.

    Raises: As `open_datamap`; ValueError for a committed map of other images or settings.
    """
    made, committed = datamap_folder(study, None) / "datamap.parquet", _committed(study.upstream)
    if made.exists() or not committed.exists():
        return open_datamap(study, images), made
    table, of = read_parquet(committed)
    now = {"images": images.fingerprints, "settings": _settings(study.upstream)}
    if lines := files.difference(now, of):
        raise ValueError(
            f"{committed} is of other settings (there -> now): {'; '.join(lines)}; "
            f"{run_to_make(made.parent)}"
        )
    return table, committed


def _make(study: Study, images: Images, seed: int | None) -> pd.DataFrame:
    """Make the datamap of a seed, after the study's own, or that one (None)."""
    settings = {
        "step": datamap_settings(study, seed),
        "inputs": images.fingerprints | _inputs(study, seed),
    }
    log = _open_log(study, images, seed)
    path = datamap_folder(study, seed) / "datamap.parquet"
    with open_run(study.upstream.runs, path.parent, settings) as run:
        if not run.finished:
            images.train.verify()
            device, scoring = prepare_device(study.upstream.compute), study.dynamics
            table = compute_datamap(log, el2n_epoch=scoring.el2n_epoch, window=scoring.window)
            if seed is None:
                table = table.assign(**_further_scores(study.upstream, images, table, device))
            else:
                table = table.assign(**_further_scores_of_seed(study, images, table, seed))
            provenance = settings["inputs"] | {"settings": run.settings_sha256}
            write_datamap(table, path, provenance)
            run.finish(
                {
                    "step": "datamap",
                    "study": study.upstream.name,
                    "datamap_sha256": files.sha256_file(path),
                    "n_examples": len(table),
                    "n_epochs": log.n_epochs,
                    "observed": log.observed,
                }
            )
        return open_datamap(study, images, seed)


def _open_log(study: Study, images: Images, seed: int | None) -> DynamicsLog:
    """The dynamics of the recording of a seed, or of the study's recorded network."""
    if seed is not None:
        return open_log(study.upstream, images, *recording_of_seed(study, seed))
    return DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)


def demand_recorded(study: Study) -> None:
    """Raises: StudyError for a study without a recorded training."""
    if study.recorded_training is None:
        why = "gives `dynamics` no model and training, and its teacher is not trained here"
        why = why if study.data.labelled else "has images without labels"
        raise StudyError(f"{study.name} {why}: it has no training dynamics and no datamap")


def _inputs(study: Study, seed: int | None) -> dict[str, str]:
    """Fingerprints of a datamap's inputs beside the images: the recorded training and the teacher's
    outputs."""
    if seed is None:
        recorded = read_evidence(study.recorded_run)
    else:
        place = (study.upstream, *recording_of_seed(study, seed))
        recorded = read_evidence(recording_folder(*place), recording_settings(*place))
    return {
        "recorded": recorded["settings_sha256"],
        "teacher_outputs": open_teacher(study.upstream)["outputs"]["train"],
    }


def _further_scores(
    study: Study, images: Images, table: pd.DataFrame, device: str
) -> dict[str, np.ndarray]:
    """Scores that follow from gradients and from the teacher's features, which are in memory as
    float32."""
    ids = table.index.to_numpy()
    scores = {}
    epoch = study.dynamics.gradient_epoch
    if epoch is not None:
        network = recorded_network(study, images, device)
        load_epoch(network, study.recorded_run, read_evidence(study.recorded_run), epoch)
        scores["grand"], scores["grand_last"] = gradients(images, network, ids, device)
    features = teacher_features(study, images.train, ids)
    n_clusters = study.dynamics.clusters or images.n_classes
    seed = derive(study.dynamics.seed, "clusters") % 2**32  # scikit-learn takes 32 bits
    distance = class_distance(features, table["label"].to_numpy())
    named = (prototypicality(features, n_clusters, seed), distance)
    return scores | dict(zip(_OF_TEACHER, named, strict=True))


def _further_scores_of_seed(
    study: Study, images: Images, table: pd.DataFrame, seed: int
) -> dict[str, pd.Series]:
    """The same for the map of a seed: its recording's gradients, and the teacher's scores, which
    are those of the study's map."""
    norms = open_gradients(study.upstream, *recording_of_seed(study, seed))
    of_teacher = open_datamap(study, images)[_OF_TEACHER]
    parts = [of_teacher] if norms is None else [norms, of_teacher]
    return {name: part[name] for part in parts for name in part}


def open_datamap(study: Study, images: Images, seed: int | None = None) -> pd.DataFrame:
    """The datamap of step 03, checked against the images and the evidence.

    Args:
        seed: That by which the subsets of this seed are chosen; None: the study's.

    Raises: FileNotFoundError that names the command; ValueError for a datamap of other images,
        another recording or another teacher; StudyError for a study without a recorded training,
        or a seed without a recording.
    """
    demand_recorded(study)
    if not study.dynamics.per_seed:
        seed = None
    elif seed is not None and seed not in study.seeds:
        raise StudyError(
            f"seed {seed} has no recording of its own (dynamics.per_seed); {study.name} has the "
            f"seeds {', '.join(map(str, study.seeds))}"
        )
    evidence = read_evidence(datamap_folder(study, seed), datamap_settings(study, seed))
    path = datamap_folder(study, seed) / "datamap.parquet"
    table = read_datamap(path, images.fingerprints | _inputs(study, seed))
    if files.sha256_file(path) != evidence["datamap_sha256"]:
        raise ValueError(f"{path} differs from its evidence; {delete_and_run(path)}")
    return table
