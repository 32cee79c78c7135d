"""`kdlib.cache.build`: parts, processes and interruptions in any order end in the same bytes."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from concurrent.futures import wait
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache.test_shards import COLUMNS, HEADER, SIZE, N, content, make, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache import part as part_module
from kdlib.cache import workers
from kdlib.cache.build import build_images, build_shards, repair
from kdlib.cache.index import CacheError, part_range
from kdlib.cache.journal import read_journal
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source
from kdlib.repro import files

TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A whole cache of four shards, built in one go, that no test writes into."""
    return make_cache(tmp_path_factory.mktemp("cache") / "whole").folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a whole cache, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


def recording(starts: list[int]) -> Callable:
    """`make`, which also notes where the shards it makes begin."""
    return lambda span: (starts.append(span[0]), make(span))[1]


def never(span: tuple[int, int]) -> None:
    pytest.fail(f"examples {span} were made again")


def stopping(shard: int, error: BaseException) -> Callable:
    """`make`, which raises at one shard."""

    def makes(span):
        if span[0] == shard * SIZE:
            raise error
        return make(span)

    return makes


def interrupted(folder: Path, shard: int = 3, part: tuple[int, int] = (1, 1)) -> Path:
    """Begin a build that ends before one of its shards; returns its journal."""
    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, stopping(shard, KeyboardInterrupt()), part=part)
    [journal] = folder.glob("journal*")
    return journal


# --- one builder -----------------------------------------------------------------------------


def test_a_whole_cache_is_opened_and_not_made_again(folder):
    before = content(folder)
    assert make_cache(folder, never).whole
    assert make_cache(folder, never, part=(2, 3)).shards.tolist() == [1]
    assert content(folder) == before


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("part", [(1, 1), (1, 2)])
def test_a_cache_of_something_else_is_refused_and_left_alone(folder, finished, part):
    if not finished:
        (folder / "values-00003.npy").unlink()
        repair(folder)
    before = content(folder)
    with pytest.raises(CacheError, match=r"something else.*nested\.a: 1 -> 2"):
        make_cache(folder, never, nested={"a": 2}, part=part)
    with pytest.raises(CacheError, match="n_examples: 17 -> 18"):
        make_cache(folder, never, n=N + 1, part=part)
    assert content(folder) == before


@pytest.mark.parametrize("shard", range(4))
def test_a_build_whose_source_fails_resumes_after_the_last_whole_shard(pristine, tmp_path, shard):
    with pytest.raises(OSError, match="disk on fire"):
        make_cache(tmp_path, stopping(shard, OSError("disk on fire")))
    with pytest.raises(CacheError, match=r"unfinished build .*run notebooks/01_cache\.ipynb"):
        Cache(tmp_path)
    starts = []
    make_cache(tmp_path, recording(starts)).verify()
    assert starts == [s * SIZE for s in range(shard, 4)]
    assert content(tmp_path) == content(pristine)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from kdlib.cache import build
from cache.test_shards import make_cache
victim, moment = 3, sys.argv[2]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
replace = os.replace
def replacing(source, target):
    if Path(target).name == f"labels-{victim:05d}.npy" and moment == "rename":
        die()
    if Path(target).name.startswith("index") and moment == "index":
        die()
    replace(source, target)
os.replace = replacing
append = build.append
def appending(journal, shard, sums):
    if shard == victim and moment == "journal":
        with open(journal, "a") as log:
            log.write('{"shard": 1, "sha2')
        die()
    append(journal, shard, sums)
