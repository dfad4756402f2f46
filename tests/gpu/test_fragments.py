"""The way of a weight: strip -> registers of a lane -> mma -> output row, in NumPy.

`gpu_kernels.fragments` says where a lane loads, in which order a word's codes come out, which rows
it holds and how activations are permuted. Here a warp does just that, for every format and shape,
with an mma written after the PTX ISA, and gives the product.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS
from hybrid_moe.formats.table import BF16, DENSE_FORMATS, FORMATS
from hybrid_moe.formats.weight_format import WeightFormat, unpack_bits
from hybrid_moe.gpu_kernels import fragments
from tests.cpu_kernels.cases import decode
from tests.gpu.slots import random_slots

Array = npt.NDArray[Any]

TOKENS = 8
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _columns(q: int) -> list[int]:
    """k of A and B that a lane has, PTX ISA: registers 0 and 1, then the same 8 further."""
    return [2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9]


def _mma(a: dict[int, Array], b: dict[int, Array]) -> Array:
    """a[lane] [rows t and t + 8, 4 k], b[lane] [4 k of column t] -> C [16, 8]."""
    A, B = np.full((16, 16), np.nan), np.full((16, 8), np.nan)
    for lane in range(fragments.LANES):
        t, q = divmod(lane, 4)
        A[np.ix_([t, t + 8], _columns(q))] = a[lane]
        B[_columns(q), t] = b[lane]
    product: Array = A @ B
    return product


def _codes_in_order(fmt: WeightFormat, word: Array) -> Array:
    """Values of the codes of 4 bytes in the order in which a lane takes them, decoded here."""
    if fmt.name == MXFP4.name:
        nibbles = np.stack([word & 15, word >> 4], 1).reshape(-1)
        values = np.where(nibbles & 8, -1.0, 1.0) * _E2M1[nibbles & 7]
    elif fmt.name == BF16.name:
        values = (word.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(float)
    else:
        values = word.view(np.int8).astype(float)
    if fragments.takes_quads(fmt):
        return values[list(fragments.QUAD_ORDER)]
    return values[list(fragments.WORD_ORDER[fmt.bits])]


def _strip_product(fmt: WeightFormat, layout: Any, strip: Array, xp: Array) -> Array:
    """One warp and one strip, uint8 [nbytes], times xp [tokens, K] in `k_order` -> [64, tokens]."""
    out = np.full((STRIP_ROWS, TOKENS), np.nan)
    for half in range(2):
        sums = np.zeros((2, 16, TOKENS))
        for group in range(layout.groups):
            at = strip[group * layout.group_bytes : (group + 1) * layout.group_bytes]
            b: dict[int, Array] = {}
            codes: dict[int, Array] = {}  # lane -> [row of 4, 8 codes]
            for lane in range(fragments.LANES):
                t, q = divmod(lane, 4)
                words = []
                for load in range(fragments.loads_per_group(fmt)):
                    first = fragments.load_offset(fmt, lane, half, load)
                    four = at[first : first + fragments.LOAD_BYTES].reshape(4, 4)
                    words.append(np.stack([_codes_in_order(fmt, word) for word in four]))
                rows = [r for tile in range(2) for r in fragments.lane_rows(lane, half, tile)]
                factor = np.ones(4)
                if fmt.scale is not None:
                    scales = at[layout.code_bytes :].view(fmt.scale.dtype)
                    factor = fmt.scale.decode(scales)[rows].astype(float)
                codes[lane] = np.concatenate(words, 1) * factor[:, None]
                b[lane] = xp[t, GROUP * group + 8 * q : GROUP * group + 8 * q + 8]
            for tile in range(2):
                for step in range(2):
                    part = slice(4 * step, 4 * step + 4)
                    a = {lane: codes[lane][2 * tile : 2 * tile + 2, part] for lane in codes}
                    sums[tile] += _mma(a, {lane: b[lane][part] for lane in b})
        for lane in range(fragments.LANES):
            t, q = divmod(lane, 4)
            for tile in range(2):
                for row, c in zip(fragments.lane_rows(lane, half, tile), (t, t + 8), strict=True):
                    out[row, 2 * q : 2 * q + 2] = sums[tile][c, 2 * q : 2 * q + 2]
    return out


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
@settings(max_examples=5)
@given(
    H=st.integers(1, 5).map(lambda groups: 32 * groups),
    I=st.integers(1, 3).map(lambda groups: 32 * groups),
    parts=st.sampled_from([(1,), (1, 2)]),
    seed=st.integers(0, 99),
)
def test_strips_are_operands_of_tensor_cores(
    fmt: WeightFormat, H: int, I: int, parts: tuple[int, ...], seed: int
) -> None:
    """Of a whole slot: gate and up of a column in the same place of the two halves, and down, whose
    last strip may be half empty."""
    slots = random_slots(fmt, H, I, 1, parts=parts, seed=seed)
    layout, memory, expert = slots.layout, slots.memory[0], slots.experts[0]
    rng = np.random.default_rng(seed)
    x, h = rng.standard_normal((TOKENS, H)), rng.standard_normal((TOKENS, I))
    gate, up = (decode(fmt, matrix) @ x.T for matrix in (expert.gate, expert.up))
    for block, (line, *_) in enumerate(layout.gate_up_table):
        strip = memory[64 * line : 64 * line + layout.gate_up.nbytes]
        found = _strip_product(fmt, layout.gate_up, strip, fragments.permute(x, fmt))
        rows = slice(GROUP * block, GROUP * block + GROUP)
        assert np.allclose(found, np.concatenate([gate[rows], up[rows]]), rtol=0, atol=1e-9)
    down = decode(fmt, expert.down) @ h.T
    for number, (line, _) in enumerate(layout.down_table):
        strip = memory[64 * line : 64 * line + layout.down.nbytes]
        found = _strip_product(fmt, layout.down, strip, fragments.permute(h, fmt))
        expected = down[STRIP_ROWS * number : STRIP_ROWS * number + STRIP_ROWS]
        assert np.allclose(found[: len(expected)], expected, rtol=0, atol=1e-9)
        assert not found[len(expected) :].any(), "rows past the last one are zero"


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_lanes_load_the_codes_that_they_take(fmt: WeightFormat) -> None:
    """Of every format: what lies in a lane's words are the codes of its rows and inputs, and those
    that become a pair of bf16 are 16 bits apart, or neighbours in 32 bits of bf16. A warp reads
    every word of a half once, or as often as lanes share it."""
    K = 2 * max(fmt.k_multiple, GROUP)
    slots = random_slots(fmt, K, 32, 1) if fmt.k_multiple == GROUP else random_slots(fmt, K, K, 1)
    layout, gate = slots.layout.gate_up, slots.experts[0].gate
    strip = slots.memory[0][64 * slots.layout.gate_up_table[0, 0] :]
    units = gate.codes.view(np.uint16) if fmt.bits == 16 else unpack_bits(gate.codes, fmt.bits)
    per_word = 32 // fmt.bits
    order = fragments.k_order(fmt).reshape(4, 2, 2, 2)
    if fmt.bits < 16:
        assert (np.diff(order, axis=-1) * fmt.bits == 16).all()
    for group in (0, layout.groups - 1):
        at = strip[layout.codes_at(group) :]
        words = set()
        for lane in range(fragments.LANES):
            t, q = divmod(lane, 4)
            held: dict[int, Array] = {}
            for load in range(fragments.loads_per_group(fmt)):
                first = fragments.load_offset(fmt, lane, 0, load)
                four = at[first : first + fragments.LOAD_BYTES].reshape(4, 4)
                codes = four.view(np.uint16) if fmt.bits == 16 else unpack_bits(four, fmt.bits)
                word = fragments.load_word(fmt, q, load)
                held |= {per_word * word + n: codes[:, n] for n in range(per_word)}
                words.add(word)
            for place in order[q].reshape(-1).tolist():
                rows = slice(4 * t, 4 * t + 4)
                assert np.array_equal(held[place], units[rows, GROUP * group + place])
        assert words == set(range(layout.words))
