"""SGLang binds its schedulers to the NUMA node of their GPU; experts on the CPU want the machine.

With `SGLANG_AUTO_NUMA_BIND` (its default) SGLang starts a scheduler under `numactl
--cpunodebind=N --membind=N`. The workers of this process would have one socket's cores and memory:
half the bandwidth on two sockets, and no room for a model that fills both. So a process that SGLang
has narrowed takes back what its server was started with. A binding that somebody asked for
(`--numa-node`, a server started under numactl, a cpuset) stays; what it costs is said.
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from hybrid_moe.cpu_kernels.pool.topology import allowed_cpus, parse_cpu_list

logger = logging.getLogger(__name__)

AUTO_BIND = "SGLANG_AUTO_NUMA_BIND"
"""SGLang's variable; on unless it says otherwise."""

_NODES = Path("/sys/devices/system/node")
_MPOL_DEFAULT, _MPOL_BIND = 0, 2
_MOST_NODES = 1024
_SYSTEM_CALLS = {
    "set_mempolicy": {"x86_64": 238, "aarch64": 237},
    "get_mempolicy": {"x86_64": 239, "aarch64": 236},
}
"""Their numbers, by machine."""


@dataclass(frozen=True)
class Machine:
    """NUMA nodes, and what of them this process and its server may use.

    Attributes:
        nodes: node -> its processors, all of them.
        memory: node -> bytes.
        server: processors that the server was started with.
        process: processors of this process.
        bound: nodes that this process's memory must come from; empty for any.
    """

    nodes: Mapping[int, frozenset[int]]
    memory: Mapping[int, int]
    server: frozenset[int]
    process: frozenset[int]
    bound: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Narrowed:
    """One node of several.

    Attributes:
        node: the one that this process is bound to.
        nodes: those that the server has.
        processors, all_processors: of this process, of the server.
        memory, all_memory: bytes that they may use.
    """

    node: int
    nodes: tuple[int, ...]
    processors: int
    all_processors: int
    memory: int
    all_memory: int

    def __str__(self) -> str:
        return (
            f"NUMA node {self.node} of {len(self.nodes)}: {self.processors} of "
            f"{self.all_processors} processors, {self.memory / 2**30:.0f} of "
            f"{self.all_memory / 2**30:.0f} GiB of memory"
        )


def narrowed(machine: Machine) -> Narrowed | None:
    """How this process is bound to one node where its server has several; None if it is not."""
    usable = {n: cpus & machine.server for n, cpus in machine.nodes.items()}
    usable = {n: cpus for n, cpus in usable.items() if cpus}
    inside = [n for n, cpus in machine.nodes.items() if cpus & machine.process]
    if len(usable) < 2 or len(inside) != 1 or inside[0] not in usable:
        return None
    reach = machine.bound & set(usable) or set(usable)
    return Narrowed(
        node=inside[0],
        nodes=tuple(sorted(usable)),
        processors=len(machine.process),
        all_processors=sum(map(len, usable.values())),
        memory=sum(machine.memory.get(n, 0) for n in reach),
        all_memory=sum(machine.memory.get(n, 0) for n in usable),
    )


def asked_for(numa_node: object, environ: Mapping[str, str]) -> str | None:
    """Who wanted the binding, if SGLang did not choose it by itself; None if it did.

    Args:
        numa_node: SGLang's `--numa-node`.
        environ: the process's environment.
    """
    if numa_node is not None:
        return "--numa-node"
    if environ.get(AUTO_BIND, "1").strip().lower() in ("0", "false", "no", "n", "off"):
        return f"who started it ({AUTO_BIND} is off)"
    return None


def read_machine() -> Machine:
    """This machine, process and server: the process that has started this one."""
    nodes, memory = {}, {}
    for folder in sorted(_NODES.glob("node[0-9]*")):
        node = int(folder.name[4:])
        nodes[node] = frozenset(parse_cpu_list((folder / "cpulist").read_text()))
        memory[node] = _total_memory((folder / "meminfo").read_text())
    process = frozenset(allowed_cpus())
    parent = psutil.Process().parent()
    server = process if parent is None else process | frozenset(parent.cpu_affinity())
    return Machine(nodes, memory, server, process, _bound_nodes())


def widen(numa_node: object, machine: Machine | None = None) -> bool:
    """Take back the server's processors and memory where SGLang has bound this process to one
    node, and log it with numbers; where somebody asked for it, log what it costs.

    To be called by the thread that makes the workers, before it does: they and the threads that
    load inherit from it. The main thread gets the processors too, whose mask is the process's
    wherever this package asks for that.

    Returns:
        Whether the binding was taken back.
    """
    if machine is None:
        try:
            machine = read_machine()
        except (OSError, ValueError, psutil.Error) as error:
            logger.info("the NUMA nodes of this machine cannot be read: %s", error)
            return False
    found = narrowed(machine)
    if found is None:
        return False
    wanted_by = asked_for(numa_node, os.environ)
    if wanted_by is not None:
        logger.warning(
            "the experts on the CPU have %s, as %s wanted: about 1/%d of the machine's memory "
            "bandwidth",
            found, wanted_by, len(found.nodes),
        )  # fmt: skip
        return False
    try:
        if machine.bound:
            _call("set_mempolicy", _MPOL_DEFAULT, None, 0)
        for thread in (os.getpid(), 0):  # the main thread and this one
            os.sched_setaffinity(thread, machine.server)
    except OSError as error:
        logger.warning(
            "SGLang bound this process to %s, and that cannot be undone here (%s): the experts on "
            "the CPU have about 1/%d of the machine's memory bandwidth; start the server with %s=0",
            found, error, len(found.nodes), AUTO_BIND,
        )  # fmt: skip
        return False
    logger.info(
        "SGLang had bound this process to %s; for the experts on the CPU it has all of them now "
        "(%s=0 avoids the binding)",
        found, AUTO_BIND,
    )  # fmt: skip
    return True


def _total_memory(text: str) -> int:
    """Bytes, of the line "Node 0 MemTotal: 131863192 kB"."""
    for line in text.splitlines():
        if "MemTotal:" in line:
            return 1024 * int(line.split()[-2])
    raise ValueError("no MemTotal")


def _bound_nodes() -> frozenset[int]:
    """Nodes of this thread's memory policy where it binds, else none."""
    mode = ctypes.c_int()
    mask = (ctypes.c_ulong * (_MOST_NODES // 64))()
    try:
        _call("get_mempolicy", ctypes.byref(mode), mask, _MOST_NODES, None, 0)
    except OSError as error:  # a container may forbid to ask, and then also to bind
        logger.debug("%s", error)
        return frozenset()
    if mode.value & 0xFF != _MPOL_BIND:
        return frozenset()
    return frozenset(n for n in range(_MOST_NODES) if mask[n // 64] >> (n % 64) & 1)


def _call(name: str, *arguments: Any) -> None:
    """A system call on memory policies; `OSError` where it fails or is not known."""
    number = _SYSTEM_CALLS[name].get(platform.machine())
    if number is None:
        raise OSError(f"{name} is not known on {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    if libc.syscall(ctypes.c_long(number), *words) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
