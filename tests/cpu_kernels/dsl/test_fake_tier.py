"""A tier that no processor has: one row of lowerings, and every kernel of every format runs.

Its ops are generic LLVM vectors that do the work in other ways than both the generic lowerings and
the real tiers do, on registers of widths and counts that no kernel could have been written for. So
nothing but the row says what a tier is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.emit import F32, I8, I32, Emit, Val
from hybrid_moe.cpu_kernels.dsl.ops import OPS, Lowering, fused, unpack_pair
from hybrid_moe.cpu_kernels.dsl.tiers import PORTABLE, Tier
from hybrid_moe.cpu_kernels.dsl.tiles import TILE_OPS
from hybrid_moe.cpu_kernels.kernels.order import fixed15_most
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import Case, from_bf16, random_batch
from tests.cpu_kernels.kernels.test_kernels import check_dot_kernels
from tests.reference import assert_within

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)

# An accumulator of byte dots holds the sum times -4 (modulo 2^32: a sum has fewer than 29 bits).


def _lookup16(emit: Emit, table: tuple[int, ...], index: Val) -> Val:
    """Selects over the bits of the index, the upper bit first."""
    if len(table) == 1:
        return emit.splat(table[0], I8, index.lanes)
    half = len(table) // 2
    upper = (index & half).equals(half)
    return upper.select(_lookup16(emit, table[half:], index), _lookup16(emit, table[:half], index))


def _byte_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """The last product first, each times 4."""
    w32, x32 = w.bits(I32), emit.broadcast(x, 16)
    for i in (3, 2, 1, 0):
        scaled = (x32 << (24 - 8 * i)).sar(22) & -4
        accumulator = accumulator - ((w32 >> (8 * i)) & 255) * scaled
    return accumulator


def _byte_dot_bias(emit: Emit, x: Val, offset: int) -> Val:
    return emit.reduce("add", x.sext(I32)) * (4 * offset)


def _byte_dot_total(emit: Emit, high: Val, low: Val) -> Val:
    return -((high << 6) + low.sar(2))


# An accumulator of wide dots: the sums of the low plane, then those of the high one, negative. The
# activations lie in planes, as a tier with a matrix unit must keep them.


def _wide_split(emit: Emit, q: Val) -> Val:
    """The low plane is q's lower byte, and a borrow makes it signed."""
    low = (q << 24).sar(24)
    return ((q - low) >> 8).trunc(I8).concat(low.trunc(I8))


def _wide_start(emit: Emit, bias: Val) -> Val:
    return emit.splat(0, I32, 32)


def _wide_weights(emit: Emit, w: Val, offset: int) -> Val:
    """Signed."""
    return -(-w + offset)


def _wide_lookup(emit: Emit, table: tuple[int, ...], offset: int, index: Val) -> Val:
    return _lookup_low4(emit, tuple(weight & 255 for weight in table), index)


def _wide_dot(emit: Emit, accumulator: Val, w: Val, first: Val, second: Val) -> Val:
    """The last product first, the low plane first."""
    w32 = w.bits(I32).concat(w.bits(I32))
    x32 = emit.broadcast(second, 16).concat(emit.broadcast(first, 16))
    for i in (3, 2, 1, 0):
        accumulator = accumulator - (w32 << (24 - 8 * i)).sar(24) * (x32 << (24 - 8 * i)).sar(24)
    return accumulator


def _wide_total(emit: Emit, accumulator: Val) -> Val:
    low, high = accumulator.halves()
    return -(low + high * 256)


def _narrow_start(emit: Emit, bias: Val) -> Val:
    """Signed weights need no bias."""
    return emit.broadcast(bias * 0, 16)


def _narrow_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """The last product first."""
    return accumulator - _wide_dot(emit, emit.splat(0, I32, 32), w, x, x).halves()[0]


def _half_to_float(emit: Emit, x: Val) -> Val:
    """Normal and subnormal numbers apart; the tests have no others."""
    wide = x.zext(I32)
    exponent, mantissa = (wide >> 10) & 31, wide & 1023
    normal = (((exponent + 112) << 23) | (mantissa << 13)).bits(F32)
    value = exponent.equals(0).select(mantissa.to_float() * 2.0**-24, normal)
    return (value.bits(I32) | ((wide >> 15) << 31)).bits(F32)


def _e4m3_pairs(emit: Emit, codes: Val) -> Val:
    """Normal and subnormal numbers apart, as integers; a NaN by its code."""
    words, parts = codes.bits(I32), []
    for i in range(4):
        m = (words >> (8 * i)) & 127
        subnormal = (m.to_float() * 2.0**-9).bits(I32) >> 16
        bits = (m < 8).select(subnormal, m * 16 + 0x3C00)
        bits = (m > 126).select(0x7FF0, bits)
        parts.append(bits + ((words >> (8 * i + 7)) & 1) * 0x8000)
    return (parts[0] + parts[2] * 65536).concat(parts[1] + parts[3] * 65536)


