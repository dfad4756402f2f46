"""The rate at which a tier's instructions decode a format, counted from the assembly.

Of the kernel for one token that the library uses: the vector pipe, load port or dispatcher that its
instructions keep busy the longest, if nothing ever waits. No stream of weights is faster than that,
however fast memory is.
"""

from __future__ import annotations

from decode.instructions import ZEN3, ZEN4, count, fewest_cycles
from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import Tier, host_features
from hybrid_moe.cpu_kernels.jit.compile import assembly
from hybrid_moe.cpu_kernels.kernels import e4m3_dot
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.order import Order
from hybrid_moe.cpu_kernels.tuning import E4M3_WORDS, TURN_GROUPS
from hybrid_moe.formats.strips import GROUP, PANELS, STRIP_ROWS
from hybrid_moe.formats.weight_format import WeightFormat

K = 4096
"""Inputs of the strip whose instructions are counted."""


def counted_cycles(
    fmt: WeightFormat, tier: Tier, activation_bits: int = 16
) -> tuple[str, float] | None:
    """What binds the kernel for one token on a strip of 64 rows x K inputs, and the cycles that it
    takes; None where the loops of the kernel cannot be told apart, or there is no x86 processor.

    Raises:
        NotImplementedError: the format has no kernels.
    """
    if "neon" in tier.all_features:
        return None
    kernels = format_kernels(fmt, activation_bits)
    order = kernels.order(1, tier.registers, tier.registers_per_panel)
    trips = _trips(fmt, order)
    text = build_module([("direct1", DOT_ARITY, kernels.direct(1, order))], tier, "counted")
    try:
        counts = count(assembly(text, tier.target), "direct1", trips)
    except ValueError:
        return None
    return fewest_cycles(counts, ZEN4 if "avx512f" in host_features() else ZEN3)


def _trips(fmt: WeightFormat, order: Order) -> tuple[int, ...]:
    """Turns of the kernel's loops, the outermost first: turns of groups, spans of groups that share
    a sum, groups; then panels or, of E4M3, words."""
    groups = K // GROUP
    if fmt.code.name == "e4m3":
        span = e4m3_dot.packed_source(fmt).span
        turns = (groups // TURN_GROUPS,) if order.kept not in (0, PANELS) else ()
        spans = ((TURN_GROUPS if turns else groups) // span,)
        inside = (span,) if span > 1 else ()
        return *turns, *spans, *inside, e4m3_dot.WORDS // E4M3_WORDS
    if order.kept == PANELS:
        return groups, 1
    return (groups // TURN_GROUPS, TURN_GROUPS) if order.kept else (groups, PANELS)


def counted_rate(
    fmt: WeightFormat, tier: Tier, hertz: float, threads: int, activation_bits: int = 16
) -> float | None:
    """The same in 10^9 bytes of weights a second on so many cores of `hertz` cycles a second."""
    counted = counted_cycles(fmt, tier, activation_bits)
    if counted is None:
        return None
    return fmt.nbytes(STRIP_ROWS, K) / counted[1] * hertz * threads / 1e9
