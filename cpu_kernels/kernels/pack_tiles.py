"""Kernels that pack: rows of a checkpoint become lanes of strips.

A plane's element has a place for each row of a strip, side by side. So packing is a transposition:
of 32-bit words, 16 rows by 16 (or by 4, for what is left of short rows); smaller elements are
transposed as words and taken out of them afterwards. Where the elements lie in a strip is a table,
and so is where the rows are: whatever a strip is made of, it is one pass over these two.

Loads and stores are all that there is to do. A tile takes a cache line of each of 64 rows, one
panel after the other, so that all 256 bytes of a word in its four panels are written at once.
Words go past the caches: strips are far larger than these, and a line that is written whole need
not be fetched (MXFP4 out of the second-level cache, one core of Zen 4: 20 GB/s; else 7.5).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from llvmlite import ir

from hybrid_moe.cpu_kernels.dsl.emit import I8, I16, I32, I64, Emit, KernelBody, Val, join
from hybrid_moe.cpu_kernels.kernels.transpose import transpose
from hybrid_moe.formats.strips import LINE, PANEL_ROWS, PANELS, STRIP_ROWS

AHEAD = 4 * LINE
"""How far ahead of a tile its rows are fetched: 64 streams are more than the processor follows by
itself. One core of Zen 4 packs MXFP4 rows from memory at 15 GB/s with it, at 11 without."""
_SECOND_LEVEL = 2
"""Rows a power of two apart share few sets of the first-level cache."""
NARROW = LINE // 4
"""Bytes of a row in a tile of short rows."""

KINDS: Mapping[int, ir.Type] = MappingProxyType({1: I8, 2: I16, 4: I32})
"""Bytes of an element -> its type."""


def _columns(emit: Emit, rows: Val, at: Val, tile_bytes: int) -> list[Val]:
    """Words of 16 rows, whose addresses are at `rows`, from byte `at` on: a vector each."""
    addresses = [emit.load(rows + 8 * i, I64, align=8) + at for i in range(PANEL_ROWS)]
    if tile_bytes == LINE:
        for row in addresses:
            emit.prefetch(row + AHEAD, _SECOND_LEVEL)
        return transpose([emit.load(row, I32, PANEL_ROWS) for row in addresses])
    parts = [emit.load(row, I32, NARROW // 4) for row in addresses]
    fours = [join(parts[i : i + 4]) for i in range(0, PANEL_ROWS, 4)]
    columns = []
    for word in range(4):
        halves = [
            a.shuffle([4 * row + word for row in range(8)], b)
            for a, b in zip(fours[::2], fours[1::2], strict=True)
        ]
        columns.append(join(halves))
    return columns


def _elements(column: Val, itemsize: int) -> list[Val]:
    """The elements of 16 words."""
    if itemsize == 4:
        return [column]
    kind = KINDS[itemsize]
    return [(column >> shift).trunc(kind) for shift in range(0, 32, 8 * itemsize)]


def pack_tiles(itemsize: int, tile_bytes: int) -> KernelBody:
    """Kernel (out, strip_bytes, strips, rows, offsets, elements), for rows of at least `tile_bytes`
    bytes, which are LINE or NARROW.

    rows is int64 [strips][64], the address of each row; offsets int64 [elements], from a strip to
    an element's first place. Strips are `strip_bytes` apart. The last tile of a row ends where the
    row does, and may begin in the one before.
    """

    def body(
        emit: Emit, out: Val, strip_bytes: Val, strips: Val, rows: Val, offsets: Val, elements: Val
    ) -> None:
        wide = tile_bytes // itemsize
        last = elements - wide
        with emit.loop(0, strips) as strip:
            to, lanes = out + strip * strip_bytes, rows + strip * (8 * STRIP_ROWS)
            with emit.loop(0, elements, wide) as tile:
                first = (tile > last).select(last, tile)
                table = offsets + first * 8
                with emit.loop(0, emit.i64(PANELS)) as panel:
                    here = lanes + panel * (8 * PANEL_ROWS)
                    place = to + panel * (itemsize * PANEL_ROWS)
                    columns = _columns(emit, here, first * itemsize, tile_bytes)
                    values = [v for column in columns for v in _elements(column, itemsize)]
                    for i, value in enumerate(values):
                        at = emit.load(table + 8 * i, I64, align=8)
                        align = itemsize * PANEL_ROWS
                        emit.store(place + at, value, align, past_caches=align == LINE)
        emit.order_stores()

    return body


def pack_one_by_one(itemsize: int) -> KernelBody:
    """Kernel (out, strip_bytes, strips, rows, offsets, elements, places) for rows of any length,
    and for rows that share their elements: rows is int64 [strips][places]."""
    kind = KINDS[itemsize]

    def body(
        emit: Emit,
        out: Val,
        strip_bytes: Val,
        strips: Val,
        rows: Val,
        offsets: Val,
        elements: Val,
        places: Val,
    ) -> None:
        with emit.loop(0, strips) as strip, emit.loop(0, places) as place:
            to = out + strip * strip_bytes + place * itemsize
            row = emit.load(rows + (strip * places + place) * 8, I64, align=8)
            with emit.loop(0, elements) as i:
                at = emit.load(offsets + i * 8, I64, align=8)
                emit.store(to + at, emit.load(row + i * itemsize, kind))

    return body
