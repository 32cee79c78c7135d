"""Reads the shards of the next batches from the disk while the present ones are used."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from kdlib.dataset.plan import Plan
from kdlib.dataset.rows import Rows

READ_AHEAD = 16  # steps whose shards are asked for together
ASK_AGAIN = 256  # steps after which a shard may have left the page cache


class ReadAhead:
    """Brings mapped shards into memory on a thread before their rows are gathered."""

    def __init__(
        self, plan: Plan, rows: Rows, share: tuple[int, int], thread: ThreadPoolExecutor, fits: bool
    ) -> None:
        """Prepare to read.

        Args:
            rows: The mapped rows.
            share: Rank and world size of this process.
            thread: Where shards are read.
            fits: Whether all of them stay in memory once they are read.
        """
        self._plan, self._rows, self._share = plan, rows, share
        self._thread, self._fits = thread, fits
        self._reading: Future | None = None
        self._asked: dict[int, int] = {}  # shard -> step at which it was last asked for
        self._next_look = 0  # the step from which on it is time to look ahead again

    def at(self, step: int) -> None:
        """Start to read what the steps from this one on need, when it is time.

        Raises: What went wrong when the thread last read.
        """
        if step < self._next_look:
            return
        self._next_look = step + READ_AHEAD
        if self._reading is not None and self._reading.done():
            self._reading.result()
        self._reading = self._thread.submit(self._read, step)

    def _read(self, step: int) -> None:
        """Bring the shards of the next two stretches of steps into memory."""
        steps = range(step, min(step + 2 * READ_AHEAD, self._plan.n_steps))
        positions = np.concatenate([self._plan.at(s, *self._share)[1] for s in steps])
        for number in np.unique(self._rows.shard_of[positions]).tolist():
            if self._asked.get(number, -np.inf) < step - ASK_AGAIN:
                self._asked[number] = step
                self._rows.populate(number)
        if len(self._asked) == self._plan.n_shards and self._fits:
            self._next_look = self._plan.n_steps
