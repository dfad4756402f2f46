"""Block formats of ggml, and NVFP4: every code, every scale, and the documented arithmetic bit for
bit, on every tier (docs/numerics.md)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, choose_tier
from hybrid_moe.cpu_kernels.kernels import integer_dot, order
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.encode import (
    FIXED15_GROUP,
    encode_rows,
    integer_encoding,
)
from hybrid_moe.cpu_kernels.kernels.group_dot import group_dot
from hybrid_moe.cpu_kernels.kernels.scalings import MINIMA, SCALINGS
from hybrid_moe.cpu_kernels.strips.pack import pack_rows
from hybrid_moe.formats.ggml import GGML, SUPER
from hybrid_moe.formats.mx import NVFP4
from hybrid_moe.formats.numbers import E4M3_VALUES
from hybrid_moe.formats.strips import STRIP_ROWS, strip_layout
from hybrid_moe.formats.table import FORMATS
from hybrid_moe.formats.tensors import Matrix
from hybrid_moe.formats.weight_format import Plane, WeightFormat
from tests.cpu_kernels.cases import Array, from_bf16, to_bf16
from tests.cpu_kernels.emulation import RUNNABLE
from tests.cpu_kernels.toolbox import aligned, compile_kernel

ROWS = (*GGML, NVFP4)
K = 2 * SUPER
"""Inputs of the strip that most tests take: two superblocks."""
QUADS = 8

Rows = pytest.mark.parametrize("fmt", ROWS, ids=lambda fmt: fmt.name)
TierNames = pytest.mark.parametrize(
    "name", [name for name, tier in TIERS.items() if not tier.tiles]
)
"""A tier with a matrix unit computes these formats with the ops that it inherits."""


def _plane(fmt: WeightFormat, plane: Plane, rng: np.random.Generator, calm: bool) -> Array:
    """Any bits that are numbers; `calm`: factors of ordinary size."""
    shape = plane.shape(STRIP_ROWS, K)
    if plane.dtype == np.float16:  # any finite one, subnormal, negative and largest ones too
        values = rng.integers(0, 0x7C00, shape, np.uint16)
        if calm:
            values = rng.uniform(0.001, 1, shape).astype(np.float16).view(np.uint16)
        return (values | rng.choice([0, 0x8000], shape).astype(np.uint16)).view(np.float16)
    if plane.dtype == np.float32:  # products with E4M3 between subnormal and nearly infinite
        size = rng.uniform(-10, 10, shape) if calm else rng.uniform(-130, 118, shape)
        return np.exp2(size).astype(np.float32)
    raw = rng.integers(0, 256, (*shape, plane.dtype.itemsize), np.uint8)
    bits = raw.view(plane.dtype)[..., 0]
    if fmt is NVFP4 and plane.name == "scales":
        return np.where((bits & 0x7F) == 0x7F, 0x01, bits).astype(np.uint8)  # no NaN
    return bits


def _planes(fmt: WeightFormat, seed: int, calm: bool = False) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    return {plane.name: _plane(fmt, plane, rng, calm) for plane in fmt.planes}


def _integers(fmt: WeightFormat, planes: Mapping[str, Array]) -> Array:
    """Weights in units of the code's step, int64 [rows, K]."""
    values = fmt.decode_codes(planes["codes"], planes.get("high"))
    return (values / fmt.code.step).astype(np.int64)


def _factors(fmt: WeightFormat, planes: Mapping[str, Array]) -> tuple[Array, Array | None]:
    """Scale and minimum of each group, float32 [rows, K / group]: rounded once, if at all."""
    if fmt.factors is None:
        return planes["scales"].astype(np.float32), None
    s, m = fmt.factors(planes)
    if fmt is not NVFP4:
        assert np.array_equal(s.astype(np.float32), s), "d times its integer is exact"
        assert m is None or np.array_equal(m.astype(np.float32), m)
    return s.astype(np.float32), None if m is None else m.astype(np.float32)


def _strip(fmt: WeightFormat, planes: dict[str, Array]) -> Array:
    layout = strip_layout(fmt, K)
    strip = aligned((layout.nbytes,), np.uint8)
    matrix: Any = Matrix(**planes)  # type: ignore[arg-type]
    pack_rows(strip.ctypes.data, range(1), layout, matrix, STRIP_ROWS)
    return strip


