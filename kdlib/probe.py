"""How much a frozen network's features know: linear and k-NN probes, effective rank, collapse.

Features carry the fingerprint of the weights that made them; a probe refuses training and test
features of different weights, or of one split. The test features choose nothing: they are read
once, after every choice. Leaves to others: extracting features, and what follows from a low number.

Sources:
    [Alain2016] Alain, Bengio. Understanding intermediate layers using linear classifier probes.
        2016. arXiv:1610.01644.
    [Wu2018] Wu, Xiong, Yu, Lin. Unsupervised Feature Learning via Non-Parametric Instance
        Discrimination. 2018. arXiv:1805.01978.
    [Garrido2023] Garrido, Balestriero, Najman, LeCun. RankMe: Assessing the Downstream Performance
        of Pretrained Self-Supervised Representations by Their Rank. 2023. arXiv:2210.02885.
    [Marchenko1967] Marchenko, Pastur. Distribution of eigenvalues for some sets of random matrices.
        1967. DOI 10.1070/SM1967v001n04ABEH001994.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from kdlib.seeds import generator

KNN_TEMPERATURE = 0.07  # [Wu2018], sec. 3.4
HELD_OUT_EVERY = 5  # one training example in five chooses C
# Largest gradient component at which L-BFGS stops. At scikit-learn's default, 1e-4, a warm start
# from C = 10 already counts as converged for C = 100: the grid's last value is never fitted.
TOLERANCE = 1e-5
MAX_ITERATIONS = 2000
CHUNK = 2**22  # similarities held at once by the k-NN probe: 32 MiB
COLLAPSED_POWER = 0.25  # collapsed = effective rank below the isotropic rank to this power


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one split under one set of weights, checked when they are made.

    Args:
        values: shape (N, D), float32, finite.
        labels: shape (N,), int64, >= 0.
        example_ids: shape (N,), int64, distinct.
        split: Which split of the source the examples are from, such as "train" or "test".
        weights_sha256: Fingerprint of the weights that made `values`.

    Raises: ValueError for another shape or dtype, no example, NaN or infinity, an unlabelled
        example, a repeated id, an empty split or fingerprint.
    """

    values: np.ndarray
    labels: np.ndarray
    example_ids: np.ndarray
    split: str
    weights_sha256: str

    def __post_init__(self) -> None:
        where = f"features of split {self.split!r}"
        if not self.split or not self.weights_sha256:
            raise ValueError(
                f"{where} with fingerprint {self.weights_sha256!r}: name the split and the weights "
                "that made them"
            )
        _check_matrix(self.values, where)
        if self.values.dtype != np.float32:
            raise ValueError(f"{where} are {self.values.dtype}; expected float32")
        for name in ("labels", "example_ids"):
            array = getattr(self, name)
            if array.shape != self.values.shape[:1] or array.dtype != np.int64:
                raise ValueError(
                    f"{name} of the {where} are {array.dtype} {array.shape}; expected int64 "
                    f"{self.values.shape[:1]}, one per row of values"
                )
        if self.labels.min() < 0:
            raise ValueError(
                f"{where} hold {(self.labels < 0).sum()} unlabelled examples (label < 0); "
                "leave them out before probing"
            )
        if len(np.unique(self.example_ids)) != len(self.example_ids):
            raise ValueError(f"{where} hold an example id twice; expected each example once")


@dataclass(frozen=True)
class ProbeResult:
    """One probe of one set of weights.

    `accuracy` is in [0, 1], high = good: correct test predictions, summed and divided once.
    `chosen` is C of the linear probe, k of the k-NN probe. `converged` is False when the linear
    probe's last fit stopped short of the tolerance; the k-NN probe has nothing to converge.
    """

    probe: str
    accuracy: float
    chosen: float
    n_train: int
    n_test: int
    weights_sha256: str
    converged: bool


@dataclass(frozen=True)
class Collapse:
    """How much of the feature space is in use; made by `collapse`.

    `effective_rank` of the features; `isotropic_rank` that random features of the same shape would
    have; `ratio` of the two, near 1 = isotropic, low = bad; `threshold_rank` below which
    `collapsed` is True.
    """

    effective_rank: float
    isotropic_rank: float
    ratio: float
    threshold_rank: float
    collapsed: bool


