"""What instructions of a lane mean: tables of functions over NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import permutations, product
from typing import Any

import numpy as np

from tests.gpu.simulator.decode import Meaning, split
from tests.gpu.simulator.numbers import (
    TYPES,
    UNSIGNED,
    Array,
    flush,
    fma32,
    fma64,
    fma_of_bf16,
    from_bf16,
    from_e4m3,
    to_bf16,
    to_e4m3,
)
from tests.gpu.simulator.parse import Instruction

Function = Callable[..., Any]
ONE, ZERO = np.ones(1, np.float32), np.zeros(1, np.float32)

# ---- integers


def _divide(a: Array, b: Array) -> Array:
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b  # floor; PTX truncates
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))
    return np.asarray(quotient.astype(a.dtype))


def _wide(a: Array, b: Array) -> Any:
    double = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
    return a.astype(double) * b.astype(double)


def _high(a: Array, b: Array) -> Array:
    """The high half of a product."""
    if a.dtype.itemsize < 8:
        whole = _wide(a, b)
        return np.asarray(whole >> whole.dtype.type(4 * whole.dtype.itemsize)).astype(a.dtype)
    words = [(int(x) * int(y) >> 64) & (2**64 - 1) for x, y in np.broadcast(a, b)]
    return np.array(words, np.uint64).view(a.dtype)


def _bits(x: Array) -> Array:
    """[lanes, bits], the lowest bit first."""
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(x.size, -1)
    return np.unpackbits(octets, axis=1, bitorder="little")


def _highest(x: Array) -> Array:
    """bfind: the index of the highest bit that is not the sign, -1 if there is none."""
    bits = _bits(np.where(x < 0, ~x, x))[:, ::-1]
    return np.where(bits.any(1), bits.shape[1] - 1 - bits.argmax(1), -1).astype(np.int32)


def _extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: a field, its sign extended if the type has one."""
    wide = np.dtype(f"{a.dtype.kind}8")
    unused = 64 - np.minimum(length & 0xFF, 8 * a.dtype.itemsize).astype(np.int64)
    shift = np.minimum(unused, 63).astype(wide)
    field = (a.astype(wide) >> np.minimum(position & 0xFF, 63).astype(wide)) << shift >> shift
    return np.where(unused == 64, 0, field).astype(a.dtype)


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the low bits of `a` over a field of `b`."""
    one, place = np.uint64(1), np.minimum(position & 0xFF, 63).astype(np.uint64)
    field = ((one << np.minimum(length & 0xFF, 63).astype(np.uint64)) - one) << place
    return (b & ~field | (a.astype(np.uint64) << place) & field).astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is a byte of {b, a}, or its sign eight times."""
    a, b, selector = np.broadcast_arrays(a, b, selector)
    source = np.stack([a, b], -1).view(np.uint8)
    nibbles = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
    octets = np.take_along_axis(source, (nibbles & 7).astype(np.int64), 1)
    octets = np.where(nibbles & 8, np.where(octets & 128, 255, 0), octets).astype(np.uint8)
    return octets.view(np.uint32)[:, 0]


@lru_cache
def _lop3(table: int) -> Function:
    """Two operations that give the truth table, else its minterms."""
    operations = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    columns = (0xF0, 0xCC, 0xAA)
    for first, second, (i, j, k) in product(operations, operations, permutations(range(3))):
        if second(first(columns[i], columns[j]), columns[k]) == table:
            return lambda *x: second(first(x[i], x[j]), x[k])

    def minterms(*x: Array) -> Any:
        result: Any = np.zeros(1, np.uint32)
        for n in range(8):
            if table >> n & 1:
                a, b, c = (v if n & bit else ~v for v, bit in zip(x, (4, 2, 1), strict=True))
                result = result | (a & b & c)
        return result

    return minterms


