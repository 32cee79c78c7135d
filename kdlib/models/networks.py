"""The small networks of this package, and the function that builds a network by its name.

Sources:
[He2016] He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016,
    arXiv:1512.03385.
[Banbury2021] Banbury et al.: MLPerf Tiny Benchmark, NeurIPS 2021 Datasets and Benchmarks,
    arXiv:2106.07597.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from kdlib.dataset.images import Images
from kdlib.models.base import Network, check_options
from kdlib.models.published import build_timm
from kdlib.repro.seeds import torch_seeded
from kdlib.study.models import Model


def _draw(network: nn.Module) -> None:
    """Kaiming-normal weights (fan in, gain of ReLU) and zero biases, as in [He2016]."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _last_layer(n_features: int, n_classes: int) -> nn.Module:
    return nn.Linear(n_features, n_classes) if n_classes else nn.Identity()


class TinyCNN(Network):
    """Two 3x3 convolutions with BatchNorm and ReLU, the second with stride 2 and twice the
    channels, then global average pooling, dropout and a linear layer; 1,442 parameters for 1x8x8
    images and 10 classes. Without BatchNorm the convolutions have biases."""

    def __init__(
        self,
        n_classes: int,
        channels: int,
        width: int = 8,
        batch_norm: bool = True,
        dropout: float = 0.0,
    ):
        super().__init__()
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f"option width of tiny_cnn is {width!r}; expected an integer >= 1")
        if not isinstance(batch_norm, bool) or not 0 <= dropout < 1:
            raise ValueError(
                f"options batch_norm and dropout of tiny_cnn are {batch_norm!r} and {dropout!r}; "
                "expected true or false, and a number in [0, 1)"
            )
        self.n_features, self.n_classes, self.n_stages = 2 * width, n_classes, 2
        norm, bias = nn.BatchNorm2d if batch_norm else nn.Identity, not batch_norm
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=bias)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=bias)
        self.bn2 = norm(2 * width)
        self.drop = nn.Dropout(dropout) if dropout else nn.Identity()
        self.linear = _last_layer(2 * width, n_classes)
        _draw(self)

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        first = F.relu(self.bn1(self.conv1(x)))
        last = F.relu(self.bn2(self.conv2(first)))
        return last.mean(dim=(2, 3)), [first, last]  # (B, D, H, W) -> (B, D)

    def head(self, features: Tensor) -> Tensor:
        return self.linear(self.drop(features))


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
        self.linear = _last_layer(64, n_classes)
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
    """The 8-layer reference network of MLPerf Tiny, as its Keras weights need it. They take pixels
    in [0, 255]: mean 0 and std 1/255 for pixels in [0, 1]. Source: [Banbury2021]."""

    def __init__(self, n_classes: int, channels: int):
        super().__init__(n_classes, channels, depth=8)
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(16, eps=1e-3)
        self.layer1, self.layer2 = _KerasBlock(16, 16, 1), _KerasBlock(16, 32, 2)
        self.layer3 = _KerasBlock(32, 64, 2)
        _draw(self)


def build_network(
    model: Model, *, n_classes: int, image_shape: tuple[int, int, int], seed: int
) -> Network:
    """A network on the CPU, in training mode, with weights drawn at random.

    The same arguments give the same bytes; the state of torch's global generator is kept.

    Args:
        model: Name and options. `tiny_cnn` takes `width`, `batch_norm` and `dropout`;
            `timm/<name>` takes `stem` (`small` or `original`; `small` is the default up to 64
            pixels) and every option of the timm class; the others take none.
        n_classes: C, >= 0; 0: without a last layer.
        image_shape: (channels, height, width) of its images.
        seed: >= 0; weights are drawn from its stream `init`.

    Raises: ValueError for an unknown network or option (with the nearest known one), for an option
        that has an impossible value, and for a timm network that cannot take such images.
    """
    if n_classes < 0 or len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(
            f"asked for {n_classes} classes and images of shape {image_shape}; expected 0 or more "
            "classes and (channels, height, width)"
        )
    if model.name.startswith("hub/"):
        raise ValueError(
            f"{model.name} comes with its weights and can be a teacher (teacher.pretrained: true); "
            "it cannot be drawn at random"
        )
    if model.name.startswith("timm/"):
        return build_timm(model, n_classes, image_shape, seed)
    tiny = {"width", "batch_norm", "dropout"}
    check_options(model, tiny if model.name == "tiny_cnn" else set())
    with torch_seeded(seed, "init"):
        if model.name == "tiny_cnn":
            return TinyCNN(n_classes, image_shape[0], **model.options)
        if model.name == "mlperf_resnet8":
            return MlperfResNet8(n_classes, image_shape[0])
        depth = int(model.name.removeprefix("cifar_resnet"))
        return CifarResNet(n_classes, image_shape[0], depth)


def network_for(images: Images, model: Model, seed: int, device: str, n_more: int = 0) -> Network:
    """A network for a study's images, with weights drawn from `seed` and `n_more` further classes,
    on a device; without a last layer for images without labels."""
    n_classes = images.n_classes + n_more
    network = build_network(model, n_classes=n_classes, image_shape=images.image_shape, seed=seed)
    return network.to(device, memory_format=images.pixels.memory_format)
