"""Pack an image cache losslessly for a machine without a network, and unpack it there to the same
bytes.

    python benchmarks/pack.py pack params/phase1.yaml DEST [--part-mb 50]
    python benchmarks/pack.py unpack params/phase1.yaml FOLDER [FOLDER ...]

A packed split is one file, `<cache>-<split>.pack`: a tar of the cache's index, its columns beside
the images, and the images as lossless WebP strips. A pack larger than a part is cut into
`<pack>.1-of-2`, ..., which are joined when it is unpacked, from one folder or several. Every shard
is compared with the checksum in the index, so that fingerprints and evidence are those of the cache
that was packed.
"""

import argparse
import io
import re
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kdlib.cache.index import file_name, index_paths, read_indexes, shard_span
from kdlib.cache.shards import Cache
from kdlib.cache.sources import SPLITS
from kdlib.repro import files
from kdlib.repro.npy import NOT_NPY, write_npy
from kdlib.study.load import load_study

PART_MB = 50
# Images of a strip, one below the other: of CIFAR-10 strips of 128 take 98.3 MB in all, strips of
# 511 100.2 MB, sheets of 20 x 50 101.8 MB (2,048 images, extrapolated; Pillow 12, 2026-11)
STRIP = 128
HIGHEST = 16383  # pixels of a WebP image
WEBP = {"lossless": True, "quality": 75, "method": 4}  # method 6: 1.4 % less, in 16 times the time
_PART = re.compile(r"(?P<pack>[\w.-]+\.pack)(\.(?P<i>\d+)-of-(?P<k>\d+))?")


def demand_webp() -> None:
    """Raise RuntimeError where Pillow was built without WebP."""
    from PIL import features

    if not features.check("webp"):
        raise RuntimeError(
            "Pillow on this machine has no WebP, in which packed images are stored; install a "
            "Pillow that has it (`python -m PIL` lists its codecs), or bring the data set itself"
        )


def encode(images: np.ndarray) -> bytes:
    """One strip: images uint8 (n, C, H, W), C 1 or 3, as a lossless WebP of n * H rows."""
    from PIL import Image

    n, channels, height, width = images.shape
    if channels not in (1, 3) or images.dtype != np.uint8:
        raise ValueError(
            f"images are {images.dtype} of {channels} channels; expected uint8 of 1 or 3: WebP has "
            "no others"
        )
    strip = images.transpose(0, 2, 3, 1).reshape(n * height, width, channels)
    strip = np.ascontiguousarray(np.broadcast_to(strip, (n * height, width, 3)))
    content = io.BytesIO()
    Image.fromarray(strip).save(content, "WEBP", **WEBP)
    return content.getvalue()


