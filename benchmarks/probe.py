"""How long a linear probe's whole grid of C takes beside scikit-learn, and whether both find the
same classifiers.

    python benchmarks/probe.py [--n 50000] [--features 384] [--classes 10 100] [--limit 200]

Features are drawn: classes around centres in a space whose directions have a standard deviation of
1 / rank, mixed, with noise of its own scale for each example and a clipped lower side, as after a
ReLU; standardised. Both fit on one BLAS thread in one process and take turns by value of C, so that
what else the machine does meets both; times are CPU seconds. The grid is that of public linear
probes, 45 values from 1e-6 to 1e5. scikit-learn (L-BFGS, warm start along C, gradient tolerance
1e-5) fits every fourth value, and stops after `--limit` seconds: the row says how many it fitted.
kdlib is timed on these values, and on all 45. A last, small case runs scikit-learn to 1e-9, where
both are at the minimum.
"""

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
from threadpoolctl import threadpool_limits

from kdlib.probes.logistic import Fit, fit_path

GRID = 10.0 ** (np.arange(-24, 21) / 4)
EVERY = 4
N_TEST = 10_000


def make_features(
    n: int, d: int, k: int, seed: int = 0, separation: float = 0.35
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training features and labels, test features and labels; standardised by the former."""
    rng = np.random.default_rng(seed)
    deviations = 1 / np.arange(1, d + 1)
    mixing = np.linalg.qr(rng.normal(size=(d, d)))[0]
    centres = separation * rng.normal(size=(k, d)) * deviations
    labels = rng.integers(0, k, n + N_TEST)
    scales = 0.5 + rng.random((n + N_TEST, 1))
    values = (centres[labels] + scales * rng.normal(size=(n + N_TEST, d)) * deviations) @ mixing.T
    values = np.maximum(values, -0.1).astype(np.float32).astype(np.float64)
    mean, std = values[:n].mean(axis=0), values[:n].std(axis=0)
    values = (values - mean) / std
    return values[:n], labels[:n], values[n:], labels[n:]


def timed(make: Callable[[], object]) -> tuple[object, float]:
    """What a call returns, and the CPU seconds it took."""
    start = time.process_time()
    found = make()
    return found, time.process_time() - start


def objective(
    values: np.ndarray, labels: np.ndarray, weights: np.ndarray, intercepts: np.ndarray, c: float
) -> float:
    """Mean loss plus penalty over C * N, in float64."""
    scores = values @ weights.T + intercepts
    losses = np.logaddexp.reduce(scores, axis=1) - scores[np.arange(len(labels)), labels]
    return float(losses.mean() + (weights**2).sum() / (2 * c * len(labels)))


def compare(n: int, d: int, k: int, limit: float, tolerance: float) -> str:
    """One row of the table."""
    from sklearn.linear_model import LogisticRegression

    values, labels, unseen, unseen_labels = make_features(n, d, k)
    theirs = LogisticRegression(tol=tolerance, max_iter=20_000, warm_start=True)
    few, ours, spent, own = [], [], 0.0, 0.0
    path = fit_path(values, labels, GRID[::EVERY])
    for c in GRID[::EVERY]:
        fit, seconds = timed(lambda: next(path))
        own += seconds
        _, seconds = timed(lambda c=c: theirs.set_params(C=c).fit(values, labels))
        spent += seconds
        few.append((theirs.coef_.copy(), theirs.intercept_.copy()))
        ours.append(fit)
        if spent > limit:
            break
    whole, seconds = timed(lambda: list(fit_path(values, labels, GRID)))
    return _row(
        f"{n:,} x {d}, {k} classes", tolerance, len(few), own, spent, seconds,
        [f.converged for f in whole],
        *_differences(ours, few, values, labels, unseen, unseen_labels),
    )  # fmt: skip


def _differences(
    ours: list[Fit],
    theirs: list[tuple[np.ndarray, np.ndarray]],
    values: np.ndarray,
    labels: np.ndarray,
    unseen: np.ndarray,
    unseen_labels: np.ndarray,
) -> tuple[list[float], list[float], list[float]]:
    """By value of C: our accuracy and theirs, and our objective over theirs minus 1."""
    accuracies, reference, excess = [], [], []
    for fit, (weights, intercepts) in zip(ours, theirs, strict=True):
        accuracies.append(float((fit.predict(unseen) == unseen_labels).mean()))
        predicted = (unseen @ weights.T + intercepts).argmax(axis=1)
        reference.append(float((predicted == unseen_labels).mean()))
        found = objective(values, labels, fit.coefficients, fit.intercepts, fit.c)
        excess.append(found / objective(values, labels, weights, intercepts, fit.c) - 1)
    return accuracies, reference, excess


def _row(
    case: str,
    tolerance: float,
    n_values: int,
    own: float,
    spent: float,
    whole: float,
    converged: list[bool],
    accuracies: list[float],
    reference: list[float],
    excess: list[float],
) -> str:
    apart = 100 * np.abs(np.subtract(accuracies, reference))
    best = int(np.argmax(reference))
    return (
        f"| {case} | {tolerance:g} | {n_values} | {own:.1f} | {spent:.1f} | {spent / own:.1f} | "
        f"{whole:.1f} | {spent / whole:.1f} | {sum(converged)} of {len(converged)} | "
        f"{100 * reference[best]:.2f} | {apart[best]:.2f} | {apart.max():.2f} | "
        f"{min(excess):+.1e} to {max(excess):+.1e} |"
    )


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--features", type=int, default=384)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--limit", type=float, default=200.0, help="scikit-learn's seconds a case")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # scikit-learn's, of fits that reach 20,000 iterations
    print(
        "| features | tol | values | kdlib, s | scikit-learn, s | ratio | kdlib, all 45, s | "
        "few of theirs / all 45 of ours | converged | best accuracy, % | apart there, points | "
        "at most | objective, kdlib over scikit-learn |",
        f"| --- |{' ---: |' * 12}",
        sep="\n",
    )
    with threadpool_limits(1, user_api="blas"):
        for k in arguments.classes:
            print(compare(arguments.n, arguments.features, k, arguments.limit, 1e-5), flush=True)
        print(compare(2_000, 64, 10, arguments.limit, 1e-9), flush=True)


if __name__ == "__main__":
    main()
