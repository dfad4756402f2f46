"""Switch routing against Transformers' router, soft mixtures against float64; both kernels in the
simulator against their references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersTop1Router,
)

from hybrid_moe.gpu_kernels import gating_soft as soft
from hybrid_moe.gpu_kernels import gating_switch as switch
from tests.gpu.harness import distinct_architectures, simulate

F32, BF16 = torch.float32, torch.bfloat16


# ---- Switch


@pytest.mark.parametrize("capacity", [0, 3, 64])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@torch.no_grad()
def test_switch_routing_is_the_model_s(dtype: torch.dtype, capacity: int) -> None:
    """In bf16 the probabilities of many experts round to the same value, and the lower id wins."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(hidden_size=16, num_experts=8, expert_capacity=capacity)
    module = SwitchTransformersTop1Router(config).eval()
    module.classifier.weight.normal_(std=0.05)
    one_hot, probabilities, logits = module(torch.randn(3, 50, 16).to(dtype))
    found = switch.gating_switch(logits, capacity, dtype)
    expected = torch.where(one_hot.any(-1), one_hot.argmax(-1), -1)
    assert torch.equal(found.ids, expected.int())
    assert torch.equal(found.probabilities, probabilities[..., 0].float())
    assert torch.equal(found.kept, one_hot.sum(1).int())
    assert torch.equal(found.dropped, 50 - one_hot.sum((1, 2)))
    if dtype == BF16:
        exact = logits.argmax(-1)
        assert (exact != expected)[expected >= 0].any() or capacity < 64


@pytest.mark.parametrize("B, S, E, capacity", [(2, 37, 8, 3), (1, 1030, 40, 20), (2, 1, 33, 0)])
def test_the_switch_kernel_is_the_reference(B: int, S: int, E: int, capacity: int) -> None:
    torch.manual_seed(1)
    choices = torch.randint(0, E, (B, S), dtype=torch.int32)
    logits = torch.nn.functional.one_hot(choices.long(), E).float()
    expected = switch.gating_switch_ref(logits, capacity)
    kernel = switch.definition(switch.SwitchConfig(E))
    for arch in distinct_architectures(kernel):
        for seed in (None, 1, 2):
            ids, routed = choices.clone(), torch.full((B, E), -77, dtype=torch.int32)
            report = simulate(kernel, arch, (B,), (ids, routed, S, capacity), seed)
            assert torch.equal(ids, expected.ids) and torch.equal(routed, expected.routed)
            assert not report.bank_conflicts()


def test_bad_arguments_of_switch_are_named() -> None:
    with pytest.raises(ValueError, match="logits have shape"):
        switch.gating_switch(torch.zeros(4, 8), 2)
    with pytest.raises(ValueError, match="capacity is -1"):
        switch.gating_switch(torch.zeros(1, 4, 8), -1)
    with pytest.raises(ValueError, match="of 1025 experts"):
        switch.gating_switch(torch.zeros(1, 4, 1025), 1)


# ---- soft


def _soft_logits(B: int, T: int, slots: int, dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(2)
    logits = torch.randn(B, T, slots) * 4
    logits[:, ::5, ::7] = -torch.inf
    return logits.to(dtype)


def _softmax(x: np.ndarray, axis: int) -> np.ndarray:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def test_soft_mixtures_are_sums_over_all_tokens_and_all_slots() -> None:
    """Against float64: T or slots + 4 roundings of positive terms, then a product in float32."""
    logits = _soft_logits(2, 19, 12, F32)
    routing = soft.gating_soft(logits)
    x, y = torch.randn(2, 19, 8), torch.randn(2, 12, 8)
    exact = logits.double().numpy()
    for found, weights, values in (
        (routing.slots(x), _softmax(exact, 1).transpose(0, 2, 1), x),
        (routing.tokens(y), _softmax(exact, 2), y),
    ):
        expected = weights @ values.double().numpy()
        bound = weights @ values.abs().double().numpy() * 2 * 24 * 2.0**-24
        assert (np.abs(found.numpy() - expected) <= bound).all()


@pytest.mark.parametrize("over_tokens, dtype", [(True, F32), (True, BF16), (False, BF16)])
def test_the_soft_kernel_is_float64_s_softmax(over_tokens: bool, dtype: torch.dtype) -> None:
    """Errors of exp (2 ulp, twice: a sum is scaled when a larger logit comes) and of the sum."""
    kernel = soft.definition(soft.SoftConfig(over_tokens, "bf16" if dtype == BF16 else "f32"))
    for arch in distinct_architectures(kernel):
        for seed, (B, T, slots) in ((None, (2, 19, 40)), (1, (1, 70, 33)), (2, (1, 1, 1))):
            logits = _soft_logits(B, T, slots, dtype)
            if T == slots == 1:
                logits.fill_(3)
            weights = torch.full((B, T, slots), -77.0)
            lines = -(-slots // 32) if over_tokens else -(-T // soft.WARPS)
            simulate(kernel, arch, (lines, B), (logits, weights, T, slots), seed)
            expected = _softmax(logits.double().numpy(), 1 if over_tokens else 2)
            roundings = (4 * 8 + max(T, slots)) * 2.0**-24
            assert (np.abs(weights.numpy() - expected) <= roundings * expected + 1e-38).all()


def test_bad_arguments_of_soft_are_named() -> None:
    with pytest.raises(ValueError, match="logits have shape"):
        soft.gating_soft(torch.zeros(4, 8))
    with pytest.raises(TypeError, match="logits are"):
        soft.gating_soft(torch.zeros(1, 4, 8).half())
    with pytest.raises(ValueError, match="logits must be contiguous"):
        soft.gating_soft(torch.zeros(1, 8, 4).mT)
