"""The kernel of both grouped GEMMs: strips times tiles of tokens. They differ in the epilogue.

A block has some strips of an expert and one tile. A warp reads weights from global memory straight
into registers, where they are A fragments (`fragments`, `weight_codes`): a word has one warp that
needs it, so shared memory would gain nothing. Tokens are the columns of B. Through K there are two
ways (`gemm_loops`):

* `split_k`, few tokens: the warps of a block share the K ranges of a strip. The sums of ranges meet
  in shared memory, and a warp adds up those of a pair of C fragments.
* `staged`, many tokens: a strip has two warps, one for each half, with all of K. Activations come
  through shared memory, for all warps of the block.

What is computed does not depend on which: ranges follow from K alone, and their sums are added in
ascending order from zero. Columns for which a tile has no pair repeat its first one and are not
stored. Blocks of tiles that do not exist leave at once.
"""

from typing import Any

from hybrid_moe.formats.strips import LINE
from hybrid_moe.gpu_kernels.definition import Argument
from hybrid_moe.gpu_kernels.fragments import HALF_ROWS
from hybrid_moe.gpu_kernels.gemm_config import ROW_TILES, GemmConfig
from hybrid_moe.gpu_kernels.gemm_loops import CHUNKS, split_k, staged
from hybrid_moe.gpu_kernels.lane_memory import divide, element, registers, rounded


def gemm_arguments(out: str) -> tuple[Argument, ...]:
    """Of either kernel, whose output has elements of type `out`.

    `activations` has rows of K, `out` of `row_columns`; pair p reads row p // pairs_per_row. The
    table has a row for each of `strips` strips.
    """
    return (
        Argument("memory", "u8", 64),
        Argument("table", "i32", 4),
        Argument("wide", "i32", 4),
        Argument("activations", "bf16", 16),
        Argument("tile_slot", "i32", 4),
        Argument("tile_rows", "i32", 8),
        Argument("num_tiles", "i32", 4),
        Argument("out", out, 16),
        Argument("slot_bytes", "i64"),
        Argument("K", "i32"),
        Argument("strips", "i32"),
        Argument("row_columns", "i32"),
        Argument("pairs_per_row", "i32"),
    )


