"""Where worker threads run, from a description of the machine: no file is read here.

The rules, in their order:

* A pool has a NUMA node, or neighbouring nodes if there are fewer pools than nodes. Together the
  pools have every node. Each pool needs a thread.
* Pools get as many threads as each other, as far as their nodes have cores, and a second thread on
  a core (SMT) only when every core has one. The fastest kind of core comes first.
* Where the pools take every core, each thread is bound to a processor of its own. Where they take
  fewer, another program beside this one might choose the same processors, so the threads of a pool
  share a mask and the system spreads them over it. The mask has one processor of each core of the
  pool's nodes (of the fastest kinds that suffice). Under a quota, which grants time and not
  processors, it has all processors, since other programs run on any of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.pool.topology import Core

Nodes = tuple[int, ...]
"""NUMA nodes of a pool, ascending."""


@dataclass(frozen=True)
class Worker:
    """A worker thread.

    Attributes:
        pool: its pool.
        cpu: the processor that it has, if each thread is to have one.
        mask: the processors that it may run on, ascending; `cpu` alone where it is bound.
    """

    pool: int
    cpu: int
    mask: tuple[int, ...]


@dataclass(frozen=True)
class Placement:
    """Pools and workers of a configuration on a machine.

    Attributes:
        pools: the NUMA nodes of each pool.
        workers: by number; those of a pool are neighbours, worker 0 is in pool 0.
        bound: every worker has a processor of its own.
    """

    pools: tuple[Nodes, ...]
    workers: tuple[Worker, ...]
    bound: bool


def place(
    machine: Mapping[int, Sequence[Core]],
    threads: int,
    pools: Sequence[Nodes],
    shared: bool = False,
    caller: int | None = None,
) -> Placement:
    """Place `threads` on the cores of `machine` (node -> cores, the fastest kind first).

    Args:
        pools: nodes of each pool; two pools have the same nodes or none in common.
        shared: others run on these processors, too.
        caller: the processor that the calling thread is bound to. It acts as worker 0, which is
            given that core if its pool has it.

    Raises:
        ValueError: threads for nodes that have fewer processors.
    """
    homes = {
        nodes: sorted(
            (core for node in nodes for core in machine[node]),
            key=lambda core: (core.slower, core.cpus),
        )
        for nodes in pools
    }
    rounds = {nodes: _rounds(cores) for nodes, cores in homes.items()}
    counts = _share_threads(threads, pools, rounds)
    bound = not shared and threads >= sum(map(len, homes.values()))
    workers: dict[int, list[Worker]] = {pool: [] for pool in range(len(pools))}
    for nodes, cores in homes.items():
        members = [pool for pool, own in enumerate(pools) if own == nodes]
        turns = sorted((turn, pool) for pool in members for turn in range(counts[pool]))
        cpus = [cpu for level in rounds[nodes] for cpu in level][: len(turns)]
        if 0 in members:
            at = next(i for i, (_, pool) in enumerate(turns) if pool == 0)  # worker 0
            callers = next((core.cpus for core in cores if caller in core.cpus), ())
            other = next((i for i, cpu in enumerate(cpus) if cpu in callers), at)
            cpus[at], cpus[other] = cpus[other], cpus[at]
        common = _mask(cores, len(turns), shared)
        for (_, pool), cpu in zip(turns, cpus, strict=True):
            workers[pool].append(Worker(pool, cpu, (cpu,) if bound else common))
    every = tuple(worker for pool in workers.values() for worker in pool)
    return Placement(tuple(pools), every, bound)


def _rounds(cores: Sequence[Core]) -> list[list[int]]:
    """The first processor of every core, then the second of those that have one, ..."""
    deepest = max(len(core.cpus) for core in cores)
    return [[core.cpus[i] for core in cores if len(core.cpus) > i] for i in range(deepest)]


def _share_threads(
    threads: int, pools: Sequence[Nodes], rounds: Mapping[Nodes, list[list[int]]]
) -> list[int]:
    """Threads of each pool: one, then round by round to the pool that has the fewest."""
    counts = [0] * len(pools)
    room = {nodes: [len(cpus) for cpus in levels] for nodes, levels in rounds.items()}

    def give(pool: int, level: int) -> None:
        counts[pool] += 1
        room[pools[pool]][level] -= 1

    for pool, nodes in enumerate(pools):
        free = [level for level, left in enumerate(room[nodes]) if left]
        if not free:
            raise ValueError(_too_few(nodes, pools.count(nodes), rounds[nodes], "pools"))
        give(pool, free[0])
    for level in range(max(map(len, rounds.values()))):
        while sum(counts) < threads:
            having = [p for p, nodes in enumerate(pools) if sum(room[nodes][level : level + 1])]
            if not having:
                break
            give(min(having, key=lambda pool: (counts[pool], pool)), level)
    if sum(counts) < threads:
        nodes = tuple(sorted({node for own in pools for node in own}))
        levels = [cpus for home in rounds.values() for cpus in home]
        raise ValueError(_too_few(nodes, threads, levels, "threads"))
    return counts


def _too_few(nodes: Nodes, wanted: int, rounds: Sequence[Sequence[int]], what: str) -> str:
    names = f"NUMA node{'s' * (len(nodes) > 1)} {', '.join(map(str, nodes))}"
    return (
        f"{wanted} {what} for {names}, where this process may use {sum(map(len, rounds))} "
        f"processors: use at most that many {what}, or name more nodes"
    )


def _mask(cores: Sequence[Core], threads: int, shared: bool) -> tuple[int, ...]:
    """What the threads of a node may run on where they are not bound."""
    if shared or threads > len(cores):
        return tuple(sorted(cpu for core in cores for cpu in core.cpus))
    slowest = cores[threads - 1].slower
    return tuple(sorted(core.cpus[0] for core in cores if core.slower <= slowest))


def spread_pools(machine: Mapping[int, Sequence[Core]], pools: int) -> tuple[Nodes, ...]:
    """The nodes of each of so many pools, all nodes used.

    Fewer pools than nodes: runs of neighbouring nodes with about as many cores each (numbers of
    neighbours are near to each other: nodes of a socket are numbered together). More: a pool for
    each node, then for one with a core that has no pool yet, and the most processors to each pool.
    """
    nodes = sorted(machine)
    if pools < len(nodes):
        return _runs([(node, len(machine[node])) for node in nodes], pools)
    size = {node: sum(len(core.cpus) for core in machine[node]) for node in nodes}
    homes = list(nodes)
    while len(homes) < pools:
        count = {node: homes.count(node) for node in nodes}
        homes.append(
            max(nodes, key=lambda n: (count[n] < len(machine[n]), size[n] / (count[n] + 1), -n))
        )
    return tuple((node,) for node in homes)


def _runs(sizes: Sequence[tuple[int, int]], count: int) -> tuple[Nodes, ...]:
    """`count` runs of (node, size), none empty, with about equal sums of sizes."""
    total = sum(size for _, size in sizes)
    runs: list[list[int]] = [[] for _ in range(count)]
    before, last = 0, -1
    for i, (node, size) in enumerate(sizes):
        wanted = int((before + size / 2) * count / total)  # by the node's middle
        last = max(min(wanted, last + 1), last, count - (len(sizes) - i))
        runs[last].append(node)
        before += size
    return tuple(map(tuple, runs))
