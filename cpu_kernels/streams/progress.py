"""How far a graph job is: the visits that streams were asked for, and its latest run."""

from __future__ import annotations

import ctypes
import os

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.pool.group import PoolGroup


class Progress:
    """Of one graph job, which it outlives.

    Attributes:
        queued: visits that streams have been asked for, eagerly.
        captured: whether a graph may ask for more.
    """

    def __init__(self, group: PoolGroup, record: records.GraphJob) -> None:
        self._group, self._record = group, record
        self._process = os.getpid()
        # now: `close` runs in finalizers, which may interrupt who holds the lock of the drivers
        self._close = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(
            drivers.addresses()["close_host"]
        )
        self.queued = 0
        self.captured = False

    @property
    def inherited(self) -> bool:
        """Whether this is a forked child, which has no workers and streams of its parent."""
        return os.getpid() != self._process

    @property
    def idle(self) -> bool:
        """Whether all visits are over and no job runs, one that was given up included. Replays of
        graphs may come all the same."""
        if self._record.visits.value < self.queued:
            return False
        latest = max(self._record.sequence.value, self._record.abandoned.value)
        return latest <= self._group.completed

    @property
    def epoch(self) -> int:
        """Changes of the layer's mask that launches had seen when the latest run was launched."""
        return self._record.epoch.value

    def close(self) -> None:
        """Let no run begin any more: replays give NaN from now on."""
        self._close(self._record.address)
