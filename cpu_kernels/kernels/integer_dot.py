"""Dot kernels of formats whose codes are integers (MXFP4's E2M1 too, doubled).

    small   weights within -12..12 or 0..15: `byte_dot`, one accumulator for each of two planes of
            activations, q = 256 * high + low, exact = 256 * sum(w * high) + sum(w * low)
    wide    weights of any byte: `wide_dot`, one accumulator, in whatever form the tier keeps it;
            with activations of 8 bits `narrow_dot`

8-bit activations have one plane, q = low.

Weights are made unsigned by an offset, which the biases of the encoding take back. Codes that are a
range of numbers are so as they are stored.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET, WIDE_OFFSET
from hybrid_moe.cpu_kernels.kernels.encode import IntegerEncoding
from hybrid_moe.cpu_kernels.kernels.group_dot import GroupSums, Source
from hybrid_moe.cpu_kernels.kernels.integer_codes import Decode, Weights, integer_codes
from hybrid_moe.cpu_kernels.kernels.scalings import MINIMA, ZEROS, Scale, ScaleOf, scale_of
from hybrid_moe.cpu_kernels.kernels.strip_cursor import Place, StripCursor, panel_address
from hybrid_moe.formats.strips import (
    GROUP,
    PANELS,
    STRIP_ROWS,
    StripField,
    StripLayout,
    strip_layout,
)
from hybrid_moe.formats.weight_format import WeightFormat

QUADS = 8
"""Of a group."""
_PARTS = ("factor", "exponent", "zero", "minimum")
"""Of a `Scale`, in the order in which unpacked groups have them."""


class _Planes(GroupSums):
    """An accumulator [16 rows] for each plane of a token."""

    def __init__(self, emit: Emit, x: Sequence[Val], half: int, encoding: IntegerEncoding) -> None:
        super().__init__(emit, x, half, encoding)
        at = self.place
        starts = {"high": at.high_bias, "low": at.low_bias}
        self._sums = {
            plane: [emit.broadcast(self.bias(t, starts[plane]), 16) for t in range(len(x))]
            for plane in encoding.planes
        }

    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        """Plane by plane."""
        for quad, w in weights:
            for plane, sums in self._sums.items():
                at = getattr(self.encoding.at, plane) + 4 * quad
                for t in tokens:
                    sums[t] = self.emit.op("byte_dot", sums[t], w, self.load(t, at, I32))

    def total(self, token: int) -> Val:
        *high, low = (sums[token] for sums in self._sums.values())
        return self.emit.op("byte_dot_total", *(high or [self.emit.splat(0, I32, 16)]), low)


class _Wide(GroupSums):
    """One accumulator for each token, in whatever form the tier keeps it."""

    def __init__(self, emit: Emit, x: Sequence[Val], half: int, encoding: IntegerEncoding) -> None:
        super().__init__(emit, x, half, encoding)
        biases = [self.bias(t, self.place.low_bias) for t in range(len(x))]
        self._sums = [emit.op("wide_start", bias) for bias in biases]

    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        at = self.encoding.at
        for quad, w in weights:
            for t in tokens:
                first, second = (self.load(t, plane + 4 * quad, I32) for plane in (at.high, at.low))
                self._sums[t] = self.emit.op("wide_dot", self._sums[t], w, first, second)

    def total(self, token: int) -> Val:
        return self.emit.op("wide_total", self._sums[token])


class _Narrow(GroupSums):
    """One accumulator for each token: bytes by bytes."""

    def __init__(self, emit: Emit, x: Sequence[Val], half: int, encoding: IntegerEncoding) -> None:
        super().__init__(emit, x, half, encoding)
        biases = [self.bias(t, self.place.low_bias) for t in range(len(x))]
        self._sums = [emit.op("narrow_start", bias) for bias in biases]

    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        at = self.encoding.at.low
        for quad, w in weights:
            for t in tokens:
                x = self.load(t, at + 4 * quad, I32)
                self._sums[t] = self.emit.op("narrow_dot", self._sums[t], w, x)

    def total(self, token: int) -> Val:
        return self._sums[token]


def _sums_of(encoding: IntegerEncoding) -> type[_Planes] | type[_Wide] | type[_Narrow]:
    if not encoding.wide:
        return _Planes
    return _Narrow if encoding.bits == 8 else _Wide


def strip_of(fmt: WeightFormat) -> StripLayout:
    """The layout of one block of a format, which is that of its strips but for their length."""
    K = max([GROUP, *(plane.per for plane in fmt.planes)])
    return strip_layout(fmt, -(-K // fmt.k_multiple) * fmt.k_multiple)


@lru_cache(maxsize=128)
def encoding_of(fmt: WeightFormat, activation_bits: int = 16) -> IntegerEncoding:
    """How activations are encoded for a format, with 16 or 8 bits."""
    integers = (-WIDE_OFFSET, WIDE_OFFSET - 1) if fmt.code.values is None else fmt.code.integers
    signed = min(integers) >= -BYTE_DOT_OFFSET and max(integers) <= BYTE_DOT_OFFSET
    small = signed or (min(integers) == 0 and max(integers) <= 15)
    return IntegerEncoding(
        wide=not small,
        code_bits=fmt.code.bits,
        halved=fmt.code.step == 0.5,
        offset=-min(integers),
        halves=2 if 0 < fmt.group < GROUP else 1,
        sums="whole" if fmt.scaling in ZEROS else "scaled" if fmt.scaling in MINIMA else "",
        bits=activation_bits,
    )


def _source(
    encoding: IntegerEncoding,
    layout: StripLayout,
    packed: bool,
    weights: Decode,
    scale: ScaleOf,
) -> Source:
    kind = _sums_of(encoding)

    def sums(emit: Emit, x: Sequence[Val], half: int) -> GroupSums:
        return kind(emit, x, half, encoding)

    return Source(
        layout, layout.words, packed, encoding.halves, encoding.group_bytes, weights, scale, sums
    )


@lru_cache(maxsize=128)
def packed_source(fmt: WeightFormat, activation_bits: int = 16) -> Source:
    """A format's strips as they stream from memory."""
    layout, encoding = strip_of(fmt), encoding_of(fmt, activation_bits)
    weights = integer_codes(fmt.code, layout, encoding.offset, encoding.wide)
    return _source(encoding, layout, True, weights, scale_of(fmt, layout))


