"""Training on several processes that share each batch: the result of one process, to rounding.

Each process runs its share of a batch through the network. Outputs are gathered, and every process
computes the same loss of the whole batch, so that losses between examples are the same for any
number of processes.
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
class World:
    """This process among those that share each batch.

    Attributes:
        rank: Of this process, in [0, size).
        size: Number of processes.
        device: Of this process.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.size == 1


def this_process(device: str) -> World:
    """This process among those of `joined`, or as the only one.

    Args:
        device: Of the study; each of several processes has a GPU for itself.
    """
    if not dist.is_initialized():
        return World(device=device)
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return World(dist.get_rank(), dist.get_world_size(), device)


@contextlib.contextmanager
def joined(device: str, single: bool = False) -> Iterator[World]:
    """Connect the processes that torchrun started; a process started otherwise stays alone.

    Args:
        single: Also connect a process of torchrun that is the only one.
    """
    if not single and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    backend, gpu = "gloo", None
    if device.startswith("cuda"):
        backend, gpu = "nccl", torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(gpu)
    # the other processes wait while the first one waits for a lock or stores a teacher's outputs;
    # NCCL's barrier waits on the device that is named here, and warns when it has to guess
    dist.init_process_group(backend, timeout=timedelta(days=7), device_id=gpu)
    try:
        yield this_process(device)
    finally:
        dist.destroy_process_group()


def launch(arguments: Sequence[str], n: int) -> None:
    """Run `python -m <arguments>` in n processes under torchrun, and wait for them.

    Raises: RuntimeError when one of them fails; that process has printed its error.
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
    """The rows of all processes. Every process computes the same loss from them, so that the
    gradient of its rows is complete without a further exchange."""

    @staticmethod
    def forward(ctx, tensor: Tensor, world: World) -> Tensor:
        ctx.world = world
        tensor = tensor.contiguous()
        parts = [torch.empty_like(tensor) for _ in range(world.size)]
        dist.all_gather(parts, tensor)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(ctx.world.size)[ctx.world.rank], None


def gathered(tensor: Tensor, world: World) -> Tensor:
    """(B / n, ...) of each process to (B, ...), in the order of their ranks."""
    return tensor if world.alone else _Gather.apply(tensor, world)


class _Sum(torch.autograd.Function):
    """The sum over processes; gradients are summed too, since each process holds a part of the
    loss. The differentiable `all_reduce` of torch.distributed.nn cannot be compiled."""

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
    """BatchNorm over the batches of all processes, on CPUs and GPUs; torch.nn.SyncBatchNorm runs on
    GPUs only."""

    @classmethod
    def of(cls, norm: nn.modules.batchnorm._BatchNorm) -> "SyncedBatchNorm":
        """A layer with the parameters and buffers of another one, and with the layers `drop` and
        `act` of timm's BatchNormAct2d."""
        synced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine)
        for name, part in (norm._parameters | norm._buffers | norm._modules).items():
            setattr(synced, name, part)
        return synced.train(norm.training)

    def _check_input_dim(self, x: Tensor) -> None:
        if x.ndim < 2:
            raise ValueError(f"expected at least 2 axes, got {x.ndim}")

    def forward(self, x: Tensor) -> Tensor:
        """As BatchNorm of the whole batch."""
        y = self._normalised(x) if self.training else super().forward(x)
        return self.act(self.drop(y)) if hasattr(self, "act") else y

    def _normalised(self, x: Tensor) -> Tensor:
        axes = [0, *range(2, x.ndim)]
        wide = x.float()
        n = float(wide.numel() // wide.shape[1] * dist.get_world_size())
        mean = _Sum.apply(wide.sum(axes)) / n
        shape = [1, -1] + [1] * (x.ndim - 2)
        centred = wide - mean.view(shape)
        variance = _Sum.apply(centred.square().sum(axes)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            share = 1.0 / float(self.num_batches_tracked)
            momentum = share if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(variance * (n / (n - 1)), momentum)
        scaled = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            scaled = scaled * self.weight.view(shape) + self.bias.view(shape)
        return scaled.to(x.dtype)


def synchronised(module: nn.Module, world: World) -> nn.Module:
    """The module, with every BatchNorm replaced by one that sees the batches of all processes;
    parameters and buffers, and their names, stay."""
    if world.alone:
        return module
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d) and child.track_running_stats:
                setattr(parent, name, SyncedBatchNorm.of(child))
    return module


def distributed(module: nn.Module, world: World) -> nn.Module:
    """The module under DistributedDataParallel where there are several processes. It averages
    gradients of which each process holds a partial sum: multiply the loss by the world size."""
    return module if world.alone else nn.parallel.DistributedDataParallel(module)


def wait(world: World) -> None:
    """Wait until all processes are here."""
    if not world.alone:
        dist.barrier()
