"""The order in which a dot kernel goes through a group of a strip, and where it keeps its sums.

There is one function for each kind of arithmetic. It depends only on the tokens and the tier's
registers. Counts below are vectors of 16 lanes; a register holds one (AVX-512), half (AVX2) or a
quarter of a vector.

A kernel for T tokens keeps a float32 sum in registers for each token and panel. While it sums a
group as integers (MXFP4, INT8), it also keeps two planes for each token and panel under way; with
8-bit activations, one. The other registers hold a word of codes, the weights looked up from it,
inputs and constants.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid_moe.cpu_kernels.tuning import STREAM_TOKENS, TILE_TOKENS
from hybrid_moe.formats.strips import PANELS

_HALVES = 2
"""Registers of 16 lanes on AVX2."""


@dataclass(frozen=True)
class Order:
    """How a kernel goes through a group.

    Attributes:
        together: panels whose word w is read before word w + 1 of any of them.
        kept: panels whose sums stay in registers over the groups of a call. With 2 of 4, two
            panels take some groups, then the other two follow. With 0, sums are in memory and
            each group adds to them.
        prefetch: packed codes are prefetched by instructions.
    """

    together: int
    kept: int
    prefetch: bool


def _vectors(registers: int, per_panel: int, reserved: int) -> int:
    """Vectors of 16 lanes that fit beside `reserved` registers."""
    return (registers - reserved) // per_panel


def _is_single(tokens: int, per_panel: int) -> bool:
    """A single token on AVX2: see `fixed15_order`."""
    return tokens == 1 and per_panel == _HALVES


def fixed15_most(registers: int, per_panel: int, planes: int = 2) -> int:
    """Tokens of the largest tile: the planes of one panel for each, beside four registers; with one
    plane beside eight, since AVX2 widens weights and inputs that are bytes."""
    reserved = 4 if planes > 1 else 8
    return max(1, min(TILE_TOKENS, _vectors(registers, per_panel, reserved) // planes))


def fixed15_order(tokens: int, registers: int, per_panel: int, planes: int = 2) -> Order:
    """One word of all four panels, then the next, touches lines in strictly ascending order, and
    the processor's own prefetchers keep up (Zen 4: a prefetch instruction for each line costs 20
    to 25 %). With more tokens the planes of four panels do not fit: panels follow each other, and
    their lines need prefetch instructions. With more than four tokens not even the sums of four
    panels fit. Those kernels are bound by arithmetic, so the order of lines matters less.

    A single token on AVX2 reads lines in order too, though half of its 24 registers' worth of sums
    and planes then live in the first-level cache: loads have time, prefetchers need the order (Zen
    4, panel by panel with prefetch instructions: INT8 at 42 % of read instead of 100, Q4_K at 43
    instead of 81)."""
    free = _vectors(registers, per_panel, 4 * per_panel)
    fit = (PANELS + planes * PANELS) * tokens <= free
    if fit or _is_single(tokens, per_panel):
        return Order(together=PANELS, kept=PANELS, prefetch=False)
    if (PANELS + planes) * tokens <= free:
        return Order(together=1, kept=PANELS, prefetch=True)
    if tokens > STREAM_TOKENS and (PANELS // 2 + planes) * tokens <= free:
        return Order(together=1, kept=PANELS // 2, prefetch=True)
    return Order(together=1, kept=0, prefetch=True)


def bf16_most(registers: int, per_panel: int) -> int:
    """Tokens of the largest tile: sums of two panels for each, beside eight registers (without a
    bf16 dot product, pairs are widened before they meet)."""
    return max(1, min(TILE_TOKENS, _vectors(registers, per_panel, 8) // 2))


def bf16_order(tokens: int, registers: int, per_panel: int) -> Order:
    """Pair by pair, each of all four panels if their sums fit; else of two panels, whose sums go to
    memory with each group. A single token on narrow registers (AVX2) prefetches its lines: the
    prefetchers of Zen 3 stop at the end of a 4 KiB page, and this gains a sixth there."""
    free = _vectors(registers, per_panel, 8)
    narrow = per_panel > 1
    if PANELS * tokens <= free:
        return Order(together=PANELS, kept=PANELS, prefetch=narrow and tokens == 1)
    return Order(together=PANELS // 2, kept=0, prefetch=False)


def e4m3_most(registers: int, per_panel: int) -> int:
    """Tokens of the largest tile: as `bf16_most`, but a panel's parts and sums for each beside
    what decodes a word."""
    return bf16_most(registers, per_panel)


def e4m3_order(tokens: int, registers: int, per_panel: int) -> Order:
    """Sums and the parts that are added to them take a vector each. Four panels at once if all of
    them fit, or for a single token on AVX2, as in `fixed15_order`; else two panels for some groups
    and then the other two; else one panel, whose sums go to memory with each part."""
    free = _vectors(registers, per_panel, 8)
    if _is_single(tokens, per_panel):
        return Order(together=PANELS, kept=PANELS, prefetch=False)
    for panels in (PANELS, PANELS // 2):
        if 2 * panels * tokens <= free:
            return Order(together=panels, kept=panels, prefetch=panels < PANELS or per_panel > 1)
    return Order(together=1, kept=0, prefetch=True)
