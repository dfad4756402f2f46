"""Codes that are integers -> the bytes that dot products take: quads of a panel.

A vector load brings a 32-bit word of 16 rows. Codes at the same place of the word's four bytes are
a quad (`weight_format.quads`), so that one shift and one mask, or one lookup, give 64 weights: four
inputs of each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid_moe.cpu_kernels.dsl.emit import I8, I32, Emit, Val
from hybrid_moe.cpu_kernels.kernels.strip_cursor import panel_address
from hybrid_moe.formats.strips import PANELS, StripLayout
from hybrid_moe.formats.weight_format import CodeType

Weights = Sequence[tuple[int, Val]]
"""(quad, 64 weight bytes) of one panel: four inputs of 16 rows each."""

Decode = Callable[[Emit, Val, "Val | int", int], Weights]
"""(emit, address of a group's codes, panel, word) -> the quads of a word."""

_LINE = 64 * PANELS
"""From one word of a panel to the next."""


Finish = Callable[[Emit, Val], Val]
"""Weights plus the offset -> what the dot product takes."""


def integer_codes(code: CodeType, layout: StripLayout, offset: int, wide: bool) -> Decode:
    """Weights in units of the code's step, plus `offset`, as bytes; with `wide`, as the tier's
    `wide_dot` takes them."""

    def finish(emit: Emit, w: Val) -> Val:
        return emit.op("wide_weights", w, offset) if wide else w

    if code.values is None:
        return _bytes(offset, finish)
    integers = code.integers
    if integers == tuple(range(integers[0], integers[0] + len(integers))):
        return _planes(code, layout, integers[0] + offset, finish)
    assert code.bits == 4 and not code.high_bits, code.name
    return _nibbles(integers, offset, wide)


def _word(emit: Emit, codes: Val, panel: Val | int, word: int) -> Val:
    return emit.load(panel_address(codes, panel, 64) + _LINE * word, I32, 16, align=64)


def _bytes(offset: int, finish: Finish) -> Decode:
    """Signed bytes."""
    added = (offset + 128) % 256 - 128  # the same byte, as a signed one

    def decode(emit: Emit, codes: Val, panel: Val | int, word: int) -> Weights:
        return [(word, finish(emit, _word(emit, codes, panel, word).bits(I8) + added))]

    return decode


def _nibbles(values: tuple[int, ...], offset: int, wide: bool) -> Decode:
    """Looked up: any 16 values."""
    table = tuple((value + offset) & 255 for value in values)

    def decode(emit: Emit, codes: Val, panel: Val | int, word: int) -> Weights:
        both = _word(emit, codes, panel, word)
        even, odd = (
            emit.op("wide_lookup", values, offset, c.bits(I8))
            if wide
            else emit.op("lookup_low4", table, c.bits(I8))
            for c in (both, both >> 4)
        )
        return [(2 * word, even), (2 * word + 1, odd)]

    return decode


def _repeated(byte: int) -> int:
    """A byte in all four bytes of a word."""
    word = byte * 0x01010101
    return word - (1 << 32) if word >= 1 << 31 else word


def _planes(code: CodeType, layout: StripLayout, first: int, finish: Finish) -> Decode:
    """A range of numbers, code 0 being `first`: lower bits from the word, upper bits from the plane
    `high`."""
    bits, high_bits = code.bits, code.high_bits
    per_word = 8 // bits

    def decode(emit: Emit, codes: Val, panel: Val | int, word: int) -> Weights:
        lower = _word(emit, codes, panel, word)
        weights = []
        for place in range(per_word):
            quad = per_word * word + place
            value = (lower >> (bits * place)) & _repeated((1 << bits) - 1)
            if high_bits:
                at, shift = divmod(high_bits * quad, 8)
                upper = _word(emit, codes + layout.high_offset, panel, at)
                moved = shift - bits  # to its place above the lower bits
                upper = upper >> moved if moved >= 0 else upper << -moved
                value = value | (upper & _repeated(((1 << high_bits) - 1) << bits))
            quad_bytes = value.bits(I8)
            weights.append((quad, finish(emit, quad_bytes + first if first else quad_bytes)))
        return weights

    return decode
