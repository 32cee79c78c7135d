"""`kdlib.cache.shards`: every row comes back, a part is a smaller cache, and nothing damaged is
read."""

import builtins
import io
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

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
)
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache import shards as shards_module
from kdlib.cache.build import build_shards, repair
from kdlib.cache.index import FORMAT, CacheError
from kdlib.cache.shards import Cache
from kdlib.repro import files


def sealed(index: dict) -> str:
    """The text of an index whose content was changed together with its seal."""
    content = {key: value for key, value in index.items() if key != "seal"}
    return json.dumps(content | {"seal": files.fingerprint(content)})


# --- reading ---------------------------------------------------------------------------------


def test_every_row_comes_back_over_uneven_shards(pristine):
    opened = Cache(pristine)
    assert opened.n_examples == N
    for i in range(N):
        np.testing.assert_array_equal(
            opened.read("values", np.array([i])), make((i, i + 1))["values"]
        )
        assert opened.read("labels", np.array([i])) == [i]
    assert [len(opened.mapped("labels", s)) for s in range(4)] == [5, 5, 5, 2]
    assert sorted(content(pristine)) == [
        "index.json",
        *(f"labels-{s:05d}.npy" for s in range(4)),
        *(f"values-{s:05d}.npy" for s in range(4)),
    ]


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), shard_size=st.integers(1, 12), data=st.data())
def test_any_ids_are_read_in_the_order_given(tmp_path_factory, n, shard_size, data):
    folder = tmp_path_factory.mktemp("cache")
    built = make_cache(folder, n=n, shard_size=shard_size)
    ids = np.array(data.draw(st.lists(st.integers(0, n - 1), max_size=2 * n)), np.int64)
    expected = make((0, n))
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


def test_rows_are_copies_and_writing_into_a_mapped_shard_changes_no_file(folder):
    before, opened = content(folder), Cache(folder)
    opened.read("values", np.arange(N))[:] = 0
    opened.resident("values")[:] = 0
    np.testing.assert_array_equal(opened.read("values", np.arange(N)), make((0, N))["values"])
    mapped = opened.mapped("values", 0)
    mapped.zero_()
    assert opened.mapped("values", 0).sum() == 0  # a private copy, as long as it is mapped
    assert content(folder) == before
    np.testing.assert_array_equal(Cache(folder).mapped("values", 0), make((0, SIZE))["values"])


