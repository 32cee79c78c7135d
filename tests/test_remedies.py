"""The remedy that a message names is what a user does: it is read from the message, done, and the
fault is gone."""

import glob
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import flip, forge, tiny_study

from kdlib.__main__ import main
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.subset import Subset
from kdlib.compare.committed import read_committed
from kdlib.repro.run import read_metrics
from kdlib.steps.cache import open_duplicates, open_images
from kdlib.steps.datamap import make_datamap, open_datamap
from kdlib.steps.distill import open_student, student_network
from kdlib.steps.folders import probe_folder, student_folder
from kdlib.steps.probe import open_probes
from kdlib.steps.recordings import open_log
from kdlib.steps.results import results
from kdlib.steps.teacher import make_teacher
from kdlib.steps.teacher_outputs import open_stored, open_teacher
from kdlib.study.base import StudyError
from kdlib.study.load import load_study
from kdlib.study.study import Study


def _first(study: Study) -> Path:
    return student_folder(study, study.cells()[0], 0)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _follow(message: str, expected: str, patch: pytest.MonkeyPatch) -> None:
    """Do what a message says: delete the file or folder it names, run the commands it names."""
    commands = re.findall(r"`python -m kdlib ([^`]+)`", message)
    assert commands, f"no remedy: {message}"
    assert commands[-1].startswith(f"{expected} params/tiny.yaml")
    for name in re.findall(r"delete (\S+), then run `", message):
        path = Path(name)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for command in commands:
        patch.setattr("sys.argv", ["kdlib", *shlex.split(command)])
        assert main() == (1 if "--repair" in command else 0)  # 1: there was something to repair


def _accepted(study: Study) -> None:
    """Raise what the table says of the first run it refuses."""
    table = results(study)
    for run, reason in table.loc[table["refused"], ["run", "reason"]].itertuples(index=False):
        raise ValueError(f"{study.runs / run}: {reason}")


def _format(path: Path) -> None:
    index = json.loads(path.read_text())
    index["header"]["format"] = 7
    path.write_text(json.dumps(index))


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace("64", "65", 1))


def _change(**changes: object) -> Callable[[Path], object]:
    return lambda params: tiny_study(params.parent, **changes)


def _forge(change: Callable[[dict], object]) -> Callable[[Path], None]:
    return lambda folder: forge(folder, change)


def _flip_last(folder: Path) -> None:
    """Its weights are read where stored outputs are made again."""
    shutil.rmtree(folder / "outputs-test")
    flip(sorted(folder.glob("weights-*"))[-1])


def _nothing(params: Path) -> None:
    """The file was never there."""


