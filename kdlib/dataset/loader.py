"""Batches of a plan out of a cache: pixels resident on the device, or mapped from the disk.

A batch is one gather per column and one pass over its pixels; there are no worker processes, and
nothing is done per image in Python. Where pixels are kept changes no byte of any batch. Leaves to
others: which examples a step sees (`sampling`), what a view is (`augment`, `fused`).
"""

from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from kdlib.cache.outputs import decoded, stored_columns, stored_views
from kdlib.cache.shards import Cache, CacheError
from kdlib.dataset.fused import available, deliver
from kdlib.dataset.memory import SHARE, free_memory
from kdlib.dataset.pixels import Pixels, pixel_scale
from kdlib.dataset.plan import Plan
from kdlib.dataset.rows import Rows, _index
from kdlib.dataset.views import apply, draw
from kdlib.repro import files
from kdlib.study.study import Augment

READ_AHEAD = 16  # steps whose shards are asked for together


ASK_AGAIN = 256  # steps after which a shard may have left the page cache


@dataclass(frozen=True)
class View:
    """How stored pixels become a network's input.

    Attributes:
        settings: Which augmentation.
        seed: Its seed; a view is a function of (seed, pass, example id).
        pixels: Normalisation and memory format.
        n_views: Pass p shows view p % n_views; None: each pass a new one.
    """

    settings: Augment
    seed: int
    pixels: Pixels
    n_views: int | None = None


class Batch(NamedTuple):  # made 10,000 times a second, three times as fast as a frozen dataclass
    """One step's examples.

    Attributes:
        example_ids: (B,) int64.
        positions: (B,) int64, place of each id among the plan's sorted ids.
        passes: (B,) int64, which pass over the training set each example belongs to.
        images: (B, C, H, W) uint8 as stored; float32, augmented and normalised, when the loader
            has a view.
        labels: (B,) int64; -1 is unlabelled.
        teacher: (B, ...) float32 by name, such as `logits`; None without a teacher.
        second: (B, C, H, W) float32, another view of each image; None unless asked for.
    """

    example_ids: torch.Tensor
    positions: torch.Tensor
    passes: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor
    teacher: dict[str, torch.Tensor] | None
    second: torch.Tensor | None = None


