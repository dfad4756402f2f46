"""One forward pass of a layer: what it borrows, how it is handed over, how it is waited for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.panels import STRIP_ROWS, round_up
from hybrid_moe.cpu_kernels.pool.group import PoolGroup, Slots, Workspace

if TYPE_CHECKING:
    from hybrid_moe.cpu_kernels.layer import ExpertLayer

_TASKS_PER_WORKER = 12
_INLINE_ENCODE_TOKENS = 4
_ENCODE_TOKENS_PER_TASK = 16


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
class Part:
    """One published job of a pass."""

    sequence: int
    ignored: int
    workspace: Workspace


class Job:
    """A forward pass under way."""

    def __init__(
        self, group: PoolGroup, parts: list[Part], out: npt.NDArray[np.uint16]
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
