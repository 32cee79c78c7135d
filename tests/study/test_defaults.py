"""The settings of a study that differ from the schema's defaults."""

import pytest
from tiny import ROOT, tiny_study

from kdlib.study.defaults import changed
from kdlib.study.load import load_study

DATA = [
    ("data.source", "digits", ""),
    ("data.n_validation", "197", ""),
    ("data.shard_size", "300", "2048"),
]
OBJECTIVES = [
    ("objectives.kd.kind", "kd", ""),
    ("objectives.kd.alpha", "0.5", ""),
    ("objectives.kd.temperature", "2.0", ""),
    ("objectives.plain.kind", "cross_entropy", ""),
]


def test_what_is_changed_or_has_no_default_is_listed_and_nothing_else(home):
    study = tiny_study(home)
    assert changed(study, "data") == DATA
    assert changed(study, "objectives") == OBJECTIVES
    assert changed(study, "objectives.plain", "data") == [*DATA, OBJECTIVES[-1]]
    assert changed(study, "compute") == changed(study, "tracking") == []
    assert changed(study, "compare") == [("compare.margin", "0.02", "0.01")]
    assert ("probe.c_grid", "[0.1, 10.0]", "45 values") in changed(study, "probe")


def test_a_section_within_a_section_and_a_section_that_is_off_by_default(home):
    study = tiny_study(home)
    assert changed(study, "data.relabel") == []
    assert ("recordings.seeds", "[0, 1]", "") in changed(study, "recordings")
    noisy = tiny_study(home, data__relabel={"noise": 0.3})
    assert changed(noisy, "data.relabel") == [("data.relabel.noise", "0.3", "-")]


def test_an_unknown_section_is_refused_with_the_nearest_one(home):
    with pytest.raises(KeyError, match="no section 'date'; did you mean 'data'"):
        changed(tiny_study(home), "date")


@pytest.mark.parametrize("path", sorted(ROOT.glob("params/**/*.yaml")), ids=lambda path: path.stem)
def test_every_study_here_has_rows_of_text(path):
    rows = changed(load_study(path))
    names = [name for name, *_ in rows]
    assert len(set(names)) == len(names) > 10
    assert {"data.source", "teacher.model.name", "axes.strategy", "seeds"} <= set(names)
    assert all(value != default for _, value, default in rows)
