"""Dot kernels for a matrix unit: a strip times up to 16 or 32 tokens, block by block.

Same call and same sums as in `dot`, for any count from 1 to M. Sums of a block beyond `count`,
which the caller has room for, mean nothing.

A block of activations is gathered from the tokens' rows: 16 x 64 bytes per group of 32 inputs, 16
loads and stores beside 32 (MXFP4: 64) cycles of the matrix unit. Packed rows of BF16 are B
registers as they lie in a strip; those of MXFP4 once they are unpacked to bytes.

MXFP4 sums a group in two integer registers, one for each plane of the activations, and scales them
by vector: exact sums, so the bits are those of `dot`. BF16 sums in the order of `tile_dot_pairs`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, I64, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.tiles import (
    REGISTER_BYTES,
    ROW_BYTES,
    ROWS,
    TileConfig,
    Tiles,
    TileShape,
)
from hybrid_moe.cpu_kernels.kernels.dot import (
    BF16_GROUP_BYTES,
    MXFP4_UNPACKED_GROUP_BYTES,
    PANELS,
    mxfp4_scales,
    prefetch,
)
from hybrid_moe.cpu_kernels.kernels.encode import META_BYTES, PLANE_BYTES
from hybrid_moe.cpu_kernels.kernels.epilogue import clear
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS

_SUMS_STRIDE = 4 * STRIP_ROWS
_PANELS_STRIDE = PANELS * ROW_BYTES  # from one B row of a panel to the next

_WHOLE = TileShape()
_PLANE = TileShape(ROWS, GROUP)  # 32 int8 inputs of 16 tokens
_QUADS = TileShape(GROUP // 4, ROW_BYTES)
MXFP4_CONFIG = TileConfig((_PLANE, _PLANE, _QUADS, _QUADS, _WHOLE, _WHOLE, _WHOLE, _WHOLE))
BF16_CONFIG = TileConfig((_WHOLE,) * 8)

TURN = 4
"""Tokens per turn of the loops beside the matrix unit, which else are longer than its products."""


class _Block:
    """Encoded rows of up to `most` tokens, one group at a time: 64 bytes of each.

    Attributes:
        count: the caller's, rounded up to whole turns; the tokens added repeat the first one.
        base: address of the gathered rows, 64 bytes apart.
    """

    def __init__(self, emit: Emit, rows: Val, count: Val, most: int) -> None:
        self._emit = emit
        self.count = (count + (TURN - 1)) & -TURN
        self.base = emit.scratch(most * ROW_BYTES)
        self._rows = emit.scratch(most * 8)
        with emit.loop(0, emit.i64(most)) as token:
            row = emit.load(rows + (token < count).select(token, 0) * 8, I64, align=8)
            emit.store(self._rows + token * 8, row, align=8)
            # a register is loaded whole: what is not gathered is zero
            emit.store(self.base + token * ROW_BYTES, emit.splat(0, I8, ROW_BYTES), align=64)

    @contextmanager
    def tokens(self) -> Iterator[list[tuple[Val, Val]]]:
        """A loop over (token, address of its row), some at a time."""
        emit = self._emit
        with emit.loop(0, self.count, step=TURN) as first:
            turn = [first + i for i in range(TURN)]
            yield [(token, emit.load(self._rows + token * 8, I64, align=8)) for token in turn]

    def gather(self, group: Val) -> None:
        """Fetch the tokens' bytes of a group."""
        emit = self._emit
        with self.tokens() as turn:
            for token, row in turn:
                values = emit.load(row + group * ROW_BYTES, I8, ROW_BYTES, align=64)
                emit.store(self.base + token * ROW_BYTES, values, align=64)