def _funnel(op: tuple[str, ...]) -> Function:
    def shift(low: Array, high: Array, count: Array) -> Any:
        count = count & np.uint32(31) if "wrap" in op else np.minimum(count, np.uint32(32))
        both = high.astype(np.uint64) << np.uint64(32) | low
        if "l" in op:
            return ((both << count.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return (both >> count.astype(np.uint64)).astype(np.uint32)

    return shift


def _shift(function: Any) -> Function:
    # NumPy, too, gives 0 (or the sign) for counts at and above the width
    return lambda a, n: function(a, np.minimum(n, 8 * a.dtype.itemsize).astype(a.dtype))


INTEGER: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "max": np.maximum,
    "neg": np.negative,
    "abs": np.abs,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "div": _divide,
    "rem": lambda a, b: a - _divide(a, b) * b,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "popc": lambda x: _bits(x).sum(1, dtype=np.uint32),
    "clz": lambda x: 8 * x.dtype.itemsize - 1 - _highest(x.view(UNSIGNED[x.itemsize])),
    "bfind": _highest,
    "brev": lambda x: np.packbits(_bits(x)[:, ::-1], 1, "little").view(x.dtype)[:, 0],
    "bfe": _extract,
    "bfi": _insert,
    "prmt": _permute,
    "lop3": lambda a, b, c, table: _lop3(int(table[0]))(a, b, c),
}
KINDS = {"shl": 1, "shr": 1, "bfe": 1, "bfi": 2, "prmt": 3, "lop3": 3}
"""How many sources have the instruction's type; those behind are u32."""
PARTS: dict[str, Function] = {
    "mul.wide": _wide,
    "mul.hi": _high,
    "mad.wide": lambda a, b, c: _wide(a, b) + c,
    "mad.hi": lambda a, b, c: _high(a, b) + c,
}


def _integer(op: tuple[str, ...]) -> Meaning:
    name, kind, modifiers = op[0], op[-1], op[1:-1]
    function, kinds = INTEGER[name], [kind] * KINDS.get(name, 9) + ["u32"]
    if name in ("mul", "mad") and modifiers in (("wide",), ("hi",)):
        function = PARTS[f"{name}.{modifiers[0]}"]
        if modifiers == ("wide",):
            kinds = [kind, kind, f"{kind[0]}{2 * int(kind[1:])}"]
    elif modifiers not in ((), ("lo",)):
        raise KeyError(modifiers)
    return Meaning(function, kinds)


# ---- floats

FLOAT: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "min": np.fmin,
    "max": np.fmax,
    "neg": np.negative,
    "abs": np.abs,
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "copysign": lambda sign, x: np.copysign(x, sign),
}
DIRECTED: dict[str, Function] = {
    # where to go from a rounded value that is on the wrong side of the exact one; NaN is nowhere
    "rm": lambda rounded, exact: np.where(rounded > exact, -np.inf, np.nan),
    "rp": lambda rounded, exact: np.where(rounded < exact, np.inf, np.nan),
    "rz": lambda rounded, exact: np.where(np.abs(rounded) > np.abs(exact), 0.0, np.nan),
}
HALVES: dict[str, tuple[Function, Function]] = {
    "bf16": (from_bf16, to_bf16),
    "f16": (
        lambda bits: bits.view(np.float16).astype(np.float64),
        lambda x: x.astype(np.float16).view(np.uint16),
    ),
    "e4m3": (from_e4m3, to_e4m3),
}
"""Bits -> values, values -> bits."""


def _directed(way: str) -> Function:
    """float32 a*b + c, rounded down, up or to zero."""

    def fma(a: Array, b: Array, c: Array) -> Array:
        exact = fma64(a, b, c)
        rounded = exact.astype(np.float32)
        towards = DIRECTED[way](rounded, exact).astype(np.float32)
        return np.where(np.isnan(towards), rounded, np.nextafter(rounded, towards))

    return fma


