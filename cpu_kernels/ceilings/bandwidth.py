"""Measured read bandwidth: the ceiling of decode."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe import sysfiles
from hybrid_moe.cpu_kernels.ceilings.probe import BYTES_PER_STEP, reader
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.affinity import bind_thread
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes

BLOCK = 4 << 20
"""Bytes read in a row where blocks come in random order: about a projection of a small expert."""

_LEAST_BUFFER = 512 << 20
_BLOCKS_PER_THREAD = 8
_PAGE = 4096
_TRIALS = 3
_CPUS = "sys/devices/system/cpu"
_UNITS = {"K": 10, "M": 20, "G": 30}


def repetitions_per_second(
    config: PoolConfig, repeat: Callable[[int], None], seconds: float
) -> float:
    """Calls of `repeat(thread)` per second, all threads together, placed as workers are.

    Args:
        config: how many threads, and which processors a pool of this configuration would give them.
        repeat: a call that releases the GIL; a call under way when the time is up still counts,
            as does its time.
        seconds: when to stop.
    """
    masks = config.worker_masks()
    calls = [0] * len(masks)
    barrier = threading.Barrier(len(masks) + 1)
    stop = threading.Event()

    def work(thread: int) -> None:
        bind_thread(masks[thread])
        barrier.wait()
        while True:  # at least once, however late the system lets this thread run
            repeat(thread)
            calls[thread] += 1
            if stop.is_set():
                return

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(len(masks))]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(calls) / (time.perf_counter() - begin)


def cache_bytes() -> int:
    """Bytes of all third-level caches of the machine, 0 where the kernel does not tell."""
    caches = {}
    for cpu in sysfiles.numbered(_CPUS, "cpu"):
        for index in sysfiles.numbered(f"{_CPUS}/cpu{cpu}/cache", "index"):
            cache = f"{_CPUS}/cpu{cpu}/cache/index{index}"
            size = re.fullmatch(r"(\d+)([KMG])", sysfiles.read(f"{cache}/size").strip())
            if size and sysfiles.integer(f"{cache}/level") == 3:
                shared_by = sysfiles.read(f"{cache}/shared_cpu_list")
                caches[shared_by] = int(size[1]) << _UNITS[size[2]]
    return sum(caches.values())


class ReadProbe:
    """Reads buffers far larger than the caches with pinned threads.

    Every pool of `config` has a buffer on its own NUMA nodes, and every thread its part of it. Of
    two loops, with prefetch instructions and without, the one is used that reads faster here with
    as many threads.

    Attributes:
        prefetches: which loop that is.

    Args:
        config: threads and where they run; a number places them as a model's workers.
        nbytes: of all buffers together; default: far beyond the caches.
        block: bytes that are read in a row, a multiple of 512.

    Raises:
        ValueError: `nbytes` is less than a block per thread, or `block` no multiple of 512.
    """

    def __init__(
        self, config: PoolConfig | int, nbytes: int | None = None, block: int = BLOCK
    ) -> None:
        self._config = PoolConfig.choose(config) if isinstance(config, int) else config
        threads = self._config.threads
        if nbytes is None:
            nbytes = max(_LEAST_BUFFER, 4 * cache_bytes(), threads * _BLOCKS_PER_THREAD * block)
        blocks = nbytes // threads // block
        if blocks < 1 or block % BYTES_PER_STEP:
            raise ValueError(
                f"{nbytes} bytes in blocks of {block} for {threads} threads: each thread needs a "
                f"block, and a block is a multiple of {BYTES_PER_STEP} bytes"
            )
        self._bytes_per_call = blocks * block
        self._block = block
        self._arenas = []
        self._in_order: list[npt.NDArray[np.int64]] = []
        pools = zip(self._config.memory_nodes, self._config.threads_per_pool, strict=True)
        for nodes, members in pools:
            arena = Arena(members * self._bytes_per_call, nodes)
            arena.bytes[::_PAGE] = 1  # untouched pages would all be the one zero page
            self._arenas.append(arena)
            starts = arena.address + block * np.arange(members * blocks, dtype=np.int64)
            self._in_order += list(starts.reshape(members, blocks))
        rng = np.random.default_rng(0)
        self._at_random = [rng.permutation(starts) for starts in self._in_order]
        self.prefetches = self._faster_loop()

    def _faster_loop(self) -> bool:
        """By the best of some passes of each, in turn: interference only makes one slower."""
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(_TRIALS):
            for prefetches, seen in speeds.items():
                self.prefetches = prefetches
                seen.append(self.measure(0))
        return max(speeds[True]) > max(speeds[False])

    def measure(self, seconds: float = 0.2, at_random: bool = False) -> float:
        """GB/s over about `seconds` of reading.

        Args:
            at_random: each thread reads its blocks in random order, as experts are read.
        """
        tables = self._at_random if at_random else self._in_order
        outs = [np.zeros(16, np.int32) for _ in tables]
        loop = reader(self.prefetches)

        def read(thread: int) -> None:
            table = tables[thread]
            loop(table.ctypes.data, len(table), self._block, outs[thread].ctypes.data)

        rate = repetitions_per_second(self._config, read, seconds)
        return rate * self._bytes_per_call / 1e9


@dataclass(frozen=True)
class ReadCeiling:
    """Read bandwidth of some threads on their own memory, GB/s (10^9 bytes).

    Attributes:
        where: "1 thread", "all threads" or "node N".
        in_order: each thread reads its part from start to end.
        at_random: the same in blocks of 4 MiB, in random order.
        prefetches: whether the loop that reads so fast has prefetch instructions.
    """

    where: str
    threads: int
    in_order: float
    at_random: float
    prefetches: bool


def read_places(threads: int) -> dict[str, PoolConfig]:
    """What `ReadCeiling.where` means: who reads, and where."""
    alone = {node: PoolConfig.choose(numa_nodes=(node,)) for node in numa_nodes()}
    one = PoolConfig(1, numa_nodes=(min(alone),))
    nodes = {f"node {node}": pool for node, pool in alone.items()}
    return {"1 thread": one, "all threads": PoolConfig.choose(threads), **nodes}


def read_ceiling(where: str, pool: PoolConfig, seconds: float = 0.5) -> ReadCeiling:
    """Medians of three measurements in either order, taken in turn."""
    probe = ReadProbe(pool)
    orders: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(3):
        for at_random, speeds in orders.items():
            speeds.append(probe.measure(seconds / 6, at_random))
    medians = [float(np.median(speeds)) for speeds in orders.values()]
    return ReadCeiling(where, pool.threads, medians[0], medians[1], probe.prefetches)


def measure_read_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """Median of three measurements, GB/s, `threads` spread over the NUMA nodes."""
    probe = ReadProbe(threads)
    return float(np.median([probe.measure(seconds / 3) for _ in range(3)]))
