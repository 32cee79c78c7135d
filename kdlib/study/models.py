"""Networks of a study: any network by its name, the teacher with its origin, the student."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, WithJsonSchema, model_validator

from kdlib.study.base import Count, ImageSize, NonNegative, Seed, Settings, Share, known
from kdlib.study.training import Training

MODELS = (
    "tiny_cnn", "cifar_resnet8", "cifar_resnet20", "cifar_resnet32", "cifar_resnet44",
    "cifar_resnet56", "mlperf_resnet8",
)  # fmt: skip


def parse_hub(name: str) -> tuple[str, str]:
    """`hub/<owner>/<repository>:<ref>/<entry>` as (`owner/repository:ref`, entry).

    A commit names fixed code; a branch or a tag can be moved to other code later.

    Raises: ValueError for anything else.

    >>> parse_hub("hub/facebookresearch/dinov2:main/dinov2_vits14")
    ('facebookresearch/dinov2:main', 'dinov2_vits14')
    """
    match = re.fullmatch(r"hub/([\w.-]+/[\w.-]+:[\w.-]+)/(\w+)", name, re.ASCII)
    if not match:
        raise ValueError(
            f"{name!r} is no torch.hub network; expected hub/<owner>/<repository>:<commit, "
            "tag or branch>/<entry>"
        )
    return match[1], match[2]


def _network_name(name: str) -> str:
    if name.startswith("hub/"):
        parse_hub(name)
    elif not name.startswith("timm/"):
        known(name, (*MODELS, "timm/<name>", "hub/<owner>/<repository>:<ref>/<entry>"), "model")
    return name


class Model(Settings):
    """A network and the options of its constructor."""

    name: Annotated[
        str,
        AfterValidator(_network_name),
        WithJsonSchema(
            {"anyOf": [{"enum": list(MODELS)}, {"type": "string", "pattern": "^(timm|hub)/"}]}
        ),
    ]
    """A built-in network; `timm/<name>` for any timm model, which gets a stem for small images; or
    `hub/<owner>/<repository>:<commit or tag>/<entry>` of torch.hub, for teachers."""
    options: dict[str, int | float | bool | str] = Field(default_factory=dict)


def untagged(model: Model) -> Model:
    """A model to draw at random, whose name has no tag of published weights.

    Raises: ValueError.
    """
    if model.name.startswith("timm/") and "." in model.name:
        raise ValueError(
            f"{model.name} names published weights (after the dot), and its weights are drawn at "
            f"random here: leave the tag out ({model.name.partition('.')[0]}), or, of a teacher or "
            "student, write `pretrained: true`"
        )
    return model


Drawn = Annotated[Model, AfterValidator(untagged)]  # a network whose weights are drawn at random


class Begun(Settings):
    """A network to train, and where its first weights come from: drawn from the seed, or given.
    Images are normalised with the study's statistics, whatever the weights were made with."""

    model: Model
    pretrained: Literal[True] | None = None
    """Begin from the weights that timm publishes for this network (a tag may follow its name:
    `timm/resnet50.a1_in1k`), with the stem for photographs unless the model's `stem` says
    otherwise. A last layer for another number of classes is drawn from the seed."""
    weights: str | None = None
    """Begin from a file, as of a loaded teacher; its last layer may be missing, or be for another
    number of classes, and is then drawn from the seed. What these weights have learnt from is not
    known here: the best epoch is only as honest as they are."""
    freeze: Literal["backbone"] | None = None
    """`backbone` trains the last layer alone; all other layers stay as they were given, in
    evaluation mode."""

    @model_validator(mode="before")
    @classmethod
    def _with_stem(cls, content: Any) -> Any:
        """Published weights are of the stem for photographs."""
        model = content.get("model") if isinstance(content, dict) else None
        if not isinstance(model, dict) or content.get("pretrained") is not True:
            return content
        options = model.get("options") or {}
        if not str(model.get("name")).startswith("timm/") or not isinstance(options, dict):
            return content
        return content | {"model": model | {"options": {"stem": "original"} | options}}

    @model_validator(mode="after")
    def _given_once(self) -> "Begun":
        if self.pretrained and self.weights is not None:
            raise ValueError("a training begins from `pretrained` or from `weights`: give one")
        if self.pretrained and not self.model.name.startswith(("timm/", "hub/")):
            raise ValueError(f"{self.model.name} has no published weights; give `weights`")
        if self.freeze and not self.is_given:
            raise ValueError(
                "`freeze: backbone` would train the last layer of a network that was drawn at "
                "random; give `pretrained: true` or `weights`"
            )
        if not self.is_given:
            untagged(self.model)
        return self

    @property
    def is_given(self) -> bool:
        """Whether its first weights are given, not drawn at random."""
        return bool(self.pretrained) or self.weights is not None


class StoredOutputs(Settings):
    """What of a teacher is stored for its students."""

    views: Count | None = None
    """Number of replayed views of each image whose outputs are stored; students see these views in
    turn, one per pass, all students the same. Without it the clean image's outputs are stored."""
    seed: Seed = 0
    """Of the replayed views."""
    top_k: Count | None = None
    """Store the k largest logits and the mass of the others."""
    grid: Count | None = None
    """Store feature grids resized to this side, which must be that of the students' grids: the loss
    resizes to it anyway. Without it the teacher's whole grids are stored."""


