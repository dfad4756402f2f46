"""Kernels of E4M3 codes: FP8, FP8_PERCHANNEL, MXFP8. The arithmetic of docs/numerics.md, step by
step in NumPy, bit for bit; and layers of ragged shapes within the float64 bound."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, Tier, available_tiers
from hybrid_moe.cpu_kernels.kernels.dot import DOT_ARITY
from hybrid_moe.cpu_kernels.kernels.encode import BLOCK_SLACK
from hybrid_moe.cpu_kernels.kernels.format_kernels import format_kernels
from hybrid_moe.cpu_kernels.kernels.library import KernelSet, Tiling, kernel_set
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.strips.pack import pack_rows
from hybrid_moe.formats.float8 import FP8, FP8_PERCHANNEL
from hybrid_moe.formats.mx import MXFP8
from hybrid_moe.formats.numbers import E4M3_VALUES, f32_to_e4m3
from hybrid_moe.formats.strips import STRIP_ROWS, strip_layout
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import Array, from_bf16, random_batch, to_bf16
from tests.cpu_kernels.emulation import QUICK, RUNNABLE
from tests.cpu_kernels.toolbox import aligned, before_a_guard, callable_at
from tests.formats import random_matrix
from tests.reference import assert_within, evaluate

FORMATS = (FP8, FP8_PERCHANNEL, MXFP8)
Formats = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)

BEST = next(r.tier.name for r in reversed(available_tiers()) if r.usable)
GROUPS = 35
"""More than one chunk, more than two turns, and a last span of three groups where one has four."""
K = 32 * GROUPS
BITS_32 = np.uint32


def _is_new(tier: Tier) -> bool:
    """Whether it does anything here in another way than the tier that it extends."""
    own = {"e4m3_pairs", "pair_dot", "times_power", "lookup16", "tile_dot_pairs"}
    below = tier.extends
    return (
        below is None
        or not own.isdisjoint(tier.lowerings)
        or (tier.vector_bits, tier.registers) != (below.vector_bits, below.registers)
    )


def _points() -> Iterator[Any]:
    """Formats and tiers; those whose kernels are others' by construction only in long runs."""
    for fmt, (name, tier) in itertools.product(FORMATS, TIERS.items()):
        brief = _is_new(tier) and (fmt is not FP8_PERCHANNEL or name in (BEST, "amx"))
        marks = [] if brief else pytest.mark.full
        yield pytest.param(fmt, name, id=f"{fmt.name}-{name}", marks=marks)


Points = pytest.mark.parametrize(("fmt", "name"), list(_points()))


@functools.lru_cache(maxsize=16)
def _kernels(fmt_name: str, name: str) -> KernelSet:
    return kernel_set(fmt_name, RUNNABLE[name])


# The arithmetic of the contract.


