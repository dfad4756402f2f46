"""What this process may use: cores (affinity mask and cgroup quota), NUMA nodes, their cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")
_CGROUP1_QUOTA = Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
_CGROUP1_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """The kernel's list format: "0-3,8" -> (0, 1, 2, 3, 8)."""
    cpus: list[int] = []
    for part in text.strip().split(","):
        if part:
            first, _, last = part.partition("-")
            cpus.extend(range(int(first), int(last or first) + 1))
    return tuple(cpus)


def allowed_cpus() -> tuple[int, ...]:
    """Logical processors in this process's affinity mask (cpusets included), ascending."""
    return tuple(sorted(os.sched_getaffinity(0)))


def cgroup_cpu_limit() -> float | None:
    """Processors' worth of time that the cgroup grants, or None where there is no quota."""
    try:
        if _CGROUP_CPU_MAX.exists():
            quota, period = _CGROUP_CPU_MAX.read_text().split()
        elif _CGROUP1_QUOTA.exists():
            quota, period = _CGROUP1_QUOTA.read_text(), _CGROUP1_PERIOD.read_text()
        else:
            return None
        if quota.strip() in ("max", "-1"):
            return None
        return int(quota) / int(period)
    except (OSError, ValueError):
        return None  # an unreadable or foreign cgroup file is no limit that we could honour


def usable_cores() -> int:
    """Threads that can run at once: the affinity mask, cut by the cgroup's quota."""
    limit = cgroup_cpu_limit()
    cores = len(allowed_cpus())
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def numa_nodes() -> dict[int, tuple[int, ...]]:
    """Node id -> its processors that this process may use; one node 0 where the kernel has none."""
    allowed = set(allowed_cpus())
    nodes = {}
    for entry in sorted(_NODES.glob("node[0-9]*")):
        cpus = parse_cpu_list((entry / "cpulist").read_text())
        usable = tuple(cpu for cpu in cpus if cpu in allowed)
        if usable:
            nodes[int(entry.name[4:])] = usable
    return nodes or {0: tuple(sorted(allowed))}
