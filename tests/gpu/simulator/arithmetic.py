"""What arithmetic instructions mean, lane by lane: a table of functions over NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations, product
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.gpu.simulator.numbers import (
    TYPES,
    UNSIGNED,
    Array,
    flush,
    fma32,
    fma64,
    fma_bf16,
    from_bf16,
    from_e4m3,
    to_bf16,
    to_e4m3,
)

if TYPE_CHECKING:
    from tests.gpu.simulator.decode import Decoder, Step

Op = tuple[str, ...]
Args = tuple[str, ...]
Function = Callable[..., Array]
ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


DIRECTED: dict[str, Function] = {
    # whether a float32 is on the wrong side of the exact value; which way is right
    "rm": lambda rounded, exact: np.where(rounded > exact, -np.inf, np.nan),
    "rp": lambda rounded, exact: np.where(rounded < exact, np.inf, np.nan),
    "rz": lambda rounded, exact: np.where(np.abs(rounded) > np.abs(exact), 0.0, np.nan),
}


def _directed(name: str, wrong: Function) -> Function:
    """Rounds down, up or to zero."""

    def function(*x: Array) -> Array:
        one = np.ones(1, np.float32)
        if name == "fma":
            exact = fma64(*x)
        elif name == "mul":
            exact = fma64(x[0], x[1], np.zeros(1, np.float32))
        else:
            exact = fma64(x[0], one, {"add": x[1], "sub": -x[1]}[name])
        rounded = exact.astype(np.float32)
        towards = wrong(rounded, exact).astype(np.float32)
        return np.where(np.isnan(towards), rounded, np.nextafter(rounded, towards))

    return function


# ---- integers


def _divide(a: Array, b: Array) -> Array:
    b = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // b  # floor; PTX truncates
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))
    return np.asarray(quotient.astype(a.dtype))


def _remainder(a: Array, b: Array) -> Array:
    return np.asarray(a - _divide(a, b) * b)


def _high(a: Array, b: Array) -> Array:
    """The high half of a product."""
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return np.asarray(a.astype(wide) * b.astype(wide) >> wide.type(8 * a.dtype.itemsize))
    exact = [int(x) * int(y) >> 64 for x, y in np.broadcast(a, b)]
    return np.array([x & 0xFFFFFFFFFFFFFFFF for x in exact], np.uint64).view(a.dtype)


def _bits(x: Array) -> Array:
    """[lanes, bits], the lowest bit first."""
    x = np.ascontiguousarray(x)
    return np.unpackbits(x.view(np.uint8).reshape(x.size, -1), axis=1, bitorder="little")


def _highest(x: Array) -> Array:
    """The index of the highest set bit, -1 (all ones) if there is none. bfind."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x)
    bits = _bits(x)[:, ::-1]
    found = bits.shape[1] - 1 - bits.argmax(1)
    return np.where(bits.any(1), found, -1).astype(np.int32)


def _reverse(x: Array) -> Array:
    reversed_bits = np.packbits(_bits(x)[:, ::-1], axis=1, bitorder="little")
    return np.ascontiguousarray(reversed_bits).view(x.dtype)[:, 0]


def _extract(a: Array, position: Array, length: Array) -> Array:
    """bfe: a field, its sign extended if the type has one."""
    wide = np.dtype(f"{a.dtype.kind}8")
    unused = np.int64(64) - np.minimum(length & 0xFF, 8 * a.dtype.itemsize).astype(np.int64)
    field = a.astype(wide) >> np.minimum(position & 0xFF, 63).astype(wide)
    shift = np.minimum(unused, 63).astype(wide)
    return np.where(unused == 64, 0, (field << shift) >> shift).astype(a.dtype)


