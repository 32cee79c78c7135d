"""A study's evidence, tables, settings, subsets and datamap as one file, and back.

A pack is a zip file with a manifest: the study, and of each file its sha256 and its bytes. What is
unpacked is data: settings (.yaml), evidence (.json), tables (.parquet), figures (.png) and, where
they were asked for, weights (.safetensors), at the places where a workspace has them. Everything is
checked before the first byte is written. Images, stored outputs and code are not packed.
"""

import hashlib
import json
import logging
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kdlib.compare.committed import NAMES, committed_folder
from kdlib.repro import files
from kdlib.repro.commands import run_to_make
from kdlib.steps.display import FIGURES
from kdlib.steps.done import sources
from kdlib.study.base import NAME
from kdlib.study.load import read_content, study_file
from kdlib.study.selections import PICKED
from kdlib.study.study import Study
from kdlib.study.yaml_text import parse_yaml

FORMAT, MANIFEST = 1, "manifest.json"
RECORDS, WEIGHTS = (".json", ".parquet"), ".safetensors"
DEFLATED = (".json", ".yaml")  # the others are compressed already
MOST_BYTES, MOST_FILES = 4 * 10**9, 100_000  # that are unpacked unless more is allowed
MOST_MANIFEST = 64 * 10**6
CHUNK = 2**20
# a part of a path: a name, or `axis=value`; none begins with a dot
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.=+-]*"
_PLACES = (
    rf"params/(?:{_PART}/)*{_PART}\.yaml",
    rf"figures/(?P<figures>{NAME})/(?:tables/(?:{_PART}/)?{_PART}\.parquet|{_PART}\.png)",
    rf"runs/(?P<runs>{NAME})/(?:{_PART}/)+{_PART}\.(?:json|parquet|safetensors)",
)
_ALLOWED = re.compile("|".join(_PLACES), re.ASCII)
_HUB = re.compile(
    r"hf://(?:(?P<kind>datasets|spaces)/)?(?P<repository>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<revision>[\w./-]+?))?/(?P<file>.+)",
    re.ASCII,
)


class PackError(ValueError):
    """A file that is no pack, or one that is not what its manifest says."""


def pack(study: Study, file: Path, target: Path, weights: bool = False) -> dict[str, Any]:
    """Write a pack; the same files give the same bytes.

    Args:
        file: The study file, in `params/` of the workspace.
        target: The zip file to write.
        weights: Also pack the weights of teacher and students.

    Returns: Its manifest.
    Raises: FileNotFoundError where committed tables or evidence of the study are missing;
        ValueError for a study file elsewhere.
    """
    home, manifest = files.workspace(), {"format": FORMAT, "study": study.name}
    found = {
        str(path.relative_to(home)): path
        for path in (*_settings(file), *_tables(study), *_records(study, weights))
    }
    manifest["studies"] = sorted({study.name, study.upstream.name})
    manifest["file"] = str(Path(file).relative_to(home))
    manifest["weights"] = weights
    manifest["files"] = {
        name: {"sha256": files.sha256_file(path), "bytes": path.stat().st_size}
        for name, path in sorted(found.items())
    }
    for name in manifest["files"]:
        _demand_place(name, manifest["studies"])

    def write(out: Any) -> None:
        with zipfile.ZipFile(out, "w") as archive:
            text = files.canonical_json(manifest).encode()
            archive.writestr(_entry(MANIFEST), text)
            for name, path in sorted(found.items()):
                archive.writestr(_entry(name), path.read_bytes())

    files.write_atomic(Path(target), write)
    return manifest


def _entry(name: str) -> zipfile.ZipInfo:
    """An entry without the time, owner and system of this machine."""
    entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
    deflated = Path(name).suffix in DEFLATED
    entry.compress_type = zipfile.ZIP_DEFLATED if deflated else zipfile.ZIP_STORED
    entry.create_system, entry.external_attr = 3, 0o644 << 16
    return entry


