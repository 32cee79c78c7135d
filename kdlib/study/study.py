"""A study file becomes validated, frozen settings; every other module reads its settings from here.

A study is one YAML file under `params/`. Unknown keys, unknown names, double keys and impossible
values are refused with the nearest known name. A cell is one point of the axes (student, strategy,
fraction, objective) with all its seeds. Leaves to others: what the settings do.
"""

import contextlib
import itertools
import math
import re
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)

from kdlib.repro.files import data_root, difference, fingerprint, nearest, sha256_file, workspace
from kdlib.study.place import study_file

# Every score, and which end of it is difficult: 1 the high one, -1 the low one, 0 neither.
DIFFICULTY = {
    "confidence": -1, "variability": 0, "correctness": -1, "forgetting_events": 1, "aum": -1,
    "el2n": 1, "entropy": 1, "loss": 1, "trend": 0, "dyn_unc": 0, "tdds": 0, "dual": 0, "grand": 1,
    "grand_last": 1, "class_distance": 1, "prototypicality": 1,
}  # fmt: skip


SCORES = tuple(DIFFICULTY)


REGION_STRATEGIES = ("easy", "ambiguous", "ambiguous_corner", "hard")


SHARD_POLICIES = ("fixed_shards", "random_shards")  # whole shards: always the same, or new per pass


RANKINGS = (  # the first n of one order
    "random",
    *REGION_STRATEGIES,
    *(f"{s}_{end}" for s in SCORES for end in ("top", "bottom")),
)


# Rules of their own: the numbers they take (with defaults in `Selection`)
CORESETS: dict[str, tuple[str, ...]] = {
    "mixture": ("shares",),
    "ccs": ("score", "cutoff", "n_strata"),
    "d2": ("score", "neighbours", "gamma_forward", "gamma_reverse"),
    "moderate": (),
    "k_center": (),
    "herding": (),
    "dual_beta": ("concentration", "exponent"),
    "own": ("code", "trust_code", "code_sha256", "options"),
}


SELECTIONS = (  # subsets of an exact number of examples that need no `selections` in the study
    "full",
    *RANKINGS,
    "random_balanced",
    *(name for name in CORESETS if name not in ("mixture", "own")),
)


STRATEGIES = (*SELECTIONS, *SHARD_POLICIES)


PICKED = "picked_"  # and a name: a selection that was made by hand and saved


MODELS = (
    "tiny_cnn", "cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44",
    "cifar_resnet56", "mlperf_resnet8",
)  # fmt: skip


SOURCES = ("digits", "mnist", "cifar10", "cifar100", "folder", "huggingface")


STEPS = ("scores", "noise", "audit")  # of the pipeline, that can be asked for by name


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


def _strategy(name: str, selections: Iterable[str]) -> None:
    """Refuse a strategy that is neither built in, nor named by the study, nor picked by hand."""
    if not (name.startswith(PICKED) and _NAME.fullmatch(name)):
        _known(name, (*STRATEGIES, *selections, f"{PICKED}<name>"), "strategy")


