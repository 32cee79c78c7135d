"""Norms of the loss gradient of each example (GraNd).

[Paul2021] Paul et al., Deep Learning on a Data Diet, 2021, arXiv 2107.07075
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, vmap
from tqdm.auto import tqdm

from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network, eval_mode

CHUNK_BYTES = 2**27  # of one chunk's gradients; a ResNet-8 has 300 kB of them for each example


def gradient_norms(
    network: Network,
    pixels: Pixels,
    images: Tensor,
    labels: Tensor,
    describe: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """GraNd of each example under one set of weights: over all weights, and over the last layer's.

    The gradient is that of the cross-entropy of one clean image, computed for each image
    separately (`torch.func`). BatchNorm uses its running statistics, so that no example enters the
    gradient of another; afterwards the network has its former mode.

    Args:
        images: (N, C, H, W) uint8, on the network's device.
        labels: (N,) int64 in [0, n_classes).
        describe: Word in front of a progress bar; None for none.

    Returns: `grand` and `grand_last`, each (N,) float64 >= 0; high = hard. `grand_last` is
        |softmax - onehot| * sqrt(|features|^2 + 1), the closed form for a linear layer with bias.
    Source: [Paul2021], definition 2.1; the paper averages over several initialisations, here it is
        one run. Its code takes the gradient of all weights, as `grand`; some ports of it compute
        the last layer's alone.
    """
    if len(images) == 0:
        return np.empty(0), np.empty(0)
    weights = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(network, (weights, buffers), (image[None],))
        return F.cross_entropy(logits, label[None])

    of_each = vmap(grad(loss), in_dims=(None, 0, 0))
    n_bytes = sum(p.numel() * p.element_size() for p in weights.values())
    chunk = max(1, min(256, CHUNK_BYTES // n_bytes))
    whole, last = [], []
    progress = tqdm(total=len(images), desc=describe, unit="img", leave=False, disable=not describe)
    with progress, eval_mode(network):
        for some, gold in zip(images.split(chunk), labels.split(chunk), strict=True):
            inputs = pixels.prepare(some).contiguous()
            gradients = of_each(weights, inputs, gold)
            squares = sum(g.flatten(1).double().square().sum(1) for g in gradients.values())
            whole.append(squares)
            with torch.no_grad():
                last.append(_last_layer(network, inputs, gold))
            progress.update(len(some))
    # NumPy's square root has the same bytes on every processor, torch's has not
    return np.sqrt(torch.cat(whole).cpu().numpy()), np.sqrt(torch.cat(last).cpu().numpy())


def _last_layer(network: Network, inputs: Tensor, labels: Tensor) -> Tensor:
    """Squared norm of the gradient of a last layer with bias: (p - onehot) x [features, 1]."""
    values = network.outputs(inputs, ("features", "logits"))
    features = values["features"]
    probs = torch.softmax(values["logits"].double(), 1)
    error = probs - F.one_hot(labels, network.n_classes)
    return error.square().sum(1) * (features.double().square().sum(1) + 1)
