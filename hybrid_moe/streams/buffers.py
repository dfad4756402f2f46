"""Pinned memory through which submissions pass, and who may use it next.

Buffers are keyed by everything that determines their sizes. What a captured graph points at must
stay where it is: buffers that were used under capture are kept for captures for ever. The others
are reused and can be freed. Reuse needs no events: buffers go back to the stream that collected the
result, whose order keeps the uses apart.
"""

from __future__ import annotations

import logging
import weakref
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from hybrid_moe.cpu_kernels.drivers.records import Mailbox
from hybrid_moe.cpu_kernels.job import JobMemory, JobShape
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.streams.progress import Progress
from hybrid_moe.locks import ProcessLock
from hybrid_moe.streams.interface import Stream

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.streams.watcher import Watcher
    from hybrid_moe.streams.staging import Stager

logger = logging.getLogger(__name__)

_MAILBOXES_PER_PAGE = 64


@dataclass(frozen=True)
class BufferKey:
    """What makes two submissions able to share buffers. `capacity` is in tokens."""

    capacity: int
    hidden: int
    top_k: int
    dtype: torch.dtype
    device: torch.device
    out_dtype: torch.dtype = torch.bfloat16


@dataclass(eq=False)
class Buffers:
    """Memory of one submission: pinned x and out [capacity, H], ids and weights [capacity, k], and
    the jobs' memory, which all layers share that take turns in these buffers.

    Without a mailbox, jobs are handed over by host functions.
    """

    key: BufferKey
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    out: torch.Tensor
    mailbox: Mailbox | None
    captured: bool = False
    memory: dict[tuple[JobShape, PoolConfig], JobMemory] = field(default_factory=dict)

    def memory_of(self, shape: JobShape, pool: PoolConfig) -> JobMemory:
        """What jobs of that shape work in on the threads of `pool`: one for each model and size
        that use the buffers. Other threads may still be at a job that was given up."""
        if (shape, pool) not in self.memory:
            self.memory[shape, pool] = JobMemory.new(shape)
        return self.memory[shape, pool]

    @classmethod
    def allocate(cls, key: BufferKey, stream: Stream, mailbox: Mailbox | None) -> Buffers:
        """New pinned buffers."""
        rows, routing = (key.capacity, key.hidden), (key.capacity, key.top_k)
        return cls(
            key,
            x=stream.pinned(rows, key.dtype),
            ids=stream.pinned(routing, torch.int64),
            weights=stream.pinned(routing, torch.float32),
            out=stream.pinned(rows, key.out_dtype),
            mailbox=mailbox,
        )


def _watcher() -> Watcher:
    from hybrid_moe.cpu_kernels.streams.watcher import watcher

    return watcher()


class Mailboxes:
    """Mailboxes that a watcher serves. They are few, live forever, and are used again.

    Args:
        watcher: gives it, when the first mailbox is needed.
    """

    def __init__(self, watcher: Callable[[], Watcher] = _watcher) -> None:
        self._watcher = watcher
        self._idle: list[Mailbox] = []
        self._blank: list[tuple[int, torch.Tensor]] = []  # not yet watched, with their page
        self._full = False

    def take(self, stream: Stream) -> Mailbox | None:
        """A mailbox of two zeros, or None where jobs must be handed over by host functions."""
        if not stream.has_flags or self._full:
            return None
        if self._idle:
            return self._idle.pop()
        if not self._blank:
            page = stream.pinned((_MAILBOXES_PER_PAGE, Mailbox.nbytes // 8), torch.int64)
            self._blank = [(row.data_ptr(), page) for row in page]
        address, page = self._blank.pop()
        if not self._watcher().add(address, page):
            self._full = True
            logger.warning("too many mailboxes: further buffers are handed over by host functions")
            return None
        return Mailbox.at(address)

    def give_back(self, buffers: Buffers) -> None:
        """Keep the mailbox of buffers that are freed, which no stream uses any more."""
        if buffers.mailbox is not None:
            self._idle.append(buffers.mailbox)


class BufferPool:
    """Free buffers: of each stream, and of captures.

    Graphs captured from one stream share buffers: they are replayed one after the other, as
    captured graphs that share a memory pool are.
    """

    def __init__(self, mailboxes: Mailboxes | None = None) -> None:
        self._mailboxes = mailboxes or Mailboxes()
        self._free: dict[tuple[BufferKey, int], list[Buffers]] = defaultdict(list)
        self._captured: dict[tuple[BufferKey, int], list[Buffers]] = defaultdict(list)
        self._lost: deque[tuple[Buffers, Progress, int, bool]] = deque()
        self._in_graphs: list[Buffers] = []
        self._stagers: weakref.WeakSet[Stager] = weakref.WeakSet()
        self._lock = ProcessLock()

    def take(self, key: BufferKey, stream: Stream) -> Buffers:
        """Buffers for one submission on `stream`.

        Under capture, buffers of earlier captures come first, then eager ones, which a warm-up run
        of this size left behind (a capture begins with a synchronized device, so no stream uses
        them): nothing is allocated under capture after a warm-up.
        """
        capturing = stream.capturing()
        with self._lock:
            self._find_lost()
            if not capturing:
                free = self._free[key, stream.handle]
                return free.pop() if free else self._allocate(key, stream)
            candidates = [self._captured[key, stream.handle]]
            candidates += [free for (other, _), free in self._free.items() if other == key]
            found = next((free.pop() for free in candidates if free), None)
            buffers = found or self._allocate(key, stream)
            buffers.captured = True
            return buffers

    def _allocate(self, key: BufferKey, stream: Stream) -> Buffers:
        return Buffers.allocate(key, stream, self._mailboxes.take(stream))

    def give_back(self, buffers: Buffers, stream: Stream) -> None:
        """Make `buffers` available to what is queued on `stream` from now on."""
        with self._lock:
            kept = self._captured if buffers.captured else self._free
            kept[buffers.key, stream.handle].append(buffers)

    def lost(
        self, buffers: Buffers, progress: Progress, stream: Stream, *, awaited: bool = False
    ) -> None:
        """Take back buffers of a job whose wait was never queued; or, `awaited`, was queued on
        `stream`. They are used again when `progress` is idle; those that a graph has captured are
        not, since a replay posts into them and does not wait. May be called from finalizers.
        """
        if buffers.captured:
            self._in_graphs.append(buffers)
        else:
            self._lost.append((buffers, progress, stream.handle, awaited))

    def _find_lost(self) -> None:
        """Free those of the lost buffers that are idle. The caller holds the lock."""
        for _ in range(len(self._lost)):
            buffers, progress, handle, awaited = self._lost.popleft()
            if not progress.idle:
                self._lost.append((buffers, progress, handle, awaited))
                continue
            if buffers.mailbox is not None and not awaited:
                buffers.mailbox.done.value = 0  # no stream has been asked to wait for it
            self._free[buffers.key, handle].append(buffers)

    def clear(self, synchronize: Callable[[torch.device], object]) -> None:
        """Free the eager buffers, when their device is idle. Captured ones stay: graphs use them,
        and so do those of submissions that wait to be collected.

        Args:
            synchronize: waits until a device has ended all that was queued.
        """
        with self._lock:
            self._find_lost()
            freed = {buffers for free in self._free.values() for buffers in free}
            for device in {buffers.key.device for buffers in freed}:
                synchronize(device)
            self._free.clear()
            for buffers in freed:
                self._mailboxes.give_back(buffers)
            for stager in self._stagers:
                stager.release(freed)
        keeping.release(most=None)

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
