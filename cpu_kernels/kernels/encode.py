"""Encoding of activations: what the dot kernels read, one row per token.

BF16 weights take the activations as they are: bf16 pairs, K * 2 bytes.

MXFP4 takes 15-bit fixed point. E2M1 codes doubled are integers, so with integer activations the
sum over a group of 32 is exact and every ISA computes the same bits. For a group with maximum
magnitude in [2^e, 2^(e+1)), q = round(x * 2^(13 - e)); a bf16 within 2^-6 of the maximum is exact
(8 significant bits), a smaller one is off by at most 2^(e-14), and |q| <= 16320 = 255/128 * 2^13.
q is split into two signed bytes, q = 256 * high + low. A group of 32 is 80 bytes in one place,
`Fixed15Group`: the planes high[32] and low[32], then what turns their sums into the group's part
of the result. The factor is 2^(e - 14): the step of q, halved because the weights are doubled; it
is stored as a float32 and as its exponent, of which a tier reads one. The biases undo the offset 12
that makes the weights unsigned. Within each 8 inputs the order is 0 2 4 6 1 3 5 7: the low nibbles
of a 32-bit word of codes hold the even inputs, the high nibbles the odd ones.

INT8 takes the same integers q, since its codes are integers too. The factor is the step of q,
2^(e - 13). The 64 bytes hold q as the tier's `wide_dot` reads it, quads in the order of the inputs;
the lower bias is what undoes the offset of tiers that make the weights unsigned.

Other integer codes take one of these two ways, by the size of their codes, with q in the order in
which a kernel takes codes out of a word (`weight_format.quads`). Codes that are a range of numbers
are unsigned as they are stored: their offset is minus the least of them, and without one there are
no biases. Where weights have zero points or minima, a group also has the sum of its q, which meets
a zero point or, times the factor, a minimum; where they have sub-groups of 16 inputs, it has biases
and sums of each half. `IntegerEncoding.places` says where. Up to two words take the place of
MXFP4's biases; more of them make a group of 96 bytes, `SummedGroup`.

A row is [group]. A tile is several tokens that a kernel multiplies by the same weights, stored as
[group][token]: one stream for any number of tokens, and the inputs of a group never compete for
one set of the first-level cache, as rows 4096 bytes apart would.

A group that holds NaN or infinity has factor and exponent NaN; the row's result is then NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from hybrid_moe.cpu_kernels.dsl.emit import (
    F32,
    I8,
    I16,
    I32,
    I64,
    Emit,
    KernelBody,
    Val,
    pieces,
)
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET, WIDE_OFFSET, split_planes
from hybrid_moe.cpu_kernels.jit.record import Record, f32, i8, i32
from hybrid_moe.formats.strips import GROUP, MOST_BLOCK_TOKENS
from hybrid_moe.formats.weight_format import quads


class Fixed15Group(Record):
    """A group of 32 encoded inputs."""

    high = i8[GROUP]
    low = i8[GROUP]
    factor = f32
    high_bias = i32  # an accumulator of byte_dot to start from
    low_bias = i32
    exponent = f32  # a whole number


class SummedGroup(Record):
    """The same with room for more biases and sums."""

    high = i8[GROUP]
    low = i8[GROUP]
    factor = f32
    high_bias = i32
    low_bias = i32
    exponent = f32
    more = i32[4]


FIXED15_GROUP = Fixed15Group.offsets()
SUMMED_GROUP = SummedGroup.offsets()
ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
ROUND_BITS = 0x4B400000


def load_bf16(emit: Emit, address: Val, lanes: int) -> Val:
    """bf16 in memory as float32."""
    return (emit.load(address, I16, lanes).zext(I32) << 16).bits(F32)


def to_bf16(x: Val) -> Val:
    """float32 -> bf16 bits as 16-bit lanes, round to nearest even, NaN stays NaN."""
    bits = x.bits(I32)
    rounded = bits + (((bits >> 16) & 1) + 0x7FFF)
    is_nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return (is_nan.select(bits | 0x400000, rounded) >> 16).trunc(I16)


def through_bf16(x: Val) -> Val:
    """float32 rounded to bf16, as float32."""
    return (to_bf16(x).zext(I32) << 16).bits(F32)


def _power_of_two(exponent: Val) -> Val:
    """2^exponent as a scalar float32, for exponents of normal numbers."""
    return ((exponent + 127) << 23).bits(F32)


def _fixed15(emit: Emit, x: Val, to: Val, halved: int) -> tuple[Val, Val]:
    """32 float32 that hold bf16 values -> (int32 q, factor). Stores the factor, the step of q times
    2^-halved, and its exponent into the group at address `to`."""
    magnitude = emit.reduce("umax", x.bits(I32) & 0x7FFFFFFF)
    biased = magnitude >> 23
    is_finite = biased < 255
    biased = (biased < 1).select(emit.splat(1, I32), biased)  # zeros and subnormals: e = -126
    shift = -biased + 140  # 13 - e
    half = shift.sar(1)  # 2^shift may exceed float32's range, its two halves do not
    q = (x * _power_of_two(half)) * _power_of_two(shift - half)
    step = -shift - halved
    half = step.sar(1)
    power = _power_of_two(half) * _power_of_two(step - half)
    nan = emit.splat(0x7FC00000, I32).bits(F32)
    factor = is_finite.select(power, nan)
    emit.store(to + FIXED15_GROUP.factor, factor, align=4)
    emit.store(to + FIXED15_GROUP.exponent, is_finite.select(step.to_float(), nan), align=4)
    return (q + ROUND).bits(I32) - ROUND_BITS, factor


@dataclass(frozen=True)
class Places:
    """Offsets in an encoded group of what concerns one half of its inputs, or all; None: it has no
    such thing.

    Attributes:
        high_bias, low_bias: accumulators to start from, of the higher and of the lower plane, or
            `low_bias` alone of both.
        sum: of q.
    """

    high_bias: int | None
    low_bias: int | None
    sum: int | None


@dataclass(frozen=True)
class IntegerEncoding:
    """How activations meet weights that are integers.

    Attributes:
        wide: weights are up to whole bytes (`wide_dot`), else within -12..12 or 0..15 (`byte_dot`).
        code_bits: of a code in its word, which gives the order of inputs.
        halved: weights are doubled, so the factor is half the step of q.
        offset: what makes weights unsigned, and biases take back.
        halves: 1, or 2 where the 16 inputs of each half of a group are summed apart.
        sums: "" for none; "whole" for the sums of q; "scaled" for these times the factor.
    """

    wide: bool
    code_bits: int
    halved: bool
    offset: int
    halves: int = 1
    sums: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.offset <= (WIDE_OFFSET if self.wide else BYTE_DOT_OFFSET):
            raise ValueError(f"weights plus {self.offset} are not what the dot product takes")

    @cached_property
    def places(self) -> tuple[Places, ...]:
        """Of each half, or of all inputs."""
        at = SUMMED_GROUP
        words = iter((at.high_bias, at.low_bias, *range(at.more, at.nbytes, 4)))
        biased = self.offset > 0
        has = (biased and not self.wide, biased, bool(self.sums))
        return tuple(
            Places(*(next(words) if wanted else None for wanted in has)) for _ in range(self.halves)
        )

    @property
    def group_bytes(self) -> int:
        """Bytes of an encoded group."""
        at = [a for p in self.places for a in (p.high_bias, p.low_bias, p.sum) if a is not None]
        fits = max(at, default=0) < FIXED15_GROUP.nbytes
        return int(FIXED15_GROUP.nbytes if fits else SUMMED_GROUP.nbytes)

    def store(self, emit: Emit, x: Val, to: Val) -> None:
        """Encode 32 float32 that hold bf16 values into the group at address `to`."""
        at = FIXED15_GROUP
        q, factor = _fixed15(emit, x, to, int(self.halved))
        q = q.shuffle(quads(self.code_bits).ravel().tolist())
        if self.wide:
            emit.store(to + at.high, emit.op("wide_split", q), align=16)
        else:
            for plane, place in zip(split_planes(q), (at.high, at.low), strict=True):
                emit.store(to + place, plane.trunc(I8), align=16)
        for place, part in zip(self.places, pieces(q, self.halves), strict=True):
            if place.sum is not None:
                total = emit.reduce("add", part).to_float()
                value = total * factor if self.sums == "scaled" else total
                emit.store(to + place.sum, value, align=4)
            if place.low_bias is None:
                continue
            if place.high_bias is None:
                bias = emit.reduce("add", part) * -self.offset
                emit.store(to + place.low_bias, bias, align=4)
                continue
            high, low = (plane.trunc(I8) for plane in split_planes(part))
            for inputs, offset in ((high, place.high_bias), (low, place.low_bias)):
                emit.store(to + offset, emit.op("byte_dot_bias", inputs, self.offset), align=4)


def _store_bf16(emit: Emit, x: Val, to: Val) -> None:
    emit.store(to, (x.bits(I32) >> 16).trunc(I16), align=32)


@dataclass(frozen=True)
class Encoding:
    """How dot kernels want their activations.

    Attributes:
        group_bytes: bytes of 32 encoded inputs.
        store: emits the encoding of 32 float32 that hold bf16 values, as (emit, x, address).
    """

    group_bytes: int
    store: Callable[[Emit, Val, Val], None]

    def row_bytes(self, groups: int) -> int:
        """Bytes of one encoded row; a tile of T tokens takes T times as many."""
        return groups * self.group_bytes


def integer_encoding(how: IntegerEncoding) -> Encoding:
    """The encoding that it describes."""
    return Encoding(how.group_bytes, how.store)


FIXED15 = integer_encoding(
    IntegerEncoding(wide=False, code_bits=4, halved=True, offset=BYTE_DOT_OFFSET)
)
WIDE15 = integer_encoding(IntegerEncoding(wide=True, code_bits=8, halved=False, offset=WIDE_OFFSET))
BF16_PAIRS = Encoding(2 * GROUP, _store_bf16)

BLOCK_SLACK = (MOST_BLOCK_TOKENS - 1) * SUMMED_GROUP.nbytes
"""Bytes that must be mapped behind a tile; their content does not matter. A matrix unit loads a
group's tokens as a whole block, so for one token it also reads where 31 more would be."""


