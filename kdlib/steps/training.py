"""One training of a study (teacher, student or recording): its batches, network and loss; the
accuracy of its checkpoints; and the evidence that the checks read."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kdlib.cache.shards import Cache
from kdlib.cartography.log import DynamicsLog, begin_log
from kdlib.dataset.batch import View
from kdlib.dataset.images import Images
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.models.base import Network
from kdlib.models.live import LiveOutputs, live_evidence
from kdlib.models.outputs import Replay, stored_accuracy
from kdlib.models.size import network_size
from kdlib.models.weights import save_weights
from kdlib.repro import checks, files
from kdlib.repro.run import Run
from kdlib.repro.seeds import PURPOSES, derive
from kdlib.steps.checkpoints import keep_epoch, measure_checkpoints, shown_results
from kdlib.steps.folders import measured_precision
from kdlib.study.objectives import CrossEntropy, Objective
from kdlib.study.selections import Dynamics
from kdlib.study.study import Study
from kdlib.study.training import Compute, Tracking, Training
from kdlib.trainer.distiller import Distiller
from kdlib.trainer.distributed import World, this_process
from kdlib.trainer.held_out import open_held_out
from kdlib.trainer.loop import Trained, checkpoint_steps, train
from kdlib.trainer.objectives import build_distiller, student_outputs, teacher_columns
from kdlib.trainer.state import saved_step
from kdlib.trainer.step import Task
from kdlib.trainer.tracking import open_tracker

CROSS_ENTROPY = CrossEntropy()
OBJECTIVE = "objective.safetensors"  # what an objective without labels trained beside the network


@dataclass(frozen=True)
class StoredTeacher:
    """A teacher whose students read stored outputs.

    Attributes:
        outputs: Its stored outputs for the training images.
        card: Its name, accuracy and number of stages, as step 02 measured them.
        replay: The views that the outputs are of; None for images without augmentation.
    """

    outputs: Cache
    card: dict[str, Any]
    replay: Replay | None = None

    @property
    def fingerprint(self) -> str:
        """Of all that determines what students read."""
        return self.outputs.fingerprint


@dataclass(frozen=True)
class LiveTeacher(StoredTeacher):
    """A teacher that computes its outputs while its students are trained.

    Attributes:
        outputs: Stored ones of images without augmentation, which students do not read.
        load: Its network, with its weights, on the device.
        pixels: The normalisation it was trained with.
    """

    load: Callable[[], Network] = field(kw_only=True)
    pixels: Pixels = field(kw_only=True)

    @property
    def fingerprint(self) -> str:
        keys = ("teacher", "pixels", "images", "image_size", "n_classes")
        header = {key: self.outputs.header.get(key) for key in keys}
        return files.fingerprint(header | {"view": "live"})


@dataclass(frozen=True)
class TrainingInputs:
    """All that one training is made of.

    Attributes:
        network: With its initial weights, on the device.
        seed: From which order, augmentation, projectors and dropout are derived.
        teacher: Of the objective; None where it uses none.
        labels: Instead of the stored ones, one for each example of the plan.
        log: Where training dynamics are recorded, or None.
        observed: As of `Task`.
        world: The processes that share each batch.
    """

    images: Images
    network: Network
    training: Training
    plan: Plan
    seed: int
    objective: Objective = CROSS_ENTROPY
    teacher: StoredTeacher | None = None
    labels: np.ndarray | None = None
    log: DynamicsLog | None = None
    observed: str = "train"
    compute: Compute = field(default_factory=Compute)
    world: World = field(default_factory=World)


def replay(study: Study) -> Replay | None:
    """The views that the study's teacher and students share; None when each pass has a new one."""
    outputs = study.teacher.stored
    if outputs.views is None:
        return None
    return Replay(outputs.views, study.training.augment, derive(outputs.seed, "augment"))


def _plan(
    images: Images,
    training: Training,
    example_ids: np.ndarray,
    seed: int,
    shards_per_pass: int | None,
) -> Plan:
    """The order of a run's examples; an epoch of drawn shards has their mean number of examples."""
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


