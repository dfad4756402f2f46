"""Dot kernels: one strip of weights times the tokens of a tile.

    kernel(codes, ahead, x, count, sums, begin, end)

adds, for tokens t < count, groups begin..end-1 of the products of the strip's 64 rows with the
tile's encoded rows to sums, float32 [count][64]; see `DotArgs`. There is one for each count T. Sums
run over groups in ascending order whatever T, order, chunking and source, so a token's bits do not
depend on how a call is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hybrid_moe.cpu_kernels.dsl.emit import F32, Emit, KernelBody, Val, Var
from hybrid_moe.formats.strips import PANELS, SUMS_BYTES


@dataclass(frozen=True)
class DotArgs:
    """Parameters of a dot kernel.

    Attributes:
        codes: address of the strip; or of its groups from `begin` on, as they are unpacked.
        ahead: address of about the packed codes that are unpacked next. Kernels over unpacked codes
            prefetch 4 KiB of them.
        x: address of the tile, [group][token] of encoded groups.
        count: tokens of the tile.
        sums: address of float32 [count][64].
        begin, end: groups. If `begin` is 0, sums start from zero and memory's are not read.
    """

    codes: Val
    ahead: Val
    x: Val
    count: Val
    sums: Val
    begin: Val
    end: Val


DOT_ARITY = len(fields(DotArgs))


def dot_kernel(body: Callable[[Emit, DotArgs], None]) -> KernelBody:
    """`body` as a kernel of DOT_ARITY parameters."""
    return lambda emit, *values: body(emit, DotArgs(*values))


SumPlace = tuple[int, int]
"""Token and panel of a vector of sums, float32 [16]."""


def _sum_address(sums: Val, place: SumPlace) -> Val:
    return sums + (SUMS_BYTES * place[0] + 64 * place[1])


def load_sums(emit: Emit, sums: Val, begin: Val, places: Sequence[SumPlace]) -> dict[SumPlace, Var]:
    """The sums in registers; zero where `begin` is 0."""
    total = {
        place: emit.var(emit.load(_sum_address(sums, place), F32, 16, align=64)) for place in places
    }
    with emit.when(begin.equals(0)):
        for value in total.values():
            value.set(emit.splat(0.0, F32, 16))
    return total


def store_sums(emit: Emit, sums: Val, total: dict[SumPlace, Var]) -> None:
    for place, value in total.items():
        emit.store(_sum_address(sums, place), value.get(), align=64)


def clear_sums(emit: Emit, sums: Val, tokens: int) -> None:
    for place in itertools.product(range(tokens), range(PANELS)):
        emit.store(_sum_address(sums, place), emit.splat(0.0, F32, 16), align=64)
