"""One training of a study, from its plan to what the tripwires read of it.

Teachers, students and recordings are all made here; what differs is the plan, the objective and
who is heard. Leaves to others: the loop (trainer), the rules (checks), which run it is (teaching,
distilling, recordings).
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdlib.cache.shards import Cache
from kdlib.cartography.log import DynamicsLog
from kdlib.dataset.batch import View
from kdlib.dataset.images import Images
from kdlib.dataset.loader import Loader
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.models.evaluation import evaluate
from kdlib.models.outputs import Replay, stored_accuracy
from kdlib.models.weights import load_weights
from kdlib.repro import checks, files, processor
from kdlib.repro.run import Run, open_run
from kdlib.repro.seeds import PURPOSES, derive
from kdlib.study.objectives import CrossEntropy, Objective
from kdlib.study.study import Study
from kdlib.study.training import Compute, Tracking, Training
from kdlib.trainer.distributed import World, launch, this_process, wait
from kdlib.trainer.loop import Trained, checkpoint_steps, train
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns
from kdlib.trainer.state import saved_step
from kdlib.trainer.step import Task
from kdlib.trainer.tracking import open_tracker

CROSS_ENTROPY = CrossEntropy()


def use(compute: Compute) -> str:
    """Set the number of threads, hold a GPU to float32 and deterministic kernels, and return this
    process's device.

    Raises: RuntimeError when the study's device is not there, or when the study asks for the same
        bytes on every processor and torch has begun to compute with other kernels.
    """
    torch.set_num_threads(compute.threads)
    if compute.portable:
        processor.hold()
    if compute.device.startswith("cuda") and not torch.cuda.is_available():
        raise RuntimeError(
            f"the study asks for {compute.device}, but torch sees no GPU here; set compute.device: "
            "cpu in the study, or run it where a GPU is"
        )
    if compute.device.startswith("cuda"):
        processor.hold_gpu()
    return this_process(compute.device).device


@contextlib.contextmanager
def open_shared_run(study: Study, folder: Path, settings: dict[str, Any]) -> Iterator[Run]:
    """The run, opened and locked by the first of the processes that share it."""
    world = this_process(study.compute.device)
    if world.first:
        with open_run(study.runs, folder, settings) as run:
            wait(world)
            yield run
    else:
        wait(world)
        yield Run(folder, settings)


def launch_run(
    study: Study, folder: Path, settings: dict[str, Any], step: str, **point: Any
) -> bool:
    """Make an unfinished run by several processes under torchrun, when the study asks for several
    and this process is not one of them; whether they were started.

    Raises: RuntimeError when one of them fails (it has printed its error), or when there are fewer
        GPUs than processes.
    """
    alone = this_process(study.compute.device).alone
    if study.compute.processes == 1 or not alone or Run(folder, settings).finished:
        return False
    if study.compute.device.startswith("cuda"):
        n_processes, n_gpus = study.compute.processes, torch.cuda.device_count()
        if n_processes > n_gpus:
            raise RuntimeError(
                f"the study asks for {n_processes} processes, one per GPU, and torch "
                f"sees {n_gpus} here; lower compute.processes, or run it where as many GPUs are"
            )
    path = written(study)
    arguments = [str(x) for pair in point.items() for x in (f"--{pair[0]}", pair[1])]
    launch(["kdlib", "step", step, str(path), *arguments], study.compute.processes)
    return True


def written(study: Study) -> Path:
    """A file of the study as it is in memory, for processes of its own."""
    path = study.runs / "launched" / f"{study.name}.yaml"  # JSON, which is YAML
    content = study.model_dump(mode="json", exclude={"name"}, exclude_none=True)
    return files.write_json(path, content)


def replay(study: Study) -> Replay | None:
    """The views that the study's teacher and students share; None when each pass has a new one."""
    outputs = study.teacher.outputs
    if outputs.views is None:
        return None
    return Replay(outputs.views, study.training.augment, derive(outputs.seed, "augment"))


