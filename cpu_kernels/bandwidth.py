"""Measured read bandwidth: the ceiling of decode."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import numpy as np

from hybrid_moe.cpu_kernels.kernels.probe import reader
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig


def repetitions_per_second(
    config: PoolConfig, repeat: Callable[[int], None], seconds: float
) -> float:
    """Calls of `repeat(thread)` per second, all threads together, each on its own processor.

    Args:
        config: how many threads, and where a pool of this configuration would pin them.
        repeat: a call that releases the GIL; a call under way when the time is up still counts,
            as does its time.
        seconds: when to stop.
    """
    cpus = config.worker_cpus()
    calls = [0] * len(cpus)
    barrier = threading.Barrier(len(cpus) + 1)
    stop = threading.Event()

    def work(thread: int) -> None:
        os.sched_setaffinity(0, {cpus[thread]})  # 0 is this thread
        barrier.wait()
        while not stop.is_set():
            repeat(thread)
            calls[thread] += 1

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(len(cpus))]
    for worker in workers:
        worker.start()
    barrier.wait()
    begin = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for worker in workers:
        worker.join()
    return sum(calls) / (time.perf_counter() - begin)


class ReadProbe:
    """Reads a buffer far larger than the caches with `threads` pinned threads.

    Args:
        threads: how many read at once, each its own part.
        nbytes: size of the buffer.
    """

    def __init__(self, threads: int, nbytes: int = 512 << 20) -> None:
        self._config = PoolConfig(threads)
        self._arena = Arena(nbytes)
        self._arena.bytes[:] = 1  # untouched pages would all be the one zero page
        self._read = reader()

    def measure(self, seconds: float = 0.2) -> float:
        """GB/s over about `seconds` of reading."""
        threads = self._config.threads
        share = self._arena.nbytes // threads // (8 * 512) * (8 * 512)
        outs = [np.zeros(16, np.int32) for _ in range(threads)]

        def read(index: int) -> None:
            start = self._arena.address + index * share
            for part in range(8):
                self._read(start + part * (share // 8), share // 8, outs[index].ctypes.data)

        return repetitions_per_second(self._config, read, seconds) * share / 1e9


def measure_read_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """Median of three measurements, GB/s."""
    probe = ReadProbe(threads)
    return float(np.median([probe.measure(seconds / 3) for _ in range(3)]))
