"""Block formats of ggml, their bits rearranged: every bit of a block is kept, none is added.

A GGUF file interleaves the inputs of a block (the low nibbles of Q4_K's byte i are one sub-block,
the high ones the next). Here codes are in the order of inputs, low bits first, as in every other
format; their upper bits lie in the plane `high` (`weight_format.pack_high` says how), and
sub-scales of six bits in words, so that all formats are read by the same kernels. Q4_0 is
`INT4_G32_FP16`, Q8_0 is `INT8`, and MXFP4 is MXFP4.

Six-bit numbers a0..an lie in words of their lower four bits, then words of their upper two.

Source: `ggml-common.h` (the blocks) and `ggml-quants.c` (`dequantize_row_*`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hybrid_moe.formats.numbers import F64, FP16, Array, ScaleType
from hybrid_moe.formats.weight_format import (
    CodeType,
    Plane,
    Planes,
    WeightFormat,
    code_plane,
    high_plane,
    no_encoder,
    unpack_bits,
)

SUPER = 256
"""Inputs of a superblock."""
IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""`kvalues_iq4nl`."""

IQ4_CODE = CodeType("iq4", 4, values=IQ4_VALUES)
UINT4_CODE = CodeType("uint4", 4, values=tuple(range(16)))
UINT5_CODE = CodeType("uint5", 4, values=tuple(range(32)), high_bits=1)
INT5_CODE = CodeType("int5", 4, values=tuple(range(-16, 16)), high_bits=1)
INT6_CODE = CodeType("int6", 4, values=tuple(range(-32, 32)), high_bits=2)
UINT2_CODE = CodeType("uint2", 2, values=tuple(range(4)))
INT3_CODE = CodeType("int3", 2, values=tuple(range(-4, 4)), high_bits=1)


def _never(stored: Array) -> np.ndarray:
    """Of words in which every bit pattern is a number."""
    return np.zeros(stored.shape, np.bool_)


def _words(name: str, dtype: type) -> ScaleType:
    return ScaleType(name, np.dtype(dtype), lambda s: s.astype(np.float32), _never)


SIX_BITS = _words("6-bit", np.uint32)
SIX_BITS_16 = _words("6-bit (16-bit words)", np.uint16)
NIBBLES = _words("4-bit pair", np.uint8)
SIGNED_BYTES = _words("int8", np.int8)


def _halves(plane: Array) -> F64:
    return plane.astype(np.float64)


def _six_bits(words: Array, count: int) -> Array:
    """Words of one superblock, integers [..., 3 n] -> the `count` numbers in them: n words of lower
    bits for each word of upper ones, or 2 n."""
    low_words = 4 * count // (8 * words.itemsize)
    low = unpack_bits(words[..., :low_words], 4)
    high = unpack_bits(words[..., low_words:], 2)
    numbers: Array = (low | (high << np.uint8(4))).astype(np.int64)
    return numbers


def _by_superblock(plane: Array, count: int) -> Any:
    """[N, n * count] -> [N, n, count]."""
    grouped: Any = plane.reshape(len(plane), -1, count)
    return grouped


def _min_32(planes: Planes) -> tuple[F64, F64 | None]:
    return _halves(planes["scales"]), _halves(planes["minima"])


def _k_min(planes: Planes) -> tuple[F64, F64 | None]:
    """Q4_K, Q5_K: eight scales and eight minima of six bits; d and dmin."""
    words = _by_superblock(planes["scales"], 3)
    # the last word has, for each of eight, the upper bits of the scale, then those of the minimum
    upper = unpack_bits(words[..., 2:], 2).astype(np.int64)
    s = unpack_bits(words[..., :1], 4) | (upper[..., 0::2] << 4)
    m = unpack_bits(words[..., 1:2], 4) | (upper[..., 1::2] << 4)
    d = _by_superblock(_halves(planes["factors"]), 2)
    return (d[..., :1] * s).reshape(len(s), -1), (-d[..., 1:] * m).reshape(len(s), -1)


