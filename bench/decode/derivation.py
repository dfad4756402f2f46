"""The MXFP4 decode kernel by steps: variants that `docs/kernels.md` derives, each a few lines.

A variant multiplies 64 rows of K weights with one token:

    body(emit, strip, x, sums)

`strip` holds their codes and scales in the step's `Layout`, 1088 bytes for a group of 32 inputs
whatever the layout; `x` is the address of the token's encoded row; `sums` is float32 [64].
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, KernelBody, Val, vector
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET, OPS, fused
from hybrid_moe.cpu_kernels.dsl.tiers import Tier
from hybrid_moe.cpu_kernels.kernels.encode import FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.group_dot import group_dot
from hybrid_moe.cpu_kernels.kernels.integer_dot import (
    packed_source,
    unpack,
    unpacked_layout,
    unpacked_source,
)
from hybrid_moe.cpu_kernels.kernels.order import Order, fixed15_order
from hybrid_moe.cpu_kernels.kernels.scalings import e8m0
from hybrid_moe.formats.mx import E2M1_CODE, MXFP4
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import PANEL_ROWS, PANELS, STRIP_ROWS, SUMS_BYTES, strip_layout

K = 4096
GROUPS = K // 32
MXFP4_STRIP = strip_layout(MXFP4, 32)
GROUP_BYTES, CODE_BYTES = MXFP4_STRIP.group_bytes, MXFP4_STRIP.code_bytes
"""Of a group of 32 inputs of all rows of a strip: codes and scales, and codes alone."""
STRIP_BYTES = GROUPS * GROUP_BYTES
WORDS = MXFP4_STRIP.words

Body = Callable[[Emit, Val, Val, Val], None]
_LINE_GROUPS = 4  # a cache line of a row's codes: 128 weights, four scales
_STRIPS_TOGETHER = 8


@dataclass(frozen=True)
class Layout:
    """How 64 rows of codes [64, K / 2] and scales [64, K / 32] lie in memory.

    Attributes:
        panels: of a strip; 64 rows are 4 / panels strips. 0: rows as a checkpoint stores them.
        beside: a group's scales follow its codes; else all scales of a strip follow all codes.
    """

    panels: int
    beside: bool = False

    @property
    def strip_bytes(self) -> int:
        return STRIP_BYTES * self.panels // PANELS

    @property
    def group_bytes(self) -> int:
        """From the codes of one group to those of the next."""
        return (GROUP_BYTES if self.beside else CODE_BYTES) * self.panels // PANELS

    @property
    def scales(self) -> int:
        """From a strip's beginning to the scales of its first group."""
        return CODE_BYTES * self.panels // PANELS * (1 if self.beside else GROUPS)

    @property
    def scales_step(self) -> int:
        """From the scales of one group to those of the next."""
        return self.group_bytes if self.beside else PANEL_ROWS * self.panels

    def pack(self, codes: Array, scales: Array) -> Array:
        """uint8 [64, K / 2], uint8 [64, K / 32] -> uint8 [STRIP_BYTES]."""
        if not self.panels:
            return np.concatenate([codes.reshape(-1), scales.reshape(-1)])
        split = (PANELS // self.panels, self.panels, PANEL_ROWS, GROUPS)
        words = np.ascontiguousarray(codes).view(np.uint32).reshape(*split, WORDS)
        words = np.ascontiguousarray(words.transpose(0, 3, 4, 1, 2)).view(np.uint8)
        parts = (words, scales.reshape(split).transpose(0, 3, 1, 2))
        rows = (split[0], GROUPS, -1) if self.beside else (split[0], -1)
        packed: Array = np.concatenate([part.reshape(rows) for part in parts], axis=-1)
        return packed.reshape(-1)


ROWS = Layout(0)
PAIR = Layout(2)
PAIR_BESIDE = Layout(2, beside=True)
STRIP = Layout(PANELS, beside=True)
"""The library's."""


@dataclass(frozen=True)
class Step:
    """One variant.

    Attributes:
        name: what changed.
        body: the kernel.
        layout: what it reads.
        trips: turns of its loops over one strip, outermost first.
        encode: float32 x [K] -> its encoded row; None: the library's 15-bit fixed point.
        without: ops that fall back to their generic lowering.
        strips: how many strips one call of `body` takes.
        x86: it names an instruction.
        lines_twice: how many it decodes once more. Whoever goes panel by panel decodes the first
            line of the next group ahead, and in the last group one of its own in vain.
    """

    name: str
    body: Body
    layout: Layout
    trips: Sequence[int]
    encode: Callable[[Array], Array] | None = None
    without: tuple[str, ...] = ()
    strips: int = 1
    x86: bool = False
    lines_twice: int = 0

    def tier(self, tier: Tier) -> Tier:
        """`tier` as this step may use it."""
        generic = {name: OPS[name].lower for name in self.without}
        return dataclasses.replace(tier, lowerings=generic, extends=tier) if generic else tier


def sweep(body: Body, tokens: int = 1, strips: int = 1) -> KernelBody:
    """Kernel (at, x, sums, count, strip_bytes): `count` strips, one after the other."""

    def kernel(emit: Emit, at: Val, x: Val, sums: Val, count: Val, strip_bytes: Val) -> None:
        with emit.loop(0, count, step=strips) as strip:
            body(emit, at + strip * strip_bytes, x, sums + strip * (SUMS_BYTES * tokens))

    return kernel


def _nibbles(codes: Val) -> tuple[Val, Val]:
    """64 bytes of codes -> those of the even and of the odd inputs, a byte each."""
    words = codes.bits(I32)
    return (words & 0x0F0F0F0F).bits(I8), ((words >> 4) & 0x0F0F0F0F).bits(I8)


def _decode(emit: Emit, codes: Val, offset: int = 0) -> list[Val]:
    table = tuple((weight + offset) & 255 for weight in E2M1_CODE.integers)
    return [emit.op("lookup16", table, index) for index in _nibbles(codes)]


def _store_sum(emit: Emit, at: Val, lanes: Val) -> None:
    """The horizontal sum that rows end with."""
    while lanes.ir.type.count > 1:
        low, high = lanes.halves()
        lanes = low + high
    emit.store(at, lanes, align=4)


def rows_in_floats(emit: Emit, strip: Val, x: Val, sums: Val) -> None:
    """Weights become float32: four groups of one row at a time, 8 weights an instruction."""
    scales = strip + GROUPS * CODE_BYTES
    with emit.loop(0, emit.i64(STRIP_ROWS)) as row:
        total = emit.var(emit.splat(0.0, F32, 16))
        with emit.loop(0, emit.i64(GROUPS), step=_LINE_GROUPS) as group:
            at = row * GROUPS + group
            decoded = _decode(emit, emit.load(strip + at * 16, I8, 64, align=64))
            for g in range(_LINE_GROUPS):
                product = emit.splat(0.0, F32, 16)
                for odd, weights in enumerate(decoded):
                    w = weights.shuffle(range(16 * g, 16 * g + 16)).sext(I32).to_float()
                    inputs = emit.load(x + group * 128 + (128 * g + 64 * odd), F32, 16, align=64)
                    product = fused(emit, w, inputs, product)
                scale = (emit.load(scales + at + g, I8).zext(I32) << 23).bits(F32)
                total.set(fused(emit, product, emit.broadcast(scale, 16), total.get()))
        _store_sum(emit, sums + row * 4, total.get())


def encode_rows_in_floats(x: Array) -> Array:
    """The row's even inputs, then its odd ones, by groups; halved, as weights are doubled."""
    pairs: Array = x.reshape(-1, 16, 2).transpose(0, 2, 1) / 2
    return pairs.astype(np.float32)


def _products(emit: Emit, w: Val, x: Val) -> Val:
    """64 unsigned bytes x 64 signed ones -> 32 sums of two (PMADDUBSW)."""
    pairs = zip(w.halves(), x.halves(), strict=True)
    name, kind = "llvm.x86.avx2.pmadd.ub.sw", vector(I16, 16)
    low, high = (emit.intrinsic(name, kind, a, b) for a, b in pairs)
    return low.concat(high)


def _times(emit: Emit, sums: Val, factor: int) -> Val:
    """32 sums of 16 bits -> 16 of 32 bits, times `factor` (PMADDWD)."""
    name, kind = "llvm.x86.avx2.pmadd.wd", vector(I32, 8)
    factors = emit.splat(factor, I16, 16)
    low, high = (emit.intrinsic(name, kind, half, factors) for half in sums.halves())
    return low.concat(high)


def rows_in_integers(emit: Emit, strip: Val, x: Val, sums: Val, ahead: int = 0) -> None:
    """Weights stay bytes: 32 products an instruction, but each group of each row is converted."""
    scales = strip + GROUPS * CODE_BYTES
    four_each = [lane // 4 for lane in range(16)]
    with emit.loop(0, emit.i64(STRIP_ROWS)) as row:
        total = emit.var(emit.splat(0.0, F32, 16))
        with emit.loop(0, emit.i64(GROUPS), step=_LINE_GROUPS) as group:
            at = row * GROUPS + group
            if ahead:
                emit.prefetch(strip + at * 16 + ahead)
            weights = _decode(emit, emit.load(strip + at * 16, I8, 64, align=64), BYTE_DOT_OFFSET)
            inputs = x + (group >> 2) * 384
            plane = [emit.load(inputs + 64 * i, I8, 64, align=64) for i in range(4)]
            high = _products(emit, weights[0], plane[0]) + _products(emit, weights[1], plane[1])
            low = _products(emit, weights[0], plane[2]) + _products(emit, weights[1], plane[3])
            exact = _times(emit, high, 256) + _times(emit, low, 1)
            exact = exact + emit.load(inputs + 256, I32, 16, align=64)
            product = exact.to_float() * emit.load(inputs + 320, F32, 16, align=64)
            scale = (emit.load(scales + at, I8, 4).zext(I32) << 23).bits(F32).shuffle(four_each)
            total.set(fused(emit, product, scale, total.get()))
        _store_sum(emit, sums + row * 4, total.get())


def _fixed15(x: Array) -> tuple[Array, Array]:
    """float32 x [K] -> integers [groups, 32] and the factor [groups] of each group."""
    groups = x.reshape(-1, 32).astype(np.float64)
    exponent = np.frexp(np.abs(groups).max(1))[1] - 1
    q = np.round(np.ldexp(groups, 13 - exponent[:, None])).astype(np.int64)
    return q, np.ldexp(1.0, exponent - 14)


def encode_rows_in_integers(x: Array) -> Array:
    """For every four groups 384 bytes: high even, high odd, low even, low odd [4][16], the bias in
    one of the four lanes of a group, the factor in all."""
    q, factor = _fixed15(x)
    low = (q + 128) % 256 - 128
    planes = np.stack([(q - low) >> 8, low])  # [plane, group, input]
    lanes = planes.reshape(2, -1, _LINE_GROUPS, 16, 2).transpose(1, 0, 4, 2, 3)
    bias = np.zeros((len(factor), 4), np.int32)
    bias[:, 0] = -BYTE_DOT_OFFSET * q.sum(1)
    parts = (
        lanes.astype(np.int8),
        bias,
        np.repeat(factor.astype(np.float32), 4),
    )
    return np.concatenate([_line_bytes(part, len(factor)) for part in parts], axis=1)


def _line_bytes(part: Array, groups: int) -> Array:
    return np.ascontiguousarray(part).view(np.uint8).reshape(groups // _LINE_GROUPS, -1)


def _clear(emit: Emit, sums: Val, panels: int) -> None:
    for panel in range(panels):
        emit.store(sums + 64 * panel, emit.splat(0.0, F32, 16), align=64)


def _add(emit: Emit, at: Val, product: Val, scale: Val) -> None:
    """To the sums in memory; `scale` is the address of 16 scales."""
    old = emit.load(at, F32, 16, align=64)
    emit.store(at, old + product * e8m0(emit, emit.load(scale, I8, 16, align=16)).factor, align=64)


def _byte_dots(emit: Emit, codes: Val, stride: int, x: Val, ahead: int = 0) -> Val:
    """One panel, one group: both planes of 32 inputs against 16 rows. Words are `stride` apart."""
    at = FIXED15_GROUP
    high, low = (
        emit.broadcast(emit.load(x + bias, I32, align=4), 16)
        for bias in (at.high_bias, at.low_bias)
    )
    for word in range(WORDS):
        line = codes + stride * word
        if ahead:
            emit.prefetch(line + ahead)
        for odd, w in enumerate(_decode(emit, emit.load(line, I8, 64), BYTE_DOT_OFFSET)):
            quad = x + 4 * (2 * word + odd)
            high = emit.op("byte_dot", high, w, emit.load(quad + at.high, I32, align=4))
            low = emit.op("byte_dot", low, w, emit.load(quad + at.low, I32, align=4))
    exact = emit.op("byte_dot_total", high, low).to_float()
    return exact * emit.load(x + at.factor, F32, align=4)


def in_panels(layout: Layout, ahead: int = 0) -> Body:
    """Bytes and lanes: 32 products an instruction, one conversion for 512 weights."""

    def body(emit: Emit, strip: Val, x: Val, sums: Val) -> None:
        _clear(emit, sums, PANELS)
        for first in range(0, PANELS, layout.panels):
            start = strip + layout.strip_bytes * (first // layout.panels)
            with (
                emit.loop(0, emit.i64(GROUPS)) as group,
                emit.loop(0, emit.i64(layout.panels)) as panel,
            ):
                at = start + group * layout.group_bytes
                scales = start + layout.scales + group * layout.scales_step + panel * PANEL_ROWS
                inputs = x + group * FIXED15_GROUP.nbytes
                product = _byte_dots(emit, at + panel * 64, 64 * layout.panels, inputs, ahead)
                _add(emit, sums + panel * 64 + 64 * first, product, scales)

    return body


def eight_streams(emit: Emit, strip: Val, x: Val, sums: Val) -> None:
    """Strips of 64 rows, but group by group through eight neighbouring ones at once."""
    _clear(emit, sums, PANELS * _STRIPS_TOGETHER)
    with (
        emit.loop(0, emit.i64(GROUPS)) as group,
        emit.loop(0, emit.i64(_STRIPS_TOGETHER)) as s,
        emit.loop(0, emit.i64(PANELS)) as panel,
    ):
        at = strip + s * STRIP_BYTES + group * GROUP_BYTES
        inputs = x + group * FIXED15_GROUP.nbytes
        product = _byte_dots(emit, at + panel * 64, 64 * PANELS, inputs)
        to = sums + s * SUMS_BYTES + panel * 64
        _add(emit, to, product, at + panel * PANEL_ROWS + CODE_BYTES)


def _call(kernel: KernelBody, emit: Emit, *values: Val | int) -> None:
    """A dot kernel's code in place: (codes, ahead, x, count, sums, begin, end)."""
    kernel(emit, *(v if isinstance(v, Val) else emit.i64(v) for v in values))


def direct(tokens: int, most: int, order: Order | None = None) -> Body:
    """The library's kernels over packed codes, `most` tokens at a time: the first of them bring a
    strip from memory, the others find it in the cache. `x` is as many tiles."""

    def body(emit: Emit, strip: Val, x: Val, sums: Val) -> None:
        kernel = group_dot(packed_source(MXFP4), most, order or _order(emit, most))
        with emit.loop(0, emit.i64(tokens), step=most) as t:
            tile, to = x + t * (GROUPS * FIXED15_GROUP.nbytes), sums + t * SUMS_BYTES
            _call(kernel, emit, strip, 0, tile, most, to, 0, GROUPS)

    return body


def unpacked(tokens: int, most: int, chunk: int) -> Body:
    """The library's kernels for many tokens: `chunk` groups are decoded once, then multiplied."""

    def body(emit: Emit, strip: Val, x: Val, sums: Val) -> None:
        kernel = group_dot(unpacked_source(MXFP4), most, _order(emit, most))
        memory, groups = emit.scratch(chunk * unpacked_layout(MXFP4).block_bytes), emit.i64(GROUPS)
        with emit.loop(0, groups, step=chunk) as begin:
            end = (groups < begin + chunk).select(groups, begin + chunk)
            at, after = strip + begin * GROUP_BYTES, strip + end * GROUP_BYTES
            unpack(MXFP4)(emit, at, memory, emit.i64(0), end - begin)
            with emit.loop(0, emit.i64(tokens), step=most) as t:
                tile, to = x + t * (GROUPS * FIXED15_GROUP.nbytes), sums + t * SUMS_BYTES
                _call(kernel, emit, memory, after, tile, most, to, begin, end)

    return body


def _order(emit: Emit, tokens: int) -> Order:
    return fixed15_order(tokens, emit.tier.registers, emit.tier.registers_per_panel)


_FLOAT_ROWS = (rows_in_floats, ROWS, (STRIP_ROWS, GROUPS // _LINE_GROUPS), encode_rows_in_floats)
_INTEGER_ROWS = (ROWS, (STRIP_ROWS, GROUPS // _LINE_GROUPS), encode_rows_in_integers)
_IN_ORDER = Order(together=PANELS, kept=PANELS, prefetch=False)
_BY_PANEL = Order(together=1, kept=PANELS, prefetch=False)
_MASKED = ("lookup_low4",)

KERNEL = Step("the kernel", direct(1, 1), STRIP, (GROUPS, PANELS))

STEPS: Mapping[str, Step] = {
    step.name: step
    for step in (
        Step("rows, floats, selects", *_FLOAT_ROWS, without=("lookup16",)),
        Step("rows, floats, lookup", *_FLOAT_ROWS),
        Step("rows, integers", rows_in_integers, *_INTEGER_ROWS, x86=True),
        Step("panels: strips of 32 rows", in_panels(PAIR), PAIR, (GROUPS, 2)),
        Step("prefetch", in_panels(PAIR, 4096), PAIR, (GROUPS, 2)),
        Step("no prefetch; scales beside codes", in_panels(PAIR_BESIDE), PAIR_BESIDE, (GROUPS, 2)),
        Step("strips of 64 rows", in_panels(STRIP), STRIP, (GROUPS, PANELS)),
        Step("sums in registers", direct(1, 1, _BY_PANEL), STRIP, (GROUPS,), without=_MASKED,
             lines_twice=1),
        Step("lines in order", direct(1, 1, _IN_ORDER), STRIP, (GROUPS,), without=_MASKED),
        KERNEL,
        Step("rows, integers, prefetch", functools.partial(rows_in_integers, ahead=4096),
             *_INTEGER_ROWS, x86=True),
        Step("lines in order, prefetch",
             direct(1, 1, dataclasses.replace(_IN_ORDER, prefetch=True)), STRIP, (GROUPS,)),
        Step("eight strips at once", eight_streams, STRIP, (GROUPS, _STRIPS_TOGETHER, PANELS),
             strips=_STRIPS_TOGETHER),
    )
}  # fmt: skip
"""In the order of the derivation: ten steps, then three ways beside it. On narrow registers the
kernel is the seventh step with prefetch; there the sums of four panels do not fit."""
