"""E4M3 codes with float32 scales, for blocks of 128 x 128 weights or for rows: FP8.

Sources: DeepSeek-V3's `weight_scale_inv` (inference/kernel.py, `weight_dequant`); GLM-4.7-FP8's
`weight_scale` [N, 1]. The last block of a matrix may be short in both directions.
"""

from __future__ import annotations

import numpy as np

from hybrid_moe.formats.mx import groups_of
from hybrid_moe.formats.numbers import E4M3_MOST, F32, FP32, Array, f32_to_e4m3
from hybrid_moe.formats.weight_format import E4M3_CODE, Plane, WeightFormat, code_plane

BLOCK = 128
"""Rows, and inputs, that share a scale."""


def _codes(w: F32, scales: F32) -> Array:
    """Codes of weights with the scale of each, [N, K] both."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = np.nan_to_num(w / scales)  # 0 / 0 where all are zero
    return f32_to_e4m3(np.clip(scaled, -E4M3_MOST, E4M3_MOST).astype(np.float32))


def _steps(maxima: F32) -> F32:
    """Scales by which the largest magnitude becomes 448; 1 where all weights are zero."""
    steps: F32 = maxima / np.float32(E4M3_MOST)
    return np.where(steps > 0, steps, np.float32(1))


def _encode_fp8(w: F32) -> tuple[Array, Array | None]:
    N, K = w.shape
    padded = np.zeros((-(-N // BLOCK) * BLOCK, -(-K // BLOCK) * BLOCK), np.float32)
    padded[:N, :K] = w
    _, maxima = groups_of(padded, "FP8", BLOCK)
    scales = _steps(maxima.reshape(-1, BLOCK, maxima.shape[1]).max(axis=1))
    wide = scales.repeat(BLOCK, 0)[:N].repeat(BLOCK, 1)[:, :K]
    return _codes(w, wide), scales


def _encode_fp8_rows(w: F32) -> tuple[Array, Array | None]:
    _, maxima = groups_of(w, "FP8_PERCHANNEL", w.shape[1])
    scales = _steps(maxima)
    return _codes(w, scales), scales


FP8 = WeightFormat(
    name="FP8",
    code=E4M3_CODE,
    code_plane=code_plane(E4M3_CODE),
    group=BLOCK,
    scale=FP32,
    scale_plane=Plane("scales", FP32.dtype, BLOCK, rows=BLOCK),
    more=(),
    scaling="float32 block",
    factors=None,
    encode=_encode_fp8,
)

FP8_PERCHANNEL = WeightFormat(
    name="FP8_PERCHANNEL",
    code=E4M3_CODE,
    code_plane=code_plane(E4M3_CODE),
    group=0,
    scale=FP32,
    scale_plane=Plane("scales", FP32.dtype, 0),
    more=(),
    scaling="float32",
    factors=None,
    encode=_encode_fp8_rows,
)
