"""The aarch64 path, by the assembly that it gets: no such processor is needed.

LLVM compiles the kernels of the portable tier and of aarch64's own for it, and what it makes of
them is counted: a generic vector that has no instruction there would show up as single lanes, as a
call of a library function, or as scalar arithmetic.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import llvmlite.binding as llvm
import pytest

from hybrid_moe.cpu_kernels.drivers import drivers_ir, intrinsics
from hybrid_moe.cpu_kernels.dsl import neon
from hybrid_moe.cpu_kernels.dsl.emit import build_module
from hybrid_moe.cpu_kernels.dsl.tiers import NEON, NEON_DOTPROD, PORTABLE, Tier
from hybrid_moe.cpu_kernels.jit.compile import optimize
from hybrid_moe.cpu_kernels.kernels.library import functions_of
from hybrid_moe.formats.table import DENSE_FORMATS

TRIPLE = "aarch64-unknown-linux-gnu"


@functools.cache
def _target() -> llvm.Target | None:
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        return llvm.Target.from_triple(TRIPLE)
    except RuntimeError:
        return None


pytestmark = pytest.mark.skipif(_target() is None, reason="this LLVM cannot compile for aarch64")


def _assembly(ir_text: str, features: str = "") -> Mapping[str, str]:
    """Function -> its assembly, compiled as `jit.compile` does."""
    target = _target()
    assert target is not None
    machine = target.create_target_machine(
        features=features, opt=3, reloc="pic", codemodel="jitdefault", jit=True
    )
    module = llvm.parse_assembly(ir_text)
    module.triple = machine.triple
    module.verify()
    optimize(module, machine)
    parts = re.split(r"^(\w[\w.]*):.*$", machine.emit_assembly(module), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@functools.cache
def _kernels(fmt: str, tier: Tier) -> Mapping[str, str]:
    return _assembly(build_module(functions_of(fmt, tier), tier, "aarch64"), tier.target.features)


_VECTOR = re.compile(r"\bv\d+(\.\d*[bhsd])?\b|\bq\d+\b")
_LANE_OUT = re.compile(r"^\s(?:[us]mov\s|f?mov\s+[wx]\d+, (?:v\d+\.|[bhsdq]\d))")
_LANE_IN = re.compile(r"^\s(?:ins|mov)\s+v\d+\.(?:[bhs]\[|d\[\d\], x)")  # not: joining halves
_CALL = re.compile(r"^\s(?:bl|blr)\s")
_SCALAR_FLOAT = re.compile(r"^\sf\w+\s+[sd]\d+")


@dataclass(frozen=True)
class _Counts:
    instructions: int
    vector: int
    lanes_out: int
    lanes_in: int
    scalar_floats: int


def _count(text: str) -> _Counts:
    lines = [line for line in text.splitlines() if re.match(r"\s[a-z]", line)]

    def matching(pattern: re.Pattern[str]) -> int:
        return sum(bool(pattern.search(line)) for line in lines)

    return _Counts(
        len(lines),
        matching(_VECTOR),
        matching(_LANE_OUT),
        matching(_LANE_IN),
        matching(_SCALAR_FLOAT),
    )


_TIERS = (PORTABLE, NEON, NEON_DOTPROD)
Kernels = pytest.mark.parametrize(
    ("fmt", "tier", "name"),
    [
        (fmt, t, name)
        for fmt in DENSE_FORMATS
        for t in _TIERS
        for name, _, _ in functions_of(fmt, t)
    ],
    ids=lambda value: value.name if isinstance(value, Tier) else value,
)

_SCALARS = {
    ("MXFP4", "encode"): (3, 6),
    ("MXFP4", "activate"): (3, 6),
    ("INT8", "encode"): (2, 6),
    ("INT8", "activate"): (2, 6),
    ("BF16", "activate"): (0, 1),
    ("BF16", "direct1"): (0, 1),
    **{(fmt, "deliver"): (1, 1) for fmt in DENSE_FORMATS},
}
"""Kernel -> lanes that leave their vector, scalar instructions on floats. A group that is encoded
in fixed point has a maximum and two biases (INT8: one), reductions by nature, and a step that is
the product of two powers of two, or NaN, as is its exponent; the limit of the activation is negated
once; one address is kept in a vector register; rows of a panel that is not whole are delivered one
by one."""


@Kernels
def test_vectors_stay_vectors(fmt: str, tier: Tier, name: str) -> None:
    counts = _count(_kernels(fmt, tier)[name])
    lanes, floats = _SCALARS.get((fmt, name), (0, 0))
    assert counts.vector > 0
    assert counts.lanes_in == 0
    assert counts.lanes_out <= lanes
    assert counts.scalar_floats <= floats


@Kernels
def test_most_instructions_are_vector_instructions(fmt: str, tier: Tier, name: str) -> None:
    """Addresses, loop counters and prefetches are fewer than a third; copies (encoding BF16,
    gathering, float32 sums as they are) and clearing are loops around a few instructions. INT8
    decodes nothing and splits nothing into planes, so what it has of them is a larger part: up to
    two fifths."""
    counts = _count(_kernels(fmt, tier)[name])
    if (fmt, name) == ("BF16", "encode") or name in ("clear", "finish_float", "gather"):
        assert counts.vector >= 4
    elif fmt == "INT8":
        assert 5 * counts.vector >= 3 * counts.instructions
    else:
        assert 3 * counts.vector >= 2 * counts.instructions


@Kernels
def test_no_library_function_is_called(fmt: str, tier: Tier, name: str) -> None:
    assert not [line for line in _kernels(fmt, tier)[name].splitlines() if _CALL.match(line)]


@pytest.mark.parametrize("fmt", DENSE_FORMATS)
def test_portable_kernels_name_no_processor(fmt: str) -> None:
    text = build_module(functions_of(fmt, PORTABLE), PORTABLE, "aarch64")
    assert not re.findall(r"llvm\.(?:x86|aarch64)\.", text)
    assert not re.search(r"%[xyz]mm|%r[a-ds]", "".join(_kernels(fmt, PORTABLE).values()))


@pytest.mark.parametrize(
    ("fmt", "tier", "kernel", "counts"),
    [
        # 8 vectors of weight bytes a panel, of 4 registers each, meet two planes
        ("MXFP4", NEON, "direct1", {"smull": 128, "addp": 64, "sadalp": 64}),
        ("MXFP4", NEON, "tiled2", {"smull": 2 * 128, "addp": 2 * 64, "sadalp": 2 * 64}),
        ("MXFP4", NEON_DOTPROD, "direct1", {"sdot": 64}),
        ("MXFP4", NEON_DOTPROD, "tiled3", {"sdot": 3 * 64}),
        # and scale bytes, widened to 16 registers of 32-bit lanes
        ("MXFP4", NEON, "unpack", {"tbl": 128 + 16}),
        ("MXFP4", NEON_DOTPROD, "unpack", {"tbl": 128 + 16}),
        # 16 scales of a panel, 4 at a time; q in words of 16 bits, 4 products of 4 rows each
        ("INT8", NEON, "direct1", {"mul": 4, "mla": 128 - 4, "fcvtl": 4}),
        ("INT8", NEON_DOTPROD, "direct3", {"sdot": 3 * 64, "fcvtl": 4}),
        # E4M3, two words of two panels in a loop's body, and of the other two: three lookups a
        # register of codes, then two pairs of products of 16 rows; no single lanes anywhere
        ("FP8", NEON, "direct1", {"tbl": 2 * 4 * 3 * 4, "fmla": 2 * 4 * 4 * 4, "umov": 0}),
        ("FP8", NEON, "tiled2", {"tbl": 0, "fmla": 2 * 2 * 4 * 4 * 4, "umov": 0}),
        ("FP8", NEON, "unpack", {"tbl": 4 * 3 * 4, "umov": 0, "ins": 0}),
    ],
    ids=lambda value: value.name if isinstance(value, Tier) else None,
)
def test_a_group_takes_the_instructions_of_its_tier(
    fmt: str, tier: Tier, kernel: str, counts: dict[str, int]
) -> None:
    found = Counter(re.findall(r"^\s([a-z]\w*)", _kernels(fmt, tier)[kernel], re.M))
    assert {mnemonic: found[mnemonic] + found[f"{mnemonic}2"] for mnemonic in counts} == counts


@pytest.mark.parametrize("hwcap", [0, 1 << 20, 0xFFFFFFFF])
def test_dotprod_is_read_from_the_system(hwcap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Libc:
        class getauxval:  # noqa: N801
            restype: object
            argtypes: object

            def __new__(cls, key: int) -> int:  # type: ignore[misc]
                asked.append(key)
                return hwcap

    monkeypatch.setattr(neon.ctypes, "CDLL", lambda name: Libc)
    monkeypatch.setattr(neon.platform, "machine", lambda: "aarch64")
    assert neon.unreported_features() == ({"dotprod"} if hwcap & (1 << 20) else set())
    assert asked == [16], "AT_HWCAP"
    monkeypatch.setattr(neon.platform, "machine", lambda: "x86_64")
    assert neon.unreported_features() == set()


def test_the_counts_see_scalar_code() -> None:
    """The same checks on a loop over single lanes, so that they can fail."""
    text = """