build.append = appending
make_cache(Path(sys.argv[1]), part=(2, 2))
"""


@pytest.mark.parametrize("moment", ["rename", "journal", "index"])
def test_a_killed_builder_of_a_part_resumes_to_the_same_bytes(pristine, tmp_path, moment):
    command = [sys.executable, "-c", KILLED, tmp_path, moment, TESTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(left) == (moment in ("rename", "index"))
    with pytest.raises(CacheError, match="unfinished build"):
        Cache(tmp_path)
    starts = []
    make_cache(tmp_path, recording(starts), part=(2, 2)).verify()
    assert starts == [s * SIZE for s in range(4 if moment == "index" else 3, 4)]
    make_cache(tmp_path)
    assert content(tmp_path) == content(pristine)  # the temporary files are gone as well


def test_temporary_files_of_other_parts_and_of_others_are_left_alone(tmp_path):
    ours = [
        ".values-00001.npy.7.tmp",
        ".index-00000-00002.json.7.tmp",
        ".journal-00001-00002.jsonl.7.tmp",
    ]
    others = [".values-00002.npy.7.tmp", ".index.json.7.tmp", ".journal-00001-00003.jsonl.7.tmp"]
    for name in (*ours, *others, ".notes.tmp", "values-00001.npy.tmp"):
        (tmp_path / name).touch()
    make_cache(tmp_path, part=(1, 2))
    left = {name for name in os.listdir(tmp_path) if name.endswith(".tmp")}
    assert left == {*others, ".notes.tmp", "values-00001.npy.tmp"}


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_torn_last_line_of_the_journal_costs_that_shard_alone(tmp_path_factory, pristine, data):
    folder = tmp_path_factory.mktemp("cache")
    journal = interrupted(folder)
    text = journal.read_bytes()
    ends = [i for i, byte in enumerate(text) if byte == ord("\n")]
    cut = data.draw(st.integers(0, len(text)), label="cut")
    journal.write_bytes(text[:cut])
    starts = []
    make_cache(folder, recording(starts)).verify()
    n_lines = sum(cut >= end for end in ends)  # a line without its newline is whole as well
    assert starts == [s * SIZE for s in range(max(n_lines - 1, 0), 4)]
    assert content(folder) == content(pristine)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_a_journal_costs_shards_or_is_refused_but_changes_no_byte(
    tmp_path_factory, pristine, data
):
    folder = tmp_path_factory.mktemp("cache")
    journal = interrupted(folder)
    text = bytearray(journal.read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    journal.write_bytes(text)
    try:
        make_cache(folder).verify()
    except CacheError as error:
        assert "of an unfinished cache of something else" in str(error)  # noqa: PT017
        return
    assert content(folder) == content(pristine)


def test_shards_made_after_a_torn_line_are_kept_by_the_next_interruption(tmp_path):
    journal = interrupted(tmp_path)
    journal.write_bytes(journal.read_bytes()[:-10])  # shard 2 is torn
    interrupted(tmp_path)  # makes shard 2 again, stops at 3
    starts = []
    make_cache(tmp_path, recording(starts))
    assert starts == [3 * SIZE]


def test_a_shard_that_was_damaged_while_the_build_lay_unfinished_is_made_again(pristine, tmp_path):
    interrupted(tmp_path)
    (tmp_path / "values-00000.npy").write_bytes(b"damaged")
    (tmp_path / "labels-00002.npy").unlink()
    starts = []
    make_cache(tmp_path, recording(starts)).verify()
    assert starts == [0, 2 * SIZE, 3 * SIZE]
    assert content(tmp_path) == content(pristine)


@pytest.mark.parametrize("part", [(1, 1), (1, 2), (2, 2)])
def test_a_journal_of_another_cache_is_refused_and_left_alone(tmp_path, part):
    interrupted(tmp_path, 1, part=(1, 2))
    before = content(tmp_path)
    with pytest.raises(
        CacheError, match=r"journal-00000-00002\.jsonl is of an unfinished cache .*a: 1 -> 2"
    ):
        make_cache(tmp_path, never, nested={"a": 2}, part=part)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"values": np.zeros((5, 2, 3), "<i4")}, r"made with columns \['values'\]; expected"),
        ({"values": np.zeros((5, 2, 3), "<i8")}, "values of shard 0 is int64 .*expected <i4"),
        ({"values": np.zeros((4, 2, 3), "<i4")}, r"is int32 \(4, 2, 3\); expected <i4 \(5, 2, 3\)"),
        ({"labels": np.zeros((5, 1), "<i8")}, r"labels of shard 0 is int64 \(5, 1\)"),
    ],
)
def test_arrays_other_than_declared_are_refused(tmp_path, wrong, message):
    whole = wrong if "made with" in message else make((0, 5)) | wrong
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path, lambda span: whole)
    assert sorted(content(tmp_path)) in (["journal.jsonl"], ["journal.jsonl", "values-00000.npy"])


@pytest.mark.parametrize(("n", "shard_size"), [(0, 5), (-1, 5), (5, 0)])
def test_a_cache_of_nothing_is_refused(tmp_path, n, shard_size):
    with pytest.raises(ValueError, match=f"asked for {n} examples in shards of {shard_size}; exp"):
        make_cache(tmp_path / "cache", n=n, shard_size=shard_size)
    assert not (tmp_path / "cache").exists()


def test_building_leaves_the_global_generators_alone(tmp_path):
    before = np.random.get_state()[1].copy()
    make_cache(tmp_path).read("values", np.arange(3))
    np.testing.assert_array_equal(np.random.get_state()[1], before)


# --- parts -----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 40), shard_size=st.integers(1, 9), data=st.data())
def test_parts_in_any_order_with_interruptions_end_in_the_files_of_a_build_in_one_go(
    tmp_path_factory, n, shard_size, data
):
    n_shards = -(-n // shard_size)
    k = data.draw(st.integers(1, n_shards), label="k")
    order = data.draw(st.permutations(range(1, k + 1)), label="order")
    one, parts = (tmp_path_factory.mktemp(name) for name in ("one", "parts"))
    make_cache(one, n=n, shard_size=shard_size)
    made: list[int] = []

    def built(part: tuple[int, int], stop_at: int | None) -> None:
        def making(span):
            if span[0] // shard_size == stop_at:
                raise KeyboardInterrupt
            made.append(span[0] // shard_size)
            return make(span)

        make_cache(parts, making, n=n, shard_size=shard_size, part=part)

    for i in order[: data.draw(st.integers(0, k), label="parts before the whole")]:
        first, stop = part_range(n_shards, (i, k))
        if data.draw(st.booleans(), label="interrupted"):
            with pytest.raises(KeyboardInterrupt):
                built((i, k), data.draw(st.integers(first, stop - 1), label="at"))
        if data.draw(st.booleans(), label="finished"):
            built((i, k), None)
            there = Cache(parts, part=(i, k))
            assert there.shards.tolist() == list(range(first, stop))
    shards = {name: data for name, data in content(parts).items() if name.endswith(".npy")}
    assert shards.items() <= content(one).items()
    built((1, 1), None)
    assert sorted(made) == list(range(n_shards))  # each was made once
    assert content(parts) == content(one)


def test_all_parts_together_are_the_whole_and_a_whole_build_puts_them_under_one_index(
    pristine, tmp_path
):
    for part in ((3, 4), (1, 2), (4, 4)):
        make_cache(tmp_path, part=part)
    opened = Cache(tmp_path)
    assert opened.whole
    assert opened.fingerprint == Cache(pristine).fingerprint
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [
        "index-00000-00002.json",
        "index-00002-00003.json",
        "index-00003-00004.json",
    ]
    make_cache(tmp_path, never)
    assert content(tmp_path) == content(pristine)


def test_a_whole_build_makes_only_the_shards_that_no_part_has(pristine, tmp_path):
    make_cache(tmp_path, part=(2, 4))
    interrupted(tmp_path, 3, part=(2, 2))
    starts = []
    make_cache(tmp_path, recording(starts))
    assert starts == [0, 3 * SIZE]
    assert content(tmp_path) == content(pristine)


def test_a_part_takes_over_what_overlapping_parts_have_made(pristine, tmp_path):
    make_cache(tmp_path, part=(2, 3))  # shard 1
    starts = []
    make_cache(tmp_path, recording(starts), part=(1, 2))
    assert starts == [0]
    make_cache(tmp_path, part=(3, 3))
    make_cache(tmp_path, never)
    assert content(tmp_path) == content(pristine)


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (5, 5)])
def test_a_part_out_of_range_is_refused_and_nothing_is_written(tmp_path, part):
    with pytest.raises(ValueError, match=rf"part {part[0]}/{part[1]} of 4 shards; expected i/k"):
        make_cache(tmp_path / "cache", never, part=part)
    assert not (tmp_path / "cache").exists()


BUILDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from cache.test_shards import make, make_cache
print("ready", flush=True)
sys.stdin.readline()
def slow(span):
    time.sleep(0.05)
    return make(span)
for _ in range(int(sys.argv[4])):
    make_cache(Path(sys.argv[1]), slow, n=60, part=(int(sys.argv[2]), 2))
"""


