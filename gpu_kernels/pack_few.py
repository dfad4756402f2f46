"""`pack` for up to 256 pairs, in one launch: one block sorts, the others permute activations.

Thread p has pair p and compares it with all others, which it reads from shared memory:

    rank  = pairs before it with its expert              count = all pairs with its expert
    first = pairs of smaller experts that start a tile, i.e. whose rank is a multiple of `tile`

so pair p is row rank % tile of tile first + rank // tile. There is nothing to sort, to add up or to
clear, and no work for experts that nobody asked for: 2 x 256 comparisons at most. Each number is
computed by one thread, so results depend on nothing but the ids.
"""

# No `from __future__ import annotations`: the DSL reads annotations as objects.

import functools
from typing import Any

from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.lane_memory import at, vector
from hybrid_moe.gpu_kernels.pack_parts import (
    NO_EXPERT,
    STEP,
    THREADS,
    PackConfig,
    activations,
    numbers,
    pack_steps,
    shared_words,
    words,
)

_WARPS = THREADS // 32


def _kernel(config: PackConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32
    from cutlass.cute import Pointer, arch

    steps = pack_steps(config)

    class PackFew:
        @cute.kernel
        def kernel(
            self,
            x: Pointer,
            ids: Pointer,
            slot_of: Pointer,
            xp: Pointer,
            tile_slot: Pointer,
            tile_rows: Pointer,
            num_tiles: Pointer,
            pieces: Int32,
            pairs: Int32,
            experts: Int32,
        ) -> None:
            thread = arch.thread_idx()[0]
            block = arch.block_idx()[0]
            tile = config.tile
            memory = shared_words(2 * THREADS + _WARPS)
            keys = vector(memory.iterator, THREADS)
            starts = vector(memory.iterator + THREADS, THREADS)
            tiles_of_warp = vector(memory.iterator + 2 * THREADS, _WARPS)
            steps.wait()
            if block == 0:
                expert, slot = steps.expert_of(ids, slot_of, thread, pairs, experts)
                keys[thread] = expert
                arch.sync_threads()
                rank = Int32(0)
                count = Int32(0)
                if thread < pairs:  # whole warps have nothing to do
                    rank, count = steps.rank_and_count(keys, expert, thread, pairs)
                hot = expert < NO_EXPERT
                starts_tile = hot and rank % tile == 0
                starts[thread] = expert if starts_tile else Int32(NO_EXPERT)
                started = arch.popc(arch.vote_ballot_sync(starts_tile))
                if thread % 32 == 0:
                    tiles_of_warp[thread // 32] = started
                arch.sync_threads()
                first = Int32(0)
                some = cute.make_rmem_tensor(cute.make_layout(STEP), Int32)
                if thread < pairs:
                    for j in cutlass.range(0, pairs, STEP):
                        cute.autovec_copy(vector(starts.iterator + j, STEP), some)
                        for i in cutlass.range_constexpr(STEP):
                            first = first + Int32(some[i] < expert)
                if hot:
                    mine = first + rank // tile
                    row = rank % tile
                    at(tile_rows, mine * tile + row)[0] = thread
                    if starts_tile:
                        at(tile_slot, mine)[0] = slot
                    if rank == count - 1:
                        steps.pad(tile_rows, mine, row + 1)
                if thread == 0:
                    total = Int32(0)
                    for warp in cutlass.range_constexpr(_WARPS):
                        total = total + tiles_of_warp[warp]
                    at(num_tiles, 0)[0] = total
            else:
                steps.permute(x, xp, (block - 1) * THREADS + thread, pieces)

        @cute.jit
        def __call__(
            self,
            x: Pointer,
            ids: Pointer,
            slot_of: Pointer,
            xp: Pointer,
            tile_slot: Pointer,
            tile_rows: Pointer,
            num_tiles: Pointer,
            pieces: Int32,
            pairs: Int32,
            experts: Int32,
            stream: Any,
        ) -> None:
            self.kernel(
                x, ids, slot_of, xp, tile_slot, tile_rows, num_tiles, pieces, pairs, experts
            ).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)

    return PackFew()


@functools.lru_cache(maxsize=64)
def pack_few(config: PackConfig) -> KernelDefinition:
    """Grid 1 + ceil(pieces / 256)."""
    arguments = (
        *activations(config),
        *words("tile_slot", "tile_rows", "num_tiles"),
        *numbers("pieces", "pairs", "experts"),
    )
    shared_bytes = 4 * (2 * THREADS + _WARPS)
    return KernelDefinition("pack_few", config, _kernel, arguments, THREADS, shared_bytes)
