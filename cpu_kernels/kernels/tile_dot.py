"""Dot kernels for a matrix unit: a strip times a block of up to 16 or 32 tokens.

The call and the sums are those of `dot`, for any count from 1 to M = 16 or 32. Registers are loaded
and stored whole, so a kernel reads up to `BLOCK_SLACK` bytes behind its tile and writes sums for M
tokens; those from `count` on mean nothing. Rows of a product do not mix, so what lies behind the
tile reaches no token's sums.

Operands lie in memory as TILELOADD wants them:

    A  activations of 16 tokens in one group, as they follow each other in a tile: 80 bytes apart
       (MXFP4 and INT8, 32 bytes of one plane each) or 64 (BF16, the whole group)
    B  one panel in one group, 256 bytes from row to row, since a row of the strip has four panels:
       8 rows of bytes (MXFP4: unpacked; INT8: the codes) or 16 rows of packed pairs (BF16)
    C  16 tokens x 16 rows of weights: sums of BF16 256 bytes apart; integers go to scratch

MXFP4 and INT8 sum a group in two integer registers, one for each plane of the activations, and
scale them by vector: exact sums, so the bits are those of `group_dot`. BF16 sums in the order of
`tile_dot_pairs`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from hybrid_moe.cpu_kernels.dsl.emit import F32, I32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.tiles import (
    REGISTER_BYTES,
    REGISTERS,
    ROW_BYTES,
    ROWS,
    TileConfig,
    Tiles,
    TileShape,
)
from hybrid_moe.cpu_kernels.kernels.bf16_dot import BF16_STRIP
from hybrid_moe.cpu_kernels.kernels.dot import DotArgs, dot_kernel
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.epilogue import clear
from hybrid_moe.cpu_kernels.kernels.integer_dot import unpacked_layout, unpacked_scale
from hybrid_moe.cpu_kernels.kernels.scalings import Scale, ScaleOf, scale_of
from hybrid_moe.cpu_kernels.kernels.strip_cursor import Place
from hybrid_moe.cpu_kernels.tuning import (
    BF16_BLOCK_AHEAD,
    BF16_CHUNK_GROUPS,
    BLOCK_TURN_TOKENS,
    INT8_BLOCK_AHEAD,
    SHARE_BYTES,
    UNPACK_GROUPS,
)
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import GROUP, LINE, PANELS, SUMS_BYTES, StripLayout, strip_layout

_B_STRIDE = PANELS * ROW_BYTES

_WHOLE = TileShape()
_PLANE = TileShape(ROWS, GROUP)  # 32 int8 inputs of 16 tokens
_QUADS = TileShape(GROUP // 4, ROW_BYTES)
FIXED15_CONFIG = TileConfig((_PLANE, _PLANE, _QUADS, _QUADS, _WHOLE, _WHOLE, _WHOLE, _WHOLE))
BF16_CONFIG = TileConfig((_WHOLE,) * REGISTERS)

_PAIR = 2  # panels of integers whose planes are in C registers at a time: 2 x 2 of them
_PLANES = (FIXED15_GROUP.high, FIXED15_GROUP.low)


def _fixed15_tile_dot(
    emit: Emit,
    args: DotArgs,
    layout: StripLayout,
    share: int,
    scale: ScaleOf,
) -> None:
    """Dot kernel for up to 16 tokens, from signed bytes [quad][panel][lane][4], two panels at a
    time. `layout` is that of the weights from `args.codes` on, where group `args.begin` is. In each
    group `share` bytes from `ahead` on are prefetched.

    Registers: 0-1 A, a plane each; 2-3 B, a panel each; 4-7 C, [panel][plane].
    """
    tiles = Tiles(emit, FIXED15_CONFIG)
    totals = emit.scratch(2 * _PAIR * REGISTER_BYTES)
    turns = (args.count + (BLOCK_TURN_TOKENS - 1)) & -BLOCK_TURN_TOKENS
    with emit.when(args.begin.equals(0)):
        clear(emit, args.sums, turns)
    with emit.loop(args.begin, args.end) as group:
        index = group - args.begin
        weights = args.codes + index * layout.group_bytes
        place = Place(weights, weights + layout.code_bytes, args.codes)
        x = args.x + group * (args.count * FIXED15_GROUP.nbytes)
        for line in range(0, share, LINE):
            emit.prefetch(args.ahead + index * share + line)
        for plane, offset in enumerate(_PLANES):
            tiles.load(plane, x + offset, emit.i64(FIXED15_GROUP.nbytes))
        for first in range(0, PANELS, _PAIR):
            _products(tiles, weights + ROW_BYTES * first, totals)
            scales = [scale(emit, place, panel, 0) for panel in range(first, first + _PAIR)]
            with emit.loop(0, turns, step=BLOCK_TURN_TOKENS) as turn:
                for token in (turn + i for i in range(BLOCK_TURN_TOKENS)):
                    _add_scaled(
                        emit,
                        totals + token * ROW_BYTES,
                        x + token * FIXED15_GROUP.nbytes,
                        scales,
                        args.sums + token * SUMS_BYTES + 64 * first,
                    )


@dot_kernel
def mxfp4_tile_dot(emit: Emit, args: DotArgs) -> None:
    """From unpacked bytes; the packed codes of the next chunk are prefetched meanwhile."""
    share = SHARE_BYTES // UNPACK_GROUPS
    _fixed15_tile_dot(emit, args, unpacked_layout(MXFP4), share, unpacked_scale(MXFP4))


@dot_kernel
def int8_tile_dot(emit: Emit, args: DotArgs) -> None:
    """From the codes of a strip."""
    layout = strip_layout(INT8, GROUP)
    first = args.codes + args.begin * layout.group_bytes
    args = dataclasses.replace(args, codes=first, ahead=first + INT8_BLOCK_AHEAD)
    _fixed15_tile_dot(emit, args, layout, layout.group_bytes, scale_of(INT8, layout))


def _products(tiles: Tiles, weights: Val, totals: Val) -> None:
    """totals [panel 2][plane 2][token 16][row 16] int32 = two panels x both planes of a group."""
    emit = tiles.emit
    for p in range(_PAIR):
        tiles.load(2 + p, weights + ROW_BYTES * p, emit.i64(_B_STRIDE))
        for plane in range(2):
            c = 4 + 2 * p + plane
            tiles.zero(c)
            tiles.dot_bytes(c, plane, 2 + p)
    for n in range(2 * _PAIR):
        tiles.store(4 + n, totals + REGISTER_BYTES * n, emit.i64(ROW_BYTES))


def _add_scaled(emit: Emit, totals: Val, encoded: Val, scales: Sequence[Scale], sums: Val) -> None:
    """sums[panel] += (256 * high + low) * factor * scale of one token, for each of `scales`."""
    factor, exponent = (
        emit.broadcast(emit.load(encoded + offset, F32, align=4), 16)
        for offset in (FIXED15_GROUP.factor, FIXED15_GROUP.exponent)
    )
    for p, scale in enumerate(scales):
        high, low = (
            emit.load(totals + REGISTER_BYTES * (2 * p + plane), I32, 16, align=64)
            for plane in range(2)
        )
        exact = ((high << 8) + low).to_float()
        product = emit.op("times_power", exact, factor, exponent)
        product = scale.times(emit, product, by_exponent=True)
        emit.store(sums + 64 * p, emit.load(sums + 64 * p, F32, 16, align=64) + product, align=64)


def bf16_tile_dot(most: int) -> KernelBody:
    """Dot kernel of BF16 for up to `most` tokens, 16 or 32.

    Four C registers hold the sums of 16 tokens and four panels, so that a strip is read once, group
    by group; or those of 32 tokens and two panels, which use each register of weights twice. The
    other two panels then follow, chunk by chunk; the float32 sums are stored in between. Registers:

        16 tokens   0-3 C, 4 A, 5-7 B in turn
        32 tokens   0-3 C, 4-5 A, 6-7 B
    """
    blocks = most // ROWS
    together = PANELS // blocks
    b_registers = range(PANELS + blocks, REGISTERS)

    def in_registers(
        tiles: Tiles, args: DotArgs, panels: Sequence[int], begin: Val, end: Val
    ) -> None:
        """Groups begin..end-1 of `panels`, the sums in registers meanwhile."""
        emit = tiles.emit
        sums = {
            together * b + i: args.sums + (b * ROWS * SUMS_BYTES + 64 * panel)
            for b in range(blocks)
            for i, panel in enumerate(panels)
        }
        for c in sums:
            tiles.zero(c)
        with emit.when(begin > 0):
            for c, at in sums.items():
                tiles.load(c, at, emit.i64(SUMS_BYTES))
        with emit.loop(begin, end) as group:
            codes = args.codes + group * BF16_STRIP.group_bytes
            x = args.x + group * (args.count * BF16_PAIRS.group_bytes)
            for b in range(blocks):
                at = x + b * ROWS * BF16_PAIRS.group_bytes
                tiles.load(PANELS + b, at, emit.i64(BF16_PAIRS.group_bytes))
            # A panel's lines are 256 bytes apart. The first panels prefetch all of them, in order.
            lines = iter(range(0, BF16_STRIP.group_bytes if panels[0] == 0 else 0, LINE))
            for i, panel in enumerate(panels):
                register = b_registers[i % len(b_registers)]
                tiles.load(register, codes + ROW_BYTES * panel, emit.i64(_B_STRIDE))
                for line in itertools.islice(lines, BF16_STRIP.group_bytes // LINE // together):
                    emit.prefetch(codes + (BF16_BLOCK_AHEAD + line))
                for b in range(blocks):
                    tiles.dot_pairs(together * b + i, PANELS + b, register)
        for c, at in sums.items():
            tiles.store(c, at, emit.i64(SUMS_BYTES))

    def body(emit: Emit, args: DotArgs) -> None:
        tiles = Tiles(emit, BF16_CONFIG)
        if together == PANELS:
            in_registers(tiles, args, range(PANELS), args.begin, args.end)
            return
        with emit.loop(args.begin, args.end, step=BF16_CHUNK_GROUPS) as first:
            last = first + BF16_CHUNK_GROUPS
            last = (args.end < last).select(args.end, last)
            for panel in range(0, PANELS, together):
                in_registers(tiles, args, range(panel, panel + together), first, last)

    return dot_kernel(body)
