"""Stored numbers and what they mean: bf16, fp16, float32, E4M3 and E8M0, as NumPy arrays.

Sources: OCP Microscaling Formats (MX) v1.0 for E8M0; OCP 8-bit Floating Point (OFP8) v1.0 for E4M3.
The tests hold every conversion against `ml_dtypes`. This module is at the bottom of the house: it
imports nothing of the project.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]
F32: TypeAlias = npt.NDArray[np.float32]
F64: TypeAlias = npt.NDArray[np.float64]

UE8M0_NAN = 255
"""The one E8M0 byte that is no power of two. A checkpoint that holds it is refused."""
FP16_INFINITE = np.uint16(0x7C00)
"""The exponent bits of an fp16 that is NaN or infinite."""
BF16_INFINITE = np.uint16(0x7F80)
"""Likewise of a bf16."""
E4M3_MOST = 448.0
"""Largest E4M3 value."""


@dataclass(frozen=True)
class ScaleType:
    """How one stored scale becomes a factor.

    Attributes:
        name: name used in messages.
        dtype: NumPy dtype of a stored scale.
        decode: stored scales -> float32 factors, same shape.
        invalid: stored scales -> mask of those that have no finite factor.
    """

    name: str
    dtype: np.dtype[Any]
    decode: Callable[[Array], F32]
    invalid: Callable[[Array], npt.NDArray[np.bool_]]


def ue8m0_to_float(codes: Array) -> F32:
    """E8M0 bytes -> 2^(s - 127) in float32; 0 is 2^-127 (a subnormal), 255 is NaN."""
    s = codes.view(np.uint8) if codes.dtype.itemsize == 1 else codes.astype(np.uint8)
    bits = s.astype(np.uint32) << np.uint32(23)
    bits = np.where(s == 0, np.uint32(0x0040_0000), bits)
    bits = np.where(s == UE8M0_NAN, np.uint32(0x7FC0_0000), bits)
    factors: F32 = bits.view(np.float32)
    return factors


def bf16_to_f32(bits: Array) -> F32:
    """bfloat16 bit patterns (uint16) -> float32, exact."""
    values: F32 = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def f32_to_bf16(x: F32) -> npt.NDArray[np.uint16]:
    """float32 -> bfloat16 bit patterns, round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet_nan = (bits >> np.uint32(16)) | np.uint32(0x40)
    nan = np.isnan(bits.view(np.float32))
    result: npt.NDArray[np.uint16] = np.where(nan, quiet_nan, rounded).astype(np.uint16)
    return result


def _e4m3_values() -> F32:
    """Of each byte: sign, four exponent bits (bias 7), three mantissa bits; 0x7F and 0xFF are NaN,
    and there is no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(
        exponent == 0, np.ldexp(mantissa, -9), np.ldexp(8.0 + mantissa, exponent - 10)
    )
    magnitude[(code & 0x7F) == 0x7F] = np.nan
    values: F32 = np.copysign(magnitude, np.where(code & 0x80, -1.0, 1.0)).astype(np.float32)
    return values


E4M3_VALUES: F32 = _e4m3_values()
"""float32 [256]: value of each E4M3 byte."""
E4M3_VALUES.setflags(write=False)


def e4m3_to_float(codes: Array) -> F32:
    """E4M3 bytes (uint8) -> float32, exact."""
    values: F32 = E4M3_VALUES[codes]
    return values


def f32_to_e4m3(x: F32) -> npt.NDArray[np.uint8]:
    """float32 of magnitude up to 448 -> E4M3 bytes, round to nearest even; -0 stays -0.

    Magnitudes from 2^-6 on keep their exponent, 120 less, and the upper three bits of 23. Half a
    last place less one unit, and one more where the kept bits are odd, carries into them as
    rounding to even does. Below lie the multiples of 2^-9, which are their own codes.
    """
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    magnitude = bits & np.uint32(0x7FFF_FFFF)
    rounded = magnitude + np.uint32(0x7_FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))
    codes = (rounded >> np.uint32(20)) - np.uint32(120 << 3)
    small = np.rint(magnitude.view(np.float32) * np.float32(512))
    small_codes = np.minimum(small, np.float32(8)).astype(np.uint32)
    codes = np.where(magnitude < np.uint32(0x3C80_0000), small_codes, codes)
    result: npt.NDArray[np.uint8] = (codes | (bits >> np.uint32(31) << np.uint32(7))).astype(
        np.uint8
    )
    return result


UE8M0 = ScaleType("ue8m0", np.dtype(np.uint8), ue8m0_to_float, lambda s: s == UE8M0_NAN)
FP16 = ScaleType(
    "fp16",
    np.dtype(np.float16),
    lambda s: s.astype(np.float32),
    lambda s: (s.view(np.uint16) & FP16_INFINITE) == FP16_INFINITE,
)
BF16_SCALE = ScaleType(
    "bf16", np.dtype(np.uint16), bf16_to_f32, lambda s: (s & BF16_INFINITE) == BF16_INFINITE
)
FP32 = ScaleType(
    "float32", np.dtype(np.float32), lambda s: s.astype(np.float32), lambda s: ~np.isfinite(s)
)
E4M3 = ScaleType("e4m3", np.dtype(np.uint8), e4m3_to_float, lambda s: (s & 0x7F) == 0x7F)
