"""Earlier selections, for undo and redo."""

import numpy as np

MOST_STEPS = 100
MOST_IDS = 20_000_000  # of all steps together: 160 MB


class History:
    """Selections in the order in which they were made, and a place among them."""

    def __init__(self) -> None:
        self._steps = [np.empty(0, np.int64)]
        self._place = 0

    def record(self, ids: np.ndarray) -> None:
        """Add a selection after the present one; later ones are dropped, and the oldest where the
        steps or their ids are too many."""
        if np.array_equal(ids, self._steps[self._place]):
            return
        self._steps = [*self._steps[: self._place + 1], ids]
        while len(self._steps) > MOST_STEPS or (
            len(self._steps) > 2 and sum(map(len, self._steps)) > MOST_IDS
        ):
            del self._steps[0]
        self._place = len(self._steps) - 1

    @property
    def can_undo(self) -> bool:
        return self._place > 0

    @property
    def can_redo(self) -> bool:
        return self._place < len(self._steps) - 1

    def undo(self) -> np.ndarray:
        """The selection before the present one; at the first, that one."""
        self._place = max(0, self._place - 1)
        return self._steps[self._place]

    def redo(self) -> np.ndarray:
        """The selection after the present one; at the last, that one."""
        self._place = min(len(self._steps) - 1, self._place + 1)
        return self._steps[self._place]
