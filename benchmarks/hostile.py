"""Hostile files and mutated studies for `faults`: what a downloaded cache, weight file or study may
hold.

A file that executes something makes the file `canary`.
"""

import json
import os
import pickle
import signal
import struct
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure

from kdlib.cache.info import describe, verify_cache
from kdlib.cache.shards import Cache
from kdlib.cartography.log import DynamicsLog
from kdlib.cartography.subset import Subset
from kdlib.explorer.example import detail_html
from kdlib.explorer.html import gallery_html
from kdlib.explorer.state import Explorer
from kdlib.models.networks import build_network
from kdlib.models.weights import load_weights
from kdlib.plots import theme
from kdlib.plots.datamaps import datamap
from kdlib.plots.images import region_grid
from kdlib.repro import files
from kdlib.repro.run import read_evidence
from kdlib.steps.cache import open_images
from kdlib.steps.datamap import open_datamap
from kdlib.study.base import StudyError
from kdlib.study.load import load_study
from kdlib.study.models import Model
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml
from kdlib.trainer.state import NAME, read_state

EVIL = '<img src=x onerror="alert(1)">|$x^{\\frac{</script>'
DEEP = 100_000
STUDENT = "runs/small/distill/student=tiny/strategy=random/fraction=0.33/objective=kd/seed=0"
SLOW_S = 5.0  # to load a mutated study


@dataclass(frozen=True)
class Case:
    """One hostile file.

    Attributes:
        before: The step before whose workspace it is put.
        paths: Glob pattern; the first file found is replaced. Empty: `make` gets the workspace.
        make: From the file's path and that of the canary.
        read: What reads it, given the workspace.
        harmless: What `read` returns when the file was taken as what it is, without harm.
    """

    name: str
    before: str
    paths: str
    make: Callable[[Path, Path], Any]
    read: Callable[[Path], Any]
    harmless: Any = "unharmed"


class _Touch:
    """Unpickled, it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = str(canary)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.canary,)


def _pickle(path: Path, canary: Path) -> None:
    path.write_bytes(pickle.dumps(_Touch(canary)))


def _object_npy(path: Path, canary: Path) -> None:
    with open(path, "wb") as file:
        np.save(file, np.array([_Touch(canary)] * 3, dtype=object), allow_pickle=True)


def _zipped_pickle(path: Path, canary: Path) -> None:
    """What `torch.save` writes."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": _Touch(canary)}))
        archive.writestr("archive/version", "3\n")


def _header_npy(header: str | bytes, version: bytes = b"\x01\x00", told: int | None = None) -> Any:
    """An .npy file with this header, which says that it has `told` bytes."""

    def make(path: Path, canary: Path) -> None:
        text = header.encode("latin1") if isinstance(header, str) else header
        size = struct.pack("<H" if version[0] == 1 else "<I", len(text) if told is None else told)
        path.write_bytes(b"\x93NUMPY" + version + size + text + bytes(64))

    return make


def _npy(shape: str) -> Any:
    return _header_npy(f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}\n")


def _text(text: str) -> Callable[[Path, Path], Any]:
    return lambda path, canary: path.write_text(text)


def _bytes(data: bytes) -> Callable[[Path, Path], Any]:
    return lambda path, canary: path.write_bytes(data)


def _changed_json(change: Callable[[Any], Any], seal: bool = True) -> Callable[[Path, Path], Any]:
    """The JSON that is there, changed and sealed again, as one who knows the format would."""

    def make(path: Path, canary: Path) -> None:
        content = json.loads(path.read_text())
        content.pop("seal", None)
        content = change(content) or content
        if seal:
            content["seal"] = files.fingerprint(content)
        path.write_text(json.dumps(content))

    return make


def _rename_file(name: str) -> Callable[[Path, Path], Any]:
    def change(index: dict) -> None:
        sums = index["shards"][0]["sha256"]
        sums[name] = sums.pop(sorted(sums)[0])

    return _changed_json(change)


