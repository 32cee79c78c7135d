"""Distillation losses of features: pure functions of vectors (B, D) and grids (B, C, H, W).

Every teacher tensor is detached. Every loss is a mean over the batch, without its weight in the
objective. Student tensors are passed after the projector, where an objective trains one
(`objectives`).

Sources:
    [Romero2015] Romero et al.: FitNets: Hints for Thin Deep Nets. ICLR 2015, arXiv 1412.6550.
    [Zagoruyko2017] Zagoruyko, Komodakis: Paying More Attention to Attention. ICLR 2017,
        arXiv 1612.03928.
    [Park2019] Park et al.: Relational Knowledge Distillation. CVPR 2019, arXiv 1904.05068.
    [Tung2019] Tung, Mori: Similarity-Preserving Knowledge Distillation. ICCV 2019,
        arXiv 1907.09682.
    [Tian2020] Tian, Krishnan, Isola: Contrastive Representation Distillation. ICLR 2020,
        arXiv 1910.10699.
    [Zbontar2021] Zbontar et al.: Barlow Twins. ICML 2021, arXiv 2103.03230.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlib.models.base import resized

EPSILON = 1e-12


def hint(projected: Tensor, teacher_grid: Tensor) -> Tensor:
    """Mean squared difference of a projected student grid and the teacher's.

    Args:
        projected: (B, C, H, W) float, the student's grid after its projector.
        teacher_grid: (B, C, H_t, W_t) float; resized to (H, W) where it differs.

    Returns: Scalar >= 0, mean over all elements.
    Raises: ValueError when batches or channels differ.
    Source: [Romero2015], eq. 3, with a mean over elements instead of half their sum; the paper
        trains with it first, here it is added to the other losses.
    """
    _check(projected, teacher_grid, 2)
    target = resized(teacher_grid.detach(), projected.shape[-2:])
    return F.mse_loss(projected, target)


def attention(student_maps: Sequence[Tensor], teacher_maps: Sequence[Tensor]) -> Tensor:
    """Sum over stages of the distance between attention maps.

    Args:
        student_maps: For each stage (B, H, W) float >= 0, of L2 norm 1 for each example.
        teacher_maps: For each stage (B, H_t, W_t) float >= 0; resized to (H, W) where it differs,
            and then brought to norm 1.

    Returns: Scalar: mean over the batch of the L2 norm of the difference, in [0, sqrt 2] for each
        stage.
    Raises: ValueError when the batches or the numbers of stages differ.
    Source: [Zagoruyko2017], eq. 2 with p = 2; their code takes mean squares instead. Where grids
        differ, public codes average the features of the larger grid before they are squared; here
        the map is resized, whose loss was 2 to 26 % from theirs.
    """
    total = torch.zeros((), dtype=student_maps[0].dtype, device=student_maps[0].device)
    for student, teacher in zip(student_maps, teacher_maps, strict=True):
        _check(student, teacher, 1)
        target = resized(teacher.detach()[:, None], student.shape[-2:]).flatten(1)
        gap = student.flatten(1) - F.normalize(target, dim=1)
        total = total + torch.linalg.vector_norm(gap, dim=1).mean()
    return total


def rkd(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Differences of the distances of pairs of examples, and of the angles of triplets.

    Args:
        student, teacher: (B, D_s) and (B, D_t) float, row by row of the same examples; B >= 2.

    Returns: (distance, angle), scalars >= 0: Huber losses of the pairwise distances, divided by
        their mean, and of the cosines of the angles of all triplets.
    Raises: ValueError when the batches differ, or hold a single example.
    Source: [Park2019], eq. 6 to 10.
    """
    _check(student, teacher, 1)
    if len(student) < 2:
        raise ValueError(
            "relations need two examples, and the batch holds 1; raise training.batch_size or "
            "lower training.accumulate"
        )
    teacher = teacher.detach()
    distance = F.smooth_l1_loss(_distances(student), _distances(teacher))
    return distance, F.smooth_l1_loss(_angles(student), _angles(teacher))


def _distances(rows: Tensor) -> Tensor:
    """Pairwise distances divided by the mean of those of distinct rows: (B, D) -> (B, B)."""
    products = rows @ rows.T
    squares = products.diagonal()
    squared = (squares[:, None] + squares[None] - 2 * products).clamp(min=0)
    apart = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    distances = torch.where(apart, (squared + EPSILON).sqrt(), torch.zeros_like(squared))
    return distances / distances[apart].mean().clamp(min=EPSILON)


def _angles(rows: Tensor) -> Tensor:
    """Cosines between (i - j) and (k - j): (B, D) -> (B, B, B).

    Rows in one place have no direction between them: cosine 0, without a gradient, which would
    grow as 1 / distance.
    """
    gaps = rows[None] - rows[:, None]  # (j, i, D)
    together = torch.linalg.vector_norm(gaps.detach(), dim=2, keepdim=True) <= 1e-6
    directions = F.normalize(gaps.masked_fill(together, 0), dim=2)
    return torch.bmm(directions, directions.transpose(1, 2))


