"""`kdlib.repro.files`: a reader sees the old file or the new one, and equal content has equal
names."""

import errno
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.repro import files
from kdlib.repro.npy import write_npy

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
HOLD = """
import sys, pathlib
from kdlib.repro.files import locked
with locked(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_write_makes_folders_and_the_whole_file(tmp_path):
    path = files.write_atomic(tmp_path / "a/b/c.bin", lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["c.bin"]


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError("mine")],
    ids=["full disk", "ctrl-c", "writer"],
)
def test_a_failed_write_leaves_the_old_file_and_no_temporary_one(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"ne")
        file.flush()
        raise error

    with pytest.raises(type(error)) as caught:
        files.write_atomic(path, write)
    assert error in (caught.value, caught.value.__cause__)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, step, full)
    with pytest.raises(OSError, match="No space left"):
        files.write_atomic(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
    ],
    ids=["system", "permission"],
)
def test_a_file_that_cannot_be_written_is_one_sentence_with_its_name(tmp_path, error, reason):
    def write(file):
        raise error

    with pytest.raises(files.DiskError) as caught:
        files.write_atomic(tmp_path / "file", write)
    assert str(caught.value) == (
        f"cannot write {tmp_path}/file ({reason}); what is finished is kept: make room or get "
        "permission there, and run the same again"
    )


def test_other_errors_of_the_system_come_through(tmp_path):
    def write(file):
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error") as caught:
        files.write_atomic(tmp_path / "file", write)
    assert not isinstance(caught.value, files.DiskError)


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, "9" * 10_000, "\udcff"], ids=["deep", "long", "no text"]
)
def test_hostile_json_is_named(tmp_path, text):
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(
        ValueError, match=r"x\.json is not valid JSON .*delete .*x.json, then run `"
    ):
        files.read_json(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[]", "null", "1"])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json holds .*; expected an object"):
        files.read_json(tmp_path / "x.json")


def test_a_seal_shows_any_change(tmp_path):
    content = files.sealed({"a": 1, "b": {"c": [2]}})
    assert files.is_sealed(content)
    assert files.sealed(content) == content
    for other in ({**content, "a": 2}, {**content, "d": 1}, {"a": 1, "b": {"c": [2]}}):
        assert not files.is_sealed(other)


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole_and_flushed(tmp_path, monkeypatch):
    path, seen, flushed = tmp_path / "file", [], []
    path.write_bytes(b"old")
    fsync = os.fsync

    def watch(descriptor):
        fsync(descriptor)
        flushed.append(path.read_bytes())  # on the disk, not yet renamed

    monkeypatch.setattr(files.os, "fsync", watch)

    def write(file):
        file.write(b"new")
        seen.append(path.read_bytes())

    files.write_atomic(path, write)
    assert seen == flushed == [b"old"]
    assert path.read_bytes() == b"new"


def test_json_comes_back_and_a_cut_file_is_named(tmp_path):
    content = {"b": [1, 2.5, None], "a": {"ü": True}}
    path = files.write_json(tmp_path / "x.json", content)
    assert files.read_json(path) == content
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"x\.json is not valid JSON.*then run `"):
        files.read_json(path)


def test_nan_is_not_json(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.fingerprint({"loss": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", float("inf"))
    assert not list(tmp_path.iterdir())


def test_object_arrays_are_never_pickled(tmp_path):
    with pytest.raises(ValueError, match="pickle"):
        write_npy(tmp_path / "x.npy", np.array([{}], dtype=object))
    assert not list(tmp_path.iterdir())


@settings(max_examples=50, deadline=None)
@given(content=st.dictionaries(st.text(max_size=5), JSON, max_size=4), data=st.data())
def test_the_order_of_keys_does_not_change_a_fingerprint(content, data):
    shuffled = dict(data.draw(st.permutations(list(content.items()))))
    assert files.canonical_json(shuffled) == files.canonical_json(content)
    assert files.fingerprint(shuffled) == files.fingerprint(content)


def test_canonical_json_and_fingerprint_are_fixed_for_ever():
    content = {"b": 1, "a": [1.5, True, "é"]}
    text = '{"a":[1.5,true,"\\u00e9"],"b":1}'
    assert files.canonical_json(content) == text
    assert files.fingerprint(content) == hashlib.sha256(text.encode()).hexdigest()


def test_an_array_s_hash_covers_values_dtype_shape_and_order():
    a = np.arange(6, dtype=np.int64)
    names = [
        files.sha256_array(a),
        files.sha256_array(a.astype(np.int32)),
        files.sha256_array(a.astype(np.uint64)),  # the same bytes
        files.sha256_array(a.reshape(2, 3)),
        files.sha256_array(a[::-1]),
        files.sha256_array(a, a[:1]),
        files.sha256_array(a[:1], a),
    ]
    assert len(set(names)) == len(names)
    assert files.sha256_array(np.asfortranarray(a.reshape(2, 3))) == names[3]


def test_a_file_s_hash_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"bytes")
    assert files.sha256_file(tmp_path / "x") == hashlib.sha256(b"bytes").hexdigest()


def test_difference_names_nested_keys_and_both_values():
    ours = {"a": 1, "b": {"c": [1], "d": 2}, "e": 5}
    theirs = {"a": 1, "b": {"c": [2], "d": 2}, "f": 6}
    assert files.difference(ours, theirs) == [
        "b.c: [2] -> [1]",
        "e: (absent) -> 5",
        "f: 6 -> (absent)",
    ]


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=3), JSON), st.dictionaries(st.text(max_size=3), JSON))
def test_difference_is_empty_only_for_equal_dictionaries(ours, theirs):
    assert files.difference(ours, ours) == []
    assert bool(files.difference(ours, theirs)) == (ours != theirs)


def test_nearest_gives_one_near_name_or_all_of_them():
    assert (
        files.nearest("confidense", ["variability", "confidence"]) == "did you mean 'confidence'?"
    )
    assert files.nearest("zzz", ["b", "a"]) == "known: a, b"
    assert files.nearest(7, ["b", "a", "b"]) == "known: a, b"


def test_workspace_and_data_follow_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("KDLIB_HOME", raising=False)
    monkeypatch.delenv("KDLIB_DATA", raising=False)
    repository = Path(files.__file__).resolve().parents[2]
    assert (files.workspace(), files.data_root()) == (repository, repository / "data")
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    assert (files.workspace(), files.data_root()) == (tmp_path, tmp_path / "data")
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "elsewhere"))
    assert files.data_root() == tmp_path / "elsewhere"
    for variable in ("KDLIB_DATA", "KDLIB_HOME"):
        monkeypatch.setenv(variable, "")
        with pytest.raises(ValueError, match=f"{variable} is set and empty.* `unset {variable}`"):
            files.data_root()
        monkeypatch.delenv(variable)  # as the message says
        files.data_root()


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock `tmp_path/.lock` until its input ends."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_a_lock_of_another_process_is_refused_and_free_after_its_death(tmp_path, holder):
    with (
        pytest.raises(BlockingIOError, match=r"another process.*\.lock is locked"),
        files.locked(tmp_path / ".lock", wait=False),
    ):
        pytest.fail("the lock was given twice")
    holder.kill()
    holder.wait()
    with files.locked(tmp_path / ".lock", wait=False):
        pass


def test_a_lock_of_another_process_is_waited_for(tmp_path, holder):
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    waiting = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    assert waiting.poll() is None
    holder.communicate()
    assert waiting.communicate(timeout=10)[0] == "held\n"


def test_a_lock_is_free_again_after_an_error_inside(tmp_path):
    with pytest.raises(KeyError), files.locked(tmp_path / "deep/.lock", wait=False):
        raise KeyError("inside")
    with files.locked(tmp_path / "deep/.lock", wait=False):
        pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    for wait in (True, False):
        with (
            pytest.raises(files.LockError, match=r"\.lock cannot be locked \(.*KDLIB_HOME"),
            files.locked(tmp_path / ".lock", wait),
        ):
            pytest.fail("the block ran without a lock")


def test_the_cpus_are_those_this_process_was_given(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert files.n_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert files.n_cpus() == os.cpu_count()


@pytest.mark.parametrize(
    "array",
    [np.arange(6).reshape(2, 3), np.zeros((0, 3), "<f2"), np.float32(3) * np.ones(()), np.eye(3).T,
     np.arange(8, dtype=">i4")[::2]],
    ids=["matrix", "empty", "scalar", "transposed", "strided"],
)  # fmt: skip
def test_an_array_is_written_with_the_bytes_of_numpy(tmp_path, array):
    write_npy(tmp_path / "x.npy", array)
    np.save(tmp_path / "y.npy", np.asarray(array, order="C"))
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_an_array_cut_by_a_full_disk_is_not_taken_for_whole(tmp_path):
    code = """
import resource, sys
import numpy as np
from pathlib import Path
from kdlib.repro.files import DiskError
from kdlib.repro.npy import write_npy
resource.setrlimit(resource.RLIMIT_FSIZE, (220, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
try:
    write_npy(Path(sys.argv[1]), np.zeros(15))
except DiskError as error:
    print(error.__cause__.strerror)
"""
    command = [sys.executable, "-c", code, tmp_path / "x.npy"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "File too large\n", done.stderr
    assert list(tmp_path.iterdir()) == []
