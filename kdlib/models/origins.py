"""What a network begins its training from: weights drawn at random, published ones, or a file's."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdlib.models.base import Network, Origin
from kdlib.models.published import published_weights
from kdlib.models.weights import adopt, read_weights, weights_fingerprint
from kdlib.repro import files
from kdlib.study.models import Begun


def begin(
    network: Network, settings: Begun, image_shape: tuple[int, ...], path: Path | None
) -> None:
    """Give a network that was drawn at random the first weights of its settings, and freeze what
    they freeze. A last layer that is missing there, or for another number of classes, stays drawn.

    Args:
        image_shape: (channels, height, width) of its input.
        path: Of `settings.weights`; None where there are none.

    Raises: FileNotFoundError, RuntimeError or ValueError that says what to do, for weights that are
        not here or do not fit.
    """
    if settings.pretrained:
        tag, state = published_weights(settings.model, image_shape)
        name = f"pretrained: {tag}"
        read = adopt(network, state, f"the published {tag}", "any")
        print(f"{tag}: read {len(state)} published tensors", *read.notes, sep="; ")
    elif path is not None:
        name, read = f"file: {files.sha256_file(path)}", read_weights(network, path, "any")
    if settings.is_given:
        network.origin = Origin(name, read.head, read.notes)
    if settings.freeze:
        network.freeze_backbone()


def begun(network: Network) -> dict[str, Any]:
    """What a network begins from, for the evidence: its `origin`; where that is not random, the
    fingerprint of all that was loaded but the last layer (`body_sha256`), whether that was `loaded`
    too, or `drawn`, or is absent, `none` (`last`), and what was done to names (`notes`); of a last
    layer that was drawn, its fingerprint (`drawn_sha256`), None where its numbers are no random
    ones; and the number of tensors that are not trained (`frozen`), where there are some."""
    origin, facts = network.origin, {"origin": network.origin.name}
    if frozen := sum(not p.requires_grad for p in network.parameters()):
        facts["frozen"] = frozen
    if origin == Origin():
        return facts
    body, last = parts(network)
    facts |= {"body_sha256": weights_fingerprint(body), "notes": [*origin.notes]}
    facts["last"] = "none" if not last else "loaded" if origin.head else "drawn"
    random = {k: v for k, v in last.items() if torch.any(v != v.flatten()[0])}
    is_drawn = random and not origin.head
    return facts | {"drawn_sha256": weights_fingerprint(random) if is_drawn else None}


def parts(network: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of all layers but the last, and those of the last, by name."""
    state, last = network.state_dict(), network.last_names()
    return {k: v for k, v in state.items() if k not in last}, {k: state[k] for k in sorted(last)}
