"""Integer codes with scales: INT8 (ggml's Q8_0), and 4-bit and 8-bit integers of other kinds.

One row of the table is one way to store them: bits, inputs that share a scale, type of the scale,
zero points. Which checkpoints store them so is the business of `formats.table.METHODS`.

Sources: ggml's Q8_0 (`block_q8_0` in ggml-common.h, `quantize_row_q8_0_ref` in ggml-quants.c);
compressed-tensors' `pack-quantized`; AutoGPTQ's and AutoAWQ's packing; kt-kernel's AMXInt4/8.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np

from hybrid_moe.formats.mx import groups_of, sum_of_squares
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
INT4_STEPS = (7.0, 7.5, 8.0, 8.5, 9.0, 9.5, 10.0)
"""By which the largest magnitude of a group is divided: the steps that the encoder tries."""
INT4_ROW_STEPS = (7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 16.0, 18.0)
"""The same of rows, whose largest weight lies farther out."""


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


def _in_steps(groups: F32, steps: F32, low: int, high: int) -> tuple[F32, F32]:
    """Groups [N, n, size] in steps [N, n]: codes, and what each weight is off by, both float32."""
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = groups / steps[..., None]
    # a step of 0 after rounding
    scaled = np.nan_to_num(scaled, copy=False, posinf=high, neginf=low)
    whole = np.clip(np.rint(scaled), low, high)
    return whole, scaled - whole


def _encode_int8_rows(w: F32, name: str) -> tuple[Array, Array]:
    """d = max / 127 of each row, codes rint(w / d)."""
    groups, maxima = groups_of(w, name, w.shape[1])
    stored = _rounded_scales(maxima / np.float32(INT8_MOST), FP32, name)
    codes, _ = _in_steps(groups, stored, -INT8_MOST, INT8_MOST)
    return codes.astype(np.int8).reshape(w.shape), stored


def int4_steps(w: F32, fmt: WeightFormat) -> tuple[F32, Array]:
    """Groups [N, n, size], and the scales [tried, N, n] that the encoder of `fmt` tries, the widest
    first.

    Raises:
        ValueError: as `WeightFormat.encode`.
    """
    assert fmt.scale is not None
    groups, maxima = groups_of(w, fmt.name, fmt.group or w.shape[1])
    divisors = INT4_STEPS if fmt.group else INT4_ROW_STEPS
    tried = [_rounded_scales(maxima / np.float32(d), fmt.scale, fmt.name) for d in divisors]
    return groups, np.stack(tried)


def _encode_int4(w: F32, fmt: WeightFormat) -> tuple[Array, Array]:
    """Nibbles n of codes n - 8. For each group the step of `INT4_STEPS` whose squared error is the
    least, of equal ones the widest.

    The step at which nothing saturates, max / 7, is too wide for most groups: their largest weight
    is an outlier among them. Measured on normal weights, the relative error falls from 0.097 to
    0.087 with groups of 32, from 0.117 to 0.102 with 128, from 0.157 to 0.109 with rows of 4096.
    """
    assert fmt.scale is not None
    groups, tried = int4_steps(w, fmt)
    steps = fmt.scale.decode(tried)
    best = tried[0]
    codes, error = _in_steps(groups, steps[0], -8, 7)
    least = sum_of_squares(error)
    for stored, step in zip(tried[1:], steps[1:], strict=True):
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = step / steps[0]
        narrower, error = _in_steps(groups, step, -8, 7)
        squares = sum_of_squares(error) * (ratio * ratio)  # in units of the widest step
        better = squares < least
        best = np.where(better, stored, best)
        codes = np.where(better[..., None], narrower, codes)
        least = np.where(better, squares, least)
    nibbles = (codes + np.float32(INT4_OFFSET)).astype(np.uint8).reshape(w.shape)
    return pack_bits(nibbles, 4), best


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
        return _encode_int4(w, fmt)

    def factors(planes: Planes) -> tuple[F64, F64 | None]:
        s = scale.decode(planes["scales"]).astype(np.float64)
        zero = _zero_points(planes["minima"], s.shape[1]).astype(np.int64) + (zeros or 0)
        return s, -s * (zero - INT4_OFFSET)

    zero_plane = Plane("minima", np.dtype(np.uint8), 2 * group)
    fmt = WeightFormat(
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
    return fmt


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
    encode=lambda w: _encode_int8_rows(w, "INT8_ROW_FLOAT32"),
)
INT4_ROW = int4_format(ROW, FP32)
INT8_SLICE = replace(
    INT8_ROW,
    name="INT8_G128_FLOAT32",
    group=128,
    scale_plane=Plane("scales", FP32.dtype, 128),
    encode=no_encoder("INT8_G128_FLOAT32", "INT8 is made instead"),
    multiple=128,
)
INT4_SLICE = int4_format(128, FP32)
"""Rows that kt-kernel has cut for NUMA nodes have a scale for each part, which is whole groups."""

RAW_INT4 = tuple(int4_format(group, BF16_SCALE) for group in (32, 64, 128))
GPTQ_SYMMETRIC = tuple(int4_format(group, FP16) for group in (32, 64, 128, 256, ROW))
GPTQ_FIRST = tuple(int4_format(group, FP16, zeros=1) for group in (32, 64, 128, 256, ROW))
ZERO_POINTS = tuple(int4_format(group, FP16, zeros=0) for group in (32, 64, 128, 256, ROW))
"""AWQ's, and those of GPTQ's second format."""
