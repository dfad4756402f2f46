"""Dot kernels for a matrix unit: a strip times a block of up to 16 or 32 tokens.

The call and the sums are those of `dot`, for any count from 1 to M = 16 or 32. Registers are loaded
and stored whole, so a kernel reads up to `BLOCK_SLACK` bytes behind its tile and writes sums for M
tokens; those from `count` on mean nothing. Rows of a product do not mix, so what lies behind the
tile reaches no token's sums.

Operands lie in memory as TILELOADD wants them:

    A  activations of 16 tokens in one group, as they follow each other in a tile: a group's bytes
       apart (integer codes: 32 bytes of one plane each, of 80 with 16-bit activations) or 64 (BF16,
       the whole group)
    B  one panel in one group, 256 bytes from row to row, since a row of the strip has four panels:
       8 rows of bytes (unpacked, or the codes of INT8) or 16 rows of packed pairs (BF16)
    C  16 tokens x 16 rows of weights: sums of BF16 256 bytes apart; integers go to scratch

Integer codes sum a group in one register for each plane of the activations, and scale these by
vector: exact sums, so the bits are those of `group_dot`. BF16 sums in the order of
`tile_dot_pairs`.
"""

from __future__ import annotations

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
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, IntegerEncoding
from hybrid_moe.cpu_kernels.kernels.epilogue import clear
from hybrid_moe.cpu_kernels.kernels.group_dot import scaled_sum
from hybrid_moe.cpu_kernels.kernels.integer_dot import (
    encoding_of,
    strip_of,
    unpacked_layout,
    unpacked_scale,
)
from hybrid_moe.cpu_kernels.kernels.scalings import Scale, scale_of
from hybrid_moe.cpu_kernels.kernels.strip_cursor import StripCursor
from hybrid_moe.cpu_kernels.tuning import (
    BF16_BLOCK_AHEAD,
    BF16_CHUNK_GROUPS,
    BLOCK_TURN_TOKENS,
    INT8_BLOCK_AHEAD,
    SHARE_BYTES,
    UNPACK_GROUPS,
)
from hybrid_moe.formats.strips import GROUP, LINE, PANELS, SUMS_BYTES
from hybrid_moe.formats.weight_format import WeightFormat

_B_STRIDE = PANELS * ROW_BYTES

_WHOLE = TileShape()
BF16_CONFIG = TileConfig((_WHOLE,) * REGISTERS)

_TOTALS = 4
"""Registers of integer sums: a plane of a panel each."""
_FIRST_TOTAL = REGISTERS - _TOTALS


def integer_config(encoding: IntegerEncoding) -> TileConfig:
    """Registers of `integer_tile_dot`: A, a plane each; B, panels in turn; 4-7 C."""
    planes = len(encoding.planes)
    inputs = GROUP // encoding.halves
    a, b = TileShape(ROWS, inputs), TileShape(inputs // 4, ROW_BYTES)
    return TileConfig((a,) * planes + (b,) * (_FIRST_TOTAL - planes) + (_WHOLE,) * _TOTALS)


def integer_tile_dot(fmt: WeightFormat, activation_bits: int = 16) -> KernelBody:
    """Dot kernel of integer codes for up to 16 tokens: from unpacked signed bytes, or from the
    strip where its codes are signed bytes.

    With two planes of activations two panels are under way, with one all four. Formats with scales
    of 16 inputs multiply each half of a group alone, by blocks of half the depth. Meanwhile lines
    are prefetched: of the packed codes of the next chunk, or of the strip.
    """
    encoding, unpacked = encoding_of(fmt, activation_bits), fmt.code.bits < 8
    layout = unpacked_layout(fmt) if unpacked else strip_of(fmt)
    scale = unpacked_scale(fmt) if unpacked else scale_of(fmt, layout)
    planes = [int(getattr(encoding.at, name)) for name in encoding.planes]
    together = _TOTALS // len(planes)
    share = SHARE_BYTES // UNPACK_GROUPS if unpacked else layout.block_bytes

    def body(emit: Emit, args: DotArgs) -> None:
        tiles = Tiles(emit, integer_config(encoding))
        totals = emit.scratch(_TOTALS * REGISTER_BYTES)
        turns = (args.count + (BLOCK_TURN_TOKENS - 1)) & -BLOCK_TURN_TOKENS
        with emit.when(args.begin.equals(0)):
            clear(emit, args.sums, turns)
        first = args.begin - args.begin if unpacked else args.begin
        cursor = StripCursor(emit, layout, args.codes, first)
        with emit.loop(args.begin, args.end) as group:
            place = cursor.place
            x = args.x + group * (args.count * encoding.group_bytes)
            ahead = place.codes + INT8_BLOCK_AHEAD
            if unpacked:
                ahead = args.ahead + (group - args.begin) * share
            for line in range(0, share, LINE):
                emit.prefetch(ahead + line)
            for half in range(encoding.halves):
                for n, offset in enumerate(planes):
                    at = x + (offset + half * (GROUP // encoding.halves))
                    tiles.load(n, at, emit.i64(encoding.group_bytes))
                weights = place.codes + half * (layout.code_bytes // 2)
                for panel in range(0, PANELS, together):
                    panels = range(panel, panel + together)
                    _products(tiles, weights, panels, len(planes), totals)
                    scales = [scale(emit, place, p, half) for p in panels]
                    with emit.loop(0, turns, step=BLOCK_TURN_TOKENS) as turn:
                        for token in (turn + i for i in range(BLOCK_TURN_TOKENS)):
                            _add_scaled(
                                emit,
                                totals + token * ROW_BYTES,
                                x + token * encoding.group_bytes,
                                scales,
                                args.sums + token * SUMS_BYTES + 64 * panel,
                                encoding,
                                half,
                            )
            cursor.advance()

    return dot_kernel(body)


def _products(tiles: Tiles, weights: Val, panels: Sequence[int], planes: int, totals: Val) -> None:
    """totals [panel][plane][token 16][row 16] int32 = panels x planes of a group."""
    emit = tiles.emit
    b_registers = range(planes, _FIRST_TOTAL)
    for p, panel in enumerate(panels):
        b = b_registers[p % len(b_registers)]
        tiles.load(b, weights + ROW_BYTES * panel, emit.i64(_B_STRIDE))
        for plane in range(planes):
            c = _FIRST_TOTAL + planes * p + plane
            tiles.zero(c)
            tiles.dot_bytes(c, plane, b)
    for n in range(_TOTALS):
        tiles.store(_FIRST_TOTAL + n, totals + REGISTER_BYTES * n, emit.i64(ROW_BYTES))


def _add_scaled(
    emit: Emit,
    totals: Val,
    encoded: Val,
    scales: Sequence[Scale],
    sums: Val,
    encoding: IntegerEncoding,
    half: int,
) -> None:
    """sums[panel] += one token's part of a group, or of a half of it, for each of `scales`."""

    def field(name: str) -> Val:
        at = encoding.places[half].sum if name == "sum" else int(getattr(encoding.at, name))
        assert at is not None
        return emit.broadcast(emit.load(encoded + at, F32, align=4), 16)

    planes = len(encoding.planes)
    for p, scale in enumerate(scales):
        *high, exact = (
            emit.load(totals + REGISTER_BYTES * (planes * p + plane), I32, 16, align=64)
            for plane in range(planes)
        )
        if high:
            exact = (high[0] << 8) + exact
        product = scaled_sum(emit, exact, field, scale, encoding, by_exponent=True)
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
