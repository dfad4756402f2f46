"""What the functions do with CUDA tensors, on the CPU: the simulator runs what they launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hybrid_moe.gpu_kernels import (
    act_quant,
    gating_soft,
    gating_switch,
    gating_topk,
    weight_dequant,
)
from hybrid_moe.gpu_kernels.definition import KernelDefinition
from hybrid_moe.gpu_kernels.gating import Gating
from tests.gpu.harness import simulate

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    names: list[str] = []

    def launch(kernel: KernelDefinition, values: Sequence[Any], grid: Any) -> None:
        names.append(kernel.name)
        simulate(kernel, "sm_80", (grid,) if isinstance(grid, int) else grid, values, seed=1)

    for module in (act_quant, gating_soft, gating_switch, gating_topk, weight_dequant):
        monkeypatch.setattr(module, "launch", launch)
    return names


@pytest.mark.parametrize("dtype, bias_dtype", [(torch.float32, None), (BF16, BF16)])
def test_gating_topk(dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    logits = torch.randn(9, 48).to(dtype)
    bias = None if bias_dtype is None else torch.randn(48).to(bias_dtype)
    gating = Gating("qwen3" if bias is None else "deepseek_v4", 5, renormalise=True)
    ids, weights = gating_topk._launched(logits, gating, bias, None)
    expected, its_weights = gating_topk.gating_topk_ref(logits, gating, bias)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(weights, its_weights, rtol=2.0**-8, atol=0)


def test_gating_switch(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 21, 6)
    expected = gating_switch.gating_switch_ref(logits, 4, BF16)
    monkeypatch.setattr(
        gating_switch,
        "gating_topk",
        lambda logits, gating, dtype: gating_topk._launched(logits, gating, None, dtype),
    )
    found = gating_switch._launched(logits, 4, BF16)
    assert launched == ["gating_topk", "gating_switch"]
    assert torch.equal(found.ids, expected.ids) and torch.equal(found.routed, expected.routed)
    assert torch.equal(found.kept, expected.kept) and torch.equal(found.dropped, expected.dropped)
    torch.testing.assert_close(found.probabilities, expected.probabilities, rtol=2.0**-8, atol=0)


def test_gating_soft() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 11, 70).to(BF16)
    found, expected = gating_soft._launched(logits), gating_soft.gating_soft_ref(logits)
    for name in ("dispatch", "combine"):
        ours, its = getattr(found, name), getattr(expected, name)
        torch.testing.assert_close(ours, its, rtol=100 * 2.0**-24, atol=0)


def test_act_quant() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 160).to(BF16)
    y, s = act_quant._quantised(x, power_of_two=True)
    codes, scales = act_quant.act_quant_ref(x, "ue8m0")
    assert torch.equal(s, scales) and torch.equal(y.view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(act_quant._rounded(x), act_quant.fp8_rounded_ref(x))


def test_weight_dequant() -> None:
    x = (torch.arange(130 * 272) % 127).to(torch.uint8).view(130, 272)
    s = torch.full((2, 3), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    expected = weight_dequant.weight_dequant_ref(x, s)
    assert torch.equal(weight_dequant._launched(x.view(torch.float8_e4m3fn), s, BF16), expected)
