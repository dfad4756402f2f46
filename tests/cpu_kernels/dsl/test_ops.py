"""Every op on every tier does what its NumPy meaning says."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I16, I32, Emit, Val
from hybrid_moe.cpu_kernels.dsl.ops import BYTE_DOT_OFFSET, OPS, WIDE_OFFSET
from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier, available_tiers
from hybrid_moe.cpu_kernels.dsl.tiles import TILE_OPS
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.models import Array, pair_dot_fused, vdpbf16ps
from tests.cpu_kernels.test_emulation import EDGE_FLOATS
from tests.cpu_kernels.toolbox import compile_kernel


def _pair_dot_meaning(accumulator: Array, w: Array, x: Array) -> Array:
    return OPS["pair_dot"].meaning(accumulator, w.view(np.uint16).reshape(-1, 2), x.view(np.uint16))


PAIR_DOT_MODELS: Mapping[str, Callable[[Array, Array, Array], Array]] = {
    "portable": _pair_dot_meaning,
    "neon": pair_dot_fused,
    "neon_dotprod": pair_dot_fused,
    "avx2": pair_dot_fused,
    "avx2_vnni": pair_dot_fused,
    "avx512": pair_dot_fused,
    "avx512_vnni": pair_dot_fused,
    "avx512_bf16": vdpbf16ps,
    "avx512_vbmi": vdpbf16ps,
}
"""Tier -> its pair_dot bit for bit; all agree where products and sums are normal."""

OFFSETS = (0, 16, WIDE_OFFSET)
"""Of wide weights."""
WEIGHTS = (-128, -127, -65, -3, -2, -1, 0, 1, 2, 3, 50, 64, 99, 113, 126, 127)
TABLE = (7, 0, 255, 128, 1, 2, 3, 250, 127, 12, 200, 99, 5, 64, 31, 77)

TierNames = pytest.mark.parametrize(
    "name", [name for name, tier in TIERS.items() if not tier.tiles]
)
"""A tier with a matrix unit inherits these ops; its own are tested in test_amx."""


def _lookup16(emit: Emit, index: Val, out: Val) -> None:
    emit.store(out, emit.op("lookup16", TABLE, emit.load(index, I8, 64)))


def _lookup_low4(emit: Emit, index: Val, out: Val) -> None:
    emit.store(out, emit.op("lookup_low4", TABLE, emit.load(index, I8, 64)))


def _byte_dots(emit: Emit, w: Val, x: Val, biases: Val, out: Val) -> None:
    """One plane: bias, 8 byte_dots; as the upper plane beside itself as the lower."""
    bias = emit.op("byte_dot_bias", emit.load(x, I8, 32), BYTE_DOT_OFFSET)
    emit.store(biases, bias)
    total = emit.broadcast(emit.load(biases, I32), 16)
    for quad in range(8):
        weights = emit.load(w + 64 * quad, I8, 64)
        total = emit.op("byte_dot", total, weights, emit.load(x + 4 * quad, I32))
    zero = emit.splat(0, I32, 16)
    emit.store(out, emit.op("byte_dot_total", zero, total))
    emit.store(out + 64, emit.op("byte_dot_total", total, zero))
    emit.store(out + 128, emit.op("byte_dot_total", total, total))


def _wide_dots(emit: Emit, w: Val, q: Val, split: Val, out: Val) -> None:
    """A group with each offset: split, start, 8 wide_dots, total."""
    values = emit.load(q, I32, 32)
    emit.store(split, emit.op("wide_split", values))
    for i, offset in enumerate(OFFSETS):
        total = emit.op("wide_start", emit.reduce("add", values) * -offset)
        for quad in range(8):
            first, second = (emit.load(split + (at + 4 * quad), I32) for at in (0, 32))
            weights = emit.op("wide_weights", emit.load(w + (512 * i + 64 * quad), I8, 64), offset)
            total = emit.op("wide_dot", total, weights, first, second)
        emit.store(out + 64 * i, emit.op("wide_total", total))


def _wide_lookup(emit: Emit, index: Val, q: Val, split: Val, out: Val) -> None:
    """A group whose quads are all the same, looked up."""
    values = emit.load(q, I32, 32)
    emit.store(split, emit.op("wide_split", values))
    total = emit.op("wide_start", emit.reduce("add", values) * -WIDE_OFFSET)
    weights = emit.op("wide_lookup", WEIGHTS, WIDE_OFFSET, emit.load(index, I8, 64))
    for quad in range(8):
        first, second = (emit.load(split + (at + 4 * quad), I32) for at in (0, 32))
        total = emit.op("wide_dot", total, weights, first, second)
    emit.store(out, emit.op("wide_total", total))


def _narrow_dots(emit: Emit, w: Val, x: Val, out: Val) -> None:
    """A group: start, 8 narrow_dots."""
    bias = emit.reduce("add", emit.load(x, I8, 32).sext(I32)) * -WIDE_OFFSET
    total = emit.op("narrow_start", bias)
    for quad in range(8):
        weights = emit.op("wide_weights", emit.load(w + 64 * quad, I8, 64) + -128, WIDE_OFFSET)
        total = emit.op("narrow_dot", total, weights, emit.load(x + 4 * quad, I32))
    emit.store(out, total)


def _half_to_float(emit: Emit, x: Val, out: Val) -> None:
    emit.store(out, emit.op("half_to_float", emit.load(x, I16, 16)))


def _e4m3_pairs(emit: Emit, codes: Val, out: Val) -> None:
    emit.store(out, emit.op("e4m3_pairs", emit.load(codes, I8, 64)))


def _pair_dot(emit: Emit, accumulator: Val, w: Val, x: Val, out: Val) -> None:
    old, weights = emit.load(accumulator, F32, 16), emit.load(w, I32, 16)
    emit.store(out, emit.op("pair_dot", old, weights, emit.load(x, I32)))


def _times_power(emit: Emit, value: Val, factor: Val, exponent: Val, out: Val) -> None:
    operands = [emit.load(at, F32, 16) for at in (value, factor, exponent)]
    emit.store(out, emit.op("times_power", *operands))


_KERNELS: Mapping[str, tuple[Callable[..., None], int]] = {
    "lookup16": (_lookup16, 2),
    "lookup_low4": (_lookup_low4, 2),
    "byte_dot": (_byte_dots, 4),
    "wide_dot": (_wide_dots, 4),
    "wide_lookup": (_wide_lookup, 4),
    "narrow_dot": (_narrow_dots, 3),
    "half_to_float": (_half_to_float, 2),
    "e4m3_pairs": (_e4m3_pairs, 2),
    "pair_dot": (_pair_dot, 4),
    "times_power": (_times_power, 4),
}


@functools.lru_cache(maxsize=64)
def _kernel(op: str, name: str) -> Callable[..., None]:
    body, arity = _KERNELS[op]
    return compile_kernel(body, arity, RUNNABLE[name])


def test_every_op_is_tested() -> None:
    # tested together with byte_dot, wide_dot and narrow_dot
    family = {"byte_dot_bias", "byte_dot_total", "narrow_start"}
    wide = {"wide_split", "wide_start", "wide_weights", "wide_total"}
    assert set(OPS) == set(_KERNELS) | family | wide, "a new op needs a test here"


@pytest.mark.parametrize("name", TIERS)
def test_lowerings_are_of_known_ops(name: str) -> None:
    known = {*TILE_OPS, *OPS} if TIERS[name].tiles else set(OPS)
    assert set(TIERS[name].lowerings) <= known


@TierNames
def test_lookup16(name: str) -> None:
    rng = np.random.default_rng(1)
    for index in (
        np.arange(64, dtype=np.uint8) % 16,
        *(rng.integers(0, 16, (20, 64), dtype=np.uint8)),
    ):
        out = np.zeros(64, np.uint8)
        _kernel("lookup16", name)(index, out)
        assert np.array_equal(out, OPS["lookup16"].meaning(TABLE, index))


@TierNames
def test_lookup_low4(name: str) -> None:
    """Every byte: the upper four bits do not count."""
    for index in np.arange(256, dtype=np.uint8).reshape(4, 64):
        out = np.zeros(64, np.uint8)
        _kernel("lookup_low4", name)(index, out)
        assert np.array_equal(out, OPS["lookup_low4"].meaning(TABLE, index))
        assert np.array_equal(out, OPS["lookup16"].meaning(TABLE, index % 16))


def _check_byte_dots(name: str, w: Array, x: Array) -> None:
    out, bias = np.zeros((3, 16), np.int32), np.zeros(1, np.int32)
    _kernel("byte_dot", name)(w, x, bias, out)
    expected: Array = OPS["byte_dot_bias"].meaning(x, BYTE_DOT_OFFSET) + np.zeros(16, np.int64)
    for quad in range(8):
        expected = OPS["byte_dot"].meaning(expected, w[quad], x[4 * quad : 4 * quad + 4])
    total = OPS["byte_dot_total"].meaning
    for row, (high, low) in zip(
        out, ((0, expected), (expected, 0), (expected, expected)), strict=True
    ):
        assert np.array_equal(row, total(high, low))
    plain = (w.astype(np.int64) - BYTE_DOT_OFFSET).transpose(1, 0, 2).reshape(16, 32) @ x
    assert np.array_equal(expected, plain), "the bias takes the offset back"


def _as_quads(w: Array) -> Array:
    """[16 rows, 32 inputs] -> [8 quads, 16 rows, 4]."""
    return np.ascontiguousarray(w.reshape(16, 8, 4).transpose(1, 0, 2))


@TierNames
@pytest.mark.parametrize("x", [-128, -127, -1, 0, 1, 127])
@pytest.mark.parametrize("w", [0, 1, 12, 23, 24])
def test_byte_dot_at_the_ends_of_its_range(name: str, w: int, x: int) -> None:
    """All of one sign: the largest sums that the contract allows."""
    _check_byte_dots(name, np.full((8, 16, 4), w, np.uint8), np.full(32, x, np.int8))
    signs = np.where(np.arange(32) % 2, 0, x).astype(np.int8)
    _check_byte_dots(name, np.full((8, 16, 4), w, np.uint8), signs)


@TierNames
@given(seed=st.integers(0, 2**32 - 1), sparse=st.booleans())
def test_byte_dot(name: str, seed: int, sparse: bool) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(0, 25, (16, 32), dtype=np.uint8)
    x = rng.integers(-128, 128, 32).astype(np.int8)
    if sparse:  # aligned signs: sums near the ends, where 16-bit halves would overflow
        w = np.where(rng.random((16, 32)) < 0.8, np.where(x > 0, 24, 0), w).astype(np.uint8)
    _check_byte_dots(name, _as_quads(w), x)


def _check_wide_dots(name: str, u: Array, q: Array) -> None:
    """`u` are weights plus an offset, whichever it is."""
    # bytes beyond 127 are weights beyond a signed byte, unless the offset is 128
    given = np.stack([u if offset == WIDE_OFFSET else u & 127 for offset in OFFSETS])
    out, split = np.zeros((len(OFFSETS), 16), np.int32), np.zeros(64, np.uint8)
    _kernel("wide_dot", name)(given, q, split, out)
    words = OPS["wide_split"].meaning(q).reshape(2, 8, 2)
    for offset, added, row in zip(OFFSETS, given, out, strict=True):
        plain = added.astype(np.int64) - offset
        expected = plain.transpose(1, 0, 2).reshape(16, 32) @ q
        assert np.array_equal(row, expected), offset
        meant: Array = OPS["wide_start"].meaning(np.int32(0))
        w = OPS["wide_weights"].meaning(added, offset)
        for quad in range(8):
            meant = OPS["wide_dot"].meaning(meant, w[quad], *words[:, quad])
        assert np.array_equal(OPS["wide_total"].meaning(meant), expected)


@TierNames
@pytest.mark.parametrize("q", [-16320, -129, -128, 0, 127, 128, 16320])
@pytest.mark.parametrize("u", [0, 1, 127, 128, 255])
def test_wide_dot_at_the_ends_of_its_range(name: str, u: int, q: int) -> None:
    _check_wide_dots(name, np.full((8, 16, 4), u, np.uint8), np.full(32, q, np.int32))


@TierNames
@given(seed=st.integers(0, 2**32 - 1), aligned=st.booleans())
def test_wide_dot(name: str, seed: int, aligned: bool) -> None:
    rng = np.random.default_rng(seed)
    u = rng.integers(0, 256, (16, 32), np.uint8)
    q = rng.integers(-16320, 16321, 32).astype(np.int32)
    if aligned:  # signs alike: sums near the ends, which no byte product with saturation reaches
        u = np.where(rng.random((16, 32)) < 0.8, np.where(q > 0, 255, 0), u).astype(np.uint8)
    _check_wide_dots(name, _as_quads(u), q)


@TierNames
@pytest.mark.parametrize("q", [-16320, -129, 0, 127, 16320])
def test_wide_lookup(name: str, q: int) -> None:
    """Every byte as an index: the upper four bits do not count."""
    for index in np.arange(256, dtype=np.uint8).reshape(4, 64):
        out, split = np.zeros(16, np.int32), np.zeros(64, np.uint8)
        _kernel("wide_lookup", name)(index, np.full(32, q, np.int32), split, out)
        w = OPS["wide_lookup"].meaning(WEIGHTS, WIDE_OFFSET, index).astype(np.int64)
        assert np.array_equal(w, np.asarray(WEIGHTS)[index % 16])
        assert np.array_equal(out, 8 * q * w.reshape(16, 4).sum(axis=1))


def _check_narrow_dots(name: str, w: Array, x: Array) -> None:
    out = np.zeros(16, np.int32)
    _kernel("narrow_dot", name)(w, x, out)
    meant: Array = OPS["narrow_start"].meaning(np.int32(0))
    for quad in range(8):
        meant = OPS["narrow_dot"].meaning(meant, w[quad], x[4 * quad : 4 * quad + 4])
    assert np.array_equal(meant, w.astype(np.int64).transpose(1, 0, 2).reshape(16, 32) @ x)
    assert np.array_equal(out, meant)


@TierNames
@pytest.mark.parametrize("x", [-127, -1, 0, 1, 127])
@pytest.mark.parametrize("w", [-128, -127, 0, 127])
def test_narrow_dot_at_the_ends_of_its_range(name: str, w: int, x: int) -> None:
    """Two products of such bytes do not fit 16 bits."""
    _check_narrow_dots(name, np.full((8, 16, 4), w, np.int8), np.full(32, x, np.int8))


@TierNames
@given(seed=st.integers(0, 2**32 - 1))
def test_narrow_dot(name: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(-128, 128, (16, 32)).astype(np.int8)
    x = rng.integers(-127, 128, 32).astype(np.int8)
    _check_narrow_dots(name, _as_quads(w), x)


@TierNames
def test_half_to_float(name: str) -> None:
    """Every fp16: subnormal ones, and a NaN stays one."""
    for x in np.arange(1 << 16, dtype=np.uint16).reshape(-1, 16):
        out = np.zeros(16, np.float32)
        _kernel("half_to_float", name)(x, out)
        _assert_same_floats(out, OPS["half_to_float"].meaning(x))


@TierNames
@pytest.mark.parametrize("shift", [0, 1, 2, 3, 61])
def test_e4m3_pairs(name: str, shift: int) -> None:
    """Every code in every byte of a word, NaN and -0 too; the bits are the same on all tiers."""
    for codes in np.roll(np.arange(256, dtype=np.uint8), shift).reshape(4, 64):
        out = np.zeros((2, 16, 2), np.uint16)
        _kernel("e4m3_pairs", name)(codes, out)
        assert np.array_equal(out, OPS["e4m3_pairs"].meaning(codes))


def test_the_meaning_of_e4m3_pairs() -> None:
    """By ml_dtypes, whose bf16 hold every E4M3 value; inputs 0, 2 of a row, then 1, 3."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    codes = np.arange(256, dtype=np.uint8)
    exact = codes.view(ml_dtypes.float8_e4m3fn).astype(ml_dtypes.bfloat16)
    assert np.array_equal(
        exact.astype(np.float64),
        codes.view(ml_dtypes.float8_e4m3fn).astype(np.float64),
        equal_nan=True,
    )
    pairs = np.concatenate([OPS["e4m3_pairs"].meaning(part) for part in codes.reshape(4, 64)], 1)
    order = pairs.transpose(1, 2, 0).reshape(256)  # [row][pair][which]: inputs 0, 1, 2, 3
    values = order.view(ml_dtypes.bfloat16).astype(np.float64)
    assert np.array_equal(values, exact.astype(np.float64), equal_nan=True)
    assert np.array_equal(order >> 15, codes >> 7)


