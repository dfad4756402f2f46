"""Dot kernels for a matrix unit: a strip times up to 16 or 32 tokens, block by block.

Same call and same sums as in `dot`, for any count from 1 to M. Sums of a block beyond `count`,
which the caller has room for, mean nothing; nor do the bytes behind a tile, which it reads.

A register of activations is 16 tokens of a tile as they lie there, 80 (MXFP4) or 64 bytes apart.
Panels of packed BF16 are B registers as they lie in a strip, 256 bytes from row to row; those of
MXFP4 once they are unpacked to bytes.

MXFP4 sums a group in two integer registers, one for each plane of the activations, and scales them
by vector: exact sums, so the bits are those of `dot`. BF16 sums in the order of `tile_dot_pairs`.
"""

from __future__ import annotations

from hybrid_moe.cpu_kernels.dsl.emit import F32, I32, Emit, KernelBody
from hybrid_moe.cpu_kernels.dsl.tiles import (
    REGISTER_BYTES,
    ROW_BYTES,
    ROWS,
    TileConfig,
    Tiles,
    TileShape,
)
from hybrid_moe.cpu_kernels.kernels.dot import (
    BF16_STRIP,
    UNPACKED_GROUP,
    DotArgs,
    Scale,
    dot_kernel,
)
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.epilogue import clear
from hybrid_moe.cpu_kernels.tuning import BLOCK_TURN_TOKENS
from hybrid_moe.formats.strips import GROUP, PANELS, SUMS_BYTES

_PANELS_STRIDE = PANELS * ROW_BYTES  # from one B row of a panel to the next
_PAIR = 2  # panels that meet a register of activations together

_WHOLE = TileShape()
_PLANE = TileShape(ROWS, GROUP)  # 32 int8 inputs of 16 tokens
_QUADS = TileShape(GROUP // 4, ROW_BYTES)
MXFP4_CONFIG = TileConfig((_PLANE, _PLANE, _QUADS, _QUADS, _WHOLE, _WHOLE, _WHOLE, _WHOLE))
BF16_CONFIG = TileConfig((_WHOLE,) * 8)


@dot_kernel
def mxfp4_tile_dot(emit: Emit, args: DotArgs) -> None:
    """Dot kernel of MXFP4 for up to 16 tokens, from unpacked signed bytes, two panels at a time."""
    tiles = Tiles(emit, MXFP4_CONFIG)
    turns = (args.count + (BLOCK_TURN_TOKENS - 1)) & -BLOCK_TURN_TOKENS
    totals = emit.scratch(2 * _PAIR * REGISTER_BYTES)  # of [panel][plane], as registers
    with emit.when(args.begin.equals(0)):
        clear(emit, args.sums, turns)
    nbytes = args.count * FIXED15_GROUP.nbytes
    a_stride, b_stride = emit.i64(FIXED15_GROUP.nbytes), emit.i64(_PANELS_STRIDE)
    with emit.loop(args.begin, args.end) as group:
        at = args.codes + (group - args.begin) * UNPACKED_GROUP.nbytes
        x = args.x + group * nbytes
        for plane, offset in enumerate((FIXED15_GROUP.high, FIXED15_GROUP.low)):
            tiles.load(plane, x + offset, a_stride)
        for first in range(0, PANELS, _PAIR):
            for p in range(_PAIR):
                tiles.load(2 + p, at + ROW_BYTES * (first + p), b_stride)
                for plane in range(2):
                    total = 4 + 2 * p + plane
                    tiles.zero(total)
                    tiles.dot_bytes(total, plane, 2 + p)
            for n in range(2 * _PAIR):
                tiles.store(4 + n, totals + REGISTER_BYTES * n, emit.i64(ROW_BYTES))
            scales = [
                Scale(
                    emit.load(at + (UNPACKED_GROUP.powers + 64 * (first + p)), F32, 16, align=64),
                    emit.load(
                        at + (UNPACKED_GROUP.exponents + 64 * (first + p)), F32, 16, align=64
                    ),
                )
                for p in range(_PAIR)
            ]
            with emit.loop(0, turns, step=BLOCK_TURN_TOKENS) as turn:
                for token in (turn + i for i in range(BLOCK_TURN_TOKENS)):
                    encoded = x + token * FIXED15_GROUP.nbytes
                    factor, exponent = (
                        emit.broadcast(emit.load(encoded + offset, F32, align=4), 16)
                        for offset in (FIXED15_GROUP.factor, FIXED15_GROUP.exponent)
                    )
                    for p, scale in enumerate(scales):
                        planes = totals + token * ROW_BYTES + 2 * REGISTER_BYTES * p
                        high = emit.load(planes, I32, 16, align=64)
                        low = emit.load(planes + REGISTER_BYTES, I32, 16, align=64)
                        exact = ((high << 8) + low).to_float()
                        product = emit.op("times_power", exact, factor, exponent)
                        product = emit.op("times_power", product, scale.power, scale.exponent)
                        to = args.sums + token * SUMS_BYTES + 64 * (first + p)
                        emit.store(to, emit.load(to, F32, 16, align=64) + product, align=64)


def bf16_tile_dot(most: int) -> KernelBody:
    """Dot kernel of BF16 for up to `most` tokens, 16 or 32: one or two registers of activations
    against two panels, so that each is loaded once for two or four products."""
    blocks = most // ROWS

    def body(emit: Emit, args: DotArgs) -> None:
        tiles = Tiles(emit, BF16_CONFIG)
        products = [(b, p) for b in range(blocks) for p in range(_PAIR)]
        nbytes = args.count * BF16_PAIRS.group_bytes
        sums_stride = emit.i64(SUMS_BYTES)
        a_stride, b_stride = emit.i64(BF16_PAIRS.group_bytes), emit.i64(_PANELS_STRIDE)
        with emit.loop(0, emit.i64(PANELS), step=_PAIR) as first:
            sums = args.sums + first * 64
            for b, p in products:
                tiles.zero(2 * b + p)
            with emit.when(args.begin > 0):
                for b, p in products:
                    tiles.load(2 * b + p, sums + (b * ROWS * SUMS_BYTES + 64 * p), sums_stride)
            with emit.loop(args.begin, args.end) as group:
                at = args.codes + (group - args.begin) * BF16_STRIP.group_bytes + first * ROW_BYTES
                x = args.x + group * nbytes
                for b in range(blocks):
                    tiles.load(4 + b, x + b * ROWS * BF16_PAIRS.group_bytes, a_stride)
                for p in range(_PAIR):
                    tiles.load(6 + p, at + ROW_BYTES * p, b_stride)
                for b, p in products:
                    tiles.dot_pairs(2 * b + p, 4 + b, 6 + p)
            for b, p in products:
                tiles.store(2 * b + p, sums + (b * ROWS * SUMS_BYTES + 64 * p), sums_stride)

    return dot_kernel(body)
