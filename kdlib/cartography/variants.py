"""Quantities that public code computes under the names of `scores`, here under separate names.

Pure functions like those of `scores`, for comparing rankings; they are no columns of the datamap.

[Seedat2022] Seedat et al., Data-IQ, 2022, arXiv 2210.13043, its code's `correctness`
[Zheng2023] Zheng et al., Coverage-centric Coreset Selection, 2023, arXiv 2210.15809, its code
[Cho2025] Cho et al., DUAL, 2025, arXiv 2502.06905, its code
[Zhang2024] Zhang et al., TDDS, 2024, arXiv 2311.13613, its code
[He2024] He et al., Dyn-Unc, 2024, arXiv 2306.05175
"""

import numpy as np
import pandas as pd
from scipy.special import softmax

from kdlib.cartography import scores
from kdlib.cartography.log import DynamicsLog

# Each score of several definitions, with the names of the variants here. Some public code calls
# `trend` forgetfulness, and some computes `grand` of the last layer only, here `grand_last`.
SAME_NAME = {
    "correctness": ("correctness_half",),
    "forgetting_events": ("forgetting_unlearned_first", "trend"),
    "aum": ("aum_softmax", "aum_softmax_last"),
    "el2n": ("el2n_first_ten",),
    "entropy": ("entropy_last",),
    "grand": ("grand_last",),
    "dyn_unc": ("dyn_unc_but_last",),
    "tdds": ("tdds_absolute", "tdds_still_window"),
}


def correctness_half(gold_prob: np.ndarray) -> np.ndarray:
    """Fraction of epochs in which the gold label has more than half of the probability. With more
    than two classes a prediction can be right with less.

    Args:
        gold_prob: (E, N) float in [0, 1].

    Returns: (N,) float64 in [0, 1]. Source: [Seedat2022].

    >>> correctness_half(np.array([[0.6, 0.4], [0.5, 0.4]])).tolist()
    [0.5, 0.0]
    """
    return scores.per_example(gold_prob, lambda block: (block > 0.5).mean(axis=0))


def forgetting_unlearned_first(correct: np.ndarray) -> np.ndarray:
    """Forgetting events alone: an example never learned ranks as one that was never forgotten.

    Args:
        correct: (E, N) int8 or bool, 0 or 1.

    Returns: (N,) int64 in [0, E // 2]. Source: some public codes; others count an example never
        learned as E, 1000 or infinitely many, which ranks as `scores.forgetting_rank`.

    >>> forgetting_unlearned_first(np.array([[1, 0], [0, 0]])).tolist()
    [1, 0]
    """
    return scores.forgetting_events(correct)


