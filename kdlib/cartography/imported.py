"""Training dynamics that another program recorded, as JSON: one entry for each example, with the
probability of its gold label after every epoch."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.cartography import scores
from kdlib.cartography.datamap import REGIONS, regions
from kdlib.repro import files

TOLERANCE = 1e-4  # of what the file says of its own probabilities, which are float32
_EXPECTED = (
    'expected {"0": {"gold_label_probs": [0.1, 0.4], "correctness": 0.5}, "1": ...}, the keys '
    "being positions from 0 on; `correctness` may be absent"
)


def read_dynamics_json(path: Path | str, example_ids: np.ndarray | None = None) -> pd.DataFrame:
    """The scores that can be had from the probabilities of the gold label, as a datamap.

    Margins, losses, entropies and changes of the prediction are not in such a file, nor are the
    scores that need them.

    Args:
        path: A JSON file, `{"<position>": {"gold_label_probs": [E floats], ...}, ...}`. Values of
            `confidence` and `variability` in it are compared with those of the probabilities.
        example_ids: (N,) distinct int64, the example id of each position, such as
            `random_split_ids`; None: positions are example ids.

    Returns: Index `example_id` (int64, sorted); columns confidence, variability, correctness
        (where the file has it), trend (from 2 epochs on), region_variability, region_corner.
    Raises: FileNotFoundError; ValueError that says what was expected, for another layout, values
        outside [0, 1], or scores that are not those of the probabilities.
    """
    path = Path(path)
    content = files.read_json(path, lambda _: f"{_EXPECTED}: give the file as it was written")
    n = len(content)
    if not n or content.keys() != set(map(str, range(n))):
        strange = min(content.keys() - set(map(str, range(n))), default="none at all")
        raise ValueError(f"{path} has {n} entries, among them {strange!r}; {_EXPECTED}")
    entries = [content[str(i)] for i in range(n)]
    gold_prob = _column(path, entries, "gold_label_probs").T  # (N, E) -> (E, N)
    if gold_prob.ndim != 2 or not len(gold_prob):
        raise ValueError(f"{path} has no list of gold_label_probs in each entry; {_EXPECTED}")
    columns = {
        "confidence": scores.confidence(gold_prob),
        "variability": scores.variability(gold_prob),
    }
    for name, score in columns.items():
        _compare(path, entries, name, score)
    if any("correctness" in entry for entry in entries):
        columns["correctness"] = _column(path, entries, "correctness")
    if len(gold_prob) > 1:
        columns["trend"] = scores.trend(gold_prob)
    for rule in ("variability", "corner"):
        names = regions(columns["confidence"], columns["variability"], rule=rule)
        columns[f"region_{rule}"] = pd.Categorical(names, categories=REGIONS)
    ids = np.arange(n) if example_ids is None else np.asarray(example_ids, np.int64)
    if ids.shape != (n,) or len(np.unique(ids)) < n:
        raise ValueError(
            f"{path} has {n} entries, and example_ids {ids.shape} of which {len(np.unique(ids))} "
            "are distinct; expected an example id for each entry"
        )
    return pd.DataFrame(columns, index=pd.Index(ids, name="example_id")).sort_index()


def random_split_ids(n: int, seed: int | None, share: float = 0.8) -> np.ndarray:
    """The example ids that `torch.utils.data.random_split` puts into its first part.

    Args:
        n: Images of the whole training split.
        seed: Of the generator that the split was given; 0 or None: one that was not seeded, as
            study A's `val_split_seed` is read.
        share: Of the first part, in (0, 1]; it has int(share * n) images.

    Returns: (int(share * n),) int64, in the order of that part: the id at each of its positions.
    """
    import torch

    drawn = torch.Generator()
    if seed:
        drawn.manual_seed(seed)
    return torch.randperm(n, generator=drawn).numpy()[: int(share * n)]


def _column(path: Path, entries: list[Any], name: str) -> np.ndarray:
    """One value, or one list of equally many, of each entry: float64 in [0, 1]."""
    try:
        values = np.array([entry[name] for entry in entries])
        numbers = values.astype(np.float64) if values.dtype.kind in "if" else None
    except (KeyError, TypeError, ValueError):  # an entry without it, or lists of unequal length
        numbers = None
    if numbers is None or not ((numbers >= 0) & (numbers <= 1)).all():
        raise ValueError(
            f"{path}: not every entry has {name} in [0, 1], the same number of them; {_EXPECTED}"
        )
    return numbers


def _compare(path: Path, entries: list[Any], name: str, score: np.ndarray) -> None:
    """Demand that a score in the file, where it is there, is that of its probabilities."""
    if not any(name in entry for entry in entries):
        return
    differ = np.flatnonzero(np.abs(_column(path, entries, name) - score) > TOLERANCE)
    if len(differ):
        i = int(differ[0])
        raise ValueError(
            f"{path}: entry {i} has {name} {entries[i][name]:.6g}, and its gold_label_probs give "
            f"{score[i]:.6g}; expected the same: the file was changed, or is of another program"
        )
