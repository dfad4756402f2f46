"""Run a tier's code on a processor that lacks its instructions.

A tier's instructions appear in the IR as calls of LLVM's target intrinsics. `emulated(tier)` is the
same tier (same lowerings, same register tiles) whose finished IR calls, in place of each intrinsic,
a function with the same signature that computes it from generic LLVM operations, after Intel's
Software Developer's Manual, volume 2, and Arm's Architecture Reference Manual, chapter C7. So what
runs in the tests is the code that the tier emits, up to the instruction selection of the last step.
`test_emulation` holds every body against a NumPy model and, where the processor has it, against the
instruction.
"""

from __future__ import annotations

import dataclasses
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from hybrid_moe.cpu_kernels.dsl.ops import Lowering
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier, available_tiers, host_features
from tests.cpu_kernels.amx import amx_tier

PREFIX = "emulated."
_FLOOR = 'declare <16 x float> @"llvm.floor.v16f32"(<16 x float>)'
_FMA = 'declare <16 x float> @"llvm.fma.v16f32"(<16 x float>, <16 x float>, <16 x float>)'


@dataclass(frozen=True)
class Instruction:
    """An instruction and its emulation.

    Attributes:
        intrinsic: LLVM's name.
        mnemonic: Intel's.
        features: what a processor needs to have it.
        result, operands: LLVM types, in the intrinsic's order.
        body: the emulating function's blocks, over the operands %a, %b, %c, %d, %e.
        needs: declarations that the body uses.
        immediates: values of the last operands, which are constants: every lane, rounding by MXCSR.
    """

    intrinsic: str
    mnemonic: str
    features: frozenset[str]
    result: str
    operands: tuple[str, ...]
    body: str
    needs: str = ""
    immediates: tuple[int, ...] = ()

    @property
    def definition(self) -> str:
        parameters = ", ".join(
            f"{kind} %{n}" for kind, n in zip(self.operands, "abcde", strict=False)
        )
        head = f'define internal {self.result} @"{PREFIX}{self.intrinsic}"({parameters}) noinline'
        return f"{head} {{\n{self.body}\n}}"


def _mask(indices: Sequence[int]) -> str:
    return f"<{len(indices)} x i32> <{', '.join(f'i32 {i}' for i in indices)}>"


def _take(name: str, source: str, kind: str, indices: Sequence[int]) -> str:
    return f"  %{name} = shufflevector {kind} %{source}, {kind} poison, {_mask(indices)}\n"


def _pshufb(n: int) -> str:
    """PSHUFB: within each 16 bytes, 0 where bit 7 of the index is set, else table[index & 15]."""
    return f"""entry:
  %table = alloca <{n} x i8>, align 64
  %index = alloca <{n} x i8>, align 64
  %out = alloca <{n} x i8>, align 64
  store <{n} x i8> %a, ptr %table
  store <{n} x i8> %b, ptr %index
  br label %byte
byte:
  %i = phi i64 [ 0, %entry ], [ %next, %byte ]
  %index_at = getelementptr i8, ptr %index, i64 %i
  %control = load i8, ptr %index_at
  %low = and i8 %control, 15
  %within = zext i8 %low to i64
  %lane = and i64 %i, -16
  %from = or i64 %lane, %within
  %table_at = getelementptr i8, ptr %table, i64 %from
  %found = load i8, ptr %table_at
  %zero = icmp slt i8 %control, 0
  %value = select i1 %zero, i8 0, i8 %found
  %out_at = getelementptr i8, ptr %out, i64 %i
  store i8 %value, ptr %out_at
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, {n}
  br i1 %more, label %byte, label %done
done:
  %result = load <{n} x i8>, ptr %out
  ret <{n} x i8> %result"""


def _vpermb() -> str:
    """VPERMB: table[index & 63]."""
    looked_up = _pshufb(64).replace("%low = and i8 %control, 15", "%low = and i8 %control, 63")
    looked_up = looked_up.replace("%lane = and i64 %i, -16", "%lane = and i64 %i, 0")
    return looked_up.replace("icmp slt i8 %control, 0", "icmp ult i8 %control, 0")


