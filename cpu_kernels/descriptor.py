"""The compiled code's view of a layer: its sizes, its kernels, and where its tables are."""

from __future__ import annotations

from collections.abc import Mapping

from hybrid_moe.cpu_kernels.drivers.records import Layer, StripSizes
from hybrid_moe.cpu_kernels.kernels.library import KernelSet
from hybrid_moe.formats.strips import GROUP, StripLayout
from hybrid_moe.formats.table import Array


def describe(
    kernels: KernelSet,
    experts: int,
    gate_up: StripLayout,
    down: StripLayout,
    tables: Mapping[str, Array],
) -> Layer:
    """The descriptor of a layer.

    Args:
        kernels: of its format and tier.
        experts: E.
        gate_up, down: layouts of strips with hidden and with intermediate inputs.
        tables: field -> the array whose address it holds. They must live for as long as the
            descriptor is used.
    """
    layer = Layer.new()
    layer.experts = experts
    layer.hidden = GROUP * gate_up.groups
    layer.intermediate = GROUP * down.groups
    for name in (
        "encode",
        "activate",
        "combine",
        "clear",
        "finish",
        "unpack",
        "enter",
        "leave",
        "chunk_group_bytes",
        "chunk_groups",
        "direct_limit",
    ):
        setattr(layer, name, getattr(kernels, name))
    layer.x_row_bytes = kernels.encoding.row_bytes(gate_up.groups)
    layer.h_row_bytes = kernels.encoding.row_bytes(down.groups)
    words = layer.words
    for name, table in tables.items():
        words[Layer.word(name)] = table.ctypes.data
    for sizes, layout in ((layer.gate_up_strips, gate_up), (layer.down_strips, down)):
        _describe_strips(sizes, layout)
    for places, dots in ((layer.direct, kernels.direct), (layer.tiled, kernels.tiled)):
        for index, dot in enumerate(dots):
            place = places[index]
            place.least, place.most, place.kernel = dot.least, dot.most, dot.address
    return layer


def _describe_strips(sizes: StripSizes, layout: StripLayout) -> None:
    sizes.groups = layout.groups
    sizes.code_bytes = layout.code_bytes_per_group
    sizes.scale_bytes = layout.scale_bytes_per_group
    sizes.scale_offset = layout.scale_offset
    sizes.strip_bytes = layout.nbytes
