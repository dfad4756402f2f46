"""Machines as the kernel would describe them: a row each, written as files of /proc and /sys."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from hybrid_moe import sysfiles
from hybrid_moe.cpu_kernels.pool import affinity, config, topology


def pretend_processors(monkeypatch: pytest.MonkeyPatch, count: int = 64) -> None:
    """Let pools have up to `count` threads on the first NUMA node, however few processors it has.
    Threads are then put aside by the system at any point."""
    node = min(topology.numa_nodes())
    monkeypatch.setattr(config, "usable_cores", lambda: count)
    monkeypatch.setattr(config, "numa_nodes", lambda: {node: tuple(range(count))})


def listed(text: str) -> list[int]:
    """Processors of "0-3,8"."""
    ends = [part.split("-") for part in text.split(",") if part]
    return [cpu for end in ends for cpu in range(int(end[0]), int(end[-1]) + 1)]


@dataclass(frozen=True)
class Machine:
    """A machine and a process on it.

    Attributes:
        nodes: NUMA node -> its processors.
        core: processor -> a name of its physical core.
        kind: processor -> 0 for the fastest kind of core, 1, ...
        files: further files, or other content: name -> text. None: the file is absent.
        mask: processors of the process, all by default.
        quota: processors' worth of time, None for no limit.
        homes: node -> nodes whose processors count to it; each node to itself by default.
    """

    nodes: Mapping[int, str]
    core: Callable[[int], int] = lambda cpu: cpu
    kind: Callable[[int], int] = lambda cpu: 0
    files: Mapping[str, str | None] = field(default_factory=dict)
    mask: str = ""
    quota: float | None = None
    homes: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def cpus(self) -> list[int]:
        """All of its processors."""
        return sorted(cpu for text in self.nodes.values() for cpu in listed(text))

    @property
    def allowed(self) -> list[int]:
        """Those of the process."""
        return listed(self.mask) if self.mask else self.cpus

    @property
    def usable_nodes(self) -> dict[int, list[int]]:
        """Node with memory -> allowed processors that count to it, if there are any."""
        homes = self.homes or {node: (node,) for node in self.nodes}
        members = {
            home: [c for node in nodes for c in listed(self.nodes[node]) if c in self.allowed]
            for home, nodes in homes.items()
        }
        return {node: sorted(cpus) for node, cpus in members.items() if cpus}

    def cores(self, node: int) -> dict[int, list[int]]:
        """Physical cores of a node: name -> allowed processors."""
        found: dict[int, list[int]] = {}
        for cpu in self.usable_nodes[node]:
            found.setdefault(self.core(cpu), []).append(cpu)
        return found

    @property
    def most_threads(self) -> int:
        """Threads that run at once."""
        return (
            len(self.allowed)
            if self.quota is None
            else min(len(self.allowed), -int(-self.quota // 1))
        )

    def content(self) -> dict[str, str]:
        """Its files of /proc and /sys, names without the leading slash."""
        system = "sys/devices/system"
        files: dict[str, str | None] = {
            "proc/self/cgroup": "0::/box\n",
            "proc/meminfo": "MemTotal: 4096 kB\nMemFree: 1024 kB\nMemAvailable: 2048 kB\n"
            "Buffers: 0 kB\nCached: 0 kB\n",
            f"{system}/cpu/online": ",".join(map(str, self.cpus)) + "\n",
            f"{system}/node/has_memory": ",".join(map(str, self.nodes)) + "\n",
        }
        for node, cpus in self.nodes.items():
            files[f"{system}/node/node{node}/cpulist"] = cpus + "\n"
        for cpu in self.cpus:
            siblings = [c for c in self.cpus if self.core(c) == self.core(cpu)]
            name = f"{system}/cpu/cpu{cpu}/topology/thread_siblings_list"
            files[name] = ",".join(map(str, siblings)) + "\n"
        if self.quota is not None:
            files["sys/fs/cgroup/box/cpu.max"] = f"{round(self.quota * 100000)} 100000\n"
        return {name: text for name, text in {**files, **self.files}.items() if text is not None}

    def write(self, root: Path) -> None:
        """Write its files under `root`, unless that exists."""
        if root.exists() and any(root.iterdir()):
            return
        for name, text in self.content().items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    def pretend(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this the machine that this process runs on, as far as it looks."""
        self.write(root)
        monkeypatch.setattr(sysfiles, "ROOT", root)
        monkeypatch.setattr(psutil, "PROCFS_PATH", str(root / "proc"), raising=False)
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(self.allowed))
        for name in affinity.BINDING_VARIABLES:
            monkeypatch.delenv(name, raising=False)


def _hybrid(cpu: int) -> int:
    """8 P cores of two threads, then 16 E cores."""
    return cpu // 2 if cpu < 16 else cpu


_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
_TWO_SOCKETS = {0: "0-15,32-47", 1: "16-31,48-63"}
_PHONE = (1024, 1024, 900, 900, 900, 300, 300, 300)
_DENSE = [5_100_000] * 4 + [3_300_000] * 8

