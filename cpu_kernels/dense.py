"""Linear layers on the CPU: matrices that all tokens meet, and their forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.descriptor import describe_dense
from hybrid_moe.cpu_kernels.drivers import check_machine, records
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.job import IDLE, Job, JobShape, Output, ReadyLayer, capacity_for
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.cpu_kernels.tuning import MAX_TOKENS_PER_JOB
from hybrid_moe.locks import ProcessLock


class DenseLayer:
    """Linear layers of one input, computed as one job: y_i = x W_i^T + b_i.

    Several layers may have a matrix in common, which is neither copied nor moved. Each token's
    outputs have the same bits in every such layer and in every batch.

    Attributes:
        inputs: K.
        rows: N_i of each matrix.
        out_offsets: of each matrix, the rows of those before it.
    """

    def __init__(
        self,
        matrices: Sequence[PackedMatrix],
        *,
        isa: str | Tier | None = None,
        name: str = "linear",
    ) -> None:
        """Describe the layer; no thread starts. The matrices may be loaded later.

        Args:
            matrices: of the same K, format and pools.
            isa: a tier's name, to use instead of the best one.
            name: of its jobs in a trace.

        Raises:
            ValueError: the matrices differ, or there is none; an unusable tier.
            NotImplementedError: neither x86-64 nor aarch64.
        """
        check_machine()
        if not matrices:
            raise ValueError("a dense layer needs a matrix")
        if len({(m.inputs, m.fmt.name, m.pool) for m in matrices}) > 1:
            raise ValueError("matrices of one dense layer have the same inputs, format and pools")
        self.matrices = tuple(matrices)
        self.fmt, self.inputs, self.pool = matrices[0].fmt, matrices[0].inputs, matrices[0].pool
        self.rows = tuple(m.rows for m in matrices)
        self.out_offsets = tuple(accumulate(self.rows, initial=0))[:-1]
        self.name = name
        self.tier = isa if isinstance(isa, Tier) else choose_tier(isa)
        self._lock = ProcessLock()
        self._state: ReadyLayer | None = None
        self._closed = False
        self._shapes: dict[int, JobShape] = {}  # by capacity

    def forward(self, x: npt.NDArray[np.uint16]) -> list[npt.NDArray[np.uint16]]:
        """A forward pass on arrays.

        Args:
            x: bf16 bits [T, K].

        Returns:
            Of each matrix bf16 bits [T, N_i].

        Raises:
            ValueError, TypeError: a shape or dtype is wrong. RuntimeError, OSError: see `start`.
        """
        if x.dtype != np.uint16:
            raise TypeError(f"x must be uint16, not {x.dtype}")
        if x.ndim != 2 or x.shape[1] != self.inputs:
            raise ValueError(f"x has shape {x.shape}, expected [tokens, {self.inputs}]")
        x, T = np.ascontiguousarray(x), len(x)
        out = np.empty(T * sum(self.rows), np.uint16)
        self.start(T, x.ctypes.data, out.ctypes.data, out, x).wait()
        places = zip(self.out_offsets, self.rows, strict=True)
        return [out[T * at : T * (at + n)].reshape(T, n) for at, n in places]

    def start(
        self, tokens: int, x: int, out: int, output: Output, inputs: object = None
    ) -> Job[Output]:
        """Start a forward pass.

        More than MAX_TOKENS_PER_JOB tokens run one part after another in the same memory, so this
        returns when all parts but the last are complete; the calling thread works on them.

        Args:
            tokens: T.
            x: address of bf16 [T][K], which are read until the job is over; of up to 4 tokens, only
                until this returns.
            out: address of bf16 [T * sum of N_i]: the output of matrix i, [T][N_i], begins
                T * out_offsets[i] elements behind.
            output: holds the memory at `out`, for as long as the job needs it; the job's `wait()`
                returns it.
            inputs: likewise of `x`.

        Raises:
            RuntimeError: a matrix has not been loaded or is closed; the layer is closed; this is a
                forked child.
            OSError: the system allows fewer threads than the pool has.
        """
        ready = self._state or self._ready()
        if not tokens:
            return Job(None, output, 0)
        group, most = ready.group, min(tokens, MAX_TOKENS_PER_JOB)
        memory = IDLE.borrow(self._job_shape(ready, most))
        owned = (ready, memory, output, inputs)
        sequence = 0
        for first in range(0, tokens, most):
            if sequence:
                group.wait(sequence)
            part = min(most, tokens - first)
            at = x + 2 * self.inputs * first
            memory.fill_dense(ready.address, part, at, out, tokens, first)
            sequence = group.submit(memory.address, owned)
        return Job((group, sequence, memory), output, tokens)

    def _job_shape(self, ready: ReadyLayer, tokens: int) -> JobShape:
        capacity = capacity_for(tokens)
        shape = self._shapes.get(capacity)
        if shape is None:
            shape = self._shapes[capacity] = JobShape(
                capacity,
                top_k=0,
                experts=0,
                hidden=self.inputs,
                x_row=ready.descriptor.gate_up.row_bytes,
                h_row=0,
                unpacked_bytes=format_kernels(self.fmt).unpacked_bytes,
                workers=self.pool.threads,
                pools=self.pool.pools,
            )
        return shape

    def _ready(self) -> ReadyLayer:
        """The threads and the descriptor; the first pass starts and builds them."""
        with self._lock:
            if self._closed:
                raise RuntimeError("this layer is closed")
            if self._state is None:
                ranges = [matrix.ranges for matrix in self.matrices]
                shares, workers = self._shares(), np.array(self.pool.threads_per_pool, np.int64)
                descriptor = describe_dense(
                    kernel_set(self.fmt.name, self.tier),
                    len(self.matrices),
                    self.matrices[0].layout,
                    {"shares": shares, "workers": workers},
                )
                descriptor.label = trace.label(self.name)
                kept = (shares, workers, ranges, [m.bias for m in self.matrices])
                group = group_for(self.pool)
                self._state = ReadyLayer(group, descriptor, descriptor.address, kept)
            return self._state

    def _shares(self) -> npt.NDArray[Any]:
        """`records.MatrixShare` [pools, matrices + 1]."""
        shape = (self.pool.pools, len(self.matrices) + 1)
        shares: npt.NDArray[Any] = np.zeros(shape, records.MatrixShare.dtype)
        for index, matrix in enumerate(self.matrices):
            for pool, held in enumerate(matrix.ranges):
                share = shares[pool, index]
                share["strips"], share["first"] = held.address, held.first
                share["rows"], share["column"] = matrix.rows, self.out_offsets[index]
                share["bias"] = matrix.bias.ctypes.data
                shares[pool, index + 1]["units"] = share["units"] + len(held.strips)
        return shares

    def close(self) -> None:
        """Let go of the matrices: at once, or when jobs under way are over. The layer cannot be
        used afterwards."""
        with self._lock:
            state, self._state, self._closed = self._state, None, True
        if state is not None:
            state.group.release_completed()
