"""How a strip is an operand of tensor cores, as it lies in memory.

`mma.m16n8k16` multiplies A [16 rows, 16 k] by B [16 k, 8 columns]. PTX gives lane l of a warp, with
t = l // 4 and q = l % 4, these elements:

    A: rows t, t + 8         x k 2q, 2q + 1, 2q + 8, 2q + 9
    B: the same k            x column t
    C: rows t, t + 8         x columns 2q, 2q + 1

Rows and k may be permuted at will as long as A, B and C agree. Here weights are A and tokens are
the columns of B. A strip has 64 rows, in halves of 32; the 32-bit words of a group of 32 inputs lie
[word][row]. In load j, a lane reads 16 aligned bytes, word 4j + q of rows 4t .. 4t + 3 of a half,
and a warp 512 distinct bytes in whole sectors. Its four rows are two tiles of 16 rows:

    tile i of a half: A rows t, t + 8 = rows 4t + 2i, 4t + 2i + 1 of the half

so a lane's four C rows are its four A rows, and a factor of a row needs no shuffle. In a gate/up
strip half 0 is gate and half 1 up of the same columns, in the same lane.

A lane holds eight codes of a row and group, whatever their width; two k-steps of 16 take four each.
`k_order` says which inputs they are. Activations are stored in that order once per token, which
makes the B fragments of a lane for a group 16 bytes in one place, for every format.

Codes come out of their words as pairs, 16 bits apart, since a register holds a pair of bf16. Of a
word, one AND leaves nibbles n and n + 4, or bytes n and n + 2. Where 16 inputs share a scale that
multiplies float32 products, a k-step must be such a group: a lane then takes a *quad* of it
(`formats.weight_format.quads`), four codes at the same place of a word's four bytes, and quads of
other lanes may lie in the same word.

Source: PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrid_moe.formats.mx import E2M1_CODE
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS
from hybrid_moe.formats.weight_format import WeightFormat, quads

LANES = 32
QUADS = 4
"""Lanes that share rows; each takes its own words."""
HALF_ROWS = STRIP_ROWS // 2
STEP = 16
"""k of an mma."""
LOAD_BYTES = 16
"""Of a lane: one word of four rows."""

WORD_ORDER = {4: (0, 4, 1, 5, 2, 6, 3, 7), 16: (0, 1)}
"""Bits of a code -> the order in which a word's codes come out of it, where a lane takes all."""
QUAD_ORDER = (0, 2, 1, 3)
"""The order in which those of a quad come out of their bytes."""


def lane_rows(lane: int, half: int, tile: int) -> tuple[int, int]:
    """The rows of a strip that a lane holds in rows t and t + 8 of A and C."""
    first = HALF_ROWS * half + 4 * (lane // QUADS) + 2 * tile
    return first, first + 1


def takes_quads(fmt: WeightFormat) -> bool:
    """Whether a k-step of a lane is a quad: of bytes, and where 16 inputs share a scale. E2M1 times
    its scale is exact in bf16, so those scales are folded into words of any inputs."""
    return fmt.bits == 8 or (fmt.group == STEP and fmt.code is not E2M1_CODE)


def load_word(fmt: WeightFormat, q: int, load: int) -> int:
    """The word of a row and group that a lane reads in one of its `loads_per_group`."""
    if not takes_quads(fmt):
        return QUADS * load + q
    return (QUADS * load + q) * fmt.bits // 8


def load_offset(fmt: WeightFormat, lane: int, half: int, load: int) -> int:
    """Bytes from a group's codes to what a lane reads: `load_word` of rows 4t .. 4t + 3."""
    t, q = divmod(lane, QUADS)
    return 4 * (STRIP_ROWS * load_word(fmt, q, load) + HALF_ROWS * half + 4 * t)


def loads_per_group(fmt: WeightFormat) -> int:
    """Loads of a lane for one half and group: one for each k-step that is a quad; else 1 for 4-bit
    codes, 4 for 16."""
    return GROUP // STEP if takes_quads(fmt) else GROUP * fmt.bits // (32 * QUADS)


@functools.lru_cache(maxsize=64)
def _k_order(bits: int, by_quads: bool) -> npt.NDArray[np.int64]:
    found = np.empty((QUADS, 8), np.int64)
    per_word = 32 // bits
    for q in range(QUADS):
        if by_quads:
            found[q] = quads(bits)[q::QUADS, QUAD_ORDER].reshape(-1)
            continue
        words = range(q, GROUP // per_word, QUADS)
        found[q] = [per_word * word + n for word in words for n in WORD_ORDER[bits]]
    order = found.reshape(-1)
    order.setflags(write=False)
    return order


def k_order(fmt: WeightFormat) -> npt.NDArray[np.int64]:
    """int64 [32], a permutation: place 8q + 4s + i of a group of activations holds its input
    k_order[8q + 4s + i], which lane q meets in column i of its fragment in k-step s."""
    return _k_order(fmt.bits, takes_quads(fmt))


@functools.lru_cache(maxsize=64)
def inverse_k_order(fmt: WeightFormat) -> npt.NDArray[np.int64]:
    """The place of each of a group's 32 inputs in the format's order."""
    return np.argsort(k_order(fmt))


def permute(x: Any, fmt: WeightFormat) -> Any:
    """Activations in `k_order`: a NumPy array or torch tensor [..., K], K a multiple of 32 -> a new
    one of its kind and shape."""
    return _take(x, k_order(fmt))


def unpermute(x: Any, fmt: WeightFormat) -> Any:
    """The inverse of `permute`."""
    return _take(x, inverse_k_order(fmt))


def _take(x: Any, order: npt.NDArray[np.int64]) -> Any:
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    return grouped[..., order.tolist()].reshape(x.shape)