def test_processes_build_parts_at_the_same_time(tmp_path):
    one, parts = tmp_path / "one", tmp_path / "parts"
    make_cache(one, n=60)
    (parts / ".lock").parent.mkdir()
    (parts / ".lock").touch()  # every builder looks at the lock of the whole
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    builders = [
        subprocess.Popen([sys.executable, "-c", BUILDER, parts, i, TESTS, "1"], text=True, **pipes)
        for i in "12"
    ]
    ready = [builder.stdout.readline() for builder in builders]
    for builder in builders:
        builder.stdin.write("go\n")
        builder.stdin.flush()
    told = [(builder.communicate()[1], builder.returncode) for builder in builders]
    assert (ready, told) == (["ready\n"] * 2, [("", 0)] * 2)
    assert Cache(parts).whole
    make_cache(parts, never, n=60)
    assert content(parts) == content(one)


def test_builders_of_the_same_shards_are_refused_while_one_works_and_of_others_are_not(
    pristine, tmp_path
):
    tried = []

    def nested(span):
        for part in ((1, 2), (1, 1), (2, 4), (2, 3)):
            with pytest.raises(BlockingIOError, match=r"another process is .*; wait for it or st"):
                make_cache(tmp_path, never, part=part)
        with pytest.raises(BlockingIOError, match="another process"):
            repair(tmp_path)
        make_cache(tmp_path, part=(3, 4))
        tried.append(span)
        return make(span)

    make_cache(tmp_path, part=(4, 4))
    make_cache(tmp_path, nested, part=(1, 2))
    assert tried == [(0, 5), (5, 10)]
    make_cache(tmp_path, never)
    assert content(tmp_path) == content(pristine)