def _settings(file: Path) -> list[Path]:
    """The study file, and those that it builds on or shares with."""
    home, found, open_files = files.workspace(), [], [Path(file)]
    while open_files:
        path = open_files.pop()
        if not path.is_relative_to(home / "params"):
            raise ValueError(
                f"{path} is not in {home / 'params'}; expected a study file of the workspace"
            )
        content = parse_yaml(path.read_text(encoding="utf-8"))
        found.append(path)
        named = [str(content[key]) for key in ("base",) if content.get(key)]
        shares = read_content(path, ()).get("shares")
        named += [str(shares)] if shares else []
        for name in named:
            near = study_file(path.parent / name if (path.parent / name).is_file() else name)
            open_files += [near] if near not in found else []
    return found


def _tables(study: Study) -> list[Path]:
    """Committed tables, and the figures of other steps than the comparison."""
    found = [committed_folder(study) / f"{name}.parquet" for name in NAMES]
    for path in found:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}; {run_to_make(path)}")
    names = [n for step, names in FIGURES.items() if step != "compare" for n in names]
    pictures = [study.figures / f"{name}.png" for name in (*names, "audit")]
    of_steps = sorted(committed_folder(study).glob("*/*.parquet"))
    return [*found, *of_steps, *(path for path in pictures if path.is_file())]


def _records(study: Study, weights: bool) -> Iterable[Path]:
    """Settings, evidence and tables of every run that the comparison is made of."""
    kinds, found = (*RECORDS, *([WEIGHTS] if weights else [])), []
    for folder in sources(study, "compare"):
        if not (folder / "evidence.json").is_file():
            raise FileNotFoundError(f"{folder} holds no finished run; {run_to_make(folder)}")
        found += [path for path in folder.iterdir() if path.suffix in kinds and path.is_file()]
    picked = [s for s in study.axes.strategy if s.startswith(PICKED)]
    return [*found, *map(study.picked, picked)]


def _demand_place(name: str, studies: Iterable[str]) -> None:
    """Raise PackError for a path that no workspace has, or of another study."""
    match = _ALLOWED.fullmatch(name)
    parts = name.split("/")
    if match is None or ".." in parts or any(part.endswith(".") for part in parts):
        raise PackError(
            f"the pack names {name!r}; expected settings, tables, figures and records below "
            "params/, figures/<study>/ and runs/<study>/"
        )
    of = match["figures"] or match["runs"]
    if of is not None and of not in studies:
        raise PackError(f"the pack names {name!r}, and is of {', '.join(studies)}")


def unpack(source: Path, into: Path, most_bytes: int = MOST_BYTES) -> dict[str, Any]:
    """Check a pack, and write its files below a folder; those that are there with the same content
    stay.

    Args:
        source: The zip file.
        into: A workspace, new or not.
        most_bytes: That may be written.

    Returns: The manifest.
    Raises: PackError for what is no pack, is damaged, too large, or names other places;
        FileExistsError where a file of other content is in the way. Nothing is written then.
    """
    try:
        with zipfile.ZipFile(source) as archive:
            manifest = _manifest(archive, most_bytes)
            sums = manifest["files"]
            in_the_way = [name for name in sums if _differs(into / name, sums[name])]
            if in_the_way:
                more = f" and {len(in_the_way) - 1} more" if in_the_way[1:] else ""
                raise FileExistsError(
                    f"{into / in_the_way[0]}{more} has other content than the pack; unpack into a "
                    "folder of its own (--into FOLDER)"
                )
            for name in sums:  # every byte before the first is written
                _copied(archive, name, sums[name], None)
            for name in sums:
                if not (into / name).exists():
                    files.write_atomic(
                        into / name,
                        lambda out, name=name: _copied(archive, name, sums[name], out),
                    )
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise PackError(
            f"{source} is no pack, or is cut ({files.one_line(error)}); fetch it again"
        ) from None
    return manifest