def _header_entries(**entries: Any) -> Callable[[Path, Path], Any]:
    return _changed_json(lambda index: index["header"].update(entries))


def _link(target: str) -> Callable[[Path, Path], Any]:
    def make(path: Path, canary: Path) -> None:
        path.unlink()
        path.symlink_to(target)

    return make


def _safetensors(header: bytes, told: int | None = None) -> Callable[[Path, Path], Any]:
    size = len(header) if told is None else told
    return _bytes(struct.pack("<Q", size) + header + bytes(64))


def _pandas_metadata(path: Path, canary: Path) -> None:
    """A table whose metadata for pandas is nested beyond all measure."""
    metadata = {b"pandas": b"[" * DEEP + b"]" * DEEP, b"kdlib": b'{"content": {}, "sha256": ""}'}
    pq.write_table(pa.table({"example_id": [1]}).replace_schema_metadata(metadata), path)


def _kdlib_metadata(path: Path, canary: Path) -> None:
    metadata = {b"kdlib": b"[" * DEEP + b"]" * DEEP}
    pq.write_table(pa.table({"example_id": [1]}).replace_schema_metadata(metadata), path)


# Readers


def _study() -> Study:
    return load_study("params/small.yaml")


def _read_cache(home: Path) -> str:
    opened = Cache(next(home.glob("cache/*/train")))
    opened.resident("images")
    opened.verify()
    return "unharmed"


def _look(home: Path) -> str:
    """What `python -m kdlib cache info` and `cache verify` say of a hostile cache."""
    folder = next(home.glob("cache/*/train"))
    told = describe(folder)
    return told if verify_cache(folder) else "refused"


def _read_evidence(home: Path) -> str:
    read_evidence(home / STUDENT)
    return "unharmed"


def _read_log(home: Path) -> str:
    DynamicsLog.open(home / "runs/small/teacher/dynamics", verify=True)
    return "unharmed"


def _read_subset(home: Path) -> str:
    Subset.load(home / STUDENT / "subset.parquet")
    return "unharmed"


def _network() -> Any:
    model = Model(name="tiny_cnn", options={"width": 8})
    return build_network(model, n_classes=10, image_shape=(1, 8, 8), seed=0)


def _load(name: str) -> Callable[[Path], str]:
    def read(home: Path) -> str:
        load_weights(_network(), home / name)
        return "unharmed"

    return read


def _read_state(home: Path) -> str:
    read_state(home, {})
    return "unharmed"


def _read_study(home: Path) -> str:
    load_study(home / "params/hostile.yaml")
    return "unharmed"


def _study_file(text: str | bytes) -> Callable[[Path, Path], Any]:
    def make(home: Path, canary: Path) -> None:
        data = text.encode() if isinstance(text, str) else text
        (home / "params/hostile.yaml").write_bytes(data.replace(b"CANARY", str(canary).encode()))

    return make


def _nothing(path: Path, canary: Path) -> None:
    pass


def _in_html(home: Path) -> str:
    """Class names of a source as the explorer shows them."""
    state = Explorer(_study())
    state.names = [EVIL] * 10
    state.select(state.table.index[:20])
    shown = gallery_html(state) + detail_html(state, int(state.selected[0]))
    return "unharmed" if "<img src=x" not in shown and "</script>" not in shown else shown


def _in_figures(home: Path) -> str:
    """Class names of a source in figures: text, and no mathematics."""
    study = _study()
    images = open_images(study)
    table = open_datamap(study, images)
    with theme.style():
        figure = Figure(figsize=(theme.WIDE, 4.6))
        datamap(figure, table, EVIL, class_names=[EVIL] * 10)
        grid = Figure(figsize=(theme.WIDE, 3))
        pixels = images.train.read("images", images.train_ids[:2])
        region_grid(grid, {EVIL: pixels}, {EVIL: [EVIL, EVIL]})
        for name, drawn in (("map", figure), ("grid", grid)):
            theme.save_figure(drawn, home / "figures", name)
    return "unharmed"


