"""`router="cute"`: models choose as with their own routers, and what is not known is refused."""

from __future__ import annotations

import ast
import copy
import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hybrid_moe.integrations.transformers.experts_module import find_experts
from hybrid_moe.integrations.transformers.registration import from_pretrained, offload
from hybrid_moe.integrations.transformers.step import router_gating
from hybrid_moe.integrations.transformers.step.router_gating import (
    SCORING,
    gate_routers,
    plan_routers,
)
from tests.hybrid_moe.tiny_models import FAMILIES, build, greedy, logits, prompt


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The scorings of the calls of `gating_topk`."""
    called: list[str] = []
    real = router_gating.gating_topk

    def counted(logits: torch.Tensor, gating: Any, bias: Any = None) -> Any:
        called.append(gating.scoring)
        return real(logits, gating, bias)

    monkeypatch.setattr(router_gating, "gating_topk", counted)
    return called


def _offload(model: Any, **kwargs: Any) -> Any:
    return offload(model, "BF16", dense="torch", progress=False, **kwargs)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_the_model_s_own_router(
    family: str, rows: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = _offload(build(family))
    with caplog.at_level(logging.INFO, router_gating.__name__):
        ours = _offload(build(family), router="cute")
    blocks = ours.config.num_hidden_layers - (family == "deepseek_v4")  # one looks experts up
    assert f"{blocks} routers choose experts by our gating, on cpu" in caplog.text
    rows.clear()
    assert torch.equal(logits(ours, prompt()), logits(own, prompt()))
    assert len(rows) == blocks and set(rows) == {SCORING[k] for k in SCORING if k in _names(ours)}
    assert greedy(ours, prompt()) == greedy(own, prompt())


def _names(model: Any) -> set[str]:
    return {type(module).__name__ for module in model.modules()}


def test_from_pretrained(tmp_path: Path, rows: list[str]) -> None:
    model = build("qwen3_moe")
    model.save_pretrained(tmp_path)
    expected = greedy(_offload(model), prompt())
    ours = from_pretrained(tmp_path, "BF16", dense="torch", progress=False, router="cute")
    rows.clear()
    assert greedy(ours, prompt()) == expected and rows


# ---- what a router is known by


@functools.cache
def _forwards() -> dict[str, str]:
    """Class -> the text of its `forward` without annotations, of all in Transformers."""
    found = {}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        text = file.read_text("utf-8")
        if not any(f"class {name}(" in text for name in SCORING):
            continue
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name in SCORING:
                [forward] = [
                    f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward"
                ]
                forward.returns = None
                for argument in forward.args.args:
                    argument.annotation = None
                found[node.name] = ast.unparse(forward)
    return found


def test_routers_of_one_row_have_one_forward() -> None:
    """As Transformers has them today: those that always renormalise lack the question."""
    forwards = _forwards()
    assert len(forwards) > 25
    asks = "    if self.norm_topk_prob:\n        router_top_value /="
    for scoring in set(SCORING.values()):
        texts = {forwards[k] for k, row in SCORING.items() if row == scoring and k in forwards}
        assert len({text.replace(asks, "    router_top_value /=") for text in texts}) == 1, scoring


@torch.no_grad()
def test_a_router_in_float32_keeps_its_groups_and_its_bias(rows: list[str]) -> None:
    """DeepSeek-V3's. It does not sort, so weights are added up in another order: an ulp."""
    config = transformers.DeepseekV3Config(
        hidden_size=32, n_routed_experts=32, num_experts_per_tok=6, n_group=4, topk_group=2
    )
    block = nn.Module()
    block.gate = DeepseekV3TopkRouter(config).bfloat16()
    nn.init.normal_(block.gate.weight)
    block.gate.e_score_correction_bias.normal_(std=0.1)
    block.experts = nn.Module()
    own = copy.deepcopy(block.gate)
    model = nn.ModuleDict({"mlp": block})
    gate_routers(plan_routers(model, ["mlp.experts"]))
    rows.clear()
    x = torch.randn(50, 32).bfloat16()
    (logits_, weights, ids), (its_logits, its_weights, its_ids) = block.gate(x), own(x)
    assert rows == ["deepseek_v3"] and torch.equal(logits_, its_logits)
    assert ids.dtype == its_ids.dtype and weights.dtype == its_weights.dtype
    assert torch.equal(ids.sort(-1).values, its_ids.sort(-1).values)
    torch.testing.assert_close(
        weights.gather(1, ids.argsort(-1)), its_weights.gather(1, its_ids.argsort(-1)),
        rtol=2.0**-21, atol=0,
    )  # fmt: skip


# ---- refusals


F = nn.functional


class _Odd(Qwen3MoeTopKRouter):  # type: ignore[misc]
    pass


class _Changed(Qwen3MoeTopKRouter):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor) -> Any:
        _, weights, ids = super().forward(hidden_states)
        return nn.functional.linear(hidden_states, self.weight), weights * 2, ids


class _Reversed(Qwen3MoeTopKRouter):  # type: ignore[misc]
    def forward(self, hidden_states: torch.Tensor) -> Any:
        logits = F.linear(hidden_states, self.weight)
        weights, ids = torch.topk(-logits, self.top_k)
        return logits, weights, ids


_Reversed.__name__ = "Qwen3MoeTopKRouter"


@pytest.mark.parametrize("kind, message", [
    (_Odd, r"the router of model.layers.0.mlp.experts is model.layers.0.mlp.gate \(_Odd\)"),
    (_Changed, "is a part of its Qwen3MoeSparseMoeBlock"),
    (_Reversed, "does not compute what Gating"),
])  # fmt: skip
def test_routers_that_are_not_known_are_refused_by_name(kind: type, message: str) -> None:
    model = build("qwen3_moe")
    model.model.layers[0].mlp.gate.__class__ = kind
    with pytest.raises(NotImplementedError, match=message):
        _offload(model, router="cute")
    assert len(find_experts(model)) == model.config.num_hidden_layers  # nothing has been moved


def test_float16_and_other_choices_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="float16, must be float32 or bfloat16"):
        _offload(build("mixtral", torch.float16), router="cute")
    with pytest.raises(ValueError, match="router is 'torch'"):
        _offload(build("mixtral"), router="torch")


def test_it_steps_aside(rows: list[str]) -> None:
    """Gradients, autocast and captured graphs get the module's own forward; copies their own."""
    model = build("mixtral")
    gate = model.model.layers[0].mlp.gate
    gate_routers(plan_routers(model, ["model.layers.0.mlp.experts"]))
    other = copy.deepcopy(gate)
    x = torch.randn(3, 64).bfloat16()
    rows.clear()
    gate(x)[1].sum().backward()
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            gate(x)
        compiled = torch.compile(gate, backend="eager", fullgraph=True)
        found = compiled(x)
        assert not rows
        expected = gate(x)
        assert len(rows) == 1
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        other.weight.zero_()
        assert other(x)[0].count_nonzero() == 0 and gate(x)[0].count_nonzero() > 0
