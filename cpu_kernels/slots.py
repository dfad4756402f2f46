"""Jobs over fixed buffers that a GPU's stream posts and awaits, see `drivers.host`.

A captured CUDA graph replays addresses, so everything that one points at lives as long as its
slot: the template of the job, the scratch, and the descriptor that compiled code gets.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, Slots

TIMEOUT_S = 60.0
"""A pool that completes no job for so long is taken for dead: far above any batch's time."""

_FAULTS: Slots = np.zeros(1, np.int64)

_REASONS = {
    f.ERROR_TIMEOUT: "the CPU workers completed nothing for {timeout:g} s",
    f.ERROR_STUCK: "the CPU workers were still busy with a job that had been given up",
    f.ERROR_STOPPED: "the CPU workers have been stopped",
}


def faults() -> int:
    """How many runs of slots have gone wrong in this process; reading it costs nothing."""
    return int(_FAULTS[0])


_abandoned: list[object] = []


def _keep_if_running(group: PoolGroup, host: Slots, memory: object) -> None:
    """Keep the memory of a slot that is gone for a job that was given up and may still run."""
    if int(host[f.H_ABANDONED]) > group.completed:
        _abandoned.append(memory)


class SlotScratch:
    """What a run works in. Slots whose runs never overlap share it: those of all layers of a
    model that take turns on a stream."""

    def __init__(self, shape: JobShape) -> None:
        self.workspace = Workspace(shape.nbytes)
        self.template = shape.template(self.workspace)


class LiveMask:
    """The mask of a layer that others change at any time, as its latest launch has seen it.

    Args:
        live: address of bool [E].
        experts: E.
    """

    def __init__(self, live: int, experts: int) -> None:
        self._block: Slots = np.zeros(f.K_SLOTS + -(-experts // 8), np.int64)
        self._block[f.K_LIVE] = live
        self._block[f.K_EXPERTS] = experts
        self.address = int(self._block.ctypes.data)
        self.snapshot = self.address + 8 * f.K_SLOTS


class JobSlot:
    """One reusable job.

    Args:
        group: its workers.
        scratch: shared with slots whose runs never overlap with this one's.
        mask: the layer's.
        ignored_ids: what ids out of range mean, `fields.IDS_*`.
        owned: kept alive.

    Attributes:
        post_fn: address of `void(void *)` that takes a snapshot of the mask, routes and posts the
            job; it waits only while the ring of jobs is full.
        wait_fn: address of `void(void *)` that returns when the latest run has ended.
        user_data: argument of both, and what a stream writes into a mailbox.
        template: the job's slots, to be filled in before the first post.
    """

    def __init__(
        self,
        group: PoolGroup,
        scratch: SlotScratch,
        mask: LiveMask,
        ignored_ids: int,
        owned: object,
    ) -> None:
        functions = drivers.addresses()
        self.post_fn = functions["post_host"]
        self.wait_fn = functions["wait_host"]
        self.template = scratch.template.copy()
        self.template[f.J_SKIP] = mask.snapshot
        self._owned = (group, scratch, mask, owned)
        self._timeout = TIMEOUT_S
        self._host: Slots = np.zeros(f.HOST_SLOTS, np.int64)
        self._host[f.H_GROUP] = group.address
        self._host[f.H_TEMPLATE] = self.template.ctypes.data
        self._host[f.H_IGNORED_IDS] = ignored_ids
        self._host[f.H_TIMEOUT_NS] = int(TIMEOUT_S * 1e9)
        self._host[f.H_FAULTS] = _FAULTS.ctypes.data
        self._host[f.H_DUMP] = scratch.template[f.J_X]  # inputs of other jobs lie there
        self._host[f.H_MASK] = mask.address
        self.user_data = int(self._host.ctypes.data)
        memory = (self._host, self.template, scratch, mask, owned)
        weakref.finalize(self, _keep_if_running, group, self._host, memory).atexit = False
        self._reported = np.zeros(3, np.int64)

    @property
    def epoch(self) -> int:
        """Changes of the layer's mask that launches had seen when the latest run was launched."""
        return int(self._host[f.H_EPOCH])

    def news(self) -> SlotReport:
        """What went wrong since the last call."""
        totals = self._host[[f.H_IGNORED, f.H_MISSING, f.H_ERRORS]]
        ignored, missing, errors = (totals - self._reported).tolist()
        self._reported = totals
        reason = _REASONS[int(self._host[f.H_ERROR])] if errors else None
        return SlotReport(
            ignored,
            missing,
            int(self._host[f.H_MISSING_EXPERT]) if missing else -1,
            reason.format(timeout=self._timeout) if reason is not None else None,
        )


@dataclass(frozen=True)
class SlotReport:
    """What went wrong since the last report.

    Attributes:
        ignored: ids out of range, of slots that count them.
        missing: runs that met an expert that is neither loaded nor skipped; their output is NaN.
        missing_expert: such an expert, or -1.
        error: why a run was given up, or None; its output is NaN.
    """

    ignored: int
    missing: int
    missing_expert: int
    error: str | None = None

    @classmethod
    def gather(cls, slots: Iterable[JobSlot]) -> SlotReport:
        """The sum over `slots`."""
        news = [slot.news() for slot in slots]
        return cls(
            sum(n.ignored for n in news),
            sum(n.missing for n in news),
            next((n.missing_expert for n in news if n.missing), -1),
            next((n.error for n in news if n.error is not None), None),
        )
