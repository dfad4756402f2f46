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
from llvmlite import ir

from hybrid_moe.cpu_kernels.dsl import e4m3
from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, Val, vector
from hybrid_moe.formats.numbers import Array

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
# at most 8 byte_dots, |x| <= 128, and weights in 0..24 that are -12..12 once the bias has taken
# their offset back, or 0..15 without one. Then each half's true sum is at most 8 * 2 * 15 * 128 =
# 30720 in magnitude.

BYTE_DOT_OFFSET = 12
"""The largest offset."""


def _byte_dot_meaning(accumulator: Array, w: Array, x: Array) -> Array:
    """accumulator int64 [16], w uint8 [64], x int8 [4] -> accumulator + w[4r + i] * x[i]."""
    return accumulator + w.reshape(16, 4).astype(np.int64) @ x.astype(np.int64)


def _byte_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    w32, x32 = w.bits(I32), emit.broadcast(x, 16)
    for i in range(4):
        accumulator = accumulator + ((w32 >> (8 * i)) & 255) * (x32 << (24 - 8 * i)).sar(24)
    return accumulator


def _byte_dot_bias_meaning(x: Array, offset: int) -> Array:
    """x int8 [32] or [16] -> what takes the weights' offset back over these inputs."""
    return np.asarray(-offset * x.astype(np.int64).sum())


def _byte_dot_bias(emit: Emit, x: Val, offset: int) -> Val:
    return emit.reduce("add", x.sext(I32)) * -offset


def _byte_dot_total_meaning(high: Array, low: Array) -> Array:
    return 256 * high + low


def _byte_dot_total(emit: Emit, high: Val, low: Val) -> Val:
    return (high << 8) + low


# wide_dot: exact integer dot products of bytes (weights -128..127) by integers of 15 bits
# (activations, |q| <= 16320), four inputs per 32-bit lane. How 32 activations lie in 64 bytes is
# the tier's own, as is the accumulator: `wide_split` arranges them, and `wide_dot` takes 32-bit
# words k and 8 + k of that for quad k. Weights come with an offset of 0 to 128 that makes them
# unsigned; `wide_weights` or `wide_lookup` prepares them for the tier's `wide_dot`, which takes
# them so, or signed. `wide_start` makes an accumulator from a bias, -offset times the sum of q, for
# tiers that keep the offset; `wide_total` reads it. A total is at most 32 * 128 * 16320 < 2^26 in
# magnitude.
#
# The generic arrangement is 16-bit words, inputs 0 and 2 of each quad in its first word, 1 and 3 in
# its second. The other one that tiers use is planes: q = 256 * high + low, high bytes first. Tiers
# with a matrix unit must use planes, since its kernels read them.

WIDE_OFFSET = 128
"""The largest offset."""


def split_planes(q: Val) -> tuple[Val, Val]:
    """q = 256 * high + low, int32 all: low in -128..127, high in -64..64 for |q| <= 16320."""
    low = ((q + 128) & 255) - 128
    return (q - low).sar(8), low


def _wide_split_meaning(q: Array) -> Array:
    """int32 [32] -> int16 [32]: by quads, inputs 0 and 2 of all, then 1 and 3 of all."""
    quads = q.reshape(8, 4)
    return np.concatenate([quads[:, 0::2].ravel(), quads[:, 1::2].ravel()]).astype(np.int16)


def _wide_split(emit: Emit, q: Val) -> Val:
    order = [4 * quad + i + half for half in (0, 1) for quad in range(8) for i in (0, 2)]
    return q.trunc(I16).shuffle(order).bits(I8)


def wide_split_planes(emit: Emit, q: Val) -> Val:
    """The arrangement for instructions that multiply bytes."""
    high, low = (plane.trunc(I8) for plane in split_planes(q))
    return high.concat(low)


def _wide_start_meaning(bias: Array) -> Array:
    return np.zeros(16, np.int64)


def _wide_start(emit: Emit, bias: Val) -> Val:
    return emit.splat(0, I32, 16)


def _wide_weights_meaning(w: Array, offset: int) -> Array:
    """uint8 [64], weights plus the offset -> int8 [64], the weights."""
    weights: Array = (w - np.uint8(offset)).view(np.int8)
    return weights


def _wide_weights(emit: Emit, w: Val, offset: int) -> Val:
    return w + -offset if offset else w


def wide_weights_unsigned(emit: Emit, w: Val, offset: int) -> Val:
    """For instructions whose weights are unsigned."""
    return w


def _wide_lookup_meaning(table: tuple[int, ...], offset: int, index: Array) -> Array:
    """table of 16 weights, index as of lookup_low4 -> int8 [64]."""
    weights: Array = np.asarray(table, np.int8)[index & 15]
    return weights


