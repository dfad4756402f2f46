"""Peak multiply-accumulates per second of the vector language's dot products.

A tile of a few accumulators, one panel of weights in registers and activations broadcast from the
first-level cache: what a dot kernel could reach if decoding, scales and memory were free.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from hybrid_moe.cpu_kernels.bandwidth import repetitions_per_second
from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, KernelBody, Val, build_module
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, available_tiers, choose_tier
from hybrid_moe.cpu_kernels.jit.compile import compile_functions
from hybrid_moe.cpu_kernels.pool.config import PoolConfig

ROWS = 16
_ACTIVATION_WINDOW = 2048  # bytes of activations: well inside a first-level cache


@dataclass(frozen=True)
class DotOp:
    """A dot product of the vector language: inputs per lane, element of weights, accumulators."""

    name: str
    inputs: int
    weight_lanes: int
    is_float: bool


BYTE_DOT = DotOp("byte_dot", 4, 64, is_float=False)
PAIR_DOT = DotOp("pair_dot", 2, 16, is_float=True)


@dataclass(frozen=True)
class DotUse:
    """How a format multiplies: `planes` dot products for each product of the mathematics."""

    op: DotOp
    planes: int


USES: Mapping[str, DotUse] = MappingProxyType(
    {"MXFP4": DotUse(BYTE_DOT, 2), "BF16": DotUse(PAIR_DOT, 1)}
)
"""MXFP4 multiplies by activations of two 8-bit planes, so each product takes two byte products."""


@dataclass(frozen=True)
class Tile:
    """Accumulators of tokens x panels, 16 lanes each."""

    tokens: int
    panels: int

    @property
    def accumulators(self) -> int:
        return self.tokens * self.panels


TILES = (Tile(2, 1), Tile(4, 1), Tile(6, 1), Tile(2, 2), Tile(8, 1), Tile(4, 2), Tile(6, 2))
"""Tried in turn: which is best differs by the number of registers and their width."""

_UNROLL = 4


def _tiles(tier: Tier) -> list[Tile]:
    """Tiles whose accumulators leave some registers free."""
    room = max(2, (tier.registers - 3) // tier.registers_per_panel)
    return [tile for tile in TILES if tile.accumulators <= room]


def _kernel(op: DotOp, tile: Tile) -> KernelBody:
    """Kernel (weights, activations, steps, out)."""

    def body(emit: Emit, weights: Val, activations: Val, steps: Val, out: Val) -> None:
        zero = emit.splat(0.0 if op.is_float else 0, F32 if op.is_float else I32, ROWS)
        sums = [[emit.var(zero) for _ in range(tile.panels)] for _ in range(tile.tokens)]
        kind = I32 if op.is_float else I8
        w = [emit.load(weights + 64 * p, kind, op.weight_lanes, 64) for p in range(tile.panels)]
        with emit.loop(0, steps, _UNROLL) as step:
            # an address that changes with each step keeps the products inside the loop
            at = activations + ((step * 64) & (_ACTIVATION_WINDOW - 1))
            for u, t in itertools.product(range(_UNROLL), range(tile.tokens)):
                x = emit.load(at + (64 * u + 4 * t), I32, align=4)
                for p in range(tile.panels):
                    sums[t][p].set(emit.op(op.name, sums[t][p].get(), w[p], x))
        for t, p in itertools.product(range(tile.tokens), range(tile.panels)):
            at = out + 64 * (t * tile.panels + p)
            emit.store(at, sums[t][p].get().bits(I32), align=4)

    return body


def _compiled(op: DotOp, tile: Tile, tier: Tier) -> Callable[[int, int, int, int], None]:
    label = f"peak_{op.name}_{tile.tokens}x{tile.panels}"
    text = build_module([("peak", 4, _kernel(op, tile))], tier, label)
    address = compile_functions(text, tier.target, ["peak"], label)["peak"]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 4)(address)


def peak_macs(op: DotOp, threads: int, tier: Tier | None = None, seconds: float = 0.3) -> float:
    """Peak multiply-accumulates per second of `op`, on `threads` pinned threads at once.

    The best of several tiles and runs: a ceiling, which interference only lowers.
    """
    tier = tier or choose_tier()
    tiles = _tiles(tier)
    runs = [tile for tile in tiles for _ in range(3)]
    return max(_run(op, tile, threads, tier, seconds / len(runs)) for tile in runs)


def _run(op: DotOp, tile: Tile, threads: int, tier: Tier, seconds: float) -> float:
    """Multiply-accumulates per second of one tile."""
    kernel = _compiled(op, tile, tier)
    # ones (bf16) and small bytes: no subnormals, no NaN
    pattern = 0x3F803F80 if op.is_float else 0x01010101
    words = np.full((_ACTIVATION_WINDOW + 4096) // 4, pattern, np.int32)
    aligned = words.ctypes.data + -words.ctypes.data % 64
    steps_per_call = 20_000
    macs_per_call = steps_per_call * tile.accumulators * ROWS * op.inputs
    outs = [np.zeros(16 * tile.accumulators, np.int32) for _ in range(threads)]

    def call(thread: int) -> None:
        kernel(aligned, aligned + 1024, steps_per_call, outs[thread].ctypes.data)

    return repetitions_per_second(PoolConfig(threads), call, seconds) * macs_per_call


def mac_ceiling(method: str, threads: int, tier: Tier | None = None) -> float:
    """Peak multiply-accumulates per second of a format: its dot product's, over its planes.

    Raises:
        ValueError: how the format multiplies is not in `USES`.
    """
    use = USES.get(method)
    if use is None:
        raise ValueError(f"no ceiling known for {method}: add how it multiplies to USES")
    return peak_macs(use.op, threads, tier) / use.planes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    for report in available_tiers():
        if report.usable:
            for op in (BYTE_DOT, PAIR_DOT):
                peak = peak_macs(op, threads, report.tier) / 1e9
                print(f"{report.tier.name:12} {op.name:9} {threads} threads {peak:8.1f} GMAC/s")


if __name__ == "__main__":
    main()
