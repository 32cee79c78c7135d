"""A study file becomes validated, frozen settings; every other module reads its settings from here.

A study is one YAML file under `params/`. Unknown keys, unknown names, double keys and impossible
values are refused with the nearest known name. A cell is one point of the axes (student, strategy,
fraction, objective) with all its seeds. Leaves to others: what the settings do.
"""

import ast
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kdlib.files import data_root, fingerprint, nearest, workspace

SCORES = (
    "confidence", "variability", "correctness", "forgetting_events", "aum", "el2n", "entropy",
    "loss", "trend", "dyn_unc", "tdds", "dual",
)  # fmt: skip
REGION_STRATEGIES = ("easy", "ambiguous", "ambiguous_corner", "hard")
SHARD_POLICIES = ("fixed_shards", "random_shards")  # whole shards: always the same, or new per pass
SELECTIONS = (  # subsets of an exact number of examples
    "full",
    "random",
    *REGION_STRATEGIES,
    *(f"{s}_{end}" for s in SCORES for end in ("top", "bottom")),
)
STRATEGIES = (*SELECTIONS, *SHARD_POLICIES)
MODELS = (
    "tiny_cnn", "cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44",
    "cifar_resnet56", "mlperf_resnet8",
)  # fmt: skip
SOURCES = ("digits", "mnist", "cifar10", "cifar100", "folder", "huggingface")
AXES = ("student", "strategy", "fraction", "objective")
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


class StudyError(ValueError):
    """A study file, or a papermill parameter, that cannot mean what was written."""


class Settings(BaseModel):
    """Base of every section: frozen, exactly typed, and refusing unknown keys with the nearest
    known one."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown_keys(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        for key in content:
            if key not in cls.model_fields:
                raise ValueError(f"unknown key {key!r}; {nearest(key, cls.model_fields)}")
        # settings are frozen all the way down: what a file lists is kept as a tuple
        return {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}


def _known(value: str, known: Sequence[str], what: str) -> str:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}; {nearest(value, known)}")
    return value


class HuggingFace(Settings):
    """A data set of the Hugging Face hub, or a local folder or file that `datasets` can read."""

    # `owner/name` on the hub, or a local parquet file or folder (relative: in the data folder)
    dataset: str
    config: str | None = None  # the data set's configuration, where it has several
    revision: str | None = None  # commit of the hub repository; None: the latest, which is recorded
    train_split: str = "train"
    test_split: str = "test"
    image_column: str = "image"
    label_column: str = "label"
    streaming: bool = False  # read once, in order, without keeping the files


class Data(Settings):
    """Which images. `n_validation` training images are held out, the same for teacher and students
    of the study."""

    source: str
    # source `folder` only: a path with train/<class>/ and test/<class>/; unlabelled: train/, test/
    folder: str | None = None
    test_folder: str = "test"  # of a folder whose test images are in `val`, say
    huggingface: HuggingFace | None = None  # source `huggingface` only
    labelled: bool = True  # False: labels are not read, and stored as -1
    n_train: int | None = Field(None, ge=2)  # only the first so many training images
    image_size: int | None = Field(None, ge=4)  # pixels; None keeps the native size
    n_validation: int = Field(ge=1)
    split_seed: int = Field(0, ge=0)
    shard_size: int = Field(2048, ge=1)  # examples per shard
    part: str = "1/1"  # `i/k`: learn from the i-th of k equal runs of shards of the training split

    @field_validator("part")
    @classmethod
    def _fraction(cls, part: str) -> str:
        parse_part(part)
        return part

    @model_validator(mode="after")
    def _consistent(self) -> "Data":
        _known(self.source, SOURCES, "data source")
        if (self.source == "folder") != (self.folder is not None):
            raise ValueError(
                "`folder` is the path of an image folder: give it with `source: folder`, and "
                "only there"
            )
        if (self.source == "huggingface") != (self.huggingface is not None):
            raise ValueError(
                "`huggingface` names a data set of the hub: give it with `source: huggingface`, "
                "and only there"
            )
        if not self.labelled and self.source not in ("folder", "huggingface"):
            raise ValueError(f"{self.source} has labels; `labelled: false` is for other images")
        return self


def parse_part(part: str) -> tuple[int, int]:
    """`i/k` as (i, k), with 1 <= i <= k.

    Raises: ValueError for anything else.

    >>> parse_part("2/8")
    (2, 8)
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", part)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError(f"part is {part!r}; expected i/k with 1 <= i <= k, such as 2/8")
    return int(found[1]), int(found[2])


