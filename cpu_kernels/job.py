"""One forward pass of a layer: the memory it borrows, and the wait for its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.kernels.encode import BLOCK_SLACK
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, Slots
from hybrid_moe.formats.strips import MOST_BLOCK_TOKENS, STRIP_ROWS, round_up

_TASKS_PER_WORKER = 12  # of a phase, at least: the last one out waits for less than a task
INLINE_ENCODE_TOKENS = 4
_ENCODE_TOKENS_PER_TASK = 16
_EXACT_CAPACITY = 8


def capacity_for(tokens: int) -> int:
    """Tokens to size a job for: exact when small, else a power of two, so that jobs of similar
    batches share memory that is already mapped."""
    return tokens if tokens <= _EXACT_CAPACITY else 1 << (tokens - 1).bit_length()


def check_inputs(x: Any, ids: Any, weights: Any, skip: Any, hidden: int, experts: int) -> None:
    """Raise unless these are the arrays of a pass, see `ExpertLayer.submit`.

    Raises:
        TypeError: a dtype. ValueError: a shape.
    """
    for name, array, dtype in (
        ("x", x, np.uint16),
        ("ids", ids, np.int64),
        ("weights", weights, np.float32),
    ):
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {np.dtype(dtype)}, not {array.dtype}")
        if array.ndim != 2:
            raise ValueError(f"{name} must have two dimensions, not shape {array.shape}")
    if x.shape[1] != hidden:
        raise ValueError(f"x has {x.shape[1]} columns, the layer's hidden size is {hidden}")
    if ids.shape != weights.shape or len(ids) != len(x):
        raise ValueError(
            f"ids {ids.shape} and weights {weights.shape} must both be [{len(x)} tokens, top-k]"
        )
    if skip is not None and (skip.shape != (experts,) or skip.dtype != np.bool_):
        raise ValueError(f"skip must be bool [{experts}]")


@dataclass(frozen=True)
class JobShape:
    """Sizes of what a job borrows; all grows with the batch and nothing with a maximum.

    Attributes:
        capacity: most tokens. top_k: ids of a token. experts: E. hidden: H.
        x_row, h_row: bytes of an encoded row of inputs and of intermediates.
        unpacked_bytes: groups of a strip that are unpacked at a time.
        workers, pools: of the group that runs it.
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

    @property
    def pairs(self) -> int:
        return self.capacity * self.top_k

    @property
    def _worker_areas(self) -> dict[int, int]:
        """Slot -> bytes of each part of a worker's scratch, whose offset it holds.

        Sums are those of a batch of one expert's tokens, or of fewer tokens and several strips; a
        matrix unit writes, and reads, whole blocks. An expert may get every pair."""
        most = min(f.BATCH_TOKENS, self.pairs)
        return {
            f.J_SCRATCH_SUMS: 4 * STRIP_ROWS * (f.BATCH_TOKENS + MOST_BLOCK_TOKENS),
            f.J_SCRATCH_X: most * self.x_row + BLOCK_SLACK,
            f.J_SCRATCH_UNPACKED: self.unpacked_bytes,
            f.J_SCRATCH_OUT: f.MAX_STRIPS * 4 * STRIP_ROWS * max(1, self.capacity),
        }

    @property
    def worker_bytes(self) -> int:
        return round_up(sum(round_up(size, 64) for size in self._worker_areas.values()), 4096)

    @property
    def _areas(self) -> dict[int, int]:
        """Slot -> bytes of the area whose address it holds."""
        pairs, tokens, experts = self.pairs, self.capacity, self.experts
        return {
            f.J_X: 2 * tokens * self.hidden,
            f.J_IDS: 8 * pairs,
            f.J_WEIGHTS: 4 * pairs,
            f.J_SKIP: experts,
            f.J_COUNTS: 4 * (experts + 1),
            f.J_ACTIVE_EXPERT: 4 * experts,
            f.J_ACTIVE_START: 4 * (experts + 1),
            f.J_PAIR_TOKEN: 4 * pairs,
            f.J_PAIR_WEIGHT: 4 * pairs,
            f.J_PAIR_X: 8 * pairs,
            f.J_X_ROWS: tokens * self.x_row + BLOCK_SLACK,
            f.J_H_ROWS: pairs * self.h_row + BLOCK_SLACK,
            f.J_SCRATCH: self.workers * self.worker_bytes,
        }

    @property
    def nbytes(self) -> int:
        """Of the whole workspace."""
        return sum(round_up(size, 64) for size in self._areas.values())

    def template(self, workspace: Workspace) -> Slots:
        """A job's slots over `workspace`; J_LAYER, J_TOKENS and J_OUT remain to be filled in."""
        job: Slots = np.zeros(f.JOB_SLOTS, np.int64)
        for slot, size in self._areas.items():
            job[slot] = workspace.take(size)
        job[f.J_TOP_K] = self.top_k
        job[f.J_POOLS] = self.pools
        job[f.J_SCRATCH_BYTES] = self.worker_bytes
        offset = 0
        for slot, size in self._worker_areas.items():
            job[slot] = offset
            offset += round_up(size, 64)
        job[f.J_ENCODE_TOKENS] = _ENCODE_TOKENS_PER_TASK
        job[f.J_INLINE_ENCODE] = int(self.capacity <= INLINE_ENCODE_TOKENS)
        job[f.J_TARGET_TASKS] = _TASKS_PER_WORKER * -(-self.workers // self.pools)
        return job


class StagedJob:
    """A job with memory of its own: inputs are copied into it, and it may be used again."""

    def __init__(self, shape: JobShape) -> None:
        self.shape = shape
        self._workspace = Workspace(shape.nbytes)
        self.template = shape.template(self._workspace)
        self._address = int(self.template.ctypes.data)
        tokens, k = shape.capacity, shape.top_k
        view = self._workspace.view
        self._x = view(self.template[f.J_X], (tokens, shape.hidden), np.uint16)
        self._ids = view(self.template[f.J_IDS], (tokens, k), np.int64)
        self._weights = view(self.template[f.J_WEIGHTS], (tokens, k), np.float32)
        self._skip = view(self.template[f.J_SKIP], (shape.experts,), np.bool_)
        self._skip_address = int(self.template[f.J_SKIP])

    @property
    def nbytes(self) -> int:
        return self._workspace.nbytes

    def stage(
        self,
        x: npt.NDArray[np.uint16],
        ids: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float32],
        skip: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Copy the inputs of a pass: [T, H], [T, k], [T, k], [E]."""
        tokens = len(x)
        self._x[:tokens] = x
        self._ids[:tokens] = ids
        self._weights[:tokens] = weights
        if skip is not None:
            self._skip[:] = skip
        self.template[f.J_TOKENS] = tokens
        self.template[f.J_SKIP] = 0 if skip is None else self._skip_address

    def address(self, descriptor: int, out: int) -> int:
        """Address of the slots, for a layer and an output bf16 [T, H]."""
        self.template[f.J_LAYER] = descriptor
        self.template[f.J_OUT] = out
        return self._address


class Job:
    """A forward pass under way.

    Args:
        group: its workers.
        running: the last published job and its number; None if there was nothing to do.
        out: bf16 bits [T, H], what it writes.
        ignored: ids below 0 or at and above the number of experts.
    """

    def __init__(
        self,
        group: PoolGroup,
        running: tuple[StagedJob, int] | None,
        out: npt.NDArray[np.uint16],
        ignored: int,
    ) -> None:
        self._group = group
        self._running = running
        self._out = out
        self.ignored = ignored

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._running is None or self._group.is_complete(self._running[1])

    def wait(self) -> npt.NDArray[np.uint16]:
        """bf16 bits [T, H]; the array is the caller's own. The calling thread works meanwhile."""
        if self._running is not None:
            self._group.wait(self._running[1])
            job, self._running = self._running[0], None
            self._group.idle.give_back(job)
        return self._out