def _in_names(home: Path) -> str:
    """A student's name, which stands in Markdown tables and names a folder."""
    content = parse_yaml((home / "params/small.yaml").read_text())
    content["students"][EVIL] = content["students"]["tiny"]
    (home / "params/hostile.yaml").write_text(yaml.safe_dump(content))
    return _read_study(home)


SHARD, INDEX = "cache/*/train/images-00000.npy", "cache/*/train/index.json"
EVIDENCE = f"{STUDENT}/evidence.json"
ARRAY = "runs/small/teacher/dynamics/loss.npy"
WEIGHTS = "runs/small/teacher/weights-*"
NESTED = "[" * DEEP + "]" * DEEP
LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 9)}]}}\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


def _cases() -> Iterable[Case]:
    for name, make in (
        ("a pickle", _pickle),
        ("an array of objects", _object_npy),
        ("an .npz", _zipped_pickle),
        ("a shape of 10**30", _npy(f"({10**30},)")),
        ("a shape below zero", _npy("(-1, -1)")),
        ("a header of 4 GB", _header_npy(b"{", b"\x02\x00", 2**32 - 1)),
        ("a header nested 5,000 deep", _header_npy("(" * 5000 + ")" * 5000)),
        ("a header of 9,000 signs", _header_npy("-" * 9000 + "1")),
        ("a header that calls", _header_npy("__import__('os').mkdir('canary')")),
    ):
        yield Case(f"{name} as a shard", "done", SHARD, make, _read_cache)
        yield Case(f"{name} as a dynamics array", "done", ARRAY, make, _read_log)
    for name in ("../../../params/small.yaml", "/etc/passwd", "images-00000.npy/../x.npy", "x\0y"):
        yield Case(f"an index that names {name!r}", "done", INDEX, _rename_file(name), _read_cache)
    for name, entries in (
        ("10**15 examples", {"n_examples": 10**15, "shard_size": 1}),
        ("shards of -1", {"shard_size": -1}),
        ("a shape of 10**15", {"columns": {"images": ["|u1", [10**15]]}}),
        ("objects", {"columns": {"images": ["|O", [1]]}}),
        ("numbers that are texts", {"n_examples": "1297"}),
        ("another kind of columns", {"columns": []}),
    ):
        make = _header_entries(**entries)
        yield Case(f"an index of {name}", "done", INDEX, make, _read_cache)
        yield Case(f"an index of {name}, looked at", "done", INDEX, make, _look, "refused")
    for name, text in (
        ("nested 100,000 deep", NESTED),
        ("of a list", "[]"),
        ("of null", "null"),
        ("of a number of 10,000 digits", "9" * 10_000),
        ("with every key twice", '{"header": {}, "header": {}, "seal": 1, "seal": 2}'),
    ):
        for what, before, where, read in (
            ("an index", "done", INDEX, _read_cache),
            ("evidence", "done", EVIDENCE, _read_evidence),
        ):
            yield Case(f"{what} {name}", before, where, _text(text), read)
    for what, where in (("a shard", SHARD), ("an index", INDEX)):
        yield Case(f"a link to a folder as {what}", "done", where, _link("/etc"), _read_cache)
        yield Case(f"a link to nothing as {what}", "done", where, _link("nowhere"), _read_cache)
    yield Case("a link to another shard", "done", SHARD, _link("images-00001.npy"), _read_cache)
    for name, make in (
        ("a pickle", _pickle),
        ("what torch.save writes", _zipped_pickle),
        ("a header of 2**60 bytes", _safetensors(b"{}", 2**60)),
        ("a header nested 10,000 deep", _safetensors(b"[" * 10_000 + b"]" * 10_000)),
        ("a tensor of 2**62 numbers", _safetensors(
            json.dumps({"w": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 64]}}).encode()
        )),
        ("tensors that overlap", _safetensors(json.dumps({
            name: {"dtype": "U8", "shape": [64], "data_offsets": [0, 64]} for name in "ab"
        }).encode())),
    ):  # fmt: skip
        for suffix in (".safetensors", ".pt"):
            read = _load(f"w{suffix}")
            yield Case(
                f"{name} as w{suffix}", "cache", "",
                lambda home, canary, make=make, suffix=suffix: make(home / f"w{suffix}", canary),
                read,
            )  # fmt: skip
        yield Case(
            f"{name} as a state", "cache", "",
            lambda home, canary, make=make: make(home / NAME, canary), _read_state,
        )  # fmt: skip
    table = f"{STUDENT}/subset.parquet"
    for name, make in (
        ("a pickle", _pickle),
        ("a footer of 2 GB", _bytes(b"PAR1" + bytes(100) + struct.pack("<I", 2**31 - 1) + b"PAR1")),
        ("nested metadata of pandas", _pandas_metadata),
        ("nested metadata of ours", _kdlib_metadata),
    ):
        yield Case(f"{name} as a table", "done", table, make, _read_subset)
    many = "\n".join(f"key{i}: {i}" for i in range(200_000))
    for name, text in (
        ("a tag that calls", "!!python/object/apply:os.mkdir [CANARY]"),
        ("a tag of an object", "data: !!python/object:kdlib.params.Study {}"),
        ("a tag of a module", "data: !!python/module:os"),
        ("a key given twice", "data: {}\ndata: {}\n"),
        ("a billion laughs", LAUGHS),
        ("a billion laughs, merged", MERGES),
        ("an alias of itself", "data: &d [*d]\nteacher: &t {model: *t}\n"),
        ("nested 100,000 deep", NESTED),
        ("200,000 keys", many),
        ("a key that is a list", "? [a, b]\n: 1\n"),
        ("a base of 10,000 letters", f"base: {'x' * 10_000}\n"),
        ("a base that is a folder", "base: /etc\n"),
        ("a base without end", "base: /dev/zero\n"),
        ("a base with a NUL", 'base: "x\\0y"\n'),
        ("a base that is itself", "base: hostile.yaml\n"),
        ("half a character", 'name2: "\\ud800"\n"\\ud800": 1\n'),
        ("bytes that are no text", b"\xff\xfe\x00data"),
        ("64 MB of text", b"# " + b"x" * 2**26),
    ):
        yield Case(f"a study of {name}", "cache", "", _study_file(text), _read_study)
    yield Case("script in class names, in HTML", "done", "", _nothing, _in_html)
    yield Case(
        "script and mathematics in class names, in figures", "done", "", _nothing, _in_figures
    )
    yield Case("script in a student's name", "cache", "", _nothing, _in_names)


