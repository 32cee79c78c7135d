"""How fast is a student fed? Images per second of kdlib's loader and of the usual ways, in one run.

    python benchmarks/loading.py [--side 32] [--n 51200] [--threads 2] [--rounds 5]

Every row delivers the same random images: as uint8 with ids and labels, and as float32 after flip,
padded crop (4) and normalisation. The yardstick, `mapped reference`, is what the fastest library
does at best: plain memory-mapped .npy shards, shards in random order and shuffled within,
`torch.index_select` into reused memory, and separate tensor operations for the views. Rounds
alternate between the rows; the median of each is compared. Page cache warm. Libraries that are not
installed are left out.
"""

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from kdlib.cache.build import build_images
from kdlib.cache.shards import Cache
from kdlib.cache.sources import array_source
from kdlib.dataset.batch import View
from kdlib.dataset.fused import available
from kdlib.dataset.loader import Loader
from kdlib.dataset.pixels import Pixels
from kdlib.dataset.plan import Plan
from kdlib.study.training import Augment

BATCH, SHARD = 512, 2048
MEAN, STD = [0.49, 0.48, 0.45], [0.25, 0.24, 0.26]
VIEW = Augment(crop_padding=4, flip=True)
Epoch = Callable[[], Iterator[int]]  # yields the number of images of each batch delivered


