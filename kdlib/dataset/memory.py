"""Free memory of a device or of the job this process belongs to."""

import contextlib
import math
import os
from pathlib import Path

import torch

SHARE = 0.5  # of the free memory that `auto` lets pixels take


def free_memory(device: torch.device) -> float:
    """Bytes that can be allocated on a device: of a CPU those that are available without swapping,
    within the memory limit of the job this process belongs to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if not Path("/proc/meminfo").exists():  # where only the memory in all is known
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    known = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return min(int(known["MemAvailable"].split()[0]) * 1024, _allowed())


def _allowed(
    root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")
) -> float:
    """Bytes left below the limit of this process's control group (a Slurm job, a container);
    infinity without a limit that can be read."""
    left = math.inf
    with contextlib.suppress(OSError, ValueError):
        lines = [line.split(":", 2) for line in groups.read_text().splitlines()]
        (path,) = [Path(part[2]) for part in lines if part[0] == "0"]  # version 2 has one
        for group in (path, *path.parents):
            folder = root / group.relative_to("/")
            most = folder / "memory.max"
            if most.is_file() and most.read_text().strip() != "max":
                used = int((folder / "memory.current").read_text())
                left = min(left, max(0, int(most.read_text()) - used))
    return left
