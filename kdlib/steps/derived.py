"""What a run draws and sees by its settings, by code of its own.

`kdlib.steps.recount` compares it with records. Nothing here is imported from the code that trains:
an error in that code agrees with itself, and not with this.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.cache.remedies import run_to_make

CORNERS = {"easy": (0.0, 1.0), "hard": (0.0, 0.0), "ambiguous_corner": (1.0, 0.5)}


def stream_seed(seed: int, purpose: str, *parts: int) -> int:
    """The 63-bit seed of one purpose of a requested seed."""
    name = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big")
    words = np.random.SeedSequence(seed, spawn_key=(name, *parts)).generate_state(1, np.uint64)
    return int(words[0]) // 2


def stream(seed: int, purpose: str, *parts: int) -> np.random.Generator:
    """The generator of one purpose of a requested seed."""
    return np.random.default_rng(stream_seed(seed, purpose, *parts))


def array_sha256(*arrays: np.ndarray) -> str:
    """sha256 over dtype, shape and bytes of arrays, as evidence holds it."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def tie_numbers(ids: np.ndarray, seed: int) -> np.ndarray:
    """The number of each example that decides ties, (N,) uint64 (SplitMix64 before and after the
    key)."""
    key = stream_seed(seed, "subset")
    return np.array([_splitmix(_splitmix(int(i)) ^ key) for i in ids], np.uint64)


def _splitmix(value: int) -> int:
    full = (1 << 64) - 1
    value = (value + 0x9E3779B97F4A7C15) & full
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & full
    value = (value ^ value >> 27) * 0x94D049BB133111EB & full
    return value ^ value >> 31


