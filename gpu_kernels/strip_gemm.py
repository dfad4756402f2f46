"""The kernel of both grouped GEMMs: strips times tiles of tokens. They differ in the epilogue.

A warp reads weights from global memory straight into registers, where they are A fragments
(`fragments`, `weight_codes`): each word has one warp that needs it, so shared memory would gain
nothing. Tokens are the columns of B. There are two ways through K, with the same products, sums and
order of additions, so that a token has the same bits in both:

* `split_k`, few tokens: the warps of a block share the K ranges of a strip. Each reads its own part
  of the activations; the sums of ranges meet in shared memory.
* `staged`, many tokens: a warp multiplies half a strip with the whole tile over all of K.
  Activations come through shared memory by `cp.async`, for all warps of the block. A range's sum and
  the total are kept apart in registers.

Where a tile has no more pairs, its columns repeat the first one and are not stored.
"""

from typing import Any

from hybrid_moe.formats.strips import GROUP, LINE, strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.gpu_kernels.definition import Argument
from hybrid_moe.gpu_kernels.gemm_config import ROW_TILES, STAGE_GROUPS, GemmConfig
from hybrid_moe.gpu_kernels.weight_codes import WEIGHT_CODES

CHUNKS = 8
"""16-byte pieces of a token in a stage."""


def arguments(out: str) -> tuple[Argument, ...]:
    """Of either kernel, whose output has elements of type `out`."""
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
        Argument("columns", "i32"),
        Argument("pairs_per_row", "i32"),
    )


