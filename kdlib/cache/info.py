"""Caches on the command line: build them, see what they hold, verify and repair them."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from kdlib.cache import index
from kdlib.cache.agreement import open_sources
from kdlib.cache.build import build_images, build_splits, repair
from kdlib.cache.index import CacheError
from kdlib.cache.readings import compare, counted, record_path, sentence
from kdlib.cache.remedies import delete_and_run, run_to_make
from kdlib.cache.shards import Cache
from kdlib.cache.study_source import open_source
from kdlib.repro import files
from kdlib.study.data import cache_folder, parse_part
from kdlib.study.load import load_study
from kdlib.study.study import Study

MOST_RANGES = 6  # more runs of shards are counted, not listed


def find_caches(path: str) -> list[Path]:
    """The caches that a path names: a cache, a folder of caches, or a study's caches.

    Args:
        path: Absolute, or relative to the current folder or to the workspace.

    Raises: FileNotFoundError when there is none; StudyError for an invalid study file.
    """
    folder = next((c for c in (Path(path), files.workspace() / path) if c.is_dir()), None)
    if folder is not None:
        candidates = [folder, *sorted(folder.iterdir())]
    elif Path(path).suffix in (".yaml", ".yml"):
        study = load_study(path)
        outputs = sorted((study.upstream.runs / "teacher").glob("outputs-*"))
        outputs += sorted((study.runs / "teachers").glob("**/outputs-*"))
        images = [study.data, *study.probe.others.values()]
        candidates = [
            cache_folder(data) / split for data in images for split in data.splits
        ] + outputs
    else:
        raise FileNotFoundError(f"{path} is neither a cache folder nor a study file")
    caches = [c for c in candidates if index.index_paths(c) or index.journal_paths(c)]
    if not caches:
        raise FileNotFoundError(
            f"there is no cache in {folder or path}; run `python -m kdlib cache build STUDY`"
        )
    return caches


def build_caches(
    study: Study, split: str | None = None, part: str | None = None, n_workers: int | None = None
) -> None:
    """Build the image cache of a study, and those of the data sets it probes on, and print what is
    there now.

    Args:
        split: None: all, or with `part` the training split.
        part: `i/k`; None: of the training split what the study asks for, of the test split all.
        n_workers: As in `build_images`.
    """
    names = (split,) if split else ("train",) if part else ()
    # the data sets of probes are small: they are built whole, with the whole study
    probed = () if split or part else study.probe.others.values()
    for data in (study.data, *probed):
        sources = {name: open_source(data, name) for name in names} or open_sources(data)
        chosen = {n: parse_part(part or (data.part if n == "train" else "1/1")) for n in sources}
        folder = cache_folder(data)
        build_splits(sources, folder, data.shard_size, chosen, n_workers)
        for name in sources:
            print(state(Cache(folder / name)))


def state(cache: Cache) -> str:
    """One line: how much of a cache is there, and what is missing."""
    examples = _counted(cache.n_examples, "example")
    shards = _counted(index.count_shards(cache.header), "shard")
    if cache.whole:
        return f"{cache.folder}: whole, {examples} in {shards}"
    return (
        f"{cache.folder}: {len(cache.shards):,} of {shards}, {len(cache.example_ids):,} of "
        f"{examples}; missing: {_spans(cache.header, cache.missing)}"
    )


def describe(folder: Path) -> str:
    """What a cache, or an unfinished one, holds: aligned lines under its path.

    Raises: CacheError for one that cannot be trusted.
    """
    header, entries = index.read_indexes(folder)
    journals = [(path, *index.read_journal(path)) for path in index.journal_paths(folder)]
    header = header or next((noted for _, noted, _ in journals if noted), {})
    if not header:
        Cache(folder)  # raises, and says what is there
    n_shards = index.count_shards(header)
    columns = [
        f"{name} {np.dtype(dtype).name} {tuple(shape)}"
        for name, (dtype, shape) in header["columns"].items()
    ]
    lines = [
        ("holds", ", ".join(str(header[k]) for k in ("kind", "source", "split") if k in header)),
        ("examples", f"{header['n_examples']:,}"),
        *[("columns" if i == 0 else "", column) for i, column in enumerate(columns)],
        ("shards", f"{n_shards:,} of up to {_counted(header['shard_size'], 'example')}"),
        ("on disk", _in_bytes(p.stat().st_size for p in folder.iterdir() if p.is_file())),
        ("fingerprint", Cache(folder).fingerprint if entries else "none yet"),
    ]
    for path in index.index_paths(folder):
        held = range(*index.part_of(path, n_shards))
        lines.append(("part", f"{path.name}: {_spans(header, held)}"))
    if entries and (read := sentence(counted(Cache(folder)))):
        lines.append(("read", read))
    missing = sorted(set(range(n_shards)) - set(entries))
    lines.append(("missing", _spans(header, missing) if missing else "nothing"))
    for path, _, done in journals:
        first, stop = index.part_of(path, n_shards)
        lines.append(
            ("unfinished", f"{path.name}: {len(done):,} of {_counted(stop - first, 'shard')} made")
        )
    return "\n".join([str(folder), *(f"  {key:<12} {text}" for key, text in lines)])


def verify_cache(folder: Path, keep_whole: bool = False) -> bool:
    """Compare every byte of a cache with its checksums, and print the names of damaged files.

    Args:
        keep_whole: Also make a damaged cache an unfinished build that keeps what is whole.

    Returns: Whether the cache is whole as far as it was built.
    """
    try:
        sums = index.all_sums(index.read_indexes(folder)[1])
        sizes = [p.stat().st_size for p in (folder / name for name in sums) if p.is_file()]
        start = time.perf_counter()
        bad = files.damaged_files(folder, sums)
        speed = f"{sum(sizes) / (time.perf_counter() - start) / 1e9:.2f} GB/s"
        if not bad:
            cache = Cache(folder)  # raises when there is no index
            cache.check(cache.header["columns"], cache.shards.tolist())
            print(f"{folder}: {_counted(len(sums), 'file')}, {_in_bytes(sizes)}, whole ({speed})")
            return True
    except CacheError as error:
        print(f"CacheError: {error}", file=sys.stderr)
        return False
    print(f"{folder}: {len(bad):,} of {_counted(len(sums), 'file')} damaged or missing ({speed})")
    print(*(f"  {name}" for name in bad), sep="\n")
    if not keep_whole:
        print("run this again with --repair: it keeps what is whole")
        return False
    repair(folder)
    print(f"whole shards are kept; {run_to_make(folder)} to make the others")
    return False


def seal(study: Study) -> None:
    """Make the whole shards at the beginning of a study's unfinished training cache a cache of its
    own, and print how to learn from it. It is that of the same study with `n_train`, to the byte;
    its files are links, and the build can go on.

    Raises: CacheError for an unfinished build of other images, or without a whole shard at its
        beginning.
    """
    data, begun = study.data, cache_folder(study.data) / "train"
    header, shards = index.read_indexes(begun)
    for journal in index.journal_paths(begun):
        noted, more = index.read_journal(journal)
        header = header or noted
        index.refuse_other(journal, header, noted or header)
        shards |= more
    if not header:
        Cache(begun)  # raises, and says what is there
    source = open_source(data, "train")
    expected = {"class_names": list(source.class_names), "identity": source.identity}
    index.refuse_other(begun, expected, {key: header[key] for key in expected})
    whole = index.whole_shards(begun, shards)
    first = list(takewhile(whole.__contains__, range(index.count_shards(header))))
    if not first or len(whole) == index.count_shards(header):
        what = "is whole" if first else "has no whole shard at its beginning"
        raise CacheError(f"{begun} {what}: there is nothing to seal; {run_to_make(begun)}")
    smaller = data.model_copy(update={"n_train": len(first) * data.shard_size, "part": "1/1"})
    source, folder = open_source(smaller, "train"), cache_folder(smaller) / "train"
    folder.mkdir(parents=True, exist_ok=True)
    taken = {shard: whole[shard] for shard in first}
    records = [record_path(begun, shard) for shard in first]  # which arrays have not
    for path in [*(begun / name for name in index.all_sums(taken)), *filter(Path.exists, records)]:
        with contextlib.suppress(FileExistsError):
            os.link(path, folder / path.name)
    header |= {"n_examples": source.n_examples, "identity": source.identity}
    index.write_journal(folder / "journal.jsonl", header, taken)
    print(state(build_images(source, folder, data.shard_size)))
    print(
        f"`data: {{n_train: {source.n_examples}}}` in a study learns from these; the others: "
        f"{run_to_make(begun)}"
    )


def compare_source(study: Study) -> bool:
    """Compare every byte of a study's images, and of those it probes on, with what its caches were
    made from, and print the files that differ.

    Returns: Whether all that is cached is still what the source has.
    """
    same = True
    for data in (study.data, *study.probe.others.values()):
        for split in data.splits:
            folder = cache_folder(data) / split
            if not index.index_paths(folder):
                print(f"{folder}: not built")
                continue
            try:
                changes = compare(open_source(data, split), Cache(folder))
            except ValueError as error:  # of an unfit layout now, or a cache not to be trusted
                print(f"{folder}: {error}", file=sys.stderr)
                same = False
                continue
            if changes.unknown:
                n = _counted(len(changes.unknown), "shard")
                print(f"{folder}: no bytes were noted of {n}; pixels were compared there")
            print(f"{folder}: {'the source has changed' if changes else 'the source is the same'}")
            for what in ("changed", "missing", "new"):
                for name in getattr(changes, what):
                    print(f"  {what}: {name}")
            if changes:
                print(f"put the old files back, or {delete_and_run(folder)}")
                same = False
    return same


def _spans(header: dict[str, Any], shards: Iterable[int]) -> str:
    """`shards 2-4 (examples 10-24), shard 7 (examples 35-39)`."""
    numbers = np.array(list(shards))
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    texts = []
    for first, last in ((int(run[0]), int(run[-1])) for run in runs[:MOST_RANGES]):
        start, stop = index.shard_span(header, first)[0], index.shard_span(header, last)[1]
        name = f"shard {first}" if first == last else f"shards {first}-{last}"
        texts.append(f"{name} (examples {start:,}-{stop - 1:,})")
    if len(runs) > MOST_RANGES:
        texts.append(f"and {len(runs) - MOST_RANGES:,} more runs, {len(numbers):,} shards in all")
    return ", ".join(texts)


def _counted(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _in_bytes(sizes: Iterable[int]) -> str:
    n = sum(sizes)
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.0f} B" if unit == "B" else f"{n:.2f} {unit}"
        n /= 1000
    return f"{n:.2f} TB"
