"""ISA tiers: which processor features each needs and how it lowers the ops.

A tier is chosen from the features that CPUID reports, never from the processor's name. To add
one: write the lowerings that its instructions improve, and add a row to `TIERS`. Everything that
a tier does not lower comes from the tier it extends, and at last from the generic lowering.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import llvmlite.binding as llvm

from hybrid_moe.cpu_kernels.dsl import amx, e4m3, neon
from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, Val, join, pieces, vector
from hybrid_moe.cpu_kernels.dsl.ops import (
    OPS,
    Lowering,
    fused,
    half_to_float_native,
    unpack_pair,
    wide_lookup_unsigned,
    wide_split_planes,
    wide_total_planes,
    wide_weights_unsigned,
)
from hybrid_moe.cpu_kernels.dsl.tiles import TILE_OPS
from hybrid_moe.cpu_kernels.jit.compile import Target


@dataclass(frozen=True)
class Tier:
    """One way to lower the vector language.

    Attributes:
        name: the value of `HYBRID_MOE_ISA`.
        features: CPUID features it needs (LLVM's names), all must be present.
        cpu: LLVM's generic processor that has (most of) these features.
        vector_bits: width of a register.
        registers: how many there are; kernels size their register tiles by it.
        lowerings: op name -> lowering, over those of `extends`.
        flushing: ops of `lowerings` whose instruction takes subnormal inputs and results for zero,
            whatever the floating-point control word says.
        machine: `platform.machine()` of the processors that may have it; empty: any.
        tiles: it has a matrix unit, so kernels of tile ops are worth running.
        rewrite: applied to the finished IR text (tests run a tier's IR on other processors).
    """

    name: str
    features: frozenset[str]
    cpu: str
    vector_bits: int
    registers: int
    lowerings: Mapping[str, Lowering] = field(default_factory=dict, hash=False)
    flushing: frozenset[str] = frozenset()
    extends: Tier | None = None
    machine: str = "x86_64"
    tiles: bool = False
    rewrite: Callable[[str], str] | None = None

    def lowering(self, op: str) -> Lowering:
        """How this tier lowers `op`."""
        tier = self._lowers(op)
        if tier is not None:
            return tier.lowerings[op]
        return TILE_OPS[op].lower if op in TILE_OPS else OPS[op].lower

    def flushes(self, op: str) -> bool:
        """Whether `op` takes subnormal inputs and results for zero here (else it keeps them)."""
        tier = self._lowers(op)
        return tier is not None and op in tier.flushing

    def _lowers(self, op: str) -> Tier | None:
        """The tier, of this one and those that it extends, that has the lowering of `op`."""
        tier: Tier | None = self
        while tier is not None and op not in tier.lowerings:
            tier = tier.extends
        return tier

    @property
    def all_features(self) -> frozenset[str]:
        """Its own features and those of the tiers it extends."""
        inherited = self.extends.all_features if self.extends else frozenset()
        return self.features | inherited

    @property
    def target(self) -> Target:
        return Target(self.cpu, ",".join(f"+{name}" for name in sorted(self.all_features)))

    @property
    def registers_per_panel(self) -> int:
        """Registers that 16 lanes of 32 bits take."""
        return max(1, 512 // self.vector_bits)

    def finish(self, ir_text: str) -> str:
        return self.rewrite(ir_text) if self.rewrite else ir_text


@dataclass(frozen=True)
class _Wide:
    """Names of x86's byte instructions at one register width."""

    bits: int
    pshufb: str
    pmaddubsw: str
    pmaddwd: str

    def lookup16(self, emit: Emit, table: tuple[int, ...], index: Val) -> Val:
        """PSHUFB looks 16 bytes up in every 128-bit lane, so the table is repeated."""
        n = self.bits // 8
        repeated = emit.constant(list(table) * (n // 16), I8)
        parts = pieces(index, index.lanes // n)
        return join([emit.intrinsic(self.pshufb, vector(I8, n), repeated, p) for p in parts])

    def e4m3_pairs(self, emit: Emit, codes: Val) -> Val:
        """PSHUFB gives 0 where the index has its top bit: 0x70 more sets it for 16 and beyond."""
        return e4m3.by_nibbles(
            codes, lambda table, m: self.lookup16(emit, table, m), lambda m: m + 0x70
        )

    def byte_dot(self, emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
        """PMADDUBSW sums two products into 16 bits (at most 2 * 24 * 128: no saturation); the
        halves are added modulo 2^16, which is exact because the true sums fit (see ops)."""
        n = self.bits // 8
        broadcast = emit.broadcast(x, n // 4).bits(I8)
        sums = [
            emit.intrinsic(self.pmaddubsw, vector(I16, n // 2), part, broadcast)
            for part in pieces(w, w.lanes // n)
        ]
        return (accumulator.bits(I16) + join(sums)).bits(I32)

    def byte_dot_total(self, emit: Emit, high: Val, low: Val) -> Val:
        """PMADDWD adds the halves and multiplies the upper plane by its 256 at once."""
        n = self.bits // 16
        totals = []
        for plane, weight in ((high, 256), (low, 1)):
            parts = pieces(plane.bits(I16), 32 // n)
            factor = emit.splat(weight, I16, n)
            totals.append(
                join([emit.intrinsic(self.pmaddwd, vector(I32, n // 2), p, factor) for p in parts])
            )
        return totals[0] + totals[1]

    def wide_dot(self, emit: Emit, accumulator: Val, w: Val, first: Val, second: Val) -> Val:
        """PMADDWD over 16-bit words: PMADDUBSW would saturate with weights of a whole byte. Shifts
        widen inputs 0 and 2 of each lane, then 1 and 3."""
        n = self.bits // 16
        words = w.bits(I16)
        for weights, word in (((words << 8).sar(8), first), (words.sar(8), second)):
            x = emit.broadcast(word, n // 2).bits(I16)
            parts = pieces(weights, 32 // n)
            kind = vector(I32, n // 2)
            accumulator = accumulator + join(
                [emit.intrinsic(self.pmaddwd, kind, part, x) for part in parts]
            )
        return accumulator

    def narrow_dot(self, emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
        """PMADDWD as in `wide_dot`, with activations that are widened by the same shifts."""
        n = self.bits // 16
        words, inputs = w.bits(I16), emit.broadcast(x, n // 2).bits(I16)
        for weights, factor in (
            ((words << 8).sar(8), (inputs << 8).sar(8)),
            (words.sar(8), inputs.sar(8)),
        ):
            parts = pieces(weights, 32 // n)
            kind = vector(I32, n // 2)
            accumulator = accumulator + join(
                [emit.intrinsic(self.pmaddwd, kind, part, factor) for part in parts]
            )
        return accumulator


def _halves_bias(emit: Emit, x: Val, offset: int) -> Val:
    """The offset of inputs 0, 1 (mod 4) in the lower 16 bits, of inputs 2, 3 in the upper."""
    wide = x.sext(I32)
    low = emit.reduce("add", wide.shuffle([i for i in range(x.lanes) if i % 4 < 2]))
    high = emit.reduce("add", wide.shuffle([i for i in range(x.lanes) if i % 4 >= 2]))
    return ((high * -offset) << 16) | ((low * -offset) & 0xFFFF)


def _wide_start_planes(emit: Emit, bias: Val) -> Val:
    """Two accumulators, of the high and of the low plane: the bias is whole in the lower one."""
    return emit.splat(0, I32, 16).concat(emit.broadcast(bias, 16))


def _wide_planes(byte_dot: Lowering) -> dict[str, Lowering]:
    """Lowerings for tiers whose `byte_dot` sums in 32 bits and takes any unsigned byte."""

    def dot(emit: Emit, accumulator: Val, w: Val, first: Val, second: Val) -> Val:
        planes = zip(accumulator.halves(), (first, second), strict=True)
        return join([byte_dot(emit, plane, w, x) for plane, x in planes])

    return {
        "narrow_start": lambda emit, bias: emit.broadcast(bias, 16),
        "narrow_dot": byte_dot,
        "wide_split": wide_split_planes,
        "wide_start": _wide_start_planes,
        "wide_weights": wide_weights_unsigned,
        "wide_lookup": wide_lookup_unsigned,
        "wide_dot": dot,
        "wide_total": wide_total_planes,
    }


def _pair_dot_fused(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    w_even, w_odd = unpack_pair(w)
    x_even, x_odd = unpack_pair(emit.broadcast(x, 16))
    return fused(emit, w_even, x_even, fused(emit, w_odd, x_odd, accumulator))


def _byte_dot_avx_vnni(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """VPDPBUSD in its VEX form, which processors without AVX-512 have too."""
    kind, broadcast = vector(I32, 8), emit.broadcast(x, 8)
    pairs = zip(pieces(accumulator, 2), pieces(w.bits(I32), 2), strict=True)
    name = "llvm.x86.avx512.vpdpbusd.256"
    return join([emit.intrinsic(name, kind, a, part, broadcast) for a, part in pairs])


def _byte_dot_vnni(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    kind = vector(I32, 16)
    operands = (accumulator, w.bits(I32), emit.broadcast(x, 16))
    return emit.intrinsic("llvm.x86.avx512.vpdpbusd.512", kind, *operands)


def _pair_dot_bf16(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """VDPBF16PS: subnormal inputs and results are zero, else as `pair_dot` means."""
    operands = (accumulator, w, emit.broadcast(x, 16))
    return emit.intrinsic("llvm.x86.avx512bf16.dpbf16ps.512", accumulator.ir.type, *operands)


def _lookup_low4_vbmi(emit: Emit, table: tuple[int, ...], index: Val) -> Val:
    """VPERMB looks up by six bits of the index; with the table four times the upper two of them do
    not count, and it ignores the rest."""
    repeated = emit.constant(list(table) * 4, I8)
    return emit.intrinsic("llvm.x86.avx512.permvar.qi.512", vector(I8, 64), repeated, index)


def _e4m3_pairs_vbmi(emit: Emit, codes: Val) -> Val:
    """VPERMI2B looks 128 bytes up by seven bits of the index, so the sign does not count."""
    halves = [
        [emit.constant(list(table[at : at + 64]), I8) for at in (0, 64)]
        for table in (e4m3.UPPER, e4m3.LOWER)
    ]
    name = "llvm.x86.avx512.vpermi2var.qi.512"
    upper, lower = (
        emit.intrinsic(name, vector(I8, 64), first, codes, second) for first, second in halves
    )
    return e4m3.spread(upper, lower, codes)


def _times_power_scalef(emit: Emit, value: Val, factor: Val, exponent: Val) -> Val:
    """VSCALEFPS. Zen 4 has it beside the adders, where it leaves dot products their pipes."""
    mask, rounding = emit.splat(-1, I16), emit.splat(4, I32)  # every lane; by MXCSR
    operands = (value, exponent, value, mask, rounding)
    return emit.intrinsic("llvm.x86.avx512.mask.scalef.ps.512", vector(F32, 16), *operands)


_YMM = _Wide(256, "llvm.x86.avx2.pshuf.b", "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd")
_ZMM = _Wide(
    512,
    "llvm.x86.avx512.pshuf.b.512",
    "llvm.x86.avx512.pmaddubs.w.512",
    "llvm.x86.avx512.pmaddw.d.512",
)


def _wide_lowerings(wide: _Wide) -> dict[str, Lowering]:
    return {
        "lookup16": wide.lookup16,
        "byte_dot": wide.byte_dot,
        "byte_dot_bias": _halves_bias,
        "byte_dot_total": wide.byte_dot_total,
        "wide_dot": wide.wide_dot,
        "narrow_dot": wide.narrow_dot,
        "half_to_float": half_to_float_native,
        "e4m3_pairs": wide.e4m3_pairs,
        "pair_dot": _pair_dot_fused,
    }


_VBMI_LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {"lookup_low4": _lookup_low4_vbmi, "e4m3_pairs": _e4m3_pairs_vbmi}
)

PORTABLE = Tier("portable", frozenset(), "", vector_bits=128, registers=16, machine="")

NEON = Tier(
    "neon",
    frozenset({"neon"}),
    "",
    vector_bits=128,
    registers=32,
    lowerings={**neon.LOWERINGS, "pair_dot": _pair_dot_fused},
    machine="aarch64",
)

NEON_DOTPROD = Tier(
    "neon_dotprod",
    frozenset({"dotprod"}),
    "",
    vector_bits=128,
    registers=32,
    lowerings=neon.SDOT_LOWERINGS,
    extends=NEON,
    machine="aarch64",
)

AVX2 = Tier(
    "avx2",
    frozenset({"avx2", "f16c", "fma"}),
    "x86-64-v3",
    vector_bits=256,
    registers=16,
    lowerings=_wide_lowerings(_YMM),
)

AVX2_VNNI = Tier(
    "avx2_vnni",
    frozenset({"avxvnni"}),
    "x86-64-v3",
    vector_bits=256,
    registers=16,
    lowerings={name: OPS[name].lower for name in ("byte_dot_bias", "byte_dot_total")}
    | {"byte_dot": _byte_dot_avx_vnni, **_wide_planes(_byte_dot_avx_vnni)},
    extends=AVX2,
)

AVX512 = Tier(
    "avx512",
    frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512cd"}),
    "x86-64-v4",
    vector_bits=512,
    registers=32,
    lowerings=_wide_lowerings(_ZMM),
    extends=AVX2,
)

AVX512_VNNI = Tier(
    "avx512_vnni",
    frozenset({"avx512vnni"}),
    "x86-64-v4",
    vector_bits=512,
    registers=32,
    lowerings={name: OPS[name].lower for name in ("byte_dot_bias", "byte_dot_total")}
    | {"byte_dot": _byte_dot_vnni, **_wide_planes(_byte_dot_vnni)},
    extends=AVX512,
)

AVX512_BF16 = Tier(
    "avx512_bf16",
    frozenset({"avx512bf16"}),
    "x86-64-v4",
    vector_bits=512,
    registers=32,
    lowerings={"pair_dot": _pair_dot_bf16},
    flushing=frozenset({"pair_dot"}),
    extends=AVX512_VNNI,
)

AVX512_VBMI = Tier(
    "avx512_vbmi",
    frozenset({"avx512vbmi"}),
    "x86-64-v4",
    vector_bits=512,
    registers=32,
    lowerings={**_VBMI_LOWERINGS, "times_power": _times_power_scalef},
    extends=AVX512_BF16,
)

_TILE_FEATURES = frozenset({"amx-tile", "amx-int8", "amx-bf16"})

AMX = Tier(
    "amx",
    _TILE_FEATURES | {"avx512vbmi"},
    "x86-64-v4",
    vector_bits=512,
    registers=32,
    lowerings={**amx.LOWERINGS, **_VBMI_LOWERINGS},
    flushing=frozenset({"tile_dot_pairs"}),
    extends=AVX512_BF16,
    tiles=True,
)

_ALL = (
    *(PORTABLE, NEON, NEON_DOTPROD),
    *(AVX2, AVX2_VNNI, AVX512, AVX512_VNNI, AVX512_BF16, AVX512_VBMI, AMX),
)
TIERS: Mapping[str, Tier] = MappingProxyType({t.name: t for t in _ALL})
"""Every tier, least capable first."""


@dataclass(frozen=True)
class TierReport:
    """Whether this processor can run a tier, and which features it lacks."""

    tier: Tier
    missing: tuple[str, ...]

    @property
    def usable(self) -> bool:
        return not self.missing


@functools.lru_cache(maxsize=1)
def host_features() -> frozenset[str]:
    """Features that this processor and operating system offer (CPUID and XCR0, through LLVM; tile
    registers only where the system grants them)."""
    found = frozenset(name for name, present in llvm.get_host_cpu_features().items() if present)
    found |= neon.unreported_features()
    return found if not found >= _TILE_FEATURES or amx.permitted() else found - _TILE_FEATURES


def available_tiers() -> list[TierReport]:
    """Every tier with what this processor lacks for it, least capable first."""
    host = host_features()
    return [TierReport(t, tuple(sorted(t.all_features - host))) for t in TIERS.values()]


def best_tier() -> Tier:
    """The most capable tier that runs here."""
    return next(report.tier for report in reversed(available_tiers()) if report.usable)


def choose_tier(name: str | None = None) -> Tier:
    """The tier to use: `name`, else `HYBRID_MOE_ISA`, else the most capable that runs here.

    Raises:
        ValueError: no such tier, or this processor lacks features that it needs.
    """
    reports = available_tiers()
    wanted = name or os.environ.get("HYBRID_MOE_ISA") or None
    if wanted is None:
        return best_tier()
    source = "isa=" if name else "HYBRID_MOE_ISA="
    for report in reports:
        if report.tier.name == wanted.lower():
            if not report.usable:
                raise ValueError(
                    f"{source}{wanted}: this processor lacks {', '.join(report.missing)}; "
                    f"usable here: {', '.join(r.tier.name for r in reports if r.usable)}"
                )
            return report.tier
    raise ValueError(f"{source}{wanted}: no such tier; there are {', '.join(TIERS)}")
