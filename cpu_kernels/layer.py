"""The routed experts of one layer on the CPU: packed weights and their forward pass."""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.batch import Batch, check_arrays
from hybrid_moe.cpu_kernels.descriptor import describe
from hybrid_moe.cpu_kernels.drivers import check_machine
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.experts import PackedExperts
from hybrid_moe.cpu_kernels.job import (
    IDLE,
    Job,
    JobMemory,
    JobShape,
    Output,
    ReadyLayer,
    capacity_for,
)
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, group_for
from hybrid_moe.cpu_kernels.streams.graph_job import Counters, GraphJob, LiveMask, Report
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.cpu_kernels.use_counts import watch_layer
from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from hybrid_moe.locks import ProcessLock


class ExpertLayer(PackedExperts):
    """Experts of one layer: allocate, load each expert, forward, close.

    Forward calls are queued in the order in which they are submitted and share the threads of equal
    pool configurations.
    """

    def __init__(
        self,
        fmt: WeightFormat | LayerFormats,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        pool: PoolConfig,
        activation: Activation | None = None,
        activation_bits: int = 16,
        isa: str | Tier | None = None,
        name: str = "experts",
    ) -> None:
        """Describe the layer; nothing is allocated and no thread starts.

        Args:
            fmt: how its weights are stored, and held; one format, or those of the projections.
            num_experts: E. hidden: H. intermediate: I; both multiples of 32.
            pool: worker threads.
            activation: clamps and alpha; plain SwiGLU by default.
            activation_bits: of x and h as they enter products with weights that are integers: 16,
                or 8, which is faster and less exact (docs/numerics.md).
            isa: a tier's name, to use instead of the best one.
            name: of its jobs in a trace.

        Raises:
            ValueError: a size is not positive or not a multiple of 32; an unusable tier; 8-bit
                activations and weights that are no integers.
            NotImplementedError: neither x86-64 nor aarch64.
        """
        check_machine()
        super().__init__(fmt, num_experts, hidden, intermediate, pool)
        if activation_bits != 16:
            for held in self.formats.each:
                format_kernels(held, activation_bits)  # or raises
        self.activation_bits = activation_bits
        self.activation = activation or Activation()
        self.tier = isa if isinstance(isa, Tier) else choose_tier(isa)
        self.name = name
        self._workers = np.array(pool.threads_per_pool, np.int64)
        self._parameters: npt.NDArray[np.float32] = np.array(self.activation.parameters, np.float32)
        self._ready_state: ReadyLayer | None = None
        self._ready_lock = ProcessLock()  # a child closes what it inherits
        self._group: PoolGroup | None = None
        self._job_shapes: dict[tuple[int, int, int], JobShape] = {}  # by capacity, k, out_size
        self._counters = Counters()
        self._routed: npt.NDArray[np.int64] = np.zeros(num_experts, np.int64)
        self._latest = 0  # number of the newest pass that is no graph job
        self._live_masks: dict[int, LiveMask] = {}

    def forward(
        self,
        x: npt.NDArray[np.uint16],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        skip: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.uint16]:
        """`submit(...)` and wait."""
        bits: npt.NDArray[np.uint16] = self.submit(x, ids, weights, skip).wait()
        return bits

    def submit(
        self,
        x: npt.NDArray[np.uint16],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        skip: npt.NDArray[np.bool_] | None = None,
        *,
        rounded: bool = True,
    ) -> Job[Array]:
        """Start a forward pass on arrays. They may be changed as soon as this returns.

        Args:
            x: bf16 bits [T, H]. ids: [T, k]. weights: [T, k].
            skip: bool [E], experts that are computed elsewhere and contribute nothing here; not to
                be changed meanwhile.
            rounded: to bf16. False: the float32 sums, as they are before that.

        Returns:
            A job whose `wait()` gives [T, H]: bf16 bits (uint16), or float32.

        Raises:
            ValueError, TypeError: a shape or dtype is wrong.
            RuntimeError: an id names an expert that is neither loaded nor skipped; or as `start`.
            OSError: as `start`.
        """
        check_arrays(x, ids, weights, skip, self.hidden, self.num_experts)
        x, ids, weights = map(np.ascontiguousarray, (x, ids, weights))
        skip = None if skip is None else np.ascontiguousarray(skip)
        out: Array = np.empty(x.shape, np.uint16 if rounded else np.float32)
        at = [array.ctypes.data for array in (x, ids, weights)]
        at += [0 if skip is None else skip.ctypes.data, out.ctypes.data, out.itemsize]
        job = self.start(Batch(*ids.shape, *at), out)
        if job.missing >= 0:
            raise RuntimeError(
                f"a token is routed to expert {job.missing}, which is not loaded here "
                "and not marked as computed elsewhere"
            )
        return job

    def start(self, batch: Batch, output: Output) -> Job[Output]:
        """Start a forward pass on a batch, whose inputs may be changed as soon as this returns.

        More than MAX_TOKENS_PER_JOB tokens run one part after another in the same memory, so this
        returns when all parts but the last are complete; the calling thread works on them.

        Args:
            batch: of the layer's H and E.
            output: holds the memory at `batch.out`, for as long as the job needs it; the job's
                `wait()` returns it.

        Returns:
            The job. Where an id names an expert that is neither loaded nor skipped it has not
            started, and says so (`missing`).

        Raises:
            RuntimeError: no expert is loaded; the layer is closed; this is a forked child.
            OSError: the system allows fewer threads than the pool has.
        """
        ready = self._ready_state or self._ready()
        tokens, group = batch.tokens, ready.group
        if not tokens:
            return Job(None, output, 0)
        most = min(tokens, MAX_TOKENS_PER_JOB)
        memory = IDLE.borrow(self._job_shape(ready, most, batch.top_k, batch.out_size))
        owned = (ready, memory, output)
        sequence = ignored = 0
        for part in batch.parts(most, self.hidden):
            if sequence:
                group.wait(sequence)
            memory.fill(ready.address, part)
            sequence = group.submit(memory.address, owned)
            ignored += memory.ignored
            if sequence <= 0:
                IDLE.give_back(memory)
                return Job(None, output, tokens, ignored, -sequence)
        self._latest = sequence
        return Job((group, sequence, memory), output, tokens, ignored)

    def wait_all(self) -> None:
        """Return when every pass that `start` has started is over; the calling thread works."""
        if self._latest and (ready := self._ready_state) is not None:
            ready.group.wait(self._latest)

    @property
    def pairs(self) -> tuple[int, int]:
        """(Token, expert) pairs of all passes so far: of experts that the mask put on the GPU, and
        of experts that were computed here."""
        ready = self._ready_state
        return (
            (0, 0) if ready is None else (ready.descriptor.hot.value, ready.descriptor.cold.value)
        )

    @property
    def routed(self) -> npt.NDArray[np.int64]:
        """int64 [E]: (token, expert) pairs of all routings so far, of experts that are computed
        here and of those that the mask skips. The counters themselves, not to be written."""
        return self._routed

    @property
    def busy(self) -> tuple[int, int]:
        """Jobs of all passes so far that have begun, and nanoseconds that the pool was at those
        that have ended."""
        ready = self._ready_state
        if ready is None:
            return 0, 0
        return ready.descriptor.launches.value, ready.descriptor.busy_ns.value

    def job_shape(self, tokens: int, top_k: int, out_size: int = 2) -> JobShape:
        """Of a job of T tokens with k experts each, and with an output of values of so many bytes,
        see `Batch`."""
        return self._job_shape(self._ready(), tokens, top_k, out_size)

    def _job_shape(self, ready: ReadyLayer, tokens: int, top_k: int, out_size: int) -> JobShape:
        key = (capacity_for(tokens), top_k, out_size)
        shape = self._job_shapes.get(key)
        if shape is None:
            descriptor = ready.descriptor
            shape = self._job_shapes[key] = JobShape(
                *key[:2],
                experts=self.num_experts,
                hidden=self.hidden,
                x_row=descriptor.gate_up.row_bytes,
                h_row=descriptor.down.row_bytes,
                unpacked_bytes=max(format_kernels(f).unpacked_bytes for f in self.formats),
                workers=self.pool.threads,
                pools=self.pool.pools,
                out_size=out_size,
            )
        return shape

    def _ready(self) -> ReadyLayer:
        """The threads and the descriptor; the first pass starts and builds them."""
        self._check_open()
        if not self._has_loaded:
            raise RuntimeError("no expert of this layer has been loaded")
        self._check_process()
        with self._ready_lock:
            self._check_open()
            if self._ready_state is None:
                self._group = self._group or group_for(self.pool)
                gate_up, down = (
                    kernel_set(fmt.name, self.tier, self.activation_bits) for fmt in self.formats
                )
                layouts, tables = (self.gate_up_layout, self.down_layout), self._tables
                descriptor = describe(gate_up, down, self.num_experts, *layouts, tables)
                descriptor.label = trace.label(self.name)
                ready = self._ready_state = ReadyLayer(
                    self._group,
                    descriptor,
                    descriptor.address,
                    (*tables.values(), self._no_bias, self._arenas),
                )
                nbytes = sum(self.expert_nbytes(pool) for pool in range(self.pool.pools))
                watch_layer(self.name, nbytes, descriptor, ready)
            return self._ready_state

    @property
    def _tables(self) -> dict[str, Array]:
        """What a descriptor points to, by field."""
        return {
            "parameters": self._parameters,
            "packed": self._table,
            "routed": self._routed,
            "blocks": self._blocks,
            "strips": self._strips,
            "workers": self._workers,
        }

    def graph_job(
        self, batch: Batch, memory: JobMemory, *, ignored_ids: int, buffers: object = None
    ) -> GraphJob:
        """A job over fixed memory that compiled host functions post and await (CUDA streams).

        Args:
            batch: its `skip` is the layer's live mask, of which each post takes a snapshot.
            memory: of `job_shape(tokens, k)`; jobs whose runs never overlap may share it.
            ignored_ids: what ids out of range mean, `records.IDS_*`.
            buffers: what holds the memory of the batch; kept for as long as it is used.
        """
        ready = self._ready()
        ready.group.start_background_worker()
        if batch.skip not in self._live_masks:
            self._live_masks[batch.skip] = LiveMask(batch.skip, self.num_experts)
        return GraphJob(
            ready.group,
            ready.address,
            batch,
            memory,
            self._live_masks[batch.skip],
            self._counters,
            hidden=self.hidden,
            ignored_ids=ignored_ids,
            owned=ready,
            buffers=buffers,
        )

    def report(self) -> Report:
        """What the runs of this layer's graph jobs have met since the last report; never blocks."""
        return self._counters.report()

    def close(self) -> None:
        """Release the packed weights: at once, or where jobs are under way, when the last of them
        has been waited for or seen to be complete. The layer cannot be used afterwards."""
        with self._ready_lock:
            ready, self._ready_state = self._ready_state, None
            super().close()
        if ready is not None and os.getpid() == self._pid:
            ready.group.release_completed()
