"""From the bytes of a strip to operands of tensor cores: an object for each weight format.

A lane's share of one half of a group (`fragments`) is four rows: words of codes, and the rows'
scales. An object has three methods, which emit code for one lane:

    chunk      the share in memory: the loads that bring it into registers
    fragment   the A operand of one row tile and k-step, bf16, from these registers
    end_group  what is left to do with a group's float32 products: scales that were not folded

A scale is folded into the codes only where the product is exact in bf16; a weight is never rounded.
MXFP4: a code has 2 significant bits, so code * 2^(s - 127) is a bf16 for s <= 128, subnormal ones
included. With larger scales it leaves bf16's range; an expert that has any is *wide*, and the
scales of all its groups multiply float32 products instead, which is exact for 0 to 254.

The DSL traces these methods in a kernel. They contain no loops or conditions of the GPU's: what is
written with `for` here is unrolled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import StripLayout
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.fragments import QUADS
from hybrid_moe.gpu_kernels.lane_memory import fused

MOST_FOLDED_SCALE = 128
"""Largest E8M0 scale whose products with E2M1 codes are bf16: 6 * 2^1; also what the exponent field
s + 126 of `_scale_pair` holds."""

_SIGNS, _MAGNITUDES = 0x8000_8000, 0x7000_7000
_NO_SCALE = "0x7E807E80"
"""2^126 twice: undoes the 2^-126 of `_code_pair` and is no scale."""


class Mxfp4Codes:
    """Four words of eight E2M1 codes, then a word with the four rows' E8M0 scales.

    The scales of a half are 32 bytes, a sector: one 4-byte load, in which the lanes of a quad read
    the same word. That is every byte of the sector once a warp. Lanes of a quad that fetch other
    groups would need as many shuffles as they save loads.
    """

    registers = 5
    scaled = True
    """Has scales that an expert may need in float32."""

    def __init__(self, layout: StripLayout) -> None:
        self.layout = layout

    def chunk(self, codes: Any, scales: Any, half: int) -> list[tuple[Any, int]]:
        """The loads of one half of a group, in the order of registers: address and words of each.

        Args:
            codes: address of the lane's first word in the group: half 0, load 0.
            scales: address of the lane's first row's scale in the group, half 0.
            half: of the strip, on top of these addresses.
        """
        return [(codes + 128 * half, 4), (scales + 32 * half, 1)]

    def fragment(self, words: Any, tile: int, step: int, folded: bool) -> list[Any]:
        """a0 .. a3 of a tile and k-step: uint32, pairs of bf16, with their scales if `folded`."""
        pairs = []
        for n in (2 * step, 2 * step + 1):
            for row in (2 * tile, 2 * tile + 1):
                scale = _scale_pair(words[4], row) if folded else None
                pairs.append(_code_pair(words[row], n, scale))
        return pairs

    def end_group(self, words: Any, tile: int, products: list[Any], sums: list[Any]) -> list[Any]:
        """sums + scale * products, both the C registers of a tile: rows 2 tile (twice) and the one
        behind it (twice). For experts that are wide."""
        factors = [_scale_float(words[4], 2 * tile + row) for row in (0, 0, 1, 1)]
        return [fused(f, p, s) for f, p, s in zip(factors, products, sums, strict=True)]


class Bf16Codes:
    """Sixteen words of two bf16: fragments as they lie there."""

    registers = 16
    scaled = False

    def __init__(self, layout: StripLayout) -> None:
        self.layout = layout

    def chunk(self, codes: Any, scales: Any, half: int) -> list[tuple[Any, int]]:
        """As `Mxfp4Codes.chunk`."""
        return [(codes + (256 * QUADS * load + 128 * half), 4) for load in range(4)]

    def fragment(self, words: Any, tile: int, step: int, folded: bool) -> list[Any]:
        """As `Mxfp4Codes.fragment`."""
        return [
            words[4 * load + row]
            for load in (2 * step, 2 * step + 1)
            for row in (2 * tile, 2 * tile + 1)
        ]

    def end_group(self, words: Any, tile: int, products: list[Any], sums: list[Any]) -> list[Any]:
        """No scales: nothing is left to do, and no expert is wide."""
        raise AssertionError("BF16 has no scales")


WEIGHT_CODES: Mapping[str, Callable[[StripLayout], Any]] = MappingProxyType(
    {MXFP4.name: Mxfp4Codes, BF16.name: Bf16Codes}
)
"""Format -> its object."""


def check_kernels(fmt: WeightFormat) -> None:
    """Raise NotImplementedError for a format that the kernels cannot read."""
    if fmt.name not in WEIGHT_CODES:
        raise NotImplementedError(
            f"{fmt.name} has no GPU kernels yet: there are {', '.join(WEIGHT_CODES)}"
        )


def needs_wide(fmt: WeightFormat, scales: Any) -> bool:
    """Whether an expert with these stored scales, a NumPy array or torch tensor of all or some of
    its groups, is wide."""
    return fmt.name == MXFP4.name and bool((scales > MOST_FOLDED_SCALE).any())


def _code_pair(word: Any, n: int, scale: Any) -> Any:
    """Codes n and n + 4 of a word as a pair of bf16, times a pair of bf16 over 2^126, or times 1
    for None.

    Moved to the top of each half, sign | magnitude >> 6 is a bf16 with the code's exponent and
    mantissa bits in the lowest exponent bits and the highest mantissa bit: value * 2^-126, also for
    0.5, which is a subnormal there as it is in E2M1. The addend is -0, so that zeros keep their
    sign. `mul.bf16x2` would do, but sm_80 lacks it.
    """
    from cutlass import Uint32
    from cutlass.cute.arch import inline_ptx

    moved = word << Uint32(4 * (3 - n)) if n < 3 else word
    bits = (moved & Uint32(_SIGNS)) | ((moved & Uint32(_MAGNITUDES)) >> Uint32(6))
    # The instruction takes no constants.
    factor, given = ("s", []) if scale is None else ("{$r1}", [scale])
    return inline_ptx(
        f"{{ .reg .b32 s, z; mov.b32 s, {_NO_SCALE}; mov.b32 z, 0x80008000; "
        f"fma.rn.bf16x2 {{$w0}}, {{$r0}}, {factor}, z; }}",
        write_only_types=[Uint32],
        read_only_args=[bits, *given],
    )


def _scale_byte(scales: Any, row: int) -> Any:
    from cutlass import Uint32

    return (scales >> Uint32(8 * row)) & Uint32(0xFF)


def _scale_pair(scales: Any, row: int) -> Any:
    """2^(s - 127) * 2^126 twice: exponent field s + 126, from 126 (s = 0) to 254 (s = 128). A
    product and a sum put it into bits 7 to 14 of both halves: one instruction."""
    from cutlass import Uint32

    return _scale_byte(scales, row) * Uint32(0x0080_0080) + Uint32(126 * 0x0080_0080)


def _scale_float(scales: Any, row: int) -> Any:
    """2^(s - 127) in float32; for s = 0 the subnormal 0x00400000, which no exponent field gives."""
    from cutlass import Float32, Uint32

    s = _scale_byte(scales, row)
    is_zero = (s - Uint32(1)) >> Uint32(31)  # s is at most 255
    return ((s << Uint32(23)) | (is_zero << Uint32(22))).bitcast(Float32)
