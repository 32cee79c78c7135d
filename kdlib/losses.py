"""Distillation objectives: from student logits, labels and teacher logits to one loss in nats.

Sources:
    [Hinton2015] Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network.
        arXiv 1503.02531.
    [Szegedy2016] Szegedy et al.: Rethinking the Inception Architecture for Computer Vision.
        arXiv 1512.00567.
"""

import torch
import torch.nn.functional as F

from kdlib.params import Objective


def soft_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float
) -> torch.Tensor:
    """KL divergence of the student from the teacher, both softened, without the factor T squared.

    Args:
        student_logits: (B, C) float.
        teacher_logits: (B, C) float, row by row of the same examples; no gradient reaches it.
        temperature: > 0; divides both logits.

    Returns: Scalar >= 0, mean over the batch, nats; 0 exactly when both softmaxes agree.
    Raises: ValueError when the shapes differ or the temperature is not positive.
    Source: [Hinton2015], sec. 2.

    >>> same = torch.tensor([[1.0, 2.0]])
    >>> soft_loss(same, same, 4.0).item()
    0.0
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"teacher logits are {tuple(teacher_logits.shape)}, student logits "
            f"{tuple(student_logits.shape)}; expected the same (B, C)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def objective_loss(
    objective: Objective,
    student_logits: torch.Tensor,
    labels: torch.Tensor,
    teacher_logits: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss a student minimises on one batch.

    Args:
        objective: `cross_entropy`; `label_smoothing` with `smoothing` [Szegedy2016]; or `kd`:
            `(1 - alpha) * CE + alpha * temperature**2 * KL` [Hinton2015].
        student_logits: (B, C) float.
        labels: (B,) int64 in [0, C).
        teacher_logits: (B, C) float for `kd`, else not looked at.

    Returns: Scalar, mean over the batch, nats.
    Raises: ValueError when `kd` gets no teacher logits.
    """
    if objective.kind == "label_smoothing":
        return F.cross_entropy(student_logits, labels, label_smoothing=objective.smoothing)
    hard = F.cross_entropy(student_logits, labels)
    if objective.kind == "cross_entropy":
        return hard
    if teacher_logits is None:
        raise ValueError("the kd objective needs teacher logits; run notebooks/02_teacher.ipynb")
    soft = soft_loss(student_logits, teacher_logits, objective.temperature)
    return (1 - objective.alpha) * hard + objective.alpha * objective.temperature**2 * soft


def needs_teacher(objective: Objective) -> bool:
    """Whether the objective reads teacher outputs."""
    return objective.kind == "kd"
