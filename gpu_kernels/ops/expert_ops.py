"""`pack`, `gate_up`, `down` and `combine` as operators of torch: see `ops`."""

# No `from __future__ import annotations`: torch reads an operator's schema from its annotations.

import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels import combine as combine_kernel
from hybrid_moe.gpu_kernels import down as down_kernel
from hybrid_moe.gpu_kernels import gate_up as gate_up_kernel
from hybrid_moe.gpu_kernels import pack_tokens
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.layout_text import layout_from_text, layout_to_text
from hybrid_moe.gpu_kernels.pack_tokens import PackedTokens
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout

Tensor = torch.Tensor


def pack(
    x: Tensor, ids: Tensor, slot_of: Tensor, *, fmt: WeightFormat, slots: int, tile: int
) -> PackedTokens:
    """`pack_tokens.pack` as one node of a graph."""
    return PackedTokens(
        *torch.ops.hybrid_moe.gpu_pack.default(x, ids, slot_of, fmt.name, slots, tile)
    )


@torch.library.custom_op("hybrid_moe::gpu_pack", mutates_args=())
def _pack(
    x: Tensor, ids: Tensor, slot_of: Tensor, format: str, slots: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = pack_tokens.pack(x, ids, slot_of, fmt=FORMATS[format], slots=slots, tile=tile)
    return packed.xp, packed.tile_slot, packed.tile_rows, packed.num_tiles


@_pack.register_fake
def _(
    x: Tensor, ids: Tensor, slot_of: Tensor, format: str, slots: int, tile: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pairs = ids.numel()
    capacity = torch.sym_min(pairs, pairs // tile + torch.sym_min(pairs, slots))  # `max_tiles`
    return (
        torch.empty_like(x),
        ids.new_empty(capacity, dtype=torch.int32),
        ids.new_empty((capacity, tile), dtype=torch.int32),
        ids.new_empty(1, dtype=torch.int32),
    )


def gate_up(
    layout: SlotLayout, activation: Activation, tiles: ExpertTiles, xp: Tensor, k: int
) -> Tensor:
    """`gate_up.gate_up` as one node of a graph."""
    h: Tensor = torch.ops.hybrid_moe.gpu_gate_up.default(
        xp, *_tensors(tiles), layout_to_text(layout), activation.limit, activation.alpha, k
    )
    return h


@torch.library.custom_op("hybrid_moe::gpu_gate_up", mutates_args=())
def _gate_up(
    xp: Tensor,
    memory: Tensor,
    table: Tensor,
    wide: Tensor,
    tile_slot: Tensor,
    tile_rows: Tensor,
    num_tiles: Tensor,
    layout: str,
    limit: float,
    alpha: float,
    k: int,
) -> Tensor:
    tiles = ExpertTiles(memory, table, wide, tile_slot, tile_rows, num_tiles)
    activation = Activation(limit, alpha)
    return gate_up_kernel.gate_up(layout_from_text(layout), activation, tiles, xp, k)


@_gate_up.register_fake
def _(
    xp: Tensor,
    memory: Tensor,
    table: Tensor,
    wide: Tensor,
    tile_slot: Tensor,
    tile_rows: Tensor,
    num_tiles: Tensor,
    layout: str,
    limit: float,
    alpha: float,
    k: int,
) -> Tensor:
    return xp.new_empty((xp.shape[0] * k, layout_from_text(layout).intermediate))


def down(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> Tensor:
    """`down.down` as one node of a graph."""
    y: Tensor = torch.ops.hybrid_moe.gpu_down.default(h, *_tensors(tiles), layout_to_text(layout))
    return y


@torch.library.custom_op("hybrid_moe::gpu_down", mutates_args=())
def _down(
    h: Tensor,
    memory: Tensor,
    table: Tensor,
    wide: Tensor,
    tile_slot: Tensor,
    tile_rows: Tensor,
    num_tiles: Tensor,
    layout: str,
) -> Tensor:
    tiles = ExpertTiles(memory, table, wide, tile_slot, tile_rows, num_tiles)
    return down_kernel.down(layout_from_text(layout), tiles, h)


@_down.register_fake
def _(
    h: Tensor,
    memory: Tensor,
    table: Tensor,
    wide: Tensor,
    tile_slot: Tensor,
    tile_rows: Tensor,
    num_tiles: Tensor,
    layout: str,
) -> Tensor:
    return h.new_empty((h.shape[0], layout_from_text(layout).hidden), dtype=torch.float32)


def _tensors(tiles: ExpertTiles) -> tuple[Tensor, ...]:
    return (
        tiles.memory,
        tiles.table,
        tiles.wide,
        tiles.tile_slot,
        tiles.tile_rows,
        tiles.num_tiles,
    )


def combine(
    y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None = None
) -> Tensor:
    """`combine.combine` as one node of a graph."""
    out: Tensor = torch.ops.hybrid_moe.gpu_combine.default(y, ids, weights, slot_of, cold)
    return out


@torch.library.custom_op("hybrid_moe::gpu_combine", mutates_args=())
def _combine(
    y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None
) -> Tensor:
    return combine_kernel.combine(y, ids, weights, slot_of, cold)


@_combine.register_fake
def _(y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None) -> Tensor:
    return y.new_empty((ids.shape[0], y.shape[1]), dtype=torch.bfloat16)
