"""Routers' logits of one token run compiled where they have torch's bits, and choose as torch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from transformers import DeepseekV3Config, GptOssConfig, MixtralConfig, Qwen3MoeConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hybrid_moe.cpu_kernels.dsl.tiers import host_features
from hybrid_moe.cpu_kernels.row_functions import LOGITS, row_functions
from hybrid_moe.integrations.transformers.step import router
from hybrid_moe.integrations.transformers.step.router import replace_router_logits

E, H = 32, 1056
"""Experts; inputs of three sums, the last of one line."""

ROUTERS: dict[str, Any] = {
    "gpt-oss": lambda: GptOssTopKRouter(
        GptOssConfig(hidden_size=H, num_local_experts=E, num_experts_per_tok=4)
    ),
    "Qwen3": lambda: Qwen3MoeTopKRouter(
        Qwen3MoeConfig(hidden_size=H, num_experts=E, num_experts_per_tok=4, norm_topk_prob=True)
    ),
    "Mixtral": lambda: MixtralTopKRouter(MixtralConfig(hidden_size=H, num_local_experts=E)),
}


def _module(name: str) -> nn.Module:
    torch.manual_seed(0)
    module: nn.Module = ROUTERS[name]().bfloat16()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that ran compiled."""
    shapes: list[torch.Size] = []
    real = router._logits

    def counted(x: torch.Tensor, *others: Any) -> torch.Tensor:
        shapes.append(x.shape)
        return real(x, *others)

    monkeypatch.setattr(router, "_logits", counted)
    return shapes


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ROUTERS)
def test_logits_weights_and_choice_are_the_module_s(name: str, ran: list[torch.Size]) -> None:
    module, plain = _module(name), _module(name)
    assert replace_router_logits(module) == 1 and replace_router_logits(module) == 0
    biased = getattr(module, "bias", None) is not None
    fast = router._has_torch_s_bits(E, H, biased)
    ran.clear()
    with torch.no_grad():
        for tokens in (1, 1, 1, 2, 7):
            x = torch.randn(tokens, H).bfloat16()
            assert _equal(module(x), plain(x))
    assert len(ran) == (3 if fast else 0)
    assert list(module.state_dict()) == list(plain.state_dict())


def test_here_they_have_torch_s_bits() -> None:
    """On processors with VDPBF16PS, for the sizes of models; elsewhere torch computes."""
    if "avx512bf16" not in host_features():
        pytest.skip("torch adds in another order on this processor")
    for experts, inputs, biased in ((32, 2880, True), (128, 2048, False), (256, 7168, False)):
        assert router._has_torch_s_bits(experts, inputs, biased)


@pytest.mark.parametrize("biased", [False, True])
def test_against_float64(biased: bool) -> None:
    """On this machine's best tier: (inputs / 2 + 4) float32 roundings of the sum of magnitudes, and
    one to bf16."""
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).bfloat16() for shape in ((H,), (E, H), (E,)))
    out = torch.empty(E, dtype=torch.bfloat16)
    row_functions()[LOGITS[biased]](
        x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr(), E, H, router.CHUNK
    )
    exact = weight.double() @ x.double() + (bias.double() if biased else 0)
    terms = weight.double().abs() @ x.double().abs() + bias.double().abs()
    bound = exact.abs() * 2.0**-8 + terms * (H + 8) * 2.0**-24
    assert ((out.double() - exact).abs() <= bound).all()


def test_it_steps_aside(ran: list[torch.Size]) -> None:
    module = _module("gpt-oss")
    replace_router_logits(module)
    router._has_torch_s_bits(E, H, True)
    ran.clear()
    x = torch.randn(1, H).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        module(x)
    module(x)[0].sum().backward()
    assert module.weight.grad is not None and not ran  # type: ignore[union-attr]
    with torch.no_grad():
        assert module.float()(x.float())[0].dtype == torch.float32 and not ran


def test_float32_routers_are_torch_s(ran: list[torch.Size]) -> None:
    """DeepSeek's multiplies in float32."""
    config = DeepseekV3Config(hidden_size=H, n_routed_experts=E)
    module = DeepseekV3TopkRouter(config).bfloat16()
    nn.init.normal_(module.weight)
    plain = copy.deepcopy(module)
    replace_router_logits(module)
    x = torch.randn(1, H).bfloat16()
    with torch.no_grad():
        found, expected = module(x), plain(x)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    assert not ran and all(torch.equal(a, b) for a, b in pairs)


def test_others_keep_their_functions() -> None:
    """Only modules that call `F.linear` on a weight of their own, and only these modules."""
    module, other = _module("Qwen3"), _module("Qwen3")
    model = nn.ModuleList([nn.Linear(H, E), nn.Embedding(E, H), module])
    assert replace_router_logits(model) == 1
    assert "forward" not in vars(other) and type(module).forward.__globals__["F"] is F


def test_copies_and_changed_weights(ran: list[torch.Size]) -> None:
    module = _module("gpt-oss")
    replace_router_logits(module)
    other = copy.deepcopy(module)
    x = torch.randn(1, H).bfloat16()
    with torch.no_grad():
        other.weight.zero_()  # type: ignore[operator]
        other.bias.zero_()  # type: ignore[operator]
        assert other(x)[0].count_nonzero() == 0 and module(x)[0].count_nonzero() == E
        module.weight.data.mul_(2)  # type: ignore[operator]
        assert _equal(module(x), type(module).forward(module, x))


def test_it_is_captured_as_the_module_is(ran: list[torch.Size]) -> None:
    module, plain = _module("gpt-oss"), _module("gpt-oss")
    replace_router_logits(module)
    x = torch.randn(1, H).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        ran.clear()
        assert _equal(compiled(x), plain(x)) and not ran
