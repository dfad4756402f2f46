"""A 64-bit fingerprint of a piece of memory, at the speed of memory."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver
from hybrid_moe.cpu_kernels.jit.record import i64

MULTIPLIER = 0x1E3779B97F4A7C15
"""Odd, so that a product by it determines the other factor; bits of the golden ratio."""


@driver
def mix(state: int, word: int) -> int:
    """The state after `word`. For a fixed word a bijection of the state and the reverse, so one
    changed word always changes the result. The shift brings high bits down: without it a change of
    the highest bit alone, a sign, would stay there and cancel with the next."""
    product = (state ^ word) * MULTIPLIER
    return product ^ (product >> 32)


@driver
def fingerprint(address: int, words: int) -> int:
    """Fingerprint of `words` int64 at `address`, in eight lanes that do not wait for each other:
    lane i takes words i, i + 8, ...; then the lanes, the rest and the length are mixed."""
    a, b, c, d = 1, 2, 3, 4
    e, f, g, h = 5, 6, 7, 8
    whole = words // 8
    word = i64.at(address)
    for i in range(whole):
        at = 8 * i
        a, b = mix(a, word[at]), mix(b, word[at + 1])
        c, d = mix(c, word[at + 2]), mix(d, word[at + 3])
        e, f = mix(e, word[at + 4]), mix(f, word[at + 5])
        g, h = mix(g, word[at + 6]), mix(h, word[at + 7])
    state = mix(mix(mix(mix(a, b), c), d), e)
    state = mix(mix(mix(mix(state, f), g), h), words)
    for i in range(8 * whole, words):
        state = mix(state, word[i])
    return state
