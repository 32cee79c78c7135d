"""The scores of the training dynamics.

Pure functions on arrays, computed in float64 over blocks of examples, so that memory stays bounded
whatever N is. To add one: a function here, its column in `datamap._score_block`, its direction in
`kdlib.study.selections.DIFFICULTY`, its row in docs/scores.md.

[Swayamdipta2020] Swayamdipta et al., Dataset Cartography, 2020, arXiv 2009.10795
[Toneva2019] Toneva et al., An Empirical Study of Example Forgetting, 2019, arXiv 1812.05159
[Pleiss2020] Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking,
    2020, arXiv 2001.10528
[Paul2021] Paul et al., Deep Learning on a Data Diet, 2021, arXiv 2107.07075
[He2024] He et al., Large-scale Dataset Pruning with Dynamic Uncertainty, 2024, arXiv 2306.05175
[Zhang2024] Zhang et al., Spanning Training Progress: Temporal Dual-Depth Scoring, 2024,
    arXiv 2311.13613
[Cho2025] Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty and
    Prediction Uncertainty, 2025, arXiv 2502.06905
"""

import itertools
import math
from collections.abc import Callable, Iterable

import numpy as np

# Values of one block of examples: 1 MiB as float64, which stays in a core's cache
CHUNK_VALUES = 2**17