def aum_softmax(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean over epochs of gold probability minus largest other probability.

    Args:
        logits: (E, N, C) float.
        labels: (N,) int64 in [0, C).

    Returns: (N,) float64 in [-1, 1]. Source: [Zheng2023]; of the last epoch only, as
        `aum_softmax_last`: [Cho2025].

    >>> aum_softmax(np.log([[[3.0, 1.0], [1.0, 1.0]]]), np.array([0, 1])).round(4).tolist()
    [0.5, 0.0]
    """
    probs = softmax(np.asarray(logits, np.float64), axis=2)
    is_gold = labels[:, None] == np.arange(probs.shape[2])  # (N, C)
    gold = np.where(is_gold, probs, 0).sum(axis=2)
    return (gold - np.where(is_gold, 0, probs).max(axis=2)).mean(axis=0)


def entropy_last(recorded: np.ndarray) -> np.ndarray:
    """Entropy of the prediction in the last recorded epoch.

    Args:
        recorded: (E, N) float, nats.

    Returns: (N,) float64 >= 0, nats. Source: [Cho2025].

    >>> entropy_last(np.array([[0.5], [0.25]])).tolist()
    [0.25]
    """
    return scores.per_example(recorded[-1:], lambda block: block[0])


def el2n_first_ten(recorded: np.ndarray) -> np.ndarray:
    """EL2N summed over the first ten epochs of one run, or over all where there are fewer.

    Args:
        recorded: (E, N) float.

    Returns: (N,) float64 >= 0. Source: [Zheng2023].

    >>> el2n_first_ten(np.array([[0.5], [0.25]])).tolist()
    [0.75]
    """
    return scores.per_example(recorded[:10], lambda block: block.sum(axis=0))


def dyn_unc_but_last(gold_prob: np.ndarray, *, window: int) -> np.ndarray:
    """Dynamic uncertainty without the last window, as in the paper's sum.

    Args:
        gold_prob: (E, N) float in [0, 1], E > window.
        window: Epochs per window, in [2, E).

    Returns: (N,) float64 >= 0. Source: [He2024], equation 3.
    """
    return scores.dyn_unc(gold_prob[:-1], window=window)


def tdds_absolute(logits: np.ndarray, *, window: int, decay: float = 0.9) -> np.ndarray:
    """TDDS with the absolute terms of the divergence summed over classes, 1e-8 added to each
    probability.

    Args:
        logits: (E, N, C) float.
        window: Epochs per window, in [3, E].
        decay: In (0, 1].

    Returns: (N,) float64 >= 0. Source: [Zhang2024].
    """
    probs = softmax(np.asarray(logits, np.float64), axis=2) + 1e-8
    steps = np.abs(probs[1:] * np.diff(np.log(probs), axis=0)).sum(axis=2)  # (E - 1, N)
    return scores.fading_spread(steps, window, decay)


def tdds_still_window(logits: np.ndarray, *, window: int, decay: float = 0.9) -> np.ndarray:
    """TDDS with logits in the place of probabilities and the first window in the place of every
    window. The logarithm of a negative logit counts as 0.

    Args:
        logits: (E, N, C) float.
        window: Epochs per window, in [3, E].
        decay: In (0, 1].

    Returns: (N,) float64 >= 0. Source: the port of TDDS in the code of [Cho2025].
    """
    with np.errstate(invalid="ignore"):
        logs = np.log(logits[:window].astype(np.float64) + 1e-8)
    steps = np.abs(logits[1:window] * np.nan_to_num(np.diff(logs, axis=0))).sum(axis=2)
    past = (1 - decay) ** np.arange(len(logits) - window + 1)
    return scores.fading_spread(steps, window, decay) * past.sum()


def variants(log: DynamicsLog, *, window: int) -> pd.DataFrame:
    """Every variant that the log allows, for every example.

    Args:
        log: A log open for reading.
        window: Epochs per window.

    Returns: Index `example_id`; the variants of `SAME_NAME` that are functions of the log and not
        scores of the datamap. Those of logits are there when the log holds them, and
        `dyn_unc_but_last` when it has more epochs than the window.
    """
    columns = {
        "correctness_half": correctness_half(log["gold_prob"]),
        "forgetting_unlearned_first": forgetting_unlearned_first(log["correct"]),
        "entropy_last": entropy_last(log["entropy"]),
        "el2n_first_ten": el2n_first_ten(log["el2n"]),
    }
    if log.n_epochs > window:
        columns["dyn_unc_but_last"] = dyn_unc_but_last(log["gold_prob"], window=window)
    if log.has_logits:
        parts = []
        for start, stop in scores.blocks(log["logits"].size, log.n_examples):
            block = np.asarray(log["logits"][:, start:stop], np.float64)
            labels = log.labels[start:stop]
            parts.append(
                {
                    "aum_softmax": aum_softmax(block, labels),
                    "aum_softmax_last": aum_softmax(block[-1:], labels),
                    "tdds_absolute": tdds_absolute(block, window=window),
                    "tdds_still_window": tdds_still_window(block, window=window),
                }
            )
        columns |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return pd.DataFrame(columns, index=pd.Index(np.array(log.example_ids), name="example_id"))