def _random_bf16(rng: np.random.Generator, n: int, spread: int) -> Array:
    values = rng.standard_normal(n) * 2.0 ** rng.integers(-spread, spread + 1, n)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _pair_dot_of(name: str, accumulator: Array, w: Array, x: Array) -> Array:
    out = np.zeros(16, np.float32)
    _kernel("pair_dot", name)(accumulator, w, x, out)
    return out


def _assert_same_floats(got: Array, expected: Array) -> None:
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), (got, expected)


@TierNames
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 4, 20]))
def test_pair_dot_of_normal_values(name: str, seed: int, spread: int) -> None:
    """Where products and sums are normal every tier has the bits of the meaning."""
    rng = np.random.default_rng(seed)
    w, x = _random_bf16(rng, 32, spread).reshape(16, 2), _random_bf16(rng, 2, spread)
    accumulator = (rng.standard_normal(16) * 2.0 ** rng.integers(-spread, spread + 1, 16)).astype(
        np.float32
    )
    expected = OPS["pair_dot"].meaning(accumulator, w, x)
    _assert_same_floats(_pair_dot_of(name, accumulator, w, x), expected)


def test_pair_dot_adds_the_odd_product_first() -> None:
    w = np.tile(np.array([0x3F80, 0xCB80], np.uint16), (16, 1))  # 1, -2^24
    x = np.array([0x3F80, 0x3F80], np.uint16)
    accumulator = np.full(16, 2.0**24, np.float32)
    assert OPS["pair_dot"].meaning(accumulator, w, x).tolist() == [1.0] * 16