def _by_parts(width: Any, of: str, to: str, function: Function) -> Function:
    """Applies `function` to the values of packed elements: [lanes, elements]."""

    def apply(*x: Array) -> Array:
        size = TYPES[of].itemsize if of in TYPES else 1
        parts = [np.ascontiguousarray(v).view(UNSIGNED[size]).reshape(v.size, -1) for v in x]
        values = function(*[HALVES[of][0](part) for part in parts])
        return np.ascontiguousarray(HALVES[to][1](values)).view(width)[:, 0]

    return apply


def _float(op: tuple[str, ...]) -> Meaning:
    name, kind, modifiers = op[0], op[-1], set(op[1:-1])
    element = kind.removesuffix("x2")
    if modifiers - {"rn", "rm", "rp", "rz", "ftz", "sat", "approx", "full", "NaN"}:
        raise KeyError(modifiers)
    fma = {"f32": fma32, "f16": fma64, "bf16": fma_of_bf16, "f64": lambda a, b, c: a * b + c}
    way = next((way for way in DIRECTED if way in modifiers), "")
    once = _directed(way) if way else fma[element]
    function: Function
    if name in ("fma", "mad"):
        function = once
    elif name in ("add", "sub", "mul") and (way or element in HALVES):
        function = {
            "add": lambda a, b: once(a, ONE, b),
            "sub": lambda a, b: once(a, ONE, -b),
            "mul": lambda a, b: once(a, b, np.copysign(ZERO, a) * np.copysign(ONE, b)),
        }[name]
    else:
        function = {"min": np.minimum, "max": np.maximum}[name] if "NaN" in op else FLOAT[name]
    if "ftz" in modifiers and element == "f32":
        exact = function
        function = lambda *x: flush(exact(*map(flush, x)))  # noqa: E731
    if "sat" in modifiers:
        unclamped = function
        function = lambda *x: np.fmin(np.fmax(unclamped(*x), 0), 1)  # noqa: E731
    if element in HALVES:
        bits = TYPES["u16" if kind == element else "u32"]
        return Meaning(_by_parts(bits, element, element, function), [f"u{8 * bits.itemsize}"])
    return Meaning(function, [kind])


def _mixed(op: tuple[str, ...]) -> Meaning:
    """add, sub, fma of bf16, exactly widened, and a last operand in float32 (sm_100)."""
    function, halves = {"add": (np.add, 1), "sub": (np.subtract, 1), "fma": (fma32, 2)}[op[0]]
    if op[1:-2] not in ((), ("rn",)):
        raise KeyError(op)
    return Meaning(lambda *x: function(*map(from_bf16, x[:-1]), x[-1]), ["u16"] * halves + ["f32"])


# ---- comparisons, moves, conversions

COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": lambda a, b: (a < b) | (a > b),
    **dict.fromkeys(("lt", "lo"), np.less),
    **dict.fromkeys(("le", "ls"), np.less_equal),
    **dict.fromkeys(("gt", "hi"), np.greater),
    **dict.fromkeys(("ge", "hs"), np.greater_equal),
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
"""Of floats: false where one is NaN, but for those of the second half."""


def _setp(instruction: Instruction) -> Meaning:
    op, kind = instruction.op, instruction.op[-1]
    compare, modifiers = COMPARE[op[1]], op[2:-1]
    if set(modifiers) - {"and", "or", "xor", "ftz"} or kind == "f16":
        raise KeyError(op)
    widen = from_bf16 if kind == "bf16" else flush if "ftz" in modifiers else (lambda x: x)
    combine = next((INTEGER[part] for part in modifiers if part != "ftz"), None)

    def function(a: Array, b: Array, *c: Array) -> Any:
        true = compare(widen(a), widen(b))
        if "|" not in instruction.args[0]:
            return combine(true, *c) if combine else true
        both = (true, np.logical_not(true))
        return [combine(value, *c) for value in both] if combine else both

    return Meaning(function, [kind, kind, "pred"])


