"""Integer codes with scales: INT8 (ggml's Q8_0), and 4-bit and 8-bit integers of other kinds.

One row of the table is one way to store them: bits, inputs that share a scale, type of the scale,
zero points. Which checkpoints store them so is the business of `formats.table.METHODS`.

Sources: ggml's Q8_0 (`block_q8_0` in ggml-common.h, `quantize_row_q8_0_ref` in ggml-quants.c);
compressed-tensors' `pack-quantized`; AutoGPTQ's and AutoAWQ's packing; kt-kernel's AMXInt4/8.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from hybrid_moe.formats.mx import groups_of
from hybrid_moe.formats.numbers import (
    BF16_SCALE,
    F32,
    F64,
    FP16,
    FP32,
    Array,
    ScaleType,
    f32_to_bf16,
)
from hybrid_moe.formats.weight_format import (
    INT8_CODE,
    CodeType,
    Plane,
    Planes,
    WeightFormat,
    code_plane,
    no_encoder,
    pack_bits,
    unpack_bits,
)

INT8_MOST = 127
"""Largest code: codes are symmetric. -128 is no code that the encoder makes, but is decoded."""
ROW = 0
"""As a group: all inputs of a row."""
INT4_OFFSET = 8
"""A nibble n is the code n - 8, as compressed-tensors and GPTQ store it."""
INT4_CODE = CodeType("int4", 4, values=tuple(range(-8, 8)))


def _encode_int8(w: F32) -> tuple[Array, Array | None]:
    """ggml's Q8_0, bit for bit: d = max / 127 in float32, codes round(x * (1 / d)) with ties away
    from zero, and d stored as fp16.

    Maxima below about 127 * 2^-25 have a d of zero in fp16, so their group becomes zeros; those of
    about 127 * 2^-14 have fewer bits in d. Where 1 / d is infinite too (max below 2^-121), ggml's
    codes are undefined, and these are 0.
    """
    groups, maxima = groups_of(w, "INT8", 32)
    steps = maxima / np.float32(INT8_MOST)
    with np.errstate(over="ignore", divide="ignore"):
        scales = steps.astype(np.float16)
        inverse = np.float32(1) / steps
    if not np.isfinite(scales).all():
        raise ValueError(
            f"a weight has magnitude {maxima.max():.4g}, beyond what fp16 scales of INT8 reach "
            f'(127 * 65504 = 8.3e6): keep such a matrix in "BF16"'
        )
    inverse[np.isinf(inverse)] = 0
    scaled = groups * inverse[..., None]
    magnitudes = np.abs(scaled)
    whole = np.floor(magnitudes)
    whole += magnitudes - whole >= np.float32(0.5)
    codes = np.copysign(whole, scaled, out=whole).astype(np.int8)
    return codes.reshape(w.shape), scales


def _rounded_scales(steps: F32, scale: ScaleType, name: str) -> Array:
    """Steps as scales of that type, to nearest even.

    Raises:
        ValueError: one is beyond what the type reaches.
    """
    with np.errstate(over="ignore"):
        stored: Array = f32_to_bf16(steps) if scale is BF16_SCALE else steps.astype(scale.dtype)
    if scale.invalid(stored).any():
        raise ValueError(f"a weight is beyond what {scale.name} scales of {name} reach")
    return stored


def _symmetric(w: F32, name: str, group: int, scale: ScaleType, most: int) -> tuple[Array, Array]:
    """Codes [N, K] of -most..most as int64, with the scale that is stored: d = max / most rounded
    to the scale's type, codes rint(w / d)."""
    groups, maxima = groups_of(w, name, group or w.shape[1])
    stored = _rounded_scales(maxima / np.float32(most), scale, name)
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = groups / scale.decode(stored)[..., None]
    codes = np.rint(np.nan_to_num(scaled, posinf=most, neginf=-most))  # a step of 0 after rounding
    return np.clip(codes, -most, most).astype(np.int64).reshape(w.shape), stored


def _zero_points(plane: Array, groups: int) -> Array:
    """The plane of zeros, two nibbles a byte -> [N, groups]."""
    return unpack_bits(plane, 4)[:, :groups]


@cache
def int4_format(group: int, scale: ScaleType, zeros: int | None = None) -> WeightFormat:
    """4-bit integers.

    Args:
        group: inputs that share a scale; ROW: all of a row.
        scale: type of the scales.
        zeros: None: weight = (n - 8) * s for nibble n. Else there are zero points, a nibble z for
            each scale, two in a byte, the even group in the low one: weight = (n - z - zeros) * s.
            GPTQ's first format has zeros = 1, AWQ and GPTQ's second have 0.
    """
    name = f"INT4_{f'G{group}' if group else 'ROW'}_{scale.name.upper()}"
    name += "" if zeros is None else f"_Z{zeros}"

    def encode(w: F32) -> tuple[Array, Array | None]:
        codes, scales = _symmetric(w, name, group, scale, 7)
        return pack_bits((codes + INT4_OFFSET).astype(np.uint8), 4), scales

    def factors(planes: Planes) -> tuple[F64, F64 | None]:
        s = scale.decode(planes["scales"]).astype(np.float64)
        zero = _zero_points(planes["minima"], s.shape[1]).astype(np.int64) + (zeros or 0)
        return s, -s * (zero - INT4_OFFSET)

    zero_plane = Plane("minima", np.dtype(np.uint8), 2 * group)
    return WeightFormat(
        name=name,
        code=INT4_CODE,
        code_plane=code_plane(INT4_CODE),
        group=group,
        scale=scale,
        scale_plane=Plane("scales", scale.dtype, group),
        more=() if zeros is None else (zero_plane,),
        scaling=f"{scale.name}{'' if zeros is None else f', zero + {zeros}'}",
        factors=None if zeros is None else factors,
        encode=no_encoder(name, "its symmetric sibling is made instead")
        if zeros is not None
        else encode,
        multiple=max(32, group),
    )


def _encode_int8_row(w: F32) -> tuple[Array, Array | None]:
    codes, scales = _symmetric(w, "INT8_ROW_FLOAT32", ROW, FP32, INT8_MOST)
    return codes.astype(np.int8), scales


INT8 = WeightFormat(
    name="INT8",
    code=INT8_CODE,
    code_plane=code_plane(INT8_CODE, np.int8),
    group=32,
    scale=FP16,
    scale_plane=Plane("scales", FP16.dtype, 32),
    more=(),
    scaling="fp16",
    factors=None,
    encode=_encode_int8,
)

INT8_ROW = WeightFormat(
    name="INT8_ROW_FLOAT32",
    code=INT8_CODE,
    code_plane=code_plane(INT8_CODE, np.int8),
    group=ROW,
    scale=FP32,
    scale_plane=Plane("scales", FP32.dtype, 0),
    more=(),
    scaling="float32",
    factors=None,
    encode=_encode_int8_row,
)
INT4_ROW = int4_format(ROW, FP32)

RAW_INT4 = tuple(int4_format(group, BF16_SCALE) for group in (32, 64, 128))
GPTQ_SYMMETRIC = tuple(int4_format(group, FP16) for group in (32, 64, 128, 256, ROW))
GPTQ_FIRST = tuple(int4_format(group, FP16, zeros=1) for group in (32, 64, 128, 256, ROW))
ZERO_POINTS = tuple(int4_format(group, FP16, zeros=0) for group in (32, 64, 128, 256, ROW))
"""AWQ's, and those of GPTQ's second format."""
