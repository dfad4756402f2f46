# No `from __future__ import annotations`: the DSL reads annotations as objects.
"""The kernels of `pack_tokens`: one launch for few pairs, three for many.

`pack_few` (one block sorts, others permute activations). Thread p has pair p and compares it with
all others, which it reads from shared memory:

    rank  = pairs before it with its expert              count = all pairs with its expert
    first = pairs of smaller experts that start a tile, i.e. whose rank is a multiple of `tile`

so pair p is row rank % tile of tile first + rank // tile. There is nothing to sort, to add up or to
clear, and no work for experts that nobody asked for: 2 x 256 comparisons at most.

Many pairs are cut into chunks of 256, pair p belonging to chunk p // 256:

    pack_count    a block a chunk: keys[p] = expert * 256 + rank within the chunk, or -1;
                  counts[chunk, expert] = pairs (other blocks permute activations)
    pack_scan     counts become sums of earlier chunks, totals[expert] those of all chunks
    pack_scatter  every block finds where each expert's tiles begin, a prefix sum of
                  ceil(totals / tile), and then writes its pairs; thread g writes what tile g has
                  besides them, its slot and padding

Ranks and sums are whole numbers and each is computed by one thread: results depend on nothing but
the ids, and no kernel needs an atomic operation.
"""

from dataclasses import dataclass
from typing import Any

from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.table import WeightFormat
from hybrid_moe.gpu_kernels.definition import Argument, KernelDefinition
from hybrid_moe.gpu_kernels.fragments import k_order

THREADS = 256
"""Of every block: the pairs of a chunk, and the most that `pack_few` takes."""
MOST_EXPERTS = 1024
"""Four for each thread of `pack_scatter`."""
SCAN_EXPERTS = 32
"""Of a block of `pack_scan`: counts of one chunk are then 128 bytes in one piece."""

STEP = 16
"""Pairs that a thread compares with at a time: four loads under way instead of one."""

_WARPS = THREADS // 32
_EACH = MOST_EXPERTS // THREADS
_NO_EXPERT = MOST_EXPERTS
"""Sorts behind every expert."""


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


