"""Which weight format a pair of stored dtypes means, as a table.

One format is stored under several dtypes: MXFP4 codes are int8 in DeepSeek-V4, uint8 in gpt-oss and
F4 in newer files; ue8m0 scales are F8_E8M0 or plain bytes. INT8 is what `convert` writes: nobody
else publishes int8 codes with fp16 scales for groups of 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.numbers import F32, Array, bf16_to_f32, f32_to_bf16
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat

_CHUNK = 1 << 16
"""Weights that are quantized at a time, so that temporaries stay in the cache."""


@dataclass(frozen=True)
class Stored:
    """One way in which a checkpoint stores weights.

    Attributes:
        format: the format in which they are handed on.
        dtypes: safetensors dtypes of the codes.
        scales: safetensors dtypes of the scales; empty where there are none.
        exact: codes are handed on as they are; else they are rounded to `format`.
    """

    format: WeightFormat
    dtypes: tuple[str, ...]
    scales: tuple[str, ...] = ()
    exact: bool = True


STORED: tuple[Stored, ...] = (
    Stored(MXFP4, ("U8", "I8", "F4"), ("F8_E8M0", "U8")),
    Stored(INT8, ("I8",), ("F16",)),
    Stored(BF16, ("BF16",)),
    Stored(BF16, ("F32", "F16"), exact=False),
)


def stored_as(dtype: str, scale: str | None) -> Stored | None:
    """The row for codes of `dtype` with scales of dtype `scale` (None: no scales), if any."""
    for row in STORED:
        if dtype in row.dtypes and (scale in row.scales if scale else not row.scales):
            return row
    return None


def describe_dtypes(dtype: str, scale: str | None) -> str:
    """The pair in words, for messages."""
    return f"{dtype} with {scale} scales" if scale else f"{dtype} without scales"


def known_dtypes() -> str:
    """Every pair of the table in words, for messages."""
    return "; ".join(
        f"{row.format.name}: {'/'.join(row.dtypes)}"
        + (f" with {'/'.join(row.scales)} scales" if row.scales else "")
        for row in STORED
    )


def to_float32(raw: Array) -> F32:
    """A raw BF16 (uint16), F16 or F32 array -> float32, exact."""
    return bf16_to_f32(raw) if raw.dtype == np.uint16 else raw.astype(np.float32, copy=False)


def encode(fmt: WeightFormat, raw: Array) -> tuple[Array, Array | None]:
    """Encode a raw BF16, F16 or F32 matrix [N, K] of any strides; see `WeightFormat.encode`.

    Rows are encoded a few at a time: the float32 copy and the temporaries of a whole matrix would
    be many times its size.
    """
    N, K = raw.shape
    codes = np.empty(fmt.code_shape(N, K), fmt.code_dtype)
    scale_shape = fmt.scale_shape(N, K)
    scales = (
        None if fmt.scale is None or scale_shape is None else np.empty(scale_shape, fmt.scale.dtype)
    )
    rows = max(1, _CHUNK // max(1, K))
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        part_codes, part_scales = fmt.encode(to_float32(raw[part]))
        codes[part] = part_codes
        if scales is not None:
            scales[part] = part_scales
    return codes, scales


def round_to_bf16(raw: Array) -> Array:
    """A raw BF16, F16 or F32 array of any strides -> BF16 bits, contiguous along its last axis."""
    if raw.dtype == np.uint16:
        return raw
    return f32_to_bf16(np.ascontiguousarray(raw, np.float32))
