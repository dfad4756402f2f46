"""Layout of packed weights: strips of four panels, read as one stream.

A panel is 16 output rows, a strip four panels: for a down projection rows 64s..64s+63; for gate
and up, 32 rows of gate and the same 32 rows of up, so that one pass yields both factors of the
activation of one group of h. Codes are stored as 32-bit words (8 MXFP4 codes, 4 INT8 codes, 2
bf16) in the order of use, and a group of 32 inputs has its scales right behind its codes:

    strip = [group][codes [word][panel 4][lane 16] | scales [panel 4][lane 16]]

with `word` running along K. One lane is one output row, so a vector load brings the same inputs
of 16 rows and no horizontal sum is ever needed. Packing is a transposition of 32-bit words; the
nibble order inside a word is answered by the order in which activations are encoded. A group is
whole cache lines (MXFP4: 17, INT8: 34, BF16: 64), read in ascending order.

Rows past the last one are zero bits (MXFP4: scale 2^-127; INT8: scale 0).
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.formats.table import WeightFormat

PANEL_ROWS = 16
PANELS = 4
STRIP_ROWS = PANELS * PANEL_ROWS
SUMS_BYTES = 4 * STRIP_ROWS
"""Of what a strip gives for one token: float32 [64]."""
GROUP = 32
"""Inputs per step of a kernel: the activations' group, and MXFP4's. Also the rows of gate, and of
up, in a strip: what comes out of it is one group of the down projection's inputs."""
LINE = 64
MOST_BLOCK_TOKENS = 32
"""Tokens of the largest block that a matrix unit's kernel writes whole; sums have room for it."""


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class StripLayout:
    """Sizes of the strips of a matrix with K inputs.

    Attributes:
        groups: K / 32.
        words: 32-bit words of codes that a row has in a group.
        scales: scales that a row has in a group; 0 where the format has none.
        scale_bytes: of one scale; 0 likewise.
    """

    groups: int
    words: int
    scales: int
    scale_bytes: int

    @property
    def code_bytes(self) -> int:
        """Bytes of a group's codes, in front of its scales."""
        return 4 * STRIP_ROWS * self.words

    @property
    def group_bytes(self) -> int:
        """From one group to the next."""
        return self.code_bytes + STRIP_ROWS * self.scales * self.scale_bytes

    @property
    def nbytes(self) -> int:
        """From one strip to the next."""
        return self.groups * self.group_bytes


def strip_layout(fmt: WeightFormat, K: int) -> StripLayout:
    """Layout of the strips of an (any number of rows) x K matrix of `fmt`."""
    if K <= 0 or K % fmt.k_multiple:
        raise ValueError(f"{fmt.name}: K = {K} must be a positive multiple of {fmt.k_multiple}")
    return StripLayout(
        groups=K // GROUP,
        words=GROUP * fmt.bits // 32,
        scales=0 if fmt.scale is None else GROUP // fmt.group,
        scale_bytes=0 if fmt.scale is None else fmt.scale.dtype.itemsize,
    )


def packed_nbytes(fmt: WeightFormat, hidden: int, intermediate: int) -> int:
    """Bytes of one expert in strips, without biases. A strip of gate and up has 32 rows of each,
    one of down 64: its rows are rounded up."""
    gate_up, down = strip_layout(fmt, hidden), strip_layout(fmt, intermediate)
    return (intermediate // GROUP) * gate_up.nbytes + -(-hidden // STRIP_ROWS) * down.nbytes


def bias_nbytes(hidden: int, intermediate: int) -> int:
    """Bytes of one expert's biases behind its strips: float32, one for each row of the strips."""
    return 4 * (2 * intermediate + round_up(hidden, STRIP_ROWS))