# codes and scales


@functools.lru_cache(maxsize=128)
def _unpack(fmt: WeightFormat, name: str) -> Callable[..., None]:
    return compile_kernel(integer_dot.unpack(fmt), 4, RUNNABLE[name])


def _unpacked(fmt: WeightFormat, name: str, strip: Array) -> tuple[Array, list[Array]]:
    """A strip's weights as the tier's dot product takes them, uint8 [rows, K], and the parts of
    its scales, float32 [rows, K / group] each."""
    layout = integer_dot.unpacked_layout(fmt)
    groups, halves = K // 32, 32 // min(fmt.group, 32)
    out = aligned((groups, layout.block_bytes), np.uint8, fill=0xAA)
    _unpack(fmt, name)(strip, out, 0, groups)
    quads = out[:, : layout.code_bytes].reshape(groups, QUADS, STRIP_ROWS, 4)
    weights = np.empty((STRIP_ROWS, groups, 32), np.uint8)
    per_byte = 8 // fmt.bits
    for quad in range(QUADS):  # codes at the same place of the four bytes of a word
        word, place = divmod(quad, per_byte)
        inputs = [(4 * word + byte) * per_byte + place for byte in range(4)]
        weights[:, :, inputs] = quads[:, quad].transpose(1, 0, 2)
    parts = np.ascontiguousarray(out[:, layout.code_bytes :]).view(np.float32)
    by_part = parts.reshape(groups, -1, halves, STRIP_ROWS).transpose(1, 3, 0, 2)
    return weights.reshape(STRIP_ROWS, K), list(by_part.reshape(len(by_part), STRIP_ROWS, -1))


@TierNames
@Rows
def test_codes_and_scales_are_decoded(fmt: WeightFormat, name: str) -> None:
    """Every code, every sub-scale, and scales of any size, as `formats` defines them."""
    planes = _planes(fmt, 3)
    w, (s, m) = _integers(fmt, planes), _factors(fmt, planes)
    assert set(np.unique(w)) == set(fmt.code.integers)
    weights, parts = _unpacked(fmt, name, _strip(fmt, planes))
    encoding = integer_dot.encoding_of(fmt)
    unsigned = not encoding.wide or "wide_weights" in _lowered(name)
    assert np.array_equal(weights, (w + encoding.offset * unsigned).astype(np.uint8))
    assert len(parts) == 1 + (m is not None)
    assert np.array_equal(parts[0], s)
    assert m is None or np.array_equal(parts[1], m)


def _lowered(name: str) -> set[str]:
    """Ops that the tier, or one that it extends, lowers its own way."""
    tier, found = TIERS[name], set()
    while True:
        found |= set(tier.lowerings)
        if tier.extends is None:
            return found
        tier = tier.extends


@Rows
def test_the_scales_of_the_tests_are_all_there_are(fmt: WeightFormat) -> None:
    """What random planes are made of: each sub-scale and minimum occurs, in the test above too."""
    planes = _planes(fmt, 3)
    ones = dict(planes)
    if "factors" not in planes or fmt is NVFP4:
        assert fmt.scaling in ("fp16", "fp16, min", "e4m3 * row")
        return
    ones["factors"] = np.ones_like(planes["factors"])
    s, m = _factors(fmt, ones)
    expected = {
        "q2_k": range(16),
        "q3_k": range(-32, 32),
        "q4_k": range(64),
        "q6_k": range(-128, 128),
        "iq4_xs": range(-32, 32),
    }[fmt.scaling]
    assert set(np.unique(s)) == set(expected)
    assert (m is not None) == (fmt.scaling in MINIMA)
    assert m is None or set(np.unique(-m)) == set(expected)


def test_nvfp4_takes_every_scale() -> None:
    """Each E4M3 byte that is a number, times a row's factor, rounded once."""
    planes = _planes(NVFP4, 4)
    number = np.flatnonzero(np.isfinite(E4M3_VALUES)).astype(np.uint8)
    planes["scales"] = np.resize(number, planes["scales"].shape)
    planes["factors"][0] = np.float32(2**-126 * 1.9999)  # some products are subnormal
    with np.errstate(under="ignore"):
        expected = E4M3_VALUES[planes["scales"]] * planes["factors"]
    for name in RUNNABLE:
        if not TIERS[name].tiles:
            _, (s,) = _unpacked(NVFP4, name, _strip(NVFP4, planes))
            assert np.array_equal(s, expected), name


