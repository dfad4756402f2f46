"""Blocks of ggml into planes, compiled by numba: imported when the first block is read.

Each function takes rows of whole blocks, uint8 [N, bytes], and fills planes [N, ...] of the format
(`formats.ggml` says how they lie). Bits are moved, none is computed: what was in a block is in the
planes and the other way round.

Source: `ggml-common.h` for the blocks, `dequantize_row_*` in `ggml-quants.c` for what their bits
mean. qs, qh, scales and d are its names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba

from hybrid_moe.formats.numbers import Array

_Loop = TypeVar("_Loop", bound=Callable[..., Any])


def _njit(function: _Loop) -> _Loop:
    """`numba.njit(nogil=True)`, typed."""
    compiled: _Loop = numba.njit(nogil=True)(function)
    return compiled


@_njit
def _copy(row: Array, at: int, out: Array, to: int, nbytes: int) -> None:
    for i in range(nbytes):
        out[to + i] = row[at + i]


@_njit
def _nibbles(row: Array, at: int, nbytes: int, codes: Array, to: int) -> None:
    """The low nibbles of `nbytes` bytes are as many weights in turn, the high ones those after."""
    half = nbytes // 2
    for i in range(half):
        first, second = row[at + 2 * i], row[at + 2 * i + 1]
        codes[to + i] = (first & 15) | ((second & 15) << 4)
        codes[to + half + i] = (first >> 4) | (second & 0xF0)


@_njit
def _quarters(row: Array, at: int, codes: Array, to: int) -> None:
    """Bits 0 and 1 of 32 bytes are 32 weights in turn, bits 2 and 3 those after, ..."""
    for i in range(8):
        a, b = row[at + 4 * i], row[at + 4 * i + 1]
        c, d = row[at + 4 * i + 2], row[at + 4 * i + 3]
        for part in range(4):
            s = 2 * part
            low = ((a >> s) & 3) | (((b >> s) & 3) << 2)
            codes[to + 8 * part + i] = low | (((c >> s) & 3) << 4) | (((d >> s) & 3) << 6)


@_njit
def _store(word: int, nbytes: int, out: Array, to: int) -> None:
    """A little-endian word of so many bytes."""
    for byte in range(nbytes):
        out[to + byte] = (word >> (8 * byte)) & 0xFF


@_njit
def _fifth_bits(word: int) -> int:
    """32 bits in the order of weights -> the word of a group in the plane `high`: that of weight
    8 w + 2 b + p goes to bit p of pair w of byte b, so the pairs [w, b] are transposed."""
    swapped = (word ^ (word >> 6)) & 0x00CC00CC
    word ^= swapped | (swapped << 6)
    swapped = (word ^ (word >> 12)) & 0x0000F0F0
    return word ^ (swapped | (swapped << 12))


@_njit
def _gather_bit(row: Array, at: int, bit: int) -> int:
    """That bit of 32 bytes, the first byte's lowest."""
    word = 0
    for i in range(32):
        word |= ((row[at + i] >> bit) & 1) << i
    return word


@_njit
def nibble_blocks(
    blocks: Array, size: int, scales: Array, scale_bytes: int, codes: Array, qs: int
) -> None:
    """32 weights of four bits: a scale of `scale_bytes` first, nibbles from byte `qs`. Q4_0, Q4_1,
    Q5_0, Q5_1, IQ4_NL, MXFP4 (each without what lies between)."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // size):
            at = block * size
            _copy(row, at, scales[n], block * scale_bytes, scale_bytes)
            _nibbles(row, at + qs, 16, codes[n], block * 16)


@_njit
def minima_of_blocks(blocks: Array, size: int, minima: Array) -> None:
    """m, behind the scale. Q4_1, Q5_1."""
    for n in range(len(blocks)):
        for block in range(blocks.shape[1] // size):
            _copy(blocks[n], block * size + 2, minima[n], 2 * block, 2)


@_njit
def fifth_bits_of_blocks(blocks: Array, size: int, qh: int, high: Array) -> None:
    """A word of upper bits at byte `qh`, in the order of weights. Q5_0, Q5_1."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // size):
            at = block * size + qh
            word = 0
            for byte in range(4):
                word |= row[at + byte] << (8 * byte)
            _store(_fifth_bits(word), 4, high[n], 4 * block)


@_njit
def q8_0(blocks: Array, scales: Array, codes: Array) -> None:
    """d, then 32 signed bytes."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // 34):
            _copy(row, 34 * block, scales[n], 2 * block, 2)
            _copy(row, 34 * block + 2, codes[n], 32 * block, 32)


@_njit
def q2_k(blocks: Array, scales: Array, factors: Array, codes: Array) -> None:
    """scales[16], qs[64], d, dmin."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // 84):
            at = 84 * block
            _copy(row, at, scales[n], 16 * block, 16)
            _quarters(row, at + 16, codes[n], 64 * block)
            _quarters(row, at + 48, codes[n], 64 * block + 32)
            _copy(row, at + 80, factors[n], 4 * block, 4)


