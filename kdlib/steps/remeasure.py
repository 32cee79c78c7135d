"""Accuracies measured again when a table is compiled, by code of their own.

The pixel statistics, the normalisation, the loop over the test images and the count of right
answers stand here a second time, on the files of the cache; the network alone is built by the
library. What was measured is kept by the fingerprints of weights, images and statistics, so that a
table compiled again measures only what is new.
"""

import functools
import importlib.metadata
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from kdlib.models.base import Network
from kdlib.models.networks import network_for
from kdlib.models.origins import begun
from kdlib.models.weights import weights_fingerprint
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import open_images
from kdlib.steps.derived import Shards, array_sha256, stream_seed
from kdlib.steps.distill import MACRO, make_subset
from kdlib.steps.folders import student_folder, teacher_folder
from kdlib.steps.processes import prepare_device
from kdlib.steps.recount import Recount
from kdlib.steps.remeasure_loss import TOLERANCE, TeacherRows, live_accuracy, loss_again
from kdlib.steps.teacher_network import (
    begun_network,
    load_teacher,
    of_file,
    teacher_network,
    teacher_pixels,
    teacher_settings,
)
from kdlib.steps.teacher_outputs import REPLAYED
from kdlib.steps.training import OBJECTIVE
from kdlib.study.cells import Cell
from kdlib.study.data import data_path
from kdlib.study.models import Begun, Model
from kdlib.study.objectives import needs_teacher
from kdlib.study.study import Study

BATCH = 1000  # images in memory at once
VERSION = 3  # of what is kept; a measurement by an earlier version is made again
ROUNDED = 0.005  # of an average over classes, where an image lies between two of them
SHORT = 0.05  # share of views whose class may differ between float32 and a type of 16 bits
HALF_PRECISION = 0.001  # share of test images on which stored logits may have another class


