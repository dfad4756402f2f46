"""Where the parts of a slot lie, and what `slot_weights` reads there."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid_moe.cpu_kernels.layer import ExpertLayer
from hybrid_moe.cpu_kernels.pool.config import PoolConfig
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import bias_nbytes, packed_nbytes
from hybrid_moe.formats.table import DENSE_FORMATS, FORMATS
from hybrid_moe.formats.weight_format import LayerFormats, WeightFormat, layer_formats
from hybrid_moe.gpu_kernels import fragments
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from hybrid_moe.gpu_kernels.slot_weights import slot_weights
from tests.cpu_kernels.cases import decode
from tests.gpu.slots import random_slots, slot_layout

Sizes = st.integers(1, 7).map(lambda groups: 32 * groups)
Parts = st.sampled_from([(1,), (1, 1), (3, 1, 2)])


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
@settings(max_examples=15)
@given(H=Sizes, I=Sizes, parts=Parts, bias=st.booleans())
def test_a_slot_is_read_as_it_was_packed(
    fmt: WeightFormat, H: int, I: int, parts: tuple[int, ...], bias: bool
) -> None:
    slots = random_slots(fmt, H, I, 2, parts=parts, bias=bias)
    biases = bias_nbytes(H, I) if bias else 0
    assert slots.layout.nbytes == packed_nbytes(fmt, H, I) + biases
    for memory, expert in zip(slots.memory, slots.experts, strict=True):
        found = slot_weights(slots.layout, torch.from_numpy(memory))
        for name in ("gate", "up", "down"):
            matrix = getattr(expert, name)
            assert np.array_equal(getattr(found, name).numpy(), decode(fmt, matrix))
            given_bias = getattr(found, f"{name}_bias")
            assert (given_bias is None) == (not bias)
            if bias:
                assert np.array_equal(given_bias.numpy(), matrix.bias)


@pytest.mark.parametrize("fmt", DENSE_FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_slot_is_the_bytes_of_a_layer(fmt: WeightFormat) -> None:
    """Copying the pool's range is all that promotion does."""
    slots = random_slots(fmt, 96, 160, 1, bias=True)
    layer = ExpertLayer(fmt, 1, 96, 160, pool=PoolConfig(1))
    layer.allocate(np.ones(1, np.bool_))
    layer.load(0, slots.experts[0])
    assert np.array_equal(layer._arenas[0].bytes[: slots.layout.nbytes], slots.memory[0])
    layer.close()


@settings(max_examples=30)
@given(H=Sizes, I=Sizes, parts=Parts)
def test_tables_lead_to_every_strip_and_its_biases(H: int, I: int, parts: tuple[int, ...]) -> None:
    """Signatures in strips and biases are found where the tables say."""
    layout = slot_layout(MXFP4, H, I, parts=parts, biases=True)
    slots = random_slots(MXFP4, H, I, 1, parts=parts, bias=True)
    lines = slots.memory[0].reshape(-1, 64)
    expert = slots.experts[0]
    assert layout.gate_up_table.shape == (I // 32, 3)
    for block, (strip, gate, up) in enumerate(layout.gate_up_table):
        rows = slice(32 * block, 32 * block + 32)
        first_word = lines[strip : strip + 4].reshape(64, 4)  # word 0 of all rows of group 0
        assert np.array_equal(first_word[:32], expert.gate.codes[rows, :4])
        assert np.array_equal(first_word[32:], expert.up.codes[rows, :4])
        for at, name in ((gate, "gate"), (up, "up")):
            found = lines[at : at + 2].reshape(-1).view(np.float32)
            assert np.array_equal(found, getattr(expert, name).bias[rows])
    assert layout.down_table.shape == (-(-H // 64), 2)
    for place, (strip, bias) in enumerate(layout.down_table):
        rows = slice(64 * place, min(64 * place + 64, H))
        count = rows.stop - rows.start
        first_word = lines[strip : strip + 4].reshape(64, 4)
        assert np.array_equal(first_word[:count], expert.down.codes[rows, :4])
        found = lines[bias : bias + 4].reshape(-1).view(np.float32)
        assert np.array_equal(found[:count], expert.down.bias[rows])


def test_pools_must_share_every_strip_once() -> None:
    layout = slot_layout(MXFP4, 64, 96, parts=(1, 1))
    with pytest.raises(ValueError, match="gate/up strips are"):
        SlotLayout(layer_formats(MXFP4), 64, 96, layout.shares[:1])
    moved = dataclasses.replace(layout.shares[1], strips=range(1, 1))
    with pytest.raises(ValueError, match=r"down strips are .*, must be 0\.\.1"):
        SlotLayout(layer_formats(MXFP4), 128, 96, (layout.shares[0], moved))


TWO = LayerFormats(FORMATS["Q4_K"], FORMATS["Q6_K"])


@pytest.mark.parametrize("fmt", [*FORMATS.values(), TWO], ids=lambda fmt: fmt.name)
def test_every_format_is_read_as_it_was_packed(fmt: WeightFormat | LayerFormats) -> None:
    """Bit for bit, with short last blocks where the format allows them."""
    short = [1 if f.k_multiple > 32 else 9 for f in layer_formats(fmt)]
    H, I = (n * f.k_multiple for n, f in zip(short, layer_formats(fmt), strict=True))
    slots = random_slots(fmt, H, I, 1, parts=(1, 1))
    assert slots.layout.nbytes == packed_nbytes(fmt, H, I)
    found = slot_weights(slots.layout, torch.from_numpy(slots.memory[0]))
    expert, formats = slots.experts[0], slots.layout.formats
    for name, f in (("gate", formats.gate_up), ("up", formats.gate_up), ("down", formats.down)):
        expected = getattr(expert, name).dequantize(f)
        assert np.array_equal(getattr(found, name).numpy(), expected), name


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_the_order_of_activations_is_a_permutation(fmt: WeightFormat) -> None:
    order = fragments.k_order(fmt)
    assert sorted(order) == list(range(32))
    x = np.random.default_rng(0).standard_normal((3, 96))
    there = fragments.permute(x, fmt)
    assert np.array_equal(there[1, 32:64], x[1, 32:64][order])
    assert np.array_equal(fragments.unpermute(there, fmt), x)
    same = fragments.permute(torch.from_numpy(x), fmt)
    assert np.array_equal(same.numpy(), there)