@TierNames
@given(seed=st.integers(0, 2**32 - 1))
def test_pair_dot_of_any_bits(name: str, seed: int) -> None:
    """Subnormals, infinities, NaN and overflow: as the model of the tier's instructions says."""
    rng = np.random.default_rng(seed)
    special = (EDGE_FLOATS.view(np.uint32) >> 16).astype(np.uint16)
    bits = rng.integers(0, 2**16, 34).astype(np.uint16)
    mixed = np.where(rng.random(34) < 0.5, rng.choice(special, 34), bits).view(np.int32)
    w, x = mixed[:16].copy(), mixed[16:].copy()
    accumulator = rng.choice(EDGE_FLOATS, 16)
    every_lane = x if name == "portable" else np.repeat(x, 16)
    expected = PAIR_DOT_MODELS[name](accumulator, w, every_lane)
    _assert_same_floats(_pair_dot_of(name, accumulator, w, x), expected)


@pytest.mark.parametrize(
    ("accumulator", "w", "x", "exact"),
    [
        (0.0, 2.0**-127, 2.0**9, 2.0**-118),  # a subnormal weight
        (0.0, -(2.0**9), 2.0**-130, -(2.0**-121)),  # a subnormal activation
        (0.0, 2.0**-100, 2.0**-27, 2.0**-127),  # a subnormal product
        (2.0**-126, 2.0**-100, -1.25 * 2.0**-26, -(2.0**-128)),  # a subnormal sum of normal numbers
        (2.0**-128, 0.0, 0.0, 2.0**-128),  # a subnormal accumulator
    ],
    ids=["weight", "activation", "product", "sum", "accumulator"],
)
@TierNames
def test_a_tier_says_whether_it_flushes(
    name: str, accumulator: float, w: float, x: float, exact: float
) -> None:
    """The lower half of each pair, so that nothing is added after the subnormal arises."""
    pairs = [np.array([value], np.float32).view(np.int32) >> 16 & 0xFFFF for value in (w, x)]
    out = _pair_dot_of(name, np.full(16, accumulator, np.float32), np.tile(pairs[0], 16), pairs[1])
    assert out.tolist() == [0.0 if RUNNABLE[name].flushes("pair_dot") else exact] * 16