def pixel_statistics(shards: Shards, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, pixels in [0, 1]: (C,) float64 each."""
    n, total, squares = 0, 0.0, 0.0
    for part in np.array_split(ids, math.ceil(len(ids) / BATCH)):
        pixels = shards.rows("images", part) / 255  # (B, C, H, W)
        n += pixels.size // pixels.shape[1]
        total, squares = total + pixels.sum((0, 2, 3)), squares + (pixels**2).sum((0, 2, 3))
    std = np.sqrt(np.maximum(squares / n - (total / n) ** 2, 0))
    return total / n, np.where(std > 1e-6, std, 1.0)


class Remeasure:
    """The records of a study's students and teachers, derived and measured again.

    Measurements are kept in `runs/<study>/measured.json`.
    """

    def __init__(self, study: Study, recount: Recount) -> None:
        self.study, self.recount = study, recount
        self.device = prepare_device(study.compute)
        self.images = open_images(study)
        self.mean, self.std = pixel_statistics(recount.train, recount.train_ids)
        self._path = study.runs / "measured.json"
        self._kept = files.read_json(self._path) if self._path.exists() else {}
        self.teacher = functools.cache(self._teacher)  # of a name, None of the study's own
        self.recording = functools.cache(self._recording)  # of a seed
        self._initial: dict[tuple[str, int], str] = {}
        distinct = array_sha256(recount.distinct)
        read = recount.read.get("test", recount.read["validation"])
        self._inputs = files.fingerprint(
            [read, self.mean.tolist(), self.std.tolist(), distinct, VERSION]
        )

    def rights(
        self, path: Path, build: Callable[[], nn.Module], macro: bool = False
    ) -> dict[str, Any]:
        """Test images that a checkpoint classifies rightly: of all (`right`, `n`), and of those
        whose pixels occur only once (`right_distinct`, `n_distinct`).

        Args:
            path: Of the weights.
            build: Makes the network that they belong to.
            macro: Whether to add `macro`: precision, recall and F1, averaged over classes.
        """
        key = f"{files.sha256_file(path)} {self._inputs}"
        if key not in self._kept or (macro and "macro" not in self._kept[key]):
            network = build()
            network.load_state_dict(load_file(path))
            answers = self._answers(network.to(self.device).eval())
            test, distinct = self.recount.test, self.recount.distinct
            labels = test.rows("labels", test.ids)
            right = answers == labels
            self._kept[key] = {
                "macro": _macro(answers.tolist(), labels.tolist()),
                "right": int(right.sum()),
                "n": len(right),
                "right_distinct": int(right[distinct].sum()),
                "n_distinct": int(distinct.sum()),
            }
        return self._kept[key]

    def _answers(self, network: nn.Module) -> np.ndarray:
        """The class that a network gives each test image: (n_test,) int64."""
        test, parts = self.recount.test, []
        mean, std = (torch.tensor(x, dtype=torch.float32) for x in (self.mean, self.std))
        for ids in np.array_split(test.ids, math.ceil(len(test.ids) / BATCH)):
            pixels = torch.from_numpy(test.rows("images", ids)).float() / 255
            pixels = (pixels - mean[:, None, None]) / std[:, None, None]
            with torch.no_grad():
                parts.append(network(pixels.to(self.device)).argmax(1).cpu().numpy())
        return np.concatenate(parts)

    def save(self) -> None:
        """Keep what was measured."""
        files.write_json(self._path, self._kept)

    def student(self, cell: Cell, seed: int, evidence: dict[str, Any]) -> tuple[float, list[str]]:
        """A student's record, derived and measured again.

        Returns: The accuracy of `last` on test images whose pixels occur only once, in [0, 1], NaN
            where there is none; and why its record does not stand, empty where it does.
        Raises: FileNotFoundError or KeyError for a record without what this reads.
        """
        folder = student_folder(self.study, cell, seed)
        reasons = self.recount.reasons(cell, seed, folder, evidence, self._drawn_again)
        settings, init = self.study.students[cell.student], stream_seed(seed, "init")
        build = functools.partial(network_for, self.images, settings.model, init, self.device)
        if settings.is_given:
            reasons += self._unlike_origin(settings, init, evidence, folder, build)
        else:
            reasons += self._unlike_initial(settings.model, init, evidence, build)
        if self.recount.test is None:
            return math.nan, reasons + self._unlabelled(cell, seed, evidence, build)
        for name in ("best", "last"):
            entry = evidence["checkpoints"][name]
            if files.sha256_file(folder / entry["file"]) != entry["file_sha256"]:
                return math.nan, reasons  # another check refuses weights that were changed
            macro = [entry[key] for key in MACRO if key in entry]  # since 2026-11
            again = self.rights(folder / entry["file"], build, macro=bool(macro))
            reasons += _unlike(f"`{name}`", entry["test_accuracy"], again["right"], again["n"])
            if macro and not np.allclose(macro, again["macro"], rtol=0, atol=ROUNDED):
                reasons.append(f"`{name}`: {' '.join(MACRO)} are {macro}, again {again['macro']}")
        objective = self.study.objectives[cell.objective]
        if needs_teacher(objective) and objective.teacher in self.study.shared_teachers:
            reasons += [f"teacher: {reason}" for reason in self.teacher(objective.teacher)]
            reasons += self._live(cell, seed, folder, evidence)
        if evidence["subset"]["parent_datamap"] is not None:
            recorded = self.recording(seed) if self.study.dynamics.per_seed else self.recorded
            reasons += [f"datamap: {reason}" for reason in recorded]
        n = again["n_distinct"]
        return again["right_distinct"] / n if n else math.nan, reasons

    def _live(self, cell: Cell, seed: int, folder: Path, evidence: dict[str, Any]) -> list[str]:
        """Why the accuracy of a live teacher on its first views does not stand."""
        live = evidence["pairing"].get("live") or {"accuracy": None}
        if live["accuracy"] is None or cell.strategy == "random_shards":  # passes are not derived
            return []
        if (key := f"{files.fingerprint(live)} {self._inputs}") not in self._kept:
            rows_of = self._teacher_rows(self.study.objectives[cell.objective].teacher)
            self._kept[key] = live_accuracy(rows_of, self.recount, cell, seed, folder, live)
        again, recorded = self._kept[key], live["accuracy"]
        if abs(again - recorded) <= (1 / live["n"] if live["precision"] == "float32" else SHORT):
            return []
        return [f"its live teacher measured again: {again:.2%} right, {recorded:.2%} on record"]

    def _unlabelled(
        self, cell: Cell, seed: int, evidence: dict[str, Any], build: Callable[[], nn.Module]
    ) -> list[str]:
        """Why the validation loss of the last step does not stand; that of `best` is the lowest of
        the same curve."""
        study, recount, folder = self.study, self.recount, student_folder(self.study, cell, seed)
        entry, objective = evidence["checkpoints"]["last"], study.objectives[cell.objective]
        kept = load_file(folder / OBJECTIVE)
        if weights_fingerprint(kept) != evidence["objective_sha256"]:
            return [f"{OBJECTIVE} is not as the training left it"]
        parts = [entry["weights_sha256"], evidence["objective_sha256"], evidence["teacher"]]
        key = f"{files.fingerprint(parts)} {self._inputs}"
        if key not in self._kept:
            network = build()
            network.load_state_dict(load_file(folder / entry["file"]))
            self._kept[key] = loss_again(
                study, cell.objective, folder, evidence, network.eval(), recount.train,
                self._teacher_rows(objective.teacher), recount.validation_ids, self.mean, self.std,
            )  # fmt: skip
        again, recorded = self._kept[key], entry["validation_loss"]
        if math.isclose(again, recorded, rel_tol=TOLERANCE):
            return []
        return [f"`last` measured again: validation loss {again:.6g}, {recorded:.6g} on record"]

    def _teacher_rows(self, name: str | None) -> TeacherRows:
        """A teacher's outputs: the stored ones, or of a live one those that it computes."""
        study, folder = self.study, teacher_folder(self.study, name)
        if not study.teacher.live:
            which = "train" if study.teacher.stored.views is None else REPLAYED
            stored = Shards.open(folder / f"outputs-{which}", study.data.part_of("train"))
            return lambda names, ids, _: {
                n: stored.rows(n, ids)[:, 0].astype(np.float32) for n in names
            }
        made = read_evidence(folder)
        network = load_teacher(study, self.images, self.device, folder, made, name).eval()
        shown = teacher_pixels(study, self.images, name)
        mean, std = (np.float32(x)[:, None, None] for x in (shown.mean, shown.std))

        def live(names: tuple[str, ...], ids: np.ndarray, images: np.ndarray) -> dict:
            inputs = torch.from_numpy(((images - mean) / std).astype(np.float32))
            with torch.no_grad():
                outputs = network.outputs(inputs.to(self.device), names)
            return {name: value.float().cpu().numpy() for name, value in outputs.items()}

        return live

    def _drawn_again(self, cell: Cell, seed: int) -> np.ndarray | None:
        """The subset of a rule that `Recount` does not derive, for one seed in five."""
        if seed not in self.study.seeds[::5]:
            return None
        return make_subset(self.study, self.images, cell, seed).example_ids

    def _unlike_initial(
        self, model: Model, init: int, evidence: dict[str, Any], build: Callable[[], nn.Module]
    ) -> list[str]:
        """A sentence when the training did not begin at the weights of its seed; another version of
        torch may draw others."""
        if evidence["made"]["versions"]["torch"] != importlib.metadata.version("torch"):
            return []
        key = (model.model_dump_json(), init)
        if key not in self._initial:
            self._initial[key] = weights_fingerprint(build())
        if evidence["initialisation"]["weights_sha256"] == self._initial[key]:
            return []
        return ["its initial weights are not those that its seed draws"]

    def _recording(self, seed: int) -> list[str]:
        """Why the recording of a seed does not stand, or its datamap is not made of it."""
        name, model = next(iter(self.study.upstream.recordings.models.items()))
        folder = self.study.upstream.runs / "recorded" / f"model={name}" / f"seed={seed}"
        evidence, init = read_evidence(folder), stream_seed(seed, "init")
        build = functools.partial(network_for, self.images, model, init, self.device)
        reasons = self._unlike_initial(model, init, evidence, build)
        return reasons + self.recount.recording_reasons(seed, folder, evidence)

    def _unlike_origin(
        self,
        settings: Begun,
        init: int,
        evidence: dict[str, Any],
        folder: Path,
        build: Callable[[], Network],
    ) -> list[str]:
        """A sentence for each fact of a training that began from given weights which these, or its
        last checkpoint, contradict."""
        record = evidence["initialisation"]
        try:
            again = self._begun_again(settings, init, build)
        except RuntimeError as error:
            return [str(error)]
        facts = [(key, record.get(key), again[key]) for key in ("origin", "body_sha256", "last")]
        if evidence["made"]["versions"]["torch"] == importlib.metadata.version("torch"):
            facts.append(("weights_sha256", record["weights_sha256"], again["weights_sha256"]))
        reasons = [
            f"its initial weights have {key} {recorded} on record, {derived} by its settings"
            for key, recorded, derived in facts
            if recorded != derived
        ]
        if again["elsewhere"]:
            reasons.append(f"{again['elsewhere']} of its initial tensors do not stand in the file")
        last = load_file(folder / evidence["checkpoints"]["last"]["file"])
        body = {key: tensor for key, tensor in last.items() if key not in again["names"]}
        stayed = weights_fingerprint(body) == record.get("body_sha256")
        asked = settings.freeze is not None
        if (bool(record.get("frozen")), stayed) != (asked, asked):
            reasons.append(
                f"its backbone {'did not change' if stayed else 'changed'} in training, "
                f"{record.get('frozen', 0)} tensors were frozen, and its settings "
                f"{'freeze it' if asked else 'train it'}"
            )
        return reasons

    def _begun_again(
        self, settings: Begun, init: int, build: Callable[[], Network]
    ) -> dict[str, Any]:
        """What a training with these settings and seed begins from; kept, so that published weights
        are fetched once. `names`: of the last layer's tensors; `elsewhere`: how many of the others
        are not in the file."""
        file = of_file(settings)
        parts = [settings.model_dump(mode="json"), init, file, torch.__version__, VERSION]
        key = f"begun {files.fingerprint(parts)}"
        if key not in self._kept:
            network = begun_network(build(), settings, self.images)
            names = sorted(network.last_names())
            state = network.state_dict()
            body = {name: tensor for name, tensor in state.items() if name not in names}
            origin, lacking = begun(network)["origin"], 0
            if settings.weights is not None:
                origin = f"file: {file['weights_file']}"
                known = _tensors_in(data_path(settings.weights))
                moved = [t for n, t in body.items() if not n.endswith("num_batches_tracked")]
                lacking = sum(_tensor_sha256(tensor) not in known for tensor in moved)
            self._kept[key] = {
                "origin": origin,
                "weights_sha256": weights_fingerprint(network),
                "body_sha256": weights_fingerprint(body),
                "last": begun(network)["last"],
                "names": names,
                "elsewhere": lacking,
            }
        return self._kept[key]

    @functools.cached_property
    def recorded(self) -> list[str]:
        """Why the record of the training whose dynamics make the datamap does not stand."""
        folder = self.study.recorded_run
        evidence = read_evidence(folder)
        return self.recount.teacher_reasons(folder, evidence) if "budget" in evidence else []

    def _teacher(self, name: str | None) -> list[str]:
        """Why the card of a teacher does not stand: its stored logits and its checkpoint are
        measured again. That of a network without a classifier is the accuracy of a probe."""
        folder = teacher_folder(self.study, name)
        evidence = read_evidence(folder)
        card, test = evidence["teacher"], self.recount.test
        if card["measured_by"] != "logits":
            return []
        stored = Shards.open(folder / "outputs-test", self.study.data.part_of("test"))
        right = int((_predictions(stored) == test.rows("labels", test.ids)).sum())
        reasons = _unlike("its stored logits", card["measured"], right, len(test.ids))
        if card["trained_here"]:
            reasons += self.recount.teacher_reasons(folder, evidence)
            build = functools.partial(teacher_network, self.study, self.images, self.device, name)
            again = self.rights(folder / evidence["checkpoints"]["last"]["file"], build)
            if abs(again["right"] / again["n"] - card["measured"]) > HALF_PRECISION:
                reasons += _unlike("its weights", card["measured"], again["right"], again["n"])
            settings = teacher_settings(self.study, name)
            if settings.is_given:
                init = stream_seed(settings.seed, "init")
                reasons += self._unlike_origin(settings, init, evidence, folder, build)
        return reasons


def _predictions(stored: Shards) -> np.ndarray:
    """The class of the largest stored logit of each example, in the first view."""
    sparse = not any(stored.folder.glob("logits-*.npy"))
    values = stored.rows("values" if sparse else "logits", stored.ids)[:, 0]
    place = values.astype(np.float32).argmax(1)
    if not sparse:
        return place
    return stored.rows("indices", stored.ids)[np.arange(len(place)), 0, place]


def _macro(answers: list[int], labels: list[int]) -> list[float]:
    """Mean precision, recall and F1 over the classes that occur, from counts of pairs."""
    named, there, of_class = Counter(answers), Counter(labels), []
    rights = Counter(a for a, label in zip(answers, labels, strict=True) if a == label)
    for c in {*named, *there}:
        precision, recall = (rights[c] / n[c] if n[c] else 0.0 for n in (named, there))
        both = precision + recall
        of_class.append((precision, recall, 2 * precision * recall / both if both else 0.0))
    return np.mean(of_class, axis=0).tolist()


def _tensors_in(path: Path) -> set[str]:
    """A hash of the shape and values of every tensor in a weight file, at any place."""
    if path.suffix == ".safetensors":
        content = load_file(path)
    else:
        content = torch.load(path, map_location="cpu", weights_only=True)
    found, left = set(), [content]
    while left:
        value = left.pop()
        if isinstance(value, torch.Tensor):
            found.add(_tensor_sha256(value))
        elif isinstance(value, dict):
            left += value.values()
    return found


def _tensor_sha256(tensor: torch.Tensor) -> str:
    return array_sha256(tensor.detach().cpu().float().numpy())


def _unlike(what: str, accuracy: float, right: int, n: int) -> list[str]:
    if abs(accuracy * n - right) <= 1:
        return []
    return [f"{what} measured again: {right} of {n} test images right, {accuracy:.2%} on record"]