def build_task(inputs: TrainingInputs, cls: type[Distiller] | None = None) -> Task:
    """Loader, loss and validation images of a training.

    Args:
        cls: Of the loss, instead of the objective's class.
    """
    images, network, objective = inputs.images, inputs.network, inputs.objective
    teacher = inputs.teacher
    reads = teacher_columns(objective, teacher.card["n_stages"] if teacher else 0)
    live = None
    if isinstance(teacher, LiveTeacher):
        live = LiveOutputs(teacher.load(), teacher.pixels, reads, inputs.compute.precision)
        shapes = live.network.output_shapes(images.image_shape, reads)
    else:  # without the axis of views; of logits the cache may hold the largest alone
        shapes = {
            name: (images.n_classes,)
            if name == "logits"
            else tuple(teacher.outputs.layout(name)[1][1:])
            for name in (reads if teacher else ())
        }
    loader = _open_loader(inputs, reads, live)
    wanted = student_outputs(objective, network.n_stages, images.n_classes > 0)
    if images.n_classes:
        validation = images.validation(inputs.world.device)
    else:
        replayed, size = teacher.replay is not None, inputs.training.batch_size
        validation = open_held_out(images, teacher.outputs, reads, loader, replayed, size)
    distiller = build_distiller(
        objective,
        network.output_shapes(images.image_shape, wanted),
        shapes,
        seed=inputs.seed,
        n_examples=len(inputs.plan.example_ids),
        cls=cls,
    )
    return Task(
        network=network,
        distiller=distiller.to(inputs.world.device),
        pixels=images.pixels,
        loader=loader,
        objective=objective,
        training=inputs.training,
        validation=validation,
        full_size=len(images.train_ids),
        n_examples=images.train.n_examples,
        seed=inputs.seed,
        log=inputs.log,
        observed=inputs.observed,
        compute=inputs.compute,
        world=inputs.world,
    )


def _open_loader(
    inputs: TrainingInputs, reads: tuple[str, ...], live: LiveOutputs | None
) -> Loader:
    images, teacher, seed, world = inputs.images, inputs.teacher, inputs.seed, inputs.world
    augment = inputs.training.augment
    view, second = View(augment, derive(seed, "augment"), images.pixels), None
    if teacher is not None and teacher.replay is not None:
        views = teacher.replay
        view = View(views.augment, views.seed, images.pixels, views.n)
    if inputs.objective.compares_views:
        second = View(augment, derive(seed, "second_view"), images.pixels)
    return Loader(
        inputs.plan,
        images.train,
        view=view,
        teacher=teacher.outputs if teacher and live is None else None,
        reads=reads,
        live=live,
        second=second,
        labels=inputs.labels,
        device=world.device,
        residence=inputs.compute.images,
        reuse=world.alone,
        rank=world.rank,
        world_size=world.size,
    )


def train_run(
    run: Run,
    study: Study,
    images: Images,
    network: Network,
    training: Training,
    example_ids: np.ndarray,
    seed: int,
    describe: str,
    *,
    objective: Objective = CROSS_ENTROPY,
    teacher: StoredTeacher | None = None,
    shards_per_pass: int | None = None,
    labels: np.ndarray | None = None,
    dynamics: Dynamics | None = None,
    world: World | None = None,
) -> dict[str, Any] | None:
    """Train, evaluate the last and the best checkpoint on the test split, where there are labels,
    and collect the evidence.

    Args:
        network, seed, objective, teacher, labels: As of `TrainingInputs`.
        shards_per_pass: How many shards each pass draws; None reads all.
        dynamics: What is recorded of the training, in `dynamics` of the run's folder.
        world: The processes that share each batch; None: all that torchrun started.

    Returns: The evidence; None on all but the first of several processes.
    Raises: CacheError when a shard of images, labels or teacher outputs has changed; ValueError
        for dynamics with gradients of an epoch beyond the training's end.
    """
    world, log = world or this_process(study.compute.device), None
    plan = _plan(images, training, example_ids, seed, shards_per_pass)
    if dynamics is not None:
        training = keep_epoch(training, plan, dynamics.gradient_epoch)
        if world.first:
            log = begin_log(
                run.folder / "dynamics",
                images,
                plan,
                observed=dynamics.observed,
                logits=dynamics.logits,
                labels=labels,
                n_classes=network.n_classes,
                settings=run.settings_sha256,
            )
    precision = run.settings["inputs"].get("precision", study.compute.precision)
    compute = study.compute.model_copy(update={"precision": precision})
    inputs = TrainingInputs(
        images, network, training, plan, seed, objective, teacher, labels, log,
        study.dynamics.observed, compute, world,
    )  # fmt: skip
    if world.first:  # once a run: 0.3 s per GB on two cores
        for cache in (*images.caches.values(), *([teacher.outputs] if teacher else [])):
            cache.verify()
    task = build_task(inputs)
    tracking = study.tracking if world.first else Tracking()
    with open_tracker(
        tracking, run.folder, describe, run.settings, saved_step(run.state)
    ) as tracker:
        trained = train(run, task, describe, tracker)
        if not world.first:
            return None
        if log is not None:
            log.finish()
        evidence = training_evidence(inputs, trained)
        if not task.distiller.labelled:  # its loss is what is measured again
            path = run.folder / OBJECTIVE
            evidence["objective_sha256"] = save_weights(task.distiller, path, {})
        checkpoints = measure_checkpoints(run.folder, network, images, trained)
        tracker.summarise(shown_results(evidence, checkpoints))
    if study.compute.precision != "float32":
        evidence["precision"] = measured_precision(study)
    evidence["metrics_sha256"] = files.sha256_file(run.folder / "metrics.parquet")
    if training.record_steps:
        evidence["steps_sha256"] = files.sha256_file(run.folder / "steps.parquet")
    if task.loader.live is not None:
        view = task.loader.view
        found = live_evidence(task.loader.live, task.loader, images.train, view.settings, view.seed)
        evidence["pairing"] |= {"live": found}
    elif "logits" in task.distiller.reads:  # read past the loader, to compare with what it returned
        stored = stored_accuracy(teacher.outputs, images.train, plan.example_ids)
        evidence["pairing"] |= {"stored_accuracy": stored}
    evidence["network"] = network_size(network, images.image_shape)
    return evidence | {"checkpoints": checkpoints}


