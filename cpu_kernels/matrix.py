"""A matrix of a dense layer in memory: packed on load, unpacked again for export and look-ups."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.strips.pack import pack_rows
from hybrid_moe.cpu_kernels.strips.unpack import RunAll, unpack_rows, unpack_some
from hybrid_moe.formats.shares import even_shares
from hybrid_moe.formats.strips import STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.tensors import Matrix, check_matrix
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.locks import ProcessLock

_allocation = ProcessLock()
"""Who takes memory for a matrix: threads may begin to load one at the same time."""


@dataclass(frozen=True)
class StripRange:
    """Some consecutive strips of a matrix in one pool's memory.

    Attributes:
        first: number of the first one.
        address: of that.
        strips: uint8 [strips, bytes of a strip]; keeps the memory alive.
    """

    first: int
    address: int
    strips: npt.NDArray[np.uint8]


class PackedMatrix:
    """A matrix [N, K] of a format in strips of 64 rows, which are cut over the pools. Strips of
    rows past the last are zero."""

    def __init__(
        self, fmt: WeightFormat, rows: int, inputs: int, pool: PoolConfig, *, bias: bool = False
    ) -> None:
        """Describe it; nothing is allocated.

        Args:
            fmt: how weights are held.
            rows: N, outputs. inputs: K, a multiple of 32.
            pool: each of its pools holds a share of the rows.
            bias: there is one for each row.

        Raises:
            ValueError: a size is not positive, or K no multiple of 32.
        """
        if rows < 1:
            raise ValueError(f"a matrix of {rows} rows: there must be at least one")
        self.fmt, self.rows, self.inputs, self.pool = fmt, rows, inputs, pool
        self.layout = strip_layout(fmt, inputs)
        self._bounds = even_shares(-(-rows // STRIP_ROWS), pool.threads_per_pool)
        self.bias = np.zeros(round_up(rows, STRIP_ROWS), np.float32)
        """Zero where there is none, and past the last row."""
        self.has_bias = bias
        self._ranges: tuple[StripRange, ...] = ()
        self._filled = np.zeros(self._bounds[-1], np.bool_)
        self._closed = False
        self._pid = os.getpid()

    def share_nbytes(self, pool: int) -> int:
        """Bytes of the strips in one pool."""
        return int(self._bounds[pool + 1] - self._bounds[pool]) * self.layout.nbytes

    @property
    def nbytes(self) -> int:
        """Bytes of all strips, allocated or not."""
        return int(self._bounds[-1]) * self.layout.nbytes

    @property
    def loaded(self) -> bool:
        """Whether every row has been loaded."""
        return bool(self._ranges) and bool(self._filled.all())

    def allocate(self, memory: Sequence[Workspace] | None = None) -> None:
        """Take memory for the strips. May be called once.

        Args:
            memory: of each pool a workspace with `share_nbytes` left, which several matrices may
                share; by default each pool gets one of its own.

        Raises:
            RuntimeError: called twice or closed. MemoryError: the system refuses.
        """
        self._check_usable()
        with _allocation:
            if self._ranges:
                raise RuntimeError("already allocated")
            self._allocate(memory)

    def _allocate(self, memory: Sequence[Workspace] | None = None) -> None:
        sizes = [self.share_nbytes(p) for p in range(self.pool.pools)]
        if memory is None:
            nodes = self.pool.memory_nodes
            memory = [Workspace(n, of) for n, of in zip(sizes, nodes, strict=True)]
        ranges = []
        for first, nbytes, workspace in zip(self._bounds[:-1], sizes, memory, strict=True):
            at = workspace.take(nbytes)
            view = workspace.view(at, (nbytes,), np.uint8).reshape(-1, self.layout.nbytes)
            ranges.append(StripRange(int(first), at, view))
        self._pid = os.getpid()
        self._ranges = tuple(ranges)

    @property
    def ranges(self) -> tuple[StripRange, ...]:
        """Its strips in each pool.

        Raises:
            RuntimeError: rows have not been loaded; closed; this is a forked child.
        """
        self._check_usable()
        if not self.loaded:
            raise RuntimeError("this matrix has not been loaded")
        return self._ranges

    def load(self, matrix: Matrix, first_row: int = 0) -> None:
        """Check and pack rows; the arrays may be reused afterwards. Different rows may be loaded by
        several threads at once. Nobody may compute with the rows meanwhile.

        Args:
            matrix: all rows, or some that follow each other.
            first_row: number of the first one, a multiple of 64; all but the last part of a matrix
                have a multiple of 64 rows.

        Raises:
            CheckpointError: a shape or dtype is not as described.
            ValueError: rows that are not those of strips; a bias, or none, against the description.
            RuntimeError: closed, or this is a forked child.
        """
        self._check_usable()
        count = len(matrix.codes)
        last = first_row + count
        if first_row % STRIP_ROWS or last > self.rows or (count % STRIP_ROWS and last < self.rows):
            raise ValueError(
                f"{matrix.where}: rows {first_row} to {last} of {self.rows}: parts begin and end "
                f"at multiples of {STRIP_ROWS} rows, or at the last one"
            )
        check_matrix(matrix, self.fmt, count, self.inputs)
        if (matrix.bias is not None) != self.has_bias:
            state = "has a bias" if matrix.bias is not None else "has no bias"
            raise ValueError(f"{matrix.where} {state}, which the layer does not expect")
        with _allocation:
            if not self._ranges:
                self._allocate()
        begin, end = first_row // STRIP_ROWS, -(-last // STRIP_ROWS)
        for held in self._ranges:
            low, high = max(begin, held.first), min(end, held.first + len(held.strips))
            if low < high:
                to = held.address + (low - held.first) * self.layout.nbytes
                pack_rows(to, range(low - begin, high - begin), self.layout, matrix, count)
        if matrix.bias is not None:
            self.bias[first_row:last] = matrix.bias
        self._filled[begin:end] = True

    def unpack(self, run_all: RunAll = map) -> Matrix:
        """A copy of the matrix, bit for bit as `load` was given it, with its bias. Thread-safe.

        Args:
            run_all: runs the copies; an executor's `map` runs them on its threads.

        Raises:
            RuntimeError: see `ranges`.
        """
        parts = [held.strips for held in self.ranges]
        strips = parts[0] if len(parts) == 1 else np.concatenate(parts)
        matrix = unpack_rows(strips, self.layout, self.fmt, self.rows, run_all)
        return replace(matrix, bias=self.bias[: self.rows].copy() if self.has_bias else None)

    def take_rows(self, ids: npt.NDArray[np.int64]) -> Matrix:
        """Copies of some rows, without bias: what an embedding looks up. Thread-safe.

        Args:
            ids: int64 [n], 0 to N - 1, in any order, also repeatedly.

        Raises:
            IndexError: there is no such row. RuntimeError: see `ranges`.
        """
        if ids.size and not 0 <= ids.min() <= ids.max() < self.rows:
            raise IndexError(f"rows {ids.min()} to {ids.max()} of a matrix of {self.rows} rows")
        codes = np.empty(self.fmt.code_shape(len(ids), self.inputs), self.fmt.code_dtype)
        scale_shape = self.fmt.scale_shape(len(ids), self.inputs)
        scale = self.fmt.scale
        scales = None if scale is None else np.empty(scale_shape or (), scale.dtype)
        for held, here in self._split(ids):
            rows = ids[here] - STRIP_ROWS * held.first
            part = unpack_some(held.strips, self.layout, self.fmt, rows)
            codes[here] = part.codes
            if scales is not None:
                scales[here] = part.scales
        return Matrix(codes, scales)

    def _split(
        self, ids: npt.NDArray[np.int64]
    ) -> Iterator[tuple[StripRange, npt.NDArray[np.bool_]]]:
        """Of each pool, its strips and which of the rows `ids` are in them."""
        strip = ids // STRIP_ROWS
        for held in self.ranges:
            yield held, (strip >= held.first) & (strip < held.first + len(held.strips))

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("this matrix is closed")
        if os.getpid() != self._pid:
            raise RuntimeError(
                "packed weights are not inherited by a forked child process; "
                "load the model after the fork, or use the 'spawn' start method"
            )

    def close(self) -> None:
        """Let go of the weights: they are freed when no layer that has them is left."""
        self._closed = True
        self._ranges = ()
