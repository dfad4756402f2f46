"""Ops as aarch64 instructions.

Every aarch64 processor has vectors of 128 bits (Neon); most since Armv8.2 also have SDOT.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Mapping
from types import MappingProxyType

from hybrid_moe.cpu_kernels.dsl import e4m3
from hybrid_moe.cpu_kernels.dsl.emit import I8, I16, I32, Emit, Val, join, pieces, vector
from hybrid_moe.cpu_kernels.dsl.ops import (
    Lowering,
    half_to_float_native,
    wide_split_planes,
    wide_total_planes,
)

_AT_HWCAP = 16
_HWCAP_ASIMDDP = 1 << 20


def unreported_features() -> frozenset[str]:
    """Features that LLVM does not find by itself: it knows `dotprod` only of processors whose name
    it knows. Linux states it in the auxiliary vector (Documentation/arch/arm64/elf_hwcaps.rst)."""
    if platform.machine() != "aarch64":
        return frozenset()
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.restype, getauxval.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return frozenset({"dotprod"} if getauxval(_AT_HWCAP) & _HWCAP_ASIMDDP else ())


def _lookup16(emit: Emit, table: tuple[int, ...], index: Val) -> Val:
    """TBL looks 16 bytes up in a register."""
    constant, kind = emit.constant(list(table), I8), vector(I8, 16)
    name = "llvm.aarch64.neon.tbl1.v16i8"
    return join([emit.intrinsic(name, kind, constant, p) for p in pieces(index, index.lanes // 16)])


def _e4m3_pairs(emit: Emit, codes: Val) -> Val:
    """TBL gives 0 where the index is beyond its 16 bytes."""
    return e4m3.by_nibbles(codes, lambda table, m: _lookup16(emit, table, m), lambda m: m)


def _byte_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """SMULL, ADDP and SADALP: weights are below 128, so they are signed bytes too, and the sum of
    two products (at most 2 * 24 * 128 in magnitude) fits 16 bits."""
    low, high = (half.sext(I16) for half in emit.broadcast(x, 4).bits(I8).halves())
    sums = []
    for part in pieces(w, w.lanes // 16):
        first, second = (half.sext(I16) for half in part.halves())
        products = (first * low, second * high)
        pairs = emit.intrinsic("llvm.aarch64.neon.addp.v8i16", vector(I16, 8), *products)
        sums.append(emit.intrinsic("llvm.aarch64.neon.saddlp.v4i32.v8i16", vector(I32, 4), pairs))
    return accumulator + join(sums)


def _byte_dot_sdot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """SDOT does all of it: weights are signed bytes, those of `byte_dot` too, as they are below
    128."""
    kind, broadcast = vector(I32, 4), emit.broadcast(x, 4).bits(I8)
    name, count = "llvm.aarch64.neon.sdot.v4i32.v16i8", accumulator.lanes // 4
    pairs = zip(pieces(accumulator, count), pieces(w, count), strict=True)
    return join([emit.intrinsic(name, kind, a, part, broadcast) for a, part in pairs])


def _wide_start(emit: Emit, bias: Val) -> Val:
    """Accumulators of the high and of the low plane; signed weights need no bias."""
    return emit.splat(0, I32, 32)


def _wide_dot_sdot(emit: Emit, accumulator: Val, w: Val, first: Val, second: Val) -> Val:
    high, low = accumulator.halves()
    return _byte_dot_sdot(emit, high, w, first).concat(_byte_dot_sdot(emit, low, w, second))


LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {
        "lookup16": _lookup16,
        "byte_dot": _byte_dot,
        "half_to_float": half_to_float_native,
        "e4m3_pairs": _e4m3_pairs,
    },
)
SDOT_LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {
        "byte_dot": _byte_dot_sdot,
        "narrow_dot": _byte_dot_sdot,
        "wide_split": wide_split_planes,
        "wide_start": _wide_start,
        "wide_dot": _wide_dot_sdot,
        "wide_total": wide_total_planes,
    }
)
