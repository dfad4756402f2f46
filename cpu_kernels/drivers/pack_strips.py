"""Packing: rows of a checkpoint -> strips, a transposition of 32-bit words; and publishing them."""

from __future__ import annotations

from hybrid_moe.cpu_kernels.drivers.intrinsics import driver, store_release
from hybrid_moe.cpu_kernels.jit.record import Word, i32, u8
from hybrid_moe.formats.strips import STRIP_ROWS

HALF_ROWS = STRIP_ROWS // 2


@driver
def pack_strips(
    out: int,
    first_strip: int,
    last_strip: int,
    groups: int,
    words: int,
    scales: int,
    scale_bytes: int,
    codes0: int,
    codes1: int,
    code_stride: int,
    scales0: int,
    scales1: int,
    scale_stride: int,
    half_step: int,
    rows: int,
) -> None:
    """Pack strips first..last-1 of a matrix, each [group][codes, scales], see `formats.strips`.

    A strip is two halves of 32 rows. The first comes from (codes0, scales0), the second from
    (codes1, scales1): for gate and up two matrices, of which a strip takes the same rows; for down
    one matrix, whose next 32 rows are `half_step` = 32 rows on (gate and up: 0). A row at or past
    `rows` is zeroes. In a group, a row has `words` 32-bit words of codes and `scales` scales of
    `scale_bytes` bytes.
    """
    code_bytes = 4 * STRIP_ROWS * words
    group_bytes = code_bytes + STRIP_ROWS * scales * scale_bytes
    for strip in range(first_strip, last_strip):
        to = out + (strip - first_strip) * groups * group_bytes
        for lane in range(STRIP_ROWS):
            half = lane // HALF_ROWS
            row = strip * (HALF_ROWS + half_step) + half * half_step + lane % HALF_ROWS
            code = i32.at((codes0 if half == 0 else codes1) + row * code_stride)
            scale = u8.at((scales0 if half == 0 else scales1) + row * scale_stride)
            for g in range(groups):
                code_to = i32.at(to + g * group_bytes + 4 * lane)
                for w in range(words):
                    value = 0
                    if row < rows:
                        value = code[g * words + w]
                    code_to[STRIP_ROWS * w] = value
                for s in range(scales):
                    scale_to = u8.at(
                        to + g * group_bytes + code_bytes + (STRIP_ROWS * s + lane) * scale_bytes
                    )
                    for b in range(scale_bytes):
                        value = 0
                        if row < rows:
                            value = scale[(g * scales + s) * scale_bytes + b]
                        scale_to[b] = value


@driver
def publish_word(word: Word, value: int) -> None:
    """Store behind all earlier stores: pairs with the acquire of `route.expert_state`."""
    store_release(word, value)
