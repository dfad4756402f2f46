"""Attention over cached keys and values: against float64 on every tier, bits, what is not read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from hybrid_moe.cpu_kernels.attention_job import CachedAttention
from hybrid_moe.cpu_kernels.drivers.records import ATTENTION_SPLIT
from hybrid_moe.cpu_kernels.dsl.emit import I32, Emit, Val
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.kernels.attention_kernels import transpose
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores
from tests.cpu_kernels.attention_problem import Problem
from tests.cpu_kernels.cases import from_bf16, to_bf16
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.toolbox import aligned, compile_kernel

Array = npt.NDArray[Any]
POOL = PoolConfig(min(2, usable_cores()))
NAN = np.uint16(0x7FC0)
POOLS = [
    PoolConfig(threads, pools, (min(numa_nodes()),) * pools)
    for threads, pools in ((1, 1), (2, 2), (3, 2))
    if threads <= usable_cores()
]
TierNames = pytest.mark.parametrize("name", TIERS)


PROBLEMS = (
    Problem(1, 2, 8, 1, 700, 64, 64, sinks=True),
    Problem(2, 1, 8, 1, 400, 64, 64, window=128, padded=True, sinks=True),
    Problem(1, 2, 3, 5, 300, 96, 80, window=100),
    Problem(3, 1, 5, 2, 257, 16, 48, padded=True),
    Problem(1, 1, 1, 1, 1, 128, 128),
    Problem(1, 1, 4, 16, 16, 256, 256, sinks=True),
    Problem(1, 1, 15, 1, 530, 80, 96),
    Problem(1, 1, 1, 3, 33, 192, 128),
)
"""Published shapes (gpt-oss, MLA, 80 and 96), every number of rows below a register tile, blocks of
16 dimensions at the end, one split and several, T on either side of a block and a split."""


@dataclass(frozen=True)
class Inputs:
    """Random states of a problem as bf16 bits; keys and values lie in memory with more room."""

    q: Array
    keys: Array
    values: Array
    first: npt.NDArray[np.int64] | None
    sinks: npt.NDArray[np.float32] | None
    problem: Problem

    def run(self, tier: Tier | None = None, pool: PoolConfig | None = None) -> Array:
        p = self.problem
        attention = CachedAttention(p.key_dim, p.value_dim, pool or POOL, isa=tier)
        return attention.forward(
            self.q, self.keys, self.values, scale=p.key_dim**-0.5, window=p.window,
            first=self.first, sinks=self.sinks,
        )  # fmt: skip


def inputs(p: Problem, seed: int = 0, room: int = 7) -> Inputs:
    """NaN lies wherever no key is visible: behind the last, and in padding."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, p.T, p.B) if p.padded else None
    states = []
    for dim in (p.key_dim, p.value_dim):
        memory = np.full((p.B, p.H, p.T + room, dim), NAN, np.uint16)
        memory[:, :, : p.T] = to_bf16(rng.standard_normal((p.B, p.H, p.T, dim)))
        for sequence, begin in enumerate(() if first is None else first):
            memory[sequence, :, :begin] = NAN
        states.append(memory[:, :, : p.T])
    q = to_bf16(2 * rng.standard_normal((p.B, p.H * p.G, p.Q, p.key_dim)))
    sinks = rng.standard_normal(p.H * p.G).astype(np.float32) if p.sinks else None
    return Inputs(q, states[0], states[1], first, sinks, p)


