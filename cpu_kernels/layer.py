"""The routed experts of one layer on the CPU: packed weights and their forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.activation import Activation
from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.kernels.encode import row_bytes
from hybrid_moe.cpu_kernels.kernels.library import KernelSet, kernel_set
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pack import pack_gate_up, pack_rows
from hybrid_moe.cpu_kernels.panels import GROUP, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, Slots, Workspace, group_for
from hybrid_moe.formats import WeightFormat
from hybrid_moe.tensors import ExpertTensors, check_matrix

MAX_TOKENS_PER_JOB = 2048
"""Larger batches are cut: scratch grows with tokens x k, and 2048 already amortise unpacking."""

_CHUNK_BYTES = 16 << 10  # codes unpacked at a time: half of a 32 KiB L1
_TASKS_PER_WORKER = 12
_INLINE_ENCODE_TOKENS = 4
_ENCODE_TOKENS_PER_TASK = 16


def _shares(units: int, parts: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """First unit of each part and the end, in proportion to `parts`."""
    bounds = np.concatenate([[0], np.cumsum(parts)]) * units / sum(parts)
    return np.round(bounds).astype(np.int64)


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
        """
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
        self._blocks = _shares(intermediate // GROUP, parts)
        self._strips = _shares(hidden // STRIP_ROWS, parts)
        self._gate_up = np.zeros((pool.pools, num_experts), np.int64)
        self._down = np.zeros((pool.pools, num_experts), np.int64)
        self._arenas: list[Arena] = []
        self._slots_of: npt.NDArray[np.int64] = np.full(num_experts, -1, np.int64)
        self._loaded = np.zeros(num_experts, bool)
        self._descriptor: Slots | None = None
        self._group: PoolGroup | None = None
        self._closed = False

    # loading

    def expert_nbytes(self, pool: int) -> int:
        """Packed bytes of one expert in one pool."""
        blocks = int(self._blocks[pool + 1] - self._blocks[pool])
        strips = int(self._strips[pool + 1] - self._strips[pool])
        return 2 * blocks * self.gate_up_layout.nbytes + strips * self.down_layout.nbytes

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
        if self._arenas or self._closed:
            raise RuntimeError("this layer is closed" if self._closed else "already allocated")
        chosen = np.flatnonzero(resident)
        self._slots_of[chosen] = np.arange(len(chosen))
        nodes = self.pool.nodes if self.pool.pools > 1 else (None,)
        for pool, node in enumerate(nodes):
            self._arenas.append(Arena(len(chosen) * self.expert_nbytes(pool), node))
        width = round_up(max(self.hidden, self.intermediate), STRIP_ROWS)
        self._no_bias = np.zeros(width, np.float32)
        self._biases: dict[tuple[str, int], npt.NDArray[np.float32]] = {}
        self._bias_tables = {
            name: np.full(self.num_experts, self._no_bias.ctypes.data, np.int64)
            for name in ("gate", "up", "down")
        }

    def load(self, expert: int, tensors: ExpertTensors) -> None:
        """Check and pack one expert; the arrays may be reused afterwards.

        Raises:
            CheckpointError: a matrix is not what the layer expects.
            IndexError: no such expert, or `allocate` did not name it.
        """
        if not 0 <= expert < self.num_experts or self._slots_of[expert] < 0:
            raise IndexError(f"expert {expert} has no memory in this layer")
        H, I = self.hidden, self.intermediate  # noqa: E741
        check_matrix(tensors.gate, self.fmt, I, H)
        check_matrix(tensors.up, self.fmt, I, H)
        check_matrix(tensors.down, self.fmt, H, I)
        slot = int(self._slots_of[expert])
        for pool, arena in enumerate(self._arenas):
            address = arena.address + slot * self.expert_nbytes(pool)
            first, last = int(self._blocks[pool]), int(self._blocks[pool + 1])
            strips = range(2 * first, 2 * last)
            pack_gate_up(address, strips, self.gate_up_layout, tensors.gate, tensors.up, I)
            down = address + len(strips) * self.gate_up_layout.nbytes
            first, last = int(self._strips[pool]), int(self._strips[pool + 1])
            pack_rows(down, range(first, last), self.down_layout, tensors.down, H)
            self._gate_up[pool, expert] = address
            self._down[pool, expert] = down
        for name in ("gate", "up", "down"):
            bias = getattr(tensors, name).bias
            if bias is not None:
                kept = np.array(bias, np.float32)
                self._biases[name, expert] = kept
                self._bias_tables[name][expert] = kept.ctypes.data
        self._loaded[expert] = True

    @property
    def loaded(self) -> npt.NDArray[np.bool_]:
        """Which experts are packed (bool [E], a copy)."""
        return self._loaded.copy()

    def _describe(self) -> Slots:
        """The compiled code's view of this layer."""
        kernels = kernel_set(self.fmt.name, self.tier)
        slots: Slots = np.zeros(f.LAYER_SLOTS, np.int64)
        self._parameters = np.array(self.activation.parameters, np.float32)
        slots[f.L_EXPERTS] = self.num_experts
        slots[f.L_HIDDEN] = self.hidden
        slots[f.L_INTERMEDIATE] = self.intermediate
        slots[f.L_ENCODE] = kernels.encode
        slots[f.L_ACTIVATE] = kernels.activate
        slots[f.L_COMBINE] = kernels.combine
        slots[f.L_CLEAR] = kernels.clear
        slots[f.L_FINISH] = kernels.finish
        slots[f.L_UNPACK] = kernels.unpack
        slots[f.L_UNPACKED_GROUP_BYTES] = kernels.unpacked_group_bytes
        slots[f.L_DIRECT_LIMIT] = kernels.direct_limit
        slots[f.L_PARAMETERS] = self._parameters.ctypes.data
        slots[f.L_X_ROW_BYTES] = row_bytes(self.fmt.name, self.gate_up_layout.groups)
        slots[f.L_H_ROW_BYTES] = row_bytes(self.fmt.name, self.down_layout.groups)
        slots[f.L_CHUNK_GROUPS] = self._chunk_groups(kernels)
        slots[f.L_GATE_BIAS] = self._bias_tables["gate"].ctypes.data
        slots[f.L_UP_BIAS] = self._bias_tables["up"].ctypes.data
        slots[f.L_DOWN_BIAS] = self._bias_tables["down"].ctypes.data
        slots[f.L_GATE_UP] = self._gate_up.ctypes.data
        slots[f.L_DOWN] = self._down.ctypes.data
        slots[f.L_BLOCKS] = self._blocks.ctypes.data
        slots[f.L_STRIPS] = self._strips.ctypes.data
        for base, layout in (
            (f.L_GU_GROUPS, self.gate_up_layout),
            (f.L_DN_GROUPS, self.down_layout),
        ):
            slots[base : base + 5] = (
                layout.groups,
                layout.code_bytes_per_group,
                layout.scale_bytes_per_group,
                layout.scale_offset,
                layout.nbytes,
            )
        for base, table in ((f.L_DIRECT, kernels.direct), (f.L_TILED, kernels.tiled)):
            pairs = [word for size in sorted(table, reverse=True) for word in (size, table[size])]
            slots[base : base + len(pairs)] = pairs
        return slots

    def _chunk_groups(self, kernels: KernelSet) -> int:
        per_group = (
            kernels.unpacked_group_bytes
            if kernels.unpack
            else self.gate_up_layout.code_bytes_per_group
        )
        return max(1, _CHUNK_BYTES // per_group)

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

        Args:
            x: bf16 bits [T, H]. ids: [T, k]. weights: [T, k].
            skip: bool [E], experts that are computed elsewhere and contribute nothing here.

        Returns:
            A job whose `wait()` gives bf16 bits [T, H].

        Raises:
            ValueError, TypeError: a shape or dtype is wrong.
            RuntimeError: an id names an expert that is neither loaded nor skipped; no expert is
                loaded; the layer is closed; this is a forked child.
        """
        self._check_inputs(x, ids, weights, skip)
        if self._closed:
            raise RuntimeError("this layer is closed")
        if self._group is None:
            self._group = group_for(self.pool)
        if self._descriptor is None or not self._arenas:
            if not self._loaded.any():
                raise RuntimeError("no expert of this layer has been loaded")
            self._descriptor = self._describe()
        out = np.empty((len(x), self.hidden), np.uint16)
        parts = []
        for start in range(0, len(x), MAX_TOKENS_PER_JOB):
            part = slice(start, start + MAX_TOKENS_PER_JOB)
            parts.append(
                self._submit_part(self._group, x[part], ids[part], weights[part], skip, out[part])
            )
        return Job(self._group, parts, out)

    def _check_inputs(self, x: Any, ids: Any, weights: Any, skip: Any) -> None:
        for name, array, dtype in (
            ("x", x, np.uint16),
            ("ids", ids, np.int64),
            ("weights", weights, np.float32),
        ):
            if array.dtype != dtype:
                raise TypeError(f"{name} must be {np.dtype(dtype)}, not {array.dtype}")
            if array.ndim != 2:
                raise ValueError(f"{name} must have two dimensions, not shape {array.shape}")
        if x.shape[1] != self.hidden:
            raise ValueError(f"x has {x.shape[1]} columns, the layer's hidden size is {self.hidden}")
        if ids.shape != weights.shape or len(ids) != len(x):
            raise ValueError(
                f"ids {ids.shape} and weights {weights.shape} must both be "
                f"[{len(x)} tokens, top-k]"
            )
        if skip is not None and (skip.shape != (self.num_experts,) or skip.dtype != np.bool_):
            raise ValueError(f"skip must be bool [{self.num_experts}]")

    def _submit_part(
        self,
        group: PoolGroup,
        x: npt.NDArray[np.uint16],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        skip: npt.NDArray[np.bool_] | None,
        out: npt.NDArray[np.uint16],
    ) -> _Part:
        descriptor = self._descriptor
        assert descriptor is not None
        plan = JobMemory.plan(self, descriptor, *ids.shape)
        workspace = group.borrow(plan.nbytes)
        arrays = (
            workspace.copy(x),
            workspace.copy(ids),
            workspace.copy(weights),
            workspace.copy(skip) if skip is not None else 0,
        )

        def fill(job: Slots) -> None:
            job[f.J_LAYER] = descriptor.ctypes.data
            job[f.J_TOKENS], job[f.J_TOP_K] = ids.shape
            job[f.J_X], job[f.J_IDS], job[f.J_WEIGHTS], job[f.J_SKIP] = arrays
            job[f.J_OUT] = out.ctypes.data
            plan.fill(job, workspace)

        submission = group.submit(fill, owned=(self, descriptor, workspace, out))
        if submission.missing >= 0:
            group.give_back(workspace)
            raise RuntimeError(
                f"a token is routed to expert {submission.missing}, which is not loaded here "
                "and not marked as computed elsewhere"
            )
        return _Part(submission.sequence, submission.ignored, workspace)

    def close(self) -> None:
        """Release the packed weights once no job uses them."""
        self._closed = True
        self._arenas = []
        self._descriptor = None


@dataclass(frozen=True)
class JobMemory:
    """Sizes of what a job borrows; everything grows with the batch and nothing with a maximum."""

    pairs: int
    tokens: int
    experts: int
    x_row: int
    h_row: int
    chunk_bytes: int
    workers: int
    inputs: int

    @classmethod
    def plan(cls, layer: ExpertLayer, descriptor: Slots, tokens: int, top_k: int) -> JobMemory:
        pairs = tokens * top_k
        per_group = max(
            int(descriptor[f.L_UNPACKED_GROUP_BYTES]), layer.gate_up_layout.code_bytes_per_group
        )
        staged = tokens * layer.hidden * 2 + pairs * 12 + layer.num_experts + 4 * 64
        return cls(
            pairs=pairs,
            tokens=tokens,
            experts=layer.num_experts,
            x_row=int(descriptor[f.L_X_ROW_BYTES]),
            h_row=int(descriptor[f.L_H_ROW_BYTES]),
            chunk_bytes=int(descriptor[f.L_CHUNK_GROUPS]) * per_group,
            workers=layer.pool.threads,
            inputs=staged,
        )

    @property
    def sums_bytes(self) -> int:
        """float32 [most tokens of one expert][32]; an expert may get every pair."""
        return 4 * STRIP_ROWS * max(1, self.pairs)

    @property
    def out_bytes(self) -> int:
        """float32 [strips of a task][tokens][32]."""
        return 4 * STRIP_ROWS * max(1, self.tokens) * f.MAX_STRIPS

    @property
    def worker_bytes(self) -> int:
        strips = f.MAX_STRIPS * (self.sums_bytes + self.chunk_bytes)
        return round_up(strips + self.out_bytes, 4096)

    @property
    def nbytes(self) -> int:
        tables = 4 * (3 * self.experts + 3) + self.pairs * (4 + 4 + 8 + 8)
        rows = self.tokens * self.x_row + self.pairs * self.h_row
        total = self.inputs + tables + rows + self.workers * self.worker_bytes
        size = total + 16 * 64
        return 1 << math.ceil(math.log2(size)) if size < 64 << 20 else round_up(size, 16 << 20)

    def fill(self, job: Slots, workspace: Workspace) -> None:
        take = workspace.take
        job[f.J_COUNTS] = take(4 * (self.experts + 1))
        job[f.J_ACTIVE_EXPERT] = take(4 * self.experts)
        job[f.J_ACTIVE_START] = take(4 * (self.experts + 1))
        job[f.J_PAIR_TOKEN] = take(4 * self.pairs)
        job[f.J_PAIR_WEIGHT] = take(4 * self.pairs)
        job[f.J_PAIR_X] = take(8 * self.pairs)
        job[f.J_PAIR_H] = take(8 * self.pairs)
        job[f.J_X_ROWS] = take(self.tokens * self.x_row)
        job[f.J_H_ROWS] = take(self.pairs * self.h_row)
        job[f.J_SCRATCH] = take(self.workers * self.worker_bytes)
        job[f.J_SCRATCH_BYTES] = self.worker_bytes
        job[f.J_SCRATCH_SUMS] = 0
        job[f.J_SUMS_BYTES] = self.sums_bytes
        job[f.J_SCRATCH_UNPACKED] = f.MAX_STRIPS * self.sums_bytes
        job[f.J_SCRATCH_OUT] = f.MAX_STRIPS * (self.sums_bytes + self.chunk_bytes)
        job[f.J_ENCODE_TOKENS] = _ENCODE_TOKENS_PER_TASK
        job[f.J_INLINE_ENCODE] = int(self.tokens <= _INLINE_ENCODE_TOKENS)
        job[f.J_TARGET_TASKS] = _TASKS_PER_WORKER * self.workers


@dataclass(frozen=True)
class _Part:
    sequence: int
    ignored: int
    workspace: Workspace


class Job:
    """A forward pass under way."""

    def __init__(
        self, group: PoolGroup, parts: list[_Part], out: npt.NDArray[np.uint16]
    ) -> None:
        self._group = group
        self._parts = parts
        self._out = out
        self.ignored = sum(part.ignored for part in parts)
        """Ids below 0 or at and above the number of experts."""

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(self._group.is_complete(part.sequence) for part in self._parts)

    def wait(self) -> npt.NDArray[np.uint16]:
        """bf16 bits [T, H]; the array is the caller's own. The calling thread works meanwhile."""
        while self._parts:
            self._group.wait(self._parts[0].sequence)
            self._group.give_back(self._parts.pop(0).workspace)
        return self._out
