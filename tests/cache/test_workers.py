"""`kdlib.cache.build`: shards made by other processes, whatever ends them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache.numbers import (
    COLUMNS,
    HEADER,
    SIZE,
    N,
    content,
    make,
    make_cache,
    recording,
)

from kdlib.cache import build
from kdlib.cache.build import build_images, build_shards
from kdlib.cache.index import CacheError, read_journal
from kdlib.cache.sources import array_source

TESTS = Path(__file__).parents[1]


class Counted:
    """A payload that counts how many of it are alive here; a worker gets (start, stop)."""

    alive: int = 0

    def __init__(self, start: int, stop: int) -> None:
        self.span = (start, stop)
        Counted.alive += 1

    def __del__(self) -> None:
        Counted.alive -= 1

    def __reduce__(self) -> tuple:
        return tuple, (self.span,)


def make_counted(payload: Any) -> dict[str, np.ndarray]:
    """`make` for what arrives of a payload, in this process or in another one."""
    return make(payload.span if isinstance(payload, Counted) else payload)


@pytest.mark.parametrize("n_workers", [0, 2])
def test_workers_give_the_same_bytes_and_hold_one_payload_more_than_they_are(tmp_path, n_workers):
    one, fetched, alive = tmp_path / "one", [], []
    make_cache(one, n=60)

    def fetch(start: int, stop: int) -> Counted:
        fetched.append(start)
        payload = Counted(start, stop)
        alive.append(Counted.alive)
        return payload

    built = build_shards(
        tmp_path / "workers",
        HEADER,
        COLUMNS,
        make_counted,
        n_examples=60,
        shard_size=SIZE,
        fetch=fetch,
        n_workers=n_workers,
    )
    assert content(built.folder) == content(one)
    assert fetched == list(range(0, 60, SIZE))
    assert max(alive) == n_workers + 1
    assert Counted.alive == 0


def make_or_raise(last_s: float, span: tuple[int, int]) -> dict[str, np.ndarray]:
    """`make`, which raises at the third shard and takes its time for the last one."""
    if span[0] == 2 * SIZE:
        raise ValueError("example 12 is no image")
    if span[0] == 3 * SIZE:
        time.sleep(last_s)
    return make(span)


def make_or_die(folder: Path, span: tuple[int, int]) -> dict[str, np.ndarray]:
    if span[0] == 2 * SIZE and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return make(span)


@pytest.mark.parametrize("how", ["raises", "raises, noticed late", "dies"])
def test_what_is_finished_before_a_worker_fails_is_kept(pristine, tmp_path, monkeypatch, how):
    folder, kept = tmp_path / "cache", [0, 1]
    function = partial(make_or_raise, 600)  # the last shard, queued behind, is never finished
    expected = (ValueError, "^example 12 is no image$")
    if how == "raises, noticed late":  # when the shard queued behind it is finished too
        function, kept = partial(make_or_raise, 0), [0, 1, 3]
        monkeypatch.setattr(build, "wait", lambda running, return_when: wait(running))
    if how == "dies":
        function = partial(make_or_die, tmp_path)
        expected = (CacheError, r"a worker process died while shards .*2.* were made, most often")
    options = {"n_examples": N, "shard_size": SIZE, "n_workers": 1}
    with pytest.raises(expected[0], match=expected[1]):
        build_shards(folder, HEADER, COLUMNS, function, **options)
    assert not list(folder.glob(".*.tmp"))
    assert sorted(read_journal(folder / "journal.jsonl")[1]) == kept  # in the order they finished
    starts = []
    make_cache(folder, recording(starts))
    assert starts == [shard * SIZE for shard in range(4) if shard not in kept]
    assert content(folder) == content(pristine)


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cache.numbers import COLUMNS, HEADER, make
from kdlib.cache.build import build_shards

def slow(span):
    if span[0] >= 10:
        time.sleep(600)
    return make(span)

if __name__ == "__main__":
    build_shards(Path(sys.argv[1]), HEADER, COLUMNS, slow, n_examples=17, shard_size=5, n_workers=2)
"""


def group(leader: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = path.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(pgrp) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    end = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("how", ["SIGINT", "SIGKILL"])
def test_a_builder_that_is_stopped_takes_its_workers_along_and_the_next_one_goes_on(
    pristine, tmp_path, how
):
    folder, script = tmp_path / "cache", tmp_path / "slow.py"
    script.write_text(SLOW)
    builder = subprocess.Popen(
        [sys.executable, script, folder, TESTS],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a shell starts what it runs in the background with Ctrl-C ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal = folder / "journal.jsonl"
    try:
        assert until(lambda: journal.exists() and len(journal.read_text().splitlines()) == 3, 60)
        assert len(group(builder.pid)) >= 3
        if how == "SIGINT":
            os.killpg(builder.pid, signal.SIGINT)  # as a terminal does: workers get it, too
        else:
            builder.kill()
        _, told = builder.communicate(timeout=10)
        assert builder.returncode == -getattr(signal, how)
        assert told.count("Traceback") == (how == "SIGINT")  # the builder's own alone
        assert until(lambda: not group(builder.pid), 10)
    finally:
        for pid in group(builder.pid):
            os.kill(pid, signal.SIGKILL)
        builder.wait()
        builder.stderr.close()
    starts = []
    make_cache(folder, recording(starts))
    assert starts == [2 * SIZE, 3 * SIZE]
    assert content(folder) == content(pristine)


def test_a_negative_number_of_workers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="n_workers is -1; expected 0 or more"):
        build_shards(tmp_path, HEADER, COLUMNS, make, n_examples=N, shard_size=SIZE, n_workers=-1)


def test_a_part_of_a_source_is_built_by_workers_to_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (13, 3, 4, 5), np.uint8)
    source = array_source("noise", "test", images, np.arange(13) % 2, "ab")
    whole = build_images(source, tmp_path / "whole", 4)
    part = build_images(source, tmp_path / "part", 4, part=(2, 2), n_workers=1)
    np.testing.assert_array_equal(part.example_ids, np.arange(8, 13))
    build_images(source, tmp_path / "part", 4, n_workers=0)
    assert content(part.folder) == content(whole.folder)
