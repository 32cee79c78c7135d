"""Multinomial logistic regression for a whole grid of regularisation strengths.

The objective is scikit-learn's: C times the sum of the losses plus half the squared weights, the
intercepts free. The features are rotated once into their principal axes, where the curvature of
every objective of the grid is nearly diagonal. L-BFGS [Liu1989] with that diagonal as its first
guess fits one C after the other, from the smallest; each fit starts from an extrapolation of the
two before it and keeps the curvature learnt so far.

N examples, D features, K classes, R <= D axes along which the features vary.

Sources:
    [Liu1989] Liu, Nocedal. On the limited memory BFGS method for large scale optimization. 1989.
        DOI 10.1007/BF01589116.
    [Bohning1992] Böhning. Multinomial logistic regression algorithm. 1992.
        DOI 10.1007/BF00048682.
    [Byrd1994] Byrd, Nocedal, Schnabel. Representations of quasi-Newton matrices and their use in
        limited memory methods. 1994. DOI 10.1007/BF01582063.
    [Hager2005] Hager, Zhang. A new conjugate gradient method with guaranteed descent and an
        efficient line search. 2005. DOI 10.1137/030601880.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

# A fit has converged when no component of the mean objective's gradient exceeds TOLERANCE (the
# criterion of scikit-learn), and a Newton step with the diagonal curvature would lower the
# objective by less than the share GAP. For linearly separable classes and a large C the first is
# met long before the weights converge. The second is an estimate, no bound: from C = 10 on,
# objectives were found 2.0e-4 to 6.4e-4 above their minimum, which changed 1 of 597 predictions
# (2026-11).
TOLERANCE = 1e-5
GAP = 1e-4
MAX_ITERATIONS = 1000
# Size of a block of examples: features and logits stay in a core's cache (2026-11, 1 MiB).
BLOCK, LEAST_ROWS = 2**17, 512
COPIED = 4096  # rows of a block where each row is read once
MEMORY = 20  # steps whose curvature is kept
# Axes with a smaller variance, relative to the largest, hold rounding errors of float32 features.
FLAT = 1e-14


@dataclass(frozen=True, eq=False)
class Fit:
    """One fitted classifier.

    `coefficients` (K, D) and `intercepts` (K,), float64, rows in the order of `classes` (K,) and of
    sum zero; `objective` is the mean of the losses plus the penalty over C * N, nats; `converged`
    whether the fit met `TOLERANCE` and `GAP`. The objective can lie further above its minimum than
    `GAP`, which is compared with an estimate.
    """

    c: float
    classes: np.ndarray
    coefficients: np.ndarray
    intercepts: np.ndarray
    objective: float
    converged: bool

    def predict(self, values: np.ndarray) -> np.ndarray:
        """Labels (n,) of features (n, D); the smallest of equally likely ones."""
        scores = values @ self.coefficients.T + self.intercepts
        return self.classes[scores.argmax(axis=1)]


def fit_path(values: np.ndarray, labels: np.ndarray, c_grid: Sequence[float]) -> Iterator[Fit]:
    """The classifiers of a whole grid of C, from the smallest C to the largest.

    The minimum is that of scikit-learn's `LogisticRegression(C=c)`, whose two classes share one
    weight vector. Products are float32, sums over blocks of examples float64; with one BLAS thread
    the same input gives the same bytes.

    Args:
        values: Features, shape (N, D), finite; of about equal scale, since one C weighs them all.
        labels: shape (N,), integers; at least two different ones.
        c_grid: Inverse strengths, > 0, in any order; each is fitted once.

    Returns: One `Fit` for each C; `converged` is False where `MAX_ITERATIONS` are too few.
    Source: [Liu1989]; the first guess is the bound of [Bohning1992] with each class's mean of
        p (1 - p) in place of 1/2; steps are accepted as in [Hager2005], sec. 4.
    """
    grid = sorted(set(map(float, c_grid)))
    classes, codes = np.unique(labels, return_inverse=True)
    problem = _Problem(values, codes, len(classes))
    # one weight vector w of two classes is the pair -w/2, w/2, whose squares sum to half of w's
    doubled = 2.0 if len(classes) == 2 else 1.0
    point, before = problem.at(np.zeros((len(classes), problem.n_axes + 1))), None
    memory = _Memory(point.weights.shape)
    for c in grid:
        start = None if before is None else point.weights - before
        before = point.weights
        strength = doubled / (c * len(values))
        point, converged = _minimise(problem, point, strength, memory, start)
        coefficients = point.weights[:, :-1] @ problem.axes.T  # for the features as given
        intercepts = point.weights[:, -1] - coefficients @ problem.mean
        objective = point.loss + problem.penalty(point.weights, strength)
        yield Fit(c, classes, coefficients, intercepts, objective, converged)


@dataclass(frozen=True, eq=False)
class _Point:
    """Mean loss, its gradient (K, R + 1) and each class's mean of p (1 - p), at some weights."""

    weights: np.ndarray
    loss: float
    gradient: np.ndarray
    doubt: np.ndarray