def decode(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The images of a strip, uint8 (n, *shape), shape (C, H, W)."""
    from PIL import Image

    channels, height, width = shape
    strip = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    return strip.reshape(-1, height, width, 3)[..., :channels].transpose(0, 3, 1, 2)


def _strips(n: int, height: int) -> list[tuple[int, int]]:
    """Rows [start, stop) of each strip of n images."""
    size = max(1, min(STRIP, HIGHEST // height))
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _strip_name(shard: int, number: int) -> str:
    return f"images-{shard:05d}-{number:04d}.webp"


def pack(folder: Path, name: str, dest: Path, part_bytes: int = PART_MB * 10**6) -> list[Path]:
    """Pack the cache in a folder.

    Args:
        name: Of the pack, without its suffix.
        dest: Folder of the result.
        part_bytes: The largest file that is written.

    Returns: The pack, or its parts in order.
    Raises: CacheError for a cache that is not whole and sound; ValueError for images of other than
        1 or 3 channels; RuntimeError without WebP.
    """
    demand_webp()
    cache = Cache(folder)
    cache.verify()
    (index,) = index_paths(folder)
    _, shape = cache.layout("images")
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar, ThreadPoolExecutor() as pool:
        _add(tar, "index.json", index.read_bytes())
        others = [column for column in cache.header["columns"] if column != "images"]
        columns = io.BytesIO()
        np.savez_compressed(columns, **{c: cache.read(c, cache.example_ids) for c in others})
        _add(tar, "columns.npz", columns.getvalue())
        for shard in cache.shards.tolist():
            ids = np.arange(*shard_span(cache.header, shard))
            images = cache.read("images", ids)
            cuts = [images[start:stop] for start, stop in _strips(len(ids), shape[1])]
            for number, strip in enumerate(pool.map(encode, cuts)):
                _add(tar, _strip_name(shard, number), strip)
    return _cut(content.getvalue(), dest / f"{name}.pack", part_bytes)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)  # no times and no owners: equal caches have equal packs
    entry.size = len(content)
    tar.addfile(entry, io.BytesIO(content))


def _cut(content: bytes, path: Path, part_bytes: int) -> list[Path]:
    k = -(-len(content) // part_bytes)
    size = -(-len(content) // k)
    written = []
    for i in range(k):
        part = path if k == 1 else path.with_name(f"{path.name}.{i + 1}-of-{k}")
        piece = content[i * size : (i + 1) * size]
        written.append(files.write_atomic(part, lambda file, piece=piece: file.write(piece)))
    return written


def packs(folders: Iterable[Path]) -> dict[str, bytes]:
    """Every pack in some folders by its name without suffix, parts joined.

    Raises: FileNotFoundError that names the parts that are missing.
    """
    parts: dict[str, dict[tuple[int, int], Path]] = {}
    for folder in folders:
        for path in sorted(folder.iterdir()):
            if found := _PART.fullmatch(path.name):
                place = int(found["i"] or 1), int(found["k"] or 1)
                parts.setdefault(found["pack"], {})[place] = path
    joined = {}
    for name, there in parts.items():
        k = max(k for _, k in there)
        if missing := [f"{name}.{i}-of-{k}" for i in range(1, k + 1) if (i, k) not in there]:
            raise FileNotFoundError(f"parts of a pack are missing: {', '.join(missing)}")
        content = b"".join(there[i, k].read_bytes() for i in range(1, k + 1))
        joined[name.removesuffix(".pack")] = content
    return joined


def unpack(content: bytes, folder: Path) -> Cache:
    """Rebuild the cache that was packed, in a folder; its index is written last.

    Raises: ValueError for a pack that is damaged, with the name of the shard; RuntimeError without
        WebP.
    """
    demand_webp()
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar.getmembers() if m.isfile()}
        index = members["index.json"]
        with np.load(io.BytesIO(members["columns.npz"]), allow_pickle=False) as found:
            columns = dict(found)
    except (tarfile.TarError, KeyError, *NOT_NPY) as error:
        raise ValueError(
            f"this is no pack of ours, or it is cut ({error!r}); pack the cache again"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    trial = folder / "unpacking"  # the index is looked at before it stands where caches are read
    files.write_atomic(trial / "index.json", lambda file: file.write(index))
    header, shards = read_indexes(trial)
    (trial / "index.json").unlink()
    trial.rmdir()
    shape = tuple(header["columns"]["images"][1])
    with ThreadPoolExecutor() as pool:
        for shard, sums in shards.items():
            start, stop = shard_span(header, shard)
            cuts = _strips(stop - start, shape[1])
            try:
                strips = [members[_strip_name(shard, number)] for number in range(len(cuts))]
                images = list(pool.map(lambda strip: decode(strip, shape), strips))
            except (KeyError, OSError, ValueError) as error:
                raise ValueError(
                    f"the images of shard {shard} are missing or damaged in the pack ({error!r})"
                ) from None
            rows = {column: values[start:stop] for column, values in columns.items()}
            rows["images"] = np.ascontiguousarray(np.concatenate(images))
            for column, values in rows.items():
                path = write_npy(folder / file_name(column, shard), values)
                if files.sha256_file(path) != sums[path.name]:
                    path.unlink()
                    raise ValueError(
                        f"{path.name} has another checksum than the packed cache; pack it again"
                    )
    files.write_atomic(folder / "index.json", lambda file: file.write(index))
    return Cache(folder)


def pack_study(path: str, dest: Path, part_bytes: int = PART_MB * 10**6) -> list[Path]:
    """Pack both splits of a study's image cache, which must be built."""
    cache = load_study(path).cache
    written = [pack(cache / split, f"{cache.name}-{split}", dest, part_bytes) for split in SPLITS]
    return [part for parts in written for part in parts]


def unpack_study(path: str, folders: Iterable[Path]) -> Iterator[Cache]:
    """Unpack what of a study's image cache is in some folders.

    Raises: FileNotFoundError where a split of it is not there.
    """
    cache, found = load_study(path).cache, packs(folders)
    for split in SPLITS:
        name = f"{cache.name}-{split}"
        if name not in found:
            raise FileNotFoundError(
                f"no {name}.pack; the packs there are of {', '.join(sorted(found)) or 'nothing'}: "
                "pack the cache of this very study"
            )
        yield unpack(found[name], cache / split)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    packing = commands.add_parser("pack", help="pack the built cache of a study")
    packing.add_argument("study")
    packing.add_argument("dest", type=Path)
    packing.add_argument("--part-mb", type=float, default=PART_MB, help="of the largest file")
    unpacking = commands.add_parser("unpack", help="rebuild the cache of a study from its packs")
    unpacking.add_argument("study")
    unpacking.add_argument("folder", type=Path, nargs="+")
    arguments = parser.parse_args()
    started = time.monotonic()
    try:
        if arguments.command == "pack":
            for part in pack_study(arguments.study, arguments.dest, int(arguments.part_mb * 1e6)):
                print(f"{part}: {part.stat().st_size / 1e6:.2f} MB")
        else:
            for cache in unpack_study(arguments.study, arguments.folder):
                print(f"{cache.folder}: {cache.n_examples:,} images, {cache.fingerprint[:12]}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
