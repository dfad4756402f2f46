"""Blocks of ggml into planes, compiled by numba: imported when the first block is read.

Each function takes rows of whole blocks, uint8 [N, blocks, bytes], and fills planes of the format,
uint8 [N, blocks, bytes] too (`formats.ggml` says how they lie). Bits are moved, none is computed:
what was in a block is in the planes and the other way round.

Places in a block are constants: numba lets an index be negative, and what it does about that keeps
a loop from becoming vectors unless the compiler sees that it is not.

Source: `ggml-common.h` for the blocks, `dequantize_row_*` in `ggml-quants.c` for what their bits
mean. qs, qh, scales and d are its names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, TypeVar

import numba

from hybrid_moe.formats.numbers import Array

_Loop = TypeVar("_Loop", bound=Callable[..., Any])
_Blocks: TypeAlias = Callable[..., None]


def _njit(function: _Loop) -> _Loop:
    """`numba.njit(nogil=True)`, typed."""
    compiled: _Loop = numba.njit(nogil=True)(function)
    return compiled


def _inline(function: _Loop) -> _Loop:
    """The same for a helper, put into its caller before places in a block become variables."""
    compiled: _Loop = numba.njit(inline="always")(function)
    return compiled


@_inline
def _copy(row: Array, at: int, out: Array, to: int, nbytes: int) -> None:
    for i in range(nbytes):
        out[to + i] = row[at + i]


@_inline
def _nibbles(row: Array, at: int, nbytes: int, codes: Array, to: int) -> None:
    """The low nibbles of `nbytes` bytes are as many weights in turn, the high ones those after."""
    for i in range(nbytes // 2):
        first, second = row[at + 2 * i], row[at + 2 * i + 1]
        codes[to + i] = (first & 15) | ((second & 15) << 4)
    for i in range(nbytes // 2):
        first, second = row[at + 2 * i], row[at + 2 * i + 1]
        codes[to + nbytes // 2 + i] = (first >> 4) | (second & 0xF0)


@_inline
def _quarters(row: Array, at: int, codes: Array, to: int) -> None:
    """Bits 0 and 1 of 32 bytes are 32 weights in turn, bits 2 and 3 those after, ..."""
    for part in range(4):
        for i in range(8):
            a, b = row[at + 4 * i] >> (2 * part), row[at + 4 * i + 1] >> (2 * part)
            c, d = row[at + 4 * i + 2] >> (2 * part), row[at + 4 * i + 3] >> (2 * part)
            low = (a & 3) | ((b & 3) << 2)
            codes[to + 8 * part + i] = low | ((c & 3) << 4) | ((d & 3) << 6)


@_inline
def _store(word: int, nbytes: int, out: Array, to: int) -> None:
    """A little-endian word of so many bytes."""
    for byte in range(nbytes):
        out[to + byte] = (word >> (8 * byte)) & 0xFF


@_inline
def _fifth_bits(word: int) -> int:
    """32 bits in the order of weights -> the word of a group in the plane `high`: that of weight
    8 w + 2 b + p goes to bit p of pair w of byte b, so the pairs [w, b] are transposed."""
    swapped = (word ^ (word >> 6)) & 0x00CC00CC
    word ^= swapped | (swapped << 6)
    swapped = (word ^ (word >> 12)) & 0x0000F0F0
    return word ^ (swapped | (swapped << 12))


@_inline
def _transpose(x: int) -> int:
    """Eight bytes as rows of an 8 x 8 matrix of bits -> its columns."""
    swapped = (x ^ (x >> 7)) & 0x00AA00AA00AA00AA
    x ^= swapped ^ (swapped << 7)
    swapped = (x ^ (x >> 14)) & 0x0000CCCC0000CCCC
    x ^= swapped ^ (swapped << 14)
    swapped = (x ^ (x >> 28)) & 0x00000000F0F0F0F0
    return x ^ (swapped ^ (swapped << 28))


def nibble_blocks(scale_bytes: int, qs: int) -> _Blocks:
    """32 weights of four bits: a scale of so many bytes first, nibbles from byte `qs`. Q4_0, Q4_1,
    Q5_0, Q5_1, IQ4_NL, MXFP4 (each without what lies between)."""

    def loop(blocks: Array, scales: Array, codes: Array) -> None:
        for n in range(blocks.shape[0]):
            for b in range(blocks.shape[1]):
                _copy(blocks[n, b], 0, scales[n, b], 0, scale_bytes)
                _nibbles(blocks[n, b], qs, 16, codes[n, b], 0)

    return _njit(loop)


scale_1_codes_1 = nibble_blocks(1, 1)
scale_2_codes_2 = nibble_blocks(2, 2)
scale_2_codes_4 = nibble_blocks(2, 4)
scale_2_codes_6 = nibble_blocks(2, 6)
scale_2_codes_8 = nibble_blocks(2, 8)


@_njit
def minima_of_blocks(blocks: Array, minima: Array) -> None:
    """m, behind the scale. Q4_1, Q5_1."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            _copy(blocks[n, b], 2, minima[n, b], 0, 2)


