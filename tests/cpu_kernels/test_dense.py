"""Dense layers against the float64 reference, on every tier; their bits; their memory."""

from __future__ import annotations

import functools
import gc
import os
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels import dense as dense_module
from hybrid_moe.cpu_kernels import matrix as matrix_module
from hybrid_moe.cpu_kernels.dense import DenseLayer
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.job import IDLE
from hybrid_moe.cpu_kernels.kernels import epilogue
from hybrid_moe.cpu_kernels.matrix import PackedMatrix
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import STRIP_ROWS
from hybrid_moe.formats.table import BF16, DENSE_FORMATS
from hybrid_moe.formats.tensors import CheckpointError, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import (
    ACTIVATION_ERROR,
    Array,
    decode,
    from_bf16,
    has_portable_bits,
    random_matrix,
    to_bf16,
)
from tests.cpu_kernels.emulation import QUICK, RUNNABLE
from tests.cpu_kernels.toolbox import aligned, compile_kernel
from tests.reference import assert_within, evaluate_linear

ROWS = (64, 70, 1, 257)
"""Of the matrices of a layer: whole strips, and such as end anywhere."""
TOKENS = (1, 2, 3, 4, 5, 7, 33, 130, 401)
"""Encoded by the caller and by workers; one tile and several; one batch and several."""

_NODE = min(numa_nodes())
POOLS = [
    PoolConfig(threads, pools, (_NODE,) * pools)
    for threads, pools in ((1, 1), (2, 1), (2, 2), (3, 2))
    if threads <= max(2, usable_cores())
]

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
TierNames = pytest.mark.parametrize("name", TIERS)


@functools.cache
def _matrices(fmt: str, K: int, rows: Sequence[int] = ROWS) -> list[Matrix]:
    rng = np.random.default_rng(7)
    return [
        random_matrix(DENSE_FORMATS[fmt], rng, n, K, bias=i % 2 == 1) for i, n in enumerate(rows)
    ]


def _packed(fmt: WeightFormat, matrix: Matrix, pool: PoolConfig) -> PackedMatrix:
    K = decode(fmt, matrix).shape[1]
    packed = PackedMatrix(fmt, len(matrix.codes), K, pool, bias=matrix.bias is not None)
    packed.load(matrix)
    return packed


def _layer(
    fmt: WeightFormat,
    matrices: Sequence[Matrix],
    pool: PoolConfig = POOLS[0],
    isa: Tier | str | None = None,
) -> DenseLayer:
    return DenseLayer([_packed(fmt, m, pool) for m in matrices], isa=isa)


def _inputs(T: int, K: int, seed: int = 0) -> Array:
    return to_bf16(np.random.default_rng(seed).standard_normal((T, K)))


@functools.cache
def _tier_layer(fmt: str, name: str, K: int) -> DenseLayer:
    return _layer(DENSE_FORMATS[fmt], _matrices(fmt, K), isa=QUICK[name])


@TierNames
@pytest.mark.parametrize("K", [32, 96, 1120])
@Formats
def test_forward(fmt: WeightFormat, K: int, name: str) -> None:
    """Within the bound of the reference; and the bits of the portable tier."""
    layer, portable = (_tier_layer(fmt.name, tier, K) for tier in (name, "portable"))
    for T in TOKENS if K == 96 else (1, 7):
        x = _inputs(T, K)
        outputs = layer.forward(x)
        for y, matrix in zip(outputs, _matrices(fmt.name, K), strict=True):
            expected = evaluate_linear(
                from_bf16(x), decode(fmt, matrix), matrix.bias,
                activation_error=ACTIVATION_ERROR[fmt.name],
            )  # fmt: skip
            assert_within(from_bf16(y), expected)
        if has_portable_bits(fmt, name):
            for y, same in zip(outputs, portable.forward(x), strict=True):
                assert np.array_equal(y, same)


@pytest.mark.parametrize("pool", POOLS, ids=lambda p: f"{p.threads}x{p.pools}")
@Formats
def test_bits_do_not_depend_on_luck(fmt: WeightFormat, pool: PoolConfig) -> None:
    """Not on the batch, the other matrices, threads and pools, nor on what memory held before."""
    matrices = _matrices(fmt.name, 96)
    packed = [_packed(fmt, m, pool) for m in matrices]
    together, alone = DenseLayer(packed), [DenseLayer([m]) for m in packed]
    x = _inputs(max(TOKENS), 96)
    expected = _layer(fmt, matrices).forward(x)
    for T in TOKENS:
        for memory in IDLE._idle:  # what jobs left behind
            memory._workspace._arena.bytes[:] = 0xFF
        for y, layer, whole in zip(together.forward(x[-T:]), alone, expected, strict=True):
            assert np.array_equal(y, whole[-T:])
            assert np.array_equal(layer.forward(x[-T:])[0], whole[-T:])


