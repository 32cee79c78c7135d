"""`kdlib.cache.build`: a folder that cannot be written into keeps what is finished."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from cache.numbers import SIZE, N, content, make_cache, never, recording, stopping

from kdlib.cache import part as part_module
from kdlib.cache.index import CacheError
from kdlib.repro import files

TESTS = Path(__file__).parents[1]


def test_a_full_disk_leaves_an_unfinished_build_and_no_temporary_file(
    pristine, tmp_path, monkeypatch
):
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if ".values-00002.npy." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        with pytest.raises(files.DiskError, match=r"cannot write .*No space left.*make room"):
            make_cache(tmp_path)
    assert list(tmp_path.glob(".*")) == [tmp_path / ".lock"]
    starts = []
    make_cache(tmp_path, recording(starts)).verify()
    assert starts == [2 * SIZE, 3 * SIZE]
    assert content(tmp_path) == content(pristine)


LIMITED = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cache.numbers import make_cache
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for limit in sys.argv[3:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
    try:
        make_cache(Path(sys.argv[1], limit))
    except OSError as error:
        print(error)
"""


def test_files_that_the_system_lets_grow_no_further_are_one_sentence(pristine, tmp_path):
    # the journal's header does not fit; the values do not; the journal's third shard does not
    n_kept, refused = {"100": 0, "220": 0, "700": 2}, ["journal.jsonl", "values-00000.npy"]
    command = [sys.executable, "-c", LIMITED, tmp_path, TESTS, *n_kept]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"cannot write {tmp_path / limit / name} (File too large); what is finished is kept: make "
        "room or get permission there, and run the same again"
        for limit, name in zip(n_kept, [*refused, "journal.jsonl"], strict=True)
    ], done.stderr
    for limit, n in n_kept.items():
        assert not list((tmp_path / limit).glob(".*.tmp"))
        assert (tmp_path / limit / "journal.jsonl").exists() == (limit != "100")
        starts = []
        make_cache(tmp_path / limit, recording(starts))
        assert starts == [s * SIZE for s in range(n, 4)]
        assert content(tmp_path / limit) == content(pristine)


def test_a_disk_with_too_little_room_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    usage = namedtuple("usage", ["total", "used", "free"])
    needed = N * (6 * 4 + 8)
    with monkeypatch.context() as patched:
        patched.setattr(part_module.shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
        with pytest.raises(CacheError, match=r"the 4 shards to be made need 0\.00 GB, .* GB free"):
            make_cache(tmp_path, never)
        assert content(tmp_path) == {}
        patched.setattr(part_module.shutil, "disk_usage", lambda _: usage(0, 0, 7 * (6 * 4 + 8)))
        make_cache(tmp_path, part=(2, 2))  # what is needed is the part's alone
        patched.setattr(part_module.shutil, "disk_usage", lambda _: usage(0, 0, needed))
        make_cache(tmp_path)


READ_ONLY = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import numpy as np
import torch  # now: a user without rights may be unable to read it
from cache.numbers import N, make_cache
from kdlib.cache.build import repair
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for folder in (Path("whole"), Path("parts")):  # the latter is complete, but under two indexes
    opened = make_cache(folder)
    opened.verify()
    print(opened.whole, opened.read("labels", np.arange(N)).sum())
for use in (
    lambda: make_cache(Path("half")), lambda: repair(Path("half")), lambda: make_cache(Path("new"))
):
    try:
        use()
    except OSError as error:
        print(error)
"""


def test_a_read_only_folder_is_read_and_verified_but_not_built_into(tmp_path):
    make_cache(tmp_path / "whole")
    for part in ((1, 2), (2, 2)):
        make_cache(tmp_path / "parts", part=part)
    make_cache(tmp_path / "half", part=(1, 2))
    folders = [tmp_path, *(tmp_path / name for name in ("whole", "parts", "half"))]
    before = {path.name: content(path) for path in folders[1:]}
    for path in folders:
        path.chmod(0o555)
    try:
        if os.getuid() != 0 and os.access(tmp_path, os.W_OK):
            pytest.skip("this user may write into folders without write permission")
        command = [sys.executable, "-c", READ_ONLY, TESTS]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    finally:
        for path in folders:
            path.chmod(0o755)
    assert done.stdout.splitlines() == [
        *["True 136"] * 2,
        *[
            f"cannot write {name} (Permission denied); what is finished is kept: make room or get "
            "permission there, and run the same again"
            for name in ("half/.lock", "half/.lock", "new/.lock")
        ],
    ], done.stderr
    assert {path.name: content(path) for path in folders[1:]} == before


def test_what_a_source_cannot_read_is_not_blamed_on_the_cache(tmp_path):
    error = PermissionError(13, "Permission denied", "/data/photo.jpg")
    with pytest.raises(PermissionError, match="photo"):
        make_cache(tmp_path, stopping(1, error))
