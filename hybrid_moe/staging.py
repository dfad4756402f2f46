"""CUDA tensors in, CUDA tensors out: pinned buffers and host functions in stream order.

A submission puts on the caller's stream: copies of the inputs into pinned memory, then a host
function that posts the job to the worker pool. Collecting it puts there: a host function that
waits for the job, then the copy of the result to the device. The host never waits, so the same
sequence can be captured by a CUDA graph and replayed.

    stream:  ... copy x, ids, weights ─ post ─ (attention, GPU experts ...) ─ wait ─ copy out ...
    pool:                                └──── the CPU's experts ────────────┘

Everything a captured graph points at must stay where it is: buffers that were used under capture
are kept for captures forever, the others are reused and can be freed. Reuse needs no events: a
buffer goes back to the stream that used it, whose order keeps the uses apart.

This file holds the order of things and knows no CUDA; `hybrid_moe.cuda` implements `Stream`.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

import torch

from hybrid_moe.cpu_kernels.job import JobShape
from hybrid_moe.cpu_kernels.slots import SlotReport, SlotScratch


class JobSlot(Protocol):
    """See `hybrid_moe.cpu_kernels.slots.JobSlot`: compiled functions, because a Python callable
    would need the GIL inside the driver's callback thread. It lives as long as anything that is
    queued or captured refers to it."""

    @property
    def post_fn(self) -> int: ...
    @property
    def wait_fn(self) -> int: ...
    @property
    def user_data(self) -> int: ...


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
        count_ignored: bool,
        scratch: SlotScratch,
    ) -> JobSlot: ...
    def slot_shape(self, tokens: int, top_k: int) -> JobShape: ...
    def slot_report(self) -> SlotReport: ...


class Stream(AbstractContextManager[None], Protocol):
    """A CUDA stream; while entered, it is the current one. Copies and functions are queued."""

    @property
    def handle(self) -> int: ...
    @property
    def device(self) -> torch.device: ...
    def capturing(self) -> bool: ...
    def pinned(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor: ...
    def to_host(self, target: torch.Tensor, source: torch.Tensor) -> None: ...
    def to_device(self, source: torch.Tensor) -> torch.Tensor: ...
    def add(self, target: torch.Tensor, other: torch.Tensor) -> None: ...
    def host_function(self, function: int, user_data: int) -> None: ...


@dataclass(frozen=True)
class BufferKey:
    """What makes two submissions able to share buffers. `capacity` is in tokens."""

    capacity: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    device: torch.device


@dataclass(eq=False)
class Buffers:
    """Memory of one submission: pinned x and out [capacity, H], ids and weights [capacity, k], and
    the CPU's scratch, which all layers share that take turns in these buffers."""

    key: BufferKey
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    captured: bool = False
    scratch: dict[JobShape, SlotScratch] = field(default_factory=dict)

    def scratch_of(self, shape: JobShape) -> SlotScratch:
        """The scratch of that shape: one for each model and size that use the buffers."""
        if shape not in self.scratch:
            self.scratch[shape] = SlotScratch(shape)
        return self.scratch[shape]

    @classmethod
    def allocate(cls, key: BufferKey, stream: Stream) -> Buffers:
        """New pinned buffers."""
        rows, routing = (key.capacity, key.hidden), (key.capacity, key.top_k)
        return cls(
            key,
            x=stream.pinned(rows, key.dtype),
            ids=stream.pinned(routing, torch.int64),
            weights=stream.pinned(routing, torch.float32),
            out=stream.pinned(rows, key.dtype),
        )


@dataclass
class BufferPool:
    """Free buffers: of each stream, and of captures.

    Graphs with the same key share buffers: they are replayed on one stream, as captured graphs
    that share a memory pool are.
    """

    _free: dict[tuple[BufferKey, int], list[Buffers]] = field(
        default_factory=lambda: defaultdict(list)
    )
    _captured: dict[BufferKey, list[Buffers]] = field(default_factory=lambda: defaultdict(list))
    _stagers: weakref.WeakSet[Stager] = field(default_factory=weakref.WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, key: BufferKey, stream: Stream) -> Buffers:
        """Buffers for one submission on `stream`.

        Under capture, buffers of earlier captures come first, then eager ones, which a warm-up run
        of this size left behind (a capture begins with a synchronized device, so no stream uses
        them): nothing is allocated under capture after a warm-up.
        """
        capturing = stream.capturing()
        with self._lock:
            if not capturing:
                free = self._free[key, stream.handle]
                return free.pop() if free else Buffers.allocate(key, stream)
            candidates = [self._captured[key]]
            candidates += [free for (other, _), free in self._free.items() if other == key]
            found = next((free.pop() for free in candidates if free), None)
            buffers = found or Buffers.allocate(key, stream)
            buffers.captured = True
            return buffers

    def give_back(self, buffers: Buffers, stream: Stream) -> None:
        """Make `buffers` available to what is queued on `stream` from now on."""
        with self._lock:
            if buffers.captured:
                self._captured[buffers.key].append(buffers)
            else:
                self._free[buffers.key, stream.handle].append(buffers)

    def clear(self, synchronize: Callable[[torch.device], object]) -> None:
        """Free the eager buffers, when their device is idle. Captured ones stay: graphs use them,
        and so do those of submissions that wait to be collected.

        Args:
            synchronize: waits until a device has ended all that was queued.
        """
        with self._lock:
            freed = {buffers for free in self._free.values() for buffers in free}
            for device in {buffers.key.device for buffers in freed}:
                synchronize(device)
            self._free.clear()
            for stager in self._stagers:
                stager.forget(freed)

    def attach(self, stager: Stager) -> None:
        """Let `stager` know of buffers that are freed."""
        self._stagers.add(stager)

    def count(self) -> tuple[int, int]:
        """Free buffers: (eager, captured)."""
        with self._lock:
            return (
                sum(map(len, self._free.values())),
                sum(map(len, self._captured.values())),
            )


