"""Dot kernels of formats whose codes are E4M3: products of bf16, summed over a span of inputs that
shares its scale, then scaled.

    part = sum of w * x over a span, from zero, in the order of `pair_dot`
    sums += part * scale                        float32, unfused

A span is the 32 inputs of a group or, where weights have scales for 128 inputs or for rows, four
groups. It is cut where a call's groups begin or end, so calls are cut between spans; the last one
of a row may be short.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, KernelBody, Val, Var
from hybrid_moe.cpu_kernels.kernels.dot import (
    DotArgs,
    clear_sums,
    dot_kernel,
    load_sums,
    store_sums,
)
from hybrid_moe.cpu_kernels.kernels.encode import BYTE_PAIRS
from hybrid_moe.cpu_kernels.kernels.integer_dot import strip_of
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.kernels.scalings import Scale, ScaleOf, scale_of
from hybrid_moe.cpu_kernels.kernels.strip_cursor import Place, StripCursor, field_address
from hybrid_moe.cpu_kernels.tuning import E4M3_WORDS, PACKED_AHEAD, SHARE_LINES, TURN_GROUPS
from hybrid_moe.formats.strips import GROUP, LINE, PANELS, SUMS_BYTES, StripField, StripLayout
from hybrid_moe.formats.weight_format import WeightFormat

SPAN_GROUPS = 4
"""Of formats with scales for 128 inputs or more."""
WORDS = GROUP // 4
"""Of codes, that a row has in a group."""

_LINES = 64 * PANELS
"""From one word, or pair, of a panel to the next."""

Pairs = Callable[[Emit, Val, int, int], list[Val]]
"""(emit, address of a group's weights, panel, word) -> the two pairs of a word's four inputs, bf16
in 32-bit lanes [16]."""


@dataclass(frozen=True)
class E4m3Source:
    """Weights as a kernel reads them.

    Attributes:
        layout: of the strip, or of what its groups are unpacked to.
        packed: it is the strip as it streams from memory; else it lies in the cache.
        span: groups that share their scales, a power of two.
        pairs: how weights are read.
        scale: (emit, place of a span's first group, panel, 0) -> the panel's scales.
    """

    layout: StripLayout
    packed: bool
    span: int
    pairs: Pairs
    scale: ScaleOf

    @property
    def word_bytes(self) -> int:
        """From the weights of a word to those of the next."""
        return _LINES if self.packed else 2 * _LINES


def _decoded(emit: Emit, codes: Val, panel: int, word: int) -> list[Val]:
    line = emit.load(codes + (_LINES * word + 64 * panel), I8, 64, align=64)
    return list(emit.op("e4m3_pairs", line).halves())


def _as_they_are(emit: Emit, pairs: Val, panel: int, word: int) -> list[Val]:
    at = pairs + (_LINES * 2 * word + 64 * panel)
    return [emit.load(at + _LINES * i, I32, 16, align=64) for i in range(2)]


@lru_cache(maxsize=8)
def packed_source(fmt: WeightFormat) -> E4m3Source:
    """A format's strips as they stream from memory."""
    layout = strip_of(fmt)
    span = 1 if fmt.group == GROUP else SPAN_GROUPS
    return E4m3Source(layout, True, span, _decoded, scale_of(fmt, layout))


@lru_cache(maxsize=8)
def unpacked_source(fmt: WeightFormat) -> E4m3Source:
    """Groups that `unpack` has made: pairs of bf16, 4 KB, then float32 parts of scales."""
    names = ("factor", "exponent") if fmt.scaling == "ue8m0" else ("factor",)
    fields = tuple(StripField(name, 4 * 64 * i, 1, 4, False) for i, name in enumerate(names))
    layout = StripLayout(1, 2 * WORDS, 0, 1, fields, ())

    def scale(emit: Emit, place: Place, panel: Val | int, half: int) -> Scale:
        at = {field.name: field_address(place, layout, field, panel) for field in fields}
        return Scale(**{name: emit.load(at[name], F32, 16, align=64) for name in names})

    return E4m3Source(layout, False, packed_source(fmt).span, _as_they_are, scale)


def unpack(fmt: WeightFormat) -> KernelBody:
    """Kernel (strip, out, begin, end): groups begin..end-1 of a strip -> unpacked groups."""
    packed, unpacked = packed_source(fmt), unpacked_source(fmt).layout

    def body(emit: Emit, strip: Val, out: Val, begin: Val, end: Val) -> None:
        cursor = StripCursor(emit, packed.layout, strip, begin)
        with emit.loop(begin, end) as group:
            place, to = cursor.place, out + (group - begin) * unpacked.block_bytes
            with emit.loop(0, emit.i64(WORDS)) as word:
                codes, pairs_to = place.codes + word * _LINES, to + word * (2 * _LINES)
                for panel in range(PANELS):
                    for i, pairs in enumerate(packed.pairs(emit, codes, panel, 0)):
                        emit.store(pairs_to + (_LINES * i + 64 * panel), pairs, align=64)
            for panel in range(PANELS):
                scale = packed.scale(emit, place, panel, 0)
                for field in unpacked.fields:
                    at = to + (unpacked.code_bytes + field.offset + 64 * panel)
                    emit.store(at, getattr(scale, field.name), align=64)
            cursor.advance()

    return body


def within(first: Val, count: int, begin: Val, end: Val) -> tuple[Val, Val]:
    """Groups first..first+count-1, as far as they are groups begin..end-1."""
    last = first + count
    return (first < begin).select(begin, first), (end < last).select(end, last)


class _Kernel:
    """Emits one kernel for `tokens`, in the order of panels and sums that `order` says."""

    def __init__(
        self, emit: Emit, args: DotArgs, tokens: int, source: E4m3Source, order: Order
    ) -> None:
        self.emit, self.args, self.tokens = emit, args, range(tokens)
        self.source, self.order = source, order
        self.ahead = emit.var(args.ahead)

    def run(self) -> None:
        emit, args, order = self.emit, self.args, self.order
        if order.kept == PANELS:
            self.in_registers(range(PANELS), args.begin, args.end)
        elif order.kept:
            with emit.loop(args.begin & -TURN_GROUPS, args.end, step=TURN_GROUPS) as turn:
                begin, end = within(turn, TURN_GROUPS, args.begin, args.end)
                for first in range(0, PANELS, order.kept):
                    self.in_registers(range(first, first + order.kept), begin, end)
        else:
            with emit.when(args.begin.equals(0)):
                clear_sums(emit, args.sums, len(self.tokens))
            with emit.loop(args.begin & -self.source.span, args.end, self.source.span) as span:
                begin, end = within(span, self.source.span, args.begin, args.end)
                for first in range(0, PANELS, order.together):
                    self.in_memory(range(first, first + order.together), begin, end)

    def in_registers(self, panels: Sequence[int], begin: Val, end: Val) -> None:
        """Groups begin..end-1 of `panels`, the sums in registers meanwhile."""
        emit, span = self.emit, self.source.span
        places = list(itertools.product(self.tokens, panels))
        total = load_sums(emit, self.args.sums, begin, places)
        with emit.loop(begin & -span, end, step=span) as first:
            for (t, p), part in self.parts(panels, *within(first, span, begin, end)).items():
                total[t, p].set(total[t, p].get() + part)
            emit.barrier()
        store_sums(emit, self.args.sums, total)

    def in_memory(self, panels: Sequence[int], begin: Val, end: Val) -> None:
        """A span of `panels`, added to the sums in memory."""
        emit = self.emit
        for (t, p), part in self.parts(panels, begin, end).items():
            at = self.args.sums + (SUMS_BYTES * t + 64 * p)
            emit.store(at, emit.load(at, F32, 16, align=64) + part, align=64)
        emit.barrier()

    def parts(self, panels: Sequence[int], begin: Val, end: Val) -> dict[tuple[int, int], Val]:
        """By token and panel: what the span of groups begin..end-1 adds to the sums."""
        emit, args, source = self.emit, self.args, self.source
        from_first = begin if source.packed else begin - args.begin
        place = StripCursor(emit, source.layout, args.codes, from_first).place
        step = len(self.tokens) * BYTE_PAIRS.group_bytes
        x = args.x + begin * step
        zero = emit.splat(0.0, F32, 16)
        part = {at: emit.var(zero) for at in itertools.product(self.tokens, panels)}
        if source.span == 1:
            self.group(panels, place.codes, x, part)
        else:
            layout = source.layout
            stride = layout.code_bytes if layout.block_groups > 1 else layout.block_bytes
            codes, row = emit.var(place.codes), emit.var(x)
            with emit.loop(begin, end):
                self.group(panels, codes.get(), row.get(), part)
                codes.set(codes.get() + stride)
                row.set(row.get() + step)
        many = len(self.tokens) > 1  # one token is bound by memory, so multipliers have time
        scales = {p: source.scale(emit, place, p, 0) for p in panels}
        return {(t, p): scales[p].times(emit, v.get(), many) for (t, p), v in part.items()}

    def group(
        self, panels: Sequence[int], codes: Val, x: Val, part: dict[tuple[int, int], Var]
    ) -> None:
        """Dot products of one group: a word of all `panels`, then the next word."""
        emit, source = self.emit, self.source
        asks = panels[0] == 0 and source.packed and self.order.prefetch
        if panels[0] == 0 and not source.packed:
            self.ask_next()
        if asks and source.layout.block_groups == 1 and source.layout.field_bytes:
            emit.prefetch(codes + (PACKED_AHEAD + source.layout.code_bytes))
        with emit.loop(0, emit.i64(WORDS), step=E4M3_WORDS) as first:
            at, inputs = codes + first * source.word_bytes, x + first * 8
            for word, p in itertools.product(range(E4M3_WORDS), panels):
                if asks:
                    for line in range(p, PANELS, len(panels)):
                        emit.prefetch(at + (PACKED_AHEAD + _LINES * word + LINE * line))
                for i, w in enumerate(source.pairs(emit, at, p, word)):
                    for t in self.tokens:
                        offset = BYTE_PAIRS.group_bytes * t + 4 * (2 * word + i)
                        value = emit.load(inputs + offset, I32, align=4)
                        part[t, p].set(emit.op("pair_dot", part[t, p].get(), w, value))
                emit.barrier()

    def ask_next(self) -> None:
        """Prefetch of the codes that are unpacked next."""
        ahead = self.ahead.get()
        self.ahead.set(ahead + SHARE_LINES * LINE)
        for line in range(SHARE_LINES):
            self.emit.prefetch(ahead + LINE * line)


def e4m3_dot(source: E4m3Source, tokens: int, order: Order) -> KernelBody:
    """Dot kernel for T = `tokens`."""
    return dot_kernel(lambda emit, args: _Kernel(emit, args, tokens, source, order).run())
