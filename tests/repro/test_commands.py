"""Every message about a file that is missing, unfinished, changed or of another format names the
command that makes it again: the test does what the message says, and the file can be read."""

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import first_run, flip, tiny_study

from kdlib.__main__ import _add_commands, main
from kdlib.cache.shards import Cache
from kdlib.cartography.datamap import write_datamap
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.subset import Subset
from kdlib.compare.committed import read_committed
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run, run_to_make
from kdlib.repro.run import read_metrics
from kdlib.steps.cache import open_duplicates, open_images
from kdlib.steps.datamap import open_datamap
from kdlib.steps.distill import open_student, student_network
from kdlib.steps.probe import open_probes, probe_folder
from kdlib.steps.recordings import open_log
from kdlib.steps.teacher_outputs import open_stored, open_teacher
from kdlib.study.load import load_study
from kdlib.study.study import Study

COMMAND = re.compile(r"`python -m kdlib ([^`]+)`")
DELETED = re.compile(r"delete (\S+), then run `")


def _evidence(folder: str, **change: Any) -> Callable[[Study], None]:
    """Change the evidence of a step without a new seal."""

    def apply(study: Study) -> None:
        path = study.runs / folder / "evidence.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return apply


def _gone(*below: str) -> Callable[[Study], None]:
    return lambda study: study.runs.joinpath(*below).unlink()


def _cut(*below: str) -> Callable[[Study], None]:
    def apply(study: Study) -> None:
        path = study.runs.joinpath(*below)
        path.write_bytes(path.read_bytes()[:40])

    return apply


def _of_student(name: str, change: Callable[[Path], Any]) -> Callable[[Study], None]:
    return lambda study: change(first_run(study) / name)


def _last_weights(study: Study) -> None:
    evidence = json.loads((first_run(study) / "evidence.json").read_text())
    flip(first_run(study) / evidence["checkpoints"]["last"]["file"])


def _other_datamap(study: Study) -> None:
    path = study.runs / "datamap" / "datamap.parquet"
    table = open_datamap(study, open_images(study))
    provenance = json.loads((study.runs / "datamap" / "settings.json").read_text())["inputs"]
    write_datamap(table.iloc[::-1], path, open_images(study).fingerprints | provenance)


def _other_k(study: Study) -> None:
    tiny_study(files.workspace(), probe__k=4)


def _other_format(study: Study) -> None:
    path = study.cache / "test" / "index.json"
    index = json.loads(path.read_text())
    index["header"]["format"] = 7
    path.write_text(json.dumps(index))


def _first(study: Study) -> tuple[Study, Any, int]:
    return study, study.cells()[0], study.seeds[0]