def _kernels(config: PackConfig) -> dict[str, Any]:
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Int32, Int64
    from cutlass.cute import arch

    Pointer = cute.Pointer

    def shared(words: int) -> Any:
        """int32 [words] in shared memory; a kernel asks once."""
        memory = cutlass.memory.SmemAllocator()
        return memory.allocate_tensor(Int32, cute.make_layout(words), byte_alignment=16)

    def vector(pointer: Any, size: int) -> Any:
        return cute.make_tensor(pointer, cute.make_layout(size))

    def at(pointer: Any, index: Any) -> Any:
        return cute.make_tensor(pointer + index, cute.make_layout(1))

    class PackKernel:
        """What the kernels share."""

        def __init__(self, config: PackConfig) -> None:
            self.config = config

        def wait(self) -> None:
            """Until what the kernel in front has written is there; the next one may be set up."""
            if self.config.pdl:
                arch.griddepcontrol_wait()
                arch.griddepcontrol_launch_dependents()

        @cute.jit
        def permute(self, x: Pointer, xp: Pointer, piece: Int32, pieces: Int32):
            """One piece of a group of activations. Its 16-byte loads and stores are whole sectors
            for pieces of 8; of 32, four of them together are."""
            size = cutlass.const_expr(len(self.config.order))
            there = cute.make_rmem_tensor(cute.make_layout(size), BFloat16)
            here = cute.make_rmem_tensor(cute.make_layout(size), BFloat16)
            if piece < pieces:
                place = Int64(piece) * size
                cute.autovec_copy(vector(x + place, size), there)
                for i in cutlass.range_constexpr(size):
                    here[i] = there[self.config.order[i]]
                cute.autovec_copy(here, vector(xp + place, size))

        @cute.jit
        def expert_of(self, ids: Pointer, slot_of: Pointer, pair: Int32, pairs: Int32, experts: Int32):
            """(expert, slot) of a pair; (_NO_EXPERT, -1) if it is in no tile."""
            expert = Int32(_NO_EXPERT)
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
        def rank_and_count(self, keys: cute.Tensor, key: Int32, thread: Int32, used: Int32):
            """How many of the first `used` keys (rounded up to whole steps) are `key`: before
            `thread`, and in all."""
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
        def pad(self, tile_rows: Pointer, tile: Int32, used: Int32):
            """-1 in the rows of a tile from `used` on."""
            rows = self.config.tile
            for row in cutlass.range(used, rows):
                at(tile_rows, tile * rows + row)[0] = Int32(-1)

    class PackFew(PackKernel):
        @cute.kernel
        def kernel(self, x: Pointer, ids: Pointer, slot_of: Pointer, xp: Pointer, tile_slot: Pointer,
                   tile_rows: Pointer, num_tiles: Pointer, pieces: Int32, pairs: Int32,
                   experts: Int32):  # fmt: skip
            thread = arch.thread_idx()[0]
            block = arch.block_idx()[0]
            tile = self.config.tile
            memory = shared(2 * THREADS)
            keys = vector(memory.iterator, THREADS)
            starts = vector(memory.iterator + THREADS, THREADS)
            self.wait()
            if block == 0:
                expert, slot = self.expert_of(ids, slot_of, thread, pairs, experts)
                keys[thread] = expert
                arch.sync_threads()
                rank = Int32(0)
                count = Int32(0)
                if thread < pairs:  # whole warps have nothing to do
                    rank, count = self.rank_and_count(keys, expert, thread, pairs)
                hot = expert < _NO_EXPERT
                starts[thread] = expert if rank % tile == 0 else Int32(_NO_EXPERT)
                arch.sync_threads()
                first = Int32(0)
                total = Int32(0)
                some = cute.make_rmem_tensor(cute.make_layout(STEP), Int32)
                if thread < pairs:
                    for j in cutlass.range(0, pairs, STEP):
                        cute.autovec_copy(vector(starts.iterator + j, STEP), some)
                        for i in cutlass.range_constexpr(STEP):
                            first = first + Int32(some[i] < expert)
                            total = total + Int32(some[i] < _NO_EXPERT)
                if hot:
                    mine = first + rank // tile
                    row = rank % tile
                    at(tile_rows, mine * tile + row)[0] = thread
                    if row == 0:
                        at(tile_slot, mine)[0] = slot
                    if rank == count - 1:
                        self.pad(tile_rows, mine, row + 1)
                if thread == 0:
                    at(num_tiles, 0)[0] = total
            else:
                self.permute(x, xp, (block - 1) * THREADS + thread, pieces)

        @cute.jit
        def __call__(self, x: Pointer, ids: Pointer, slot_of: Pointer, xp: Pointer, tile_slot: Pointer,
                     tile_rows: Pointer, num_tiles: Pointer, pieces: Int32, pairs: Int32,
                     experts: Int32, stream):  # fmt: skip
            self.kernel(x, ids, slot_of, xp, tile_slot, tile_rows, num_tiles, pieces, pairs,
                        experts).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip

    class PackCount(PackKernel):
        @cute.kernel
        def kernel(self, x: Pointer, ids: Pointer, slot_of: Pointer, xp: Pointer, keys: Pointer,
                   counts: Pointer, chunks: Int32, pieces: Int32, pairs: Int32, experts: Int32):  # fmt: skip
            thread = arch.thread_idx()[0]
            block = arch.block_idx()[0]
            chunk_keys = shared(THREADS)
            self.wait()
            if block < chunks:
                pair = block * THREADS + thread
                own = counts + Int64(block) * experts
                expert, _ = self.expert_of(ids, slot_of, pair, pairs, experts)
                chunk_keys[thread] = expert
                for other in cutlass.range(thread, experts, THREADS):
                    at(own, other)[0] = Int32(0)
                arch.sync_threads()
                rank, count = self.rank_and_count(chunk_keys, expert, thread, THREADS)
                hot = expert < _NO_EXPERT
                if pair < pairs:
                    at(keys, pair)[0] = expert * THREADS + rank if hot else Int32(-1)
                if hot and rank == count - 1:
                    at(own, expert)[0] = count
            else:
                self.permute(x, xp, (block - chunks) * THREADS + thread, pieces)

        @cute.jit
        def __call__(self, x: Pointer, ids: Pointer, slot_of: Pointer, xp: Pointer, keys: Pointer,
                     counts: Pointer, chunks: Int32, pieces: Int32, pairs: Int32, experts: Int32,
                     stream):  # fmt: skip
            self.kernel(x, ids, slot_of, xp, keys, counts, chunks, pieces, pairs, experts).launch(
                grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip

    class PackScan(PackKernel):
        @cute.kernel
        def kernel(self, counts: Pointer, totals: Pointer, chunks: Int32, experts: Int32):
            thread = arch.thread_idx()[0]
            lane = thread % SCAN_EXPERTS
            part = thread // SCAN_EXPERTS
            expert = arch.block_idx()[0] * SCAN_EXPERTS + lane
            sums = shared(THREADS)
            self.wait()
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
        def __call__(self, counts: Pointer, totals: Pointer, chunks: Int32, experts: Int32, stream):
            self.kernel(counts, totals, chunks, experts).launch(
                grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip

    class PackScatter(PackKernel):
        @cute.kernel
        def kernel(self, slot_of: Pointer, keys: Pointer, counts: Pointer, totals: Pointer,
                   tile_slot: Pointer, tile_rows: Pointer, num_tiles: Pointer, pairs: Int32,
                   experts: Int32):  # fmt: skip
            thread = arch.thread_idx()[0]
            block = arch.block_idx()[0]
            lane = thread % 32
            warp = thread // 32
            tile = self.config.tile
            memory = shared(MOST_EXPERTS + _WARPS)
            firsts = vector(memory.iterator, MOST_EXPERTS)
            warp_sums = vector(memory.iterator + MOST_EXPERTS, _WARPS)
            self.wait()
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
                self.pad(tile_rows, number, at(totals, last)[0] - (number - firsts[last]) * tile)
            if number == 0:
                at(num_tiles, 0)[0] = all_tiles

        @cute.jit
        def __call__(self, slot_of: Pointer, keys: Pointer, counts: Pointer, totals: Pointer,
                     tile_slot: Pointer, tile_rows: Pointer, num_tiles: Pointer, pairs: Int32,
                     experts: Int32, stream):  # fmt: skip
            self.kernel(slot_of, keys, counts, totals, tile_slot, tile_rows, num_tiles, pairs,
                        experts).launch(grid=[1, 1, 1], block=[THREADS, 1, 1], stream=stream)  # fmt: skip

    kernels = (PackFew, PackCount, PackScan, PackScatter)
    return {kernel.__name__: kernel(config) for kernel in kernels}


def _few(config: PackConfig) -> Any:
    return _kernels(config)["PackFew"]


def _count(config: PackConfig) -> Any:
    return _kernels(config)["PackCount"]


def _scan(config: PackConfig) -> Any:
    return _kernels(config)["PackScan"]


def _scatter(config: PackConfig) -> Any:
    return _kernels(config)["PackScatter"]


def _words(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "i32", 4) for name in names)


def _numbers(*names: str) -> tuple[Argument, ...]:
    return tuple(Argument(name, "i32") for name in names)


def _activations(config: PackConfig) -> tuple[Argument, ...]:
    ids = Argument("ids", "i64", 8) if config.wide_ids else Argument("ids", "i32", 4)
    return Argument("x", "bf16", 16), ids, *_words("slot_of"), Argument("xp", "bf16", 16)


def few_definition(config: PackConfig) -> KernelDefinition:
    """`pack_few`, grid 1 + ceil(pieces / 256): pairs up to 256."""
    arguments = (
        *_activations(config),
        *_words("tile_slot", "tile_rows", "num_tiles"),
        *_numbers("pieces", "pairs", "experts"),
    )
    return KernelDefinition("pack_few", config, _few, arguments, THREADS, 8 * THREADS)


def count_definition(config: PackConfig) -> KernelDefinition:
    """`pack_count`, grid chunks + ceil(pieces / 256)."""
    arguments = (
        *_activations(config),
        *_words("keys", "counts"),
        *_numbers("chunks", "pieces", "pairs", "experts"),
    )
    return KernelDefinition("pack_count", config, _count, arguments, THREADS, 4 * THREADS)


def scan_definition(config: PackConfig) -> KernelDefinition:
    """`pack_scan`, grid ceil(experts / 32)."""
    arguments = (*_words("counts", "totals"), *_numbers("chunks", "experts"))
    return KernelDefinition("pack_scan", config, _scan, arguments, THREADS, 4 * THREADS)


def scatter_definition(config: PackConfig) -> KernelDefinition:
    """`pack_scatter`, grid chunks."""
    arguments = (
        *_words("slot_of", "keys", "counts", "totals", "tile_slot", "tile_rows", "num_tiles"),
        *_numbers("pairs", "experts"),
    )
    shared_bytes = 4 * (MOST_EXPERTS + _WARPS)
    return KernelDefinition("pack_scatter", config, _scatter, arguments, THREADS, shared_bytes)
