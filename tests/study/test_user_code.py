"""`kdlib.study.user_code`: selections from a file of the user, and that no code runs unasked;
objectives are in `tests/trainer/test_objectives.py`."""

import os

import numpy as np
import pandas as pd
import pytest

from kdlib.cartography.selection import select
from kdlib.study.selections import Ranking, UserSelection
from kdlib.study.user_code import pin, run

CODE = """
def cost(table, power):
    return abs(table["confidence"] - 0.5) ** power
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(CODE)
    return tmp_path


def rule(**more):
    given = {"code": "mine.py", "trust_code": True, "options": {"power": 2.0}}
    return pin(UserSelection(**given | more), "selections.mine")


def table():
    confidence, label = [0.9, 0.4, 0.5, 0.0, 0.65, 1.0], [0, 0, 0, 1, 1, 1]
    ids = pd.Index([5, 3, 8, 1, 9, 2], name="example_id")
    return pd.DataFrame({"confidence": confidence, "label": label}, index=ids)


def test_an_own_selection_takes_the_least_of_its_cost(home):
    # costs by id: 5: 0.16, 3: 0.01, 8: 0, 1: 0.25, 9: 0.0225, 2: 0.25
    assert select(table(), 3, rule(), 0).tolist() == [3, 8, 9]
    balanced = select(table(), 4, rule(balanced=True), 0)
    assert balanced.tolist()[1:] == [3, 8, 9]
    assert balanced[0] in (1, 2)  # a tie, drawn
    draws = {int(select(table(), 4, rule(balanced=True), seed)[0]) for seed in range(20)}
    assert draws == {1, 2}
    shuffled = table().sample(frac=1, random_state=0)
    assert select(shuffled, 3, rule(), 0).tolist() == [3, 8, 9]


def test_an_own_selection_cannot_change_the_datamap(home):
    (home / "mine.py").write_text(
        "def cost(table):\n    table['confidence'] = 0.0\n    return table['label']"
    )
    given = table()
    select(given, 3, rule(options=None), 0)
    pd.testing.assert_frame_equal(given, table())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return table['confidence'][:2]", r"shape \(2,\).*finite number for each of 6"),
        ("return table['confidence'] / 0 * 0", "finite: False"),
    ],
)
def test_costs_that_are_none_are_refused(home, body, message):
    (home / "mine.py").write_text(f"def cost(table):\n    {body}")
    with pytest.raises(ValueError, match=message):
        select(table(), 3, rule(options=None), 0)


def test_a_selection_without_trust_or_code_is_refused_when_the_study_is_read(home):
    (home / "mine.py").write_text("raise SystemExit('ran')")
    for key in ("trust_code", "code"):
        with pytest.raises(ValueError, match=rf"(?s){key}\n.*Field required"):
            rule(**{key: None})
    with pytest.raises(ValueError, match="unknown key 'code'"):
        Ranking(kind="random", code="mine.py", trust_code=True)


def test_no_code_runs_but_that_whose_sha256_was_read(home):
    ran = home / "ran"
    (home / "mine.py").write_text(f"open({str(ran)!r}, 'w').close()\ndef cost(table): pass")
    trusted = rule()
    assert not ran.exists()
    (home / "mine.py").write_text(CODE)
    with pytest.raises(ValueError, match="was changed while the study runs"):
        run(trusted, "cost", "cost(table)")
    (home / "mine.py").unlink()
    with pytest.raises(ValueError, match="was changed while the study runs"):
        run(trusted, "cost", "cost(table)")
    assert not ran.exists()


def test_code_of_ours_and_of_theirs_share_no_state(home):
    (home / "mine.py").write_text(
        "seen = []\ndef cost(table):\n    seen.append(1)\n    return seen"
    )
    modules = [run(rule(options=None), "cost", "cost(table)") for _ in range(2)]
    assert modules[0].cost(None) == modules[1].cost(None) == [1]
    assert np.asarray(modules[0].seen).tolist() == [1]


def test_what_runs_are_the_bytes_that_were_hashed(home):
    path = home / "mine.py"
    body = "def cost(table):\n    return {}"
    for value in (1, 2):  # of one size and one second: bytecode of the first would be taken
        path.write_text(body.format(value))
        os.utime(path, (1_000_000_000, 1_000_000_000))
        assert run(rule(options=None), "cost", "cost(table)").cost(None) == value
    assert not list(home.glob("**/*.pyc"))


def test_a_file_may_have_any_name_and_dataclasses(home):
    (home / "mine").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\ndef cost(table): return A(3).x"
    )
    assert run(rule(code="mine", options=None), "cost", "cost(table)").cost(None) == 3


def test_costs_are_of_the_whole_datamap_where_classes_are_balanced(home):
    (home / "mine.py").write_text(
        "def cost(table):\n    assert len(table) == 6\n    return -table['confidence'].rank()"
    )
    # the most confident of each class: 5 (0.9) and 2 (1.0)
    assert select(table(), 2, rule(options=None, balanced=True), 0).tolist() == [2, 5]
