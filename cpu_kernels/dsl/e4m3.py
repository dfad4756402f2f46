"""The op `e4m3_pairs`: E4M3 codes become pairs of bf16, exactly.

    e4m3_pairs(codes)    codes are 64 bytes, four inputs of each of 16 rows. Lanes 0..15 of the
                         result are pairs of inputs 0 and 2 of each row (0 in the lower half), lanes
                         16..31 of inputs 1 and 3.

Even and odd bytes of a word are spread to 16 bits without leaving it. A NaN has the bits 0x7FF0 and
its sign. For a magnitude m, the code without its sign, bf16 is

    m >= 8    (m << 4) + (120 << 7)    the exponent's bias is 127 instead of 7
    m < 8     m * 2^-9                 subnormal as E4M3, not as bf16

so its upper byte is 60 + (m >> 4) and its lower byte m << 4. Magnitudes below 8 are looked up.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, Val
from hybrid_moe.formats.numbers import E4M3_VALUES, Array

_NAN = 0x7FF0
_NAN_CODE = 0x7F


def _bf16_bits(codes: Array) -> Array:
    """uint8 -> uint16, same shape."""
    values = E4M3_VALUES[codes]
    signs = (codes & 0x80).astype(np.uint16) << np.uint16(8)
    upper = values.view(np.uint32) >> np.uint32(16)
    bits: Array = np.where(np.isnan(values), signs | _NAN, upper).astype(np.uint16)
    return bits


def meaning(codes: Array) -> Array:
    """uint8 [64] -> uint16 [2, 16, 2]."""
    bits = _bf16_bits(codes).reshape(16, 4)
    return np.stack([bits[:, 0::2], bits[:, 1::2]])


def generic(emit: Emit, codes: Val) -> Val:
    """Exponent and mantissa in the places of a float32's are 2^-120 of the value, the subnormal
    ones too."""
    words = codes.bits(I32)
    floats = []
    for i in range(4):
        magnitude = (words >> (8 * i)) & 0x7F
        value = ((magnitude << 20).bits(F32) * 2.0**120).bits(I32)
        value = magnitude.equals(_NAN_CODE).select(_NAN << 16, value)
        floats.append(value | ((words << (24 - 8 * i)) & -(1 << 31)))
    even, odd = ((floats[i] >> 16) | floats[i + 2] for i in range(2))
    return even.concat(odd)


def _byte_table(first: int, count: int, shift: int) -> tuple[int, ...]:
    """Upper (shift 8) or lower (0) bytes of the bf16 of `count` codes."""
    bits = _bf16_bits(np.arange(first, first + count, dtype=np.uint8))
    return tuple(int(b) >> shift & 0xFF for b in bits)


UPPER, LOWER = (_byte_table(0, 128, shift) for shift in (8, 0))
"""Bytes of the bf16 of each magnitude."""

_FIRST_UPPER = UPPER[:16]
_UPPER_BY_NIBBLE = (0, *(UPPER[16 * n] for n in range(1, 8)), *(0,) * 8)
_FIRST_LOWER = tuple(low - (m << 4) & 0xFF for m, low in enumerate(LOWER[:16]))
"""Of magnitudes below 16; the lower byte less m << 4."""


def spread(upper: Val, lower: Val, codes: Val) -> Val:
    """Bytes of the bf16 of each magnitude, and the codes with their signs -> the pairs."""
    high = (upper.bits(I32) | (codes.bits(I32) & -0x7F7F7F80)).bits(I16)
    low = lower.bits(I16)
    even, odd = (low & 0xFF) | (high << 8), (low >> 8) | (high & -0x100)
    return even.bits(I32).concat(odd.bits(I32))


def by_nibbles(
    codes: Val, find: Callable[[tuple[int, ...], Val], Val], bounded: Callable[[Val], Val]
) -> Val:
    """With lookups among 16 bytes.

    Args:
        find: (table, index) -> table[index] for an index below 16.
        bounded: m -> an index that finds table[m] for m < 16 and 0 for other m < 128.
    """
    words = codes.bits(I32)
    m = (words & 0x7F7F7F7F).bits(I8)
    first = bounded(m)
    upper = find(_UPPER_BY_NIBBLE, ((words >> 4) & 0x07070707).bits(I8)) | find(_FIRST_UPPER, first)
    upper = m.equals(_NAN_CODE).select(_NAN >> 8, upper)
    lower = ((words << 4) & -0x0F0F0F10).bits(I8) + find(_FIRST_LOWER, first)
    return spread(upper, lower, codes)