CASES = list(_cases())


# Mutated study files

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 1e300, -1e300, 1e-300, float("inf"),
    float("-inf"), float("nan"), 0.5, 1.5, "", " ", "x", "1", "../../x", "/etc/passwd", "a\0b",
    "random", "full", "picked_x", "picked_../x", "cpu", "cuda", "1/0", "0/1", "é" * 50, "😀",
    "\ud800", "x" * 100_000, [], [None], [[]], [1, "a", None], {}, {"a": 1}, {1: 2}, {None: None},
    b"bytes", [0.33] * 1000, list(range(1000)), {f"k{i}": i for i in range(1000)}, "$x^{",
    "<script>",
)  # fmt: skip
TEXTS = (
    b"\x00", b"\xff", b"\t", b"*a", b"&a ", b"!!python/name:os.system ", b"? ", b"---\n", b"...\n",
    b"\xef\xbb\xbf", b"{", b"]", b'"', b"'", b": ", b"- ", b"<<: ", b"%YAML 9.9\n", b"\x85",
    b"2025-02-30", b"!!bool maybe", b"!!int x", b"!!set {a}", b"!!binary '='", b"1_000:61", b"0b2",
    b"!!timestamp x", b"!!float x", b"!!omap [a]", b"!!pairs [1]", b"=", b"~", b"#",
)  # fmt: skip


