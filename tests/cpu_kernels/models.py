"""Bit-exact NumPy models of the instructions that tiers use, after Intel's SDM, volume 2, and Arm's
Architecture Reference Manual, chapter C7.

They share nothing with the IR bodies in `emulation`: NumPy's own integers, and for the fused
multiply-add float64 with rounding to odd (Boldo and Melquiond, "Emulation of FMA and correctly
rounded sums", IEEE TC 57, 2008), which makes the second rounding harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def vpshufb(table: Array, index: Array) -> Array:
    """uint8 [16 n], uint8 [16 n]"""
    lanes, picks = table.reshape(-1, 16), index.reshape(-1, 16)
    found = np.take_along_axis(lanes, (picks % 16).astype(np.int64), axis=1)
    return np.where(picks >= 128, 0, found).astype(np.uint8).reshape(-1)


def vpermb(table: Array, index: Array) -> Array:
    """uint8 [64], uint8 [64]"""
    return table[index % 64]


def vpermi2b(first: Array, index: Array, second: Array) -> Array:
    """uint8 [64] each"""
    return np.concatenate([first, second])[index % 128]


def vscalefps(a: Array, b: Array, _kept: Array) -> Array:
    """float32 [n] each; the third is what lanes that a mask leaves out would keep. A NaN stays one,
    but a quiet one times 2^-inf is 0, times 2^inf infinite; 0 * 2^inf and inf * 2^-inf are NaN."""
    with np.errstate(all="ignore"):
        whole = np.floor(b.astype(np.float64))
        power = np.exp2(whole.clip(-600, 600))  # a float32 times 2^600 is infinite, 2^-600 zero
        power = np.where(np.isinf(whole), np.where(whole > 0, np.inf, 0), power)
        scaled = (a.astype(np.float64) * power).astype(np.float32)
        quiet = np.isnan(a) & (a.view(np.uint32) & 0x400000 != 0)
        return np.where(quiet & np.isinf(b), power, scaled).astype(np.float32)


def vpmaddubsw(a: Array, b: Array) -> Array:
    """uint8 [n], uint8 [n] (read as int8) -> int16 [n / 2]"""
    products = a.astype(np.int64) * b.view(np.int8).astype(np.int64)
    return products.reshape(-1, 2).sum(axis=1).clip(-(2**15), 2**15 - 1).astype(np.int16)


def vpmaddwd(a: Array, b: Array) -> Array:
    """int16 [n], int16 [n] -> int32 [n / 2]"""
    sums = (a.astype(np.int64) * b.astype(np.int64)).reshape(-1, 2).sum(axis=1)
    return (sums % 2**32).astype(np.uint32).view(np.int32)


def vpdpbusd(accumulator: Array, a: Array, b: Array) -> Array:
    """int32 [n], int32 [n] (four unsigned bytes each), int32 [n] (four signed) -> int32 [n]"""
    products = a.view(np.uint8).astype(np.int64) * b.view(np.int8).astype(np.int64)
    sums = accumulator.astype(np.int64) + products.reshape(-1, 4).sum(axis=1)
    return (sums % 2**32).astype(np.uint32).view(np.int32)


def tbl(table: Array, index: Array) -> Array:
    """uint8 [16], uint8 [16]"""
    return np.where(index < 16, table[index % 16], 0).astype(np.uint8)


def addp(a: Array, b: Array) -> Array:
    """int16 [n], int16 [n] -> int16 [n]"""
    sums = np.concatenate([a, b]).astype(np.int64).reshape(-1, 2).sum(axis=1)
    return (sums % 2**16).astype(np.uint16).view(np.int16)


def saddlp(a: Array) -> Array:
    """int16 [n] -> int32 [n / 2]"""
    return a.astype(np.int32).reshape(-1, 2).sum(axis=1, dtype=np.int32)


def sdot(accumulator: Array, a: Array, b: Array) -> Array:
    """int32 [n], uint8 [4 n], uint8 [4 n] (both read as int8) -> int32 [n]"""
    products = a.view(np.int8).astype(np.int64) * b.view(np.int8).astype(np.int64)
    sums = accumulator.astype(np.int64) + products.reshape(-1, 4).sum(axis=1)
    return (sums % 2**32).astype(np.uint32).view(np.int32)


def flush(x: Array) -> Array:
    """Subnormals become zeros of their sign."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x).astype(np.float32)


def _sum_to_odd(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c in float64, rounded to odd, where a * b is exact in float64."""
    with np.errstate(all="ignore"):
        p, c64 = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
        s = p + c64
        back = s - c64
        error = (c64 - (s - back)) + (p - back)
        bits = s.view(np.int64)
        inexact = np.isfinite(s) & (error != 0) & (bits % 2 == 0)
        away = (error > 0) == (s > 0)
        return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c in one rounding to nearest even, where a * b is exact in float64."""
    with np.errstate(all="ignore"):
        return _sum_to_odd(a, b, c).astype(np.float32)


def fma_flushed(a: Array, b: Array, c: Array) -> Array:
    """`fma`, whose tiny results are zeros of their sign. A result is tiny if it is below the least
    normal number once it is rounded to 24 bits as if exponents had no end: x86 detects tininess
    after rounding. 2^-126 - 2^-150 is, though as a float32 it would round to 2^-126."""
    odd = _sum_to_odd(a, b, c)
    with np.errstate(all="ignore"):
        rounded = odd.astype(np.float32)
        tiny = np.abs((odd * 2.0**64).astype(np.float32)) < np.float32(2.0 ** (64 - 126))
    return np.where(tiny, np.copysign(np.float32(0), rounded), rounded).astype(np.float32)


def bf16_pairs(pair: Array) -> tuple[Array, Array]:
    """int32 [n] -> float32 (even, odd), the bf16 of the lower and of the upper half."""
    wide = (pair.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide[0::2], wide[1::2]


def vdpbf16ps(accumulator: Array, w: Array, x: Array) -> Array:
    """float32 [n], int32 [n], int32 [n] (two bf16 each) -> float32 [n]; the upper half first"""
    total = flush(accumulator)
    for a, b in zip(reversed(bf16_pairs(w)), reversed(bf16_pairs(x)), strict=True):
        total = fma_flushed(flush(a), flush(b), total)
    return total


def pair_dot_fused(accumulator: Array, w: Array, x: Array) -> Array:
    """The same sums by two ordinary fused multiply-adds (VFMADD), which keep subnormals."""
    (w0, w1), (x0, x1) = bf16_pairs(w), bf16_pairs(x)
    return fma(w0, x0, fma(w1, x1, accumulator))


MODELS: Mapping[str, Callable[..., Array]] = {
    "vpshufb": vpshufb,
    "vpermb": vpermb,
    "vpermi2b": vpermi2b,
    "vscalefps": vscalefps,
    "vpmaddubsw": vpmaddubsw,
    "vpmaddwd": vpmaddwd,
    "vpdpbusd": vpdpbusd,
    "tbl": tbl,
    "addp": addp,
    "saddlp": saddlp,
    "sdot": sdot,
    "vdpbf16ps": vdpbf16ps,
}
"""Mnemonic -> model."""