class Loader:
    """Batches of a plan, made when asked for.

    A small thread works ahead where that pays: it makes the next batch while a GPU computes, and
    asks the disk for the shards of the next batches when pixels are mapped.
    """

    def __init__(
        self,
        plan: Plan,
        images: Cache,
        *,
        view: View | None = None,
        teacher: Cache | None = None,
        reads: Collection[str] = ("logits",),
        second: View | None = None,
        labels: np.ndarray | None = None,
        device: str = "cpu",
        residence: str = "auto",
        reuse: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Open the columns the plan needs.

        Args:
            images: The image cache the plan's ids are from.
            view: How pixels become inputs; None hands them out as they are stored.
            teacher: Stored outputs of the same images, which go with each batch.
            reads: Which of them.
            second: How a second view of each image is made, for objectives that compare two.
            labels: (N,) int64, one for each of the plan's sorted ids, instead of the stored ones.
            device: Where batches are made.
            residence: `resident` keeps pixels on the device, `mapped` reads them from the disk's
                page cache, `auto` takes the former when they need less than half of the free
                memory there.
            reuse: Hand out the same memory again and again: a batch is then valid until the next
                one is asked for. Saves more time than the copy takes.
            rank: Of `world_size` processes that share each batch.

        Raises: CacheError for damaged shards, or a teacher whose replayed views are not those of
            `view`; ValueError for another residence.
        """
        if residence not in ("auto", "resident", "mapped"):
            raise ValueError(f"residence is {residence!r}; expected auto, resident or mapped")
        self.plan, self.view, self.device = plan, view, torch.device(device)
        if second is not None and (view is None or (second.settings, second.seed) == (
            view.settings, view.seed
        )):  # fmt: skip
            raise ValueError("the second view of each image is the first one; give another seed")
        self.second = second
        self._images = images
        ids = plan.example_ids
        n_bytes = images.row_bytes()["images"]
        if teacher is not None:
            n_bytes += sum(teacher.row_bytes()[c] for c in stored_columns(teacher, reads))
        self._fits = len(ids) * n_bytes <= SHARE * free_memory(self.device)
        self.residence = residence
        if residence == "auto":
            self.residence = "resident" if self._fits else "mapped"
        resident = self.residence == "resident"
        self._pixels = Rows(images, "images", ids, device, resident)
        self._labels = images.read("labels", ids) if labels is None else np.array(labels, np.int64)
        if self._labels.shape != ids.shape:
            raise ValueError(f"{len(self._labels)} labels for a plan of {len(ids)} examples")
        self._teacher = None
        if teacher is not None:
            self._replayed = _agreeing_views(teacher, view)
            self._n_classes = teacher.header["n_classes"]
            self._teacher = {
                column: Rows(teacher, column, ids, device, resident)
                for column in stored_columns(teacher, reads)
            }
        self._rank = (rank, world_size)
        self._passes: dict[int, tuple[np.ndarray, ...]] = {}
        ahead = not resident or self.device.type != "cpu"
        self._thread = ThreadPoolExecutor(1, "loader") if ahead else None
        # on a CPU a batch is made by the cores that would train meanwhile
        self._on_cpu = self.device.type == "cpu"
        self._works_ahead = not self._on_cpu
        # one set of memory for the batch in use, and one for the next where it is made meanwhile
        self._reuse, self._turn = reuse, 0
        self._buffers: list[dict] = [{}, {}] if self._works_ahead else [{}]
        self._next: tuple[int, Future] | None = None
        self._reading: Future | None = None
        self._asked: dict[int, int] = {}  # shard -> step at which it was last asked for
        self._look = 0  # from this step on it is time to look ahead again

    @property
    def has_teacher(self) -> bool:
        """Whether teacher outputs go with each batch."""
        return self._teacher is not None

    @property
    def labels(self) -> torch.Tensor:
        """(N,) int64: the label at each position."""
        return torch.from_numpy(self._labels).to(self.device)

    def __len__(self) -> int:
        """Number of batches: the steps of the plan."""
        return self.plan.n_steps

    def __iter__(self) -> Iterator[Batch]:
        """Every batch of the plan, from the first step to the last."""
        return map(self.batch, range(len(self)))

    def batch(self, step: int) -> Batch:
        """The batch of one step, on the device."""
        if self._thread is None:
            return self._make(step)
        if self.residence == "mapped" and step >= self._look:
            self._look = step + READ_AHEAD
            if self._reading is not None and self._reading.done():
                self._reading.result()  # raises what went wrong there
            self._reading = self._thread.submit(self._read_ahead, step)
        if not self._works_ahead:
            return self._make(step)
        waiting, self._next = self._next, None
        made = None if waiting is None else waiting[1].result()  # it fills one of our buffers
        if made is None or waiting[0] != step:
            made = self._make(step)
        if step + 1 < self.plan.n_steps:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return made

    def _read_ahead(self, step: int) -> None:
        """Bring the shards of the next two stretches of steps into memory."""
        steps = range(step, min(step + 2 * READ_AHEAD, self.plan.n_steps))
        positions = np.concatenate([self.plan.at(s, *self._rank)[1] for s in steps])
        for number in np.unique(self._pixels.shard_of[positions]).tolist():
            if self._asked.get(number, -np.inf) < step - ASK_AGAIN:
                self._asked[number] = step
                self._pixels.populate(number)
        if len(self._asked) == self.plan.n_shards and self._fits:  # all are here, and stay
            self._look = self.plan.n_steps

    def close(self) -> None:
        """End the thread; further batches are made when asked for."""
        if self._thread is not None:
            self._thread.shutdown()
        self._thread = self._next = None

    def _make(self, step: int) -> Batch:
        pieces = [
            [column[start:stop] for column in self._pass(number)]
            for number, start, stop in self.plan.pieces(step, *self._rank)
        ]
        if len(pieces) == 1:
            passes, ids, positions, labels, index = pieces[0]
        else:
            passes, ids, positions, labels, index = map(np.concatenate, zip(*pieces, strict=True))
        buffers = None
        if self._reuse:
            self._turn = (self._turn + 1) % len(self._buffers)
            buffers = self._buffers[self._turn]
        views = passes
        if self.view is not None and self.view.n_views is not None:
            views = passes % self.view.n_views
        if self.view is None:
            images = self._pixels.gather(index, self._room(buffers, "raw", len(ids)))
        else:
            images = self._inputs(index, ids, views, self._room(buffers, "inputs", len(ids)))
        second = None
        if self.second is not None:
            out = self._room(buffers, "second", len(ids))
            second = self._inputs(index, ids, passes, out, self.second)
        return Batch(
            example_ids=self._small(ids),
            positions=self._small(positions),
            passes=self._small(passes),
            images=images,
            labels=self._small(labels),
            teacher=self.teacher_rows(positions, views) if self.has_teacher else None,
            second=second,
        )

    def _small(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values if self._reuse else values.copy())
        return tensor if self._on_cpu else tensor.to(self.device, non_blocking=True)

    def _pass(self, number: int) -> tuple[np.ndarray, ...]:
        """Passes, ids, positions, labels and pixel rows of a whole pass, of which a batch is a
        slice."""
        if number not in self._passes:
            order, index = self.plan.order(number), self._pixels.index
            self._passes = {k: v for k, v in self._passes.items() if k >= number - 1}
            self._passes[number] = (
                np.full(len(order), number),
                self.plan.example_ids[order],
                order,
                self._labels[order],
                order if index is None else index[order],
            )
        return self._passes[number]

    def _room(self, buffers: dict | None, name: str, n: int) -> torch.Tensor | None:
        """Memory for n images that is handed out again; None when a fresh one shall be taken."""
        if buffers is None:
            return None
        if name not in buffers:
            _, shape = self._images.layout("images")
            kind, layout = torch.uint8, torch.contiguous_format
            if name != "raw":
                kind, layout = torch.float32, self.view.pixels.memory_format
            buffers[name] = torch.empty(
                (n, *shape), dtype=kind, device=self.device, memory_format=layout
            )
        return buffers[name]

    def _inputs(
        self,
        index: np.ndarray,
        ids: np.ndarray,
        views: np.ndarray,
        out: torch.Tensor | None,
        view: View | None = None,
    ) -> torch.Tensor:
        """Augmented, normalised float32 images in the memory format the network wants."""
        view = view or self.view
        pixels, shape = view.pixels, self._pixels.shape
        numbers, names = torch.from_numpy(views), torch.from_numpy(ids)
        drawn = draw(view.settings, view.seed, numbers, names, shape)
        if not (self._on_cpu and available()):
            raw = self._pixels.gather(index)
            return pixels.prepare(apply(raw, drawn), out)
        if out is None:
            out = torch.empty((len(index), *shape), memory_format=pixels.memory_format)
        source = self._pixels.source
        whole = source.as_strided(
            (len(source), *shape), (source.stride(0), shape[1] * shape[2], shape[2], 1)
        )
        scale, shift = pixel_scale(pixels.mean, pixels.std)
        deliver(whole, index, drawn, scale, shift, out, n_threads=torch.get_num_threads())
        return out

    def raw(self, positions: np.ndarray) -> torch.Tensor:
        """Stored images at some positions, (B, C, H, W) uint8, on the device."""
        return self._pixels.gather(_index(self._pixels, np.asarray(positions, np.int64)))

    def teacher_rows(self, positions: np.ndarray, views: np.ndarray) -> dict[str, torch.Tensor]:
        """Stored teacher outputs at some positions, of the view each was seen in: (B, ...) float32
        by name."""
        parts = {
            column: rows.gather(_index(rows, positions)) for column, rows in self._teacher.items()
        }
        if self._replayed:
            index = torch.from_numpy(views).to(self.device)
            every = torch.arange(len(index), device=self.device)
            parts = {column: part[every, index] for column, part in parts.items()}
        else:
            parts = {column: part[:, 0] for column, part in parts.items()}
        return decoded(parts, self._n_classes)


def _agreeing_views(teacher: Cache, view: View | None) -> bool:
    """Whether the stored outputs are of replayed views, which are then those of `view`."""
    theirs = stored_views(teacher)
    if theirs is None:
        return False
    ours = {}
    if view is not None:
        augment = view.settings.model_dump(mode="json")
        ours = {"n": view.n_views, "augment": augment, "seed": view.seed}
    if lines := files.difference(ours, theirs):
        raise CacheError(
            f"{teacher.folder} holds outputs of other views than the student would see (there -> "
            f"here): {'; '.join(lines)} (study: teacher.outputs, training.augment)"
        )
    return True
