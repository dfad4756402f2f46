"""Norms that run compiled are what their module computes, wherever they apply."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import (
    Qwen3NextRMSNorm,
    Qwen3NextRMSNormGated,
)

from hybrid_moe.integrations.transformers.step import norm
from hybrid_moe.integrations.transformers.step.norm import replace_norms

N = 96

NORMS: dict[str, tuple[type[nn.Module], torch.dtype]] = {
    "Llama's": (Qwen3MoeRMSNorm, torch.bfloat16),
    "gpt-oss": (GptOssRMSNorm, torch.bfloat16),
    "gpt-oss in float32": (GptOssRMSNorm, torch.float32),
    "Gemma's": (GemmaRMSNorm, torch.bfloat16),
    "Qwen3-Next": (Qwen3NextRMSNorm, torch.bfloat16),
}


class Doubled(Qwen3MoeRMSNorm):  # type: ignore[misc]
    """Looks like a norm, and computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


class Promoting(Qwen3MoeRMSNorm):  # type: ignore[misc]
    """Answers in its weight's dtype."""


OTHERS: dict[str, Any] = {
    "another function": lambda: Doubled(N).bfloat16(),
    "Llama's with a float32 weight": lambda: Promoting(N),
    "a layer norm": lambda: nn.LayerNorm(N).bfloat16(),
    "a layer norm without bias": lambda: nn.LayerNorm(N, bias=False).bfloat16(),
    "a group norm": lambda: nn.GroupNorm(4, N).bfloat16(),
    "a batch norm": lambda: nn.BatchNorm1d(N).bfloat16(),
    "an embedding": lambda: nn.Embedding(3, N).bfloat16(),
    "an odd size": lambda: Qwen3MoeRMSNorm(N + 1).bfloat16(),
    "float16": lambda: Qwen3MoeRMSNorm(N).half(),
    "a gate": lambda: Qwen3NextRMSNormGated(N).bfloat16(),
}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that ran compiled."""
    shapes: list[torch.Size] = []
    real = norm.run_norm

    def counted(spec: norm.NormSpec, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return real(spec, x, weight)

    monkeypatch.setattr(norm, "run_norm", counted)
    return shapes


def _module(name: str) -> nn.Module:
    kind, dtype = NORMS[name]
    torch.manual_seed(0)
    module = kind(N, eps=1e-5).to(dtype)
    nn.init.normal_(module.weight)  # type: ignore[arg-type]
    return module


@pytest.mark.parametrize("name", NORMS)
def test_the_module_s_bits(name: str, ran: list[torch.Size]) -> None:
    module = _module(name)
    plain = copy.deepcopy(module)
    assert replace_norms(module) == 1
    ran.clear()
    shapes = [(N,), (1, 1, N), (2, 5, N), (1, 7, 4, N)]
    with torch.no_grad():
        for shape in shapes:
            x = torch.randn(shape).bfloat16()
            assert torch.equal(module(x), plain(x))
    assert [tuple(shape) for shape in ran] == shapes
    assert type(module) is type(plain) and list(module.state_dict()) == ["weight"]


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_recognised_stays(name: str) -> None:
    module = OTHERS[name]()
    assert replace_norms(module) == 0 and "forward" not in vars(module)


def test_it_steps_aside(ran: list[torch.Size]) -> None:
    """For what only the module's own operations do."""
    module, plain = _module("Llama's"), _module("Llama's")
    replace_norms(module)
    ran.clear()
    x = torch.randn(3, N).bfloat16()
    cases: list[torch.Tensor] = [
        x.float(),
        x.t().contiguous().t(),
        torch.randn(400, N).bfloat16(),
        torch.empty(0, N).bfloat16(),
        x.as_subclass(Tracked),
    ]
    with torch.no_grad():
        for case in cases:
            assert torch.equal(module(case), plain(case))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(module(x), plain(x))
        assert torch.equal(module(hidden_states=x), plain(x))
        with pytest.raises(RuntimeError):
            module(x[:, :-8])
    y = x.clone().requires_grad_()
    module(y).sum().backward()
    assert y.grad is not None and not ran


class Tracked(torch.Tensor):
    """A tensor that others watch."""


def test_it_is_captured_as_the_module_is(ran: list[torch.Size]) -> None:
    module, x = _module("gpt-oss"), torch.randn(2, N).bfloat16()
    replace_norms(module)
    ran.clear()
    with torch.no_grad():
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), module(x))
    assert len(ran) == 1


def test_what_has_changed_since(ran: list[torch.Size]) -> None:
    module = _module("Llama's")
    replace_norms(module)
    ran.clear()
    x = torch.randn(2, N).bfloat16()
    with torch.no_grad():
        module.weight.mul_(3)  # type: ignore[operator]
        assert torch.equal(module(x), type(module).forward(module, x)) and len(ran) == 1
        module.variance_epsilon = 1.0
        assert torch.equal(module(x), type(module).forward(module, x)) and len(ran) == 1
        assert module.float()(x).dtype == torch.float32 and len(ran) == 1


def test_a_weight_that_is_parametrized(ran: list[torch.Size]) -> None:
    module, x = _module("Llama's"), torch.randn(2, N).bfloat16()
    replace_norms(module)
    ran.clear()
    torch.nn.utils.parametrize.register_parametrization(module, "weight", torch.nn.Tanh())
    with torch.no_grad():
        assert torch.isfinite(module(x)).all() and not ran


def test_copies_are_their_own(ran: list[torch.Size]) -> None:
    module = _module("Llama's")
    replace_norms(module)
    ran.clear()
    other = copy.deepcopy(module)
    x = torch.randn(2, N).bfloat16()
    with torch.no_grad():
        other.weight.zero_()  # type: ignore[operator]
        assert other(x).count_nonzero() == 0 and module(x).count_nonzero() > 0
    assert len(ran) == 2


def test_a_replaced_forward_is_left_alone() -> None:
    module = _module("Llama's")
    module.forward = lambda x: x
    assert replace_norms(module) == 0


def test_weights_that_are_not_there_yet(ran: list[torch.Size]) -> None:
    """On meta, as a checkpoint's model is before it is loaded."""
    with torch.device("meta"):
        module = Qwen3MoeRMSNorm(N).bfloat16()
    assert replace_norms(module) == 1
    ran.clear()
    with torch.no_grad():
        assert module(torch.randn(1, N, device="meta").bfloat16()).is_meta and not ran
        module.to_empty(device="cpu")
        nn.init.normal_(module.weight)
        x = torch.randn(2, N).bfloat16()
        assert torch.equal(module(x), type(module).forward(module, x)) and len(ran) == 1