def plan_run(
    images: Images,
    training: Training,
    example_ids: np.ndarray,
    seed: int,
    shards_per_pass: int | None = None,
) -> Plan:
    """The order of a run's examples; an epoch of drawn shards is as long as these are on
    average."""
    n, size = len(example_ids), images.train.shard_size
    if shards_per_pass is not None:
        n = round(n * shards_per_pass / len(np.unique(example_ids // size)))
    return Plan(
        example_ids,
        training.batch_size,
        training.n_steps(n),
        seed,
        order=training.order,
        shard_size=size,
        window_shards=training.window_shards,
        shards_per_pass=shards_per_pass,
    )


def train_run(
    run: Run,
    study: Study,
    images: Images,
    network: Network,
    training: Training,
    plan: Plan,
    objective: Objective,
    seed: int,
    describe: str,
    world: World,
    *,
    log: DynamicsLog | None = None,
    teacher: Cache | None = None,
    card: dict[str, Any] | None = None,
    labels: np.ndarray | None = None,
) -> dict[str, Any] | None:
    """Train, measure the last and the best checkpoint on the test split, collect the evidence.

    Args:
        teacher, card: The teacher's stored outputs and what step 02 measured of it.
        labels: Instead of the stored ones, one for each example of the plan.

    Returns: The evidence; None on all but the first of several processes.
    Raises: CacheError when a shard of images, labels or teacher outputs is not as it was written.
    """
    device = world.device
    if world.first:  # once a run: 0.3 s a GB on two cores, and what is learnt is what was stored
        for cache in (images.train, images.test, *([] if teacher is None else [teacher])):
            cache.verify()
    views = replay(study) if teacher is not None else None
    view = View(training.augment, derive(seed, "augment"), images.pixels)
    if views is not None:
        view = View(views.augment, views.seed, images.pixels, views.n)
    second = None
    if objective.compares_views:
        second = View(training.augment, derive(seed, "second_view"), images.pixels)
    reads = teacher_columns(objective, card["n_stages"] if card else 0)
    loader = Loader(
        plan,
        images.train,
        view=view,
        teacher=teacher,
        reads=reads,
        second=second,
        labels=labels,
        device=device,
        residence=study.compute.images,
        reuse=world.alone,
        rank=world.rank,
        world_size=world.size,
    )
    heard = {} if teacher is None else teacher.header["columns"]
    shapes = {  # without the axis of views; logits may be stored as the largest alone
        name: (images.n_classes,) if name == "logits" else tuple(heard[name][1][1:])
        for name in reads
    }
    distiller = build_distiller(
        objective,
        network.output_shapes(images.image_shape, student_outputs(objective, network.n_stages)),
        shapes,
        seed=seed,
        n_examples=len(plan.example_ids),
    ).to(device)
    task = Task(
        network=network,
        distiller=distiller,
        pixels=images.pixels,
        loader=loader,
        objective=objective,
        training=training,
        validation=images.validation(device),
        full_size=len(images.train_ids),
        n_examples=images.train.n_examples,
        seed=seed,
        log=log,
        observed=study.dynamics.observed,
        compute=study.compute,
        world=world,
    )
    tracking = study.tracking if world.first else Tracking()
    with open_tracker(
        tracking, run.folder, describe, run.settings, saved_step(run.state)
    ) as tracker:
        trained = train(run, task, describe, tracker)
    if not world.first:
        return None
    test = images.test.resident("images").to(device), images.test.resident("labels").to(device)
    measured = {}
    for which, step in (("last", trained.last_step), ("best", trained.best_step)):
        if which == "best" and step == trained.last_step:
            measured["best"] = measured["last"]
            continue
        file, weights_sha256 = trained.checkpoints[step]
        load_checked(network, run.folder, file, weights_sha256)
        loss, accuracy = evaluate(network, images.pixels, *test)
        measured[which] = {
            "step": step,
            "file": file,
            "file_sha256": files.sha256_file(run.folder / file),
            "weights_sha256": weights_sha256,
            "test_accuracy": accuracy,
            "test_loss": loss,
        }
    held_out = images.validation_ids
    evidence = training_evidence(held_out, training, plan, trained, seed, card)
    evidence["metrics_sha256"] = files.sha256_file(run.folder / "metrics.parquet")
    if "logits" in reads:  # read past the loader, for the tripwire to compare
        read = stored_accuracy(teacher, images.train, plan.example_ids)
        evidence["pairing"] |= {"stored_accuracy": read}
    return evidence | {"checkpoints": measured}


def training_evidence(
    validation_ids: np.ndarray,
    training: Training,
    plan: Plan,
    trained: Trained,
    seed: int,
    card: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What the tripwires read of a finished training.

    Args:
        validation_ids: From which its best epoch was chosen.
        training, plan: As they were declared; where they say so, a run may stop early.
        card: Of the teacher it heard.
    """
    n_steps, kept = plan.n_steps, checkpoint_steps(training, plan.n_steps)
    series = [s for s in sorted(trained.checkpoints) if s in kept or s == trained.last_step]
    if training.early_stopping is not None and trained.evidence["stopped_early"]:
        n_steps = trained.last_step
    planned = plan.visits(n_steps)
    coverage = checks.coverage_evidence(
        trained.visits, plan.example_ids, planned, plan.shards_per_pass
    )
    return {
        "seeds": {"requested": seed, "resolved": {p: derive(seed, p) for p in PURPOSES}},
        "budget": {
            "comparison": training.comparison,
            "declared": {
                "unique_examples": int((planned > 0).sum()),
                "samples": n_steps * plan.batch_size,
                "steps": n_steps,
            },
            "bound": plan.n_steps,
            "recorded": {
                "unique_examples": coverage["unique"],
                "samples": int(trained.visits.sum()),
                "steps": int(trained.metrics["step"].iloc[-1]),
            },
        },
        "coverage": coverage,
        "subset": {"n_examples": len(plan.example_ids)},
        "epochs_in_steps": len(plan.example_ids) / plan.batch_size,
        "initialisation": {
            "source": "random",
            "weights_sha256": trained.evidence["initial_weights_sha256"],
        },
        "order_sha256": trained.evidence["order_sha256"],
        "gradient": trained.evidence["gradient"],
        "pairing": trained.evidence["pairing"],
        "selection": {
            "best_epoch_by": "validation",
            "overlap": int((trained.visits[validation_ids] > 0).sum()),
            "steers": training.selects,
            # validation images of which the student has heard through its teacher
            "teacher_overlap": len(validation_ids)
            if card is not None and card["trained_on"] == "train"
            else 0,
        },
        "series": {str(step): trained.checkpoints[step][0] for step in series},
        "series_sha256": {str(step): trained.checkpoints[step][1] for step in series},
    }


def load_checked(network: Network, folder: Path, file: str, weights_sha256: str | None) -> str:
    """Load the weights of a run into a network.

    Args:
        weights_sha256: Their fingerprint when they were written; None where that is not known.

    Returns: Their fingerprint.
    Raises: ValueError for weights that were changed.
    """
    found = load_weights(network, folder / file)
    if weights_sha256 not in (None, found):
        raise ValueError(
            f"{folder / file} was changed after it was written; delete {folder} and run the "
            "notebook that makes it again"
        )
    return found


def load_step(network: Network, folder: Path, evidence: dict[str, Any], step: int | str) -> str:
    """Load the weights of one kept step of a finished run; as `load_checked`."""
    known = evidence.get("series_sha256", {})  # runs of format 1 have none
    return load_checked(network, folder, evidence["series"][str(step)], known.get(str(step)))
