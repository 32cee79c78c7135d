"""Earlier selections."""

import numpy as np

from kdlib.explorer import history as module
from kdlib.explorer.history import History


def test_steps_go_back_and_forth_between_the_first_and_the_last():
    history = History()
    for n in (1, 1, 2, 3):  # the same again is no step
        history.record(np.arange(n))
    assert [len(history.undo()) for _ in range(4)] == [2, 1, 0, 0]
    assert not history.can_undo
    assert [len(history.redo()) for _ in range(4)] == [1, 2, 3, 3]
    assert not history.can_redo
    history.undo()
    history.record(np.arange(7))
    assert not history.can_redo
    assert [len(history.undo()) for _ in range(2)] == [2, 1]


def test_the_oldest_steps_are_dropped_where_they_are_too_many(monkeypatch):
    monkeypatch.setattr(module, "MOST_STEPS", 5)
    monkeypatch.setattr(module, "MOST_IDS", 100)
    history = History()
    for n in range(1, 11):
        history.record(np.arange(n))
    assert [len(history.undo()) for _ in range(6)] == [9, 8, 7, 6, 6, 6]
    for n in (80, 90, 95):
        history.record(np.arange(n))
    assert [len(history.undo()) for _ in range(2)] == [90, 90]
