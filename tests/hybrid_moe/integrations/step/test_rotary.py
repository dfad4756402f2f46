"""One token's rotary positions run compiled where they have the bits of the model's function."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from hybrid_moe.cpu_kernels.dsl.tiers import TIERS
from hybrid_moe.cpu_kernels.row_functions import ROTATE, row_functions
from hybrid_moe.integrations.transformers.step import rotary
from tests.cpu_kernels.emulation import RUNNABLE

WIDTHS = {"gpt_oss": 2, "qwen3_moe": 1, "mixtral": 1, "olmoe": 1}
"""Model -> head size / width of its tables."""

OTHERS = ("glm4_moe", "glm", "cohere")
"""Models that rotate a part of a head, or interleaved pairs."""


def _apply(model: str) -> Callable[..., Any]:
    module = import_module(f"transformers.models.{model}.modeling_{model}")
    function: Callable[..., Any] = module.apply_rotary_pos_emb
    return function


def _inputs(
    size: int, width: int, tokens: int = 1, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    torch.manual_seed(size)
    angles = torch.randn(batch, tokens, size // 2) * 100
    angles = torch.cat([angles] * (2 * width // size), -1)
    q, k = (torch.randn(batch, tokens, heads, size).transpose(1, 2) for heads in (5, 2))
    return [x.to(dtype) for x in (q, k, angles.cos(), angles.sin())]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Shapes that ran compiled, without those of proofs."""
    shapes: list[torch.Size] = []
    real, agrees = rotary._rotated, rotary._agrees

    def counted(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return real(x, cos, sin)

    def uncounted(*arguments: Any) -> bool:
        found = agrees(*arguments)
        shapes.clear()
        return found

    monkeypatch.setattr(rotary, "_rotated", counted)
    monkeypatch.setattr(rotary, "_agrees", uncounted)
    rotary.rotary.cache_clear()
    return shapes


@pytest.mark.parametrize("size", [16, 64, 128])
@pytest.mark.parametrize("model", WIDTHS)
def test_the_bits_of_the_model_s_function(model: str, size: int, ran: list[torch.Size]) -> None:
    own = _apply(model)
    q, k, cos, sin = _inputs(size, size // WIDTHS[model])
    with torch.no_grad():
        found = rotary.rotary(own)(q, k, cos, sin)
        expected = own(q, k, cos, sin)
    assert ran == [q.shape, k.shape]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) and a.shape == b.shape


@pytest.mark.parametrize("model", OTHERS)
def test_another_function_runs_itself(model: str, ran: list[torch.Size]) -> None:
    own = _apply(model)
    width = 8 if model.startswith("glm") else 16
    q, k, cos, sin = _inputs(16, width)
    with torch.no_grad():
        found, expected = rotary.rotary(own)(q, k, cos, sin), own(q, k, cos, sin)
    assert not ran and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


CASES: dict[str, Callable[[], list[torch.Tensor]]] = {
    "several tokens": lambda: _inputs(16, 16, tokens=3),
    "a batch": lambda: _inputs(16, 16, batch=2),
    "float32": lambda: _inputs(16, 16, dtype=torch.float32),
    "an odd size": lambda: _inputs(24, 24),
    "gradients": lambda: [x.requires_grad_() for x in _inputs(16, 16)],
    "not contiguous": lambda: [
        x if x.ndim == 3 else x.transpose(1, 3).contiguous().transpose(1, 3)
        for x in _inputs(16, 16)
    ],
}


@pytest.mark.parametrize("case", CASES)
def test_it_steps_aside(case: str, ran: list[torch.Size]) -> None:
    own, inputs = _apply("qwen3_moe"), CASES[case]()
    with torch.set_grad_enabled(case == "gradients"):
        found, expected = rotary.rotary(own)(*inputs), own(*inputs)
    assert not ran and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_with_other_arguments(ran: list[torch.Size]) -> None:
    own, (q, k, cos, sin) = _apply("qwen3_moe"), _inputs(16, 16)
    with torch.no_grad():
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        found = rotary.rotary(own)(q, k, cos, sin, unsqueeze_dim=2)
        expected = own(q, k, cos, sin, unsqueeze_dim=2)
    assert not ran and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_function_of_other_arguments(ran: list[torch.Size]) -> None:
    """DeepSeek-V4's rotates one tensor."""
    own, (q, _, cos, sin) = _apply("deepseek_v4"), _inputs(16, 8)
    with torch.no_grad():
        assert torch.equal(rotary.rotary(own)(q, cos, sin), own(q, cos, sin)) and not ran


@pytest.mark.parametrize("name", TIERS)
def test_every_tier(name: str) -> None:
    """Against float64: three roundings to bf16 of 2^-8, two of them of the terms."""
    q, _, cos, sin = _inputs(64, 64)
    out = torch.empty_like(q)
    row_functions(RUNNABLE[name])[ROTATE](
        q.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr(), q.shape[1], 32, 32
    )
    x1, x2 = q.double().chunk(2, -1)
    c, s = cos[..., :32].double(), sin[..., :32].double()
    exact = torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)
    terms = torch.cat([(x1 * c).abs() + (x2 * s).abs(), (x2 * c).abs() + (x1 * s).abs()], -1)
    assert ((out.double() - exact).abs() <= terms * 2.0**-8 * 2.01).all()