class Model(Settings):
    """A network: a name of `MODELS`; `timm/<name>` for any timm model, which then gets a small-
    image stem; or `hub/<owner>/<repository>:<commit or tag>/<entry>` of torch.hub, for teachers."""

    name: str
    options: dict[str, int | float | bool | str] = {}

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if name.startswith("hub/"):
            parse_hub(name)
            return name
        known = (*MODELS, "timm/<name>", "hub/<owner>/<repository>:<ref>/<entry>")
        return name if name.startswith("timm/") else _known(name, known, "model")


def parse_hub(name: str) -> tuple[str, str]:
    """`hub/<owner>/<repository>:<ref>/<entry>` as (`owner/repository:ref`, entry).

    Raises: ValueError for anything else; a commit or tag is needed, since branches move.

    >>> parse_hub("hub/facebookresearch/dinov2:main/dinov2_vits14")
    ('facebookresearch/dinov2:main', 'dinov2_vits14')
    """
    found = re.fullmatch(r"hub/([\w.-]+/[\w.-]+:[\w.-]+)/(\w+)", name, re.ASCII)
    if not found:
        raise ValueError(
            f"{name!r} is no torch.hub network; expected hub/<owner>/<repository>:<commit or "
            "tag>/<entry>"
        )
    return found[1], found[2]


class ResizedCrop(Settings):
    """Ranges of a random resized crop, as torchvision defines it."""

    scale: tuple[float, float] = (0.08, 1.0)  # area of the crop, as a fraction of the image's
    ratio: tuple[float, float] = (0.75, 4 / 3)  # width / height

    @model_validator(mode="after")
    def _ordered(self) -> "ResizedCrop":
        if not 0 < self.scale[0] <= self.scale[1] <= 1 or not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(
                f"scale is {self.scale} and ratio {self.ratio}; expected 0 < scale <= 1 and "
                "0 < ratio, the lower end first"
            )
        return self


class ColourJitter(Settings):
    """Largest changes of colour, as torchvision defines them: a factor is drawn from
    [max(0, 1 - x), 1 + x], the hue's shift from [-hue, hue] turns."""

    brightness: float = Field(0.0, ge=0, le=8)
    contrast: float = Field(0.0, ge=0, le=8)
    saturation: float = Field(0.0, ge=0, le=8)
    hue: float = Field(0.0, ge=0, le=0.5)


class Augment(Settings):
    """Random views of a training image; all off by default."""

    # pixels of zero padding before a random crop of the native size
    crop_padding: int = Field(0, ge=0)
    flip: bool = False  # mirror left-right with probability 1/2
    resized_crop: ResizedCrop | None = None  # instead of the padded crop
    colour_jitter: ColourJitter | None = None

    @model_validator(mode="after")
    def _one_crop(self) -> "Augment":
        if self.crop_padding and self.resized_crop:
            raise ValueError("give one crop: either `crop_padding` or `resized_crop`")
        return self