def similarity(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared difference of the similarity matrices of a batch.

    Args:
        student, teacher: (B, ...) float; each example's values are taken as one vector.

    Returns: Scalar >= 0: the sum over pairs, divided by B squared, of the squared difference of
        Gram matrices whose rows have norm 1.
    Raises: ValueError when the batches differ.
    Source: [Tung2019], eq. 2 to 4.
    """
    _check(student, teacher, 1)

    def gram(rows: Tensor) -> Tensor:
        flat = rows.flatten(1)
        return F.normalize(flat @ flat.T, dim=1)

    return (gram(student) - gram(teacher.detach())).square().mean()


def crd(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, n_examples: int
) -> Tensor:
    """Contrast of student and teacher embeddings: rows of the same example against negatives.

    With h = exp(g / T) / (exp(g / T) + N / M), g the cosine of two rows, the loss is
    -log h(same) - sum over negatives of log(1 - h), once with the student's row as anchor and once
    with the teacher's; `same` are the two rows of one example.

    Args:
        student, teacher: (B, D) float embeddings, of any norm.
        labels: (B,) int64; the negatives of an example are the rows of other classes in the batch.
        temperature: T > 0.
        n_examples: M, examples of the training set; N is the mean number of negatives.

    Returns: Scalar >= 0, mean over the batch.
    Raises: ValueError when the shapes differ or the temperature is not positive.
    Source: [Tian2020], eq. 17 to 19. The paper draws its negatives from a memory of all examples;
        here they come from the batch, so that the loss is a function of the batch. Its code, and
        those after it, divide exp(g / T) by a constant Z, M times its mean in the first batch,
        which the equation does not have.
    """
    _check(student, teacher, 2)
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")
    similar = F.normalize(student, dim=1) @ F.normalize(teacher.detach(), dim=1).T / temperature
    others = labels[:, None] != labels[None]
    n_negatives = others.double().sum(1).mean().clamp(min=1).item()
    log_ratio = torch.log(torch.tensor(n_negatives / n_examples, dtype=similar.dtype))
    # log h and log(1 - h) of h = sigmoid(g / T - log(N / M))
    score = similar - log_ratio.to(similar.device)
    same = -F.logsigmoid(score.diagonal()).mean()
    wrong = -F.logsigmoid(-score) * others
    return 2 * same + wrong.sum(1).mean() + wrong.sum(0).mean()


def tokens(projected: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of projected student features, or grids of them, and the teacher's.

    Args:
        projected: (B, D) or (B, D, H, W) float.
        teacher: (B, D) or (B, D, H_t, W_t) float; a grid is resized to (H, W).

    Returns: Scalar in [0, 2], mean over examples and places.
    Raises: ValueError when batches or widths differ.
    """
    _check(projected, teacher, 2)
    target = teacher.detach()
    if projected.ndim == 4:
        target = resized(target, projected.shape[-2:])
    return (1 - F.cosine_similarity(projected, target, dim=1)).mean()


def two_views(first: Tensor, second: Tensor) -> None:
    """Refuse two views that are equal.

    Args:
        first, second: Of the same shape: two views of images, or their features.

    Raises: ValueError when both tensors are the same to the bit.
    """
    if torch.equal(first, second):
        raise ValueError(
            "identical views: both are the same to the bit; expected two different augmentations "
            "of each image (study: training.augment)"
        )


def barlow(first: Tensor, second: Tensor, off_diagonal: float = 0.005) -> Tensor:
    """Distance of the correlation matrix of two views' embeddings from the identity.

    Args:
        first, second: (B, D) float embeddings of two views of the same examples.
        off_diagonal: Weight of the squares off the diagonal, >= 0; the paper takes 0.005.

    Returns: Scalar >= 0: squared deviations of the diagonal from 1 plus the weighted squares off
        it, divided by D.
    Raises: ValueError for two equal views.
    Source: [Zbontar2021], eq. 1 and 2; the division by D, by which widths can be compared, is
        kdlib's.
    """
    two_views(first, second)

    def scaled(rows: Tensor) -> Tensor:
        centred = rows - rows.mean(0)
        # inside the root, so that a constant column has the gradient 0 rather than 0 / 0
        return centred / (centred.square().mean(0) + EPSILON).sqrt()

    correlation = scaled(first).T @ scaled(second) / len(first)  # (D, D)
    diagonal = correlation.diagonal()
    off = correlation.square().sum() - diagonal.square().sum()
    return ((diagonal - 1).square().sum() + off_diagonal * off) / len(diagonal)


def _check(student: Tensor, teacher: Tensor, n_axes: int) -> None:
    """Refuse tensors whose first axes differ, which would broadcast one row over all."""
    if student.shape[:n_axes] != teacher.shape[:n_axes]:
        same = ("batch", "batch and channels")[n_axes - 1]
        raise ValueError(
            f"teacher features are {tuple(teacher.shape)}, student features "
            f"{tuple(student.shape)}; expected the same {same}"
        )
