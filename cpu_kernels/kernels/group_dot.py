"""Dot kernels that sum each group of 32 inputs as integers and scale the sum.

For each token, row and group of 32 inputs, with activations as integers q (see `encode`):

    exact = sum(w * q)                      integers, in the accumulators of byte products
    sums += (exact * factor) * scale        float32; of 16-bit activations the factor is 2^n

with zero points exact - zero * sum(q) instead of exact, and with minima

    sums += (exact * factor) * scale + (sum(q) * factor) * minimum

Where weights have scales for 16 inputs, each half of a group is a group of its own here. What a
format's weights look like, and how they meet the activations, is a `Source`. The kernels go through
it in the order of lines, panels and sums that `order` says.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_moe.cpu_kernels.dsl.emit import F32, I32, Emit, KernelBody, Val, Var
from hybrid_moe.cpu_kernels.kernels.dot import (
    DotArgs,
    clear_sums,
    dot_kernel,
    load_sums,
    store_sums,
)
from hybrid_moe.cpu_kernels.kernels.encode import IntegerEncoding
from hybrid_moe.cpu_kernels.kernels.integer_codes import Decode, Weights
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.kernels.scalings import Scale, ScaleOf
from hybrid_moe.cpu_kernels.kernels.strip_cursor import Place, StripCursor
from hybrid_moe.cpu_kernels.tuning import PACKED_AHEAD, SHARE_LINES, TURN_GROUPS
from hybrid_moe.formats.strips import LINE, PANELS, SUMS_BYTES, StripLayout

Totals = dict[tuple[int, int], Var]
"""Sums by token and panel, float32 [16] each."""


class GroupSums(abc.ABC):
    """Integer sums of one panel and group for some tokens, from their biases on."""

    def __init__(self, emit: Emit, x: Sequence[Val], half: int, encoding: IntegerEncoding) -> None:
        """`x` has the address of each token's group; `half` is 1 for the second half of a group
        whose halves are summed apart, else 0."""
        self.emit, self.x, self.encoding = emit, x, encoding
        self.place = encoding.places[half]

    @abc.abstractmethod
    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        """The dot products of `tokens`."""

    @abc.abstractmethod
    def total(self, token: int) -> Val:
        """The exact sum of one token, int32 [16]."""

    def bias(self, token: int, offset: int | None) -> Val:
        """Of one token, zero where there is none."""
        return self.emit.splat(0, I32) if offset is None else self.load(token, offset, I32)

    def load(self, token: int, offset: int, element: Any) -> Val:
        """32 bits of a token's group."""
        return self.emit.load(self.x[token] + offset, element, align=4)

    def scaled(self, token: int, scale: Scale) -> Val:
        """The group's part of one token's result, float32 [16]."""

        def field(name: str) -> Val:
            at = self.place.sum if name == "sum" else int(getattr(self.encoding.at, name))
            assert at is not None
            return self.emit.broadcast(self.load(token, at, F32), 16)

        many = len(self.x) > 1  # one token is bound by memory, so the multipliers have time for it
        return scaled_sum(self.emit, self.total(token), field, scale, self.encoding, many)


def scaled_sum(
    emit: Emit,
    exact: Val,
    field: Callable[[str], Val],
    scale: Scale,
    encoding: IntegerEncoding,
    by_exponent: bool,
) -> Val:
    """A group's part of a token's result, float32 [16].

    Args:
        exact: the integer sum, int32 [16].
        field: name of a field of the encoded group -> its float32 in 16 lanes.
        scale: of the panel's rows.
        encoding: of the activations.
        by_exponent: powers of two are added as exponents, where the tier has that.
    """
    value = exact.to_float()
    if scale.zero is not None:
        value = value - scale.zero * field("sum")
    factor = Scale(field("factor"), field("exponent") if encoding.is_power else None)
    part = scale.times(emit, factor.times(emit, value, by_exponent), by_exponent)
    return part if scale.minimum is None else part + scale.minimum * field("sum")


@dataclass(frozen=True)
class Source:
    """A strip as a kernel reads it.

    Attributes:
        layout: of the strip, or of what its groups are unpacked to.
        steps: parts of a panel's weights in a group that follow each other.
        packed: it is the strip as it streams from memory; else it lies in the cache.
        halves: 1, or 2 where each half of a group, half of the steps, has a scale of its own.
        encoded_bytes: of a token's group.
        weights: (emit, address of codes, panel, step) -> one part.
        scale: (emit, place, panel, half) -> the panel's scales.
        sums: (emit, addresses of the tokens' groups, half) -> sums for a panel.
    """

    layout: StripLayout
    steps: int
    packed: bool
    halves: int
    encoded_bytes: int
    weights: Decode
    scale: ScaleOf
    sums: Callable[[Emit, Sequence[Val], int], GroupSums]

    def steps_of(self, half: int) -> range:
        """The steps of one half."""
        each = self.steps // self.halves
        return range(each * half, each * (half + 1))


