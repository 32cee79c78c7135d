"""A subset of the training images: example ids with how they were chosen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.repro import files
from kdlib.repro.commands import delete_and_run
from kdlib.repro.tables import check_provenance, read_parquet, write_parquet

FORMAT = 1  # of the subset file
FIELDS = ("strategy", "fraction", "seed", "parent", "data_fingerprint")


@dataclass(frozen=True, eq=False)
class Subset:
    """Chosen examples and where the choice came from: a strategy of a study, or a lasso by hand.

    Attributes: example_ids, (n,) int64, sorted, distinct, >= 0, read-only; strategy, its name;
        fraction, the requested share, in [0, 1]; seed; parent, fingerprint of the datamap, None
        when the choice used ids only; data_fingerprint, of the data set the ids belong to.

    Raises: ValueError for ids that are not sorted, distinct and >= 0.
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
        ids.flags.writeable = False
        object.__setattr__(self, "example_ids", ids)

    def __len__(self) -> int:
        return len(self.example_ids)

    @property
    def sha256(self) -> str:
        """sha256 of the ids: equal for equal choices, whatever strategy or study made them."""
        return files.sha256_array(self.example_ids)

    def _metadata(self) -> dict:
        facts = {"format": FORMAT, "n_examples": len(self), "sha256": self.sha256}
        return facts | {name: getattr(self, name) for name in FIELDS}

    def save(self, path: Path) -> Path:
        """Write the subset as parquet; a file that holds the same subset is left as it is.

        Raises: ValueError when the file holds another subset, with the difference, or is damaged.
        """
        if path.exists():
            if lines := files.difference(self._metadata(), Subset.load(path)._metadata()):
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

        Raises: FileNotFoundError; ValueError for a damaged file, another format, or a subset of
            another data set.
        """
        table, metadata = read_parquet(path)
        if metadata.get("format") != FORMAT or list(table.columns) != ["example_id"]:
            raise ValueError(
                f"{path} has subset format {metadata.get('format')} and columns "
                f"{list(table.columns)}; expected format {FORMAT} and ['example_id']: "
                f"{delete_and_run(path)}"
            )
        if data_fingerprint is not None:
            check_provenance({"data_fingerprint": data_fingerprint}, metadata, path)
        return cls(table["example_id"].to_numpy(), *(metadata[field] for field in FIELDS))
