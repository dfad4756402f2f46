"""What this process may use: processors and quota, the cores they belong to, their NUMA nodes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid_moe import sysfiles
from hybrid_moe.cpu_kernels.pool import affinity, cgroups
from hybrid_moe.sysfiles import parse_cpu_list

__all__ = [
    "Core",
    "allowed_cpus",
    "cgroup_cpu_limit",
    "cores_of",
    "numa_nodes",
    "parse_cpu_list",
    "usable_cores",
]

_NODES = "sys/devices/system/node"
_CPUS = "sys/devices/system/cpu"
_SAME_SPEED = 0.8
"""Cores of one kind differ by less (favoured cores of a boost), P and E cores by more."""

_CORE_TYPES = {"intel_core": 3, "cpu_core": 3, "intel_atom": 2, "cpu_atom": 2, "cpu_lowpower": 1}
"""What the kernel calls the kinds of core of a hybrid x86 processor, and their ranks."""


@dataclass(frozen=True)
class Core:
    """A physical core.

    Attributes:
        cpus: its logical processors (SMT siblings) that this process may use, ascending.
        slower: 0 for the fastest kind of core of the machine, 1 for the next, ...
    """

    cpus: tuple[int, ...]
    slower: int = 0


def allowed_cpus() -> tuple[int, ...]:
    """Logical processors that this process may use (cpuset, taskset, numactl), ascending."""
    return affinity.process_cpus()


def cgroup_cpu_limit() -> float | None:
    """Processors' worth of time that the cgroups grant, or None where there is no quota."""
    return cgroups.cpu_limit()


def usable_cores() -> int:
    """Threads that can run at once: the processors of this process, cut by the cgroup's quota."""
    limit = cgroup_cpu_limit()
    cores = len(allowed_cpus())
    return cores if limit is None else max(1, min(cores, math.ceil(limit)))


def numa_nodes() -> dict[int, tuple[int, ...]]:
    """Node id -> its processors that this process may use; every one of those is in one node.

    A node without processors (memory only) is left out. Processors of a node without memory, or
    whose memory a cpuset withholds, count as those of the nearest node that has some. A kernel that
    lists no nodes has one, 0.
    """
    allowed = allowed_cpus()
    ids = sysfiles.numbered(_NODES, "node")
    members = {node: sysfiles.cpu_list(f"{_NODES}/node{node}/cpulist") for node in ids}
    home = {cpu: node for node in reversed(ids) for cpu in members[node]}
    withheld = _without_memory(ids)
    nodes: dict[int, list[int]] = {}
    for cpu in allowed:
        node = home.get(cpu, ids[0] if ids else 0)
        if node in withheld:
            node = min(set(ids) - withheld, key=lambda n: (_distance(node, n, ids), n))
        nodes.setdefault(node, []).append(cpu)
    return {node: tuple(nodes[node]) for node in sorted(nodes)}


def _without_memory(ids: Sequence[int]) -> set[int]:
    """Nodes without memory for this process; none if that would be all of them."""
    have = set(sysfiles.cpu_list(f"{_NODES}/has_memory")) or set(ids)
    have &= set(sysfiles.cpu_list("proc/self/status", "Mems_allowed_list")) or have
    return set(ids) - have if have & set(ids) else set()


def _distance(node: int, other: int, ids: Sequence[int]) -> int:
    words = sysfiles.read(f"{_NODES}/node{node}/distance").split()
    known = len(words) == len(ids) and all(word.isdecimal() for word in words)
    return int(words[ids.index(other)]) if known else abs(node - other)


def cores_of(nodes: Mapping[int, Iterable[int]]) -> dict[int, tuple[Core, ...]]:
    """The cores of each node, the fastest kind first, then by their first processor."""
    cpus = tuple(sorted(cpu for group in nodes.values() for cpu in group))
    siblings, slower = _siblings(sysfiles.ROOT, cpus), _slower(sysfiles.ROOT, cpus)
    found = {}
    for node, group in nodes.items():
        members: dict[int, list[int]] = {}
        for cpu in sorted(group):
            members.setdefault(siblings[cpu], []).append(cpu)
        cores = (Core(tuple(m), min(slower[cpu] for cpu in m)) for m in members.values())
        found[node] = tuple(sorted(cores, key=lambda core: (core.slower, core.cpus)))
    return found


@functools.lru_cache(maxsize=16)
def _siblings(root: Path, cpus: tuple[int, ...]) -> dict[int, int]:
    """Processor -> the first of its core. A processor that the kernel does not describe is alone.

    `root` tells described machines apart.
    """
    first: dict[int, int] = {}
    for cpu in cpus:
        if cpu not in first:
            names = ("core_cpus_list", "thread_siblings_list")
            lists = (sysfiles.cpu_list(f"{_CPUS}/cpu{cpu}/topology/{name}") for name in names)
            for sibling in {cpu, *next(filter(None, lists), ())}:
                first.setdefault(sibling, cpu)
    return first


@functools.lru_cache(maxsize=16)
def _slower(root: Path, cpus: tuple[int, ...]) -> dict[int, int]:
    """Processor -> kind of its core, 0 for the fastest: by the scheduler's capacity, by the types
    of a hybrid processor, or by the highest frequency. `root` tells described machines apart."""
    ranks = {
        cpu: rank
        for name, rank in _CORE_TYPES.items()
        for file in (f"sys/devices/{name}/cpus", f"{_CPUS}/types/{name}/cpulist",
                     f"{_CPUS}/types/{name}_0/cpulist")
        for cpu in sysfiles.cpu_list(file)
    }  # fmt: skip
    for measure in (
        {cpu: sysfiles.integer(f"{_CPUS}/cpu{cpu}/cpu_capacity") for cpu in cpus},
        {cpu: ranks.get(cpu) for cpu in cpus},
        {cpu: sysfiles.integer(f"{_CPUS}/cpu{cpu}/cpufreq/cpuinfo_max_freq") for cpu in cpus},
    ):
        speeds = {cpu: speed for cpu, speed in measure.items() if speed is not None}
        kinds = _kinds(speeds.values())
        if len(speeds) == len(cpus) and len(set(kinds.values())) > 1:
            return {cpu: kinds[speed] for cpu, speed in speeds.items()}
    return dict.fromkeys(cpus, 0)


def _kinds(speeds: Iterable[int]) -> dict[int, int]:
    """Speed -> number of its kind, 0 for the fastest. A kind ends where the next speed is clearly
    lower."""
    kinds: dict[int, int] = {}
    kind, leader = -1, math.inf
    for speed in sorted(set(speeds), reverse=True):
        if kind < 0 or speed < _SAME_SPEED * leader:
            kind, leader = kind + 1, speed
        kinds[speed] = kind
    return kinds
