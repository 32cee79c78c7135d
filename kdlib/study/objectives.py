"""What a student minimises: one settings class for each kind of objective.

The docstring of a class holds the loss, where T is the temperature; in the next paragraph the
paper, and in its last line the test that works the loss by hand.
"""

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from kdlib.study.base import Count, Distinct, Name, NonNegative, Positive, Settings, Share, matching
from kdlib.study.user_code import UserCode


class Objective(Settings):
    """What a student minimises. `alpha` weights the soft loss of `kd` and `mse`; the other
    objectives add their terms to the cross-entropy (CE), except `tokens`, whose labels train the
    last layer alone."""

    kind: str
    teacher: Name | None = None
    """One of the study's `teachers`; without it its `teacher`."""

    @property
    def teacher_features(self) -> str | None:
        """What it reads of a teacher beside logits, as the teacher's settings name it."""
        return None

    @property
    def compares_grids(self) -> bool:
        """Whether it compares grids of features, which are those of one view of an image."""
        return False

    @property
    def compares_views(self) -> bool:
        """Whether the student sees each image as two views."""
        return getattr(self, "barlow_weight", None) is not None

    @classmethod
    def described(cls) -> tuple[str, str, str]:
        """Formula, paper and test, from the docstring."""
        formula, source = cls.__doc__.split("\n\n")
        paper, test = source.strip().split("\n")
        return " ".join(formula.split()), paper.strip(), test.strip()


class CrossEntropy(Objective):
    """CE

    -
    tests/trainer/test_logit_losses.py::test_a_cross_entropy_worked_by_hand
    """

    kind: Literal["cross_entropy"] = "cross_entropy"


class LabelSmoothing(Objective):
    """CE with labels (1 - smoothing) onehot + smoothing / C

    Szegedy et al. 2016, arXiv 1512.00567
    tests/trainer/test_logit_losses.py::test_label_smoothing_worked_by_hand
    """

    kind: Literal["label_smoothing"] = "label_smoothing"
    smoothing: Annotated[float, Field(ge=0, lt=1)]


class KD(Objective):
    """(1 - alpha) CE + alpha T² KL(teacher || student)

    Hinton et al. 2015, arXiv 1503.02531; standardise: Sun et al. 2024, arXiv 2403.01427
    tests/trainer/test_logit_losses.py::test_a_kd_loss_worked_by_hand
    """

    kind: Literal["kd"] = "kd"
    alpha: Share
    temperature: Positive
    standardise: bool = False
    """Bring logits to mean 0 and variance 1 before the temperature."""


class LogitMSE(Objective):
    """(1 - alpha) CE + alpha mean (student - teacher)²

    Ba and Caruana 2014, arXiv 1312.6184
    tests/trainer/test_logit_losses.py::test_a_squared_difference_of_logits_worked_by_hand
    """

    kind: Literal["mse"] = "mse"
    alpha: Share


class DKD(Objective):
    """CE + T² (target_weight TCKD + rest_weight NCKD)

    Zhao et al. 2022, arXiv 2203.08679
    tests/trainer/test_logit_losses.py::test_decoupled_parts_worked_by_hand
    """

    kind: Literal["dkd"] = "dkd"
    temperature: Positive
    standardise: bool = False
    """Bring logits to mean 0 and variance 1 before the temperature."""
    target_weight: NonNegative
    """Of the gold class against the rest."""
    rest_weight: NonNegative
    """Among the other classes."""


class DIST(Objective):
    """CE + T² (inter_weight (1 - r over classes) + intra_weight (1 - r over examples))

    Huang et al. 2022, arXiv 2205.10536
    tests/trainer/test_logit_losses.py::test_correlations_worked_by_hand
    """

    kind: Literal["dist"] = "dist"
    temperature: Positive
    standardise: bool = False
    """Bring logits to mean 0 and variance 1 before the temperature."""
    inter_weight: NonNegative
    """Of the classes of an example."""
    intra_weight: NonNegative
    """Of the examples of a class."""


class FeatureObjective(Objective):
    """An objective that reads a teacher's features."""

    @property
    def teacher_features(self) -> str:
        return f"{self.kind} {getattr(self, 'stage', '')}".strip()


class GridObjective(FeatureObjective):
    """An objective that compares grids of features."""

    @property
    def compares_grids(self) -> bool:
        return True


class Hint(GridObjective):
    """CE + weight mean (projected stage - teacher's stage)²

    Romero et al. 2015, arXiv 1412.6550
    tests/trainer/test_feature_losses.py::test_a_hint_worked_by_hand
    """

    kind: Literal["hint"] = "hint"
    weight: Positive
    stage: Count | Literal["middle", "last"] = "middle"
    """Stage of the networks whose feature grid is read, counted from 1."""


