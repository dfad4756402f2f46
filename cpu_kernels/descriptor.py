"""The compiled code's view of a layer: its sizes, its kernels, and where its tables are."""

from __future__ import annotations

from collections.abc import Mapping

from hybrid_moe.cpu_kernels.drivers.records import Layer, Products, TilePlan
from hybrid_moe.cpu_kernels.kernels.library import KernelSet, Tiling
from hybrid_moe.formats.numbers import Array
from hybrid_moe.formats.strips import GROUP, StripLayout


def describe(
    kernels: KernelSet,
    down_kernels: KernelSet,
    experts: int,
    gate_up: StripLayout,
    down: StripLayout,
    tables: Mapping[str, Array],
) -> Layer:
    """The descriptor of a layer.

    Args:
        kernels: of the tier and the format of gate and up.
        down_kernels: of the tier and the format of down.
        experts: E.
        gate_up, down: layouts of strips with hidden and with intermediate inputs.
        tables: field -> the array whose address it holds. They must live for as long as the
            descriptor is used.
    """
    layer = _layer(kernels, gate_up, tables)
    layer.experts = experts
    layer.intermediate = GROUP * down.groups
    layer.activate = down_kernels.activate  # encodes what down reads
    _describe_products(layer.down, down_kernels, down)
    if kernels.enter != down_kernels.enter:  # tile registers of two shapes
        layer.leave = kernels.leave or down_kernels.leave
        layer.gate_up.enter, layer.down.enter = kernels.enter, down_kernels.enter
    return layer


def describe_dense(
    kernels: KernelSet, matrices: int, layout: StripLayout, tables: Mapping[str, Array]
) -> Layer:
    """The descriptor of a dense layer.

    Args:
        kernels: of its format and tier.
        matrices: how many, all with strips of `layout`.
        tables: as for `describe`.
    """
    layer = _layer(kernels, layout, tables)
    layer.matrices = matrices
    return layer


def _layer(kernels: KernelSet, layout: StripLayout, tables: Mapping[str, Array]) -> Layer:
    """What layers have in common: `layout` is that of the strips which meet the inputs."""
    layer = Layer.new()
    layer.hidden = GROUP * layout.groups
    for name in (
        "encode",
        "activate",
        "combine",
        "weigh",
        "add",
        "clear",
        "finish",
        "finish_float",
        "deliver",
        "enter",
        "leave",
    ):
        setattr(layer, name, getattr(kernels, name))
    words = layer.words
    for name, table in tables.items():
        words[Layer.word(name)] = table.ctypes.data
    _describe_products(layer.gate_up, kernels, layout)
    return layer


def _describe_products(products: Products, kernels: KernelSet, layout: StripLayout) -> None:
    products.strips.groups, products.strips.strip_bytes = layout.groups, layout.nbytes
    products.gather, products.tiled_from = kernels.gather, kernels.tiled_from
    products.encoded_bytes = kernels.encoding.group_bytes
    products.row_bytes = kernels.encoding.row_bytes(layout.groups)
    _describe_tiles(products.direct, kernels.direct)
    _describe_tiles(products.tiled, kernels.tiled)


def _describe_tiles(tiles: TilePlan, tiling: Tiling) -> None:
    tiles.most, tiles.unit, tiles.groups = tiling.most, tiling.unit, tiling.groups
    tiles.unpack = tiling.unpack
    for tokens, address in tiling.kernels.items():
        tiles.kernels[tokens - 1] = address
