"""Which instructions a process computes with, so that another processor gives the same bytes.

A processor that can do more is given other kernels, which sum in another order: weights differ from
the first step on. Held to AVX2, and matrix products to one order for all makers, a study gave the
same bytes wherever it was tried (benchmarks/processors.py). Leaves to others: which study asks for
it, and what it then cannot have (params).
"""

import os
import platform
import re
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


def name() -> str:
    """This machine's processor, and the instructions that torch takes of it."""
    import torch

    model, told = platform.machine(), Path("/proc/cpuinfo")
    if told.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", told.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"
