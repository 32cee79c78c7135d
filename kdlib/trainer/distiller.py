"""The base class of all losses: which outputs an objective reads, what it trains beside the
student, and its value."""

from collections.abc import Callable, Mapping
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.study.objectives import Objective

Shapes = Mapping[str, tuple[int, ...]]
Outputs = Mapping[str, Tensor]

# The class of each class of settings
DISTILLERS: dict[type[Objective], type["Distiller"]] = {}

Class = TypeVar("Class", bound=type["Distiller"])


def register_for(*settings: type[Objective]) -> Callable[[Class], Class]:
    """Register a subclass of `Distiller` for the settings of a kind of objective."""

    def register(cls: Class) -> Class:
        DISTILLERS.update(dict.fromkeys(settings, cls))
        return cls

    return register


class Distiller(nn.Module):
    """An objective's loss, and the projectors it trains beside the student.

    A projector maps an output of the student. Teacher outputs are detached, and no parameter with
    a gradient lies before them.

    A subclass names the `columns` it reads, and defines `term`; `draw` where it trains projectors;
    and `total` where the loss is not the cross-entropy plus the term.

    Attributes:
        columns: Outputs of a teacher that it reads: `logits`, `features`, `stage` for the stage of
            the settings, `attention` for the maps of all stages.
        reads: The same, with the numbers of the stages.
        projectors: By the name of the student output they map.
        labelled: Whether the student has logits; without them no cross-entropy is added.
        labels_train_head_only: Whether gradients of the cross-entropy stop at the features.
        exact: Type in which `pairing` compares two values of the term.
        parts: Of the last loss by name: the cross-entropy and each distillation term before its
            weight, detached scalars; empty where the loss is one term.
    """

    columns: ClassVar[tuple[str, ...]] = ()
    labels_train_head_only: ClassVar[bool] = False
    exact: ClassVar[torch.dtype] = torch.float64

    def __init__(
        self, objective: Objective, student: Shapes, teacher: Shapes, n_examples: int
    ) -> None:
        """Arguments as of `build_distiller`, which seeds torch's generator."""
        super().__init__()
        self.objective, self.reads, self.n_examples = objective, tuple(teacher), n_examples
        self.projectors, self.labelled = nn.ModuleDict(), "logits" in student
        self.parts: dict[str, Tensor] = {}
        self.draw(student, teacher)

    def draw(self, student: Shapes, teacher: Shapes) -> None:
        """Make the projectors.

        Raises: ValueError for shapes that do not fit the objective.
        """

    def project(self, outputs: Outputs, second: Outputs | None = None) -> dict[str, Tensor]:
        """Everything that has parameters, for the examples of this process.

        Args:
            outputs: Of the student, by name, as `student_outputs` lists them. Where
                `labels_train_head_only`, the logits are those of detached features.
            second: Of a second view of the same examples.

        Returns: (B, ...) by name.
        """
        return dict(outputs) | {
            name: projector(outputs[name]) for name, projector in self.projectors.items()
        }

    def loss(self, projected: Outputs, labels: Tensor, teacher: Outputs) -> Tensor:
        """The loss of a whole batch.

        Args:
            projected: As `project` returns it.
            labels: (B,) int64 in [0, C); -1 of images without labels.
            teacher: (B, ...) float by name, as `teacher_columns` lists them.

        Returns: Scalar, mean over the batch.
        Raises: ValueError when teacher outputs are missing.
        """
        self.parts = {}
        hard, soft = self.hard(projected, labels), self.soft_term(projected, teacher, labels)
        if not self.parts.keys() - {"cross_entropy"}:
            self.note(**{self.objective.kind: soft})
        return self.total(hard, soft)

    def note(self, **parts: Tensor) -> None:
        """Keep the value of parts of the loss, for the curves."""
        self.parts |= {name: value.detach() for name, value in parts.items()}

    def hard(self, projected: Outputs, labels: Tensor) -> Tensor:
        """The cross-entropy; 0 of a student without logits, whose images have no labels."""
        if not self.labelled:
            return torch.zeros(())
        hard = F.cross_entropy(widened(projected["logits"]), labels)
        self.note(cross_entropy=hard)
        return hard

    def soft_term(
        self, projected: Outputs, teacher: Outputs, labels: Tensor | None = None
    ) -> Tensor:
        """The distillation term, before its weight in the loss.

        Args:
            projected, teacher: As in `loss`.
            labels: (B,) int64 in [0, C), for objectives that distinguish classes.

        Returns: Scalar, mean over the batch.
        Raises: ValueError when teacher outputs are missing.
        """
        if missing := [name for name in self.reads if name not in teacher]:
            raise ValueError(
                f"the {self.objective.kind} objective needs teacher {', '.join(missing)}; "
                "`python -m kdlib step teacher STUDY` stores what the study's objectives read"
            )
        return self.term(*widened_pair(projected, teacher), labels)

    def term(self, student: Outputs, teacher: Outputs, labels: Tensor | None) -> Tensor:
        """The distillation term; what a subclass defines.

        Args:
            student: (B, ...) float32 or float64 by name: logits (B, C), features (B, D), `stage<k>`
                (B, C_k, H_k, W_k), `attention<k>` (B, H_k, W_k), projected where there is a
                projector.
            teacher: Likewise of the teacher, detached; names as in `reads`.
            labels: (B,) int64 in [0, C).

        Returns: Scalar, mean over the batch.
        """
        raise NotImplementedError

    def total(self, hard: Tensor, soft: Tensor) -> Tensor:
        """The loss, from the cross-entropy and the distillation term, both scalars."""
        return hard + soft


def widened(value: Tensor) -> Tensor:
    """A tensor of any shape, float16 and bfloat16 as float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def widened_pair(
    projected: Outputs, teacher: Outputs
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Outputs of student and teacher as losses take them; the teacher's without gradient."""
    student = {name: widened(value) for name, value in projected.items()}
    return student, {name: widened(value).detach() for name, value in teacher.items()}
