"""How long every log-only score of a large log takes, and how much memory, beside the
straightforward way: JSON lines, and a Python loop over examples with NumPy calls on each row.

    python benchmarks/cartography.py [--n 1281167] [--epochs 90] [--fraction 0.0005]

Makes a log of random dynamics in a temporary folder (11 bytes for each example and epoch), reads it
once so that it lies in the page cache, and scores it in one process of one thread. The loop takes a
fraction of the examples, from JSON lines made of the same log, and is compared per example; both
must give the same scores.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd

from kdlib.cartography.datamap import compute_datamap
from kdlib.cartography.log import DynamicsLog

EL2N_EPOCH, WINDOW = 10, 10
QUANTITIES = ("gold_prob", "margin", "entropy", "el2n", "loss", "correct")


def make_log(folder: Path, n: int, n_epochs: int) -> DynamicsLog:
    """A log of examples that are learnt at different times, with noise."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, n)
    log = DynamicsLog.create(
        folder, np.arange(n), labels, n_epochs=n_epochs, n_classes=1000, observed="train",
        logits=False, provenance={},
    )  # fmt: skip
    learnt, speed = rng.uniform(0, 1.3 * n_epochs, n), rng.uniform(0.05, 0.5, n)
    for epoch in range(n_epochs):
        logit = (epoch - learnt) * speed + rng.normal(0, 1, n).astype(np.float32)
        prob = 1 / (1 + np.exp(-logit))
        log["gold_prob"][epoch], log["margin"][epoch] = prob, logit.clip(-100, 100)
        log["entropy"][epoch] = 7 * prob * (1 - prob)
        log["el2n"][epoch] = 1.4142 * (1 - prob)
        log["loss"][epoch] = np.logaddexp(0, -logit).clip(0, 100)
        log["correct"][epoch] = logit > 0
    return log.finish()


class PeakMemory:
    """Largest private memory of this process while the block runs, in MiB above its start; pages
    of mapped files, which the system may drop, are not counted."""

    def __enter__(self) -> "PeakMemory":
        self._start, self.peak, self._done = self._private(), 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    @staticmethod
    def _private() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("RssAnon")) / 1024

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, self._private() - self._start)


def write_lines(log: DynamicsLog, folder: Path, n: int) -> None:
    """One file of JSON lines for each epoch, as public code writes them."""
    for epoch in range(log.n_epochs):
        rows = {name: log[name][epoch, :n].tolist() for name in QUANTITIES}
        with (folder / f"epoch_{epoch}.jsonl").open("w") as file:
            for i in range(n):
                file.write(json.dumps({"id": i} | {k: v[i] for k, v in rows.items()}) + "\n")


def straightforward(folder: Path, n_epochs: int) -> pd.DataFrame:
    """The same scores, example by example."""
    seen: dict[int, dict[str, list]] = {}
    for epoch in range(n_epochs):
        with (folder / f"epoch_{epoch}.jsonl").open() as file:
            for line in file:
                record = json.loads(line)
                of_example = seen.setdefault(record["id"], {name: [] for name in QUANTITIES})
                for name in QUANTITIES:
                    of_example[name].append(record[name])
    rows = {}
    for example, lists in seen.items():
        p, correct = np.array(lists["gold_prob"]), np.array(lists["correct"])
        windows = [p[k : k + WINDOW] for k in range(n_epochs - WINDOW + 1)]
        rows[example] = {
            "confidence": np.mean(p),
            "variability": np.std(p),
            "correctness": np.mean(correct),
            "forgetting_events": int(np.sum(np.diff(correct) < 0)),
            "never_learned": not np.any(correct),
            "aum": np.mean(lists["margin"]),
            "el2n": lists["el2n"][EL2N_EPOCH - 1],
            "entropy": np.mean(lists["entropy"]),
            "loss": np.mean(lists["loss"]),
            "trend": np.polyfit(np.arange(n_epochs), p, 1)[0],
            "dyn_unc": np.mean([np.std(w, ddof=1) for w in windows]),
            "dual": np.mean([(1 - np.mean(w)) * np.std(w, ddof=1) for w in windows]),
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=1_281_167)
    parser.add_argument("--epochs", type=int, default=90)
    parser.add_argument("--fraction", type=float, default=0.0005)
    arguments = parser.parse_args()
    n_few = max(2, round(arguments.n * arguments.fraction))
    with tempfile.TemporaryDirectory() as folder:
        log = make_log(Path(folder) / "log", arguments.n, arguments.epochs)
        for name in QUANTITIES:
            np.asarray(log[name]).max()
        with PeakMemory() as ours:
            start = time.perf_counter()
            table = compute_datamap(log, el2n_epoch=EL2N_EPOCH, window=WINDOW)
            elapsed = time.perf_counter() - start
        write_lines(log, Path(folder), n_few)
        with PeakMemory() as theirs:
            start = time.perf_counter()
            slow = straightforward(Path(folder), arguments.epochs)
            slow_elapsed = time.perf_counter() - start
    for name in slow:  # float16 of the log is exact in JSON
        np.testing.assert_allclose(
            slow[name].astype(float),
            table[name].iloc[:n_few].astype(float),
            atol=1e-6,
            err_msg=name,
        )
    each, slow_each = elapsed / arguments.n, slow_elapsed / n_few
    print(f"{arguments.n:,} examples x {arguments.epochs} epochs, one thread")
    print("| way | examples | time, s | us/example | ratio | peak memory, MiB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    print(f"| kdlib, one pass over the log | {arguments.n:,} | {elapsed:.1f} | {1e6 * each:.1f} "
          f"| 1 | {ours.peak:.0f} |")  # fmt: skip
    print(f"| JSON lines, loop over examples | {n_few:,} | {slow_elapsed:.1f} "
          f"| {1e6 * slow_each:.1f} | {slow_each / each:.0f} | {theirs.peak:.0f} |")  # fmt: skip


if __name__ == "__main__":
    main()
