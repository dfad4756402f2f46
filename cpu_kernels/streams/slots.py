"""Jobs over fixed buffers that a GPU's stream posts and awaits, see `drivers.host`.

A stream holds addresses, and nobody hears when it is through with them. So whoever drops a slot
drops nothing that a stream, the watcher or a worker may still touch: that stays until the slot has
been visited as often as streams were asked to, and its last job is complete
(`cpu_kernels.keeping`).

A captured graph may be replayed at any time, and nobody hears when it is gone. What its replays
touch before they launch anything (some KB, and the pinned buffers) therefore stays for good. The
layer does not: once the slot is dropped, replays that have not begun give NaN and an error.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.drivers.records import (
    ERROR_STOPPED,
    ERROR_STUCK,
    ERROR_TIMEOUT,
    Counters,
    Faults,
    GraphJob,
    Mask,
)
from hybrid_moe.cpu_kernels.jit.records import u8
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.streams import keeping

TIMEOUT_S = 60.0
"""A pool that ends no task for so long, and as long again as the largest task of its job may take
a slow thread (`drivers.patience`), is taken for dead."""

_FAULTS = Faults.new()
_FAULT_WORDS = _FAULTS.words

_REASONS = {
    ERROR_TIMEOUT: "the CPU workers completed nothing for {waited} s",
    ERROR_STUCK: "the CPU workers were still busy with a job that had been given up",
    ERROR_STOPPED: "the CPU workers have been stopped",
}


def faults() -> int:
    """How many runs of slots have gone wrong in this process; reading it costs nothing."""
    return _FAULT_WORDS[0]


def closed_runs() -> int:
    """How many of them were replays of slots whose layer was gone."""
    return _FAULT_WORDS[1]


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
        self._seen: npt.NDArray[np.uint8] = np.zeros(experts, np.uint8)
        self.record = mask = Mask.new()
        mask.experts = experts
        mask.live = u8.at(live)
        mask.seen = u8.at(self._seen.ctypes.data)


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


class SlotCounters:
    """What the runs of all slots of one layer have met, those of slots that are gone included."""

    def __init__(self) -> None:
        self.record = Counters.new()
        self._reported = (0, 0, 0)

    def report(self) -> SlotReport:
        """What is new since the last call; never blocks."""
        found = self.record
        totals = (found.ignored.value, found.missing.value, found.errors.value)
        ignored, missing, errors = (
            now - then for now, then in zip(totals, self._reported, strict=True)
        )
        self._reported = totals
        waited = f"{found.waited_ns.value / 1e9:.2f}".rstrip("0").rstrip(".")
        return SlotReport(
            ignored,
            missing,
            found.missing_expert.value if missing else -1,
            _REASONS[found.error.value].format(waited=waited) if errors else None,
        )


class SlotState:
    """How far the visits and jobs of a slot are. It outlives the slot.

    Attributes:
        queued: visits that streams have been asked for, eagerly.
        captured: whether a graph may ask for more.
    """

    def __init__(self, group: PoolGroup, record: GraphJob) -> None:
        self._group, self._record = group, record
        self._process = os.getpid()
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
        close = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(drivers.addresses()["close_host"])
        close(self._record.address)


class JobSlot:
    """One reusable job.

    What a run touches may outlive the slot, see the module.

    Args:
        group: its workers.
        scratch: shared with slots whose runs never overlap with this one's.
        mask: the layer's.
        counters: the layer's.
        hidden: H.
        ignored_ids: what ids out of range mean, `records.IDS_*`.
        layer: what a job in flight uses, of the layer.
        buffers: what holds the memory that the caller fills in the addresses of.

    Attributes:
        post_fn: address of `void(void *)` that takes a snapshot of the mask, routes and posts the
            job; it waits only while the ring of jobs is full.
        wait_fn: address of `void(void *)` that returns when the latest run has ended.
        user_data: argument of both, and what a stream writes into a mailbox.
        template: the job, to be filled in before the first post.
        state: how far it is.
    """

    def __init__(
        self,
        group: PoolGroup,
        scratch: SlotScratch,
        mask: LiveMask,
        counters: SlotCounters,
        *,
        hidden: int,
        ignored_ids: int,
        layer: object,
        buffers: object,
    ) -> None:
        functions = drivers.addresses()
        self.post_fn = functions["post_host"]
        self.wait_fn = functions["wait_host"]
        self.template = scratch.template.copy()
        self.template.skip = mask.record.seen
        record = GraphJob.new()
        record.group = group.control
        record.job = self.template
        record.mask = mask.record
        record.counters = counters.record
        record.faults = _FAULTS
        record.hidden = hidden
        record.ignored_ids = ignored_ids
        record.timeout_ns = int(TIMEOUT_S * 1e9)
        record.dump = scratch.template.x  # inputs of other jobs lie there
        self.user_data = record.address
        self.state = SlotState(group, record)
        replayed = (group, record, self.template, scratch, mask, counters, buffers)
        weakref.finalize(self, _let_go, self.state, replayed, layer).atexit = False

    def will_visit(self, *, captured: bool, number: int = 1) -> None:
        """A stream is about to be asked for one visit more: for a post through a mailbox, or for a
        call of `post_fn` or `wait_fn`. -1: it has refused."""
        if captured:
            self.state.captured = True
        else:
            self.state.queued += number


def _let_go(state: SlotState, replayed: tuple[object, ...], layer: object) -> None:
    """The slot is dropped; a part may have to stay."""
    if state.inherited:
        return
    if state.captured:
        state.close()
        keeping.for_good(replayed)
    keeping.until_idle(state, (replayed, layer))