class Training(Settings):
    """One budget and one optimiser. The budget is a number of optimiser steps, given as such or as
    epochs."""

    # equal-steps comparison: the same number for every subset
    steps: int | None = Field(None, ge=1)
    # equal-epochs comparison: steps follow from the subset's size
    epochs: float | None = Field(None, gt=0)
    batch_size: int = Field(ge=1)
    optimiser: Literal["sgd", "adamw"] = "sgd"
    lr_peak: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(5e-4, ge=0)
    # after the warm-up; `step` multiplies by `decay` at each of `milestones`, `plateau` when the
    # validation loss has not fallen for `patience` evaluations, `one_cycle` falls linearly to 0
    schedule: Literal["cosine", "constant", "step", "one_cycle", "plateau"] = "cosine"
    warmup_steps: int = Field(0, ge=0)  # the learning rate rises linearly over them
    milestones: tuple[float, ...] = ()  # of `step`, as fractions of the budget
    decay: float = Field(0.1, gt=0, lt=1)  # of `step` and `plateau`
    patience: int = Field(5, ge=1)  # of `plateau`, evaluations
    clip_norm: float | None = Field(None, gt=0)  # largest norm of a step's whole gradient
    # a step's batch in so many pieces, one after another, where memory is short; BatchNorm then
    # sees a piece at a time
    accumulate: int = Field(1, ge=1)
    # students are measured and kept with the running mean of their weights, whose decay this is
    ema: float | None = Field(None, gt=0, lt=1)
    # stop when the validation loss has not fallen for so many evaluations; the budget is then a
    # bound, and runs that used other parts of it are compared as `early_stopping`
    early_stopping: int | None = Field(None, ge=1)
    augment: Augment = Augment()
    # of each pass: `shuffled` draws from the whole training set; `windowed` permutes the shards and
    # shuffles within so many of them, for caches larger than memory; `sequential` is by example id
    order: Literal["shuffled", "windowed", "sequential"] = "shuffled"
    window_shards: int = Field(8, ge=1)
    # None: once per pass over the full training split
    evaluate_every_steps: int | None = Field(None, ge=1)
    # weights kept for probing, as fractions of the budget
    checkpoint_fractions: tuple[float, ...] = ()

    @model_validator(mode="after")
    def _one_budget(self) -> "Training":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the budget once: either `steps` or `epochs`")
        if any(not 0 <= f <= 1 for f in self.checkpoint_fractions):
            raise ValueError(
                f"checkpoint_fractions are {self.checkpoint_fractions}; expected values in [0, 1]"
            )
        if (self.schedule == "step") != bool(self.milestones):
            raise ValueError("`milestones` belong to `schedule: step`, and it needs some")
        if any(not 0 < m < 1 for m in self.milestones):
            raise ValueError(f"milestones are {self.milestones}; expected fractions in (0, 1)")
        if self.schedule == "one_cycle" and self.warmup_steps == 0:
            raise ValueError("`schedule: one_cycle` rises before it falls; give `warmup_steps`")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"a batch of {self.batch_size} is not a multiple of accumulate {self.accumulate}"
            )
        return self

    @property
    def selects(self) -> str | None:
        """The setting by which validation images steer this training; None when they do not."""
        if self.early_stopping is not None:
            return "early_stopping"
        return "schedule: plateau" if self.schedule == "plateau" else None

    def n_steps(self, n_examples: int) -> int:
        """Optimiser steps of the budget for a training set of `n_examples`."""
        if self.steps is not None:
            return self.steps
        # as written: 0.07 epochs of 100 examples are 7, where floats make 7.000000000000001
        return math.ceil(Fraction(str(self.epochs)) * n_examples / self.batch_size)

    @property
    def comparison(self) -> str:
        """`equal_steps`, `equal_epochs` or `early_stopping`: the only kind of comparison this
        budget allows."""
        if self.early_stopping is not None:
            return "early_stopping"
        return "equal_steps" if self.steps is not None else "equal_epochs"


class Outputs(Settings):
    """What of a teacher is stored for its students."""

    # None: logits of the clean image. n: of n replayed views of each, which the students then see
    # in turn, one per pass, all students the same
    views: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)  # of the replayed views
    top_k: int | None = Field(None, ge=1)  # store the k largest logits and the mass of the others


