"""How well frozen features separate the classes: linear, few-shot and k-NN probes.

Features carry the fingerprint of the weights that made them; a probe refuses training and test
features of different weights, or of one split. Test features are read once, after every choice.

Sources:
    [Alain2016] Alain, Bengio. Understanding intermediate layers using linear classifier probes.
        2016. arXiv:1610.01644.
    [Wu2018] Wu, Xiong, Yu, Lin. Unsupervised Feature Learning via Non-Parametric Instance
        Discrimination. 2018. arXiv:1805.01978.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from threadpoolctl import threadpool_limits

from kdlib.models.outputs import chance_accuracy
from kdlib.probes.diagnostics import matrix, unit_rows
from kdlib.probes.logistic import fit_path
from kdlib.repro import files
from kdlib.repro.seeds import generator

KNN_TEMPERATURE = 0.07  # [Wu2018], sec. 3.4
HELD_OUT_EVERY = 5  # one training example in five chooses C
FEW_SHOT_C = 1.0  # fixed: so few examples cannot choose it
CHUNK = 2**22  # similarities held at once by the k-NN probe: 16 MiB
GROUP = 32  # similarities of which the k-NN probe first takes the largest


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one split under one set of weights, checked when they are made.

    Args:
        values: shape (N, D), float32, finite.
        labels: shape (N,), int64, >= 0.
        example_ids: shape (N,), int64, distinct.
        split: Which split of the source the examples are from, such as "train" or "test".
        weights_sha256: Fingerprint of the weights that made `values`.

    Raises: ValueError for another shape, no example, NaN or infinity, an unlabelled example, or a
        repeated id.
    """

    values: np.ndarray
    labels: np.ndarray
    example_ids: np.ndarray
    split: str
    weights_sha256: str

    def __post_init__(self) -> None:
        where = f"features of split {self.split!r}"
        matrix(self.values, where)
        if not len(self.values) == len(self.labels) == len(self.example_ids):
            raise ValueError(
                f"{where}: {len(self.values)} rows, {len(self.labels)} labels, "
                f"{len(self.example_ids)} example ids; expected one of each per example"
            )
        if self.labels.min() < 0:
            raise ValueError(
                f"{where} hold {(self.labels < 0).sum()} unlabelled examples (label < 0); "
                "leave them out before probing"
            )
        if len(np.unique(self.example_ids)) != len(self.example_ids):
            raise ValueError(f"{where} hold an example id twice; expected each example once")

    @property
    def examples(self) -> str:
        """Split, number, and sha256 of example ids and labels: what a probe of them reads."""
        sha256 = files.sha256_array(self.example_ids, self.labels)
        return f"{self.split} {len(self.labels)} {sha256}"


@dataclass(frozen=True)
class ProbeResult:
    """One probe of one set of weights.

    `accuracy` is in [0, 1], high = good: correct test predictions, summed and divided once.
    `chosen` is C of the linear probe, k of the k-NN probe. `converged` is False when the linear
    probe's last fit stopped short of the tolerance; the k-NN probe has nothing to converge.
    `chance` is the `chance_accuracy` of the k-NN probe's predictions.
    """

    probe: str
    accuracy: float
    chosen: float
    n_train: int
    n_test: int
    weights_sha256: str
    converged: bool
    chance: float | None = None


