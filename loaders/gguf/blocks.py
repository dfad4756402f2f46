"""Rows of ggml's blocks as the planes of our formats, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.numbers import Array
from hybrid_moe.loaders.gguf.ggml_types import GgmlType

Bytes: TypeAlias = npt.NDArray[np.uint8]
Take: TypeAlias = Callable[[int], Bytes]
"""Memory for so many bytes, aligned for every dtype."""


def fresh(nbytes: int) -> Bytes:
    """New memory."""
    return np.empty(nbytes, np.uint8)


def planes_of_blocks(kind: GgmlType, blocks: Bytes, take: Take = fresh) -> dict[str, Array]:
    """Planes of the rows, see `WeightFormat.planes`.

    Args:
        kind: a type of blocks whose `format` is read.
        blocks: uint8 [N, bytes of a row].
        take: where the planes lie.
    """
    fmt = kind.format
    assert fmt is not None and kind.weights > 1, kind.name
    N, K = len(blocks), blocks.shape[1] // kind.nbytes * kind.weights
    planes: dict[str, Array] = {}
    for plane in fmt.planes:
        rows, elements = plane.shape(N, K)
        raw = take(rows * elements * plane.dtype.itemsize)
        planes[plane.name] = raw.view(plane.dtype).reshape(rows, elements)
    _fill(kind, blocks, {name: plane.view(np.uint8) for name, plane in planes.items()})
    return planes


def _fill(kind: GgmlType, blocks: Bytes, to: dict[str, Bytes]) -> None:
    """Move the bits into planes, which are seen as bytes."""
    from hybrid_moe.loaders.gguf import block_loops as loops

    codes, scales, size = to["codes"], to["scales"], kind.nbytes
    match kind.name:
        case "Q4_0" | "IQ4_NL":
            loops.nibble_blocks(blocks, size, scales, 2, codes, 2)
        case "MXFP4":
            loops.nibble_blocks(blocks, size, scales, 1, codes, 1)
        case "Q4_1":
            loops.nibble_blocks(blocks, size, scales, 2, codes, 4)
            loops.minima_of_blocks(blocks, size, to["minima"])
        case "Q5_0":
            loops.nibble_blocks(blocks, size, scales, 2, codes, 6)
            loops.fifth_bits_of_blocks(blocks, size, 2, to["high"])
        case "Q5_1":
            loops.nibble_blocks(blocks, size, scales, 2, codes, 8)
            loops.minima_of_blocks(blocks, size, to["minima"])
            loops.fifth_bits_of_blocks(blocks, size, 4, to["high"])
        case "Q8_0":
            loops.q8_0(blocks, scales, codes)
        case "Q2_K":
            loops.q2_k(blocks, scales, to["factors"], codes)
        case "Q3_K":
            loops.q3_k(blocks, scales, to["factors"], codes, to["high"])
        case "Q4_K":
            loops.q4_k(blocks, size, scales, to["factors"], codes, 16)
        case "Q5_K":
            loops.q4_k(blocks, size, scales, to["factors"], codes, 48)
            loops.q5_k_high(blocks, to["high"])
        case "Q6_K":
            loops.q6_k(blocks, scales, to["factors"], codes, to["high"])
        case "IQ4_XS":
            loops.iq4_xs(blocks, scales, to["factors"], codes)
        case _:
            raise AssertionError(kind.name)
