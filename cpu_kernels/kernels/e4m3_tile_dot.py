"""Dot kernels of E4M3 codes for a matrix unit: blocks of up to 16 or 32 tokens, see `tile_dot`.

Weights come unpacked, as pairs of bf16. A span of inputs that shares its scale is summed in C
registers, from zero, in the order of `tile_dot_pairs`; its parts go to scratch, and vectors scale
them and add them to the sums. Four C registers are those of 16 tokens and four panels, or of 32
tokens and two panels, which use each register of weights twice:

    16 tokens   0-3 C, 4 A, 5-7 B in turn
    32 tokens   0-3 C, 4-5 A, 6-7 B
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid_moe.cpu_kernels.dsl.emit import F32, Emit, KernelBody, Val
from hybrid_moe.cpu_kernels.dsl.tiles import REGISTER_BYTES, REGISTERS, ROW_BYTES, ROWS, Tiles
from hybrid_moe.cpu_kernels.kernels.dot import DotArgs, dot_kernel
from hybrid_moe.cpu_kernels.kernels.e4m3_dot import E4m3Source, unpacked_source, within
from hybrid_moe.cpu_kernels.kernels.encode import BYTE_PAIRS
from hybrid_moe.cpu_kernels.kernels.epilogue import clear
from hybrid_moe.cpu_kernels.kernels.strip_cursor import Place
from hybrid_moe.cpu_kernels.kernels.tile_dot import BF16_CONFIG
from hybrid_moe.cpu_kernels.tuning import BLOCK_TURN_TOKENS, SHARE_LINES
from hybrid_moe.formats.strips import LINE, PANELS, SUMS_BYTES
from hybrid_moe.formats.weight_format import WeightFormat

_B_STRIDE = PANELS * ROW_BYTES


class _Block:
    """Emits one kernel."""

    def __init__(self, emit: Emit, args: DotArgs, source: E4m3Source, blocks: int) -> None:
        self.emit, self.args, self.source, self.blocks = emit, args, source, blocks
        self.together = PANELS // blocks
        self.tiles = Tiles(emit, BF16_CONFIG)
        self.totals = emit.scratch(PANELS * REGISTER_BYTES)

    def run(self) -> None:
        emit, args, span = self.emit, self.args, self.source.span
        turns = (args.count + (BLOCK_TURN_TOKENS - 1)) & -BLOCK_TURN_TOKENS
        with emit.when(args.begin.equals(0)):
            clear(emit, args.sums, turns)
        with emit.loop(args.begin & -span, args.end, step=span) as first:
            begin, end = within(first, span, args.begin, args.end)
            for panel in range(0, PANELS, self.together):
                panels = range(panel, panel + self.together)
                self.products(panels, begin, end)
                self.add(panels, begin, turns)

    def weights(self, group: Val) -> Val:
        """Address of an unpacked group."""
        return self.args.codes + (group - self.args.begin) * self.source.layout.block_bytes

    def products(self, panels: Sequence[int], begin: Val, end: Val) -> None:
        """totals [block][panel][token 16][row 16] = parts of groups begin..end-1."""
        emit, tiles, args = self.emit, self.tiles, self.args
        registers = self.blocks * self.together
        for c in range(registers):
            tiles.zero(c)
        b_registers = range(PANELS + self.blocks, REGISTERS)
        with emit.loop(begin, end) as group:
            weights = self.weights(group)
            x = args.x + group * (args.count * BYTE_PAIRS.group_bytes)
            if panels[0] == 0:  # codes that are unpacked next
                for line in range(SHARE_LINES):
                    emit.prefetch(args.ahead + ((group - args.begin) * SHARE_LINES + line) * LINE)
            for b in range(self.blocks):
                at = x + b * ROWS * BYTE_PAIRS.group_bytes
                tiles.load(PANELS + b, at, emit.i64(BYTE_PAIRS.group_bytes))
            for i, panel in enumerate(panels):
                register = b_registers[i % len(b_registers)]
                tiles.load(register, weights + ROW_BYTES * panel, emit.i64(_B_STRIDE))
                for b in range(self.blocks):
                    tiles.dot_pairs(self.together * b + i, PANELS + b, register)
        for c in range(registers):
            tiles.store(c, self.totals + REGISTER_BYTES * c, emit.i64(ROW_BYTES))

    def add(self, panels: Sequence[int], begin: Val, turns: Val) -> None:
        """sums += totals * scale, a turn of tokens at a time."""
        emit, args, layout = self.emit, self.args, self.source.layout
        weights = self.weights(begin)
        place = Place(weights, weights + layout.code_bytes, args.codes)
        scales = [self.source.scale(emit, place, p, 0) for p in panels]
        block_bytes = self.together * REGISTER_BYTES
        with emit.loop(0, turns, step=BLOCK_TURN_TOKENS) as turn:
            rows = self.totals + (turn >> (ROWS.bit_length() - 1)) * block_bytes
            for i in range(BLOCK_TURN_TOKENS):
                row = rows + ((turn & (ROWS - 1)) + i) * ROW_BYTES
                for n, (panel, scale) in enumerate(zip(panels, scales, strict=True)):
                    part = emit.load(row + REGISTER_BYTES * n, F32, 16, align=64)
                    at = args.sums + ((turn + i) * SUMS_BYTES + 64 * panel)
                    part = scale.times(emit, part, by_exponent=True)
                    emit.store(at, emit.load(at, F32, 16, align=64) + part, align=64)


def e4m3_tile_dot(fmt: WeightFormat, most: int) -> KernelBody:
    """Dot kernel for up to `most` tokens, 16 or 32, over what `e4m3_dot.unpack` has made."""
    source = unpacked_source(fmt)
    return dot_kernel(lambda emit, args: _Block(emit, args, source, most // ROWS).run())
