"""Encoding of activations: what the dot kernels read, one row per token.

BF16 weights take the activations as they are: bf16 pairs, K * 2 bytes. So do E4M3 weights, but a
pair is inputs 0 and 2, or 1 and 3, of four: the even and the odd bytes of a word of codes.

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

With 8-bit activations, where a user prefers speed, q = round(x * (127 / m)) for a group's largest
magnitude m. It fits one plane, and the factor is m / 127, halved as above, no power of two. A group
is 48 or 64 bytes, `Fixed8Group` or `SummedFixed8Group`.

A row is [group]. A tile is several tokens that a kernel multiplies by the same weights, stored as
[group][token]: one stream for any number of tokens, and the inputs of a group never compete for
one set of the first-level cache, as rows 4096 bytes apart would.

A group that holds NaN or infinity has factor and exponent NaN; the row's result is then NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace

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


class Fixed8Group(Record):
    """A group of 32 inputs in 8 bits, with what `Fixed15Group` has for one plane."""

    low = i8[GROUP]
    factor = f32
    low_bias = i32
    more = i32[2]


class SummedFixed8Group(Record):
    """The same with room for more biases and sums."""

    low = i8[GROUP]
    factor = f32
    low_bias = i32
    more = i32[6]


FIXED15_GROUP = Fixed15Group.offsets()
SUMMED_GROUP = SummedGroup.offsets()
FIXED8_GROUP = Fixed8Group.offsets()
SUMMED_FIXED8_GROUP = SummedFixed8Group.offsets()
LEAST_MAXIMUM = 0x0D800000
"""2^-100, as bits: a smaller maximum of a group counts as so much in 8 bits, which keeps 127 / m
finite."""
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


def _maximum(emit: Emit, x: Val) -> tuple[Val, Val]:
    """(bits of the largest magnitude of float32 lanes, whether all of them are finite)."""
    magnitude = emit.reduce("umax", x.bits(I32) & 0x7FFFFFFF)
    return magnitude, (magnitude >> 23) < 255


def _nan(emit: Emit) -> Val:
    return emit.splat(0x7FC00000, I32).bits(F32)


def _rounded(x: Val) -> Val:
    """float32 within -2^22..2^22 -> int32, to nearest even."""
    return (x + ROUND).bits(I32) - ROUND_BITS


def _fixed15(emit: Emit, x: Val, halved: int) -> tuple[Val, Val, Val]:
    """32 float32 that hold bf16 values -> (int32 q, factor, its exponent). The factor is the step
    of q times 2^-halved."""
    magnitude, is_finite = _maximum(emit, x)
    biased = magnitude >> 23
    biased = (biased < 1).select(emit.splat(1, I32), biased)  # zeros and subnormals: e = -126
    shift = -biased + 140  # 13 - e
    half = shift.sar(1)  # 2^shift may exceed float32's range, its two halves do not
    q = (x * _power_of_two(half)) * _power_of_two(shift - half)
    step = -shift - halved
    half = step.sar(1)
    power = _power_of_two(half) * _power_of_two(step - half)
    factor, exponent = (is_finite.select(value, _nan(emit)) for value in (power, step.to_float()))
    return _rounded(q), factor, exponent


def _fixed8(emit: Emit, x: Val, halved: int) -> tuple[Val, Val]:
    """The same in 8 bits: (int32 q within -127..127, factor)."""
    magnitude, is_finite = _maximum(emit, x)
    least = emit.splat(LEAST_MAXIMUM, I32)
    largest = (magnitude < least).select(least, magnitude).bits(F32)
    most = emit.splat(127.0, F32)
    factor = is_finite.select(largest / most * 2.0**-halved, _nan(emit))
    return _rounded(x * (most / largest)), factor


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
        bits: of activations: 16, which are kept in 15 bits, or 8.
    """

    wide: bool
    code_bits: int
    halved: bool
    offset: int
    halves: int = 1
    sums: str = ""
    bits: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.offset <= (WIDE_OFFSET if self.wide else BYTE_DOT_OFFSET):
            raise ValueError(f"weights plus {self.offset} are not what the dot product takes")

    @property
    def at(self) -> SimpleNamespace:
        """Byte offsets of a group's fields, but for biases and sums."""
        return FIXED8_GROUP if self.bits == 8 else FIXED15_GROUP

    @cached_property
    def places(self) -> tuple[Places, ...]:
        """Of the biases and sums of each half, or of all inputs."""
        at, room = self.at, self._room
        words = [at.low_bias, *range(room.more, room.nbytes, 4)]
        free = iter(words if self.bits == 8 else [at.high_bias, *words])
        biased = self.offset > 0
        has = (biased and not self.wide and self.bits == 16, biased, bool(self.sums))
        return tuple(
            Places(*(next(free) if wanted else None for wanted in has)) for _ in range(self.halves)
        )

    @property
    def _room(self) -> SimpleNamespace:
        """Of a group with all the words that any format needs."""
        return SUMMED_FIXED8_GROUP if self.bits == 8 else SUMMED_GROUP

    @cached_property
    def group_bytes(self) -> int:
        """Bytes of an encoded group."""
        used = [w for p in self.places for w in (p.high_bias, p.low_bias, p.sum) if w is not None]
        fits = max(used, default=0) < self.at.nbytes
        return int(self.at.nbytes if fits else self._room.nbytes)

    @property
    def planes(self) -> tuple[str, ...]:
        """Fields with the bytes of q, the more significant ones first."""
        return ("low",) if self.bits == 8 else ("high", "low")

    @property
    def is_power(self) -> bool:
        """Whether factors are powers of two, whose exponents a group has too."""
        return self.bits == 16

    def store(self, emit: Emit, x: Val, to: Val) -> None:
        """Encode 32 float32 that hold bf16 values into the group at address `to`."""
        at = self.at
        if self.bits == 8:
            q, factor = _fixed8(emit, x, int(self.halved))
        else:
            q, factor, exponent = _fixed15(emit, x, int(self.halved))
            emit.store(to + at.exponent, exponent, align=4)
        emit.store(to + at.factor, factor, align=4)
        q = q.shuffle(quads(self.code_bits).ravel().tolist())
        if self.wide and self.bits == 16:
            emit.store(to + at.high, emit.op("wide_split", q), align=16)
        else:
            for plane, name in zip(self._split(q), self.planes, strict=True):
                emit.store(to + getattr(at, name), plane.trunc(I8), align=16)
        for place, part in zip(self.places, pieces(q, self.halves), strict=True):
            if place.low_bias is not None:
                for offset, bias in self._biases(emit, part, place):
                    emit.store(to + offset, bias, align=4)
            if place.sum is not None:
                total = emit.reduce("add", part).to_float()
                value = total * factor if self.sums == "scaled" else total
                emit.store(to + place.sum, value, align=4)

    def _split(self, q: Val) -> tuple[Val, ...]:
        """q by planes."""
        return (q,) if self.bits == 8 else split_planes(q)

    def _biases(self, emit: Emit, q: Val, place: Places) -> Iterator[tuple[int, Val]]:
        """(place, accumulator to start from), of each plane, or of all in one."""
        if self.wide:
            assert place.low_bias is not None
            yield place.low_bias, emit.reduce("add", q) * -self.offset
            return
        offsets = [offset for offset in (place.high_bias, place.low_bias) if offset is not None]
        for offset, plane in zip(offsets, self._split(q), strict=True):
            yield offset, emit.op("byte_dot_bias", plane.trunc(I8), self.offset)