def _wide_lookup(emit: Emit, table: tuple[int, ...], offset: int, index: Val) -> Val:
    return emit.op("lookup_low4", tuple(weight & 255 for weight in table), index)


def wide_lookup_unsigned(emit: Emit, table: tuple[int, ...], offset: int, index: Val) -> Val:
    """Likewise: the offset is in the table."""
    return emit.op("lookup_low4", tuple((weight + offset) & 255 for weight in table), index)


def _wide_dot_meaning(accumulator: Array, w: Array, first: Array, second: Array) -> Array:
    """int64 [16], int8 [64], int16 [2] (inputs 0, 2), int16 [2] (1, 3) -> int64 [16]."""
    q = np.array([first[0], second[0], first[1], second[1]], np.int64)
    total: Array = accumulator + w.reshape(16, 4).astype(np.int64) @ q
    return total


def _wide_dot(emit: Emit, accumulator: Val, w: Val, first: Val, second: Val) -> Val:
    w32 = w.bits(I32)
    for i, word in enumerate((first, second)):
        x32 = emit.broadcast(word, 16)
        accumulator = accumulator + (w32 << (24 - 8 * i)).sar(24) * (x32 << 16).sar(16)
        accumulator = accumulator + (w32 << (8 - 8 * i)).sar(24) * x32.sar(16)
    return accumulator


def _wide_total_meaning(accumulator: Array) -> Array:
    return accumulator


def _wide_total(emit: Emit, accumulator: Val) -> Val:
    return accumulator


def wide_total_planes(emit: Emit, accumulator: Val) -> Val:
    """Of an accumulator that holds the sums of the high plane, then those of the low one."""
    high, low = accumulator.halves()
    return (high << 8) + low


# narrow_dot: the same of bytes: weights as `wide_weights` or `wide_lookup` prepares them, signed
# activations within -127..127, four inputs per 32-bit lane. The accumulator is 16 lanes of 32 bits;
# `narrow_start` makes one from a bias, -offset times the sum of the activations, for tiers that
# keep the offset. A total is at most 32 * 128 * 127 < 2^19 in magnitude.


def _narrow_start_meaning(bias: Array) -> Array:
    return np.zeros(16, np.int64)


def _narrow_start(emit: Emit, bias: Val) -> Val:
    return emit.splat(0, I32, 16)


def _narrow_dot_meaning(accumulator: Array, w: Array, x: Array) -> Array:
    """int64 [16], int8 [64], int8 [4] -> int64 [16]."""
    total: Array = accumulator + w.reshape(16, 4).astype(np.int64) @ x.astype(np.int64)
    return total


def _narrow_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    w32, x32 = w.bits(I32), emit.broadcast(x, 16)
    for i in range(4):
        shift = 24 - 8 * i
        accumulator = accumulator + (w32 << shift).sar(24) * (x32 << shift).sar(24)
    return accumulator


# half_to_float(x): fp16 bits in 16-bit lanes -> float32, exact


def _half_to_float_meaning(x: Array) -> Array:
    """uint16 [16] -> float32 [16]."""
    return x.view(np.float16).astype(np.float32)


def _half_to_float(emit: Emit, x: Val) -> Val:
    """An fp16's exponent and mantissa are those of a float32 2^112 times smaller, subnormal ones
    included; NaN and infinity get the exponent bits of their kind."""
    wide = x.zext(I32)
    magnitude = (wide & 0x7FFF) << 13
    value = (magnitude.bits(F32) * 2.0**112).bits(I32)
    value = (magnitude > 0x0F7FFFFF).select(magnitude | 0x7F800000, value)
    return (value | ((wide & 0x8000) << 16)).bits(F32)


def half_to_float_native(emit: Emit, x: Val) -> Val:
    """The target's own conversion: FCVTL, or VCVTPH2PS on x86. Subnormal fp16 are kept by both,
    whatever the control word says."""
    halves = emit.builder.bitcast(x.ir, ir.VectorType(ir.HalfType(), x.lanes))
    return Val(emit, emit.builder.fpext(halves, vector(F32, x.lanes)))


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
            Op("wide_split", _wide_split_meaning, _wide_split),
            Op("wide_start", _wide_start_meaning, _wide_start),
            Op("wide_weights", _wide_weights_meaning, _wide_weights),
            Op("wide_lookup", _wide_lookup_meaning, _wide_lookup),
            Op("wide_dot", _wide_dot_meaning, _wide_dot),
            Op("wide_total", _wide_total_meaning, _wide_total),
            Op("narrow_start", _narrow_start_meaning, _narrow_start),
            Op("narrow_dot", _narrow_dot_meaning, _narrow_dot),
            Op("half_to_float", _half_to_float_meaning, _half_to_float),
            Op("e4m3_pairs", e4m3.meaning, e4m3.generic),
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