def fifth_bits_of_blocks(qh: int) -> _Blocks:
    """A word of upper bits at byte `qh`, in the order of weights. Q5_0, Q5_1."""

    def loop(blocks: Array, high: Array) -> None:
        for n in range(blocks.shape[0]):
            for b in range(blocks.shape[1]):
                block = blocks[n, b]
                word = 0
                for byte in range(4):
                    word |= block[qh + byte] << (8 * byte)
                _store(_fifth_bits(word), 4, high[n, b], 0)

    return _njit(loop)


fifth_bits_2 = fifth_bits_of_blocks(2)
fifth_bits_4 = fifth_bits_of_blocks(4)


@_njit
def q8_0(blocks: Array, scales: Array, codes: Array) -> None:
    """d, then 32 signed bytes."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            _copy(blocks[n, b], 0, scales[n, b], 0, 2)
            _copy(blocks[n, b], 2, codes[n, b], 0, 32)


@_njit
def q2_k(blocks: Array, scales: Array, factors: Array, codes: Array) -> None:
    """scales[16], qs[64], d, dmin."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[n, b]
            _copy(block, 0, scales[n, b], 0, 16)
            _quarters(block, 16, codes[n, b], 0)
            _quarters(block, 48, codes[n, b], 32)
            _copy(block, 80, factors[n, b], 0, 4)


