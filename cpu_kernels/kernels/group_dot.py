"""Dot kernels that sum each group of 32 inputs as integers and scale the sum: MXFP4 and INT8.

For each token, row and group of 32 inputs, with activations in 15-bit fixed point (see `encode`):

    exact = sum(w * q)                      integers, in the accumulators of byte products
    sums += (exact * factor) * scale        float32; the factor is a power of two

What a format's weights look like, and how they meet the activations, is a `Source`. The kernels
go through it in the order of lines, panels and sums that `order` says.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hybrid_moe.cpu_kernels.dsl.emit import F32, Emit, KernelBody, Val, Var
from hybrid_moe.cpu_kernels.kernels.dot import (
    DotArgs,
    Place,
    clear_sums,
    dot_kernel,
    load_sums,
    store_sums,
)
from hybrid_moe.cpu_kernels.kernels.encode import FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.tuning import PACKED_AHEAD, SHARE_LINES, TURN_GROUPS
from hybrid_moe.formats.strips import LINE, PANELS, SUMS_BYTES

Weights = Sequence[tuple[int, Val]]
"""(quad, 64 weight bytes) of one panel: four inputs of 16 rows each."""


@dataclass(frozen=True)
class Scale:
    """16 scales, and where they are powers of two their exponents, float32 both."""

    factor: Val
    exponent: Val | None = None

    def times(self, emit: Emit, value: Val, by_exponent: bool) -> Val:
        """value * scale. By exponent where it has one: on some tiers that leaves the multipliers to
        the dot products. The bits are the same."""
        if by_exponent and self.exponent is not None:
            return emit.op("times_power", value, self.factor, self.exponent)
        return value * self.factor


class GroupSums(abc.ABC):
    """Integer sums of one panel and group for some tokens, from their biases on."""

    def __init__(self, emit: Emit, x: Sequence[Val]) -> None:
        """`x` has the address of each token's group."""
        self.emit, self.x = emit, x

    @abc.abstractmethod
    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        """The dot products of `tokens`."""

    @abc.abstractmethod
    def total(self, token: int) -> Val:
        """The exact sum of one token, int32 [16]."""

    def load(self, token: int, offset: int, element: Any) -> Val:
        """32 bits of a token's group."""
        return self.emit.load(self.x[token] + offset, element, align=4)

    def scaled(self, token: int, scale: Scale) -> Val:
        """The group's part of one token's result, float32 [16]."""
        emit, at = self.emit, FIXED15_GROUP
        exact = self.total(token).to_float()
        factor, exponent = (
            emit.broadcast(self.load(token, offset, F32), 16) for offset in (at.factor, at.exponent)
        )
        many = len(self.x) > 1  # one token is bound by memory, so the multipliers have time for it
        return scale.times(emit, Scale(factor, exponent).times(emit, exact, many), many)


@dataclass(frozen=True)
class Source:
    """A group of a strip as a kernel reads it, from the address `group` on.

    Attributes:
        nbytes: of a group.
        steps: parts of a panel's weights that follow each other.
        packed: it is the strip as it streams from memory; else it lies in the cache.
        weights: (emit, group, panel, step) -> one part.
        scale: (emit, group, panel) -> the panel's scales.
        sums: (emit, addresses of the tokens' groups) -> sums for a panel.
    """

    nbytes: int
    steps: int
    packed: bool
    weights: Callable[[Emit, Val, Val | int, int], Weights]
    scale: Callable[[Emit, Val, Val | int], Scale]
    sums: Callable[[Emit, Sequence[Val]], GroupSums]


def panel_address(group: Val, panel: Val | int, nbytes: int) -> Val:
    """Where the `nbytes` of a panel begin in an array [panel]."""
    return group + panel * nbytes if isinstance(panel, Val) else group + nbytes * panel


