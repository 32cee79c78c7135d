"""Which steps of a study are finished, and why the others are not.

A step is finished when its evidence belongs to the settings and inputs of now, its checks passed
and its files are there. The pipeline runs the steps that are not, `python -m kdlib status` prints
them, and no summary is printed before there are none. All of it is read from the study's own files.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from kdlib.cache.shards import Cache
from kdlib.cartography.subset import Subset
from kdlib.compare.committed import NAMES, committed_folder
from kdlib.dataset.plan import split_ids
from kdlib.repro import files
from kdlib.repro.run import incomplete, read_evidence
from kdlib.steps.folders import (
    datamap_folder,
    datamap_settings,
    dynamics_settings,
    precision_input,
    probe_folder,
    recording_folder,
    recording_of_seed,
    recording_settings,
    student_folder,
    student_settings,
    teacher_folder,
)
from kdlib.study.cells import Cell
from kdlib.study.data import data_path
from kdlib.study.models import Student, Teacher, TrainedTeacher
from kdlib.study.objectives import needs_teacher
from kdlib.study.selections import PICKED
from kdlib.study.study import Study

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"  # beside the package
# What the notebook of a step leaves in `figures/<study>/`, of every study
SHOWN = {
    "datamap": ("datamap.png", "forming.png", "regions.png"),
    "compare": ("summary.md", "comparison.md", "objectives.md", "ledger.md"),
    "scores": ("stability.png", "scores.md"),
    "noise": ("detectors.png", "suspects.png", "noise.md"),
    "audit": ("audit.png", "audit.md"),
}
_EXECUTED = {  # the notebook that makes a step, in its run's folder
    "cache": "01_cache", "teacher": "02_teacher", "datamap": "03_datamap", "distill": "04_distill",
    "probe": "05_probe", "compare": "06_compare", "scores": "07_scores", "noise": "08_noise",
    "audit": "09_audit",
}  # fmt: skip
FAILED, CUT = "stopped at an error", "did not come to its last cell"
_FAULTS = (OSError, ValueError, KeyError, TypeError)  # what evidence of another making raises

Evidence = dict[str, Any]


def unfinished(study: Study, step: str | None = None) -> dict[Path, str]:
    """The folders of the runs of a study that are not finished, and of each the sentence why, in
    the order in which they are made.

    Args:
        step: `scores`, `noise` or `audit`: only this one; None: the whole study.
    """
    why, audit = _Steps(study).why, study.runs / "audit"
    if step is None:
        return {f: sentence for f, sentence in why.items() if study.audit or f != audit}
    folder = study.runs / step
    return {folder: why[folder]} if folder in why else {}


def read_by(study: Study, step: str) -> dict[str, str | None]:
    """The seals of the evidence that the tables of `compare`, `scores` or `noise` are made of, by
    folder; None where there is none."""
    seals: dict[str, str | None] = {}
    for folder in sources(study, step):
        seals[_named(folder)] = None
        with contextlib.suppress(OSError, ValueError):
            seals[_named(folder)] = files.read_json(folder / "evidence.json").get("seal")
    return seals


def _named(folder: Path) -> str:
    return str(folder.relative_to(files.workspace() / "runs"))


def sources(study: Study, step: str) -> list[Path]:
    """The folders of the runs whose evidence is compared, or scored."""
    if step != "compare":
        runs = study.recordings.runs() if study.recordings else []
        return [recording_folder(study, *run) for run in runs]
    teachers = [teacher_folder(study, name) for name in study.shared_teachers]
    shared = [study.upstream.runs / "cache", *teachers]
    shared += [datamap_folder(study)] if study.recorded_training else []
    for seed in study.seeds if study.dynamics.per_seed else ():
        recording = recording_folder(study.upstream, *recording_of_seed(study, seed))
        shared += [recording, datamap_folder(study, seed)]
    students = [student_folder(study, c, seed) for c in study.cells() for seed in study.seeds]
    return [*shared, *students, *(probe_folder(study, c) for c in study.probed_cells())]


class _Steps:
    """The runs of a study, looked at one after another, those first that others read.

    Attributes:
        why: Folder -> sentence, of those that are not finished.
        open: Of these, the folders whose evidence is missing or will be another.
    """

    def __init__(self, study: Study) -> None:
        self.study, self.why, self.open = study, {}, set()
        self._evidence: dict[Path, Evidence] = {}
        self.cache, self.teacher, self.datamap = (
            study.upstream.runs / step for step in ("cache", "teacher", "datamap")
        )
        self._shared()
        for run in study.recordings.runs() if study.recordings else ():
            self._recording(study, *run)
        for cell in study.cells():
            for seed in study.seeds:
                self._student(cell, seed)
        for cell in study.probed_cells():
            self._probes(cell)
        self._tables("compare")
        if study.recordings:
            self._tables("scores")
            if study.data.relabel:
                self._tables("noise")
        audit = study.runs / "audit"
        self._add(audit, study.step_settings("audit"), [self.cache], self._images)
        self._look(audit, "audit")

    def _add(
        self,
        folder: Path,
        asked: dict[str, Any],
        waits: Iterable[Path] = (),
        inputs: Callable[[], dict[str, Any]] = dict,
        further: Callable[[Evidence], str] = lambda evidence: "",
    ) -> None:
        """Look at one run.

        Args:
            asked: Its settings by the study of now.
            waits: Folders of the runs that it reads.
            inputs: The fingerprints of its inputs as they are now, once those are finished.
            further: Another reason why the run is not finished, from its evidence.
        """
        evidence: Evidence = {}
        unmade = [other for other in waits if other in self.open]
        try:
            if not (folder / "evidence.json").is_file():
                sentence = "is not made yet"
            else:
                evidence = read_evidence(folder, asked)
                if unmade:
                    sentence = f"reads {_named(unmade[0])}, which is not finished"
                elif not (sentence := incomplete(folder, evidence)):
                    made_of, now = files.read_json(folder / "settings.json")["inputs"], inputs()
                    lines = files.difference(now, {k: made_of.get(k) for k in now})
                    sentence = f"was made of other inputs ({'; '.join(lines)})" if lines else ""
                    sentence = sentence or further(evidence)
        except _FAULTS as error:
            sentence = files.one_line(error)
        if sentence:
            self.why[folder] = sentence
            self.open.add(folder)
        self._evidence[folder] = evidence

    def _look(self, folder: Path, step: str) -> None:
        """Add what a finished run lacks for the eye: a figure, a text, the end of its notebook,
        where that is younger than its evidence: a run that was made by hand after its notebook had
        failed is finished. No other run reads these."""
        if folder in self.why:
            return
        study = self.study.upstream if step in ("cache", "datamap") else self.study
        for path in (study.figures / name for name in SHOWN.get(step, ())):
            if not path.is_file():
                self.why[folder] = f"{path} is not there"
            elif path.stat().st_mtime < self._evidence[folder]["made"].get("at", 0):
                self.why[folder] = f"{path} is older than the run that it shows"
        # that of students is of all objectives and seeds
        place = folder.parents[1] if step == "distill" else folder
        notebook = place / f"{_EXECUTED[step]}.ipynb"
        if notebook.is_file():
            at = notebook.stat().st_mtime_ns
            made = (folder / "evidence.json").stat().st_mtime_ns
            if at >= made and (fault := end_of_notebook(notebook, at)):
                self.why[folder] = f"{notebook} {fault}"

    def _shared(self) -> None:
        """Cache, teacher, recorded network, datamap and further teachers."""
        study, up = self.study, self.study.upstream
        self._add(self.cache, up.step_settings("cache"), (), self._cached)
        self._look(self.cache, "cache")
        if up.dynamics.model is not None:
            inputs = functools.partial(self._trained_on, up)
            self._add(up.recorded_run, dynamics_settings(study), [self.cache], inputs)
        for name in study.shared_teachers:
            self._teacher(up if name is None else study, name)
        if up.recorded_run in self.open and self.teacher not in self.why:  # notebook 02 makes both
            why = self.why[up.recorded_run]
            self.why[self.teacher] = f"{_named(up.recorded_run)}: {why}"
        if study.recorded_training is None:
            return
        waits = [self.cache, up.recorded_run, self.teacher]
        inputs = functools.partial(self._of_datamap, up.recorded_run)
        self._add(self.datamap, datamap_settings(study), waits, inputs)
        self._look(self.datamap, "datamap")
        for seed in study.seeds if study.dynamics.per_seed else ():
            self._datamap_of_seed(seed)

    def _recording(self, study: Study, model: str, part: str) -> Path:
        """Look at a recording, once; its folder."""
        folder = recording_folder(study, model, part)
        if folder not in self._evidence:
            asked = recording_settings(study, model, part)
            inputs = functools.partial(self._trained_on, study)
            self._add(folder, asked, [self.cache], inputs)
        return folder

    def _datamap_of_seed(self, seed: int) -> None:
        study, folder = self.study, datamap_folder(self.study, seed)
        recording = self._recording(study.upstream, *recording_of_seed(study, seed))
        inputs = functools.partial(self._of_datamap, recording)
        waits = [self.cache, recording, self.teacher]
        self._add(folder, datamap_settings(study, seed), waits, inputs)
        if folder in self.open and self.datamap not in self.why:  # notebook 03 makes both
            self.why[self.datamap] = f"{_named(folder)}: {self.why[folder]}"

    def _teacher(self, study: Study, name: str | None) -> None:
        settings = study.teacher if name is None else study.teachers[name]
        folder = teacher_folder(study, name)

        def inputs() -> dict[str, Any]:
            trained = isinstance(settings, TrainedTeacher)
            now = self._trained_on(study) if trained else self._images()
            return now | _weights_file(settings)

        def outputs(evidence: Evidence) -> str:
            for which, fingerprint in evidence["teacher"]["outputs"].items():
                part = study.data.part_of("test" if which == "test" else "train")
                if Cache(folder / f"outputs-{which}", part=part).fingerprint != fingerprint:
                    return f"{folder / f'outputs-{which}'} holds other outputs than its evidence"
            return ""

        asked = study.step_settings("teacher", teacher=name)
        self._add(folder, asked, [self.cache], inputs, outputs)
        if name is None:
            self._look(folder, "teacher")

    @functools.cached_property
    def _caches(self) -> dict[str, Cache]:
        up = self.study.upstream
        return {s: Cache(up.cache / s, part=up.data.part_of(s)) for s in up.data.splits}

    def _cached(self) -> dict[str, str]:
        return {split: cache.fingerprint for split, cache in self._caches.items()}

    def _images(self) -> dict[str, str]:
        """The fingerprints of the images, as `Images` has them."""
        return self._cached() | {"split": self._split}

    def _trained_on(self, study: Study | None = None) -> dict[str, str]:
        """The inputs of a training: the images, and the precision that was decided."""
        return self._images() | precision_input(study or self.study)

    @functools.cached_property
    def _split(self) -> str:
        data, ids = self.study.upstream.data, self._caches["train"].example_ids
        return files.sha256_array(*split_ids(ids, data.n_validation, data.split_seed))

    def _of_datamap(self, recorded_run: Path) -> dict[str, Any]:
        recorded = self._evidence[recorded_run]["settings_sha256"]
        outputs = self._evidence[self.teacher]["teacher"]["outputs"]["train"]
        return self._images() | {"recorded": recorded, "teacher_outputs": outputs}

    def _student(self, cell: Cell, seed: int) -> None:
        study, waits = self.study, [self.cache]
        objective, teacher = study.objectives[cell.objective], None
        if needs_teacher(objective) and objective.teacher in study.shared_teachers:
            teacher = teacher_folder(study, objective.teacher)
            waits.append(teacher)
        picked = cell.strategy.startswith(PICKED)
        if mapped := study.reads_datamap(cell.strategy) and not picked:
            waits.append(datamap_folder(study, seed))

        def further(evidence: Evidence) -> str:
            if teacher is not None and evidence["teacher"] != self._evidence[teacher]["teacher"]:
                return "was made from another teacher's outputs"
            parent = evidence["subset"]["parent_datamap"]
            datamap = self._evidence.get(datamap_folder(study, seed))
            if mapped and parent != datamap["datamap_sha256"]:
                return "its subset was chosen by another datamap"
            if picked:
                saved = Subset.load(study.picked(cell.strategy)).sha256
                if saved != evidence["subset"]["sha256"]:
                    return f"{study.picked(cell.strategy)} holds another selection"
            return ""

        folder = student_folder(study, cell, seed)

        def inputs() -> dict[str, Any]:
            return self._trained_on() | _weights_file(study.students[cell.student])

        self._add(folder, student_settings(study, cell, seed), waits, inputs, further)
        self._look(folder, "distill")

    def _probes(self, cell: Cell) -> None:
        study = self.study
        folders = {str(seed): student_folder(study, cell, seed) for seed in study.seeds}

        def inputs() -> dict[str, Any]:
            of = {seed: self._evidence[folder] for seed, folder in folders.items()}
            return self._images() | {
                "students": {seed: e["checkpoints"]["last"] for seed, e in of.items()},
                "series": {seed: e["series"] for seed, e in of.items()},
                "teacher": self._evidence[self.teacher]["teacher"]["outputs"],
            }

        folder = probe_folder(study, cell)
        asked = study.step_settings("probe", cell)
        self._add(folder, asked, [self.cache, self.teacher, *folders.values()], inputs)
        self._look(folder, "probe")

    def _tables(self, step: str) -> None:
        study, folder = self.study, self.study.runs / step

        def further(evidence: Evidence) -> str:
            now, then = read_by(study, step), evidence.get("read", {})
            for name in {**now, **then}:
                if now.get(name, "") != then.get(name, ""):
                    return f"was made before {name} was made as it is now"
            for name in NAMES if step == "compare" else ():
                path = committed_folder(study) / f"{name}.parquet"
                if not path.is_file() or files.sha256_file(path) != evidence["committed"][name]:
                    return f"{path} is gone or is not as it was written"
            return ""

        self._add(folder, study.step_settings(step), sources(study, step), dict, further)
        self._look(folder, step)
        name = f"{_EXECUTED[step]}.ipynb"
        comes_anew = step == "compare" and folder not in self.why and (folder / name).is_file()
        if comes_anew and _code(folder / name) != _code(NOTEBOOKS / name):
            self.why[folder] = f"notebooks/{name} was changed since it was executed"


def _weights_file(settings: Teacher | Student) -> dict[str, str]:
    """The sha256 of the file of a network's weights, where it has one that is there."""
    weights = getattr(settings, "weights", None)
    if weights is None or not data_path(weights).is_file():
        return {}
    path = data_path(weights)
    return {"weights_file": _sha256(path, path.stat().st_mtime_ns)}


@functools.lru_cache
def _sha256(path: Path, mtime_ns: int) -> str:
    """Of a file that many runs read, once for each time of it."""
    return files.sha256_file(path)


@functools.lru_cache
def end_of_notebook(path: Path, mtime_ns: int) -> str:
    """How an executed notebook ended: `FAILED`, `CUT`, or empty where all cells were executed.

    Args:
        mtime_ns: Its time: a notebook of many runs is read once.
    """
    content = path.read_bytes()
    if b'"output_type": "error"' in content:
        return FAILED
    begun = b'"status": "pending"' in content or b'"status": "running"' in content
    return CUT if begun or not content else ""


def _code(path: Path) -> list[str]:
    """The code of a notebook without the parameters that papermill adds."""
    with contextlib.suppress(*_FAULTS):
        return [
            "".join(cell["source"])
            for cell in files.read_json(path)["cells"]
            if cell["cell_type"] == "code"
            and "injected-parameters" not in cell.get("metadata", {}).get("tags", ())
        ]
    return []