def encode_rows(encoding: Encoding) -> KernelBody:
    """Kernel (x, x_stride, rows, row_stride, count, groups, group_stride): bf16 -> encoded rows.

    x is bf16 [count][32 * groups], with x_stride bytes from row to row. Encoded rows are row_stride
    bytes apart, and the groups of one group_stride: `group_bytes` in a row of its own, and T times
    that in a tile of T tokens, where rows are `group_bytes` apart.
    """

    def body(
        emit: Emit,
        x: Val,
        x_stride: Val,
        rows: Val,
        row_stride: Val,
        count: Val,
        groups: Val,
        group_stride: Val,
    ) -> None:
        with emit.loop(0, count) as token:
            source, row = x + token * x_stride, rows + token * row_stride
            with emit.loop(0, groups) as group:
                values = load_bf16(emit, source + group * (2 * GROUP), GROUP)
                encoding.store(emit, values, row + group * group_stride)

    return body


def gather(encoding: Encoding) -> KernelBody:
    """Kernel (rows, count, out, groups): the encoded rows at addresses rows (int64 [count]) -> one
    tile [group][token] at `out`."""
    nbytes = encoding.group_bytes

    def body(emit: Emit, rows: Val, count: Val, out: Val, groups: Val) -> None:
        with emit.loop(0, count) as token:
            row = emit.load(rows + token * 8, I64, align=8)
            with emit.loop(0, groups) as group:
                at, to = row + group * nbytes, out + (group * count + token) * nbytes
                # 64 bytes are all of a BF16 group; others have 16 or 32 more
                for offset in range(0, nbytes, 64):
                    lanes = min(64, nbytes - offset) // 4
                    emit.store(to + offset, emit.load(at + offset, I32, lanes, 16), align=16)

    return body
