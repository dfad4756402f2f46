"""What the compiler makes of the dot kernels: sums, planes and weights stay in registers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import pytest

from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier
from hybrid_moe.cpu_kernels.jit.compile import assembly
from hybrid_moe.cpu_kernels.kernels.library import functions_of
from hybrid_moe.formats.table import DENSE_FORMATS

_LABEL = re.compile(r"^(\.?\w+):")
_JUMP = re.compile(r"^\tj\w+\s+(\.\w+)$")
_SPILL = re.compile(r"%[xyz]mm\d+, -?\d*\(%r[sb]p\)$")

TIGHT: Mapping[tuple[str, str, str], int] = {
    # lines in order, so planes of four panels: 16 registers and eight of sums, of which 16 exist
    ("avx2", "MXFP4", "direct1"): 61,
    ("avx2", "INT8", "direct1"): 9,
    ("avx2_vnni", "MXFP4", "direct1"): 108,
    ("avx2_vnni", "INT8", "direct1"): 72,
    # 12 half panels of planes, of codes even and odd two each: all 16 registers before any product
    ("avx2", "MXFP4", "direct3"): 25,
    ("avx2_vnni", "MXFP4", "direct3"): 18,
    ("avx2_vnni", "INT8", "direct3"): 12,
    # a mask before each lookup, two multiplications more a dot product
    ("avx512", "MXFP4", "direct2"): 2,
    ("avx512", "MXFP4", "direct4"): 6,
    ("avx512", "MXFP4", "direct5"): 2,
    ("avx512", "MXFP4", "direct6"): 5,
    ("avx512_vnni", "MXFP4", "direct4"): 1,
    ("avx512_vnni", "MXFP4", "direct6"): 1,
    ("avx512_bf16", "MXFP4", "direct4"): 1,
    ("avx512_bf16", "MXFP4", "direct6"): 1,
    # pairs are widened: 24 sums, and even and odd of weights and inputs
    ("avx512", "BF16", "direct6"): 3,
    ("avx512_vnni", "BF16", "direct6"): 3,
}
"""Kernels that store a vector in an inner loop because their registers are full, and how many."""

X86 = [
    tier
    for tier in TIERS.values()
    # of the 16 registers of `portable` a panel takes four, and a lookup is a tree of selects
    if tier.machine == "x86_64" and not tier.tiles
]


def _dot_kernels(fmt: str, tier: Tier, bits: int = 16) -> dict[str, list[str]]:
    """Dot kernel -> its lines of assembly."""
    text = assembly(build_module(functions_of(fmt, tier, bits), tier, "dots"), tier.target)
    parts = re.split(r"^(\w+):.*$", text, flags=re.M)
    bodies = zip(parts[1::2], parts[2::2], strict=True)
    return {n: b.splitlines() for n, b in bodies if re.fullmatch(r"(direct|tiled)\d", n)}


def _inner_loops(lines: Sequence[str]) -> list[Sequence[str]]:
    """The loops that have no loop in them: from a label to a jump back to it."""
    at = {found[1]: i for i, line in enumerate(lines) if (found := _LABEL.match(line))}
    jumps = [(i, found[1]) for i, line in enumerate(lines) if (found := _JUMP.match(line))]
    loops = [(at[to], i) for i, to in jumps if at.get(to, i) < i]
    return [
        lines[begin : end + 1]
        for begin, end in loops
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in loops)
    ]


@pytest.mark.parametrize("tier", X86, ids=lambda tier: tier.name)
@pytest.mark.parametrize("fmt", DENSE_FORMATS)
def test_nothing_is_spilled_in_inner_loops(fmt: str, tier: Tier) -> None:
    for name, lines in _dot_kernels(fmt, tier).items():
        loops = _inner_loops(lines)
        assert loops, name
        spilled = max(sum(bool(_SPILL.search(line)) for line in loop) for loop in loops)
        assert spilled <= TIGHT.get((tier.name, fmt, name), 0), name


@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("fmt", ["INT4_G128_BF16", "INT4_ROW_FLOAT32", "INT8_ROW_FLOAT32"])
def test_nothing_is_spilled_where_other_scales_are_multiplied(fmt: str, bits: int) -> None:
    """Blocks, fields of rows, and activations of 8 bits, on the tier of the measured processor."""
    for name, lines in _dot_kernels(fmt, TIERS["avx512_vbmi"], bits).items():
        loops = _inner_loops(lines)
        assert loops, name
        assert not any(_SPILL.search(line) for loop in loops for line in loop), name


def test_a_spill_is_seen() -> None:
    code = """
.outer:
\tvmovaps\t%zmm1, 64(%rsp)
.inner:
\tvmovaps\t%zmm2, -64(%rsp)
\tvmovaps\t64(%rsp), %zmm1
\tvmovaps\t%zmm2, 64(%rdi)
\tjl\t.inner
\tjl\t.outer""".splitlines()
    (loop,) = _inner_loops(code)
    assert [line for line in loop if _SPILL.search(line)] == ["\tvmovaps\t%zmm2, -64(%rsp)"]