@_njit
def q3_k(blocks: Array, scales: Array, factors: Array, codes: Array, high: Array) -> None:
    """hmask[32], qs[64], scales[12], d. Of the first eight bytes of scales the low nibbles are of
    scales 0 to 7, the high ones of 8 to 15; byte i of the last four has the upper two bits of
    scales i, i + 4, i + 8 and i + 12."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block, s, h = blocks[n, b], scales[n, b], high[n, b]
            _quarters(block, 32, codes[n, b], 0)
            _quarters(block, 64, codes[n, b], 32)
            # bit j of hmask's byte i is of weight 32 j + i; that of weight 16 w + 4 b + p goes to
            # bit 4 w + p of byte b
            for byte in range(4):
                rows = 0
                for place in range(8):
                    rows |= block[16 * (place // 4) + 4 * byte + place % 4] << (8 * place)
                rows = _transpose(rows)
                for part in range(8):
                    h[4 * part + byte] = (rows >> (8 * part)) & 0xFF
            _nibbles(block, 96, 8, s, 0)
            for i in range(4):
                upper = 0
                for j in range(4):
                    upper |= ((block[104 + j] >> (2 * i)) & 3) << (2 * j)
                s[8 + i] = upper
            _copy(block, 108, factors[n, b], 0, 2)


@_inline
def _k_scales(block: Array, out: Array) -> None:
    """The twelve bytes of Q4_K and Q5_K (`get_scale_min_k4`), behind d and dmin. The lower six bits
    of bytes 0 to 3 are scales 0 to 3, of bytes 4 to 7 minima 0 to 3; bytes 8 to 11 are the lower
    four bits of scales and of minima 4 to 7, whose upper two are the upper two of bytes 0 to 7."""
    s, m, upper = 0, 0, 0
    for i in range(4):
        a, b, c = block[4 + i], block[8 + i], block[12 + i]
        s |= ((a & 15) << (4 * i)) | ((c & 15) << (4 * i + 16))
        m |= ((b & 15) << (4 * i)) | ((c >> 4) << (4 * i + 16))
        upper |= (((a >> 4) & 3) << (4 * i)) | (((b >> 4) & 3) << (4 * i + 2))
        upper |= ((a >> 6) << (4 * i + 16)) | ((b >> 6) << (4 * i + 18))
    _store(s, 4, out, 0)
    _store(m, 4, out, 4)
    _store(upper, 4, out, 8)


def k_blocks(qs: int) -> _Blocks:
    """d, dmin, scales[12], and qs[128] from byte `qs`. Q4_K; Q5_K without its upper bits."""

    def loop(blocks: Array, scales: Array, factors: Array, codes: Array) -> None:
        for n in range(blocks.shape[0]):
            for b in range(blocks.shape[1]):
                block, c = blocks[n, b], codes[n, b]
                _copy(block, 0, factors[n, b], 0, 4)
                _k_scales(block, scales[n, b])
                for part in range(4):
                    _nibbles(block, qs + 32 * part, 32, c, 32 * part)

    return _njit(loop)


q4_k = k_blocks(16)
q5_k = k_blocks(48)


@_njit
def q5_k_high(blocks: Array, high: Array) -> None:
    """qh[32] behind the scales: bit j of byte i is of weight 32 j + i."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block, h = blocks[n, b], high[n, b]
            for byte in range(4):  # weight 8 w + 2 b + p goes to bit 2 w + p of byte b
                rows = 0
                for place in range(8):
                    rows |= block[16 + 8 * (place // 2) + 2 * byte + place % 2] << (8 * place)
                rows = _transpose(rows)
                for part in range(8):
                    h[4 * part + byte] = (rows >> (8 * part)) & 0xFF


@_njit
def q6_k(blocks: Array, scales: Array, factors: Array, codes: Array, high: Array) -> None:
    """ql[128], qh[64], scales[16], d. In qh, bits 2 j and 2 j + 1 of byte 32 h + i are of weight
    128 h + 32 j + i; here weight 8 w + 2 b + p of a group goes to pair 2 (w % 2) + p of byte b of
    word w / 2."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block, h = blocks[n, b], high[n, b]
            for half in range(2):
                _nibbles(block, 64 * half, 64, codes[n, b], 64 * half)
                for part in range(4):
                    for word in range(2):
                        for byte in range(4):
                            i = 128 + 32 * half + 16 * word + 2 * byte
                            s = 2 * part
                            low = ((block[i] >> s) & 3) | (((block[i + 1] >> s) & 3) << 2)
                            up = ((block[i + 8] >> s) & 3) | (((block[i + 9] >> s) & 3) << 2)
                            h[32 * half + 8 * part + 4 * word + byte] = low | (up << 4)
            _copy(block, 192, scales[n, b], 0, 16)
            _copy(block, 208, factors[n, b], 0, 2)


@_njit
def iq4_xs(blocks: Array, scales: Array, factors: Array, codes: Array) -> None:
    """d, scales_h, scales_l[4], qs[128]."""
    for n in range(blocks.shape[0]):
        for b in range(blocks.shape[1]):
            block = blocks[n, b]
            _copy(block, 0, factors[n, b], 0, 2)
            _copy(block, 4, scales[n, b], 0, 4)
            _copy(block, 2, scales[n, b], 4, 2)
            for part in range(8):
                _nibbles(block, 8 + 16 * part, 16, codes[n, b], 16 * part)
