"""The loss of each kind of objective.

To add one: its formula in `logit_losses` or `feature_losses`, its settings in
`kdlib.study.objectives` (a class of `AnyObjective`), and a class here, with `@register_for` and
these settings; a loss of logits may be a case of `LogitDistiller`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.repro.seeds import torch_seeded
from kdlib.study import objectives as settings
from kdlib.study.objectives import Objective, needs_teacher
from kdlib.study.user_code import run
from kdlib.trainer import feature_losses
from kdlib.trainer.distiller import (
    DISTILLERS,
    Distiller,
    Outputs,
    Shapes,
    register_for,
    widened,
    widened_pair,
)
from kdlib.trainer.logit_losses import decoupled, dist_terms, logit_mse, soft_loss, standardised


def teacher_columns(objective: Objective, n_stages: int) -> tuple[str, ...]:
    """Which outputs of a teacher with `n_stages` stages an objective reads.

    Raises: ValueError for a stage the teacher does not have.
    """
    columns = getattr(objective, "reads", DISTILLERS[type(objective)].columns)
    numbered = {}
    if "stage" in columns or "attention" in columns:
        numbered["stage"] = (f"stage{_stage(objective, n_stages)}",)
        numbered["attention"] = tuple(f"attention{k}" for k in range(1, n_stages + 1))
    return tuple(name for column in columns for name in numbered.get(column, (column,)))


def student_outputs(objective: Objective, n_stages: int, logits: bool = True) -> tuple[str, ...]:
    """Which outputs of a student with `n_stages` stages an objective reads, `logits` first.

    Args:
        logits: Whether the student has a last layer.

    Raises: ValueError for a stage the student does not have.
    """
    first = ("logits",) if logits else ()
    return tuple(dict.fromkeys((*first, *teacher_columns(objective, n_stages))))


def _stage(objective: Objective, n_stages: int) -> int:
    stage = getattr(objective, "stage", "last")
    if isinstance(stage, str):
        stage = {"middle": (n_stages + 1) // 2, "last": n_stages}[stage]
    if not 1 <= stage <= n_stages:
        raise ValueError(
            f"objective {objective.kind} reads stage {stage} of networks of which one has "
            f"{n_stages} stages; expected a stage in [1, {n_stages}]"
        )
    return stage


def build_distiller(
    objective: Objective,
    student_shapes: Shapes,
    teacher_shapes: Shapes,
    *,
    seed: int,
    n_examples: int,
    cls: type[Distiller] | None = None,
) -> Distiller:
    """An objective's loss, with projectors drawn from the run's seed.

    Args:
        student_shapes, teacher_shapes: Of the outputs it reads, by name, without batch axis.
        n_examples: Of the training set.
        cls: Instead of the class that is registered for the objective's settings.

    Raises: ValueError for networks whose shapes do not fit the objective, or no teacher where it
        needs one.
    """
    if needs_teacher(objective) and not teacher_shapes:
        raise ValueError(
            f"objective {objective.kind} reads a teacher's outputs, and there are none; "
            "`python -m kdlib step teacher STUDY` stores what the study's objectives read"
        )
    with torch_seeded(seed, "projector"):
        cls = cls or DISTILLERS[type(objective)]
        return cls(objective, student_shapes, teacher_shapes, n_examples)


@register_for(settings.CrossEntropy, settings.LabelSmoothing)
class LabelDistiller(Distiller):
    """The cross-entropy with labels that may be smoothed; no teacher."""

    def loss(self, projected: Outputs, labels: Tensor, teacher: Outputs) -> Tensor:
        smoothing = getattr(self.objective, "smoothing", 0.0)
        return F.cross_entropy(widened(projected["logits"]), labels, label_smoothing=smoothing)


@register_for(settings.KD, settings.LogitMSE, settings.DKD, settings.DIST)
class LogitDistiller(Distiller):
    """Compares logits by a loss of `logit_losses`, standardised where the settings say so."""

    columns = ("logits",)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        o, pair = self.objective, (student["logits"], teacher["logits"])
        if getattr(o, "standardise", False):
            pair = standardised(pair[0]), standardised(pair[1])
        match o:
            case settings.KD():
                return soft_loss(*pair, o.temperature)
            case settings.LogitMSE():
                return logit_mse(*pair)
            case settings.DKD():
                target, rest = decoupled(*pair, labels, o.temperature)
                self.note(target=target, rest=rest)
                return o.target_weight * target + o.rest_weight * rest
            case settings.DIST():
                inter, intra = dist_terms(*pair, o.temperature)
                self.note(inter=inter, intra=intra)
                return o.inter_weight * inter + o.intra_weight * intra
        raise TypeError(f"no term for {type(o).__name__}")

    def total(self, hard: Tensor, soft: Tensor) -> Tensor:
        """With a share `alpha` the cross-entropy has the rest of the weight, without one 1."""
        soft_weight, o = getattr(self.objective, "temperature", 1.0) ** 2, self.objective
        if hasattr(o, "alpha"):
            return (1 - o.alpha) * hard + o.alpha * soft_weight * soft
        return hard + soft_weight * soft


class WeightedDistiller(Distiller):
    """Adds its term to the cross-entropy with one weight."""

    def total(self, hard: Tensor, soft: Tensor) -> Tensor:
        return hard + self.objective.weight * soft


def _grid(shapes: Shapes) -> str:
    """The name of the feature grid among outputs of one network."""
    return next(name for name in shapes if name.startswith("stage"))


def _grid_projector(student: Shapes, teacher: Shapes) -> nn.Module:
    ours, theirs = student[_grid(student)], teacher[_grid(teacher)]
    return nn.Conv2d(ours[0], theirs[0], 1, bias=False)


@register_for(settings.Hint)
class HintDistiller(WeightedDistiller):
    """`feature_losses.hint` of one stage, behind a 1 x 1 convolution."""

    columns = ("stage",)

    def draw(self, student: Shapes, teacher: Shapes) -> None:
        self.projectors[_grid(student)] = _grid_projector(student, teacher)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        return feature_losses.hint(student[_grid(student)], teacher[_grid(teacher)])


@register_for(settings.Similarity)
class SimilarityDistiller(WeightedDistiller):
    """`feature_losses.similarity` of one stage."""

    columns = ("stage",)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        return feature_losses.similarity(student[_grid(student)], teacher[_grid(teacher)])


@register_for(settings.Attention)
class AttentionDistiller(WeightedDistiller):
    """`feature_losses.attention` of all stages, in pairs."""

    columns = ("attention",)

    def draw(self, student: Shapes, teacher: Shapes) -> None:
        n = sum(name.startswith("attention") for name in student)
        if n != len(teacher):
            raise ValueError(
                f"objective attention pairs stages, and the student has {n}, the teacher "
                f"{len(teacher)}; take networks with as many, or objective similarity"
            )

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        maps = ([outputs[name] for name in self.reads] for outputs in (student, teacher))
        return feature_losses.attention(*maps)


@register_for(settings.RKD)
class RKDDistiller(Distiller):
    """The two parts of `feature_losses.rkd`."""

    columns = ("features",)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        distance, angle = feature_losses.rkd(student["features"], teacher["features"])
        self.note(distance=distance, angle=angle)
        return self.objective.distance_weight * distance + self.objective.angle_weight * angle


@register_for(settings.CRD)
class CRDDistiller(WeightedDistiller):
    """`feature_losses.crd` of embeddings; the student's is trained, the teacher's is fixed."""

    columns = ("features",)

    def draw(self, student: Shapes, teacher: Shapes) -> None:
        (n_in,), (n_teacher,) = student["features"], teacher["features"]
        width = self.objective.width
        if width > n_teacher:
            raise ValueError(
                f"objective crd embeds {n_teacher} teacher features in {width}; expected a "
                f"width of at most {n_teacher} (study: objectives.<name>.width)"
            )
        self.projectors["features"] = nn.Linear(n_in, width)
        # the paper trains the teacher's embedding too; a fixed, orthogonal one keeps distances and
        # cannot collapse
        orthogonal, _ = torch.linalg.qr(torch.randn(n_teacher, width))
        self.register_buffer("teacher_projection", orthogonal)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        features, o = teacher["features"], self.objective
        embedded = features @ self.teacher_projection.to(features.dtype)
        return feature_losses.crd(
            student["features"], embedded, labels, o.temperature, self.n_examples
        )


@register_for(settings.Tokens)
class TokensDistiller(Distiller):
    """`feature_losses.tokens` of features and of grids, each where its weight is above 0, and
    `feature_losses.barlow` of two views."""

    columns = ("features", "stage")
    labels_train_head_only = True

    def draw(self, student: Shapes, teacher: Shapes) -> None:
        (n_in,), (n_out,) = student["features"], teacher["features"]
        if self.objective.compares_grids:
            self.projectors[_grid(student)] = _grid_projector(student, teacher)
        if self.objective.cls_weight > 0:
            self.projectors["features"] = nn.Linear(n_in, n_out)
        if self.objective.compares_views:
            self.expander = nn.Sequential(
                nn.Linear(n_in, n_in, bias=False),
                nn.BatchNorm1d(n_in),
                nn.ReLU(),
                nn.Linear(n_in, n_in, bias=False),
            )

    def project(self, outputs: Outputs, second: Outputs | None = None) -> dict[str, Tensor]:
        """As `Distiller.project`, with an embedding of each of two views."""
        projected = super().project(outputs)
        if second is not None:
            for name, view in (("view1", outputs), ("view2", second)):
                projected[name] = self.expander(view["features"])
        return projected

    def loss(self, projected: Outputs, labels: Tensor, teacher: Outputs) -> Tensor:
        self.parts = {}
        hard, soft = self.hard(projected, labels), self.soft_term(projected, teacher, labels)
        if self.objective.compares_views:
            views = widened(projected["view1"]), widened(projected["view2"])
            barlow = feature_losses.barlow(*views)
            self.note(barlow=barlow)
            soft = soft + self.objective.barlow_weight * barlow
        return hard + soft

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        cls = patches = 0.0
        if self.objective.cls_weight > 0:
            cls = feature_losses.tokens(student["features"], teacher["features"])
            self.note(cls=cls)
        if self.objective.compares_grids:
            patches = feature_losses.tokens(student[_grid(student)], teacher[_grid(teacher)])
            self.note(patch=patches)
        return self.objective.cls_weight * cls + self.objective.patch_weight * patches


@register_for(settings.UserObjective)
class UserDistiller(Distiller):
    """The functions `loss`, `term` and `projectors` of the user's file; `loss` is required and
    takes the place of a missing `term`. Of images without labels they get None for labels."""

    exact = torch.float32  # the user's code may not take float64

    def draw(self, student: Shapes, teacher: Shapes) -> None:
        self.code = run(self.objective, "loss", "loss(student, teacher, labels, **options)")
        if hasattr(self.code, "projectors"):
            self.projectors.update(self.code.projectors(student, teacher, **self.objective.options))
        if strange := set(self.projectors) - set(student):
            raise ValueError(
                f"{self.objective.code}: projectors stand behind {sorted(strange)}; expected some "
                f"of {sorted(student)}"
            )

    def loss(self, projected: Outputs, labels: Tensor, teacher: Outputs) -> Tensor:
        return self._called("loss", projected, teacher, labels)

    def soft_term(
        self, projected: Outputs, teacher: Outputs, labels: Tensor | None = None
    ) -> Tensor:
        name = "term" if hasattr(self.code, "term") else "loss"
        return self._called(name, projected, teacher, labels)

    def _called(
        self, name: str, projected: Outputs, teacher: Outputs, labels: Tensor | None
    ) -> Tensor:
        function, options = getattr(self.code, name), self.objective.options
        labels = labels if self.labelled else None
        value = function(*widened_pair(projected, teacher), labels, **options)
        if not isinstance(value, Tensor) or value.ndim:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            file = self.objective.code
            raise ValueError(f"{file}: {name} gave {got}; expected a tensor of no axis")
        return value
