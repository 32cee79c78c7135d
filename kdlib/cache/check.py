"""Every odd image of a study's data sets, before a byte is built: `python -m kdlib cache check`.

Headers are read, pixels only where a header cannot tell. What a study must decide before its cache
can be built stands apart from what a reader converts or cuts by itself.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from kdlib.cache.agreement import declared
from kdlib.cache.duplicates import count_duplicates
from kdlib.cache.encoded import NOTES, ImageError, look
from kdlib.cache.image_files import passed_over, shown
from kdlib.cache.readings import LISTED, sha256_of
from kdlib.cache.sources import SPLITS, Source
from kdlib.cache.study_source import open_source
from kdlib.cache.survey import STORED, count_workers, look_over
from kdlib.repro import files, splits
from kdlib.study.data import Data
from kdlib.study.study import Study

MOST_DECODED = 10_000  # images of a split whose pixels are compared without being asked for

# Suffixes of images that Pillow may not open
_UNREAD = (
    ".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".psd", ".raw", ".dng", ".cr2", ".cr3",
    ".nef", ".arw", ".orf", ".rw2", ".raf", ".exr", ".hdr", ".tga", ".eps",
)  # fmt: skip

Place = tuple[str, int, str, int]  # split, example id, name and label of an image


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
    findings, alike, sources = Findings(), defaultdict(list), {}
    for split in data.splits:
        try:
            sources[split] = open_source(data, split)
        except (ValueError, OSError) as error:
            findings.decisions["cannot be opened"].append(f"{split}: {error}")
    pixels = every or all(source.n_examples <= MOST_DECODED for source in sources.values())
    for split, source in sources.items():
        if source.encoded is None:
            findings.counts.append(
                f"{split}: {source.n_examples:,} images that are arrays of one size; "
                "there is nothing to check"
            )
        else:
            _check_split(data, source, pixels, n_workers, findings, alike)
    if len(sources) == len(data.splits):
        for text in splits.faults(declared(data, sources)):
            findings.decisions["the splits do not belong together"].append(text)
        groups = alike.values() if pixels else _of_equal_bytes(sources, alike)
        _say_twins(data, sources, groups, findings)
    return findings


def _check_split(
    data: Data,
    source: Source,
    pixels: bool,
    n_workers: int | None,
    findings: Findings,
    alike: dict[Any, list[Place]],
) -> None:
    """Look at each image of one split.

    Args:
        alike: By the sha256 of their pixels, else by their size: this split's images are added.
    """
    split, encoded, n, n_even = source.split, source.encoded, source.n_examples, 0
    found = look_over(encoded, [(0, n)], count_workers(source, n_workers), pixels)
    for i, seen in enumerate(found):
        name = f"{split}/{shown(seen.place)}"
        if seen.fault:
            findings.decisions["needs a decision or a repair"].append(f"{name} {seen.fault}")
        for note in seen.notes:
            findings.notes[NOTES[note]].append(name)
        n_even += not seen.fault and not seen.notes
        if not pixels or seen.pixels is not None:
            alike[seen.pixels or seen.n_bytes].append((split, i, name, seen.label))
    findings.counts.append(
        f"{split}: {n:,} images, {n_even:,} of them as they are read"
        + ("" if pixels else "; duplicates are those of equal bytes (--all compares pixels)")
    )
    if data.source == "folder":
        _check_others(data, split, findings)
        return
    for kind, n_files in encoded.passed_over.items():
        findings.notes[f"files passed over ({shown(kind)})"].append(f"{split}: {n_files:,}")


def _check_others(data: Data, split: str, findings: Findings) -> None:
    """Files that are not read; those that Pillow can open may be images that were forgotten."""
    folder = files.data_root() / data.folder / (data.test_folder if split == "test" else "train")
    for kind, path in passed_over(folder, data.labelled):
        name = f"{split}/{shown(path.removeprefix(f'{folder}/'))}"
        if kind != "hidden" and _is_readable(path):
            why = f"is an image, but its name ends in {shown(kind)}"
            if kind == "outside class folders":
                why = "lies beside the class folders"
        elif kind in _UNREAD:
            why = f"is named like an image of a kind that is not read ({kind}); save it as PNG"
        else:
            findings.notes[f"files passed over ({shown(kind)})"].append(name)
            continue
        findings.decisions["images that would be passed over"].append(f"{name} {why}")


def _is_readable(path: str) -> bool:
    try:
        look(path, "", STORED)
    except (ImageError, OSError):
        return False
    return True


def _of_equal_bytes(
    sources: dict[str, Source], alike: dict[int, list[Place]]
) -> Iterator[list[Place]]:
    """Groups of images with the same bytes, of images by their size."""
    for places in alike.values():
        groups = defaultdict(list)
        for split, i, *about in places if len(places) > 1 else ():
            with contextlib.suppress(OSError):  # a fault that is listed already
                digest = sha256_of(sources[split].encoded.fetch(i, i + 1).images[0])
                groups[digest].append((split, i, *about))
        yield from groups.values()


def _say_twins(
    data: Data, sources: dict[str, Source], groups: Iterable[list[Place]], findings: Findings
) -> None:
    """Sort images that are there twice; those in both splits or in two classes need a decision
    where step 01 would stop at them."""
    rows = [(i, *place) for i, group in enumerate(groups) if len(group) > 1 for place in group]
    if not rows:
        return
    table = pd.DataFrame(rows, columns=["group", "split", "example_id", "name", "label"])
    allowed = True  # without labels: what is held out is not known yet
    if data.labelled:
        n_images = [sources[split].n_examples for split in SPLITS]
        counts = count_duplicates(table, *n_images, data.duplicates)
        allowed, _ = splits.duplicates({"duplicates": counts})
    for _, group in table.groupby("group", sort=False):
        kind, found = "more than once in one class", findings.notes
        if group["split"].nunique() > 1:
            kind = "the same image in train and test"
        elif group["label"].nunique() > 1:
            kind = "the same image in several classes"
        if kind != "more than once in one class" and not allowed:
            found = findings.decisions
        found[kind].append(" = ".join(group["name"]))


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
    if not (needed := sum(map(len, findings.decisions.values()))):
        return [*lines, "  nothing needs a decision"]
    return [*lines, f"  {needed:,} need{'s' if needed == 1 else ''} a decision (marked !)"]
