"""Scores as detectors of wrong labels, for data whose right labels are known.

Pure functions on arrays; areas under curves are those of `sklearn.metrics`.

[Pleiss2020] Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking,
    2020, arXiv 2001.10528
[Northcutt2021] Northcutt et al., Confident Learning, 2021, arXiv 1911.00068
"""

import numpy as np
import pandas as pd

from kdlib.cartography import scores
from kdlib.cartography.log import DynamicsLog
from kdlib.study.selections import DIFFICULTY

CURVE_POINTS = 500  # at most, of a curve that is drawn
PERCENTILE = 99  # of the threshold samples' AUM, as in the paper


def curves(suspicion: np.ndarray, wrong: np.ndarray) -> pd.DataFrame:
    """ROC and precision-recall of a detector, a row for each threshold from strict to lax.

    Args:
        suspicion: (N,) float, high = probably wrong; examples that tie are flagged together.
        wrong: (N,) bool, some of each.

    Returns: Columns `false_positive_rate`, `true_positive_rate`, `recall` (the same), `precision`
        (of the first row, where nothing is flagged, that of the second).
    """
    from sklearn.metrics import precision_recall_curve, roc_curve

    false_positives, recall, _ = roc_curve(wrong, suspicion, drop_intermediate=False)
    precision = precision_recall_curve(wrong, suspicion)[0][::-1].copy()
    precision[0] = precision[1]
    rates = {"false_positive_rate": false_positives, "true_positive_rate": recall}
    return pd.DataFrame(rates | {"recall": recall, "precision": precision})


def thinned(table: pd.DataFrame) -> pd.DataFrame:
    """A curve of at most `CURVE_POINTS` rows, first and last kept."""
    if len(table) <= CURVE_POINTS:
        return table
    return table.iloc[np.linspace(0, len(table) - 1, CURVE_POINTS).round().astype(int)]


def over_epochs(log: DynamicsLog, wrong: np.ndarray, n_points: int = 10) -> pd.DataFrame:
    """AUROC of scores of the first e recorded epochs, for several e.

    Args:
        log: A log open for reading.
        wrong: (N,) bool, in the order of `log.example_ids`.
        n_points: Number of e, at most; the last is all epochs.

    Returns: Columns `detector`, `epoch`, `auroc`, for `aum`, `confidence`, `loss` (means over the
        epochs), `el2n` (of epoch e), `forgetting_events`.
    """
    from sklearn.metrics import roc_auc_score

    rows = []
    for epoch in np.unique(np.linspace(1, log.n_epochs, n_points).round().astype(int)).tolist():
        detectors = {
            "aum": scores.aum(log["margin"][:epoch]),
            "confidence": scores.confidence(log["gold_prob"][:epoch]),
            "loss": scores.loss(log["loss"][:epoch]),
            "el2n": scores.el2n(log["el2n"], epoch=epoch),
            "forgetting_events": scores.forgetting_rank(
                scores.forgetting_events(log["correct"][:epoch]),
                scores.never_learned(log["correct"][:epoch]),
            ),
        }
        for name, score in detectors.items():
            area = roc_auc_score(wrong, DIFFICULTY[name] * score)
            rows.append({"detector": name, "epoch": epoch, "auroc": area})
    return pd.DataFrame(rows)


def precision_recall(flagged: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Precision and recall of a rule that flags labels as wrong.

    Args:
        flagged: (N,) bool.
        wrong: (N,) bool, some of them True.

    Returns: `flagged`, the number of flagged labels; `precision` (NaN where none is flagged) and
        `recall`, in [0, 1].
    """
    hits, n = int((flagged & wrong).sum()), int(flagged.sum())
    precision = hits / n if n else float("nan")
    return {"flagged": n, "precision": precision, "recall": hits / int(wrong.sum())}


def below_threshold_samples(
    margins: tuple[np.ndarray, np.ndarray], pretending: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Examples whose AUM lies below that of threshold samples, whose labels are wrong for certain.

    Threshold samples are examples that a training labels with one additional class.

    Args:
        margins: AUM (N,) of two trainings with different threshold samples.
        pretending: (N,) bool for each training: its threshold samples, at least one; no example is
            one in both.

    Returns: (N,) bool: whether the AUM lies below the 99th percentile of the threshold samples', in
        the training in which the example has its label (where it has in both, the second).
    Source: [Pleiss2020], sec. 3.2 and algorithm 1. The authors' code flags an example where more
        than 1 % of the threshold samples lie above it, without the percentile's interpolation, and
        one that is a threshold sample in neither training only where both flag it.

    >>> aums = np.array([-3.0, 5.0, 1.0, -2.0])
    >>> first, second = np.array([1, 0, 0, 0], bool), np.array([0, 0, 0, 1], bool)
    >>> below_threshold_samples((aums, aums), (first, second)).tolist()
    [True, False, False, False]
    """
    below = [
        aum < np.percentile(aum[mask], PERCENTILE)
        for aum, mask in zip(margins, pretending, strict=True)
    ]
    return np.where(pretending[1], below[0], below[1])


def held_out_scores(probs: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
    """Suspicion of each label from held-out probabilities.

    Args:
        probs: (N, C) float, rows sum to 1, of networks that were not trained on the example.
        labels: (N,) int64 in [0, C), as given.

    Returns: `held-out loss` (nats, of float64 probabilities at least 1e-12) and `held-out margin`
        (largest other probability minus that of the label), each (N,) float64, high = suspicious.
    """
    gold = probs[np.arange(len(labels)), labels]
    others = np.where(labels[:, None] == np.arange(probs.shape[1]), -np.inf, probs).max(axis=1)
    return {"held-out loss": -np.log(np.maximum(gold, 1e-12)), "held-out margin": others - gold}


def confident_learning(probs: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """cleanlab's confident learning on held-out probabilities.

    Args:
        probs: As in `held_out_scores`.
        labels: (N,) int64 in [0, C), as given; every class occurs.

    Returns: (suspicion (N,) float64: 1 - label quality by the normalised margin of probabilities
        adjusted for each class's confidence; flagged (N,) bool: its label issues, pruned by noise
        rate).
    Raises: ModuleNotFoundError where cleanlab is not installed.
    Source: [Northcutt2021], as cleanlab implements it.
    """
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "confident learning is cleanlab's; install it: pip install cleanlab"
        ) from None
    flagged = find_label_issues(labels, probs, n_jobs=1)
    quality = get_label_quality_scores(
        labels, probs, method="normalized_margin", adjust_pred_probs=True
    )
    return 1 - np.asarray(quality, np.float64), np.asarray(flagged, bool)
