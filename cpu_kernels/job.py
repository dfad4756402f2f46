"""One forward pass of a layer: the memory it borrows, and the wait for its result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import tuning
from hybrid_moe.cpu_kernels.drivers import records
from hybrid_moe.cpu_kernels.drivers.records import BATCH_TOKENS
from hybrid_moe.cpu_kernels.jit.records import u8
from hybrid_moe.cpu_kernels.kernels.encode import BLOCK_SLACK
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.group import PoolGroup
from hybrid_moe.formats.strips import MOST_BLOCK_TOKENS, STRIP_ROWS, SUMS_BYTES, round_up

INLINE_ENCODE_TOKENS = 4
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
        most = min(BATCH_TOKENS, self.pairs)
        return {
            "sums_offset": SUMS_BYTES * (BATCH_TOKENS + MOST_BLOCK_TOKENS),
            "x_offset": most * self.x_row + BLOCK_SLACK,
            "unpacked_offset": self.unpacked_bytes,
            "out_offset": SUMS_BYTES * tuning.out_rows(self.strips, self.capacity),
        }

    @property
    def worker_bytes(self) -> int:
        return round_up(sum(round_up(size, 64) for size in self._worker_areas.values()), 4096)

    @property
    def _areas(self) -> dict[str, int]:
        """Field -> bytes of the area whose address it holds."""
        pairs, tokens, experts = self.pairs, self.capacity, self.experts
        return {
            "x": 2 * tokens * self.hidden,
            "ids": 8 * pairs,
            "weights": 4 * pairs,
            "skip": experts,
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
        """Of the whole workspace."""
        return sum(round_up(size, 64) for size in self._areas.values())

    def template(self, workspace: Workspace) -> records.Job:
        """A job over `workspace`; its layer, tokens and out remain to be filled in."""
        job = records.Job.new()
        words = job.words
        for name, size in self._areas.items():
            words[records.Job.word(name)] = workspace.take(size) if size else 0
        job.top_k = self.top_k
        job.pools = self.pools
        job.scratch_bytes = self.worker_bytes
        offset = 0
        for name, size in self._worker_areas.items():
            words[records.Job.word(name)] = offset
            offset += round_up(size, 64)
        job.inline_encode = int(self.capacity <= INLINE_ENCODE_TOKENS)
        return job


class StagedJob:
    """A job with memory of its own: inputs are copied into it, and it may be used again."""

    def __init__(self, shape: JobShape) -> None:
        self.shape = shape
        self._workspace = Workspace(shape.nbytes)
        self.template = shape.template(self._workspace)
        tokens, k = shape.capacity, shape.top_k
        view = self._workspace.view
        self._x = view(self.template.x, (tokens, shape.hidden), np.uint16)
        self._ids = view(self.template.ids.address, (tokens, k), np.int64)
        self._weights = view(self.template.weights.address, (tokens, k), np.float32)
        self._skip_at = self.template.skip
        self._skip = view(self._skip_at.address, (shape.experts,), np.bool_)

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
        self.template.tokens = tokens
        self.template.skip = u8.at(0) if skip is None else self._skip_at

    def address(self, layer: records.Layer, out: int) -> int:
        """Address of the job, for a layer and an output bf16 [T, H]."""
        self.template.layer = layer
        self.template.out.value = out
        return self.template.address


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
