"""The shape of frozen features: effective rank and collapse, spread on the sphere, distances within
classes, similarity of two networks' features.

Each number can be compared with a theoretical one: that of isotropic features of the same N and D,
or the largest possible. Studies compute all of them on training images.

N examples, D features, K classes; u is a feature vector of norm 1, or 0 where it is all zero.

Sources:
    [Garrido2023] Garrido, Balestriero, Najman, LeCun. RankMe: Assessing the Downstream Performance
        of Pretrained Self-Supervised Representations by Their Rank. 2023. arXiv:2210.02885.
    [Marchenko1967] Marchenko, Pastur. Distribution of eigenvalues for some sets of random matrices.
        1967. DOI 10.1070/SM1967v001n04ABEH001994.
    [Wang2020] Wang, Isola. Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere. 2020. arXiv:2005.10242.
    [Kornblith2019] Kornblith, Norouzi, Lee, Hinton. Similarity of Neural Network Representations
        Revisited. 2019. arXiv:1905.00414.
"""

from dataclasses import dataclass

import numpy as np

COLLAPSED_POWER = 0.25  # collapsed = effective rank below the isotropic rank to this power
PAIRED = 4096  # examples of which all pairs are compared, at most
SHARPNESS = 2.0  # t of the uniformity, as in [Wang2020]


@dataclass(frozen=True)
class Collapse:
    """Effective rank of features beside that of isotropic ones; returned by `collapse`.

    `effective_rank` of the features; `isotropic_rank` of random features of the same shape;
    `ratio`, the first divided by the second, near 1 = isotropic, low = bad; `threshold_rank`, below
    which `collapsed` is True.
    """

    effective_rank: float
    isotropic_rank: float
    ratio: float
    threshold_rank: float
    collapsed: bool


def effective_rank(values: np.ndarray) -> float:
    """RankMe: exponential of the entropy of the normalised singular values.

    Args:
        values: Features, shape (N, D), finite; not centred.

    Returns: Number in [1, min(N, D)], low = collapsed; 0 when every value is zero.
    Raises: ValueError for another shape or non-finite values.
    Source: [Garrido2023], eq. 1; the paper adds 1e-7 to each normalised singular value, here zeros
        are left out of the entropy instead, so that known spectra give exact numbers.

    >>> round(effective_rank(np.diag([3.0, 3.0, 3.0, 0.0])), 6)
    3.0
    """
    singular = np.linalg.svd(matrix(values), compute_uv=False)
    if singular[0] == 0:
        return 0.0
    p = singular / singular.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def isotropic_rank(n_examples: int, n_features: int) -> float:
    """Effective rank that isotropic random features of this shape reach, for large N and D.

    The squared singular values of N x D independent standard normal numbers, divided by the larger
    side, follow the Marchenko-Pastur law; the integral is taken numerically. Within 2 % of the mean
    over draws once the smaller side is 16.

    Args:
        n_examples: N, >= 2.
        n_features: D, >= 2.

    Returns: Number in (1, min(N, D)).
    Raises: ValueError for a side below 2.
    Source: [Marchenko1967]; effective rank as in [Garrido2023].

    >>> 0.99 < isotropic_rank(100_000, 10) / 10 < 1
    True
    """
    small, large = sorted((n_examples, n_features))
    if small < 2:
        raise ValueError(
            f"features are ({n_examples}, {n_features}); expected at least 2 examples and 2 "
            "features to speak of collapse"
        )
    q = small / large
    angle = (np.arange(4096) + 0.5) * np.pi / 4096
    eigenvalues = 1 + q + 2 * np.sqrt(q) * np.cos(angle)
    density = np.sin(angle) ** 2 / eigenvalues
    density /= density.sum()
    singular = np.sqrt(eigenvalues)
    mean = (density * singular).sum()
    return float(small * mean * np.exp(-(density * singular * np.log(singular)).sum() / mean))