def strip_gemm(config: GemmConfig, epilogue: Any) -> Any:
    """The kernel's object of CuTe DSL.

    Args:
        epilogue: an object with
            halves_meet: whether it takes the two halves of a row tile together, or the two row
                tiles of a half.
            table_columns: of a row of `table`.
            early_weights: the kernel before this one has waited for what wrote the tiles, so
                weights may be loaded while it still runs.
            store(c, pairs, out, base, entry, strip, a, t, row_columns): what is done with such a
                pair of C fragments, float32 [4, 2], of tile or half `a`. `pairs` are the two pairs
                whose columns they are, -1 for none; `base` is the slot's address, `entry` leads to
                the strip's row of the table.
    """
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64

    loop = staged(config) if config.staged else split_k(config)
    columns = config.columns

    class StripGemm:
        @cute.kernel
        def kernel(
            self,
            memory: cute.Pointer,
            table: cute.Pointer,
            wide: cute.Pointer,
            activations: cute.Pointer,
            tile_slot: cute.Pointer,
            tile_rows: cute.Pointer,
            num_tiles: cute.Pointer,
            out: cute.Pointer,
            slot_bytes: Int64,
            K: Int32,
            strips: Int32,
            row_columns: Int32,
            pairs_per_row: Int32,
        ) -> None:
            shared = cutlass.memory.SmemAllocator().allocate_tensor(
                Float32, cute.make_layout(config.shared_bytes // 4), byte_alignment=128
            )
            if cutlass.const_expr(config.pdl and not epilogue.early_weights):
                cute.arch.griddepcontrol_wait()
                cute.arch.griddepcontrol_launch_dependents()
            tid = cute.arch.thread_idx()[0]
            lane, warp = tid & 31, cute.arch.make_warp_uniform(tid >> 5)
            t, q = lane >> 2, lane & 3
            block, tile, _ = cute.arch.block_idx()
            groups = K >> 5
            # All that is needed before weights can be loaded is asked for at once.
            count = element(num_tiles, 0)
            slot = element(tile_slot, tile)
            rows = tile_rows + tile * config.tile
            strip = block * config.strips + divide(warp, config.strip_warps)
            present = strip < strips
            entry = table + (strip if present else Int32(0)) * epilogue.table_columns
            line = element(entry, 0)
            if tile < count:
                base = memory.toint() + Int64(slot) * slot_bytes
                strip_at = base + Int64(line) * Int64(LINE)
                if cutlass.const_expr(config.staged):
                    half = warp & 1
                    lane_codes, fields_from = loop.lane_offsets()
                    codes_at = strip_at + Int64(lane_codes)
                    if cutlass.const_expr(config.pdl and epilogue.early_weights):
                        cute.arch.griddepcontrol_wait()
                        cute.arch.griddepcontrol_launch_dependents()
                    sources = registers((loop.copied,), Int32)
                    for i in cutlass.range_constexpr(loop.copied):
                        token, chunk = loop.chunk(i)
                        row = self.token(rows, token, pairs_per_row)
                        sources[i] = Int32(row) * (K >> 3) + chunk
                    x = cute.make_tensor(
                        cute.recast_ptr(shared.iterator, dtype=BFloat16),
                        cute.make_layout((8, CHUNKS, config.tile, config.stages)),
                    )
                    words = loop.registers()
                    totals = registers((4, ROW_TILES, columns), Float32)
                    at = (codes_at, fields_from, activations.toint(), sources, x)
                    loop.start(words, *at, groups)
                    totals.fill(0.0)
                    if cutlass.const_expr(loop.codes.ways == (True,)):
                        loop.run(True, 0, words, *at, totals, groups)
                    elif cutlass.const_expr(loop.codes.ways == (False,)):
                        self.run_passes(words, at, totals, groups)
                    elif element(wide, slot) == 0:
                        loop.run(True, 0, words, *at, totals, groups)
                    else:
                        self.run_passes(words, at, totals, groups)
                    if cutlass.const_expr(epilogue.halves_meet):
                        self.exchange(
                            totals, shared, out, base, table, rows, strip, strips, row_columns
                        )
                    elif present:
                        c = registers((4, 2), Float32)
                        for n in cutlass.range_constexpr(columns):
                            for i in cutlass.range_constexpr(4):
                                c[i, 0], c[i, 1] = totals[i, 0, n], totals[i, 1, n]
                            self.store(
                                c, out, base, table, rows, strip, half, Int32(n), row_columns
                            )
                else:
                    lane_codes, fields_from = loop.lane_offsets()
                    codes_at = strip_at + Int64(lane_codes)
                    words, b = loop.registers()
                    k_warp = warp - divide(warp, config.k_warps) * config.k_warps
                    first = divide(k_warp * config.ranges, config.k_warps)
                    last = divide((k_warp + 1) * config.ranges, config.k_warps)
                    begin, end = loop.bound(first, groups), loop.bound(last, groups)
                    if not present:
                        end = begin
                    loop.start_weights(words, codes_at, fields_from, begin, end)
                    if cutlass.const_expr(config.pdl and epilogue.early_weights):
                        cute.arch.griddepcontrol_wait()
                        cute.arch.griddepcontrol_launch_dependents()
                    tokens = registers((columns,), Int64)
                    for n in cutlass.range_constexpr(columns):
                        row = self.token(rows, 8 * n + t, pairs_per_row)
                        tokens[n] = activations.toint() + row * Int64(2 * K) + Int64(16 * q)
                    loop.start_tokens(b, tokens, begin, end)
                    partial = cute.make_tensor(
                        shared.iterator,
                        cute.make_layout((4, 32, config.fragments, config.ranges, config.strips)),
                    )
                    mine = partial[None, lane, None, None, divide(warp, config.k_warps)]
                    job = (codes_at, fields_from, tokens, mine, first, begin, end, groups)
                    if cutlass.const_expr(len(loop.codes.ways) == 1):
                        loop.run(loop.codes.ways[0], words, b, *job)
                    elif element(wide, slot) == 0:
                        loop.run(True, words, b, *job)
                    else:
                        loop.run(False, words, b, *job)
                    cute.arch.sync_threads()
                    self.add_ranges(
                        partial, out, base, table, rows, block * config.strips, strips, row_columns
                    )
            elif cutlass.const_expr(config.pdl and epilogue.early_weights):
                # or this kernel could end before the one in front, for which others wait through it
                cute.arch.griddepcontrol_wait()

        def run_passes(self, words: Any, at: Any, totals: Any, groups: Any) -> None:
            """All columns, some at a time, with factors in float32."""
            loop.run(False, 0, words, *at, totals, groups)
            for number in range(1, loop.passes):
                cute.arch.sync_threads()  # the activations have been read
                loop.start(words, *at, groups)
                loop.run(False, number, words, *at, totals, groups)

        @cute.jit
        def token(self, rows: cute.Pointer, i: Int32, pairs_per_row: Int32) -> Int64:
            """Row of the activations of a tile's pair i; of its first one where it has no i."""
            pair = element(rows, i)
            if pair < 0:
                pair = element(rows, 0)
            return Int64(divide(pair, pairs_per_row))

        @cute.jit
        def add_ranges(
            self,
            partial: cute.Tensor,
            out: cute.Pointer,
            base: Int64,
            table: cute.Pointer,
            rows: cute.Pointer,
            first: Int32,
            strips: Int32,
            row_columns: Int32,
        ) -> None:
            """Of every `warps`-th pair of fragments of the block, add up the ranges, and store."""
            tid = cute.arch.thread_idx()[0]
            lane, warp = tid & 31, cute.arch.make_warp_uniform(tid >> 5)
            units = 2 * columns
            # of a fragment (half * ROW_TILES + tile) * columns + n
            step, apart = (1, ROW_TILES) if epilogue.halves_meet else (ROW_TILES, 1)
            for j in cutlass.range_constexpr(-(-config.strips * units // config.warps)):
                unit = warp + j * config.warps
                local = divide(unit, units)
                a = divide(unit - local * units, columns)
                n = unit - local * units - a * columns
                if (local < config.strips) & (first + local < strips):
                    v = registers((4,), Float32)
                    c = registers((4, 2), Float32)
                    c.fill(0.0)
                    for r in cutlass.range_constexpr(config.ranges):
                        for side in cutlass.range_constexpr(2):
                            fragment = (a * step + side * apart) * columns + n
                            cute.autovec_copy(partial[None, lane, fragment, r, local], v)
                            for i in cutlass.range_constexpr(4):
                                c[i, side] = c[i, side] + v[i]
                    self.store(c, out, base, table, rows, first + local, a, n, row_columns)

        @cute.jit
        def exchange(
            self,
            totals: cute.Tensor,
            shared: cute.Tensor,
            out: cute.Pointer,
            base: Int64,
            table: cute.Pointer,
            rows: cute.Pointer,
            strip: Int32,
            strips: Int32,
            row_columns: Int32,
        ) -> None:
            """Store the totals of a strip's two warps, each of which has a half of all columns: the
            first finishes the first columns and the second the others, and each gives away, through
            shared memory, what the other one needs."""
            tid = cute.arch.thread_idx()[0]
            lane, warp = tid & 31, cute.arch.make_warp_uniform(tid >> 5)
            second = (warp & 1) == 1
            some = columns // 2
            given = cute.make_tensor(
                shared.iterator, cute.make_layout((4, 32, ROW_TILES, some, config.warps))
            )
            v, c = registers((4,), Float32), registers((4, 2), Float32)
            cute.arch.sync_threads()  # the activations there have been read
            for tile in cutlass.range_constexpr(ROW_TILES):
                for m in cutlass.range_constexpr(some):
                    for i in cutlass.range_constexpr(4):
                        v[i] = totals[i, tile, m] if second else totals[i, tile, some + m]
                    cute.autovec_copy(v, given[None, lane, tile, m, warp])
            cute.arch.sync_threads()
            if strip < strips:
                for tile in cutlass.range_constexpr(ROW_TILES):
                    for m in cutlass.range_constexpr(some):
                        cute.autovec_copy(given[None, lane, tile, m, warp ^ 1], v)
                        for i in cutlass.range_constexpr(4):
                            own = totals[i, tile, some + m] if second else totals[i, tile, m]
                            c[i, 0] = v[i] if second else own
                            c[i, 1] = own if second else v[i]
                        n = (warp & 1) * some + m
                        self.store(c, out, base, table, rows, strip, Int32(tile), n, row_columns)

        @cute.jit
        def store(
            self,
            c: cute.Tensor,
            out: cute.Pointer,
            base: Int64,
            table: cute.Pointer,
            rows: cute.Pointer,
            strip: Int32,
            a: Int32,
            n: Int32,
            row_columns: Int32,
        ) -> None:
            """Hand a pair of C fragments of column n to the epilogue."""
            lane = cute.arch.thread_idx()[0] & 31
            t, q = lane >> 2, lane & 3
            entry = table + strip * epilogue.table_columns
            pairs = registers((2,), Int32)
            two = (rows + (8 * n + 2 * q)).align(8)
            cute.autovec_copy(cute.make_tensor(two, cute.make_layout(2)), pairs)
            if cutlass.const_expr(loop.codes.rows is not None):
                # c[2 r + e, side]: `side` is the half, and a the tile, or the other way round
                at = base + Int64(element(entry, 0)) * Int64(LINE)
                for side in cutlass.range_constexpr(2):
                    half, tile = (side, a) if epilogue.halves_meet else (a, side)
                    row = half * HALF_ROWS + 4 * t + 2 * tile
                    factors = loop.codes.rows.two(at, row)
                    for i in cutlass.range_constexpr(4):
                        c[i, side] = rounded(c[i, side], factors[i // 2])
            epilogue.store(c, pairs, out, base, entry, strip, a, t, row_columns)

        @cute.jit
        def __call__(
            self,
            memory: cute.Pointer,
            table: cute.Pointer,
            wide: cute.Pointer,
            activations: cute.Pointer,
            tile_slot: cute.Pointer,
            tile_rows: cute.Pointer,
            num_tiles: cute.Pointer,
            out: cute.Pointer,
            slot_bytes: Int64,
            K: Int32,
            strips: Int32,
            row_columns: Int32,
            pairs_per_row: Int32,
            stream: Any,
        ) -> None:
            pointers = (memory, table, wide, activations, tile_slot, tile_rows, num_tiles, out)
            scalars = (slot_bytes, K, strips, row_columns, pairs_per_row)
            self.kernel(*pointers, *scalars).launch(
                grid=[1, 1, 1],
                block=[config.threads, 1, 1],
                stream=stream,
                min_blocks_per_mp=config.resident,
                preferred_smem_carveout=50,  # where it is not given, the DSL asks a GPU
            )

    return StripGemm()
