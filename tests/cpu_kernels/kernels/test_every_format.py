"""Layers of every weight format that processors compute with, on every tier, of ragged shapes.

The expected value is float64 arithmetic on `WeightFormat.exact`, within the bound of
`tests/reference.py`; integer codes have the bits of `portable` besides. `make test` runs nearly
every format on the best tier (and on `portable`, for its bits), and every tier for one row of each
kind of arithmetic; `make test-full` has the whole product.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS, available_tiers
from hybrid_moe.cpu_kernels.kernels.format_kernels import has_kernels, sums_integers
from hybrid_moe.cpu_kernels.kernels.scalings import MINIMA
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.memory import Workspace
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.table import BF16, FORMATS
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat
from tests.cpu_kernels.cases import Array, from_bf16, to_bf16
from tests.cpu_kernels.emulation import QUICK
from tests.formats import random_matrix
from tests.reference import (
    FIXED_POINT_ERROR,
    INT8_ACTIVATION_ERROR,
    Evaluation,
    assert_within,
    evaluate,
)

BEST = next(r.tier.name for r in reversed(available_tiers()) if r.usable)
EVERY_TIER = (
    ("INT4_G32_FP16_Z1", 16),  # small codes, zero points, blocks of two groups
    ("INT8_ROW_FLOAT32", 16),  # whole bytes, fields of rows
    ("Q2_K", 16),  # codes of two bits, halves of a group, minima
    ("INT8_ROW_FLOAT32", 8),  # one plane
)
"""Rows, and bits of activations, that run on every tier even in a short run: on `portable` as what
the others are compared with. What tiers do with each op is tested in `test_ops`."""
BRIEF_8 = ("INT4_G32_FP16_Z1", "INT4_ROW_FLOAT32", "NVFP4", "Q4_K")
"""Rows that meet activations of 8 bits on the best tier in a short run."""
BETWEEN = ("_G64_", "_G256_", "_Z0", "ROW_FP16")
"""In names of rows that differ from others by a shift or a constant: not in a short run."""

Case = tuple[WeightFormat, int]
"""Weights, and bits of activations."""

EXPERTS = 3
TOKENS = [1, 2, 3, 4, 5, 6, 7, 45]
"""Of the first expert: every tile, two tiles, and so many that codes are unpacked."""


def _cases() -> Iterator[Any]:
    """(weights and bits, tier), those of long runs marked."""
    for fmt, tier, bits in itertools.product(FORMATS.values(), TIERS, (16, 8)):
        if not has_kernels(fmt) or (bits == 8 and not sums_integers(fmt)):
            continue
        brief = tier == BEST and not any(group in fmt.name for group in BETWEEN)
        brief &= bits == 16 or fmt.name in BRIEF_8
        brief |= tier != "portable" and (fmt.name, bits) in EVERY_TIER
        marks = [] if brief else pytest.mark.full
        yield pytest.param((fmt, bits), tier, id=f"{fmt.name}-{bits}-{tier}", marks=marks)


Every = pytest.mark.parametrize(("case", "name"), list(_cases()))


def shapes_of(fmt: WeightFormat) -> dict[str, tuple[LayerFormats, int, int]]:
    """Formats, H and I of layers: the smallest sizes; and K of three blocks of groups, a last block
    that ends early included where there is one, with numbers of rows that are no multiple of a
    strip's 64. Where a format's K is a multiple of 64 the other projections are INT8, whose rows
    have no such limit."""
    least = fmt.k_multiple
    longest = max([least, *(plane.per for plane in fmt.planes)])
    blocks = -(-(2 * longest + least) // least) * least
    return {
        "smallest": (LayerFormats(fmt, fmt), least, least),
        "gate and up": (LayerFormats(fmt, INT8), blocks, 96),
        "down": (LayerFormats(INT8, fmt), 160, blocks),
    }


def _in_poison(plane: Array) -> Array:
    """The same numbers, with rows of NaN bits (or -1) around each other."""
    rows, elements = plane.shape
    wide = np.full((rows, (elements + 5) * plane.itemsize), 0xFF, np.uint8).view(plane.dtype)
    wide[:, 2 : 2 + elements] = plane
    return wide[:, 2 : 2 + elements]


def matrix_of(fmt: WeightFormat, rng: np.random.Generator, N: int, K: int) -> Matrix:
    """Random, in planes with strided rows."""
    made = random_matrix(fmt, rng, N, K)
    planes = {name: _in_poison(plane) for name, plane in made.planes.items()}
    return Matrix(**planes, scale_rows=made.scale_rows)  # type: ignore[arg-type]


@functools.lru_cache(maxsize=4)
def _experts(fmt: WeightFormat, shape: str) -> list[ExpertTensors]:
    formats, H, I = shapes_of(fmt)[shape]
    rng = np.random.default_rng(7)
    return [
        ExpertTensors(
            matrix_of(formats.gate_up, rng, I, H),
            matrix_of(formats.gate_up, rng, I, H),
            matrix_of(formats.down, rng, H, I),
        )
        for _ in range(EXPERTS)
    ]


def sizes(fmt: WeightFormat, matrix: Matrix) -> Array:
    """What the roundings of its products are relative to, float64 [N, K]: abs(value * s) and
    abs(offset) apart where a kernel adds them apart (minima), else abs(weight). Zero points are
    taken off while sums are integers."""
    planes = matrix.planes
    if fmt.factors is None or fmt.scaling not in MINIMA:
        return np.abs(fmt.exact(planes))
    s, offset = fmt.factors(planes)
    assert offset is not None
    values = np.abs(fmt.decode_codes(planes["codes"], planes.get("high")).astype(np.float64))
    s, offset = (np.repeat(np.abs(part), fmt.group, axis=1) for part in (s, offset))
    total: Array = values * s + offset
    return total


def batch_of(tokens: int, H: int) -> tuple[Array, Array, Array]:
    """All tokens go to expert 0, and some to one of the others; ids of -1 contribute nothing, even
    with a weight that is NaN."""
    rng = np.random.default_rng(tokens)
    x = to_bf16(rng.standard_normal((tokens, H)))
    ids = np.zeros((tokens, 2), np.int64)
    ids[:, 1] = rng.integers(-1, EXPERTS, tokens)
    ids[ids[:, 1] == 0, 1] = -1
    weights = rng.uniform(0.1, 1, (tokens, 2)).astype(np.float32)
    weights[ids < 0] = np.nan
    return x, ids, weights


@functools.lru_cache(maxsize=4)
def _dequantized(fmt: WeightFormat, shape: str) -> dict[str, Array]:
    """The weights of all experts as float64, and `sizes` of them."""
    formats, _, _ = shapes_of(fmt)[shape]
    parts: dict[str, Array] = {}
    for name in ("gate", "up", "down"):
        of = formats.down if name == "down" else formats.gate_up
        matrices = [getattr(expert, name) for expert in _experts(fmt, shape)]
        parts[name] = np.stack([of.exact(m.planes) for m in matrices])
        parts[f"{name}_sizes"] = np.stack([sizes(of, m) for m in matrices])
    return parts


@functools.lru_cache(maxsize=64)
def _expected(case: Case, shape: str, tokens: int) -> Evaluation:
    fmt, bits = case
    x, ids, weights = batch_of(tokens, shapes_of(fmt)[shape][1])
    parts = _dequantized(fmt, shape)
    error = 0.0
    if sums_integers(fmt):
        error = FIXED_POINT_ERROR if bits == 16 else INT8_ACTIVATION_ERROR
    return evaluate(from_bf16(x), ids, np.nan_to_num(weights), **parts, activation_error=error)


def _layer(case: Case, shape: str, tier: str) -> ExpertLayer:
    fmt, bits = case
    formats, H, I = shapes_of(fmt)[shape]
    layer = ExpertLayer(
        formats, EXPERTS, H, I, pool=PoolConfig(1), activation_bits=bits, isa=QUICK[tier]
    )
    layer.allocate(np.ones(EXPERTS, bool))
    for number, expert in enumerate(_experts(fmt, shape)):
        layer.load(number, expert)
    return layer


@pytest.fixture(autouse=True)
def _poisoned_jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The memory of a new job is all NaN."""
    init = Workspace.__init__

    def poisoned(self: Workspace, nbytes: int) -> None:
        init(self, nbytes)
        self._arena.bytes[:] = 0xFF

    monkeypatch.setattr(Workspace, "__init__", poisoned)
    yield


@functools.lru_cache(maxsize=64)
def _portable_bits(case: Case, shape: str, tokens: int) -> Array:
    layer = _layer(case, shape, "portable")
    out = layer.forward(*batch_of(tokens, layer.hidden))
    layer.close()
    return out


@Every
def test_every_format_on_every_tier(case: Case, name: str) -> None:
    """Within the bound, and with the bits of the portable tier where sums are whole numbers."""
    fmt, _ = case
    for shape in shapes_of(fmt):
        layer = _layer(case, shape, name)
        for tokens in TOKENS:
            out = layer.forward(*batch_of(tokens, layer.hidden))
            assert_within(from_bf16(out), _expected(case, shape, tokens))
            if sums_integers(fmt):
                assert np.array_equal(out, _portable_bits(case, shape, tokens)), (shape, tokens)
        layer.close()


def test_8_bit_activations_are_for_integers() -> None:
    with pytest.raises(ValueError, match="those of BF16 are not"):
        ExpertLayer(BF16, 1, 32, 32, pool=PoolConfig(1), activation_bits=8)
    with pytest.raises(ValueError, match="of 4 bits"):
        ExpertLayer(INT8, 1, 32, 32, pool=PoolConfig(1), activation_bits=4)
