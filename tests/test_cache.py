"""`kdlib.cache`: every row comes back, a killed build resumes, and nothing damaged is read."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib import cache, files
from kdlib.cache import FORMAT, Cache, CacheError, build, build_images, pixel_statistics, repair
from kdlib.data import array_source

N, SIZE = 17, 5  # four shards: 5, 5, 5, 2
COLUMNS = {"values": ("<i4", (2, 3)), "labels": ("<i8", ())}
HEADER = {"kind": "numbers", "nested": {"a": 1}}


def make(start: int, stop: int) -> dict[str, np.ndarray]:
    """Rows that say which example they belong to: 6 * id + place."""
    ids = np.arange(start, stop)
    values = 6 * ids[:, None] + np.arange(6)
    return {"values": values.reshape(-1, 2, 3).astype("<i4"), "labels": ids}


def make_cache(folder: Path, function: Callable = make, n: int = N, **changes) -> Cache:
    return build(folder, HEADER | changes, COLUMNS, function, n_examples=n, shard_size=SIZE)


def content(folder: Path) -> dict[str, bytes]:
    """Every visible file of a cache, and its bytes."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != ".lock"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """A whole cache that no test writes into."""
    return make_cache(tmp_path_factory.mktemp("cache") / "whole").folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A copy of a whole cache, to be damaged."""
    return Path(shutil.copytree(pristine, tmp_path / "cache"))


# --- reading ---------------------------------------------------------------------------------


def test_every_row_comes_back_over_uneven_shards(pristine):
    opened = Cache(pristine)
    assert opened.n_examples == N
    for i in range(N):
        np.testing.assert_array_equal(
            opened.read("values", np.array([i])), make(i, i + 1)["values"]
        )
        assert opened.read("labels", np.array([i])) == [i]
    assert [len(opened.shard("labels", s)) for s in range(4)] == [5, 5, 5, 2]
    assert sorted(content(pristine)) == [
        "index.json",
        *(f"labels-{s:05d}.npy" for s in range(4)),
        *(f"values-{s:05d}.npy" for s in range(4)),
    ]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), shard_size=st.integers(1, 12), data=st.data())
def test_any_ids_are_read_in_the_order_given(tmp_path_factory, n, shard_size, data):
    folder = tmp_path_factory.mktemp("cache")
    built = build(folder, HEADER, COLUMNS, make, n_examples=n, shard_size=shard_size)
    ids = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)), np.int64)
    expected = make(0, n)
    for column, (dtype, shape) in COLUMNS.items():
        rows = built.read(column, ids)
        assert (rows.dtype, rows.shape) == (np.dtype(dtype), (len(ids), *shape))
        np.testing.assert_array_equal(rows, expected[column][ids])
        np.testing.assert_array_equal(built.resident(column).numpy(), expected[column])
    built.verify()


@pytest.mark.parametrize("ids", [[-1], [0, N], [3, -(2**40)], [2**62]])
def test_ids_outside_the_cache_are_refused(pristine, ids):
    with pytest.raises(IndexError, match=rf"which has ids \[0, {N}\)"):
        Cache(pristine).read("values", np.array(ids))


def test_rows_are_copies_and_shards_are_read_only(pristine):
    opened = Cache(pristine)
    opened.read("values", np.arange(N))[:] = 0
    opened.resident("values")[:] = 0
    with pytest.raises(ValueError, match="read-only"):
        opened.shard("values", 0)[:] = 0
    opened.verify()
    np.testing.assert_array_equal(opened.read("values", np.arange(N)), make(0, N)["values"])


def test_a_typo_in_a_column_gives_the_nearest(pristine):
    with pytest.raises(CacheError, match="no column 'value'; did you mean 'values'"):
        Cache(pristine).shard("value", 0)


