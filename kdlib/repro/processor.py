"""Which instructions a process computes with, so that another processor gives the same bytes.

A processor that can do more is given other kernels, which sum in another order: weights differ from
the first step on. Held to AVX2, and matrix products to one order for all makers, a study gave the
same bytes wherever it was tried (benchmarks/processors.py). Leaves to others: which study asks for
it, and what it then cannot have (params). A GPU is held to float32 and to kernels that sum in one
order (`hold_gpu`).
"""

import os
import platform
import re
import warnings
from pathlib import Path

KERNELS = {  # read when torch computes for the first time
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "MKL_CBWR": "COMPATIBLE",  # matrix products
}


LIBRARIES = {  # read when NumPy is loaded: before a process starts, that is
    "OPENBLAS_CORETYPE": "Haswell",  # matrix products of NumPy and SciPy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",  # exp and log; names of NumPy 2.4
}


def hold_children() -> None:
    """Hold the processes that this one starts, whatever they compute with."""
    os.environ.update(KERNELS | LIBRARIES)


def ask() -> None:
    """Ask torch to hold itself, in time where it has not computed yet."""
    os.environ.update(KERNELS)


def hold() -> None:
    """Hold this process, as far as torch computes; NumPy is held by whoever starts the process.

    Raises: RuntimeError when torch has computed with more already, or where there is no AVX2.
    """
    import torch  # Snakemake asks for the children alone

    ask()
    found = torch.backends.cpu.get_cpu_capability()
    if found != "AVX2":
        raise RuntimeError(
            f"the study asks for the same bytes on every processor (compute.portable), and torch "
            f"computes with {found} here; expected AVX2: restart this process (a kernel: Kernel > "
            "Restart), or set compute.portable: false where the processor has none"
        )


def hold_gpu() -> None:
    """Make a GPU compute float32 in float32, with kernels that give the same bytes in every run.

    PyTorch lets convolutions round their factors to TensorFloat-32, which has 10 bits of mantissa
    instead of 23; a study that says float32 would be given 1e-3 where it expects 1e-7. An operation
    without a deterministic kernel runs all the same, and PyTorch warns.
    """
    import torch

    # cuBLAS reads it when it is first used; without it two streams may give other sums
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with warnings.catch_warnings():
        # PyTorch 2.9 and later have newer names for these two, and refuse to be asked for the older
        # ones, as torch.compile does, once the newer ones differ
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # each buffer is written in full


def name() -> str:
    """This machine's processor, and the instructions that torch takes of it."""
    import torch

    model, told = platform.machine(), Path("/proc/cpuinfo")
    if told.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