def evaluate(x: Inputs) -> tuple[Array, Array]:
    """(output in float64, bound on the error of each element), [B, Q, query heads, value_dim].

    A weight p is off by a factor of 1 + e, with
        e = 2^-8                    its rounding to bf16,
          + (K + 4) 2^-24 S         K roundings of a score whose terms sum to S in magnitude, and
                                    those of the scale, of the difference to the maximum,
          + 2^-21                   exp, within 3 ulp, and the range of its argument.
    Numerator and denominator are off by that each, their float32 sums by T 2^-24 and a few more
    for the splits, all relative to sum(p |v|) / sum(p); the output by its rounding to bf16.
    """
    p = x.problem
    out = np.zeros((p.B, p.Q, p.H * p.G, p.value_dim))
    bound = np.zeros_like(out)
    key, query = np.arange(p.T)[None], np.arange(p.T - p.Q, p.T)[:, None]
    for b in range(p.B):
        seen = (key <= query) & (key >= (0 if x.first is None else x.first[b]))
        if p.window:
            seen &= key > query - p.window
        for h in range(p.H * p.G):
            q, k, v = (
                np.nan_to_num(from_bf16(a).astype(np.float64))
                for a in (x.q[b, h], x.keys[b, h // p.G], x.values[b, h // p.G])
            )
            sink = -np.inf if x.sinks is None else float(x.sinks[h])
            scores = np.where(seen, q @ k.T * p.key_dim**-0.5, -np.inf)
            most = np.maximum(scores.max(1, keepdims=True), sink)
            most[np.isinf(most)] = 0
            weights = np.exp(scores - most)
            total = weights.sum(1, keepdims=True) + np.exp(sink - most)
            weights /= np.where(total == 0, 1, total)
            magnitude = (np.abs(q) @ np.abs(k).T).max() * p.key_dim**-0.5
            e = 2.0**-8 + (p.key_dim + 4) * 2.0**-24 * magnitude * 2 + 2.0**-21
            out[b, :, h] = weights @ v
            spread = (weights @ np.abs(v)) * (2 * e + e * e + (p.T + 32) * 2.0**-24)
            bound[b, :, h] = spread + 2.0**-8 * (np.abs(out[b, :, h]) + spread) + 2.0**-126
    return out, bound


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
@TierNames
def test_output(name: str, problem: Problem) -> None:
    x = inputs(problem)
    expected, bound = evaluate(x)
    error = np.abs(from_bf16(x.run(RUNNABLE[name])).astype(np.float64) - expected)
    assert np.all(error <= bound), (error / bound).max()


def test_the_bound_notices_a_missing_key() -> None:
    x = inputs(Problem(1, 2, 4, 1, 40, 64, 64))
    _, bound = evaluate(x)
    fewer = Inputs(x.q, x.keys[:, :, 1:], x.values[:, :, 1:], None, None, x.problem)
    error = np.abs(from_bf16(fewer.run()).astype(np.float64) - from_bf16(x.run()))
    assert np.any(error > bound)


@pytest.mark.parametrize("problem", PROBLEMS[:4], ids=str)
@pytest.mark.parametrize("pool", POOLS, ids=lambda p: f"{p.threads}-{p.pools}")
def test_bits_do_not_depend_on_threads_and_pools(pool: PoolConfig, problem: Problem) -> None:
    x = inputs(problem)
    np.testing.assert_array_equal(x.run(pool=pool), x.run())


def test_a_sequence_has_the_bits_that_it_has_alone() -> None:
    """In a batch, behind padding."""
    batch = inputs(Problem(3, 2, 4, 1, 2 * ATTENTION_SPLIT + 40, 64, 64, padded=True), seed=3)
    out = batch.run()
    assert batch.first is not None
    for b, first in enumerate(batch.first):
        q, keys, values = batch.q[b, None], batch.keys[b, None], batch.values[b, None]
        p = Problem(1, 2, 4, 1, batch.problem.T - first, 64, 64)
        alone = Inputs(q, keys[:, :, first:], values[:, :, first:], None, None, p).run()
        np.testing.assert_array_equal(out[b], alone[0])


def test_a_query_token_has_the_bits_that_it_has_alone() -> None:
    """Of the last query tokens each, with the keys up to its own."""
    several = inputs(Problem(1, 2, 2, 4, 300, 64, 64, window=70))
    p = several.problem
    out = several.run()
    for i in range(p.Q):
        T = p.T - p.Q + 1 + i
        low = max(0, p.T - p.Q + 1 - p.window)  # where the splits of all of them begin
        one = Problem(1, 2, 2, 1, T - low, 64, 64, window=p.window)
        q, k, v = several.q[:, :, i, None], several.keys[:, :, low:T], several.values[:, :, low:T]
        first = np.array([max(0, T - p.window - low)], np.int64)
        alone = Inputs(q, k, v, None, None, one).run()
        expected, bound = evaluate(Inputs(q, k, v, first, None, one))
        assert np.all(np.abs(from_bf16(alone) - expected) <= bound)
        assert np.all(np.abs(from_bf16(out[:, i, None]) - expected) <= bound)


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_are_zero(sinks: bool) -> None:
    x = inputs(Problem(2, 2, 2, 1, 20, 32, 32, sinks=sinks))
    for array in (x.keys, x.values):
        array[1] = NAN
    out = Inputs(x.q, x.keys, x.values, np.array([0, 20]), x.sinks, x.problem).run()
    assert not out[1].any()
    assert np.isfinite(from_bf16(out[0])).all()
    assert out[0].any()


@pytest.mark.parametrize("empty", ["sequences", "queries"])
def test_nothing_to_compute(empty: str) -> None:
    """Of several splits: their merge would have no task, and nobody would end it."""
    q, keys = (
        np.zeros((2, 4, 1, 16), np.uint16),
        np.zeros((2, 2, 2 * ATTENTION_SPLIT, 16), np.uint16),
    )
    q, keys = (q[:0], keys[:0]) if empty == "sequences" else (q[:, :, :0], keys)
    out = CachedAttention(16, 16, POOL).forward(q, keys, keys, scale=1.0)
    assert out.shape == (len(q), q.shape[2], 4, 16)


def test_nan_stays_in_its_sequence_and_head() -> None:
    x = inputs(Problem(2, 2, 2, 1, 600, 32, 32))
    before = x.run()
    x.keys[1, 0, 5] = NAN
    after = x.run()
    assert np.isnan(from_bf16(after[1, 0, :2])).all()
    before[1, 0, :2] = after[1, 0, :2] = 0
    np.testing.assert_array_equal(after, before)


def test_strides_of_states() -> None:
    """Keys and values as a projection leaves them: [B, T, H, dim], transposed."""
    x = inputs(PROBLEMS[1])
    keys, values = (
        np.ascontiguousarray(a.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)
        for a in (x.keys, x.values)
    )
    moved = Inputs(x.q, keys, values, x.first, x.sinks, x.problem)
    np.testing.assert_array_equal(moved.run(), x.run())


@TierNames
def test_transpose(name: str) -> None:
    def body(emit: Emit, rows: Val, out: Val) -> None:
        for i, column in enumerate(
            transpose([emit.load(rows + 64 * i, I32, 16) for i in range(16)])
        ):
            emit.store(out + 64 * i, column)

    rows, out = aligned((16, 16), np.int32), aligned((16, 16), np.int32)
    rows[...] = np.arange(256).reshape(16, 16)
    compile_kernel(body, 2, RUNNABLE[name])(rows, out)
    np.testing.assert_array_equal(out, rows.T)


@pytest.mark.parametrize("dims", [(0, 64), (64, 24), (-16, 64)])
def test_dimensions_are_multiples_of_16(dims: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="positive multiple of 16"):
        CachedAttention(*dims, PoolConfig(threads=1))


def test_refused_arrays() -> None:
    attention = CachedAttention(32, 32, PoolConfig(threads=1))
    q, k = np.zeros((1, 4, 1, 32), np.uint16), np.zeros((1, 2, 5, 32), np.uint16)
    for bad, error in (
        ((q.astype(np.float32), k, k), TypeError),
        ((q[..., :16], k, k), ValueError),
        ((q, k, k[:, :, :4]), ValueError),
        ((q[:, :3], k, k), ValueError),
        ((np.zeros((1, 4, 6, 32), np.uint16), k, k), ValueError),
    ):
        with pytest.raises(error):
            attention.forward(*bad, scale=1.0)
    with pytest.raises(ValueError, match="sinks"):
        attention.forward(q, k, k, scale=1.0, sinks=np.zeros(3, np.float32))