def test_tiers_that_flush() -> None:
    """The contract, docs/numerics.md: dots of pairs that one instruction does; nothing else."""
    flushing = {
        (name, op) for name, tier in TIERS.items() for op in (*OPS, *TILE_OPS) if tier.flushes(op)
    }
    dots = {(name, "pair_dot") for name, model in PAIR_DOT_MODELS.items() if model is vdpbf16ps}
    assert ("avx512_bf16", "pair_dot") in dots
    assert flushing == dots | {("amx", "pair_dot"), ("amx", "tile_dot_pairs")}
    for name, tier in TIERS.items():
        assert tier.flushing <= set(tier.lowerings), f"{name} says so of its own lowerings only"


@TierNames
@given(seed=st.integers(0, 2**32 - 1))
def test_times_power(name: str, seed: int) -> None:
    """Results that are subnormal, zero or infinite too, and a NaN on either side."""
    rng = np.random.default_rng(seed)
    value = (rng.standard_normal(16) * 2.0 ** rng.integers(-140, 120, 16)).astype(np.float32)
    value = np.where(rng.random(16) < 0.2, rng.choice(EDGE_FLOATS, 16), value)
    exponent = rng.integers(-149, 128, 16).astype(np.float32)
    exponent[rng.random(16) < 0.1] = np.nan
    factor = np.exp2(exponent.astype(np.float64)).astype(np.float32)
    out = np.zeros(16, np.float32)
    _kernel("times_power", name)(value, factor, exponent, out)
    _assert_same_floats(out, OPS["times_power"].meaning(value, factor, exponent))


def test_usable_tiers_are_tested_natively() -> None:
    for report in available_tiers():
        tier: Tier = RUNNABLE[report.tier.name]
        assert (tier is report.tier) == report.usable