def test_the_fingerprint_covers_all_that_determines_the_bytes(pristine, tmp_path):
    same = make_cache(tmp_path / "same")
    others = [
        make_cache(tmp_path / "a", nested={"a": 2}),
        make_cache(tmp_path / "b", n=N - 1),
        build(tmp_path / "c", HEADER, COLUMNS, make, n_examples=N, shard_size=SIZE + 1),
    ]
    assert same.fingerprint == Cache(pristine).fingerprint
    assert content(same.folder) == content(pristine)
    assert len({c.fingerprint for c in (same, *others)}) == 4


# --- building --------------------------------------------------------------------------------


def test_a_whole_cache_is_opened_and_not_made_again(folder):
    before = content(folder)
    make_cache(folder, lambda start, stop: pytest.fail("made again"))
    assert content(folder) == before


@pytest.mark.parametrize("finished", [True, False])
def test_a_cache_of_something_else_is_refused_and_left_alone(folder, finished):
    if not finished:
        (folder / "values-00003.npy").unlink()
        repair(folder)
    before = content(folder)
    with pytest.raises(CacheError, match=r"something else.*nested\.a: (1 -> 2|2 -> 1)"):
        make_cache(folder, nested={"a": 2})
    with pytest.raises(CacheError, match="n_examples"):
        make_cache(folder, n=N + 1)
    assert content(folder) == before


@pytest.mark.parametrize("shard", range(4))
def test_a_build_whose_source_fails_resumes_after_the_last_whole_shard(pristine, tmp_path, shard):
    def failing(start, stop):
        if start == shard * SIZE:
            raise OSError("disk on fire")
        return make(start, stop)

    folder = tmp_path / "cache"
    with pytest.raises(OSError, match="disk on fire"):
        make_cache(folder, failing)
    with pytest.raises(CacheError, match=r"unfinished build .*run the notebook"):
        Cache(folder)
    starts = []
    make_cache(folder, lambda start, stop: (starts.append(start), make(start, stop))[1]).verify()
    assert starts == [s * SIZE for s in range(shard, 4)]
    assert content(folder) == content(pristine)


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from kdlib import cache
from test_cache import make, make_cache
victim, moment = int(sys.argv[2]), sys.argv[3]
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def making(start, stop):
    if start == 5 * victim and moment == "make":
        die()
    return make(start, stop)
replace, count = os.replace, 0
def replacing(source, target):
    global count
    if Path(target).name == f"labels-{victim:05d}.npy" and moment == "rename":
        die()
    replace(source, target)
os.replace = replacing
append = cache._append
def appending(log, entry):
    if entry.get("shard") == victim and moment == "journal":
        log.write('{"shard": 1, "sha2')
        log.flush()
        die()
    append(log, entry)
