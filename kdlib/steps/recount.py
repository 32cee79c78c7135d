"""A run's record, compared with what its files say.

The code that trains also writes what it did, so an error in it agrees with itself. Here split,
subset, number of steps, examples and labels of every batch, and the learning rate of every
evaluation are derived again by `kdlib.steps.derived`, from `settings.json`, the shards of caches,
`subset.parquet` and the datamap. `kdlib.steps.remeasure` does the same for accuracies.
"""

import dataclasses
import functools
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from kdlib.steps.derived import (
    Expected,
    Shards,
    array_sha256,
    chain,
    learning_rate,
    lowest,
    ranking_costs,
    rounded,
    steps_of,
    stream,
    stream_seed,
)
from kdlib.study.cells import Cell
from kdlib.study.data import Data, cache_folder
from kdlib.study.evaluation import OWN
from kdlib.study.selections import PICKED, Ranking
from kdlib.study.study import Study

# By the precision that a study asks for, the type of a network's passes
TYPES = {"float32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of a run, with the precision that was decided for it."""
    settings = json.loads((folder / "settings.json").read_text())
    decided = {k: v for k, v in settings["inputs"].items() if k == "precision"}
    settings["step"]["compute"] |= decided
    return settings


def unlike_executed(step: dict[str, Any], executed: dict[str, Any], n_steps: int) -> list[str]:
    """A sentence for each setting that the objects of a training had otherwise than its
    `settings.json` asks for.

    Args:
        step: The settings of its step.
        executed: As its evidence has them.
        n_steps: Steps of the plan.
    """
    training = step["training"]
    same = ("batch_size", "accumulate", "optimiser", "weight_decay", "augment")
    asked = {key: training[key] for key in same} | {
        "clip_norm": training.get("clip_norm"),
        "ema": training.get("ema"),
        "momentum": training["momentum"] if training["optimiser"] == "sgd" else 0.0,
        "precision": TYPES[step["compute"]["precision"]],
        "objective": step["objective"],
    }
    if training.get("betas"):
        asked["betas"] = training["betas"]
    wrong = [
        f"{name} as executed: {_short(executed[name])}, asked for {_short(value)}"
        for name, value in asked.items()
        if executed[name] != value
    ]
    lowered = 1.0  # by which a plateau has multiplied the rate so far
    for number, rate in executed["learning_rates"].items():
        wanted = learning_rate(training, int(number), n_steps)
        if training["schedule"] == "plateau":
            lowest = training.get("lr_floor", 0) / training["lr_peak"]
            while rate < wanted * lowered * 0.999 and lowered > lowest:
                lowered = max(lowered * training["decay"], lowest)
            wanted *= lowered
        if not math.isclose(rate, wanted, rel_tol=1e-9, abs_tol=1e-15):
            wrong.append(f"learning rate of step {number}: {rate:.6g}, asked for {wanted:.6g}")
            break
    return wrong


def unlike_recorded_steps(folder: Path, steps_sha256: str) -> list[str]:
    """A sentence for each way in which `steps.parquet` of a run is not what its metrics say: of
    another content, of other steps, of another mean loss or learning rate at an evaluation.

    Args:
        steps_sha256: Of the file, as its evidence has it.
    """
    data = (folder / "steps.parquet").read_bytes()
    if hashlib.sha256(data).hexdigest() != steps_sha256:
        return ["steps.parquet was changed"]
    steps, metrics = pd.read_parquet(io.BytesIO(data)), pd.read_parquet(folder / "metrics.parquet")
    ends = metrics["step"].to_numpy()
    if steps["step"].tolist() != list(range(1, ends[-1] + 1)):
        return [f"steps.parquet has {len(steps)} steps of {ends[-1]}"]
    of_row = steps.groupby(np.searchsorted(ends, steps["step"]))
    again = {"train_loss": of_row["loss"].mean(), "learning_rate": of_row["learning_rate"].last()}
    return [
        f"{column} by the recorded steps is not that of the metrics"
        for column, values in again.items()
        if not np.allclose(values, metrics[column], rtol=1e-9, atol=0)
    ]


class Recount:
    """What the runs of a study are to have seen, by the study and the files on the disk."""

    def __init__(self, study: Study) -> None:
        data, cache = study.upstream.data, study.upstream.cache
        self.study = study
        self.train = Shards.open(cache / "train", data.part_of("train"))
        self.test = Shards.open(cache / "test", data.part_of("test")) if data.labelled else None
        self.train_ids, self.validation_ids = _split(data, self.train.ids)
        self.labels = np.full(self.train.ids[-1] + 1, -1, np.int64)
        self.labels[self.train.ids] = self.train.rows("labels", self.train.ids)
        self.datamap = functools.cache(self._datamap)  # of a seed

    @functools.cached_property
    def read(self) -> dict[str, dict[str, Any]]:
        """What an evaluation of each split reports: number of images, and their fingerprint."""
        splits = {"validation": (self.train, self.validation_ids)}
        if self.test is not None:
            splits["test"] = (self.test, self.test.ids)
        return {name: {"n": len(i), "sha256": s.sha256(i)} for name, (s, i) in splits.items()}

    @functools.cache  # noqa: B019 (lives as long as the tables are compiled)
    def probed(self, on: str) -> dict[str, str]:
        """What a probe on a data set reads, by column of its table; `own` means the study's."""
        read, train, train_ids, test = {}, self.train, self.train_ids, self.test
        if on != OWN:
            data = self.study.probe.others[on]
            train = Shards.open(cache_folder(data) / "train", data.part_of("train"))
            test = Shards.open(cache_folder(data) / "test")
            train_ids, _ = _split(data, train.ids)
        for split, shards, ids in (("train", train, train_ids), ("test", test, test.ids)):
            sha256 = array_sha256(ids, shards.rows("labels", ids))
            read[f"{split}_examples"] = f"{split} {len(ids)} {sha256}"
        return read

    @functools.cached_property
    def pixels(self) -> dict[str, list[bytes]]:
        """A hash of the pixels of each image, in the order of ids, by split."""
        return {
            split: [
                hashlib.blake2b(image.tobytes(), digest_size=16).digest()
                for ids in np.array_split(shards.ids, max(1, len(shards.ids) // shards.size))
                for image in shards.rows("images", ids)
            ]
            for split, shards in self.splits.items()
        }

    @property
    def splits(self) -> dict[str, Shards]:
        """`train` and, where there are labels, `test`."""
        both = {"train": self.train, "test": self.test}
        return {split: shards for split, shards in both.items() if shards is not None}

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """Whether no other image of either split has the same pixels: (n_test,) bool."""
        if self.test is None:
            return np.zeros(0, bool)
        n_images = Counter(self.pixels["train"] + self.pixels["test"])
        return np.array([n_images[pixels] == 1 for pixels in self.pixels["test"]])

    def _datamap(self, seed: int) -> pd.DataFrame:
        """The file of the datamap that chooses the subsets of a seed, by example id."""
        folder = f"datamaps/seed={seed}" if self.study.dynamics.per_seed else "datamap"
        table = pd.read_parquet(self.study.upstream.runs / folder / "datamap.parquet")
        return (table.set_index("example_id") if "example_id" in table else table).sort_index()

    def subset(self, cell: Cell, seed: int) -> np.ndarray | None:
        """The subset of a cell and seed, sorted ids; None for a rule that is not derived here."""
        shards, ids = np.unique(self.train_ids // self.train.size), self.train_ids
        if cell.strategy in ("full", "random_shards"):
            return ids
        if cell.strategy == "fixed_shards":
            n = cell.shards or max(1, rounded(len(shards), cell.fraction))
            drawn = stream(seed, "subset").choice(shards, n, replace=False)
            return ids[np.isin(ids // self.train.size, drawn)]
        if cell.strategy.startswith(PICKED):
            return pd.read_parquet(self.study.picked(cell.strategy))["example_id"].to_numpy()
        rule = self.study.selection(cell.strategy)
        if rule.balanced or not isinstance(rule, Ranking):
            return None
        drawn = rule.kind == "random"  # which reads no datamap
        costs = (
            np.zeros(len(ids)) if drawn else ranking_costs(self.datamap(seed).loc[ids], rule.kind)
        )
        return lowest(costs, ids, rounded(len(ids), cell.fraction), seed)

    def expected(self, cell: Cell, ids: np.ndarray, training: dict[str, Any]) -> Expected:
        """What a student with this training set is to see."""
        n_drawn, n = None, len(ids)
        if cell.strategy == "random_shards":
            n_shards = len(np.unique(ids // self.train.size))
            n_drawn = cell.shards or max(1, rounded(n_shards, cell.fraction))
            n = round(n * n_drawn / n_shards)  # an epoch: the mean number of a pass
        return Expected(ids, steps_of(training, n), n_drawn)

    def reasons(
        self,
        cell: Cell,
        seed: int,
        folder: Path,
        evidence: dict[str, Any],
        again: Callable[[Cell, int], np.ndarray | None],
    ) -> list[str]:
        """Why a student's record does not stand: a sentence for each fact that its files
        contradict.

        Args:
            again: Draws the subset of rules that are not derived here, by the library's own rule;
                returns None where it is not to be drawn.
        """
        settings = _settings(folder)
        step, asked = settings["step"], settings["step"]["subset"]
        ids = pd.read_parquet(folder / "subset.parquet")["example_id"].to_numpy(np.int64)
        split, sha256 = array_sha256(self.train_ids, self.validation_ids), array_sha256(ids)
        outside = len(np.setdiff1d(ids, self.train_ids))
        drawn = self.subset(cell, seed)
        drawn = again(cell, seed) if drawn is None else drawn
        facts = [
            ("seed", step["seed"], seed),
            ("cell", asked["strategy"], cell.strategy),
            *(("cell", asked.get(size), value) for size, value in cell.size.items()),
            ("split", evidence["data"]["split"], split),
            ("subset", evidence["subset"]["sha256"], sha256),
            ("subset of the settings", settings["inputs"]["subset"], sha256),
            ("examples outside the training split", outside, 0),
            ("subset drawn again", sha256, sha256 if drawn is None else array_sha256(drawn)),
        ]
        expected = self.expected(cell, ids, step["training"])
        reasons = _contradicted(facts + self._live(step, expected, seed, evidence))
        return reasons + self.training_reasons(step, expected, seed, evidence, folder)

    def _live(
        self, step: dict[str, Any], expected: Expected, seed: int, evidence: dict[str, Any]
    ) -> list[tuple[str, Any, Any]]:
        """Facts of a teacher that computed its outputs live: its weights, and which examples and
        views it was asked for first, by the first of the processes that shared each batch."""
        live = (evidence["pairing"] or {}).get("live")
        asked = step.get("teacher_outputs") == "live"
        if live is None or not asked:
            return [("a live teacher", live is not None, asked)]
        first = self.first_asked(step, expected, seed, live["n"])
        return [
            ("the live teacher's weights", live["weights_sha256"],
             evidence["teacher"]["weights_sha256"]),
            ("its views", live["view"]["augment"], step["training"]["augment"]),
            ("the seed of its views", live["view"]["seed"], stream_seed(seed, "augment")),
            ("the examples it was asked for", live["examples_sha256"],
             array_sha256(first)),
        ]  # fmt: skip

    def first_asked(
        self, step: dict[str, Any], expected: Expected, seed: int, n: int
    ) -> np.ndarray:
        """Ids of the first `n` examples or more, in whole batches, of the first of the processes
        that share each batch."""
        share, first = step["training"]["batch_size"] // step["compute"]["processes"], []
        for ids in expected.batches(step["training"], seed, self.train.size):
            first.append(ids[:share])
            if sum(map(len, first)) >= n:
                break
        return np.concatenate(first)

    def training_reasons(
        self,
        step: dict[str, Any],
        expected: Expected,
        seed: int,
        evidence: dict[str, Any],
        folder: Path,
    ) -> list[str]:
        """A sentence for each fact of a training that its files contradict.

        Args:
            step: Its settings: `training`, `compute`, `objective`.
            expected: What it is to have seen.
            folder: Of its run.
        """
        training, recorded = step["training"], evidence["budget"]["recorded"]
        read, planned = evidence["read"], expected.n_steps
        held_out = [self.read["validation"]] if len(self.validation_ids) else []
        if training.get("early_stopping") is not None:  # the budget is an upper bound
            expected = dataclasses.replace(expected, n_steps=min(recorded["steps"], planned))
        batches = list(expected.batches(training, seed, self.train.size))
        n_unique = len(np.unique(np.concatenate(batches)))
        kept = evidence["checkpoints"] if self.test is not None else ()
        tested = {name: kept[name]["read"] for name in kept}
        facts = [
            ("steps", recorded["steps"], len(batches)),
            ("samples", recorded["samples"], sum(map(len, batches))),
            ("unique_examples", recorded["unique_examples"], n_unique),
            ("batches", read["batches_sha256"], chain(iter(batches), self.labels)),
            ("validation images", read["validation"], held_out),
            *((f"test images of `{name}`", of, self.read["test"]) for name, of in tested.items()),
        ]
        reasons = _contradicted(facts) + unlike_executed(step, evidence["executed"], planned)
        if training.get("record_steps"):
            reasons += unlike_recorded_steps(folder, evidence["steps_sha256"])
        return reasons

    def teacher_reasons(self, folder: Path, evidence: dict[str, Any]) -> list[str]:
        """The same of a training on all training images: a teacher's, or that of the network whose
        dynamics make the datamap."""
        asked = _settings(folder)["step"]
        of = asked["teacher"] if evidence["step"] == "teacher" else asked["dynamics"]
        step = asked | {"training": of["training"], "objective": {"kind": "cross_entropy"}}
        expected = Expected(self.train_ids, steps_of(of["training"], len(self.train_ids)))
        return self.training_reasons(step, expected, of["seed"], evidence, folder)

    def recording_reasons(self, seed: int, folder: Path, evidence: dict[str, Any]) -> list[str]:
        """The same of the recording of a seed, and of what its datamap took from its log."""
        step = _without_null(_settings(folder)["step"])
        ids = np.load(folder / "dynamics" / "example_ids.npy", allow_pickle=False)
        facts = [
            ("seed of the recording", step["seed"], seed),
            ("examples of the recording", array_sha256(ids), array_sha256(self.train_ids)),
        ]
        reasons, datamap = _contradicted(facts), self.datamap(seed).reindex(ids)
        for score, logged in (("confidence", "gold_prob"), ("correctness", "correct")):
            epochs = np.load(folder / "dynamics" / f"{logged}.npy", allow_pickle=False)  # (E, N)
            unlike = ~(np.abs(datamap[score] - epochs.mean(0, np.float64)) < 1e-6)  # NaN is unlike
            if unlike.any():
                reasons.append(f"{score} of {unlike.sum()} examples is not that of its recording")
        step = step | {"objective": {"kind": "cross_entropy"}}
        expected = Expected(self.train_ids, steps_of(step["training"], len(self.train_ids)))
        return reasons + self.training_reasons(step, expected, seed, evidence, folder)


def _without_null(value: Any) -> Any:
    """Settings without the keys that have no value, as evidence has them."""
    if not isinstance(value, dict):
        return value
    return {key: _without_null(v) for key, v in value.items() if v is not None}


def _split(data: Data, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted training and validation ids of a training split."""
    order = stream(data.split_seed, "split").permutation(len(ids))
    return np.sort(ids[order[data.n_validation :]]), np.sort(ids[order[: data.n_validation]])


def _contradicted(facts: list[tuple[str, Any, Any]]) -> list[str]:
    """A sentence for each fact whose value on record is not the one that was derived."""
    return [
        f"{what}: {_short(recorded)} on record, {_short(derived)} by the files"
        for what, recorded, derived in facts
        if recorded != derived
    ]


def _short(value: Any) -> str:
    """A value for a sentence; a fingerprint by its first digits."""
    if isinstance(value, str) and len(value) == 64:
        return value[:12]
    if isinstance(value, dict):
        return ", ".join(f"{key} {_short(v)}" for key, v in value.items())
    if isinstance(value, list):
        return " and ".join(map(_short, value)) or "nothing"
    return str(value)
