"""Packing: rows of a checkpoint -> strips, a transposition of 32-bit words; and publishing them."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, store_release
from hybrid_moe.cpu_kernels.jit.record import Word, i32, u8
from hybrid_moe.formats.strips import PANEL_ROWS, STRIP_ROWS

HALF_ROWS = STRIP_ROWS // 2


@driver
def store_element(to: int, itemsize: int, index: int, source: int, exists: int) -> None:
    """Element `index` of a row, or zero where there is no such row."""
    if itemsize == 4:
        word = 0
        if exists != 0:
            word = i32.at(source)[index]
        i32.at(to)[0] = word
    else:
        for b in range(itemsize):
            byte = 0
            if exists != 0:
                byte = u8.at(source)[index * itemsize + b]
            u8.at(to)[b] = byte


@driver
def pack_plane(
    out: int,
    first_strip: int,
    last_strip: int,
    strip_bytes: int,
    units: int,
    unit_bytes: int,
    block_units: int,
    block_bytes: int,
    count: int,
    itemsize: int,
    rows0: int,
    rows1: int,
    row_stride: int,
    shared_rows: int,
    half_step: int,
    rows: int,
) -> None:
    """Pack one plane of strips first..last-1 of a matrix, see `formats.strips`.

    A strip is two halves of 32 rows. The first comes from `rows0`, the second from `rows1`: for
    gate and up two matrices, of which a strip takes the same rows; for down one matrix, whose next
    32 rows are `half_step` = 32 rows on (gate and up: 0). A row at or past `rows` is zeroes.

    A row has `units` times `count` elements of `itemsize` bytes. Units are `unit_bytes` apart,
    `block_units` of them in a block, and blocks `block_bytes`; `out` is where the first strip's
    first unit belongs. In a unit, an element has a place for each of 64 rows; or if `shared_rows`
    rows share one, for each of four panels.
    """
    for strip in range(first_strip, last_strip):
        to = out + (strip - first_strip) * strip_bytes
        each = 1
        if shared_rows > 1:
            each = PANEL_ROWS
        places = STRIP_ROWS // each
        for place in range(places):
            lane = place * each
            half = lane // HALF_ROWS
            row = strip * (HALF_ROWS + half_step) + half * half_step + lane % HALF_ROWS
            source = (rows0 if half == 0 else rows1) + row // shared_rows * row_stride
            exists = 0
            if row < rows:
                exists = 1
            block = to + place * itemsize
            unit = 0
            while unit < units:
                last = min(units, unit + block_units)
                for u in range(unit, last):
                    at = block + (u - unit) * unit_bytes
                    for i in range(count):
                        store_element(
                            at + i * places * itemsize, itemsize, u * count + i, source, exists
                        )
                unit = last
                block += block_bytes


@driver
def publish_word(word: Word, value: int) -> None:
    """Store behind all earlier stores: pairs with the acquire of `route.expert_state`."""
    store_release(word, value)
