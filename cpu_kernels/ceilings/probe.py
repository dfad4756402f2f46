"""Loops that do nothing but read: the ceiling beside which decode figures stand."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

from hybrid_moe.cpu_kernels.dsl.emit import I32, I64, Emit, KernelBody, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import choose_tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions

BYTES_PER_STEP = 512
_AHEAD = 4096


def read_blocks(prefetches: bool) -> KernelBody:
    """Kernel (table, count, nbytes, out): sum of all 32-bit words of `count` blocks, 16 lanes.

    `table` is int64 [count], the addresses of blocks of `nbytes` (a multiple of 512) each: the
    order of reading is the table's, and no Python runs between blocks.

    Args:
        prefetches: whether each line is asked for a page ahead. Zen 3 reads faster so; on Zen 4 its
            own prefetchers do better alone, by 1 to 8 %.
    """

    def kernel(emit: Emit, table: Val, count: Val, nbytes: Val, out: Val) -> None:
        sums = [emit.var(emit.splat(0, I32, 16)) for _ in range(4)]
        with emit.loop(0, count) as block:
            address = emit.load(table + block * 8, I64, align=8)
            with emit.loop(0, nbytes, BYTES_PER_STEP) as at:
                for line in range(BYTES_PER_STEP // 64):
                    total = sums[line % len(sums)]
                    total.set(total.get() + emit.load(address + at + 64 * line, I32, 16, align=64))
                    if prefetches:
                        emit.prefetch(address + at + (64 * line + _AHEAD))
        emit.store(out, (sums[0].get() + sums[1].get()) + (sums[2].get() + sums[3].get()), align=4)

    return kernel


@functools.cache
def reader(prefetches: bool) -> Callable[[int, int, int, int], None]:
    """The compiled kernel as a Python callable that releases the GIL."""
    tier = choose_tier()
    name = "read_blocks_ahead" if prefetches else "read_blocks"
    text = build_module([(name, 4, read_blocks(prefetches))], tier, "probe")
    address = compile_functions(text, tier.target, [name], "probe")[name]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)
