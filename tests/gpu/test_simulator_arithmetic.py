"""What instructions of one lane mean, against exact arithmetic: Python's integers and fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from tests.gpu.simulator.parse import parse
from tests.gpu.snippets import compute, entry, run

Array = np.ndarray[Any, Any]
BF16 = np.dtype(ml_dtypes.bfloat16)
LANES = 96


def dtype_of(kind: str) -> np.dtype[Any]:
    if kind in ("bf16", "bf16x2"):
        return BF16
    if kind in ("f16", "f16x2"):
        return np.dtype(np.float16)
    return np.dtype(
        {"pred": "b1"}.get(kind)
        or f"{kind[0].replace('b', 'u').replace('s', 'i')}{int(kind[1:]) // 8}"
    )


def samples(kind: str, rng: np.random.Generator) -> Array:
    """Edges and random values of a type."""
    dtype = dtype_of(kind)
    if kind == "pred":
        return rng.integers(0, 2, LANES).astype(bool)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        edges = [0, 1, 2, 31, 32, 33, 64, 100, info.max, info.max - 1, info.min, info.min + 1]
        if dtype.kind == "i":
            edges += [-1, -2, -32]
        wide = rng.integers(info.min, info.max, LANES, dtype, endpoint=True)
        wide[LANES // 2 :] >>= rng.integers(0, 8 * dtype.itemsize, LANES // 2).astype(dtype)
        wide[: len(edges)] = rng.permutation(
            np.array([edge & (2**64 - 1) for edge in edges], np.uint64).astype(dtype)
        )
        return wide
    significand = rng.choice([-1.0, 1.0], LANES * 2) * rng.uniform(1, 2, LANES * 2)
    values = np.ldexp(significand, rng.integers(-4, 5, LANES * 2)).astype(dtype)
    values[::7] = np.ldexp(1.0, rng.integers(-140, 15, LANES * 2))[::7].astype(dtype)
    values[3], values[4] = 0.0, -0.0
    return values if kind.endswith("x2") else values[:LANES]


def rounded(x: Fraction, dtype: np.dtype[Any], way: str = "n") -> float:
    """An exact value in a float type: to nearest even, or m (down), p (up), z (to zero)."""
    info = ml_dtypes.finfo(dtype)
    if x == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(x)))
    exponent += (abs(x) >= Fraction(2) ** (exponent + 1)) - (abs(x) < Fraction(2) ** exponent)
    quantum = Fraction(2) ** (max(exponent, int(info.minexp)) - int(info.nmant))
    count = {
        "n": round,  # half to even
        "m": math.floor,
        "p": math.ceil,
        "z": math.trunc,
    }[way](x / quantum)
    return float(count * quantum)


def wrapped(value: int, kind: str) -> int:
    bits = int(kind[1:])
    value &= (1 << bits) - 1
    return value - (1 << bits) if kind[0] == "s" and value >> (bits - 1) else value


def field(a: int, position: int, length: int, signed: bool) -> int:
    """bfe of 32 bits, bit by bit as the PTX manual has it."""
    position, length = position & 255, length & 255
    sign = (a >> min(position + length - 1, 31)) & 1 if signed and length else 0
    return sum(
        ((a >> (position + i) & 1) if i < length and position + i < 32 else sign) << i
        for i in range(32)
    )


def inserted(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i if i < 32 else b
    return b


def permuted(a: int, b: int, selector: int) -> int:
    both, result = b << 32 | a, 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = both >> 8 * (nibble & 7) & 255
        result |= ((255 if byte & 128 else 0) if nibble & 8 else byte) << 8 * i
    return result


def lop3(table: int) -> Callable[..., int]:
    return lambda a, b, c: sum(
        (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
    )


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def highest(x: int) -> int:
    return x.bit_length() - 1


INTEGER: list[tuple[str, str, tuple[str, ...], Callable[..., int]]] = [
    ("add.s32 {d}, {0}, {1};", "s32", ("s32", "s32"), lambda a, b: a + b),
    ("add.u64 {d}, {0}, {1};", "u64", ("u64", "u64"), lambda a, b: a + b),
    ("sub.u32 {d}, {0}, {1};", "u32", ("u32", "u32"), lambda a, b: a - b),
    ("mul.lo.s32 {d}, {0}, {1};", "s32", ("s32", "s32"), lambda a, b: a * b),
    ("mul.hi.s32 {d}, {0}, {1};", "s32", ("s32", "s32"), lambda a, b: a * b >> 32),
    ("mul.hi.u32 {d}, {0}, {1};", "u32", ("u32", "u32"), lambda a, b: a * b >> 32),
    ("mul.hi.s64 {d}, {0}, {1};", "s64", ("s64", "s64"), lambda a, b: a * b >> 64),
    ("mul.wide.s32 {d}, {0}, {1};", "s64", ("s32", "s32"), lambda a, b: a * b),
    ("mul.wide.u16 {d}, {0}, {1};", "u32", ("u16", "u16"), lambda a, b: a * b),
    ("mad.lo.s32 {d}, {0}, {1}, {2};", "s32", ("s32",) * 3, lambda a, b, c: a * b + c),
    ("mad.wide.u32 {d}, {0}, {1}, {2};", "u64", ("u32", "u32", "u64"), lambda a, b, c: a * b + c),
    ("mad.wide.s32 {d}, {0}, -8, {1};", "s64", ("s32", "s64"), lambda a, c: a * -8 + c),
    ("div.s32 {d}, {0}, {1};", "s32", ("s32", "s32"), truncated),
    ("div.u32 {d}, {0}, {1};", "u32", ("u32", "u32"), truncated),
    ("div.s64 {d}, {0}, {1};", "s64", ("s64", "s64"), truncated),
    ("rem.s32 {d}, {0}, {1};", "s32", ("s32", "s32"), lambda a, b: a - truncated(a, b) * b),
    ("rem.u64 {d}, {0}, {1};", "u64", ("u64", "u64"), lambda a, b: a % b),
    ("min.s32 {d}, {0}, {1};", "s32", ("s32", "s32"), min),
    ("max.u32 {d}, {0}, {1};", "u32", ("u32", "u32"), max),
    ("min.s64 {d}, {0}, {1};", "s64", ("s64", "s64"), min),
    ("neg.s32 {d}, {0};", "s32", ("s32",), lambda a: -a),
    ("abs.s32 {d}, {0};", "s32", ("s32",), abs),
    ("and.b32 {d}, {0}, {1};", "b32", ("b32", "b32"), lambda a, b: a & b),
    ("or.b64 {d}, {0}, {1};", "b64", ("b64", "b64"), lambda a, b: a | b),
    ("xor.b16 {d}, {0}, {1};", "b16", ("b16", "b16"), lambda a, b: a ^ b),
    ("not.b32 {d}, {0};", "b32", ("b32",), lambda a: ~a),
    ("and.pred {d}, {0}, {1};", "pred", ("pred", "pred"), lambda a, b: a & b),
    ("not.pred {d}, {0};", "pred", ("pred",), lambda a: 1 - a),
    ("shl.b32 {d}, {0}, {1};", "b32", ("b32", "u32"), lambda a, n: a << min(n, 32)),
    ("shl.b64 {d}, {0}, {1};", "b64", ("b64", "u32"), lambda a, n: a << min(n, 64)),
    ("shr.u32 {d}, {0}, {1};", "u32", ("u32", "u32"), lambda a, n: a >> min(n, 32)),
    ("shr.s32 {d}, {0}, {1};", "s32", ("s32", "u32"), lambda a, n: a >> min(n, 32)),
    ("shr.s64 {d}, {0}, {1};", "s64", ("s64", "u32"), lambda a, n: a >> min(n, 64)),
    ("shr.u16 {d}, {0}, {1};", "u16", ("u16", "u32"), lambda a, n: a >> min(n, 16)),
    (
        "shf.l.wrap.b32 {d}, {0}, {1}, {2};",
        "b32",
        ("b32", "b32", "u32"),
        lambda a, b, n: (b << 32 | a) << (n & 31) >> 32,
    ),
    (
        "shf.r.clamp.b32 {d}, {0}, {1}, {2};",
        "b32",
        ("b32", "b32", "u32"),
        lambda a, b, n: (b << 32 | a) >> min(n, 32),
    ),
    ("popc.b32 {d}, {0};", "u32", ("b32",), lambda a: a.bit_count()),
    ("popc.b64 {d}, {0};", "u32", ("b64",), lambda a: a.bit_count()),
    ("clz.b32 {d}, {0};", "u32", ("b32",), lambda a: 32 - a.bit_length()),
    ("clz.b64 {d}, {0};", "u32", ("b64",), lambda a: 64 - a.bit_length()),
    ("bfind.u32 {d}, {0};", "u32", ("u32",), highest),
    ("bfind.s32 {d}, {0};", "u32", ("s32",), lambda a: highest(~a if a < 0 else a)),
    ("brev.b32 {d}, {0};", "b32", ("b32",), lambda a: int(f"{a:032b}"[::-1], 2)),
    ("bfe.u32 {d}, {0}, {1}, {2};", "u32", ("u32",) * 3, lambda a, p, n: field(a, p, n, False)),
    ("bfe.s32 {d}, {0}, 28, {1};", "s32", ("s32", "u32"), lambda a, n: field(a, 28, n, True)),
    ("bfe.s32 {d}, {0}, 4, 4;", "s32", ("s32",), lambda a: field(a, 4, 4, True)),
    ("bfi.b32 {d}, {0}, {1}, {2}, {3};", "b32", ("b32", "b32", "u32", "u32"), inserted),
    ("bfi.b32 {d}, {0}, {1}, 8, 12;", "b32", ("b32", "b32"), lambda a, b: inserted(a, b, 8, 12)),
    ("prmt.b32 {d}, {0}, {1}, {2};", "b32", ("b32",) * 3, permuted),
    ("prmt.b32 {d}, {0}, {1}, 0xBE40;", "b32", ("b32",) * 2, lambda a, b: permuted(a, b, 0xBE40)),
    *[
        (f"lop3.b32 {{d}}, {{0}}, {{1}}, {{2}}, {table:#x};", "b32", ("b32",) * 3, lop3(table))
        for table in (0xEA, 0x96, 0xE8, 0x1B, 0x80, 0xFE, 0x00, 0xFF)
    ],
    (
        "selp.b32 {d}, {0}, {1}, {2};",
        "b32",
        ("b32", "b32", "pred"),
        lambda a, b, p: a if p else b,
    ),
    ("setp.lt.s32 {d}, {0}, {1};", "pred", ("s32", "s32"), lambda a, b: a < b),
    ("setp.hi.u32 {d}, {0}, {1};", "pred", ("u32", "u32"), lambda a, b: a > b),
    ("setp.ge.u64 {d}, {0}, {1};", "pred", ("u64", "u64"), lambda a, b: a >= b),
    (
        "setp.ne.or.s32 {d}, {0}, 0, {1};",
        "pred",
        ("s32", "pred"),
        lambda a, p: a != 0 or p,
    ),
    (
        "setp.gt.and.s32 {d}, {0}, -3, !{1};",
        "pred",
        ("s32", "pred"),
        lambda a, p: a > -3 and not p,
    ),
    (
        "setp.eq.s32 %p15|{d}, {0}, {1};",
        "pred",
        ("s32", "s32"),
        lambda a, b: a != b,
    ),
    ("@{1} add.s32 {0}, {0}, 1; mov.b32 {d}, {0};", "s32", ("s32", "pred"), lambda a, p: a + p),
    ("cvt.s64.s32 {d}, {0};", "s64", ("s32",), lambda a: a),
    ("cvt.u64.u32 {d}, {0};", "u64", ("u32",), lambda a: a),
    ("cvt.s32.s8 {d}, {0};", "s32", ("s8",), lambda a: a),
    ("cvt.u16.u32 {d}, {0};", "u16", ("u32",), lambda a: a),
    ("cvt.u32.s64 {d}, {0};", "u32", ("s64",), lambda a: a),
    ("cvt.sat.s8.s32 {d}, {0};", "s8", ("s32",), lambda a: max(-128, min(127, a))),
    ("mov.b64 {d}, {{{0}, {1}}};", "b64", ("b32", "b32"), lambda a, b: b << 32 | a),
    ("mov.b32 {{%rs15, {d}}}, {0};", "b16", ("b32",), lambda a: a >> 16),
]


@pytest.mark.parametrize("case", INTEGER, ids=lambda case: case[0].replace(" {d}", ""))
def test_integers(case: tuple[str, str, tuple[str, ...], Callable[..., int]]) -> None:
    instruction, result, kinds, meaning = case
    rng = np.random.default_rng(1)
    values = [samples(kind, rng) for kind in kinds]
    if instruction.startswith(("div", "rem")):
        values[1][values[1] == 0] = 3
    got = compute(instruction, result, *zip(kinds, values, strict=True))
    for i, lane in enumerate(zip(*[v.tolist() for v in values], strict=True)):
        expected = int(meaning(*map(int, lane)))
        bits = 8 if result == "pred" else int(result[1:])
        assert int(got[i]) == expected & ((1 << bits) - 1), lane


def exact(function: Callable[..., Fraction], way: str = "n") -> Callable[..., float]:
    return lambda dtype, *x: rounded(function(*map(Fraction, x)), dtype, way)


def flushing(function: Callable[..., Fraction]) -> Callable[..., float]:
    def flush(x: float) -> float:
        return 0.0 if abs(x) < 2.0**-126 else x

    return lambda dtype, *x: flush(rounded(function(*map(Fraction, map(flush, x))), dtype))


FLOAT: list[tuple[str, str, int, Callable[..., float]]] = [
    ("add.rn.f32 {d}, {0}, {1};", "f32", 2, exact(lambda a, b: a + b)),
    ("sub.f32 {d}, {0}, {1};", "f32", 2, exact(lambda a, b: a - b)),
    ("mul.f32 {d}, {0}, {1};", "f32", 2, exact(lambda a, b: a * b)),
    ("mul.ftz.f32 {d}, {0}, {1};", "f32", 2, flushing(lambda a, b: a * b)),
    ("fma.rn.ftz.f32 {d}, {0}, {1}, {2};", "f32", 3, flushing(lambda a, b, c: a * b + c)),
    ("fma.rn.f32 {d}, {0}, {1}, {2};", "f32", 3, exact(lambda a, b, c: a * b + c)),
    ("fma.rm.f32 {d}, {0}, {1}, {2};", "f32", 3, exact(lambda a, b, c: a * b + c, "m")),
    ("mul.rz.f32 {d}, {0}, {1};", "f32", 2, exact(lambda a, b: a * b, "z")),
    ("add.rp.f32 {d}, {0}, {1};", "f32", 2, exact(lambda a, b: a + b, "p")),
    ("div.rn.f32 {d}, {0}, {1};", "f32", 2, exact(lambda a, b: a / b)),
    ("min.f32 {d}, {0}, {1};", "f32", 2, lambda dtype, a, b: min(a, b)),
    ("max.f32 {d}, {0}, {1};", "f32", 2, lambda dtype, a, b: max(a, b)),
    ("neg.f32 {d}, {0};", "f32", 1, lambda dtype, a: -a),
    ("abs.f32 {d}, {0};", "f32", 1, lambda dtype, a: abs(a)),
    ("add.f64 {d}, {0}, {1};", "f64", 2, lambda dtype, a, b: a + b),
    ("fma.rn.bf16x2 {d}, {0}, {1}, {2};", "bf16x2", 3, exact(lambda a, b, c: a * b + c)),
    ("mul.rn.bf16x2 {d}, {0}, {1};", "bf16x2", 2, exact(lambda a, b: a * b)),
    ("add.rn.bf16x2 {d}, {0}, {1};", "bf16x2", 2, exact(lambda a, b: a + b)),
    ("sub.rn.bf16 {d}, {0}, {1};", "bf16", 2, exact(lambda a, b: a - b)),
    ("max.bf16x2 {d}, {0}, {1};", "bf16x2", 2, lambda dtype, a, b: max(a, b)),
    ("fma.rn.f16x2 {d}, {0}, {1}, {2};", "f16x2", 3, exact(lambda a, b, c: a * b + c)),
]


def bits_of(values: Array, kind: str) -> Array:
    return values.view(f"u{values.dtype.itemsize * (2 if kind.endswith('x2') else 1)}")


@pytest.mark.parametrize("case", FLOAT, ids=lambda case: case[0].replace(" {d}", ""))
def test_floats(case: tuple[str, str, int, Callable[..., float]]) -> None:
    instruction, kind, count, meaning = case
    rng = np.random.default_rng(2)
    dtype = dtype_of(kind)
    values = [samples(kind, rng) for _ in range(count)]
    if instruction.startswith("div"):
        values[1][values[1] == 0] = 3
    if count == 3:  # sums that an intermediate rounding would put between two results
        tie = np.ldexp(1.0, -ml_dtypes.finfo(dtype).nmant - 1)
        values[0][40:44], values[1][40:44] = tie, [1, 1, -1, -1]
        values[2][40:44] = [1, np.nextafter(dtype.type(1), dtype.type(2)), 1, -1]
        values[0][44:50], values[1][44:50] = 1 + 2 * tie, [1 - tie, -1 + tie, 1 + 2 * tie] * 2
    got = compute(instruction, kind, *[(kind, bits_of(v, kind)) for v in values]).view(dtype)
    limit = float(ml_dtypes.finfo(dtype).max)
    for i, lane in enumerate(zip(*[v.astype(float).tolist() for v in values], strict=True)):
        expected = meaning(dtype, *lane)
        if abs(expected) <= limit:
            assert float(got[i]) == expected, lane


APPROXIMATE: list[tuple[str, Callable[[Array], Array]]] = [
    ("ex2.approx.ftz.f32", lambda x: np.exp2(x)),
    ("rcp.approx.ftz.f32", lambda x: 1 / x),
    ("rsqrt.approx.f32", lambda x: 1 / np.sqrt(x)),
    ("sqrt.rn.f32", lambda x: np.sqrt(x)),
    ("lg2.approx.f32", lambda x: np.log2(x)),
    ("tanh.approx.f32", lambda x: np.tanh(x)),
]


@pytest.mark.parametrize(("name", "meaning"), APPROXIMATE, ids=lambda case: str(case)[:20])
def test_approximate_functions(name: str, meaning: Callable[[Array], Array]) -> None:
    x = np.random.default_rng(3).uniform(0.1, 20, 64).astype(np.float32)
    got = compute(name + " {d}, {0};", "f32", ("f32", x)).view(np.float32)
    # 2 ulp for a float32 function, 2^-22 near the zero of lg2
    np.testing.assert_allclose(got, meaning(x.astype(np.float64)), rtol=2.0**-22, atol=2.0**-22)


def test_subnormals_survive_without_ftz() -> None:
    """E8M0 scale 0 is 2^-127, subnormal in float32 and in bf16."""
    tiny = np.array([2.0**-127, -(2.0**-127), 2.0**-126], np.float32)
    two = np.full(3, 2, np.float32)
    kept = compute("mul.f32 {d}, {0}, {1};", "f32", ("f32", tiny), ("f32", two)).view(np.float32)
    assert kept.tolist() == (tiny * 2).tolist()
    flushed = compute("mul.ftz.f32 {d}, {0}, {1};", "f32", ("f32", tiny), ("f32", two))
    assert flushed.tolist() == [0, 0x80000000, 0x01000000]
    pairs = np.full(3, 0x00408040, np.uint32)  # 2^-127 and -2^-127
    twice = compute("add.rn.bf16x2 {d}, {0}, {1};", "bf16x2", ("b32", pairs), ("b32", pairs))
    assert twice.tolist() == [0x00808080] * 3
    wide = compute("cvt.f32.bf16 {d}, {0};", "f32", ("b16", np.full(3, 0x0040, np.uint16)))
    assert wide.view(np.float32).tolist() == [2.0**-127] * 3


def test_mixed_precision() -> None:
    """float32 = bf16 (* bf16) + float32, which compilers emit for sm_100; comparisons of bf16."""
    rng = np.random.default_rng(5)
    a, b = (rng.standard_normal(64).astype(BF16) for _ in range(2))
    c = rng.standard_normal(64).astype(np.float32)
    x, y = ("b16", a.view(np.uint16)), ("b16", b.view(np.uint16))
    got = compute("fma.rn.f32.bf16 {d}, {0}, {1}, {2};", "f32", x, y, ("f32", c)).view(np.float32)
    exact = a.astype(np.float64) * b.astype(np.float64) + c
    assert got.tolist() == exact.astype(np.float32).tolist()
    got = compute("add.f32.bf16 {d}, {0}, {1};", "f32", x, ("f32", c)).view(np.float32)
    assert got.tolist() == (a.astype(np.float32) + c).tolist()
    less = compute("setp.lt.bf16 {d}, {0}, {1};", "pred", x, y)
    assert less.tolist() == (a.astype(np.float32) < b.astype(np.float32)).tolist()


def test_nan_and_comparisons() -> None:
    a = np.array([1, 2, np.nan, np.nan, np.inf, -0.0], np.float32)
    b = np.array([2, 2, 1, np.nan, np.inf, 0.0], np.float32)
    for name, expected in {
        "lt": [1, 0, 0, 0, 0, 0],
        "ltu": [1, 0, 1, 1, 0, 0],
        "eq": [0, 1, 0, 0, 1, 1],
        "ne": [1, 0, 0, 0, 0, 0],
        "neu": [1, 0, 1, 1, 0, 0],
        "geu": [0, 1, 1, 1, 1, 1],
        "nan": [0, 0, 1, 1, 0, 0],
        "num": [1, 1, 0, 0, 1, 1],
    }.items():
        got = compute(f"setp.{name}.f32 {{d}}, {{0}}, {{1}};", "pred", ("f32", a), ("f32", b))
        assert got.tolist() == expected, name
    least = compute("min.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)).view(np.float32)
    assert least.tolist()[:3] == [1, 2, 1] and np.isnan(least[3])
    kept = compute("min.NaN.f32 {d}, {0}, {1};", "f32", ("f32", a), ("f32", b)).view(np.float32)
    assert np.isnan(kept[2:4]).all()


def test_conversions_round_and_saturate() -> None:
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.normal(0, 100, 56), [0.5, 1.5, -2.5, 448, 465, 1e10, -1e10, np.nan]])
    x = x.astype(np.float32)
    low = x[::-1].copy()
    with np.errstate(invalid="ignore"):
        pairs = {
            "cvt.rn.bf16x2.f32": ml_dtypes.bfloat16,
            "cvt.rn.f16x2.f32": np.float16,
        }
        for name, dtype in pairs.items():
            got = compute(f"{name} {{d}}, {{0}}, {{1}};", "b32", ("f32", x), ("f32", low))
            with np.errstate(over="ignore"):
                for half, of in ((got.view(np.uint16)[1::2], x), (got.view(np.uint16)[::2], low)):
                    np.testing.assert_array_equal(
                        half.view(dtype).astype(np.float64), of.astype(dtype).astype(np.float64)
                    )
    got = compute(
        "cvt.rn.satfinite.e4m3x2.f32 {d}, {0}, {1};", "b16", ("f32", x), ("f32", low)
    ).view(ml_dtypes.float8_e4m3fn)
    clipped = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)
    np.testing.assert_array_equal(got[1::2].astype(np.float64), clipped)
    np.testing.assert_array_equal(got[::2].astype(np.float64), clipped[::-1])
    codes = np.arange(256, dtype=np.uint8).view(np.uint16)
    half = compute("cvt.rn.f16x2.e4m3x2 {d}, {0};", "b32", ("b16", codes)).view(np.float16)
    expected = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float16)
    np.testing.assert_array_equal(half, expected)
    for name, rounding in {
        "rni": np.rint,
        "rzi": np.trunc,
        "rmi": np.floor,
        "rpi": np.ceil,
    }.items():
        got = compute(f"cvt.{name}.s32.f32 {{d}}, {{0}};", "s32", ("f32", x)).view(np.int32)
        whole = np.nan_to_num(rounding(x.astype(np.float64)), nan=0.0)
        assert got.tolist() == np.clip(whole, -(2**31), 2**31 - 1).astype(np.int64).tolist()
    whole = np.array([0, -1, 2**24 + 1, -(2**31), 2**31 - 1], np.int32)
    got = compute("cvt.rn.f32.s32 {d}, {0};", "f32", ("s32", whole)).view(np.float32)
    assert got.tolist() == whole.astype(np.float32).tolist()
    got = compute("cvt.rn.bf16.f32 {d}, {0};", "b16", ("f32", x)).view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(
        got.astype(np.float64), x.astype(ml_dtypes.bfloat16).astype(np.float64)
    )


@pytest.mark.parametrize(
    "instruction",
    [
        "wgmma.fence.sync.aligned;",
        "add.sat.s32 %r1, %r2, %r3;",
        "ld.b32 %r1, [%rd0];",  # a generic address
        "ld.global.L2::cache_hint.b32 %r1, [%rd0], %rd1;",
        "red.global.add.v2.f32 [%rd0], {%r1, %r2};",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%r1, %r2, %r3, %r4}, {%r1, %r2}, {%r3}, {%r1, %r2, %r3, %r4};",
        "cvt.rz.f32.f64 %r1, %rd1;",
        "bar.red.popc.u32 %r1, 0, %p1;",
        "mov.u32 %r1, %smid;",
    ],
)
def test_an_unknown_instruction_is_named(instruction: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"line \d+: {instruction[:3]}|%smid"):
        run(instruction, np.zeros(1, np.uint32))


def test_scopes_have_registers_of_their_own() -> None:
    """Assembly written inline declares names again and again."""
    body = """
    mov.b32 %r1, 5;
    { .reg .b32 z; .reg .pred p;
      mov.b32 z, 7; setp.eq.s32 p, z, 7; @p add.s32 %r1, %r1, z; }
    { .reg .b32 z; mov.b32 z, 100; add.s32 %r1, %r1, z; }
    st.global.b32 [%rd0], %r1;"""
    out = np.zeros(1, np.uint32)
    run(body, out)
    assert out[0] == 112
    assert len({name for name in parse(entry(body, 1)).registers if "@" in name}) == 3
