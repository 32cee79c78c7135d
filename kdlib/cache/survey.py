"""A look at the source before a shard is made: whether finished shards are still of its files, and
whether the others can be made. All images that cannot be read are named at once."""

import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from kdlib.cache import index
from kdlib.cache.encoded import ImageError, Rules, decode, look
from kdlib.cache.image_files import Payload, named, other_size, state_of
from kdlib.cache.index import CacheError
from kdlib.cache.part import Part
from kdlib.cache.readings import COMPARE, by_name, changed_since, listed, names_of, record_path
from kdlib.cache.remedies import delete_and_run
from kdlib.cache.sources import Encoded, Source
from kdlib.repro import files

CHUNK = 256  # images that are looked at by one call
STORED = Rules(exif="ignore", alpha="drop")  # pixels as they are stored, whatever a study says
WORTH_WORKERS = 4096  # examples; fewer are decoded before worker processes have started
# Entries of a header that follow from which files there are
_OF_FILES = ("n_examples", "class_names", "columns", "identity")


@dataclass(frozen=True)
class Seen:
    """What is seen of one image.

    Attributes:
        name: In messages.
        place: Its path below the folder of its split, or its number.
        label: -1: none.
        fault: Why it cannot be cached: what follows its name in a sentence.
        notes: Keys of `NOTES`.
        pixels: Their sha256, where they were decoded.
    """

    name: str
    place: str
    label: int
    n_bytes: int
    fault: str | None
    notes: tuple[str, ...]
    pixels: str | None


def prepare(
    source: Source,
    folder: Path,
    header: dict[str, Any],
    part: tuple[int, int],
    n_workers: int,
) -> None:
    """Look at the source before shards are made: whether finished ones are still of its files, and
    whether the others can be made.

    An unfinished build of files that have changed since is dropped, with a line that says so.

    Raises: CacheError that names the files, for finished shards of other ones; ImageError that
        names every image that cannot be read.
    """
    mine = Part(folder, header, *index.part_range(index.count_shards(header), part))
    there, indexed = index.read_indexes(folder)
    try:
        index.refuse_other(folder, header, there or header)
    except CacheError as error:
        differ = by_name(source, folder, indexed)
        names = differ.listed()
        raise CacheError(f"{error}{names and f'; {names}; {COMPARE} compares all bytes'}") from None
    if not there:
        _drop_unfinished(folder, header)
    begun = {shard for path in index.journal_paths(folder) for shard in index.read_journal(path)[1]}
    done = sorted((indexed.keys() | begun) & set(mine.shards))
    changed = changed_since(source, folder, header, done)
    if names := [name for shard, names in changed.items() if shard in indexed for name in names]:
        raise CacheError(
            f"{folder} was built from other images than are there now; changed since: "
            f"{listed(names)}; nothing was changed: {COMPARE} compares all of them; put the old "
            f"files back, or {delete_and_run(folder)}"
        )
    for shard in changed:  # of an unfinished build: they are made again
        for column in header["columns"]:
            (folder / index.file_name(column, shard)).unlink(missing_ok=True)
    if not source.encoded.once:
        todo = [shard for shard in mine.shards if shard not in done or shard in changed]
        demand_readable(source, header, todo, n_workers)


def demand_readable(
    source: Source,
    header: dict[str, Any],
    shards: Iterable[int],
    n_workers: int,
    pixels: bool = False,
) -> None:
    """Raises: ImageError that names every image of some shards that cannot be read.

    Args:
        pixels: Decode them too.
    """
    spans = [index.shard_span(header, shard) for shard in shards]
    seen = look_over(source.encoded, spans, n_workers, pixels)
    if bad := [f"{image.name} {image.fault}" for image in seen if image.fault]:
        raise ImageError(
            bad[0]
            if len(bad) == 1
            else f"{len(bad):,} images of {source.encoded.where} are not "
            f"read:\n  {listed(bad, sep=f'{os.linesep}  ')}\nmend all of them, then run the same "
            "again (`python -m kdlib cache check STUDY` lists every odd image)"
        )


