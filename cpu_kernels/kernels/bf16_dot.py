"""Dot kernels of BF16. For each token, row and pair of inputs: sums += w[odd] * x[odd], then +=
w[even] * x[even]."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hybrid_moe.cpu_kernels.dsl.emit import I32, Emit, KernelBody, Val, Var
from hybrid_moe.cpu_kernels.kernels.dot import DotArgs, SumPlace, dot_kernel, load_sums, store_sums
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.tuning import BF16_AHEAD
from hybrid_moe.formats.strips import GROUP, PANELS, strip_layout
from hybrid_moe.formats.table import BF16

BF16_STRIP = strip_layout(BF16, GROUP)


def bf16_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel of BF16 for T = `tokens`."""

    def pairs(
        emit: Emit, at: Val, x: Val, panels: Sequence[int], total: dict[SumPlace, Var], ahead: int
    ) -> None:
        """One group of `panels`. Compiler fences keep the order, a line of weights and then its dot
        products; inputs stay memory operands of the instructions that use them."""
        for pair, panel in itertools.product(range(GROUP // 2), panels):
            line = at + 64 * (PANELS * pair + panel)
            if ahead:
                emit.prefetch(line + ahead)
            w = emit.load(line, I32, 16, align=64)
            for t in range(tokens):
                value = emit.load(x + (BF16_PAIRS.group_bytes * t + 4 * pair), I32, align=4)
                total[t, panel].set(emit.op("pair_dot", total[t, panel].get(), w, value))
            emit.barrier()

    def body(emit: Emit, args: DotArgs) -> None:
        step, ahead = tokens * BF16_PAIRS.group_bytes, BF16_AHEAD if order.prefetch else 0
        code = emit.var(args.codes + args.begin * BF16_STRIP.group_bytes)
        row = emit.var(args.x + args.begin * step)
        halves = [range(p, p + order.together) for p in range(0, PANELS, order.together)]
        places = [list(itertools.product(range(tokens), panels)) for panels in halves]
        total: dict[SumPlace, Var] = {}
        if order.kept:
            total = load_sums(emit, args.sums, args.begin, places[0])
        with emit.loop(args.begin, args.end) as group:
            for panels, some in zip(halves, places, strict=True):
                if not order.kept:
                    total = load_sums(emit, args.sums, group, some)
                pairs(emit, code.get(), row.get(), panels, total, ahead)
                if not order.kept:
                    store_sums(emit, args.sums, total)
            code.set(code.get() + BF16_STRIP.group_bytes)
            row.set(row.get() + step)
        if order.kept:
            store_sums(emit, args.sums, total)

    return dot_kernel(body)
