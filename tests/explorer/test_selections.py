"""Saved selections are subsets of the study, whose students are trained and compared."""

from pathlib import Path

import pytest
import yaml

from kdlib.cartography.subset import Subset
from kdlib.explorer.selections import saved_selections, students, training_commands
from kdlib.explorer.state import Explorer
from kdlib.explorer.still import still_map
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.distill import make_subset
from kdlib.steps.step_command import read_points
from kdlib.study.load import load_study


def test_a_saved_selection_is_a_subset_and_comes_back(state, study):
    ids = state.table.index[100:211]
    state.select(ids)
    path = state.save("my-pick_1")
    data = files.fingerprint(state.images.fingerprints)
    subset = Subset.load(path, data)
    assert subset.example_ids.tolist() == ids.tolist()
    assert (subset.strategy, subset.seed) == ("picked_my-pick_1", 0)
    assert subset.fraction == 111 / 1100
    assert subset.parent == read_evidence(study.runs / "datamap")["datamap_sha256"]
    assert saved_selections(state.study) == ["my-pick_1"]

    state.select([])
    state.filter([1])
    assert state.restore("my-pick_1") == "my-pick_1: 111 selected."
    assert state.selected.tolist() == ids.tolist()
    assert state.save("my-pick_1") == path  # the same once more
    made = make_subset(study, state.images, study.cell(strategy="picked_my-pick_1"), 1)
    assert made.sha256 == subset.sha256


@pytest.mark.parametrize("name", ["", "_x", "a b", "../a", "a/b", "ä", "a.b", "-a", "a\n"])
def test_what_is_no_name_is_refused(state, name):
    state.select(state.table.index[:3])
    with pytest.raises(ValueError, match="names no selection"):
        state.save(name)
    assert saved_selections(state.study) == []


def test_another_selection_of_the_same_name_is_left_alone(state):
    state.select(state.table.index[:10])
    path = state.save("mine")
    before = path.read_bytes()
    state.select(state.table.index[:11])
    with pytest.raises(ValueError, match="already names another selection, of 10 examples"):
        state.save("mine")
    assert path.read_bytes() == before


def test_nothing_is_not_saved(state):
    with pytest.raises(ValueError, match="Nothing is selected"):
        state.save("nothing")
    assert saved_selections(state.study) == []


def test_the_map_of_a_study_that_shares_another_one_s_is_walked_in(study, workspace):
    path = workspace / "params" / "sharing.yaml"
    path.write_text(yaml.safe_dump({"base": "tiny.yaml", "shares": "tiny.yaml"}))
    sharing = load_study(path)
    assert still_map(sharing).is_file()
    walk = Explorer(sharing)
    walk.select(walk.images.train_ids[:5])
    saved = Subset.load(walk.save("mine"))
    assert saved.parent == read_evidence(study.runs / "datamap")["datamap_sha256"]


def test_the_command_trains_the_selection_and_as_many_random_examples(state, study):
    state.select(state.table.index[:110])
    state.save("mine")
    [command] = training_commands(state.study, "mine")
    assert command[1:5] == ["-m", "kdlib", "step", "distill"]
    assert load_study(command[5]) == study
    points = list(read_points(Path(command[-1]).read_text().splitlines(), study))
    assert points == students(study, "mine")
    described = [(cell.objective, cell.strategy, cell.fraction, seed) for cell, seed in points]
    assert described == [
        (objective, strategy, 0.1, seed)
        for seed in (0, 1)
        for objective in ("kd", "plain")
        for strategy in ("picked_mine", "random")
    ]
