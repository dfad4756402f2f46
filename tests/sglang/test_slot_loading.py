"""What SGLang's loaders hand over for slots, one expert or all of them; no SGLang."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hybrid_moe.integrations.sglang import slot_loading
from hybrid_moe.integrations.sglang.gpu_experts import GpuExperts

E = 4


@pytest.fixture(autouse=True)
def no_locations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_loading, "_location", lambda layer: None)


def loader(hot: tuple[int, ...], filled: list[tuple[Any, ...]]) -> slot_loading.WeightLoader:
    """A loader whose fills are appended to `filled`: (slot or None for all, tensor)."""

    def fill_one(*, loaded_weight: torch.Tensor, expert_id: int, **rest: Any) -> None:
        filled.append((expert_id, loaded_weight))

    def fill_all(param: Any, rows: torch.Tensor, *rest: Any, **more: Any) -> None:
        filled.append((None, rows))

    layer = SimpleNamespace(layer_id=3, _weight_loader_impl=fill_one)
    return slot_loading.slot_loader(layer, GpuExperts(E, hot), fill_all)


def give(load: slot_loading.WeightLoader, stacked: bool, param: Any, loaded: torch.Tensor) -> None:
    """All experts' `loaded` [E, ...], at once or one by one."""
    if stacked:
        load(param, loaded, "w13", None)
        return
    for expert, weight in enumerate(loaded):
        load(param, weight, "w13", "w1", expert_id=expert)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("hot", [(), (1, 3), (0, 1, 2, 3)], ids=str)
def test_hot_experts_reach_their_slots(hot: tuple[int, ...], stacked: bool) -> None:
    filled: list[tuple[Any, ...]] = []
    weights = torch.arange(E * 6.0).reshape(E, 2, 3)
    give(loader(hot, filled), stacked, torch.nn.Parameter(torch.zeros(len(hot), 2, 3)), weights)
    if stacked:
        assert [slot for slot, _ in filled] == [None] * bool(hot)
        rows = [row for _, tensor in filled for row in tensor]
    else:
        assert [slot for slot, _ in filled] == list(range(len(hot)))
        rows = [tensor for _, tensor in filled]
    assert all(torch.equal(row, weights[e]) for row, e in zip(rows, hot, strict=True))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("codes", [torch.uint8, torch.int8])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
def test_codes_are_not_cast_to_weights(
    stacked: bool, codes: torch.dtype, weights: torch.dtype
) -> None:
    filled: list[tuple[Any, ...]] = []
    param = torch.nn.Parameter(torch.zeros(2, 2, 3, dtype=weights))
    given = torch.zeros(E, 2, 3, dtype=codes)
    with pytest.raises(ValueError, match=f"w13 of layer 3 is {codes} codes, .*takes {weights}"):
        give(loader((1, 3), filled), stacked, param, given)
    assert not filled
    give(loader((), filled), stacked, param, given)  # none of them is on the GPU
    packed = torch.nn.Parameter(torch.zeros(2, 2, 3, dtype=codes), requires_grad=False)
    give(loader((1, 3), filled), stacked, packed, given)
    assert filled
