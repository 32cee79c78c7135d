"""How large a network is, and what its forward pass costs."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from kdlib.models.base import Network, eval_mode


@torch.no_grad()
def network_size(network: Network, image_shape: tuple[int, ...]) -> dict[str, float]:
    """Parameters of a network, megabytes (10^6) of its parameters and buffers as they are stored,
    and multiply-adds of its forward pass of one image.

    Counted are the products of convolutions, linear layers and attention; sums of a bias,
    normalisation, activations and pooling are not.

    Args:
        image_shape: (channels, height, width).
    """
    first = next(network.parameters())
    with eval_mode(network), FlopCounterMode(display=False) as counted:
        image = torch.zeros(1, *image_shape, device=first.device)
        network.outputs(image, ("logits" if network.n_classes else "features",))
    tensors = network.state_dict().values()
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "megabytes": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "multiply_adds": counted.get_total_flops() // 2,
    }