class Attention(GridObjective):
    """CE + weight Σ over stages of |map - teacher's map|

    Zagoruyko and Komodakis 2017, arXiv 1612.03928
    tests/trainer/test_feature_losses.py::test_attention_maps_worked_by_hand
    """

    kind: Literal["attention"] = "attention"
    weight: Positive


class RKD(FeatureObjective):
    """CE + distance_weight Huber(distances) + angle_weight Huber(angles)

    Park et al. 2019, arXiv 1904.05068
    tests/trainer/test_feature_losses.py::test_relations_worked_by_hand
    """

    kind: Literal["rkd"] = "rkd"
    distance_weight: NonNegative
    angle_weight: NonNegative


class Similarity(GridObjective):
    """CE + weight mean (Gram - teacher's Gram)²

    Tung and Mori 2019, arXiv 1907.09682
    tests/trainer/test_feature_losses.py::test_similarities_worked_by_hand
    """

    kind: Literal["similarity"] = "similarity"
    weight: Positive
    stage: Count | Literal["middle", "last"] = "last"
    """Stage of the networks whose feature grid is read, counted from 1."""


class CRD(FeatureObjective):
    """CE + weight (-log h(same) - Σ log(1 - h(other))), both ways, negatives of the batch

    Tian et al. 2020, arXiv 1910.10699
    tests/trainer/test_feature_losses.py::test_a_contrast_worked_by_hand
    """

    kind: Literal["crd"] = "crd"
    temperature: Positive
    weight: Positive
    width: Count = 128
    """Of the embedding."""


class Tokens(GridObjective):
    """cls_weight (1 - cos CLS) + patch_weight (1 - cos patches) + barlow_weight Barlow;
    labels train the last layer alone

    barlow: Zbontar et al. 2021, arXiv 2103.03230
    tests/trainer/test_feature_losses.py::test_tokens_worked_by_hand
    """

    kind: Literal["tokens"] = "tokens"
    cls_weight: NonNegative
    patch_weight: NonNegative
    barlow_weight: Positive | None = None
    """Without it there is no second view."""

    @property
    def compares_grids(self) -> bool:
        return self.patch_weight > 0

    @property
    def teacher_features(self) -> str:
        return self.kind if self.compares_grids else f"{self.kind} features"

    @property
    def reads(self) -> tuple[str, ...]:
        """Outputs of student and teacher; no grid where its weight is 0."""
        return ("features", "stage") if self.compares_grids else ("features",)

    @model_validator(mode="after")
    def _read_at_all(self) -> "Tokens":
        if self.cls_weight == self.patch_weight == 0:
            raise ValueError(
                "cls_weight and patch_weight are 0, and nothing is learnt from the teacher; "
                "expected at least one of them > 0"
            )
        return self


Read = matching(
    r"logits|features|(stage|attention)[1-9]\d*", "logits, features, stage1, attention1, ..."
)


class UserObjective(UserCode, Objective):
    """a function in a file of the user

    -
    tests/trainer/test_objectives.py::test_an_own_objective_is_what_its_file_says
    """

    kind: Literal["own"] = "own"
    reads: Annotated[tuple[Read, ...], Distinct]
    """Outputs of student and teacher; none where it uses no teacher."""

    @property
    def teacher_features(self) -> str | None:
        return None if self.reads in ((), ("logits",)) else f"own {' '.join(self.reads)}"


AnyObjective = Annotated[
    CrossEntropy | LabelSmoothing | KD | LogitMSE | DKD | DIST | Hint | Attention | RKD | Similarity
    | CRD | Tokens | UserObjective,
    Field(discriminator="kind"),
]  # fmt: skip

# The class of each kind
OBJECTIVES: dict[str, type[Objective]] = {
    cls.model_fields["kind"].default: cls for cls in get_args(get_args(AnyObjective)[0])
}


def why_labels(objective: Objective) -> str | None:
    """Why an objective cannot be minimised on images without labels; None where it can. It is then
    its distillation term with its weights, without the cross-entropy; the student has no last
    layer."""
    match objective:
        case Tokens() | RKD() | Attention():
            return None
        case Hint() | Similarity():
            behind = "without labels nothing trains what lies behind its stage: write `stage: last`"
            return None if objective.stage == "last" else behind
        case UserObjective():
            features = objective.reads and "logits" not in objective.reads
            return None if features else "it is to read features or stages, not logits"
        case CRD():
            return "its negatives are examples of other classes"
    return "it compares classes"


def needs_teacher(objective: Objective) -> bool:
    """Whether the objective reads teacher outputs."""
    if isinstance(objective, UserObjective):
        return bool(objective.reads)
    return not isinstance(objective, CrossEntropy | LabelSmoothing)