class GroupDot:
    """Emits one kernel, in the order of lines, panels and sums that `order` says."""

    def __init__(
        self, emit: Emit, args: DotArgs, tokens: int, source: Source, order: Order
    ) -> None:
        self.emit, self.args, self.tokens = emit, args, range(tokens)
        self.source, self.order = source, order
        self.row_bytes = tokens * FIXED15_GROUP.nbytes
        self.lines: list[Val] = []  # still to be prefetched in this group
        self.ahead = emit.var(args.ahead)

    def run(self) -> None:
        args, kept = self.args, self.order.kept
        if kept == PANELS:
            self.in_registers(range(PANELS), args.codes, args.begin, args.end)
        elif kept:
            self.by_turns()
        else:
            self.in_memory()

    def by_turns(self) -> None:
        """Two panels of TURN_GROUPS groups, then the other two."""
        emit, args, kept = self.emit, self.args, self.order.kept
        with emit.loop(args.begin, args.end, step=TURN_GROUPS) as first:
            last = first + TURN_GROUPS
            last = (args.end < last).select(args.end, last)
            codes = args.codes + (first - args.begin) * self.source.nbytes
            for panel in range(0, PANELS, kept):
                self.in_registers(range(panel, panel + kept), codes, first, last)

    def in_registers(self, panels: Sequence[int], codes: Val, begin: Val, end: Val) -> None:
        """Groups begin..end-1 of `panels`, the sums in registers meanwhile."""
        emit, args, source = self.emit, self.args, self.source
        total = load_sums(emit, args.sums, begin, list(itertools.product(self.tokens, panels)))
        code, row = emit.var(codes), emit.var(args.x + begin * self.row_bytes)
        ahead = [emit.var(w) for _, w in source.weights(emit, codes, panels[0], 0)]
        with emit.loop(begin, end) as index:
            group, x = code.get(), self.token_addresses(row.get())
            following = group + source.nbytes
            self.lines = self.wanted(group) if panels[0] == 0 else []
            if self.order.together == PANELS:
                self.by_words(group, x, total)
            else:
                after = (index + 1 < end).select(following, group)
                self.by_panels(panels, group, after, x, total, ahead)
            code.set(following)
            row.set(row.get() + self.row_bytes)
        store_sums(emit, args.sums, total)

    def by_words(self, group: Val, x: Sequence[Val], total: dict[Place, Var]) -> None:
        """A word of all panels, then the next word: lines in ascending order."""
        emit, source = self.emit, self.source
        planes = [source.sums(emit, x) for _ in range(PANELS)]
        emit.barrier()
        for step in range(source.steps):
            for p in range(PANELS):
                weights = source.weights(emit, group, p, step)
                if len(x) > 1:  # a single token has registers for the weights of all panels
                    emit.barrier()
                planes[p].add(weights, self.tokens)
                if len(x) > 1:
                    emit.barrier()
            emit.barrier()
        for p in range(PANELS):
            scale = source.scale(emit, group, p)
            for t in self.tokens:
                total[t, p].set(total[t, p].get() + planes[p].scaled(t, scale))
        emit.barrier()

    def by_panels(
        self,
        panels: Sequence[int],
        group: Val,
        after: Val,
        x: Sequence[Val],
        total: dict[Place, Var],
        ahead: Sequence[Var],
    ) -> None:
        """Panel by panel, so that dot products wait for nothing else. A panel's first weights are
        decoded (into `ahead`; `after` is the address of the next group) before the results of the
        panel before it are added up. Its last step goes token by token: the result of each is added
        up behind the dot products of the next.

        Compiler fences keep this order. Without them LLVM loads inputs and weights early, into
        registers that the accumulators need (four tokens: 72 instead of 115 GMAC/s), or adds up
        late.
        """
        emit, source = self.emit, self.source
        share = -(-len(self.lines) // (len(panels) * source.steps))
        for position, p in enumerate(panels):
            planes = source.sums(emit, x)
            emit.barrier()
            quads = [quad for quad, _ in source.weights(emit, group, p, 0)]
            weights: Weights = list(zip(quads, (w.get() for w in ahead), strict=True))
            for step in range(source.steps - 1):
                self.ask(share)
                planes.add(weights, self.tokens)
                emit.barrier()
                weights = source.weights(emit, group, p, step + 1)
                emit.barrier()
            self.ask(share)
            is_last = position + 1 == len(panels)
            begin = (after, panels[0]) if is_last else (group, panels[position + 1])
            for variable, (_, w) in zip(ahead, source.weights(emit, *begin, 0), strict=True):
                variable.set(w)
            if self.order.kept < PANELS:  # the more tokens, the less room for both at once
                emit.barrier()
            else:
                emit.fence()
            scale = source.scale(emit, group, p)
            for t in self.tokens:
                planes.add(weights, [t])
                if t > 0:
                    total[t - 1, p].set(total[t - 1, p].get() + planes.scaled(t - 1, scale))
            last = self.tokens[-1]
            total[last, p].set(total[last, p].get() + planes.scaled(last, scale))
            emit.barrier()

    def in_memory(self) -> None:
        """Panel by panel, each group's sums added to memory. A loop over panels, not four copies:
        the copies' equal loads of x would be kept in registers that the accumulators need."""
        emit, args, source = self.emit, self.args, self.source
        with emit.when(args.begin.equals(0)):
            clear_sums(emit, args.sums, len(self.tokens))
        with emit.loop(args.begin, args.end) as index:
            group = args.codes + (index - args.begin) * source.nbytes
            x = self.token_addresses(args.x + index * self.row_bytes)
            self.lines = self.wanted(group)
            self.ask(len(self.lines))
            with emit.loop(0, emit.i64(PANELS)) as panel:
                planes = source.sums(emit, x)
                for step in range(source.steps):
                    planes.add(source.weights(emit, group, panel, step), self.tokens)
                scale = source.scale(emit, group, panel)
                for t in self.tokens:
                    to = args.sums + panel * 64 + SUMS_BYTES * t
                    product = planes.scaled(t, scale)
                    emit.store(to, emit.load(to, F32, 16, align=64) + product, align=64)

    def token_addresses(self, row: Val) -> list[Val]:
        return [row + FIXED15_GROUP.nbytes * t for t in self.tokens]

    def wanted(self, group: Val) -> list[Val]:
        """Lines to prefetch during a group: of the strip that is being read, or of the codes that
        are unpacked next."""
        if self.source.packed:
            ahead = group + PACKED_AHEAD
            lines = self.source.nbytes // LINE if self.order.prefetch else 0
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