def _listed(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


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


class Relabel(Settings):
    """Other labels for the training split, to measure what finds wrong ones: noise that is drawn
    (`noise`), or labels of a file (`file`, `key`). The source's own labels are kept beside them and
    taken as the truth; no training reads them."""

    noise: float | None = Field(None, gt=0, le=1)  # probability that a label is replaced
    # by any other class with equal probability, or always by the next one
    kind: Literal["symmetric", "next_class"] = "symmetric"
    seed: int = Field(0, ge=0)
    file: str | None = None  # .npz; a relative path is looked up in the data folder
    key: str | None = None  # its array: one label in [0, n_classes) for each training image

    @model_validator(mode="after")
    def _one_origin(self) -> "Relabel":
        if (self.noise is None) == (self.file is None) or (self.file is None) != (self.key is None):
            raise ValueError("other labels are drawn (`noise`) or read (`file` and `key`)")
        return self


class Data(Settings):
    """Which images. `n_validation` training images are held out, the same for teacher and students
    of the study."""

    source: str
    # source `folder` only: a path with train/<class>/ and test/<class>/; unlabelled: train/, test/
    folder: str | None = None
    test_folder: str = "test"  # of a folder whose test images are in `val`, say
    huggingface: HuggingFace | None = None  # source `huggingface` only
    labelled: bool = True  # False: labels are not read, and stored as -1
    relabel: Relabel | None = None  # other labels for the training split
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
        if self.relabel is not None and not self.labelled:
            raise ValueError("`relabel` replaces labels, and `labelled: false` says there are none")
        return self

    def part_of(self, split: str) -> tuple[int, int]:
        """(i, k): part i of k of a split's shards is learnt from; the test split stays whole."""
        return parse_part(self.part) if split == "train" else (1, 1)


def cache_folder(data: Data) -> Path:
    """Folder of the cache of these images, wherever they are asked for."""
    content = data.model_dump(exclude={"n_validation", "split_seed", "part"})
    if content["relabel"] is None:  # as before there was such a key
        del content["relabel"]
    return workspace() / "cache" / f"{data.source}-{fingerprint(content)[:8]}"


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

    A commit stays what it is; a branch or tag runs whatever it names on that day.

    Raises: ValueError for anything else.

    >>> parse_hub("hub/facebookresearch/dinov2:main/dinov2_vits14")
    ('facebookresearch/dinov2:main', 'dinov2_vits14')
    """
    found = re.fullmatch(r"hub/([\w.-]+/[\w.-]+:[\w.-]+)/(\w+)", name, re.ASCII)
    if not found:
        raise ValueError(
            f"{name!r} is no torch.hub network; expected hub/<owner>/<repository>:<commit, "
            "tag or branch>/<entry>"
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
    # validation loss has not fallen for more than `patience` evaluations, `one_cycle` falls to 0 in
    # a line
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
    # stop when the validation loss has not fallen for more than so many evaluations; the budget is
    # then a bound, and runs that used other parts of it are compared as `early_stopping`
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
    # of the study's further teachers: `subset` trains one for each subset and seed, on nothing
    # else, so that its soft labels cannot tell the student of what was left out
    learns_from: Literal["train", "subset"] = "train"

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
        if self.mean is not None and self.training is not None:
            raise ValueError(
                "`mean` and `std` are of a teacher that was trained elsewhere; one that is trained "
                "here sees pixels normalised as its students'"
            )
        if self.std is not None and (len(self.mean) != len(self.std) or min(self.std) <= 0):
            raise ValueError(
                f"mean is {self.mean}, std is {self.std}; expected a number per channel, std > 0"
            )
        if self.learns_from == "subset" and self.training is None:
            raise ValueError("a teacher of the subset alone is trained here: give `training`")
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
    # epoch (counted from 1) after which the gradient of every example is measured; None: no
    # `grand` and `grand_last` in the datamap
    gradient_epoch: int | None = Field(None, ge=1)
    clusters: int | None = Field(None, ge=1)  # of `prototypicality`; None: as many as classes

    @model_validator(mode="after")
    def _whole(self) -> "Dynamics":
        if self.logits and self.window < 3:
            raise ValueError("`tdds`, of kept logits, needs a `window` of at least 3 epochs")
        if (self.model is None) != (self.training is None):
            raise ValueError("`model` and `training` of dynamics go together")
        return self


class Recordings(Settings):
    """Further recorded trainings of the same images, from labels alone: how far two runs agree on a
    score, and which scores find wrong labels. Notebooks 07 and 08 read them."""

    models: dict[str, Model] = Field(min_length=1)
    training: Training | None = None  # None: that of the recorded training of the study
    seeds: tuple[int, ...] = Field(min_length=2)  # each of them for each model
    # cross-validation with the first model: each image judged by a network that has not learnt it
    folds: int | None = Field(None, ge=2)
    # two trainings of the first model in which some images pretend to be of one more class
    threshold_samples: bool = False

    @model_validator(mode="after")
    def _valid(self) -> "Recordings":
        for name in self.models:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} names a folder; expected letters, digits, _, - or .")
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {self.seeds}; expected distinct integers >= 0")
        return self

    def runs(self) -> list[tuple[str, str]]:
        """Every recording as (model, part): `seed=0`, `fold=1`, `threshold=1`, ..."""
        first = next(iter(self.models))
        found = [(model, f"seed={seed}") for model in self.models for seed in self.seeds]
        found += [(first, f"fold={k}") for k in range(1, (self.folds or 0) + 1)]
        return found + [(first, f"threshold={k}") for k in (1, 2) if self.threshold_samples]


class Student(Settings):
    """A student's network; weights are always drawn at random from the run's seed."""

    model: Model

    @model_validator(mode="after")
    def _trainable(self) -> "Student":
        if self.model.name.startswith("hub/"):
            raise ValueError(
                f"{self.model.name} comes with its weights; a student begins from none"
            )
        return self


class Code(Settings):
    """What may come from a Python file of the study's own, as `kind: own`;
    `kdlib.study.own_code` runs it."""

    code: str | None = None  # the file, relative to the workspace
    code_sha256: str | None = None  # None: that of the file as it is
    trust_code: Literal[True] | None = None  # the file runs here, as the user who runs the study
    options: dict[str, float] | None = None  # numbers for its functions

    # left out where they are not given: settings written before there were these read the same
    _OWN: ClassVar[tuple[str, ...]] = ("code", "code_sha256", "trust_code", "options")

    @model_validator(mode="before")
    @classmethod
    def _name_the_code(cls, content: Any) -> Any:
        if not isinstance(content, dict) or not isinstance(content.get("code"), str):
            return content
        path = workspace() / content["code"]
        found = None
        with contextlib.suppress(OSError):  # a name too long, say; a device would never end
            if path.is_file() and path.stat().st_size <= _MOST_BYTES:
                found = sha256_file(path)
        if found is None:
            raise ValueError(
                f"no file {_short(str(path))} that can be read; expected a Python file of at most "
                f"{_MOST_BYTES:,} bytes (study: code)"
            )
        if (content.get("code_sha256") or found) != found:
            raise ValueError(
                f"{path} has sha256 {found}; expected {content['code_sha256']}: read what it does "
                "now, then write its new sha256, or leave `code_sha256` out"
            )
        return content | {"code_sha256": found}

    @model_serializer(mode="wrap")
    def _without_code(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {k: v for k, v in dump(self).items() if k not in self._OWN or v is not None}


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
    "own": (("code", "trust_code", "reads"), ("code_sha256", "options")),
}


_OUTPUTS = r"logits|features|(stage|attention)[1-9]\d*"  # of a network


UNTAUGHT = ("cross_entropy", "label_smoothing")  # objectives that read no teacher


class Objective(Code):
    """What a student minimises; `kdlib.trainer.objectives` has formula and paper of each.

    `alpha` weights the soft loss: (1 - alpha) * CE + alpha * temperature**2 * KL. All others add
    their terms to CE, except `tokens`, whose labels train the last layer alone.
    """

    kind: Literal[
        "cross_entropy", "label_smoothing", "kd", "mse", "dkd", "dist", "hint", "attention", "rkd",
        "similarity", "crd", "tokens", "own",
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
    teacher: str | None = None  # one of the study's `teachers`; None: its `teacher`
    reads: tuple[str, ...] | None = None  # of `own`: outputs of student and teacher

    _OWN: ClassVar[tuple[str, ...]] = (*Code._OWN, "reads")

    @model_validator(mode="after")
    def _fitting(self) -> "Objective":
        needs, takes = OBJECTIVES[self.kind]
        given = {k for k, v in self if k not in ("kind", "teacher") and v is not None}
        if self.teacher is not None and (self.kind in UNTAUGHT or self.reads == ()):
            raise ValueError(f"{self.kind} hears no teacher, and names {self.teacher!r}")
        if not set(needs) <= given <= {*needs, *takes}:
            may = f", and may have {sorted(takes)}" if takes else ""
            raise ValueError(
                f"{self.kind} takes {sorted(needs) or 'no numbers'}{may}; "
                f"got {sorted(given) or 'none'}"
            )
        wrong = [n for n in self.reads or () if not re.fullmatch(_OUTPUTS, n)]
        if wrong or len(set(self.reads or ())) < len(self.reads or ()):
            raise ValueError(
                f"reads are {self.reads}; expected logits, features, stage1, attention1, ..., each "
                "once, or none"
            )
        return self


class Selection(Code):
    """A way to choose a subset, where a built-in name does not say enough.

    `kind` is a ranking of the datamap (such as `random`, `easy`, `aum_bottom`) or a rule of its
    own; `kdlib.cartography.coresets` has formula and paper of each.
    """

    kind: str
    balanced: bool = False  # as many examples of each class as there are, or as the others have
    # of `mixture`: rankings and their shares of the budget, which sum to 1
    shares: dict[str, float] | None = None
    score: str | None = None  # of `ccs` (None: aum) and `d2` (None: forgetting_events)
    cutoff: float | None = Field(None, ge=0, lt=1)  # of `ccs`: share of the hardest left out
    n_strata: int | None = Field(None, ge=1)  # of `ccs`
    neighbours: int | None = Field(None, ge=1)  # of `d2`
    gamma_forward: float | None = Field(None, ge=0)  # of `d2`
    gamma_reverse: float | None = Field(None, ge=0)  # of `d2`
    concentration: float | None = Field(None, gt=0)  # of `dual_beta`
    exponent: float | None = Field(None, gt=0)  # of `dual_beta`

    @model_validator(mode="after")
    def _fitting(self) -> "Selection":
        _known(self.kind, (*RANKINGS, *CORESETS), "selection")
        takes = CORESETS.get(self.kind, ())
        given = [k for k, v in self if k not in ("kind", "balanced") and v is not None]
        if stray := sorted(set(given) - set(takes)):
            raise ValueError(f"{self.kind} takes {list(takes) or 'no numbers'}; got {stray}")
        if self.score is not None:
            _known(self.score, [s for s, sign in DIFFICULTY.items() if sign], "score of difficulty")
        if (self.kind == "own") != bool(self.code and self.trust_code):
            raise ValueError(
                "a selection of one's own needs `code`, a file, and `trust_code: true`"
            )
        if (self.kind == "mixture") != bool(self.shares):
            raise ValueError("a mixture needs `shares`: rankings and their parts of the budget")
        for ranking in self.shares or ():
            _known(ranking, RANKINGS, "ranking")
        if self.shares and (
            min(self.shares.values()) < 0 or not math.isclose(sum(self.shares.values()), 1)
        ):
            raise ValueError(f"shares are {self.shares}; expected numbers >= 0 that sum to 1")
        return self


def built_in_rule(strategy: str) -> Selection:
    """The rule behind a strategy that needs no `selections` in the study.

    Raises: KeyError for a strategy that follows no rule, such as `full`.
    """
    if strategy == "random_balanced":
        return Selection(kind="random", balanced=True)
    if strategy not in (*RANKINGS, *CORESETS):
        raise KeyError(strategy)
    return Selection(kind=strategy)


class Axes(Settings):
    """The axes of the sweep; the full set is one more strategy, run once per objective."""

    student: tuple[str, ...] = Field(min_length=1)
    strategy: tuple[str, ...] = Field(min_length=1)
    fraction: tuple[float, ...] = Field(min_length=1)
    objective: tuple[str, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _valid(self) -> "Axes":
        if any(not 0 < f <= 1 for f in self.fraction):
            raise ValueError(f"fractions are {self.fraction}; expected values in (0, 1]")
        for axis in AXES:
            if len(set(getattr(self, axis))) != len(getattr(self, axis)):
                raise ValueError(f"axis {axis} names a value twice: {getattr(self, axis)}")
        return self


class Probe(Settings):
    """Which cells are probed, and how."""

    strategy: tuple[str, ...] = Field(("full", "random"), min_length=1)
    fraction: float = Field(gt=0, le=1)
    objective: tuple[str, ...] = Field(min_length=1)
    k: int = Field(20, ge=1)  # neighbours
    # inverse regularisation, on standardised features: 45 values from 1e-6 to 1e5
    c_grid: tuple[float, ...] = tuple(10.0 ** (k / 4) for k in range(-24, 21))
    # labelled examples of each class, for probes of few; each drawn so many times
    few_shot: tuple[int, ...] = ()
    few_shot_draws: int = Field(5, ge=1)
    # `features`, what the last layer reads (of a transformer what timm hands its classifier), and
    # the mean of a stage's grid, `stage1`, ...
    layers: tuple[str, ...] = ("features",)
    others: dict[str, Data] = {}  # further data sets on which the same networks are probed
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _fitting(self) -> "Probe":
        for name in self.others:
            if not _NAME.fullmatch(name) or name == "own":
                raise ValueError(
                    f"{name!r} names rows and a folder; expected letters, digits, _, - or ., and "
                    "not `own`, which is the study's data"
                )
        if not self.c_grid or min(self.c_grid) <= 0:
            raise ValueError(f"c_grid is {self.c_grid}; expected numbers > 0")
        strange = [x for x in self.layers if not re.fullmatch(r"features|stage[1-9]\d*", x)]
        if strange or "features" not in self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError(
                f"layers are {self.layers}; expected features, and stage1, stage2, ..., each once"
            )
        if any(n < 1 for n in self.few_shot) or len(set(self.few_shot)) < len(self.few_shot):
            raise ValueError(f"few_shot is {self.few_shot}; expected different integers >= 1")
        return self


# What a study compares, and the column of the results table that holds it.
MEASURES = {"accuracy": "test_accuracy", "linear": "linear_accuracy", "knn": "knn_accuracy"}


class Compare(Settings):
    """What, against what, and how small a difference counts as none."""

    # test accuracy of the student's own last layer, or of a probe of its features at the last step
    measure: Literal["accuracy", "linear", "knn"] = "accuracy"
    baseline: str = "random"
    # each objective of the axis minus this one, beside each minus the one without a teacher
    objective: str | None = None
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
    # the same bytes on every x86-64 processor with AVX2, but for `grand`: nothing newer is used
    portable: bool = False
    processes: int = Field(1, ge=1)  # that share each batch, under torchrun
    # where pixels are kept: on the device, or mapped from the disk; `auto` looks at the memory.
    # Changes no result
    images: Literal["auto", "resident", "mapped"] = "auto"

    @model_validator(mode="after")
    def _refuse_what_is_of_one_machine(self) -> "Compute":
        asked = {"device": self.device != "cpu", "precision": self.precision != "float32",
                 "compile": self.compile}  # fmt: skip
        if self.portable and any(asked.values()):
            key = next(key for key, is_so in asked.items() if is_so)
            raise ValueError(
                f"portable: true and {key}: {getattr(self, key)} exclude each other; the same "
                "bytes on every processor are those of float32 on a CPU, not compiled"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_portable(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # left out where it is not asked for: settings written before there was it read the same
        return {k: v for k, v in dump(self).items() if k != "portable" or v}


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
        parts = dict(self.items()) | {"fraction": repr(self.fraction).removesuffix(".0")}
        return Path(*(f"{axis}={value}" for axis, value in parts.items()))

    def items(self) -> Iterable[tuple[str, str | float]]:
        return asdict(self).items()


class Study(Settings):
    """A whole study. `name` is the file's stem and names folders in `runs/` and `figures/`."""

    name: str
    # another study's file beside this one, whose images, teacher, recorded dynamics and datamap are
    # used here and not made again; this study must ask for the same
    shares: str | None = None
    data: Data
    teacher: Teacher
    teachers: dict[str, Teacher] = {}  # further ones, for objectives that name them
    dynamics: Dynamics = Dynamics()
    recordings: Recordings | None = None
    audit: bool = False  # also make notebook 09: what two earlier studies measured, in miniature
    selections: dict[str, Selection] = {}  # further strategies, by name
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
    _upstream: "Study | None" = PrivateAttr(None)

    @field_validator("name", "students", "objectives", "selections", "teachers")
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
        for name in self.selections:
            if name in STRATEGIES or name.startswith(PICKED):
                raise ValueError(f"selection {name!r} has the name of a built-in strategy")
        for name in self.axes.strategy:
            _strategy(name, self.selections)
        for name in self.axes.objective:
            _known(name, tuple(self.objectives), "objective")
        for name in self.probe.objective:
            _known(name, self.axes.objective, "objective to probe")
        for name in self.probe.strategy:
            _known(name, ("full", *self.axes.strategy), "strategy to probe")
            if name.startswith(PICKED):
                raise ValueError(f"{name} has a fraction of its own and cannot be probed")
        if self.probe.fraction not in self.axes.fraction:
            raise ValueError(
                f"probe.fraction is {self.probe.fraction}; expected one of axes.fraction"
            )
        _known(self.compare.baseline, self.axes.strategy, "baseline strategy")
        if self.compare.objective is not None:
            _known(self.compare.objective, self.axes.objective, "objective to compare with")
        if self.compare.measure != "accuracy":
            self._all_probed()
        if len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {self.seeds}; expected distinct integers >= 0")
        if self.teacher.training is None and self.dynamics.model is None:
            raise ValueError(
                "a loaded teacher has no recorded training: give `dynamics` a model and a training"
            )
        trained = [self.training, self.dynamics.training, self.teacher.training]
        trained += [teacher.training for teacher in self.teachers.values()]
        for training in filter(None, trained):
            pieces = training.accumulate * self.compute.processes
            if training.batch_size % pieces:
                raise ValueError(
                    f"batch_size {training.batch_size} cannot be split among "
                    f"{self.compute.processes} processes, each in {training.accumulate} pieces; "
                    f"expected a multiple of {pieces}"
                )
        if self.compute.portable:
            self._portable([training for training in trained if training is not None])
        recorded = self.dynamics.training or self.teacher.training
        if recorded.early_stopping is not None:
            raise ValueError(
                "`early_stopping` is for students: every epoch of the recorded training is planned"
            )
        self._consistent_teachers()
        everyone = (self.teacher, *self.teachers.values())
        contaminated = any(teacher.trained_on == "train" for teacher in everyone)
        if contaminated and (how := self.training.selects):
            raise ValueError(
                f"`{how}` reads the validation images, which the teacher has learnt from "
                "(trained_on: train), so that its students have heard of them: take another "
                "teacher, or a budget that looks at nothing"
            )
        for name, objective in self.objectives.items():
            if objective.kind in ("hint", "attention", "similarity", "tokens"):
                self._seen_alike(name)
            if objective.barlow_weight is not None and self.training.augment == Augment():
                raise ValueError(
                    f"objective {name} compares two views of each image: give training.augment"
                )
        return self

    def _portable(self, trained: list[Training]) -> None:
        """torch leaves square roots and logarithms of whole tensors to a library of a maker of
        processors, which takes them otherwise on another one, whatever it is asked."""
        asked = {"optimiser: adamw": any(training.optimiser == "adamw" for training in trained),
                 "outputs: top_k": self.teacher.outputs.top_k is not None}  # fmt: skip
        for name, objective in self.objectives.items():
            roots = objective.kind == "rkd" or objective.standardise or objective.barlow_weight
            asked[f"objective {name}"] = bool(roots)
        if any(asked.values()):
            culprit = next(what for what, is_so in asked.items() if is_so)
            raise ValueError(
                f"compute.portable: true cannot be kept with {culprit}: it takes square roots or "
                "logarithms that differ between processors; leave one of them out"
            )

    def _consistent_teachers(self) -> None:
        if self.teacher.learns_from == "subset":
            raise ValueError(
                "the study's teacher learns from all training images; one that learns from the "
                "subset alone stands under `teachers`"
            )
        for name, teacher in self.teachers.items():
            if teacher.outputs != Outputs():
                raise ValueError(
                    f"teacher {name} has `outputs`; those of `teacher` hold for all: students of "
                    "one study see the same views"
                )
        for name, objective in self.objectives.items():
            if objective.teacher is not None:
                _known(objective.teacher, tuple(self.teachers), f"teacher of objective {name}")

    def _all_probed(self) -> None:
        """A probe can be compared only where every cell has one."""
        wanted = {
            "strategy": {"full", *self.axes.strategy},
            "objective": set(self.axes.objective),
            "fraction": set(self.axes.fraction),
        }
        probed = {a: {*_listed(getattr(self.probe, a))} for a in wanted}
        if lacking := {a: sorted(v - probed[a]) for a, v in wanted.items() if v - probed[a]}:
            raise ValueError(
                f"compare.measure is {self.compare.measure}, but not every cell is probed: "
                f"probe lacks {lacking}; add them, or compare accuracy"
            )
        if picked := [s for s in self.axes.strategy if s.startswith(PICKED)]:
            raise ValueError(
                f"compare.measure is {self.compare.measure}, but {picked} have fractions of their "
                "own, which are not probed: compare accuracy"
            )

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
        return cache_folder(self.data)

    @property
    def upstream(self) -> "Study":
        """The study that makes images, teacher, recorded dynamics and datamap: this one, or the one
        it shares them with."""
        return self._upstream or self

    @property
    def recorded_run(self) -> Path:
        """Folder of the run whose training dynamics make the datamap."""
        made = "teacher" if self.dynamics.model is None else "dynamics"
        return self.upstream.runs / made

    def share(self, other: "Study") -> "Study":
        """This study with the images, teacher, recorded dynamics and datamap of another one.

        Raises: StudyError with the differences, where this study asks for something else.
        """
        lines = []
        for step in ("cache", "teacher", "datamap"):
            ours, theirs = self.step_settings(step), other.step_settings(step)
            if step == "teacher":
                missing = set(ours.pop("features_for")) - set(theirs.pop("features_for"))
                lines += [f"objectives: no teacher outputs for {m}" for m in sorted(missing)]
            lines += difference(ours, theirs)
        if other.shares is not None:
            lines.append(f"it shares those of {other.shares} itself: name that one")
        if lines:
            raise StudyError(
                f"{self.name} cannot share the images, teacher and datamap of {other.name} (there "
                "-> here):\n  " + "\n  ".join(lines)
            )
        shared = self.model_copy()
        shared._upstream = other
        return shared

    def selection(self, strategy: str) -> Selection:
        """The rule behind a strategy that chooses an exact number of examples.

        Raises: KeyError for `full`, shard policies and picked selections, which follow no rule.
        """
        if strategy in self.selections:
            return self.selections[strategy]
        return built_in_rule(strategy)

    def picked(self, strategy: str) -> Path:
        """Where the selection behind a strategy `picked_<name>` was saved."""
        return self.runs / "selections" / f"{strategy.removeprefix(PICKED)}.parquet"

    def _own_fraction(self, strategy: str) -> float | None:
        """The fraction that a strategy has by itself; None when the study says it."""
        if strategy == "full":
            return 1.0
        if not strategy.startswith(PICKED):
            return None
        from kdlib.repro.tables import read_parquet  # pandas, only here

        made_by = "the map in notebooks/03_datamap.ipynb and save a selection of that name"
        _, metadata = read_parquet(self.picked(strategy), made_by)
        return float(metadata["fraction"])

    def cells(self) -> list[Cell]:
        """All cells, the full set first; beside a picked selection its baseline of equal size."""
        axes, subsets = self.axes, [("full", 1.0)]
        for strategy in axes.strategy:
            own = self._own_fraction(strategy)
            if own is None:
                subsets += itertools.product([strategy], axes.fraction)
            else:
                subsets += [(strategy, own)]
                if self._own_fraction(self.compare.baseline) is None and strategy != "full":
                    subsets += [(self.compare.baseline, own)]
        subsets = list(dict.fromkeys(subsets))
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
        try:
            _strategy(str(values["strategy"]), self.selections)
            _known(values["student"], tuple(self.students), "student")
            _known(values["objective"], tuple(self.objectives), "objective")
        except ValueError as error:
            raise StudyError(str(error)) from None
        own = self._own_fraction(values["strategy"])
        if own is not None:
            values["fraction"] = own
        try:
            fraction = float(values["fraction"])
        except (TypeError, ValueError):
            fraction = math.nan
        if not 0 < fraction <= 1:
            raise StudyError(f"fraction is {values['fraction']!r}; expected a number in (0, 1]")
        return Cell(values["student"], values["strategy"], fraction, values["objective"])

    def step_settings(
        self, step: str, cell: Cell | None = None, teacher: str | None = None
    ) -> dict[str, Any]:
        """The settings one step reads itself; what it inherits reaches it as fingerprints.

        Args:
            step: cache, teacher, datamap, record, scores, noise, audit, distill, probe or compare.
            cell: The cell, for distill.
            teacher: One of the further teachers, for teacher; None: the study's own.
        """
        out = {"name": True, "shares": True, "tracking": True, "compute": {"images"}}
        dump = self.model_dump(mode="json", exclude=out)
        keys = ("el2n_epoch", "window", "clusters")
        scoring = {key: dump["dynamics"].pop(key) for key in keys}
        reads = {
            f"{o.kind} {o.stage or ' '.join(o.reads or ())}".strip()
            for o in self.objectives.values()
            if o.teacher == teacher
        }
        logits_alone = {"cross_entropy", "label_smoothing", "kd", "mse", "dkd", "dist", "own",
                        "own logits"}  # fmt: skip
        if step == "distill":
            named = cell.strategy in self.selections
            own = self.teachers.get(self.objectives[cell.objective].teacher)
            of_subset = own is not None and own.learns_from == "subset"
            return {
                "student": dump["students"][cell.student],
                "objective": dump["objectives"][cell.objective],
                "subset": {"strategy": cell.strategy, "fraction": cell.fraction}
                | ({"rule": dump["selections"][cell.strategy]} if named else {}),
                "training": dump["training"],
                "compute": dump["compute"],
            } | ({"teacher": own.model_dump(mode="json")} if of_subset else {})
        # replayed views are those of the students' augmentation
        views = {"augment": dump["training"]["augment"]} if self.teacher.outputs.views else {}
        if teacher is not None:
            return views | {
                "teacher": dump["teachers"][teacher],
                "compute": dump["compute"],
                "features_for": sorted(reads - logits_alone),
            }
        return {
            "cache": {"data": dump["data"]},
            "teacher": views
            | {
                **{key: dump[key] for key in ("teacher", "dynamics", "compute")},
                "features_for": sorted(reads - logits_alone),
            },
            "datamap": {"scoring": scoring},
            "record": {
                "recordings": dump["recordings"],
                "training": dump["dynamics"]["training"] or dump["teacher"]["training"],
                "dynamics": {
                    key: dump["dynamics"][key] for key in ("observed", "logits", "gradient_epoch")
                },
                "compute": dump["compute"],
            },
            "audit": {"compute": dump["compute"]},
            "scores": {"scoring": scoring, "recordings": dump["recordings"]},
            "noise": {"scoring": scoring, "recordings": dump["recordings"]},
            "probe": {
                **{
                    key: value
                    for key, value in dump["probe"].items()
                    if key not in ("strategy", "fraction", "objective")
                },
                "compute": dump["compute"],
            },
            "compare": {k: v for k, v in dump.items() if k not in ("recordings", "audit")},
        }[step]


_MOST_BYTES = 2**18  # of a study file; the largest here has 3 kB


_MOST_LINES = 20  # of what is wrong with a study
_MALFORMED = (  # all but the first are what PyYAML lets through, for `!!int x` or [[[[...
    yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError, OverflowError,
    RecursionError,
)  # fmt: skip


# Types of plain scalars in the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section 10.3.2), and
# the characters they begin with ("": the empty scalar). PyYAML follows 1.1, which reads 1e-06 as
# text, 010 as 8, 1:30 as 90 and `no` as false.
_CORE_SCHEMA = (
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),  # before float, which has it
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


class _SafeLoader(yaml.SafeLoader):
    """YAML with the scalars of 1.2, without tags that construct objects, and without keys given
    twice."""

    yaml_implicit_resolvers: ClassVar[dict] = {}  # filled below; none of YAML 1.1

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        # JSON writes a character past U+FFFF as two surrogates, which PyYAML leaves two
        text = super().construct_scalar(node)
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le")

    def construct_core_int(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key is a list or a mapping", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


for _type, _form, _first in _CORE_SCHEMA:
    _SafeLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_type}", re.compile(rf"(?:{_form})\Z"), list(_first)
    )