def mxfp4_tile_dot(
    emit: Emit,
    codes: Val,
    scales: Val,
    rows: Val,
    count: Val,
    sums: Val,
    begin: Val,
    end: Val,
    groups: Val,
) -> None:
    """Dot kernel of MXFP4 for up to 16 tokens, from unpacked signed bytes."""
    tiles = Tiles(emit, MXFP4_CONFIG)
    block = _Block(emit, rows, count, ROWS)
    totals = emit.scratch(2 * PANELS * REGISTER_BYTES)  # of [panel][plane], as registers
    with emit.when(begin.equals(0)):
        clear(emit, sums, block.count)
    stride, panels_stride = emit.i64(ROW_BYTES), emit.i64(_PANELS_STRIDE)
    with emit.loop(begin, end) as group:
        at = codes + (group - begin) * MXFP4_UNPACKED_GROUP_BYTES
        block.gather(group)
        for plane in range(2):
            tiles.load(plane, block.base + GROUP * plane, stride)
        for panel in range(PANELS):
            tiles.load(2 + panel, at + ROW_BYTES * panel, panels_stride)
            for plane in range(2):
                total = 4 + 2 * panel + plane
                tiles.zero(total)
                tiles.dot_bytes(total, plane, 2 + panel)
        for n in range(2 * PANELS):
            tiles.store(4 + n, totals + REGISTER_BYTES * n, stride)
        scale_at = scales + (group - begin) * STRIP_ROWS
        scale = [mxfp4_scales(emit, scale_at + 16 * panel) for panel in range(PANELS)]
        with block.tokens() as turn:
            for token, row in turn:
                factor = emit.load(row + groups * PLANE_BYTES + group * META_BYTES, F32, align=4)
                for panel in range(PANELS):
                    planes = totals + token * ROW_BYTES + 2 * REGISTER_BYTES * panel
                    high = emit.load(planes, I32, 16, align=64)
                    low = emit.load(planes + REGISTER_BYTES, I32, 16, align=64)
                    product = ((high << 8) + low).to_float() * factor
                    to = sums + token * _SUMS_STRIDE + 64 * panel
                    old = emit.load(to, F32, 16, align=64)
                    emit.store(to, emit.op("scale_add", old, product, scale[panel]), align=64)


def bf16_tile_dot(most: int) -> KernelBody:
    """Dot kernel of BF16 for up to `most` tokens, 16 or 32: one or two registers of activations
    against both panels, so that each is loaded once for two or four products."""
    blocks = most // ROWS

    def body(
        emit: Emit,
        codes: Val,
        scales: Val,
        rows: Val,
        count: Val,
        sums: Val,
        begin: Val,
        end: Val,
        groups: Val,
    ) -> None:
        del scales, groups
        tiles = Tiles(emit, BF16_CONFIG)
        block = _Block(emit, rows, count, most)
        products = [(b, p) for b in range(blocks) for p in range(PANELS)]
        sums_stride = emit.i64(_SUMS_STRIDE)

        def sums_at(b: int, p: int) -> Val:
            return sums + (b * ROWS * _SUMS_STRIDE + 64 * p)

        for b, p in products:
            tiles.zero(2 * b + p)
        with emit.when(begin > 0):
            for b, p in products:
                tiles.load(2 * b + p, sums_at(b, p), sums_stride)
        stride, panels_stride = emit.i64(ROW_BYTES), emit.i64(_PANELS_STRIDE)
        with emit.loop(begin, end) as group:
            at = codes + (group - begin) * BF16_GROUP_BYTES
            if blocks == 1:  # weights may be streaming from memory
                prefetch(emit, at, BF16_GROUP_BYTES)
            block.gather(group)
            for b in range(blocks):
                tiles.load(4 + b, block.base + b * REGISTER_BYTES, stride)
            for p in range(PANELS):
                tiles.load(6 + p, at + ROW_BYTES * p, panels_stride)
            for b, p in products:
                tiles.dot_pairs(2 * b + p, 4 + b, 6 + p)
        for b, p in products:
            tiles.store(2 * b + p, sums_at(b, p), sums_stride)

    return body
