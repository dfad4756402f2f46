"""A format's strips as operands of tensor cores: its codes, and its factors."""

from __future__ import annotations

from typing import Any

from hybrid_moe.formats.strips import StripLayout
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.weight_codes.codes import CODES, Lane
from hybrid_moe.gpu_kernels.weight_codes.row_factors import row_factors
from hybrid_moe.gpu_kernels.weight_codes.scale_kinds import FoldedE4m3, Scaling


class StripCodes:
    """What the grouped GEMMs ask. A lane's *share* is its four rows of one half of a group.

    Attributes:
        registers: words of a share that are loaded ahead: codes, upper bits, fields.
        fields_ahead: whether fields are among them. Those of a block of eight groups are not: a
            lane would hold up to 16 words for each group, of lines that L1 has after the first of
            eight. They are loaded when they are used.
        ways: `Scaling.ways`. group_steps, has_offsets: likewise.
        rows: factors of rows, or None.
    """

    def __init__(self, fmt: WeightFormat, layout: StripLayout, scaling: Scaling) -> None:
        self.layout, self.scaling = layout, scaling
        self.codes = CODES[fmt.code.name](fmt, layout)
        self.fields_ahead = scaling.fields_ahead
        self.registers = self.codes.registers + scaling.registers * self.fields_ahead
        self.ways, self.group_steps = scaling.ways, scaling.group_steps
        self.has_offsets = scaling.has_offsets
        left = scaling.left if isinstance(scaling, FoldedE4m3) else 0
        self.rows = row_factors(layout, left)
        self._block_bits = layout.block_groups.bit_length() - 1

    def lane_codes(self, lane: Lane) -> Any:
        """Bytes from the strip to the lane's first word of codes."""
        first = self.layout.codes_at(0)
        return self.codes.lane_offset(lane) + first if first else self.codes.lane_offset(lane)

    def lane_fields(self, lane: Lane) -> Any:
        """Bytes from the strip to the lane's first field."""
        return self.scaling.lane_offset(lane)

    def chunk(
        self, codes_at: Any, fields_from: Any, group: Any, lane: Lane, half: int
    ) -> tuple[list[tuple[Any, int]], list[tuple[Any, int]]]:
        """The loads of a share, of codes and of fields, in the order of registers: address and
        words of each.

        Args:
            codes_at: address of the lane's first codes in the strip.
            fields_from: from there to its first field.
            half: on top of these, 0 or 1.
        """
        from cutlass import Int32, Int64

        layout, stride = self.layout, self.scaling.stride
        if layout.block_groups == 1:
            codes = codes_at + Int64(group) * Int64(layout.block_bytes)
            fields = codes if stride else codes_at
        else:
            block = Int64(group >> Int32(self._block_bits))
            fields = codes_at + block * Int64(layout.block_bytes)
            codes = codes_at + Int64(group) * Int64(layout.code_bytes)
            codes = codes + block * Int64(layout.field_bytes)
        loads = self.codes.chunk(codes, lane, half)
        if not self.scaling.registers:
            return loads, []
        return loads, self.scaling.chunk(fields + Int64(fields_from), group, lane, half)

    def fragment(
        self, share: list[Any], tile: int, step: int, group: Any, lane: Lane, folded: bool
    ) -> list[Any]:
        """a0 .. a3 of a tile and k-step: uint32, pairs of bf16, with their scales if `folded`."""
        words, fields = self._parts(share)
        found = []
        for row in (2 * tile, 2 * tile + 1):
            operand = self.scaling.operand(fields, row, group, folded)
            found.append(self.codes.pairs(words, row, step, lane, operand))
        return [found[row][n] for n in range(2) for row in range(2)]

    def factors(self, share: list[Any], tile: int, step: int, group: Any) -> tuple[Any, Any]:
        """s and m of a tile's two rows, for a group's k-steps from `step` on: two lists of Float32;
        None for m where there is none."""
        _, fields = self._parts(share)
        rows = (2 * tile, 2 * tile + 1)
        scales = [self.scaling.factor(fields, row, step, group) for row in rows]
        if not self.has_offsets:
            return scales, None
        return scales, [self.scaling.offset(fields, row, step, group) for row in rows]

    def _parts(self, share: list[Any]) -> tuple[list[Any], list[Any]]:
        return share[: self.codes.registers], share[self.codes.registers :]
