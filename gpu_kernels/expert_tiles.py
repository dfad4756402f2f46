"""What both grouped GEMMs are given besides activations: experts in slots, and tiles of pairs.

A pair p = token * k + j is one expert of one token; `pack` sorts pairs into tiles of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.slot_weights import SlotWeights, slot_weights

Tensor = torch.Tensor

TILE_STEP = 8
"""Pairs of a tile come in columns of an mma."""


@dataclass(frozen=True)
class ExpertTiles:
    """Tiles, and the slots that they name.

    Attributes:
        memory: uint8 [S, nbytes], the slots.
        table: int32, where a slot's strips lie: the layout's `gate_up_table` or `down_table`.
        wide: int32 [S]: not 0 where the expert has scales that bf16 cannot hold (`weight_codes`).
        tile_slot: int32 [max_tiles], the slot of each tile.
        tile_rows: int32 [max_tiles, tile], its pairs, then -1.
        num_tiles: int32 [1]. What lies behind is not read.
    """

    memory: Tensor
    table: Tensor
    wide: Tensor
    tile_slot: Tensor
    tile_rows: Tensor
    num_tiles: Tensor

    @property
    def tile(self) -> int:
        """Pairs of a tile."""
        return self.tile_rows.shape[1]

    def pointers(self, activations: Tensor) -> tuple[Tensor, ...]:
        """The kernels' first arguments, `strip_gemm.gemm_arguments`."""
        experts = self.memory, self.table, self.wide
        return *experts, activations, self.tile_slot, self.tile_rows, self.num_tiles

    def check(self, layout: SlotLayout, columns: int, strips: int, activations: Tensor) -> None:
        """Raise TypeError or ValueError, with the argument's name, for what no kernel can read:
        a wrong dtype, shape or device, or rows that are not contiguous."""
        slots, tiles = self.memory.shape[0], self.tile_slot.shape[0]
        expected: dict[str, tuple[Tensor, torch.dtype, tuple[int, ...]]] = {
            "memory": (self.memory, torch.uint8, (slots, layout.nbytes)),
            "table": (self.table, torch.int32, (strips, columns)),
            "wide": (self.wide, torch.int32, (slots,)),
            "tile_slot": (self.tile_slot, torch.int32, (tiles,)),
            "tile_rows": (self.tile_rows, torch.int32, (tiles, self.tile_rows.shape[-1])),
            "num_tiles": (self.num_tiles, torch.int32, (1,)),
        }
        for name, (tensor, dtype, shape) in expected.items():
            check_tensor(name, tensor, dtype, shape, activations.device)
        if self.tile < TILE_STEP or self.tile % TILE_STEP:
            raise ValueError(
                f"tile_rows has tiles of {self.tile} pairs, must be a multiple of {TILE_STEP}"
            )

    def pairs_by_slot(self, layout: SlotLayout) -> Iterator[tuple[Tensor, SlotWeights]]:
        """For references: of each slot that occurs its pairs, int64 [n], and its weights."""
        count = int(self.num_tiles)
        of_tile = self.tile_slot[:count]
        for slot in of_tile.unique().tolist():
            rows = self.tile_rows[:count][of_tile == slot].flatten()
            yield rows[rows >= 0].long(), slot_weights(layout, self.memory[slot])


def check_tensor(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise unless `tensor`, called `name`, is a contiguous one of this dtype, shape and device."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, must be {dtype}")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, must be {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the activations are on {device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")