def look_over(
    encoded: Encoded, spans: Iterable[tuple[int, int]], n_workers: int, pixels: bool
) -> Iterator[Seen]:
    """What is seen of each image of some ranges, in their order.

    Args:
        pixels: Decode them, which finds damage inside.
    """
    ranges = [
        (first, min(first + CHUNK, stop))
        for start, stop in spans
        for first in range(start, stop, CHUNK)
    ]
    chunks = (encoded.fetch(*ids) for ids in ranges)
    found = _in_workers(partial(_look_at, encoded, pixels), chunks, n_workers)
    about = f"looking at {encoded.where}"
    for seen in tqdm(found, about, len(ranges), leave=False, unit="chunk", delay=1):
        yield from seen


def _look_at(encoded: Encoded, pixels: bool, payload: Payload) -> list[Seen]:
    found, rules, names = [], encoded.rules, names_of(encoded, payload)
    for i, image in enumerate(payload.images):
        notes, digest = (), None
        try:
            seen = look(image, "", rules)
            if pixels and not seen.deep:
                digest = files.sha256_array(decode(image, "", STORED)[0])
            fault, notes = seen.refusal(rules), tuple(seen.notes(rules))
            if not fault and rules.image_size is None and seen.size != encoded.size:
                fault = other_size(seen.size, encoded.size)
        except ImageError as error:
            fault = str(error).strip()
        name = named(image, f"example {payload.first_id + i} of {encoded.where}")
        label, n_bytes = int(payload.labels[i]), state_of(image)[0]
        found.append(Seen(name, names[i], label, n_bytes, fault, notes, digest))
    return found


def count_workers(source: Source, n_workers: int | None) -> int:
    """Processes to read with: as asked for, else one per CPU where a source is worth it."""
    if n_workers is not None:
        return n_workers
    worth = source.parallel and source.n_examples >= WORTH_WORKERS
    return files.n_cpus() if worth else 0


def demand_workers(n_workers: int) -> None:
    """Raises: ValueError for a negative number of processes."""
    if n_workers < 0:
        raise ValueError(f"n_workers is {n_workers}; expected 0 or more")


def _in_workers(function: Any, payloads: Iterator[Any], n_workers: int) -> Iterator[Any]:
    """What a function returns for each of some payloads, in their order; at most 2 * n_workers of
    them are in memory."""
    demand_workers(n_workers)
    if n_workers == 0:
        yield from map(function, payloads)
        return
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends this process, which ends the workers
    with ProcessPoolExecutor(n_workers, get_context("spawn"), signal.signal, ignore) as pool:
        running = []
        try:
            for payload in payloads:
                running.append(pool.submit(function, payload))
                if len(running) >= 2 * n_workers:
                    yield running.pop(0).result()
            while running:
                yield running.pop(0).result()
        except BrokenProcessPool:
            raise CacheError(
                "a worker process died while images were looked at, most often because memory ran "
                "out; run the same again with fewer workers"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _drop_unfinished(folder: Path, header: dict[str, Any]) -> None:
    """Remove the beginnings of a cache of the same source with other files: no shard of it can be
    shown to be right, since a file more or less moves all others."""
    for journal in index.journal_paths(folder):
        old, done = index.read_journal(journal)
        if not old or old == header or not _same_source(old, header):
            continue
        with Part(folder, old, *index.part_of(journal, index.count_shards(old))).locked():
            for shard in done:
                for column in old["columns"]:
                    (folder / index.file_name(column, shard)).unlink(missing_ok=True)
                record_path(folder, shard).unlink(missing_ok=True)
            journal.unlink(missing_ok=True)
        print(
            f"{folder}: the files of {header['source']} {header['split']} have changed since this "
            f"build began; its {len(done):,} finished shards are made again"
        )


def _same_source(old: dict[str, Any], header: dict[str, Any]) -> bool:
    def fixed(header: dict[str, Any]) -> dict[str, Any]:
        of_source = header.get("identity", {}).items()
        identity = {k: v for k, v in of_source if k not in ("sha256", "n_examples")}
        rest = {k: v for k, v in header.items() if k not in _OF_FILES}
        return rest | {"identity": identity}

    return fixed(old) == fixed(header)
