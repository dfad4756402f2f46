"""The formats' tables against `ml_dtypes`, and the quantizer against a search over all codes."""

from __future__ import annotations

import math
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import (
    FP16,
    UE8M0_NAN,
    bf16_to_f32,
    e4m3_to_float,
    f32_to_bf16,
    f32_to_e4m3,
    ue8m0_to_float,
)
from hybrid_moe.formats.table import BF16, DENSE_FORMATS, METHODS, format_named
from hybrid_moe.formats.weight_format import WeightFormat, unpack_bits

CODES = np.arange(16, dtype=np.uint8)
E2M1 = CODES.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
SCALES = np.arange(256, dtype=np.uint8)
E8M0 = SCALES.view(ml_dtypes.float8_e8m0fnu).astype(np.float64)

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
matrices = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])), elements=finite
)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in value and sign of zero, NaN equal to NaN."""
    return bool(np.array_equal(a, b, equal_nan=True) and (np.signbit(a) == np.signbit(b)).all())


def test_every_e2m1_code() -> None:
    packed = CODES[0::2] | (CODES[1::2] << 4)
    assert same(MXFP4.decode_codes(packed), E2M1.astype(np.float32))


def test_every_e8m0_byte() -> None:
    assert same(ue8m0_to_float(SCALES), E8M0.astype(np.float32))
    assert np.isnan(ue8m0_to_float(SCALES)).nonzero()[0].tolist() == [UE8M0_NAN]
    assert ue8m0_to_float(SCALES)[0] == 2.0**-127
    assert same(ue8m0_to_float(SCALES.view(np.int8)), ue8m0_to_float(SCALES))


def test_every_code_with_every_scale() -> None:
    codes = np.broadcast_to(np.tile(CODES[0::2] | (CODES[1::2] << 4), 2), (256, 16))
    values = MXFP4.dequantize(codes, SCALES[:, None])
    with np.errstate(over="ignore", invalid="ignore"):
        expected = (np.tile(E2M1, 2) * E8M0[:, None]).astype(np.float32)
    assert np.array_equal(values, expected, equal_nan=True)


def test_every_bf16_pattern() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    oracle = bits.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(bf16_to_f32(bits).view(np.uint32), oracle.view(np.uint32))
    numbers = ~np.isnan(oracle)
    assert np.array_equal(f32_to_bf16(oracle)[numbers], bits[numbers])
    assert np.isnan(bf16_to_f32(f32_to_bf16(oracle[~numbers]))).all()


def test_bf16_rounds_to_nearest_even_around_every_midpoint() -> None:
    low = np.arange(0, 0x7F80, dtype=np.uint32) << np.uint32(16)
    bits = np.concatenate([low + np.uint32(o) for o in (0x7FFF, 0x8000, 0x8001)])
    x = np.concatenate([bits, bits | np.uint32(1 << 31)]).view(np.float32)
    with np.errstate(over="ignore"):
        oracle = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(f32_to_bf16(x), oracle)


@given(hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32)))
def test_bf16_of_any_float(x: np.ndarray) -> None:
    numbers = ~np.isnan(x)
    with np.errstate(over="ignore"):
        oracle = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert np.array_equal(f32_to_bf16(x)[numbers], oracle[numbers])
    assert np.isnan(bf16_to_f32(f32_to_bf16(x))[~numbers]).all()


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 3), st.integers(1, 9))))
def test_low_nibble_is_the_even_input(codes: np.ndarray) -> None:
    nibbles = unpack_bits(codes, 4)
    assert np.array_equal(nibbles[..., 0::2], codes % 16)
    assert np.array_equal(nibbles[..., 1::2], codes // 16)


def test_e4m3_is_that_of_ml_dtypes() -> None:
    """Every byte; zeros; both sides of the middle between any two, and the middle itself."""
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert same(e4m3_to_float(codes), values)
    values = values[np.isfinite(values)]
    ascending = np.unique(values)
    middle = (ascending[1:] + ascending[:-1]) / 2  # exact: one bit more
    x = np.concatenate([values, middle, np.nextafter(middle, -448), np.nextafter(middle, 448)])
    x = np.concatenate([x, np.float32([0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-11])])
    oracle = x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    assert np.array_equal(f32_to_e4m3(x.astype(np.float32)), oracle.view(np.uint8))


def nearest_codes(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The nearest of all codes by exhaustive search; of two equally near the even one."""
    distance = np.abs(np.abs(values)[..., None] - E2M1[:8] * scale[..., None, None])
    candidates = np.where(distance == distance.min(axis=-1, keepdims=True), CODES[:8], 99)
    even_first = np.where(candidates % 2 == 0, candidates, candidates + 50)
    code = even_first.min(axis=-1)
    return np.where(code >= 50, code - 50, code) + 8 * np.signbit(values)