def collapse(values: np.ndarray) -> Collapse:
    """Whether features span little more than one direction.

    Total collapse (constant features) has effective rank 1, isotropic random features of the same
    shape have `isotropic_rank`; the threshold lies a quarter of the way between them on a
    logarithmic scale, `isotropic_rank ** 0.25` (2.4 for 32 features, 4.4 for 384). Features are not
    centred: a common offset much larger than all variation counts as collapse.

    Args:
        values: Features, shape (N, D), N and D >= 2, finite.

    Returns: `Collapse`.
    Raises: ValueError for another shape or non-finite values.
    Source: [Garrido2023]; the threshold is kdlib's.

    >>> collapse(np.ones((50, 8))).collapsed, collapse(np.eye(8)).collapsed
    (True, False)
    """
    rank = effective_rank(values)
    isotropic = isotropic_rank(*values.shape)
    threshold = isotropic**COLLAPSED_POWER
    return Collapse(rank, isotropic, rank / isotropic, threshold, rank < threshold)


def mean_cosine(values: np.ndarray) -> float:
    """Mean cosine of two different examples' features, their common mean taken out.

    In O(N D): the sum over all pairs is the squared length of the sum of the directions.

    Args:
        values: Features, shape (N, D), N >= 2, finite.

    Returns: Number in [-1 / (N - 1), 1]; 0 for isotropic features, high = along one line on one
        side. An example at the mean has cosine 0 to every other.
    Raises: ValueError for another shape, one example, or non-finite values.

    >>> round(mean_cosine(np.array([[0.0, 1.0], [0.0, 3.0]])), 9)
    -1.0
    """
    centred, n_pairs = matrix(values), _n_pairs(values)
    centred = centred - centred.mean(axis=0)
    # equal values less their mean leave rounding errors, whose direction means nothing
    scale = np.finfo(np.float32).eps * np.abs(values).max()
    unit = unit_rows(np.where(np.abs(centred) <= scale, 0.0, centred))
    return float(((unit.sum(axis=0) ** 2).sum() - (unit**2).sum()) / n_pairs)


def unit_variance(values: np.ndarray) -> float:
    """Mean over dimensions of the variance of features of norm 1.

    The variances sum to 1 - |mean of u|^2, so that the most possible is 1 / D: a threshold for this
    number must depend on D.

    Args:
        values: Features, shape (N, D), finite.

    Returns: Number in [0, 1 / D]; 1 / D = directions that cancel out, 0 = one direction.
    Raises: ValueError for another shape or non-finite values.

    >>> round(unit_variance(np.array([[2.0, 0.0], [-3.0, 0.0]])), 9)
    0.5
    """
    return float(unit_rows(values).var(axis=0).mean())