def linear_probe(
    train: Features, test: Features, c_grid: Sequence[float], seed: int
) -> ProbeResult:
    """Test accuracy of multinomial logistic regression on frozen features.

    One fifth of the training features, stratified by class and drawn by `seed`, chooses C; ties go
    to the smallest C. The chosen C is refitted on all training features, and the test features are
    used once. Every fit standardises with the mean and standard deviation of the examples it is
    fitted on; a constant feature is left at zero. Fits are float64 L-BFGS on one thread (sums
    depend on the number of threads), along the grid with a warm start and for the refit with a cold
    one, until no gradient component exceeds `TOLERANCE` or after `MAX_ITERATIONS`, which the result
    reports. Two classes share one weight vector. The order of the examples changes nothing.

    Args:
        train: Features the probe is fitted on, of at least 2 classes.
        test: Features of another split, made by the same weights. A class that `train` lacks is
            never predicted.
        c_grid: Inverse regularisation strengths to choose from, > 0; scikit-learn's C.
        seed: Requested seed of the held-out fifth.

    Returns: `ProbeResult` with probe "linear" and `chosen` = C.
    Raises: ValueError for features that do not belong together, fewer than 2 classes, a grid that
        is empty or not positive, or too few examples to hold a fifth out.
    Source: [Alain2016]; there C is fixed, here it is chosen on training features.
    """
    _check_pair(train, test)
    grid = sorted(set(map(float, c_grid)))
    if not grid or not all(0 < c < np.inf for c in grid):
        raise ValueError(f"c_grid is {tuple(c_grid)}; expected numbers > 0 (params: probe.c_grid)")
    order = np.argsort(train.example_ids)
    values, labels = train.values[order].astype(np.float64), train.labels[order]
    with threadpool_limits(1, user_api="blas"):
        chosen = _choose_c(values, labels, grid, seed) if len(grid) > 1 else grid[0]
        model, converged = _fit(_classifier(), _standardise(values, values), labels, chosen)
        predicted = model.predict(_standardise(test.values.astype(np.float64), values))
    return _result("linear", predicted, chosen, train, test, converged)


def knn_probe(train: Features, test: Features, k: int) -> ProbeResult:
    """Test accuracy of weighted k nearest neighbours under cosine similarity.

    Each of the k most similar training examples votes for its class with weight
    exp(similarity / `KNN_TEMPERATURE`). Equally similar neighbours are taken by smallest example
    id, equal votes go to the smallest label; similarities and votes equal to nine decimals count as
    equal, so that rounding decides nothing. An all-zero feature has similarity 0 to everything.
    k is given, not chosen: the test features are used once.

    Args:
        train: Features that vote, of at least 2 classes.
        test: Features of another split, made by the same weights.
        k: Number of neighbours, in [1, N of `train`].

    Returns: `ProbeResult` with probe "knn" and `chosen` = k.
    Raises: ValueError for features that do not belong together, fewer than 2 classes, or k out of
        range.
    Source: [Wu2018], sec. 3.4; the paper takes k = 200 on ImageNet.
    """
    _check_pair(train, test)
    if not 1 <= k <= len(train.values):
        raise ValueError(
            f"k is {k} but there are {len(train.values)} training features; expected k in "
            f"[1, {len(train.values)}] (params: probe.k)"
        )
    order = np.argsort(train.example_ids)
    bank, labels = _unit_rows(train.values[order]), train.labels[order]
    rows = max(1, CHUNK // max(len(bank), labels.max() + 1))
    predicted = [
        _vote(np.round(_unit_rows(test.values[start : start + rows]) @ bank.T, 9), labels, k)
        for start in range(0, len(test.values), rows)
    ]
    return _result("knn", np.concatenate(predicted), k, train, test, converged=True)


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
    _check_matrix(values, "features")
    singular = np.linalg.svd(np.asarray(values, np.float64), compute_uv=False)
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
    Raises: ValueError for a side below 2: such a matrix cannot collapse further.
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
    """Whether features span little more than one direction, judged against what theory allows.

    Total collapse (constant features) has effective rank 1, isotropic random features of the same
    shape have `isotropic_rank`; the threshold lies a quarter of the way between them on a
    logarithmic scale, `isotropic_rank ** 0.25`, so that it can be reached from both sides whatever
    N and D are (2.4 of 32 features, 4.4 of 384). Features are not centred: a common offset much
    larger than all variation counts as collapse.

    Args:
        values: Features, shape (N, D), N and D >= 2, finite.

    Returns: `Collapse`.
    Raises: ValueError for another shape or non-finite values.
    Source: [Garrido2023]; the threshold is ours.

    >>> collapse(np.ones((50, 8))).collapsed, collapse(np.eye(8)).collapsed
    (True, False)
    """
    rank = effective_rank(values)
    isotropic = isotropic_rank(*values.shape)
    threshold = isotropic**COLLAPSED_POWER
    return Collapse(rank, isotropic, rank / isotropic, threshold, rank < threshold)


def _check_matrix(values: np.ndarray, where: str) -> None:
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"{where} have shape {values.shape}; expected (N, D), neither of them 0")
    finite = np.isfinite(values)
    if not finite.all():
        raise ValueError(
            f"{where} hold {(~finite).sum()} NaN or infinite values, the first in row "
            f"{np.flatnonzero(~finite.all(axis=1))[0]}; the network that made them diverged or "
            "was read wrongly: look at its training loss"
        )


