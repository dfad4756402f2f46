"""Bits do not depend on luck: one token's output, whatever surrounds it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.job import IDLE
from hybrid_moe.cpu_kernels.kernels.library import kernel_set
from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.memory import Arena
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores
from hybrid_moe.cpu_kernels.tuning import BATCH_TOKENS
from hybrid_moe.formats.integers import INT8
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import GROUP
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import ExpertTensors, Matrix
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import Array, Case, flushes_subnormals, from_bf16, random_batch
from tests.cpu_kernels.emulation import QUICK, RUNNABLE

TOKENS = 12
"""Distinct tokens; batches repeat them."""
SHAPES = ((1120, 64), (64, 1056), (1024, 64))
"""Groups of inputs, of gate/up and of down: 35 and 2, 2 and 33, 32 and 2. A chunk that several
tiles meet has 32 groups: a part of one, one group more than one, a whole one."""
_CHUNKS = {"INT8": 2}
"""Format -> times as long a chunk."""


def _shape(fmt_name: str, index: int) -> tuple[int, int]:
    H, I = SHAPES[index]
    more = GROUP * 32 * (_CHUNKS.get(fmt_name, 1) - 1)
    return (H + more, I) if H > I else (H, I + more)


_NODE = min(numa_nodes())
CONFIGS = [
    PoolConfig(threads, pools, (_NODE,) * pools)
    for threads, pools in ((1, 1), (2, 1), (2, 2), (3, 2), (4, 4))
    if threads <= usable_cores()
]

Formats = pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda f: f.name)
TierNames = pytest.mark.parametrize("name", TIERS)
TwoCores = pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")


@functools.cache
def _case(fmt_name: str, shape: tuple[int, int]) -> Case:
    return Case.random(DENSE_FORMATS[fmt_name], *shape, E=3, bias=True)


@functools.cache
def _layer(
    fmt_name: str, name: str, shape: tuple[int, int] = SHAPES[0], pool: PoolConfig = CONFIGS[0]
) -> ExpertLayer:
    return _case(fmt_name, shape).layer(QUICK[name], pool)


def _batch(shape: tuple[int, int], rows: Array) -> tuple[Array, Array, Array]:
    """Tokens `rows` of the twelve. All choose expert 0, and 1 or 2 or nothing, in either slot."""
    x, _, weights = random_batch(TOKENS, shape[0], 3, 2)
    ids = np.stack([np.zeros(TOKENS, np.int64), np.array([1, 2, -1] * (TOKENS // 3))], axis=1)
    ids[::2] = ids[::2, ::-1]
    return x[rows], ids[rows], weights[rows]


@functools.cache
def _alone(fmt_name: str, name: str, shape: tuple[int, int]) -> Array:
    """Each token's output when it is the only one."""
    layer = _layer(fmt_name, name, shape)
    return np.concatenate([layer.forward(*_batch(shape, np.array([t]))) for t in range(TOKENS)])


def _edges(fmt_name: str, name: str) -> list[int]:
    """Numbers of tokens of one expert on either side of whatever a pass decides by."""
    kernels = kernel_set(fmt_name, QUICK[name])
    limits = {kernels.tiled_from, BATCH_TOKENS, kernels.direct.most, kernels.tiled.most}
    limits |= {2 * kernels.direct.most, 2 * kernels.tiled.most}
    near = {limit + i for limit in limits for i in (-1, 0, 1)}
    return sorted(count for count in {1, *near} if 0 < count <= BATCH_TOKENS + 1)


@pytest.mark.parametrize("index", range(len(SHAPES)))
@TierNames
@Formats
def test_one_token_or_many(fmt: WeightFormat, name: str, index: int) -> None:
    """A token alone, and with so many that its expert takes any other kernel, path or chunk."""
    shape = _shape(fmt.name, index)
    kernels = kernel_set(fmt.name, QUICK[name])
    edges = _edges(fmt.name, name)
    assert edges[0] == 1 and edges[-1] == BATCH_TOKENS + 1
    assert max(shape) // GROUP - kernels.tiled.groups in (0, 1, 3)
    layer, alone = _layer(fmt.name, name, shape), _alone(fmt.name, name, shape)
    rng = np.random.default_rng(4)
    for count in edges:
        rows = rng.integers(0, TOKENS, count)
        assert np.array_equal(layer.forward(*_batch(shape, rows)), alone[rows]), count