def _mov(instruction: Instruction) -> Meaning:
    kind = instruction.op[-1]
    dest, source = (len(split(arg)) for arg in instruction.args)
    if dest == source == 1:
        return Meaning(lambda x: x, [kind])
    size = TYPES[kind].itemsize
    part, whole = UNSIGNED[size // max(dest, source)], UNSIGNED[size]
    shifts = [whole.type(8 * part.itemsize * i) for i in range(max(dest, source))]

    def pack(*parts: Array) -> Any:
        words = [x.astype(whole) << n for x, n in zip(parts, shifts, strict=True)]
        return np.bitwise_or.reduce(np.broadcast_arrays(*words))

    if source > 1:
        return Meaning(pack, [f"u{8 * part.itemsize}"])
    return Meaning(lambda x: [(x >> n).astype(part) for n in shifts], [f"u{8 * size}"])


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(x: Array, dtype: Any, rounding: Any) -> Array:
    """Saturates; NaN becomes 0."""
    info = np.iinfo(dtype)
    whole = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2e19, neginf=-2e19))
    inside = np.clip(whole, float(info.min), np.nextafter(float(info.max) + 1, 0)).astype(dtype)
    return np.where(whole >= float(info.max), dtype.type(info.max), inside)


def _cvt(op: tuple[str, ...]) -> Meaning:
    modifiers, to, of = set(op[1:-2]), op[-2], op[-1]
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)
    if modifiers - {"rn", "sat", "ftz", "satfinite", *ROUNDINGS}:
        raise KeyError(op)
    if to.endswith("x2"):
        element, width = to.removesuffix("x2"), TYPES[to]
        if of.endswith("x2"):
            return Meaning(
                _by_parts(width, of[:-2], element, lambda x: x), [f"u{8 * TYPES[of].itemsize}"]
            )
        if of != "f32":
            raise KeyError(op)

        def pair(high: Array, low: Array) -> Array:
            both = np.stack(np.broadcast_arrays(low, high), -1)
            return np.ascontiguousarray(HALVES[element][1](both)).view(width)[:, 0]

        return Meaning(pair, ["f32"])
    dtype, integer = TYPES[to], to[0] in "su"
    if of[0] in "su" and integer:
        if "sat" in modifiers:
            info = np.iinfo(dtype)
            return Meaning(
                lambda x: np.clip(x.astype(object), info.min, info.max).astype(dtype), [of]
            )
        middle = np.dtype(f"{TYPES[of].kind}{dtype.itemsize}")  # the sign of `of` extends
        return Meaning(lambda x: x.astype(middle).view(dtype), [of])
    if of[0] in "su" and to == "bf16":
        raise KeyError(op)

    def convert(x: Array) -> Any:
        x = from_bf16(x) if of == "bf16" else flush(x) if "ftz" in modifiers else x
        if integer:
            return _to_integer(x, dtype, rounding or np.trunc)
        x = rounding(x) if rounding else x
        x = np.fmin(np.fmax(x, 0), 1) if "sat" in modifiers else x
        return to_bf16(x.astype(np.float32)) if to == "bf16" else x.astype(dtype)

    return Meaning(convert, [of])


def meaning(instruction: Instruction) -> Meaning | None:
    """Of an instruction that works lane by lane."""
    op, name, kind = instruction.op, instruction.op[0], instruction.op[-1]
    if name == "mov":
        return _mov(instruction)
    if name == "cvta":
        return Meaning(lambda x: x, [kind])  # generic addresses are the same
    if name == "setp":
        return _setp(instruction)
    if name == "selp":
        return Meaning(lambda a, b, p: np.where(p, a, b), [kind, kind, "pred"])
    if name == "cvt":
        return _cvt(op)
    if name == "shf":
        return Meaning(_funnel(op), ["u32"])
    if name == "createpolicy":
        return Meaning(lambda *x: np.zeros(1, np.uint64), ["f32"])  # a hint to the cache
    if op[-2:] == ("f32", "bf16"):
        return _mixed(op)
    if name in FLOAT.keys() | {"fma", "mad"} and (kind[0] == "f" or "bf16" in kind):
        return _float(op)
    return _integer(op) if name in INTEGER else None
