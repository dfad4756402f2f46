"""CUDA tensors in, CUDA tensors out: one layer's jobs in the order of the caller's stream.

The host never waits, so what `submit` and `result` queue can be captured by a CUDA graph and
replayed:

    caller's stream:  ─┬─────────────┬─ (attention, GPU experts ...) ──┬─ wait ─ copy out ─
                     fork          copied                             join
    side stream:       └─ copy x, ids, weights ─ post ─────────────────┘
    workers:                                       └── the CPU's experts ──► done

The inputs may change as soon as the caller's stream has passed `copied`; it does not wait for the
post, which can take a callback thread's wake-up. Post and wait go through the buffers' mailbox: the
stream writes the address of the job's slot, waits for the flag and clears it for the next run, so
that a replay of the same constants works (`hybrid_moe.cpu_kernels.drivers.mailbox` says why). Where
a GPU has no memory flags, both are host functions, compiled ones: Python would need the GIL inside
the driver's callback thread. Every wait is for something queued earlier, so streams that the
hardware serializes cannot block each other.

A submission may be dropped at any time, with its layer: see `cpu_kernels.streams.slots` for what
stays until the stream and the workers are through with it. Its buffers come back to the pool then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from hybrid_moe.cpu_kernels.drivers.records import IDS_COUNT
from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.streams.slots import SlotReport, SlotScratch
from hybrid_moe.streams.buffers import BUFFERS, BufferKey, BufferPool, Buffers
from hybrid_moe.streams.interface import Event, Stream

__all__ = ["BUFFERS", "BufferPool", "StagedJob", "Stager"]


MOST_SLOTS = 128
"""Eager slots that a layer keeps, one for each buffers and number of tokens that it has met: all
batch sizes of a decoding server, but not all lengths of prompts."""


class SlotState(Protocol):
    """See `hybrid_moe.cpu_kernels.streams.slots.SlotState`."""

    @property
    def idle(self) -> bool: ...
    @property
    def epoch(self) -> int: ...


class JobSlot(Protocol):
    """See `cpu_kernels.streams.slots.JobSlot`. It may be dropped at any time: what streams that
    were announced by `will_visit` still touch stays until they have."""

    @property
    def post_fn(self) -> int: ...
    @property
    def wait_fn(self) -> int: ...
    @property
    def user_data(self) -> int: ...
    @property
    def state(self) -> SlotState: ...

    def will_visit(self, *, captured: bool, number: int = 1) -> None: ...


class SlotMaker(Protocol):
    """What `hybrid_moe.cpu_kernels.layer.ExpertLayer` offers for CUDA streams."""

    def job_slot(
        self,
        *,
        tokens: int,
        top_k: int,
        x: int,
        ids: int,
        weights: int,
        skip: int,
        out: int,
        ignored_ids: int,
        scratch: SlotScratch,
        owned: object,
    ) -> JobSlot: ...
    def slot_shape(self, tokens: int, top_k: int) -> JobShape: ...
    def slot_report(self) -> SlotReport: ...


class Stager:
    """Submissions of one layer through pinned buffers.

    Args:
        maker: the layer.
        skip: bool [E] CPU tensor, the live mask; it must stay where it is.
        pool: of buffers.
    """

    def __init__(self, maker: SlotMaker, skip: torch.Tensor, pool: BufferPool = BUFFERS) -> None:
        self._maker, self._skip, self._pool = maker, skip, pool
        self._slots: dict[tuple[Buffers, int, int], JobSlot] = {}  # least recently used first
        self._captured: dict[tuple[Buffers, int, int], JobSlot] = {}
        pool.attach(self)

    def submit(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        ignored_ids: int = IDS_COUNT,
        join: bool = False,
    ) -> StagedJob:
        """Queue the copies of hidden [B, H], ids and weights [B, k], and the job's start.

        Args:
            ignored_ids: what ids out of range mean, `records.IDS_*`.
            join: let the stream wait for the post, for a result that is collected elsewhere: a
                captured graph must end with all its streams joined.
        """
        (tokens, H), k = hidden.shape, ids.shape[1]
        key = BufferKey(1 << max(tokens - 1, 0).bit_length(), H, k, hidden.dtype, stream.device)
        keeping.release()
        buffers = self._pool.take(key, stream)
        try:
            slot = self._slot(buffers, tokens, ignored_ids)
            ready = stream.record()
        except BaseException:
            self._pool.give_back(buffers, stream)
            raise
        job = StagedJob(slot, buffers, tokens, self._pool, stream, ready, join)
        side = stream.side
        side.wait(job.posted)
        with side:
            side.to_host(buffers.x[:tokens], hidden)
            side.to_host(buffers.ids[:tokens], ids)
            side.to_host(buffers.weights[:tokens], weights)
        stream.wait(side.record())
        mailbox = buffers.mailbox
        with _visit(slot, buffers.captured):
            if mailbox is not None:
                side.write_value(mailbox.posted.address, slot.user_data)
            else:
                side.host_function(slot.post_fn, slot.user_data)
        job.posted = side.record()
        if join:
            stream.wait(job.posted)
        return job

    def _slot(self, buffers: Buffers, tokens: int, ignored_ids: int) -> JobSlot:
        """The slot of these buffers: immutable, since the stream may still have to post it."""
        key = (buffers, tokens, ignored_ids)
        slots = self._captured if buffers.captured else self._slots
        slot = slots.pop(key, None)
        if slot is None:
            shape = self._maker.slot_shape(tokens, buffers.key.top_k)
            slot = self._maker.job_slot(
                tokens=tokens,
                top_k=buffers.key.top_k,
                x=buffers.x.data_ptr(),
                ids=buffers.ids.data_ptr(),
                weights=buffers.weights.data_ptr(),
                skip=self._skip.data_ptr(),
                out=buffers.out.data_ptr(),
                ignored_ids=ignored_ids,
                scratch=buffers.scratch_of(shape),
                owned=(buffers, self._skip),
            )
        slots[key] = slot
        if len(self._slots) > MOST_SLOTS:
            del self._slots[next(iter(self._slots))]
        return slot

    def report(self) -> SlotReport:
        """What went wrong in runs that have ended since the last report. Never blocks."""
        return self._maker.slot_report()

    def forget(self, freed: set[Buffers]) -> None:
        """Drop the slots over `freed` buffers; nothing that is queued uses them any more."""
        for key in [key for key in self._slots if key[0] in freed]:
            del self._slots[key]


@contextmanager
def _visit(slot: JobSlot, captured: bool) -> Iterator[None]:
    """Announce the visit that is queued meanwhile; a stream that refuses it makes none."""
    slot.will_visit(captured=captured)
    try:
        yield
    except RuntimeError:
        slot.will_visit(captured=captured, number=-1)
        raise


@dataclass
class StagedJob:
    """A job on its way through a stream.

    Attributes:
        posted: where the side stream has posted it.
        joined: `stream` has waited for that.
        settled: the wait is queued, and the buffers are the pool's again.
    """

    slot: JobSlot
    buffers: Buffers
    tokens: int
    pool: BufferPool
    stream: Stream
    posted: Event
    joined: bool
    settled: bool = False

    def result(self, stream: Stream | None = None) -> torch.Tensor:
        """Queue the wait and the copy to the device; a new device tensor [B, H]."""
        stream = stream or self.stream
        if stream.capturing() != self.buffers.captured:
            raise RuntimeError(
                "submit_forward and sync_forward of one call must either both be captured by a "
                "CUDA graph or neither"
            )
        self._wait(stream)
        try:
            with stream:
                return stream.to_device(self.buffers.out[: self.tokens])
        finally:  # the device may be out of memory; the wait is queued all the same
            self.pool.give_back(self.buffers, stream)

    def discard(self) -> None:
        """Queue the wait, so that the buffers can be used again. Where it cannot be queued, since
        the run is in a graph that has ended, or the wait would be, the pool waits for the run."""
        if self.settled:
            return
        if self.stream.capturing() == self.buffers.captured:
            self._wait(self.stream)
            self.pool.give_back(self.buffers, self.stream)
        else:
            self._lose()

    def __del__(self) -> None:
        # dropped by an exception, or with its layer; nothing can be queued from a finalizer
        self._lose()

    def _lose(self) -> None:
        if not self.settled:
            self.settled = True
            self.pool.lost(self.buffers, self.slot.state, self.stream)

    def _wait(self, stream: Stream) -> None:
        """Let `stream` wait for the job's end."""
        if not (self.joined and stream.handle == self.stream.handle):
            stream.wait(self.posted)
        mailbox = self.buffers.mailbox
        if mailbox is None:
            with _visit(self.slot, self.buffers.captured):
                stream.host_function(self.slot.wait_fn, self.slot.user_data)
            self.settled = True
        else:
            self.settled = True  # a stream that waits may not find its answer taken back
            stream.wait_value(mailbox.done.address, 1)
            stream.write_value(mailbox.done.address, 0)