class _Problem:
    """Features in their principal axes, float32, the constant that intercepts weigh last."""

    def __init__(self, values: np.ndarray, codes: np.ndarray, n_classes: int) -> None:
        n, d = values.shape
        self.codes, self.n_classes = codes, n_classes
        self.mean = values.mean(axis=0, dtype=np.float64)
        if n < d:  # the axes are at most N
            _, singular, rows = np.linalg.svd(values - self.mean, full_matrices=False)
            variances, axes = singular[::-1] ** 2 / n, rows[::-1].T
        else:
            moments = np.zeros((d, d))
            for start in range(0, n, COPIED):
                centred = values[start : start + COPIED] - self.mean
                moments += centred.T @ centred
            variances, axes = np.linalg.eigh(moments / n)
        kept = variances > FLAT * max(variances[-1], np.finfo(float).tiny)
        self.axes = axes[:, kept]  # (D, R)
        self.n_axes = self.axes.shape[1]
        self.curvature = np.append(variances[kept], 1.0)  # (R + 1,)
        self.penalised = np.append(np.ones(self.n_axes), 0.0)
        self.rotated = np.ones((n, self.n_axes + 1), np.float32)
        for start in range(0, n, COPIED):
            part = slice(start, start + COPIED)
            self.rotated[part, : self.n_axes] = (values[part] - self.mean) @ self.axes

    def at(self, weights: np.ndarray) -> _Point:
        """One pass over the examples.

        Logits are differences from that of the gold label, whose probability is not subtracted from
        one, so that losses far below float32's resolution of 1 keep their digits.
        """
        n, n_rows = len(self.codes), max(LEAST_ROWS, BLOCK // sum(weights.shape))
        loss, gradient, doubt = 0.0, np.zeros(weights.shape), np.zeros(self.n_classes)
        weights32 = weights.astype(np.float32)
        for start in range(0, n, n_rows):
            x, gold = self.rotated[start : start + n_rows], self.codes[start : start + n_rows]
            rows = np.arange(len(gold))
            error = weights32 @ x.T  # (K, B)
            error -= error[gold, rows]
            largest = error.max(axis=0)  # (B,), >= 0
            error -= largest
            np.exp(error, out=error)
            error[gold, rows] = 0
            others = error.sum(axis=0)
            rest = others + np.expm1(-largest)
            loss += float((largest + np.log1p(rest)).sum(dtype=np.float64))
            error /= 1 + rest  # p of the wrong classes
            error[gold, rows] = -others / (1 + rest)  # p - 1 of the right one
            gradient += error @ x
            doubt += np.abs(error).sum(axis=1) - np.einsum("kb,kb->k", error, error)
        return _Point(weights, loss / n, gradient / n, doubt / n)

    def penalty(self, weights: np.ndarray, strength: float) -> float:
        return 0.5 * strength * float((self.penalised * weights**2).sum())

    def largest(self, gradient: np.ndarray) -> float:
        """Largest component of a gradient with respect to the weights of the features as given."""
        along, of_constant = gradient[:, :-1] @ self.axes.T, gradient[:, -1]
        return float(max(np.abs(along).max(), np.abs(of_constant).max()))


def _minimise(
    problem: _Problem,
    point: _Point,
    strength: float,
    memory: "_Memory",
    start: np.ndarray | None,
) -> tuple[_Point, bool]:
    """Minimise mean loss + strength / 2 * squared weights from a point that is known.

    Args:
        memory: Of the fits before; the newest steps are added.
        start: First direction to try, if it goes down.
    """
    for iteration in itertools.count():
        value = point.loss + problem.penalty(point.weights, strength)
        gradient = point.gradient + strength * problem.penalised * point.weights
        doubt = np.maximum(point.doubt, 1e-3 * point.doubt.max())[:, None]
        metric = np.maximum(doubt * problem.curvature + strength * problem.penalised, 1e-30)
        gap = 0.5 * float((gradient**2 / metric).sum())  # what a Newton step would gain
        if problem.largest(gradient) <= TOLERANCE and gap <= GAP * value:
            return point, True
        if iteration == MAX_ITERATIONS:
            return point, False
        direction = start if iteration == 0 else None
        if direction is None or (direction * gradient).sum() >= 0:
            direction = memory.direction(problem, gradient, metric, strength)
        if (direction * gradient).sum() >= 0:  # no descent direction
            memory.clear()
            direction = memory.direction(problem, gradient, metric, strength)
        following = _search(problem, point, direction, strength, value, gradient)
        if following is None:
            if not memory.n:
                return point, False
            memory.clear()
            continue
        step = following.weights - point.weights
        change = following.gradient - point.gradient
        if (step * change).sum() > 1e-12 * np.sqrt((step**2).sum() * (change**2).sum()):
            memory.add(step, change)
        point = following


class _Memory:
    """The last steps (M, P) and the changes of the gradient of the loss over them, independent of
    the strength: what was learnt at one C holds at the next."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.steps = np.empty((MEMORY, shape[0] * shape[1]))
        self.changes = np.empty_like(self.steps)
        self.newest = -1
        self.n = 0

    def add(self, step: np.ndarray, change: np.ndarray) -> None:
        self.newest = (self.newest + 1) % MEMORY
        self.n = min(self.n + 1, MEMORY)
        self.steps[self.newest], self.changes[self.newest] = step.ravel(), change.ravel()

    def clear(self) -> None:
        self.n = 0

    def direction(
        self, problem: _Problem, gradient: np.ndarray, metric: np.ndarray, strength: float
    ) -> np.ndarray:
        """Minus the gradient times the inverse curvature that the memory and the metric suggest.

        In the compact form of [Byrd1994], eq. 3.1: products of matrices instead of two loops over
        vectors.
        """
        if not self.n:
            return -_level(gradient / metric)
        rows = (self.newest - np.arange(self.n)[::-1]) % MEMORY  # oldest first
        steps = self.steps[rows]
        penalised = np.broadcast_to(problem.penalised, gradient.shape).ravel()
        changes = self.changes[rows] + strength * penalised * steps  # (M, P)
        g, inverse = gradient.ravel(), 1 / metric.ravel()
        products = steps @ changes.T  # (M, M)
        # the metric times what the newest pair says of it
        inverse *= products[-1, -1] / (changes[-1] ** 2 * inverse).sum()
        bent = changes * inverse
        upper = np.triu(products)
        first = np.linalg.solve(upper, steps @ g)
        middle = np.diag(products) * first + bent @ (first @ changes)
        along = np.linalg.solve(upper.T, middle - bent @ g)
        product = g * inverse + along @ steps - first @ bent
        return -_level(product.reshape(gradient.shape))


def _level(weights: np.ndarray) -> np.ndarray:
    """Weights less their mean over classes, which changes no probability."""
    return weights - weights.mean(axis=0)


def _search(
    problem: _Problem,
    point: _Point,
    direction: np.ndarray,
    strength: float,
    value: float,
    gradient: np.ndarray,
) -> _Point | None:
    """A point along a direction that meets the strong Wolfe conditions; None after 30 trials.

    The whole step is tried first. Slopes decide near the minimum, where float32 sums no longer tell
    two values apart.
    """
    slope = float((direction * gradient).sum())
    low, slope_low, high, length = 0.0, slope, None, 1.0
    for _ in range(30):
        trial = problem.at(point.weights + length * direction)
        new = trial.loss + problem.penalty(trial.weights, strength)
        along = trial.gradient + strength * problem.penalised * trial.weights
        new_slope = float((direction * along).sum())
        rises = new > value + 1e-4 * length * slope + 1e-7 * value
        if rises or new_slope > -0.9 * slope:
            high = length
            share = slope_low / (slope_low - new_slope) if new_slope > slope_low else 0.5
            length = low + (high - low) * float(np.clip(share, 0.1, 0.9))
        elif new_slope < 0.9 * slope:
            low, slope_low = length, new_slope
            length = 2 * length if high is None else 0.5 * (low + high)
        else:
            return trial
    return None