cache._append = appending
write_json = cache.files.write_json
cache.files.write_json = die if moment == "index" else write_json
make_cache(Path(sys.argv[1]), making)
"""


@pytest.mark.parametrize("moment", ["make", "rename", "journal", "index"])
def test_a_killed_build_resumes_to_the_same_bytes(pristine, tmp_path, moment):
    folder = tmp_path / "cache"
    victim = int(np.random.default_rng([ord(c) for c in moment]).integers(1, 4))
    command = [sys.executable, "-c", KILLED, folder, str(victim), moment, Path(__file__).parent]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    with pytest.raises(CacheError, match="unfinished build"):
        Cache(folder)
    starts = []
    make_cache(folder, lambda start, stop: (starts.append(start), make(start, stop))[1]).verify()
    assert starts == [s * SIZE for s in range(4 if moment == "index" else victim, 4)]
    visible = {name: data for name, data in content(folder).items() if name[0] != "."}
    assert visible == content(pristine)


def interrupted(folder: Path) -> Path:
    """Make an unfinished cache of which three of four shards are whole; returns its journal."""

    def stops(start, stop):
        if start == 3 * SIZE:
            raise KeyboardInterrupt
        return make(start, stop)

    with pytest.raises(KeyboardInterrupt):
        make_cache(folder, stops)
    return folder / "journal.jsonl"


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
    make_cache(folder, lambda start, stop: (starts.append(start), make(start, stop))[1]).verify()
    n_lines = sum(cut >= end for end in ends)  # a line without its newline is whole as well
    assert starts == [s * SIZE for s in range(max(n_lines - 1, 0), 4)]
    assert content(folder) == content(pristine)


def test_shards_made_after_a_torn_line_are_kept_by_the_next_interruption(tmp_path):
    journal = interrupted(tmp_path)
    journal.write_bytes(journal.read_bytes()[:-10])  # shard 2 is torn
    interrupted(tmp_path)  # makes shard 2 again, stops at 3
    starts = []
    make_cache(tmp_path, lambda start, stop: (starts.append(start), make(start, stop))[1])
    assert starts == [3 * SIZE]


def test_a_shard_that_was_damaged_while_the_build_lay_unfinished_is_made_again(pristine, tmp_path):
    interrupted(tmp_path)
    (tmp_path / "values-00000.npy").write_bytes(b"damaged")
    (tmp_path / "labels-00002.npy").unlink()
    starts = []
    make_cache(tmp_path, lambda start, stop: (starts.append(start), make(start, stop))[1]).verify()
    assert starts == [0, 2 * SIZE, 3 * SIZE]
    assert content(tmp_path) == content(pristine)


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
        with pytest.raises(OSError, match="No space left"):
            make_cache(tmp_path)
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
    make_cache(tmp_path).verify()
    assert content(tmp_path) == content(pristine)


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
    whole = wrong if list(wrong) == ["values"] and "made with" in message else make(0, 5) | wrong
    with pytest.raises(ValueError, match=message):
        make_cache(tmp_path, lambda start, stop: whole)
    assert not (tmp_path / "index.json").exists()


def test_a_second_builder_of_one_cache_is_refused(tmp_path):
    command = "from pathlib import Path; from kdlib import files\n"
    command += (
        f"with files.locked(Path({str(tmp_path / '.lock')!r})):\n print(1, flush=True)\n input()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", command], **pipes) as holder:
        assert holder.stdout.readline() == "1\n"
        with pytest.raises(BlockingIOError, match="another process is working here"):
            make_cache(tmp_path)
        assert os.listdir(tmp_path) == [".lock"]
        holder.stdin.write("\n")
    make_cache(tmp_path).verify()


def test_a_builder_that_starts_while_another_one_works_is_refused(tmp_path):
    def nested(start, stop):
        with pytest.raises(BlockingIOError, match="another process"):
            make_cache(tmp_path)
        return make(start, stop)

    make_cache(tmp_path, nested).verify()


# --- damage ----------------------------------------------------------------------------------


def test_a_missing_cache_names_the_remedy(tmp_path):
    with pytest.raises(CacheError, match=r"no cache \(index.json is missing\); run the notebook"):
        Cache(tmp_path / "nowhere")


def test_a_missing_shard_is_refused(folder):
    (folder / "labels-00002.npy").unlink()
    with pytest.raises(CacheError, match=r"labels-00002\.npy is missing; run `kdlib.cache.repair`"):
        Cache(folder)


@settings(max_examples=60, deadline=None)
@given(keep=st.integers(0, 128 + 40 - 1))
def test_a_cut_shard_is_refused_wherever_it_is_cut(tmp_path_factory, pristine, keep):
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("cut") / "cache"))
    path = folder / "labels-00001.npy"  # 128 bytes of header, 5 * 8 of labels
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"labels-00001\.npy is cut or damaged"):
        Cache(folder)


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 128 + 40 - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_found_by_verify_if_opening_does_not(
    tmp_path_factory, pristine, place, value
):
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("flip") / "cache"))
    path = folder / "labels-00001.npy"
    damaged = bytearray(path.read_bytes())
    if damaged[place] == value:
        return
    damaged[place] = value
    path.write_bytes(damaged)
    with pytest.raises(CacheError, match=r"labels-00001\.npy"):
        Cache(folder).verify()
    assert repair(folder) == ["labels-00001.npy"]


HEADER_CHANGES = {  # from the bytes of an .npy header to others, each once seen to escape NumPy
    "unbalanced": (b", }", b",  "),
    "octal": (b"(5,)", b"(05)"),
    "no header": (b"\x93NUMPY", b"PK\x03\x04  "),
}


@pytest.mark.parametrize("change", HEADER_CHANGES)
def test_a_header_numpy_cannot_parse_is_refused(folder, change):
    path = folder / "labels-00001.npy"
    old, new = HEADER_CHANGES[change]
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    with pytest.raises(CacheError, match=r"labels-00001\.npy is cut or damaged"):
        Cache(folder)


@pytest.mark.parametrize(
    "array",
    [np.zeros((5, 2, 3), "<i8"), np.zeros((5, 2, 3), ">i4"), np.zeros((5, 3, 2), "<i4")],
    ids=lambda a: f"{a.dtype.str} {a.shape}",
)
def test_a_shard_of_another_dtype_or_shape_is_refused(folder, array):
    np.save(folder / "values-00000.npy", array)
    with pytest.raises(CacheError, match=r"its index says <i4 \(5, 2, 3\)"):
        Cache(folder)


class Trap:
    """Executes on unpickling."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_a_pickled_shard_is_refused_and_executes_nothing(folder, tmp_path):
    trap = np.empty(5, dtype=object)
    trap[:] = [Trap(tmp_path / "executed")] * 5
    np.save(folder / "labels-00001.npy", trap, allow_pickle=True)
    with pytest.raises(CacheError, match=r"labels-00001\.npy is cut or damaged"):
        Cache(folder)
    np.load(folder / "labels-00001.npy", allow_pickle=True)
    assert (tmp_path / "executed").exists()  # the trap would have worked
    (tmp_path / "executed").unlink()
    with pytest.raises(CacheError, match=r"labels-00001\.npy is cut or damaged"):
        Cache(folder).verify()
    repair(folder)
    make_cache(folder).verify()
    assert not (tmp_path / "executed").exists()


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def rename_file(index: dict, name: str) -> None:
    sums = index["shards"][0]["sha256"]
    sums[name] = sums.pop("values-00000.npy")