declare float @expf(float)
define void @lanes(ptr %p) {
  %v = load <4 x float>, ptr %p
  %a = extractelement <4 x float> %v, i32 2
  %b = call float @expf(float %a)
  %c = fmul float %b, %a
  %w = insertelement <4 x float> %v, float %c, i32 1
  %i = bitcast <4 x float> %w to <4 x i32>
  %x = extractelement <4 x i32> %i, i32 3
  store <4 x float> %w, ptr %p
  %q = getelementptr i8, ptr %p, i64 64
  store i32 %x, ptr %q
  ret void
}"""
    body = _assembly(text)["lanes"]
    counts = _count(body)
    assert counts.lanes_in and counts.scalar_floats
    assert any(_CALL.match(line) for line in body.splitlines())


# drivers


def test_drivers_compile_for_aarch64(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is particular to a processor is behind one switch: spin hint, control word of floats."""
    monkeypatch.setattr(intrinsics, "_X86", False)
    text = drivers_ir()
    assert set(re.findall(r"llvm\.(?:x86|aarch64)\.[\w.]+", text)) == {
        "llvm.aarch64.hint",
        "llvm.aarch64.get.fpcr",
        "llvm.aarch64.set.fpcr",
    }
    code = "".join(_assembly(text).values())
    for instruction in (r"\syield\b", r"\smrs\s+x\d+, FPCR", r"\smsr\s+FPCR, x"):
        assert re.search(instruction, code)
    called = set(re.findall(r"\sbl\s+(?!\.)(\w+)", code))
    assert {"syscall", "clock_gettime"} <= called
