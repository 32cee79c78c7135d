"""Free memory of a device or of the job this process belongs to."""

import contextlib
import math
import os
from pathlib import Path

import torch

SHARE = 0.5  # of the free memory that `auto` lets pixels take


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device without pushing anything out, or over the limit of
    the job this process belongs to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # where only the memory in all is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(int(known["MemAvailable"].split()[0]) * 1024, _allowed())


def _allowed(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Bytes that the limit of this process's group (a Slurm job, a container) leaves; infinity
    where there is none that can be read."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
        (path,) = [Path(part[2]) for part in lines if part[0] == "0"]  # version 2 has one
        for group in (path, *path.parents):
            folder = root / group.relative_to("/")
            most = folder / "memory.max"
            if most.is_file() and most.read_text().strip() != "max":
                used = int((folder / "memory.current").read_text())
                left = min(left, max(0, int(most.read_text()) - used))
    return left
