"""The routed experts of one layer on the CPU: packed weights and their forward pass."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.activation import Activation
from hybrid_moe.cpu_kernels.descriptor import describe
from hybrid_moe.cpu_kernels.drivers import check_machine, records
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.jit.records import f32, i64
from hybrid_moe.cpu_kernels.job import Job, JobShape, StagedJob, capacity_for, check_inputs
from hybrid_moe.cpu_kernels.kernels.format_kernels import FORMAT_KERNELS
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, group_for
from hybrid_moe.cpu_kernels.small import SmallJob, SmallPass, fill, idle_jobs
from hybrid_moe.cpu_kernels.streams.slots import (
    JobSlot,
    LiveMask,
    SlotCounters,
    SlotReport,
    SlotScratch,
)
from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows, publish_address
from hybrid_moe.cpu_kernels.strips.unpack import RunAll, unpack_gate_up, unpack_rows
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.table import Array, WeightFormat
from hybrid_moe.formats.tensors import ExpertTensors, check_matrix
from hybrid_moe.locks import ProcessLock


def _shares(units: int, parts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """First unit of each part and the end, in proportion to `parts`."""
    bounds = np.concatenate([[0], np.cumsum(parts)]) * units / sum(parts)
    return np.round(bounds).astype(np.int64)


@dataclass(frozen=True)
class _Ready:
    """What a layer needs to run, and what jobs own: its threads, the compiled code's view of it
    (`descriptor`), and whatever that points to (`memory`)."""

    group: PoolGroup
    descriptor: records.Layer
    memory: tuple[object, ...]


class ExpertLayer:
    """Experts of one layer: allocate, load each expert, forward, close.

    Loading is thread-safe for different experts. Forward calls are queued in the order in which
    they are submitted and share the threads of equal pool configurations.
    """

    def __init__(
        self,
        fmt: WeightFormat,
        num_experts: int,
        hidden: int,
        intermediate: int,
        *,
        pool: PoolConfig,
        activation: Activation | None = None,
        isa: str | Tier | None = None,
    ) -> None:
        """Describe the layer; nothing is allocated and no thread starts.

        Args:
            fmt: how its weights are stored, and held.
            num_experts: E. hidden: H. intermediate: I; both multiples of 32.
            pool: worker threads.
            activation: clamps and alpha; plain SwiGLU by default.
            isa: a tier's name, to use instead of the best one.

        Raises:
            ValueError: a size is not positive or not a multiple of 32; an unusable tier.
            NotImplementedError: neither x86-64 nor aarch64.
        """
        check_machine()
        if num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, not {num_experts}")
        for name, size in (("hidden", hidden), ("intermediate", intermediate)):
            if size < 1 or size % GROUP:
                raise ValueError(f"{name} = {size} must be a positive multiple of {GROUP}")
        self.fmt = fmt
        self.num_experts = num_experts
        self.hidden = hidden
        self.intermediate = intermediate
        self.pool = pool
        self.activation = activation or Activation()
        self.tier = isa if isinstance(isa, Tier) else choose_tier(isa)
        self.gate_up_layout = strip_layout(fmt, hidden)
        self.down_layout = strip_layout(fmt, intermediate)
        parts = pool.threads_per_pool
        self._workers = np.array(parts, np.int64)
        self._blocks = _shares(intermediate // GROUP, parts)
        self._strips = _shares(-(-hidden // STRIP_ROWS), parts)
        self._gate_up = np.zeros((pool.pools, num_experts), np.int64)
        self._down = np.zeros((pool.pools, num_experts), np.int64)
        self._arenas: list[Arena] = []
        self._slots_of: npt.NDArray[np.int64] = np.full(num_experts, -1, np.int64)
        self._loaded: npt.NDArray[np.bool_] = np.zeros(num_experts, np.bool_)
        self._has_experts = False
        self._parameters: npt.NDArray[np.float32] = np.array(self.activation.parameters, np.float32)
        self._no_bias: npt.NDArray[np.float32] = np.zeros(
            round_up(max(hidden, intermediate), STRIP_ROWS), np.float32
        )
        self._biases: dict[tuple[str, int], npt.NDArray[np.float32]] = {}
        self._bias_tables = {
            name: np.full(num_experts, self._no_bias.ctypes.data, np.int64)
            for name in ("gate", "up", "down")
        }
        self._ready_state: _Ready | None = None
        self._ready_lock = ProcessLock()  # a child closes what it inherits
        self._group: PoolGroup | None = None
        self._closed = False
        self._pid = os.getpid()
        self._job_shapes: dict[tuple[int, int], JobShape] = {}
        self._small_jobs: dict[tuple[int, int], list[SmallJob]] = {}  # by tokens and k
        self._slot_counters = SlotCounters()
        self._live_masks: dict[int, LiveMask] = {}

    # loading

    def expert_nbytes(self, pool: int) -> int:
        """Packed bytes of one expert in one pool."""
        blocks = int(self._blocks[pool + 1] - self._blocks[pool])
        strips = int(self._strips[pool + 1] - self._strips[pool])
        return blocks * self.gate_up_layout.nbytes + strips * self.down_layout.nbytes

    @property
    def nbytes(self) -> int:
        """Packed bytes held."""
        return sum(arena.nbytes for arena in self._arenas)

    def allocate(self, resident: npt.NDArray[np.bool_]) -> None:
        """Map memory for the experts in `resident` (bool [E]). May be called once.

        Raises:
            ValueError: wrong length. RuntimeError: called twice or closed.
            MemoryError: the system refuses.
        """
        if resident.shape != (self.num_experts,):
            raise ValueError(f"resident has shape {resident.shape}, expected ({self.num_experts},)")
        self._check_open()
        if self._arenas:
            raise RuntimeError("already allocated")
        self._pid = os.getpid()
        chosen = np.flatnonzero(resident)
        self._slots_of[chosen] = np.arange(len(chosen))
        for pool, nodes in enumerate(self.pool.memory_nodes):
            self._arenas.append(Arena(len(chosen) * self.expert_nbytes(pool), nodes))

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Check and pack one expert; the arrays may be reused afterwards.

        A pass of another thread finds the expert whole, or not loaded.

        Raises:
            CheckpointError: a matrix is not what the layer expects.
            IndexError: no such expert, or `allocate` did not name it.
            RuntimeError: the layer is closed, or this is a forked child.
        """
        self._check_open()
        self._check_process()
        if not 0 <= expert < self.num_experts or self._slots_of[expert] < 0:
            raise IndexError(f"expert {expert} has no memory in this layer")
        H, I = self.hidden, self.intermediate
        check_matrix(tensors.gate, self.fmt, I, H)
        check_matrix(tensors.up, self.fmt, I, H)
        check_matrix(tensors.down, self.fmt, H, I)
        arenas, biases, loaded = self._arenas, self._biases, self._loaded  # `close` makes new ones
        slot = int(self._slots_of[expert])
        places = []
        for pool, arena in enumerate(arenas):
            address = arena.address + slot * self.expert_nbytes(pool)
            first, last = int(self._blocks[pool]), int(self._blocks[pool + 1])
            strips = range(first, last)
            pack_gate_up(address, strips, self.gate_up_layout, tensors.gate, tensors.up, I)
            down = address + len(strips) * self.gate_up_layout.nbytes
            first, last = int(self._strips[pool]), int(self._strips[pool + 1])
            pack_rows(down, range(first, last), self.down_layout, tensors.down, H)
            places.append((address, down))
        for name in ("gate", "up", "down"):
            bias = getattr(tensors, name).bias
            if (name, expert) in biases:  # loaded once more: a pass may be reading it
                biases[name, expert][: I if name != "down" else H] = 0 if bias is None else bias
            elif bias is not None:
                padded = np.zeros(round_up(len(bias), STRIP_ROWS), np.float32)
                padded[: len(bias)] = bias
                biases[name, expert] = padded
                self._bias_tables[name][expert] = biases[name, expert].ctypes.data
        # routing looks at pool 0's gate and up: they are published last
        for pool, (address, down) in reversed(list(enumerate(places))):
            self._down[pool, expert] = down
            publish_address(self._gate_up[pool, expert:], address)
        loaded[expert] = True
        self._has_experts = True
        self._check_open()

    def check_readable(self, expert: int) -> None:
        """Raise unless `unpack(expert)` can succeed: see there."""
        self._check_open()
        self._check_process()
        if not 0 <= expert < self.num_experts or not self._loaded[expert]:
            raise IndexError(f"expert {expert} is not loaded in this layer")

    def unpack(self, expert: int, run_all: RunAll = map) -> ExpertTensors:
        """A copy of a loaded expert, bit for bit as `load` was given it. Thread-safe.

        Args:
            expert: id.
            run_all: runs the copies; an executor's `map` runs them on its threads.

        Raises:
            IndexError: it is not loaded. RuntimeError: closed, or this is a forked child.
        """
        self.check_readable(expert)
        slot, strips = int(self._slots_of[expert]), []
        for pool, arena in enumerate(self._arenas):
            size = self.expert_nbytes(pool)
            packed = arena.bytes[slot * size : (slot + 1) * size]
            split = int(self._down[pool, expert] - self._gate_up[pool, expert])
            strips.append((packed[:split], packed[split:]))
        gate_up, down = (
            (parts[0] if len(parts) == 1 else np.concatenate(parts)).reshape(-1, layout.nbytes)
            for parts, layout in zip(
                zip(*strips, strict=True), (self.gate_up_layout, self.down_layout), strict=True
            )
        )
        fmt = self.fmt
        gate, up = unpack_gate_up(gate_up, self.gate_up_layout, fmt, self.intermediate, run_all)
        matrices = {"gate": gate, "up": up}
        matrices["down"] = unpack_rows(down, self.down_layout, fmt, self.hidden, run_all)
        for name, matrix in matrices.items():
            bias = self._biases.get((name, expert))
            if bias is not None:
                matrices[name] = replace(matrix, bias=bias[: len(matrix.codes)].copy())
        return ExpertTensors(**matrices)

    @property
    def loaded(self) -> npt.NDArray[np.bool_]:
        """Which experts are packed (bool [E], a copy)."""
        return np.copy(self._loaded)

    @property
    def _tables(self) -> dict[str, Array]:
        """What a descriptor points to, by its field."""
        return {
            "parameters": self._parameters,
            "gate_bias": self._bias_tables["gate"],
            "up_bias": self._bias_tables["up"],
            "down_bias": self._bias_tables["down"],
            "gate_up": self._gate_up,
            "down": self._down,
            "workers": self._workers,
            "blocks": self._blocks,
            "strips": self._strips,
        }

    # forward

    def forward(
        self,
        x: npt.NDArray[np.uint16],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        skip: npt.NDArray[np.bool_] | None = None,
    ) -> npt.NDArray[np.uint16]:
        """`submit(...)` and wait."""
        return self.submit(x, ids, weights, skip).wait()

    def submit(
        self,
        x: npt.NDArray[np.uint16],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        skip: npt.NDArray[np.bool_] | None = None,
    ) -> Job:
        """Start a forward pass. The inputs are copied before this returns.

        More than MAX_TOKENS_PER_JOB tokens run one part after another in the same memory, so this
        returns when all parts but the last are complete; the calling thread works on them.

        Args:
            x: bf16 bits [T, H]. ids: [T, k]. weights: [T, k].
            skip: bool [E], experts that are computed elsewhere and contribute nothing here.

        Returns:
            A job whose `wait()` gives bf16 bits [T, H].

        Raises:
            ValueError, TypeError: a shape or dtype is wrong.
            RuntimeError: an id names an expert that is neither loaded nor skipped; no expert is
                loaded; the layer is closed; this is a forked child.
            OSError: the system allows fewer threads than the pool has.
        """
        check_inputs(x, ids, weights, skip, self.hidden, self.num_experts)
        ready = self._ready()
        group = ready.group
        out = np.empty((len(x), self.hidden), np.uint16)
        if not len(x):
            return Job(group, None, out, 0)
        most = min(len(x), MAX_TOKENS_PER_JOB)
        job = group.idle.borrow(self._job_shape(ready, most, ids.shape[1]), StagedJob)
        owned = (ready, job, out)
        sequence = ignored = 0
        for start in range(0, len(x), most):
            if start:
                group.wait(sequence)
            part = slice(start, start + most)
            job.stage(x[part], ids[part], weights[part], skip)
            submission = group.submit(job.address(ready.descriptor, out[part].ctypes.data), owned)
            if submission.missing >= 0:
                group.idle.give_back(job)
                raise RuntimeError(
                    f"a token is routed to expert {submission.missing}, which is not loaded here "
                    "and not marked as computed elsewhere"
                )
            ignored += submission.ignored
            sequence = submission.sequence
        return Job(group, (job, sequence), out, ignored)

    def small(
        self,
        tokens: int,
        top_k: int,
        x: int,
        ids: int,
        weights: int,
        skip: int,
        out: int,
        owned: object,
    ) -> SmallPass:
        """Start a pass of at most `SMALL_TOKENS` tokens on raw addresses that the caller vouches
        for. The inputs may change as soon as this returns.

        Args:
            tokens, top_k: T and k.
            x: of bf16 [T, H]. ids: of int64 [T, k]. weights: of float32 [T, k]. skip: of bool [E].
            out: of bf16 [T, H], written until `wait()` returns.
            owned: whatever holds `out`, kept alive until then.
        """
        ready, idle = self._ready_state, self._small_jobs.get((tokens, top_k))
        if ready is None or idle is None:
            ready = self._ready()
            idle = idle_jobs(self._job_shape(ready, tokens, top_k))
            self._small_jobs[tokens, top_k] = idle
        try:
            job = idle.pop()
        except IndexError:
            job = SmallJob(self._job_shape(ready, tokens, top_k))
        fill(job.words, ready.descriptor.address, tokens, x, ids, weights, skip, out)
        return SmallPass(ready.group, job, idle, (ready, owned))

    def _job_shape(self, ready: _Ready, tokens: int, top_k: int) -> JobShape:
        key = (capacity_for(tokens), top_k)
        shape = self._job_shapes.get(key)
        if shape is None:
            descriptor = ready.descriptor
            shape = self._job_shapes[key] = JobShape(
                *key,
                experts=self.num_experts,
                hidden=self.hidden,
                x_row=descriptor.x_row_bytes,
                h_row=descriptor.h_row_bytes,
                unpacked_bytes=FORMAT_KERNELS[self.fmt.name].unpacked_bytes,
                workers=self.pool.threads,
                pools=self.pool.pools,
            )
        return shape

    def _ready(self) -> _Ready:
        """The threads and the descriptor; the first pass starts and builds them."""
        self._check_open()
        if not self._has_experts:
            raise RuntimeError("no expert of this layer has been loaded")
        self._check_process()
        with self._ready_lock:
            self._check_open()
            if self._ready_state is None:
                self._group = self._group or group_for(self.pool)
                kernels, tables = kernel_set(self.fmt.name, self.tier), self._tables
                descriptor = describe(
                    kernels, self.num_experts, self.gate_up_layout, self.down_layout, tables
                )
                self._ready_state = _Ready(
                    self._group,
                    descriptor,
                    (*tables.values(), self._no_bias, self._arenas, self._biases),
                )
            return self._ready_state

    def slot_shape(self, tokens: int, top_k: int) -> JobShape:
        """What the scratch of a slot depends on."""
        return self._job_shape(self._ready(), tokens, top_k)

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
        owned: object = None,
    ) -> JobSlot:
        """A job over fixed buffers that compiled host functions post and await (CUDA streams).

        Args:
            tokens, top_k: T and k.
            x, out: addresses of bf16 [T, H]. ids: of int64 [T, k]. weights: of float32 [T, k].
            skip: address of bool [E], the layer's live mask: each post takes a snapshot of it.
            ignored_ids: what ids out of range mean, `records.IDS_*`.
            scratch: of `slot_shape(tokens, top_k)`.
            owned: what holds the memory at these addresses; kept for as long as they are used.
        """
        ready = self._ready()
        ready.group.start_background_worker()
        if skip not in self._live_masks:
            self._live_masks[skip] = LiveMask(skip, self.num_experts)
        slot = JobSlot(
            ready.group,
            scratch,
            self._live_masks[skip],
            self._slot_counters,
            hidden=self.hidden,
            ignored_ids=ignored_ids,
            layer=ready,
            buffers=owned,
        )
        job = slot.template
        job.layer = ready.descriptor
        job.tokens = tokens
        job.x, job.ids, job.weights = x, i64.at(ids), f32.at(weights)
        job.out.value = out
        return slot

    def slot_report(self) -> SlotReport:
        """What the runs of this layer's job slots have met since the last report; never blocks."""
        return self._slot_counters.report()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                "packed experts are not inherited by a forked child process; "
                "load the model after the fork, or use the 'spawn' start method"
            )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this layer is closed")

    def close(self) -> None:
        """Release the packed weights: at once, or where jobs are under way, when the last of them
        has been waited for or seen to be complete. The layer cannot be used afterwards."""
        with self._ready_lock:
            self._closed = True
            ready, self._ready_state = self._ready_state, None
            # new objects: jobs under way own the old ones
            self._arenas, self._biases = [], {}
            self._loaded = np.zeros(self.num_experts, np.bool_)
        if ready is not None and os.getpid() == self._pid:
            ready.group.forget_completed()
