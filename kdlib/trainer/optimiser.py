"""Learning-rate schedules, optimisers, the running mean of weights, patience.

Sources:
    [Loshchilov2017] Loshchilov, Hutter: SGDR: Stochastic Gradient Descent with Warm Restarts.
        arXiv 1608.03983 (cosine).
    [Smith2018] Smith, Topin: Super-Convergence: Very Fast Training of Neural Networks Using Large
        Learning Rates. arXiv 1708.07120 (one cycle).
    [Kingma2015] Kingma, Ba: Adam: A Method for Stochastic Optimization. ICLR 2015,
        arXiv 1412.6980.
    [Loshchilov2019] Loshchilov, Hutter: Decoupled Weight Decay Regularization. arXiv 1711.05101
        (AdamW).
    [Polyak1992] Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging. SIAM J.
        Control Optim. 30(4) (averaged weights).
"""

import functools
import inspect
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from kdlib.study.training import Training


def learning_rate(training: Training, step: int, n_steps: int) -> float:
    """Learning rate of step `step` in [0, n_steps), before the factor by which `plateau` lowers it.

    The warm-up rises linearly to `lr_peak`. Then: `constant` and `plateau` stay; `cosine` falls to
    `lr_floor`, or 0, along half a cosine [Loshchilov2017]; `one_cycle` falls to it linearly, the
    momentum stays [Smith2018]; `step` multiplies by `decay` from each milestone on.
    """
    peak, warmup, floor = training.lr_peak, training.warmup_steps, training.lr_floor or 0.0
    if step < warmup:
        return peak * (step + 1) / warmup
    if training.schedule in ("constant", "plateau"):
        return peak
    if training.schedule == "step":
        return peak * training.decay ** sum(step >= m * n_steps for m in training.milestones)
    done = (step - warmup) / max(1, n_steps - warmup)
    if training.schedule == "one_cycle":
        return floor + (peak - floor) * (1 - done)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * done))


def lowered(training: Training, factor: float) -> float:
    """The factor of the learning rate after a plateau, from that before it."""
    return max(factor * training.decay, (training.lr_floor or 0.0) / training.lr_peak)


def make_optimiser(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, Adam [Kingma2015] with the decay in the gradient, or AdamW
    [Loshchilov2019] with the decay beside it; biases and normalisation weights are not decayed."""
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": training.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if training.optimiser != "sgd":
        adam = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[training.optimiser]
        betas = training.betas or (0.9, 0.999)
        return _plain(adam)(groups, lr=training.lr_peak, betas=betas, fused=True)
    momentum = training.momentum
    return _plain(torch.optim.SGD)(
        groups, lr=training.lr_peak, momentum=momentum, nesterov=momentum > 0, fused=True
    )


@functools.cache
def _plain(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """An optimiser of torch, of the same name, whose methods do not import torch's compiler: that
    takes as long as torch itself. They are wrapped for programs that compile the optimiser."""
    wrapped = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    methods = {name: inspect.unwrap(getattr(kind, name)) for name in wrapped}
    return type(
        kind.__name__, (kind,), methods | {"step": torch.no_grad()(inspect.unwrap(kind.step))}
    )


class Ema:
    """Running mean of a network's weights and BatchNorm statistics [Polyak1992].

    The decay of update t, from 0, is min(decay, (1 + t) / (10 + t)), so that the random initial
    weights soon have no share in the mean.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay, self.n_updates = decay, 0
        self.weights = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take the network's weights into the mean; copy integer counters."""
        keep = min(self.decay, (1 + self.n_updates) / (10 + self.n_updates))
        state = network.state_dict()
        moving = [k for k, v in state.items() if v.is_floating_point()]
        torch._foreach_lerp_(
            [self.weights[k] for k in moving], [state[k] for k in moving], 1 - keep
        )
        for key in state.keys() - set(moving):
            self.weights[key].copy_(state[key])
        self.n_updates += 1

    def load(self, weights: Mapping[str, Tensor], n_updates: int) -> None:
        """Restore a saved mean."""
        self.n_updates = n_updates
        for key, value in weights.items():
            self.weights[key].copy_(value)


class Patience:
    """Counts evaluations since the validation loss last fell.

    Attributes:
        limit: How many evaluations without a lower loss are allowed.
        best: Lowest loss so far.
        waited: Evaluations since then.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.best, self.waited = limit, math.inf, 0

    def spent(self, loss: float) -> bool:
        """Count one more evaluation; whether the limit is exceeded, after which the count begins
        anew."""
        if loss < self.best:
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        if self.waited <= self.limit:
            return False
        self.waited = 0
        return True
