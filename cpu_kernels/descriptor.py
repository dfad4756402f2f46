"""The compiled code's view of a layer: its sizes, its kernels, and where its tables are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from hybrid_moe.cpu_kernels.drivers import fields as f
from hybrid_moe.cpu_kernels.kernels.library import KernelSet
from hybrid_moe.cpu_kernels.pool.group import Slots
from hybrid_moe.formats.strips import GROUP, StripLayout
from hybrid_moe.formats.table import Array


def describe(
    kernels: KernelSet,
    experts: int,
    gate_up: StripLayout,
    down: StripLayout,
    tables: Mapping[int, Array],
) -> Slots:
    """The descriptor of a layer.

    Args:
        kernels: of its format and tier.
        experts: E.
        gate_up, down: layouts of strips with hidden and with intermediate inputs.
        tables: slot -> the array whose address it holds, of those that `drivers.fields` describes.
            They must live for as long as the descriptor is used.
    """
    slots: Slots = np.zeros(f.LAYER_SLOTS, np.int64)
    slots[f.L_EXPERTS] = experts
    slots[f.L_HIDDEN] = GROUP * gate_up.groups
    slots[f.L_INTERMEDIATE] = GROUP * down.groups
    slots[f.L_ENCODE] = kernels.encode
    slots[f.L_ACTIVATE] = kernels.activate
    slots[f.L_COMBINE] = kernels.combine
    slots[f.L_CLEAR] = kernels.clear
    slots[f.L_FINISH] = kernels.finish
    slots[f.L_ENTER] = kernels.enter
    slots[f.L_LEAVE] = kernels.leave
    slots[f.L_UNPACK] = kernels.unpack
    slots[f.L_CHUNK_GROUP_BYTES] = kernels.chunk_group_bytes
    slots[f.L_DIRECT_LIMIT] = kernels.direct_limit
    slots[f.L_X_ROW_BYTES] = kernels.encoding.row_bytes(gate_up.groups)
    slots[f.L_H_ROW_BYTES] = kernels.encoding.row_bytes(down.groups)
    slots[f.L_CHUNK_GROUPS] = kernels.chunk_groups
    for slot, table in tables.items():
        slots[slot] = table.ctypes.data
    for base, layout in ((f.L_GU_LAYOUT, gate_up), (f.L_DN_LAYOUT, down)):
        slots[base : base + f.LAYOUT_SLOTS] = (
            layout.groups,
            layout.code_bytes_per_group,
            layout.scale_bytes_per_group,
            layout.scale_offset,
            layout.nbytes,
        )
    for base, dots in ((f.L_DIRECT, kernels.direct), (f.L_TILED, kernels.tiled)):
        words = [word for dot in dots for word in (dot.least, dot.most, dot.address)]
        slots[base : base + len(words)] = words
    return slots
