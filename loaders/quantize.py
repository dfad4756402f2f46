"""Weights of 16 bits, and of FP8, quantized while they are loaded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hybrid_moe.formats.numbers import F32, Array, bf16_to_f32, f32_to_bf16
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import WeightFormat

_CHUNK = 1 << 16
"""Weights that are quantized at a time, so that temporaries stay in the cache."""
COMPILED_FROM = 1 << 20
"""Weights of a matrix that is worth compiled loops: they take seconds to compile, once, and a
model has thousands of such matrices. Smaller ones are quantized by NumPy, to the same bits."""


def to_float32(raw: Array) -> F32:
    """A raw BF16 (uint16), F16 or F32 array -> float32, exact."""
    return bf16_to_f32(raw) if raw.dtype == np.uint16 else raw.astype(np.float32, copy=False)


def encode(fmt: WeightFormat, raw: Array) -> tuple[Array, Array | None]:
    """Encode a raw BF16, F16 or F32 matrix [N, K] of any strides; see `WeightFormat.encode`."""
    N, K = raw.shape
    return encode_rows(fmt, N, K, lambda rows: to_float32(raw[rows]))


def encode_rows(
    fmt: WeightFormat, N: int, K: int, read: Callable[[slice], F32], step: int = 1
) -> tuple[Array, Array | None]:
    """Encode a matrix of N rows of K inputs.

    Rows are encoded a few at a time: the float32 copy and the temporaries of a whole matrix would
    be many times its size.

    Args:
        read: some rows as float32.
        step: `read` takes multiples of so many rows, and what is left.

    Returns:
        Codes and scales.
    """
    codes = np.empty(fmt.code_shape(N, K), fmt.code_dtype)
    scale_shape = fmt.scale_shape(N, K)
    scales = (
        None if fmt.scale is None or scale_shape is None else np.empty(scale_shape, fmt.scale.dtype)
    )
    quantize = _encoder(fmt, N * K)
    step = max(step, fmt.scale_rows)  # whose multiple the other one is
    rows = max(1, _CHUNK // max(1, K) // step) * step
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        part_codes, part_scales = quantize(read(part))
        codes[part] = part_codes
        if scales is not None:
            first = start // fmt.scale_rows
            assert part_scales is not None
            scales[first : first + len(part_scales)] = part_scales
    return codes, scales


def _encoder(fmt: WeightFormat, weights: int) -> Callable[[F32], tuple[Array, Array | None]]:
    """What quantizes a matrix of so many weights."""
    if weights >= COMPILED_FROM and fmt.scale is not None:
        from hybrid_moe.loaders.quantize_loops import ENCODERS

        return ENCODERS.get(fmt.name, fmt.encode)
    return fmt.encode


def requantize(
    fmt: WeightFormat, matrix: Matrix, stored: WeightFormat
) -> tuple[Array, Array | None]:
    """Encode a matrix of another format, dequantized a few rows at a time."""

    def read(rows: slice) -> F32:
        return matrix.rows(rows).dequantize(stored)

    planes = matrix.planes
    N, K = len(planes["codes"]), planes["codes"].shape[1] * _per_element(stored)
    return encode_rows(fmt, N, K, read, stored.scale_rows)


def _per_element(fmt: WeightFormat) -> int:
    return 8 * fmt.code_dtype.itemsize // fmt.bits


def round_to_bf16(raw: Array) -> Array:
    """A raw BF16, F16 or F32 array of any strides -> BF16 bits, contiguous along its last axis."""
    if raw.dtype == np.uint16:
        return raw
    return f32_to_bf16(np.ascontiguousarray(raw, np.float32))