def linear_probe(
    train: Features, test: Features, c_grid: Sequence[float], seed: int
) -> ProbeResult:
    """Test accuracy of multinomial logistic regression on frozen features.

    One fifth of the training features, stratified by class and drawn by `seed`, chooses C; ties go
    to the smallest C. The chosen C is refitted on all training features, and the test features are
    used once. Every fit standardises with the mean and standard deviation of the examples it is
    fitted on; a constant feature is left at zero. Fits are those of `logistic` on one thread (sums
    depend on the number of threads), along the grid with a warm start and for the refit with a cold
    one; `converged` says whether all of them did. Two classes share one weight vector. The order of
    the examples changes nothing.

    Args:
        train: Features the probe is fitted on, of at least 2 classes.
        test: Features of another split, made by the same weights. A class that is absent from
            `train` is not predicted.
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
        chosen, converged = grid[0], True
        if len(grid) > 1:
            chosen, converged = _choose_c(values, labels, grid, seed)
        (fit,) = fit_path(_standardise(values, values), labels, [chosen])
        predicted = fit.predict(_standardise(test.values.astype(np.float64), values))
    converged = converged and fit.converged
    return ProbeResult(
        "linear", int((predicted == test.labels).sum()) / len(test.labels), chosen,
        len(train.labels), len(test.labels), train.weights_sha256, converged,
    )  # fmt: skip


def few_shot_probe(
    train: Features, test: Features, n_shots: int, n_draws: int, seed: int
) -> ProbeResult:
    """Test accuracy of the linear probe fitted on a few training examples of each class, the mean
    over draws.

    C is `FEW_SHOT_C`; features are standardised by the examples drawn. Draws are independent; the
    same seed draws the same examples for every network.

    Args:
        train: Features of which examples are drawn, of at least 2 classes.
        test: Features of another split, made by the same weights.
        n_shots: Examples of each class, >= 1.
        n_draws: Number of draws, >= 1.
        seed: Requested seed of the draws.

    Returns: `ProbeResult` with probe `few_shot_<n_shots>` and `n_train` of one draw.
    Raises: ValueError for features that do not belong together, fewer than 2 classes, no draw, or a
        class with fewer than `n_shots` examples.
    Source: [Alain2016], on few examples.
    """
    _check_pair(train, test)
    classes, counts = np.unique(train.labels, return_counts=True)
    if n_draws < 1 or not 1 <= n_shots <= counts.min():
        raise ValueError(
            f"{n_draws} draws of {n_shots} examples of each class, where class "
            f"{classes[counts.argmin()]} has {counts.min()}; expected at least one draw of 1 to "
            f"{counts.min()} (params: probe.few_shot, probe.few_shot_draws)"
        )
    order = np.argsort(train.example_ids)
    order = order[np.argsort(train.labels[order], kind="stable")]  # by class, then id
    members = np.split(order, np.cumsum(counts)[:-1])
    correct, converged = [], True
    unseen = test.values.astype(np.float64)
    with threadpool_limits(1, user_api="blas"):
        for draw in range(n_draws):
            rng = generator(seed, "probe", n_shots, draw)
            rows = np.concatenate([rng.choice(m, n_shots, replace=False) for m in members])
            values = train.values[rows].astype(np.float64)
            standard = _standardise(values, values)
            (fit,) = fit_path(standard, train.labels[rows], [FEW_SHOT_C])
            correct.append(fit.predict(_standardise(unseen, values)) == test.labels)
            converged = converged and fit.converged
    n_correct, n_test = int(np.sum(correct)), len(test.labels)
    return ProbeResult(
        f"few_shot_{n_shots}", n_correct / (n_draws * n_test), FEW_SHOT_C, len(rows), n_test,
        train.weights_sha256, converged,
    )  # fmt: skip


def knn_probe(train: Features, test: Features, k: int) -> ProbeResult:
    """Test accuracy of weighted k nearest neighbours under cosine similarity.

    Each of the k most similar training examples votes for its class with weight
    exp(similarity / `KNN_TEMPERATURE`). Equally similar neighbours are taken by smallest example
    id, equal votes go to the smallest label; similarities and votes equal to nine decimals count as
    equal, so that rounding does not decide. float32 products, with a margin for their error, select
    the examples whose similarity is computed in float64. An all-zero feature has similarity 0 to
    every other. k is given; the test features are used once.

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
    bank, labels = unit_rows(train.values[order]), train.labels[order]
    unseen, bank32 = unit_rows(test.values), bank.astype(np.float32)
    n_classes, predicted = int(labels.max()) + 1, []
    rows = max(1, CHUNK // max(len(bank), n_classes))
    with threadpool_limits(1, user_api="blas"):
        for start in range(0, len(unseen), rows):
            similarities, columns = _nearest(unseen[start : start + rows], bank, bank32, k)
            predicted.append(_vote(similarities, labels[columns], n_classes))
    answers = np.concatenate(predicted)
    n_correct = int((answers == test.labels).sum())
    return ProbeResult(
        "knn", n_correct / len(test.labels), k, len(train.labels), len(test.labels),
        train.weights_sha256, converged=True, chance=chance_accuracy(answers, test.labels),
    )  # fmt: skip


def _check_pair(train: Features, test: Features) -> None:
    if train.weights_sha256 != test.weights_sha256:
        raise ValueError(
            f"training features come from weights {train.weights_sha256}, test features from "
            f"{test.weights_sha256}; expected the same weights: extract both splits again for "
            "each checkpoint"
        )
    if train.split == test.split:
        raise ValueError(
            f"training and test features are both of split {train.split!r}; expected two splits: a "
            "probe is tested on examples that it was not fitted on"
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


def _choose_c(
    values: np.ndarray, labels: np.ndarray, grid: list[float], seed: int
) -> tuple[float, bool]:
    """The C with the highest accuracy on a held-out fifth of each class, the smallest on ties; and
    whether every fit converged."""
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
    n_correct, converged = [], True
    for fit in fit_path(_standardise(fitted, fitted), fitted_labels, grid):
        n_correct.append((fit.predict(held_out) == held_out_labels).sum())
        converged = converged and fit.converged
    return grid[int(np.argmax(n_correct))], converged


def _standardise(values: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """`values` with the mean and standard deviation of `reference` taken out, column by column."""
    mean, std = reference.mean(axis=0), reference.std(axis=0)
    # A deviation below float32 resolution is rounding: dividing by it would amplify the rounding.
    is_constant = std <= np.finfo(np.float32).eps * np.abs(mean)
    return (values - mean) / np.where(is_constant, np.inf, std)


def _nearest(
    rows: np.ndarray, bank: np.ndarray, bank32: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of a bank (N, D) for each row (B, D), all of norm 1 or 0.

    Returns: Similarities (B, k) rounded to nine decimals, nearest first, and their columns; the
        smaller column first where similarities are equal.
    """
    n, d = bank.shape
    rough = rows.astype(np.float32) @ bank32.T  # (B, N)
    n_groups = n // GROUP
    level = rough
    if n_groups >= k:  # the k-th largest maximum of a group is at most the k-th largest value
        level = rough[:, : n_groups * GROUP].reshape(len(rows), GROUP, n_groups).max(axis=1)
    kth = np.partition(level, level.shape[1] - k, axis=1)[:, level.shape[1] - k, None]  # (B, 1)
    # sums of d products of unit vectors are this far off at most, on either side
    margin = np.float32(2 * (d + 4) * np.finfo(np.float32).eps)
    places, columns = np.nonzero(rough >= kth - margin)
    if len(columns) * d > CHUNK:  # many similarities lie within the margin
        exact = (rows @ bank.T)[places, columns]
    else:
        exact = np.einsum("nd,nd->n", rows[places], bank[columns])
    exact = np.round(exact, 9)
    order = np.lexsort((columns, -exact, places))
    starts = np.searchsorted(places, np.arange(len(rows)))
    chosen = order[starts[:, None] + np.arange(k)]  # (B, k)
    return exact[chosen], columns[chosen]


def _vote(similarities: np.ndarray, labels: np.ndarray, n_classes: int) -> np.ndarray:
    """Predicted labels (B,) from the similarities (B, k), nearest first, and the labels (B, k) of
    the neighbours."""
    n_rows = len(similarities)
    # Dividing all votes of a row by one number changes no winner and keeps exp from overflowing.
    weights = np.exp((similarities - similarities[:, :1]) / KNN_TEMPERATURE)
    cells = np.arange(n_rows)[:, None] * n_classes + labels
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=n_rows * n_classes)
    return np.round(votes.reshape(n_rows, n_classes), 9).argmax(axis=1)
