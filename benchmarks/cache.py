"""How fast does a large cache open, how fast is it verified, and what does reading ahead save?

    python benchmarks/cache.py [--shards 10000] [--n 40960]

Opens a cache of many shards of two columns (of empty files: opening
reads indexes and names alone), then verifies and reads one of `n` images of 3x96x96. The cold
reading drops the cache's own files from the page cache before each run.
"""

import argparse
import gc
import hashlib
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from kdlib.cache.build import build_shards
from kdlib.cache.index import FORMAT, all_sums, file_name
from kdlib.cache.shards import Cache
from kdlib.dataset.loader import Loader
from kdlib.dataset.plan import Plan
from kdlib.repro import files

SHARD, BATCH = 2048, 512


def many_shards(folder: Path, n_shards: int) -> None:
    """A cache whose shards hold one example of two small columns each."""
    header = {"format": FORMAT, "n_examples": n_shards, "shard_size": 1, "columns": {}}
    header["columns"] = {"images": ["|u1", [1]], "labels": ["<i8", []]}
    shards = []
    for shard in range(n_shards):
        names = [file_name(column, shard) for column in header["columns"]]
        sums = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
        shards.append({"first_id": shard, "n": 1, "sha256": sums})
        for name in names:
            (folder / name).touch()
    content = {"header": header, "shards": shards}
    files.write_json(folder / "index.json", content | {"seal": files.fingerprint(content)})


def drop(folder: Path) -> None:
    """Make the files of a folder cold; they must not be mapped."""
    gc.collect()
    os.sync()
    for path in folder.glob("*.npy"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def waited(folder: Path, n: int, ahead: bool) -> float:
    """Seconds spent in `batch` over one cold pass in windows of 4 shards, 40 ms between batches."""
    drop(folder)
    plan = Plan(
        np.arange(n), BATCH, n // BATCH, 0, order="windowed", shard_size=SHARD, window_shards=4
    )
    loader, total = Loader(plan, Cache(folder), residence="mapped", reuse=True), 0.0
    if not ahead:
        loader._look = plan.n_steps
    for step in range(plan.n_steps):
        start = time.perf_counter()
        loader.batch(step)
        total += time.perf_counter() - start
        time.sleep(0.04)  # the training step
    loader.close()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", type=int, default=10000)
    parser.add_argument("--n", type=int, default=40960)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=files.workspace()) as name:  # /tmp may lie in memory
        many, one = Path(name) / "many", Path(name) / "one"
        many.mkdir()
        many_shards(many, chosen.shards)
        times = []
        for _ in range(5):
            start = time.perf_counter()
            Cache(many)
            times.append(time.perf_counter() - start)
        print(f"open {chosen.shards:,} shards of 2 columns: {statistics.median(times):.3f} s")
        block = np.random.default_rng(0).integers(0, 256, (SHARD, 3, 96, 96), np.uint8)
        n = chosen.n // SHARD * SHARD
        columns = {"images": ("|u1", (3, 96, 96)), "labels": ("<i8", ())}
        build_shards(
            one,
            {"kind": "images"},
            columns,
            lambda span: {"images": block, "labels": np.arange(*span)},
            n_examples=n,
            shard_size=SHARD,
        )
        cache = Cache(one)
        size = n * sum(cache.row_bytes().values())
        for n_threads in (1, files.n_cpus()):
            start = time.perf_counter()
            assert not files.damaged_files(one, all_sums(cache.entries), n_threads)
            rate = size / (time.perf_counter() - start) / 1e9
            print(f"verify {size / 1e9:.2f} GB, warm, {n_threads} threads: {rate:.2f} GB/s")
        del cache
        for ahead in (True, False):
            runs = ", ".join(f"{waited(one, n, ahead):.2f}" for _ in range(3))
            print(f"cold pass, reading ahead {'on' if ahead else 'off'}: waited {runs} s")


if __name__ == "__main__":
    main()
