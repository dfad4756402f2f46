"""How many worker threads, in which pools, on which NUMA nodes."""

from __future__ import annotations

from dataclasses import dataclass, field

from hybrid_moe.cpu_kernels.drivers.records import MAX_POOLS
from hybrid_moe.cpu_kernels.pool.affinity import bound_to
from hybrid_moe.cpu_kernels.pool.pinning import Nodes, Placement, place, spread_pools
from hybrid_moe.cpu_kernels.pool.topology import cores_of, numa_nodes, usable_cores


def default_pools(threads: int) -> int:
    """One pool per NUMA node that this process may use; `MAX_POOLS` at most: of more nodes,
    neighbours share a pool."""
    return max(1, min(threads, len(numa_nodes()), MAX_POOLS))


def _nodes_here() -> dict[int, tuple[int, ...]]:
    return numa_nodes()  # by a name that no argument of `choose` hides


@dataclass(frozen=True)
class PoolConfig:
    """Worker threads of a model. Equal configurations share their threads.

    Attributes:
        threads: worker threads over all pools.
        pools: number of pools; each holds a share of every expert's output rows.
        numa_nodes: node of each pool; None spreads pools over the nodes this process may use.
        placement: where that puts pools and threads on this machine (`pinning.py` has the rules).

    Raises:
        ValueError: fewer threads than pools, more threads than usable processors (of the process,
            or of the named nodes), an unknown node, or a list of another length than `pools`.
    """

    threads: int
    pools: int = 1
    numa_nodes: tuple[int, ...] | None = None
    placement: Placement = field(init=False, repr=False, compare=False)

    @classmethod
    def choose(
        cls,
        threads: int | None = None,
        pools: int | None = None,
        numa_nodes: tuple[int, ...] | None = None,
    ) -> PoolConfig:
        """The configuration for this machine; whatever is None is chosen. Every entry point to the
        kernels uses this, and so do `plan`, `doctor` and `bench ceilings`.

        Args:
            threads: None for one per physical core of the nodes, no more than the cgroup's quota.
            pools: None for one per NUMA node (`default_pools`).
            numa_nodes: None for every node.
        """
        nodes = _nodes_here()
        if numa_nodes is not None:
            nodes = {node: cpus for node, cpus in nodes.items() if node in numa_nodes}
        usable = usable_cores()
        if threads is None:
            cores = sum(map(len, cores_of(nodes).values()))
            threads = max(1, min(max(cores, pools or 1), usable))
        if pools is None:
            pools = default_pools(threads) if numa_nodes is None else len(numa_nodes)
        return cls(threads, pools, numa_nodes)

    def __post_init__(self) -> None:
        if self.threads < 1 or self.pools < 1:
            raise ValueError(
                f"threads ({self.threads}) and pools ({self.pools}) must be at least 1"
            )
        if self.pools > MAX_POOLS:
            raise ValueError(f"{self.pools} pools: at most {MAX_POOLS} are supported")
        nodes = numa_nodes()
        self._check_nodes(sorted(nodes))
        if self.threads < self.pools:
            raise ValueError(
                f"{self.threads} threads for {self.pools} pools: every pool needs a thread"
            )
        usable = usable_cores()
        if self.threads > usable:
            raise ValueError(
                f"{self.threads} threads, but this process may use {usable} cores "
                "(affinity mask and cgroup quota); use at most that many"
            )
        machine = cores_of(nodes)
        homes = (
            spread_pools(machine, self.pools)
            if self.numa_nodes is None
            else tuple((node,) for node in self.numa_nodes)
        )
        shared = usable < sum(map(len, nodes.values()))
        placement = place(machine, self.threads, homes, shared, bound_to())
        object.__setattr__(self, "placement", placement)  # the class is frozen

    def _check_nodes(self, known: list[int]) -> None:
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
    def nodes(self) -> tuple[Nodes, ...]:
        """The NUMA nodes of each pool."""
        return self.placement.pools

    @property
    def memory_nodes(self) -> tuple[Nodes, ...]:
        """The nodes that each pool's memory comes from: its own, in turn if it has several; none
        (first touch) on a machine with one node."""
        return self.nodes if len(numa_nodes()) > 1 else ((),) * self.pools

    @property
    def threads_per_pool(self) -> tuple[int, ...]:
        """Threads of each pool: equal shares (the remainder goes to the first ones), as far as the
        pools' nodes have cores."""
        pools = self.worker_pools()
        return tuple(pools.count(pool) for pool in range(self.pools))

    def worker_pools(self) -> tuple[int, ...]:
        """Pool of each worker; worker 0 is in pool 0."""
        return tuple(worker.pool for worker in self.placement.workers)

    def worker_cpus(self) -> tuple[int, ...]:
        """A processor for each worker, no two the same: for threads that must have one each."""
        return tuple(worker.cpu for worker in self.placement.workers)

    def worker_masks(self) -> tuple[tuple[int, ...], ...]:
        """Processors that each worker may run on: what pools bind their threads to."""
        return tuple(worker.mask for worker in self.placement.workers)
