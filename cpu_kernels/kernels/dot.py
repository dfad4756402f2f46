"""Dot kernels: one strip of weights times the rows of a few tokens.

    kernel(codes, scales, rows, count, sums, begin, end, groups)

adds, for tokens t < count, groups begin..end-1 of the products of the strip's 32 rows with the
encoded row at address rows[t] (int64 [count]) to sums (float32 [count][32]); `begin` 0 starts from
zero. `codes` and `scales` point at group `begin`. The kernels here are for one count M each. Sums
run over groups in ascending order whatever M, chunking and source, so a token's bits do not depend
on how a call is cut.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, I64, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET
from hybrid_moe.cpu_kernels.kernels.encode import META_BYTES, PLANE_BYTES
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS
from hybrid_moe.formats.table import E2M1_VALUES

PANELS = 2
E2M1_DOUBLED = tuple(int(2 * v) for v in E2M1_VALUES)
"""Integers in -12..12. Plus 12 they are unsigned, as byte_dot wants its weights."""

MXFP4_GROUP_BYTES = 512
MXFP4_UNPACKED_GROUP_BYTES = 1024
BF16_PAIR_BYTES = 128  # two inputs of 32 rows
BF16_GROUP_BYTES = GROUP // 2 * BF16_PAIR_BYTES


class _Sums:
    """The float32 sums of M tokens x 2 panels in memory: [token][panel][lane]."""

    def __init__(self, emit: Emit, base: Val) -> None:
        self._emit, self._base = emit, base

    def _address(self, token: int, panel: Val | int) -> Val:
        offset = panel * 64 if isinstance(panel, Val) else self._emit.i64(64 * panel)
        return self._base + offset + 4 * STRIP_ROWS * token

    def load(self, token: int, panel: Val | int) -> Val:
        return self._emit.load(self._address(token, panel), F32, 16, align=64)

    def store(self, token: int, panel: Val | int, value: Val) -> None:
        self._emit.store(self._address(token, panel), value, align=64)

    def clear(self, tokens: int) -> None:
        zero = self._emit.splat(0.0, F32, 16)
        for token in range(tokens):
            for panel in range(PANELS):
                self.store(token, panel, zero)


def _decode_word(emit: Emit, word: Val, offset: int) -> tuple[Val, Val]:
    """64 bytes of packed codes -> weights of the even and of the odd inputs: doubled, + offset."""
    table = tuple((weight + offset) & 255 for weight in E2M1_DOUBLED)
    low = (word & 0x0F0F0F0F).bits(I8)
    high = ((word >> 4) & 0x0F0F0F0F).bits(I8)
    return emit.op("lookup16", table, low), emit.op("lookup16", table, high)


def mxfp4_scales(emit: Emit, address: Val) -> Val:
    """16 E8M0 bytes -> float32. Byte 0 is 2^-127, whose bits are 0x00400000 and not 0."""
    bits = emit.load(address, I8, 16, align=16).zext(I32) << 23
    return (bits < 0x00400000).select(0x00400000, bits).bits(F32)


def mxfp4_dot(tokens: int, unpacked: bool) -> KernelBody:
    """Dot kernel of MXFP4 for M = `tokens`, from packed codes or from `mxfp4_unpack`'s bytes."""

    def body(
        emit: Emit,
        codes: Val,
        scales: Val,
        rows: Val,
        count: Val,
        sums: Val,
        begin: Val,
        end: Val,
        groups: Val,
    ) -> None:
        del count
        row = [emit.load(rows + 8 * t, I64) for t in range(tokens)]
        total = _Sums(emit, sums)
        with emit.when(begin.equals(0)):
            total.clear(tokens)
        step = MXFP4_UNPACKED_GROUP_BYTES if unpacked else MXFP4_GROUP_BYTES
        with emit.loop(begin, end) as group:
            at = codes + (group - begin) * step
            scale_at = scales + (group - begin) * STRIP_ROWS
            plane = [r + group * PLANE_BYTES for r in row]
            meta = [r + groups * PLANE_BYTES + group * META_BYTES for r in row]
            if not unpacked:
                prefetch(emit, at, MXFP4_GROUP_BYTES)
            # a loop, not two copies: the copies' equal loads of x would be kept in registers that
            # the accumulators need
            with emit.loop(0, emit.i64(PANELS)) as panel:
                high = [emit.broadcast(emit.load(m + 4, I32, align=4), 16) for m in meta]
                low = [emit.broadcast(emit.load(m + 8, I32, align=4), 16) for m in meta]
                for quad, w in _weights(emit, at + panel * 64, unpacked):
                    for t in range(tokens):
                        x_high = emit.load(plane[t] + 4 * quad, I32, align=4)
                        x_low = emit.load(plane[t] + (32 + 4 * quad), I32, align=4)
                        high[t] = emit.op("byte_dot", high[t], w, x_high)
                        low[t] = emit.op("byte_dot", low[t], w, x_low)
                scale = mxfp4_scales(emit, scale_at + panel * 16)
                for t in range(tokens):
                    exact = emit.op("byte_dot_total", high[t], low[t]).to_float()
                    product = exact * emit.load(meta[t], F32, align=4)
                    old = total.load(t, panel)
                    total.store(t, panel, emit.op("scale_add", old, product, scale))

    return body