def _check_pair(train: Features, test: Features) -> None:
    if train.weights_sha256 != test.weights_sha256:
        raise ValueError(
            f"training features come from weights {train.weights_sha256}, test features from "
            f"{test.weights_sha256}; expected the same weights. Test features extracted once, with "
            "other weights, made an earlier study measure nothing: extract both splits again for "
            "each checkpoint"
        )
    if train.split == test.split:
        raise ValueError(
            f"training and test features are both of split {train.split!r}; expected two splits: a "
            "probe tested on the examples it was fitted on measures memory"
        )
    if train.values.shape[1] != test.values.shape[1]:
        raise ValueError(
            f"training features have {train.values.shape[1]} dimensions, test features "
            f"{test.values.shape[1]}; expected the same layer of the same network"
        )
    if len(np.unique(train.labels)) < 2:
        raise ValueError(
            f"training features hold the single class {train.labels[0]}; expected at least 2"
        )


def _result(
    probe: str,
    predicted: np.ndarray,
    chosen: float,
    train: Features,
    test: Features,
    converged: bool,
) -> ProbeResult:
    n_correct = int((predicted == test.labels).sum())
    n_train, n_test = len(train.labels), len(test.labels)
    return ProbeResult(
        probe, n_correct / n_test, chosen, n_train, n_test, train.weights_sha256, converged
    )


def _choose_c(values: np.ndarray, labels: np.ndarray, grid: list[float], seed: int) -> float:
    """The C with the highest accuracy on a held-out fifth of each class; the smallest on ties."""
    shuffled = generator(seed, "probe").permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    # From the fifth on: a class of two or more examples always keeps one in the fitted part.
    is_held_out = np.zeros(len(labels), bool)
    is_held_out[by_class[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]] = True
    fitted, fitted_labels = values[~is_held_out], labels[~is_held_out]
    held_out, held_out_labels = values[is_held_out], labels[is_held_out]
    if not len(held_out) or len(np.unique(fitted_labels)) < 2:
        raise ValueError(
            f"{len(labels)} training features are too few to hold a fifth out and fit two classes "
            "on the rest; give more, or a c_grid of one value, which needs no choice"
        )
    held_out = _standardise(held_out, fitted)
    fitted = _standardise(fitted, fitted)
    model, n_correct = _classifier(), []
    for c in grid:
        model, _ = _fit(model, fitted, fitted_labels, c)
        n_correct.append((model.predict(held_out) == held_out_labels).sum())
    return grid[int(np.argmax(n_correct))]


def _classifier():
    # scikit-learn takes a second to import: only a linear probe pays for it.
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(
        solver="lbfgs", tol=TOLERANCE, max_iter=MAX_ITERATIONS, warm_start=True
    )


def _fit(model, values: np.ndarray, labels: np.ndarray, c: float) -> tuple:
    """The model fitted at C = `c`, and whether it converged; other warnings pass through."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        model.set_params(C=c).fit(values, labels)
    for warning in caught:
        if not issubclass(warning.category, ConvergenceWarning):
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    return model, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def _standardise(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`values` with the mean and standard deviation of `reference` taken out, column by column."""
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    # Below float32 resolution a spread is rounding, and dividing by it would make noise a feature.
    is_constant = std <= np.finfo(np.float32).eps * np.abs(mean)
    return (values - mean) / np.where(is_constant, np.inf, std)


def _unit_rows(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    norms = np.linalg.norm(values, axis=1, keepdims=True)
    return values / np.where(norms == 0, 1.0, norms)


def _vote(similarities: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    """Predicted labels (B,) from similarities (B, N) to the examples with `labels` (N,)."""
    n_rows, n_columns = similarities.shape
    kth = np.partition(similarities, n_columns - k, axis=1)[:, n_columns - k, None]  # (B, 1)
    nearer, level = similarities > kth, similarities == kth
    room = k - nearer.sum(axis=1, keepdims=True)
    chosen = nearer | (level & (level.cumsum(axis=1) <= room))
    columns = np.nonzero(chosen)[1].reshape(n_rows, k)
    nearest = np.take_along_axis(similarities, columns, axis=1)  # (B, N) -> (B, k)
    # Dividing all votes of a row by one number changes no winner and keeps exp from overflowing.
    weights = np.exp((nearest - nearest.max(axis=1, keepdims=True)) / KNN_TEMPERATURE)
    n_classes = labels.max() + 1
    cells = np.arange(n_rows)[:, None] * n_classes + labels[columns]
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=n_rows * n_classes)
    return np.round(votes.reshape(n_rows, n_classes), 9).argmax(axis=1)