def _vpermi2b() -> str:
    """VPERMI2B: of two tables, the one that bit 6 of the index says, at index & 63."""
    return """entry:
  %table = alloca <128 x i8>, align 64
  %index = alloca <64 x i8>, align 64
  %out = alloca <64 x i8>, align 64
  %second = getelementptr i8, ptr %table, i64 64
  store <64 x i8> %a, ptr %table
  store <64 x i8> %c, ptr %second
  store <64 x i8> %b, ptr %index
  br label %byte
byte:
  %i = phi i64 [ 0, %entry ], [ %next, %byte ]
  %index_at = getelementptr i8, ptr %index, i64 %i
  %control = load i8, ptr %index_at
  %low = and i8 %control, 127
  %from = zext i8 %low to i64
  %table_at = getelementptr i8, ptr %table, i64 %from
  %found = load i8, ptr %table_at
  %out_at = getelementptr i8, ptr %out, i64 %i
  store i8 %found, ptr %out_at
  %next = add i64 %i, 1
  %more = icmp ult i64 %next, 64
  br i1 %more, label %byte, label %done
done:
  %result = load <64 x i8>, ptr %out
  ret <64 x i8> %result"""


def _vscalefps() -> str:
    """VSCALEFPS of every lane: a * 2^floor(b) in one rounding. In two halves, which float64's range
    holds exactly, since beyond 600 every result is zero or infinite."""
    floats, wide = "<16 x float>", "<16 x double>"

    def all_lanes(value: float) -> str:
        (bits,) = struct.unpack("<Q", struct.pack("<d", value))
        return f"<{', '.join([f'double 0x{bits:016X}'] * 16)}>"

    return (
        f'entry:\n  %whole = call {floats} @"llvm.floor.v16f32"({floats} %b)\n'
        f"  %x = fpext {floats} %a to {wide}\n"
        f"  %n = fpext {floats} %whole to {wide}\n"
        f"  %above = fcmp ogt {wide} %n, {all_lanes(600)}\n"
        f"  %capped = select <16 x i1> %above, {wide} {all_lanes(600)}, {wide} %n\n"
        f"  %below = fcmp olt {wide} %capped, {all_lanes(-600)}\n"
        f"  %kept = select <16 x i1> %below, {wide} {all_lanes(-600)}, {wide} %capped\n"
        f"  %is.nan = fcmp uno {wide} %kept, %kept\n"
        f"  %known = select <16 x i1> %is.nan, {wide} zeroinitializer, {wide} %kept\n"
        "  %exponent = fptosi <16 x double> %known to <16 x i64>\n"
        f"  %biased = add <16 x i64> %exponent, <{', '.join(['i64 1023'] * 16)}>\n"
        f"  %finite.bits = shl <16 x i64> %biased, <{', '.join(['i64 52'] * 16)}>\n"
        f"  %finite = bitcast <16 x i64> %finite.bits to {wide}\n"
        f"  %is.least = fcmp oeq {wide} %n, {all_lanes(-math.inf)}\n"
        f"  %is.most = fcmp oeq {wide} %n, {all_lanes(math.inf)}\n"
        f"  %low = select <16 x i1> %is.least, {wide} zeroinitializer, {wide} %finite\n"
        f"  %power = select <16 x i1> %is.most, {wide} %n, {wide} %low\n"
        f"  %scaled = fmul {wide} %x, %power\n"
        f"  %rounded = fptrunc {wide} %scaled to {floats}\n"
        f"  %result = select <16 x i1> %is.nan, {floats} %b, {floats} %rounded\n"
        f"  %raw = bitcast {floats} %a to <16 x i32>\n"
        f"  %kind = and <16 x i32> %raw, <{', '.join([f'i32 {0x7FC00000}'] * 16)}>\n"
        f"  %is.quiet = icmp eq <16 x i32> %kind, <{', '.join([f'i32 {0x7FC00000}'] * 16)}>\n"
        "  %is.infinite = or <16 x i1> %is.least, %is.most\n"
        "  %is.special = and <16 x i1> %is.quiet, %is.infinite\n"
        f"  %limit = fptrunc {wide} %power to {floats}\n"
        f"  %all = select <16 x i1> %is.special, {floats} %limit, {floats} %result\n"
        f"  ret {floats} %all"
    )


