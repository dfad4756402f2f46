"""Jobs over fixed buffers, posted and awaited by compiled host functions of a CUDA stream.

A captured CUDA graph replays addresses, so everything that one points at lives as long as its
slot: the template of the job, the scratch, and the descriptor that both functions get.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, Slots


class SlotScratch:
    """What a run works in. Slots whose runs never overlap share it: those of all layers of a
    model that take turns on a stream."""

    def __init__(self, shape: JobShape) -> None:
        self.workspace = Workspace(shape.nbytes)
        self.template = shape.template(self.workspace)


class JobSlot:
    """One reusable job.

    Attributes:
        post_fn: address of `void(void *)` that reads the mask, routes and posts the job; it waits
            only while the ring of jobs is full.
        wait_fn: address of `void(void *)` that returns when the latest run has ended.
        user_data: argument of both.
        template: the job's slots, to be filled in before the first post.
    """

    def __init__(
        self, group: PoolGroup, scratch: SlotScratch, count_ignored: bool, owned: object
    ) -> None:
        functions = drivers.addresses()
        self.post_fn = functions["post_host"]
        self.wait_fn = functions["wait_host"]
        self.template = scratch.template.copy()
        self._owned = (group, scratch, owned)
        self._host: Slots = np.zeros(f.HOST_SLOTS, np.int64)
        self._host[f.H_GROUP] = group.address
        self._host[f.H_TEMPLATE] = self.template.ctypes.data
        self._host[f.H_COUNT_IGNORED] = int(count_ignored)
        self.user_data = int(self._host.ctypes.data)
        self._reported = np.zeros(2, np.int64)

    def news(self) -> tuple[int, int, int]:
        """(ids out of range, runs with a missing expert, such an expert) since the last call."""
        totals = self._host[[f.H_IGNORED, f.H_MISSING]]
        ignored, missing = (totals - self._reported).tolist()
        self._reported = totals
        return ignored, missing, int(self._host[f.H_MISSING_EXPERT])


@dataclass(frozen=True)
class SlotReport:
    """What went wrong since the last report.

    Attributes:
        ignored: ids out of range, of slots that count them.
        missing: runs that met an expert that is neither loaded nor skipped; their output is NaN.
        missing_expert: such an expert, or -1.
        error: a worker's error, or None.
    """

    ignored: int
    missing: int
    missing_expert: int
    error: str | None = None

    @classmethod
    def gather(cls, slots: Iterable[JobSlot]) -> SlotReport:
        """The sum over `slots`."""
        news = [slot.news() for slot in slots]
        lost = [expert for _, missing, expert in news if missing]
        return cls(sum(n[0] for n in news), sum(n[1] for n in news), lost[0] if lost else -1)