def test_a_part_is_refused_while_the_whole_is_built(tmp_path):
    def nested(span):
        with pytest.raises(BlockingIOError, match=r"some of these shards: .*\.lock is locked"):
            make_cache(tmp_path, never, part=(2, 2))
        return make(span)

    make_cache(tmp_path, nested).verify()


def test_two_builders_may_look_at_one_lock_at_the_same_time(tmp_path):
    (tmp_path / ".lock").touch()
    with open(tmp_path / ".lock") as file:  # another builder of a part, while it looks
        fcntl.flock(file, fcntl.LOCK_SH)
        make_cache(tmp_path, part=(1, 2))
        with pytest.raises(BlockingIOError, match="another process"):
            make_cache(tmp_path)


def test_a_second_builder_in_another_process_is_refused(tmp_path):
    command = "from pathlib import Path; from kdlib.repro import files\n"
    command += (
        f"with files.locked(Path({str(tmp_path / '.lock')!r})):\n print(1, flush=True)\n input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", command], **pipes) as holder:
        assert holder.stdout.readline() == "1\n"
        for part in ((1, 1), (1, 2)):
            with pytest.raises(BlockingIOError, match="another process is"):
                make_cache(tmp_path, never, part=part)
        assert content(tmp_path) == {}
        holder.stdin.write("\n")
    make_cache(tmp_path).verify()


# --- worker processes ------------------------------------------------------------------------


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
        monkeypatch.setattr(workers, "wait", lambda running, return_when: wait(running))
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
from cache.test_shards import COLUMNS, HEADER, make
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


# --- a folder that cannot be written into ----------------------------------------------------


def test_a_full_disk_leaves_an_unfinished_build_and_no_temporary_file(
    pristine, tmp_path, monkeypatch
):
    save = np.save

    def full(file, array, **options):
        if array.dtype == np.int32 and array[0, 0, 0] == 6 * 2 * SIZE:
            file.write(b"half")
            raise OSError(28, "No space left on device")
        save(file, array, **options)

    with monkeypatch.context() as patched:
        patched.setattr(files.np, "save", full)
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
from cache.test_shards import make_cache
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
from cache.test_shards import N, Cache, make_cache, repair
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


# --- repair ----------------------------------------------------------------------------------


