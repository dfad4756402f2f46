"""Dot kernels: one strip of weights times the tokens of a tile.

    kernel(codes, ahead, x, count, sums, begin, end)

adds, for tokens t < count, groups begin..end-1 of the products of the strip's 64 rows with the
tile's encoded rows to sums, float32 [count][64]; see `DotArgs`. The kernels here are for one count
T each. Sums run over groups in ascending order whatever T, order, chunking and source, so a token's
bits do not depend on how a call is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, KernelBody, Val, Var
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET
from hybrid_moe.cpu_kernels.jit.record import Record, f32, u8
from hybrid_moe.cpu_kernels.kernels.encode import BF16_PAIRS, FIXED15_GROUP
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.tuning import BF16_AHEAD, MXFP4_AHEAD, SHARE_LINES, TURN_GROUPS
from hybrid_moe.formats.strips import GROUP, LINE, PANELS, SUMS_BYTES, strip_layout
from hybrid_moe.formats.table import BF16, E2M1_VALUES, MXFP4

E2M1_DOUBLED = tuple(int(2 * v) for v in E2M1_VALUES)
"""Integers in -12..12. Plus 12 they are unsigned, as byte_dot wants its weights."""

MXFP4_STRIP = strip_layout(MXFP4, GROUP)
BF16_STRIP = strip_layout(BF16, GROUP)


@dataclass(frozen=True)
class DotArgs:
    """Parameters of a dot kernel.

    Attributes:
        codes: address of group `begin` of the strip, packed, or as `mxfp4_unpack` leaves it.
        ahead: address of the packed codes that are unpacked next. Kernels over unpacked codes
            prefetch 4 KiB of them.
        x: address of the tile, [group][token] of encoded groups.
        count: tokens of the tile.
        sums: address of float32 [count][64].
        begin, end: groups. If `begin` is 0, sums start from zero and memory's are not read.
    """

    codes: Val
    ahead: Val
    x: Val
    count: Val
    sums: Val
    begin: Val
    end: Val


DOT_ARITY = len(fields(DotArgs))


def dot_kernel(body: Callable[[Emit, DotArgs], None]) -> KernelBody:
    """`body` as a kernel of DOT_ARITY parameters."""
    return lambda emit, *values: body(emit, DotArgs(*values))


Place = tuple[int, int]
"""Token and panel of a vector of sums, float32 [16]."""


def _sum_address(sums: Val, place: Place) -> Val:
    return sums + (SUMS_BYTES * place[0] + 64 * place[1])


def load_sums(emit: Emit, sums: Val, begin: Val, places: Sequence[Place]) -> dict[Place, Var]:
    """The sums in registers; zero where `begin` is 0."""
    total = {
        place: emit.var(emit.load(_sum_address(sums, place), F32, 16, align=64)) for place in places
    }
    with emit.when(begin.equals(0)):
        for value in total.values():
            value.set(emit.splat(0.0, F32, 16))
    return total


def store_sums(emit: Emit, sums: Val, total: dict[Place, Var]) -> None:
    for place, value in total.items():
        emit.store(_sum_address(sums, place), value.get(), align=64)


def clear_sums(emit: Emit, sums: Val, tokens: int) -> None:
    for place in itertools.product(range(tokens), range(PANELS)):
        emit.store(_sum_address(sums, place), emit.splat(0.0, F32, 16), align=64)


# MXFP4. For each token, row and group of 32 inputs q = 256 * high + low (see `encode`):
#
#     exact = 256 * sum(w * high) + sum(w * low)      integers; w = 2 * value + 12, and the biases
#                                                     of the group take the 12 back
#     sums += (exact * factor) * 2^(scale - 127)      float32; both factors are powers of two


@dataclass(frozen=True)
class Scale:
    """16 scales as powers of two and as their exponents, float32 both."""

    power: Val
    exponent: Val


def mxfp4_scale(emit: Emit, address: Val) -> Scale:
    """16 E8M0 bytes in memory. Byte 0 is 2^-127, whose bits are 0x00400000 and not 0."""
    byte = emit.load(address, I8, 16, align=16).zext(I32)
    bits = byte << 23
    power = (bits < 0x00400000).select(0x00400000, bits).bits(F32)
    return Scale(power, (byte - 127).to_float())


class UnpackedGroup(Record):
    """A group of a strip as `mxfp4_unpack` leaves it."""

    weights = u8[8, PANELS, 16, 4]  # or int8; [quad][panel][lane]: four inputs of a row
    powers = f32[PANELS, 16]  # the scales [panel][lane]
    exponents = f32[PANELS, 16]  # and their exponents; a tier reads one of them


UNPACKED_GROUP = UnpackedGroup.offsets()


def unpacked_scale(emit: Emit, panel: Val) -> Scale:
    """The scales of the panel whose weights begin at address `panel`."""
    return Scale(
        *(
            emit.load(panel + offset, F32, 16, align=64)
            for offset in (UNPACKED_GROUP.powers, UNPACKED_GROUP.exponents)
        )
    )


Weights = Sequence[tuple[int, Val]]
"""(quad, 64 weight bytes) of one panel: four inputs of 16 rows each."""


def _decode(emit: Emit, codes: Val, word: int, offset: int) -> Weights:
    """64 bytes of packed codes -> weights of the even and of the odd inputs: doubled, + offset."""
    table = tuple((weight + offset) & 255 for weight in E2M1_DOUBLED)
    even, odd = (emit.op("lookup_low4", table, c.bits(I8)) for c in (codes, codes >> 4))
    return [(2 * word, even), (2 * word + 1, odd)]


class _Packed:
    """Codes as they stream from memory: four words of a row in a group, two quads each."""

    nbytes = MXFP4_STRIP.group_bytes
    steps = MXFP4_STRIP.words

    def weights(self, emit: Emit, group: Val, panel: Val | int, word: int) -> Weights:
        at = group + panel * 64 if isinstance(panel, Val) else group + 64 * panel
        codes = emit.load(at + 64 * PANELS * word, I32, 16, align=64)
        return _decode(emit, codes, word, BYTE_DOT_OFFSET)

    def scale(self, emit: Emit, group: Val, panel: Val | int) -> Scale:
        at = group + panel * 16 if isinstance(panel, Val) else group + 16 * panel
        return mxfp4_scale(emit, at + MXFP4_STRIP.code_bytes)


class _Unpacked:
    """Weight bytes in the cache: no lookup competes with the dot products."""

    nbytes = UNPACKED_GROUP.nbytes
    steps = 8

    def weights(self, emit: Emit, group: Val, panel: Val | int, quad: int) -> Weights:
        at = group + panel * 64 if isinstance(panel, Val) else group + 64 * panel
        return [(quad, emit.load(at + 64 * PANELS * quad, I8, 64, align=64))]

    def scale(self, emit: Emit, group: Val, panel: Val | int) -> Scale:
        return unpacked_scale(
            emit, group + panel * 64 if isinstance(panel, Val) else group + 64 * panel
        )


class _Planes:
    """Integer sums of one panel and group: two accumulators [16 rows] for each token."""

    def __init__(self, emit: Emit, x: Sequence[Val]) -> None:
        """`x` has the address of each token's group."""
        self._emit, self._x = emit, x
        at = FIXED15_GROUP
        self._high, self._low = (
            [emit.broadcast(emit.load(address + bias, I32, align=4), 16) for address in x]
            for bias in (at.high_bias, at.low_bias)
        )

    def add(self, weights: Weights, tokens: Sequence[int]) -> None:
        """The dot products of `tokens`, plane by plane."""
        emit = self._emit
        planes = ((self._high, FIXED15_GROUP.high), (self._low, FIXED15_GROUP.low))
        for quad, w in weights:
            for sums, plane in planes:
                for t in tokens:
                    x = emit.load(self._x[t] + (plane + 4 * quad), I32, align=4)
                    sums[t] = emit.op("byte_dot", sums[t], w, x)

    def scaled(self, token: int, scale: Scale) -> Val:
        """The group's part of one token's result, float32 [16]."""
        emit, at, x = self._emit, FIXED15_GROUP, self._x[token]
        exact = emit.op("byte_dot_total", self._high[token], self._low[token]).to_float()
        factor, exponent = (
            emit.broadcast(emit.load(x + offset, F32, align=4), 16)
            for offset in (at.factor, at.exponent)
        )
        if len(self._x) == 1:  # bound by memory, so the multipliers have time for it
            return (exact * factor) * scale.power
        product = emit.op("times_power", exact, factor, exponent)
        return emit.op("times_power", product, scale.power, scale.exponent)