def _parts(fmt: WeightFormat) -> tuple[str, ...]:
    """What a `Scale` of the format has."""
    has = {
        "factor": True,
        "exponent": fmt.scaling == "ue8m0",
        "zero": fmt.scaling in ZEROS,
        "minimum": fmt.scaling in MINIMA,
    }
    return tuple(name for name in _PARTS if has[name])


@lru_cache(maxsize=64)
def unpacked_layout(fmt: WeightFormat) -> StripLayout:
    """Groups as `unpack` leaves them: a word for each quad, then float32 parts of scales."""
    halves = encoding_of(fmt).halves
    fields, offset = [], 0
    for name in _parts(fmt):
        fields.append(StripField(name, offset, halves, 4, False))
        offset += fields[-1].nbytes
    return StripLayout(1, QUADS, 0, 1, tuple(fields), ())


def unpacked_scale(fmt: WeightFormat) -> ScaleOf:
    """The scales of an unpacked group."""
    layout = unpacked_layout(fmt)

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        parts = {}
        for name in _parts(fmt):
            field = layout.field(name)
            at = panel_address(place.fields, panel, field.panel_bytes)
            at = at + (field.offset + half * field.element_bytes)
            parts[name] = emit.load(at, F32, 16, align=64)
        return Scale(**parts)

    return scale


def _quads_as_they_are(emit: Emit, codes: Val, panel: Val | int, quad: int) -> Weights:
    """No lookup competes with the dot products."""
    at = panel_address(codes, panel, 64) + 4 * STRIP_ROWS * quad
    return [(quad, emit.load(at, I32, 16, align=64).bits(I8))]


@lru_cache(maxsize=128)
def unpacked_source(fmt: WeightFormat, activation_bits: int = 16) -> Source:
    """Groups that `unpack` has made of the codes, in the cache."""
    layout, encoding = unpacked_layout(fmt), encoding_of(fmt, activation_bits)
    return _source(encoding, layout, False, _quads_as_they_are, unpacked_scale(fmt))


def unpack(fmt: WeightFormat, offset: int | None = None) -> KernelBody:
    """Kernel (strip, out, begin, end): groups begin..end-1 of a strip -> unpacked groups.

    Args:
        fmt: of the strip.
        offset: what is added to weights; None for that of the encoding.
    """
    source, layout, to_layout = packed_source(fmt), strip_of(fmt), unpacked_layout(fmt)
    encoding = encoding_of(fmt)
    added = encoding.offset if offset is None else offset
    weights = integer_codes(fmt.code, layout, added, encoding.wide)

    def body(emit: Emit, strip: Val, out: Val, begin: Val, end: Val) -> None:
        cursor = StripCursor(emit, layout, strip, begin)
        with emit.loop(begin, end) as group:
            place, to = cursor.place, out + (group - begin) * to_layout.block_bytes
            for word, panel in itertools.product(range(layout.words), range(PANELS)):
                for quad, w in weights(emit, place.codes, panel, word):
                    emit.store(to + (4 * STRIP_ROWS * quad + 64 * panel), w, align=64)
            for panel, half in itertools.product(range(PANELS), range(source.halves)):
                scale = source.scale(emit, place, panel, half)
                for name in _parts(fmt):
                    field = to_layout.field(name)
                    at = to_layout.code_bytes + field.offset + half * field.element_bytes
                    emit.store(to + (at + 64 * panel), getattr(scale, name), align=64)
            cursor.advance()

    return body
