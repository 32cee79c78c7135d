"""Several processes that share each batch and train what one process would, to rounding.

Each process runs its share of a batch through the network; outputs are gathered, and every process
computes the same loss of the whole batch, so that losses which relate examples to each other mean
the same for any number of processes. Leaves to others: which examples a process sees (`sampling`),
and the training itself (`trainer`).
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """Which process this is of how many.

    Attributes:
        rank: In [0, n).
        n: Processes.
        device: This process's own.
    """

    rank: int = 0
    n: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes what all have made."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.n == 1


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, or be alone.

    Args:
        device: Of the study; on GPUs each process takes its own.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(device=device)
        return
    with _group(device) as ranks:
        yield ranks


@contextlib.contextmanager
def _group(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun started, even where this is the only one."""
    kind, own = "gloo", None
    if device.startswith("cuda"):
        kind, device = "nccl", f"cuda:{os.environ['LOCAL_RANK']}"
        own = torch.device(device)  # where NCCL's barrier waits; otherwise it guesses, and warns
        torch.cuda.set_device(own)
    # the others wait while the first one waits for a lock, or stores a teacher's outputs
    dist.init_process_group(kind, timeout=timedelta(days=7), device_id=own)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def launch(arguments: Sequence[str], n: int) -> None:
    """Run `python -m <arguments>` in n processes under torchrun, and wait for them.

    Raises: RuntimeError when one of them fails; its own error was printed before.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(n), "--max-restarts", "0", "-m", *arguments]
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    process = subprocess.Popen(command, env=environment)
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    if status:
        raise RuntimeError(
            f"{n} processes of `python -m {' '.join(arguments)}` ended with status {status}; the "
            "error of the one that failed stands above"
        )


class _Gather(torch.autograd.Function):
    """All processes' rows. Every process computes the same loss from them, so the gradient of the
    own rows is whole without any further exchange."""

    @staticmethod
    def forward(ctx, tensor: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(ranks.n)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.ranks.n)[ctx.ranks.rank], None


def gathered(tensor: Tensor, ranks: Ranks) -> Tensor:
    """(B / n, ...) of each process to (B, ...), in the order of their ranks."""
    return tensor if ranks.alone else _Gather.apply(tensor, ranks)


class _Sum(torch.autograd.Function):
    """The sum over processes; its gradient is summed, too, as each holds a part of the loss."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SyncedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the batches of all processes, on any device. PyTorch's own one needs GPUs."""

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2 axes, got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """As BatchNorm of the whole batch."""
        if not self.training:
            return super().forward(x)
        axes = [0, *range(2, x.ndim)]
        wide = x.float()
        n = float(wide.numel() // wide.shape[1] * dist.get_world_size())
        mean = _Sum.apply(wide.sum(axes)) / n
        shape = [1, -1] + [1] * (x.ndim - 2)
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), momentum)
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        scaled = scaled.to(x.dtype)
        # timm's BatchNormAct2d drops and activates within
        return self.act(self.drop(scaled)) if hasattr(self, "act") else scaled


def synchronised(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module, in which every BatchNorm now sees the batches of all processes; parameters,
    buffers and their names stay."""
    if ranks.alone:
        return module
    for child in module.modules():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.track_running_stats:
            child.__class__ = _synced(type(child))
    return module


def _synced(kind: type) -> type:
    """SyncedBatchNorm that is still an instance of its former class."""
    if kind not in _SYNCED:
        _SYNCED[kind] = type(f"Synced{kind.__name__}", (SyncedBatchNorm, kind), {})
    return _SYNCED[kind]


_SYNCED: dict[type, type] = {}


def distributed(module: nn.Module, ranks: Ranks) -> nn.Module:
    """The module under DistributedDataParallel; itself when alone."""
    if ranks.alone:
        return module
    return nn.parallel.DistributedDataParallel(module)


def summed_loss(loss: Tensor, ranks: Ranks) -> Tensor:
    """The loss to call `backward` on: each process holds its part of one gradient, and
    DistributedDataParallel takes their mean where their sum is meant."""
    return loss if ranks.alone else loss * ranks.n


def wait(ranks: Ranks) -> None:
    """Go on when all processes are here."""
    if not ranks.alone:
        dist.barrier()