@TierNames
@Formats
@settings(max_examples=12)
@given(data=st.data())
def test_any_batch_on_any_pool(fmt: WeightFormat, name: str, data: st.DataObject) -> None:
    """Any selection of tokens in any order, repetitions included, on any number of threads."""
    shape, pool = data.draw(st.sampled_from(SHAPES)), data.draw(st.sampled_from(CONFIGS))
    count = data.draw(st.sampled_from(_edges(fmt.name, name)) | st.integers(1, 70))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rows = np.random.default_rng(seed).integers(0, TOKENS, count)
    out = _layer(fmt.name, name, shape, pool).forward(*_batch(shape, rows))
    assert np.array_equal(out, _alone(fmt.name, name, shape)[rows])


@Formats
def test_ignored_slots_do_not_change_bits(fmt: WeightFormat) -> None:
    layer = _layer(fmt.name, "portable")
    x, ids, weights = random_batch(9, SHAPES[0][0], 3, 2)
    padded = np.full((9, 5), -1, np.int64)
    padded[:, 1], padded[:, 4] = ids[:, 0], ids[:, 1]
    wide = np.full((9, 5), np.nan, np.float32)
    wide[:, 1], wide[:, 4] = weights[:, 0], weights[:, 1]
    assert np.array_equal(layer.forward(x, padded, wide), layer.forward(x, ids, weights))


@TwoCores
@pytest.mark.parametrize("shape", [(96, 64), (32, 32), (352, 160)], ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40, 130])
@Formats
def test_threads_and_pools(fmt: WeightFormat, tokens: int, shape: tuple[int, int]) -> None:
    """Two pools share even a single block of 32 rows: then one of them has none."""
    case = Case.random(fmt, *shape, bias=True)
    batch = random_batch(tokens, case.H, case.E, 3)
    first, *others = [case.layer(pool=config).forward(*batch) for config in CONFIGS]
    assert others
    for out in others:
        assert np.array_equal(out, first)


@TwoCores
def test_pools_hold_each_weight_once() -> None:
    case = Case.random(MXFP4, 352, 160)
    whole = case.layer(pool=CONFIGS[0])
    assert case.layer(pool=PoolConfig(2, 2, (_NODE, _NODE))).nbytes == whole.nbytes


# memory that a job did not write