def training_evidence(inputs: TrainingInputs, trained: Trained) -> dict[str, Any]:
    """The facts of a finished training that the checks read.

    Args:
        inputs: As the study declares them; the evidence then says what was trained on beside what
            was declared.
    """
    training, plan, seed = inputs.training, inputs.plan, inputs.seed
    n_steps, kept = plan.n_steps, checkpoint_steps(training, plan.n_steps)
    series = [s for s in sorted(trained.checkpoints) if s in kept or s == trained.last_step]
    if training.early_stopping is not None and trained.evidence["stopped_early"]:
        n_steps = trained.last_step
    planned = plan.visits(n_steps)
    coverage = checks.coverage_evidence(
        trained.visits, plan.example_ids, planned, plan.shards_per_pass
    )
    images, held_out = inputs.images, inputs.images.validation_ids
    # validation images that the teacher was trained on
    known = inputs.teacher is not None and inputs.teacher.card.get("trained_on") == "train"
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
            "weights_sha256": trained.evidence["initial_weights_sha256"],
            # a run that an earlier version began says nothing of it
            **trained.evidence.get("begun", {}),
        },
        "order_sha256": trained.evidence["order_sha256"],
        "gradient": trained.evidence["gradient"],
        "pairing": trained.evidence["pairing"],
        "executed": trained.evidence["executed"],
        "read": {
            "batches_sha256": trained.evidence["batches_sha256"],
            "validation": trained.evidence["validation"],
        },
        "selection": {
            "held_out": {
                "n": len(held_out),
                "sha256": files.sha256_array(
                    *(images.train.read(column, held_out) for column in ("images", "labels"))
                ),
            },
            "overlap": int((trained.visits[held_out] > 0).sum()),
            "steers": training.selects,
            "teacher_overlap": len(held_out) if known else 0,
        },
        "series": {str(step): trained.checkpoints[step][0] for step in series},
        "series_sha256": {str(step): trained.checkpoints[step][1] for step in series},
    }


def finish_run(
    run: Run,
    study: Study,
    images: Images,
    step: str,
    evidence: dict[str, Any],
    rules: Iterable[Callable[[checks.Evidence], checks.Check]],
) -> dict[str, Any]:
    """Apply the checks to the evidence of a run and mark the run finished.

    Returns: The evidence as written.
    Raises: checks.CheckError when a check fails; the run is then not finished.
    """
    evidence = {"step": step, "study": study.name, "data": images.fingerprints} | evidence
    evidence["checks"] = checks.demand(rules, evidence)
    return run.finish(evidence, this_process(study.compute.device).device)