def _manifest(archive: zipfile.ZipFile, most_bytes: int) -> dict[str, Any]:
    """The manifest of a pack whose entries are those it names."""
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if MANIFEST not in names or archive.getinfo(MANIFEST).file_size > MOST_MANIFEST:
        raise PackError(f"{archive.filename} is no pack: it has no {MANIFEST}")
    # also names that are one where a disk does not tell capitals apart
    if len({name.casefold() for name in names}) != len(names) or len(names) > MOST_FILES:
        raise PackError(f"{archive.filename} has {len(names):,} entries, or names one twice")
    manifest = _parsed(archive)
    sums = manifest["files"]
    if set(names) != {MANIFEST, *sums}:
        odd = sorted({MANIFEST, *sums} ^ set(names))
        raise PackError(f"manifest and entries differ in {odd[0]!r} ({len(odd)} in all)")
    for name in sums:
        _demand_place(name, manifest["studies"])
    if manifest["file"] not in sums:
        raise PackError(f"the pack lacks its study file {manifest['file']!r}")
    total = sum(entry["bytes"] for entry in sums.values())
    if total > most_bytes:
        raise PackError(
            f"the pack holds {total / 1e9:.2f} GB; expected at most {most_bytes / 1e9:.2f} GB "
            "(--most-gb)"
        )
    for entry in entries:
        if entry.filename != MANIFEST and entry.file_size != sums[entry.filename]["bytes"]:
            raise PackError(f"{entry.filename} has not the size that the manifest says")
    return manifest


def _parsed(archive: zipfile.ZipFile) -> dict[str, Any]:
    """The content of the manifest.

    Raises: PackError for one of another form or format.
    """
    try:
        manifest = json.loads(archive.read(MANIFEST))
        if manifest["format"] != FORMAT:
            raise PackError(f"the pack has format {manifest['format']!r}; expected {FORMAT}")
        names = [manifest["study"], *manifest["studies"]]
        whole = isinstance(manifest["file"], str) and all(
            isinstance(name, str) and re.fullmatch(NAME, name, re.ASCII) for name in names
        )
        for name, entry in manifest["files"].items():
            size, sha256 = entry["bytes"], entry["sha256"]
            is_size = isinstance(size, int) and not isinstance(size, bool) and size >= 0
            whole &= isinstance(name, str) and is_size and isinstance(sha256, str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, PackError):
            raise
        whole = False
    if not whole:
        raise PackError(f"{MANIFEST} is not one of a pack; fetch the pack again")
    return manifest


def _differs(path: Path, entry: dict[str, Any]) -> bool:
    """Whether there is a file, or anything else, of other content."""
    if not path.exists() and not path.is_symlink():
        return False
    return not path.is_file() or files.sha256_file(path) != entry["sha256"]


def _copied(archive: zipfile.ZipFile, name: str, entry: dict[str, Any], out: Any) -> None:
    """Read an entry, chunk by chunk, and write it where `out` is a file.

    Raises: PackError where it is longer than the manifest says, or of another content.
    """
    digest, left = hashlib.sha256(), entry["bytes"]
    with archive.open(name) as content:
        while chunk := content.read(CHUNK):
            left -= len(chunk)
            if left < 0:
                break
            digest.update(chunk)
            if out is not None:
                out.write(chunk)
    if left != 0 or digest.hexdigest() != entry["sha256"]:
        raise PackError(f"{name} is not what the manifest says; fetch the pack again")


def fetch(source: str) -> Path:
    """A pack on the disk: of `hf://datasets/owner/name[@revision]/file.zip` the copy that
    huggingface_hub downloads, of any other source the path itself.

    Raises: ModuleNotFoundError, ValueError, FileNotFoundError or RuntimeError in one sentence.
    """
    if not source.startswith("hf://"):
        if not Path(source).is_file():
            raise FileNotFoundError(f"no file {source!r}; expected a pack, or hf://...")
        return Path(source)
    if (place := _HUB.fullmatch(source)) is None:
        raise ValueError(
            f"{source!r} names no file; expected hf://datasets/OWNER/NAME[@REVISION]/FILE"
        )
    try:
        import huggingface_hub  # optional: only this reads the hub
    except ImportError:
        raise ModuleNotFoundError(
            "the Hugging Face hub is read by huggingface_hub, which is not installed here: "
            "pip install huggingface_hub"
        ) from None
    kind = (place["kind"] or "models").removesuffix("s")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of each attempt
    try:
        return Path(
            huggingface_hub.hf_hub_download(
                place["repository"], place["file"], repo_type=kind, revision=place["revision"]
            )
        )
    except (OSError, ValueError, RuntimeError) as error:  # no network, no such file, no permission
        raise RuntimeError(
            f"cannot fetch {source} ({files.one_line(error, 160)}); bring the file by other means "
            "and give its path"
        ) from None
