"""Packing: rows of a checkpoint -> strips, a transposition of 32-bit words; and telling others."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, store_release
from hybrid_moe.cpu_kernels.jit.records import Word, i32, u8


@driver
def pack_strips(
    out: int,
    first_strip: int,
    last_strip: int,
    strip_bytes: int,
    scale_offset: int,
    words: int,
    scales_per_row: int,
    codes0: int,
    codes1: int,
    code_stride: int,
    scales0: int,
    scales1: int,
    scale_stride: int,
    panel_rows: int,
    rows: int,
) -> None:
    """Pack strips first..last-1 of a matrix.

    Panel 0 of strip s holds rows s * panel_rows + lane of (codes0, scales0), panel 1 the same rows
    of (codes1, scales1); for gate and up those are two matrices and panel_rows is 16, for down
    they are one matrix (the second shifted by 16 rows) and panel_rows is 32. `rows` bounds the
    rows of panel 0; a row at or past it is zeroes.
    """
    for strip in range(first_strip, last_strip):
        to = out + (strip - first_strip) * strip_bytes
        for panel in range(2):
            codes = codes0 if panel == 0 else codes1
            scales = scales0 if panel == 0 else scales1
            shift = panel * 16 if panel_rows == 32 else 0
            for lane in range(16):
                row = strip * panel_rows + lane
                words_to = i32.at(to + 4 * (16 * panel + lane))  # one of each 32
                scales_to = u8.at(to + scale_offset + 16 * panel + lane)
                if row + shift >= rows:
                    for w in range(words):
                        words_to[32 * w] = 0
                    for g in range(scales_per_row):
                        scales_to[32 * g] = 0
                    continue
                words_from = i32.at(codes + row * code_stride)
                for w in range(words):
                    words_to[32 * w] = words_from[w]
                scales_from = u8.at(scales + row * scale_stride)
                for g in range(scales_per_row):
                    scales_to[32 * g] = scales_from[g]


@driver
def publish_word(word: Word, value: int) -> None:
    """Store behind all earlier stores: pairs with the acquire of `route.expert_state`."""
    store_release(word, value)