class Teacher(Settings):
    """A network with one origin: trained by this lab (`training`), read from a weight file
    (`weights`), or published with its weights (`pretrained`, of timm or torch.hub)."""

    model: Model
    seed: int = Field(0, ge=0)
    training: Training | None = None
    # a .safetensors file, or a PyTorch checkpoint of plain tensors; a relative path is looked up in
    # the data folder
    weights: str | None = None
    pretrained: bool = False
    trust_code: bool = False  # a torch.hub network is code of others, which runs here
    # which images a loaded teacher has learnt from: `train`, the whole training split, held-out
    # images included; `kept`, the study's training images alone; `elsewhere`, other data
    trained_on: Literal["train", "kept", "elsewhere"] | None = None
    # pixels; the teacher sees images of this size, its students those of the cache
    image_size: int | None = Field(None, ge=4)
    # per channel, pixels in [0, 1]; None: measured on the training split
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    # the card: what the teacher claims on the test split; of a network without classifier, what the
    # nearest neighbours of its features say
    expected_accuracy: float = Field(ge=0, le=1)
    # by how much the measured accuracy may lie below the claim
    tolerance: float = Field(0.005, ge=0)
    outputs: Outputs = Outputs()

    @model_validator(mode="after")
    def _one_origin(self) -> "Teacher":
        if (self.training is not None) + (self.weights is not None) + self.pretrained != 1:
            raise ValueError(
                "a teacher is either trained (`training`), loaded (`weights`) or `pretrained`: "
                "give one of them"
            )
        if (self.training is None) != (self.trained_on is not None):
            raise ValueError(
                "`trained_on` says which images a loaded teacher has learnt from: train, kept or "
                "elsewhere; give it with `weights` or `pretrained`, and only there"
            )
        hub = self.model.name.startswith("hub/")
        if hub and not (self.pretrained and self.trust_code):
            raise ValueError(
                f"{self.model.name} is code of others, which would run here: read it, then write "
                "`trust_code: true` and `pretrained: true`; it cannot be trained"
            )
        if self.pretrained and not self.model.name.startswith(("timm/", "hub/")):
            raise ValueError(f"{self.model.name} has no published weights; give `weights`")
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` go together")
        return self


class Dynamics(Settings):
    """Whose training is recorded for the datamap, and how. Without `model` it is the teacher's own
    training."""

    # `train`: the training pass itself; `eval`: a clean pass after each epoch
    observed: Literal["train", "eval"] = "train"
    logits: bool = False  # also store all logits (needed by `tdds`)
    model: Model | None = None
    training: Training | None = None
    seed: int = Field(0, ge=0)
    el2n_epoch: int = Field(10, ge=1)  # recorded epoch (counted from 1) at which el2n is read
    window: int = Field(10, ge=2)  # epochs per window of dyn_unc, tdds and dual

    @model_validator(mode="after")
    def _whole(self) -> "Dynamics":
        if (self.model is None) != (self.training is None):
            raise ValueError("`model` and `training` of dynamics go together")
        return self


class Student(Settings):
    """A student's network; weights are always drawn at random from the run's seed."""

    model: Model


# What each objective takes: numbers that must be given, and those that have a default.
OBJECTIVES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cross_entropy": ((), ()),
    "label_smoothing": (("smoothing",), ()),
    "kd": (("alpha", "temperature"), ("standardise",)),
    "mse": (("alpha",), ()),
    "dkd": (("target_weight", "rest_weight", "temperature"), ("standardise",)),
    "dist": (("inter_weight", "intra_weight", "temperature"), ("standardise",)),
    "hint": (("weight",), ("stage",)),
    "attention": (("weight",), ()),
    "rkd": (("distance_weight", "angle_weight"), ()),
    "similarity": (("weight",), ("stage",)),
    "crd": (("weight", "temperature"), ("width",)),
    "tokens": (("cls_weight", "patch_weight"), ("barlow_weight",)),
}


class Objective(Settings):
    """What a student minimises; `kdlib.objectives` has formula and paper of each.

    `alpha` weights the soft loss: (1 - alpha) * CE + alpha * temperature**2 * KL. All others add
    their terms to CE, except `tokens`, whose labels train the last layer alone.
    """

    kind: Literal[
        "cross_entropy", "label_smoothing", "kd", "mse", "dkd", "dist", "hint", "attention", "rkd",
        "similarity", "crd", "tokens",
    ]  # fmt: skip
    alpha: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(None, gt=0)
    smoothing: float | None = Field(None, ge=0, lt=1)
    standardise: bool | None = None  # logits to mean 0 and variance 1 before the temperature
    weight: float | None = Field(None, gt=0)  # of the one term beside CE
    target_weight: float | None = Field(None, ge=0)  # of DKD: gold class against the others
    rest_weight: float | None = Field(None, ge=0)  # of DKD: among the others
    inter_weight: float | None = Field(None, ge=0)  # of DIST: classes of an example
    intra_weight: float | None = Field(None, ge=0)  # of DIST: examples of a class
    distance_weight: float | None = Field(None, ge=0)  # of RKD
    angle_weight: float | None = Field(None, ge=0)  # of RKD
    # stage of the networks whose feature grid is read, counted from 1; None: the middle one for
    # `hint`, the last one for `similarity`
    stage: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)  # of CRD's embedding; None: 128
    cls_weight: float | None = Field(None, ge=0)
    patch_weight: float | None = Field(None, ge=0)
    barlow_weight: float | None = Field(None, gt=0)  # None: no second view

    @model_validator(mode="after")
    def _fitting(self) -> "Objective":
        needs, takes = OBJECTIVES[self.kind]
        given = {k for k, v in self if k != "kind" and v is not None}
        if not set(needs) <= given <= {*needs, *takes}:
            may = f", and may have {sorted(takes)}" if takes else ""
            raise ValueError(
                f"{self.kind} takes {sorted(needs) or 'no numbers'}{may}; "
                f"got {sorted(given) or 'none'}"
            )
        return self


class Axes(Settings):
    """The axes of the sweep; the full set is one more strategy, run once per objective."""

    student: tuple[str, ...] = Field(min_length=1)
    strategy: tuple[str, ...] = Field(min_length=1)
    fraction: tuple[float, ...] = Field(min_length=1)
    objective: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _valid(self) -> "Axes":
        for strategy in self.strategy:
            _known(strategy, STRATEGIES, "strategy")
        if any(not 0 < f <= 1 for f in self.fraction):
            raise ValueError(f"fractions are {self.fraction}; expected values in (0, 1]")
        for axis in AXES:
            if len(set(getattr(self, axis))) != len(getattr(self, axis)):
                raise ValueError(f"axis {axis} names a value twice: {getattr(self, axis)}")
        return self


class Probe(Settings):
    """Which cells are probed, and how."""

    strategy: tuple[str, ...] = ("full", "random")
    fraction: float = Field(gt=0, le=1)
    objective: tuple[str, ...] = Field(min_length=1)
    k: int = Field(20, ge=1)  # neighbours
    c_grid: tuple[float, ...] = (
        0.01,
        0.1,
        1.0,
        10.0,
        100.0,
    )  # inverse regularisation, on standardised features
    seed: int = Field(0, ge=0)


class Compare(Settings):
    """Against what, and how small a difference counts as none."""

    baseline: str = "random"
    margin: float = Field(0.01, gt=0, lt=1)  # accuracy; differences inside +-margin are equivalent
    confidence_level: float = Field(0.95, gt=0.5, lt=1)


class Compute(Settings):
    """Where and how tensors are computed; `threads` is fixed because sums depend on it."""

    device: str = "cpu"
    threads: int = Field(1, ge=1)
    channels_last: bool = True
    # `bf16` computes the network's passes in bfloat16, weights and losses in float32
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False  # torch.compile; on a CPU it needs a C++ compiler
    processes: int = Field(1, ge=1)  # that share each batch, under torchrun
    # where pixels are kept: on the device, or mapped from the disk; `auto` looks at the memory.
    # Changes no result
    images: Literal["auto", "resident", "mapped"] = "auto"


class Tracking(Settings):
    """Where metrics go besides the run's own folder; changes no result."""

    tensorboard: bool = False  # event files in the run's folder
    wandb: bool = False  # Weights & Biases; WANDB_MODE=offline keeps it on this machine
    project: str = "kdlib"  # there


@dataclass(frozen=True, order=True)
class Cell:
    """One point of the axes; `path` names its folder."""

    student: str
    strategy: str
    fraction: float
    objective: str

    @property
    def path(self) -> Path:
        return Path(
            *(
                f"{axis}={value:g}" if axis == "fraction" else f"{axis}={value}"
                for axis, value in self.items()
            )
        )

    def items(self) -> Iterable[tuple[str, str | float]]:
        return asdict(self).items()


class Study(Settings):
    """A whole study. `name` is the file's stem and names folders in `runs/` and `figures/`."""

    name: str
    data: Data
    teacher: Teacher
    dynamics: Dynamics = Dynamics()
    students: dict[str, Student] = Field(min_length=1)
    training: Training  # of the students
    objectives: dict[str, Objective] = Field(min_length=1)
    axes: Axes
    # paired: seed s means the same draws in every cell
    seeds: tuple[int, ...] = Field(min_length=2)
    probe: Probe
    compare: Compare = Compare()
    compute: Compute = Compute()
    tracking: Tracking = Tracking()

    @field_validator("name", "students", "objectives")
    @classmethod
    def _fit_for_folders(cls, names: Any) -> Any:
        for name in [names] if isinstance(names, str) else names:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"{name!r} names a folder; expected letters, digits, '_', '-' or '.'"
                )
        return names

    @model_validator(mode="after")
    def _consistent(self) -> "Study":
        for name in self.axes.student:
            _known(name, tuple(self.students), "student on the axis")
        for name in (*self.axes.objective, *self.probe.objective):
            _known(name, tuple(self.objectives), "objective")
        for name in self.probe.strategy:
            _known(name, ("full", *self.axes.strategy), "strategy to probe")
        if self.probe.fraction not in self.axes.fraction:
            raise ValueError(
                f"probe.fraction is {self.probe.fraction}; expected one of axes.fraction"
            )
        _known(self.compare.baseline, self.axes.strategy, "baseline strategy")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {self.seeds}; expected distinct integers >= 0")
        if self.teacher.training is None and self.dynamics.model is None:
            raise ValueError(
                "a loaded teacher has no recorded training: give `dynamics` a model and a training"
            )
        recorded = self.dynamics.training or self.teacher.training
        if recorded.early_stopping is not None:
            raise ValueError(
                "`early_stopping` is for students: every epoch of the recorded training is planned"
            )
        if self.teacher.trained_on == "train" and (how := self.training.selects):
            raise ValueError(
                f"`{how}` reads the validation images, which the teacher has learnt from "
                "(teacher.trained_on: train), so that its students have heard of them: take "
                "another teacher, or a budget that looks at nothing"
            )
        for name, objective in self.objectives.items():
            if objective.kind in ("hint", "attention", "similarity", "tokens"):
                self._seen_alike(name)
            if objective.barlow_weight is not None and self.training.augment == Augment():
                raise ValueError(
                    f"objective {name} compares two views of each image: give training.augment"
                )
        return self

    def _seen_alike(self, name: str) -> None:
        """Grids of features must be of the view the student sees: they cannot be augmented
        afterwards."""
        if self.teacher.outputs.views is None and self.training.augment != Augment():
            raise ValueError(
                f"objective {name} compares grids of features, and the flipped grid is not that of "
                "the flipped image: give teacher.outputs.views, which the students then see, or no "
                "training.augment"
            )

    @property
    def runs(self) -> Path:
        """Folder of everything this study makes except figures and the shared cache."""
        return workspace() / "runs" / self.name

    @property
    def figures(self) -> Path:
        """Folder of this study's figures and tables."""
        return workspace() / "figures" / self.name

    @property
    def cache(self) -> Path:
        """Folder of the image cache; studies that ask for the same images share it."""
        content = self.data.model_dump(exclude={"n_validation", "split_seed", "part"})
        return workspace() / "cache" / f"{self.data.source}-{fingerprint(content)[:8]}"

    @property
    def recorded_run(self) -> Path:
        """Folder of the run whose training dynamics make the datamap."""
        return self.runs / ("teacher" if self.dynamics.model is None else "dynamics")

    def cells(self) -> list[Cell]:
        """All cells, the full set first."""
        axes = self.axes
        subsets = [("full", 1.0)] + [
            p for p in itertools.product(axes.strategy, axes.fraction) if p[0] != "full"
        ]
        return [
            Cell(st, s, f, o) for st in axes.student for s, f in subsets for o in axes.objective
        ]

    def same_subset(self, cell: Cell) -> list[Cell]:
        """The cells that differ from this one in the objective alone, itself included."""
        return [replace(cell, objective=objective) for objective in self.axes.objective]

    def probed_cells(self) -> list[Cell]:
        """The cells whose checkpoints are probed."""
        probe, wanted = self.probe, []
        for cell in self.cells():
            at_fraction = cell.fraction == (1.0 if cell.strategy == "full" else probe.fraction)
            if (
                cell.strategy in probe.strategy
                and cell.objective in probe.objective
                and at_fraction
            ):
                wanted.append(cell)
        return wanted

    def cell(self, **axes: str | float) -> Cell:
        """The cell with these axis values; an axis that is not given takes the study's first value.

        Raises: StudyError for an unknown axis or value. A fraction off the study's axis is allowed:
            it makes a run of its own beside the study's.
        """
        for axis in axes:
            if axis not in AXES:
                raise StudyError(f"unknown axis {axis!r}; {nearest(axis, AXES)}")
        values = {
            axis: axes.get(axis) if axes.get(axis) is not None else getattr(self.axes, axis)[0]
            for axis in AXES
        }
        known = {
            "student": tuple(self.students),
            "strategy": STRATEGIES,
            "objective": tuple(self.objectives),
        }
        for axis, names in known.items():
            if values[axis] not in names:
                raise StudyError(f"unknown {axis} {values[axis]!r}; {nearest(values[axis], names)}")
        if values["strategy"] == "full":
            values["fraction"] = 1.0
        try:
            fraction = float(values["fraction"])
        except (TypeError, ValueError):
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise StudyError(f"fraction is {values['fraction']!r}; expected a number in (0, 1]")
        return Cell(values["student"], values["strategy"], fraction, values["objective"])

    def step_settings(self, step: str, cell: Cell | None = None) -> dict[str, Any]:
        """The settings one step reads itself; what it inherits reaches it as fingerprints.

        Args:
            step: cache, teacher, datamap, distill, probe or compare.
            cell: The cell, for distill.
        """
        dump = self.model_dump(
            mode="json", exclude={"name": True, "tracking": True, "compute": {"images"}}
        )
        scoring = {key: dump["dynamics"].pop(key) for key in ("el2n_epoch", "window")}
        reads = {f"{o.kind} {o.stage or ''}".strip() for o in self.objectives.values()}
        logits_alone = {"cross_entropy", "label_smoothing", "kd", "mse", "dkd", "dist"}
        if step == "distill":
            return {
                "student": dump["students"][cell.student],
                "objective": dump["objectives"][cell.objective],
                "subset": {"strategy": cell.strategy, "fraction": cell.fraction},
                "training": dump["training"],
                "compute": dump["compute"],
            }
        return {
            "cache": {"data": dump["data"]},
            "teacher": {
                **{key: dump[key] for key in ("teacher", "dynamics", "compute")},
                "features_for": sorted(reads - logits_alone),
            },
            "datamap": {"scoring": scoring},
            "probe": {
                **{key: dump["probe"][key] for key in ("k", "c_grid", "seed")},
                "compute": dump["compute"],
            },
            "compare": dump,
        }[step]


class _SafeLoader(yaml.SafeLoader):
    """YAML without tags that construct objects, and without keys given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
        return super().construct_mapping(node, deep)


def load_study(path: str | Path) -> Study:
    """Read and validate a study file.

    Args:
        path: Absolute, or relative to the current folder or to the workspace.

    Raises: FileNotFoundError that lists the studies there are; StudyError that says which key is
        wrong and how.
    """
    candidates = [Path(path), workspace() / path]
    found = next((c for c in candidates if c.is_file()), None)
    if found is None:
        there = sorted(p.name for p in (workspace() / "params").glob("*.yaml"))
        raise FileNotFoundError(
            f"no study file {str(path)!r}; params/ has {', '.join(there) or 'none'}"
        )
    try:
        content = yaml.load(found.read_text(), Loader=_SafeLoader)
    # the last four are what PyYAML lets through, for 2025-02-30 or `!!bool maybe` or [[[[...
    except (yaml.YAMLError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise StudyError(f"{found} is not a readable YAML file: {error}") from None
    if not isinstance(content, dict):
        raise StudyError(
            f"{found} holds {type(content).__name__}; expected a mapping with data, "
            "teacher, students, ..."
        )
    if "name" in content:
        raise StudyError(
            f"{found}: `name` is taken from the file name ({found.stem}); remove the key"
        )
    try:
        return Study.model_validate({"name": found.stem, **content})
    except ValidationError as error:
        lines = [
            f"  {'.'.join(map(str, e['loc'])) or 'study'}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise StudyError(f"{found} is not a valid study:\n" + "\n".join(lines)) from None


def open_point(history: Sequence[str], study: str, **axes: str | float) -> tuple[Study, Cell]:
    """The study and cell a notebook was asked for; the first call of every notebook.

    papermill only warns about a parameter it does not know, so that a typo in a sweep would run the
    default. Its injected cell stands in the notebook's history, where this function reads the names
    it sets.

    Args:
        history: The notebook's `In`: the source of the cells run so far.
        study: Path of the study file.
        axes: The axis values of the parameters cell; empty strings and zeros mean the study's first
            value.

    Raises: StudyError for a parameter the notebook does not have, and whatever `load_study` and
        `Study.cell` raise.
    """
    known = ("study", *axes)
    for source in history:
        if source.startswith("# Parameters"):
            for node in ast.walk(ast.parse(source)):
                if (
                    isinstance(node, ast.Name)
                    and isinstance(node.ctx, ast.Store)
                    and node.id not in known
                ):
                    raise StudyError(
                        f"this notebook has no parameter {node.id!r}; {nearest(node.id, known)}"
                    )
    loaded = load_study(study)
    return loaded, loaded.cell(
        **{axis: value for axis, value in axes.items() if value not in ("", 0, None)}
    )


def weights_path(weights: str) -> Path:
    """Where a weight file named in a study lies: as written if absolute, else in the data root."""
    path = Path(weights)
    return path if path.is_absolute() else data_root() / path
