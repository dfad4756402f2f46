"""A strip is also an A operand of tensor cores: `mma.m16n8k16` takes its bytes as they lie there.

A warp of 32 lanes t = l // 4, q = l % 4 loads 16 aligned bytes a lane: four rows of one word. PTX's
fragments: A of a lane has rows t and t + 8 in columns 2q, 2q + 1, 2q + 8, 2q + 9; B has these rows
(k) of column t; C rows t and t + 8 in columns 2q, 2q + 1. Rows and k may be permuted at will as
long as A, B and C agree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.strips.pack import pack_gate_up
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS, strip_layout
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import Array, decode, random_matrix
from tests.cpu_kernels.toolbox import aligned

LANES = [(lane // 4, lane % 4) for lane in range(32)]
HALF_ROWS = STRIP_ROWS // 2
WORD_BYTES = 4 * STRIP_ROWS  # from one word of all rows to the next
TOKENS = 8


def _columns(q: int) -> list[int]:
    return [2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9]


def _mma(a: Sequence[Array], b: Sequence[Array]) -> Array:
    """a[lane] [2 rows, 4 columns], b[lane] [4 rows] -> C [16, 8]."""
    A, B = np.zeros((16, 16)), np.zeros((16, 8))
    for lane, (t, q) in enumerate(LANES):
        A[t, _columns(q)], A[t + 8, _columns(q)] = a[lane]
        B[_columns(q), t] = b[lane]
    product: Array = A @ B
    return product


def _nibbles(words: Array, positions: Sequence[int]) -> Array:
    """uint32 [words] -> E2M1 values of the first word's 4-bit codes at `positions`."""
    magnitudes = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = (int(words[0]) >> (4 * np.array(positions))) & 15
    return np.where(codes & 8, -1, 1) * magnitudes[codes & 7]


def _halves(words: Array) -> Array:
    """uint32 [2] -> the four bf16 in them."""
    bits = words.view(np.uint16).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Step:
    """One mma of a group: the words that lane q loads, the inputs that they hold in the order of
    the fragment's columns, and how."""

    words: Callable[[int], list[int]]
    inputs: Callable[[int], list[int]]
    decode: Callable[[Array], Array]


def _mxfp4_step(positions: Sequence[int]) -> Step:
    """Codes n and n + 4 of a word are one AND and one shift apart."""
    return Step(
        lambda q: [q],
        lambda q: [8 * q + n for n in positions],
        lambda words: _nibbles(words, positions),
    )


def _bf16_step(s: int) -> Step:
    return Step(
        lambda q: [8 * s + q, 8 * s + q + 4],
        lambda q: [16 * s + column for column in _columns(q)],
        _halves,
    )


def _int8_step(s: int) -> Step:
    """A word is the four columns of a lane."""
    return Step(
        lambda q: [4 * s + q],
        lambda q: [16 * s + 4 * q + n for n in range(4)],
        lambda words: words.view(np.int8).astype(np.float64),
    )


STEPS = {
    "MXFP4": [_mxfp4_step((0, 4, 1, 5)), _mxfp4_step((2, 6, 3, 7))],
    "INT8": [_int8_step(0), _int8_step(1)],
    "BF16": [_bf16_step(0), _bf16_step(1)],
}


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
def test_a_strip_feeds_tensor_cores(fmt: WeightFormat) -> None:
    """Loads of 16 bytes, at one stride from word to word, and nothing but decoding: the products of
    a gate/up strip, gate and up of one column in the same place of the same lane."""
    rng = np.random.default_rng(0)
    K = 5 * GROUP
    layout = strip_layout(fmt, K)
    gate, up = (random_matrix(fmt, rng, HALF_ROWS, K) for _ in range(2))
    strip = aligned((layout.nbytes,), np.uint8)
    pack_gate_up(strip.ctypes.data, range(1), layout, gate, up, HALF_ROWS)
    groups = strip.reshape(layout.groups, layout.group_bytes)
    X = rng.standard_normal((TOKENS, K))

    def load(group: int, word: int, half: int, t: int) -> Array:
        """One word of four rows: 16 bytes on a boundary of 16."""
        at = WORD_BYTES * word + 4 * HALF_ROWS * half + 16 * t
        return groups[group, at : at + 16].view(np.uint32)

    def scale(group: int, half: int, row: int) -> float:
        if fmt.scale is None:
            return 1.0
        scales = groups[group, layout.code_bytes :].view(fmt.scale.dtype)
        return float(fmt.scale.decode(scales[HALF_ROWS * half + row]))

    out = np.zeros((2, HALF_ROWS, TOKENS))
    for half in range(2):
        for tile in range(2):  # rows 4t + 2 tile and the one behind it, of every t
            C = np.zeros((16, 8))
            for group in range(layout.groups):
                for step in STEPS[fmt.name]:
                    a, b = [], []
                    for t, q in LANES:
                        words = np.stack([load(group, w, half, t) for w in step.words(q)])
                        rows = range(2 * tile, 2 * tile + 2)
                        a.append(np.stack([
                            step.decode(np.ascontiguousarray(words[:, r]))
                            * scale(group, half, 4 * t + r) for r in rows
                        ]))  # fmt: skip
                        b.append(X[t, GROUP * group + np.array(step.inputs(q))])
                    C += _mma(a, b)
            for t in range(8):
                out[half, 4 * t + 2 * tile], out[half, 4 * t + 2 * tile + 1] = C[t], C[t + 8]
    for half, matrix in enumerate((gate, up)):
        expected = decode(fmt, matrix) @ X.T
        assert np.abs(out[half] - expected).max() <= 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
def test_a_warp_reads_whole_sectors(fmt: WeightFormat) -> None:
    """The loads of one word of half a strip are 128 bytes in one piece, on a boundary of as many
    where groups are a multiple of it, else of 64: 32-byte sectors are read whole."""
    layout = strip_layout(fmt, GROUP)
    assert 4 * HALF_ROWS == 8 * 16
    assert layout.code_bytes == WORD_BYTES * layout.words and layout.group_bytes % 64 == 0
