"""`kdlib.cache.build`: parts, processes and interruptions in any order end in the same bytes."""

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cache.numbers import (
    SIZE,
    N,
    content,
    interrupted,
    make,
    make_cache,
    never,
    recording,
    stopping,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache.build import build_images, repair
from kdlib.cache.index import CacheError, part_range
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source

TESTS = Path(__file__).parents[1]


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
    with pytest.raises(
        CacheError, match=r"unfinished build .*run `python -m kdlib cache build STUDY`"
    ):
        Cache(tmp_path)
    starts = []
    make_cache(tmp_path, recording(starts)).verify()
    assert starts == [s * SIZE for s in range(shard, 4)]
    assert content(tmp_path) == content(pristine)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from kdlib.cache import index
from cache.numbers import make_cache
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
append = index.append
def appending(journal, shard, sums):
    if shard == victim and moment == "journal":
        with open(journal, "a") as log:
            log.write('{"shard": 1, "sha2')
        die()
    append(journal, shard, sums)
index.append = appending
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
        assert "made of something else" in str(error)  # noqa: PT017
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
        CacheError, match=r"journal-00000-00002\.jsonl was made of something else .*a: 1 -> 2"
    ):
        make_cache(tmp_path, never, nested={"a": 2}, part=part)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"values": np.zeros((5, 2, 3), "<i4")},
            r"columns {'values': \('<i4', \(5, 2, 3\)\)}; ",
        ),
        (
            {"values": np.zeros((5, 2, 3), "<i8")},
            r"'values': \('<i8', \(5.*; exp.*\('<i4', \(5",
        ),
        (
            {"values": np.zeros((4, 2, 3), "<i4")},
            r"'values': \('<i4', \(4.*; exp.*\('<i4', \(5",
        ),
        ({"labels": np.zeros((5, 1), "<i8")}, r"shard 0 .*'labels': \('<i8', \(5, 1\)\).*; exp"),
    ],
)
def test_arrays_other_than_declared_are_refused(tmp_path, wrong, message):
    whole = wrong if message.startswith("columns") else make((0, 5)) | wrong
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path, lambda span: whole)
    assert sorted(content(tmp_path)) == ["journal.jsonl"]


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
from cache.numbers import make, make_cache
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


def test_a_lock_that_cannot_be_looked_at_is_named(tmp_path, monkeypatch):
    (tmp_path / ".lock").touch()
    flock = fcntl.flock

    def refuse(file, how: int) -> None:
        if how & fcntl.LOCK_SH:
            raise OSError(errno.ENOLCK, "No locks available")
        flock(file, how)

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=r"\.lock cannot be locked \(No locks available\)"):
        make_cache(tmp_path, part=(1, 2))


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