MACHINES = {
    "one core": Machine({0: "0"}),
    "one core, two threads": Machine({0: "0-1"}, core=lambda c: 0),
    "two sockets, siblings n and n+32": Machine(_TWO_SOCKETS, core=lambda c: c % 32),
    "four nodes a socket": Machine({n: f"{16 * n}-{16 * n + 15}" for n in range(4)}),
    "sixteen caches as nodes": Machine(
        {n: f"{4 * n}-{4 * n + 3},{64 + 4 * n}-{67 + 4 * n}" for n in range(16)},
        core=lambda c: c % 64,
    ),
    "twenty-three nodes": Machine({n: f"{3 * n}-{3 * n + 2}" for n in range(23)}),
    "laptop by types": Machine(
        {0: "0-31"}, core=_hybrid, kind=lambda c: int(c >= 16),
        files={"sys/devices/cpu_core/cpus": "0-15\n", "sys/devices/cpu_atom/cpus": "16-31\n"},
    ),
    "laptop, slow cores first": Machine(
        {0: "0-11"}, core=lambda c: c if c < 4 else 4 + (c - 4) // 2, kind=lambda c: int(c < 4),
        files={f"{_CPU}/types/intel_core/cpulist": "4-11\n",
               f"{_CPU}/types/intel_atom/cpulist": "0-3\n"},
    ),
    "dense cores by frequency": Machine(
        {0: "0-23"}, core=lambda c: c % 12, kind=lambda c: int(c % 12 >= 4),
        files={f"{_CPU}/cpu{c}/cpufreq/cpuinfo_max_freq": f"{_DENSE[c % 12]}\n" for c in range(24)},
    ),
    "favoured cores are of one kind": Machine(
        {0: "0-7"},
        files={f"{_CPU}/cpu{c}/cpufreq/cpuinfo_max_freq": f"{5_700_000 - 100_000 * (c % 3)}\n"
               for c in range(8)},
    ),
    "phone by capacity": Machine(
        {0: "0-7"}, kind=lambda c: int(c >= 5),
        files={f"{_CPU}/cpu{c}/cpu_capacity": f"{speed}\n" for c, speed in enumerate(_PHONE)},
    ),
    "cloud machine, siblings 2n and 2n+1": Machine({0: "0-15"}, core=lambda c: c // 2),
    "container with a quota": Machine(_TWO_SOCKETS, core=lambda c: c % 32, quota=8),
    "container with half a processor": Machine({0: "0-63"}, quota=0.5),
    "quota of all but half a processor": Machine({0: "0-7"}, quota=7.5),
    "container with a cpuset": Machine(_TWO_SOCKETS, core=lambda c: c % 32, mask="4-7,36-39"),
    "memory-only nodes": Machine({0: "0-15", 1: "", 2: ""}, core=lambda c: c // 2),
    "nodes without memory": Machine(
        {n: f"{8 * n}-{8 * n + 7}" for n in range(4)},
        homes={0: (0, 1), 2: (2, 3)},
        files={f"{_NODE}/has_memory": "0,2\n",
               f"{_NODE}/node1/distance": "16 10 32 32\n",
               f"{_NODE}/node3/distance": "32 32 16 10\n"},
    ),
    "memory of one node only": Machine(
        _TWO_SOCKETS, core=lambda c: c % 32, homes={0: (0, 1)},
        files={"proc/self/status": "Name:\tx\nMems_allowed_list:\t0\n"},
    ),
    "unequal nodes, numbers apart": Machine({0: "0-23", 8: "24-27,32-35"}, core=lambda c: c % 32),
    "started under taskset": Machine(_TWO_SOCKETS, core=lambda c: c % 32, mask="3-17,40"),
    "one thread of each core": Machine({0: "0-15"}, core=lambda c: c // 2, mask="0,2,4,6,8,9"),
    "nothing told": Machine(
        {0: "0-7"},
        files=dict.fromkeys([
            "proc/self/cgroup", "proc/meminfo", f"{_CPU}/online", f"{_NODE}/has_memory",
            f"{_NODE}/node0/cpulist",
            *(f"{_CPU}/cpu{c}/topology/thread_siblings_list" for c in range(8)),
        ]),
    ),
    "told in words we do not know": Machine(
        {0: "0-7"},
        files={
            "proc/self/cgroup": "nonsense\n\n0::/box\n", f"{_CPU}/online": "all\n",
            f"{_NODE}/has_memory": "?", f"{_NODE}/node0/cpulist": "every\n",
            "sys/fs/cgroup/box/cpu.max": "plenty of time\n", "proc/self/status": "Mems_allowed",
            **{f"{_CPU}/cpu{c}/topology/thread_siblings_list": "a-b\n" for c in range(8)},
            **{f"{_CPU}/cpu{c}/cpu_capacity": "fast\n" for c in range(8)},
        },
    ),
}  # fmt: skip
"""By what they are."""
