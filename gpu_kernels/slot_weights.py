"""What a slot holds, as matrices: the ground of every kernel's reference. Pure torch, any device.

It follows the strips' layout (`formats.strips`) and knows nothing of lanes and fragments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch

from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import E2M1_VALUES, MXFP4
from hybrid_moe.formats.strips import STRIP_ROWS, StripLayout
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

Tensor = torch.Tensor


@dataclass(frozen=True)
class SlotWeights:
    """One expert's matrices in float32 on the slot's device.

    Attributes:
        gate, up: [I, H]. down: [H, I].
        gate_bias, up_bias: [I]. down_bias: [H]. None where the slot has no room for biases.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def _e2m1(codes: Tensor) -> Tensor:
    values = torch.tensor(E2M1_VALUES, dtype=torch.float64, device=codes.device)
    nibbles = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
    return values[nibbles.long()]


def _e8m0(scales: Tensor) -> Tensor:
    # float64: 2^-127 is a subnormal float32, which exp2 of some devices flushes
    return torch.exp2(scales.to(torch.float64) - 127)


_VALUES: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        MXFP4.name: _e2m1,
        INT8.name: lambda codes: codes.view(torch.int8).to(torch.float64),
        BF16.name: lambda codes: codes.view(torch.bfloat16).to(torch.float64),
    }
)
"""Format -> its code bytes, uint8 [..., bytes], as float64 values [..., weights]."""

_FACTORS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        MXFP4.name: _e8m0,
        INT8.name: lambda scales: scales.view(torch.float16).to(torch.float64),
    }
)
"""Format -> its scale bytes, uint8 [..., bytes], as float64 factors [..., scales]."""


def check_supported(fmt: WeightFormat) -> None:
    """Raise NotImplementedError for a format that these references cannot read."""
    if fmt.name not in _VALUES:
        raise NotImplementedError(
            f"{fmt.name} cannot be read from a slot yet: there are {', '.join(_VALUES)}"
        )


def slot_weights(layout: SlotLayout, slot: Tensor) -> SlotWeights:
    """Decode one expert.

    Args:
        layout: of the slot.
        slot: uint8 [nbytes], contiguous. A product of code and scale beyond float32 (a scale of
            2^126 and more) becomes infinite.

    Raises:
        NotImplementedError: a format that has no reader here.
    """
    check_supported(layout.fmt)
    gates, ups, downs = [], [], []
    biases: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    for at, share in zip(layout.share_offsets, layout.shares, strict=True):
        piece = slot[at : at + share.nbytes]
        gate_up = _rows(layout.fmt, share.gate_up, piece[: share.down_offset])
        halves = gate_up.unflatten(0, (-1, 2, STRIP_ROWS // 2))
        gates.append(halves[:, 0].flatten(0, 1))
        ups.append(halves[:, 1].flatten(0, 1))
        downs.append(_rows(layout.fmt, share.down, piece[share.down_offset : share.strip_bytes]))
        if layout.biases:
            for name, rows in share.bias_rows.items():
                first = share.bias_offsets[name]
                biases[name].append(piece[first : first + 4 * len(rows)].view(torch.float32))
    gate_bias, up_bias, down_bias = (
        torch.cat(biases[name]) if layout.biases else None for name in ("gate", "up", "down")
    )
    return SlotWeights(
        torch.cat(gates),
        torch.cat(ups),
        torch.cat(downs)[: layout.hidden],
        gate_bias,
        up_bias,
        None if down_bias is None else down_bias[: layout.hidden],
    )


def _rows(fmt: WeightFormat, layout: StripLayout, strips: Tensor) -> Tensor:
    """Strips, uint8 [n * nbytes], as float32 [n * 64, K]."""
    groups = strips.reshape(-1, layout.groups, layout.group_bytes)
    words = groups[..., : layout.code_bytes].unflatten(-1, (layout.words, STRIP_ROWS, 4))
    codes = words.permute(0, 3, 1, 2, 4).flatten(3)  # [strip, row, group, bytes]
    values = _VALUES[fmt.name](codes.contiguous())
    if layout.fields:
        (field,) = layout.fields
        stored = groups[..., layout.code_bytes :].unflatten(
            -1, (field.count, STRIP_ROWS, field.itemsize)
        )
        factors = _FACTORS[fmt.name](stored.permute(0, 3, 1, 2, 4).flatten(3).contiguous())
        per_scale = values.unflatten(-1, (field.count, -1))
        values = (per_scale * factors[..., None]).flatten(-2)
    return values.flatten(2).flatten(0, 1).to(torch.float32)
