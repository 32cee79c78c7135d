"""Batches of a plan out of a cache: pixels resident on the device, or mapped from the disk.

A batch is one gather per column and one pass over its pixels; there are no worker processes, and no
Python code runs per image. Where pixels are kept changes no byte of any batch.
"""

import dataclasses
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from kdlib.cache.outputs import stored_columns
from kdlib.cache.shards import Cache
from kdlib.dataset.batch import Batch, Live, View
from kdlib.dataset.fused import available, deliver
from kdlib.dataset.plan import Plan
from kdlib.dataset.rows import ReadAhead, Rows, TeacherRows, free_memory
from kdlib.dataset.views import apply, draw

SHARE = 0.5  # of the free memory that `auto` lets pixels take
COMPILED = 64 * 2**20  # bytes of pixels that a plan draws for which loading machine code pays


class Loader:
    """Batches of a plan, made when asked for.

    A thread works ahead where that pays: it makes the next batch while a GPU computes, and reads
    the shards of the next batches from the disk when pixels are mapped.
    """

    def __init__(
        self,
        plan: Plan,
        images: Cache,
        *,
        view: View | None = None,
        teacher: Cache | None = None,
        reads: Collection[str] = ("logits",),
        live: Live | None = None,
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
            live: Instead of stored outputs, a teacher that is asked for those of each batch's own
                views; it needs a `view`.
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
            `view`; ValueError for another residence, or a live teacher without a view.
        """
        if second is not None and (view is None or (second.settings, second.seed) == (
            view.settings, view.seed
        )):  # fmt: skip
            raise ValueError("the second view of each image is the first one; give another seed")
        self.plan, self.view, self.second, self.device = plan, view, second, torch.device(device)
        ids, columns = plan.example_ids, () if teacher is None else stored_columns(teacher, reads)
        n_bytes = images.row_bytes()["images"]
        n_bytes += sum(teacher.row_bytes()[column] for column in columns)
        if residence not in ("auto", "resident", "mapped"):
            raise ValueError(f"residence is {residence!r}; expected auto, resident or mapped")
        fits = len(ids) * n_bytes <= SHARE * free_memory(self.device)
        self.residence = residence if residence != "auto" else "resident" if fits else "mapped"
        resident, self._on_cpu = self.residence == "resident", self.device.type == "cpu"
        n_drawn = plan.n_steps * plan.batch_size * images.row_bytes()["images"]
        self._fused = self._on_cpu and n_drawn >= COMPILED and available()
        self._pixels = Rows(images, "images", ids, self.device, resident)
        self._labels = images.read("labels", ids) if labels is None else np.array(labels, np.int64)
        if self._labels.shape != ids.shape:
            raise ValueError(f"{len(self._labels)} labels for a plan of {len(ids)} examples")
        self._teacher = None
        if teacher is not None:
            self._teacher = TeacherRows(teacher, columns, view, ids, self.device, resident)
        self.live = live
        if live is not None and view is None:
            raise ValueError("a live teacher is asked for outputs of views; give `view`")
        if live is not None:  # the same views, normalised for the teacher where that differs
            same = live.pixels == view.pixels
            self._live_view = None if same else dataclasses.replace(view, pixels=live.pixels)
        self._share = (rank, world_size)
        self._passes: dict[int, tuple[np.ndarray, ...]] = {}
        self._thread = self._read_ahead = None
        if not (resident and self._on_cpu):
            self._thread = ThreadPoolExecutor(1, "loader")
        if not resident:
            self._read_ahead = ReadAhead(plan, self._pixels, self._share, self._thread, fits)
        # on a CPU a batch is made by the cores that would train meanwhile
        self._works_ahead = not self._on_cpu
        # one set of memory for the batch in use, and one for the next where it is made meanwhile
        self._reuse, self._turn = reuse, 0
        self._buffers: list[dict] = [{}, {}] if self._works_ahead else [{}]
        self._next: tuple[int, Future] | None = None

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
        if self._read_ahead is not None:
            self._read_ahead.at(step)
        if not self._works_ahead:
            return self._make(step)
        waiting, self._next = self._next, None
        batch = None if waiting is None else waiting[1].result()  # it fills one of our buffers
        if batch is None or waiting[0] != step:
            batch = self._make(step)
        if step + 1 < self.plan.n_steps:
            self._next = (step + 1, self._thread.submit(self._make, step + 1))
        return batch

    def raw(self, positions: np.ndarray) -> torch.Tensor:
        """Stored images at some positions, (B, C, H, W) uint8, on the device."""
        return self._pixels.gather(self._pixels.index_of(np.asarray(positions, np.int64)))

    def teacher_rows(self, positions: np.ndarray, views: np.ndarray) -> dict[str, torch.Tensor]:
        """Teacher outputs at some positions: (B, ...) float32 by name. Stored ones are those of one
        view each, those of a live teacher are of images without augmentation."""
        if self.live is not None:
            return self.live(self.live.pixels.prepare(self.raw(positions)))
        return self._teacher.gather(positions, views)

    def close(self) -> None:
        """End the thread; further batches are made when asked for."""
        if self._thread is not None:
            self._thread.shutdown()
        self._read_ahead, self._works_ahead, self._next = None, False, None

    def _make(self, step: int) -> Batch:
        pieces = [
            [column[start:stop] for column in self._pass(number)]
            for number, start, stop in self.plan.pieces(step, *self._share)
        ]
        if len(pieces) == 1:
            passes, ids, positions, labels, index = pieces[0]
        else:
            passes, ids, positions, labels, index = map(np.concatenate, zip(*pieces, strict=True))
        if self._reuse:
            self._turn = (self._turn + 1) % len(self._buffers)
        views = passes
        if self.view is not None and self.view.n_views is not None:
            views = passes % self.view.n_views
        if self.view is None:
            images = self._pixels.gather(index, self._buffer("raw", len(ids)))
        else:
            images = self._inputs("inputs", self.view, index, ids, views)
        teacher = second = None
        if self._teacher is not None:
            teacher = self.teacher_rows(positions, views)
        elif self.live is not None:
            same = self._live_view is None
            teacher = self.live(
                images if same else self._inputs("live", self._live_view, index, ids, views)
            )
        if self.second is not None:
            second = self._inputs("second", self.second, index, ids, passes)
        return Batch(
            example_ids=self._small(ids),
            positions=self._small(positions),
            passes=self._small(passes),
            images=images,
            labels=self._small(labels),
            teacher=teacher,
            second=second,
        )

    def _small(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values if self._reuse else values.copy())
        return tensor if self._on_cpu else tensor.to(self.device, non_blocking=True)

    def _pass(self, number: int) -> tuple[np.ndarray, ...]:
        """Passes, ids, positions, labels and pixel rows of a whole pass, of which a batch is a
        slice."""
        if number not in self._passes:
            order = self.plan.order(number)
            self._passes = {k: v for k, v in self._passes.items() if k >= number - 1}
            self._passes[number] = (
                np.full(len(order), number),
                self.plan.example_ids[order],
                order,
                self._labels[order],
                self._pixels.index_of(order),
            )
        return self._passes[number]

    def _buffer(self, name: str, n: int) -> torch.Tensor | None:
        """Memory for n images that is handed out again; None when a fresh one shall be taken."""
        if not self._reuse:
            return None
        buffers = self._buffers[self._turn]
        if name not in buffers:
            kind, layout = torch.uint8, torch.contiguous_format
            if name != "raw":
                kind, layout = torch.float32, self.view.pixels.memory_format
            buffers[name] = torch.empty(
                (n, *self._pixels.shape), dtype=kind, device=self.device, memory_format=layout
            )
        return buffers[name]

    def _inputs(
        self, name: str, view: View, index: np.ndarray, ids: np.ndarray, views: np.ndarray
    ) -> torch.Tensor:
        """Augmented, normalised float32 images in the memory format the network wants."""
        pixels, shape, out = view.pixels, self._pixels.shape, self._buffer(name, len(ids))
        drawn = draw(
            view.settings, view.seed, torch.from_numpy(views), torch.from_numpy(ids), shape
        )
        if not self._fused:
            return pixels.prepare(apply(self._pixels.gather(index), drawn), out)
        if out is None:
            out = torch.empty((len(index), *shape), memory_format=pixels.memory_format)
        deliver(self._pixels.images, index, drawn, pixels, out, torch.get_num_threads())
        return out
