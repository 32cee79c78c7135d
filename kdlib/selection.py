"""Which examples a student learns from: a subset is a function of datamap, budget, strategy, seed.

Ties, and the whole of `random`, are decided by a hash of (seed, example id), never by an example's
position, so that permuting the data set permutes nothing but rows. Leaves to others: the scores
(cartography), the order in which a subset is seen (sampling).
"""

import math
import operator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib import files
from kdlib.params import SELECTIONS
from kdlib.seeds import derive
from kdlib.tables import check_provenance, read_parquet, write_parquet

FORMAT = 1  # of the subset file
MAKER = "notebooks/04_distill.ipynb"


def budget(n_examples: int, fraction: float) -> int:
    """Number of examples in a fraction of a data set, rounded half up.

    Args:
        n_examples: N >= 0.
        fraction: In [0, 1], taken as the decimal number it is written as.

    Raises: ValueError for a fraction or number out of range.

    >>> budget(100, 0.145), budget(3, 0.5), budget(3, 1 / 3), budget(7, 0.0)
    (15, 2, 1, 0)
    """
    if n_examples < 0:
        raise ValueError(f"n_examples is {n_examples}; expected an integer >= 0")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction}; expected a number in [0, 1]")
    exact = Decimal(repr(float(fraction))) * n_examples  # 0.145 * 100 is 14.499... as a float
    return int(exact.to_integral_value(ROUND_HALF_UP))


def tie_break(example_ids: np.ndarray, seed: int) -> np.ndarray:
    """A pseudo-random number per example that depends on its id and the seed only.

    Args:
        example_ids: (N,) int64.
        seed: >= 0.

    Returns: (N,) uint64; distinct ids get distinct numbers, and the orders of two seeds are
        unrelated. Source: the mixing function of SplitMix64 (Steele et al., Fast Splittable
        Pseudorandom Number Generators, 2014), applied before and after the key.

    >>> bool(tie_break(np.array([3, 5]), seed=0)[1] == tie_break(np.array([5]), seed=0)[0])
    True
    """
    key = np.uint64(derive(seed, "subset"))
    return _mix(_mix(np.asarray(example_ids, dtype=np.int64).astype(np.uint64)) ^ key)


def _mix(z: np.ndarray) -> np.ndarray:
    # Array arithmetic on uint64 wraps, as the function wants; every step is a bijection.
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def select(table: pd.DataFrame, n: int, strategy: str, seed: int) -> np.ndarray:
    """The ids of exactly `n` examples, chosen by one strategy.

    `full`: all (n must be N). `random`: uniformly; with one seed, a smaller random subset lies
    within a larger one. `easy`, `hard`, `ambiguous_corner`: nearest to (variability, confidence) =
    (0, 1), (0, 0), (1, 0.5). `ambiguous`: highest variability. `<score>_top`, `<score>_bottom`:
    highest, lowest score.

    Args:
        table: A datamap: index of N distinct int64 example ids in any order, score columns.
        n: Budget, in [0, N].
        strategy: One of `params.SELECTIONS`.
        seed: >= 0; decides `random` and every tie.

    Returns: (n,) int64, sorted and distinct.
    Raises: ValueError for an unknown strategy (with the nearest name), a budget out of range, a
        score that is absent or not finite, and ids that are not distinct integers.
    """
    ids = table.index.to_numpy()
    if ids.dtype.kind not in "iu" or not table.index.is_unique:
        raise ValueError(
            f"the datamap's index is {ids.dtype}, distinct: {table.index.is_unique}; expected "
            "distinct int64 example ids"
        )
    if strategy not in SELECTIONS:
        raise ValueError(f"unknown strategy {strategy!r}; {files.nearest(strategy, SELECTIONS)}")
    n, n_examples = operator.index(n), len(ids)
    if not 0 <= n <= n_examples:
        raise ValueError(f"the budget is {n} examples; expected [0, {n_examples}]")
    if strategy == "full" and n != n_examples:
        raise ValueError(
            f"strategy 'full' is all {n_examples} examples; got a budget of {n}: set fraction 1"
        )
    order = np.lexsort((tie_break(ids, seed), _cost(table, strategy)))  # last key sorts first
    return np.sort(ids[order[:n]].astype(np.int64))


def _cost(table: pd.DataFrame, strategy: str) -> np.ndarray:
    """What the strategy wants least of, per example: (N,) float64."""
    if strategy in ("full", "random"):
        return np.zeros(len(table))
    if strategy == "ambiguous":
        return -_score(table, "variability", strategy)
    poles = {"easy": (0.0, 1.0), "hard": (0.0, 0.0), "ambiguous_corner": (1.0, 0.5)}
    if strategy in poles:
        variability, confidence = poles[strategy]
        return (_score(table, "variability", strategy) - variability) ** 2 + (
            _score(table, "confidence", strategy) - confidence
        ) ** 2
    column, end = strategy.rsplit("_", 1)
    score = _score(table, column, strategy)
    return -score if end == "top" else score


