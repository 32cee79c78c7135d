"""A teacher that computes its outputs while a student is trained, on the views the student sees."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from kdlib.cache.shards import Cache
from kdlib.dataset.batch import Batch
from kdlib.dataset.pixels import Pixels
from kdlib.models.base import Network, in_precision
from kdlib.models.evaluation import accuracy
from kdlib.models.outputs import Replay, view_outputs
from kdlib.models.weights import weights_fingerprint
from kdlib.repro import files
from kdlib.study.training import Augment

AT_ONCE = 500  # images of one forward pass: a batch of more is split
SAMPLE = 256  # examples whose outputs are computed again


class LiveOutputs:
    """A frozen network that is called with the images of a batch.

    Attributes:
        pixels: The normalisation the network was trained with.
    """

    def __init__(
        self, network: Network, pixels: Pixels, wanted: Sequence[str], precision: str = "float32"
    ) -> None:
        """Freeze the network.

        Args:
            network: On the device of the batches; it stays in evaluation mode.
            wanted: Names of `Network.outputs`.
            precision: Of the forward pass, as of a study's `compute`.
        """
        self.network = network.eval().requires_grad_(False)
        self.pixels, self.wanted, self.precision = pixels, tuple(wanted), precision

    @torch.no_grad()
    def __call__(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs of images (B, C, H, W) float32, normalised by `pixels`: (B, ...) float32 by
        name. A function of the images alone."""
        with in_precision(inputs.device.type, self.precision):
            parts = [self.network.outputs(some, self.wanted) for some in inputs.split(AT_ONCE)]
        return {name: torch.cat([part[name].float() for part in parts]) for name in self.wanted}


class Batches(Protocol):
    """What makes the batches of a training, as `kdlib.dataset.Loader` does."""

    def batch(self, step: int) -> Batch:
        """The batch of one step."""

    def __len__(self) -> int:
        """Number of steps."""


def live_evidence(
    live: LiveOutputs, loader: Batches, images: Cache, augment: Augment, seed: int
) -> dict[str, Any]:
    """Outputs of the first batches as the loader returns them, compared with those that are
    computed again as stored outputs are: by example id, from the image cache, in float32.

    Args:
        augment, seed: Of the views the student is to see.

    Returns: `weights_sha256` of the network; `view`; `examples_sha256` of the `n` example ids in
        their order; `drift`, the largest difference of an output relative to its largest value;
        `accuracy` of the logits of these views, None where the objective reads none or images have
        no labels; `precision`.
    """
    ids, drift, logits, labels = [], 0.0, [], []
    replay, n_seen = Replay(1, augment, seed), 0
    for step in range(len(loader)):
        batch = loader.batch(step)
        ids.append(batch.example_ids.cpu().clone())
        again = view_outputs(
            live.network,
            live.pixels,
            images,
            ids[-1].numpy(),
            batch.passes.cpu(),
            replay,
            batch.images.device,
            live.wanted,
        )
        for name, values in again.items():
            largest = values.abs().max().clamp(min=torch.finfo(values.dtype).tiny)
            gap = float((batch.teacher[name] - values).abs().max() / largest)
            drift = gap if gap != gap else max(drift, gap)  # NaN stays
        if "logits" in again and bool((batch.labels >= 0).all()):
            logits.append(batch.teacher["logits"].cpu())
            labels.append(batch.labels.cpu().clone())
        n_seen += len(ids[-1])
        if n_seen >= SAMPLE or drift != drift:
            break
    return {
        "weights_sha256": weights_fingerprint(live.network),
        "view": {"augment": augment.model_dump(mode="json", exclude_none=True), "seed": seed},
        "examples_sha256": files.sha256_array(torch.cat(ids).numpy()),
        "n": n_seen,
        "drift": drift,
        "accuracy": accuracy(torch.cat(logits), torch.cat(labels)) if logits else None,
        "precision": live.precision,
    }
