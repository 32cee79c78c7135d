"""Step 03: the datamap of a study: every score of every training example."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from kdlib.cartography.datamap import compute_datamap, read_datamap, write_datamap
from kdlib.cartography.feature_scores import class_distance, prototypicality
from kdlib.cartography.gradients import gradient_norms
from kdlib.cartography.log import DynamicsLog
from kdlib.dataset.images import Images
from kdlib.models.base import Network
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run
from kdlib.repro.run import open_run, read_evidence
from kdlib.repro.seeds import derive
from kdlib.steps.checkpoints import load_epoch
from kdlib.steps.processes import prepare_device
from kdlib.steps.teacher_network import recorded_network
from kdlib.steps.teacher_outputs import open_teacher, teacher_features
from kdlib.study.study import Study


def make_datamap(study: Study, images: Images) -> pd.DataFrame:
    """Step 03: every score of every training example, from the recorded dynamics, the recorded
    network's gradients where the study asks for them, and the teacher's features."""
    study = study.upstream
    recorded = read_evidence(study.recorded_run)
    log = DynamicsLog.open(study.recorded_run / "dynamics", images.fingerprints, verify=True)
    settings = {
        "step": study.step_settings("datamap"),
        "inputs": images.fingerprints | _inputs(study),
    }
    path = study.runs / "datamap" / "datamap.parquet"
    with open_run(study.runs, path.parent, settings) as run:
        if not run.finished:
            images.train.verify()
            device, scoring = prepare_device(study.compute), study.dynamics
            table = compute_datamap(log, el2n_epoch=scoring.el2n_epoch, window=scoring.window)
            table = table.assign(**_further_scores(study, images, table, recorded, device))
            provenance = settings["inputs"] | {"settings": run.settings_sha256}
            write_datamap(table, path, provenance)
            run.finish(
                {
                    "step": "datamap",
                    "study": study.name,
                    "datamap_sha256": files.sha256_file(path),
                    "n_examples": len(table),
                    "n_epochs": log.n_epochs,
                    "observed": log.observed,
                }
            )
        return open_datamap(study, images)


def _inputs(study: Study) -> dict[str, str]:
    """Fingerprints of a datamap's inputs beside the images: the recorded training and the teacher's
    outputs."""
    return {
        "recorded": read_evidence(study.recorded_run)["settings_sha256"],
        "teacher_outputs": open_teacher(study)["outputs"]["train"],
    }


def _further_scores(
    study: Study, images: Images, table: pd.DataFrame, recorded: dict[str, Any], device: str
) -> dict[str, np.ndarray]:
    """Scores that follow from gradients and from the teacher's features, which are in memory as
    float32."""
    ids = table.index.to_numpy()
    scores = {}
    epoch = study.dynamics.gradient_epoch
    if epoch is not None:
        network = recorded_network(study, images, device)
        load_epoch(network, study.recorded_run, recorded, epoch)
        scores["grand"], scores["grand_last"] = gradients(images, network, ids, device)
    features = teacher_features(study, images.train, ids)
    n_clusters = study.dynamics.clusters or images.n_classes
    seed = derive(study.dynamics.seed, "clusters") % 2**32  # scikit-learn takes 32 bits
    scores["prototypicality"] = prototypicality(features, n_clusters, seed)
    return scores | {"class_distance": class_distance(features, table["label"].to_numpy())}


def gradients(
    images: Images, network: Network, ids: np.ndarray, device: str
) -> tuple[np.ndarray, np.ndarray]:
    """`grand` and `grand_last` of some training examples under a network's weights."""
    pixels = torch.from_numpy(images.train.read("images", ids)).to(device)
    labels = torch.from_numpy(images.train.read("labels", ids)).to(device)
    return gradient_norms(network, images.pixels, pixels, labels, describe="gradients")


def open_datamap(study: Study, images: Images) -> pd.DataFrame:
    """The datamap of step 03, checked against the images and the evidence.

    Raises: FileNotFoundError that names the command; ValueError for a datamap of other images,
        another recording or another teacher.
    """
    study = study.upstream
    evidence = read_evidence(study.runs / "datamap", study.step_settings("datamap"))
    path = study.runs / "datamap" / "datamap.parquet"
    table = read_datamap(path, images.fingerprints | _inputs(study))
    if files.sha256_file(path) != evidence["datamap_sha256"]:
        raise ValueError(f"{path} differs from its evidence; {delete_and_run(path)}")
    return table
