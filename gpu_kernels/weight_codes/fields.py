"""Fields of a strip (`formats.strips.StripField`) in a lane's registers: loads, and numbers.

A lane reads a field of its four rows at once: 4 elements of 1, 2 or 4 bytes are 1, 2 or 4 words.
Lanes of a quad read the same. The 32 rows of a half are whole sectors, so a warp reads every byte
of them once; lanes of a quad that fetched other elements would need as many shuffles as they save.
"""

from __future__ import annotations

from typing import Any

from hybrid_moe.formats.strips import PANEL_ROWS, StripField, StripLayout
from hybrid_moe.gpu_kernels.fragments import HALF_ROWS
from hybrid_moe.gpu_kernels.weight_codes.codes import Lane


class LaneFields:
    """Where a lane finds the fields of a block, or those in front of all blocks.

    Attributes:
        stride: bytes from the fields of one block to the next; 0 for fields of rows.
    """

    def __init__(self, layout: StripLayout, fields: tuple[StripField, ...], *, rows: bool) -> None:
        self._first = fields[0]
        self._base = 0 if rows else layout.fields_at(0)
        self.stride = 0 if rows else layout.block_bytes

    def lane_offset(self, lane: Lane) -> Any:
        """Bytes from the strip to the first field of the lane's first row, block 0."""
        field = self._first
        row = (lane.row // PANEL_ROWS if field.shared else lane.row) * field.itemsize
        return self._base + field.offset + row

    def load(
        self, fields: Any, field: StripField, lane: Lane, half: int, element: Any = 0
    ) -> tuple[Any, int]:
        """One element of the lane's rows in a half: address and words.

        Args:
            fields: address of the lane's first field: its block, and `lane_offset`.
            element: an int, or an Int32.
        """
        from cutlass import Int64

        first = self._first
        if field.shared:
            assert field is first
            return fields + half * HALF_ROWS // PANEL_ROWS * field.itemsize, 1
        constant = field.offset - first.offset + half * HALF_ROWS * field.itemsize
        if field.itemsize != first.itemsize:
            fields = fields + Int64((field.itemsize - first.itemsize) * lane.row)
        if isinstance(element, int):
            constant += element * field.element_bytes
        else:
            fields = fields + Int64(element * field.element_bytes)
        return fields + constant, field.itemsize


def byte(words: list[Any], row: int) -> Any:
    """The row's byte of a word for four rows: Uint32."""
    from cutlass import Uint32

    return (words[0] >> Uint32(8 * row)) & Uint32(0xFF)


def half_word(words: list[Any], row: int) -> Any:
    """The row's 16 bits of two words for four rows: Uint32."""
    from cutlass import Uint32

    word = words[row // 2]
    return word >> Uint32(16) if row % 2 else word & Uint32(0xFFFF)


def fp16(words: list[Any], row: int) -> Any:
    """The row's fp16 as float32."""
    from cutlass import Float32
    from cutlass.cute.arch import inline_ptx

    return inline_ptx(
        "{ .reg .b16 h; cvt.u16.u32 h, {$r0}; cvt.f32.f16 {$w0}, h; }",
        write_only_types=[Float32],
        read_only_args=[half_word(words, row)],
    )


def bf16(words: list[Any], row: int) -> Any:
    """The row's bf16 as float32."""
    from cutlass import Float32, Uint32

    word = words[row // 2]
    bits = word & Uint32(0xFFFF_0000) if row % 2 else word << Uint32(16)
    return bits.bitcast(Float32)


def float32(words: list[Any], row: int) -> Any:
    """The row's float32, or the one that all four rows share."""
    from cutlass import Float32

    return words[row if len(words) > 1 else 0].bitcast(Float32)


def e8m0(words: list[Any], row: int) -> Any:
    """2^(s - 127) in float32; for s = 0 the subnormal 0x00400000, which no exponent field gives."""
    from cutlass import Float32, Uint32

    s = byte(words, row)
    is_zero = (s - Uint32(1)) >> Uint32(31)  # s is at most 255
    return ((s << Uint32(23)) | (is_zero << Uint32(22))).bitcast(Float32)


NUMBERS = {"ue8m0": e8m0, "fp16": fp16, "bf16": bf16, "float32": float32}
"""Type of scales -> the words of four rows and a row -> its factor in float32."""