@given(matrices)
def test_mxfp4_encode_is_nearest(w: np.ndarray) -> None:
    N, K = w.shape
    codes, scales = MXFP4.encode(w)
    assert scales is not None and scales.max() < UE8M0_NAN
    assert (codes.shape, codes.dtype) == (MXFP4.code_shape(N, K), np.uint8)
    assert (scales.shape, scales.dtype) == (MXFP4.scale_shape(N, K), np.uint8)
    groups = w.reshape(N, -1, 32).astype(np.float64)
    nibbles = unpack_bits(codes, 4).reshape(groups.shape)
    assert np.array_equal(nibbles, nearest_codes(groups, E8M0[scales]))


@given(matrices)
def test_mxfp4_scale_is_the_standards_or_the_next_whichever_fits_better(w: np.ndarray) -> None:
    codes, scales = MXFP4.encode(w)
    assert scales is not None
    groups = w.reshape(w.shape[0], -1, 32).astype(np.float64)
    maxima = np.abs(groups).max(axis=-1)
    with np.errstate(divide="ignore"):
        standard = np.clip(np.floor(np.log2(maxima)) - 2, -127, 126)
    nonzero = maxima > 0
    chosen = scales.astype(np.int64) - 127
    assert np.isin(chosen - standard, (0, 1))[nonzero].all()
    errors = [
        np.square(E2M1[nearest_codes(groups, np.exp2(e))] * np.exp2(e)[..., None] - groups).sum(-1)
        for e in (np.where(nonzero, standard, 0), np.where(nonzero, standard, 0) + 1)
    ]
    nibbles = unpack_bits(codes, 4).reshape(groups.shape)
    error = np.square(E2M1[nibbles] * E8M0[scales][..., None] - groups).sum(-1)
    # the two errors are compared in float32: 32 squares, each a few roundings of 2^-24
    assert (error <= np.minimum(*errors) * (1 + 2.0**-18)).all()


@given(
    hnp.arrays(np.uint8, (2, 32)),
    hnp.arrays(np.uint8, (2, 2), elements=st.integers(0, 252)),
)
def test_mxfp4_encode_keeps_mxfp4_values(codes: np.ndarray, scales: np.ndarray) -> None:
    values = MXFP4.dequantize(codes, scales)
    assert same(MXFP4.dequantize(*MXFP4.encode(values)), values)


def roundf(x: float) -> int:
    """C's: ties away from zero."""
    return int(math.copysign(math.floor(abs(x) + 0.5), x))


def quantize_row_q8_0_ref(row: np.ndarray) -> bytes:
    """ggml's `block_q8_0`s of a row (ggml-quants.c), float32 step by step: d as fp16, then qs."""
    blocks = b""
    for x in row.reshape(-1, 32):
        d = np.float32(np.abs(x).max()) / np.float32(127)
        with np.errstate(over="ignore"):
            inverse = np.float32(1) / d if d else np.float32(0)
        codes = [roundf(float(v * inverse)) for v in x] if np.isfinite(inverse) else [0] * 32
        blocks += struct.pack("<e32b", float(d), *codes)
    return blocks


def as_blocks(codes: np.ndarray, scales: np.ndarray) -> bytes:
    pairs = zip(codes.reshape(-1, 32), scales.reshape(-1), strict=True)
    return b"".join(d.tobytes() + q.tobytes() for q, d in pairs)


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])),
        elements=st.floats(-8e6, 8e6, width=32) | st.floats(-1, 1, width=32),
    )
)
def test_int8_has_the_bits_of_q8_0(w: np.ndarray) -> None:
    """Subnormal and vanishing scales too. Of a group below 2^-121 ggml's codes are undefined."""
    codes, scales = INT8.encode(w)
    assert scales is not None and (codes.dtype, scales.dtype) == (np.int8, np.float16)
    assert as_blocks(codes, scales) == b"".join(quantize_row_q8_0_ref(row) for row in w)


