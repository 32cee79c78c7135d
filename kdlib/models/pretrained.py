"""Teachers that were published with their weights: timm's, and those of torch.hub.

Where weights cannot be downloaded, the error says where to put them. A torch.hub network is
downloaded code, which runs where the study says `trust_code: true`.

Sources:
    [Wightman2019] Wightman: PyTorch Image Models (timm), 2019, doi:10.5281/zenodo.4414861.
    [Oquab2024] Oquab et al.: DINOv2: Learning Robust Visual Features without Supervision.
        arXiv 2304.07193.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kdlib.models.base import Network
from kdlib.models.timm_networks import TimmNetwork
from kdlib.models.weights import first_line
from kdlib.study.models import Model, parse_hub


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
        network = _from_hub(model, n_classes, trust_code)
    elif model.name.startswith("timm/"):
        network = _from_timm(model, n_classes, image_shape)
    else:
        raise ValueError(f"{model.name} has no published weights; give teacher.weights")
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
    network = TimmNetwork(body).eval()
    with torch.no_grad():
        network.n_features = network.features(torch.zeros(1, *image_shape)).shape[1]
    network.n_classes = body.num_classes
    return network


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


@contextlib.contextmanager
def _fetching(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and "offline" not in str(error).lower():
            raise
        # a study refuses `weights` for a torch.hub network, whose code comes with them
        file = "" if name.startswith("hub/") else ", or give a file (teacher.weights)"
        raise RuntimeError(
            f"the weights of {name} are not on this machine and could not be downloaded "
            f"({type(error).__name__}: {first_line(error)}); run this once where "
            f"there is a network and copy $TORCH_HOME and $HF_HOME{file}"
        ) from error


class HubNetwork(Network):
    """A torch.hub network: a DINOv2 transformer [Oquab2024], or a classifier that ends in a linear
    layer; of the latter, `layer1`, `layer2`, ... are the stages where it has them."""

    def __init__(self, body: nn.Module, name: str, n_classes: int) -> None:
        super().__init__()
        self.body = body
        self._tokens = hasattr(body, "forward_features") and hasattr(body, "embed_dim")
        if self._tokens:
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
        if self._tokens:
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

    def head(self, features: Tensor) -> Tensor:
        return self._last[0](features)