@TierNames
@pytest.mark.parametrize("shape", [(32, 32), (96, 160)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 70])
@Formats
def test_uninitialised_memory_is_never_read(
    fmt: WeightFormat,
    tokens: int,
    shape: tuple[int, int],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All bits of packed padding and of workspaces are one (NaN) before they are written."""
    case = Case.random(fmt, *shape)
    batch = random_batch(tokens, case.H, case.E, 3)
    expected = case.layer(RUNNABLE[name]).forward(*batch)
    map_memory = Arena.__init__
    poisoned: list[int] = []

    def map_poisoned(self: Arena, nbytes: int, numa_nodes: Sequence[int] = ()) -> None:
        map_memory(self, nbytes, numa_nodes)
        self.bytes[:] = 0xFF
        poisoned.append(nbytes)

    monkeypatch.setattr(Arena, "__init__", map_poisoned)
    IDLE.clear()  # memory of earlier jobs would be used again
    layer = case.layer(RUNNABLE[name])
    packed = len(poisoned)
    assert np.array_equal(layer.forward(*batch), expected)
    assert packed and len(poisoned) > packed
    IDLE.clear()


# how the checkpoint lay in memory


def _strided(array: Array) -> Array:
    """The same rows, every other row of a larger array."""
    wide = np.empty((2 * len(array), array.shape[1] + 8), array.dtype)
    wide.view(np.uint8)[:] = 255
    wide[::2, :-8] = array
    return wide[::2, :-8]


def _transposed(array: Array) -> Array:
    """The same values, columns contiguous."""
    return np.asfortranarray(array)


def _reversed(array: Array) -> Array:
    """The same rows, stored last to first."""
    return np.ascontiguousarray(array[::-1])[::-1]


@pytest.mark.parametrize("view", [_strided, _transposed, _reversed])
@Formats
def test_packing_takes_any_strides(fmt: WeightFormat, view) -> None:  # type: ignore[no-untyped-def]
    case = Case.random(fmt, 96, 64, E=2)
    batch = random_batch(5, case.H, case.E, 2)

    def seen(matrix: Matrix) -> Matrix:
        scales = None if matrix.scales is None else view(matrix.scales)
        return Matrix(view(matrix.codes), scales, matrix.bias)

    layer = ExpertLayer(fmt, 2, 96, 64, pool=PoolConfig(1))
    layer.allocate(np.ones(2, bool))
    for index, expert in enumerate(case.experts):
        # gate as it is, up and down as views: the two halves of a strip differ in strides
        layer.load(index, ExpertTensors(expert.gate, seen(expert.up), seen(expert.down)))
    assert np.array_equal(layer.forward(*batch), case.layer().forward(*batch))


@Formats
def test_packing_takes_interleaved_gate_and_up(fmt: WeightFormat) -> None:
    """gpt-oss stores gate and up as the even and odd rows of one matrix."""
    case = Case.random(fmt, 96, 64, E=1)
    expert = case.experts[0]

    def halves(gate: Array | None, up: Array | None) -> tuple[Array | None, Array | None]:
        if gate is None or up is None:
            return None, None
        both = np.stack([gate, up], axis=1).reshape(2 * len(gate), -1)
        return both[0::2], both[1::2]

    codes = halves(expert.gate.codes, expert.up.codes)
    scales = halves(expert.gate.scales, expert.up.scales)
    gate, up = (Matrix(c, s) for c, s in zip(codes, scales, strict=True) if c is not None)
    layer = ExpertLayer(fmt, 1, 96, 64, pool=PoolConfig(1))
    layer.allocate(np.ones(1, bool))
    layer.load(0, ExpertTensors(gate, up, expert.down))
    batch = random_batch(5, 96, 1, 1)
    assert np.array_equal(layer.forward(*batch), case.layer().forward(*batch))


# the caller's floating-point environment


def _tiny_activations(fmt: WeightFormat) -> tuple[Case, float]:
    """Experts that make results of subnormal activations, and the activations' scale."""
    case = Case.random(fmt, 64, 64, bias=fmt is INT8)
    if fmt is INT8:  # scales reach 2^16 only: gate gives 2^-104, and up is a bias of 1
        case = case.with_scales(gate=65504.0, up=65504.0, down=65504.0)
        for expert in case.experts:
            for matrix, bias in ((expert.gate, 0), (expert.up, 1), (expert.down, 0)):
                assert matrix.bias is not None
                matrix.bias[:] = bias
    elif fmt.scale is not None:  # weights of 2^127, or subnormal ones for the rest of the batch
        case = case.with_scales(gate=254, up=254, down=127)
        case.experts[1].gate.scales[...] = 0
    else:
        for expert in case.experts:
            expert.gate.codes[...] += 120 << 7  # exponents raised by 120
            expert.up.codes[...] += 120 << 7
    return case, 2.0**-130


@pytest.mark.parametrize("tokens", [1, 4, 40])
@pytest.mark.parametrize("tiny", ["activations", "routing weights"])
@TierNames
@Formats
def test_flush_to_zero_in_the_caller(fmt: WeightFormat, name: str, tiny: str, tokens: int) -> None:
    """torch.set_flush_denormal changes MXCSR of the calling thread, which works as worker 0.

    Subnormal activations matter, unless the tier's dot product takes them for zero by itself;
    subnormal routing weights, and the output that they make, matter on every tier.
    """
    tier = RUNNABLE[name]
    case, scale = (
        _tiny_activations(fmt) if tiny == "activations" else (Case.random(fmt, 64, 64), 64.0)
    )
    x, ids, weights = random_batch(tokens, case.H, case.E, 3, scale=scale)
    if tiny == "routing weights":
        weights *= np.float32(2.0**-128)
        assert (np.abs(weights) < 2.0**-126).all()
    layer = case.layer(tier)
    expected = layer.forward(x, ids, weights)
    matter = tiny == "routing weights" or not flushes_subnormals(fmt, tier)
    assert ((from_bf16(expected) != 0).any(axis=1) == matter).all()
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        out = layer.forward(x, ids, weights)
        quarter = torch.tensor([2.0**-126]) / 4
        assert quarter.item() == 0, "the caller's mode is as it was"
    finally:
        torch.set_flush_denormal(False)
    assert np.array_equal(out, expected)
