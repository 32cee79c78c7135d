"""What each way of reading a teacher costs: bytes on the disk, and seconds of its network."""

import shutil
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from kdlib.cache.shards import CacheError
from kdlib.dataset.images import Images
from kdlib.dataset.plan import budget
from kdlib.models.base import Network
from kdlib.models.live import LiveOutputs
from kdlib.models.outputs import output_columns
from kdlib.repro import files
from kdlib.steps.folders import axes_of
from kdlib.steps.precision import decided
from kdlib.steps.processes import prepare_device
from kdlib.steps.teacher_network import teacher_network, teacher_pixels
from kdlib.steps.teacher_outputs import kinds, read_by_students, replay_of, stored_outputs
from kdlib.study.models import StoredOutputs
from kdlib.study.objectives import needs_teacher
from kdlib.study.study import Study


def output_costs(study: Study, images: Images, name: str | None = None) -> pd.DataFrame:
    """What each way of reading a teacher costs in this study, before any of it is begun.

    Times are those of one batch of the real network on the study's device, measured here; reading
    and writing files is not counted.

    Returns: One row for each of `clean`, `<n> views` (those the study asks for, else as many as the
        longest student makes passes, so that each pass has a new one) and `live`: `asked`, whether
        the study asks for it; `stored_bytes`, of all that step 02 stores; `pass_s`, of the
        network's passes in step 02; `step_s`, of its pass in each step of a student; `students_s`,
        the same in all steps of all students that read this teacher.
    """
    owner, device = study.upstream if name is None else study, prepare_device(study.compute)
    network = teacher_network(owner, images, device, name).eval()
    steps = _steps(study, images, name)
    longest = max(steps, default=1) * study.training.batch_size
    stored = owner.teacher.stored
    views = stored.views or -(-longest // len(images.train_ids))
    rest = stored.model_dump(exclude={"views"}, exclude_none=True)
    ways = {
        "clean": StoredOutputs(**rest),
        f"{views} views": StoredOutputs(**rest, views=views),
        "live": "live",
    }
    precision = decided(study, images).get("precision", study.compute.precision)
    in_step = batch_s = _seconds(study, images, network, name, "float32")
    if precision != "float32":  # what is stored is computed in float32
        in_step = _seconds(study, images, network, name, precision)
    in_pass = batch_s / study.training.batch_size
    rows = []
    for way, outputs in ways.items():
        asked = owner.teacher.model_copy(update={"outputs": outputs})
        other = owner.model_copy(update={"teacher": asked})
        n_train, *n_test = (len(cache.example_ids) for cache in images.caches.values())
        n_images = n_train + sum(n_test) + (views * n_train if way.endswith("views") else 0)
        step_s = in_step if way == "live" else 0.0
        rows.append(
            {"outputs": way, "asked": outputs == owner.teacher.outputs,
             "stored_bytes": stored_bytes(other, images, network, name),
             "pass_s": n_images * in_pass, "step_s": step_s, "students_s": step_s * sum(steps)}
        )  # fmt: skip
    return pd.DataFrame(rows)


def demand_room(
    study: Study, images: Images, network: Network, name: str | None, folder: Path
) -> None:
    """Compare what step 02 is to store of a teacher with the room on the disk, before it begins.

    Args:
        folder: Of its run; outputs that are there already need no more room.

    Raises: CacheError.
    """
    there = sum(p.stat().st_size for p in folder.glob("outputs-*/*.npy"))
    needed = stored_bytes(study, images, network, name) - there
    free = shutil.disk_usage(files.workspace()).free
    if needed > free:
        raise CacheError(
            f"the teacher's outputs need {needed / 1e9:.2f} GB, and the disk of {folder} has "
            f"{free / 1e9:.2f} GB free; make room there, or store less: teacher.outputs: live, or "
            "outputs.grid, outputs.top_k, fewer outputs.views (`python -m kdlib cache outputs "
            "STUDY --costs` compares them)"
        )


def stored_bytes(study: Study, images: Images, network: Network, name: str | None) -> int:
    """Bytes of all that step 02 stores of a teacher, without the headers of its files."""
    total, stored = 0, study.teacher.stored
    for which in kinds(study):
        cache = images.test if which == "test" else images.train
        columns = output_columns(
            network,
            images.image_shape,
            replay_of(study, which),
            stored.top_k,
            stored.grid,
            stored_outputs(study, network, name, which),
        )
        row = sum(
            np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in columns.values()
        )
        total += row * len(cache.example_ids)
    return total


def _steps(study: Study, images: Images, name: str | None) -> list[int]:
    """Steps of each student that reads a teacher."""
    return [
        study.training.n_steps(budget(len(images.train_ids), axes_of(study, cell)["fraction"]))
        for cell in study.cells()
        if needs_teacher(objective := study.objectives[cell.objective])
        and objective.teacher == name
        for _ in study.seeds
    ]


def _seconds(
    study: Study, images: Images, network: Network, name: str | None, precision: str
) -> float:
    """Of one batch of the students, the faster of two after one that is not counted."""
    owner = study.upstream if name is None else study
    wanted = read_by_students(study, network, name) or ["features"]
    live = LiveOutputs(network, teacher_pixels(owner, images, name), wanted, precision)
    ids = np.resize(images.train_ids, study.training.batch_size)
    device = next(network.parameters()).device
    raw, taken = torch.from_numpy(images.train.read("images", ids)).to(device), []
    for _ in range(3):
        started = time.perf_counter()
        values = live(live.pixels.prepare(raw))
        next(iter(values.values())).sum().item()  # a GPU has finished then
        taken.append(time.perf_counter() - started)
    return min(taken[1:])