def _pmaddubsw(n: int) -> str:
    """PMADDUBSW: a unsigned, b signed; the sum of two neighbouring products, saturated to int16."""
    half = n // 2
    wide = f"<{half} x i32>"
    text = "entry:\n"
    for parity, indices in enumerate((range(0, n, 2), range(1, n, 2))):
        text += _take(f"a{parity}", "a", f"<{n} x i8>", indices)
        text += _take(f"b{parity}", "b", f"<{n} x i8>", indices)
        text += f"  %u{parity} = zext <{half} x i8> %a{parity} to {wide}\n"
        text += f"  %s{parity} = sext <{half} x i8> %b{parity} to {wide}\n"
        text += f"  %p{parity} = mul {wide} %u{parity}, %s{parity}\n"
    most = ", ".join(["i32 32767"] * half)
    least = ", ".join(["i32 -32768"] * half)
    return text + (
        f"  %sum = add {wide} %p0, %p1\n"
        f"  %above = icmp sgt {wide} %sum, <{most}>\n"
        f"  %capped = select <{half} x i1> %above, {wide} <{most}>, {wide} %sum\n"
        f"  %below = icmp slt {wide} %capped, <{least}>\n"
        f"  %kept = select <{half} x i1> %below, {wide} <{least}>, {wide} %capped\n"
        f"  %result = trunc {wide} %kept to <{half} x i16>\n"
        f"  ret <{half} x i16> %result"
    )


def _pmaddwd(n: int) -> str:
    """PMADDWD: the sum of two neighbouring products of int16, modulo 2^32."""
    half = n // 2
    wide = f"<{half} x i32>"
    text = "entry:\n"
    for parity, indices in enumerate((range(0, n, 2), range(1, n, 2))):
        for operand in "ab":
            text += _take(f"{operand}{parity}", operand, f"<{n} x i16>", indices)
            text += f"  %{operand}w{parity} = sext <{half} x i16> %{operand}{parity} to {wide}\n"
        text += f"  %p{parity} = mul {wide} %aw{parity}, %bw{parity}\n"
    return text + f"  %result = add {wide} %p0, %p1\n  ret {wide} %result"


def _vpdpbusd(n: int) -> str:
    """VPDPBUSD: a + four products of unsigned (b) by signed (c) bytes, modulo 2^32."""
    wide, narrow = f"<{n // 4} x i32>", f"<{n} x i8>"
    text = f"entry:\n  %bb = bitcast {wide} %b to {narrow}\n  %cb = bitcast {wide} %c to {narrow}\n"
    total = "a"
    for i in range(4):
        text += _take(f"b{i}", "bb", narrow, range(i, n, 4))
        text += _take(f"c{i}", "cb", narrow, range(i, n, 4))
        text += f"  %u{i} = zext <{n // 4} x i8> %b{i} to {wide}\n"
        text += f"  %s{i} = sext <{n // 4} x i8> %c{i} to {wide}\n"
        text += f"  %p{i} = mul {wide} %u{i}, %s{i}\n"
        text += f"  %t{i} = add {wide} %{total}, %p{i}\n"
        total = f"t{i}"
    return text + f"  ret {wide} %{total}"


def _tbl() -> str:
    """TBL: table[index], or 0 for an index beyond its 16 bytes."""
    return _pshufb(16).replace(
        "%zero = icmp slt i8 %control, 0", "%zero = icmp ugt i8 %control, 15"
    )


def _pairwise_halves(kind: str, n: int) -> str:
    """ADDP: sums of neighbours of a, then of b, modulo the lane."""
    both, wide = f"<{2 * n} x {kind}>", f"<{n} x {kind}>"
    return (
        f"entry:\n  %ab = shufflevector {wide} %a, {wide} %b, {_mask(range(2 * n))}\n"
        + _take("even", "ab", both, range(0, 2 * n, 2))
        + _take("odd", "ab", both, range(1, 2 * n, 2))
        + f"  %result = add {wide} %even, %odd\n  ret {wide} %result"
    )


