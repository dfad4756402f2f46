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

from typing import Any, NamedTuple

import torch

from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.definition import Launch
from hybrid_moe.gpu_kernels.expert_tiles import TILE_STEP, check_tensor
from hybrid_moe.gpu_kernels.fragments import permute
from hybrid_moe.gpu_kernels.pack_few import pack_few
from hybrid_moe.gpu_kernels.pack_many import SCAN_EXPERTS, pack_count, pack_scan, pack_scatter
from hybrid_moe.gpu_kernels.pack_parts import MOST_EXPERTS, THREADS, PackConfig, piece_order
from hybrid_moe.gpu_kernels.toolchain import has_pdl, launch

Tensor = torch.Tensor

ID_DTYPES = (torch.int32, torch.int64)
MOST_EXPERTS_PER_TOKEN = 16


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
    if x.dim() != 2 or not x.shape[1] or x.shape[1] % GROUP:
        raise ValueError(
            f"x has shape {tuple(x.shape)}, must be (tokens, H), H a positive multiple of {GROUP}"
        )
    check_tensor("x", x, torch.bfloat16, tuple(x.shape), x.device)
    check_routing(ids, slot_of, x.shape[0], x.device)
    if slots < 1:
        raise ValueError(f"slots is {slots}, must be at least 1")
    if tile < TILE_STEP or tile % TILE_STEP:
        raise ValueError(f"tile is {tile}, must be a positive multiple of {TILE_STEP}")


def check_routing(ids: Tensor, slot_of: Tensor, tokens: int, device: torch.device) -> None:
    """Raise unless `ids` and `slot_of` are what `pack` and `combine` take, for `tokens` tokens on
    `device`."""
    if ids.dtype not in ID_DTYPES:
        raise TypeError(f"ids is {ids.dtype}, must be torch.int32 or torch.int64")
    k = ids.shape[1] if ids.dim() == 2 else 0
    if not 1 <= k <= MOST_EXPERTS_PER_TOKEN:
        raise ValueError(
            f"ids has shape {tuple(ids.shape)}, must be ({tokens}, k), k from 1 to "
            f"{MOST_EXPERTS_PER_TOKEN}"
        )
    check_tensor("ids", ids, ids.dtype, (tokens, k), device)
    experts = slot_of.shape[0] if slot_of.dim() == 1 else 0
    if not 1 <= experts <= MOST_EXPERTS:
        raise ValueError(
            f"slot_of has shape {tuple(slot_of.shape)}, must be (E,), E from 1 to {MOST_EXPERTS}"
        )
    check_tensor("slot_of", slot_of, torch.int32, (experts,), device)


def takes_one_launch(pairs: int) -> bool:
    """Whether `pack_few` is the faster one, and can.

    A comparison of two pairs takes about 8 instructions in all, so 256 pairs, a batch of 32 with 8
    experts each, take 8 warps x 256 x 8 / 4 schedulers = 4000 cycles, 2 us, and 64 pairs, 2 warps
    on as many schedulers, 500. Three launches take 2 us each even in a graph, but a time that grows
    with the pairs and not with their square.
    """
    return pairs <= THREADS


def pack_launches(
    x: Tensor,
    ids: Tensor,
    slot_of: Tensor,
    packed: PackedTokens,
    *,
    fmt: WeightFormat,
    few: bool,
    pdl: bool = False,
) -> list[Launch]:
    """The launches that fill `packed`, whose tensors are of the right shapes and dtypes: one if
    `few`, for at most 256 pairs, else three."""
    pairs, experts, tile = ids.numel(), len(slot_of), packed.tile_rows.shape[1]
    config = PackConfig(piece_order(fmt), tile, ids.dtype == torch.int64, pdl)
    pieces = x.numel() // len(config.order)
    permuting = -(-pieces // THREADS)  # blocks
    if few:
        values: tuple[Any, ...] = (x, ids, slot_of, *packed, pieces, pairs, experts)
        return [Launch(pack_few(config), values, (1 + permuting,))]
    chunks = -(-pairs // THREADS)
    keys = ids.new_empty(pairs, dtype=torch.int32)
    counts = ids.new_empty((chunks, experts), dtype=torch.int32)
    totals = ids.new_empty(experts, dtype=torch.int32)
    xp, tile_slot, tile_rows, num_tiles = packed
    return [
        Launch(
            pack_count(config),
            (x, ids, slot_of, xp, keys, counts, chunks, pieces, pairs, experts),
            (chunks + permuting,),
        ),
        Launch(
            pack_scan(config), (counts, totals, chunks, experts), (-(-experts // SCAN_EXPERTS),)
        ),
        Launch(
            pack_scatter(config),
            (slot_of, keys, counts, totals, tile_slot, tile_rows, num_tiles, pairs, experts),
            (chunks,),
        ),
    ]


def empty_packed(x: Tensor, pairs: int, slots: int, tile: int) -> PackedTokens:
    """Room for what `pack` writes, beside `x`."""
    capacity = max_tiles(pairs, slots, tile)
    return PackedTokens(
        torch.empty_like(x),
        x.new_empty(capacity, dtype=torch.int32),
        x.new_empty((capacity, tile), dtype=torch.int32),
        x.new_empty(1, dtype=torch.int32),
    )


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
    if x.device.type != "cuda":
        return pack_ref(x, ids, slot_of, fmt=fmt, slots=slots, tile=tile)
    _check(x, ids, slot_of, slots, tile)
    packed = empty_packed(x, ids.numel(), slots, tile)
    few, pdl = takes_one_launch(ids.numel()), has_pdl(x.device)
    for each in pack_launches(x, ids, slot_of, packed, fmt=fmt, few=few, pdl=pdl):
        launch(*each, pdl=pdl)
    return packed
