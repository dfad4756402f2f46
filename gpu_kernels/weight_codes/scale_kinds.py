"""Factors and offsets of groups: what a lane reads, and where they enter the product.

Three places, by what is exact (w = q * s + m, for a code q):

    folded       q * s is a bf16: s is multiplied into the A fragment
    of groups    sums + s * products + m * (sum of the activations), float32, at the end of a group
    of rows      multiplies the whole sum (`row_factors`)

Groups of 32 inputs and of more have it after both k-steps of a group, those of 16 after each.
"""

from __future__ import annotations

from typing import Any

from hybrid_moe.formats.strips import StripField, StripLayout
from hybrid_moe.formats.weight_format import GROUP, WeightFormat
from hybrid_moe.gpu_kernels.fragments import STEP
from hybrid_moe.gpu_kernels.weight_codes import fields as of
from hybrid_moe.gpu_kernels.weight_codes import pairs
from hybrid_moe.gpu_kernels.weight_codes.codes import Lane
from hybrid_moe.gpu_kernels.weight_codes.fields import LaneFields


class Scaling:
    """No factors but those of rows; what all kinds share.

    Attributes:
        ways: how its experts are multiplied: with all factors folded, or with those of groups in
            float32. Where there are two, an expert that is *wide* takes the second.
        registers: words of a lane's fields in half a group.
        fields_ahead: `StripCodes.fields_ahead`.
        group_steps: k-steps with the same factor: 2, or 1.
        has_offsets: m is not zero.
    """

    ways: tuple[bool, ...] = (True,)
    registers = 0
    fields_ahead = True
    group_steps = 2
    has_offsets = False

    def __init__(self, fmt: WeightFormat, layout: StripLayout) -> None:
        self.fmt, self.layout = fmt, layout
        rows = not layout.fields
        given = layout.row_fields if rows else layout.fields
        self.fields = LaneFields(layout, given, rows=rows) if given else None
        self.named: dict[str, StripField] = {field.name: field for field in given}
        if fmt.group == STEP and self.ways == (False,):
            self.group_steps = 1

    @property
    def stride(self) -> int:
        """Bytes from a block's fields to the next block's."""
        return 0 if self.fields is None else self.fields.stride

    def lane_offset(self, lane: Lane) -> Any:
        """Bytes from the strip to the lane's first field."""
        return 0 if self.fields is None else self.fields.lane_offset(lane)

    def chunk(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        """The loads of one half of a group: address and words of each.

        Args:
            fields: address of the lane's first field in the group's block.
        """
        return []

    def operand(self, words: list[Any], row: int, group: Any, folded: bool) -> Any:
        """What is put into the row's pairs of bf16 (`Codes.pairs`)."""
        return None

    def factor(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        """s of a row, for the k-steps from `step` on: Float32."""
        raise AssertionError(f"{self.fmt.name} has no factors of groups")

    def offset(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        """m, likewise."""
        raise AssertionError(f"{self.fmt.name} has no offsets")

    def _load(
        self, fields: Any, name: str, lane: Lane, half: int, element: Any = 0
    ) -> tuple[Any, int]:
        assert self.fields is not None
        return self.fields.load(fields, self.named[name], lane, half, element)

    def _element(self, name: str, group: Any) -> Any:
        """Of a field with one element for so many groups: the group's."""
        from cutlass import Int32

        field, plane = self.named[name], self.fmt.plane(name)
        assert plane is not None
        if field.count == 1:
            return 0
        return (group >> Int32((plane.per // GROUP).bit_length() - 1)) & Int32(field.count - 1)

    def _in_block(self, group: Any) -> Any:
        """Number of a group in its block."""
        from cutlass import Int32

        return group & Int32(self.layout.block_groups - 1)


class FoldedPowers(Scaling):
    """E8M0 scales of E2M1 or E4M3 codes: folded, unless a product would leave bf16."""

    ways = (True, False)
    registers = 1

    def chunk(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        return [self._load(fields, "scales", lane, half)]

    def operand(self, words: list[Any], row: int, group: Any, folded: bool) -> Any:
        """2^(s - 127) over the power of two that codes have in front, twice: a product and a sum
        put the exponent field into bits 7 to 14 of both halves, one instruction."""
        from cutlass import Uint32

        if not folded:
            return None
        in_front = 126 if self.fmt.bits == 4 else 120
        return of.byte(words, row) * Uint32(0x0080_0080) + Uint32(in_front * 0x0080_0080)

    def factor(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        return of.e8m0(words, row)


class FoldedE4m3(Scaling):
    """E4M3 scales of 16 E2M1 codes: the products have 6 significant bits. Lanes 0 and 1 of a quad
    have codes of a group's first scale, the others of the second.

    Over 2^-126 such a scale is up to 448 * 2^126, too much for bf16. So 2^7 of that are left to the
    factor of the row (`row_factors`): products and sums are 2^-7 of what they are, which is exact.
    """

    registers = 1
    left = 7

    def lane_offset(self, lane: Lane) -> Any:
        return super().lane_offset(lane) + self.named["scales"].element_bytes * (lane.q >> 1)

    def chunk(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        return [self._load(fields, "scales", lane, half)]

    def operand(self, words: list[Any], row: int, group: Any, folded: bool) -> Any:
        from cutlass import Uint32

        twice = of.byte(words, row) * Uint32(pairs.LOW_HALVES)
        scale = pairs.scaled(pairs.e4m3_pair(twice, 0, finite=True), pairs.power_pair(120))
        return pairs.scaled(scale, pairs.power_pair(126 - self.left))


class GroupScales(Scaling):
    """A number for a group, of any type; with it an offset (ggml's minima), or a zero point, which
    is exact in the codes.

    Attributes:
        zeros: None, or what is added to a zero point.
    """

    ways = (False,)

    def __init__(self, fmt: WeightFormat, layout: StripLayout, zeros: int | None = None) -> None:
        super().__init__(fmt, layout)
        assert fmt.scale is not None
        self.zeros = zeros
        self.has_offsets = zeros is None and "minima" in self.named
        self._number = of.NUMBERS[fmt.scale.name]
        self._scale_words = 1 if self.named["scales"].shared else self.named["scales"].itemsize
        self.registers = self._scale_words + (
            self.named["minima"].itemsize if "minima" in self.named else 0
        )

    def chunk(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        loads = []
        for name in ("scales", "minima"):
            if name in self.named:
                element = 0 if self._is_pair(name) else self._element(name, group)
                loads.append(self._load(fields, name, lane, half, element))
        return loads

    def _is_pair(self, name: str) -> bool:
        """Whether it is the one byte with the zero points of two groups, or of the row."""
        return name == "minima" and self.zeros is not None

    def operand(self, words: list[Any], row: int, group: Any, folded: bool) -> Any:
        if self.zeros is None:
            return None
        return zero_point(self, words[self._scale_words :], row, group, self.zeros)

    def factor(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        return self._number(words[: self._scale_words], row)

    def offset(self, words: list[Any], row: int, step: int, group: Any) -> Any:
        return of.fp16(words[self._scale_words :], row)


class RowZeros(Scaling):
    """Zero points of rows, whose factors are of rows as well."""

    registers = 1

    def __init__(self, fmt: WeightFormat, layout: StripLayout, zeros: int) -> None:
        super().__init__(fmt, layout)
        self.zeros = zeros

    def lane_offset(self, lane: Lane) -> Any:
        field = self.named["minima"]
        return field.offset + field.itemsize * lane.row

    def chunk(self, fields: Any, group: Any, lane: Lane, half: int) -> list[tuple[Any, int]]:
        """The same bytes for every group: from L1, all but the first time."""
        return [(fields + 32 * half, 1)]

    def operand(self, words: list[Any], row: int, group: Any, folded: bool) -> Any:
        return zero_point(self, words, row, None, self.zeros)


def zero_point(scaling: Scaling, words: list[Any], row: int, group: Any, zeros: int) -> Any:
    """A row's zero point out of a byte for two groups, plus `zeros`: a nibble n is n - 8 as a code,
    so n less this is the code less (zero - 8). Up to 16."""
    from cutlass import Uint32

    found = of.byte(words, row)
    if group is not None:
        plane = scaling.fmt.plane("minima")
        assert plane is not None
        shift = (plane.per // 2 // GROUP).bit_length() - 1
        found = found >> (((Uint32(group) >> Uint32(shift)) & Uint32(1)) << Uint32(2))
    found = found & Uint32(0xF)
    return found + Uint32(zeros) if zeros else found