def alignment(values: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance, on the sphere, of two different examples of the same class.

    In O(N D), from the sum of directions of each class.

    Args:
        values: Features, shape (N, D), finite.
        labels: shape (N,), integers; a class of one example has no pair.

    Returns: Number in [0, 4], low = classes lie close together; 2 for isotropic features.
    Raises: ValueError for another shape, non-finite values, or no two examples of a class.
    Source: [Wang2020], sec. 4.1.1, with alpha = 2; there a pair is two augmented views of one
        image, here two images of one class, which needs no further pass and no draw.

    >>> values = np.array([[1.0, 0.0], [0.0, 2.0], [5.0, 0.0]])
    >>> round(alignment(values, np.array([0, 0, 1])), 9)
    2.0
    """
    unit = unit_rows(values)
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if len(labels) != len(values) or counts.max() < 2:
        raise ValueError(
            f"{len(labels)} labels, at most {counts.max()} of one class, for {len(values)} "
            "examples; expected one label each, and two examples of some class"
        )
    squares = (unit**2).sum(axis=1)  # 1, or 0 of zero rows
    order = np.argsort(codes, kind="stable")
    sums = np.add.reduceat(unit[order], np.cumsum(counts) - counts)  # (K, D)
    # over ordered pairs i != j of a class: |u_i|^2 + |u_j|^2 - 2 u_i u_j
    ends = 2 * (squares * (counts[codes] - 1)).sum()
    products = (sums**2).sum() - squares.sum()
    return float((ends - 2 * products) / (counts * (counts - 1)).sum())


def uniformity(values: np.ndarray, rows: np.ndarray | None = None) -> float:
    """Logarithm of the mean, over pairs, of exp(-2 * squared distance on the sphere).

    Args:
        values: Features, shape (N, D), finite.
        rows: Which examples, of whose pairs all count; None: all, which takes N**2 operations.

    Returns: Number in [-8, 0], low = evenly spread, 0 = all on one point; `even_uniformity(D)` is
        what features spread evenly over the sphere reach.
    Raises: ValueError for another shape, non-finite values, or one example.
    Source: [Wang2020], sec. 4.1.2, with t = 2; the paper's mean is over independent pairs, here
        over all pairs of different examples.

    >>> round(uniformity(np.array([[1.0, 0.0], [-1.0, 0.0]])), 9)
    -8.0
    """
    unit = unit_rows(values if rows is None else values[rows])
    n, n_pairs = len(unit), _n_pairs(unit)
    squares = (unit**2).sum(axis=1)
    total = 0.0
    for start in range(0, n, 512):
        part = slice(start, start + 512)
        distances = squares[part, None] + squares - 2 * unit[part] @ unit.T
        near = np.exp(-SHARPNESS * np.maximum(distances, 0))
        near[np.arange(len(near)), np.arange(n)[part]] = 0  # pairs of an example with itself
        total += float(near.sum())
    return float(np.log(total / n_pairs))


def _n_pairs(values: np.ndarray) -> int:
    n = len(values)
    if n < 2:
        raise ValueError(f"features of {n} example; expected at least 2 to make a pair")
    return n * (n - 1)


def even_uniformity(n_features: int) -> float:
    """`uniformity` of features spread evenly over the sphere in D dimensions.

    The mean of exp(4 cos) over it is the hypergeometric function 0F1(; D / 2; 4).

    Args:
        n_features: D, >= 1.

    Returns: Number in [-4, -0.69]; the more dimensions, the lower.
    Source: [Wang2020], sec. 4.1.2.

    >>> round(even_uniformity(1), 4) == round(float(np.log((1 + np.exp(-8)) / 2)), 4)
    True
    """
    from scipy.special import hyp0f1

    return float(-2 * SHARPNESS + np.log(hyp0f1(n_features / 2, SHARPNESS**2)))


def linear_cka(first: np.ndarray, second: np.ndarray, norm: float | None = None) -> float:
    """Linear CKA of two networks' features of the same examples; rotation and scale do not matter.

    Args:
        first: Features, shape (N, D), finite.
        second: Features of another network, shape (N, D'), of the same examples in the same order.
        norm: `shared(second, second)`, to compute it once for several calls.

    Returns: Number in [0, 1], 1 = equal up to rotation and scale; 0 when either is constant. For
        two random networks it grows with D / N.
    Raises: ValueError for another shape, non-finite values, or other numbers of examples.
    Source: [Kornblith2019], sec. 3, with the linear kernel.

    >>> one, other = np.array([[1.0], [2.0], [4.0]]), np.array([[0.0, 2.0], [0.0, 4.0], [0.0, 8.0]])
    >>> round(linear_cka(one, other), 9)
    1.0
    """
    norm = shared(second, second) if norm is None else norm
    product = np.sqrt(shared(first, first)) * np.sqrt(norm)
    return 0.0 if product == 0 else float(np.clip(shared(first, second) / product, 0, 1))


def shared(first: np.ndarray, second: np.ndarray) -> float:
    """HSIC with linear kernels, times (N - 1)**2: the sum of squares of the cross-products of two
    centred feature matrices.

    Args:
        first: Features, shape (N, D), finite.
        second: Features, shape (N, D'), of the same examples in the same order.

    Returns: Number >= 0.
    Raises: As `linear_cka`.
    """
    one, two = matrix(first), matrix(second)
    if len(one) != len(two):
        raise ValueError(
            f"features of {len(first)} and of {len(second)} examples; expected those of the same "
            "examples in the same order"
        )
    one = one - one.mean(axis=0)
    two = one if first is second else two - two.mean(axis=0)
    return float(((one.T @ two) ** 2).sum())


def unit_rows(values: np.ndarray) -> np.ndarray:
    """Rows of norm 1, (N, D) float64; a row of zeros stays one. Checked as by `matrix`."""
    values = matrix(values)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms == 0, 1.0, norms)


def matrix(values: np.ndarray, where: str = "features") -> np.ndarray:
    """Features as a finite (N, D) float64 matrix.

    Args:
        where: What the message calls them.

    Raises: ValueError for another shape, or NaN or infinite values.
    """
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{where} have shape {values.shape}; expected (N, D), neither of them 0")
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"{where} hold {(~finite).sum()} NaN or infinite values, the first in row "
            f"{np.flatnonzero(~finite.all(axis=1))[0]}; the network that made them diverged or "
            "was read wrongly: look at its training loss"
        )
    return np.asarray(values, np.float64)