_SafeLoader.add_constructor("tag:yaml.org,2002:int", _SafeLoader.construct_core_int)


def parse_yaml(text: str) -> Any:
    """The content of a study file's text: mappings, lists, and scalars of the YAML 1.2 core schema.

    Raises: yaml.YAMLError, and what PyYAML lets through (`_MALFORMED`), for text that is not YAML.

    >>> parse_yaml("{a: 1e-3, b: 010, c: 0o10, d: 1:30, e: no, f: true, g: ~}")
    {'a': 0.001, 'b': 10, 'c': 8, 'd': '1:30', 'e': 'no', 'f': True, 'g': None}
    """
    return yaml.load(text, Loader=_SafeLoader)


def _read_yaml(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a study file, laid over that of its `base` where it names one.

    A key of the file replaces that of its base, mappings key by key; `null` takes a key away.
    """
    try:
        if (n_bytes := path.stat().st_size) > _MOST_BYTES:
            raise ValueError(f"{n_bytes:,} bytes; a study has at most {_MOST_BYTES:,}")
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except _MALFORMED as error:
        raise StudyError(f"{path} is not a readable YAML file: {_short(str(error))}") from None
    if not isinstance(content, dict):
        raise StudyError(
            f"{path} holds {type(content).__name__}; expected a mapping with data, "
            "teacher, students, ..."
        )
    if "name" in content:
        raise StudyError(
            f"{path}: `name` is taken from the file name ({path.stem}); remove the key"
        )
    if "base" not in content:
        return content
    base = path.parent / str(content.pop("base"))
    try:
        there = base.is_file()
    except (OSError, ValueError):  # a name that no file can have
        there = False
    if not there or base in (path, *above):
        raise StudyError(
            f"{path}: its base {_short(str(base))} is "
            f"{'itself built on this file' if there else 'no file'}; expected another study file "
            "beside it"
        )
    return _laid_over(_read_yaml(base, (path, *above)), content)


def _short(text: str, most: int = 500) -> str:
    """A text that can stand in a message."""
    return text if len(text) <= most else f"{text[:most]}..."


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(key), dict):
            merged[key] = _laid_over(below[key], value)
        elif value is None:
            merged.pop(key, None)
        else:
            merged[key] = value
    return merged


def load_study(path: str | Path) -> Study:
    """Read and validate a study file.

    Args:
        path: As in `study_file`.

    Raises: FileNotFoundError that lists the studies there are; StudyError that says which key is
        wrong and how.
    """
    found = study_file(path)
    study = _validated(found)
    if study.shares is None:
        return study
    beside = [found.parent / study.shares, workspace() / "params" / study.shares]
    with contextlib.suppress(OSError):  # a name too long, say
        for other in beside:
            if other.is_file() and not other.samefile(found):
                return study.share(_validated(other))
    raise StudyError(
        f"{found}: `shares` names {_short(study.shares)!r}; expected another study file beside it"
    )


def _validated(found: Path) -> Study:
    """The study of a file by itself, whatever it shares."""
    try:
        content = _read_yaml(found, ())
    except RecursionError:  # two mappings that contain themselves, laid over each other
        raise StudyError(f"{found} is nested without end in itself or in its base") from None
    try:
        study = Study.model_validate({"name": found.stem, **content})
    except ValidationError as error:
        lines = [
            _short(f"  {'.'.join(map(str, e['loc'])) or 'study'}: ", 200)
            + _short(e["msg"].removeprefix("Value error, "))
            for e in error.errors()
        ]
        if len(lines) > _MOST_LINES:
            lines[_MOST_LINES:] = [f"  and {len(lines) - _MOST_LINES} more"]
        raise StudyError(f"{found} is not a valid study:\n" + "\n".join(lines)) from None
    return study


def data_path(name: str) -> Path:
    """Where a file named in a study lies: as written if absolute, else in the data root."""
    path = Path(name)
    return path if path.is_absolute() else data_root() / path
