"""Factors of rows: they multiply a row's sum over K, in float32, before the bias is added."""

from __future__ import annotations

from typing import Any

from hybrid_moe.formats.strips import StripField, StripLayout
from hybrid_moe.gpu_kernels.lane_memory import load_words, registers
from hybrid_moe.gpu_kernels.weight_codes import fields as of


class RowFactors:
    """Of one format.

    Args:
        left: the factors are multiplied by 2^left, which A fragments left to them.
    """

    def __init__(self, field: StripField, left: int) -> None:
        self.field, self.left = field, left

    def two(self, strip: Any, row: Any) -> list[Any]:
        """The factors of two rows: Float32.

        Args:
            strip: its address.
            row: the first of them in the strip, an even number.
        """
        from cutlass import Float32, Int64, Uint32

        size = self.field.itemsize
        words = registers((size // 2,), Uint32)
        load_words(words, strip + Int64(size * row + self.field.offset))
        number = of.float32 if size == 4 else of.fp16
        found = [words[i] for i in range(size // 2)]
        return [number(found, i) * Float32(2.0**self.left) for i in range(2)]


def row_factors(layout: StripLayout, left: int) -> RowFactors | None:
    """Of a format with fields of rows; None for others."""
    for name in ("factors", "scales"):
        for field in layout.row_fields:
            if field.name == name:
                return RowFactors(field, left)
    return None