def _saddlp() -> str:
    """SADDLP: sums of neighbours, in lanes of twice the width."""
    text = "entry:\n"
    for parity in range(2):
        text += _take(f"h{parity}", "a", "<8 x i16>", range(parity, 8, 2))
        text += f"  %w{parity} = sext <4 x i16> %h{parity} to <4 x i32>\n"
    return text + "  %result = add <4 x i32> %w0, %w1\n  ret <4 x i32> %result"


def _sdot() -> str:
    """SDOT: a + four products of signed bytes, modulo 2^32."""
    text, total = "entry:\n", "a"
    for i in range(4):
        for operand in "bc":
            text += _take(f"{operand}{i}", operand, "<16 x i8>", range(i, 16, 4))
            text += f"  %{operand}w{i} = sext <4 x i8> %{operand}{i} to <4 x i32>\n"
        text += f"  %p{i} = mul <4 x i32> %bw{i}, %cw{i}\n"
        text += f"  %t{i} = add <4 x i32> %{total}, %p{i}\n"
        total = f"t{i}"
    return text + f"  ret <4 x i32> %{total}"


def _flush(name: str, source: str) -> str:
    """%name = the float bits %source with subnormals replaced by zeros of their sign."""
    wide = "<16 x i32>"

    def all_lanes(value: int) -> str:
        return f"<{', '.join([f'i32 {value}'] * 16)}>"

    return (
        f"  %{name}.exponent = and {wide} %{source}, {all_lanes(0x7F800000)}\n"
        f"  %{name}.sign = and {wide} %{source}, {all_lanes(-0x80000000)}\n"
        f"  %{name}.tiny = icmp eq {wide} %{name}.exponent, zeroinitializer\n"
        f"  %{name}.bits = select <16 x i1> %{name}.tiny, {wide} %{name}.sign, {wide} %{source}\n"
        f"  %{name} = bitcast {wide} %{name}.bits to <16 x float>\n"
    )


def _scaled(value: str, power: int) -> str:
    """%value.up = %value * 2^power"""
    floats = "<16 x float>"
    factor = f"<{', '.join([f'float {2**power}.0'] * 16)}>"
    return f"  %{value}.up = fmul {floats} %{value}, {factor}\n"


def _flush_result(name: str, operands: tuple[str, str, str]) -> str:
    """%name = the float bits %name.raw of the fused a * b + c, or a zero of its sign where the
    result is tiny: x86 rounds it to 24 bits as if exponents had no end and then compares it with
    2^-126. The same sum 2^64 times as large has no subnormals there, and where it overflows or is
    NaN the result is not tiny."""
    wide, floats = "<16 x i32>", "<16 x float>"
    a, b, c = operands

    def all_lanes(value: int) -> str:
        return f"<{', '.join([f'i32 {value}'] * 16)}>"

    return (
        f'  %{name}.sum = call {floats} @"llvm.fma.v16f32"'
        f"({floats} %{a}.up, {floats} %{b}.up, {floats} %{c}.up)\n"
        f"  %{name}.large = bitcast {floats} %{name}.sum to {wide}\n"
        f"  %{name}.size = and {wide} %{name}.large, {all_lanes(0x7FFFFFFF)}\n"
        f"  %{name}.sign = and {wide} %{name}.raw, {all_lanes(-0x80000000)}\n"
        f"  %{name}.tiny = icmp ult {wide} %{name}.size, {all_lanes((127 + 64 - 126) << 23)}\n"
        f"  %{name}.bits = select <16 x i1> %{name}.tiny, {wide} %{name}.sign, {wide} %{name}.raw\n"
        f"  %{name} = bitcast {wide} %{name}.bits to {floats}\n"
    )


