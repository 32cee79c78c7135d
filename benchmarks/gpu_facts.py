"""What the machine is: card, driver, versions, and the rates that bound a training step.

    python benchmarks/gpu_facts.py --out FOLDER [--dry]

A part of `gpu.py`. Rates are medians of `REPEATS` after one call to warm up. Bytes of a
device-to-device copy are those read and those written.
"""

import argparse
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import torch
from gpu_rows import Rows, first_line

REPEATS = 5
ROOT = Path(__file__).parents[1]
PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pandas", "pyarrow", "numba", "safetensors", "pytest",
)  # fmt: skip
CARD = (
    "name", "driver_version", "memory.total", "compute_mode", "clocks.max.sm", "power.limit",
    "pcie.link.gen.current", "pcie.link.width.current",
)  # fmt: skip


def device_of(dry: bool) -> str:
    """`cuda`, or `cpu` in a dry run.

    Raises: SystemExit when torch sees no GPU.
    """
    if dry:
        return "cpu"
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU here; --dry runs every part on the CPU in miniature")
    return "cuda"


def synchronise(device: str) -> None:
    """Wait until the device has done all it was given."""
    if device != "cpu":
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Version by package, None for one that is not installed; all that kdlib needs are named."""
    found: dict[str, str | None] = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        found[name] = _version(name)
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        name = re.match(r"[\w-]+", line)[0]
        found.setdefault(name, _version(name))
    return found | {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}


def processor() -> dict[str, str | int | float]:
    """The CPU's name, its cores that this process may use, memory in GiB."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [x for x in cpuinfo.read_text().splitlines() if x.startswith("model name")]
        name = named[0].partition(":")[2].strip() if named else name
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(memory, 1)}


def card() -> dict[str, str | int | float]:
    """What torch and the driver say of the first card."""
    properties = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(total / 2**30, 1),
        "free_gib": round(free / 2**30, 1),
    }
    query = ["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return found | {"nvidia_smi": first_line(error)}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    return found | dict(zip(CARD, values, strict=False))


def median_s(call: Callable[[], object], device: str) -> float:
    """Median seconds of a call, the device's work included."""
    taken = []
    for _ in range(REPEATS + 1):
        synchronise(device)
        begin = time.perf_counter()
        call()
        synchronise(device)
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[1:])


def copies(rows: Rows, device: str, n_bytes: int) -> None:
    """GB/s on the device, and between it and pinned or pageable memory of the host."""
    there, other = (torch.empty(n_bytes, dtype=torch.uint8, device=device) for _ in range(2))
    there.random_(0, 256)
    rows.write(
        "copy",
        of="device to device",
        gb_per_s=2 * n_bytes / median_s(lambda: other.copy_(there), device) / 1e9,
    )
    for kind, pinned in (("pinned", device != "cpu"), ("pageable", False)):
        here = torch.zeros(n_bytes, dtype=torch.uint8, pin_memory=pinned)
        for of, call in (
            (f"{kind} host to device", lambda here=here: there.copy_(here, non_blocking=True)),
            (f"device to {kind} host", lambda here=here: here.copy_(there, non_blocking=True)),
        ):
            rows.write("copy", of=of, gb_per_s=n_bytes / median_s(call, device) / 1e9)


def products(rows: Rows, device: str, side: int) -> None:
    """TFLOP/s of a square matrix product of random numbers, by precision."""
    before = torch.get_float32_matmul_precision()
    try:
        for of, dtype, precision in (
            ("bf16", torch.bfloat16, "highest"),
            ("float32", torch.float32, "highest"),
            ("float32 as TF32", torch.float32, "high"),
        ):
            torch.set_float32_matmul_precision(precision)
            a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
            seconds = median_s(lambda a=a, b=b: a @ b, device)
            rows.write("product", of=of, side=side, tflop_per_s=2 * side**3 / seconds / 1e12)
    finally:
        torch.set_float32_matmul_precision(before)


def latencies(rows: Rows, device: str, n: int = 200) -> None:
    """Microseconds of the host: per kernel given to an idle device, per value read back from it,
    per small copy to it."""
    x, small = torch.zeros((), device=device), torch.zeros(256, dtype=torch.int64)
    for of, call in (
        ("add_ on one number, not waited for", lambda: x.add_(1)),
        ("item() of one number", lambda: x.item()),
        ("copy of 2 KiB of pageable memory to the device", lambda: small.to(device, copy=True)),
    ):
        seconds = median_s(lambda call=call: [call() for _ in range(n)], device)
        rows.write("latency", of=of, us=seconds / n * 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    rows = Rows(arguments.out, "facts")
    found = versions()
    rows.write("versions", **found)
    rows.write("packages not here", names=[name for name, version in found.items() if not version])
    rows.write("processor", **processor(), threads=torch.get_num_threads())
    device = device_of(arguments.dry)
    rows.write("card", device=device, **(card() if device == "cuda" else {}))
    # torch's defaults; the row `settings` of gpu_speed.py has those of a study
    rows.write(
        "float32",
        convolutions_tf32=torch.backends.cudnn.allow_tf32,
        products=torch.get_float32_matmul_precision(),
        cudnn_benchmark=torch.backends.cudnn.benchmark,
    )
    latencies(rows, device)
    copies(rows, device, 2**20 if arguments.dry else 2**30)
    products(rows, device, 64 if arguments.dry else 8192)


if __name__ == "__main__":
    main()