@pytest.mark.parametrize("most", [3, 5])
@Formats
def test_long_batches_run_in_parts(
    fmt: WeightFormat, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts that the caller encodes, and such as workers do: one is over before the next begins."""
    layer, x = _layer(fmt, _matrices(fmt.name, 96)), _inputs(23, 96)
    expected = layer.forward(x)
    monkeypatch.setattr(dense_module, "MAX_TOKENS_PER_JOB", most)
    for y, whole in zip(layer.forward(x), expected, strict=True):
        assert np.array_equal(y, whole)


@Formats
def test_nothing_else_is_written(fmt: WeightFormat) -> None:
    layer = _layer(fmt, _matrices(fmt.name, 96))
    for T in (1, 6, 200):
        x, n = _inputs(T, 96), T * sum(ROWS)
        out = np.full(n + 128, 0x7FC0, np.uint16)
        before = x.copy()
        layer.start(T, x.ctypes.data, out[64:].ctypes.data, out).wait()
        assert (out[:64] == 0x7FC0).all() and (out[64 + n :] == 0x7FC0).all()
        assert not (out[64 : 64 + n] == 0x7FC0).any()
        assert np.array_equal(x, before)


@Formats
def test_nan_stays_in_its_row(fmt: WeightFormat) -> None:
    layer, x = _layer(fmt, _matrices(fmt.name, 96)), _inputs(9, 96)
    expected = layer.forward(x)
    x[4, 50] = 0x7FC0
    for y, whole in zip(layer.forward(x), expected, strict=True):
        assert np.isnan(from_bf16(y[4])).all()
        assert np.array_equal(np.delete(y, 4, 0), np.delete(whole, 4, 0))


@TierNames
def test_deliver_writes_any_number_of_rows(name: str) -> None:
    kernel = compile_kernel(epilogue.deliver, 6, RUNNABLE[name])
    rng = np.random.default_rng(5)
    sums = aligned((3, STRIP_ROWS), np.float32)
    sums[:] = rng.standard_normal(sums.shape)
    bias = rng.standard_normal(STRIP_ROWS).astype(np.float32)
    for rows in range(1, STRIP_ROWS + 1):
        out = np.full((3, STRIP_ROWS + 4), 0xABCD, np.uint16)
        kernel(sums, 3, out, out.strides[0], rows, bias)
        assert np.array_equal(out[:, :rows], to_bf16(sums + bias)[:, :rows])
        assert (out[:, rows:] == 0xABCD).all()


# the matrix


@Formats
@settings(max_examples=25)
@given(
    rows=st.integers(1, 300), groups=st.integers(1, 4), pool=st.sampled_from(POOLS), data=st.data()
)
def test_unpacking_law(
    fmt: WeightFormat, rows: int, groups: int, pool: PoolConfig, data: st.DataObject
) -> None:
    """What was packed, whole or in parts, comes back bit for bit: all of it, and any rows."""
    matrix = random_matrix(fmt, np.random.default_rng(rows), rows, 32 * groups, bias=True)
    packed = PackedMatrix(fmt, rows, 32 * groups, pool, bias=True)
    step = STRIP_ROWS * data.draw(st.integers(1, 5))
    for first in range(0, rows, step):
        assert not packed.loaded
        packed.load(matrix.rows(slice(first, first + step)), first)
    assert packed.loaded
    back = packed.unpack()
    ids = np.array(data.draw(st.lists(st.integers(0, rows - 1), max_size=9)), np.int64)
    some = packed.take_rows(ids)
    for name in ("codes", "scales"):
        stored = getattr(matrix, name)
        assert (stored is None) == (getattr(back, name) is None) == (getattr(some, name) is None)
        if stored is not None:
            assert np.array_equal(getattr(back, name), stored)
            assert np.array_equal(getattr(some, name), stored[ids])
    assert back.bias is not None and np.array_equal(back.bias, matrix.bias)


def test_matrices_share_workspaces() -> None:
    pool = POOLS[-1]
    matrices = _matrices("BF16", 96)
    packed = [PackedMatrix(BF16, len(m.codes), 96, pool, bias=m.bias is not None) for m in matrices]
    sizes = [sum(p.share_nbytes(i) for p in packed) for i in range(pool.pools)]
    memory = [Workspace(size) for size in sizes]
    for p, m in zip(packed, matrices, strict=True):
        p.allocate(memory)
        p.load(m)
    assert [workspace.nbytes for workspace in memory] == sizes
    x = _inputs(3, 96)
    expected = _layer(BF16, matrices, pool).forward(x)
    for y, same in zip(DenseLayer(packed).forward(x), expected, strict=True):
        assert np.array_equal(y, same)
    with pytest.raises(RuntimeError, match="already allocated"):
        packed[0].allocate()


def test_threads_that_begin_to_load_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of them takes the memory, and the others wait for it."""
    (matrix,) = _matrices("BF16", 64, (128,))
    packed, taken = PackedMatrix(BF16, 128, 64, POOLS[0]), []

    def slow(*args: Any) -> Workspace:
        taken.append(args)
        time.sleep(0.1)  # that the others are not in time is what must not matter
        return Workspace(*args)

    monkeypatch.setattr(matrix_module, "Workspace", slow)
    halves = [Matrix(matrix.codes[i : i + 64], None, None, "") for i in (0, 64)]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(packed.load, halves, (0, 64)))
    assert len(taken) == 1
    assert np.array_equal(packed.unpack().codes, matrix.codes)


