"""Distillation losses of logits: pure functions of student logits, teacher logits and labels.

Every teacher tensor is detached. Every loss is a mean over the batch, without its weight in the
objective and without the factor temperature squared: `objectives` multiplies by both.

Sources:
    [Hinton2015] Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network.
        arXiv 1503.02531.
    [Ba2014] Ba, Caruana: Do Deep Nets Really Need to be Deep? NeurIPS 2014, arXiv 1312.6184.
    [Kim2021] Kim et al.: Comparing Kullback-Leibler Divergence and Mean Squared Error Loss in
        Knowledge Distillation. IJCAI 2021, arXiv 2105.08919.
    [Zhao2022] Zhao et al.: Decoupled Knowledge Distillation. CVPR 2022, arXiv 2203.08679.
    [Huang2022] Huang et al.: Knowledge Distillation from A Stronger Teacher. NeurIPS 2022,
        arXiv 2205.10536.
    [Sun2024] Sun et al.: Logit Standardization in Knowledge Distillation. CVPR 2024,
        arXiv 2403.01427.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-7  # its square is added to a variance, so that a constant row gives 0 and not NaN


def soft_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL divergence of the student from the teacher, both softened, without the factor T squared.

    Args:
        student_logits: (B, C) float.
        teacher_logits: (B, C) float, row by row of the same examples; no gradient reaches it.
        temperature: > 0; divides both logits.

    Returns: Scalar >= 0, mean over the batch, nats; 0 exactly when both softmaxes agree.
    Raises: ValueError when the shapes differ or the temperature is not positive.
    Source: [Hinton2015], sec. 2.

    >>> same = torch.tensor([[1.0, 2.0]])
    >>> round(soft_loss(same, same, 4.0).item(), 6)
    0.0
    """
    _check(student_logits, teacher_logits, temperature)
    student = F.log_softmax(student_logits / temperature, dim=1)
    teacher = F.log_softmax(teacher_logits.detach() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def standardised(logits: Tensor) -> Tensor:
    """Logits (B, C) of each example shifted to mean 0 and scaled to variance 1 over its classes.

    The variance is a mean over the C classes.

    Source: [Sun2024], sec. 4 (the temperature comes after). The authors' code divides by C - 1: its
        logits at temperature T are those here at T * sqrt(C / (C - 1)). At equal T the loss differs
        by up to 11 % for C = 10.

    >>> standardised(torch.tensor([[1.0, 3.0]])).tolist()
    [[-1.0, 1.0]]
    """
    centred = logits - logits.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + EPSILON**2).sqrt()


def logit_mse(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Mean squared difference of logits over batch and classes.

    Args:
        student_logits, teacher_logits: (B, C) float, row by row of the same examples.

    Returns: Scalar >= 0, squared logits.
    Raises: ValueError when the shapes differ.
    Source: [Ba2014], sec. 2.2, and [Kim2021]; a mean over classes where they take a sum.
    """
    _check(student_logits, teacher_logits)
    return F.mse_loss(student_logits, teacher_logits.detach())


def decoupled(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The two parts of the KL divergence: gold class against all others, and among the others.

    With b = (p_gold, 1 - p_gold) and q = softmax over the other classes alone,
    KL(p_t || p_s) = KL(b_t || b_s) + (1 - p_t[gold]) KL(q_t || q_s); the paper weights the two
    divergences on the right independently.

    Args:
        student_logits, teacher_logits: (B, C) float, C >= 2.
        labels: (B,) int64 in [0, C).
        temperature: > 0; divides both logits.

    Returns: (TCKD, NCKD), scalars >= 0, means over the batch, nats.
    Raises: ValueError when the shapes differ or the temperature is not positive.
    Source: [Zhao2022], eq. 4 to 7.
    """
    _check(student_logits, teacher_logits, temperature)
    gold = F.one_hot(labels, student_logits.shape[1]).bool()

    def parts(logits: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = F.log_softmax(logits / temperature, dim=1)
        others = log_probs[~gold].view(len(logits), -1)  # (B, C) -> (B, C - 1)
        rest = others.logsumexp(1, keepdim=True)
        return torch.cat([log_probs[gold][:, None], rest], 1), others - rest

    student, teacher = parts(student_logits), parts(teacher_logits.detach())
    return tuple(
        F.kl_div(s, t, reduction="batchmean", log_target=True)
        for s, t in zip(student, teacher, strict=True)
    )


def dist_terms(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """1 - Pearson correlation of softened probabilities: of the classes of an example, and of the
    examples of a class.

    Args:
        student_logits, teacher_logits: (B, C) float.
        temperature: > 0; divides both logits.

    Returns: (inter, intra), scalars in [0, 2], means over examples and over classes; 0 when every
        correlation is 1. The correlation with a constant row counts as 0.
    Raises: ValueError when the shapes differ or the temperature is not positive.
    Source: [Huang2022], eq. 6 to 9.
    """
    _check(student_logits, teacher_logits, temperature)
    student = F.softmax(student_logits / temperature, dim=1)
    teacher = F.softmax(teacher_logits.detach() / temperature, dim=1)
    return _uncorrelated(student, teacher), _uncorrelated(student.T, teacher.T)


def _uncorrelated(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over rows of 1 - Pearson correlation."""
    student = student - student.mean(1, keepdim=True)
    teacher = teacher - teacher.mean(1, keepdim=True)
    return (1 - F.cosine_similarity(student, teacher, dim=1, eps=1e-12)).mean()


def _check(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"teacher logits are {tuple(teacher.shape)}, student logits "
            f"{tuple(student.shape)}; expected the same (B, C)"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
