"""What the kernels of `pack` share: their choices, and steps that more than one of them takes."""

# No `from __future__ import annotations`: the DSL reads annotations as objects.

import functools
from dataclasses import dataclass
from typing import Any

from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels.definition import Argument
from hybrid_moe.gpu_kernels.fragments import k_order
from hybrid_moe.gpu_kernels.lane_memory import at, vector

THREADS = 256
"""Of every block: the pairs of a chunk, and the most that `pack_few` takes."""
MOST_EXPERTS = 1024
"""Four for each thread of `pack_scatter`."""
NO_EXPERT = MOST_EXPERTS
"""Of a pair in no tile. Sorts behind every expert."""
STEP = 16
"""Pairs that a thread compares with at a time: four loads under way instead of one."""


@dataclass(frozen=True)
class PackConfig:
    """What the kernels of `pack` are compiled for.

    Attributes:
        order: `k_order` of a piece of a group; see `piece_order`.
        tile: pairs of a tile.
        wide_ids: ids are int64, else int32.
        pdl: launched before the kernel in front has ended (sm_90 and later).
    """

    order: tuple[int, ...]
    tile: int
    wide_ids: bool
    pdl: bool = False


@functools.lru_cache(maxsize=64)  # asked for by every launch
def piece_order(fmt: WeightFormat) -> tuple[int, ...]:
    """`k_order` of the smallest piece of a group that can be permuted apart from the others, all in
    the same way: 8 inputs, 16 bytes, for 4-bit codes; the group of 32 for others. A thread permutes
    a piece in its registers."""
    order = [int(place) for place in k_order(fmt)]
    for size in (8, 16):
        pieces = [order[at : at + size] for at in range(0, GROUP, size)]
        if all([i - size * n for i in p] == pieces[0] for n, p in enumerate(pieces)):
            return tuple(pieces[0])
    return tuple(order)


def words(*names: str) -> tuple[Argument, ...]:
    """Pointers to int32."""
    return tuple(Argument(name, "i32", 4) for name in names)


def numbers(*names: str) -> tuple[Argument, ...]:
    """int32 scalars."""
    return tuple(Argument(name, "i32") for name in names)


def activations(config: PackConfig) -> tuple[Argument, ...]:
    """What the kernels take that read ids and permute activations: x, ids, slot_of, xp."""
    ids = Argument("ids", "i64", 8) if config.wide_ids else Argument("ids", "i32", 4)
    return Argument("x", "bf16", 16), ids, *words("slot_of"), Argument("xp", "bf16", 16)


def shared_words(count: int) -> Any:
    """In a kernel: int32 [count] in shared memory. A kernel asks once."""
    import cutlass
    import cutlass.cute as cute

    memory = cutlass.memory.SmemAllocator()
    return memory.allocate_tensor(cutlass.Int32, cute.make_layout(count), byte_alignment=16)


@dataclass(frozen=True)
class PackSteps:
    """Functions for use in kernels; `pack_steps` has their meaning."""

    wait: Any
    permute: Any
    expert_of: Any
    rank_and_count: Any
    pad: Any


def pack_steps(config: PackConfig) -> PackSteps:
    """What more than one kernel does. Imports the DSL."""
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Int32, Int64
    from cutlass.cute import Pointer, arch

    size = len(config.order)
    tile = config.tile

    def wait() -> None:
        """Until what the kernel in front has written is there; the next one may be set up."""
        if config.pdl:
            arch.griddepcontrol_wait()
            arch.griddepcontrol_launch_dependents()

    @cute.jit
    def permute(x: Pointer, xp: Pointer, piece: Int32, pieces: Int32) -> None:
        """One piece of a group of activations. A warp's loads and stores of 16 bytes are whole
        sectors for pieces of 8; of 32, two of them together are, which caches see to.

        A format with zeros or minima would also need the sum of each group of activations
        (docs/gpu.md): this is the place that has them in registers.
        """
        there = cute.make_rmem_tensor(cute.make_layout(size), BFloat16)
        here = cute.make_rmem_tensor(cute.make_layout(size), BFloat16)
        if piece < pieces:
            place = Int64(piece) * size
            cute.autovec_copy(vector(x + place, size), there)
            for i in cutlass.range_constexpr(size):
                here[i] = there[config.order[i]]
            cute.autovec_copy(here, vector(xp + place, size))

    @cute.jit
    def expert_of(ids: Pointer, slot_of: Pointer, pair: Int32, pairs: Int32, experts: Int32) -> Any:
        """(expert, slot) of a pair; (NO_EXPERT, -1) if it is in no tile."""
        expert = Int32(NO_EXPERT)
        slot = Int32(-1)
        if pair < pairs:
            given = at(ids, pair)[0]
            if given >= 0 and given < experts:
                found = at(slot_of, Int32(given))[0]
                if found >= 0:
                    expert = Int32(given)
                    slot = found
        return expert, slot

    @cute.jit
    def rank_and_count(keys: cute.Tensor, key: Int32, thread: Int32, used: Int32) -> Any:
        """How many of the first `used` keys (rounded up to whole steps) are `key`: before `thread`,
        and in all."""
        rank = Int32(0)
        count = Int32(0)
        some = cute.make_rmem_tensor(cute.make_layout(STEP), Int32)
        for j in cutlass.range(0, used, STEP):
            cute.autovec_copy(vector(keys.iterator + j, STEP), some)
            for i in cutlass.range_constexpr(STEP):
                same = Int32(some[i] == key)
                count = count + same
                rank = rank + (same if j + i < thread else Int32(0))
        return rank, count

    @cute.jit
    def pad(tile_rows: Pointer, number: Int32, used: Int32) -> None:
        """-1 in the rows of tile `number` from `used` on."""
        for row in cutlass.range(used, tile):
            at(tile_rows, number * tile + row)[0] = Int32(-1)

    return PackSteps(wait, permute, expert_of, rank_and_count, pad)
