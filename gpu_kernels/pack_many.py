"""`pack` for any number of pairs, in three launches. Pair p is in chunk p // 256.

    pack_count    a block a chunk: keys[p] = expert * 256 + rank within the chunk, or -1;
                  counts[chunk, expert] = pairs. Other blocks permute activations.
    pack_scan     counts become sums of earlier chunks, totals[expert] those of all chunks
    pack_scatter  every block finds where each expert's tiles begin, a prefix sum of
                  ceil(totals / tile), and then writes its pairs; thread g writes what tile g has
                  besides them, its slot and padding

Ranks and sums are whole numbers and each is computed by one thread: results depend on nothing but
the ids, and no kernel needs an atomic operation.
"""

# No `from __future__ import annotations`: the DSL reads annotations as objects.

import functools
from typing import Any

from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.lane_memory import at, vector
from hybrid_moe.gpu_kernels.pack_parts import (
    MOST_EXPERTS,
    NO_EXPERT,
    THREADS,
    PackConfig,
    activations,
    numbers,
    pack_steps,
    shared_words,
    words,
)

SCAN_EXPERTS = 32
"""Of a block of `pack_scan`: counts of one chunk are then 128 bytes in one piece."""

_WARPS = THREADS // 32
_EACH = MOST_EXPERTS // THREADS