def test_refusals() -> None:
    (matrix,) = _matrices("MXFP4", 96, (130,))
    with pytest.raises(ValueError, match="0 rows"):
        PackedMatrix(MXFP4, 0, 96, POOLS[0])
    with pytest.raises(ValueError, match="K = 48"):
        PackedMatrix(MXFP4, 64, 48, POOLS[0])
    packed = PackedMatrix(MXFP4, 130, 96, POOLS[0])
    layer = DenseLayer([packed])
    x = _inputs(2, 96)
    with pytest.raises(RuntimeError, match="not been loaded"):
        layer.forward(x)
    for part, first in ((slice(0, 32), 0), (slice(0, 64), 32), (slice(0, 64), 128)):
        with pytest.raises(ValueError, match="multiples of 64"):
            packed.load(matrix.rows(part), first)
    with pytest.raises(CheckpointError, match="codes must be"):
        packed.load(Matrix(matrix.codes.astype(np.int64), matrix.scales))
    with pytest.raises(ValueError, match="has a bias"):
        packed.load(Matrix(matrix.codes, matrix.scales, np.zeros(130, np.float32)))
    assert not packed.loaded
    packed.load(matrix.rows(slice(0, 128)))
    with pytest.raises(RuntimeError, match="not been loaded"):
        packed.unpack()
    packed.load(matrix.rows(slice(128, 130)), 128)
    layer.forward(x)
    for ids in ([-1], [0, 130]):
        with pytest.raises(IndexError, match="of 130 rows"):
            packed.take_rows(np.array(ids))
    with pytest.raises(TypeError, match="uint16"):
        layer.forward(x.astype(np.float32))
    with pytest.raises(ValueError, match=r"expected \[tokens, 96\]"):
        layer.forward(x[:, :64])
    other = PackedMatrix(BF16, 64, 96, POOLS[0])
    with pytest.raises(ValueError, match="same inputs"):
        DenseLayer([packed, other])
    with pytest.raises(ValueError, match="needs a matrix"):
        DenseLayer([])


def test_an_empty_batch() -> None:
    layer = _layer(BF16, _matrices("BF16", 96))
    assert [y.shape for y in layer.forward(_inputs(0, 96))] == [(0, n) for n in ROWS]


def test_close_frees_the_weights() -> None:
    """The matrix's own close leaves a layer that has it as it is."""
    (matrix,) = _matrices("BF16", 96, (64,))
    packed = _packed(BF16, matrix, POOLS[0])
    layer, x = DenseLayer([packed]), _inputs(2, 96)
    expected = layer.forward(x)[0]
    alive = weakref.ref(packed.ranges[0].strips)
    packed.close()
    with pytest.raises(RuntimeError, match="closed"):
        packed.unpack()
    assert np.array_equal(layer.forward(x)[0], expected)
    layer.close()
    layer.close()
    with pytest.raises(RuntimeError, match="closed"):
        layer.forward(x)
    del packed, layer
    gc.collect()
    assert alive() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told() -> None:
    (matrix,) = _matrices("BF16", 96, (64,))
    packed = _packed(BF16, matrix, POOLS[0])
    layer, x = DenseLayer([packed]), _inputs(2, 96)
    layer.forward(x)
    child = os.fork()
    if not child:
        told = 0
        for call in (packed.unpack, lambda: layer.forward(x)):
            try:
                call()
            except RuntimeError as error:
                told += "fork" in str(error)
        os._exit(told)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
