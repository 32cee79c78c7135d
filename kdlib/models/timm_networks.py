"""Any network of timm, with its first layers fitted to small images.

Sources:
[Wightman2019] Wightman: PyTorch Image Models (timm), 2019, doi:10.5281/zenodo.4414861.
"""

import inspect
from difflib import get_close_matches

import torch
from torch import Tensor, nn

from kdlib.models.base import Network, check_options
from kdlib.repro.seeds import torch_seeded
from kdlib.study.models import Model

# Up to this side in pixels a network for 224-pixel photographs keeps the image's resolution.
SMALL_IMAGE = 64


class TimmNetwork(Network):
    """Any timm network behind the interface of `Network`. Source: [Wightman2019].

    Stages are the last of each resolution, four at most. Those of a plain vision transformer are
    four evenly spaced blocks; their grids are the patch tokens.
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
        last, grids = self.body.forward_intermediates(
            x, indices=self._taps, output_fmt="NCHW", **norm
        )
        return self.body.forward_head(last, pre_logits=True), grids

    def head(self, features: Tensor) -> Tensor:
        return self.body.get_classifier()(features)


def build_timm(model: Model, n_classes: int, image_shape: tuple[int, ...], seed: int) -> Network:
    """The network of `build_network` for a model `timm/<name>`."""
    import timm

    name, options = model.name.removeprefix("timm/"), dict(model.options)
    if not timm.is_model(name) or "." in name:  # what follows a dot names pretrained weights
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"nearest: {', '.join(close)}" if close else "timm.list_models() has all names"
        raise ValueError(f"timm has no network {name!r} to draw at random; {hint}")
    with torch_seeded(seed, "init"), torch.device("meta"):  # its signature, without weights
        blank = timm.create_model(name)
    accepted = {p for c in type(blank).__mro__ for p in inspect.signature(c.__init__).parameters}
    fixed = {"num_classes": n_classes, "in_chans": image_shape[0]}
    if "img_size" in accepted:
        fixed["img_size"] = image_shape[1:]
    check_options(model, {"stem", *accepted} - {"self", "args", "kwargs", "cfg", *fixed})
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
            network = TimmNetwork(body).eval()  # one trial image shows whether it fits, and D
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
            f"no stem for small images is known for {name}; the option `stem: original` keeps the "
            "stem for photographs; ResNet, RegNet, MobileNet, EfficientNet, ConvNeXt and ViT have "
            "a small one"
        )
