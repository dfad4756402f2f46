"""Dot kernels of MXFP4.

Weights are doubled, so that they are integers in -12..12. With 12 more they are unsigned, as
`byte_dot` wants them, and the biases of a group take the 12 back. Activations are two planes of
bytes, q = 256 * high + low:

    exact = 256 * sum(w * high) + sum(w * low)
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET
from hybrid_moe.cpu_kernels.jit.record import Record, f32, u8
from hybrid_moe.cpu_kernels.kernels.encode import FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.group_dot import (
    GroupSums,
    Scale,
    Source,
    Weights,
    group_dot,
    panel_address,
)
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.formats.mx import E2M1_VALUES, MXFP4
from hybrid_moe.formats.strips import GROUP, PANELS, strip_layout

E2M1_DOUBLED = tuple(int(2 * v) for v in E2M1_VALUES)
MXFP4_STRIP = strip_layout(MXFP4, GROUP)


def mxfp4_scale(emit: Emit, address: Val) -> Scale:
    """16 E8M0 bytes in memory. Byte 0 is 2^-127, whose bits are 0x00400000 and not 0."""
    byte = emit.load(address, I8, 16, align=16).zext(I32)
    bits = byte << 23
    power = (bits < 0x00400000).select(0x00400000, bits).bits(F32)
    return Scale(power, (byte - 127).to_float())


class UnpackedGroup(Record):
    """A group of a strip as `mxfp4_unpack` leaves it."""

    weights = u8[8, PANELS, 16, 4]  # or int8; [quad][panel][lane]: four inputs of a row
    powers = f32[PANELS, 16]  # the scales [panel][lane]
    exponents = f32[PANELS, 16]  # and their exponents; a tier reads one of them


UNPACKED_GROUP = UnpackedGroup.offsets()


def unpacked_scale(emit: Emit, panel: Val) -> Scale:
    """The scales of the panel whose weights begin at address `panel`."""
    return Scale(
        *(
            emit.load(panel + offset, F32, 16, align=64)
            for offset in (UNPACKED_GROUP.powers, UNPACKED_GROUP.exponents)
        )
    )


def _decode(emit: Emit, codes: Val, word: int, offset: int) -> Weights:
    """64 bytes of packed codes -> weights of the even and of the odd inputs: doubled, + offset."""
    table = tuple((weight + offset) & 255 for weight in E2M1_DOUBLED)
    even, odd = (emit.op("lookup_low4", table, c.bits(I8)) for c in (codes, codes >> 4))
    return [(2 * word, even), (2 * word + 1, odd)]


def _packed_weights(emit: Emit, group: Val, panel: Val | int, word: int) -> Weights:
    """Two quads of each word."""
    at = panel_address(group, panel, 64) + 64 * PANELS * word
    return _decode(emit, emit.load(at, I32, 16, align=64), word, BYTE_DOT_OFFSET)


def _packed_scale(emit: Emit, group: Val, panel: Val | int) -> Scale:
    return mxfp4_scale(emit, panel_address(group, panel, 16) + MXFP4_STRIP.code_bytes)


def _unpacked_weights(emit: Emit, group: Val, panel: Val | int, quad: int) -> Weights:
    """No lookup competes with the dot products."""
    at = panel_address(group, panel, 64) + 64 * PANELS * quad
    return [(quad, emit.load(at, I8, 64, align=64))]


def _unpacked_scale(emit: Emit, group: Val, panel: Val | int) -> Scale:
    return unpacked_scale(emit, panel_address(group, panel, 64))


class _Planes(GroupSums):
    """Two accumulators [16 rows] for each token."""

    def __init__(self, emit: Emit, x: Sequence[Val]) -> None:
        super().__init__(emit, x)
        at = FIXED15_GROUP
        self._high, self._low = (
            [emit.broadcast(self.load(t, bias, I32), 16) for t in range(len(x))]
            for bias in (at.high_bias, at.low_bias)
        )

    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        """Plane by plane."""
        planes = ((self._high, FIXED15_GROUP.high), (self._low, FIXED15_GROUP.low))
        for quad, w in weights:
            for sums, plane in planes:
                for t in tokens:
                    x = self.load(t, plane + 4 * quad, I32)
                    sums[t] = self.emit.op("byte_dot", sums[t], w, x)

    def total(self, token: int) -> Val:
        return self.emit.op("byte_dot_total", self._high[token], self._low[token])


_PACKED = Source(
    MXFP4_STRIP.group_bytes, MXFP4_STRIP.words, True, _packed_weights, _packed_scale, _Planes
)
_UNPACKED = Source(UNPACKED_GROUP.nbytes, 8, False, _unpacked_weights, _unpacked_scale, _Planes)


def mxfp4_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel for T = `tokens`, from packed codes."""
    return group_dot(_PACKED, tokens, order)


def mxfp4_unpacked_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel for T = `tokens`, from what `mxfp4_unpack` has made of the codes."""
    return group_dot(_UNPACKED, tokens, order)


def mxfp4_unpack(offset: int) -> KernelBody:
    """Kernel (codes, out, count): groups of a strip -> `UnpackedGroup`s. Weights are doubled,
    plus `offset`."""

    def body(emit: Emit, codes: Val, out: Val, count: Val) -> None:
        with emit.loop(0, count) as group:
            at, to = codes + group * MXFP4_STRIP.group_bytes, out + group * UNPACKED_GROUP.nbytes
            for word, panel in itertools.product(range(MXFP4_STRIP.words), range(PANELS)):
                line = emit.load(at + 64 * (PANELS * word + panel), I32, 16, align=64)
                for quad, w in _decode(emit, line, word, offset):
                    emit.store(to + 64 * (PANELS * quad + panel), w, align=64)
            for panel in range(PANELS):
                scale = mxfp4_scale(emit, at + (MXFP4_STRIP.code_bytes + 16 * panel))
                assert scale.exponent is not None
                emit.store(to + (UNPACKED_GROUP.powers + 64 * panel), scale.factor, align=64)
                emit.store(to + (UNPACKED_GROUP.exponents + 64 * panel), scale.exponent, align=64)

    return body
