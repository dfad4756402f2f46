"""Blocks into planes: nothing is lost, and weights are those of the `gguf` library."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from hybrid_moe.formats.numbers import Array
from hybrid_moe.loaders.gguf.blocks import planes_of_blocks
from hybrid_moe.loaders.gguf.ggml_types import GGML_TYPES, GgmlType
from tests.loaders.gguf.files import random_blocks

BLOCKS = [kind for kind in GGML_TYPES.values() if kind.format is not None and kind.weights > 1]


def test_the_types_are_ggmls() -> None:
    """Every type of the library has its name and sizes here."""
    sizes = {(int(kind), kind.name): size for kind, size in gguf.constants.GGML_QUANT_SIZES.items()}
    assert sizes == {(t.number, t.name): (t.weights, t.nbytes) for t in GGML_TYPES.values()}


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("seed", range(3))
def test_weights_equal_those_of_the_library(kind: GgmlType, seed: int) -> None:
    """Bit for bit (MXFP4's zeros lose their sign in the library, which has one zero).

    Both are exact up to one rounding to float32: a scale of 11 bits times a sub-scale of 6 or 8 and
    a code of 5 or 6 fits 24 bits, and so does an offset; their sum is rounded once.
    """
    rng = np.random.default_rng(seed)
    blocks = random_blocks(kind, rng, 5, 768)
    assert kind.format is not None
    ours = kind.format.dequantize(**planes_of_blocks(kind, blocks))
    reference = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(kind.number))
    assert np.isfinite(reference).all()
    if kind.name == "MXFP4":
        np.testing.assert_array_equal(ours, reference)
    else:
        np.testing.assert_array_equal(ours.view(np.uint32), reference.view(np.uint32))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_every_bit_of_a_block_has_its_place(kind: GgmlType) -> None:
    """Blocks of one set bit each: all their planes differ, have one bit set and no more bytes."""
    bits = 8 * kind.nbytes
    blocks = np.zeros((bits, kind.nbytes), np.uint8)
    blocks[np.arange(bits), np.arange(bits) // 8] = 1 << (np.arange(bits) % 8)
    planes = planes_of_blocks(kind, blocks)
    everything = np.concatenate([plane.view(np.uint8) for plane in planes.values()], axis=1)
    assert everything.shape == blocks.shape
    set_bits = np.unpackbits(everything, axis=1)
    np.testing.assert_array_equal(set_bits.sum(axis=1), 1)
    assert len(np.unique(set_bits.argmax(axis=1))) == bits


def test_planes_lie_where_the_caller_says() -> None:
    """Memory comes from `take`, in the sizes of the planes."""
    kind = next(kind for kind in BLOCKS if kind.name == "Q5_K")
    taken: list[Array] = []

    def take(nbytes: int) -> Array:
        taken.append(np.empty(nbytes, np.uint8))
        return taken[-1]

    blocks = random_blocks(kind, np.random.default_rng(3), 2, 256)
    planes = planes_of_blocks(kind, blocks, take)
    assert sum(map(len, taken)) == blocks.nbytes
    assert all(any(np.shares_memory(p, t) for t in taken) for p in planes.values())