rmtree, unlink = shutil.rmtree, Path.unlink
STUDENT, PROBES, DATAMAP, STORED = (
    lambda s: open_student(s, s.cells()[0], 0),
    lambda s: open_probes(s, s.probed_cells()[0]),
    lambda s: open_datamap(s, open_images(s)),
    lambda s: [open_stored(s, cache) for cache in (open_images(s).train, open_images(s).test)],
)
LOG = "teacher/dynamics"
# What is broken: how, which file below runs/tiny, what reads it, and the command that its message
# has to name
FAULTS = {
    "a student that was not trained": (rmtree, "{first}", STUDENT, "step distill"),
    "evidence that was edited": (_edit, "{first}/evidence.json", STUDENT, "step distill"),
    "evidence of another format": (
        _forge(lambda e: e.update(format=1)), "{first}", STUDENT, "step distill",
    ),
    "evidence beside other settings": (_edit, "{first}/settings.json", STUDENT, "step distill"),
    "a study that was changed": (
        _change(dynamics__el2n_epoch=3), "../../params", DATAMAP, "step datamap",
    ),
    "metrics that are cut": (
        _cut, "{first}/metrics.parquet", lambda s: read_metrics(_first(s)), "step distill",
    ),
    "a subset that is cut": (
        _cut, "{first}/subset.parquet", lambda s: Subset.load(_first(s) / "subset.parquet"),
        "step distill",
    ),
    "weights that were changed": (
        flip, "{first}/weights-00000060*",
        lambda s: student_network(s, open_images(s), s.cells()[0], 0), "step distill",
    ),
    "a datamap that is not there": (unlink, "datamap/datamap.parquet", DATAMAP, "step datamap"),
    "a datamap that is cut": (_cut, "datamap/datamap.parquet", DATAMAP, "step datamap"),
    "a datamap of another run": (
        _forge(lambda e: e.update(datamap_sha256="0" * 64)), "datamap", DATAMAP, "step datamap",
    ),
    "probes that are cut": (_cut, "{probed}/probes.parquet", PROBES, "step probe"),
    "probes of another run": (
        _forge(lambda e: e.update(table_sha256="0" * 64)), "{probed}", PROBES, "step probe",
    ),
    "a dynamics log that is cut": (
        _cut, f"{LOG}/gold_prob.npy", lambda s: make_datamap(s, open_images(s)), "step teacher",
    ),
    "teacher outputs that are not there": (rmtree, "teacher/outputs-train", STORED, "step teacher"),
    "a teacher's weights that were changed": (
        _flip_last, "teacher", lambda s: make_teacher(s, open_images(s)), "step teacher",
    ),
    "a teacher that is another one now": (
        _forge(lambda e: e["teacher"].update(measured=0.9)), "{first}", _accepted, "step distill",
    ),
    "images that are not there": (rmtree, "{cache}", open_images, "cache build"),
    "images of another format": (_format, "{cache}/test/index.json", open_images, "cache build"),
    "a shard that is not there": (
        unlink, "{cache}/train/images-00001.npy", open_images, "cache build",
    ),
    "images without a run": (unlink, "cache/evidence.json", open_images, "step cache"),
    "duplicates that are not there": (
        unlink, "cache/duplicates.parquet", open_duplicates, "step cache",
    ),
    "a teacher that is not there": (rmtree, "teacher", open_teacher, "step teacher"),
    "evidence that is cut": (_cut, "teacher/evidence.json", open_teacher, "step teacher"),
    "teacher outputs whose index is cut": (
        _cut, "teacher/outputs-test/index.json", STORED, "step teacher",
    ),
    "a dynamics log that is not there": (
        unlink, f"{LOG}/index.json", lambda s: DynamicsLog.open(s.runs / LOG), "step teacher",
    ),
    "a recording that was not made": (
        _nothing, "../../params", lambda s: open_log(s, open_images(s), "tiny", "seed=0"), "record",
    ),
    "probes of before the study was changed": (
        _change(probe__k=4), "../../params", PROBES, "step probe",
    ),
    "tables to commit that are not there": (
        _nothing, "../../params", read_committed, "step compare",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_message_tells_to_do_mends_what_it_names(lab, fault, monkeypatch):
    monkeypatch.chdir(lab)  # where `params/tiny.yaml` is
    study = tiny_study(lab)
    break_it, place, provoke, command = FAULTS[fault]
    probed = probe_folder(study, study.probed_cells()[0])
    place = place.format(first=_first(study), probed=probed, cache=study.cache)
    (path,) = glob.glob(str(study.runs / place))
    break_it(Path(os.path.normpath(path)))
    study = load_study(lab / "params" / "tiny.yaml")
    with pytest.raises((ValueError, OSError, RuntimeError)) as refused:
        provoke(study)
    _follow(str(refused.value), command, monkeypatch)
    provoke(study)


HUB = {"name": "hub/owner/networks:v1/net"}
LEARNING = {"epochs": 2, "batch_size": 64, "lr_peak": 0.1}
TWO_VIEWS = {"kind": "tokens", "cls_weight": 1.0, "patch_weight": 0.5, "barlow_weight": 0.1}
# What a study file has, what the message asks for (a pattern), and the same file with it done
KEYS = [
    (
        {"training": {"batch_size": 64, "lr_peak": 0.1}},
        "give the budget once: either `steps` or `epochs`",
        {"training": LEARNING},
    ),
    (
        {"training": LEARNING | {"schedule": "one_cycle"}},
        "give `warmup_steps`",
        {"training": LEARNING | {"schedule": "one_cycle", "warmup_steps": 5}},
    ),
    (
        {"training": LEARNING | {"schedule": "step"}},
        "`milestones` belong to `schedule: step`, and it needs some",
        {"training": LEARNING | {"schedule": "step", "milestones": [0.5]}},
    ),
    (
        {"training": LEARNING | {"accumulate": 3}},
        "is not a multiple of accumulate 3",
        {"training": LEARNING | {"accumulate": 3, "batch_size": 66}},
    ),
    (
        {"compute": {"processes": 3}},
        "batch_size 64 cannot be split among 3 processes, .*; expected a multiple of 3",
        {"compute": {"processes": 3}, "training": LEARNING | {"batch_size": 66},
         "teacher__training": LEARNING | {"batch_size": 66}},
    ),
    (
        {"teacher__model": HUB},
        "write `trust_code: true` and `pretrained: true`; it cannot be trained",
        {"teacher": {"model": HUB, "trust_code": True, "pretrained": True, "expected_accuracy": 0.5,
                     "trained_on": "elsewhere"},
         "dynamics__model": {"name": "tiny_cnn"}, "dynamics__training": LEARNING},
    ),
    (
        {"teacher": {"model": {"name": "tiny_cnn"}, "weights": "w.pt", "expected_accuracy": 0.5,
                     "trained_on": "kept"}},
        "give `dynamics` a model and a training",
        {"teacher": {"model": {"name": "tiny_cnn"}, "weights": "w.pt", "expected_accuracy": 0.5,
                     "trained_on": "kept"},
         "dynamics__model": {"name": "tiny_cnn"}, "dynamics__training": LEARNING},
    ),
    (
        {"compare__measure": "linear"},
        "probe lacks .*; add them, or compare accuracy",
        {"compare__measure": "linear", "probe__strategy": ["full", "random", "easy"],
         "probe__objective": ["kd", "plain"]},
    ),
    (
        {"compare__measure": "linear"},
        "probe lacks .*; add them, or compare accuracy",
        {"compare__measure": "accuracy"},
    ),
    (
        {"objectives__plain": {"kind": "cross_entropy", "teacher": "other"}},
        "objective plain uses no teacher: remove `teacher: other`",
        {"objectives__plain": {"kind": "cross_entropy"}},
    ),
    (
        {"objectives__plain": TWO_VIEWS},
        "compares two views of each image: give training.augment",
        {"objectives__plain": TWO_VIEWS,
         "training": LEARNING | {"augment": {"flip": True}}, "teacher__outputs": {"views": 2}},
    ),
    (
        {"compute": {"portable": True, "precision": "bf16"}},
        "portable: true and precision: bf16 exclude each other",
        {"compute": {"portable": True}},
    ),
    (
        {"probe__fraction": 0.5},
        r"probe\.fraction is 0\.5; expected one of axes\.fraction",
        {"probe__fraction": 0.5, "axes__fraction": [0.33, 0.5]},
    ),
    (
        {"compute": {"device": "gpu"}},
        "'gpu' is not allowed here; expected cpu, cuda or",
        {"compute": {"device": "cuda"}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message", "asked"), KEYS, ids=[key[1][:30] for key in KEYS])
def test_the_key_that_a_message_asks_for_makes_the_study_valid(home, changes, message, asked):
    with pytest.raises(StudyError, match=message):
        tiny_study(home, **changes)
    tiny_study(home, **asked)
