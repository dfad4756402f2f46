"""Rotary positions of one token's queries or keys, with the roundings of torch's BF16 operations.

    first half  = bf16(bf16(x1 * cos1) - bf16(x2 * sin1))
    second half = bf16(bf16(x2 * cos2) + bf16(x1 * sin2))

Products and sums of bf16 are computed in float32 and rounded, as torch does; subtracting and adding
the negative are the same. Transformers' functions are this in some 15 operations.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.dsl.emit import Emit, Val
from hybrid_moe.cpu_kernels.kernels.encode import load_bf16, through_bf16, to_bf16

LANES = 8
"""The half of a head is a multiple of it."""


def rotate(
    emit: Emit, x: Val, cos: Val, sin: Val, out: Val, heads: Val, half: Val, other: Val
) -> None:
    """Kernel: x and out are bf16 [heads][2 * half]; cos and sin bf16, the second half of which lie
    `other` elements behind the first (0: both halves have the same)."""
    with emit.loop(0, heads) as head, emit.loop(0, half, LANES) as i:
        at, to = x + head * half * 4 + i * 2, out + head * half * 4 + i * 2
        x1, x2 = load_bf16(emit, at, LANES), load_bf16(emit, at + half * 2, LANES)
        (cos1, cos2), (sin1, sin2) = (
            [load_bf16(emit, table + i * 2 + shift, LANES) for shift in (emit.i64(0), other * 2)]
            for table in (cos, sin)
        )
        first = through_bf16(x1 * cos1) - through_bf16(x2 * sin1)
        second = through_bf16(x2 * cos2) + through_bf16(x1 * sin2)
        emit.store(to, to_bf16(first), align=2)
        emit.store(to + half * 2, to_bf16(second), align=2)
