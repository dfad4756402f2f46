"""Jobs over fixed buffers that a GPU's stream posts and awaits, see `drivers.host`.

A stream holds addresses, and does not report when it is done with them. So dropping a job frees
nothing that a stream, the watcher or a worker may still touch: that stays until the job has been
visited as often as streams were asked to, and its latest run is complete
(`cpu_kernels.streams.keeping`).

A captured graph may be replayed at any time, and its end is not reported either. What its replays
touch before they launch anything (some KB, and the pinned buffers) therefore stays for good. The
layer does not: once the job is dropped, replays that have not begun give NaN and an error.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np

from hybrid_moe.cpu_kernels import drivers
from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.jit.record import u8
from hybrid_moe.cpu_kernels.job import JobMemory
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.streams.progress import Progress

TIMEOUT_S = 60.0
"""A pool that ends no task for so long, and as long again as the largest task of its job may take
a slow thread (`drivers.patience`), is taken for dead."""

_FAULTS = records.Faults.new()
_FAULT_WORDS = _FAULTS.words

_REASONS = {
    records.ERROR_TIMEOUT: "the CPU workers completed nothing for {waited} s",
    records.ERROR_STUCK: "the CPU workers were still busy with a job that had been given up",
    records.ERROR_STOPPED: "the CPU workers have been stopped",
}


def faults() -> int:
    """How many runs of graph jobs have gone wrong in this process; reading it costs nothing."""
    return _FAULT_WORDS[0]


def closed_runs() -> int:
    """How many of them were replays of jobs whose layer was gone."""
    return _FAULT_WORDS[1]


class LiveMask:
    """The mask of a layer that others change at any time, as its latest launch has seen it.

    Args:
        live: address of bool [E].
        experts: E.
    """

    def __init__(self, live: int, experts: int) -> None:
        self._seen = np.zeros(experts, np.uint8)
        self.record = records.Mask.new()
        self.record.live = u8.at(live)
        self.record.seen = u8.at(self._seen.ctypes.data)
        self.record.experts = experts

    @property
    def seen(self) -> int:
        """Address of the mask as the latest launch has seen it."""
        return self.record.seen.address


@dataclass(frozen=True)
class Report:
    """What went wrong since the last report.

    Attributes:
        ignored: ids out of range, of jobs that count them.
        missing: runs that met an expert that is neither loaded nor skipped; their output is NaN.
        missing_expert: such an expert, or -1.
        error: why a run was given up, or None; its output is NaN.
    """

    ignored: int
    missing: int
    missing_expert: int
    error: str | None = None


class Counters:
    """What the runs of a layer's graph jobs have met, those of jobs that are gone included."""

    def __init__(self) -> None:
        self.record = records.Counters.new()
        self._reported = (0, 0, 0)

    def report(self) -> Report:
        """What is new since the last call; never blocks."""
        words = self.record
        totals = (words.ignored.value, words.missing.value, words.errors.value)
        ignored, missing, errors = (
            now - then for now, then in zip(totals, self._reported, strict=True)
        )
        self._reported = totals
        waited = f"{words.waited_ns.value / 1e9:.2f}".rstrip("0").rstrip(".")
        return Report(
            ignored,
            missing,
            words.missing_expert.value if missing else -1,
            _REASONS[words.error.value].format(waited=waited) if errors else None,
        )


class GraphJob:
    """A job that a stream posts, and graphs replay. What a run touches may outlive it, see the
    module.

    Args:
        group: its workers.
        layer: address of the layer's descriptor.
        batch: fixed; its `skip` is not looked at.
        memory: may be shared with jobs whose runs never overlap with this one's.
        mask: the layer's.
        counters: the layer's.
        hidden: H.
        ignored_ids: what ids out of range mean, `records.IDS_*`.
        owned: what a job in flight uses, of the layer.
        buffers: what holds the memory of the batch.

    Attributes:
        post_fn: address of `void(void *)` that takes a snapshot of the mask, routes and posts the
            job; it waits only while the ring of jobs is full.
        wait_fn: address of `void(void *)` that returns when the latest run has ended.
        user_data: argument of both, and what a stream writes into a mailbox.
        progress: how far it is.
    """

    def __init__(
        self,
        group: PoolGroup,
        layer: int,
        batch: Batch,
        memory: JobMemory,
        mask: LiveMask,
        counters: Counters,
        *,
        hidden: int,
        ignored_ids: int,
        owned: object,
        buffers: object,
    ) -> None:
        functions = drivers.addresses()
        self.post_fn = functions["post_host"]
        self.wait_fn = functions["wait_host"]
        memory = memory.share()
        memory.fill(layer, batch._replace(skip=mask.seen))
        job = records.GraphJob.new()
        job.dump = memory.descriptor.x_copy  # nothing lies there: x stays until the job is over
        memory.descriptor.x_copy = 0
        job.group = group.control
        job.job = memory.descriptor
        job.mask = mask.record
        job.counters = counters.record
        job.faults = _FAULTS
        job.hidden = hidden
        job.ignored_ids = ignored_ids
        job.timeout_ns = int(TIMEOUT_S * 1e9)
        self.user_data = job.address
        self.progress = Progress(group, job)
        replayed = (group, job, memory, mask, counters, buffers)
        weakref.finalize(self, _let_go, self.progress, replayed, owned).atexit = False

    def will_visit(self, *, captured: bool, number: int = 1) -> None:
        """A stream is about to be asked for one visit more: for a post through a mailbox, or for a
        call of `post_fn` or `wait_fn`. -1: it has refused."""
        if captured:
            self.progress.captured = True
        else:
            self.progress.queued += number


def _let_go(progress: Progress, replayed: tuple[object, ...], owned: object) -> None:
    """The job is dropped; a part may have to stay."""
    if progress.inherited:
        return
    if progress.captured:
        progress.close()
        keeping.for_good(replayed)
    keeping.until_idle(progress, (replayed, owned))
