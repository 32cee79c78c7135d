"""What reading a teacher costs is said before it is begun, and is what is stored then."""

import shutil
from collections import namedtuple

import pytest
from tiny import tiny_study

from kdlib.__main__ import main
from kdlib.cache.shards import CacheError
from kdlib.steps import output_costs as module
from kdlib.steps import teacher as teacher_module
from kdlib.steps.cache import cache_images
from kdlib.steps.output_costs import output_costs
from kdlib.steps.teacher import make_teacher

KEPT = {"training": {"steps": 20, "batch_size": 64, "lr_peak": 0.1}, "expected_accuracy": 0.1}
HINT = {"hint": {"kind": "hint", "weight": 1.0}, "plain": {"kind": "cross_entropy"}}


@pytest.fixture
def home(made, tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    shutil.copytree(made / "cache", tmp_path / "cache")
    return tmp_path


def study_of(home, outputs, **changes):
    return tiny_study(
        home, teacher={"model": {"name": "tiny_cnn"}, "outputs": outputs} | KEPT,
        dynamics={"el2n_epoch": 1, "window": 2}, recordings=None, objectives=HINT,
        axes__objective=list(HINT), probe__objective=["plain"],
        teacher__training__steps=40, **changes,
    )  # fmt: skip


@pytest.mark.parametrize(("outputs", "way"), [({}, "clean"), ({"views": 2}, "2 views"),
                                              ("live", "live")])  # fmt: skip
def test_the_bytes_that_are_announced_are_those_that_are_stored(home, outputs, way):
    study = study_of(home, outputs)
    images = cache_images(study)
    costs = output_costs(study, images).set_index("outputs")
    assert costs.index.tolist()[::2] == ["clean", "live"]
    assert costs.index[costs["asked"]].tolist() == [way]
    make_teacher(study, images)
    rows = study.runs.glob("teacher/outputs-*/*.npy")
    stored = sum(path.stat().st_size - 128 for path in rows)  # without NumPy's headers
    assert stored == costs.loc[way, "stored_bytes"]
    live, clean, views = (costs.loc[w] for w in ("live", "clean", costs.index[1]))
    assert live["stored_bytes"] < clean["stored_bytes"] < views["stored_bytes"]
    # one student of each seed on all examples, two on a third; 60 steps each
    assert live["students_s"] == pytest.approx(6 * 60 * live["step_s"])
    assert live["step_s"] > 0 == clean["step_s"] == views["students_s"]
    assert 0 < live["pass_s"] == clean["pass_s"] < views["pass_s"]


def test_costs_are_printed_and_nothing_is_stored(home, capsys, monkeypatch):
    study = study_of(home, {})
    cache_images(study)
    path = str(home / "params" / "tiny.yaml")
    monkeypatch.setattr("sys.argv", ["kdlib", "cache", "outputs", path, "--costs"])
    main()
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()] == ["outputs", "clean", "4", "live"]
    assert not (study.runs / "teacher").exists()


def test_a_disk_without_room_is_found_before_the_teacher_is_trained(home, monkeypatch):
    study = study_of(home, {"views": 2})
    monkeypatch.setattr(teacher_module, "train_run", None)
    usage = namedtuple("Usage", "free")(10**5)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=r"need 0\.00 GB.*or store less: teacher\.outputs: live"):
        make_teacher(study, cache_images(study))