def test_int8_has_the_bits_of_the_gguf_package() -> None:
    quants = pytest.importorskip("gguf.quants")
    rng = np.random.default_rng(4)
    w = rng.standard_normal((40, 256)) * 2.0 ** rng.integers(-30, 20, (40, 256))
    w[0], w[1, :64] = 0, np.arange(64) - 31.5  # ties
    codes, scales = INT8.encode(w.astype(np.float32))
    assert scales is not None
    blocks = quants.Q8_0.quantize(w.astype(np.float32))
    assert as_blocks(codes, scales) == blocks.tobytes()
    assert np.array_equal(INT8.dequantize(codes, scales), quants.Q8_0.dequantize(blocks))


@given(matrices)
def test_int8_is_off_by_half_a_step_and_the_rounding_of_the_scale(w: np.ndarray) -> None:
    """Of scales that are normal fp16: d rounds by at most 2^-11, a code times 127 of them."""
    w = np.where(np.abs(w) > 127 * 65504, 1, w).astype(np.float32)
    largest = np.abs(w).reshape(len(w), -1, 32).max(axis=-1, keepdims=True)
    d = np.maximum(largest, 127 * 2.0**-14) / 127
    error = np.abs(INT8.dequantize(*INT8.encode(w)) - w.astype(np.float64))
    assert (error.reshape(len(w), -1, 32) <= d * (0.5 + 127 * 2.0**-11 + 2.0**-14)).all()


def test_int8_refuses_what_fp16_scales_do_not_reach() -> None:
    w = np.zeros((2, 32), np.float32)
    w[1, 3] = 127 * 65504
    codes, scales = INT8.encode(w)
    assert scales is not None and scales.max() == 65504 and codes[1, 3] == 127
    w[1, 3] = -9e6
    with pytest.raises(ValueError, match=r"magnitude 9e\+06, beyond .* of INT8 .*BF16"):
        INT8.encode(w)


def test_every_int8_code_with_every_fp16() -> None:
    d = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert np.array_equal(FP16.invalid(d), ~np.isfinite(d))
    d = d[np.isfinite(d)]
    for code in (-128, -127, -1, 0, 1, 127):
        values = INT8.dequantize(np.full((len(d), 32), code, np.int8), d[:, None])
        assert np.array_equal(values, np.repeat(code * d[:, None].astype(np.float64), 32, 1))


QUANTIZED = pytest.mark.parametrize("fmt", [MXFP4, INT8], ids=lambda fmt: fmt.name)


@QUANTIZED
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_a_format_cannot_hold_is_refused(fmt: WeightFormat, value: float) -> None:
    w = np.zeros((2, 64), np.float32)
    w[1, 40] = value
    with pytest.raises(ValueError, match=f"NaN or infinite, which {fmt.name} cannot hold"):
        fmt.encode(w)


@QUANTIZED
def test_a_broken_group_is_refused(fmt: WeightFormat) -> None:
    with pytest.raises(ValueError, match=f"multiple of {fmt.name}'s group of 32"):
        fmt.encode(np.zeros((2, 48), np.float32))


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
@given(data=st.data())
def test_sizes_agree_with_what_encode_returns(fmt: WeightFormat, data: st.DataObject) -> None:
    N, K = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([32, 64, 160]))
    codes, scales = fmt.encode(np.ones((N, K), np.float32))
    assert codes.shape == fmt.code_shape(N, K)
    assert codes.dtype == fmt.code_dtype
    assert (None if scales is None else scales.shape) == fmt.scale_shape(N, K)
    assert fmt.nbytes(N, K) == codes.nbytes + (0 if scales is None else scales.nbytes)
    rounding = 2.0**-11 if fmt is INT8 else 0.0  # of a scale of 1 / 127 to fp16
    assert (np.abs(fmt.dequantize(codes, scales) - 1) <= rounding).all()
    assert K % fmt.k_multiple == 0


def test_bf16_encode_is_the_rounding_of_ml_dtypes() -> None:
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    codes, scales = BF16.encode(w)
    assert scales is None
    assert np.array_equal(codes, w.astype(ml_dtypes.bfloat16).view(np.uint16))


def test_a_format_is_named_in_any_case() -> None:
    assert format_named("mxfp4") is MXFP4
    with pytest.raises(ValueError, match=f"unknown method 'FP3': .* {', '.join(sorted(METHODS))}$"):
        format_named("FP3")