def _scales(fmt: WeightFormat, matrix: Matrix, groups: int) -> Array:
    """float32 [rows, groups]."""
    assert fmt.scale is not None and matrix.scales is not None
    s = fmt.scale.decode(matrix.scales)
    wide = np.repeat(s, (fmt.group or 32 * groups) // 32, axis=1)[:, :groups]
    return np.repeat(wide, fmt.scale_rows, axis=0)[: len(matrix.codes)]


def _part(w: Array, x: Array) -> Array:
    """float32 [rows, n], [T, n]: the products of pairs, the second of each first."""
    part = np.zeros((len(x), len(w)), np.float32)
    for four in range(0, w.shape[1], 4):
        for i in (2, 0, 3, 1):
            part = part + np.outer(x[:, four + i], w[:, four + i])
    return part


def _tile_part(w: Array, x: Array) -> Array:
    """The same in the order of a matrix unit: 32 inputs at a time, 0 and 1 of four apart from 2
    and 3."""
    part = np.zeros((len(x), len(w)), np.float32)
    for group in range(0, w.shape[1], 32):
        halves = [np.zeros_like(part) for _ in range(2)]
        for four, i, half in itertools.product(range(group, group + 32, 4), (0, 1), (0, 1)):
            at = four + i + 2 * half
            halves[half] = halves[half] + np.outer(x[:, at], w[:, at])
        part = part + (halves[0] + halves[1])
    return part


def contract(fmt: WeightFormat, matrix: Matrix, x: Array, tiles: bool) -> Array:
    """bf16 bits [T, K] -> float32 [T, rows], the bits of docs/numerics.md for normal numbers."""
    values, w = from_bf16(x).astype(np.float32), E4M3_VALUES[matrix.codes]
    scales = _scales(fmt, matrix, x.shape[1] // 32)
    span = 32 if fmt is MXFP8 else 128
    sums = np.zeros((len(x), len(w)), np.float32)
    for at in range(0, x.shape[1], span):
        part = (_tile_part if tiles else _part)(w[:, at : at + span], values[:, at : at + span])
        sums = sums + part * scales[:, at // 32]
    return sums


# The kernels, called as the drivers do.


def _tile(kernels: KernelSet, x: Array, poison: int) -> Array:
    """Encoded rows as a tile, and behind it what may be anything, up to a page not to touch."""
    size = kernels.encoding.group_bytes
    groups = x.shape[1] // 32
    rows = aligned((len(x), groups, size), np.uint8)
    call = callable_at(kernels.encode, 7)
    call(np.ascontiguousarray(x), 2 * x.shape[1], rows, groups * size, len(x), groups, size)
    encoded = rows.transpose(1, 0, 2).reshape(-1)
    tile = before_a_guard(len(encoded) + BLOCK_SLACK)
    tile[: len(encoded)] = encoded
    tile[len(encoded) :] = np.resize(np.array([poison], np.uint16).view(np.uint8), BLOCK_SLACK)
    return tile


def _strip(fmt: WeightFormat, matrix: Matrix, number: int = 0) -> Array:
    """A strip of the matrix in front of a page that must not be touched."""
    N, k = matrix.codes.shape
    layout = strip_layout(fmt, k)
    strip = before_a_guard(layout.nbytes, fill=0xFF)
    pack_rows(strip.ctypes.data, range(number, number + 1), layout, matrix, N)
    return strip


def products(
    fmt: WeightFormat,
    kernels: KernelSet,
    tiling: Tiling,
    strip: Array,
    x: Array,
    cuts: Sequence[int],
) -> Array:
    """float32 [T, 64] of one tile, its groups cut at `cuts`."""
    tile, count = _tile(kernels, x, poison=0x7FC0), len(x)
    rows = -(-count // tiling.unit) * tiling.unit
    sums = before_a_guard(256 * rows, 0xFF).view(np.float32).reshape(rows, STRIP_ROWS)
    unpacked = before_a_guard(GROUPS * format_kernels(fmt).unpacked_group_bytes, 0xFF)
    if kernels.enter:
        callable_at(kernels.enter, 0)()
    for begin, end in itertools.pairwise(cuts):
        at = strip.ctypes.data
        if tiling.unpack:
            unpacked[:] = 0xFF
            callable_at(tiling.unpack, 4)(at, unpacked, begin, end)
            at = unpacked.ctypes.data
        ahead = strip.ctypes.data + len(strip)  # a hint
        callable_at(tiling.kernels[count], DOT_ARITY)(at, ahead, tile, count, sums, begin, end)
    if kernels.leave:
        callable_at(kernels.leave, 0)()
    return sums[:count]


def _tilings(kernels: KernelSet) -> list[Tiling]:
    return [kernels.direct] if kernels.direct is kernels.tiled else [kernels.direct, kernels.tiled]


def _counts(tiling: Tiling) -> list[int]:
    """Of a matrix unit's 32 those at the ends of its blocks."""
    some = {1, 2, 3, 4, 15, 16, 17, 31, 32}
    return [n for n in tiling.kernels if tiling.unit == 1 or n in some]


@Points
def test_bits_are_those_of_the_contract(fmt: WeightFormat, name: str) -> None:
    """Every kernel, whole and in chunks; what was in memory before does not matter."""
    kernels, rng = _kernels(fmt.name, name), np.random.default_rng(3)
    matrix = random_matrix(fmt, rng, STRIP_ROWS, K)
    subnormal = rng.random(matrix.codes.shape) < 0.1
    matrix.codes[subnormal] &= 0x87
    strip = _strip(fmt, matrix)
    x = to_bf16(rng.standard_normal((32, K)))
    expected = contract(fmt, matrix, x, TIERS[name].tiles)
    for tiling in _tilings(kernels):
        for count, cuts in itertools.product(_counts(tiling), ([0, GROUPS], [0, 4, 32, GROUPS])):
            got = products(fmt, kernels, tiling, strip, x[:count], cuts)
            assert np.array_equal(got.view(BITS_32), expected[:count].view(BITS_32)), (count, cuts)


def _integers(fmt: WeightFormat, rng: np.random.Generator, N: int) -> Matrix:
    """Weights that are multiples of 1/8 up to 16 with scales of 1/2, 1 or 2: float32 holds the sums
    of their products with small integers exactly, in any order."""
    codes = f32_to_e4m3(
        (rng.integers(-15, 16, (N, K)) / 8 * rng.choice([1, 8], (N, K))).astype("f4")
    )
    shape = fmt.scale_shape(N, K)
    assert shape is not None
    if fmt is MXFP8:
        return Matrix(codes, rng.integers(126, 129, shape, np.uint8))
    scales = rng.choice([0.5, 1.0, 2.0], shape).astype(np.float32)
    return Matrix(codes, scales, scale_rows=fmt.scale_rows)


@Points
def test_any_cut_gives_the_sums(fmt: WeightFormat, name: str) -> None:
    """Within a span too; and rows beyond the last are zero."""
    kernels, rng = _kernels(fmt.name, name), np.random.default_rng(4)
    N = 2 * STRIP_ROWS + 40  # the last strip in the second block of rows
    matrix, x = _integers(fmt, rng, N), to_bf16(rng.integers(-8, 9, (6, K)))
    expected = np.zeros((6, 3 * STRIP_ROWS))
    expected[:, :N] = from_bf16(x) @ fmt.exact(matrix.planes).T
    for number, tiling in itertools.product((0, 2), _tilings(kernels)):
        strip = _strip(fmt, matrix, number)
        part = expected[:, STRIP_ROWS * number : STRIP_ROWS * (number + 1)]
        ends = {min(tiling.kernels), max(n for n in tiling.kernels if n <= len(x))}
        for count, cuts in itertools.product(ends, ([0, GROUPS], [0, 2, 17, 18, GROUPS])):
            got = products(fmt, kernels, tiling, strip, x[:count], cuts)
            assert np.array_equal(got, part[:count]), (number, count, cuts)


@pytest.mark.parametrize("name", [BEST, "amx"])
@Formats
def test_nan_stays_in_its_row_and_token(fmt: WeightFormat, name: str) -> None:
    kernels, rng = _kernels(fmt.name, name), np.random.default_rng(5)
    matrix, x = _integers(fmt, rng, STRIP_ROWS), to_bf16(rng.integers(-8, 9, (6, K)))
    clean = _strip(fmt, matrix)
    matrix.codes[7, 33], matrix.codes[50, K - 1] = 0x7F, 0xFF
    nan_row, nan_token = _strip(fmt, matrix), x.copy()
    nan_token[1, 40], nan_token[2, K - 1] = 0x7FC0, 0x7F80
    for tiling in _tilings(kernels):
        count = max(c for c in tiling.kernels if c <= 6)
        good = products(fmt, kernels, tiling, clean, x[:count], [0, GROUPS])
        got = products(fmt, kernels, tiling, nan_row, x[:count], [0, GROUPS])
        rows = np.isin(np.arange(STRIP_ROWS), (7, 50))
        assert np.isnan(got[:, rows]).all() and np.array_equal(got[:, ~rows], good[:, ~rows])
        got = products(fmt, kernels, tiling, clean, nan_token[:count], [0, GROUPS])
        tokens = np.isin(np.arange(count), (1, 2))
        assert np.isnan(got[1]).all() and not np.isfinite(got[2:3]).any()
        assert np.array_equal(got[~tokens], good[~tokens])


# Layers.

H, I, E = 416, 224, 3
"""Neither is a multiple of 128: the last block of rows, and of inputs, is short."""
TOKENS = (1, 2, 3, 5, 7, 50)


@functools.lru_cache(maxsize=4)
def _experts(fmt: WeightFormat) -> list[ExpertTensors]:
    rng = np.random.default_rng(6)
    return [
        ExpertTensors(*(random_matrix(fmt, rng, *shape) for shape in ((I, H), (I, H), (H, I))))
        for _ in range(E)
    ]


def _layer(fmt: WeightFormat, tier: Tier) -> ExpertLayer:
    layer = ExpertLayer(fmt, E, H, I, pool=PoolConfig(1), isa=tier)
    layer.allocate(np.ones(E, bool))
    for expert, tensors in enumerate(_experts(fmt)):
        layer.load(expert, tensors)
    return layer


@pytest.fixture
def poisoned_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a new job is all NaN."""
    init = Workspace.__init__

    def poisoned(self: Workspace, nbytes: int) -> None:
        init(self, nbytes)
        self._arena.bytes[:] = 0xFF

    monkeypatch.setattr(Workspace, "__init__", poisoned)


@Formats
def test_layers_and_their_batches(fmt: WeightFormat, poisoned_jobs: None) -> None:
    """Within the bound, every tile; each token has the bits that it has alone, and on the best
    vectors those of `portable`."""
    stacked = {
        name: np.stack([fmt.exact(getattr(e, name).planes) for e in _experts(fmt)])
        for name in ("gate", "up", "down")
    }
    outputs = {}
    for tier in (QUICK["amx"], RUNNABLE["portable"], RUNNABLE[BEST]):
        layer = _layer(fmt, tier)
        for tokens in TOKENS:
            x, ids, weights = random_batch(tokens, H, E, 2)
            out = outputs[tier.name, tokens] = layer.forward(x, ids, weights)
            reference = evaluate(from_bf16(x), ids, weights, **stacked, activation_error=0.0)
            assert_within(from_bf16(out), reference)
            for t in {0, tokens // 2, tokens - 1}:
                alone = layer.forward(x[t : t + 1], ids[t : t + 1], weights[t : t + 1])
                assert np.array_equal(out[t], alone[0]), (tier.name, tokens, t)
        layer.close()
    for tokens in TOKENS if not TIERS[BEST].tiles else ():
        best, portable = (outputs[tier, tokens] for tier in (BEST, "portable"))
        assert np.array_equal(best, portable)
