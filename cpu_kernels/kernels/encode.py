"""Encoding of activations: what the dot kernels read, one row per token.

BF16 weights take the activations as they are: bf16 pairs, K * 2 bytes.

MXFP4 takes 15-bit fixed point. E2M1 codes doubled are integers, so with integer activations the
sum over a group of 32 is exact and every ISA computes the same bits. For a group with maximum
magnitude in [2^e, 2^(e+1)), q = round(x * 2^(13 - e)); a bf16 within 2^-6 of the maximum is exact
(8 significant bits), a smaller one is off by at most 2^(e-14), and |q| <= 16320 = 255/128 * 2^13.
q is split into two signed bytes, q = 256 * high + low. Per group of 32, 80 bytes:

    planes[group]: high[32], low[32]           meta[group]: factor f32, bias high, bias low, -

in the order planes of all groups, then meta of all groups. factor = 2^(e - 14): the step of q,
halved because the weights are doubled. The biases undo the offset 12 that makes the weights
unsigned. Within each 8 inputs the order is 0 2 4 6 1 3 5 7: the low nibbles of a 32-bit word of
codes hold the even inputs, the high nibbles the odd ones.

A group that holds NaN or infinity has factor NaN; the row's result is then NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, KernelBody, Val
from hybrid_moe.formats.strips import GROUP, LINE

PLANE_BYTES = 64
META_BYTES = 16
_QUAD_ORDER = [8 * octet + i for octet in range(4) for i in (0, 2, 4, 6, 1, 3, 5, 7)]
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
_ROUND_BITS = 0x4B400000


def load_bf16(emit: Emit, address: Val, lanes: int) -> Val:
    """bf16 in memory as float32."""
    return (emit.load(address, I16, lanes).zext(I32) << 16).bits(F32)


def to_bf16(x: Val) -> Val:
    """float32 -> bf16 bits as 16-bit lanes, round to nearest even, NaN stays NaN."""
    bits = x.bits(I32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return (is_nan.select(bits | 0x400000, rounded) >> 16).trunc(I16)


def _power_of_two(exponent: Val) -> Val:
    """2^exponent as a scalar float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).bits(F32)


def encode_fixed15_group(emit: Emit, x: Val, planes: Val, meta: Val) -> None:
    """Encode 32 float32 that hold bf16 values."""
    magnitude = emit.reduce("umax", x.bits(I32) & 0x7FFFFFFF)
    biased = magnitude >> 23
    is_finite = biased < 255
    biased = (biased < 1).select(emit.splat(1, I32), biased)
    shift = -biased + 140  # 13 - e
    half = shift.sar(1)  # 2^shift may exceed float32's range, its two halves do not
    q = (x * _power_of_two(half)) * _power_of_two(shift - half)
    q = (q + _ROUND).bits(I32) - _ROUND_BITS
    low = ((q + 128) & 255) - 128
    high = (q - low).sar(8)
    for index, plane in enumerate((high, low)):
        lanes = plane.trunc(I8).shuffle(_QUAD_ORDER)
        emit.store(planes + 32 * index, lanes, align=32)
        emit.store(meta + (4 + 4 * index), emit.op("byte_dot_bias", lanes), align=4)
    step = -shift - 1
    half = step.sar(1)
    factor = _power_of_two(half) * _power_of_two(step - half)
    nan = emit.splat(0x7FC00000, I32).bits(F32)
    emit.store(meta, is_finite.select(factor, nan), align=4)


def _store_fixed15(emit: Emit, x: Val, row: Val, group: Val, groups: Val) -> None:
    planes = row + group * PLANE_BYTES
    meta = row + groups * PLANE_BYTES + group * META_BYTES
    encode_fixed15_group(emit, x, planes, meta)


def _store_bf16(emit: Emit, x: Val, row: Val, group: Val, groups: Val) -> None:
    emit.store(row + group * (2 * GROUP), (x.bits(I32) >> 16).trunc(I16), align=32)


@dataclass(frozen=True)
class Encoding:
    """How dot kernels want their activations.

    Attributes:
        group_bytes: bytes of 32 encoded inputs.
        store: emits the encoding of 32 float32 that hold bf16 values, as (emit, x, row, group,
            groups): group `group` of the row at address `row` that has `groups` of them.
    """

    group_bytes: int
    store: Callable[[Emit, Val, Val, Val, Val], None]

    def row_bytes(self, groups: int) -> int:
        """Bytes of one encoded row: whole cache lines, 9 more than a multiple of 16 of them.

        A tile reads the same group of up to 12 rows at once. Were rows a power of two apart (64
        lines for 4096 inputs as bf16), all of these would fall into one of the 64 sets of a first
        level cache with 8 or 12 ways. 9 lines modulo 16 are odd, so 64 neighbouring rows fall into
        64 different sets. BF16, 1024 tokens: a fifth faster on Zen 5, a quarter on Zen 4.
        """
        lines = -(-groups * self.group_bytes // LINE)
        return (lines + (9 - lines) % 16) * LINE


FIXED15 = Encoding(PLANE_BYTES + META_BYTES, _store_fixed15)
BF16_PAIRS = Encoding(2 * GROUP, _store_bf16)


def encode_rows(encoding: Encoding) -> KernelBody:
    """Kernel (x, x_stride, rows, row_stride, count, groups): bf16 rows -> encoded rows."""

    def body(
        emit: Emit, x: Val, x_stride: Val, rows: Val, row_stride: Val, count: Val, groups: Val
    ) -> None:
        with emit.loop(0, count) as token:
            source, row = x + token * x_stride, rows + token * row_stride
            with emit.loop(0, groups) as group:
                values = load_bf16(emit, source + group * (2 * GROUP), GROUP)
                encoding.store(emit, values, row, group, groups)

    return body
