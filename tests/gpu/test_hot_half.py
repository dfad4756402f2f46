"""The four kernels one after another in the simulator, as `SlotExperts` calls them: a layer with
some of its experts on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hybrid_moe.formats.activation import Activation
from hybrid_moe.formats.mx import MXFP4
from hybrid_moe.formats.strips import GROUP, STRIP_ROWS
from hybrid_moe.formats.table import BF16
from hybrid_moe.formats.weight_format import WeightFormat
from hybrid_moe.gpu_kernels import down, gate_up, slot_experts
from hybrid_moe.gpu_kernels.combine import combine_launch
from hybrid_moe.gpu_kernels.expert_tiles import ExpertTiles
from hybrid_moe.gpu_kernels.pack_tokens import (
    PackedTokens,
    empty_packed,
    pack_launches,
    takes_one_launch,
)
from hybrid_moe.gpu_kernels.slot_experts import SlotExperts
from hybrid_moe.gpu_kernels.slot_layout import SlotLayout
from tests.cpu_kernels.cases import Case, random_batch
from tests.gpu.harness import simulate
from tests.gpu.slots import pack_slot, slot_layout
from tests.reference import assert_within

ARCH = "sm_80"
E, H, I, K = 7, 160, 96, 3
HOT = (5, 0, 3, 2)
"""Their slots are 0 to 3."""

Tensor = torch.Tensor


def _unwritten(tensor: Tensor) -> Tensor:
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -77)


def _pack(x: Tensor, ids: Tensor, slot_of: Tensor, **how: Any) -> PackedTokens:
    packed = empty_packed(x, ids.numel(), how["slots"], how["tile"])
    few = takes_one_launch(ids.numel())
    for each in pack_launches(x, ids, slot_of, packed, fmt=how["fmt"], few=few):
        simulate(each.definition, ARCH, each.grid, each.values)
    return packed


def _gate_up(
    layout: SlotLayout, activation: Activation, tiles: ExpertTiles, xp: Tensor, k: int
) -> Tensor:
    kernel = gate_up.choose(layout, activation, tiles.tile)
    h = _unwritten(xp.new_empty(len(xp) * k, layout.intermediate))
    strips = layout.intermediate // GROUP
    scalars = (layout.nbytes, layout.hidden, strips, layout.intermediate, k)
    grid = kernel.config.gemm.grid(strips, len(tiles.tile_slot))
    simulate(kernel, ARCH, grid, (*tiles.pointers(xp), h, *scalars))
    return h


def _down(layout: SlotLayout, tiles: ExpertTiles, h: Tensor) -> Tensor:
    kernel = down.choose(layout, tiles.tile)
    y = _unwritten(torch.empty(len(h), layout.hidden))
    strips = -(-layout.hidden // STRIP_ROWS)
    scalars = (layout.nbytes, layout.intermediate, strips, layout.hidden, 1)
    grid = kernel.config.grid(strips, len(tiles.tile_slot))
    simulate(kernel, ARCH, grid, (*tiles.pointers(h), y, *scalars))
    return y


def _combine(
    y: Tensor, ids: Tensor, weights: Tensor, slot_of: Tensor, cold: Tensor | None
) -> Tensor:
    out = _unwritten(torch.empty(len(ids), y.shape[1], dtype=torch.bfloat16))
    each = combine_launch(y, ids, weights, slot_of, cold, out)
    simulate(each.definition, ARCH, each.grid, each.values)
    return out


def _slots(case: Case, backend: str) -> SlotExperts:
    """The experts `HOT` in slots."""
    layout = slot_layout(case.fmt, H, I, parts=(1, 1), biases=True)
    slots = SlotExperts(layout, case.activation, E, len(HOT), torch.device("cpu"), backend)
    for slot, expert in enumerate(HOT):
        pack_slot(layout, slots.memory[slot].numpy(), case.experts[expert])
        slots.slot_of[expert] = slot
    return slots


@pytest.mark.parametrize("tokens", [9, pytest.param(120, marks=pytest.mark.full)])
@pytest.mark.parametrize("fmt", [MXFP4, BF16], ids=lambda fmt: fmt.name)
def test_a_layer_with_hot_experts(
    fmt: WeightFormat, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the bound of a layer on the CPU. A token alone has the same bits, though 120 tokens
    take other kernels: `pack` in three launches, tiles of 64. Ids out of range and cold experts are
    left to others."""
    others = slot_experts.BACKENDS["torch"][4:]
    simulated = (_pack, _gate_up, _down, _combine, *others)
    monkeypatch.setitem(slot_experts.BACKENDS, "cute", simulated)
    case = Case.random(fmt, H, I, E=E, bias=True, activation=Activation(7.0, 1.702))
    bits, ids, weights = random_batch(tokens, H, E, K)
    ids[2, 1] = -1
    ids[4] = E
    skipped = np.where(np.isin(ids, HOT), -1, ids)
    cold = torch.from_numpy(case.reference(bits, skipped, weights).value.astype(np.float32))
    x = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    given = (torch.from_numpy(ids), torch.from_numpy(weights), cold)

    def run(slots: SlotExperts, rows: slice) -> Tensor:
        own, share, rest = (tensor[rows].contiguous() for tensor in given)
        y = slots.rows(x[rows].contiguous(), own)
        return slots.combine(y, own, share, rest, slots.slot_of)

    slots = _slots(case, "cute")
    out = run(slots, slice(None))
    assert_within(out.double().numpy(), case.reference(bits, ids, weights))
    plain = run(_slots(case, "torch"), slice(None))
    torch.testing.assert_close(out.float(), plain.float(), rtol=0.01, atol=0.01)
    for token in (0, 4):
        alone = run(slots, slice(token, token + 1))
        assert torch.equal(alone[0].view(torch.int16), out[token].view(torch.int16))
