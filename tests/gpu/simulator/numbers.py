"""Register types as NumPy types, and the roundings that NumPy lacks: to bf16 and fp8, and the
single rounding of a fused multiply-add."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

UNSIGNED = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}
TYPES: dict[str, Any] = {
    "pred": np.dtype(bool),
    "bf16": UNSIGNED[2],  # bits: its arithmetic is below
    **{f"{kind}x2": UNSIGNED[size] for kind, size in {"bf16": 4, "f16": 4, "e4m3": 2}.items()},
    **{f"f{n}": np.dtype(f"f{n // 8}") for n in (16, 32, 64)},
    **{f"{kind}{n}": np.dtype(f"u{n // 8}") for kind in "bu" for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
}
"""PTX type -> dtype of the arrays that hold it, one element a lane."""

POISON = 0x7FFF7FFF7FFF7FFF
"""What nobody wrote: NaN as f32 and as bf16 pairs, out of any bounds as an index."""


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(x: Array) -> Array:
    """float32 -> bf16 bits, to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_e4m3(bits: Array) -> Array:
    return np.asarray(bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))


def to_e4m3(x: Array) -> Array:
    """float32 -> e4m3 bits, to nearest even; beyond ±448 saturates, NaN stays."""
    finite = np.clip(x, np.float32(-448), np.float32(448))
    return np.asarray(finite.astype(ml_dtypes.float8_e4m3fn).view(np.uint8))


def flush(x: Array) -> Array:
    """`.ftz`: subnormals become zeros of their sign."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x) if tiny.any() else x


def _odd(value: Array, rest: Array, bits: Any) -> Array:
    """`value`, with an odd last bit where `value + rest` is the exact result and rest is not 0
    (round to odd): rounding it again, to fewer bits, then is rounding the exact result."""
    word, one = value.view(bits), bits.type(1)
    even = (rest != 0) & (word & one == 0) & np.isfinite(value) & (value != 0)
    away = (rest > 0) == (value > 0)
    return np.where(even, np.where(away, word + one, word - one), word).view(value.dtype)


def fma64(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of floats of at most 24 bits, in float64 rounded to odd: the product is exact, the
    error of the sum is what Knuth's two-sum says."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    moved = total - product
    rest = (product - (total - moved)) + (addend - moved)
    return _odd(total, rest, UNSIGNED[8]) if rest.any() else total


def fma32(a: Array, b: Array, c: Array) -> Array:
    """float32 a*b + c with one rounding. The plain float64 sum rounds as well wherever it is not
    right between two float32 (nor among float32's subnormals), which is nearly always."""
    total = np.asarray(a.astype(np.float64) * b + c)
    between = total.view(np.uint64) & np.uint64(0x1FFFFFFF) == np.uint64(0x10000000)
    if between.any() or (np.abs(total) < 2.0**-126).any():
        total = fma64(a, b, c)
    return np.asarray(total.astype(np.float32))


def fma_of_bf16(a: Array, b: Array, c: Array) -> Array:
    """a*b + c of bf16 values, as float32 that `to_bf16` rounds like the exact result. A product of
    8-bit significands is exact in float32 unless it is tiny; the float32 sum rounds to bf16 as the
    exact one does unless it is right between two bf16."""
    total = np.asarray(a * b + c)
    between = (total.view(np.uint32) & np.uint32(0xFFFF)) == np.uint32(0x8000)
    if between.any() or ((np.abs(total) < np.float32(2.0**-100)) & (total != c)).any():
        exact = fma64(a, b, c)
        total = exact.astype(np.float32)
        total = _odd(total, exact - total, UNSIGNED[4])
    return total