@dataclass(frozen=True)
class Shards:
    """An image cache as plain files.

    Attributes:
        ids: (N,) int64, sorted: the examples that are here.
        size: Examples of a shard.
    """

    folder: Path
    ids: np.ndarray
    size: int

    @classmethod
    def open(cls, folder: Path, part: tuple[int, int] | None = None) -> "Shards":
        """Read the indexes of a cache; `part` (i, k) takes the shards of one part of k alone."""
        indexes = [json.loads(path.read_text()) for path in sorted(folder.glob("index*.json"))]
        if not indexes:
            raise FileNotFoundError(f"{folder} holds no cache; {run_to_make(folder)}")
        header = indexes[0]["header"]
        n_shards = -(-header["n_examples"] // header["shard_size"])
        i, k = part or (1, 1)
        kept = range(n_shards * (i - 1) // k, n_shards * i // k)
        entries = {s["first_id"]: s["n"] for index in indexes for s in index["shards"]}
        size = header["shard_size"]
        spans = [np.arange(f, f + n) for f, n in sorted(entries.items()) if f // size in kept]
        return cls(folder, np.concatenate(spans), size)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return self.rows("images", self.ids[:1]).shape[1:]

    def rows(self, column: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a column (`images`, `labels`) in the order of sorted ids."""
        parts = []
        for shard in np.unique(ids // self.size) if len(ids) else self.ids[:1] // self.size:
            path = self.folder / f"{column}-{shard:05d}.npy"
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            parts.append(rows[ids[ids // self.size == shard] - shard * self.size])
        return np.concatenate(parts)

    def sha256(self, ids: np.ndarray) -> str:
        """Fingerprint of images and labels, as an evaluation reports what it read."""
        return array_sha256(self.rows("images", ids), self.rows("labels", ids))


def rounded(n_examples: int, fraction: float) -> int:
    """A fraction of a number of examples, rounded half up."""
    exact = Decimal(str(fraction)) * n_examples
    return int(exact.quantize(Decimal(1), ROUND_HALF_UP))


def lowest(costs: np.ndarray, ids: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Sorted ids of the n lowest costs; ties by the seed's numbers."""
    order = np.lexsort((tie_numbers(ids, seed), costs))
    return np.sort(ids[order[:n]])


def ranking_costs(datamap: pd.DataFrame, kind: str) -> np.ndarray | None:
    """What a ranking sorts by, lowest first; None for a rule that is no ranking of one score."""
    if kind == "random":
        return np.zeros(len(datamap))
    if kind == "ambiguous":
        return -datamap["variability"].to_numpy(np.float64)
    if kind in CORNERS:
        x, y = CORNERS[kind]
        return ((datamap["variability"] - x) ** 2 + (datamap["confidence"] - y) ** 2).to_numpy()
    name, _, end = kind.rpartition("_")
    if name not in datamap or end not in ("top", "bottom"):
        return None
    score = datamap[name].to_numpy(np.float64)
    if name == "forgetting_events":  # never learnt is harder than any number of forgettings
        score = np.where(datamap["never_learned"], np.inf, score)
    return -score if end == "top" else score


def steps_of(training: dict[str, Any], n_examples: int) -> int:
    """Optimiser steps of a budget."""
    if training.get("steps") is not None:
        return training["steps"]
    return math.ceil(Fraction(str(training["epochs"])) * n_examples / training["batch_size"])


@dataclass(frozen=True)
class Expected:
    """What a run is to see by its settings.

    Attributes:
        ids: (N,) int64, sorted: its training set.
        n_steps: Optimiser steps.
        n_drawn: Shards that each pass draws; None: all.
    """

    ids: np.ndarray
    n_steps: int
    n_drawn: int | None = None

    def batches(self, training: dict[str, Any], seed: int, size: int) -> Iterator[np.ndarray]:
        """Example ids of each batch, in order; `size` is the cache's shard size."""
        left = np.empty(0, np.int64)
        number = 0
        for _ in range(self.n_steps):
            while len(left) < training["batch_size"]:
                left = np.concatenate([left, self._one_pass(training, seed, size, number)])
                number += 1
            yield left[: training["batch_size"]]
            left = left[training["batch_size"] :]

    def _one_pass(self, training: dict[str, Any], seed: int, size: int, number: int) -> np.ndarray:
        known = np.unique(self.ids // size)
        if self.n_drawn is not None:
            drawn = stream(seed, "shards", number).choice(len(known), self.n_drawn, replace=False)
            known = known[np.sort(drawn)]
        members = self.ids[np.isin(self.ids // size, known)]
        draw = stream(seed, "order", number)
        if training["order"] == "sequential":
            return members
        if training["order"] == "shuffled":
            return draw.permutation(members)
        shards, width, parts = draw.permutation(known), training["window_shards"], []
        for start in range(0, len(shards), width):
            rows = [self.ids[self.ids // size == s] for s in shards[start : start + width]]
            parts.append(draw.permutation(np.concatenate(rows)))
        return np.concatenate(parts)


def chain(batches: Iterator[np.ndarray], labels: np.ndarray) -> str:
    """Fingerprint of the examples and labels of all batches: sha256 over the fingerprint before and
    the batch's ids, sorted, and their labels.

    Args:
        labels: Label of every example id, (n_examples,) int64.
    """
    digest = b""
    for ids in batches:
        ids = np.sort(ids)
        digest = hashlib.sha256(digest + ids.tobytes() + labels[ids].tobytes()).digest()
    return digest.hex()


def learning_rate(training: dict[str, Any], step: int, n_steps: int) -> float:
    """Learning rate of the step that ends as step `step` (from 1), without a plateau's factor."""
    peak, warm, done = training["lr_peak"], training["warmup_steps"], step - 1
    if done < warm:
        return peak * step / warm
    low = training.get("lr_floor") or 0
    share = (done - warm) / max(n_steps - warm, 1)
    passed = sum(done >= m * n_steps for m in training["milestones"])
    return {
        "constant": peak,
        "plateau": peak,
        "cosine": low + (peak - low) * (1 + math.cos(math.pi * share)) / 2,
        "one_cycle": low * share + peak * (1 - share),
        "step": peak * training["decay"] ** passed,
    }[training["schedule"]]
