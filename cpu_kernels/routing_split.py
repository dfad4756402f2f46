"""A batch's routing, cut into the experts that run now and those that run later, by compiled code:
a token would wait for seventeen small operations of torch else."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

import numpy as np

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers.records import Split
from hybrid_moe.cpu_kernels.jit.record import u8
from hybrid_moe.formats.numbers import Array

_write_batch = Split.writer("tokens", "ids", "scores", "now", "later")


@functools.lru_cache(maxsize=1)
def _split_routing() -> Callable[[int], int]:
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)
    return kind(drivers.addresses()["split_routing"])


class RoutingSplit:
    """Cuts routings of one layer. For one thread at a time.

    Args:
        experts: E. top_k: k.
        protected: slots of a token that must run now.
    """

    def __init__(self, experts: int, top_k: int, protected: int) -> None:
        self._run = _split_routing()
        self._protects: Array = np.zeros(experts, np.uint8)
        self._split = split = Split.new()
        split.experts, split.top_k, split.protected = experts, top_k, protected
        split.protects = u8.at(self._protects.ctypes.data)
        self._words, self._address = split.words, split.address

    def __call__(self, tokens: int, ids: int, scores: int, now: int, later: int) -> int:
        """Cut a batch, by addresses of ids int64 [T, k] and scores float32 [T, k], into ids of
        the same shape: those that run now, and those that run later; each has -1 elsewhere.

        Returns:
            How many ids are out of range: neither has them.
        """
        _write_batch(self._words, tokens, ids, scores, now, later)
        return self._run(self._address)
