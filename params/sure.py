"""Distillation that listens where the teacher is sure: the soft loss of each image is weighted by
the teacher's largest probability. Used by photos.yaml."""

import torch.nn.functional as F
from torch import Tensor


def loss(
    student: dict[str, Tensor],
    teacher: dict[str, Tensor],
    labels: Tensor,
    alpha: float,
    temperature: float,
) -> Tensor:
    """`student` and `teacher` hold what the study `reads`, (B, ...) float32; labels are (B,)."""
    soft = F.log_softmax(teacher["logits"] / temperature, dim=1)
    own = F.log_softmax(student["logits"] / temperature, dim=1)
    sure = F.softmax(teacher["logits"], dim=1).amax(dim=1)  # (B,)
    distance = F.kl_div(own, soft, log_target=True, reduction="none").sum(dim=1)  # (B,)
    hard = F.cross_entropy(student["logits"], labels)
    return (1 - alpha) * hard + alpha * temperature**2 * (sure * distance).mean()
