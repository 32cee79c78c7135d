"""`kdlib.cache.index`: an index is read as it was written, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cache.numbers import N, content, make, make_cache
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlib.cache import index
from kdlib.cache.build import repair
from kdlib.cache.index import FORMAT, CacheError, part_range
from kdlib.cache.shards import Cache
from kdlib.repro import files


def sealed(index: dict) -> str:
    """The text of an index whose content was changed together with its seal."""
    content = {key: value for key, value in index.items() if key != "seal"}
    return json.dumps(content | {"seal": files.fingerprint(content)})


@pytest.fixture
def half(tmp_path: Path) -> Cache:
    """The second half of a cache: shards 2 and 3, examples 10 to 16."""
    make_cache(tmp_path, part=(2, 2))
    return Cache(tmp_path)


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
    with pytest.raises(CacheError, match=r"made of something else .*nested\.a: "):
        Cache(half.folder)


def test_indexes_that_differ_on_a_shard_are_refused(half):
    make_cache(half.folder, part=(2, 3))  # shard 1
    path = half.folder / "index-00002-00004.json"
    overlapping = json.loads(path.read_text())
    first = json.loads((half.folder / "index-00001-00002.json").read_text())["shards"][0]
    overlapping["shards"].insert(0, first | {"sha256": dict.fromkeys(first["sha256"], "0" * 64)})
    (half.folder / "index-00001-00004.json").write_text(sealed(overlapping))
    with pytest.raises(CacheError, match="differ on shard 1; delete "):
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
    with pytest.raises(
        CacheError, match=r"index\.json is not valid JSON.*delete .*cache, then run `"
    ):
        Cache(folder)


@pytest.mark.parametrize("text", ["[]", "3", "null", '{"header": null}'])
def test_json_that_is_no_index_is_refused(folder, text):
    (folder / "index.json").write_text(text)
    with pytest.raises(CacheError, match=r"has format None|expected an object"):
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


def test_a_sealed_index_cannot_ask_for_memory_that_no_shard_needs(folder):
    index = json.loads((folder / "index.json").read_text())
    index["header"]["columns"]["values"] = ["<i4", [10**13]]
    (folder / "index.json").write_text(json.dumps(files.sealed(index)))
    cache = Cache(folder)
    for read in (lambda: cache.read("values", np.arange(3)), lambda: cache.resident("values")):
        with pytest.raises(CacheError, match=r"values-00000\.npy holds <i4 .*expected"):
            read()
