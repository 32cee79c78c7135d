"""The interface of every network: images in, features, logits and feature grids out.

Sources:
[Zagoruyko2017] Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017,
    arXiv:1612.03928.
"""

import contextlib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.repro import files
from kdlib.study.models import Model

# Types of a network's passes, by `compute.precision`
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def in_precision(kind: str, precision: str) -> torch.autocast:
    """A `with` block in which networks compute in a precision.

    Args:
        kind: Of the device: `cpu`, `cuda`.
        precision: A key of `DTYPES`.
    """
    dtype = DTYPES[precision]
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


@dataclass(frozen=True)
class Origin:
    """Where the first weights of a network come from.

    Attributes:
        name: `random`, `pretrained: <network of timm>.<tag>`, or `file: <its sha256>`.
        head: Whether those of the last layer come from there, too; else they are drawn.
        notes: What was done to the names and numbers of the file.
    """

    name: str = "random"
    head: bool = False
    notes: tuple[str, ...] = ()


class Network(nn.Module):
    """A classifier in two parts: `forward(x) = head(features(x))`.

    Input is (B, C, H, W) float32, normalised; features are (B, D) float32, the input of the last
    linear layer; logits are (B, C) float32.

    Attributes:
        n_features: D.
        n_classes: C; 0 for a network without a classifier.
        n_stages: Number of stages whose feature grids `staged` returns; 0 for a network that
            returns none.
        image_size: Side in pixels to which `forward` and `outputs` resize images bilinearly; None
            keeps their size. `features` and `staged` take images of the final size.
        origin: Of its first weights.
        frozen: Whether the last layer alone is trained, as `freeze_backbone` says.
    """

    n_features: int
    n_classes: int
    n_stages: int
    image_size: int | None = None
    origin: Origin = Origin()
    frozen: bool = False

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (B, D) and the grid (B, C_k, H_k, W_k) of each stage, from one pass.

        Args:
            x: (B, C, H, W) float32, normalised images.
        """
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Input of the last layer, (B, D), for images as in `staged`."""
        return self.staged(x)[0]

    @property
    def last(self) -> nn.Module:
        """The last layer, from features to logits."""
        return self.linear

    def head(self, features: Tensor) -> Tensor:
        """Logits of features, (B, D) -> (B, C)."""
        return self.last(features)

    def last_names(self) -> set[str]:
        """Names of the last layer's tensors in the state dict."""
        own = set(map(id, self.last.parameters()))
        return {name for name, p in self.named_parameters() if id(p) in own}

    def drop_last(self) -> None:
        """Remove the last layer; `n_classes` is then 0."""
        last = self.last
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if child is last:
                    setattr(module, name, nn.Identity())
        self.n_classes = 0

    def freeze_backbone(self) -> None:
        """Train the last layer alone: all other parameters get no gradient, and all other layers
        stay in evaluation mode, so that BatchNorm keeps its statistics and nothing is dropped."""
        self.requires_grad_(False)
        self.last.requires_grad_(True)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "Network":
        """Training or evaluation mode; of a frozen network the last layer's alone."""
        super().train(mode)
        if self.frozen:
            for child in self.children():
                child.eval()
            self.last.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, C), for images (B, C, H, W) float32 of any size."""
        return self.head(self.features(self._resized(x)))

    def _resized(self, x: Tensor) -> Tensor:
        if self.image_size is None or x.shape[-2:] == (self.image_size, self.image_size):
            return x
        side = (self.image_size, self.image_size)
        return F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """Several outputs of one pass, by name.

        Args:
            wanted: `logits` (B, C), `features` (B, D), `stage<k>` (B, C_k, H_k, W_k) and
                `attention<k>` (B, H_k, W_k), k from 1: the mean over channels of the squared
                grid, of norm 1 for each example [Zagoruyko2017].

        Raises: ValueError for an output that this network does not have.
        """
        x = self._resized(x)
        grids: list[Tensor] = []
        if any(name not in ("logits", "features") for name in wanted):
            features, grids = self.staged(x)
        else:
            features = self.features(x)
        return {name: self._output(name, features, grids) for name in wanted}

    def _output(self, name: str, features: Tensor, grids: list[Tensor]) -> Tensor:
        if name == "features":
            return features
        if name == "logits" and self.n_classes:
            return self.head(features)
        match = re.fullmatch(r"(stage|attention)(\d+)", name)
        if not match or not 1 <= int(match[2]) <= len(grids):
            known = [*(["logits"] if self.n_classes else []), "features"]
            known += [f"{kind}1 to {kind}{self.n_stages}" for kind in ("stage", "attention")
                      if self.n_stages]  # fmt: skip
            raise ValueError(
                f"{type(self).__name__} has no output {name!r}; it has {', '.join(known)}"
            )
        grid = grids[int(match[2]) - 1]
        return grid if match[1] == "stage" else attention_map(grid)

    @torch.no_grad()
    def output_shapes(
        self, image_shape: tuple[int, ...], wanted: Collection[str]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of outputs without their batch axis, measured on one black image."""
        device = next(self.parameters()).device
        with eval_mode(self):
            values = self.outputs(torch.zeros(1, *image_shape, device=device), wanted)
        return {name: tuple(value.shape[1:]) for name, value in values.items()}


def resized(grid: Tensor, size: tuple[int, int]) -> Tensor:
    """A grid (B, C, H, W) resized to another (height, width): averaged over areas where it shrinks,
    interpolated bilinearly where it grows; corners stay corners.

    >>> round(resized(torch.arange(4.0).view(1, 1, 2, 2), (1, 1)).item(), 6)
    1.5
    """
    height, width = grid.shape[-2:]
    if (height, width) == tuple(size):
        return grid
    if size[0] <= height and size[1] <= width:
        return F.adaptive_avg_pool2d(grid, size)
    return F.interpolate(grid, size, mode="bilinear", antialias=True, align_corners=False)


def attention_map(grid: Tensor) -> Tensor:
    """Where a feature grid is active: mean of squares over channels, of norm 1 for each example.

    Args:
        grid: (B, C, H, W) float.

    Returns: (B, H, W), float32 at least, values >= 0; zeros where the whole grid is zero.
    Source: [Zagoruyko2017], sec. 3.1, with p = 2.
    """
    # its squares would lose bits in bfloat16, and the map is part of a loss
    wide = grid.float() if grid.dtype in (torch.float16, torch.bfloat16) else grid
    energy = wide.square().mean(1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


@contextlib.contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Evaluation mode within a `with` block; afterwards each module has its former mode."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def check_options(model: Model, known: set[str]) -> None:
    """Raises: ValueError for an option that the network does not take, with the nearest one."""
    for option in model.options:
        if option not in known:
            hint = files.nearest(option, known) if known else "it takes no options"
            raise ValueError(f"unknown option {option!r} of model {model.name}; {hint}")