def _score(table: pd.DataFrame, column: str, strategy: str) -> np.ndarray:
    if column not in table.columns:
        hint = " (it needs dynamics.logits: true in the study)" if column == "tdds" else ""
        raise ValueError(
            f"strategy {strategy!r} needs the score {column!r}, which the datamap lacks{hint}; it "
            f"has {', '.join(map(str, table.columns))}"
        )
    score = table[column].to_numpy(dtype=np.float64)
    bad = ~np.isfinite(score)
    if bad.any():
        raise ValueError(
            f"{column} is NaN or infinite for {bad.sum()} of {len(score)} examples (first: id "
            f"{table.index[bad][0]}); expected finite scores: make the datamap again"
        )
    return score


@dataclass(frozen=True, eq=False)
class Subset:
    """Chosen examples and where the choice came from; a selection made by hand is one too.

    Attributes: example_ids, (n,) int64, sorted, distinct, >= 0, read-only; strategy, its name;
        fraction, what was asked for, in [0, 1]; seed; parent, fingerprint of the datamap, None when
        the choice looked at ids alone; data_fingerprint, of the data set the ids belong to.

    Raises: ValueError for ids that are not sorted, distinct and >= 0, and for fields out of range.
    """

    example_ids: np.ndarray
    strategy: str
    fraction: float
    seed: int
    parent: str | None
    data_fingerprint: str

    def __post_init__(self):
        ids = np.array(self.example_ids)
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and len(ids)):
            raise ValueError(
                f"example_ids are {ids.dtype} of shape {ids.shape}; expected a row of int64"
            )
        ids = ids.astype(np.int64)
        if (np.diff(ids) <= 0).any() or (len(ids) and ids[0] < 0):
            raise ValueError(
                "example_ids are not sorted, distinct and >= 0; pass them through np.unique"
            )
        if not (math.isfinite(self.fraction) and 0 <= self.fraction <= 1):
            raise ValueError(f"fraction is {self.fraction}; expected a number in [0, 1]")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; expected an integer >= 0")
        ids.flags.writeable = False
        object.__setattr__(self, "example_ids", ids)

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def sha256(self) -> str:
        """sha256 of the ids: equal for equal choices, wherever they came from."""
        return files.sha256_array(self.example_ids)

    def _metadata(self) -> dict:
        return {
            "format": FORMAT,
            "strategy": self.strategy,
            "fraction": float(self.fraction),
            "seed": int(self.seed),
            "parent": self.parent,
            "data_fingerprint": self.data_fingerprint,
            "n_examples": len(self),
            "sha256": self.sha256,
        }

    def save(self, path: Path) -> Path:
        """Write the subset as parquet; a file that holds the same subset is left as it is.

        Raises: ValueError when the file holds another subset, with the difference, or is damaged.
        """
        path = Path(path)
        if path.exists():
            lines = files.difference(self._metadata(), Subset.load(path)._metadata())
            if lines:
                raise ValueError(
                    f"{path} holds another subset (key: there -> to be saved):\n  "
                    + "\n  ".join(lines)
                    + "\nsave under another name, or delete the file"
                )
            return path
        return write_parquet(path, pd.DataFrame({"example_id": self.example_ids}), self._metadata())

    @classmethod
    def load(cls, path: Path, data_fingerprint: str | None = None) -> "Subset":
        """Read a subset.

        Args:
            path: The parquet file.
            data_fingerprint: Of the data set the caller trains on; None accepts any.

        Raises: FileNotFoundError; ValueError for a damaged file, another format, ids that do not
            match their hash, or a subset of another data set.
        """
        path = Path(path)
        table, metadata = read_parquet(path, MAKER)
        if metadata.get("format") != FORMAT or list(table.columns) != ["example_id"]:
            raise ValueError(
                f"{path} has subset format {metadata.get('format')} and columns "
                f"{list(table.columns)}; expected format {FORMAT} and ['example_id']: run {MAKER} "
                "again"
            )
        if data_fingerprint is not None:
            check_provenance({"data_fingerprint": data_fingerprint}, metadata, path)
        try:
            subset = cls(
                table["example_id"].to_numpy(),
                *(metadata[k] for k in ("strategy", "fraction", "seed", "parent")),
                metadata["data_fingerprint"],
            )
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a valid subset ({error}); run {MAKER} again") from None
        if subset.sha256 != metadata.get("sha256"):
            raise ValueError(
                f"{path}: the ids do not match the sha256 stored with them; run {MAKER} again"
            )
        return subset
