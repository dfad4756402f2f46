"""Ops whose lowering differs between tiers: what each one means.

Every op has one meaning in NumPy, exact or with a stated bound, and a default lowering in generic
LLVM vectors that any processor can run. A tier replaces a lowering by its own instructions and
keeps the meaning. Lanes: a panel has 16 output rows, so 32-bit values come in vectors of 16 and
bytes in vectors of 64 (four inputs of each row). Ops on whole blocks are in `tiles`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, Val
from hybrid_moe.formats.table import Array

Lowering = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """An operation of the vector language.

    Attributes:
        name: what kernels call it.
        meaning: the operation on NumPy arrays, the specification and the tests' oracle.
        lower: generic lowering, called as lower(emit, *operands).
        exact: the lowering of every tier gives the bits of `meaning`.
    """

    name: str
    meaning: Callable[..., Array]
    lower: Lowering
    exact: bool = True


# lookup16(table, index): table is 16 Python integers, index is 64 bytes below 16


def _lookup16_meaning(table: tuple[int, ...], index: Array) -> Array:
    return np.asarray(table, np.uint8)[index]


def _lookup16(emit: Emit, table: tuple[int, ...], index: Val) -> Val:
    """A tree of selects over the bits of the index: 15 of them, constants at the leaves."""
    level = [emit.splat(value, I8, index.lanes) for value in table]
    for bit in range(4):
        odd = (index & (1 << bit)).equals(1 << bit)
        level = [odd.select(level[2 * i + 1], level[2 * i]) for i in range(len(level) // 2)]
    return level[0]


# lookup_low4(table, index): table as above, index is 64 bytes of which the lower four bits count


def _lookup_low4_meaning(table: tuple[int, ...], index: Array) -> Array:
    return _lookup16_meaning(table, index & 15)


def _lookup_low4(emit: Emit, table: tuple[int, ...], index: Val) -> Val:
    return emit.op("lookup16", table, (index.bits(I32) & 0x0F0F0F0F).bits(I8))


# byte_dot: exact integer dot products of unsigned by signed bytes, four per 32-bit lane.
# An accumulator is 16 lanes of 32 bits in a representation that is the tier's own; it starts at
# zero or at a bias and is read by byte_dot_total. The contract that lets a tier keep 16-bit halves:
# at most 8 byte_dots, weights in 0..24 whose offset 12 the bias takes back, |x| <= 128, so that
# each half's true sum is at most 8 * 2 * 12 * 128 = 24576 in magnitude.

BYTE_DOT_OFFSET = 12


def _byte_dot_meaning(accumulator: Array, w: Array, x: Array) -> Array:
    """accumulator int64 [16], w uint8 [64], x int8 [4] -> accumulator + w[4r + i] * x[i]."""
    return accumulator + w.reshape(16, 4).astype(np.int64) @ x.astype(np.int64)


def _byte_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    w32, x32 = w.bits(I32), emit.broadcast(x, 16)
    for i in range(4):
        accumulator = accumulator + ((w32 >> (8 * i)) & 255) * (x32 << (24 - 8 * i)).sar(24)
    return accumulator


def _byte_dot_bias_meaning(x: Array) -> Array:
    """x int8 [32] -> what takes the weights' offset back over these 32 inputs."""
    return np.asarray(-BYTE_DOT_OFFSET * x.astype(np.int64).sum())


def _byte_dot_bias(emit: Emit, x: Val) -> Val:
    return emit.reduce("add", x.sext(I32)) * -BYTE_DOT_OFFSET


def _byte_dot_total_meaning(high: Array, low: Array) -> Array:
    return 256 * high + low


def _byte_dot_total(emit: Emit, high: Val, low: Val) -> Val:
    return (high << 8) + low


# pair_dot(accumulator, w, x): accumulator float32 [16]; w and x hold two bf16 in 32 bits. The odd
# (upper) product is added first, each sum rounded to nearest even: the order of VDPBF16PS. The
# products are exact in float32 while they are normal, so fused and unfused additions agree.


def _pair_dot_meaning(accumulator: Array, w: Array, x: Array) -> Array:
    """float32 [16], uint16 [16, 2], uint16 [2] -> float32 [16]."""
    wide = w.astype(np.uint32) << np.uint32(16)
    wf, xf = wide.view(np.float32), (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    with np.errstate(all="ignore"):
        total: Array = (accumulator + wf[:, 1] * xf[1]) + wf[:, 0] * xf[0]
    return total


def unpack_pair(pair: Val) -> tuple[Val, Val]:
    """(even, odd) bf16 of each 32-bit lane as float32."""
    return (pair << 16).bits(F32), (pair & -65536).bits(F32)


def _pair_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    w_even, w_odd = unpack_pair(w)
    x_even, x_odd = unpack_pair(emit.broadcast(x, 16))
    return (accumulator + w_odd * x_odd) + w_even * x_even


# times_power(value, factor, exponent): value * factor in one rounding. The factor is 2^exponent,
# and a NaN if the exponent is one: both are given, and a tier reads the one that its instruction
# takes. Equal bits on all tiers but for the sign of a NaN.


def _times_power_meaning(value: Array, factor: Array, exponent: Array) -> Array:
    """float32 each -> float32; `exponent` holds whole numbers."""
    with np.errstate(all="ignore"):
        product: Array = value * factor
    return product


def _times_power(emit: Emit, value: Val, factor: Val, exponent: Val) -> Val:
    return value * factor


OPS: Mapping[str, Op] = MappingProxyType(
    {
        op.name: op
        for op in (
            Op("lookup16", _lookup16_meaning, _lookup16),
            Op("lookup_low4", _lookup_low4_meaning, _lookup_low4),
            Op("byte_dot", _byte_dot_meaning, _byte_dot),
            Op("byte_dot_bias", _byte_dot_bias_meaning, _byte_dot_bias),
            Op("byte_dot_total", _byte_dot_total_meaning, _byte_dot_total),
            Op("pair_dot", _pair_dot_meaning, _pair_dot, exact=False),
            Op("times_power", _times_power_meaning, _times_power),
        )
    }
)


def fused(emit: Emit, a: Val, b: Val, c: Val) -> Val:
    """a * b + c in one rounding, for lowerings of tiers that have the instruction."""
    kind = a.ir.type
    name = f"llvm.fma.v{a.lanes}f32"
    return emit.intrinsic(name, kind, a, b, c)