def _pair_dot(emit: Emit, accumulator: Val, w: Val, x: Val) -> Val:
    """Eight rows at a time."""
    (w0, w1), (x0, x1) = unpack_pair(w), unpack_pair(emit.broadcast(x, 16))
    halves = zip(*(v.halves() for v in (accumulator, w0, w1, x0, x1)), strict=True)
    low, high = (fused(emit, a0, b0, fused(emit, a1, b1, c)) for c, a0, a1, b0, b1 in halves)
    return low.concat(high)


def _lookup_low4(emit: Emit, table: tuple[int, ...], index: Val) -> Val:
    """Shifts out and in again what does not count."""
    return _lookup16(emit, table, (index << 4) >> 4)


def _times_power(emit: Emit, value: Val, factor: Val, exponent: Val) -> Val:
    return (factor * value).bits(I32).bits(F32)


_DOTS = {
    ("MXFP4", False): {
        *("lookup_low4", "byte_dot", "byte_dot_bias", "byte_dot_total", "times_power"),
    },
    ("MXFP4", True): {"byte_dot", "tile_dot_bytes", "tile_configure", "tile_release"},
    ("INT8", False): {
        *("wide_split", "wide_start", "wide_weights", "wide_dot", "wide_total"),
        *("half_to_float", "times_power"),
    },
    ("INT8", True): {
        *("wide_split", "wide_dot", "half_to_float", "tile_dot_bytes", "tile_configure"),
        "tile_release",
    },
    ("BF16", False): {"pair_dot"},
    ("BF16", True): {"tile_dot_pairs", "tile_configure", "tile_release"},
}
"""(format, with tiles) -> ops that its kernels cannot do without."""

_LOWERINGS: dict[str, Lowering] = {
    "lookup16": _lookup16,
    "lookup_low4": _lookup_low4,
    "byte_dot": _byte_dot,
    "byte_dot_bias": _byte_dot_bias,
    "byte_dot_total": _byte_dot_total,
    "wide_split": _wide_split,
    "wide_start": _wide_start,
    "wide_weights": _wide_weights,
    "wide_lookup": _wide_lookup,
    "wide_dot": _wide_dot,
    "wide_total": _wide_total,
    "narrow_start": _narrow_start,
    "narrow_dot": _narrow_dot,
    "half_to_float": _half_to_float,
    "e4m3_pairs": _e4m3_pairs,
    "pair_dot": _pair_dot,
    "times_power": _times_power,
}


def _fake(vector_bits: int, registers: int, tiles: bool, used: Counter[str]) -> Tier:
    def counted(op: str, lowering: Lowering) -> Callable[..., Val]:
        def lower(*operands: object) -> Val:
            used[op] += 1
            return lowering(*operands)

        return lower

    lowerings = _LOWERINGS | {name: op.lower for name, op in TILE_OPS.items()}
    return Tier(
        f"fake{vector_bits}x{registers}",
        frozenset(),
        "",
        vector_bits=vector_bits,
        registers=registers,
        lowerings={op: counted(op, lowering) for op, lowering in lowerings.items()},
        tiles=tiles,
    )


def test_the_fake_tier_lowers_every_op_its_own_way() -> None:
    assert set(_LOWERINGS) == set(OPS)
    for op, lowering in _LOWERINGS.items():
        assert lowering is not OPS[op].lower


@pytest.mark.parametrize(
    ("vector_bits", "registers", "tiles", "most"),
    [
        (1024, 10, False, 3),
        (64, 8, True, 1),
    ],
)
@Formats
def test_a_new_tier_is_one_row(
    fmt: WeightFormat, vector_bits: int, registers: int, tiles: bool, most: int
) -> None:
    used: Counter[str] = Counter()
    fake = _fake(vector_bits, registers, tiles, used)
    assert fixed15_most(fake.registers, fake.registers_per_panel) == most
    check_dot_kernels(fmt, fake)
    case = Case.random(fmt, 96, 64, bias=True)
    layer, portable = case.layer(fake), case.layer(PORTABLE)
    for tokens in (1, 3, 9, 50):
        batch = random_batch(tokens, case.H, case.E, 3)
        out = layer.forward(*batch)
        assert_within(from_bf16(out), case.reference(*batch))
        if fmt.name != "BF16" or not tiles:
            assert np.array_equal(out, portable.forward(*batch)), "normal numbers: the same bits"
    assert set(used) >= _DOTS[fmt.name, tiles]


@pytest.mark.parametrize("fmt", [MXFP4, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("tiles", [False, True])
def test_a_new_tier_takes_activations_of_8_bits(fmt: WeightFormat, tiles: bool) -> None:
    used: Counter[str] = Counter()
    case = Case.random(fmt, 96, 64)
    layers = [case.layer(tier, activation_bits=8) for tier in (_fake(64, 8, tiles, used), PORTABLE)]
    for tokens in (1, 3, 9, 50):
        batch = random_batch(tokens, case.H, case.E, 3)
        out, expected = (layer.forward(*batch) for layer in layers)
        assert np.array_equal(out, expected)
    assert set(used) >= ({"narrow_start", "narrow_dot"} if fmt is INT8 else {"byte_dot"})
