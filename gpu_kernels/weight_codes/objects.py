"""Format -> what its strips are to tensor cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from hybrid_moe.formats.mx import MXFP4, MXFP8
from hybrid_moe.formats.strips import StripLayout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.gpu_kernels.weight_codes.codes import CODES
from hybrid_moe.gpu_kernels.weight_codes.scale_kinds import (
    FoldedE4m3,
    FoldedPowers,
    GroupScales,
    RowZeros,
    Scaling,
)
from hybrid_moe.gpu_kernels.weight_codes.strip_codes import StripCodes
from hybrid_moe.gpu_kernels.weight_codes.superblocks import (
    NibblePairs,
    SignedBytes,
    SixBitPairs,
    SixBits,
)

FOLDED_SCALES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {MXFP4.name: (0, 128), MXFP8.name: (3, 134)}
)
"""Format -> the least and the largest E8M0 scale whose products with its codes are bf16, and that
`FoldedPowers.operand` can hold in an exponent field. Of E2M1: 6 * 2^1 is no limit yet, s + 126 is
254 at most. Of E4M3: a subnormal's last bit, 2^-9 * 2^(s - 127), must not be below bf16's, 2^-133;
s + 120 is 254 at most."""

Make = Callable[[WeightFormat, StripLayout], Scaling]


def _zeros(added: int) -> Make:
    """Zero points of groups or of rows."""

    def make(fmt: WeightFormat, layout: StripLayout) -> Scaling:
        if fmt.group:
            return GroupScales(fmt, layout, added)
        return RowZeros(fmt, layout, added)

    return make


def _scales(fmt: WeightFormat, layout: StripLayout) -> Scaling:
    """Scales of groups or of rows."""
    return GroupScales(fmt, layout) if fmt.group else Scaling(fmt, layout)


SCALINGS: Mapping[str, Make] = MappingProxyType(
    {
        "none": Scaling,
        "ue8m0": FoldedPowers,
        "e4m3 * row": FoldedE4m3,
        "float32": _scales,
        "float32 block": GroupScales,
        "fp16": _scales,
        "bf16": GroupScales,
        "fp16, zero + 0": _zeros(0),
        "fp16, zero + 1": _zeros(1),
        "fp16, min": GroupScales,
        "q4_k": SixBitPairs,
        "q3_k": SixBits,
        "iq4_xs": SixBits,
        "q6_k": SignedBytes,
        "q2_k": NibblePairs,
    }
)
"""`WeightFormat.scaling` -> where its factors come from."""


def has_object(fmt: WeightFormat) -> bool:
    """Whether the kernels can read a format's strips."""
    return fmt.scaling in SCALINGS and fmt.code.name in CODES


def strip_codes(fmt: WeightFormat, layout: StripLayout) -> StripCodes:
    """The object of a format.

    Raises:
        NotImplementedError: there is none.
    """
    check_kernels(fmt)
    return StripCodes(fmt, layout, SCALINGS[fmt.scaling](fmt, layout))


def check_kernels(formats: WeightFormat | LayerFormats) -> None:
    """Raise NotImplementedError for formats that the kernels cannot read."""
    missing = [fmt.name for fmt in layer_formats(formats).each if not has_object(fmt)]
    if missing:
        there = ", ".join(name for name, fmt in FORMATS.items() if has_object(fmt))
        raise NotImplementedError(
            f"{' and '.join(missing)} has no GPU kernels yet: there are {there}"
        )


def needs_wide(fmt: WeightFormat, scales: Any) -> bool:
    """Whether an expert with these stored scales, a NumPy array or torch tensor of all or some of
    its groups, is wide."""
    limits = FOLDED_SCALES.get(fmt.name)
    if limits is None:
        return False
    return bool(((scales < limits[0]) | (scales > limits[1])).any())
