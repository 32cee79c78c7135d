"""`kdlib.trainer.state`: whole or not at all, the two newest, and nothing that executes."""

import pytest
import torch
from safetensors.torch import save_file

from kdlib.trainer.state import (
    BEFORE,
    NAME,
    StateError,
    read_state,
    saved_step,
    write_state,
)

SETTINGS = {"step": {"training": {"lr_peak": 0.1, "steps": None}}}


def put(folder, step):
    write_state(folder, SETTINGS, {"w": torch.full((3,), float(step))}, {"step": step, "rows": []})


def test_what_is_written_is_read_back(tmp_path):
    put(tmp_path, 4)
    tensors, numbers = read_state(tmp_path, SETTINGS)
    assert tensors["w"].tolist() == [4.0, 4.0, 4.0]
    assert numbers == {"step": 4, "rows": []}
    assert saved_step(tmp_path) == 4


def test_where_nothing_was_saved_there_is_nothing(tmp_path):
    assert read_state(tmp_path, SETTINGS) is None
    assert saved_step(tmp_path) == 0


def test_the_two_newest_are_kept(tmp_path):
    for step in (1, 2, 3):
        put(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [BEFORE, NAME]
    assert read_state(tmp_path, SETTINGS)[1]["step"] == 3
    (tmp_path / NAME).unlink()
    assert read_state(tmp_path, SETTINGS)[1]["step"] == 2


@pytest.mark.parametrize("where", ["header", "tensor", "cut", "number", "name", "settings"])
def test_a_damaged_state_is_passed_over_and_said(tmp_path, capsys, where):
    put(tmp_path, 1)
    put(tmp_path, 2)
    path = tmp_path / NAME
    data = bytearray(path.read_bytes())
    if where == "cut":
        data = data[:-2]
    elif where in ("header", "tensor"):
        data[20 if where == "header" else -1] ^= 1
    else:  # the file stays one of tensors
        old, new = {
            "number": (b'step\\": 2', b'step\\": 3'),
            "name": (b'"w"', b'"v"'),
            "settings": (b"0.1", b"0.2"),
        }[where]
        assert data.count(old) == 1
        data = data.replace(old, new)
    path.write_bytes(data)
    assert read_state(tmp_path, SETTINGS)[1]["step"] == 1
    assert "is not a whole training state" in capsys.readouterr().out


def test_when_every_state_is_damaged_it_is_said_what_to_do(tmp_path):
    put(tmp_path, 1)
    (tmp_path / NAME).write_bytes(b"\x80\x04 no tensors")
    with pytest.raises(StateError, match=r"not a whole training state .*delete /.* to train from"):
        read_state(tmp_path, SETTINGS)


def test_a_file_of_tensors_that_is_no_state_is_refused(tmp_path):
    save_file({"w": torch.zeros(1)}, tmp_path / NAME)
    with pytest.raises(StateError, match="not a whole training state"):
        read_state(tmp_path, SETTINGS)


def test_a_state_of_other_settings_is_refused_with_the_difference(tmp_path):
    put(tmp_path, 1)
    other = {"step": {"training": {"lr_peak": 0.2, "steps": None}}}
    with pytest.raises(StateError, match=r"step\.training\.lr_peak: 0\.1 -> 0\.2; delete /"):
        read_state(tmp_path, other)


def test_a_full_disk_keeps_both_states(tmp_path, monkeypatch):
    put(tmp_path, 1)
    put(tmp_path, 2)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        put(tmp_path, 3)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
