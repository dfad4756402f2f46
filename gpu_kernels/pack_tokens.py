"""Sort a batch's (token, expert) pairs into tiles of one expert each: kernel `pack`.

A pair p = token * k + j is one expert of one token. Pairs whose expert has no slot (cold ones) and
ids out of range are left out. A tile is up to `tile` pairs of one expert, all that one block of the
grouped GEMMs multiplies at a time:

    ids        3 1 | 1 7 | 3 1 | 9 3      pairs 0 .. 7 of four tokens, k = 2; 9 is cold
    tile_slot  [slot of 1, slot of 3, slot of 7]                          tile = 4
    tile_rows  [1 2 5 .] [0 4 7 .] [3 . . .]                              "." is -1

Tiles ascend in expert id and pairs ascend within an expert: a contract, not an accident, so that
results are equal whichever kernels made them. Nothing returns to the host.

The activations are put into `k_order` on the way, once a token and not once a pair; the GEMMs
gather rows by pair // k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.table import WeightFormat
from hybrid_moe.gpu_kernels.fragments import permute

Tensor = torch.Tensor

ID_DTYPES = (torch.int32, torch.int64)


class PackedTokens(NamedTuple):
    """A batch as the grouped GEMMs read it.

    Attributes:
        xp: bf16 [T, H], the activations in the format's `k_order`.
        tile_slot: int32 [max_tiles], the slot of each tile's expert.
        tile_rows: int32 [max_tiles, tile], its pairs in ascending order, then -1.
        num_tiles: int32 [1]. Tiles from this one on are not written by the kernel; `pack_ref` fills
            them with -1.
    """

    xp: Tensor
    tile_slot: Tensor
    tile_rows: Tensor
    num_tiles: Tensor


def max_tiles(pairs: int, slots: int, tile: int) -> int:
    """The most tiles that `pairs` pairs of at most `slots` experts can fill: full ones, and for
    each expert one that is not; but none is empty."""
    return min(pairs, pairs // tile + min(pairs, slots))


def pack_ref(
    x: Tensor, ids: Tensor, slot_of: Tensor, *, fmt: WeightFormat, slots: int, tile: int
) -> PackedTokens:
    """`pack` in torch: any device, no value read by the host, no loop over pairs or experts.

    Raises:
        TypeError, ValueError: see `pack`.
    """
    _check(x, ids, slot_of, slots, tile)
    pairs, experts = ids.numel(), len(slot_of)
    capacity = max_tiles(pairs, slots, tile)
    flat = ids.reshape(-1).long()
    known = (flat >= 0) & (flat < experts)
    hot = known & (slot_of[flat.clamp(0, experts - 1)] >= 0)
    # Stable: pairs ascend within an expert. All that is in no tile comes last, as expert E.
    expert, pair = torch.where(hot, flat, experts).sort(stable=True)
    count = torch.zeros(experts + 1, dtype=torch.long, device=ids.device)
    count.scatter_add_(0, expert, torch.ones_like(expert))
    count[experts] = 0
    tiles = (count + tile - 1) // tile
    tiles_through = tiles.cumsum(0)
    rank = torch.arange(pairs, device=ids.device) - (count.cumsum(0) - count)[expert]
    place = (tiles_through - tiles)[expert] * tile + rank
    # One more row than there are takes what is in no tile.
    rows = torch.full((capacity * tile + 1,), -1, dtype=torch.int32, device=ids.device)
    rows[torch.where(expert < experts, place, capacity * tile)] = pair.int()
    number = torch.arange(capacity, device=ids.device)
    owner = torch.searchsorted(tiles_through, number, right=True)
    slot = slot_of.int()[owner.clamp(max=experts - 1)]
    return PackedTokens(
        permute(x, fmt),
        torch.where(number < tiles_through[-1], slot, -1),
        rows[: capacity * tile].view(capacity, tile),
        tiles_through[-1:].int(),
    )


def _check(x: Tensor, ids: Tensor, slot_of: Tensor, slots: int, tile: int) -> None:
    if x.dim() != 2 or x.dtype != torch.bfloat16 or x.shape[1] % GROUP or not x.shape[1]:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, must be torch.bfloat16 (tokens, H), H a positive "
            f"multiple of {GROUP}"
        )
    check_routing(ids, slot_of, x.shape[0], x.device)
    if not x.is_contiguous():
        raise ValueError(f"x has strides {x.stride()}, must be contiguous")
    if slots < 1:
        raise ValueError(f"slots is {slots}, must be at least 1")
    if tile < 8 or tile % 8:
        raise ValueError(f"tile is {tile}, must be a positive multiple of 8")


def check_routing(ids: Tensor, slot_of: Tensor, tokens: int, device: torch.device) -> None:
    """Raise unless `ids` and `slot_of` are what `pack` and `combine` take, beside `tokens` rows of
    activations on `device`."""
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids is {ids.dtype}, must be torch.int32 or torch.int64")
    if ids.dim() != 2 or ids.shape[0] != tokens or not 1 <= ids.shape[1] <= MOST_EXPERTS_OF_TOKEN:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}, must be ({tokens}, k) with k from 1 to "
            f"{MOST_EXPERTS_OF_TOKEN}"
        )
    if slot_of.dtype != torch.int32:
        raise TypeError(f"slot_of is {slot_of.dtype}, must be torch.int32")
    if slot_of.dim() != 1 or not 1 <= len(slot_of) <= MOST_EXPERTS:
        raise ValueError(
            f"slot_of has shape {tuple(slot_of.shape)}, must be (E,) with E from 1 to "
            f"{MOST_EXPERTS}"
        )
    for name, tensor in (("ids", ids), ("slot_of", slot_of)):
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, must be on {device} like the rows")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}, must be contiguous")


MOST_EXPERTS = 1024
MOST_EXPERTS_OF_TOKEN = 16


def pack(
    x: Tensor, ids: Tensor, slot_of: Tensor, *, fmt: WeightFormat, slots: int, tile: int
) -> PackedTokens:
    """Sort a batch's pairs into tiles of one expert each, and put its activations into `k_order`.

    Args:
        x: bf16 [T, H], H a multiple of 32.
        ids: int32 or int64 [T, k], k up to 16; ids below 0 or at and above E are in no tile.
        slot_of: int32 [E], E up to 1024: the slot of each expert, -1 if it has none. No two experts
            share a slot.
        fmt: of the experts' weights; it decides the order of activations.
        slots: how many there are.
        tile: pairs of a tile, a multiple of 8.

    All tensors are contiguous and on one device.

    Raises:
        TypeError, ValueError: naming the argument, before anything is allocated.
    """
    return pack_ref(x, ids, slot_of, fmt=fmt, slots=slots, tile=tile)
