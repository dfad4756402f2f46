"""How many worker threads, in which pools, on which NUMA nodes."""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.cpu_kernels.drivers.fields import MAX_POOLS
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores


@dataclass(frozen=True)
class PoolConfig:
    """Worker threads of a model. Equal configurations share their threads.

    Attributes:
        threads: worker threads over all pools.
        pools: number of pools; each holds a share of every expert's output rows.
        numa_nodes: node of each pool; None spreads pools over the nodes this process may use.

    Raises:
        ValueError: fewer threads than pools, more threads than usable cores, an unknown node, or
            a list of another length than `pools`.
    """

    threads: int
    pools: int = 1
    numa_nodes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.threads < 1 or self.pools < 1:
            raise ValueError(
                f"threads ({self.threads}) and pools ({self.pools}) must be at least 1"
            )
        if self.pools > MAX_POOLS:
            raise ValueError(f"{self.pools} pools: at most {MAX_POOLS} are supported")
        if self.threads < self.pools:
            raise ValueError(
                f"{self.threads} threads for {self.pools} pools: every pool needs a thread"
            )
        cores = usable_cores()
        if self.threads > cores:
            raise ValueError(
                f"{self.threads} threads, but this process may use {cores} cores "
                "(affinity mask and cgroup quota); use at most that many"
            )
        known = sorted(numa_nodes())
        if self.numa_nodes is None:
            return
        if len(self.numa_nodes) != self.pools:
            raise ValueError(
                f"numa_nodes {list(self.numa_nodes)} names {len(self.numa_nodes)} nodes "
                f"for {self.pools} pools"
            )
        unknown = [node for node in self.numa_nodes if node not in known]
        if unknown:
            raise ValueError(f"unknown NUMA node {unknown[0]}: this process may use {known}")

    @property
    def nodes(self) -> tuple[int, ...]:
        """The NUMA node of each pool."""
        if self.numa_nodes is not None:
            return self.numa_nodes
        known = sorted(numa_nodes())
        return tuple(known[p % len(known)] for p in range(self.pools))

    @property
    def threads_per_pool(self) -> tuple[int, ...]:
        """Threads of each pool; the remainder goes to the first ones."""
        whole, rest = divmod(self.threads, self.pools)
        return tuple(whole + (p < rest) for p in range(self.pools))

    def worker_pools(self) -> tuple[int, ...]:
        """Pool of each worker; worker 0 is in pool 0."""
        return tuple(p for p, n in enumerate(self.threads_per_pool) for _ in range(n))

    def worker_cpus(self) -> tuple[int, ...]:
        """Processor that each worker is pinned to. Pools on one node take turns on its list."""
        nodes = numa_nodes()
        taken = dict.fromkeys(nodes, 0)
        cpus = []
        for pool in self.worker_pools():
            node = self.nodes[pool]
            choices = nodes[node]
            cpus.append(choices[taken[node] % len(choices)])
            taken[node] += 1
        return tuple(cpus)
