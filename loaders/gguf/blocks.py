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
    count = blocks.shape[1] // kind.nbytes
    seen = {name: plane.view(np.uint8).reshape(N, count, -1) for name, plane in planes.items()}
    _fill(kind.name, blocks.reshape(N, count, kind.nbytes), seen)
    return planes


def _fill(kind: str, blocks: Bytes, to: dict[str, Bytes]) -> None:
    """Move the bits of blocks [N, blocks, bytes] into planes, which are seen in the same way."""
    from hybrid_moe.loaders.gguf import block_loops as loops

    codes, scales = to["codes"], to["scales"]
    match kind:
        case "Q4_0" | "IQ4_NL":
            loops.scale_2_codes_2(blocks, scales, codes)
        case "MXFP4":
            loops.scale_1_codes_1(blocks, scales, codes)
        case "Q4_1":
            loops.scale_2_codes_4(blocks, scales, codes)
            loops.minima_of_blocks(blocks, to["minima"])
        case "Q5_0":
            loops.scale_2_codes_6(blocks, scales, codes)
            loops.fifth_bits_2(blocks, to["high"])
        case "Q5_1":
            loops.scale_2_codes_8(blocks, scales, codes)
            loops.minima_of_blocks(blocks, to["minima"])
            loops.fifth_bits_4(blocks, to["high"])
        case "Q8_0":
            loops.q8_0(blocks, scales, codes)
        case "Q2_K":
            loops.q2_k(blocks, scales, to["factors"], codes)
        case "Q3_K":
            loops.q3_k(blocks, scales, to["factors"], codes, to["high"])
        case "Q4_K":
            loops.q4_k(blocks, scales, to["factors"], codes)
        case "Q5_K":
            loops.q5_k(blocks, scales, to["factors"], codes)
            loops.q5_k_high(blocks, to["high"])
        case "Q6_K":
            loops.q6_k(blocks, scales, to["factors"], codes, to["high"])
        case "IQ4_XS":
            loops.iq4_xs(blocks, scales, to["factors"], codes)
        case _:
            raise AssertionError(kind)