def _way(content: Any) -> str:
    """The tag of how students read a teacher's outputs."""
    return "live" if isinstance(content, str) else "stored"


Outputs = Annotated[
    Annotated[StoredOutputs, Tag("stored")] | Annotated[Literal["live"], Tag("live")],
    Discriminator(_way),
]


class Teacher(Settings):
    """A network whose outputs students learn from. It is trained (`training`), or used as it is
    given (`weights` or `pretrained: true`); both together fine-tune what is given."""

    model: Model
    seed: Seed = 0
    image_size: ImageSize | None = None
    """Pixels of the images the teacher sees; students see those of the cache."""
    expected_accuracy: Share | None = None
    """Expected accuracy on the test split; left out where the images have no labels. A network
    without a classifier is scored by k-NN on its features."""
    tolerance: NonNegative = 0.005
    """By how much the measured accuracy may lie below the expected one."""
    uninformed: Literal[True] | None = None
    """Let a teacher pass that is no better than chance on the test split, as a control; a student
    need not learn more from its outputs than from those of other images."""
    outputs: Outputs = StoredOutputs()
    """What is stored for students; or `live`: in each step the teacher computes its outputs on the
    very views that the student sees, and nothing is stored for students."""

    @model_validator(mode="after")
    def _trusted(self) -> "Teacher":
        if self.model.name.startswith("hub/") and not getattr(self, "trust_code", False):
            raise ValueError(
                f"{self.model.name} is downloaded code, which would run here: read it, then write "
                "`trust_code: true` and `pretrained: true`; it cannot be trained"
            )
        return self

    @property
    def live(self) -> bool:
        """Whether it computes its outputs while students are trained."""
        return self.outputs == "live"

    @property
    def stored(self) -> StoredOutputs:
        """How its outputs are stored."""
        return StoredOutputs() if self.live else self.outputs

    @property
    def of_subset(self) -> bool:
        """Whether one is trained for each subset and seed."""
        return getattr(self, "learns_from", "train") == "subset"


class TrainedTeacher(Teacher, Begun):
    """A teacher that the study trains, from random weights or from given ones."""

    training: Training
    learns_from: Literal["train", "subset"] = "train"
    """All training images, or (of the further teachers) one teacher for each subset and seed that
    is trained on that subset, so that its soft labels carry nothing of the images left out."""

    @property
    def trained_on(self) -> str:
        """Images it has learnt from: the study's training images, or a subset of them."""
        return "subset" if self.of_subset else "kept"


class _FinishedTeacher(Teacher):
    trained_on: Literal["train", "kept", "elsewhere"]
    """Images the teacher has learnt from: the whole training split, held-out images included
    (`train`); the study's training images (`kept`); other data (`elsewhere`)."""
    mean: tuple[float, ...] | None = None
    """Per channel, of pixels in [0, 1]; without it measured on the training split."""
    std: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _normalised(self) -> "_FinishedTeacher":
        if (self.mean is None) != (self.std is None):
            raise ValueError("`mean` and `std` go together")
        if self.std is not None and (len(self.mean) != len(self.std) or min(self.std) <= 0):
            raise ValueError(
                f"mean is {self.mean}, std is {self.std}; expected a number per channel, std > 0"
            )
        return self


class LoadedTeacher(_FinishedTeacher):
    """A teacher whose weights are read from a file."""

    weights: str
    """A .safetensors file, or a PyTorch checkpoint of plain tensors; a relative path is looked up
    in the data folder."""


class PretrainedTeacher(_FinishedTeacher):
    """A teacher that is published with its weights, by timm or torch.hub."""

    pretrained: Literal[True]
    trust_code: bool = False
    """The code of a torch.hub network runs here."""

    @model_validator(mode="after")
    def _published(self) -> "PretrainedTeacher":
        if not self.model.name.startswith(("timm/", "hub/")):
            raise ValueError(f"{self.model.name} has no published weights; give `weights`")
        return self


def _origin(content: Any) -> str | None:
    """The tag of a teacher's class, by its key `training`, `weights` or `pretrained`; None where
    none of them is given, or the last two without the first."""
    given = dict(content) if isinstance(content, dict | Teacher) else {}
    keys = ("training", "weights", "pretrained")
    origins = [key for key in keys if given.get(key) not in (None, False)]
    return f"from_{origins[0]}" if len(origins) == 1 or "training" in origins else None


AnyTeacher = Annotated[
    Annotated[TrainedTeacher, Tag("from_training")]
    | Annotated[LoadedTeacher, Tag("from_weights")]
    | Annotated[PretrainedTeacher, Tag("from_pretrained")],
    Discriminator(
        _origin,
        custom_error_type="origin",
        custom_error_message="a teacher is either trained (`training`), loaded (`weights`) or "
        "`pretrained`: give one of them, or `training` with one of the other two",
    ),
]


class Student(Begun):
    """A student's network. Its first weights are drawn from the run's seed, or given: then the
    students of all seeds begin from the same ones, but for a last layer that is drawn. Students of
    two names are never compared with each other, so that no difference is one of origins."""

    @model_validator(mode="after")
    def _trainable(self) -> "Student":
        if self.model.name.startswith("hub/"):
            raise ValueError(
                f"{self.model.name} comes with its code and is for teachers; a student is a "
                "built-in network or timm/<name>"
            )
        return self