def prefetch(emit: Emit, at: Val, nbytes: int, ahead: int = 4096) -> None:
    """Fetch the lines of one group, `ahead` bytes on: a hardware prefetcher stops at the end of a
    4 KiB page. One token, Zen 3: a sixth faster than without, 5 % faster than 2048 bytes ahead."""
    for line in range(0, nbytes, 64):
        emit.prefetch(at + (ahead + line))


def _weights(
    emit: Emit, at: Val, unpacked: bool, offset: int = BYTE_DOT_OFFSET
) -> Iterator[tuple[int, Val]]:
    """(quad, 64 weight bytes) of one panel and group; a quad is four inputs of 16 rows."""
    if unpacked:
        for quad in range(8):
            yield quad, emit.load(at + 64 * PANELS * quad, I8, 64, align=64)
        return
    for word in range(4):
        codes = emit.load(at + 64 * PANELS * word, I32, 16, align=64)
        even, odd = _decode_word(emit, codes, offset)
        yield 2 * word, even
        yield 2 * word + 1, odd


_NEXT_CHUNK = 8192
"""Packed bytes of a chunk (kernels.formats.chunk_bytes): the next one comes from memory while this
one is multiplied. 64 tokens, Zen 3: 4 % faster than without."""


def mxfp4_unpack(offset: int) -> KernelBody:
    """Kernel (codes, out, count): groups of packed codes -> weight bytes [group][quad][panel],
    doubled, plus `offset`."""

    def body(emit: Emit, codes: Val, out: Val, count: Val) -> None:
        with emit.loop(0, count) as group:
            at, to = codes + group * MXFP4_GROUP_BYTES, out + group * MXFP4_UNPACKED_GROUP_BYTES
            prefetch(emit, at, MXFP4_GROUP_BYTES, _NEXT_CHUNK)
            for panel in range(PANELS):
                for quad, w in _weights(emit, at + 64 * panel, unpacked=False, offset=offset):
                    emit.store(to + 64 * (PANELS * quad + panel), w, align=64)

    return body


def bf16_dot(tokens: int) -> KernelBody:
    """Dot kernel of BF16 for M = `tokens`; `scales` and `groups` are not used."""

    def body(
        emit: Emit,
        codes: Val,
        scales: Val,
        rows: Val,
        count: Val,
        sums: Val,
        begin: Val,
        end: Val,
        groups: Val,
    ) -> None:
        del scales, count, groups
        row = [emit.load(rows + 8 * t, I64) for t in range(tokens)]
        memory = _Sums(emit, sums)
        with emit.when(begin.equals(0)):
            memory.clear(tokens)
        slots = [(t, p) for t in range(tokens) for p in range(PANELS)]
        total = {slot: emit.var(memory.load(*slot)) for slot in slots}
        # Fences keep the order: a load of weights, then its dots. Without them the compiler goes
        # token by token with all weights of a turn in registers, or keeps the inputs, which both
        # panels read, in registers that the accumulators need (12 tokens: 24 of 32); so each input
        # is an operand of the instruction that uses it. A turn takes several pairs because it also
        # moves the pointers.
        unrolled = max(2, 8 // tokens)
        first = begin * (GROUP // 2)
        with emit.loop(first, end * (GROUP // 2), step=unrolled) as pair:
            at = codes + (pair - first) * BF16_PAIR_BYTES
            inputs = [r + pair * 4 for r in row]
            if tokens == 1:
                prefetch(emit, at, unrolled * BF16_PAIR_BYTES)
            for i, panel in itertools.product(range(unrolled), range(PANELS)):
                w = emit.load(at + (BF16_PAIR_BYTES * i + 64 * panel), I32, 16, align=64)
                for t in range(tokens):
                    x = emit.load(inputs[t] + 4 * i, I32, align=4)
                    total[t, panel].set(emit.op("pair_dot", total[t, panel].get(), w, x))
                emit.fence()
        for slot in slots:
            memory.store(*slot, total[slot].get())

    return body