def _store_bf16(emit: Emit, x: Val, to: Val) -> None:
    emit.store(to, (x.bits(I32) >> 16).trunc(I16), align=32)


_BYTE_PAIRS_ORDER = [four + i for four in range(0, GROUP, 4) for i in (0, 2, 1, 3)]


def _store_byte_pairs(emit: Emit, x: Val, to: Val) -> None:
    _store_bf16(emit, x.shuffle(_BYTE_PAIRS_ORDER), to)


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
BF16_PAIRS = Encoding(2 * GROUP, _store_bf16)
BYTE_PAIRS = Encoding(2 * GROUP, _store_byte_pairs)

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


def _vectors_of(nbytes: int) -> Iterator[tuple[int, int]]:
    """(offset, size) of vectors of 64, 32 and 16 bytes that make up so many."""
    offset = 0
    for size in (64, 32, 16):
        while nbytes - offset >= size:
            yield offset, size
            offset += size


def gather(encoding: Encoding) -> KernelBody:
    """Kernel (rows, count, out, groups): the encoded rows at addresses rows (int64 [count]) -> one
    tile [group][token] at `out`."""
    nbytes = encoding.group_bytes

    def body(emit: Emit, rows: Val, count: Val, out: Val, groups: Val) -> None:
        with emit.loop(0, count) as token:
            row = emit.load(rows + token * 8, I64, align=8)
            with emit.loop(0, groups) as group:
                at, to = row + group * nbytes, out + (group * count + token) * nbytes
                for offset, size in _vectors_of(nbytes):
                    value = emit.load(at + offset, I32, size // 4, 16)
                    emit.store(to + offset, value, align=16)

    return body
