"""The loss of an objective on held-out images: how a training without labels is followed."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.cache.outputs import stored_columns
from kdlib.cache.shards import Cache
from kdlib.dataset.batch import View
from kdlib.dataset.images import Images
from kdlib.dataset.loader import Loader
from kdlib.dataset.rows import TeacherRows
from kdlib.dataset.views import augment
from kdlib.models.base import eval_mode
from kdlib.models.evaluation import Evaluation, read_sha256
from kdlib.study.training import Augment
from kdlib.trainer.distiller import Distiller, Outputs


@dataclass(frozen=True)
class HeldOut:
    """Held-out images with their teacher outputs, as the same views at every evaluation.

    Attributes:
        ids: (N,) int64, on the CPU.
        images: (N, C, H, W) uint8, on the network's device.
        labels: (N,) int64, all -1.
        teacher: From positions among `ids`, and the first view of these images (uint8), to the
            teacher's outputs.
        first: Its pass 0 is the view of each image; `settings` without a change: as it is stored.
        second: Likewise of a second view, for objectives that compare two.
        batch_size: Of the training. Some objectives compare the images of a batch.
    """

    ids: Tensor
    images: Tensor
    labels: Tensor
    teacher: Callable[[np.ndarray, Tensor], Outputs]
    first: View
    second: View | None
    batch_size: int

    def _seen(self, view: View, positions: np.ndarray) -> Tensor:
        ids = self.ids[positions]
        zeros = torch.zeros_like(ids)
        return augment(self.images[positions], ids, zeros, view.settings, view.seed)

    @torch.no_grad()
    def evaluate(self, learner: nn.Module, distiller: Distiller) -> Evaluation:
        """The objective's loss in evaluation mode: its mean over pieces of equal size, of a batch
        of the training or up to two.

        Args:
            learner: From images to what the distiller's loss takes.
        """
        n, total = len(self.ids), 0.0
        views = [self.first] if self.second is None else [self.first, self.second]
        with eval_mode(learner):
            for positions in np.array_split(np.arange(n), max(1, n // self.batch_size)):
                raw = [self._seen(view, positions) for view in views]
                pairs = zip(views, raw, strict=True)
                projected = learner(*(view.pixels.prepare(seen) for view, seen in pairs))
                labels, teacher = self.labels[positions], self.teacher(positions, raw[0])
                total += len(positions) * float(distiller.loss(projected, labels, teacher))
        return Evaluation(total / n, None, n, read_sha256(self.images, self.labels))


def open_held_out(
    images: Images,
    stored: Cache,
    reads: Collection[str],
    loader: Loader,
    replayed: bool,
    batch_size: int,
) -> HeldOut:
    """The validation images as they are stored, or as the first of the replayed views, with the
    outputs of the loader's live teacher, or with stored ones."""
    ids, live, first = images.validation_ids, loader.live, loader.view
    if not replayed:
        first = View(Augment(), 0, images.pixels)
    pixels, labels = images.validation(str(loader.device))
    rows = None
    if live is None:
        columns = stored_columns(stored, reads)
        rows = TeacherRows(stored, columns, first, ids, loader.device, resident=False)

    def outputs(positions: np.ndarray, raw: Tensor) -> Outputs:
        if rows is None:
            return live(live.pixels.prepare(raw))
        return rows.gather(positions, np.zeros_like(positions))

    return HeldOut(torch.from_numpy(ids), pixels, labels, outputs, first, loader.second, batch_size)