def per_example(array: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Apply `score` to float64 blocks (E, n, ...) of `array` (E, N, ...); returns (N,).

    Blocks are of nearly equal size, so that NumPy sums every example in the same way.

    Raises: ValueError for an array of one axis or without epochs, or values that are not finite.
    """
    if array.ndim < 2 or array.shape[0] < 1:
        raise ValueError(f"got an array of shape {array.shape}; expected (E, N, ...) with E >= 1")
    n_examples = array.shape[1]
    parts = []
    for start, stop in blocks(array.size, n_examples):
        block = np.asarray(array[:, start:stop], dtype=np.float64)
        if not np.isfinite(block).all():
            raise ValueError(
                "the array holds NaN or infinity: cells that were never recorded; expected a "
                "finished log (DynamicsLog.open)"
            )
        parts.append(score(block))
    return np.concatenate(parts)


def blocks(n_values: int, n_examples: int) -> Iterable[tuple[int, int]]:
    """Ranges of examples of about `CHUNK_VALUES` values each."""
    n_blocks = min(max(1, math.ceil(n_values / CHUNK_VALUES)), max(1, n_examples))
    return itertools.pairwise(n_examples * i // n_blocks for i in range(n_blocks + 1))


def _per_example_correct(correct: np.ndarray, score: Callable) -> np.ndarray:
    """`per_example` for 0/1 records; `score` takes a bool block."""

    def checked(block: np.ndarray) -> np.ndarray:
        if not ((block == 0) | (block == 1)).all():
            raise ValueError(
                "correct holds values other than 0 and 1 (-1 = never recorded); expected a "
                "finished log (DynamicsLog.open)"
            )
        return score(block == 1)

    return per_example(correct, checked)


def _check_window(n_epochs: int, window: int, least: int) -> None:
    if not least <= window <= n_epochs:
        raise ValueError(
            f"window is {window}; expected [{least}, {n_epochs}], because {n_epochs} epochs were "
            "recorded: change dynamics.window in the study, or record more epochs"
        )


def confidence(gold_prob: np.ndarray) -> np.ndarray:
    """Mean over epochs of the probability of the gold label.

    Args:
        gold_prob: (E, N) float in [0, 1].

    Returns: (N,) float64 in [0, 1]; high = easy. Source: [Swayamdipta2020], sec. 2.

    >>> confidence(np.array([[0.25, 1.0], [0.75, 1.0]])).tolist()
    [0.5, 1.0]
    """
    return per_example(gold_prob, lambda block: block.mean(axis=0))


def variability(gold_prob: np.ndarray) -> np.ndarray:
    """Population standard deviation (ddof=0) over epochs of the probability of the gold label.

    Args:
        gold_prob: (E, N) float in [0, 1].

    Returns: (N,) float64 in [0, 0.5]; high = ambiguous. Source: [Swayamdipta2020], sec. 2.

    >>> variability(np.array([[0.25, 1.0], [0.75, 1.0]])).tolist()
    [0.25, 0.0]
    """
    return per_example(gold_prob, lambda block: block.std(axis=0))


def correctness(correct: np.ndarray) -> np.ndarray:
    """Fraction of epochs in which the prediction is the gold label.

    Args:
        correct: (E, N) int8 or bool, 0 or 1.

    Returns: (N,) float64 in [0, 1]; high = easy. Source: [Swayamdipta2020], sec. 2; the published
        code counts epochs, here it is the fraction.

    >>> correctness(np.array([[1, 0], [1, 0], [0, 0], [1, 0]])).tolist()
    [0.75, 0.0]
    """
    return _per_example_correct(correct, lambda block: block.mean(axis=0))


def forgetting_events(correct: np.ndarray) -> np.ndarray:
    """Number of changes from correct to incorrect between consecutive recorded epochs.

    Args:
        correct: (E, N) int8 or bool, 0 or 1.

    Returns: (N,) int64 in [0, E // 2]; high = forgettable; 0 for an example never learned, which
        `never_learned` tells apart, and which `forgetting_rank` makes the hardest. Source:
        [Toneva2019]; the paper counts every mini-batch presentation.

    >>> forgetting_events(np.array([[1, 0], [0, 0], [1, 0], [0, 0]])).tolist()
    [2, 0]
    """
    return _per_example_correct(
        correct, lambda block: (block[:-1] & ~block[1:]).sum(axis=0, dtype=np.int64)
    )


def never_learned(correct: np.ndarray) -> np.ndarray:
    """Whether the prediction was the gold label in no recorded epoch.

    Args:
        correct: (E, N) int8 or bool, 0 or 1.

    Returns: (N,) bool. Source: [Toneva2019], its unlearned examples.

    >>> never_learned(np.array([[1, 0], [0, 0]])).tolist()
    [False, True]
    """
    return _per_example_correct(correct, lambda block: ~block.any(axis=0))


def forgetting_rank(events: np.ndarray, never_learned: np.ndarray) -> np.ndarray:
    """What `forgetting_events` ranks by: an example never learned is harder than every other one.

    Args:
        events: (N,) int, as `forgetting_events` counts them.
        never_learned: (N,) bool.

    Returns: (N,) float64 >= 0; high = hard. Examples never learned all have one more than the
        largest count. Source: [Toneva2019], who give them infinitely many; a finite number can be
        averaged over runs.

    >>> forgetting_rank(np.array([0, 2, 0]), np.array([False, False, True])).tolist()
    [0.0, 2.0, 3.0]
    """
    events = np.asarray(events, np.float64)
    return np.where(never_learned, events.max(initial=0) + 1, events)


def aum(margin: np.ndarray) -> np.ndarray:
    """Area under the margin: mean over epochs of gold logit minus largest other logit.

    Args:
        margin: (E, N) float, in logits.

    Returns: (N,) float64; low = hard or mislabelled. Source: [Pleiss2020].

    >>> aum(np.array([[2.0, -1.0], [4.0, 0.0]])).tolist()
    [3.0, -0.5]
    """
    return per_example(margin, lambda block: block.mean(axis=0))


def el2n(recorded: np.ndarray, *, epoch: int) -> np.ndarray:
    """L2 norm of softmax minus one-hot label at one early epoch.

    Args:
        recorded: (E, N) float, the norm in each epoch of one run; or (S, E, N) of several runs,
            which are averaged.
        epoch: Recorded epoch, counted from 1.

    Returns: (N,) float64 in [0, sqrt(2)]; high = hard.
    Raises: ValueError for an epoch that was not recorded.
    Source: [Paul2021], sec. 2; the paper averages 10 runs, here S.

    >>> el2n(np.array([[0.5, 1.0], [0.25, 0.0]]), epoch=2).tolist()
    [0.25, 0.0]
    """
    n_epochs = recorded.shape[-2]
    if not 1 <= epoch <= n_epochs:
        raise ValueError(
            f"el2n epoch is {epoch}; expected [1, {n_epochs}], the recorded epochs counted from "
            "1: change dynamics.el2n_epoch in the study, or record more epochs"
        )
    runs = recorded if recorded.ndim == 3 else recorded[None]  # (S, E, N)
    return per_example(runs[:, epoch - 1], lambda block: block.mean(axis=0))


def entropy(recorded: np.ndarray) -> np.ndarray:
    """Mean over epochs of the entropy of the predicted distribution.

    Args:
        recorded: (E, N) float, the entropy in each epoch, nats.

    Returns: (N,) float64 in [0, ln C], nats; high = uncertain.

    >>> entropy(np.array([[0.5, 0.0], [1.0, 0.0]])).tolist()
    [0.75, 0.0]
    """
    return per_example(recorded, lambda block: block.mean(axis=0))


def loss(recorded: np.ndarray) -> np.ndarray:
    """Mean over epochs of the cross-entropy with the gold label.

    Args:
        recorded: (E, N) float, the cross-entropy in each epoch, nats.

    Returns: (N,) float64 >= 0, nats; high = hard.

    >>> loss(np.array([[3.0, 0.5], [1.0, 0.0]])).tolist()
    [2.0, 0.25]
    """
    return per_example(recorded, lambda block: block.mean(axis=0))


def trend(gold_prob: np.ndarray) -> np.ndarray:
    """Least-squares slope over epochs of the probability of the gold label.

    Args:
        gold_prob: (E, N) float in [0, 1], E >= 2.

    Returns: (N,) float64, 1/epoch; positive = improving.
    Raises: ValueError for a single epoch, which has no slope.
    Source: no paper; some public code calls it forgetfulness.

    >>> trend(np.array([[0.0, 0.5], [0.25, 0.5], [0.5, 0.5]])).tolist()
    [0.25, 0.0]
    """
    n_epochs = gold_prob.shape[0]
    if n_epochs < 2:
        raise ValueError(f"trend needs at least 2 recorded epochs; got {n_epochs}")
    time = np.arange(n_epochs) - (n_epochs - 1) / 2  # (E,), sums to 0
    weights = (time / (time**2).sum())[:, None]
    return per_example(gold_prob, lambda block: (weights * block).sum(axis=0))


def dyn_unc(gold_prob: np.ndarray, *, window: int) -> np.ndarray:
    """Dynamic uncertainty: standard deviation (ddof=1) of the gold probability within a window of
    epochs, averaged over all E - window + 1 windows.

    Args:
        gold_prob: (E, N) float in [0, 1].
        window: Epochs per window, in [2, E]; the paper takes 10.

    Returns: (N,) float64 >= 0; high = uncertain (kept by the paper).
    Raises: ValueError for a window out of range.
    Source: [He2024]; its average leaves out the last window, here it holds every window, as in
    [Cho2025]; the factor 10 of its code, which orders nothing, is left out.

    >>> dyn_unc(np.array([[0.0, 1.0], [0.5, 1.0], [0.5, 1.0]]), window=2).round(4).tolist()
    [0.1768, 0.0]
    """
    _check_window(gold_prob.shape[0], window, least=2)
    return per_example(gold_prob, lambda block: _windows(block, window)[1].mean(axis=0))


def _windows(block: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (ddof=1) of each window of epochs: (E, n) -> (E - window + 1, n).

    By running sums of the deviations from the example's mean: every epoch is added once, whatever
    the window. A series that never changes has deviations of exactly 0.
    """
    middle = block.mean(axis=0)
    # (E + 1, 2, n): running sums from 0 of deviations and of their squares
    sums = np.zeros((len(block) + 1, 2, block.shape[1]))
    np.subtract(block, middle, out=sums[1:, 0])
    sums[1:, 0][:, (block == block[0]).all(axis=0)] = 0  # without the rounding of their mean
    np.square(sums[1:, 0], out=sums[1:, 1])
    np.cumsum(sums, axis=0, out=sums)
    inside = sums[window:] - sums[:-window]
    means = inside[:, 0] / window
    squares = np.maximum(inside[:, 1] - window * means**2, 0)
    return means + middle, np.sqrt(squares / (window - 1))


def dual(gold_prob: np.ndarray, *, window: int) -> np.ndarray:
    """Difficulty times uncertainty: (1 - mean) * standard deviation (ddof=1) of the gold
    probability within a window of epochs, averaged over all E - window + 1 windows.

    Args:
        gold_prob: (E, N) float in [0, 1]; pass only the first epochs to score early in training.
        window: Epochs per window, in [2, E]; the paper takes 10.

    Returns: (N,) float64 >= 0; high = hard and uncertain (kept by the paper).
    Raises: ValueError for a window out of range.
    Source: [Cho2025]; the paper's sampling by a Beta distribution is not part of the score,
    and the factor 10 of its code, which orders nothing, is left out.

    >>> dual(np.array([[0.0, 1.0], [0.5, 1.0], [0.5, 1.0]]), window=2).round(4).tolist()
    [0.1326, 0.0]
    """
    _check_window(gold_prob.shape[0], window, least=2)

    def score(block: np.ndarray) -> np.ndarray:
        means, deviations = _windows(block, window)
        return ((1 - means) * deviations).mean(axis=0)

    return per_example(gold_prob, score)


def tdds(logits: np.ndarray, *, window: int, decay: float = 0.9) -> np.ndarray:
    """Temporal dual-depth score: how much the epoch-to-epoch KL divergence of the prediction varies
    within a window, the windows averaged with weights that fade into the past.

    With d[t] = KL(p[t + 1] || p[t]), the value of the window of epochs [k, k + window) is the L2
    norm over its window - 1 steps of d - mean(d); the last window weighs `decay`, each earlier one
    (1 - decay) times the next.

    Args:
        logits: (E, N, C) float.
        window: Epochs per window, in [3, E]; two epochs have a single step, whose deviation is 0.
            The authors' code takes 10.
        decay: In (0, 1]; the authors' code takes 0.9.

    Returns: (N,) float64 >= 0; high = kept by the paper.
    Raises: ValueError for a window or decay out of range.
    Source: [Zhang2024]; the authors' code sums the absolute terms of d over classes and
    adds 1e-8 to the probabilities, here d is the divergence itself, from log-softmax.

    >>> logits = np.log([[[1, 1], [1, 1]], [[1, 1], [3, 1]], [[1, 1], [3, 1]]])
    >>> tdds(logits, window=3).round(4).tolist()
    [0.0, 0.0832]
    """

    def score(block: np.ndarray) -> np.ndarray:
        peak = block.max(axis=2, keepdims=True)
        log_probs = block - peak - np.log(np.exp(block - peak).sum(axis=2, keepdims=True))
        steps = (np.exp(log_probs[1:]) * np.diff(log_probs, axis=0)).sum(axis=2)  # (E - 1, n)
        return fading_spread(steps, window, decay)

    return per_example(logits, score)


def fading_spread(steps: np.ndarray, window: int, decay: float) -> np.ndarray:
    """The second half of `tdds`: L2 norm of the steps of each window about their mean, the windows
    weighted into the past: (E - 1, n) -> (n,).

    Raises: ValueError for a window or decay out of range.
    """
    _check_window(len(steps) + 1, window, least=3)
    if not 0 < decay <= 1:
        raise ValueError(f"decay is {decay}; expected a number in (0, 1]")
    n_windows = len(steps) + 2 - window
    total = np.zeros(steps.shape[1])
    for k in range(n_windows):
        inside = steps[k : k + window - 1]
        norm = np.sqrt(((inside - inside.mean(axis=0)) ** 2).sum(axis=0))
        total += decay * (1 - decay) ** (n_windows - 1 - k) * norm
    return total