def our(
    cache: Cache, n: int, order: str, residence: str, view: bool, window: int = 1, **layout: bool
) -> Epoch:
    """kdlib's loader; each call is the next pass."""
    plan = Plan(np.arange(n), BATCH, 10**6, 0, order=order, shard_size=SHARD, window_shards=window)
    pixels = Pixels(MEAN, STD, **layout)
    loader = Loader(
        plan, cache, view=View(VIEW, 0, pixels) if view else None, residence=residence, reuse=True
    )
    steps = iter(range(10**6))

    def epoch() -> Iterator[int]:
        for _ in range(n // BATCH):
            yield len(loader.batch(next(steps)).images)

    return epoch


def reference(cache: Cache, n: int, order: str, view: bool, reused: bool = True) -> Epoch:
    """Mapped shards, `index_select` into reused memory, separate tensor operations."""
    shards = [cache.mapped("images", s) for s in range(n // SHARD)]
    labels = [cache.mapped("labels", s) for s in range(n // SHARD)]
    whole = cache.resident("images") if order == "shuffled" else None
    all_labels = cache.resident("labels") if order == "shuffled" else None
    shape = shards[0].shape[1:]
    rng = torch.Generator().manual_seed(0)
    raw = torch.empty((BATCH, *shape), dtype=torch.uint8)
    names = torch.empty(BATCH, dtype=torch.int64)
    buffers = torch.empty((BATCH, *shape))

    def deliver(images: torch.Tensor) -> torch.Tensor:
        if not view:
            return images
        return separate(images, rng, buffers if reused else None)

    def shuffled() -> Iterator[int]:
        index = torch.randperm(n, generator=rng)
        for start in range(0, n, BATCH):
            rows = index[start : start + BATCH]
            torch.index_select(whole, 0, rows, out=raw)
            torch.index_select(all_labels, 0, rows, out=names)
            yield len(deliver(raw))

    def by_shard() -> Iterator[int]:
        for shard in torch.randperm(len(shards), generator=rng).tolist():
            index = torch.randperm(SHARD, generator=rng)
            for start in range(0, SHARD, BATCH):
                rows = index[start : start + BATCH]
                torch.index_select(shards[shard], 0, rows, out=raw)
                torch.index_select(labels[shard], 0, rows, out=names)
                _ = rows + shard * SHARD  # the ids
                yield len(deliver(raw))

    return shuffled if order == "shuffled" else by_shard


def separate(
    images: torch.Tensor, rng: torch.Generator, room: torch.Tensor | None = None
) -> torch.Tensor:
    """Flip, padded crop and normalisation by ordinary batched tensor operations."""
    n, c, h, w = images.shape
    pad = VIEW.crop_padding
    x = torch.arange(w).expand(n, w)
    flip = torch.rand(n, generator=rng) < 0.5
    x = torch.where(flip[:, None], w - 1 - x, x)
    x = x + torch.randint(2 * pad + 1, (n, 1), generator=rng)
    y = torch.arange(h) + torch.randint(2 * pad + 1, (n, 1), generator=rng)
    padded = torch.nn.functional.pad(images, (pad, pad, pad, pad))
    index = (y[:, :, None] * (w + 2 * pad) + x[:, None, :]).reshape(n, 1, h * w).expand(n, c, h * w)
    seen = padded.flatten(2).gather(2, index).reshape(n, c, h, w)
    mean, std = (torch.tensor(v).reshape(1, c, 1, 1) * 255 for v in (MEAN, STD))
    if room is None:
        return (seen.float() - mean) / std
    return room.copy_(seen).sub_(mean).div_(std)


def data_loader(images: np.ndarray, labels: np.ndarray, view: bool) -> Epoch:
    """TensorDataset and DataLoader with torchvision's transforms per image."""
    from torch.utils.data import DataLoader, Dataset, TensorDataset
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomCrop(images.shape[2], VIEW.crop_padding),
            v2.RandomHorizontalFlip(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )

    class Transformed(Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return transform(torch.from_numpy(images[i])), int(labels[i])

    plain = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    loader = DataLoader(Transformed() if view else plain, BATCH, shuffle=True)

    def epoch() -> Iterator[int]:
        for batch in loader:
            yield len(batch[0])

    return epoch


def float_shards(images: np.ndarray, folder: Path, view: bool) -> Epoch:
    """float32 shards read whole and cut into batches, as the second earlier study kept them."""
    files = []
    for start in range(0, len(images), SHARD):
        files.append(folder / f"float-{start}.npy")
        np.save(files[-1], images[start : start + SHARD].astype(np.float32) / 255)
    rng = torch.Generator().manual_seed(0)
    mean, std = (torch.tensor(v).reshape(1, -1, 1, 1) for v in (MEAN, STD))

    def epoch() -> Iterator[int]:
        for i in torch.randperm(len(files), generator=rng).tolist():
            shard = torch.from_numpy(np.load(files[i]))
            for rows in torch.randperm(SHARD, generator=rng).split(BATCH):
                batch = shard[rows]
                if view:
                    padded = torch.nn.functional.pad(batch, (4, 4, 4, 4))
                    batch = torch.stack([crop(image, rng) for image in padded])
                    batch = (batch - mean) / std
                yield len(batch)

    def crop(image: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        y, x, flip = torch.randint(9, (3,), generator=rng).tolist()
        side = image.shape[2] - 8
        image = image[:, y : y + side, x : x + side]
        return image.flip(2) if flip % 2 else image

    return epoch


def hugging_face(images: np.ndarray, labels: np.ndarray, view: bool) -> Epoch:
    """`datasets` with fixed-size arrays, in torch format, shuffled."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Array3D(images.shape[1:], "uint8"),
            "label": datasets.Value("int64"),
        }
    )
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features)
    table = table.with_format("torch")
    rng, numpy_rng = torch.Generator().manual_seed(0), np.random.default_rng(0)

    def epoch() -> Iterator[int]:
        for batch in table.shuffle(generator=numpy_rng).iter(BATCH):
            pixels = batch["image"].to(torch.uint8)
            yield len(separate(pixels, rng) if view else pixels)

    return epoch


def h5py_file(images: np.ndarray, labels: np.ndarray, folder: Path, view: bool) -> Epoch:
    """One HDF5 file in chunks of one image, read by shard and shuffled within."""
    import h5py

    file = h5py.File(folder / f"images-{view}.h5", "w")
    stored = file.create_dataset("images", data=images)
    rng = torch.Generator().manual_seed(0)

    def epoch() -> Iterator[int]:
        for shard in torch.randperm(len(images) // SHARD, generator=rng).tolist():
            block = torch.from_numpy(stored[shard * SHARD : (shard + 1) * SHARD])
            for rows in torch.randperm(SHARD, generator=rng).split(BATCH):
                pixels = block.index_select(0, rows)
                _ = labels[rows.numpy() + shard * SHARD]
                yield len(separate(pixels, rng) if view else pixels)

    return epoch


def measure(rows: dict[str, Epoch], rounds: int, limit_s: float) -> dict[str, list[float]]:
    """Images per second of each row in each round, rows taking turns; one round warms up.

    A round of a row ends after a pass or after `limit_s` seconds.
    """
    rates: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, epoch in rows.items():
            start, n = time.perf_counter(), 0
            for size in epoch():
                n += size
                if time.perf_counter() - start > limit_s:
                    break
            if number:
                rates[name].append(n / (time.perf_counter() - start))
    return rates


def table(title: str, rates: dict[str, list[float]], against: dict[str, str]) -> str:
    lines = [f"| {title} | images/s | ratio to its reference |", "| --- | ---: | ---: |"]
    for name, values in rates.items():
        ratios = [v / r for v, r in zip(values, rates[against[name]], strict=True)]
        lines.append(
            f"| {name} | {statistics.median(values):,.0f} | {statistics.median(ratios):.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--n", type=int, default=51200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only-ours", action="store_true", help="leave other libraries out")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    n = chosen.n // SHARD * SHARD
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 3, chosen.side, chosen.side), np.uint8)
    labels = rng.integers(0, 10, n)
    print(
        f"{n:,} images 3x{chosen.side}x{chosen.side}, batch {BATCH}, shards of {SHARD}; "
        f"{chosen.threads} threads, {platform.machine()}, torch {torch.__version__}, fused kernel: "
        f"{available()}; median of {chosen.rounds} rounds\n"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = array_source("random", "train", images, labels, "0123456789")
        cache = build_images(source, folder / "cache", SHARD)
        for view in (False, True):
            rows = {
                "mapped reference, by shard": reference(cache, n, "windowed", view),
                "resident reference, exact shuffle": reference(cache, n, "shuffled", view),
            }
            against = {name: name for name in rows}
            by_shard, exact = rows
            orders = {
                "sequential": ("sequential", 1, by_shard),
                "by shard": ("windowed", 1, by_shard),
                "windows of 8 shards": ("windowed", 8, exact),
                "exact shuffle": ("shuffled", 1, exact),
            }
            for residence in ("mapped", "resident"):
                for order, (kind, window, same) in orders.items():
                    name = f"kdlib {residence}, {order}"
                    rows[name] = our(cache, n, kind, residence, view, window)
                    against[name] = same
            if view:
                last = "kdlib resident, exact shuffle, channels last"
                rows[last] = our(cache, n, "shuffled", "resident", view, channels_last=True)
                rows["reference, fresh memory"] = reference(cache, n, "windowed", view, False)
                against |= {last: exact, "reference, fresh memory": by_shard}
            if not chosen.only_ours:
                others = {
                    "h5py": lambda view=view: h5py_file(images, labels, folder, view),
                    "float32 shards": lambda view=view: float_shards(images, folder, view),
                    "TensorDataset + DataLoader": lambda view=view: data_loader(
                        images, labels, view
                    ),
                    "Hugging Face datasets": lambda view=view: hugging_face(images, labels, view),
                }
                for other, make in others.items():
                    try:
                        rows[other], against[other] = make(), by_shard
                    except ImportError as error:
                        print(f"left out: {other} ({error})")
            title = "float32, flip, crop, normalised" if view else "uint8, ids, labels"
            print(table(title, measure(rows, chosen.rounds, 3.0), against), "\n")


if __name__ == "__main__":
    main()
