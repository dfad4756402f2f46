"""Bits of packed matrices in the order of inputs, against plain NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from hybrid_moe.loaders.bit_order import transpose_nibbles, transpose_words, unpack_rows
from hybrid_moe.loaders.planes import AWQ_ORDER

SHAPES = [(1, 1), (2, 20), (3, 4), (8, 1), (32, 5), (136, 33), (256, 17)]
"""Less than a tile, whole tiles, and what is left of them."""


def _words(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, 2**32, (rows, columns), np.uint32)


def _pairs(nibbles: np.ndarray) -> np.ndarray:
    """[N, n] -> bytes [N, ceil(n / 2)], low first."""
    even = np.pad(nibbles, ((0, 0), (0, nibbles.shape[1] % 2)))
    return even[:, 0::2] | (even[:, 1::2] << 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_words(shape: tuple[int, int]) -> None:
    words = _words(*shape)
    assert np.array_equal(transpose_words(words), words.T)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("order", [AWQ_ORDER, tuple(range(8))])
def test_columns(shape: tuple[int, int], order: tuple[int, ...]) -> None:
    words = _words(*shape)
    nibbles = np.zeros((8 * shape[1], shape[0]), np.uint8)
    for place, column in enumerate(order):
        nibbles[column::8] = ((words >> np.uint32(4 * place)) & 15).T
    assert np.array_equal(transpose_nibbles(words, order), _pairs(nibbles))


@pytest.mark.parametrize("shape", SHAPES)
def test_rows(shape: tuple[int, int]) -> None:
    words = _words(*shape)
    nibbles = np.zeros((8 * shape[0], shape[1]), np.uint8)
    for place in range(8):
        nibbles[place::8] = (words >> np.uint32(4 * place)) & 15
    assert np.array_equal(unpack_rows(words), _pairs(nibbles))
