"""What this process may use: cores (affinity mask and cgroup quota), NUMA nodes, their cores."""

from __future__ import annotations

import math
import os
from pathlib import Path

_NODES = Path("/sys/devices/system/node")
_CGROUPS = Path("/sys/fs/cgroup")
_SELF_CGROUP = Path("/proc/self/cgroup")


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


def cgroup_folders(controller: str) -> list[Path]:
    """Folders of this process's cgroup for `controller` and of those above it, v1 and v2.

    A limit may stand in any of them; the tightest holds.
    """
    folders: list[Path] = []
    for line in _lines(_SELF_CGROUP):
        _, controllers, path = line.strip().split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # v1 mounts a controller in its own folder; v2 (no name) is the mount or `unified`
        roots = [_CGROUPS / controller] if controllers else [_CGROUPS, _CGROUPS / "unified"]
        parts = [part for part in path.split("/") if part]
        for root in roots:
            folders.extend(root.joinpath(*parts[:depth]) for depth in range(len(parts) + 1))
    return folders


def cgroup_cpu_limit() -> float | None:
    """Processors' worth of time that the cgroups grant, or None where there is no quota."""
    limits = [limit for folder in cgroup_folders("cpu") if (limit := _quota_of(folder)) is not None]
    return min(limits, default=None)


def _quota_of(folder: Path) -> float | None:
    words = " ".join(_lines(folder / "cpu.max")).split() or [
        word for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us") for word in _lines(folder / name)
    ]
    try:
        quota, period = (int(word) for word in words)
    except ValueError:  # absent, or "max", or of a kind that we do not know
        return None
    return quota / period if quota > 0 < period else None


def _lines(path: Path) -> list[str]:
    """Lines of a file of /proc or /sys; none where it is absent or hidden from this process."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


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