def strip_gemm(config: GemmConfig, epilogue: Any) -> Any:
    """The kernel's object of CuTe DSL.

    Args:
        epilogue: an object with
            halves_meet: whether it takes the two halves of a row tile together, or the two row
                tiles of a half.
            table_columns: of a row of `table`.
            store(...): what is done with a pair of C fragments.
    """
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64, Uint32
    from cutlass.cute.nvgpu import cpasync, warp

    layout = strip_layout(FORMATS[config.format], GROUP)
    codes = WEIGHT_CODES[config.format](layout)
    columns, halves, depth = config.columns, config.halves, config.depth

    def value(pointer: Any, at: Any) -> Any:
        """pointer[at]."""
        return cute.make_tensor(pointer + at, cute.make_layout(1))[0]

    def registers(shape: tuple[int, ...], kind: Any) -> Any:
        return cute.make_rmem_tensor(cute.make_layout(shape), kind)

    class StripGemm:
        def bound(self, r: Any, groups: Any) -> Any:
            """First group of range r, as `range_bounds`."""
            first = STAGE_GROUPS * (r * ((groups + 1) // STAGE_GROUPS) // config.ranges)
            return first + ((groups - first) >> Int32(31))  # one too many if groups are odd

        def load_weights(self, words: Any, at: Any, scales: Any, group: Any) -> None:
            offset = Int64(group) * Int64(layout.group_bytes)
            for half in range(halves):
                codes.load(words[None, half], at + offset, scales + offset, half)

        def multiply(self, words: Any, b: Any, sums: Any, folded: bool) -> None:
            """sums += a group's products.

            Args:
                words: uint32 [registers, halves].
                b: column -> the lane's B fragments of both k-steps, uint32 [4].
                sums: float32 [4, row tile, column, half].
            """
            mma = cute.make_mma_atom(warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
            a = registers((4, ROW_TILES, 2), Uint32)

            def step(d: Any, tile: int, k: int, column: Any) -> None:
                c = cute.make_tensor(d.iterator, cute.make_layout((4, 1, 1)))
                left = cute.recast_ptr(a[None, tile, k].iterator, dtype=BFloat16)
                right = cute.recast_ptr(column.iterator + 2 * k, dtype=BFloat16)
                cute.gemm(
                    mma,
                    c,
                    cute.make_tensor(left, cute.make_layout((8, 1))),
                    cute.make_tensor(right, cute.make_layout((4, 1))),
                    c,
                )

            for half in range(halves):
                share = [words[i, half] for i in range(codes.registers)]
                for tile in range(ROW_TILES):
                    for k in range(2):
                        for i, pair in enumerate(codes.fragment(share, tile, k, folded)):
                            a[i, tile, k] = pair
                for n in range(columns):
                    column = b(n)
                    if folded:
                        for k in range(2):
                            for tile in range(ROW_TILES):
                                step(sums[None, tile, n, half], tile, k, column)
                        continue
                    for tile in range(ROW_TILES):
                        products = registers((4,), Float32)
                        products.fill(0.0)
                        for k in range(2):
                            step(products, tile, k, column)
                        before = [sums[i, tile, n, half] for i in range(4)]
                        group = [products[i] for i in range(4)]
                        for i, total in enumerate(codes.end_group(share, tile, group, before)):
                            sums[i, tile, n, half] = total

        @cute.jit
        def split_k(
            self,
            folded: cutlass.Constexpr,
            at: Int64,
            scales: Int64,
            tokens: cute.Tensor,
            partial: cute.Tensor,
            first: Int32,
            last: Int32,
            groups: Int32,
        ):
            """The sums of ranges first .. last - 1 into partial, float32 [4, fragment, range].

            `tokens` are the addresses of the lane's pieces of activations, one for each column.
            """
            words = registers((codes.registers, halves, depth), Uint32)
            b = registers((4, columns, depth), Uint32)
            sums = registers((4, ROW_TILES, columns, halves), Float32)
            sums.fill(0.0)
            begin, end = self.bound(first, groups), self.bound(last, groups)
            r = first
            boundary = self.bound(first + 1, groups)
            for d in cutlass.range_constexpr(depth):
                if begin + d < end:
                    self.load_weights(words[None, None, d], at, scales, begin + d)
                    self.load_tokens(b[None, None, d], tokens, begin + d)
            for g in cutlass.range(begin, end, depth, unroll=1):
                for d in cutlass.range_constexpr(depth):
                    if g + d < end:
                        self.multiply(
                            words[None, None, d], lambda n, d=d: b[None, n, d], sums, folded
                        )
                        if g + (d + depth) < end:
                            self.load_weights(words[None, None, d], at, scales, g + (d + depth))
                            self.load_tokens(b[None, None, d], tokens, g + (d + depth))
                        if g + (d + 1) == boundary:
                            self.keep(sums, partial, r)
                            r += 1
                            boundary = self.bound(r + 1, groups)

        def load_tokens(self, b: Any, tokens: Any, group: Any) -> None:
            for n in range(columns):
                place = cute.make_ptr(
                    Uint32,
                    tokens[n] + Int64(group) * Int64(2 * GROUP),
                    cute.AddressSpace.gmem,
                    assumed_align=16,
                )
                cute.autovec_copy(cute.make_tensor(place, cute.make_layout(4)), b[None, n])

        def keep(self, sums: Any, partial: Any, r: Any) -> None:
            """A range is complete: its sums go to shared memory, and the next one starts at 0."""
            for half in range(halves):
                for tile in range(ROW_TILES):
                    for n in range(columns):
                        fragment = (half * ROW_TILES + tile) * columns + n
                        cute.autovec_copy(sums[None, tile, n, half], partial[None, fragment, r])
            sums.fill(0.0)

        @cute.jit
        def staged(
            self,
            folded: cutlass.Constexpr,
            at: Int64,
            scales: Int64,
            sources: cute.Tensor,
            x: cute.Tensor,
            totals: cute.Tensor,
            groups: Int32,
        ):
            """totals, float32 [4, row tile, column] = the sums over all K, range by range.

            `sources` are the addresses from which this thread copies activations to x, bf16 [8,
            chunk, token, stage].
            """
            tid = cute.arch.thread_idx()[0]
            lane = tid % 32
            t, q = lane // 4, lane % 4
            words = registers((codes.registers, 1, STAGE_GROUPS), Uint32)
            sums = registers((4, ROW_TILES, columns, 1), Float32)
            b = registers((4,), Uint32)
            sums.fill(0.0)
            stages = (groups + 1) // STAGE_GROUPS
            for s in cutlass.range_constexpr(config.stages - 1):
                if s < stages:
                    self.copy(sources, x, Int32(s), s, groups)
                cute.arch.cp_async_commit_group()
            for d in cutlass.range_constexpr(STAGE_GROUPS):
                if d < groups:
                    self.load_weights(words[None, None, d], at, scales, Int32(d))
            r = Int32(1)
            boundary = stages // config.ranges
            for stage in cutlass.range(0, stages, 1, unroll=1):
                cute.arch.cp_async_wait_group(config.stages - 2)
                cute.arch.sync_threads()
                if stage + (config.stages - 1) < stages:
                    later = stage + (config.stages - 1)
                    self.copy(sources, x, later, later % config.stages, groups)
                cute.arch.cp_async_commit_group()
                place = stage % config.stages
                for d in cutlass.range_constexpr(STAGE_GROUPS):
                    group = stage * STAGE_GROUPS + d
                    if group < groups:

                        def column(n, d=d, place=place):
                            piece = x[None, (4 * d + q) ^ ((t & 1) * 4), 8 * n + t, place]
                            cute.autovec_copy(
                                piece,
                                cute.make_tensor(
                                    cute.recast_ptr(b.iterator, dtype=BFloat16), cute.make_layout(8)
                                ),
                            )
                            return b

                        self.multiply(words[None, None, d], column, sums, folded)
                        if group + STAGE_GROUPS < groups:
                            self.load_weights(
                                words[None, None, d], at, scales, group + STAGE_GROUPS
                            )
                if stage + 1 == boundary:
                    for i in cutlass.range_constexpr(4 * ROW_TILES * columns):
                        totals[i] = totals[i] + sums[i]
                    sums.fill(0.0)
                    r += 1
                    boundary = r * stages // config.ranges

        @cute.jit
        def copy(
            self, sources: cute.Tensor, x: cute.Tensor, stage: Int32, place: Int32, groups: Int32
        ):
            """Start copying a stage. Lanes of 8 take the 128 bytes of a token; chunks of odd tokens
            change places, so that 8 lanes, which read 4 chunks of 2 tokens, meet all banks."""
            tid = cute.arch.thread_idx()[0]
            chunk, token = tid % CHUNKS, tid // CHUNKS
            atom = cute.make_copy_atom(
                cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
                BFloat16,
                num_bits_per_copy=128,
            )
            if stage * STAGE_GROUPS + chunk // 4 < groups:
                for i in cutlass.range_constexpr(config.tile * CHUNKS // config.threads):
                    row = token + i * (config.threads // CHUNKS)
                    source = cute.make_ptr(
                        BFloat16,
                        sources[i] + Int64(stage) * Int64(2 * STAGE_GROUPS * GROUP),
                        cute.AddressSpace.gmem,
                        assumed_align=16,
                    )
                    cute.copy(
                        atom,
                        cute.make_tensor(source, cute.make_layout(8)),
                        x[None, chunk ^ ((row & 1) * 4), row, place],
                    )

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
        ):
            tid = cute.arch.thread_idx()[0]
            block, tile, _ = cute.arch.block_idx()
            lane = tid % 32
            warp_id = cute.arch.make_warp_uniform(tid // 32)
            t, q = lane // 4, lane % 4
            groups = K // GROUP
            shared = cutlass.memory.SmemAllocator().allocate_tensor(
                Float32, cute.make_layout(config.shared_bytes // 4), byte_alignment=128
            )
            if cutlass.const_expr(config.pdl):
                cute.arch.griddepcontrol_wait()
            if tile < value(num_tiles, 0):
                slot = value(tile_slot, tile)
                base = memory.toint() + Int64(slot) * slot_bytes
                rows = tile_rows + tile * config.tile
                strip = block * config.strips + warp_id // (config.k_warps or 2)
                present = strip < strips
                entry = table + (strip if present else Int32(0)) * epilogue.table_columns
                half = Int32(0) if cutlass.const_expr(halves == 2) else warp_id % 2
                strip_at = base + Int64(value(entry, 0)) * Int64(LINE) + Int64(half) * Int64(128)
                at = strip_at + Int64(256 * q + 16 * t)
                scales = (
                    strip_at + Int64(layout.code_bytes) + Int64(4 * t) - Int64(half) * Int64(96)
                )
                folded = value(wide, slot) == 0
                if cutlass.const_expr(config.staged):
                    copied = config.tile * CHUNKS // config.threads
                    sources = registers((copied,), Int64)
                    for i in cutlass.range_constexpr(copied):
                        sources[i] = self.token(
                            activations,
                            rows,
                            tid // CHUNKS + i * (config.threads // CHUNKS),
                            K,
                            pairs_per_row,
                        ) + Int64(16 * (tid % CHUNKS))
                    x = cute.make_tensor(
                        cute.recast_ptr(shared.iterator, dtype=BFloat16),
                        cute.make_layout((8, CHUNKS, config.tile, config.stages)),
                    )
                    totals = registers((4, ROW_TILES, columns), Float32)
                    totals.fill(0.0)
                    if cutlass.const_expr(codes.scaled):
                        if folded:
                            self.staged(True, at, scales, sources, x, totals, groups)
                        else:
                            self.staged(False, at, scales, sources, x, totals, groups)
                    else:
                        self.staged(True, at, scales, sources, x, totals, groups)
                    self.finish_staged(
                        totals, shared, out, base, table, rows, strip, strips, half, row_columns
                    )
                else:
                    tokens = registers((columns,), Int64)
                    for n in cutlass.range_constexpr(columns):
                        tokens[n] = self.token(
                            activations, rows, 8 * n + t, K, pairs_per_row
                        ) + Int64(16 * q)
                    partial = cute.make_tensor(
                        shared.iterator,
                        cute.make_layout((4, 32, config.fragments, config.ranges, config.strips)),
                    )
                    mine = partial[None, lane, None, None, warp_id // config.k_warps]
                    k_warp = warp_id % config.k_warps
                    first = k_warp * config.ranges // config.k_warps
                    last = (k_warp + 1) * config.ranges // config.k_warps
                    if present:
                        if cutlass.const_expr(codes.scaled):
                            if folded:
                                self.split_k(True, at, scales, tokens, mine, first, last, groups)
                            else:
                                self.split_k(False, at, scales, tokens, mine, first, last, groups)
                        else:
                            self.split_k(True, at, scales, tokens, mine, first, last, groups)
                    cute.arch.sync_threads()
                    self.finish_split(
                        partial, out, base, table, rows, block * config.strips, strips, row_columns
                    )
            if cutlass.const_expr(config.pdl):
                cute.arch.griddepcontrol_launch_dependents()

        @cute.jit
        def token(
            self,
            activations: cute.Pointer,
            rows: cute.Pointer,
            i: Int32,
            K: Int32,
            pairs_per_row: Int32,
        ) -> Int64:
            """Address of the activations of a tile's pair i; of its first one where it has no i."""
            pair = value(rows, i)
            if pair < 0:
                pair = value(rows, 0)
            return activations.toint() + Int64(pair // pairs_per_row) * Int64(K) * Int64(2)

        @cute.jit
        def finish_split(
            self,
            partial: cute.Tensor,
            out: cute.Pointer,
            base: Int64,
            table: cute.Pointer,
            rows: cute.Pointer,
            first: Int32,
            strips: Int32,
            row_columns: Int32,
        ):
            """Add up the ranges. A warp takes every `warps`-th pair of fragments of the block."""
            tid = cute.arch.thread_idx()[0]
            lane = tid % 32
            warp_id = cute.arch.make_warp_uniform(tid // 32)
            units = 2 * columns
            for j in cutlass.range_constexpr(-(-config.strips * units // config.warps)):
                unit = warp_id + j * config.warps
                local = unit // units
                if local < config.strips and first + local < strips:
                    a, n = unit % units // columns, unit % columns
                    one = a * columns + n
                    two = (ROW_TILES + a) * columns + n
                    if cutlass.const_expr(not epilogue.halves_meet):
                        one = a * ROW_TILES * columns + n
                        two = (a * ROW_TILES + 1) * columns + n
                    v = registers((4,), Float32)
                    c = registers((4, 2), Float32)
                    c.fill(0.0)
                    for r in cutlass.range_constexpr(config.ranges):
                        cute.autovec_copy(partial[None, lane, one, r, local], v)
                        for i in cutlass.range_constexpr(4):
                            c[i, 0] = c[i, 0] + v[i]
                        cute.autovec_copy(partial[None, lane, two, r, local], v)
                        for i in cutlass.range_constexpr(4):
                            c[i, 1] = c[i, 1] + v[i]
                    self.store(c, out, base, table, rows, first + local, a, n, row_columns)

        @cute.jit
        def finish_staged(
            self,
            totals: cute.Tensor,
            shared: cute.Tensor,
            out: cute.Pointer,
            base: Int64,
            table: cute.Pointer,
            rows: cute.Pointer,
            strip: Int32,
            strips: Int32,
            half: Int32,
            row_columns: Int32,
        ):
            tid = cute.arch.thread_idx()[0]
            lane = tid % 32
            warp_id = cute.arch.make_warp_uniform(tid // 32)
            c = registers((4, 2), Float32)
            if cutlass.const_expr(not epilogue.halves_meet):
                if strip < strips:
                    for n in cutlass.range_constexpr(columns):
                        for i in cutlass.range_constexpr(4):
                            c[i, 0] = totals[i, 0, n]
                            c[i, 1] = totals[i, 1, n]
                        self.store(c, out, base, table, rows, strip, half, Int32(n), row_columns)
            else:
                # The warp with half 0 finishes the first columns, the other one the last: each
                # gives away what the other needs.
                some = columns // 2
                given = cute.make_tensor(
                    shared.iterator, cute.make_layout((4, 32, ROW_TILES, some, config.warps))
                )
                cute.arch.sync_threads()  # activations are read
                v = registers((4,), Float32)
                for tile in cutlass.range_constexpr(ROW_TILES):
                    for m in cutlass.range_constexpr(some):
                        for i in cutlass.range_constexpr(4):
                            v[i] = totals[i, tile, m] if half == 1 else totals[i, tile, some + m]
                        cute.autovec_copy(v, given[None, lane, tile, m, warp_id])
                cute.arch.sync_threads()
                if strip < strips:
                    for tile in cutlass.range_constexpr(ROW_TILES):
                        for m in cutlass.range_constexpr(some):
                            cute.autovec_copy(given[None, lane, tile, m, warp_id ^ 1], v)
                            for i in cutlass.range_constexpr(4):
                                own = totals[i, tile, m] if half == 0 else totals[i, tile, some + m]
                                c[i, 0] = own if half == 0 else v[i]
                                c[i, 1] = v[i] if half == 0 else own
                            self.store(
                                c,
                                out,
                                base,
                                table,
                                rows,
                                strip,
                                Int32(tile),
                                half * some + m,
                                row_columns,
                            )

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
        ):
            """Hand over a pair of C fragments, float32 [4, 2], of column n."""
            lane = cute.arch.thread_idx()[0] % 32
            t, q = lane // 4, lane % 4
            entry = table + strip * epilogue.table_columns
            pairs = registers((2,), Int32)
            cute.autovec_copy(
                cute.make_tensor((rows + 8 * n + 2 * q).align(8), cute.make_layout(2)), pairs
            )
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
            stream,
        ):
            self.kernel(
                memory, table, wide, activations, tile_slot, tile_rows, num_tiles, out,
                slot_bytes, K, strips, row_columns, pairs_per_row,
            ).launch(grid=[1, 1, 1], block=[config.threads, 1, 1], stream=stream)  # fmt: skip

    return StripGemm()