BUFFERS = BufferPool()
"""The process's pinned buffers, shared by all layers."""


class Stager:
    """Submissions of one layer through pinned buffers.

    Args:
        maker: the layer.
        skip: bool [E] CPU tensor, the live mask; it must stay where it is.
    """

    def __init__(self, maker: SlotMaker, skip: torch.Tensor, pool: BufferPool = BUFFERS) -> None:
        self._maker, self._skip, self._pool = maker, skip, pool
        self._slots: dict[tuple[Buffers, int, bool], JobSlot] = {}
        pool.attach(self)
        # a layer may be dropped while a stream has yet to call its slots
        weakref.finalize(self, _drain, self._slots).atexit = False

    def submit(
        self,
        stream: Stream,
        hidden: torch.Tensor,
        ids: torch.Tensor,
        weights: torch.Tensor,
        *,
        count_ignored: bool = True,
    ) -> StagedJob:
        """Queue the copies of hidden [B, H], ids and weights [B, k], and the job's start."""
        (tokens, H), k = hidden.shape, ids.shape[1]
        key = BufferKey(1 << max(tokens - 1, 0).bit_length(), H, k, hidden.dtype, stream.device)
        buffers = self._pool.take(key, stream)
        with stream:
            stream.to_host(buffers.x[:tokens], hidden)
            stream.to_host(buffers.ids[:tokens], ids)
            stream.to_host(buffers.weights[:tokens], weights)
            slot = self._slot(buffers, tokens, count_ignored)
            stream.host_function(slot.post_fn, slot.user_data)
        return StagedJob(slot, buffers, tokens, self._pool, stream)

    def _slot(self, buffers: Buffers, tokens: int, count_ignored: bool) -> JobSlot:
        """The slot of these buffers: immutable, since the stream may still have to post it."""
        key = (buffers, tokens, count_ignored)
        if key not in self._slots:
            shape = self._maker.slot_shape(tokens, buffers.key.top_k)
            self._slots[key] = self._maker.job_slot(
                tokens=tokens,
                top_k=buffers.key.top_k,
                x=buffers.x.data_ptr(),
                ids=buffers.ids.data_ptr(),
                weights=buffers.weights.data_ptr(),
                skip=self._skip.data_ptr(),
                out=buffers.out.data_ptr(),
                count_ignored=count_ignored,
                scratch=buffers.scratch_of(shape),
            )
        return self._slots[key]

    def report(self) -> SlotReport:
        """What went wrong in runs that have ended since the last report. Never blocks."""
        return self._maker.slot_report()

    def forget(self, freed: set[Buffers]) -> None:
        """Drop the slots over `freed` buffers; nothing that is queued uses them any more."""
        for key in [key for key in self._slots if key[0] in freed]:
            del self._slots[key]


def _drain(slots: dict[tuple[Buffers, int, bool], JobSlot]) -> None:
    """Wait for the GPUs that may still call `slots`, which live until then."""
    for device in {buffers.key.device for buffers, _, _ in slots}:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    slots.clear()


@dataclass
class StagedJob:
    """A job on its way through a stream."""

    slot: JobSlot
    buffers: Buffers
    tokens: int
    pool: BufferPool
    stream: Stream

    def result(self, stream: Stream | None = None) -> torch.Tensor:
        """Queue the wait and the copy to the device; a new device tensor [B, H]."""
        stream = stream or self.stream
        if stream.capturing() != self.buffers.captured:
            raise RuntimeError(
                "submit_forward and sync_forward of one call must either both be captured by a "
                "CUDA graph or neither"
            )
        with stream:
            stream.host_function(self.slot.wait_fn, self.slot.user_data)
            result = stream.to_device(self.buffers.out[: self.tokens])
        self.pool.give_back(self.buffers, stream)
        return result

    def discard(self) -> None:
        """Queue the wait, so that the buffers can be used again."""
        with self.stream:
            self.stream.host_function(self.slot.wait_fn, self.slot.user_data)
        self.pool.give_back(self.buffers, self.stream)
