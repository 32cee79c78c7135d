"""The remedy that a message names is what a user does: it is read from the message, done, and the
fault is gone."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny import flip, forge, tiny_study

from kdlib.cartography.subset import Subset
from kdlib.repro.run import read_metrics
from kdlib.steps.cache import cache_images, open_images
from kdlib.steps.compare import compile_tables, finish_tables, results
from kdlib.steps.datamap import make_datamap, open_datamap
from kdlib.steps.distill import open_student, student_network, train_student
from kdlib.steps.folders import probe_folder, student_folder
from kdlib.steps.probe import open_probes, probe_cell
from kdlib.steps.teacher import make_teacher
from kdlib.steps.teacher_outputs import open_stored
from kdlib.study.load import load_study
from kdlib.study.study import Study


def _first(study: Study) -> Path:
    return student_folder(study, study.cells()[0], 0)


def _probed(study: Study) -> Path:
    return probe_folder(study, study.probed_cells()[0])


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _students(study: Study) -> None:
    for cell in study.cells():
        for seed in study.seeds:
            train_student(study, open_images(study), cell, seed)


# What a notebook does
NOTEBOOKS: dict[str, Callable[[Study], object]] = {
    "01_cache": cache_images,
    "02_teacher": lambda study: make_teacher(study, open_images(study)),
    "03_datamap": lambda study: make_datamap(study, open_images(study)),
    "04_distill": _students,
    "05_probe": lambda study: [
        probe_cell(study, open_images(study), cell) for cell in study.probed_cells()
    ],
    "06_compare": lambda study: finish_tables(study, "compare", compile_tables(study)),
}


def _follow(message: str, study: Study) -> None:
    """Do what a message says: delete the file or folder it names, run the notebook it names."""
    if found := re.search(r"delete (its? ?|/[^,;: ]+)", message):
        first = re.search(r"/[^,;: ]+", message)[0]
        path = Path(first if found[1].startswith("it") else found[1])
        assert study.runs in path.parents
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if "the evidence.json beside it" in message:
            path.with_name("evidence.json").unlink()
    notebook = re.search(r"run (?:python -m kdlib .*)?notebooks/(\w+)\.ipynb", message)
    assert found or notebook, f"no remedy: {message}"
    if notebook:
        NOTEBOOKS[notebook[1]](study)


def _accepted(study: Study) -> None:
    """Raise what the table says of the first run it refuses."""
    table = results(study)
    for run, reason in table.loc[table["refused"], ["run", "reason"]].itertuples(index=False):
        raise ValueError(f"{study.runs / run}: {reason}")


FAULTS: dict[str, tuple[Callable[[Study], object], Callable[[Study], object]]] = {
    "a student that was not trained": (
        lambda s: shutil.rmtree(_first(s)),
        lambda s: open_student(s, s.cells()[0], 0),
    ),
    "evidence that was edited": (
        lambda s: _edit(_first(s) / "evidence.json"),
        lambda s: open_student(s, s.cells()[0], 0),
    ),
    "evidence of another format": (
        lambda s: forge(_first(s), lambda e: e.update(format=1)),
        lambda s: open_student(s, s.cells()[0], 0),
    ),
    "evidence beside other settings": (
        lambda s: _edit(_first(s) / "settings.json"),
        lambda s: open_student(s, s.cells()[0], 0),
    ),
    "a study that was changed": (
        lambda s: _change(s, dynamics__el2n_epoch=3),
        lambda s: open_datamap(_now(s), open_images(_now(s))),
    ),
    "metrics that are cut": (
        lambda s: _cut(_first(s) / "metrics.parquet"),
        lambda s: read_metrics(_first(s)),
    ),
    "a subset that is cut": (
        lambda s: _cut(_first(s) / "subset.parquet"),
        lambda s: Subset.load(_first(s) / "subset.parquet"),
    ),
    "weights that were changed": (
        lambda s: flip(next(_first(s).glob("weights-00000060*"))),
        lambda s: student_network(s, open_images(s), s.cells()[0], 0),
    ),
    "a datamap that is not there": (
        lambda s: (s.runs / "datamap" / "datamap.parquet").unlink(),
        lambda s: open_datamap(s, open_images(s)),
    ),
    "a datamap that is cut": (
        lambda s: _cut(s.runs / "datamap" / "datamap.parquet"),
        lambda s: open_datamap(s, open_images(s)),
    ),
    "a datamap of another run": (
        lambda s: forge(s.runs / "datamap", lambda e: e.update(datamap_sha256="0" * 64)),
        lambda s: open_datamap(s, open_images(s)),
    ),
    "probes that are cut": (
        lambda s: _cut(_probed(s) / "probes.parquet"),
        lambda s: open_probes(s, s.probed_cells()[0]),
    ),
    "probes of another run": (
        lambda s: forge(_probed(s), lambda e: e.update(table_sha256="0" * 64)),
        lambda s: open_probes(s, s.probed_cells()[0]),
    ),
    "a dynamics log that is cut": (
        lambda s: _cut(s.runs / "teacher" / "dynamics" / "gold_prob.npy"),
        lambda s: make_datamap(s, open_images(s)),
    ),
    "teacher outputs that are not there": (
        lambda s: shutil.rmtree(s.runs / "teacher" / "outputs-train"),
        lambda s: open_stored(s, open_images(s).train),
    ),
    "a teacher's weights that were changed": (
        lambda s: [
            shutil.rmtree(s.runs / "teacher" / "outputs-test"),
            flip(sorted((s.runs / "teacher").glob("weights-*"))[-1]),
        ],
        lambda s: make_teacher(s, open_images(s)),
    ),
    "a teacher that is another one now": (
        lambda s: forge(_first(s), lambda e: e["teacher"].update(measured=0.9)),
        _accepted,
    ),
    "images that are not there": (
        lambda s: shutil.rmtree(s.cache),
        lambda s: open_images(s),
    ),
}


def _edit(path: Path) -> None:
    path.write_text(path.read_text().replace("64", "65", 1))


def _change(study: Study, **changes) -> None:
    tiny_study(study.runs.parents[1], **changes)


def _now(study: Study) -> Study:
    return load_study(study.runs.parents[1] / "params" / "tiny.yaml")


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_message_tells_to_do_mends_what_it_names(lab, fault):
    study = tiny_study(lab)
    break_it, provoke = FAULTS[fault]
    break_it(study)
    study = _now(study)
    with pytest.raises((ValueError, OSError, RuntimeError)) as refused:
        provoke(study)
    _follow(str(refused.value), study)
    provoke(study)
