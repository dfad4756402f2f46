"""MXFP4 in ggml's order."""

from __future__ import annotations

import numpy as np

from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.tensors import Matrix

_BLOCK = 17
"""Bytes of 32 weights: the scale, then element j beside element j + 16."""


def ggml_blocks(matrix: Matrix) -> Array:
    """MXFP4 [N, K/2] and [N, K/32] as ggml's blocks, uint8 [N, 17 * K/32].

    A byte of ours holds elements 2i and 2i + 1, one of ggml's j and j + 16.
    """
    assert matrix.scales is not None
    N, groups = matrix.scales.shape
    codes = matrix.codes.reshape(N, groups, 16)
    low, high = codes[..., :8], codes[..., 8:]  # elements 0 to 15 and 16 to 31
    blocks = np.empty((N, groups, _BLOCK), np.uint8)
    blocks[..., 0] = matrix.scales
    blocks[..., 1::2] = (low & 15) | (high << 4)
    blocks[..., 2::2] = (low >> 4) | (high & 0xF0)
    return blocks.reshape(N, groups * _BLOCK)
