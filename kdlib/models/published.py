"""Published networks: timm's, drawn at random or with their weights, and torch.hub's with theirs.

Small images get first layers that keep their resolution. Where weights cannot be downloaded, the
error says where to put them. A torch.hub network is downloaded code, which runs where the study
says `trust_code: true`.

Sources:
[Wightman2019] Wightman: PyTorch Image Models (timm), 2019, doi:10.5281/zenodo.4414861.
[Oquab2024] Oquab et al.: DINOv2: Learning Robust Visual Features without Supervision,
    arXiv:2304.07193.
"""

import contextlib
import inspect
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from kdlib.models.base import Network, check_options, eval_mode
from kdlib.models.weights import BODY
from kdlib.repro import files
from kdlib.repro.seeds import torch_seeded
from kdlib.study.models import Model, parse_hub

# Up to this side in pixels a network for 224-pixel photographs keeps the image's resolution.
SMALL_IMAGE = 64


class TimmNetwork(Network):
    """Any timm network behind the interface of `Network`. Source: [Wightman2019].

    Stages are the last of each resolution, four at most. Those of a plain vision transformer are
    four evenly spaced blocks; their grids are the patch tokens.
    """

    def __init__(self, body: nn.Module, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.body = body
        with eval_mode(self), torch.no_grad():  # one trial image shows whether it fits, and D
            features = self.features(torch.zeros(1, *image_shape))
            self.n_features = features.shape[1]
            self.n_classes = self.head(features).shape[1] if body.num_classes else 0
        info = list(body.feature_info) if hasattr(body, "forward_intermediates") else []
        by_resolution = {stage["reduction"]: number for number, stage in enumerate(info)}
        self._taps = list(by_resolution.values())[-4:]
        if len(by_resolution) == 1:  # a plain transformer
            self._taps = sorted({round(len(info) * k / 4) - 1 for k in range(1, 5)} - {-1})
        self.n_stages = len(self._taps)
        self._options = {}
        if info and "norm" in inspect.signature(body.forward_intermediates).parameters:
            self._options["norm"] = True

    def features(self, x: Tensor) -> Tensor:
        return self.body.forward_head(self.body.forward_features(x), pre_logits=True)

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if not self.n_stages:
            return self.features(x), []
        last, grids = self.body.forward_intermediates(
            x, indices=self._taps, output_fmt="NCHW", **self._options
        )
        return self.body.forward_head(last, pre_logits=True), grids

    @property
    def last(self) -> nn.Module:
        return self.body.get_classifier()


def build_timm(model: Model, n_classes: int, image_shape: tuple[int, ...], seed: int) -> Network:
    """The network of `build_network` for a model `timm/<name>`."""
    import timm

    name, stem, options = _arguments(model, image_shape)
    try:
        with torch_seeded(seed, "init"), torch.no_grad():
            body = timm.create_model(name, pretrained=False, num_classes=n_classes, **options)
            if stem == "small" and "patch_size" not in options:
                _fit_stem(body, model.name, max(image_shape[1:]))
            return TimmNetwork(body, image_shape).train()
    except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{model.name} with options {model.options} cannot be built for images of shape "
            f"{image_shape}: {files.one_line(error)}; take other options, data.image_size, or "
            "another network"
        ) from None


def published_weights(model: Model, image_shape: tuple[int, ...]) -> tuple[str, dict[str, Tensor]]:
    """The weights that timm publishes for a network of `build_timm`, fitted by timm to its number
    of channels and its patches.

    Returns: `<network>.<tag>`, and the tensors by the network's names; those of the last layer are
        for the published number of classes.
    Raises: RuntimeError that says what to do when they cannot be fetched; ValueError for options
        that do not fit them.
    """
    import timm

    name, _, options = _arguments(model, image_shape)
    with _fetching(model.name), torch_seeded(0, "init"):
        body = timm.create_model(name, pretrained=True, **options)
    known = body.pretrained_cfg
    tag = ".".join(filter(None, (known.get("architecture") or name, known.get("tag"))))
    return tag, {BODY + key: value for key, value in body.state_dict().items()}


