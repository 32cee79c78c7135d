"""A network's outputs for many images, its accuracy and its loss."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network, eval_mode
from kdlib.repro import files


@torch.no_grad()
def outputs(
    network: Network,
    pixels: Pixels,
    images: torch.Tensor,
    wanted: Sequence[str] = ("features", "logits"),
    batch_size: int = 500,
) -> Iterator[tuple[torch.Tensor, ...]]:
    """Outputs of images without augmentation, batch by batch, in evaluation mode.

    Afterwards each module has its former mode.

    Args:
        images: (N, C, H, W) uint8, on the network's device.
        wanted: Names of `Network.outputs`.

    Yields: One (B, ...) tensor for each name, float32.
    """
    with eval_mode(network):
        for chunk in torch.split(images, batch_size):
            values = network.outputs(pixels.prepare(chunk), wanted)
            yield tuple(values[name] for name in wanted)


def all_outputs(
    network: Network,
    pixels: Pixels,
    images: torch.Tensor,
    wanted: Sequence[str] = ("features", "logits"),
) -> tuple[torch.Tensor, ...]:
    """Outputs of all images, one (N, ...) float32 tensor for each name."""
    parts = list(outputs(network, pixels, images, wanted))
    return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


def accuracy(logits: torch.Tensor | np.ndarray, labels: torch.Tensor | np.ndarray) -> float:
    """Fraction of rows whose largest logit is the label's: counts summed, divided once.

    Args:
        logits: (N, C) float, N > 0.
        labels: (N,) int64.

    Returns: In [0, 1].
    Raises: ValueError for no rows, or another number of labels.

    >>> accuracy(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([0, 1]))
    0.5
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    if len(logits) == 0 or len(logits) != len(labels):
        raise ValueError(f"{len(logits)} rows of logits for {len(labels)} labels; expected as many")
    return int((logits.argmax(1) == labels).sum()) / len(labels)


def macro_scores(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 of each class, averaged over the classes that occur in either.

    Args:
        predicted, labels: (N,) int64.

    Returns: `precision`, `recall` and `f1`, in [0, 1]. The precision of a class that is never
        predicted, and the recall of one that has no example, count 0.

    >>> macro_scores(np.array([0, 0, 1]), np.array([0, 1, 1]))
    {'precision': 0.75, 'recall': 0.75, 'f1': 0.6666666666666666}
    """
    n_classes = 1 + max(predicted.max(), labels.max())
    right = np.bincount(labels[predicted == labels], minlength=n_classes)
    named, there = (np.bincount(column, minlength=n_classes) for column in (predicted, labels))
    known = named + there > 0
    right, named, there = right[known], named[known], there[known]
    return {
        "precision": float((right / np.maximum(named, 1)).mean()),
        "recall": float((right / np.maximum(there, 1)).mean()),
        "f1": float((2 * right / (named + there)).mean()),
    }


class Evaluation(NamedTuple):
    """What an evaluation measured, and what it read.

    Attributes:
        loss: Mean cross-entropy in nats; of images without labels the objective's.
        accuracy: In [0, 1]; None without labels.
        n: Images read.
        sha256: Fingerprint of these images and labels, in their order.
        macro: As of `macro_scores`; None where they were not asked for.
    """

    loss: float
    accuracy: float | None
    n: int
    sha256: str
    macro: dict[str, float] | None = None

    @property
    def read(self) -> dict[str, Any]:
        """`n` and `sha256`, for the evidence."""
        return {"n": self.n, "sha256": self.sha256}


def evaluate(
    network: Network,
    pixels: Pixels,
    images: torch.Tensor,
    labels: torch.Tensor,
    macro: bool = False,
) -> Evaluation:
    """Loss and accuracy of a network on images without augmentation.

    Args:
        images: (N, C, H, W) uint8, on the network's device.
        labels: (N,) int64 in [0, n_classes), on the same device.
        macro: Also compute `macro_scores`.
    """
    (logits,) = all_outputs(network, pixels, images, ("logits",))
    loss = float(F.cross_entropy(logits.double(), labels))
    scores = None
    if macro:
        scores = macro_scores(logits.argmax(1).cpu().numpy(), labels.cpu().numpy())
    sha256 = read_sha256(images, labels)
    return Evaluation(loss, accuracy(logits, labels), len(labels), sha256, scores)


# of images: the version of the tensor, the labels and their version, the fingerprint of both
_READ: Any = WeakTensorKeyDictionary()


def read_sha256(images: torch.Tensor, labels: torch.Tensor) -> str:
    """Fingerprint of images and labels; computed once for tensors that do not change."""
    kept = _READ.get(images)
    if kept is None or kept[0] != images._version or kept[1] is not labels:
        arrays = (tensor.cpu().contiguous().numpy() for tensor in (images, labels))
        kept = _READ[images] = (images._version, labels, files.sha256_array(*arrays))
    return kept[2]
