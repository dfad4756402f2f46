"""A forward pass of a layer: the memory that it works in, its descriptor, and the wait."""

from __future__ import annotations

import os
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Generic, NamedTuple, TypeVar

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.batch import Batch
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.kernels.encode import BLOCK_SLACK
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.cpu_kernels.use_counts import TOTALS
from hybrid_moe.formats.strips import MOST_BLOCK_TOKENS, STRIP_ROWS, SUMS_BYTES, round_up

Output = TypeVar("Output")

_EXACT_CAPACITY = 8


def capacity_for(tokens: int) -> int:
    """Tokens to size a job for: exact when small, else a power of two, so that jobs of similar
    batches share memory that is already mapped."""
    return tokens if tokens <= _EXACT_CAPACITY else 1 << (tokens - 1).bit_length()


@dataclass(frozen=True)
class ReadyLayer:
    """What a layer needs to run, and what jobs own: its threads, the compiled code's view of it
    (at `address`), and whatever that points to (`memory`)."""

    group: PoolGroup
    descriptor: records.Layer
    address: int
    memory: tuple[object, ...]


class JobShape(NamedTuple):
    """Sizes of what a job borrows; all grows with the batch and nothing with a maximum.

    A dense layer's job has neither experts nor ids (both 0): encoded inputs and sums are all that
    it needs, and it reads its inputs where they are.

    Attributes:
        capacity: most tokens. top_k: ids of a token. experts: E. hidden: H.
        x_row, h_row: bytes of an encoded row of inputs and of intermediates.
        unpacked_bytes: groups of a strip that are unpacked at a time.
        workers, pools: of the group that runs it.
        out_size: bytes of a value of the output, see `Batch`.
    """

    capacity: int
    top_k: int
    experts: int
    hidden: int
    x_row: int
    h_row: int
    unpacked_bytes: int
    workers: int
    pools: int
    out_size: int = 2

    @property
    def pairs(self) -> int:
        return self.capacity * self.top_k

    @property
    def strips(self) -> int:
        """Of the output."""
        return -(-self.hidden // STRIP_ROWS)

    @property
    def _pair_rows(self) -> int:
        """Bytes of what pairs add to the output, if few tokens keep that."""
        if not tuning.rows_by_pair(self.strips, self.workers):
            return 0
        return SUMS_BYTES * self.strips * self.top_k * min(self.capacity, tuning.PAIR_TOKENS)

    @property
    def _worker_areas(self) -> dict[str, int]:
        """Bytes of each part of a worker's scratch, by the field that holds its offset.

        Sums are those of a batch of one expert's tokens, or of fewer tokens and several strips; a
        matrix unit writes, and reads, whole blocks. An expert may get every pair."""
        most, routed = min(tuning.BATCH_TOKENS, self.pairs), int(self.experts > 0)
        return {
            "sums_offset": SUMS_BYTES * (tuning.BATCH_TOKENS + MOST_BLOCK_TOKENS),
            "x_offset": most * self.x_row + BLOCK_SLACK,
            "unpacked_offset": self.unpacked_bytes,
            "out_offset": SUMS_BYTES * tuning.out_rows(self.strips, self.capacity) * routed,
        }

    @property
    def worker_bytes(self) -> int:
        return round_up(sum(round_up(size, 64) for size in self._worker_areas.values()), 4096)

    @property
    def _areas(self) -> dict[str, int]:
        """Bytes of the areas whose addresses a descriptor holds, by field."""
        pairs, tokens, experts = self.pairs, self.capacity, self.experts
        return {
            # the output of a job that is given up goes here too, see `streams.graph_job`
            "x_copy": self.out_size * tokens * self.hidden * int(experts > 0),
            "counts": 4 * (experts + 1),
            "active_expert": 4 * experts,
            "active_start": 4 * (experts + 1),
            "pair_token": 4 * pairs,
            "pair_weight": 4 * pairs,
            "pair_x": 8 * pairs,
            "x_rows": tokens * self.x_row + BLOCK_SLACK,
            "h_rows": pairs * self.h_row + BLOCK_SLACK,
            "pair_rows": self._pair_rows,
            "scratch": self.workers * self.worker_bytes,
        }

    @property
    def nbytes(self) -> int:
        return sum(round_up(size, 64) for size in self._areas.values())

    def descriptor(self, workspace: Workspace) -> records.Job:
        """A job over `workspace`; its layer and batch remain to be filled in."""
        job = records.Job.new()
        words = job.words
        for name, size in self._areas.items():
            words[records.Job.word(name)] = workspace.take(size) if size else 0
        job.pools = self.pools
        job.scratch_bytes = self.worker_bytes
        offset = 0
        for name, size in self._worker_areas.items():
            words[records.Job.word(name)] = offset
            offset += round_up(size, 64)
        job.inline_encode = int(self.capacity <= tuning.INLINE_ENCODE_TOKENS)
        job.active = int(self.experts == 0)  # routing finds out; a dense layer has none
        return job


_write_batch = records.Job.writer("layer", *Batch._fields)
_write_rows = records.Job.writer("layer", *Batch._fields, "out_tokens", "out_first")
_IGNORED = records.Job.word("ignored")


class JobMemory:
    """What a pass works in, and the descriptor that says so to compiled code.

    Attributes:
        shape: its sizes. nbytes: of all of it.
        descriptor: at `address`.
    """

    __slots__ = ("__weakref__", "_words", "_workspace", "address", "descriptor", "nbytes", "shape")

    def __init__(self, shape: JobShape, workspace: Workspace, descriptor: records.Job) -> None:
        self.shape = shape
        self.nbytes = workspace.nbytes
        self.descriptor = descriptor
        self.address = descriptor.address
        self._words = descriptor.words
        self._workspace = workspace

    @classmethod
    def new(cls, shape: JobShape) -> JobMemory:
        """Memory that is not resident yet."""
        workspace = Workspace(shape.nbytes)
        return cls(shape, workspace, shape.descriptor(workspace))

    def share(self) -> JobMemory:
        """The same memory under a descriptor of its own, for a job whose runs never overlap with
        those of others that share it."""
        return JobMemory(self.shape, self._workspace, self.descriptor.copy())

    def fill(self, layer: int, batch: Batch) -> None:
        """Fill in the address of the layer's descriptor, and what a pass reads and writes."""
        _write_batch(self._words, layer, *batch)

    def fill_dense(self, layer: int, tokens: int, x: int, out: int, total: int, first: int) -> None:
        """The same of a dense layer: bf16 rows at `x`, which are tokens from `first` on of the
        output's `total`."""
        _write_rows(self._words, layer, *Batch(tokens, 0, x, 0, 0, 0, out), total, first)

    @property
    def ignored(self) -> int:
        """Ids out of range that the latest launch has met."""
        return self._words[_IGNORED]


class IdleMemory:
    """Memory of jobs that are over, for later ones of the same shape: least recently used first;
    what was given back last is kept, however large.

    Without a lock, which would cost more than all the rest: `list` does one step at a time. Two
    threads that drop old memory at once may drop more than they need.
    """

    MOST_JOBS = 16
    MOST_BYTES = 256 << 20

    def __init__(self) -> None:
        self._idle: list[JobMemory] = []

    def borrow(self, shape: JobShape) -> JobMemory:
        """Idle memory of this shape, or new one."""
        for memory in reversed(self._idle):
            if memory.shape == shape:
                try:
                    self._idle.remove(memory)
                except ValueError:  # another thread was faster
                    continue
                return memory
        return JobMemory.new(shape)

    def give_back(self, memory: JobMemory) -> None:
        """Keep `memory`, and drop old ones past 16 jobs or 256 MiB."""
        idle = self._idle
        if any(each is memory for each in idle):  # two threads have waited for one job
            return
        idle.append(memory)
        while len(idle) > 1 and (
            len(idle) > self.MOST_JOBS or sum([each.nbytes for each in idle]) > self.MOST_BYTES
        ):
            del idle[:1]

    def clear(self) -> None:
        """Drop all of it."""
        self._idle.clear()


IDLE = IdleMemory()
"""Of the process; layers of equal sizes share it."""
os.register_at_fork(after_in_child=IDLE.clear)  # the child has no mapping of it


class Job(Generic[Output]):
    """A pass under way, or one that did not start.

    Attributes:
        tokens: T.
        ignored: ids below 0 or at and above the number of experts.
        missing: an expert that is neither loaded nor skipped, for which reason nothing runs; or -1.
    """

    __slots__ = ("_output", "_running", "ignored", "missing", "tokens")

    def __init__(
        self,
        running: tuple[PoolGroup, int, JobMemory] | None,
        output: Output,
        tokens: int,
        ignored: int = 0,
        missing: int = -1,
    ) -> None:
        """A job that has been launched.

        Args:
            running: where, its number (that of the last part of a long batch), and what it works
                in, which goes to `IDLE` when it is over. None: nothing runs.
            output: what `wait` returns.
        """
        self._running, self._output = running, output
        self.tokens, self.ignored, self.missing = tokens, ignored, missing

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._running is None or self._running[0].is_complete(self._running[1])

    def wait(self) -> Output:
        """The output, which is the caller's own. The calling thread works meanwhile. For one thread
        at a time; a second call returns at once."""
        if self._running is not None:
            group, sequence, memory = self._running
            begin = perf_counter_ns()
            group.wait(sequence)
            TOTALS.waits += 1
            TOTALS.waited_ns += perf_counter_ns() - begin
            self._running = None
            IDLE.give_back(memory)
        return self._output