@pytest.mark.parametrize(
    "fmt",
    [f for f in FORMATS.values() if f.scaling in SCALINGS and f.code.name != "e4m3"],
    ids=lambda fmt: fmt.name,
)
def test_biases_and_sums_have_places_of_their_own(fmt: WeightFormat) -> None:
    encoding, at = integer_dot.encoding_of(fmt), FIXED15_GROUP
    used = [at.factor, at.exponent]
    for place in encoding.places:
        used += [w for w in (place.high_bias, place.low_bias, place.sum) if w is not None]
        assert (place.low_bias is not None) == (encoding.offset > 0)
        assert (place.sum is not None) == bool(encoding.sums)
    assert len(set(used)) == len(used)
    assert min(used) >= 64 and max(used) + 4 <= encoding.group_bytes
    assert encoding.group_bytes == (80 if len(used) <= 4 else 96)


# products


@functools.lru_cache(maxsize=128)
def _encoder(fmt: WeightFormat, name: str) -> Callable[..., None]:
    encoding = integer_encoding(integer_dot.encoding_of(fmt))
    return compile_kernel(encode_rows(encoding), 7, RUNNABLE[name])


@functools.lru_cache(maxsize=128)
def _dot(fmt: WeightFormat, name: str, tokens: int, packed: bool) -> Callable[..., None]:
    tier = RUNNABLE[name]
    source = (integer_dot.packed_source if packed else integer_dot.unpacked_source)(fmt)
    how = order.fixed15_order(tokens, tier.registers, tier.registers_per_panel)
    return compile_kernel(group_dot(source, tokens, how), DOT_ARITY, tier)


def _products(
    fmt: WeightFormat, name: str, planes: dict[str, Array], x: Array, packed: bool = True
) -> Array:
    """bf16 bits [T, K] -> float32 [T, rows] of the kernel for T tokens."""
    tokens, groups, strip = len(x), K // 32, _strip(fmt, planes)
    nbytes = integer_dot.encoding_of(fmt).group_bytes
    tile = aligned((groups * tokens * nbytes,), np.uint8, fill=0xFF)
    _encoder(fmt, name)(x, 2 * K, tile, nbytes, tokens, groups, tokens * nbytes)
    sums = aligned((tokens, STRIP_ROWS), np.float32, fill=0xFF)
    codes = strip
    if not packed:
        codes = aligned((groups, integer_dot.unpacked_layout(fmt).block_bytes), np.uint8)
        _unpack(fmt, name)(strip, codes, 0, groups)
    _dot(fmt, name, tokens, packed)(codes, strip, tile, tokens, sums, 0, groups)
    return sums


def _encoded(fmt: WeightFormat, x: Array) -> tuple[Array, Array]:
    """float64 [K] -> (integers q [K / 32, 32], factors, float32 [K / 32])."""
    groups = x.reshape(-1, 32)
    largest = np.maximum(np.abs(groups).max(axis=1), 2.0**-126)
    e = np.frexp(largest)[1] - 1
    q = np.rint(np.ldexp(groups, 13 - e[:, None])).astype(np.int64)
    return q, np.ldexp(fmt.code.step, e - 13).astype(np.float32)