# What is broken, what reads it, and the command that the message has to name.
KINDS = {
    "images unfinished": (
        lambda s: (s.cache / "train" / "index.json").unlink(), open_images, "cache build",
    ),
    "images of another format": (_other_format, open_images, "cache build"),
    "a shard of images gone": (
        lambda s: (s.cache / "train" / "images-00001.npy").unlink(), open_images, "cache build",
    ),
    "images without a run": (_gone("cache", "evidence.json"), open_images, "step cache"),
    "duplicates gone": (_gone("cache", "duplicates.parquet"), open_duplicates, "step cache"),
    "teacher not there": (
        lambda s: shutil.rmtree(s.runs / "teacher"), open_teacher, "step teacher",
    ),
    "teacher's evidence cut": (_cut("teacher", "evidence.json"), open_teacher, "step teacher"),
    "teacher of another format": (_evidence("teacher", format=3), open_teacher, "step teacher"),
    "teacher's evidence changed": (_evidence("teacher", step="x"), open_teacher, "step teacher"),
    "teacher outputs unfinished": (
        _gone("teacher", "outputs-train", "index.json"),
        lambda s: open_stored(s, open_images(s).train),
        "step teacher",
    ),
    "teacher outputs cut": (
        _cut("teacher", "outputs-test", "index.json"),
        lambda s: open_stored(s, open_images(s).test),
        "step teacher",
    ),
    "dynamics gone": (
        _gone("teacher", "dynamics", "index.json"),
        lambda s: DynamicsLog.open(s.runs / "teacher" / "dynamics"),
        "step teacher",
    ),
    "a recording not made": (
        lambda s: None, lambda s: open_log(s, open_images(s), "tiny", "seed=0"), "record",
    ),
    "datamap cut": (
        _cut("datamap", "datamap.parquet"), lambda s: open_datamap(s, open_images(s)),
        "step datamap",
    ),
    "another datamap": (
        _other_datamap, lambda s: open_datamap(s, open_images(s)), "step datamap",
    ),
    "student not there": (
        _of_student("evidence.json", Path.unlink), lambda s: open_student(*_first(s)),
        "step distill",
    ),
    "student's metrics changed": (
        _of_student("metrics.parquet", flip), lambda s: read_metrics(first_run(s)),
        "step distill",
    ),
    "student's subset gone": (
        _of_student("subset.parquet", flip),
        lambda s: Subset.load(first_run(s) / "subset.parquet"),
        "step distill",
    ),
    "student's weights changed": (
        _last_weights,
        lambda s: student_network(s, open_images(s), s.cells()[0], s.seeds[0]),
        "step distill",
    ),
    "probes gone": (
        lambda s: (probe_folder(s, s.probed_cells()[0]) / "probes.parquet").unlink(),
        lambda s: open_probes(s, s.probed_cells()[0]),
        "step probe",
    ),
    "probes of before the study was changed": (
        _other_k, lambda s: open_probes(s, s.probed_cells()[0]), "step probe",
    ),
    "tables to commit not there": (lambda s: None, read_committed, "step compare"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_message_says_makes_the_file_again(lab, monkeypatch, kind):
    damage, read, expected = KINDS[kind]
    monkeypatch.chdir(lab)  # where `params/tiny.yaml` is
    damage(load_study("params/tiny.yaml"))
    with pytest.raises((FileNotFoundError, ValueError)) as refused:
        read(load_study("params/tiny.yaml"))
    message = str(refused.value)
    commands = COMMAND.findall(message)
    assert commands, message
    assert commands[-1].startswith(f"{expected} params/tiny.yaml")
    for path in DELETED.findall(message):
        shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()
    for command in commands:
        monkeypatch.setattr("sys.argv", ["kdlib", *shlex.split(command)])
        assert main() == (1 if "--repair" in command else 0)  # 1: there was something to repair
    assert read(load_study("params/tiny.yaml")) is not None


PLACES = {
    "tiny/cache/duplicates.parquet": ("tiny/cache", "step cache params/tiny.yaml"),
    "tiny/dynamics/dynamics/loss.npy": ("tiny/dynamics", "step teacher params/tiny.yaml"),
    "tiny/teachers/wide/metrics.parquet": (
        "tiny/teachers/wide", "step teacher params/tiny.yaml --teacher wide",
    ),
    "tiny/teachers/wide/outputs-train/index.json": (
        "tiny/teachers/wide/outputs-train", "step teacher params/tiny.yaml --teacher wide",
    ),
    "tiny/recorded/model=tiny/fold=2/held_out.parquet": (
        "tiny/recorded/model=tiny/fold=2", "record params/tiny.yaml --model tiny --part fold=2",
    ),
    "tiny/scores": ("tiny/scores", "study params/tiny.yaml scores"),
    "tiny/noise/evidence.json": ("tiny/noise", "study params/tiny.yaml noise"),
    "tiny/audit/exhibits.parquet": ("tiny/audit", "study params/tiny.yaml audit"),
    "tiny/compare/results.parquet": ("tiny/compare", "step compare params/tiny.yaml"),
    "tiny/measured.json": ("tiny/measured.json", "step compare params/tiny.yaml"),
    "tiny/distill": ("tiny/distill", "study params/tiny.yaml"),
    "tiny": ("tiny", "study params/tiny.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_command_of_a_place_is_one_that_there_is(home, place):
    folder, command = PLACES[place]
    tiny_study(home)
    said = f"run `python -m kdlib {command}`"
    assert run_to_make(home / "runs" / place) == said
    assert delete_and_run(home / "runs" / place) == f"delete {home / 'runs' / folder}, then {said}"
    parser = argparse.ArgumentParser()
    _add_commands(parser.add_subparsers(required=True))
    assert load_study(parser.parse_args(shlex.split(command)).study).name == "tiny"


def test_a_teacher_of_a_subset_is_made_by_a_student_of_that_subset(home):
    runs = home / "runs" / "tiny"
    place = "student=tiny/strategy=easy/fraction=0.33/objective=own/seed=1"
    for objective, teacher in (("kd", None), ("own", "small")):
        folder = runs / "distill" / place.replace("=own", f"={objective}")
        settings = {"step": {"objective": {"teacher": teacher}}, "inputs": {"subset": "a" * 64}}
        files.write_json(folder / "settings.json", settings)
    teacher = runs / "teachers" / "small" / f"subset={'a' * 16}" / "seed=1"
    student = "--student tiny --strategy easy --fraction 0.33 --objective own --seed 1"
    assert delete_and_run(teacher / "outputs-train" / "index.json") == (
        f"delete {teacher / 'outputs-train'}, then run "
        f"`python -m kdlib step distill params/tiny.yaml {student}`"
    )
    elsewhere = teacher.with_name("seed=0")
    assert run_to_make(elsewhere) == "run `python -m kdlib study params/tiny.yaml`"


def test_other_places_and_selections_made_by_hand_name_what_there_is(home):
    assert "`python -m kdlib study STUDY`" in run_to_make(home / "elsewhere" / "x.parquet")
    picked = home / "runs" / "tiny" / "selections" / "mine.parquet"
    assert run_to_make(picked).startswith("save a selection named mine in the map: notebooks/03")
    table = home / "figures" / "tiny" / "tables" / "probes.parquet"
    assert delete_and_run(table) == (
        f"delete {table}, then run `python -m kdlib step compare params/tiny.yaml`"
    )


def test_images_that_no_study_file_here_asks_for_name_the_general_command(home):
    with pytest.raises(ValueError, match=r"run `python -m kdlib cache build STUDY` with a study"):
        Cache(home / "cache" / "digits-00000000" / "train")
