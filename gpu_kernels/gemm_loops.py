"""The two ways of a warp through K, with the same products and the same order of additions.

`SplitK` is for few tokens, `Staged` for many; `strip_gemm` says how the warps of a block share the
work. Both are given where the lane's first codes are (`codes_at`, an address) and how far its first
field is from there (`fields_from`), and both keep the sum of a range apart from what was summed
before, so that a token has the same bits in both.
"""

from typing import Any

from hybrid_moe.formats.strips import GROUP, strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.gpu_kernels.fragments import HALF_ROWS
from hybrid_moe.gpu_kernels.gemm_config import ROW_TILES, STAGE_GROUPS, GemmConfig
from hybrid_moe.gpu_kernels.lane_memory import (
    at_address,
    divide,
    fused,
    load_words,
    part,
    registers,
    request,
)
from hybrid_moe.gpu_kernels.weight_codes.codes import Lane
from hybrid_moe.gpu_kernels.weight_codes.objects import strip_codes
from hybrid_moe.gpu_kernels.weight_codes.pairs import power_pair

CHUNKS = 8
"""16-byte pieces of a token in a stage."""
GROUP_BYTES = 2 * GROUP
"""Of a token's activations."""
ONES = power_pair(0)


class GroupProducts:
    """What both ways do with a group: load weights, multiply.

    Attributes:
        layout: of the strips.
        codes: the format's object.
    """

    def __init__(self, config: GemmConfig) -> None:
        self.config = config
        fmt = FORMATS[config.format]
        self.layout = strip_layout(fmt, max(GROUP, fmt.k_multiple))
        self.codes = strip_codes(fmt, self.layout)

    def bound(self, r: Any, groups: Any) -> Any:
        """First group of range r, as `range_bounds` has it."""
        stages = divide(groups + 1, STAGE_GROUPS)
        first = STAGE_GROUPS * divide(r * stages, self.config.ranges)
        return first + ((groups - first) >> 31)  # the last one is one too many if groups are odd

    def _lane(self) -> Lane:
        """Where this lane is; the half of a warp that has only one is in its row."""
        import cutlass.cute as cute

        thread = cute.arch.thread_idx()[0]
        t, q = (thread & 31) >> 2, thread & 3
        if self.config.staged:
            return Lane(4 * t + HALF_ROWS * (cute.arch.make_warp_uniform(thread >> 5) & 1), q)
        return Lane(4 * t, q)

    def lane_offsets(self) -> tuple[Any, Any]:
        """Bytes from a strip to the lane's first codes, and from there to its first field."""
        lane = self._lane()
        codes = self.codes.lane_codes(lane)
        return codes, self.codes.lane_fields(lane) - codes

    def load_weights(self, words: Any, codes_at: Any, fields_from: Any, group: Any) -> None:
        """words, uint32 [registers, half] = the lane's share of a group."""
        lane = self._lane()
        for half in range(self.config.halves):
            codes, fields = self.codes.chunk(codes_at, fields_from, group, lane, half)
            self._load(words[None, half], codes + fields if self.codes.fields_ahead else codes)
            if not self.codes.fields_ahead:
                request(fields[0][0])

    @staticmethod
    def _load(words: Any, loads: list[tuple[Any, int]]) -> None:
        first = 0
        for address, count in loads:
            load_words(part(words, first, count), address)
            first += count

    def request_weights(self, codes_at: Any, fields_from: Any, group: Any) -> None:
        """Have the lane's share of a group brought to L2."""
        lane = self._lane()
        for half in range(self.config.halves):
            codes, fields = self.codes.chunk(codes_at, fields_from, group, lane, half)
            for address, _ in codes + fields:
                request(address)

    def multiply(
        self,
        words: Any,
        codes_at: Any,
        fields_from: Any,
        group: Any,
        column: Any,
        sums: Any,
        columns: int,
        folded: bool,
    ) -> None:
        """sums += a group's products.

        Args:
            words: uint32 [registers, half], from `load_weights`.
            column: n -> the lane's B fragments of both k-steps, uint32 [4], of column n.
            sums: float32 [4, row tile, column, half].
            columns: how many.
            folded: scales are in the A fragments; else they multiply float32 products.
        """
        from cutlass import Uint32

        lane = self._lane()
        a = registers((4, 2, ROW_TILES), Uint32)
        totals = self._column_sums(column, columns) if self.codes.has_offsets else None
        for half in range(self.config.halves):
            share = [words[i, half] for i in range(self.codes.registers)]
            if not self.codes.fields_ahead:
                _, fields = self.codes.chunk(codes_at, fields_from, group, lane, half)
                late = registers((sum(count for _, count in fields),), Uint32)
                self._load(late, fields)
                share += [late[i] for i in range(sum(count for _, count in fields))]
            for tile in range(ROW_TILES):
                for k in range(2):
                    fragment = self.codes.fragment(share, tile, k, group, lane, folded)
                    for i in range(4):
                        a[i, k, tile] = fragment[i]
            if folded:
                for n in range(columns):
                    b = column(n)
                    for k in range(2):
                        for tile in range(ROW_TILES):
                            _mma(sums[None, tile, n, half], a[None, k, tile], b, k)
            else:
                self._scaled(share, group, a, column, sums[None, None, None, half], totals, columns)

    def _scaled(
        self, share: Any, group: Any, a: Any, column: Any, sums: Any, totals: Any, columns: int
    ) -> None:
        """sums, float32 [4, row tile, column], += s * products + m * sum of activations."""
        from cutlass import Float32

        steps = self.codes.group_steps
        factors = {
            (tile, k): self.codes.factors(share, tile, k, group)
            for tile in range(ROW_TILES)
            for k in range(0, 2, steps)
        }
        for n in range(columns):
            b = column(n)
            for tile in range(ROW_TILES):
                for first in range(0, 2, steps):
                    products = registers((4,), Float32)
                    products.fill(0.0)
                    for k in range(first, first + steps):
                        _mma(products, a[None, k, tile], b, k)
                    scales, offsets = factors[tile, first]
                    for i in range(4):
                        total = fused(scales[i // 2], products[i], sums[i, tile, n])
                        if offsets is not None:
                            total = fused(offsets[i // 2], totals[i % 2, first // steps, n], total)
                        sums[i, tile, n] = total

    def _column_sums(self, column: Any, columns: int) -> Any:
        """The sums of the activations that share an offset, float32 [2, groups of k-steps, column],
        of the lane's two columns: products with rows of ones, all of which are the same."""
        from cutlass import Float32, Uint32

        steps = self.codes.group_steps
        totals = registers((2, 2 // steps, columns), Float32)
        ones = registers((4,), Uint32)
        ones.fill(ONES)
        for n in range(columns):
            b = column(n)
            for first in range(0, 2, steps):
                products = registers((4,), Float32)
                products.fill(0.0)
                for k in range(first, first + steps):
                    _mma(products, ones, b, k)
                for i in range(2):
                    totals[i, first // steps, n] = products[i]
        return totals


def _mma(c: Any, a: Any, b: Any, k: int) -> None:
    """c, float32 [4], += a, uint32 [4], times the fragment of k-step k in b, uint32 [4]."""
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32
    from cutlass.cute.nvgpu import warp

    atom = cute.make_mma_atom(warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
    d = cute.make_tensor(c.iterator, cute.make_layout((4, 1, 1)))
    left = cute.recast_ptr(a.iterator, dtype=BFloat16)
    right = cute.recast_ptr(b.iterator + 2 * k, dtype=BFloat16)
    cute.gemm(
        atom,
        d,
        cute.make_tensor(left, cute.make_layout((8, 1))),
        cute.make_tensor(right, cute.make_layout((4, 1))),
        d,
    )


def split_k(config: GemmConfig) -> Any:
    """A warp with some of the K ranges, and its own loads of activations.

    Registers hold `depth` groups of weights and activations. The place of a group is filled again
    as soon as it has been multiplied, so that many loads are always on their way.
    """
    import cutlass
    import cutlass.cute as cute
    from cutlass import Float32, Int32, Int64, Uint32

    products = GroupProducts(config)
    depth, columns, halves = config.depth, config.columns, config.halves
    alone = config.ranges <= config.k_warps  # no warp has more than one range

    class SplitK:
        codes = products.codes
        lane_offsets = products.lane_offsets
        bound = products.bound

        def registers(self) -> tuple[Any, Any]:
            """Places of weights and of activations."""
            return (
                registers((products.codes.registers, halves, depth), Uint32),
                registers((4, columns, depth), Uint32),
            )

        def load_tokens(self, b: Any, tokens: Any, group: Any) -> None:
            for n in range(columns):
                load_words(b[None, n], tokens[n] + Int64(group) * Int64(GROUP_BYTES))

        @cute.jit
        def start_weights(
            self, words: cute.Tensor, codes_at: Int64, fields_from: Int32, begin: Int32, end: Int32
        ) -> None:
            for d in cutlass.range_constexpr(depth):
                if begin + d < end:
                    products.load_weights(words[None, None, d], codes_at, fields_from, begin + d)

        @cute.jit
        def start_tokens(
            self, b: cute.Tensor, tokens: cute.Tensor, begin: Int32, end: Int32
        ) -> None:
            for d in cutlass.range_constexpr(depth):
                if begin + d < end:
                    self.load_tokens(b[None, None, d], tokens, begin + d)

        @cute.jit
        def run(
            self,
            folded: cutlass.Constexpr,
            words: cute.Tensor,
            b: cute.Tensor,
            codes_at: Int64,
            fields_from: Int32,
            tokens: cute.Tensor,
            partial: cute.Tensor,
            first: Int32,
            begin: Int32,
            end: Int32,
            groups: Int32,
        ) -> None:
            """Sum up the groups begin .. end - 1, ranges from `first` on.

            Args:
                words, b: hold the first groups already.
                tokens: the lane's addresses of activations, one for each column.
                partial: float32 [4, fragment, range], for the ranges' sums.
            """
            sums = registers((4, ROW_TILES, columns, halves), Float32)
            sums.fill(0.0)
            r = first
            boundary = products.bound(first + 1, groups)
            for g in cutlass.range(begin, end, depth, unroll=1):
                for d in cutlass.range_constexpr(depth):
                    if g + d < end:
                        place = words[None, None, d]
                        products.multiply(
                            place,
                            codes_at,
                            fields_from,
                            g + d,
                            lambda n, d=d: b[None, n, d],
                            sums,
                            columns,
                            folded,
                        )
                        if g + (d + depth) < end:
                            products.load_weights(place, codes_at, fields_from, g + (d + depth))
                            self.load_tokens(b[None, None, d], tokens, g + (d + depth))
                        if cutlass.const_expr(not alone):  # noqa: SIM102 (one of two stages)
                            if g + (d + 1) == boundary:
                                self.keep(sums, partial, r)
                                r += 1
                                boundary = products.bound(r + 1, groups)
            if cutlass.const_expr(alone):
                self.keep(sums, partial, r)

        def keep(self, sums: Any, partial: Any, r: Any) -> None:
            """A range is complete: its sums go to shared memory, and the next one starts at 0."""
            for half in range(halves):
                for tile in range(ROW_TILES):
                    for n in range(columns):
                        fragment = (half * ROW_TILES + tile) * columns + n
                        cute.autovec_copy(sums[None, tile, n, half], partial[None, fragment, r])
            sums.fill(0.0)

    return SplitK()


def staged(config: GemmConfig) -> Any:
    """A warp with one half of a strip and all of K; all warps of a block copy the activations of a
    stage into shared memory, some stages ahead, and read them from there.

    x is bf16 [8, chunk, token, stage]. Chunks of odd tokens change places by 4: eight lanes that
    read 16 bytes at a time, four chunks of two tokens, then meet every bank once, and so do eight
    lanes that write the chunks of one token.
    """
    import cutlass
    import cutlass.cute as cute
    from cutlass import BFloat16, Float32, Int32, Int64, Uint32
    from cutlass.cute.nvgpu import cpasync

    products = GroupProducts(config)
    columns = config.columns
    rows_apart = config.threads // CHUNKS
    """Tokens between those that a thread copies."""

    class Staged:
        codes = products.codes
        lane_offsets = products.lane_offsets

        passes = 1 if columns <= 4 else columns // (4 if products.codes.group_steps == 2 else 2)
        """Times that a half strip goes through K where its factors are not folded: a group's
        products take registers of their own, which sums and totals of 64 tokens do not leave; with
        factors of 16 inputs there are twice as many."""
        copied = config.tile // rows_apart
        """Tokens of which a thread copies a chunk."""

        def registers(self) -> Any:
            """Places of a stage's weights."""
            return registers((products.codes.registers, 1, STAGE_GROUPS), Uint32)

        def chunk(self, i: int) -> tuple[Any, Any]:
            """The i-th (token of a tile, chunk) that this thread copies."""
            tid = cute.arch.thread_idx()[0]
            return (tid >> 3) + i * rows_apart, tid & (CHUNKS - 1)

        @cute.jit
        def copy(
            self,
            tokens_at: Int64,
            sources: cute.Tensor,
            x: cute.Tensor,
            stage: Int32,
            place: Int32,
            groups: Int32,
        ) -> None:
            atom = cute.make_copy_atom(
                cpasync.CopyG2SOp(cache_mode=cpasync.LoadCacheMode.GLOBAL),
                BFloat16,
                num_bits_per_copy=128,
            )
            if stage * STAGE_GROUPS + (self.chunk(0)[1] >> 2) < groups:
                at = tokens_at + Int64(stage) * Int64(STAGE_GROUPS * GROUP_BYTES)
                for i in cutlass.range_constexpr(self.copied):
                    token, chunk = self.chunk(i)
                    to = x[None, chunk ^ ((token & 1) * 4), token, place]
                    cute.copy(
                        atom, at_address(BFloat16, at + Int64(sources[i]) * Int64(16), 8, 16), to
                    )

        @cute.jit
        def start(
            self,
            words: cute.Tensor,
            codes_at: Int64,
            fields_from: Int32,
            tokens_at: Int64,
            sources: cute.Tensor,
            x: cute.Tensor,
            groups: Int32,
        ) -> None:
            """Start loading the first weights and stages.

            `tokens_at` is where the activations begin, and `sources` from where on this thread
            copies them, int32 in pieces of 16 bytes: a register each instead of two."""
            for d in cutlass.range_constexpr(STAGE_GROUPS):
                if d < groups:
                    products.load_weights(words[None, None, d], codes_at, fields_from, Int32(d))
            for d in cutlass.range_constexpr(STAGE_GROUPS, config.ahead):
                if d < groups:
                    products.request_weights(codes_at, fields_from, Int32(d))
            for s in cutlass.range_constexpr(config.stages - 1):
                if s * STAGE_GROUPS < groups:
                    self.copy(tokens_at, sources, x, Int32(s), Int32(s), groups)
                cute.arch.cp_async_commit_group()

        @cute.jit
        def run(
            self,
            folded: cutlass.Constexpr,
            pass_number: cutlass.Constexpr,
            words: cute.Tensor,
            codes_at: Int64,
            fields_from: Int32,
            tokens_at: Int64,
            sources: cute.Tensor,
            x: cute.Tensor,
            totals: cute.Tensor,
            groups: Int32,
        ) -> None:
            """totals, float32 [4, row tile, column] += the sums over all K, range by range; of an
            expert that is not `folded` only the columns of one of `passes`."""
            lane = cute.arch.thread_idx()[0] & 31
            t, q = lane >> 2, lane & 3
            some = columns if folded else columns // self.passes
            skipped = some * pass_number
            sums = registers((4, ROW_TILES, some, 1), Float32)
            b = registers((4,), Uint32)
            sums.fill(0.0)
            r = Int32(1)
            boundary = products.bound(r, groups)
            for first in cutlass.range(0, groups, STAGE_GROUPS, unroll=1):
                cute.arch.cp_async_wait_group(config.stages - 2)
                cute.arch.sync_threads()
                stage = divide(first, STAGE_GROUPS)
                later = stage + (config.stages - 1)
                if later * STAGE_GROUPS < groups:
                    self.copy(tokens_at, sources, x, later, later & (config.stages - 1), groups)
                cute.arch.cp_async_commit_group()
                place = stage & (config.stages - 1)
                for d in cutlass.range_constexpr(STAGE_GROUPS):
                    if first + d < groups:

                        def column(n: int, d: int = d, place: Any = place) -> Any:
                            chunk = (4 * d + q) ^ ((t & 1) * 4)
                            whole = cute.recast_ptr(b.iterator, dtype=BFloat16)
                            cute.autovec_copy(
                                x[None, chunk, 8 * (skipped + n) + t, place],
                                cute.make_tensor(whole, cute.make_layout(8)),
                            )
                            return b

                        place_of_weights = words[None, None, d]
                        products.multiply(
                            place_of_weights,
                            codes_at,
                            fields_from,
                            first + d,
                            column,
                            sums,
                            some,
                            folded,
                        )
                        if first + (d + STAGE_GROUPS) < groups:
                            products.load_weights(
                                place_of_weights, codes_at, fields_from, first + (d + STAGE_GROUPS)
                            )
                        if first + (d + config.ahead) < groups:
                            products.request_weights(
                                codes_at, fields_from, first + (d + config.ahead)
                            )
                if (first + STAGE_GROUPS == boundary) | (first + STAGE_GROUPS > groups):
                    self.keep(sums, totals, some, skipped)
                    r += 1
                    boundary = products.bound(r, groups)

        def keep(self, sums: Any, totals: Any, some: int, skipped: int) -> None:
            """A range is complete: add its sums to the totals, and start the next one at 0."""
            first = 4 * ROW_TILES * skipped
            for i in range(4 * ROW_TILES * some):
                totals[first + i] = totals[first + i] + sums[i]
            sums.fill(0.0)

    return Staged()
