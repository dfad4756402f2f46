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
    slots[f.L_GATHER] = kernels.gather
    slots[f.L_ACTIVATE] = kernels.activate
    slots[f.L_COMBINE] = kernels.combine
    slots[f.L_WEIGH] = kernels.weigh
    slots[f.L_ADD] = kernels.add
    slots[f.L_CLEAR] = kernels.clear
    slots[f.L_FINISH] = kernels.finish
    slots[f.L_ENTER] = kernels.enter
    slots[f.L_LEAVE] = kernels.leave
    slots[f.L_ENCODED_BYTES] = kernels.encoding.group_bytes
    slots[f.L_X_ROW_BYTES] = kernels.encoding.row_bytes(gate_up.groups)
    slots[f.L_H_ROW_BYTES] = kernels.encoding.row_bytes(down.groups)
    slots[f.L_TILED_FROM] = kernels.tiled_from
    for slot, table in tables.items():
        slots[slot] = table.ctypes.data
    for base, layout in ((f.L_GU_LAYOUT, gate_up), (f.L_DN_LAYOUT, down)):
        slots[base : base + f.LAYOUT_SLOTS] = (layout.groups, layout.group_bytes, layout.nbytes)
    for base, tiling in ((f.L_DIRECT, kernels.direct), (f.L_TILED, kernels.tiled)):
        slots[base + f.TILES_MOST] = tiling.most
        slots[base + f.TILES_UNIT] = tiling.unit
        slots[base + f.TILES_GROUPS] = tiling.groups
        slots[base + f.TILES_UNPACK] = tiling.unpack
        for tokens, address in tiling.kernels.items():
            slots[base + f.TILES_KERNELS + tokens - 1] = address
    return slots