def _insert(a: Array, b: Array, position: Array, length: Array) -> Array:
    """bfi: the low bits of `a` over a field of `b`."""
    one = np.uint64(1)
    place = (position & np.uint32(0xFF)).astype(np.uint64)
    ones = (one << np.minimum(length & np.uint32(0xFF), 63).astype(np.uint64)) - one
    field = np.where(place < 64, ones << place, np.uint64(0))
    return (b & ~field | (a.astype(np.uint64) << place) & field).astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt: each byte of the result is a byte of {b, a}, or its sign eight times."""
    a, b = np.broadcast_arrays(a, b)
    source = np.stack([a, b], -1).view(np.uint8)
    result = np.zeros((max(len(source), selector.size), 4), np.uint8)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        if nibble.size == 1:
            column = source[:, nibble[0] & 7]
        else:
            index = (nibble & 7)[:, None].astype(np.int64)
            column = np.take_along_axis(np.broadcast_to(source, (nibble.size, 8)), index, 1)[:, 0]
        result[:, i] = np.where(nibble & 8, np.where(column & 128, 255, 0), column)
    return result.view(np.uint32)[:, 0]


def _lop3(table: int) -> Function:
    """Two operations that give the truth table, else its minterms."""
    operations = (np.bitwise_and, np.bitwise_or, np.bitwise_xor)
    columns = (0xF0, 0xCC, 0xAA)
    for first, second, (i, j, k) in product(operations, operations, permutations(range(3))):
        if second(first(columns[i], columns[j]), columns[k]) == table:
            return lambda *x: second(first(x[i], x[j]), x[k])

    def minterms(*x: Array) -> Array:
        result: Any = np.zeros(1, np.uint32)
        for n in range(8):
            if table >> n & 1:
                terms = [v if n & bit else ~v for v, bit in zip(x, (4, 2, 1), strict=True)]
                result = result | (terms[0] & terms[1] & terms[2])
        return np.asarray(result)

    return minterms


def _funnel(op: Op) -> Function:
    def shift(low: Array, high: Array, count: Array) -> Array:
        limit = count & np.uint32(31) if "wrap" in op else np.minimum(count, np.uint32(32))
        both = high.astype(np.uint64) << np.uint64(32) | low
        if "l" in op:
            return np.asarray((both << limit.astype(np.uint64)) >> np.uint64(32)).astype(np.uint32)
        return np.asarray(both >> limit.astype(np.uint64)).astype(np.uint32)

    return shift


def _shift(function: Any) -> Function:
    # NumPy, too, gives 0 (or the sign) for counts at and above the width
    return lambda a, n: np.asarray(
        function(a, np.minimum(n, 8 * a.dtype.itemsize).astype(a.dtype)).astype(a.dtype)
    )


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
    "rem": _remainder,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "popc": lambda x: _bits(x).sum(1, dtype=np.uint32),
    "clz": lambda x: 8 * x.dtype.itemsize - 1 - _highest(x.view(UNSIGNED[x.itemsize])),
    "bfind": _highest,
    "brev": _reverse,
}
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
EXACT_IN_FLOAT32 = {"min", "max", "neg", "abs"}


def _arithmetic(d: Decoder, op: Op, args: Args) -> Step:
    kind = op[-1]
    name = op[0]
    if "x2" in kind or kind in ("bf16", "f16"):
        return _half(d, op, args)
    if kind[0] == "f" or kind == "f64":
        return _float(d, op, args)
    types = [kind] * (len(args) - 1)
    if name in ("shl", "shr"):
        types[1] = "u32"
    elif "wide" in op:
        return _wide(d, op, args)
    function = INTEGER[name]
    if "hi" in op:
        function = _high if name == "mul" else lambda a, b, c: _high(a, b) + c
    if name == "bfind" and "shiftamt" in op or "sat" in op or "cc" in op:
        raise d.unknown()
    return d.alu(function, args[0], *map(d.source, args[1:], types))


def _wide(d: Decoder, op: Op, args: Args) -> Step:
    kind = op[-1]
    wide = TYPES[kind[0] + str(2 * int(kind[1:]))]
    sources = [d.source(arg, kind) for arg in args[1:3]]
    if op[0] == "mul":
        return d.alu(lambda a, b: a.astype(wide) * b.astype(wide), args[0], *sources)
    sources.append(d.source(args[3], kind[0] + str(2 * int(kind[1:]))))
    return d.alu(lambda a, b, c: a.astype(wide) * b.astype(wide) + c, args[0], *sources)


def _float(d: Decoder, op: Op, args: Args) -> Step:
    kind = op[-1]
    name = "fma" if op[0] == "mad" else op[0]
    directed = next((part for part in op if part in DIRECTED), "")
    if {"xorsign", "relu"} & set(op) or (directed and kind != "f32"):
        raise d.unknown()
    if directed:
        exact = _directed(name, DIRECTED[directed])
    elif name == "fma":
        exact = fma32 if kind == "f32" else (lambda a, b, c: a * b + c)
    elif "NaN" in op:
        exact = {"min": np.minimum, "max": np.maximum}[name]
    else:
        exact = FLOAT[name]
    function: Function = exact
    if "ftz" in op:
        function = lambda *x: flush(exact(*map(flush, x)))  # noqa: E731
    if "sat" in op:
        unclamped = function
        function = lambda *x: np.fmin(np.fmax(unclamped(*x), 0), 1)  # noqa: E731
    return d.alu(function, args[0], *[d.source(arg, kind) for arg in args[1:]])


def _half(d: Decoder, op: Op, args: Args) -> Step:
    """bf16 and f16, single or in pairs: [lanes, 1 or 2] float32 or float64, rounded once."""
    kind, name = op[-1], op[0]
    if {"sat", "relu", "xorsign"} & set(op):
        raise d.unknown()
    width = "u16" if kind in ("bf16", "f16") else "u32"

    def widen(x: Array) -> Array:
        halves = np.ascontiguousarray(x).view(np.uint16).reshape(x.size, -1)
        return from_bf16(halves) if "bf16" in kind else halves.view(np.float16).astype(np.float64)

    def narrow(x: Array) -> Array:
        bits = to_bf16(x) if "bf16" in kind else x.astype(np.float16).view(np.uint16)
        return np.ascontiguousarray(bits).view(TYPES[width])[:, 0]

    if name == "fma":
        function = fma_bf16 if "bf16" in kind else fma64
    elif "bf16" in kind and name in ("add", "sub", "mul"):
        one = np.ones(1, np.float32)
        function = {
            "add": lambda a, b: fma_bf16(a, one, b),
            "sub": lambda a, b: fma_bf16(a, one, -b),
            "mul": lambda a, b: fma_bf16(a, b, np.copysign(np.float32(0), a * b)),
        }[name]
    elif "bf16" in kind and name not in EXACT_IN_FLOAT32:  # ex2, tanh: approximate by definition
        function = lambda *x: to_bf16(np.asarray(FLOAT[name](*x)))  # noqa: E731
    elif "NaN" in op:
        function = {"min": np.minimum, "max": np.maximum}[name]
    else:
        function = FLOAT[name]
    bits = "bf16" in kind and name not in EXACT_IN_FLOAT32

    def halves(*x: Array) -> Array:
        result = function(*map(widen, x))
        if bits:  # already rounded
            return np.ascontiguousarray(result).view(TYPES[width])[:, 0]
        return narrow(np.asarray(result, np.float32) if "bf16" in kind else result)

    return d.alu(halves, args[0], *[d.source(arg, width) for arg in args[1:]])


# ---- moves, choices, conversions


def _move(d: Decoder, op: Op, args: Args) -> Step:
    kind = op[-1]
    if not args[0].startswith("{"):
        return d.alu(lambda x: x, args[0], d.source(args[1], kind))
    names = d.vector(args[0])
    part = UNSIGNED[TYPES[kind].itemsize // len(names)]
    source = d.source(args[1], f"u{8 * TYPES[kind].itemsize}")
    puts = [d.sink(name) for name in names]

    def unpack(warps: Any, mask: Any) -> None:
        value = np.ascontiguousarray(source(warps.R))
        for i, put in enumerate(puts):
            put(warps, (value >> value.dtype.type(8 * part.itemsize * i)).astype(part), mask)

    return unpack


def _cvta(d: Decoder, op: Op, args: Args) -> Step:
    return d.alu(lambda x: x, args[0], d.source(args[1], op[-1]))  # generic addresses are the same


COMPARE: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    **{name: np.less for name in ("lt", "lo")},
    **{name: np.less_equal for name in ("le", "ls")},
    **{name: np.greater for name in ("gt", "hi")},
    **{name: np.greater_equal for name in ("ge", "hs")},
    "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
    "neu": np.not_equal,  # of floats: true if one is NaN
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


def _setp(d: Decoder, op: Op, args: Args) -> Step:
    kind = op[-1]
    compare = COMPARE[op[1]]
    if op[1] == "ne" and kind[0] == "f":
        compare = lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b)  # noqa: E731
    if kind in ("f16", "bf16"):
        raise d.unknown()
    if "ftz" in op:
        unflushed = compare
        compare = lambda a, b: unflushed(flush(a), flush(b))  # noqa: E731
    sources = [d.source(arg, kind) for arg in args[1:3]]
    dest, _, complement = args[0].partition("|")
    combine = next((INTEGER[part] for part in op[2:-1] if part in ("and", "or", "xor")), None)
    if combine is not None:
        sources.append(d.source(args[3], "pred"))
        plain = compare
        compare = lambda a, b, c: combine(plain(a, b), c)  # noqa: E731
    step = d.alu(compare, dest, *sources)
    if not complement:
        return step
    if combine is not None:
        raise d.unknown()
    other = d.alu(lambda *x: np.logical_not(compare(*x)), complement.strip(), *sources)

    def both(warps: Any, mask: Any) -> None:
        other(warps, mask)
        step(warps, mask)

    return both


def _selp(d: Decoder, op: Op, args: Args) -> Step:
    a, b = (d.source(arg, op[-1]) for arg in args[1:3])
    choose = d.source(args[3], "pred")
    return d.alu(lambda a, b, p: np.where(p, a, b), args[0], a, b, choose)


def _to_float32(kind: str) -> Function:
    if kind == "bf16":
        return from_bf16
    return lambda x: x.astype(np.float32)


def _from_float(kind: str) -> Function:
    if kind == "bf16":
        return lambda x: to_bf16(x.astype(np.float32))
    return lambda x: x.astype(TYPES[kind])


def _to_integer(kind: str, rounding: Any) -> Function:
    """Saturates; NaN becomes 0."""
    dtype = TYPES[kind]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max

    def convert(x: Array) -> Array:
        whole = rounding(np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=2e19, neginf=-2e19))
        exact = np.clip(whole, float(low), np.nextafter(float(high) + 1, 0)).astype(dtype)
        return np.where(whole >= float(high), dtype.type(high), exact)

    return convert


def _cvt(d: Decoder, op: Op, args: Args) -> Step:
    modifiers, to, of = set(op[1:-2]), op[-2], op[-1]
    rounding = next((ROUNDINGS[m] for m in modifiers if m in ROUNDINGS), None)
    known = {"rn", "sat", "ftz", "satfinite", *ROUNDINGS}
    if modifiers - known:
        raise d.unknown()
    if to.endswith("x2") or of.endswith("x2"):
        return _cvt_pair(d, op, args)
    source = d.source(args[1], of)
    if to[0] in "su" and of[0] in "su":
        if "sat" in modifiers:
            low, high = np.iinfo(TYPES[to]).min, np.iinfo(TYPES[to]).max
            return d.alu(
                lambda x: np.clip(x.astype(object), low, high).astype(TYPES[to]), args[0], source
            )
        # first to the width of `to` with the sign of `of`
        middle = np.dtype(f"{TYPES[of].kind}{TYPES[to].itemsize}")
        return d.alu(lambda x: x.astype(middle).view(TYPES[to]), args[0], source)
    if of[0] in "su":
        if to == "bf16":
            return d.alu(lambda x: to_bf16(x.astype(np.float32)), args[0], source)
        return d.alu(lambda x: x.astype(TYPES[to]), args[0], source)
    widen = from_bf16 if of == "bf16" else (lambda x: x)
    flushed = flush if "ftz" in modifiers and of == "f32" else (lambda x: x)
    if to[0] in "su":
        convert = _to_integer(to, rounding or np.trunc)
    else:
        narrow = _from_float(to)
        rounded = rounding or (lambda x: x)
        clamp = (lambda x: np.fmin(np.fmax(x, 0), 1)) if "sat" in modifiers else (lambda x: x)
        convert = lambda x: narrow(clamp(rounded(x)))  # noqa: E731
    return d.alu(lambda x: convert(flushed(widen(x))), args[0], source)


def _cvt_pair(d: Decoder, op: Op, args: Args) -> Step:
    """Two values in one register: from two float32 (the first operand is the high half), or from
    a pair of another type."""
    narrow: dict[str, Function] = {
        "bf16x2": to_bf16,
        "f16x2": lambda x: x.astype(np.float16).view(np.uint16),
        "e4m3x2": to_e4m3,
    }
    widen: dict[str, Function] = {
        "e4m3x2": lambda x: from_e4m3(np.ascontiguousarray(x).view(np.uint8)),
        "bf16x2": lambda x: from_bf16(np.ascontiguousarray(x).view(np.uint16)),
        "f16x2": lambda x: np.ascontiguousarray(x).view(np.float16).astype(np.float32),
    }
    to, of = op[-2], op[-1]
    if to not in narrow or (of != "f32" and of not in widen) or ("rn" not in op):
        raise d.unknown()
    bits = {"bf16x2": np.uint32, "f16x2": np.uint32, "e4m3x2": np.uint16}[to]
    if of != "f32":
        width = "u16" if of == "e4m3x2" else "u32"
        return d.alu(
            lambda x: narrow[to](widen[of](x)).view(bits), args[0], d.source(args[1], width)
        )

    def pair(high: Array, low: Array) -> Array:
        both = np.stack(np.broadcast_arrays(low, high), -1)
        return np.ascontiguousarray(narrow[to](both)).view(bits)[:, 0]

    return d.alu(pair, args[0], *[d.source(arg, "f32") for arg in args[1:3]])


def _field(function: Function) -> Callable[[Decoder, Op, Args], Step]:
    """bfe, bfi: positions and lengths are u32 whatever the type."""

    def decode(d: Decoder, op: Op, args: Args) -> Step:
        types = [op[-1]] * (len(args) - 3) + ["u32", "u32"]
        return d.alu(function, args[0], *map(d.source, args[1:], types))

    return decode


def _logic3(d: Decoder, op: Op, args: Args) -> Step:
    table = d.constant(args[4])
    if table is None or op[1:] != ("b32",):
        raise d.unknown()
    return d.alu(_lop3(table), args[0], *[d.source(arg, "b32") for arg in args[1:4]])


def _prmt(d: Decoder, op: Op, args: Args) -> Step:
    if op[1:] != ("b32",):
        raise d.unknown()
    return d.alu(_permute, args[0], *[d.source(arg, "b32") for arg in args[1:]])


def _shf(d: Decoder, op: Op, args: Args) -> Step:
    return d.alu(_funnel(op), args[0], *[d.source(arg, "u32") for arg in args[1:]])


def _policy(d: Decoder, op: Op, args: Args) -> Step:
    return d.alu(lambda: np.zeros(1, np.uint64), args[0])  # createpolicy: a hint to the cache


DECODERS: dict[str, Callable[[Decoder, Op, Args], Step]] = {
    **dict.fromkeys([*INTEGER, *FLOAT, "fma"], _arithmetic),
    "mov": _move,
    "cvta": _cvta,
    "setp": _setp,
    "selp": _selp,
    "cvt": _cvt,
    "bfe": _field(_extract),
    "bfi": _field(_insert),
    "lop3": _logic3,
    "prmt": _prmt,
    "shf": _shf,
    "createpolicy": _policy,
}