def _places(content: Any, above: tuple = ()) -> Iterable[tuple]:
    """Paths to every value of nested dictionaries and lists."""
    entries: Iterable[tuple[Any, Any]] = ()
    if isinstance(content, dict):
        entries = content.items()
    elif isinstance(content, list):
        entries = enumerate(content)
    for key, value in entries:
        yield (*above, key)
        yield from _places(value, (*above, key))


def _mutate_content(content: dict, rng: np.random.Generator) -> None:
    """Delete, replace, rename, repeat or nest one value."""
    places = list(_places(content))
    place = places[rng.integers(len(places))]
    holder = content
    for key in place[:-1]:
        holder = holder[key]
    key, how = place[-1], rng.integers(6)
    if how == 0:
        del holder[key]
    elif how in (1, 2):
        holder[key] = VALUES[rng.integers(len(VALUES))]
    elif how == 3 and isinstance(holder, dict):
        name, at = str(key), int(rng.integers(len(str(key))))
        holder[name[:at] + chr(97 + int(rng.integers(26))) + name[at + 1 :]] = holder.pop(key)
    elif how == 4:
        other = content
        for step in places[rng.integers(len(places))]:
            other = other[step]
        holder[key] = json.loads(json.dumps(other))
    else:
        value = holder[key]
        for _ in range(int(rng.choice([1, 3, 30, 200]))):
            value = [value] if rng.integers(2) else {"a": value}
        holder[key] = value


def mutant(number: int, seed: int) -> bytes:
    """A study file in which one to four things are changed: values, or bytes of the text."""
    rng = np.random.default_rng([seed, number])
    studies = sorted((Path(__file__).parents[1] / "params").glob("*.yaml"))
    path = studies[rng.integers(len(studies))]
    if rng.integers(2):
        content = parse_yaml(path.read_text())
        for _ in range(rng.integers(1, 4)):
            if content:
                _mutate_content(content, rng)
        try:
            text = yaml.safe_dump(content, allow_unicode=bool(rng.integers(2)))
        except (yaml.YAMLError, RecursionError):
            text = json.dumps(content, default=str)
        return text.encode("utf-8", errors="surrogatepass")
    data = bytearray(path.read_bytes())
    for _ in range(rng.integers(1, 5)):
        at, how = int(rng.integers(len(data))), rng.integers(4)
        if how == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif how == 1:
            del data[at : at + int(rng.integers(1, 40))]
        elif how == 2:
            data[at:at] = TEXTS[rng.integers(len(TEXTS))]
        else:
            end = at + int(rng.integers(1, 200))
            data[at:at] = data[at:end]
    return bytes(data)


class _TooSlow(BaseException):
    """Loading took too long."""


def load_mutants(numbers: Iterable[int], seed: int, folder: Path) -> list[list]:
    """[number, `refused` | `valid` | `wrong`, what was said] of some mutants."""

    def too_slow(*_: Any) -> None:
        raise _TooSlow(f"more than {SLOW_S} s")

    signal.signal(signal.SIGALRM, too_slow)
    os.environ["KDLIB_HOME"] = str(folder)
    there = folder / "mutants"
    there.mkdir(exist_ok=True)
    for path in (Path(__file__).parents[1] / "params").glob("*.yaml"):
        (there / path.name).write_bytes(path.read_bytes())
    found = []
    for number in numbers:
        path = there / "mutant.yaml"
        path.write_bytes(mutant(number, seed))
        signal.setitimer(signal.ITIMER_REAL, SLOW_S)
        try:
            study = load_study(path)
            study.step_settings("compare")
            how, told = "valid", ""
        except StudyError as error:
            told = str(error)
            one = str(path) in told and 0 < len(told) < 5000 and "Traceback" not in told
            how = "refused" if one else "wrong"
        except BaseException as error:
            how, told = "wrong", f"{type(error).__name__}: {error}"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        found.append([number, how, told[:500]])
    return found
