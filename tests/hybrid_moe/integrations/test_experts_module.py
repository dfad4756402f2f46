"""What is read off an experts module is proved by the module itself, or refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hybrid_moe.formats.activation import Activation
from hybrid_moe.integrations.transformers.experts_module import experts_spec
from hybrid_moe.integrations.transformers.proof import recognise_activation
from tests.hybrid_moe.tiny_models import FAMILIES, build

silu = torch.nn.functional.silu
Gate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Experts(torch.nn.Module):
    """An experts module of H = 32, I = 32 whose activation and layout a test chooses.

    Args:
        gate: (gate, up) -> the product.
        alternate: gate and up alternate in what `_apply_gate` is given.
        claims: what the module says of itself, `is_concatenated`; None for the truth.
        attributes: further ones (limit, alpha, ...).
    """

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(
        self, gate: Gate, *, alternate: bool = False, claims: bool | None = None, **attributes: Any
    ) -> None:
        super().__init__()
        self.gate, self.alternate = gate, alternate
        self.is_concatenated = not alternate if claims is None else claims
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(2, 64, 32))
        self.down_proj = torch.nn.Parameter(torch.zeros(2, 32, 32))
        for name, value in attributes.items():
            setattr(self, name, value)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        if self.alternate:
            return self.gate(gate_up[..., ::2], gate_up[..., 1::2])
        return self.gate(*gate_up.chunk(2, dim=-1))


def swiglu(limit: float = 0.0, alpha: float = 0.0) -> Gate:
    """The documented formula, in float32."""

    def apply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if limit:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return gate * torch.sigmoid(alpha * gate) * (up + 1) if alpha else silu(gate) * up

    return apply


@pytest.mark.parametrize("limit", [0.0, 1e-3, 0.25, 7.0, 23.5, 24.0, 30.0, 1e4, 1e20])
@pytest.mark.parametrize("alpha", [0.0, 1.702])
@pytest.mark.parametrize("alternate", [False, True])
def test_clamps_are_recognised_wherever_they_are(
    limit: float, alpha: float, alternate: bool
) -> None:
    module = Experts(swiglu(limit, alpha), alternate=alternate, limit=limit, alpha=alpha)
    spec = experts_spec(module)
    assert spec.activation == Activation(limit, alpha)
    assert spec.concatenated != alternate


@given(st.floats(2.0**-20, 2.0**90), st.sampled_from(["limit", "swiglu_limit"]))
def test_a_limit_is_taken_if_and_only_if_it_is_applied(limit: float, name: str) -> None:
    applied = Experts(swiglu(limit), **{name: limit})
    assert recognise_activation(applied, "experts") == Activation(limit)
    ignored = Experts(swiglu(), **{name: limit})
    assert recognise_activation(ignored, "experts") == Activation()


@pytest.mark.parametrize("value", [None, float("inf"), torch.tensor(30.0)])
def test_a_limit_may_be_absent_infinite_or_a_tensor(value: Any) -> None:
    limit = 30.0 if isinstance(value, torch.Tensor) else 0.0
    assert recognise_activation(Experts(swiglu(limit), limit=value), "experts") == Activation(limit)


def test_defaults_under_which_models_are_built_do_not_matter() -> None:
    module = Experts(swiglu(30.0, 1.702), limit=30.0, alpha=1.702)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert recognise_activation(module, "experts") == Activation(30.0, 1.702)
    finally:
        torch.set_default_dtype(torch.float32)


def _two_sided(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate.clamp(-30, 30)) * up.clamp(-30, 30)


def _clamped_after(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate).clamp(max=3) * up.clamp(-3, 3)


def _gate_alone(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return silu(gate.clamp(max=30)) * up


REFUSED: dict[str, Experts] = {
    **{f"unnamed {x:g}": Experts(swiglu(x)) for x in (20.0, 24.5, 30.0, 1e4, 1e29)},
    **{f"named {x:g}": Experts(swiglu(30.0), limit=x) for x in (29.5, 30.25, 1e4)},
    "gate alone": Experts(_gate_alone, limit=30.0),
    "up and gate swapped": Experts(lambda g, u: swiglu(30.0)(u, g), limit=30.0),
    "gate from below too": Experts(_two_sided, limit=30.0),
    "clamped after silu": Experts(_clamped_after, limit=3.0),
    "another alpha": Experts(swiglu(7.0, 1.7), limit=7.0, alpha=1.702),
    "unnamed alpha": Experts(swiglu(7.0, 1.702), limit=7.0),
    "gelu": Experts(lambda g, u: torch.nn.functional.gelu(g) * u),
    "not the formula of gpt-oss": Experts(lambda g, u: swiglu(0, 1.5)(g, u) + 1, alpha=1.5),
    "alternates, says halves": Experts(swiglu(), alternate=True, claims=True),
    "halves, says alternates": Experts(swiglu(), claims=False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_formulas_and_layouts_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match=r"experts \(Experts\): its activation"):
        experts_spec(REFUSED[name])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layouts_of_families(family: str, device: str) -> None:
    model = build(family).to(device)
    module = model.get_submodule("model.layers.0.mlp.experts")
    assert experts_spec(module).concatenated == (family != "gpt_oss")


def test_halves_with_biases_are_halves() -> None:
    """A transposed family with biases, like gpt-oss, but for its layout."""
    import transformers

    config = transformers.OpenAIPrivacyFilterConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, num_local_experts=4,
        num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.OpenAIPrivacyFilterForTokenClassification(config)
    module = model.get_submodule("model.layers.0.mlp.experts")
    spec = experts_spec(module)
    assert spec.biased and spec.transposed and spec.concatenated
