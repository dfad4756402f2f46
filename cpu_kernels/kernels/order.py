"""In which order a dot kernel goes through a group of a strip, and where its sums are meanwhile.

One function for each kind of arithmetic, of the tokens and the tier's registers alone. Counts below
are in vectors of 16 lanes, of which a register holds one (AVX-512), half (AVX2) or a quarter.

What a kernel for T tokens keeps in registers: a float32 sum for each token and panel, and while a
group of MXFP4 is summed as integers, two planes for each token and panel under way. Beside them a
word of codes, what is looked up of it, and inputs and constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.cpu_kernels.tuning import STREAM_TOKENS, TILE_TOKENS
from hybrid_moe.formats.strips import PANELS


@dataclass(frozen=True)
class Order:
    """How a kernel goes through a group.

    Attributes:
        together: panels of which one word is taken before the next word.
        kept: panels whose sums stay in registers over the groups of a call. With 2 of 4, two
            panels go some groups ahead, then the other two follow. With 0, sums are in memory
            and each group adds to them.
        prefetch: packed codes are asked for by instructions, ahead of their use.
    """

    together: int
    kept: int
    prefetch: bool


def _vectors(registers: int, per_panel: int, reserved: int) -> int:
    """Vectors of 16 lanes that fit beside `reserved` registers."""
    return (registers - reserved) // per_panel


def mxfp4_most(registers: int, per_panel: int) -> int:
    """Tokens of the largest tile: two planes of one panel for each, beside four registers."""
    return max(1, min(TILE_TOKENS, _vectors(registers, per_panel, 4) // 2))


def mxfp4_order(tokens: int, registers: int, per_panel: int) -> Order:
    """A word of all four panels, then the next, touches lines in strictly ascending order: the
    processor's prefetchers then keep up by themselves (Zen 4: an instruction for each line costs
    20 to 25 %). More tokens have no room for the planes of four panels, so panels follow each
    other, and the lines want asking for. With more than four not even the sums of four panels fit;
    those tokens are bound by arithmetic, so that the order of lines matters less to them."""
    free = _vectors(registers, per_panel, 4 * per_panel)
    if (PANELS + 2 * PANELS) * tokens <= free:
        return Order(together=PANELS, kept=PANELS, prefetch=False)
    if (PANELS + 2) * tokens <= free:
        return Order(together=1, kept=PANELS, prefetch=True)
    if tokens > STREAM_TOKENS and (PANELS // 2 + 2) * tokens <= free:
        return Order(together=1, kept=PANELS // 2, prefetch=True)
    return Order(together=1, kept=0, prefetch=True)


def bf16_most(registers: int, per_panel: int) -> int:
    """Tokens of the largest tile: sums of two panels for each, beside eight registers (without a
    bf16 dot product, pairs are widened before they meet)."""
    return max(1, min(TILE_TOKENS, _vectors(registers, per_panel, 8) // 2))


def bf16_order(tokens: int, registers: int, per_panel: int) -> Order:
    """Pair by pair, each of all four panels if their sums fit; else of two, whose sums go to memory
    with each group. A single token on narrow registers (AVX2) asks for its lines: Zen 3, whose
    prefetchers stop at the end of a 4 KiB page, is a sixth faster so."""
    free = _vectors(registers, per_panel, 8)
    narrow = per_panel > 1
    if PANELS * tokens <= free:
        return Order(together=PANELS, kept=PANELS, prefetch=narrow and tokens == 1)
    return Order(together=PANELS // 2, kept=0, prefetch=False)
