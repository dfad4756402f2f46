"""Fingerprints of memory: whether it still holds what it held."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.parallel import map_all

BLOCK = 1 << 20
"""Bytes with a fingerprint of their own, so that threads can share one large matrix."""


@functools.lru_cache(maxsize=1)
def _fingerprint() -> Callable[[int, int], int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)
    return kind(drivers.addresses()["fingerprint"])


def fingerprint(memory: npt.NDArray[np.uint8]) -> int:
    """The fingerprint of uint8 [a multiple of 8], contiguous: see `fingerprints`."""
    if memory.nbytes % 8 or not memory.flags.c_contiguous:
        raise ValueError("fingerprints are of whole words, one behind the other")
    return _fingerprint()(memory.ctypes.data, memory.nbytes // 8)


def fingerprints(spans: Sequence[tuple[int, int]], threads: int) -> list[tuple[int, ...]]:
    """For each span of memory the fingerprints of its blocks.

    Every byte counts. Equal bytes have equal fingerprints. A change within one word of 8 bytes
    always changes them, any other change but for one chance in 2^64: they tell accidents, and are
    no defence against somebody who makes two contents with one fingerprint.

    Args:
        spans: (address, bytes), both multiples of 8.
        threads: that read, if there is enough to read.

    Raises:
        ValueError: an address or a size is no multiple of 8.
    """
    if any((address | size) % 8 for address, size in spans):
        raise ValueError("fingerprints are of whole words: addresses and sizes in multiples of 8")
    blocks = [
        (address + start, min(BLOCK, size - start) // 8)
        for address, size in spans
        for start in range(0, max(size, 1), BLOCK)
    ]
    one = _fingerprint()

    def of(part: Sequence[tuple[int, int]]) -> list[int]:
        return [one(address, words) for address, words in part]

    share = -(-len(blocks) // threads)
    if threads == 1 or share < 2:
        results = iter(of(blocks))
    else:
        parts = [blocks[i : i + share] for i in range(0, len(blocks), share)]
        done = map_all(of, parts, threads)
        results = iter([value for part in done for value in part])
    return [tuple(next(results) for _ in range(0, max(size, 1), BLOCK)) for _, size in spans]