def test_repair_keeps_whole_shards_and_the_next_build_makes_the_others(folder, pristine):
    (folder / "values-00001.npy").write_bytes(b"")
    (folder / "labels-00003.npy").unlink()
    kept = (folder / "values-00000.npy").stat().st_mtime_ns
    assert repair(folder) == ["values-00001.npy", "labels-00003.npy"]
    with pytest.raises(CacheError, match="unfinished build"):
        Cache(folder)
    starts = []
    make_cache(folder, recording(starts)).verify()
    assert starts == [SIZE, 3 * SIZE]
    assert (folder / "values-00000.npy").stat().st_mtime_ns == kept
    assert content(folder) == content(pristine)


def test_repair_of_a_part_leaves_the_other_parts_readable(pristine, tmp_path):
    for part in ((1, 2), (2, 2)):
        make_cache(tmp_path, part=part)
    (tmp_path / "values-00001.npy").write_bytes(b"")
    assert repair(tmp_path) == ["values-00001.npy"]
    assert Cache(tmp_path).shards.tolist() == [2, 3]
    starts = []
    make_cache(tmp_path, recording(starts), part=(1, 2)).verify()
    assert starts == [SIZE]
    make_cache(tmp_path, never)
    assert content(tmp_path) == content(pristine)


def test_repair_of_a_shard_that_two_parts_share_names_it_once(pristine, tmp_path):
    make_cache(tmp_path, part=(2, 3))  # shard 1
    make_cache(tmp_path, part=(3, 3))  # shards 2 and 3
    make_cache(tmp_path, part=(3, 4))  # shard 2 again
    assert len(list(tmp_path.glob("index*"))) == 2
    shutil.copy(tmp_path / "index-00001-00002.json", tmp_path / "kept")
    make_cache(tmp_path, part=(1, 2))  # shards 0 and 1
    (tmp_path / "kept").rename(tmp_path / "index-00001-00002.json")
    (tmp_path / "labels-00001.npy").unlink()
    assert repair(tmp_path) == ["labels-00001.npy"]
    assert Cache(tmp_path).shards.tolist() == [2, 3]
    starts = []
    make_cache(tmp_path, recording(starts))
    assert starts == [SIZE]
    assert content(tmp_path) == content(pristine)


def test_repair_of_a_whole_cache_changes_nothing(folder):
    before = content(folder)
    assert repair(folder) == []
    assert content(folder) == before


def test_repair_of_an_unfinished_or_missing_cache_says_what_is_there(tmp_path):
    with pytest.raises(CacheError, match="holds no cache"):
        repair(tmp_path)
    interrupted(tmp_path)
    with pytest.raises(CacheError, match="holds an unfinished build"):
        repair(tmp_path)


# --- images ----------------------------------------------------------------------------------


def test_images_and_labels_of_a_source_come_back_and_name_it(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (13, 3, 4, 5), np.uint8), rng.integers(0, 2, 13)
    source = array_source("noise", "test", images, labels, ["cat", "dog"])
    built = build_images(source, tmp_path, 4)
    np.testing.assert_array_equal(built.read("images", np.arange(13)), images)
    np.testing.assert_array_equal(built.resident("labels").numpy(), labels)
    assert built.header["class_names"] == ["cat", "dog"]
    assert (built.header["source"], built.header["split"]) == ("noise", "test")
    assert np.load(tmp_path / "images-00003.npy", allow_pickle=False).shape == (1, 3, 4, 5)


def test_another_source_does_not_open_this_one_s_cache(tmp_path):
    images = np.zeros((3, 1, 4, 4), np.uint8)
    build_images(array_source("noise", "test", images, np.array([0, 1, 0]), "ab"), tmp_path, 2)
    with pytest.raises(CacheError, match=r"identity\.sha256: "):
        build_images(array_source("noise", "test", images, np.array([0, 1, 1]), "ab"), tmp_path, 2)


def test_a_part_of_a_source_is_built_by_workers_to_the_same_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (13, 3, 4, 5), np.uint8)
    source = array_source("noise", "test", images, np.arange(13) % 2, "ab")
    whole = build_images(source, tmp_path / "whole", 4)
    part = build_images(source, tmp_path / "part", 4, part=(2, 2), n_workers=1)
    np.testing.assert_array_equal(part.example_ids, np.arange(8, 13))
    build_images(source, tmp_path / "part", 4, n_workers=0)
    assert content(part.folder) == content(whole.folder)
