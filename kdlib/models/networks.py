"""Networks that turn a batch of images into features and logits.

Holds the small networks of the lab, the CIFAR ResNets, any timm network fitted to small images.
Leaves to others: normalising pixels, training, and reading and writing weights (weights).

Sources:
[He2016] He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016,
    arXiv:1512.03385.
[Banbury2021] Banbury et al.: MLPerf Tiny Benchmark, NeurIPS 2021 Datasets and Benchmarks,
    arXiv:2106.07597.
[Zagoruyko2017] Zagoruyko, Komodakis: Paying More Attention to Attention, ICLR 2017,
    arXiv:1612.03928.
[Wightman2019] Wightman: PyTorch Image Models (timm), 2019, doi:10.5281/zenodo.4414861.
"""

import inspect
import re
from collections.abc import Collection
from difflib import get_close_matches

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.dataset.images import Images
from kdlib.repro import files
from kdlib.repro.seeds import torch_seeded
from kdlib.study.study import Model

# Up to this side in pixels a network for 224-pixel photographs keeps the image's resolution.
SMALL_IMAGE = 64


class Network(nn.Module):
    """A classifier in two parts: `forward(x) = head(features(x))`.

    Input is (B, C, H, W) float32, already normalised; features are (B, D) float32, D =
    `n_features`, the input of the last linear layer; logits are (B, C) float32, C = `n_classes`, 0
    of a network without classifier. Between them lie the feature grids of `n_stages` stages, 0 of a
    network that does not show them.
    """

    n_features: int
    n_classes: int
    n_stages: int

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (B, D), and the grid (B, C_k, H_k, W_k) of each stage, in one pass."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Penultimate activations, (B, D)."""
        return self.staged(x)[0]

    def head(self, features: Tensor) -> Tensor:
        """Logits of features, (B, D) -> (B, C)."""
        return self.linear(features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, (B, C)."""
        return self.head(self.features(x))

    def outputs(self, x: Tensor, wanted: Collection[str]) -> dict[str, Tensor]:
        """What one pass gives, by name.

        Args:
            wanted: `logits` (B, C), `features` (B, D), `stage<k>` (B, C_k, H_k, W_k) and
                `attention<k>` (B, H_k, W_k), k from 1: the mean over channels of the squared
                grid, of norm 1 for each example [Zagoruyko2017].

        Raises: ValueError for a name this network has nothing for.
        """
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
        found = re.fullmatch(r"(stage|attention)(\d+)", name)
        if not found or not 1 <= int(found[2]) <= len(grids):
            there = [*(["logits"] if self.n_classes else []), "features"]
            there += [f"{kind}1 to {kind}{self.n_stages}" for kind in ("stage", "attention")
                      if self.n_stages]  # fmt: skip
            raise ValueError(
                f"{type(self).__name__} has no output {name!r}; it has {', '.join(there)}"
            )
        grid = grids[int(found[2]) - 1]
        return grid if found[1] == "stage" else attention_map(grid)

    @torch.no_grad()
    def output_shapes(
        self, image_shape: tuple[int, ...], wanted: Collection[str]
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of outputs without their batch axis, found by a trial that leaves no trace."""
        modes = [(module, module.training) for module in self.modules()]
        place = next(self.parameters()).device
        try:
            found = self.eval().outputs(torch.zeros(1, *image_shape, device=place), wanted)
        finally:
            for module, training in modes:
                module.training = training
        return {name: tuple(value.shape[1:]) for name, value in found.items()}


def attention_map(grid: Tensor) -> Tensor:
    """Where a feature grid is active: mean of squares over channels, of norm 1 for each example.

    Args:
        grid: (B, C, H, W) float.

    Returns: (B, H, W), values >= 0; zeros where the whole grid is zero.
    Source: [Zagoruyko2017], sec. 3.1, with p = 2.
    """
    energy = grid.square().mean(1)
    return F.normalize(energy.flatten(1), dim=1).view_as(energy)


class Resized(Network):
    """A network that sees its images brought to another size, bilinearly; everything else, names of
    weights included, is the network's own."""

    def __init__(self, network: Network, size: int) -> None:
        super().__init__()
        self.size = size
        # its modules under their own names; the network itself is no submodule
        self._modules, self._parameters, self._buffers = (
            network._modules, network._parameters, network._buffers,
        )  # fmt: skip
        object.__setattr__(self, "_network", network)
        self.n_features, self.n_classes = network.n_features, network.n_classes
        self.n_stages = network.n_stages

    def _seen(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        side = (self.size, self.size)
        return F.interpolate(x, side, mode="bilinear", antialias=True, align_corners=False)

    def features(self, x: Tensor) -> Tensor:
        return self._network.features(self._seen(x))

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self._network.staged(self._seen(x))

    def head(self, features: Tensor) -> Tensor:
        return self._network.head(features)


def _draw(network: nn.Module) -> None:
    """Kaiming-normal weights (fan in, gain of ReLU) and zero biases, as in [He2016]."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


class TinyCNN(Network):
    """Two 3x3 convolutions with BatchNorm and ReLU, the second with stride 2 and twice the
    channels, then global average pooling and a linear layer; 1,442 parameters for 1x8x8 images and
    10 classes."""

    def __init__(self, n_classes: int, channels: int, width: int = 8):
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"option width of tiny_cnn is {width!r}; expected an integer >= 1")
        self.n_features, self.n_classes, self.n_stages = 2 * width, n_classes, 2
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        self.linear = nn.Linear(2 * width, n_classes)
        _draw(self)

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = F.relu(self.bn1(self.conv1(x)))
        last = F.relu(self.bn2(self.conv2(first)))
        return last.mean(dim=(2, 3)), [first, last]  # (B, D, H, W) -> (B, D)


class _Block(nn.Module):
    """Two 3x3 convolutions around a shortcut without parameters (option A)."""

    def __init__(self, n_in: int, n_out: int, stride: int, bias: bool = False, eps: float = 1e-5):
        super().__init__()
        self.stride, self.padding = stride, (n_out - n_in) // 2
        self.conv1 = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=bias)
        self.bn1 = nn.BatchNorm2d(n_out, eps)
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=bias)
        self.bn2 = nn.BatchNorm2d(n_out, eps)

    def residual(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        y = self.residual(x)
        if self.stride > 1:  # the new channels are zero, half of them on each side
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, *[self.padding] * 2))
        return F.relu(x + y)


class CifarResNet(Network):
    """ResNet of depth 6n + 2 for small images: three stages of n blocks with 16, 32 and 64 channels
    and parameter-free shortcuts (option A). Source: [He2016], sec. 4.2."""

    def __init__(self, n_classes: int, channels: int, depth: int):
        super().__init__()
        n_blocks = (depth - 2) // 6
        self.n_features, self.n_classes, self.n_stages = 64, n_classes, 3
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (n_in, n_out) in enumerate([(16, 16), (16, 32), (32, 64)], start=1):
            blocks = [_Block(n_in, n_out, stride=1 if stage == 1 else 2)]
            blocks += [_Block(n_out, n_out, stride=1) for _ in range(n_blocks - 1)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, n_classes)
        _draw(self)

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = self.layer1(F.relu(self.bn1(self.conv1(x))))
        middle = self.layer2(first)
        last = self.layer3(middle)
        return last.mean(dim=(2, 3)), [first, middle, last]  # (B, D, H, W) -> (B, D)


class _KerasBlock(_Block):
    """The block of MLPerf Tiny: biases, TensorFlow's padding, a 1x1 convolution as shortcut."""

    def __init__(self, n_in: int, n_out: int, stride: int):
        super().__init__(n_in, n_out, stride, bias=True, eps=1e-3)
        if stride > 1:
            self.conv1.padding = (0, 0)
            self.shortcut = nn.Conv2d(n_in, n_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return F.relu(x + self.residual(x))
        height, width = x.shape[2:]
        padded = F.pad(x, (width % 2, 1, height % 2, 1))  # SAME: left and top only if odd
        return F.relu(self.shortcut(x) + self.residual(padded))


class MlperfResNet8(CifarResNet):
    """The 8-layer reference network of MLPerf Tiny, as its Keras weights need it. These take pixels
    in [0, 255]: mean 0 and std 1/255 for pixels in [0, 1]. Source: [Banbury2021]."""

    def __init__(self, n_classes: int, channels: int):
        super().__init__(n_classes, channels, depth=8)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, eps=1e-3)
        self.layer1, self.layer2 = _KerasBlock(16, 16, 1), _KerasBlock(16, 32, 2)
        self.layer3 = _KerasBlock(32, 64, 2)
        _draw(self)


class TimmNetwork(Network):
    """Any timm network behind the interface of this module. Source: [Wightman2019].

    Stages are the last of each resolution, four at most; of a plain vision transformer, four evenly
    spaced blocks, the grids being their patch tokens.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.n_classes, self.n_features = body.num_classes, body.num_features
        info = list(body.feature_info) if hasattr(body, "forward_intermediates") else []
        by_resolution = {stage["reduction"]: number for number, stage in enumerate(info)}
        self._taps = list(by_resolution.values())[-4:]
        if len(by_resolution) == 1:  # a plain transformer
            self._taps = sorted({round(len(info) * k / 4) - 1 for k in range(1, 5)} - {-1})
        self.n_stages = len(self._taps)
        self._norms = "norm" in inspect.signature(body.forward_intermediates).parameters if (
            info) else False  # fmt: skip

    def features(self, x: Tensor) -> Tensor:
        return self.body.forward_head(self.body.forward_features(x), pre_logits=True)

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.n_stages:
            return self.features(x), []
        norm = {"norm": True} if self._norms else {}
        found, grids = self.body.forward_intermediates(
            x, indices=self._taps, output_fmt="NCHW", **norm
        )
        return self.body.forward_head(found, pre_logits=True), grids

    def head(self, features: Tensor) -> Tensor:
        return self.body.get_classifier()(features)


def build_network(
    model: Model, *, n_classes: int, image_shape: tuple[int, int, int], seed: int
) -> Network:
    """A network on the CPU, in training mode, with weights drawn at random.

    The same arguments give the same bytes; the global generator is left as it was found.

    Args:
        model: Name and options. `tiny_cnn` takes `width`; `timm/<name>` takes `stem` (`small` or
            `original`; `small` is the default up to 64 pixels) and every option of the timm class;
            the others take none.
        n_classes: C, >= 1.
        image_shape: (channels, height, width) of the images to come.
        seed: The run's seed, >= 0; weights have their own stream of it.

    Raises: ValueError for an unknown network or option (with the nearest known one), for an option
        that has an impossible value, and for a timm network that cannot take such images.
    """
    if n_classes < 1 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"asked for {n_classes} classes and images of shape {image_shape}; expected >= 1 class "
            "and (channels, height, width)"
        )
    if model.name.startswith("hub/"):
        raise ValueError(
            f"{model.name} comes with its weights and can be a teacher (teacher.pretrained: true); "
            "it cannot be drawn at random"
        )
    if model.name.startswith("timm/"):
        return _build_timm(model, n_classes, image_shape, seed)
    _check_options(model, {"width"} if model.name == "tiny_cnn" else set())
    with torch_seeded(seed, "init"):
        if model.name == "tiny_cnn":
            return TinyCNN(n_classes, image_shape[0], **model.options)
        if model.name == "mlperf_resnet8":
            return MlperfResNet8(n_classes, image_shape[0])
        depth = int(model.name.removeprefix("cifar_resnet"))
        return CifarResNet(n_classes, image_shape[0], depth)


def network_for(images: Images, model: Model, seed: int, device: str, n_more: int = 0) -> Network:
    """A network for a study's images, and `n_more` classes, with weights drawn from `seed`."""
    n_classes = images.n_classes + n_more
    built = build_network(model, n_classes=n_classes, image_shape=images.image_shape, seed=seed)
    return built.to(device, memory_format=images.pixels.memory_format)


def _check_options(model: Model, known: set[str]) -> None:
    for option in model.options:
        if option not in known:
            hint = files.nearest(option, known) if known else "it takes no options"
            raise ValueError(f"unknown option {option!r} of model {model.name}; {hint}")


def _build_timm(model: Model, n_classes: int, image_shape: tuple[int, ...], seed: int) -> Network:
    import timm

    name, options = model.name.removeprefix("timm/"), dict(model.options)
    if not timm.is_model(name) or "." in name:  # what follows a dot names pretrained weights
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"nearest: {', '.join(close)}" if close else "timm.list_models() has all names"
        raise ValueError(f"timm has no network {name!r} to draw at random; {hint}")
    with torch_seeded(seed, "init"), torch.device("meta"):  # no weights, only its signature
        blank = timm.create_model(name)
    accepted = {p for c in type(blank).__mro__ for p in inspect.signature(c.__init__).parameters}
    fixed = {"num_classes": n_classes, "in_chans": image_shape[0]}
    if "img_size" in accepted:
        fixed["img_size"] = image_shape[1:]
    _check_options(model, {"stem", *accepted} - {"self", "args", "kwargs", "cfg", *fixed})
    side = max(image_shape[1:])
    stem = options.pop("stem", "small" if side <= SMALL_IMAGE else "original")
    if stem not in ("small", "original"):
        raise ValueError(f"option stem of {model.name} is {stem!r}; expected small or original")
    if stem == "small" and "patch_size" in accepted:
        shrinks = len({stage["reduction"] for stage in blank.feature_info}) > 1  # Swin, ConvNeXt
        options.setdefault("patch_size", 1 if shrinks else small_patch(*image_shape[1:]))
    if any(length % options.get("patch_size", 1) for length in image_shape[1:]):
        raise ValueError(
            f"option patch_size of {model.name} is {options['patch_size']}; expected a divisor of "
            f"the image's height and width, {image_shape[1:]}"
        )
    try:
        with torch_seeded(seed, "init"), torch.no_grad():
            body = timm.create_model(name, pretrained=False, **fixed, **options)
            if stem == "small" and "patch_size" not in accepted:
                _fit_stem(body, model.name)
            network = TimmNetwork(body).eval()  # a trial: does it take such images, how wide is D?
            features = network.features(torch.zeros(1, *image_shape))
            network.n_features = features.shape[1]
            network.n_classes = network.head(features).shape[1]
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{model.name} with options {model.options} cannot be built for images of shape "
            f"{image_shape}: {error}"
        ) from None
    return network.train()


def small_patch(height: int, width: int) -> int:
    """The largest square patch that tiles an image with at least 7 x 7 patches, or else 1 pixel.

    >>> [small_patch(side, side) for side in (8, 28, 32, 64)]
    [1, 4, 4, 8]
    """
    sides = range(1, min(height, width) // 7 + 1)
    return max((p for p in sides if height % p == width % p == 0), default=1)


def _fit_stem(body: nn.Module, name: str) -> None:
    """Make the first layers of a convolutional network keep the image's resolution, in place."""
    from timm.models import RegNet, ResNet

    if isinstance(body, ResNet):
        body.maxpool = nn.Identity()
        if isinstance(body.conv1, nn.Conv2d):  # 7x7, stride 2
            n_in, n_out = body.conv1.in_channels, body.conv1.out_channels
            body.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False)
            nn.init.kaiming_normal_(body.conv1.weight, mode="fan_out", nonlinearity="relu")
        else:  # the deep stem of the `d` variants, already 3x3
            body.conv1[0].stride = (1, 1)
    elif isinstance(body, RegNet):
        body.stem.conv.stride = (1, 1)
    elif hasattr(body, "conv_stem"):  # MobileNets, EfficientNets
        body.conv_stem.stride = (1, 1)
    else:
        raise ValueError(
            f"no stem for small images is known for {name}; with the option `stem: original` it "
            "keeps its own, made for photographs; a ResNet, RegNet, MobileNet, EfficientNet, "
            "ConvNeXt or ViT gets a small one"
        )
