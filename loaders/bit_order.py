"""Bits of packed matrices from the order of their files to the order of inputs.

Plain loops over arrays, compiled by numba at their first call: importing this module imports numba,
so it is imported where the first such matrix is read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import numba
import numpy as np
import numpy.typing as npt

_Loop = TypeVar("_Loop", bound=Callable[..., None])
_U8 = npt.NDArray[np.uint8]
_U32 = npt.NDArray[np.uint32]

_TILE = 16
"""Words of a cache line: a tile of so many columns is read and written whole."""


def _njit(function: _Loop) -> _Loop:
    """`numba.njit(nogil=True)`, typed."""
    compiled: _Loop = numba.njit(nogil=True)(function)
    return compiled


@_njit
def _transpose_words(words: _U32, out: _U32) -> None:
    rows, columns = words.shape
    for first in range(0, columns, _TILE):
        last = min(first + _TILE, columns)
        for row in range(rows):
            for column in range(first, last):
                out[column, row] = words[row, column]


@_njit
def _transpose_nibbles(words: _U32, shifts: _U32, out: _U8) -> None:
    rows, columns = words.shape
    for first in range(0, columns, _TILE):
        last = min(first + _TILE, columns)
        for row in range(0, rows, 2):
            for column in range(first, last):
                low = words[row, column]
                high = words[row + 1, column] if row + 1 < rows else np.uint32(0)
                for place in range(8):
                    a = (low >> shifts[place]) & np.uint32(15)
                    b = (high >> shifts[place]) & np.uint32(15)
                    out[8 * column + place, row // 2] = np.uint8(a | (b << np.uint32(4)))


@_njit
def _unpack_rows(words: _U32, out: _U8) -> None:
    rows, columns = words.shape
    for row in range(rows):
        for place in range(8):
            shift = np.uint32(4 * place)
            for column in range(0, columns, 2):
                a = (words[row, column] >> shift) & np.uint32(15)
                b = np.uint32(0)
                if column + 1 < columns:
                    b = (words[row, column + 1] >> shift) & np.uint32(15)
                out[8 * row + place, column // 2] = np.uint8(a | (b << np.uint32(4)))


@_njit
def _untile(tiles: _U32, inputs: int, block_rows: int, block_inputs: int, out: _U32) -> None:
    # in units of words; a tile is 32 rows of 16 words, two transposed squares of 16 x 16
    rows, words = out.shape
    per_word = inputs // words
    for first in range(0, rows, block_rows):
        some = min(block_rows, rows - first)
        for start in range(0, inputs, block_inputs):
            size = min(block_inputs, inputs - start)
            for row in range(0, some, 32):
                for word in range(0, size // per_word, 16):
                    at = (first * inputs + start * some + row * size) // per_word + 32 * word
                    for r in range(32):
                        square = at + 256 * (r // 16) + r % 16
                        for w in range(16):
                            out[first + row + r, start // per_word + word + w] = tiles[
                                square + 16 * w
                            ]


@_njit
def _join_halves(packed: _U8, out: _U8) -> None:
    # 64 bytes: the low nibbles are inputs 0..63, the high ones 64..127, in two's complement
    rows, size = packed.shape
    for row in range(rows):
        for base in range(0, size, 64):
            for pair in range(32):
                a, b = packed[row, base + 2 * pair], packed[row, base + 2 * pair + 1]
                low = (a & np.uint8(15)) | ((b & np.uint8(15)) << np.uint8(4))
                high = (a >> np.uint8(4)) | (b & np.uint8(0xF0))
                out[row, base + pair] = low ^ np.uint8(0x88)
                out[row, base + 32 + pair] = high ^ np.uint8(0x88)


def transpose_words(words: _U32) -> _U32:
    """uint32 [R, C] -> [C, R]."""
    out = np.empty(words.shape[::-1], np.uint32)
    _transpose_words(words, out)
    return out


def transpose_nibbles(words: _U32, order: tuple[int, ...]) -> _U8:
    """Words of eight columns to rows of nibbles.

    Args:
        words: uint32 [R, C]; of word [r, c] nibble i, low first, is of column 8 c + order[i].
        order: of the columns in a word.

    Returns:
        uint8 [8 C, ceil(R / 2)]: of each column the nibbles of all R, low first; where R is odd,
        the last upper one is 0.
    """
    shifts = np.empty(8, np.uint32)
    shifts[list(order)] = 4 * np.arange(8)
    out = np.empty((8 * words.shape[1], -(-words.shape[0] // 2)), np.uint8)
    _transpose_nibbles(words, shifts, out)
    return out


def unpack_rows(words: _U32) -> _U8:
    """uint32 [R, C], of word [r, c] nibble i of row 8 r + i -> uint8 [8 R, ceil(C / 2)], nibbles
    low first; where C is odd, the last upper one is 0."""
    out = np.empty((8 * words.shape[0], -(-words.shape[1] // 2)), np.uint8)
    _unpack_rows(words, out)
    return out


def untile(
    tiles: _U32, rows: int, inputs: int, bits: int, block_rows: int, block_inputs: int
) -> _U8:
    """kt-kernel's matrices for AMX: blocks of rows, in these blocks of inputs, in these 32 rows, in
    these tiles of 16 words, each of them two squares of 16 x 16 words, transposed.

    Args:
        tiles: uint32, all words.
        rows, inputs: of the matrix: whole tiles.
        bits: of a code, 4 or 8.
        block_rows, block_inputs: of a block, but for the last ones.

    Returns:
        uint8 [rows, inputs * bits / 8], codes in the order of inputs: signed bytes as they are; of
        4 bits, each code's nibble plus 8, low first.
    """
    out = np.empty((rows, inputs * bits // 32), np.uint32)
    _untile(tiles, inputs, block_rows, block_inputs, out)
    raw = out.view(np.uint8)
    if bits == 8:
        return raw
    joined = np.empty_like(raw)
    _join_halves(raw, joined)
    return joined
