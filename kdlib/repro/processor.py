"""Limits a process to AVX2 instructions, so that another processor gives the same bytes.

On a processor with more instructions, libraries choose kernels that sum in another order, and the
weights differ from the first step on. Limited to AVX2, with matrix products in one order for all
makers, a study gave the same bytes wherever it was tried (benchmarks/processors.py). A GPU is
limited to float32 and to kernels that sum in one order (`hold_gpu`).
"""

import os
import platform
import re
import warnings
from pathlib import Path

KERNELS = {  # read when torch computes for the first time
    "ATEN_CPU_CAPABILITY": "avx2",  # torch
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "MKL_CBWR": "COMPATIBLE",  # matrix products
}

LIBRARIES = {  # read when NumPy is loaded: before a process starts, that is
    "OPENBLAS_CORETYPE": "Haswell",  # matrix products of NumPy and SciPy
    "NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR",  # exp and log; names of NumPy 2.4
}


def hold_children() -> None:
    """Limit the processes that this one starts, whatever library they compute with."""
    os.environ.update(KERNELS | LIBRARIES)


def ask() -> None:
    """Limit torch in this process; it has an effect before torch first computes."""
    os.environ.update(KERNELS)


def hold() -> None:
    """Limit torch in this process. NumPy reads its limits when it is loaded: `hold_children` sets
    them in the process that starts this one.

    Raises: RuntimeError when torch has computed with more already, or where there is no AVX2.
    """
    import torch  # loaded late: Snakemake calls `hold_children` only

    ask()
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX2":
        raise RuntimeError(
            f"the study asks for the same bytes on every processor (compute.portable), and torch "
            f"computes with {capability} here; expected AVX2: restart this process (a kernel: "
            "Kernel > Restart), or set compute.portable: false where the processor has none"
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
    """This machine's processor, and the instructions that torch uses."""
    import torch

    model, cpuinfo = platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
        model = match.group(1).strip() if match else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
