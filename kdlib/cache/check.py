"""Every odd image of a study's data sets, before a byte is built: `python -m kdlib cache check`.

Headers are read, pixels only where a header cannot tell. What a study must decide before its cache
can be built is told apart from what a reader converts or cuts by itself.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from kdlib.cache.agreement import declared
from kdlib.cache.duplicates import LIMIT
from kdlib.cache.encoded import NOTES, ImageError, Rules, decode, look
from kdlib.cache.image_files import Payload, n_bytes, passed_over, shown
from kdlib.cache.readings import names_of
from kdlib.cache.sources import SPLITS, Source
from kdlib.cache.study_source import open_source
from kdlib.cache.survey import CHUNK, WORTH_WORKERS, fault, in_workers
from kdlib.repro import files, splits
from kdlib.study.data import Data
from kdlib.study.study import Study

LISTED = 20  # images that are named for each kind, unless all are asked for
MOST_DECODED = 10_000  # images of a split whose pixels are compared without being asked for
_STORED = Rules(exif="ignore", alpha="drop")  # pixels as they are stored, whatever the study says

# Suffixes of images that Pillow may not open
_UNREAD = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".tga", ".eps",
)  # fmt: skip

Place = tuple[str, str]  # split, and name of an image in it


@dataclass
class Findings:
    """What was found in one data set.

    Attributes:
        decisions: What stops a build, or makes a wrong cache -> the images it is true of.
        notes: What a reader does by itself -> the images it does it to.
        counts: Per split the number of images, and how many differ in nothing.
    """

    decisions: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Seen:
    """What was seen of one image: `fault` needs a decision, `kinds` are noted, `pixels` is their
    sha256."""

    fault: str | None
    kinds: tuple[str, ...]
    n_bytes: int
    pixels: str | None


def check_study(study: Study, n_workers: int | None = None, every: bool = False) -> bool:
    """Print every odd image of a study's data sets, and of those it probes on.

    Args:
        n_workers: Processes that read; None takes one per CPU for many images, else none.
        every: Name all images, and compare the pixels of any number of them.

    Returns: Whether nothing needs a decision.
    """
    good = True
    for data in (study.data, *study.probe.others.values()):
        findings = check_data(data, n_workers, every)
        good &= not findings.decisions
        print(*_lines(data, findings, every), sep="\n")
    return good


def check_data(data: Data, n_workers: int | None = None, every: bool = False) -> Findings:
    """As `check_study`, of one data set."""
    findings, twins, sources = Findings(), defaultdict(list), {}
    for split in SPLITS:
        try:
            source = open_source(data, split)
        except (ValueError, OSError) as error:
            findings.decisions["cannot be opened"].append(f"{split}: {error}")
            continue
        sources[split] = source
        if source.encoded is None:
            findings.counts.append(
                f"{split}: {source.n_examples:,} images that are arrays of one size and 8 bits; "
                "there is nothing to check"
            )
            continue
        _check_split(data, source, findings, twins, n_workers, every)
    if len(sources) == len(SPLITS):
        for text in splits.faults(declared(data, sources)):
            findings.decisions["the splits do not belong together"].append(text)
        n_test = sources["test"].n_examples
        _say_twins(data, twins.values(), n_test, sources["train"].n_examples + n_test, findings)
    return findings


def _check_split(
    data: Data,
    source: Source,
    findings: Findings,
    twins: dict[str, list[tuple[Place, int]]],
    n_workers: int | None,
    every: bool,
) -> None:
    """Look at each image of one split.

    Args:
        twins: Images by the sha256 of their pixels or bytes, to which those of this split are
            added.
    """
    split, encoded = source.split, source.encoded
    pixels = every or source.n_examples <= MOST_DECODED
    if n_workers is None:
        n_workers = files.n_cpus() if source.n_examples >= WORTH_WORKERS else 0
    names, labels, n_even = [], [], 0
    same_bytes: dict[int, list[int]] = defaultdict(list)
    payloads = _payloads(source, names, labels)
    for i, seen in enumerate(
        chain.from_iterable(in_workers(partial(_seen, encoded, pixels), payloads, n_workers))
    ):
        name = f"{split}/{shown(names[i])}"
        if seen.fault:
            findings.decisions["needs a decision or a repair"].append(f"{name} {seen.fault}")
        for kind in seen.kinds:
            findings.notes[NOTES[kind]].append(name)
        n_even += not seen.fault and not seen.kinds
        if seen.pixels is not None:
            twins[seen.pixels].append(((split, name), labels[i]))
        else:
            same_bytes[seen.n_bytes].append(i)
    if not pixels:  # only files of equal size can be equal
        for i in chain.from_iterable(ids for ids in same_bytes.values() if len(ids) > 1):
            image = encoded.fetch(i, i + 1).images[0]
            try:
                content = image if isinstance(image, bytes) else Path(image).read_bytes()
            except OSError:
                continue
            key = hashlib.sha256(content).hexdigest()
            twins[key].append(((split, f"{split}/{shown(names[i])}"), labels[i]))
    findings.counts.append(
        f"{split}: {source.n_examples:,} images, {n_even:,} of them as they are read"
        + ("" if pixels else "; duplicates are those of equal bytes (--all compares pixels)")
    )
    if data.source == "folder":
        _check_others(data, split, findings)
        return
    for kind, n in encoded.passed_over.items():
        findings.notes[f"files passed over ({shown(kind)})"].append(f"{split}: {n:,}")


def _payloads(source: Source, names: list[str], labels: list[int]) -> Any:
    for first in range(0, source.n_examples, CHUNK):
        payload = source.encoded.fetch(first, min(first + CHUNK, source.n_examples))
        names += names_of(source.encoded, payload)
        labels += payload.labels.tolist()
        yield payload


def _seen(encoded: Any, pixels: bool, payload: Payload) -> list[Seen]:
    return [_seen_one(encoded, pixels, image) for image in payload.images]


def _seen_one(encoded: Any, pixels: bool, image: bytes | str) -> Seen:
    size, digest = len(image) if isinstance(image, bytes) else n_bytes(image), None
    try:
        seen = look(image, "", encoded.rules)
        if pixels and not seen.deep:
            digest = files.sha256_array(decode(image, "", _STORED)[0])
    except ImageError as error:
        return Seen(str(error).strip(), (), size, None)
    reason = fault(encoded, seen)
    return Seen(reason, tuple(seen.notes(encoded.rules)), size, digest)


def _check_others(data: Data, split: str, findings: Findings) -> None:
    """Files that are not read; those that Pillow can open may be images that were forgotten."""
    root = files.data_root() / data.folder
    folder = root / (data.test_folder if split == "test" else "train")
    for kind, path in passed_over(folder, data.labelled):
        name = f"{split}/{shown(path.removeprefix(f'{folder}/'))}"
        if kind != "hidden" and _is_readable(path):
            why = (
                "lies beside the class folders"
                if kind == "outside class folders"
                else f"is an image, but its name ends in {shown(kind)}"
            )
            findings.decisions["images that would be passed over"].append(f"{name} {why}")
        elif kind in _UNREAD:
            why = f"is named like an image of a kind that is not read ({kind}); save it as PNG"
            findings.decisions["images that would be passed over"].append(f"{name} {why}")
        else:
            findings.notes[f"files passed over ({shown(kind)})"].append(name)


def _is_readable(path: str) -> bool:
    try:
        look(path, "", _STORED)
    except (ImageError, OSError):
        return False
    return True


def _say_twins(
    data: Data,
    twins: Iterable[list[tuple[Place, int]]],
    n_test: int,
    n_images: int,
    findings: Findings,
) -> None:
    """Sort images that are there twice; those in both splits or in two classes need a decision
    where they are more than the share at which step 01 stops."""
    kinds, counts = defaultdict(list), Counter()
    for places in twins:
        if len(places) < 2:
            continue
        text = " = ".join(name for (_, name), _ in places)
        if len({split for (split, _), _ in places}) > 1:
            kinds["the same image in train and test"].append(text)
            counts["crossing"] += sum(split == "test" for (split, _), _ in places)
        elif len({label for _, label in places}) > 1:
            kinds["the same image in several classes"].append(text)
        else:
            findings.notes["more than once in one class"].append(text)
        if len({label for _, label in places}) > 1:
            counts["torn"] += len(places)
    limit = LIMIT if data.duplicates is None else data.duplicates
    many = max(counts["crossing"] / n_test, counts["torn"] / n_images) > limit
    for kind, texts in kinds.items():
        (findings.decisions if many else findings.notes)[kind] += texts


def _lines(data: Data, findings: Findings, every: bool) -> list[str]:
    place = data.folder or (data.huggingface.dataset if data.huggingface else data.source)
    lines = [f"{place}:", *(f"  {text}" for text in findings.counts)]
    for found, mark in ((findings.decisions, "! "), (findings.notes, "")):
        for kind, names in found.items():
            lines.append(f"  {mark}{kind}: {len(names):,}")
            shown_here = names if every or mark else names[:LISTED]
            lines += [f"    {name}" for name in shown_here]
            if len(shown_here) < len(names):
                lines.append(f"    and {len(names) - LISTED:,} more (--all names them)")
    needed = sum(map(len, findings.decisions.values()))
    lines.append(
        f"  {needed:,} need{'s' if needed == 1 else ''} a decision (marked !)"
        if needed
        else "  nothing needs a decision"
    )
    return lines
