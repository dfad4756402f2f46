"""Layout of packed weights: strips of two panels, and of encoded activations.

A panel is 16 output rows. A strip is two panels, read as one stream: for a down projection rows
32s..32s+31; for gate and up, 16 rows of gate and the same 16 rows of up, so that one pass yields
both factors of the activation. Codes are stored as 32-bit words (8 MXFP4 codes, 2 bf16) in the
order of use:

    strip = codes[word][panel 2][lane 16] then scales[group][panel 2][lane 16]

with `word` running along K. One lane is one output row, so a vector load brings the same inputs
of 16 rows and no horizontal sum is ever needed. Packing is a transposition of 32-bit words; the
nibble order inside a word is answered by the order in which activations are encoded.

Rows past the last one and the padding of a strip to a cache line are zero (scale 2^-127).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.formats.table import WeightFormat

PANEL_ROWS = 16
STRIP_ROWS = 32
GROUP = 32
"""Inputs per step of a kernel: the activations' group, and MXFP4's."""
LINE = 64
MOST_BLOCK_TOKENS = 32
"""Tokens of the largest block that a matrix unit's kernel writes whole; sums have room for it."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class StripLayout:
    """Sizes in bytes of the strips of a matrix with K inputs.

    Attributes:
        groups: K / 32.
        words: 32-bit words of codes in one row.
        code_bytes_per_group: bytes of codes that a strip has for each group of 32 inputs.
        scale_bytes_per_group: 32 (one byte per row), or 0 where the format has no scales.
        scale_offset: from the strip's start to its scales.
        nbytes: from one strip to the next.
    """

    groups: int
    words: int
    code_bytes_per_group: int
    scale_bytes_per_group: int
    scale_offset: int
    nbytes: int


def strip_layout(fmt: WeightFormat, K: int) -> StripLayout:
    """Layout of the strips of an (any number of rows) x K matrix of `fmt`."""
    if K <= 0 or K % fmt.k_multiple:
        raise ValueError(f"{fmt.name}: K = {K} must be a positive multiple of {fmt.k_multiple}")
    groups = K // GROUP
    code_bytes = GROUP * fmt.bits // 8 * STRIP_ROWS
    scale_bytes = 0 if fmt.scale is None else STRIP_ROWS * GROUP // fmt.group
    return StripLayout(
        groups=groups,
        words=K * fmt.bits // 32,
        code_bytes_per_group=code_bytes,
        scale_bytes_per_group=scale_bytes,
        scale_offset=groups * code_bytes,
        nbytes=round_up(groups * (code_bytes + scale_bytes), LINE),
    )
