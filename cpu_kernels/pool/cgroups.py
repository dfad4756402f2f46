"""Control groups, v1 and v2: the limits that a container or a service manager sets."""

from __future__ import annotations

from hybrid_moe import sysfiles
from hybrid_moe.logs import warn_once

_MOUNT = "sys/fs/cgroup"


def folders(controller: str) -> list[str]:
    """Folders of this process's group for `controller` and of those above it, the lowest last.

    A limit may stand in any of them; the tightest holds.
    """
    found: list[str] = []
    for line in sysfiles.lines("proc/self/cgroup"):
        _, controllers, path = [*line.strip().split(":", 2), "", ""][:3]
        if not path or (controllers and controller not in controllers.split(",")):
            continue
        # v1 mounts controllers in a folder of their own; v2 (no name) is the mount or `unified`
        mounts = dict.fromkeys((controller, controllers)) if controllers else ("", "unified")
        parts = [part for part in path.split("/") if part]
        for mount in mounts:
            root = f"{_MOUNT}/{mount}".rstrip("/")
            found += ["/".join([root, *parts[:depth]]) for depth in range(len(parts) + 1)]
    return found


def cpu_limit() -> float | None:
    """Processors' worth of time that the groups grant, or None where there is no quota."""
    limits = [limit for folder in folders("cpu") if (limit := _quota_of(folder)) is not None]
    return min(limits, default=None)


def _quota_of(folder: str) -> float | None:
    name = f"{folder}/cpu.max"
    words = sysfiles.read(name).split()
    if not words:
        name = f"{folder}/cpu.cfs_quota_us"
        words = [w for file in (name, f"{folder}/cpu.cfs_period_us") for w in sysfiles.lines(file)]
    if not words or words[0] in ("max", "-1"):
        return None
    try:
        quota, period = (int(word) for word in words)
        if quota > 0 and period > 0:
            return quota / period
    except ValueError:
        pass  # warned of below
    warn_once(f"/{name} says {' '.join(words)!r}, which is no quota that we know: taken as none")
    return None


def memory_limit() -> int | None:
    """Bytes of memory that the groups allow, or None for no limit."""
    limits = [
        limit
        for folder in folders("memory")
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := sysfiles.integer(f"{folder}/{name}")) is not None and limit < 1 << 60
    ]
    return min(limits, default=None)


def cpuset() -> tuple[int, ...]:
    """Processors that the groups allow, whatever mask a thread has. Without a cpuset these are all
    that are online; none if the kernel does not say."""
    for folder in reversed(folders("cpuset")):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if cpus := sysfiles.cpu_list(f"{folder}/{name}"):
                return cpus
    return sysfiles.cpu_list("sys/devices/system/cpu/online")
