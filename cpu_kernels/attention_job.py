"""Attention of a few query tokens over cached keys and values, as a job of the pool.

What a decode step does: each key head's keys and values are read once, for all query heads of its
group. `kernels.attention_kernels` states the arithmetic, `drivers.attention_tasks` the tasks.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hybrid_moe.cpu_kernels import trace
from hybrid_moe.cpu_kernels.drivers import check_machine, records
from hybrid_moe.cpu_kernels.drivers.records import ATTENTION_SPLIT
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, choose_tier
from hybrid_moe.cpu_kernels.kernels.attention_kernels import (
    ATTEND_ARITY,
    DIMS,
    MERGE_ARITY,
    attend,
    merge,
    partial_bytes,
    scratch_bytes,
)
from hybrid_moe.cpu_kernels.kernels.library import compile_kernels
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.group import group_for
from hybrid_moe.formats.strips import round_up


class AttentionCall(NamedTuple):
    """Where the states of a call are. Whoever makes one has checked them: they are bf16, and the
    dimensions of a head adjoin. Strides are bytes.

    Attributes:
        sequences, key_heads: B and H.
        queries: Q, the last tokens of the keys; token i sees no key behind its own.
        rows: G * Q, with G query heads to a key head.
        keys: T, of each sequence.
        splits: see `split_count`.
        window: keys that a token sees at most, its own among them; 0: all.
        first: address of int64 [B], the first key of each sequence that is no padding; or 0.
        scale: address of a float32, by which scores are multiplied.
        sinks: address of [H * G] scores that take part in the softmax and have no value.
        sink_bytes: of each of them, 2 for bf16 and 4 for float32; 0: there are none.
        query_states: bf16 [B][H * G][Q][key_dim], contiguous.
        key_states: address of key 0 of head 0 of sequence 0, and the strides to the next sequence,
            head and key. value_states: likewise.
        out: bf16 [B][Q][H * G][value_dim], contiguous.
    """

    sequences: int
    key_heads: int
    queries: int
    rows: int
    keys: int
    splits: int
    window: int
    first: int
    scale: int
    sinks: int
    sink_bytes: int
    query_states: int
    key_states: int
    key_sequence_bytes: int
    key_head_bytes: int
    key_bytes: int
    value_states: int
    value_sequence_bytes: int
    value_head_bytes: int
    value_bytes: int
    out: int


def split_count(keys: int, queries: int, window: int) -> int:
    """Splits of a sequence of T keys that begins with the first of them."""
    seen = keys if not window else min(keys, window + queries - 1)
    return max(1, -(-seen // ATTENTION_SPLIT))


@functools.lru_cache(maxsize=64)
def _kernels(tier: Tier) -> tuple[int, int]:
    """Addresses of `attend` and `merge`."""
    functions = [("attend", ATTEND_ARITY, attend(tier)), ("merge", MERGE_ARITY, merge)]
    at = compile_kernels(functions, tier, f"attention_{tier.name}")
    return at["attend"], at["merge"]


_write_call = records.Attention.writer(*AttentionCall._fields)


class _Memory:
    """What a call works in: up to so many partials and rows."""

    def __init__(self, attention: CachedAttention, partials: int, rows: int) -> None:
        self.partials, self.rows = partials, rows
        pool, visible = attention.pool, round_up(8 * rows, 64)
        worker = round_up(visible + scratch_bytes(rows, attention.key_dim), 4096)
        partial = partial_bytes(attention.value_dim)
        self._workspace = workspace = Workspace(partials * partial + pool.threads * worker)
        self._layer = records.Layer.new()  # whose kernels no task calls
        self._layer.label = trace.label("attention")
        self.descriptor = descriptor = records.Attention.new()
        self.words = descriptor.words
        descriptor.attend, descriptor.merge = _kernels(attention.tier)
        descriptor.words[records.Attention.word("workers")] = attention.workers.ctypes.data
        descriptor.key_dim, descriptor.value_dim = attention.key_dim, attention.value_dim
        descriptor.partial_bytes, descriptor.visible_bytes = partial, visible
        descriptor.partials = workspace.take(partials * partial)
        self._job = job = records.Job.new()
        job.layer, job.attention, job.pools = self._layer, descriptor, pool.pools
        job.scratch_bytes, job.scratch = worker, workspace.take(pool.threads * worker)
        self.job_address = job.address


class CachedAttention:
    """Attention with heads of given dimensions on the threads of a pool.

    Attributes:
        key_dim, value_dim: of a head.
        pool: worker threads.
    """

    _MOST_IDLE = 4

    def __init__(
        self, key_dim: int, value_dim: int, pool: PoolConfig, *, isa: str | Tier | None = None
    ) -> None:
        """Compile the kernels, or fetch them from the cache, and start the threads.

        Args:
            key_dim, value_dim: multiples of 16.
            isa: a tier's name, to use instead of the best one.

        Raises:
            ValueError: a dimension is not a positive multiple of 16; an unusable tier.
            NotImplementedError: neither x86-64 nor aarch64.
            OSError: the system allows fewer threads than the pool has.
        """
        check_machine()
        for name, dim in (("key_dim", key_dim), ("value_dim", value_dim)):
            if dim <= 0 or dim % DIMS:
                raise ValueError(f"{name} must be a positive multiple of {DIMS}, not {dim}")
        self.key_dim, self.value_dim, self.pool = key_dim, value_dim, pool
        self.tier = isa if isinstance(isa, Tier) else choose_tier(isa)
        self.workers = np.array(pool.threads_per_pool, np.int64)
        self._group = group_for(pool)
        self._idle: list[_Memory] = []

    def run(self, call: AttentionCall, owned: object) -> None:
        """Compute `call.out`; the calling thread works on it.

        Args:
            owned: holds the memory of the call. It is kept alive until the job is over, even where
                an exception (Ctrl-C) ends the wait.

        Raises:
            RuntimeError: this is a forked child, or the threads have been stopped.
        """
        if not call.sequences * call.key_heads * call.rows:
            return  # a job without tasks would never be complete
        memory = self._borrow(call.sequences * call.key_heads * call.splits * call.rows, call.rows)
        _write_call(memory.words, *call)
        group = self._group
        group.wait(group.submit(memory.job_address, (memory, owned)))
        if len(self._idle) < self._MOST_IDLE:
            self._idle.append(memory)

    def _borrow(self, partials: int, rows: int) -> _Memory:
        """Idle memory that is large enough, or new one. `list.pop` is a single step, so threads
        need no lock; memory that is too small is dropped."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = None
        if memory is None or memory.partials < partials or memory.rows < rows:
            memory = _Memory(self, 1 << (partials - 1).bit_length(), rows)
        return memory

    def forward(
        self,
        q: npt.NDArray[np.uint16],
        keys: npt.NDArray[np.uint16],
        values: npt.NDArray[np.uint16],
        *,
        scale: float,
        window: int = 0,
        first: npt.NDArray[np.int64] | None = None,
        sinks: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.uint16]:
        """`run` on arrays.

        Args:
            q: bf16 bits [B, H * G, Q, key_dim].
            keys, values: bf16 bits [B, H, T, key_dim or value_dim]; may be views.
            scale, window, first, sinks: see `AttentionCall`.

        Returns:
            bf16 bits [B, Q, H * G, value_dim].

        Raises:
            ValueError, TypeError: a shape or dtype is wrong.
        """
        states = (("q", q, self.key_dim), ("keys", keys, self.key_dim))
        for name, array, dim in (*states, ("values", values, self.value_dim)):
            if array.dtype != np.uint16:
                raise TypeError(f"{name} must be uint16, not {array.dtype}")
            if array.ndim != 4 or array.shape[-1] != dim:
                raise ValueError(f"{name} has shape {array.shape}, not [B, heads, tokens, {dim}]")
        (B, query_heads, Q, _), (_, H, T, _) = q.shape, keys.shape
        if keys.shape[:3] != values.shape[:3] or keys.shape[0] != B or query_heads % H or Q > T:
            raise ValueError(f"q {q.shape}, keys {keys.shape} and values {values.shape} differ")
        q = np.ascontiguousarray(q)
        keys, values = (a if a.strides[-1] == 2 else a.copy() for a in (keys, values))
        out = np.empty((B, Q, query_heads, self.value_dim), np.uint16)
        factor = np.array([scale], np.float32)
        sunk = np.ascontiguousarray(np.zeros(query_heads) if sinks is None else sinks, np.float32)
        first = None if first is None else np.ascontiguousarray(first, np.int64)
        if sunk.shape != (query_heads,) or (first is not None and first.shape != (B,)):
            raise ValueError("sinks must be [query heads], and first [sequences]")
        (k_sequence, k_head, k_key, _), (v_sequence, v_head, v_key, _) = (
            keys.strides,
            values.strides,
        )
        call = AttentionCall(
            B, H, Q, query_heads // H * Q, T, split_count(T, Q, window), window,
            0 if first is None else first.ctypes.data, factor.ctypes.data, sunk.ctypes.data,
            0 if sinks is None else 4,
            q.ctypes.data, keys.ctypes.data, k_sequence, k_head, k_key,
            values.ctypes.data, v_sequence, v_head, v_key, out.ctypes.data,
        )  # fmt: skip
        owned: Any = (q, keys, values, factor, sunk, first, out)
        self.run(call, owned)
        return out
