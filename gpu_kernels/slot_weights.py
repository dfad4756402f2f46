"""What a slot holds, as matrices: the ground of every kernel's reference, on any device.

It takes planes out of strips as their layout says (`formats.strips`) and knows nothing of lanes and
fragments; what planes mean, the format's own dequantizer says, in NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import GROUP, PANEL_ROWS, PANELS, STRIP_ROWS, StripLayout
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


def slot_weights(layout: SlotLayout, slot: Tensor) -> SlotWeights:
    """Decode one expert.

    Args:
        layout: of the slot.
        slot: uint8 [nbytes], contiguous. A product of code and scale beyond float32 (a scale of
            2^126 and more) becomes infinite.
    """
    gates, ups, downs = [], [], []
    biases: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    for at, share in zip(layout.share_offsets, layout.shares, strict=True):
        piece = slot[at : at + share.nbytes]
        gate_up = _rows(layout.formats.gate_up, share.gate_up, piece[: share.down_offset])
        halves = gate_up.unflatten(0, (-1, 2, STRIP_ROWS // 2))
        gates.append(halves[:, 0].flatten(0, 1))
        ups.append(halves[:, 1].flatten(0, 1))
        down = piece[share.down_offset : share.strip_bytes]
        downs.append(_rows(layout.formats.down, share.down, down))
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
    raw = strips.reshape(-1, layout.nbytes).cpu().numpy()
    if fmt.scale_plane is not None and fmt.scale_plane.rows > 1:  # a strip has one for each panel
        fmt = replace(fmt, scale_plane=replace(fmt.scale_plane, rows=PANEL_ROWS))
    weights = fmt.dequantize(**_planes(fmt, layout, raw))
    return torch.from_numpy(weights).to(strips.device)


def _planes(fmt: WeightFormat, layout: StripLayout, strips: Array) -> dict[str, Array]:
    """The planes of strips, uint8 [n, nbytes]."""
    groups = [layout.codes_at(group) for group in range(layout.groups)]
    blocks = [layout.fields_at(block) for block in range(layout.blocks)]
    found: dict[str, Array] = {}
    for name, words, at in (
        ("codes", layout.words, 0),
        ("high", layout.high_words, layout.high_offset),
    ):
        if words:
            found[name] = _plane(strips, [first + at for first in groups], words, 4, STRIP_ROWS)
    for fields, firsts in ((layout.fields, blocks), (layout.row_fields, [0])):
        for field in fields:
            places = [first + field.offset for first in firsts]
            rows = PANELS if field.shared else STRIP_ROWS
            found[field.name] = _plane(strips, places, field.count, field.itemsize, rows)
    K = GROUP * layout.groups
    for name, given in found.items():
        plane = fmt.plane(name)
        assert plane is not None
        elements = plane.shape(1, K)[1]  # the last block may be short
        found[name] = given.view(plane.dtype)[:, :elements]
    return found


def _plane(strips: Array, places: list[int], count: int, itemsize: int, rows: int) -> Array:
    """Bytes of `count` elements of each row, [element][row], at each of these places of a strip:
    uint8 [n * rows, bytes]."""
    size = count * rows * itemsize
    pieces = np.stack([strips[:, at : at + size] for at in places], 1)
    split = pieces.reshape(len(strips), len(places), count, rows, itemsize)
    in_rows = np.ascontiguousarray(split.transpose(0, 3, 1, 2, 4))
    return in_rows.reshape(len(strips) * rows, len(places) * count * itemsize)
