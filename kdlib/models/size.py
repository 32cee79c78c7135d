"""How large a network is, and what its forward pass costs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kdlib.models.base import Network, eval_mode


def _of_matrices(out: Tensor, left: Tensor, *_: Any) -> int:
    return out.numel() * left.shape[-1]


def _of_convolution(out: Tensor, x: Tensor, weight: Tensor, *_: Any) -> int:
    return out.numel() * weight[0].numel()  # inputs of a group, height, width


def _of_attention(out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


# Name of a function of torch -> its multiply-adds, from its result and arguments
_PRODUCTS: dict[str, Callable[..., int]] = {
    "conv2d": _of_convolution, "scaled_dot_product_attention": _of_attention,
    **dict.fromkeys(("linear", "matmul", "__matmul__", "mm", "bmm"), _of_matrices),
}  # fmt: skip


class _Counter(TorchFunctionMode):
    """Counts in a `with` block. torch's own counter, `torch.utils.flop_counter`, imports its
    compiler, which takes seconds."""

    n = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if products := _PRODUCTS.get(getattr(func, "__name__", "")):
            self.n += products(out, *args)
        return out


@torch.no_grad()
def network_size(network: Network, image_shape: tuple[int, ...]) -> dict[str, float]:
    """Parameters of a network, megabytes (10^6) of its parameters and buffers as they are stored,
    and multiply-adds of its forward pass of one image.

    Counted are the products of convolutions, linear layers, matrices and attention; sums of a bias,
    normalisation, activations and pooling are not.

    Args:
        image_shape: (channels, height, width).
    """
    image = torch.zeros(1, *image_shape, device=next(network.parameters()).device)
    with eval_mode(network), _Counter() as counted:
        network.outputs(image, ("logits" if network.n_classes else "features",))
    tensors = network.state_dict().values()
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "megabytes": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "multiply_adds": counted.n,
    }
