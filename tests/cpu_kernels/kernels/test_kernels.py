"""Kernels alone: exponential, rounding, encoding of activations, packing, dot products."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.dsl.emit import F32, I16, Emit, Val
from hybrid_moe.cpu_kernels.dsl.ops import OPS
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.kernels import encode, epilogue
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.library import KernelSet, kernel_set
from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows
from hybrid_moe.cpu_kernels.tuning import BATCH_TOKENS
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import f32_to_bf16
from hybrid_moe.formats.strips import (
    LINE,
    PANEL_ROWS,
    PANELS,
    STRIP_ROWS,
    round_up,
    strip_layout,
)
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import (
    Array,
    decode,
    from_bf16,
    integer_matrix,
    random_matrix,
    to_bf16,
)
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.toolbox import aligned, aligned_copy, callable_at, compile_kernel

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
TierNames = pytest.mark.parametrize("name", TIERS)


def _map16(function: Callable[[Val], Val]) -> Callable[..., None]:
    """Kernel (source, out, n): `function` of n float32, 16 at a time."""

    def body(emit: Emit, source: Val, out: Val, n: Val) -> None:
        with emit.loop(0, n, 16) as i:
            result = function(emit.load(source + i * 4, F32, 16))
            size = 2 if result.element == I16 else 4
            emit.store(out + i * size, result)

    return body


@functools.lru_cache(maxsize=16)
def _mapped(function: str, name: str) -> Callable[..., None]:
    return compile_kernel(_map16(_FUNCTIONS[function]), 3, RUNNABLE[name])


_FUNCTIONS: dict[str, Callable[[Val], Val]] = {"exp": epilogue.exp, "to_bf16": encode.to_bf16}


def _apply(function: str, name: str, x: Array, dtype: Any) -> Array:
    padded = np.zeros(-(-len(x) // 16) * 16, np.float32)
    padded[: len(x)] = x
    out = np.zeros(len(padded), dtype)
    _mapped(function, name)(padded, out, len(padded))
    return out[: len(x)]


@TierNames
def test_exp(name: str) -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [
            np.linspace(-87, 88, 200_001),
            rng.uniform(-1, 1, 50_000),
            np.ldexp(rng.uniform(-1, 1, 20_000), rng.integers(-149, 0, 20_000)),
            np.log(2) * (np.arange(-125, 127) + 0.5),  # where the reduced argument is largest
            [0.0, -0.0, -87, 88],
        ]
    ).astype(np.float32)
    x = x.clip(-87, 88)
    expected = np.exp(x.astype(np.float64))
    ulp = np.spacing(expected.astype(np.float32)).astype(np.float64)
    error = np.abs(_apply("exp", name, x, np.float32) - expected) / ulp
    assert error.max() <= 3, x[error.argmax()]


@TierNames
def test_exp_saturates_and_keeps_nan(name: str) -> None:
    x = np.array([-87, -87.1, -1e30, -np.inf, 88, 88.1, 1e30, np.inf, np.nan], np.float32)
    y = _apply("exp", name, x, np.float32)
    assert (y[:4] == y[0]).all() and 0 < y[0] < 2e-38
    assert (y[4:8] == y[4]).all() and 1e38 < y[4] < np.inf
    assert np.isnan(y[8])


@TierNames
def test_to_bf16(name: str) -> None:
    """Every upper half with the lower halves that decide the rounding."""
    upper = np.arange(2**16, dtype=np.uint32) << np.uint32(16)
    lower = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper[:, None] | lower).reshape(-1).view(np.float32)
    assert np.array_equal(_apply("to_bf16", name, x, np.uint16), f32_to_bf16(x))


# encoding of activations


@functools.lru_cache(maxsize=16)
def _kernels(fmt_name: str, name: str) -> KernelSet:
    return kernel_set(fmt_name, RUNNABLE[name])


def _encode(kernels: KernelSet, x: Array) -> Array:
    """bf16 bits [T, K] -> encoded rows, uint8 [T, row bytes]."""
    T, K = x.shape
    groups = K // 32
    rows = aligned((T, kernels.encoding.row_bytes(groups)), np.uint8, fill=0xFF)
    call = callable_at(kernels.encode, 7)
    step = kernels.encoding.group_bytes
    call(np.ascontiguousarray(x), 2 * K, rows, rows.shape[1], T, groups, step)
    return rows


Fixed15 = pytest.mark.parametrize("fmt", [MXFP4, INT8], ids=lambda f: f.name)
"""Formats whose activations are fixed-point numbers."""


def _decode_rows(fmt: WeightFormat, name: str, rows: Array) -> tuple[Array, Array]:
    """Encoded rows -> (integers q, the step that they are counted in) as [T, groups, 32] and [T,
    groups]."""
    at = encode.FIXED15_GROUP
    groups = rows.reshape(len(rows), -1, at.nbytes)

    def field(offset: int, count: int, dtype: Any) -> Array:
        nbytes = count * np.dtype(dtype).itemsize
        return np.ascontiguousarray(groups[:, :, offset : offset + nbytes]).view(dtype)

    high, low = (field(offset, 32, np.int8).astype(np.int64) for offset in (at.high, at.low))
    order = [8 * octet + i for octet in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    if fmt is INT8:
        order = list(range(32))
    q = 256 * high + low
    if fmt is INT8 and RUNNABLE[name].lowering("wide_split") is OPS["wide_split"].lower:
        q = field(at.high, 32, np.int16).astype(np.int64)  # inputs 0 and 2 of each quad, 1 and 3
        order = [4 * quad + i for half in ((0, 2), (1, 3)) for quad in range(8) for i in half]
    restored = np.empty_like(q)
    restored[:, :, order] = q
    factors, exponents = (field(o, 1, np.float32)[..., 0] for o in (at.factor, at.exponent))
    assert np.array_equal(np.exp2(exponents.astype(np.float64)), factors, equal_nan=True)
    return restored, factors * np.float32(2 if fmt is MXFP4 else 1)  # its weights are doubled


@TierNames
@Fixed15
@settings(max_examples=25)  # of nine groups each
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 3, 12, 40]))
def test_encoding_keeps_its_bounds(fmt: WeightFormat, name: str, seed: int, spread: int) -> None:
    """Off by at most 2^(e - 14) where the maximum is in [2^e, 2^(e+1)); exact near the maximum."""
    rng = np.random.default_rng(seed)
    centre = int(rng.integers(-100, 80))
    exponents = centre + rng.integers(-spread, spread + 1, (3, 96))
    x = to_bf16(np.ldexp(rng.standard_normal((3, 96)), exponents))
    q, steps = _decode_rows(fmt, name, _encode(_kernels(fmt.name, name), x))
    exact = from_bf16(x).reshape(3, 3, 32)
    decoded = q * steps[..., None].astype(np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    e = np.floor(np.log2(largest))
    error = np.abs(decoded - exact)
    assert (error <= 2.0 ** (e - 14)).all()
    assert (error[np.abs(exact) >= largest * 2.0**-6] == 0).all()
    assert np.abs(q).max() <= 16320


@TierNames
@Fixed15
def test_encoding_of_special_groups(fmt: WeightFormat, name: str) -> None:
    x = np.zeros((7, 32), np.uint16)
    x[1] = 0x8000  # -0
    x[2] = 0x0001  # the smallest subnormal
    x[3] = 0x7F7F  # the largest number
    x[4, 5], x[5, 31], x[6, 0] = 0x7FC0, 0x7F80, 0xFF80
    q, steps = _decode_rows(fmt, name, _encode(_kernels(fmt.name, name), x))
    assert (q[:2] == 0).all() and np.isfinite(steps[:4]).all()
    decoded = q * steps[..., None].astype(np.float64)
    for row in (2, 3):
        assert np.array_equal(decoded[row, 0], from_bf16(x[row]))
    assert np.isnan(steps[4:]).all()


@TierNames
def test_bf16_rows_are_the_activations(name: str) -> None:
    x = np.arange(3 * 64, dtype=np.uint16).reshape(3, 64) * 341
    rows = _encode(_kernels("BF16", name), x)
    assert np.array_equal(rows.view(np.uint16)[:, :64], x)


def _tile(encoding: encode.Encoding, rows: Array) -> Array:
    """Encoded rows [T, row bytes] -> the tile [groups, T, group bytes]."""
    by_group = rows.reshape(len(rows), -1, encoding.group_bytes)
    tile = aligned(by_group.transpose(1, 0, 2).shape, np.uint8)
    tile[...] = by_group.transpose(1, 0, 2)
    return tile


@TierNames
@Formats
@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_gathering_makes_a_tile(fmt: WeightFormat, tokens: int, name: str) -> None:
    """Of rows in any order and at any distance; nothing behind the tile is written."""
    kernels = _kernels(fmt.name, name)
    rows = _encode(kernels, to_bf16(np.random.default_rng(7).standard_normal((9, 96))))
    chosen = np.array([8, 0, 3, 3, 5])[:tokens]
    addresses = rows.ctypes.data + rows.shape[1] * chosen
    tile = aligned((tokens * rows.shape[1] + 64,), np.uint8, fill=0xAA)
    callable_at(kernels.gather, 4)(addresses, tokens, tile, 3)
    assert np.array_equal(tile[:-64], _tile(kernels.encoding, rows[chosen]).reshape(-1))
    assert (tile[-64:] == 0xAA).all()


# packing


def _unpack(fmt: WeightFormat, strips: Array, K: int) -> Array:
    """Strips as `formats.strips` documents them -> float64 [strips, 4 panels, 16 lanes, K]."""
    layout = strip_layout(fmt, K)
    panels = []
    for strip in strips.reshape(len(strips), layout.groups, layout.group_bytes):
        words = np.ascontiguousarray(strip[:, : layout.code_bytes]).view(np.uint32)
        words = words.reshape(-1, STRIP_ROWS)  # word by word along K
        codes = np.ascontiguousarray(words.T).view(fmt.code_dtype)
        scales = None
        if fmt.scale is not None:
            scales = np.ascontiguousarray(strip[:, layout.code_bytes :]).view(fmt.scale.dtype)
            scales = scales.reshape(-1, STRIP_ROWS).T
        panels.append(decode(fmt, Matrix(codes, scales)).reshape(PANELS, PANEL_ROWS, K))
    return np.stack(panels)


@Formats
@settings(max_examples=25)
@given(rows=st.integers(1, 200), groups=st.integers(1, 12), seed=st.integers(0, 999))
def test_packing_law(fmt: WeightFormat, rows: int, groups: int, seed: int) -> None:
    """Unpacking what was packed gives the matrix, any number of rows; the rest is zero."""
    K = 32 * groups
    rng = np.random.default_rng(seed)
    layout = strip_layout(fmt, K)
    assert layout.nbytes == STRIP_ROWS * fmt.nbytes(1, K) and layout.group_bytes % LINE == 0
    matrix, other = random_matrix(fmt, rng, rows, K), random_matrix(fmt, rng, rows, K)

    n = -(-rows // STRIP_ROWS)
    strips = aligned((n, layout.nbytes), np.uint8, fill=0xFF)
    pack_rows(strips.ctypes.data, range(n), layout, matrix, rows)
    values = _unpack(fmt, strips, K).reshape(-1, K)
    assert np.array_equal(values[:rows], decode(fmt, matrix))
    assert (values[rows:] == 0).all()

    n = -(-rows // 32)
    strips = aligned((n, layout.nbytes), np.uint8, fill=0xFF)
    pack_gate_up(strips.ctypes.data, range(n), layout, matrix, other, rows)
    panels = _unpack(fmt, strips, K)
    for panel, source in ((0, matrix), (2, other)):
        values = panels[:, panel : panel + 2].reshape(-1, K)
        assert np.array_equal(values[:rows], decode(fmt, source))
        assert (values[rows:] == 0).all()


@Formats
def test_packing_a_range_of_strips(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(1)
    matrix = random_matrix(fmt, rng, 320, 64)
    layout = strip_layout(fmt, 64)
    strips = aligned((2, layout.nbytes), np.uint8)
    pack_rows(strips.ctypes.data, range(3, 5), layout, matrix, 320)
    values = _unpack(fmt, strips, 64).reshape(-1, 64)
    assert np.array_equal(values, decode(fmt, matrix)[192:320])


@pytest.mark.parametrize("K", [0, -32, 31, 48])
def test_layout_refuses(K: int) -> None:
    with pytest.raises(ValueError, match="K = "):
        strip_layout(MXFP4, K)


# dot products


@contextmanager
def _entered(kernels: KernelSet) -> Iterator[None]:
    """What a worker does before and after its part of a job."""
    if kernels.enter:
        callable_at(kernels.enter, 0)()
    yield
    if kernels.leave:
        callable_at(kernels.leave, 0)()


@TierNames
@Formats
def test_dot_kernels(fmt: WeightFormat, name: str) -> None:
    check_dot_kernels(fmt, RUNNABLE[name])


def check_dot_kernels(fmt: WeightFormat, tier: Tier) -> None:
    """Every kernel with every number of tokens, whole and in chunks, on sums that are exact."""
    kernels = kernel_set(fmt.name, tier)
    K, groups = 32 * 19, 19  # more groups than two panels go ahead of the others
    layout = strip_layout(fmt, K)
    rng = np.random.default_rng(2)
    matrix = integer_matrix(fmt, rng, STRIP_ROWS, K)
    x = to_bf16(rng.integers(-60, 61, (max(kernels.direct.most, kernels.tiled.most), K)))
    strip = aligned((layout.nbytes,), np.uint8)
    pack_rows(strip.ctypes.data, range(1), layout, matrix, STRIP_ROWS)
    expected = from_bf16(x) @ decode(fmt, matrix).T
    rows = _encode(kernels, x)
    unpacked = aligned((groups * format_kernels(fmt).unpacked_group_bytes,), np.uint8)
    for cuts, tiling in itertools.product(
        ([0, 19], [0, 2, 17, 19]), (kernels.direct, kernels.tiled)
    ):
        for count, address in tiling.kernels.items():
            # a matrix unit reads and writes whole blocks
            behind = aligned((4096,), np.uint8, fill=0xFF)
            tile = np.concatenate([_tile(kernels.encoding, rows[:count]).reshape(-1), behind])
            tile = aligned_copy(tile)
            sums = aligned((round_up(count, tiling.unit), STRIP_ROWS), np.float32, fill=0xFF)
            for begin, end in itertools.pairwise(cuts):
                codes = ahead = strip.ctypes.data
                if tiling.unpack:
                    unpacked[:] = 0xFF
                    callable_at(tiling.unpack, 4)(codes, unpacked, begin, end)
                    codes = unpacked.ctypes.data
                with _entered(kernels):
                    call = callable_at(address, DOT_ARITY)
                    call(codes, ahead, tile, count, sums, begin, end)
            assert np.array_equal(sums[:count], expected[:count]), (count, tiling.unpack, cuts)


@TierNames
@Formats
@given(count=st.integers(1, 2 * BATCH_TOKENS))
def test_tiles_are_even_and_have_kernels(fmt: WeightFormat, name: str, count: int) -> None:
    """As few as possible, none larger than the largest kernel, sizes that differ by one unit."""
    kernels = _kernels(fmt.name, name)
    tiling = kernels.direct if count < kernels.tiled_from else kernels.tiled
    sizes = tiling.sizes(count)
    assert sum(sizes) == count and len(sizes) == -(-count // tiling.most)
    assert set(sizes) <= set(tiling.kernels)
    units = [-(-size // tiling.unit) for size in sizes]
    assert max(units) - min(units) <= 1
    assert all(size % tiling.unit == 0 for size in sizes[:-1])