@_njit
def q3_k(blocks: Array, scales: Array, factors: Array, codes: Array, high: Array) -> None:
    """hmask[32], qs[64], scales[12], d. Of the first eight bytes of scales the low nibbles are of
    scales 0 to 7, the high ones of 8 to 15; byte i of the last four has the upper two bits of
    scales i, i + 4, i + 8 and i + 12."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // 110):
            at = 110 * block
            _quarters(row, at + 32, codes[n], 64 * block)
            _quarters(row, at + 64, codes[n], 64 * block + 32)
            for part in range(8):  # bit `part` of hmask: weights 32 part to 32 part + 31
                word = 0
                for i in range(32):  # weight 16 w + 4 b + p goes to bit 4 w + p of byte b
                    place = 8 * (i // 4 % 4) + 4 * (i // 16) + i % 4
                    word |= ((row[at + i] >> part) & 1) << place
                _store(word, 4, high[n], 32 * block + 4 * part)
            _nibbles(row, at + 96, 8, scales[n], 12 * block)
            for i in range(4):
                upper = 0
                for j in range(4):
                    upper |= ((row[at + 104 + j] >> (2 * i)) & 3) << (2 * j)
                scales[n, 12 * block + 8 + i] = upper
            _copy(row, at + 108, factors[n], 2 * block, 2)


@_njit
def _k_scales(row: Array, at: int, out: Array, to: int) -> None:
    """The twelve bytes of Q4_K and Q5_K (`get_scale_min_k4`). The lower six bits of bytes 0 to 3
    are scales 0 to 3, of bytes 4 to 7 minima 0 to 3; bytes 8 to 11 are the lower four bits of
    scales and of minima 4 to 7, whose upper two are the upper two of bytes 0 to 7."""
    s, m, upper = 0, 0, 0
    for i in range(4):
        a, b, c = row[at + i], row[at + 4 + i], row[at + 8 + i]
        s |= ((a & 15) << (4 * i)) | ((c & 15) << (4 * i + 16))
        m |= ((b & 15) << (4 * i)) | ((c >> 4) << (4 * i + 16))
        upper |= (((a >> 4) & 3) << (4 * i)) | (((b >> 4) & 3) << (4 * i + 2))
        upper |= ((a >> 6) << (4 * i + 16)) | ((b >> 6) << (4 * i + 18))
    _store(s, 4, out, to)
    _store(m, 4, out, to + 4)
    _store(upper, 4, out, to + 8)


@_njit
def q4_k(blocks: Array, size: int, scales: Array, factors: Array, codes: Array, qs: int) -> None:
    """d, dmin, scales[12], and qs[128] from byte `qs`. Q4_K; Q5_K without its upper bits."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // size):
            at = size * block
            _copy(row, at, factors[n], 4 * block, 4)
            _k_scales(row, at + 4, scales[n], 12 * block)
            for part in range(4):
                _nibbles(row, at + qs + 32 * part, 32, codes[n], 128 * block + 32 * part)


@_njit
def q5_k_high(blocks: Array, high: Array) -> None:
    """qh[32] behind the scales: bit j of byte i is of weight 32 j + i."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // 176):
            for part in range(8):
                word = _fifth_bits(_gather_bit(row, 176 * block + 16, part))
                _store(word, 4, high[n], 32 * block + 4 * part)


@_njit
def q6_k(blocks: Array, scales: Array, factors: Array, codes: Array, high: Array) -> None:
    """ql[128], qh[64], scales[16], d. In qh, bits 2 j and 2 j + 1 of byte 32 h + i are of weight
    128 h + 32 j + i; here weight 8 w + 2 b + p of a group goes to pair 2 (w % 2) + p of byte b of
    word w / 2."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // 210):
            at = 210 * block
            for half in range(2):
                _nibbles(row, at + 64 * half, 64, codes[n], 128 * block + 64 * half)
                for part in range(4):
                    to = 64 * block + 32 * half + 8 * part
                    for word in range(2):
                        for byte in range(4):
                            i = at + 128 + 32 * half + 16 * word + 2 * byte
                            s = 2 * part
                            low = ((row[i] >> s) & 3) | (((row[i + 1] >> s) & 3) << 2)
                            up = ((row[i + 8] >> s) & 3) | (((row[i + 9] >> s) & 3) << 2)
                            high[n, to + 4 * word + byte] = low | (up << 4)
            _copy(row, at + 192, scales[n], 16 * block, 16)
            _copy(row, at + 208, factors[n], 2 * block, 2)


@_njit
def iq4_xs(blocks: Array, scales: Array, factors: Array, codes: Array) -> None:
    """d, scales_h, scales_l[4], qs[128]."""
    for n in range(len(blocks)):
        row = blocks[n]
        for block in range(len(row) // 136):
            at = 136 * block
            _copy(row, at, factors[n], 2 * block, 2)
            _copy(row, at + 4, scales[n], 6 * block, 4)
            _copy(row, at + 2, scales[n], 6 * block + 4, 2)
            for part in range(8):
                _nibbles(row, at + 8 + 16 * part, 16, codes[n], 128 * block + 16 * part)
