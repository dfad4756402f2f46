"""Whole models with packed linear layers: their tokens, and what Transformers does with them."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.hybrid_moe.integrations.dense.packed_models import pack
from tests.hybrid_moe.tiny_models import FAMILIES, build, greedy, logits, offload_experts, prompt

HALF_UNITS = 8
"""Roundings of BF16 that the two models make apart, per logit: a few a layer."""


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "deepseek_v4"])
def test_tokens_equal_those_of_plain_transformers(family: str) -> None:
    """DeepSeek-V4 reads a grouped weight itself, see its own tests."""
    plain = build(family)
    packed = pack(copy.deepcopy(plain))
    assert greedy(packed, prompt()) == greedy(plain, prompt())
    got, want = logits(packed, prompt()), logits(plain, prompt())
    assert (got - want).abs().max() <= HALF_UNITS * 2**-8 * want.abs().max()


def test_a_compiled_model_has_the_same_logits() -> None:
    torch._dynamo.reset()
    model = pack(offload_experts(build("qwen3_moe"), "BF16", threads=1))
    want = logits(model, prompt())
    assert torch.equal(logits(torch.compile(model, backend="eager"), prompt()), want)
    torch._dynamo.reset()


def test_what_transformers_asks_of_a_model() -> None:
    model = pack(build("mixtral"))
    assert model.dtype == torch.bfloat16 and model.device.type == "cpu"
    assert model.num_parameters() == build("mixtral").num_parameters()
    assert model.get_output_embeddings() is model.lm_head
    want = logits(model, prompt())
    model.tie_weights()
    model.to("cpu").eval().requires_grad_(False)
    model.gradient_checkpointing_enable()
    assert torch.equal(logits(copy.deepcopy(model), prompt()), want)
    assert torch.equal(model(prompt(), logits_to_keep=1).logits[0, 0].float(), want[-1])
    with pytest.raises(RuntimeError, match=r"layers\.0\.self_attn\.\w+ is packed"):
        model.half()
