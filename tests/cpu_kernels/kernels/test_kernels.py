"""Kernels alone: exponential, rounding, encoding of activations, packing, dot products."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.dsl.emit import F32, I16, Emit, Val
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.kernels import encode, epilogue
from hybrid_moe.cpu_kernels.kernels.library import DotKernel, KernelSet, kernel_set
from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up, pack_rows
from hybrid_moe.formats.strips import LINE, STRIP_ROWS, round_up, strip_layout
from hybrid_moe.formats.table import FORMATS, MXFP4, WeightFormat, f32_to_bf16
from hybrid_moe.formats.tensors import Matrix
from tests.cpu_kernels.cases import Array, decode, from_bf16, random_matrix, to_bf16
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.toolbox import aligned, callable_at, compile_kernel

Formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
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
    call = callable_at(kernels.encode, 6)
    call(np.ascontiguousarray(x), 2 * K, rows, rows.shape[1], T, groups)
    return rows


def _decode_rows(rows: Array, groups: int) -> tuple[Array, Array]:
    """Encoded MXFP4 rows -> (integers q, factors) as [T, groups, 32] and [T, groups]."""
    planes = rows[:, : groups * encode.PLANE_BYTES].reshape(len(rows), groups, 2, 32)
    q = 256 * planes[:, :, 0].view(np.int8).astype(np.int64) + planes[:, :, 1].view(np.int8)
    order = [8 * octet + i for octet in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
    restored = np.empty_like(q)
    restored[:, :, order] = q
    meta = rows[:, groups * encode.PLANE_BYTES :][:, : groups * encode.META_BYTES]
    factors = np.ascontiguousarray(meta.reshape(len(rows), groups, encode.META_BYTES)[:, :, :4])
    return restored, factors.view(np.float32)[..., 0]


@TierNames
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 3, 12, 40]))
def test_encoding_keeps_its_bounds(name: str, seed: int, spread: int) -> None:
    """Off by at most 2^(e - 14) where the maximum is in [2^e, 2^(e+1)); exact near the maximum."""
    rng = np.random.default_rng(seed)
    centre = int(rng.integers(-100, 80))
    exponents = centre + rng.integers(-spread, spread + 1, (3, 96))
    x = to_bf16(np.ldexp(rng.standard_normal((3, 96)), exponents))
    q, factors = _decode_rows(_encode(_kernels(MXFP4.name, name), x), 3)
    exact = from_bf16(x).reshape(3, 3, 32)
    decoded = q * 2.0 * factors[..., None].astype(np.float64)
    largest = np.abs(exact).max(axis=-1, keepdims=True)
    e = np.floor(np.log2(largest))
    error = np.abs(decoded - exact)
    assert (error <= 2.0 ** (e - 14)).all()
    assert (error[np.abs(exact) >= largest * 2.0**-6] == 0).all()
    assert np.abs(q).max() <= 16320


@TierNames
def test_encoding_of_special_groups(name: str) -> None:
    x = np.zeros((7, 32), np.uint16)
    x[1] = 0x8000  # -0
    x[2] = 0x0001  # the smallest subnormal
    x[3] = 0x7F7F  # the largest number
    x[4, 5], x[5, 31], x[6, 0] = 0x7FC0, 0x7F80, 0xFF80
    q, factors = _decode_rows(_encode(_kernels(MXFP4.name, name), x), 1)
    assert (q[:2] == 0).all() and np.isfinite(factors[:4]).all()
    decoded = q * 2.0 * factors[..., None].astype(np.float64)
    for row in (2, 3):
        assert np.array_equal(decoded[row, 0], from_bf16(x[row]))
    assert np.isnan(factors[4:]).all()


@TierNames
def test_bf16_rows_are_the_activations(name: str) -> None:
    x = np.arange(3 * 64, dtype=np.uint16).reshape(3, 64) * 341
    rows = _encode(_kernels("BF16", name), x)
    assert np.array_equal(rows.view(np.uint16)[:, :64], x)


@given(st.integers(1, 4096), st.sampled_from([encode.FIXED15, encode.BF16_PAIRS]))
def test_neighbouring_rows_share_no_cache_set(groups: int, encoding: encode.Encoding) -> None:
    """The same bytes of 64 rows lie in all 64 sets of a first level cache (4 KiB a way)."""
    row = encoding.row_bytes(groups)
    assert row % LINE == 0 and 0 <= row - groups * encoding.group_bytes < 16 * LINE
    assert len({i * row // LINE % 64 for i in range(64)}) == 64


# packing


def _unpack(fmt: WeightFormat, strips: Array, K: int) -> Array:
    """Strips as `panels` documents them -> float64 [strips, 2 panels, 16 lanes, K]."""
    layout = strip_layout(fmt, K)
    panels = []
    for strip in strips:
        words = strip[: layout.scale_offset].view(np.uint32).reshape(layout.words, 2, 16)
        codes = np.ascontiguousarray(words.transpose(1, 2, 0)).view(fmt.code_dtype)
        scales = None
        if fmt.scale is not None:
            raw = strip[layout.scale_offset :][: layout.groups * layout.scale_bytes_per_group]
            scales = raw.reshape(-1, 2, 16).transpose(1, 2, 0).reshape(32, -1)
        matrix = Matrix(codes.reshape(32, -1), scales)
        panels.append(decode(fmt, matrix).reshape(2, 16, K))
    return np.stack(panels)


@Formats
@settings(max_examples=25)
@given(rows=st.integers(1, 100), groups=st.integers(1, 12), seed=st.integers(0, 999))
def test_packing_law(fmt: WeightFormat, rows: int, groups: int, seed: int) -> None:
    """Unpacking what was packed gives the matrix, any number of rows; the rest is zero."""
    K = 32 * groups
    rng = np.random.default_rng(seed)
    layout = strip_layout(fmt, K)
    assert layout.nbytes % LINE == 0
    matrix, other = random_matrix(fmt, rng, rows, K), random_matrix(fmt, rng, rows, K)

    n = -(-rows // STRIP_ROWS)
    strips = aligned((n, layout.nbytes), np.uint8, fill=0xFF)
    pack_rows(strips.ctypes.data, range(n), layout, matrix, rows)
    values = _unpack(fmt, strips, K).reshape(-1, K)
    assert np.array_equal(values[:rows], decode(fmt, matrix))
    assert (values[rows:] == 0).all()

    n = -(-rows // 16)
    strips = aligned((n, layout.nbytes), np.uint8, fill=0xFF)
    pack_gate_up(strips.ctypes.data, range(n), layout, matrix, other, rows)
    panels = _unpack(fmt, strips, K)
    for panel, source in enumerate((matrix, other)):
        values = panels[:, panel].reshape(-1, K)
        assert np.array_equal(values[:rows], decode(fmt, source))
        assert (values[rows:] == 0).all()


@Formats
def test_packing_a_range_of_strips(fmt: WeightFormat) -> None:
    rng = np.random.default_rng(1)
    matrix = random_matrix(fmt, rng, 160, 64)
    layout = strip_layout(fmt, 64)
    strips = aligned((2, layout.nbytes), np.uint8)
    pack_rows(strips.ctypes.data, range(3, 5), layout, matrix, 160)
    values = _unpack(fmt, strips, 64).reshape(-1, 64)
    assert np.array_equal(values, decode(fmt, matrix)[96:160])


@pytest.mark.parametrize("K", [0, -32, 31, 48])
def test_layout_refuses(K: int) -> None:
    with pytest.raises(ValueError, match="K = "):
        strip_layout(MXFP4, K)


# dot products


def _integer_case(
    fmt: WeightFormat, rng: np.random.Generator, T: int, K: int
) -> tuple[Matrix, Array]:
    """Weights and activations whose sums are exact in float32 in any order."""
    if fmt is MXFP4:
        codes = rng.integers(0, 256, (32, K // 2), dtype=np.uint8)
        scales = rng.integers(126, 129, (32, K // 32)).astype(np.uint8)
        matrix = Matrix(codes, scales)
    else:
        matrix = Matrix(to_bf16(rng.integers(-12, 13, (32, K)) / 2), None)
    return matrix, to_bf16(rng.integers(-60, 61, (T, K)))


@contextmanager
def _entered(kernels: KernelSet) -> Iterator[None]:
    """What a worker does before and after its part of a job."""
    if kernels.enter:
        callable_at(kernels.enter, 0)()
    yield
    if kernels.leave:
        callable_at(kernels.leave, 0)()


def _calls(table: Sequence[DotKernel]) -> list[tuple[DotKernel, int]]:
    """Every kernel with the fewest and the most tokens that it takes, and one between."""
    return [
        (dot, count)
        for dot in table
        for count in sorted({dot.least, (dot.least + dot.most) // 2, dot.most})
    ]


@TierNames
@Formats
def test_dot_kernels(fmt: WeightFormat, name: str) -> None:
    check_dot_kernels(fmt, RUNNABLE[name])


def check_dot_kernels(fmt: WeightFormat, tier: Tier) -> None:
    """Every kernel of every tile size, whole and in chunks, on sums that are exact."""
    kernels = kernel_set(fmt.name, tier)
    layout = strip_layout(fmt, 160)
    rng = np.random.default_rng(2)
    most = max(dot.most for dot in (*kernels.direct, *kernels.tiled))
    matrix, x = _integer_case(fmt, rng, most, 160)
    strip = aligned((layout.nbytes,), np.uint8)
    pack_rows(strip.ctypes.data, range(1), layout, matrix, 32)
    expected = from_bf16(x) @ decode(fmt, matrix).T
    rows = _encode(kernels, x)
    addresses = rows.ctypes.data + rows.shape[1] * np.arange(most, dtype=np.int64)
    assert kernels.direct[-1].least == kernels.tiled[-1].least == 1
    for cuts in ([0, 5], [0, 2, 3, 5]):
        for table, unpack in ((kernels.direct, 0), (kernels.tiled, kernels.unpack)):
            for dot, count in _calls(table):
                sums = aligned((round_up(count, 32), 32), np.float32, fill=0xFF)
                for begin, end in itertools.pairwise(cuts):
                    codes = strip.ctypes.data + begin * layout.code_bytes_per_group
                    scales = layout.scale_offset + begin * layout.scale_bytes_per_group
                    unpacked = aligned((5, kernels.chunk_group_bytes), np.uint8, fill=0xFF)
                    if unpack:
                        callable_at(unpack, 3)(codes, unpacked, end - begin)
                        codes = unpacked.ctypes.data
                    scales += strip.ctypes.data
                    call = callable_at(dot.address, 8)
                    with _entered(kernels):
                        call(codes, scales, addresses, count, sums, begin, end, 5)
                assert np.array_equal(sums[:count], expected[:count]), (count, bool(unpack), cuts)