def _arguments(model: Model, image_shape: tuple[int, ...]) -> tuple[str, str, dict[str, Any]]:
    """The name of a network of timm, its stem (`small` or `original`), and what its constructor is
    given beside the number of classes."""
    import timm

    name, options = model.name.removeprefix("timm/"), dict(model.options)
    if not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"nearest: {', '.join(close)}" if close else "timm.list_models() has all names"
        raise ValueError(f"timm has no network {name!r} to build; {hint}")
    with torch_seeded(0, "init"), torch.device("meta"):  # its signature, without weights
        blank = timm.create_model(name)
    accepted = {p for c in type(blank).__mro__ for p in inspect.signature(c.__init__).parameters}
    fixed: dict[str, Any] = {"in_chans": image_shape[0]}
    if "img_size" in accepted:
        fixed["img_size"] = image_shape[1:]
    taken = {"self", "args", "kwargs", "cfg", "num_classes", *fixed}
    check_options(model, {"stem", *accepted} - taken)
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
    return name, stem, fixed | options


def small_patch(height: int, width: int) -> int:
    """The largest square patch that tiles an image with at least 7 x 7 patches, or else 1 pixel.

    >>> [small_patch(side, side) for side in (8, 28, 32, 64)]
    [1, 4, 4, 8]
    """
    sides = range(1, min(height, width) // 7 + 1)
    return max((p for p in sides if height % p == width % p == 0), default=1)


def _fit_stem(body: nn.Module, name: str, side: int) -> None:
    """Make the first layers of a convolutional network keep the image's resolution, in place; those
    of a VGG keep it already, and its last ones are fitted to grids of few pixels.

    Args:
        side: Of the images, in pixels.
    """
    from timm.models import VGG, RegNet, ResNet

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
    elif isinstance(body, VGG):
        if side < 32:  # after four of its five pools one pixel is left
            body.features[-1] = nn.Identity()
        fc1 = body.pre_logits.fc1  # 7x7, for which timm would repeat the few pixels
        body.pre_logits.fc1 = nn.Conv2d(fc1.in_channels, fc1.out_channels, 1)
        nn.init.kaiming_normal_(body.pre_logits.fc1.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(body.pre_logits.fc1.bias)
        body.pre_logits.input_kernel_size = 1
    elif hasattr(body, "conv_stem"):  # MobileNets, EfficientNets
        body.conv_stem.stride = (1, 1)
    else:
        raise ValueError(
            f"no stem for small images is known for {name}; the option `stem: original` keeps the "
            "stem for photographs; ResNet, RegNet, MobileNet, EfficientNet, VGG, ConvNeXt and ViT "
            "have a small one"
        )


def load_pretrained(
    model: Model, *, n_classes: int, image_shape: tuple[int, int, int], trust_code: bool
) -> Network:
    """A published network with its weights, on the CPU, in evaluation mode, without gradients.

    A classifier for another number of classes is removed; the network then has `n_classes` 0.

    Args:
        model: `timm/<name>` or `timm/<name>.<tag>`, or `hub/<owner>/<repository>:<ref>/<entry>`;
            options go to the function that builds it.
        n_classes: C of the images.
        image_shape: (channels, height, width) of its input.
        trust_code: Whether the code of a torch.hub repository may run here.

    Raises: RuntimeError that says what to do when weights or code cannot be fetched; ValueError for
        a network that cannot be used.
    """
    if model.name.startswith("hub/"):
        network = _from_hub(model, n_classes, trust_code).eval()
        _demand_last_layer(network, model.name, image_shape)
    elif model.name.startswith("timm/"):
        network = _from_timm(model, n_classes, image_shape)
    else:
        raise ValueError(f"{model.name} has no published weights; give teacher.weights")
    if n_classes and not network.n_classes:
        print(
            f"{model.name}: without a classifier of {n_classes} classes; its features are scored "
            "by k-NN"
        )
    return network.eval().requires_grad_(False)


def _from_timm(model: Model, n_classes: int, image_shape: tuple[int, int, int]) -> Network:
    import timm

    name, options = model.name.removeprefix("timm/"), dict(model.options)
    if not timm.is_model(name):
        raise ValueError(f"timm has no network {name!r}; timm.list_models() has all names")
    if name.startswith(("vit", "deit", "beit", "eva")):
        options.setdefault("img_size", image_shape[1:])
    with _fetching(model.name):
        body = timm.create_model(name, pretrained=True, in_chans=image_shape[0], **options)
    if body.num_classes != n_classes:
        body.reset_classifier(0)
    return TimmNetwork(body, image_shape)


def _from_hub(model: Model, n_classes: int, trust_code: bool) -> Network:
    repository, entry = parse_hub(model.name)
    if not trust_code:
        raise ValueError(
            f"{repository} is downloaded code, which would run here: read it, then write "
            "teacher.trust_code: true"
        )
    with _fetching(model.name):
        body = torch.hub.load(
            repository, entry, **model.options, trust_repo=True, skip_validation=True, verbose=False
        )
    return HubNetwork(body, model.name, n_classes)


@torch.no_grad()
def _demand_last_layer(network: "HubNetwork", name: str, image_shape: tuple[int, ...]) -> None:
    """Refuse a network whose answers are not those of its last linear layer: it has another head
    beside it, or more behind it.

    Raises: ValueError.
    """
    if network.finds_tokens:
        return
    x = torch.linspace(-1, 1, image_shape[0] * image_shape[1] * image_shape[2]).view(
        1, *image_shape
    )
    whole, ours = network.body(x), network.head(network.staged(x)[0])
    same = isinstance(whole, Tensor) and whole.shape == ours.shape
    if not same or not torch.allclose(whole, ours, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"{name} does not answer by its last linear layer alone (it answers "
            f"{tuple(getattr(whole, 'shape', ()))}, the layer {tuple(ours.shape)}): its features "
            "would not be those of its classifier; take another network, or its weights in a "
            "network that kdlib builds (teacher.weights)"
        )


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "offline" not in str(error).lower():
            raise
        if "loading state_dict" in str(error):
            raise ValueError(
                f"the published weights of {name} do not fit it with these options: "
                f"{files.one_line(error)}"
            ) from None
        # a study refuses `weights` for a torch.hub network, whose code comes with them
        file = "" if name.startswith("hub/") else ", or give a file (`weights`)"
        raise RuntimeError(
            f"the weights of {name} are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {files.one_line(error)}); run this once where "
            f"there is a network and copy $TORCH_HOME and $HF_HOME{file}"
        ) from error


class HubNetwork(Network):
    """A torch.hub network: a DINOv2 transformer [Oquab2024], or a classifier that ends in a linear
    layer; of the latter, `layer1`, `layer2`, ... are the stages where it has them."""

    def __init__(self, body: nn.Module, name: str, n_classes: int) -> None:
        super().__init__()
        self.body = body
        self.finds_tokens = hasattr(body, "forward_features") and hasattr(body, "embed_dim")
        if self.finds_tokens:
            self.n_features, self.n_classes, self.n_stages = body.embed_dim, 0, 1
            return
        linear = [m for m in body.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ValueError(
                f"{name} is {type(body).__name__}, neither a vision transformer with "
                "forward_features nor a classifier with a linear last layer"
            )
        self._last = [linear[-1]]  # in a list, so that the body's module is not registered twice
        self._layers = [m for n, m in body.named_children() if n.startswith("layer")]
        self.n_features, self.n_stages = linear[-1].in_features, len(self._layers)
        self.n_classes = n_classes if linear[-1].out_features == n_classes else 0

    def staged(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Features (B, D), and the output of each stage, (B, C, H, W)."""
        if self.finds_tokens:
            tokens = self.body.forward_features(x)
            patches = tokens["x_norm_patchtokens"]
            side = round(patches.shape[1] ** 0.5)
            grid = patches.transpose(1, 2).unflatten(2, (side, side))  # (B, N, D) -> (B, D, H, W)
            return tokens["x_norm_clstoken"], [grid]
        seen: dict[nn.Module, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda m, _, out: seen.__setitem__(m, out))
            for module in self._layers
        ]
        hooks.append(
            self._last[0].register_forward_pre_hook(lambda m, given: seen.__setitem__(m, given[0]))
        )
        try:
            self.body(x)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[self._last[0]], [seen[module] for module in self._layers]

    @property
    def last(self) -> nn.Module:
        return self._last[0]
