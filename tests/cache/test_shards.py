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
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache import index
from kdlib.cache import shards as shards_module
from kdlib.cache.build import build_images, build_shards, repair
from kdlib.cache.index import FORMAT, CacheError, part_range
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source
from kdlib.dataset.pixels import pixel_statistics
from kdlib.repro import files

N, SIZE = 17, 5  # four shards: 5, 5, 5, 2
COLUMNS = {"values": ("<i4", (2, 3)), "labels": ("<i8", ())}
HEADER = {"kind": "numbers", "nested": {"a": 1}}


def make(span: tuple[int, int]) -> dict[str, np.ndarray]:
    """Rows that say which example they belong to: 6 * id + place."""
    ids = np.arange(*span)
    values = 6 * ids[:, None] + np.arange(6)
    return {"values": values.reshape(-1, 2, 3).astype("<i4"), "labels": ids}


def make_cache(
    folder: Path,
    function: Callable = make,
    n: int = N,
    shard_size: int = SIZE,
    part: tuple[int, int] = (1, 1),
    **changes,
) -> Cache:
    header = HEADER | changes
    return build_shards(
        folder, header, COLUMNS, function, n_examples=n, shard_size=shard_size, part=part
    )


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a cache but the locks, and its bytes."""
    paths = (p for p in sorted(folder.iterdir()) if not p.name.startswith(".lock"))
    return {path.name: path.read_bytes() for path in paths}


def sealed(index: dict) -> str:
    """The text of an index whose content was changed together with its seal."""
    content = {key: value for key, value in index.items() if key != "seal"}
    return json.dumps(content | {"seal": files.fingerprint(content)})


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


@given(n_shards=st.integers(1, 50), data=st.data())
def test_the_parts_of_a_cache_are_even_runs_that_leave_no_gap(n_shards, data):
    k = data.draw(st.integers(1, n_shards))
    ranges = [part_range(n_shards, (i, k)) for i in range(1, k + 1)]
    assert [first for first, _ in ranges] + [n_shards] == [0] + [stop for _, stop in ranges]
    sizes = [stop - first for first, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


def test_indexes_of_two_caches_in_one_folder_are_refused(half, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    make_cache(other, part=(1, 2), nested={"a": 2})
    for path in other.iterdir():
        shutil.copy(path, half.folder)
    with pytest.raises(CacheError, match=r"of another cache than the other parts \(nested\.a: "):
        Cache(half.folder)


def test_indexes_that_differ_on_a_shard_are_refused(half):
    make_cache(half.folder, part=(2, 3))  # shard 1
    path = half.folder / "index-00002-00004.json"
    overlapping = json.loads(path.read_text())
    first = json.loads((half.folder / "index-00001-00002.json").read_text())["shards"][0]
    overlapping["shards"].insert(0, first | {"sha256": dict.fromkeys(first["sha256"], "0" * 64)})
    (half.folder / "index-00001-00004.json").write_text(sealed(overlapping))
    with pytest.raises(CacheError, match="differ on shard 1; do not trust"):
        Cache(half.folder)


def test_an_index_that_a_builder_replaces_while_it_is_read_is_no_error(half, monkeypatch):
    read, replaced = index.read_index, []

    def replacing(path):
        if not replaced:  # between the list of names and the first look at one of them
            replaced.append(True)
            make_cache(half.folder)
        return read(path)

    monkeypatch.setattr(index, "read_index", replacing)
    assert Cache(half.folder).whole


# --- damage ----------------------------------------------------------------------------------


def test_a_missing_cache_names_the_remedy(tmp_path):
    remedy = r"no cache \(index.json is missing\); run notebooks/01_cache.*cache build STUDY`"
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


def edit_index(folder: Path, change: Callable[[dict], object]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(files.sealed(index)))


def rename_file(index: dict, name: str) -> None:
    sums = index["shards"][0]["sha256"]
    sums[name] = sums.pop("values-00000.npy")


INDEX_CHANGES = {
    "future format": (lambda i: i["header"].update(format=FORMAT + 1), "has format 2; this kdlib"),
    "no format": (lambda i: i["header"].pop("format"), "has format None"),
    "no header": (lambda i: i.pop("header"), "has format None"),
    "odd header": (lambda i: i.update(header=[1]), "has format None"),
    "up": (lambda i: rename_file(i, "../labels-00000.npy"), "shard 0 has other files"),
    "absolute": (lambda i: rename_file(i, "/etc/passwd"), "shard 0 has other files"),
    "newline": (lambda i: rename_file(i, "values-00000.npy\n"), "shard 0 has other files"),
    "other file": (
        lambda i: rename_file(i, "others-00000.npy"),
        "shard 0 has other files",
    ),
    "column up": (
        lambda i: i["header"]["columns"].update({"../x/values": ["<i4", [2, 3]]}),
        "column '../x/values' has rows of",
    ),
    "odd dtype": (
        lambda i: i["header"]["columns"].update(values=["<i5", [2, 3]]),
        r"is no index of a cache \(TypeError",
    ),
    "two dtypes": (
        lambda i: i["header"]["columns"].update(values=[",i4", [2, 3]]),  # NumPy: SyntaxError
        "has rows of ,i4",
    ),
    "objects": (
        lambda i: i["header"]["columns"].update(values=["|O", [2, 3]]),
        r"has rows of \|O",
    ),
    "odd shape": (
        lambda i: i["header"]["columns"].update(values=["<i4", [2, -3]]),
        r"rows of <i4 \[2, -3\]",
    ),
    "listed columns": (
        lambda i: i["header"].update(columns=["values", "labels"]),
        "is no index of a cache",
    ),
    "no sums": (lambda i: i["shards"][1].update(sha256={}), "shard 1 has other files"),
    "fewer shards": (
        lambda i: i["shards"].pop(),
        r"3 shards for the part \[0, 4\) of 4",
    ),
    "more examples": (
        lambda i: i["header"].update(n_examples=18),
        "shard 3 has other files or examples",
    ),
    "moved": (lambda i: i["shards"][1].update(first_id=0), "shard 1 has other files or examples"),
    "no shards": (lambda i: i.pop("shards"), r"is no index of a cache \(KeyError\('shards'\)\)"),
    "very many shards": (  # and never listed
        lambda i: i["header"].update(n_examples=10**15, shard_size=1),
        r"4 shards for the part \[0, 1000000000000000\)",
    ),
    "size 0": (lambda i: i["header"].update(shard_size=0), "is no index of a cache"),
    "odd size": (lambda i: i["header"].update(shard_size="5"), "is no index of a cache"),
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


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_an_index_is_detected_or_harmless(tmp_path_factory, pristine, data):
    folder = tmp_path_factory.mktemp("flip")
    for part in ((1, 2), (2, 2)):
        make_cache(folder, part=part)
    path = folder / data.draw(st.sampled_from(["index-00000-00002.json", "index-00002-00004.json"]))
    text = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(text) - 1), label="place")
    text[place] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    path.write_bytes(text)
    try:
        opened = Cache(folder)
        opened.verify()
    except CacheError:
        return
    assert opened.fingerprint == Cache(pristine).fingerprint
    np.testing.assert_array_equal(opened.read("values", np.arange(N)), make((0, N))["values"])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_of_an_index_is_found_when_it_is_opened(tmp_path_factory, pristine, data):
    folder = Path(shutil.copytree(pristine, tmp_path_factory.mktemp("flip") / "cache"))
    text = bytearray((folder / "index.json").read_bytes())
    text[data.draw(st.integers(0, len(text) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "index.json").write_bytes(text)
    try:
        opened = Cache(folder)
    except CacheError:
        return
    assert opened.fingerprint == Cache(pristine).fingerprint  # white space, at most
    assert opened.entries == Cache(pristine).entries


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
    opened = Cache(folder)
    assert opened.damaged() == opened.damaged(1) == ["values-00001.npy", "labels-00003.npy"]
    with pytest.raises(CacheError, match=r"values-00001\.npy, labels-00003\.npy differ from"):
        opened.verify()
    (folder / "labels-00000.npy").unlink()
    assert opened.damaged()[0] == "labels-00000.npy"


# --- images ----------------------------------------------------------------------------------


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


def test_a_sealed_index_cannot_ask_for_memory_that_no_shard_needs(folder):
    index = json.loads((folder / "index.json").read_text())
    index["header"]["columns"]["values"] = ["<i4", [10**13]]
    (folder / "index.json").write_text(json.dumps(files.sealed(index)))
    cache = Cache(folder)
    for read in (lambda: cache.read("values", np.arange(3)), lambda: cache.resident("values")):
        with pytest.raises(CacheError, match=r"values-00000\.npy holds <i4 .*expected"):
            read()


@pytest.mark.parametrize("header", ["(" * 5000 + ")" * 5000, "-" * 9000 + "1", f"({10**30},)"])
def test_a_shard_with_a_hostile_header_is_refused(folder, header):
    if header.endswith(",)"):
        header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {header}}}"
    text = header.encode().ljust(128)
    data = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    (folder / "labels-00001.npy").write_bytes(data)
    assert_refused(folder, r"labels-00001\.npy is cut or damaged")