INDEX_CHANGES = {
    "future format": (lambda i: i["header"].update(format=FORMAT + 1), "has format 2; this kdlib"),
    "no format": (lambda i: i["header"].pop("format"), "has format None"),
    "no header": (lambda i: i.pop("header"), "has format None"),
    "odd header": (lambda i: i.update(header=[1]), "has format None"),
    "up": (lambda i: rename_file(i, "../labels-00000.npy"), "names a file that no cache of ours"),
    "absolute": (lambda i: rename_file(i, "/etc/passwd"), "no cache of ours has: '/etc/passwd'"),
    "newline": (lambda i: rename_file(i, "values-00000.npy\n"), "no cache of ours has"),
    "other file": (lambda i: rename_file(i, "others-00000.npy"), "do not make up its 17 examples"),
    "column up": (
        lambda i: i["header"]["columns"].update({"../x/values": ["<i4", [2, 3]]}),
        "no cache of ours has: '../x/values-00000.npy'; do not trust",
    ),
    "no sums": (lambda i: i["shards"][1].update(sha256={}), "lists 4 shards that do not make up"),
    "fewer shards": (lambda i: i["shards"].pop(), "lists 3 shards that do not make up its 17"),
    "more examples": (lambda i: i["header"].update(n_examples=18), "do not make up its 18 examp"),
    "moved": (lambda i: i["shards"][1].update(first_id=0), "do not make up"),
    "no shards": (lambda i: i.pop("shards"), r"is not an index of ours \(KeyError\('shards'\)\)"),
    "size 0": (lambda i: i["header"].update(shard_size=0), "is not an index of ours"),
    "odd size": (lambda i: i["header"].update(shard_size="5"), "is not an index of ours"),
}


