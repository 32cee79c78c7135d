"""The datamap: a table of scores per example, and its regions."""

from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.cartography import scores
from kdlib.cartography.log import DynamicsLog
from kdlib.repro.commands import delete_and_run
from kdlib.repro.tables import check_provenance, read_parquet, write_parquet

FORMAT = 1  # of the datamap
REGIONS = ("easy", "ambiguous", "hard")


def regions(confidence: np.ndarray, variability: np.ndarray, *, rule: str) -> np.ndarray:
    """Easy-to-learn, ambiguous or hard-to-learn, under one of two rules.

    `variability`: ambiguous = the third with the highest variability (the paper's 33 %); the rest
    go to the nearer of easy (variability 0, confidence 1) and hard (0, 0), that is easy from
    confidence 0.5 upwards. Examples that tie across the border of the third all stay out, so that
    the order of the data set does not matter.
    `corner`: the nearest of easy (0, 1), hard (0, 0) and ambiguous (1, 0.5); at equal distance the
    first of these.

    Args:
        confidence: (N,) float in [0, 1].
        variability: (N,) float in [0, 0.5].
        rule: `variability` or `corner`.

    Returns: (N,) str, each one of `REGIONS`.
    Raises: ValueError for an unknown rule.
    Source: [Swayamdipta2020] for `variability`; `corner` is a later variant.

    >>> regions(np.array([0.9, 0.5, 0.1]), np.array([0.1, 0.4, 0.1]), rule="corner").tolist()
    ['easy', 'ambiguous', 'hard']
    """
    if rule == "variability":
        ordered = np.sort(variability)
        at_least = len(ordered) - np.searchsorted(ordered, variability)  # how many reach this one
        ambiguous = 3 * at_least <= len(ordered)
    elif rule == "corner":
        to_pole = np.minimum((1 - confidence) ** 2, confidence**2) + variability**2
        ambiguous = (1 - variability) ** 2 + (confidence - 0.5) ** 2 < to_pole
    else:
        raise ValueError(f"unknown rule {rule!r}; expected 'variability' or 'corner'")
    return np.where(ambiguous, "ambiguous", np.where(confidence >= 0.5, "easy", "hard"))


def _score_block(
    log: DynamicsLog, start: int, stop: int, el2n_epoch: int, window: int
) -> dict[str, np.ndarray]:
    """Every score of the examples [start, stop); each quantity of the log is read once."""

    def read(quantity: str) -> np.ndarray:
        return np.asarray(log[quantity][:, start:stop], dtype=np.float64)

    gold_prob, correct = read("gold_prob"), log["correct"][:, start:stop]
    columns = {
        "confidence": scores.confidence(gold_prob),
        "variability": scores.variability(gold_prob),
        "correctness": scores.correctness(correct),
        "forgetting_events": scores.forgetting_events(correct),
        "never_learned": scores.never_learned(correct),
        "aum": scores.aum(read("margin")),
        "el2n": scores.el2n(log["el2n"][:, start:stop], epoch=el2n_epoch),
        "entropy": scores.entropy(read("entropy")),
        "loss": scores.loss(read("loss")),
        "trend": scores.trend(gold_prob),
        "dyn_unc": scores.dyn_unc(gold_prob, window=window),
    }
    if log.has_logits:
        columns["tdds"] = scores.tdds(read("logits"), window=window)
    columns["dual"] = scores.dual(gold_prob, window=window)
    return columns


def compute_datamap(log: DynamicsLog, *, el2n_epoch: int, window: int) -> pd.DataFrame:
    """Every score and both regions of every example of a finished log.

    One pass over the log by blocks of examples: memory stays bounded whatever N is.

    Args:
        log: A log open for reading.
        el2n_epoch: Recorded epoch at which `el2n` is read, counted from 1.
        window: Epochs per window of `dyn_unc`, `dual` and `tdds`.

    Returns: Index `example_id` (int64, sorted); columns `label`, the scores, `never_learned`,
        `region_variability` and `region_corner` (categorical easy | ambiguous | hard). `tdds` is
        there when the log holds logits.
    Raises: ValueError when `el2n_epoch` or `window` exceeds the recorded epochs, naming the study
        key to change.
    """
    n_values = log.n_epochs * log.n_examples * (log.n_classes if log.has_logits else 1)
    parts = [
        _score_block(log, start, stop, el2n_epoch, window)
        for start, stop in scores.blocks(n_values, log.n_examples)
    ]
    columns = {"label": np.array(log.labels)}
    columns |= {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    for rule in ("variability", "corner"):
        names = regions(columns["confidence"], columns["variability"], rule=rule)
        columns[f"region_{rule}"] = pd.Categorical(names, categories=REGIONS)
    index = pd.Index(np.array(log.example_ids), name="example_id")
    return pd.DataFrame(columns, index=index)


def ranked(table: pd.DataFrame, score: str) -> np.ndarray:
    """A score as it orders examples, (N,) float64: its column, but for `forgetting_events`, where
    examples never learned are the hardest (`scores.forgetting_rank`).

    Raises: ValueError for forgetting events without the column `never_learned`.
    """
    if score != "forgetting_events":
        return table[score].to_numpy(np.float64)
    if "never_learned" not in table.columns:
        raise ValueError(
            "forgetting_events order examples together with the column never_learned, which the "
            f"table lacks; it has {', '.join(map(str, table.columns))}: give the table that "
            "`python -m kdlib step datamap STUDY` makes"
        )
    return scores.forgetting_rank(table[score].to_numpy(), table["never_learned"].to_numpy(bool))


def write_datamap(table: pd.DataFrame, path: Path, provenance: dict) -> Path:
    """Write a datamap as parquet, its provenance in the file's metadata.

    Args:
        table: As returned by `compute_datamap`.
        path: The file; replaced atomically.
        provenance: JSON-able; what determines the content.
    """
    return write_parquet(path, table, {"format": FORMAT, "provenance": provenance})


def read_datamap(path: Path, provenance: dict | None = None) -> pd.DataFrame:
    """Read a datamap.

    Args:
        path: The parquet file.
        provenance: The keys the reader expects; None accepts any.

    Raises: FileNotFoundError, or ValueError for a damaged file, another format, or another
        provenance (naming the key).
    """
    table, metadata = read_parquet(path)
    if metadata.get("format") != FORMAT or "provenance" not in metadata:
        raise ValueError(
            f"{path} has datamap format {metadata.get('format')}; expected {FORMAT}: "
            f"{delete_and_run(path)}"
        )
    check_provenance(provenance, metadata["provenance"], Path(path))
    return table
