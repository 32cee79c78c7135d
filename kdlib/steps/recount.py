"""What a run's record says, derived a second time from the files on the disk.

The code that trains also writes what it did, so an error in it agrees with itself. This module
derives the same facts by code of its own: from `settings.json`, the shards of the caches,
`subset.parquet` and the datamap it computes the split, the subset, the number of steps, the
examples and labels of every batch, and the learning rate of every evaluation. It calls none of the
code that trains, and draws its random numbers by `stream`. `kdlib.steps.remeasure` does the same
for accuracies.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.study.cells import Cell
from kdlib.study.selections import PICKED, Ranking
from kdlib.study.study import Study

Subsets = Callable[[Cell, int], np.ndarray | None]

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
    parts = [f"{a.dtype.str}{a.shape}".encode() + a.tobytes() for a in arrays]
    return hashlib.sha256(b"".join(parts)).hexdigest()


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
            raise FileNotFoundError(f"{folder} holds no cache; run the step that makes it again")
        header = indexes[0]["header"]
        n_shards = -(-header["n_examples"] // header["shard_size"])
        i, k = part or (1, 1)
        kept = range(n_shards * (i - 1) // k, n_shards * i // k)
        entries = {s["first_id"]: s["n"] for index in indexes for s in index["shards"]}
        size = header["shard_size"]
        spans = [np.arange(f, f + n) for f, n in sorted(entries.items()) if f // size in kept]
        return cls(folder, np.concatenate(spans), size)

    def rows(self, column: str, ids: np.ndarray) -> np.ndarray:
        """Rows of a column (`images`, `labels`) in the order of sorted ids."""
        parts = []
        for shard in np.unique(ids // self.size):
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
    share = (done - warm) / max(n_steps - warm, 1)
    passed = sum(done >= m * n_steps for m in training["milestones"])
    return {
        "constant": peak,
        "plateau": peak,
        "cosine": peak * (1 + math.cos(math.pi * share)) / 2,
        "one_cycle": peak * (1 - share),
        "step": peak * training["decay"] ** passed,
    }[training["schedule"]]


def unlike_executed(step: dict[str, Any], executed: dict[str, Any], n_steps: int) -> list[str]:
    """A sentence for each setting that the objects of a training had otherwise than its
    `settings.json` asks for.

    Args:
        step: The settings of its step.
        executed: As its evidence has them.
        n_steps: Steps of the plan.
    """
    training = step["training"]
    momentum = training["momentum"] if training["optimiser"] == "sgd" else 0.0
    asked = {
        "batch_size": training["batch_size"],
        "accumulate": training["accumulate"],
        "clip_norm": training.get("clip_norm"),
        "precision": "bfloat16" if step["compute"]["precision"] == "bf16" else "float32",
        "optimiser": training["optimiser"],
        "weight_decay": training["weight_decay"],
        "momentum": momentum,
        "augment": training["augment"],
        "objective": step["objective"],
        "ema": training.get("ema"),
    }
    wrong = [
        f"{name} as executed: {_short(executed[name])}, asked for {_short(value)}"
        for name, value in asked.items()
        if executed[name] != value
    ]
    lowered = 1.0  # by which a plateau has multiplied the rate so far
    for number, rate in executed["learning_rates"].items():
        wanted = learning_rate(training, int(number), n_steps)
        if training["schedule"] == "plateau":
            while rate < wanted * lowered * 0.999:
                lowered *= training["decay"]
            wanted *= lowered
        if not math.isclose(rate, wanted, rel_tol=1e-9, abs_tol=1e-15):
            wrong.append(f"learning rate of step {number}: {rate:.6g}, asked for {wanted:.6g}")
            break
    return wrong


class Recount:
    """What the runs of a study are to have seen, by the study and the files on the disk."""

    def __init__(self, study: Study) -> None:
        data, cache = study.upstream.data, study.upstream.cache
        self.study = study
        self.train = Shards.open(cache / "train", data.part_of("train"))
        self.test = Shards.open(cache / "test", data.part_of("test"))
        order = stream(data.split_seed, "split").permutation(len(self.train.ids))
        held_out, kept = order[: data.n_validation], order[data.n_validation :]
        self.train_ids = np.sort(self.train.ids[kept])
        self.validation_ids = np.sort(self.train.ids[held_out])
        self.labels = np.full(self.train.ids[-1] + 1, -1, np.int64)
        self.labels[self.train.ids] = self.train.rows("labels", self.train.ids)

    @functools.cached_property
    def read(self) -> dict[str, dict[str, Any]]:
        """What an evaluation of each split reports: number of images, and their fingerprint."""
        splits = {
            "validation": (self.train, self.validation_ids),
            "test": (self.test, self.test.ids),
        }
        return {name: {"n": len(i), "sha256": s.sha256(i)} for name, (s, i) in splits.items()}

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """Whether no image of the training split, and no test image before it, has the same pixels:
        (n_test,) bool."""
        seen = {_pixels_sha256(image) for image in self._images(self.train)}
        distinct = []
        for image in self._images(self.test):
            name = _pixels_sha256(image)
            distinct.append(name not in seen)
            seen.add(name)
        return np.array(distinct)

    def _images(self, cache: Shards) -> Iterator[np.ndarray]:
        for ids in np.array_split(cache.ids, max(1, len(cache.ids) // cache.size)):
            yield from cache.rows("images", ids)

    @functools.cached_property
    def datamap(self) -> pd.DataFrame:
        """The datamap's file, by example id."""
        table = pd.read_parquet(self.study.upstream.runs / "datamap" / "datamap.parquet")
        return (table.set_index("example_id") if "example_id" in table else table).sort_index()

    def subset(self, cell: Cell, seed: int) -> np.ndarray | None:
        """The subset of a cell and seed, sorted ids; None for a rule that is not told here."""
        shards, ids = np.unique(self.train_ids // self.train.size), self.train_ids
        if cell.strategy in ("full", "random_shards"):
            return ids
        if cell.strategy == "fixed_shards":
            n = max(1, rounded(len(shards), cell.fraction))
            drawn = stream(seed, "subset").choice(shards, n, replace=False)
            return ids[np.isin(ids // self.train.size, drawn)]
        if cell.strategy.startswith(PICKED):
            return pd.read_parquet(self.study.picked(cell.strategy))["example_id"].to_numpy()
        rule = self.study.selection(cell.strategy)
        if rule.balanced or not isinstance(rule, Ranking):
            return None
        if rule.kind == "random":
            costs = np.zeros(len(ids))
        else:
            costs = ranking_costs(self.datamap.loc[ids], rule.kind)
        return lowest(costs, ids, rounded(len(ids), cell.fraction), seed)

    def expected(self, cell: Cell, ids: np.ndarray, training: dict[str, Any]) -> Expected:
        """What a student with this training set is to see."""
        n_drawn, n = None, len(ids)
        if cell.strategy == "random_shards":
            n_shards = len(np.unique(ids // self.train.size))
            n_drawn = max(1, rounded(n_shards, cell.fraction))
            n = round(n * n_drawn / n_shards)  # an epoch: the mean number of a pass
        return Expected(ids, steps_of(training, n), n_drawn)

    def reasons(
        self, cell: Cell, seed: int, folder: Path, evidence: dict[str, Any], again: Subsets
    ) -> list[str]:
        """Why a student's record does not stand: a sentence for each fact that its files
        contradict.

        Args:
            again: Draws the subset of rules that are not derived here, by the library's own rule;
                returns None where it is not to be drawn.
        """
        settings = json.loads((folder / "settings.json").read_text())
        training, step = settings["step"]["training"], settings["step"]
        ids = pd.read_parquet(folder / "subset.parquet")["example_id"].to_numpy(np.int64)
        wrong = []

        def compare(what: str, recorded: Any, derived: Any) -> None:
            if recorded != derived:
                wrong.append(
                    f"{what}: {_short(recorded)} on record, {_short(derived)} by the files"
                )

        compare("seed", step["seed"], seed)
        compare("cell", (step["subset"]["strategy"], step["subset"]["fraction"]),
                (cell.strategy, cell.fraction))  # fmt: skip
        compare("split", evidence["data"]["split"],
                array_sha256(self.train_ids, self.validation_ids))  # fmt: skip
        sha256 = array_sha256(ids)
        compare("subset", evidence["subset"]["sha256"], sha256)
        compare("subset of the settings", settings["inputs"]["subset"], sha256)
        compare("examples outside the training split", len(np.setdiff1d(ids, self.train_ids)), 0)
        drawn = self.subset(cell, seed)
        drawn = again(cell, seed) if drawn is None else drawn
        if drawn is not None:
            compare("subset drawn again", sha256, array_sha256(drawn))
        expected = planned = self.expected(cell, ids, training)
        recorded = evidence["budget"]["recorded"]
        if training.get("early_stopping") is not None:  # the budget is an upper bound
            n_steps = min(recorded["steps"], expected.n_steps)
            expected = dataclasses.replace(expected, n_steps=n_steps)
        batches = list(expected.batches(training, seed, self.train.size))
        budget = {
            "steps": len(batches),
            "samples": sum(map(len, batches)),
            "unique_examples": len(np.unique(np.concatenate(batches))),
        }
        for name, number in budget.items():
            compare(name, recorded[name], number)
        compare("batches", evidence["read"]["batches_sha256"], chain(iter(batches), self.labels))
        compare("validation images", evidence["read"]["validation"], [self.read["validation"]])
        for name in ("last", "best"):
            entry = evidence["checkpoints"][name]
            compare(f"test images of `{name}`", entry["read"], self.read["test"])
        return wrong + unlike_executed(step, evidence["executed"], planned.n_steps)


def _pixels_sha256(image: np.ndarray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).data).digest()


def _short(value: Any) -> str:
    """A value for a sentence; a fingerprint by its first digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(v)}" for key, v in value.items())
    if isinstance(value, list):
        return " and ".join(map(_short, value)) or "nothing"
    return str(value)
