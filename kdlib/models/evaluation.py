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


class Evaluation(NamedTuple):
    """What an evaluation measured, and what it read.

    Attributes:
        loss: Mean cross-entropy in nats.
        accuracy: In [0, 1].
        n: Images read.
        sha256: Fingerprint of these images and labels, in their order.
    """

    loss: float
    accuracy: float
    n: int
    sha256: str

    @property
    def read(self) -> dict[str, Any]:
        """`n` and `sha256`, for the evidence."""
        return {"n": self.n, "sha256": self.sha256}


def evaluate(
    network: Network, pixels: Pixels, images: torch.Tensor, labels: torch.Tensor
) -> Evaluation:
    """Loss and accuracy of a network on images without augmentation.

    Args:
        images: (N, C, H, W) uint8, on the network's device.
        labels: (N,) int64 in [0, n_classes), on the same device.
    """
    (logits,) = all_outputs(network, pixels, images, ("logits",))
    loss = float(F.cross_entropy(logits.double(), labels))
    return Evaluation(loss, accuracy(logits, labels), len(labels), _read_sha256(images, labels))


# of images: the version of the tensor, the labels and their version, the fingerprint of both
_READ: Any = WeakTensorKeyDictionary()


def _read_sha256(images: torch.Tensor, labels: torch.Tensor) -> str:
    """Fingerprint of images and labels; computed once for tensors that do not change."""
    kept = _READ.get(images)
    if kept is None or kept[0] != images._version or kept[1] is not labels:
        arrays = (tensor.cpu().contiguous().numpy() for tensor in (images, labels))
        kept = _READ[images] = (images._version, labels, files.sha256_array(*arrays))
    return kept[2]