class GroupDot:
    """Emits one kernel, in the order of lines, panels and sums that `order` says."""

    def __init__(
        self, emit: Emit, args: DotArgs, tokens: int, source: Source, order: Order
    ) -> None:
        self.emit, self.args, self.tokens = emit, args, range(tokens)
        self.source, self.order = source, order
        self.row_bytes = tokens * source.encoded_bytes
        self.lines: list[Val] = []  # still to be prefetched in this group
        self.ahead = emit.var(args.ahead)

    def run(self) -> None:
        args, kept = self.args, self.order.kept
        if kept == PANELS:
            self.in_registers(range(PANELS), args.begin, args.end)
        elif kept:
            self.by_turns()
        else:
            self.in_memory()

    def cursor(self, begin: Val) -> StripCursor:
        """At group `begin`. Unpacked groups are there from the call's first on."""
        args, source = self.args, self.source
        first = begin if source.packed else begin - args.begin
        return StripCursor(self.emit, source.layout, args.codes, first)

    def by_turns(self) -> None:
        """Two panels of TURN_GROUPS groups, then the other two."""
        emit, args, kept = self.emit, self.args, self.order.kept
        with emit.loop(args.begin, args.end, step=TURN_GROUPS) as first:
            last = first + TURN_GROUPS
            last = (args.end < last).select(args.end, last)
            for panel in range(0, PANELS, kept):
                self.in_registers(range(panel, panel + kept), first, last)

    def in_registers(self, panels: Sequence[int], begin: Val, end: Val) -> None:
        """Groups begin..end-1 of `panels`, the sums in registers meanwhile."""
        emit, args, source = self.emit, self.args, self.source
        total = load_sums(emit, args.sums, begin, list(itertools.product(self.tokens, panels)))
        cursor, row = self.cursor(begin), emit.var(args.x + begin * self.row_bytes)
        by_words, ahead = self.order.together == PANELS, []
        if not by_words:
            first = source.weights(emit, cursor.place.codes, panels[0], 0)
            ahead = [emit.var(w) for _, w in first]
        with emit.loop(begin, end) as index:
            place, x = cursor.place, self.token_addresses(row.get())
            self.lines = self.wanted(place.codes) if panels[0] == 0 else []
            if by_words:
                self.by_words(place, x, total)
            else:
                after = (index + 1 < end).select(cursor.next_codes, place.codes)
                self.by_panels(panels, place, after, x, total, ahead)
            cursor.advance()
            row.set(row.get() + self.row_bytes)
        store_sums(emit, args.sums, total)

    def by_words(self, place: Place, x: Sequence[Val], total: Totals) -> None:
        """A word of all panels, then the next word: lines in ascending order."""
        emit, source = self.emit, self.source
        if source.packed:
            self.touch_in_order(place)
        for half in range(source.halves):
            planes = [source.sums(emit, x, half) for _ in range(PANELS)]
            emit.barrier()
            for step in source.steps_of(half):
                for p in range(PANELS):
                    weights = source.weights(emit, place.codes, p, step)
                    if len(x) > 1:  # a single token has registers for the weights of all panels
                        emit.barrier()
                    planes[p].add(weights, self.tokens)
                    if len(x) > 1:
                        emit.barrier()
                emit.barrier()
            for p in range(PANELS):
                scale = source.scale(emit, place, p, half)
                for t in self.tokens:
                    total[t, p].set(total[t, p].get() + planes[p].scaled(t, scale))
            emit.barrier()

    def touch_in_order(self, place: Place) -> None:
        """Touch lines that would else be met before lines in front of them: the fields of a block,
        which a group needs when it has summed its codes, and in front of upper bits, which the
        first word needs, all other words of the group."""
        emit, layout = self.emit, self.source.layout
        if layout.fields_first:
            assert place.index is not None
            with emit.when(place.index.equals(0)):
                for line in range(0, layout.field_bytes, LINE):
                    emit.touch(place.fields + line)
        if layout.high_words:
            for line in range(0, layout.high_offset, LINE):
                emit.touch(place.codes + line)

    def by_panels(
        self,
        panels: Sequence[int],
        place: Place,
        after: Val,
        x: Sequence[Val],
        total: Totals,
        ahead: Sequence[Var],
    ) -> None:
        """Panel by panel, so that dot products wait for nothing else. A panel's first weights are
        decoded (into `ahead`; `after` is the address of the next group's codes) before the results
        of the panel before it are added up. Its last step goes token by token: the result of each
        is added up behind the dot products of the next.

        Compiler fences keep this order. Without them LLVM loads inputs and weights early, into
        registers that the accumulators need (four tokens: 72 instead of 115 GMAC/s), or adds up
        late.
        """
        emit, source = self.emit, self.source
        share = -(-len(self.lines) // (len(panels) * source.steps))
        parts = list(itertools.product(panels, range(source.halves)))
        for position, (p, half) in enumerate(parts):
            steps = source.steps_of(half)
            planes = source.sums(emit, x, half)
            emit.barrier()
            quads = [quad for quad, _ in source.weights(emit, place.codes, p, steps[0])]
            weights: Weights = list(zip(quads, (w.get() for w in ahead), strict=True))
            for step in steps[1:]:
                self.ask(share)
                planes.add(weights, self.tokens)
                emit.barrier()
                weights = source.weights(emit, place.codes, p, step)
                emit.barrier()
            self.ask(share)
            codes, (panel, next_half) = after, parts[0]
            if position + 1 < len(parts):
                codes, (panel, next_half) = place.codes, parts[position + 1]
            first = source.weights(emit, codes, panel, source.steps_of(next_half)[0])
            for variable, (_, w) in zip(ahead, first, strict=True):
                variable.set(w)
            if self.order.kept < PANELS:  # the more tokens, the less room for both at once
                emit.barrier()
            else:
                emit.fence()
            scale = source.scale(emit, place, p, half)
            for t in self.tokens:
                planes.add(weights, [t])
                if t > 0:
                    total[t - 1, p].set(total[t - 1, p].get() + planes.scaled(t - 1, scale))
            last = self.tokens[-1]
            total[last, p].set(total[last, p].get() + planes.scaled(last, scale))
            emit.barrier()

    def in_memory(self) -> None:
        """Panel by panel, each group's sums added to memory. A loop over panels, not four copies:
        the copies' equal loads of x would be kept in registers that the accumulators need.

        Each panel asks for a quarter of the lines, a few at a time: a core can wait for some 20 at
        once, and stops when it is asked for all 32 of INT8's (Zen 4, two tokens on AVX2: 11 GB/s
        instead of 26)."""
        emit, args, source = self.emit, self.args, self.source
        with emit.when(args.begin.equals(0)):
            clear_sums(emit, args.sums, len(self.tokens))
        cursor = self.cursor(args.begin)
        with emit.loop(args.begin, args.end) as index:
            place = cursor.place
            x = self.token_addresses(args.x + index * self.row_bytes)
            wanted = self.wanted(place.codes)
            share = len(wanted) // PANELS if source.packed else 0
            self.lines = wanted[share * PANELS :]
            self.ask(len(self.lines))
            with emit.loop(0, emit.i64(PANELS)) as panel:
                self.lines = [line + panel * (share * LINE) for line in wanted[:share]]
                for half in range(source.halves):
                    planes = source.sums(emit, x, half)
                    for step in source.steps_of(half):
                        self.ask(-(-share // source.steps))
                        planes.add(source.weights(emit, place.codes, panel, step), self.tokens)
                    scale = source.scale(emit, place, panel, half)
                    for t in self.tokens:
                        to = args.sums + panel * 64 + SUMS_BYTES * t
                        product = planes.scaled(t, scale)
                        emit.store(to, emit.load(to, F32, 16, align=64) + product, align=64)
            cursor.advance()

    def token_addresses(self, row: Val) -> list[Val]:
        return [row + self.source.encoded_bytes * t for t in self.tokens]

    def wanted(self, codes: Val) -> list[Val]:
        """Lines to prefetch during a group: of the strip that is being read, or of the codes that
        are unpacked next."""
        if self.source.packed:
            ahead = codes + PACKED_AHEAD
            layout = self.source.layout
            each = -(-layout.block_bytes // layout.block_groups)
            lines = -(-each // LINE) if self.order.prefetch else 0
        else:
            ahead, lines = self.ahead.get(), SHARE_LINES
            self.ahead.set(ahead + lines * LINE)
        return [ahead + LINE * line for line in range(lines)]

    def ask(self, lines: int) -> None:
        for line in self.lines[:lines]:
            self.emit.prefetch(line)
        self.lines = self.lines[lines:]


def group_dot(source: Source, tokens: int, order: Order) -> KernelBody:
    """Dot kernel for T = `tokens`."""
    return dot_kernel(lambda emit, args: GroupDot(emit, args, tokens, source, order).run())