class _Mxfp4:
    """Emits one kernel, in the order of lines, panels and sums that `order` says."""

    def __init__(
        self, emit: Emit, args: DotArgs, tokens: int, source: _Packed | _Unpacked, order: Order
    ) -> None:
        self.emit, self.args, self.tokens = emit, args, range(tokens)
        self.source, self.order = source, order
        self.row_bytes = tokens * FIXED15_GROUP.nbytes
        self.lines: list[Val] = []  # still to be prefetched in this group
        self.ahead = emit.var(args.ahead)

    def run(self) -> None:
        args, kept = self.args, self.order.kept
        if kept == PANELS:
            self.in_registers(range(PANELS), args.codes, args.begin, args.end)
        elif kept:
            self.by_turns()
        else:
            self.in_memory()

    def by_turns(self) -> None:
        """Two panels of TURN_GROUPS groups, then the other two."""
        emit, args, kept = self.emit, self.args, self.order.kept
        with emit.loop(args.begin, args.end, step=TURN_GROUPS) as first:
            last = first + TURN_GROUPS
            last = (args.end < last).select(args.end, last)
            codes = args.codes + (first - args.begin) * self.source.nbytes
            for panel in range(0, PANELS, kept):
                self.in_registers(range(panel, panel + kept), codes, first, last)

    def in_registers(self, panels: Sequence[int], codes: Val, begin: Val, end: Val) -> None:
        """Groups begin..end-1 of `panels`, the sums in registers meanwhile."""
        emit, args, source = self.emit, self.args, self.source
        total = load_sums(emit, args.sums, begin, list(itertools.product(self.tokens, panels)))
        code, row = emit.var(codes), emit.var(args.x + begin * self.row_bytes)
        ahead = [emit.var(w) for _, w in source.weights(emit, codes, panels[0], 0)]
        with emit.loop(begin, end) as index:
            group, x = code.get(), self.token_addresses(row.get())
            following = group + source.nbytes
            self.lines = self.wanted(group) if panels[0] == 0 else []
            if self.order.together == PANELS:
                self.by_words(group, x, total)
            else:
                after = (index + 1 < end).select(following, group)
                self.by_panels(panels, group, after, x, total, ahead)
            code.set(following)
            row.set(row.get() + self.row_bytes)
        store_sums(emit, args.sums, total)

    def by_words(self, group: Val, x: Sequence[Val], total: dict[Place, Var]) -> None:
        """A word of all panels, then the next word: lines in ascending order."""
        emit, source = self.emit, self.source
        planes = [_Planes(emit, x) for _ in range(PANELS)]
        emit.barrier()
        for step in range(source.steps):
            for p in range(PANELS):
                weights = source.weights(emit, group, p, step)
                if len(x) > 1:  # a single token has registers for the weights of all panels
                    emit.barrier()
                planes[p].add(weights, self.tokens)
                if len(x) > 1:
                    emit.barrier()
            emit.barrier()
        for p in range(PANELS):
            scale = source.scale(emit, group, p)
            for t in self.tokens:
                total[t, p].set(total[t, p].get() + planes[p].scaled(t, scale))
        emit.barrier()

    def by_panels(
        self,
        panels: Sequence[int],
        group: Val,
        after: Val,
        x: Sequence[Val],
        total: dict[Place, Var],
        ahead: Sequence[Var],
    ) -> None:
        """Panel by panel, so that dot products wait for nothing else. A panel's first weights are
        decoded (into `ahead`; `after` is the address of the next group) before the results of the
        panel before it are added up. Its last step goes token by token: the result of each is added
        up behind the dot products of the next.

        Compiler fences keep this order. Without them LLVM loads inputs and weights early, into
        registers that the accumulators need (four tokens: 72 instead of 115 GMAC/s), or adds up
        late.
        """
        emit, source = self.emit, self.source
        share = -(-len(self.lines) // (len(panels) * source.steps))
        for position, p in enumerate(panels):
            planes = _Planes(emit, x)
            emit.barrier()
            quads = [quad for quad, _ in source.weights(emit, group, p, 0)]
            weights: Weights = list(zip(quads, (w.get() for w in ahead), strict=True))
            for step in range(source.steps - 1):
                self.ask(share)
                planes.add(weights, self.tokens)
                emit.barrier()
                weights = source.weights(emit, group, p, step + 1)
                emit.barrier()
            self.ask(share)
            is_last = position + 1 == len(panels)
            begin = (after, panels[0]) if is_last else (group, panels[position + 1])
            for variable, (_, w) in zip(ahead, source.weights(emit, *begin, 0), strict=True):
                variable.set(w)
            if self.order.kept < PANELS:  # the more tokens, the less room for both at once
                emit.barrier()
            else:
                emit.fence()
            scale = source.scale(emit, group, p)
            for t in self.tokens:
                planes.add(weights, [t])
                if t > 0:
                    total[t - 1, p].set(total[t - 1, p].get() + planes.scaled(t - 1, scale))
            last = self.tokens[-1]
            total[last, p].set(total[last, p].get() + planes.scaled(last, scale))
            emit.barrier()

    def in_memory(self) -> None:
        """Panel by panel, each group's sums added to memory. A loop over panels, not four copies:
        the copies' equal loads of x would be kept in registers that the accumulators need."""
        emit, args, source = self.emit, self.args, self.source
        with emit.when(args.begin.equals(0)):
            clear_sums(emit, args.sums, len(self.tokens))
        with emit.loop(args.begin, args.end) as index:
            group = args.codes + (index - args.begin) * source.nbytes
            x = self.token_addresses(args.x + index * self.row_bytes)
            self.lines = self.wanted(group)
            self.ask(len(self.lines))
            with emit.loop(0, emit.i64(PANELS)) as panel:
                planes = _Planes(emit, x)
                for step in range(source.steps):
                    planes.add(source.weights(emit, group, panel, step), self.tokens)
                scale = source.scale(emit, group, panel)
                for t in self.tokens:
                    to = args.sums + panel * 64 + SUMS_BYTES * t
                    product = planes.scaled(t, scale)
                    emit.store(to, emit.load(to, F32, 16, align=64) + product, align=64)

    def token_addresses(self, row: Val) -> list[Val]:
        return [row + FIXED15_GROUP.nbytes * t for t in self.tokens]

    def wanted(self, group: Val) -> list[Val]:
        """Lines to prefetch during a group: of the strip that is being read, or of the codes that
        are unpacked next."""
        if isinstance(self.source, _Packed):
            ahead = group + MXFP4_AHEAD
            lines = self.source.nbytes // LINE if self.order.prefetch else 0
        else:
            ahead, lines = self.ahead.get(), SHARE_LINES
            self.ahead.set(ahead + lines * LINE)
        return [ahead + LINE * line for line in range(lines)]

    def ask(self, lines: int) -> None:
        for line in self.lines[:lines]:
            self.emit.prefetch(line)
        self.lines = self.lines[lines:]


def mxfp4_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel of MXFP4 for T = `tokens`, from packed codes."""
    return dot_kernel(lambda emit, args: _Mxfp4(emit, args, tokens, _Packed(), order).run())


def mxfp4_unpacked_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel of MXFP4 for T = `tokens`, from what `mxfp4_unpack` has made of the codes."""
    return dot_kernel(lambda emit, args: _Mxfp4(emit, args, tokens, _Unpacked(), order).run())


def mxfp4_unpack(offset: int) -> KernelBody:
    """Kernel (codes, out, count): groups of a strip -> `UnpackedGroup`s. Weights are doubled,
    plus `offset`."""

    def body(emit: Emit, codes: Val, out: Val, count: Val) -> None:
        with emit.loop(0, count) as group:
            at, to = codes + group * MXFP4_STRIP.group_bytes, out + group * UNPACKED_GROUP.nbytes
            for word, panel in itertools.product(range(MXFP4_STRIP.words), range(PANELS)):
                line = emit.load(at + 64 * (PANELS * word + panel), I32, 16, align=64)
                for quad, w in _decode(emit, line, word, offset):
                    emit.store(to + 64 * (PANELS * quad + panel), w, align=64)
            for panel in range(PANELS):
                scale = mxfp4_scale(emit, at + (MXFP4_STRIP.code_bytes + 16 * panel))
                emit.store(to + (UNPACKED_GROUP.powers + 64 * panel), scale.power, align=64)
                emit.store(to + (UNPACKED_GROUP.exponents + 64 * panel), scale.exponent, align=64)

    return body


# BF16. For each token, row and pair of inputs: sums += w[odd] * x[odd], then += w[even] * x[even]


def bf16_dot(tokens: int, order: Order) -> KernelBody:
    """Dot kernel of BF16 for T = `tokens`."""

    def pairs(
        emit: Emit, at: Val, x: Val, panels: Sequence[int], total: dict[Place, Var], ahead: int
    ) -> None:
        """One group of `panels`. Compiler fences keep the order, a line of weights and then its dot
        products; inputs stay memory operands of the instructions that use them."""
        for pair, panel in itertools.product(range(GROUP // 2), panels):
            line = at + 64 * (PANELS * pair + panel)
            if ahead:
                emit.prefetch(line + ahead)
            w = emit.load(line, I32, 16, align=64)
            for t in range(tokens):
                value = emit.load(x + (BF16_PAIRS.group_bytes * t + 4 * pair), I32, align=4)
                total[t, panel].set(emit.op("pair_dot", total[t, panel].get(), w, value))
            emit.barrier()

    def body(emit: Emit, args: DotArgs) -> None:
        step, ahead = tokens * BF16_PAIRS.group_bytes, BF16_AHEAD if order.prefetch else 0
        code, row = emit.var(args.codes), emit.var(args.x + args.begin * step)
        halves = [range(p, p + order.together) for p in range(0, PANELS, order.together)]
        places = [list(itertools.product(range(tokens), panels)) for panels in halves]
        total: dict[Place, Var] = {}
        if order.kept:
            total = load_sums(emit, args.sums, args.begin, places[0])
        with emit.loop(args.begin, args.end) as group:
            for panels, some in zip(halves, places, strict=True):
                if not order.kept:
                    total = load_sums(emit, args.sums, group, some)
                pairs(emit, code.get(), row.get(), panels, total, ahead)
                if not order.kept:
                    store_sums(emit, args.sums, total)
            code.set(code.get() + BF16_STRIP.group_bytes)
            row.set(row.get() + step)
        if order.kept:
            store_sums(emit, args.sums, total)

    return dot_kernel(body)
