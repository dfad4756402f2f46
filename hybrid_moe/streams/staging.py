"""CUDA tensors in, CUDA tensors out: one layer's jobs in the order of the caller's stream.

The host never waits, so what `submit` and `result` queue can be captured by a CUDA graph and
replayed:

    caller's stream:  ─┬─────────────┬─ (attention, GPU experts ...) ──┬─ wait ─ copy out ─
                     fork          copied                             join
    side stream:       └─ copy x, ids, weights ─ post ─────────────────┘
    workers:                                       └── the CPU's experts ──► done

The inputs may change as soon as the caller's stream has passed `copied`; it does not wait for the
post, which can take a callback thread's wake-up. A layer's own hot half comes before `copied`: both
only read the inputs. Post and wait go through the buffers' mailbox: the
stream writes the address of the graph job, waits for the flag and clears it for the next run, so
that a replay of the same constants works (`hybrid_moe.cpu_kernels.drivers.mailbox` says why). Where
a GPU has no memory flags, both are host functions, compiled ones: Python would need the GIL inside
the driver's callback thread. Every wait is for something queued earlier, so streams that the
hardware serializes cannot block each other.

A submission may be dropped at any time, with its layer: `cpu_kernels.streams.graph_job` says what
stays until the stream and the workers are through with it. Its buffers come back to the pool then.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers.records import IDS_COUNT
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.streams import keeping
from hybrid_moe.cpu_kernels.streams.graph_job import GraphJob
from hybrid_moe.streams.buffers import BUFFERS, BufferKey, BufferPool, Buffers
from hybrid_moe.streams.interface import Event, Stream

MOST_JOBS = 128
"""Eager jobs that a layer keeps, one for each buffers and number of tokens that it has met: all
batch sizes of a decoding server, but not all lengths of prompts."""

_Key = tuple[Buffers, int, int]
"""Buffers, tokens, and what ids out of range mean."""


class Stager:
    """Submissions of one layer through pinned buffers.

    Args:
        layer: whose experts run.
        skip: bool or uint8 [E] CPU tensor, the live mask; it must stay where it is.
        pool: of buffers.
        out_type: of results: bfloat16, or float32 for sums that are not rounded.
    """

    def __init__(
        self,
        layer: ExpertLayer,
        skip: torch.Tensor,
        pool: BufferPool = BUFFERS,
        out_type: torch.dtype = torch.bfloat16,
    ) -> None:
        self._layer, self._skip, self._pool = layer, skip, pool
        self._out_type = out_type
        self._recent: deque[weakref.ref[StreamJob]] = deque(maxlen=2)
        """Of eager jobs: more than what runs now and what runs later is never under way."""
        self._jobs: dict[_Key, GraphJob] = {}  # least recently used first
        self._captured: dict[_Key, GraphJob] = {}
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
        beside: Callable[[], object] | None = None,
    ) -> StreamJob:
        """Queue the copies of hidden [B, H], ids and weights [B, k], and the job's start.

        Args:
            ignored_ids: what ids out of range mean, `records.IDS_*`.
            join: let the stream wait for the post, for a result that is collected elsewhere: a
                captured graph must end with all its streams joined.
            beside: queues what the stream does with the inputs while they are copied.
        """
        (tokens, H), k = hidden.shape, ids.shape[1]
        capacity = 1 << max(tokens - 1, 0).bit_length()
        key = BufferKey(capacity, H, k, hidden.dtype, stream.device, self._out_type)
        keeping.release()
        buffers = self._pool.take(key, stream)
        try:
            graph_job = self._job(buffers, tokens, ignored_ids)
            ready = stream.record()
        except BaseException:
            self._pool.give_back(buffers, stream)
            raise
        job = StreamJob(graph_job, buffers, tokens, self._pool, stream, ready, join)
        side = stream.side
        side.wait(job.posted)
        with side:
            side.to_host(buffers.x[:tokens], hidden)
            side.to_host(buffers.ids[:tokens], ids)
            side.to_host(buffers.weights[:tokens], weights)
        copied = side.record()
        mailbox = buffers.mailbox
        try:
            with _visit(graph_job, buffers.captured):
                if mailbox is not None:
                    side.write_value(mailbox.posted.address, graph_job.user_data)
                else:
                    side.host_function(graph_job.post_fn, graph_job.user_data)
            job.posted = side.record()
            try:
                if beside is not None:
                    beside()
            except BaseException:
                job.discard()
                raise
        finally:
            stream.wait(copied)
        if join:
            stream.wait(job.posted)
        if not buffers.captured:
            self._recent.append(weakref.ref(job))
        return job

    def settle(self, stream: Stream) -> None:
        """Let what follows on `stream` wait for the ends of all eager jobs so far. Their results
        are collected as ever."""
        for job in [job() for job in self._recent]:
            if job is not None:
                job.settle(stream)

    def _job(self, buffers: Buffers, tokens: int, ignored_ids: int) -> GraphJob:
        """The job over these buffers: immutable, since the stream may still have to post it."""
        key = (buffers, tokens, ignored_ids)
        jobs = self._captured if buffers.captured else self._jobs
        job = jobs.pop(key, None)
        if job is None:
            top_k = buffers.key.top_k
            batch = Batch(
                tokens,
                top_k,
                x=buffers.x.data_ptr(),
                ids=buffers.ids.data_ptr(),
                weights=buffers.weights.data_ptr(),
                skip=self._skip.data_ptr(),
                out=buffers.out.data_ptr(),
                out_size=buffers.out.element_size(),
            )
            shape = self._layer.job_shape(tokens, top_k, batch.out_size)
            job = self._layer.graph_job(
                batch,
                buffers.memory_of(shape, self._layer.pool),
                ignored_ids=ignored_ids,
                buffers=(buffers, self._skip),
            )
        jobs[key] = job
        if len(self._jobs) > MOST_JOBS:
            del self._jobs[next(iter(self._jobs))]
        return job

    def release(self, freed: set[Buffers]) -> None:
        """Drop the jobs over `freed` buffers; nothing that is queued uses them any more."""
        for key in [key for key in self._jobs if key[0] in freed]:
            del self._jobs[key]

    def close(self) -> None:
        """Drop all jobs."""
        self._jobs.clear()
        self._captured.clear()


@contextmanager
def _visit(job: GraphJob, captured: bool) -> Iterator[None]:
    """Announce the visit that is queued meanwhile; a stream that refuses it makes none."""
    job.will_visit(captured=captured)
    try:
        yield
    except RuntimeError:
        job.will_visit(captured=captured, number=-1)
        raise


@dataclass(eq=False)
class StreamJob:
    """A job on its way through a stream.

    Attributes:
        graph_job: what is posted. tokens: T.
        posted: where the side stream has posted it.
        joined: `stream` has waited for that.
        settled: the wait is queued, and the buffers are the pool's again, or will be (`over`).
        over: of a wait that was queued before the result was asked for: where it has passed, and
            on which stream.
    """

    graph_job: GraphJob
    buffers: Buffers
    tokens: int
    pool: BufferPool
    stream: Stream
    posted: Event
    joined: bool
    settled: bool = False
    over: tuple[Event, Stream] | None = None

    def result(self, stream: Stream) -> torch.Tensor:
        """Queue the wait and the copy to the device; a new device tensor [B, H]."""
        if stream.capturing() != self.buffers.captured:
            raise RuntimeError(
                "submit_forward and sync_forward of one call must either both be captured by a "
                "CUDA graph or neither"
            )
        over, self.over = self.over, None
        if over is None:
            self._wait(stream)
        else:
            stream.wait(over[0])
        try:
            with stream:
                return stream.to_device(self.buffers.out[: self.tokens])
        finally:  # the device may be out of memory; the wait is queued all the same
            self.pool.give_back(self.buffers, stream)

    def discard(self) -> None:
        """Queue the wait, so that the buffers can be used again. Where it cannot be queued, since
        the run is in a graph that has ended, or the wait would be, the pool waits for the run."""
        over, self.over = self.over, None
        if over is not None:
            self.pool.give_back(self.buffers, over[1])
        if self.settled:
            return
        if self.stream.capturing() == self.buffers.captured:
            self._wait(self.stream)
            self.pool.give_back(self.buffers, self.stream)
        else:
            self._lose()

    def settle(self, stream: Stream) -> None:
        """Queue the wait now, unless that is done; `result` then waits for where it was queued."""
        if not self.settled:
            self._wait(stream)
            self.over = stream.record(), stream

    def __del__(self) -> None:
        # dropped by an exception, or with its layer; nothing can be queued from a finalizer
        self._lose()

    def _lose(self) -> None:
        progress, (over, self.over) = self.graph_job.progress, (self.over, None)
        if over is not None:
            self.pool.lost(self.buffers, progress, over[1], awaited=True)
        elif not self.settled:
            self.settled = True
            self.pool.lost(self.buffers, progress, self.stream)

    def _wait(self, stream: Stream) -> None:
        """Let `stream` wait for the job's end."""
        if not (self.joined and stream.handle == self.stream.handle):
            stream.wait(self.posted)
        mailbox = self.buffers.mailbox
        if mailbox is None:
            with _visit(self.graph_job, self.buffers.captured):
                stream.host_function(self.graph_job.wait_fn, self.graph_job.user_data)
            self.settled = True
        else:
            self.settled = True  # a stream that waits may not find its answer taken back
            stream.wait_value(mailbox.done.address, 1)
            stream.write_value(mailbox.done.address, 0)


@dataclass(frozen=True)
class StreamZeros:
    """In place of a job, for a layer of which all experts are on the GPU."""

    like: torch.Tensor
    out_type: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return int(self.like.shape[0])

    def result(self, stream: Stream) -> torch.Tensor:
        """Zeros like the batch, a new tensor."""
        with stream:
            return torch.zeros_like(self.like, dtype=self.out_type)

    def discard(self) -> None:
        """Nothing runs."""
