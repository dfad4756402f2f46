"""Measured read bandwidth: the ceiling of decode."""

from __future__ import annotations

import threading
import time

import numpy as np

from hybrid_moe.cpu_kernels.kernels.probe import reader
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig


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
        read_bytes = [0] * threads
        barrier = threading.Barrier(threads + 1)
        stop = threading.Event()

        def read(index: int) -> None:
            start = self._arena.address + index * share
            out = np.zeros(16, np.int32)
            barrier.wait()
            while not stop.is_set():
                for part in range(8):
                    self._read(start + part * (share // 8), share // 8, out.ctypes.data)
                read_bytes[index] += share

        workers = [threading.Thread(target=read, args=(i,)) for i in range(threads)]
        for worker in workers:
            worker.start()
        barrier.wait()
        begin = time.perf_counter()
        time.sleep(seconds)
        stop.set()
        for worker in workers:
            worker.join()
        return sum(read_bytes) / (time.perf_counter() - begin) / 1e9


def measure_read_bandwidth(threads: int, seconds: float = 0.5) -> float:
    """Median of three measurements, GB/s."""
    probe = ReadProbe(threads)
    return float(np.median([probe.measure(seconds / 3) for _ in range(3)]))
