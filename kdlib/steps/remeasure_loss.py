"""The validation loss of a student of images without labels, and the accuracy of a live teacher,
measured again by code of their own.

The images, their normalisation, the teacher's rows, the pieces and the mean are read and made here
a second time; the networks, the objective's loss and the views are the library's.
"""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from kdlib.dataset.views import augment
from kdlib.steps.derived import Shards, stream_seed
from kdlib.steps.recount import Recount
from kdlib.steps.training import OBJECTIVE
from kdlib.study.cells import Cell
from kdlib.study.study import Study
from kdlib.study.training import Augment
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns
from kdlib.trainer.step import Learner

# Names, example ids, images -> outputs by name, float32
TeacherRows = Callable[[tuple[str, ...], np.ndarray, np.ndarray], dict[str, np.ndarray]]
TOLERANCE = 1e-4  # relative: sums of float32 in another order


def loss_again(
    study: Study,
    objective_name: str,
    folder: Path,
    evidence: dict[str, Any],
    network: nn.Module,
    shards: Shards,
    rows_of: TeacherRows,
    ids: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
) -> float:
    """The objective's mean loss on the held-out images, with the weights of the last step.

    Args:
        folder, evidence: Of the student's run.
        network: The student, with these weights.
        shards: Of the images.
        rows_of: From names of outputs, example ids and the first view of these images, in [0, 1],
            to the teacher's outputs.
        ids: Of the held-out images.
        mean, std: (C,) of pixels in [0, 1].
    """
    objective, card = study.objectives[objective_name], evidence["teacher"]
    training = json.loads((folder / "settings.json").read_text())["step"]["training"]
    reads = teacher_columns(objective, card["n_stages"])
    wanted, shape = student_outputs(objective, network.n_stages, logits=False), shards.image_shape
    distiller = build_distiller(
        objective,
        network.output_shapes(shape, wanted),
        {k: v.shape[1:] for k, v in rows_of(reads, ids[:1], np.zeros((1, *shape))).items()},
        seed=0,
        n_examples=evidence["subset"]["n_examples"],
    )
    distiller.load_state_dict(load_file(folder / OBJECTIVE))
    learner, device = Learner(network, distiller, objective), next(network.parameters()).device
    learner.to(device).eval()
    views = [(Augment(), 0)]
    if (outputs := study.teacher.stored).views is not None:
        views = [(study.training.augment, stream_seed(outputs.seed, "augment"))]
    if objective.compares_views:
        views.append(
            (study.training.augment, stream_seed(evidence["seeds"]["requested"], "second_view"))
        )
    centre, spread = (torch.tensor(x, dtype=torch.float32)[:, None, None] for x in (mean, std))
    total, n_pieces = [], max(1, len(ids) // training["batch_size"])
    for start, stop in _bounds(len(ids), n_pieces):
        some = torch.from_numpy(ids[start:stop])
        raw = torch.from_numpy(shards.rows("images", ids[start:stop]))
        zeros = torch.zeros_like(some)
        seen = [augment(raw, some, zeros, *view).float() / 255 for view in views]
        teacher = rows_of(reads, ids[start:stop], seen[0].numpy())
        teacher = {name: torch.from_numpy(value).to(device) for name, value in teacher.items()}
        with torch.no_grad():
            projected = learner(*(((pixels - centre) / spread).to(device) for pixels in seen))
            labels = torch.full((len(some),), -1, device=device)
            total.append(len(some) * float(distiller.loss(projected, labels, teacher)))
    return math.fsum(total) / len(ids)


def live_accuracy(
    rows_of: TeacherRows,
    recount: Recount,
    cell: Cell,
    seed: int,
    folder: Path,
    live: dict[str, Any],
) -> float:
    """Share of the first views in a student's training that its live teacher classifies rightly.

    Args:
        rows_of: As of `loss_again`.
        folder: Of the student's run.
        live: Of its evidence: the number of examples, `augment` and `seed` of their views.
    """
    step = json.loads((folder / "settings.json").read_text())["step"]
    subset = pd.read_parquet(folder / "subset.parquet")["example_id"].to_numpy(np.int64)
    expected, shards = recount.expected(cell, subset, step["training"]), recount.train
    ids = np.sort(recount.first_asked(step, expected, seed, live["n"]))
    # an example that comes for the n-th time does so in the n-th pass
    passes = np.concatenate([np.arange(n) for n in np.unique(ids, return_counts=True)[1]])
    settings = Augment.model_validate(live["view"]["augment"])
    raw = torch.from_numpy(shards.rows("images", ids))
    seen = augment(
        raw, torch.from_numpy(ids), torch.from_numpy(passes), settings, live["view"]["seed"]
    )
    logits = rows_of(("logits",), ids, seen.float().numpy() / 255)["logits"]
    return float((logits.argmax(1) == shards.rows("labels", ids)).mean())


def _bounds(n: int, n_pieces: int) -> list[tuple[int, int]]:
    """Begin and end of equal pieces, the longer ones first."""
    least, longer = divmod(n, n_pieces)
    starts = [0]
    for piece in range(n_pieces):
        starts.append(starts[-1] + least + (piece < longer))
    return list(itertools.pairwise(starts))
