"""An expert's ranges of memory: all that a pass reads of it, biases behind strips."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.cpu_kernels.pool.topology import numa_nodes, usable_cores
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import LINE
from hybrid_moe.formats.table import DENSE_FORMATS
from hybrid_moe.formats.tensors import ExpertTensors
from hybrid_moe.formats.weight_format import WeightFormat
from tests.cpu_kernels.cases import Array, Case, random_batch

NAMES = ("gate", "up", "down")
POOLS = range(1, min(2, usable_cores()) + 1)
Sizes = st.integers(1, 7).map(lambda groups: 32 * groups)
Biased = st.fixed_dictionaries({name: st.booleans() for name in NAMES})


def _pool(pools: int) -> PoolConfig:
    return PoolConfig(pools, pools, (min(numa_nodes()),) * pools)


def _with_biases(expert: ExpertTensors, biased: Mapping[str, bool]) -> ExpertTensors:
    """The expert with the biases of the matrices named True alone."""
    return ExpertTensors(
        **{
            name: matrix if biased[name] else dataclasses.replace(matrix, bias=None)
            for name, matrix in ((name, getattr(expert, name)) for name in NAMES)
        }
    )


def _move(layer: ExpertLayer, expert: int, place: int) -> None:
    """Copy the expert's ranges to a place, point its records there, and spoil what was there."""
    zeros = layer._no_bias.ctypes.data
    for pool, arena in enumerate(layer._arenas):
        size, old = layer.expert_nbytes(pool), int(layer._place[expert])
        ranges = arena.bytes.reshape(-1, size) if size else np.zeros((place + 1, 0), np.uint8)
        ranges[place] = ranges[old]
        ranges[old] = 0xFF  # NaN, as BF16, as a scale and as a bias
        share = layer._table[expert, pool]
        for name in layer._table.dtype.names or ():
            if share[name] != zeros:
                share[name] += (place - old) * size
    layer._place[expert] = place


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
@settings(max_examples=30)
@given(H=Sizes, I=Sizes, biased=st.lists(Biased, min_size=3, max_size=3), expert=st.integers(0, 2))
def test_a_copy_of_its_ranges_is_the_expert(
    fmt: WeightFormat,
    pools: int,
    H: int,
    I: int,
    biased: list[dict[str, bool]],
    expert: int,
) -> None:
    """Bit for bit, wherever they lie; and `unpack` gives biases where `load` was given some."""
    experts = list(Case.random(fmt, H, I, E=4, bias=True).experts)
    experts[:3] = [_with_biases(e, b) for e, b in zip(experts, biased, strict=False)]
    layer = ExpertLayer(fmt, 4, H, I, pool=_pool(pools))
    has_room = any(any(each.values()) for each in biased)
    layer.allocate(np.ones(4, bool), biases=has_room)
    for index in range(3):  # place 3 stays free
        layer.load(index, experts[index])
    batch = random_batch(5, H, 3, 3)
    skip = np.zeros(4, bool)
    expected = layer.forward(*batch, skip)
    _move(layer, expert, 3)
    assert np.array_equal(layer.forward(*batch, skip), expected)
    moved = layer.unpack(expert)
    for name in NAMES:
        bias: Array | None = getattr(experts[expert], name).bias
        if bias is None:
            assert getattr(moved, name).bias is None
        else:
            assert np.array_equal(getattr(moved, name).bias, bias)
    layer.close()


@pytest.mark.parametrize("pools", POOLS)
@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
def test_parts_are_whole_cache_lines(fmt: WeightFormat, pools: int) -> None:
    """Down's last strip has rows of padding at H = 96: their biases are zero."""
    case = Case.random(fmt, 96, 160, E=2, bias=True)
    layer = case.layer(pool=_pool(pools))
    for layout, arena in zip(layer._layouts, layer._arenas, strict=True):
        offsets = (layout.down_offset, *layout.bias_offsets.values(), layout.nbytes)
        assert all(offset % LINE == 0 for offset in offsets)
        assert list(offsets) == sorted(offsets)
        for expert, share in enumerate(arena.bytes.reshape(2, layout.nbytes)):
            for name, rows in layout.bias_rows.items():
                bias = getattr(case.experts[expert], name).bias
                padded = np.pad(bias, (0, -len(bias) % 64))[rows.start : rows.stop]
                assert np.array_equal(layout.bias(share, name), padded)


@pytest.mark.parametrize("name", NAMES)
def test_a_bias_without_room(name: str) -> None:
    """Refused before anything is written, also where the expert is loaded once more."""
    case = Case.random(MXFP4, 96, 64, E=2, bias=True)
    plain = _with_biases(case.experts[1], dict.fromkeys(NAMES, False))
    layer = ExpertLayer(MXFP4, 2, 96, 64, pool=PoolConfig(1))
    layer.allocate(np.ones(2, bool), biases=False)
    layer.load(1, plain)
    table, memory = layer._table.copy(), layer._arenas[0].bytes.copy()
    one = _with_biases(case.experts[0], {other: other == name for other in NAMES})
    for expert in range(2):
        with pytest.raises(ValueError, match=rf"expert {expert}: {name} .*biases=True"):
            layer.load(expert, one)
    assert np.array_equal(layer._table, table)
    assert np.array_equal(layer._arenas[0].bytes, memory)