def test_a_mapped_shard_holds_no_file_descriptor(pristine):
    opened = Cache(pristine)
    before = len(os.listdir("/proc/self/fd"))
    held = [opened.mapped(column, shard) for column in COLUMNS for shard in range(4)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert [len(rows) for rows in held] == 2 * [5, 5, 5, 2]


def test_so_many_shards_are_mapped_at_a_time_and_no_more(pristine, monkeypatch):
    monkeypatch.setattr(shards_module, "_MOST_MAPS", 2)
    opened = Cache(pristine)
    held = opened.mapped("values", 0)
    for _ in range(2):
        rows = opened.read("values", np.arange(N)[::-1])
        np.testing.assert_array_equal(rows, make((0, N))["values"][::-1])
        assert len(opened._maps) == 2
    np.testing.assert_array_equal(held, make((0, SIZE))["values"])  # still mapped: it is held here


def test_columns_of_one_dtype_and_two_shapes_are_told_apart(tmp_path):
    columns = {"wide": ("<f4", (6,)), "narrow": ("<f4", (2,))}

    def rows(span):
        n = span[1] - span[0]
        return {c: np.full((n, *shape), n, dtype) for c, (dtype, shape) in columns.items()}

    opened = build_shards(tmp_path, HEADER, columns, rows, n_examples=4, shard_size=2)
    assert [opened.mapped(c, s).shape for c in columns for s in (0, 1)] == 2 * [(2, 6)] + 2 * [
        (2, 2)
    ]
    narrow = (tmp_path / "narrow-00000.npy").read_bytes()
    (tmp_path / "wide-00000.npy").write_bytes(narrow + bytes(2 * 4 * 4))  # as long as a wide one
    with pytest.raises(CacheError, match=r"holds <f4 \(2, 2\); expected <f4 \(2, 6\)"):
        Cache(tmp_path).check(["narrow", "wide"], [0])


@pytest.mark.parametrize("ids", [[0.0], [True, False], ["1"]])
def test_ids_that_are_no_integers_are_refused(pristine, ids):
    with pytest.raises(TypeError, match="expected integers"):
        Cache(pristine).read("values", np.array(ids))


def file_looks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many files and folders opening a cache opens, lists or asks the state of."""
    looks = 0

    def counted(function: Callable) -> Callable:
        def counting(*args, **options):
            nonlocal looks
            looks += 1
            return function(*args, **options)

        return counting

    with monkeypatch.context() as patched:
        for owner, name in (
            *((os, name) for name in ("stat", "lstat", "open", "listdir", "scandir")),
            (io, "open"),
            (builtins, "open"),
        ):
            patched.setattr(owner, name, counted(getattr(owner, name)))
        Cache(folder)
    return looks


def test_opening_looks_at_no_shard_file_however_many_there_are(tmp_path, monkeypatch):
    looks = []
    for n_shards in (2, 400):
        folder = tmp_path / str(n_shards)
        folder.mkdir()
        header = {"format": FORMAT, "n_examples": n_shards, "shard_size": 1}
        header["columns"] = {"labels": ["<i8", []]}
        names = [f"labels-{s:05d}.npy" for s in range(n_shards)]
        shards = [{"first_id": s, "n": 1, "sha256": {names[s]: "0"}} for s in range(n_shards)]
        (folder / "index.json").write_text(sealed({"header": header, "shards": shards}))
        for name in names:
            (folder / name).touch()
        looks.append(file_looks(folder, monkeypatch))
    assert looks[0] == looks[1]
    assert 3 <= looks[0] <= 10


def test_a_typo_in_a_column_gives_the_nearest(pristine):
    with pytest.raises(CacheError, match="no column 'value'; did you mean 'values'"):
        Cache(pristine).mapped("value", 0)


def test_the_fingerprint_covers_all_that_determines_the_bytes(pristine, tmp_path):
    same = make_cache(tmp_path / "same")
    others = [
        make_cache(tmp_path / "a", nested={"a": 2}),
        make_cache(tmp_path / "b", n=N - 1),
        make_cache(tmp_path / "c", shard_size=SIZE + 1),
    ]
    assert same.fingerprint == Cache(pristine).fingerprint
    assert content(same.folder) == content(pristine)
    assert len({c.fingerprint for c in (same, *others)}) == 4


# --- parts -----------------------------------------------------------------------------------


@pytest.fixture
def half(tmp_path: Path) -> Cache:
    """The second half of a cache: shards 2 and 3, examples 10 to 16."""
    make_cache(tmp_path, part=(2, 2))
    return Cache(tmp_path)


def test_a_part_of_a_cache_says_what_is_there_and_what_is_missing(half, pristine):
    assert not half.whole
    assert half.missing == [0, 1]
    assert half.shards.tolist() == [2, 3]
    assert half.n_examples == N
    np.testing.assert_array_equal(half.example_ids, np.arange(10, N))
    whole = Cache(pristine)
    assert (whole.whole, whole.missing) == (True, [])
    np.testing.assert_array_equal(whole.example_ids, np.arange(N))


def test_rows_of_a_part_are_those_of_the_whole(half, pristine):
    ids = np.array([16, 10, 14, 10])
    for column in COLUMNS:
        np.testing.assert_array_equal(half.read(column, ids), Cache(pristine).read(column, ids))
        here = half.resident(column)
        assert len(here) == 7
        np.testing.assert_array_equal(here[half.positions(ids)], half.read(column, ids))
    np.testing.assert_array_equal(half.positions(half.example_ids), np.arange(7))
    np.testing.assert_array_equal(Cache(pristine).positions(ids), ids)
    half.verify()


def test_positions_skip_the_shards_between_two_parts(tmp_path):
    for part in ((1, 4), (4, 4)):
        make_cache(tmp_path, part=part)
    opened = Cache(tmp_path)
    assert opened.missing == [1, 2]
    np.testing.assert_array_equal(opened.positions(np.array([0, 4, 15, 16])), [0, 4, 5, 6])
    np.testing.assert_array_equal(opened.resident("labels"), [0, 1, 2, 3, 4, 15, 16])


def test_ids_that_are_not_built_yet_are_refused_by_their_shards(half):
    for use in (half.positions, lambda ids: half.read("values", ids)):
        with pytest.raises(IndexError, match="is partial: shards 0, 1 are not built yet; build"):
            use(np.array([12, 9, 3]))
        with pytest.raises(IndexError, match="shards 1 are not built"):
            use(np.array([12, 9]))
        with pytest.raises(IndexError, match=rf"which has ids \[0, {N}\)"):
            use(np.array([12, N]))


def test_a_part_has_a_fingerprint_of_its_own_whoever_else_arrives(tmp_path, pristine):
    make_cache(tmp_path, part=(1, 2))
    alone, as_part = Cache(tmp_path), Cache(tmp_path, part=(1, 2))
    make_cache(tmp_path, part=(2, 2))
    beside, other, both = (Cache(tmp_path, part=part) for part in ((1, 2), (2, 2), None))
    assert alone.fingerprint == as_part.fingerprint == beside.fingerprint
    assert both.fingerprint == Cache(tmp_path, part=(1, 1)).fingerprint
    assert both.fingerprint == Cache(pristine).fingerprint
    assert len({beside.fingerprint, other.fingerprint, both.fingerprint}) == 3
    assert Cache(pristine, part=(1, 2)).fingerprint == alone.fingerprint


def test_a_part_of_a_whole_cache_opens_without_the_rest(pristine):
    quarter = Cache(pristine, part=(3, 4))
    assert quarter.shards.tolist() == [2]
    with pytest.raises(IndexError, match="is partial"):
        quarter.read("labels", np.array([0]))


def test_a_part_that_is_not_built_is_refused_with_the_command_that_builds_it(half):
    with pytest.raises(
        CacheError,
        match=r"not all of part 1/2: 0, 1 of its shards \[0, 2\) are missing; .*--part 1/2`",
    ):
        Cache(half.folder, part=(1, 2))
    with pytest.raises(CacheError, match=r"part 2/3: 1 of its shards \[1, 2\) are missing"):
        Cache(half.folder, part=(2, 3))


@pytest.mark.parametrize("part", [(0, 2), (3, 2), (1, 5), (-1, 4)])
def test_a_part_out_of_range_is_refused(pristine, part):
    with pytest.raises(ValueError, match=rf"part {part[0]}/{part[1]} of 4 shards; expected i/k"):
        Cache(pristine, part=part)


# --- damage ----------------------------------------------------------------------------------


def test_a_missing_cache_names_the_remedy(tmp_path):
    remedy = r"no cache \(index.json is missing\); run `python -m kdlib cache build STUDY`"
    with pytest.raises(CacheError, match=remedy):
        Cache(tmp_path / "nowhere")


def test_a_missing_shard_is_refused_at_opening(folder):
    (folder / "labels-00002.npy").unlink()
    with pytest.raises(
        CacheError, match=r"labels-00002\.npy is missing; run `python -m kdlib cache verify --rep"
    ):
        Cache(folder)


LOOKS = {  # all the ways to read shard 1 of the labels
    "mapped": lambda cache: cache.mapped("labels", 1),
    "read": lambda cache: cache.read("labels", np.array([SIZE])),
    "resident": lambda cache: cache.resident("labels"),
    "check": lambda cache: cache.check(["values", "labels"], [0, 1]),
}


def assert_refused(folder: Path, message: str) -> None:
    """Every look at shard 1 of the labels raises, and a look at another one does not."""
    for look in LOOKS.values():
        with pytest.raises(CacheError, match=message):
            look(Cache(folder))
    assert len(Cache(folder).mapped("labels", 0)) == SIZE


def test_a_shard_that_goes_missing_after_opening_is_named(folder):
    opened = Cache(folder)
    (folder / "labels-00001.npy").unlink()
    for look in LOOKS.values():
        with pytest.raises(CacheError, match=r"labels-00001\.npy is missing; run"):
            look(opened)


@settings(max_examples=60, deadline=None)
@given(keep=st.integers(0, 128 + 40 - 1))
def test_a_cut_shard_is_refused_wherever_it_is_cut(tmp_path_factory, pristine, keep):
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("cut") / "cache"))
    path = folder / "labels-00001.npy"  # 128 bytes of header, 5 * 8 of labels
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(folder, r"labels-00001\.npy is cut or damaged")


def test_a_shard_with_bytes_behind_its_end_is_refused(folder):
    with open(folder / "labels-00001.npy", "ab") as file:
        file.write(b"\0")
    assert_refused(folder, r"labels-00001\.npy is cut or damaged")


@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 128 + 40 - 1), value=st.integers(0, 255))
def test_a_changed_byte_is_found_by_verify(tmp_path_factory, pristine, place, value):
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
    "shorter header": (b"\x93NUMPY\x01\x00\x76", b"\x93NUMPY\x01\x00\x75"),
}


@pytest.mark.parametrize("change", HEADER_CHANGES)
def test_a_header_numpy_cannot_parse_is_refused(folder, change):
    path = folder / "labels-00001.npy"
    old, new = HEADER_CHANGES[change]
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    assert_refused(folder, r"labels-00001\.npy is cut or damaged")


@pytest.mark.parametrize(
    "array",
    [np.zeros(5, "<i4"), np.zeros(5, ">i8"), np.zeros((5, 1), "<i8"), np.zeros(6, "<i8")],
    ids=lambda a: f"{a.dtype.str} {a.shape}",
)
def test_a_shard_of_another_dtype_or_shape_is_refused(folder, array):
    np.save(folder / "labels-00001.npy", array)
    assert_refused(folder, r"expected <i8 \(5,\)")


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
    np.load(folder / "labels-00001.npy", allow_pickle=True)
    assert (tmp_path / "executed").exists()  # the trap works
    (tmp_path / "executed").unlink()
    assert_refused(folder, r"labels-00001\.npy is cut or damaged")
    with pytest.raises(CacheError, match=r"labels-00001\.npy differ from"):
        Cache(folder).verify()
    repair(folder)
    make_cache(folder).verify()
    assert not (tmp_path / "executed").exists()


def test_verify_names_every_damaged_file_and_no_other(folder):
    for name in ("labels-00003.npy", "values-00001.npy"):
        damaged = bytearray((folder / name).read_bytes())
        damaged[-1] ^= 1
        (folder / name).write_bytes(damaged)
    opened = Cache(folder)
    with pytest.raises(CacheError, match=r"values-00001\.npy, labels-00003\.npy differ from"):
        opened.verify()
    (folder / "labels-00000.npy").unlink()
    with pytest.raises(CacheError, match=r": labels-00000\.npy, values-00001\.npy"):
        opened.verify()


@pytest.mark.parametrize("header", ["(" * 5000 + ")" * 5000, "-" * 9000 + "1", f"({10**30},)"])
def test_a_shard_with_a_hostile_header_is_refused(folder, header):
    if header.endswith(",)"):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {header}}}"
    text = header.encode().ljust(128)
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    (folder / "labels-00001.npy").write_bytes(data)
    assert_refused(folder, r"labels-00001\.npy is cut or damaged")


def test_a_shard_that_is_cut_while_it_is_open_is_named_and_not_read(folder):
    opened = Cache(folder)
    assert opened.read("values", np.arange(3)).sum() == make((0, 3))["values"].sum()
    path = folder / "values-00000.npy"
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 60)
    with pytest.raises(CacheError, match=r"values-00000\.npy was cut to 188 of 248 .*--repair"):
        opened.mapped("values", 0)
    with pytest.raises(CacheError, match=r"values-00000\.npy is cut or damaged"):
        opened.read("values", np.arange(3))
    path.write_bytes(whole)
    assert opened.read("values", np.arange(3)).sum() == make((0, 3))["values"].sum()
    path.unlink()  # what is mapped stays
    assert len(opened.mapped("values", 0)) == SIZE