def _documented(fmt: WeightFormat, planes: dict[str, Array], x: Array) -> Array:
    """docs/numerics.md, an operation a line: float64 [K] -> float32 [rows]."""
    w, (s, m) = _integers(fmt, planes), _factors(fmt, planes)
    q, factor = _encoded(fmt, x)
    q_flat, total = q.reshape(-1), np.zeros(STRIP_ROWS, np.float32)
    for i in range(K // fmt.group):
        at = slice(i * fmt.group, (i + 1) * fmt.group)
        f = factor[i * fmt.group // 32]
        part = (w[:, at] @ q_flat[at]).astype(np.float32)
        part = part * f
        part = part * s[:, i]
        if m is not None:
            inputs = np.float32(q_flat[at].sum()) * f
            part = part + inputs * m[:, i]
        total = total + part
    return total


def _inputs(seed: int, tokens: int, spread: int) -> Array:
    """bf16 bits [tokens, K] of 2 * spread + 1 binades; zeros and subnormal numbers now and then."""
    rng = np.random.default_rng(seed)
    centre = int(rng.integers(-20, 20)) if spread < 60 else -60
    exponents = centre + rng.integers(-spread, spread + 1, (tokens, K))
    x = to_bf16(np.ldexp(rng.standard_normal((tokens, K)), exponents))
    x[rng.random((tokens, K)) < 0.05] = 0
    x[:, 32 * int(rng.integers(K // 32)) :][:, :32] = 0x8001  # a group of subnormal numbers
    return x


@TierNames
@Rows
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 4, 12, 60]))
def test_products_are_as_documented(fmt: WeightFormat, name: str, seed: int, spread: int) -> None:
    """Bit for bit, whatever the factors: so all tiers agree."""
    planes, x = _planes(fmt, seed), _inputs(seed, 2, spread)
    with np.errstate(all="ignore"):
        expected = np.stack([_documented(fmt, planes, row) for row in from_bf16(x)])
    got = _products(fmt, name, planes, x)
    assert np.array_equal(got, expected, equal_nan=True)


@Rows
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 4, 12, 60]))
def test_unpacked_products_are_as_documented(fmt: WeightFormat, seed: int, spread: int) -> None:
    planes, x = _planes(fmt, seed), _inputs(seed, 1, spread)
    with np.errstate(all="ignore"):
        expected = _documented(fmt, planes, from_bf16(x[0]))
    for packed in (True, False):
        got = _products(fmt, choose_tier().name, planes, x, packed)[0]
        assert np.array_equal(got, expected, equal_nan=True), packed


@Rows
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32 - 1), spread=st.sampled_from([0, 4, 12]))
def test_products_are_within_the_bound(fmt: WeightFormat, seed: int, spread: int) -> None:
    """Of docs/numerics.md, against float64. Where weights have minima, they and the scaled codes
    count apart: a weight may be the difference of two large numbers."""
    planes, x = _planes(fmt, seed, calm=True), _inputs(seed, 1, spread)
    inputs = from_bf16(x[0])
    weights = fmt.exact(planes)
    minimum = np.zeros_like(weights)
    _, m = _factors(fmt, planes)
    if m is not None:
        minimum = np.repeat(m, fmt.group, axis=1).astype(np.float64)
    q, factor = _encoded(fmt, inputs)
    step = factor.astype(np.float64) / fmt.code.step
    fixed = np.abs(q * step[:, None]).reshape(-1)
    largest = np.repeat(np.abs(inputs.reshape(-1, 32)).max(axis=1), 32)
    sums = K / fmt.group + 3
    bound = sums * 2.0**-24 * ((np.abs(weights - minimum) + np.abs(minimum)) @ fixed)
    bound += 2.0**-14 * (np.abs(weights) @ largest)
    got = _products(fmt, choose_tier().name, planes, x)[0].astype(np.float64)
    assert (np.abs(got - weights @ inputs) <= bound + 2.0**-126).all()


@Rows
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_are_exact(fmt: WeightFormat, sign: int) -> None:
    """Every weight the largest in magnitude, every q 16320: no accumulator overflows."""
    largest = int(np.argmax(np.abs(fmt.code.integers)))
    planes = _planes(fmt, 5, calm=True)
    bits, high_bits = fmt.code.bits, fmt.code.high_bits
    low = largest & ((1 << bits) - 1)
    planes["codes"][:] = sum(low << shift for shift in range(0, 8, bits))
    if high_bits:
        word = sum((largest >> bits) << shift for shift in range(0, 8, high_bits))
        planes["high"][:] = word * 0x01010101
    assert (_integers(fmt, planes) == fmt.code.integers[largest]).all()
    x = np.full((1, K), to_bf16(np.array(sign * (2 - 2**-7))), np.uint16)
    q, _ = _encoded(fmt, from_bf16(x[0]))
    assert (q == sign * 16320).all()
    expected = _documented(fmt, planes, from_bf16(x[0]))
    for name in RUNNABLE:
        if not TIERS[name].tiles:
            tokens = np.repeat(x, 2, axis=0)
            assert np.array_equal(_products(fmt, name, planes, tokens)[1], expected), name
