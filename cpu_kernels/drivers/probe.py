"""Reading memory as fast as it goes: the ceiling beside which decode figures stand."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.memory import driver, load64


@driver
def read_sum(address, lines):  # type: ignore[no-untyped-def]
    """Sum of all words of `lines` cache lines, four independent chains."""
    a = 0
    b = 0
    c = 0
    d = 0
    for i in range(lines):
        at = address + 64 * i
        a += load64(at) + load64(at + 32)
        b += load64(at + 8) + load64(at + 40)
        c += load64(at + 16) + load64(at + 48)
        d += load64(at + 24) + load64(at + 56)
    return a + b + c + d
