"""The command that makes a file, by its place: each is one that there is. tests/test_remedies.py
runs them."""

import argparse
import shlex

import pytest
from tiny import ROOT, tiny_study

from kdlib.__main__ import _add_commands
from kdlib.cache.shards import Cache
from kdlib.repro import files
from kdlib.repro.commands import delete_and_run, run_to_make
from kdlib.study.load import load_study

# place below runs/ -> the folder to delete, the command, the notebook
PLACES = {
    "tiny/cache/duplicates.parquet": ("tiny/cache", "step cache params/tiny.yaml", "01_cache"),
    "tiny/dynamics/dynamics/loss.npy": (
        "tiny/dynamics", "step teacher params/tiny.yaml", "02_teacher",
    ),
    "tiny/teachers/wide/metrics.parquet": (
        "tiny/teachers/wide", "step teacher params/tiny.yaml --teacher wide", "02_teacher",
    ),
    "tiny/teachers/wide/outputs-train/index.json": (
        "tiny/teachers/wide/outputs-train", "step teacher params/tiny.yaml --teacher wide",
        "02_teacher",
    ),
    "tiny/distill/student=tiny/strategy=easy/fraction=0.33/objective=kd/seed=1/metrics.parquet": (
        "tiny/distill/student=tiny/strategy=easy/fraction=0.33/objective=kd/seed=1",
        "step distill params/tiny.yaml --student tiny --strategy easy --fraction 0.33 "
        "--objective kd --seed 1", "04_distill",
    ),
    "tiny/recorded/model=tiny/fold=2/held_out.parquet": (
        "tiny/recorded/model=tiny/fold=2", "record params/tiny.yaml --model tiny --part fold=2",
        "07_scores",
    ),
    "tiny/scores": ("tiny/scores", "study params/tiny.yaml scores", "07_scores"),
    "tiny/noise/evidence.json": ("tiny/noise", "study params/tiny.yaml noise", "08_noise"),
    "tiny/audit/exhibits.parquet": ("tiny/audit", "study params/tiny.yaml audit", "09_audit"),
    "tiny/compare/results.parquet": ("tiny/compare", "step compare params/tiny.yaml", "06_compare"),
    "tiny/measured.json": ("tiny/measured.json", "step compare params/tiny.yaml", "06_compare"),
    "tiny/distill": ("tiny/distill", "study params/tiny.yaml", None),
    "tiny": ("tiny", "study params/tiny.yaml", None),
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_the_command_and_the_notebook_of_a_place_are_there(home, place):
    folder, command, notebook = PLACES[place]
    tiny_study(home)
    said = f"run `python -m kdlib {command}`"
    if notebook is not None:
        assert (ROOT / "notebooks" / f"{notebook}.ipynb").is_file()
        said += f" or notebooks/{notebook}.ipynb with this study"
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
        f"`python -m kdlib step distill params/tiny.yaml {student}` or notebooks/04_distill.ipynb "
        "with this study"
    )
    elsewhere = teacher.with_name("seed=0")
    assert run_to_make(elsewhere) == "run `python -m kdlib study params/tiny.yaml`"


def test_other_places_and_selections_made_by_hand_name_what_there_is(home):
    assert "`python -m kdlib study STUDY`" in run_to_make(home / "elsewhere" / "x.parquet")
    picked = home / "runs" / "tiny" / "selections" / "mine.parquet"
    assert run_to_make(picked).startswith("save a selection named mine in the map: notebooks/03")
    table = home / "figures" / "tiny" / "tables" / "probes.parquet"
    assert delete_and_run(table) == (
        f"delete {table}, then run `python -m kdlib step compare params/tiny.yaml` or "
        "notebooks/06_compare.ipynb with this study"
    )


def test_images_that_no_study_file_here_asks_for_name_the_general_command(home):
    with pytest.raises(ValueError, match=r"run `python -m kdlib cache build STUDY` with a study"):
        Cache(home / "cache" / "digits-00000000" / "train")