@pytest.mark.parametrize("change", INDEX_CHANGES)
def test_an_index_that_build_never_wrote_is_refused(folder, change):
    function, message = INDEX_CHANGES[change]
    edit_index(folder, function)
    before = content(folder)
    for use in (Cache, repair):
        with pytest.raises(CacheError, match=message):
            use(folder)
    assert content(folder) == before


@pytest.mark.parametrize("keep", [0, 1, 40, -5])
def test_a_cut_index_is_refused(folder, keep):
    path = folder / "index.json"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match=r"index\.json is not valid JSON.*delete it and run"):
        Cache(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"header": null}'])
def test_json_that_is_no_index_is_refused(folder, text):
    (folder / "index.json").write_text(text)
    with pytest.raises(CacheError, match="has format None"):
        Cache(folder)


def test_another_header_than_expected_is_refused_with_the_difference(pristine):
    assert Cache(pristine, {"kind": "numbers", "nested": {"a": 1}}).n_examples == N
    with pytest.raises(CacheError, match=r"nested\.a: 1 -> 2; nothing was changed"):
        Cache(pristine, {"kind": "numbers", "nested": {"a": 2}})
    with pytest.raises(CacheError, match="teacher: None -> abc"):
        Cache(pristine, {"teacher": "abc"})


def test_verify_names_every_damaged_file_and_no_other(folder):
    for name in ("labels-00003.npy", "values-00001.npy"):
        damaged = bytearray((folder / name).read_bytes())
        damaged[-1] ^= 1
        (folder / name).write_bytes(damaged)
    with pytest.raises(CacheError, match=r"values-00001\.npy, labels-00003\.npy differ from"):
        Cache(folder).verify()


def test_repair_keeps_whole_shards_and_the_next_build_makes_the_others(folder, pristine):
    (folder / "values-00001.npy").write_bytes(b"")
    (folder / "labels-00003.npy").unlink()
    kept = {name: (folder / name).stat().st_mtime_ns for name in ("values-00000.npy",)}
    assert repair(folder) == ["values-00001.npy", "labels-00003.npy"]
    with pytest.raises(CacheError, match="unfinished build"):
        Cache(folder)
    starts = []
    make_cache(folder, lambda start, stop: (starts.append(start), make(start, stop))[1]).verify()
    assert starts == [SIZE, 3 * SIZE]
    assert all((folder / name).stat().st_mtime_ns == time for name, time in kept.items())
    assert content(folder) == content(pristine)


def test_repair_of_a_whole_cache_changes_nothing(folder):
    before = content(folder)
    assert repair(folder) == []
    assert content(folder) == before


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


def test_pixel_statistics_are_numpy_s_whatever_the_order(make_images, monkeypatch):
    images = make_images(30)
    ids = np.random.default_rng(1).permutation(30)[:22]
    mean, std = pixel_statistics(images, ids)
    pixels = images.read("images", ids).astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-12)
    assert pixel_statistics(images, ids[::-1]) == (mean, std)  # to the last bit


def test_pixel_statistics_of_many_images_are_summed_over_chunks(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9000, 1, 1, 2), np.uint8)
    labels = np.zeros(9000, np.int64)
    built = build_images(array_source("noise", "train", pixels, labels, "a"), tmp_path, 2048)
    mean, std = pixel_statistics(built, np.arange(9000))
    np.testing.assert_allclose([*mean, *std], [pixels.mean() / 255, pixels.std() / 255], rtol=1e-12)


def test_a_constant_channel_has_standard_deviation_1(tmp_path):
    pixels = np.zeros((4, 3, 2, 2), np.uint8)
    pixels[:, 1], pixels[:2, 2] = 51, 255
    built = build_images(array_source("flat", "train", pixels, np.zeros(4), "a"), tmp_path, 4)
    assert pixel_statistics(built, np.arange(4)) == ([0.0, 0.2, 0.5], [1.0, 1.0, 0.5])


def test_building_leaves_the_global_generators_alone(tmp_path):
    before = np.random.get_state()[1].copy()
    make_cache(tmp_path).read("values", np.arange(3))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert cache.FORMAT == 1