def _vdpbf16ps() -> str:
    """VDPBF16PS: a + odd product, then + even product. Each is a fused multiply-add, rounded to
    nearest even; subnormal operands are zero, tiny results become zero."""
    wide, floats = "<16 x i32>", "<16 x float>"
    sixteen = f"<{', '.join(['i32 16'] * 16)}>"
    upper = f"<{', '.join(['i32 -65536'] * 16)}>"
    text = f"entry:\n  %acc.raw = bitcast {floats} %a to {wide}\n" + _flush("acc", "acc.raw")
    for operand in "bc":
        text += f"  %{operand}.odd = and {wide} %{operand}, {upper}\n"
        text += f"  %{operand}.even = shl {wide} %{operand}, {sixteen}\n"
        text += _flush(f"{operand}1", f"{operand}.odd") + _flush(f"{operand}0", f"{operand}.even")
    old = "acc"
    for parity in (1, 0):
        text += (
            f'  %f{parity} = call {floats} @"llvm.fma.v16f32"'
            f"({floats} %b{parity}, {floats} %c{parity}, {floats} %{old})\n"
            f"  %r{parity}.raw = bitcast {floats} %f{parity} to {wide}\n"
        )
        text += _scaled(f"b{parity}", 32) + _scaled(f"c{parity}", 32) + _scaled(old, 64)
        text += _flush_result(f"r{parity}", (f"b{parity}", f"c{parity}", old))
        old = f"r{parity}"
    return text + f"  ret {floats} %r0"


def _bytes(bits: int) -> str:
    return f"<{bits // 8} x i8>"


def _words(bits: int) -> str:
    return f"<{bits // 16} x i16>"


