"""How much memory a run may plan with on this machine."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

# What is left aside: kernels' own buffers and the allocator's gaps on a card; other programs on a host.
CUDA_SHARE = 0.9
HOST_SHARE = 0.7
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def available_bytes(device: torch.device, held_bytes: int = 0) -> int:
    """Most of what is free on the device, and of the `held_bytes` that the run holds there already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch would use it first
        return int(CUDA_SHARE * (free + held_bytes))
    return int(HOST_SHARE * (host_free_bytes() + held_bytes))


def host_free_bytes() -> int:
    """What is free on the host, within the limits of this process."""
    free = psutil.virtual_memory().available
    limited = cgroup_free_bytes()
    return free if limited is None else min(free, limited)


def cgroup_free_bytes(root: Path = _CGROUP_ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """What the control groups of this process (version 1 or 2) leave to it; None where none sets a limit.

    The limit of each group from our own up to the root binds. Inactive pages of files are given back when asked for.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return None
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, limit, usage, inactive = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            inactive = "total_inactive_file"
        else:
            continue
        own = top / path.lstrip("/")
        # In a container the path may be the host's and not exist here: the root is our own group then.
        for group in (own, *own.parents):
            if group.is_relative_to(top):
                left.append(_group_free_bytes(group, limit, usage, inactive))
    return min((found for found in left if found is not None), default=None)


def _group_free_bytes(group: Path, limit: str, usage: str, inactive: str) -> int | None:
    """Limit minus use of one group; None where it has no limit or cannot be read. No limit is "max" in version 2."""
    try:
        most, used = int((group / limit).read_text()), int((group / usage).read_text())
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, most - used + int(statistics.get(inactive, 0)))