def _count(config: PackConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64
    from cutlass.cute import Pointer, arch

    steps = pack_steps(config)

    class PackCount:
        @cute.kernel
        def kernel(
            self,
            x: Pointer,
            ids: Pointer,
            slot_of: Pointer,
            xp: Pointer,
            keys: Pointer,
            counts: Pointer,
            chunks: Int32,
            pieces: Int32,
            pairs: Int32,
            experts: Int32,
        ) -> None:
            thread = arch.thread_idx()[0]
            block = arch.block_idx()[0]
            chunk_keys = shared_words(THREADS)
            steps.wait()
            if block < chunks:
                pair = block * THREADS + thread
                own = counts + Int64(block) * experts
                expert, _ = steps.expert_of(ids, slot_of, pair, pairs, experts)
                chunk_keys[thread] = expert
                for other in cutlass.range(thread, experts, THREADS):
                    at(own, other)[0] = Int32(0)
                arch.sync_threads()
                rank, count = steps.rank_and_count(chunk_keys, expert, thread, THREADS)
                hot = expert < NO_EXPERT
                if pair < pairs:
                    at(keys, pair)[0] = expert * THREADS + rank if hot else Int32(-1)
                if hot and rank == count - 1:
                    at(own, expert)[0] = count
            else:
                steps.permute(x, xp, (block - chunks) * THREADS + thread, pieces)

        @cute.jit
        def __call__(
            self,
            x: Pointer,
            ids: Pointer,
            slot_of: Pointer,
            xp: Pointer,
            keys: Pointer,
            counts: Pointer,
            chunks: Int32,
            pieces: Int32,
            pairs: Int32,
            experts: Int32,
            stream: Any,
        ) -> None:
            self.kernel(x, ids, slot_of, xp, keys, counts, chunks, pieces, pairs, experts).launch(
                grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
            )

    return PackCount()


def _scan(config: PackConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64
    from cutlass.cute import Pointer, arch

    steps = pack_steps(config)

    class PackScan:
        @cute.kernel
        def kernel(self, counts: Pointer, totals: Pointer, chunks: Int32, experts: Int32) -> None:
            thread = arch.thread_idx()[0]
            lane = thread % SCAN_EXPERTS
            part = thread // SCAN_EXPERTS
            expert = arch.block_idx()[0] * SCAN_EXPERTS + lane
            sums = shared_words(THREADS)
            steps.wait()
            size = (chunks + (_WARPS - 1)) // _WARPS
            begin = part * size
            end = cutlass.min(begin + size, chunks)
            own = Int32(0)
            if expert < experts:
                for chunk in cutlass.range(begin, end, unroll=8):
                    own = own + at(counts, Int64(chunk) * experts + expert)[0]
            sums[thread] = own
            arch.sync_threads()
            before = Int32(0)
            for other in cutlass.range_constexpr(_WARPS - 1):
                before = before + (sums[other * SCAN_EXPERTS + lane] if other < part else Int32(0))
            if expert < experts:
                for chunk in cutlass.range(begin, end, unroll=8):
                    place = at(counts, Int64(chunk) * experts + expert)
                    count = place[0]
                    place[0] = before
                    before = before + count
                if part == _WARPS - 1:
                    at(totals, expert)[0] = before

        @cute.jit
        def __call__(
            self, counts: Pointer, totals: Pointer, chunks: Int32, experts: Int32, stream: Any
        ) -> None:
            self.kernel(counts, totals, chunks, experts).launch(
                grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream
            )

    return PackScan()


def _scatter(config: PackConfig) -> Any:
    import cutlass
    import cutlass.cute as cute
    from cutlass import Int32, Int64
    from cutlass.cute import Pointer, arch

    steps = pack_steps(config)

    class PackScatter:
        @cute.kernel
        def kernel(
            self,
            slot_of: Pointer,
            keys: Pointer,
            counts: Pointer,
            totals: Pointer,
            tile_slot: Pointer,
            tile_rows: Pointer,
            num_tiles: Pointer,
            pairs: Int32,
            experts: Int32,
        ) -> None:
            thread = arch.thread_idx()[0]
            block = arch.block_idx()[0]
            lane = thread % 32
            warp = thread // 32
            tile = config.tile
            memory = shared_words(MOST_EXPERTS + _WARPS)
            firsts = vector(memory.iterator, MOST_EXPERTS)
            warp_sums = vector(memory.iterator + MOST_EXPERTS, _WARPS)
            steps.wait()
            # Tiles of four experts, then of those before in the warp, then of earlier warps.
            through = cute.make_rmem_tensor(cute.make_layout(_EACH), Int32)
            mine = Int32(0)
            for i in cutlass.range_constexpr(_EACH):
                expert = thread * _EACH + i
                total = Int32(0)
                if expert < experts:
                    total = at(totals, expert)[0]
                through[i] = mine
                mine = mine + (total + (tile - 1)) // tile
            sum_through = mine
            for step in cutlass.range_constexpr(5):
                other = arch.shuffle_sync_up(sum_through, 1 << step, mask_and_clamp=0)
                sum_through = sum_through + (other if lane >= 1 << step else Int32(0))
            if lane == 31:
                warp_sums[warp] = sum_through
            arch.sync_threads()
            before = sum_through - mine
            all_tiles = Int32(0)
            for other in cutlass.range_constexpr(_WARPS):
                before = before + (warp_sums[other] if other < warp else Int32(0))
                all_tiles = all_tiles + warp_sums[other]
            for i in cutlass.range_constexpr(_EACH):
                through[i] = through[i] + before
            cute.autovec_copy(through, vector(firsts.iterator + thread * _EACH, _EACH))
            arch.sync_threads()

            pair = block * THREADS + thread
            if pair < pairs:
                key = at(keys, pair)[0]
                if key >= 0:
                    owner = key // THREADS
                    earlier = at(counts, Int64(block) * experts + owner)[0]
                    rank = key % THREADS + earlier
                    at(tile_rows, firsts[owner] * tile + rank)[0] = pair
            number = pair  # there are no more tiles than pairs
            if number < all_tiles:
                # The last expert whose tiles begin here or before; those without any come earlier.
                last = Int32(0)
                for bit in cutlass.range_constexpr(10):
                    half = MOST_EXPERTS >> (bit + 1)
                    last = last + (half if firsts[last + half] <= number else 0)
                at(tile_slot, number)[0] = at(slot_of, last)[0]
                steps.pad(tile_rows, number, at(totals, last)[0] - (number - firsts[last]) * tile)
            if number == 0:
                at(num_tiles, 0)[0] = all_tiles

        @cute.jit
        def __call__(
            self,
            slot_of: Pointer,
            keys: Pointer,
            counts: Pointer,
            totals: Pointer,
            tile_slot: Pointer,
            tile_rows: Pointer,
            num_tiles: Pointer,
            pairs: Int32,
            experts: Int32,
            stream: Any,
        ) -> None:
            self.kernel(
                slot_of, keys, counts, totals, tile_slot, tile_rows, num_tiles, pairs, experts
            ).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)

    return PackScatter()


@functools.lru_cache(maxsize=64)
def pack_count(config: PackConfig) -> KernelDefinition:
    """Grid chunks + ceil(pieces / 256)."""
    arguments = (
        *activations(config),
        *words("keys", "counts"),
        *numbers("chunks", "pieces", "pairs", "experts"),
    )
    return KernelDefinition("pack_count", config, _count, arguments, THREADS, 4 * THREADS)


@functools.lru_cache(maxsize=64)
def pack_scan(config: PackConfig) -> KernelDefinition:
    """Grid ceil(experts / 32)."""
    arguments = (*words("counts", "totals"), *numbers("chunks", "experts"))
    return KernelDefinition("pack_scan", config, _scan, arguments, THREADS, 4 * THREADS)


@functools.lru_cache(maxsize=64)
def pack_scatter(config: PackConfig) -> KernelDefinition:
    """Grid chunks."""
    arguments = (
        *words("slot_of", "keys", "counts", "totals", "tile_slot", "tile_rows", "num_tiles"),
        *numbers("pairs", "experts"),
    )
    shared_bytes = 4 * (MOST_EXPERTS + _WARPS)
    return KernelDefinition("pack_scatter", config, _scatter, arguments, THREADS, shared_bytes)