def _instructions() -> list[Instruction]:
    found = []
    for bits, dot, suffix, features in (
        (256, "avx2", ("pshuf.b", "pmadd.ub.sw", "pmadd.wd"), {"avx2"}),
        (512, "avx512", ("pshuf.b.512", "pmaddubs.w.512", "pmaddw.d.512"), {"avx512bw"}),
    ):
        names = [f"llvm.x86.{dot}.{s}" for s in suffix]
        needs = frozenset(features)
        b, w, d = _bytes(bits), _words(bits), f"<{bits // 32} x i32>"
        found += [
            Instruction(names[0], "vpshufb", needs, b, (b, b), _pshufb(bits // 8)),
            Instruction(names[1], "vpmaddubsw", needs, w, (b, b), _pmaddubsw(bits // 8)),
            Instruction(names[2], "vpmaddwd", needs, d, (w, w), _pmaddwd(bits // 16)),
        ]
    for bits, features in ((256, {"avxvnni"}), (512, {"avx512vnni"})):
        name, d = f"llvm.x86.avx512.vpdpbusd.{bits}", f"<{bits // 32} x i32>"
        needs, body = frozenset(features), _vpdpbusd(bits // 8)
        found.append(Instruction(name, "vpdpbusd", needs, d, (d, d, d), body))
    b, w, d = "<16 x i8>", "<8 x i16>", "<4 x i32>"
    for suffix, mnemonic, feature, result, operands, body in (
        ("tbl1.v16i8", "tbl", "neon", b, (b, b), _tbl()),
        ("addp.v8i16", "addp", "neon", w, (w, w), _pairwise_halves("i16", 8)),
        ("saddlp.v4i32.v8i16", "saddlp", "neon", d, (w,), _saddlp()),
        ("sdot.v4i32.v16i8", "sdot", "dotprod", d, (d, b, b), _sdot()),
    ):
        name, needs = f"llvm.aarch64.neon.{suffix}", frozenset({feature})
        found.append(Instruction(name, mnemonic, needs, result, operands, body))
    b, d, f = "<64 x i8>", "<16 x i32>", "<16 x float>"
    scalef = "llvm.x86.avx512.mask.scalef.ps.512"
    found += [
        Instruction(
            "llvm.x86.avx512.permvar.qi.512", "vpermb", frozenset({"avx512vbmi"}), b, (b, b),
            _vpermb(),
        ),
        Instruction(
            "llvm.x86.avx512.vpermi2var.qi.512", "vpermi2b", frozenset({"avx512vbmi"}), b,
            (b, b, b), _vpermi2b(),
        ),
        Instruction(
            scalef, "vscalefps", frozenset({"avx512f"}), f, (f, f, f, "i16", "i32"), _vscalefps(),
            _FLOOR, immediates=(-1, 4),
        ),
    ]  # fmt: skip
    bf16 = frozenset({"avx512bf16"})
    return [
        *found,
        Instruction(
            "llvm.x86.avx512bf16.dpbf16ps.512", "vdpbf16ps", bf16, f, (f, d, d), _vdpbf16ps(), _FMA
        ),
    ]


INSTRUCTIONS: Mapping[str, Instruction] = {i.intrinsic: i for i in _instructions()}
"""Every target intrinsic that a tier may call."""

_DECLARATION = re.compile(
    r'^declare (?P<result>[^@]+) @"(?P<name>llvm\.(?:x86|aarch64)\.[^"]+)"'
    r"\((?P<operands>.*)\)[^)\n]*$",
    re.M,
)


def rewriter(emulate: Callable[[Instruction], bool]) -> Callable[[str], str]:
    """A `Tier.rewrite` that emulates the instructions that `emulate` chooses."""

    def rewrite(text: str) -> str:
        definitions = []
        for match in list(_DECLARATION.finditer(text)):
            name = match["name"]
            if name not in INSTRUCTIONS:
                raise NotImplementedError(f"{name} has no emulation: add it to INSTRUCTIONS")
            instruction = INSTRUCTIONS[name]
            if not emulate(instruction):
                continue
            operands = tuple(re.sub(r' %"[^"]*"', "", match["operands"]).split(", "))
            if (match["result"], operands) != (instruction.result, instruction.operands):
                raise TypeError(f"{name} is declared as {match[0]!r}")
            text = text.replace(match[0], "").replace(f'@"{name}"', f'@"{PREFIX}{name}"')
            definitions.append(instruction.definition)
            for line in instruction.needs.splitlines():
                function = line[line.index("@") : line.index("(")]
                if not re.search(rf"^declare .*{re.escape(function)}\(", text, re.M):
                    definitions.append(line)
        return "\n".join([text, *definitions])

    return rewrite


def all_lowerings(tier: Tier) -> dict[str, Lowering]:
    """The tier's lowerings with those that it inherits."""
    inherited = all_lowerings(tier.extends) if tier.extends else {}
    return {**inherited, **tier.lowerings}


def emulated(tier: Tier, features: frozenset[str] | None = None) -> Tier:
    """`tier` for a processor with `features` (this one's by default)."""
    host = host_features() if features is None else features
    avx2 = TIERS["avx2"]
    lowerings = all_lowerings(tier)
    return dataclasses.replace(
        tier,
        name=f"{tier.name}_emulated",
        features=tier.all_features & host,  # of the instructions that are not emulated
        cpu=avx2.cpu if avx2.features <= host else "",
        lowerings=lowerings,
        flushing=frozenset(op for op in lowerings if tier.flushes(op)),
        extends=None,
        rewrite=rewriter(lambda instruction: not instruction.features <= host),
    )


def runnable(tier: Tier) -> Tier:
    """`tier` itself where this processor can run it, else its emulation.

    A tier with a matrix unit stands on the best vectors of this processor: what it inherits is
    tested with the tiers that it inherits it from.
    """
    if tier.all_features <= host_features():
        return tier
    if tier.tiles:
        usable = [r.tier for r in available_tiers() if r.usable and not r.tier.tiles]
        return amx_tier(usable[-1])
    return emulated(tier)


RUNNABLE: Mapping[str, Tier] = {name: runnable(tier) for name, tier in TIERS.items()}
"""Every tier by name, in a form that runs here."""


def _quick(name: str) -> Tier:
    tier = RUNNABLE[name]
    if not tier.tiles or tier is TIERS[name]:
        return tier
    base = [r.tier for r in available_tiers() if r.usable and not r.tier.tiles][-1]
    return dataclasses.replace(base, name=f"{base.name}_with_tiles", tiles=True)


QUICK: Mapping[str, Tier] = {name: _quick(name) for name in TIERS}
"""The same, but a matrix unit that this processor lacks is the generic lowering of its ops, which
is compiled: for tests of what kernels and drivers make of many tokens."""