def _nibble_min(planes: Planes) -> tuple[F64, F64 | None]:
    """Q2_K: sixteen bytes, scale in the low nibble and minimum in the high one; d and dmin."""
    pairs = _by_superblock(planes["scales"], 16)
    d = _by_superblock(_halves(planes["factors"]), 2)
    s, m = d[..., :1] * (pairs & 15), -d[..., 1:] * (pairs >> 4)
    return s.reshape(len(s), -1), m.reshape(len(s), -1)


def _six_bit_scales(count: int, words: int) -> Callable[[Planes], tuple[F64, F64 | None]]:
    """Q3_K, IQ4_XS: `count` scales of six bits, less 32; d."""

    def factors(planes: Planes) -> tuple[F64, F64 | None]:
        s = _six_bits(_by_superblock(planes["scales"], words), count) - 32
        d = _by_superblock(_halves(planes["factors"]), 1)
        return np.asarray(d * s, np.float64).reshape(len(s), -1), None

    return factors


def _byte_scales(planes: Planes) -> tuple[F64, F64 | None]:
    """Q6_K: sixteen signed bytes; d."""
    s = _by_superblock(planes["scales"], 16).astype(np.int64)
    d = _by_superblock(_halves(planes["factors"]), 1)
    return (d * s).reshape(len(s), -1), None


def _row(
    name: str,
    code: CodeType,
    group: int,
    scale: ScaleType,
    scales: tuple[int, int],
    scaling: str,
    factors: Callable[[Planes], tuple[F64, F64 | None]] | None,
    *more: Plane,
) -> WeightFormat:
    high = (high_plane(code),) if code.high_bits else ()
    return WeightFormat(
        name=name,
        code=code,
        code_plane=code_plane(code),
        group=group,
        scale=scale,
        scale_plane=Plane("scales", scale.dtype, *scales),
        more=(*high, *more),
        scaling=scaling,
        factors=factors,
        encode=no_encoder(name, "llama.cpp makes such files"),
        multiple=max(32, scales[0]),
    )


_F16 = np.dtype(np.float16)
_MIN = Plane("minima", _F16, 32)
_D = Plane("factors", _F16, SUPER)
_D_DMIN = Plane("factors", _F16, SUPER, 2)

Q4_1 = _row("Q4_1", UINT4_CODE, 32, FP16, (32, 1), "fp16, min", _min_32, _MIN)
Q5_0 = _row("Q5_0", INT5_CODE, 32, FP16, (32, 1), "fp16", None)
Q5_1 = _row("Q5_1", UINT5_CODE, 32, FP16, (32, 1), "fp16, min", _min_32, _MIN)
Q2_K = _row("Q2_K", UINT2_CODE, 16, NIBBLES, (SUPER, 16), "q2_k", _nibble_min, _D_DMIN)
Q3_K = _row("Q3_K", INT3_CODE, 16, SIX_BITS, (SUPER, 3), "q3_k", _six_bit_scales(16, 3), _D)
Q4_K = _row("Q4_K", UINT4_CODE, 32, SIX_BITS, (SUPER, 3), "q4_k", _k_min, _D_DMIN)
Q5_K = _row("Q5_K", UINT5_CODE, 32, SIX_BITS, (SUPER, 3), "q4_k", _k_min, _D_DMIN)
Q6_K = _row("Q6_K", INT6_CODE, 16, SIGNED_BYTES, (SUPER, 16), "q6_k", _byte_scales, _D)
IQ4_NL = _row("IQ4_NL", IQ4_CODE, 32, FP16, (32, 1), "fp16", None)
IQ4_XS = _row("IQ4_XS", IQ4_CODE, 32, SIX_BITS_16, (SUPER, 3), "iq4_xs", _six_bit_scales(8, 3), _D)

GGML: tuple[WeightFormat, ...] = (Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS)
